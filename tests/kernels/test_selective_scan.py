"""The selective scan: the token scan against a float64 loop, and every implementation against the token scan."""

from functools import cache, partial
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh

from kernels import SelectiveScanBlocks, selective_scan, selective_scan_step

pytestmark = pytest.mark.usefixtures("quick_compile")

B, D, G, N = 2, 6, 3, 5
BLOCKS = SelectiveScanBlocks(chunk=4, channels=128, unroll=2)
RUN = {
    "reference": partial(selective_scan, implementation="reference"),
    "chunked": partial(selective_scan, implementation="chunked", blocks=BLOCKS),
    "tpu": partial(selective_scan, implementation="pallas_tpu", blocks=BLOCKS, interpret=True),
}
OTHERS = [name for name in RUN if name != "reference"]
# The interpreter of GPU kernels takes seconds for a call.
RUN_ON_GPU = partial(selective_scan, implementation="pallas_gpu", interpret=plgpu.InterpretGPUParams(detect_races=True))
# What each case adds to u, delta, A, B, C and the options that go with it.
CASES = {
    "plain": ((), {}),
    "full": (("D_D", "z_BLD", "delta_bias_D", "initial_state_BDN"), {"delta_softplus": True}),
    "reverse": (("delta_bias_D", "initial_state_BDN", "segment_ids"), {"reverse": True, "delta_softplus": True}),
    "groups": (("groups", "D_D", "initial_state_BDN"), {}),
}


def segment_ids(L):
    """Boundaries inside chunks and at their edges, a segment of one step, an id that comes back."""
    return np.array([[t // 5 % 2 for t in range(L)], [int(t in (2, 3, 8)) for t in range(L)]], np.int32)


def draw(case: str, L: int, seed: int = 0) -> tuple[dict[str, Any], dict[str, Any], tuple[Any, Any]]:
    """Arguments of a case, exact in float64, and cotangents of the output and the final state."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    names, options = CASES[case]
    grouped = (G,) if "groups" in names else ()
    arguments = {
        "u_BLD": normal(B, L, D),
        "delta_BLD": normal(B, L, D) if options.get("delta_softplus") else np.abs(normal(B, L, D)),
        "A_DN": -np.exp(normal(D, N)),
        "B_BLN": normal(B, L, *grouped, N),
        "C_BLN": normal(B, L, *grouped, N),
        "D_D": normal(D),
        "z_BLD": normal(B, L, D),
        "delta_bias_D": normal(D),
        "initial_state_BDN": normal(B, D, N),
        "segment_ids": segment_ids(L),
    }
    kept = {name: each for name, each in arguments.items() if name in names or name in list(arguments)[:5]}
    return kept, options, (normal(B, L, D), normal(B, D, N))


def loop(arguments, options):
    """The published definition in float64, one channel and one step at a time."""
    given = {name: np.asarray(each, np.float64) for name, each in arguments.items() if name != "segment_ids"}
    u, delta, A, maps_in, maps_out = (given[name] for name in ("u_BLD", "delta_BLD", "A_DN", "B_BLN", "C_BLN"))
    rows, L, channels = u.shape
    if maps_in.ndim == 3:
        maps_in, maps_out = maps_in[:, :, None], maps_out[:, :, None]
    delta = delta + given.get("delta_bias_D", np.zeros(channels))
    if options.get("delta_softplus"):
        delta = np.logaddexp(0, delta)
    final = given.get("initial_state_BDN", np.zeros((rows, channels, A.shape[1]))).copy()
    ids = arguments.get("segment_ids", np.zeros((rows, L), int))
    y = np.zeros_like(u)
    for b in range(rows):
        before = None
        for t in range(L)[:: -1 if options.get("reverse") else 1]:
            if before is not None and ids[b, t] != ids[b, before]:
                final[b] = 0
            for d in range(channels):
                g = d * maps_in.shape[2] // channels
                final[b, d] = (
                    np.exp(delta[b, t, d] * A[d]) * final[b, d] + delta[b, t, d] * u[b, t, d] * maps_in[b, t, g]
                )
                y[b, t, d] = maps_out[b, t, g] @ final[b, d]
            before = t
    y = y + given.get("D_D", np.zeros(channels)) * u
    if "z_BLD" in given:
        y = y * given["z_BLD"] / (1 + np.exp(-given["z_BLD"]))
    return y, final


def split_ids(arguments):
    """Segments apart from the rest, one segment if there are none: fewer programs to compile."""
    floats = {name: each for name, each in arguments.items() if name != "segment_ids"}
    return floats, arguments.get("segment_ids", np.zeros(floats["u_BLD"].shape[:2], np.int32))


@cache
def compiled(implementation, frozen_options):
    """Outputs and gradients, compiled once for an implementation and its options."""

    def compute(arguments, ids, cotangents):
        run = partial(RUN.get(implementation, RUN_ON_GPU), segment_ids=ids, **dict(frozen_options))
        outputs, pull = jax.vjp(lambda arguments: run(**arguments), arguments)
        return outputs, pull(tuple(c.astype(o.dtype) for c, o in zip(cotangents, outputs, strict=True)))[0]

    return jax.jit(compute)


def compute(implementation, arguments, options, cotangents):
    return compiled(implementation, tuple(options.items()))(*split_ids(arguments), cotangents)


def assert_close(found, wanted, tolerance=2e-5):
    """Equal up to a share of the largest entry, leaf by leaf; NaN equals nothing."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (path, mine), theirs in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        theirs = np.asarray(theirs, np.float64)
        error = np.abs(np.asarray(mine, np.float64) - theirs).max()
        assert error <= tolerance * max(1, np.abs(theirs).max()), (jax.tree_util.keystr(path), error)


@pytest.mark.parametrize("L", [1, 13])
@pytest.mark.parametrize("case", CASES)
def test_reference_against_a_float64_loop(case, L):
    arguments, options, cotangents = draw(case, L)
    outputs, gradients = compute("reference", arguments, options, cotangents)
    assert_close(outputs, loop(arguments, options))
    rng = np.random.default_rng(1)
    for name, gradient in gradients.items():
        direction, slope = rng.normal(size=gradient.shape), 0.0
        for sign in (1, -1):
            moved = arguments | {name: arguments[name].astype(np.float64) + sign * 1e-5 * direction}
            slope += sign * sum((o * c).sum() for o, c in zip(loop(moved, options), cotangents, strict=True)) / 2e-5
        assert abs((gradient * direction).sum() - slope) <= 2e-5 * np.abs(gradient * direction).sum(), name


@pytest.mark.parametrize(("case", "L"), [*((case, 13) for case in CASES), ("full", 1)])
@pytest.mark.parametrize("implementation", OTHERS)
def test_values_and_gradients(implementation, case, L):
    drawn = draw(case, L)
    found, wanted = compute(implementation, *drawn), compute("reference", *drawn)
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert mine.dtype == theirs.dtype == jnp.float32
        assert mine.shape == theirs.shape
    assert_close(found, wanted)


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("implementation", OTHERS)
def test_gradients_through_one_output_alone(implementation, part):
    arguments, options, cotangents = draw("reverse", 13)
    cotangents = tuple(c if i == part else np.zeros_like(c) for i, c in enumerate(cotangents))
    _, gradients = compute(implementation, arguments, options, cotangents)
    assert_close(gradients, compute("reference", arguments, options, cotangents)[1])
    assert all(np.abs(gradients[name]).max() > 0.1 for name in ("u_BLD", "delta_BLD", "B_BLN"))


@pytest.mark.parametrize("implementation", RUN)
def test_decays_of_nothing_and_of_everything(implementation):
    """delta A of 0, -1e-3, -1, -80 and -200 in turn, mixed over channels and states."""
    arguments, options, cotangents = draw("reverse", 13)
    arguments["delta_BLD"] = np.random.default_rng(2).choice(np.array([0, 1e-3, 1], np.float32), (B, 13, D))
    options = {"reverse": True}
    del arguments["delta_bias_D"]
    arguments["A_DN"] = np.random.default_rng(3).choice(np.array([0, -1, -80, -200], np.float32), (D, N))
    outputs, gradients = compute(implementation, arguments, options, cotangents)
    assert_close(outputs, loop(arguments, options))
    assert_close(gradients, compute("reference", arguments, options, cotangents)[1])


@pytest.mark.parametrize("implementation", RUN)
def test_segments_equal_separate_runs(implementation):
    arguments, options, cotangents = draw("full", 13)
    ids = np.repeat(np.array([[7, 2, 7]], np.int32), [4, 1, 8], axis=1).repeat(B, axis=0)
    (y, final), gradients = compute(implementation, arguments | {"segment_ids": ids}, options, cotangents)
    last = None
    for low, high in ((0, 4), (4, 5), (5, 13)):
        alone = {n: each[:, low:high] if "BL" in n else each for n, each in arguments.items()}
        if low:
            alone["initial_state_BDN"] = np.zeros_like(arguments["initial_state_BDN"])
        weights = (cotangents[0][:, low:high], cotangents[1] * (high == 13))
        (wanted, last), slopes = compute("reference", alone, options, weights)
        assert_close(y[:, low:high], wanted)
        assert_close(
            {n: g[:, low:high] for n, g in gradients.items() if "BL" in n},
            {n: g for n, g in slopes.items() if "BL" in n},
        )
        if low == 0:
            assert_close(gradients["initial_state_BDN"], slopes["initial_state_BDN"])
    assert_close(final, last)


@pytest.mark.parametrize("implementation", RUN)
def test_nothing_crosses_a_boundary(implementation):
    """Exactly, also into a chunk that starts with a segment: not even a NaN passes."""
    arguments, options, _ = draw("full", 13)
    ids = np.repeat([[0, 1]], [8, 5], axis=1).repeat(B, axis=0).astype(np.int32)
    arguments["segment_ids"] = ids
    late = (np.zeros((B, 13, D), np.float32), np.ones((B, D, N), np.float32))
    late[0][:, 8:] = 1
    (y, final), gradients = compute(implementation, arguments, options, late)
    for name, gradient in gradients.items():
        if "BL" in name:
            assert not np.any(gradient[:, :8]), name
            assert np.all(np.isfinite(gradient)), name
    assert not np.any(gradients["initial_state_BDN"])
    poisoned = arguments | {"u_BLD": arguments["u_BLD"].copy()}
    poisoned["u_BLD"][:, 3] = np.nan
    (y_poisoned, final_poisoned), _ = compute(implementation, poisoned, options, late)
    np.testing.assert_array_equal(y_poisoned[:, 8:], y[:, 8:])
    np.testing.assert_array_equal(final_poisoned, final)


@pytest.mark.parametrize("implementation", RUN)
def test_reverse_is_the_flipped_run(implementation):
    arguments, options, cotangents = draw("reverse", 13)
    flipped = {n: each[:, ::-1] if "BL" in n or n == "segment_ids" else each for n, each in arguments.items()}
    (y, final), gradients = compute(implementation, arguments, options, cotangents)
    turned = compute(implementation, flipped, options | {"reverse": False}, (cotangents[0][:, ::-1], cotangents[1]))
    (wanted, last), slopes = turned
    assert_close((y, final), (wanted[:, ::-1], last), 1e-6)
    assert_close(gradients, {n: g[:, ::-1] if "BL" in n else g for n, g in slopes.items()}, 1e-6)


@pytest.mark.parametrize("implementation", RUN)
def test_a_carried_state_continues_a_run(implementation):
    arguments, options, cotangents = draw("full", 13)
    (y, final), _ = compute(implementation, arguments, options, cotangents)
    state = None
    for low, high in ((0, 5), (5, 13)):
        part = {n: each[:, low:high] if "BL" in n else each for n, each in arguments.items()}
        (part_y, state), _ = compute(implementation, part, options, (cotangents[0][:, low:high], cotangents[1]))
        assert_close(part_y, y[:, low:high], 1e-6)
        arguments["initial_state_BDN"] = np.asarray(state)
    assert_close(state, final, 1e-6)


@pytest.mark.parametrize("case", ["full", "groups"])
def test_steps_equal_the_scan(case):
    arguments, options, _ = draw(case, 5)
    step = jax.jit(partial(selective_scan_step, **options))
    state = arguments.pop("initial_state_BDN")
    (y, final), _ = compute("reference", arguments | {"initial_state_BDN": state}, options, draw(case, 5)[2])
    for t in range(5):
        token = {n.replace("BL", "B"): each[:, t] if "BL" in n else each for n, each in arguments.items()}
        y_BD, state = step(state, **token)
        assert_close(y_BD, y[:, t], 1e-6)
    assert_close(state, final, 1e-6)


@pytest.mark.parametrize(
    ("implementation", "dtype"), [*((name, jnp.bfloat16) for name in RUN), ("chunked", jnp.float16)]
)
def test_narrow_inputs_are_computed_in_float32(implementation, dtype):
    arguments, options, cotangents = draw("full", 13)
    narrow = {n: jnp.asarray(each, dtype) for n, each in arguments.items()}
    (y, final), gradients = compute(implementation, narrow, options, cotangents)
    wide = {n: np.asarray(each, np.float32) for n, each in narrow.items()}
    rounded = (np.asarray(jnp.asarray(cotangents[0], dtype), np.float32), cotangents[1])
    (y_wide, _), slopes = compute("reference", wide, options, rounded)
    assert y.dtype == dtype
    assert final.dtype == jnp.float32
    assert_close(final, loop(wide, options)[1])
    digit = float(jnp.finfo(dtype).eps)
    # Exact but for the last rounding, of the output and of each gradient.
    np.testing.assert_allclose(np.asarray(y, np.float32), y_wide, rtol=digit, atol=digit / 100)
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        np.testing.assert_allclose(np.asarray(gradient, np.float32), slopes[name], rtol=digit, atol=digit / 100)


@pytest.mark.parametrize("implementation", OTHERS)
def test_vmap_and_remat_change_nothing(implementation):
    many = [draw("full", 5, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *each: np.stack(each), *(arguments for arguments, _, _ in many))
    run = partial(RUN[implementation], **many[0][1])

    def slope(arguments, c_y, c_final):
        def loss(arguments):
            y, final = jax.checkpoint(lambda arguments: run(**arguments))(arguments)
            return (y * c_y).sum() + (final * c_final).sum()

        return jax.grad(loss)(arguments)

    gradients = jax.jit(jax.vmap(slope))(stacked, *(np.stack(c) for c in zip(*(c for _, _, c in many), strict=True)))
    for i, drawn in enumerate(many):
        assert_close(jax.tree.map(lambda g, i=i: g[i], gradients), compute("reference", *drawn)[1])


def test_second_derivatives():
    arguments, options, _ = draw("full", 5)

    def curvature(implementation):
        def slope(arguments):
            inner = jax.grad(lambda each: (RUN[implementation](**each, **options)[0] ** 2).sum())(arguments)
            return sum((jnp.tanh(each) ** 2).sum() for each in inner.values())

        return jax.jit(jax.grad(slope))(arguments)

    assert_close(curvature("chunked"), curvature("reference"), 1e-4)


def test_float64_where_enabled():
    with jax.enable_x64(True):
        arguments, options, cotangents = draw("reverse", 13)
        wide = {n: each if n == "segment_ids" else each.astype(np.float64) for n, each in arguments.items()}
        (y, final), gradients = compute("chunked", wide, options, cotangents)
        assert y.dtype == final.dtype == jnp.float64
        assert_close((y, final), loop(wide, options), 1e-13)
        assert_close(gradients, compute("reference", wide, options, cotangents)[1], 1e-13)


def test_memory_is_linear_in_length_and_far_below_all_states():
    def temporary(L):
        shapes = {
            "u_BLD": (1, L, 64),
            "delta_BLD": (1, L, 64),
            "A_DN": (64, 16),
            "B_BLN": (1, L, 16),
            "C_BLN": (1, L, 16),
        }
        arguments = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
        run = partial(selective_scan, implementation="chunked", blocks=SelectiveScanBlocks(chunk=32))
        slope = jax.jit(jax.grad(lambda each: (run(**each)[0] ** 2).sum()))
        analysis = slope.lower(arguments).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    short, long = temporary(1024), temporary(4096)
    assert long < 4.2 * short
    assert long < 4096 * 64 * 16 * 4 / 2


@cache
def forward(chunk):
    blocks = SelectiveScanBlocks(chunk=chunk, unroll=1)
    run = partial(selective_scan, implementation="chunked", blocks=blocks)
    return jax.jit(run, static_argnames=("reverse", "delta_softplus"))


@settings(max_examples=10)
@given(
    L=st.sampled_from([3, 11]),
    chunk=st.sampled_from([1, 5]),
    reverse=st.booleans(),
    cuts=st.sets(st.integers(1, 10)),
    seed=st.integers(0, 99),
)
def test_any_length_chunk_and_segments(L, chunk, reverse, cuts, seed):
    arguments, _, _ = draw("reverse", L, seed)
    arguments["segment_ids"] = np.cumsum([[t in cuts for t in range(L)]] * B, axis=1).astype(np.int32)
    options = {"reverse": reverse, "delta_softplus": True}
    outputs = forward(chunk)(**arguments, **options)
    assert_close(outputs, loop(arguments, options))


def kernel_shapes(dtype, N=16):
    """More than one block of channels, and a last chunk that is not whole."""
    shapes = {"u_BLD": (2, 150, 600), "delta_BLD": (2, 150, 600), "A_DN": (600, N), "B_BLN": (2, 150, N)}
    shapes |= {"C_BLN": (2, 150, N), "initial_state_BDN": (2, 600, N)}
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}


def lower(run, arguments, platform):
    """Text of forward and backward pass, lowered for a platform that need not be here."""

    def slopes(arguments):
        return jax.value_and_grad(lambda arguments: sum((each**2).sum() for each in run(**arguments)))(arguments)

    return jax.jit(slopes).trace(arguments).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("chunk", [4, 64])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_tpu_kernels_lower(chunk, dtype):
    run = partial(selective_scan, implementation="pallas_tpu", blocks=SelectiveScanBlocks(chunk=chunk))
    text = lower(run, kernel_shapes(dtype), "tpu")
    assert "selective_scan_forward" in text
    assert "selective_scan_backward" in text


def test_tpu_kernels_in_the_tpu_interpreter():
    """With uninitialised memory full of NaN and a watch for races."""
    arguments, options, cotangents = draw("reverse", 3)
    interpret = pltpu.InterpretParams(detect_races=True)
    blocks = SelectiveScanBlocks(chunk=2)
    run = partial(selective_scan, implementation="pallas_tpu", blocks=blocks, interpret=interpret, **options)
    floats, ids = split_ids(arguments)
    outputs, pull = jax.vjp(jax.jit(lambda floats: run(**floats, segment_ids=ids)), floats)
    found = outputs, pull(tuple(jnp.asarray(c) for c in cotangents))[0]
    assert_close(found, compute("reference", arguments, options, cotangents))


@pytest.mark.parametrize(("case", "L"), [("reverse", 13), ("groups", 1)])
def test_gpu_kernels_in_the_gpu_interpreter(case, L):
    """With a watch for races: value and gradient, chunks that are not whole, one that follows another, any decay."""
    arguments, options, cotangents = draw(case, L)
    some = np.random.default_rng(3).choice(np.array([0, -1, -80, -200], np.float32), (D, N))
    arguments["A_DN"] = np.where(np.arange(N) % 2, arguments["A_DN"], some)
    arguments, cotangents = jax.tree.map(
        lambda each: each[1:] if each.shape[:1] == (B,) else each, (arguments, cotangents)
    )
    found, wanted = (compute(name, arguments, options, cotangents) for name in ("gpu", "reference"))
    assert_close(found, wanted)


H200 = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")


@pytest.mark.parametrize("mapped", [False, True])
def test_gpu_kernels_lower(mapped):
    """Also under vmap and remat, which their interpreter does not do."""
    run = partial(selective_scan, implementation="pallas_gpu")
    arguments = kernel_shapes(jnp.bfloat16 if mapped else jnp.float32, N=5)
    if mapped:
        arguments = {n: jax.ShapeDtypeStruct((3, *each.shape), each.dtype) for n, each in arguments.items()}
        plain = jax.checkpoint(run)
        run = jax.vmap(plain)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=H200)):
        text = lower(run, arguments, "cuda")
    assert "selective_scan_forward" in text
    assert "selective_scan_backward" in text


def test_too_many_states_for_the_gpu():
    arguments = arrays(A_DN=-np.ones((4, 49)), B_BLN=np.ones((2, 3, 49)), C_BLN=np.ones((2, 3, 49)))
    with pytest.raises(NotImplementedError, match=r"selective_scan: .*'pallas_gpu'.* 49 states, more than 48"):
        selective_scan(**arguments, implementation="pallas_gpu")


@pytest.mark.parametrize("implementation", [*OTHERS, "gpu"])
def test_values_without_gradients(implementation):
    """Kernels then keep no states."""
    arguments, options, cotangents = draw("full", 3)
    floats, ids = split_ids(arguments)
    run = jax.jit(partial(RUN.get(implementation, RUN_ON_GPU), **options))
    outputs = run(**floats, segment_ids=ids)
    assert_close(outputs, compute("reference", arguments, options, cotangents)[0])


@pytest.mark.parametrize(("implementation", "platform"), [("pallas_tpu", "tpu"), ("pallas_gpu", "cuda")])
def test_kernels_lower_without_gradients(implementation, platform):
    run = partial(selective_scan, implementation=implementation)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=H200)):
        traced = jax.jit(run).trace(**kernel_shapes(jnp.float32, N=5))
        assert "selective_scan_forward" in traced.lower(lowering_platforms=(platform,)).as_text()


def test_kernels_refuse_float64():
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match=r"selective_scan: .*'pallas_tpu'.* float64"):
        selective_scan(**arrays(), implementation="pallas_tpu", interpret=True)


def arrays(**change) -> dict[str, Any]:
    """Small arguments that are right, but for `change`."""
    shapes = {"u_BLD": (2, 3, 4), "delta_BLD": (2, 3, 4), "A_DN": (4, 5), "B_BLN": (2, 3, 5), "C_BLN": (2, 3, 5)}
    return {name: np.ones(shape, np.float32) for name, shape in shapes.items()} | {"A_DN": -np.ones((4, 5))} | change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"u_BLD": np.ones((3, 4))}, r"u has shape \(3, 4\), expected \(B, L, D\)"),
        ({"u_BLD": np.ones((2, 0, 4))}, "u has length 0"),
        ({"u_BLD": np.ones((2, 3, 4), int)}, "u has dtype int64, expected a real"),
        ({"A_DN": np.ones((4, 5), np.complex64)}, "A has dtype complex64, expected a real"),
        ({"A_DN": np.ones(4)}, r"A has shape \(4,\), expected \(D, N\)"),
        ({"delta_BLD": np.ones((2, 3, 5))}, r"delta has shape \(2, 3, 5\), expected \(B, L, D\) = \(2, 3, 4\)"),
        ({"B_BLN": np.ones((2, 3, 3, 5))}, "B has 3 groups, expected a divisor of D = 4"),
        ({"C_BLN": np.ones((2, 3, 1, 5))}, r"C has shape \(2, 3, 1, 5\), expected \(B, L, N\) = \(2, 3, 5\)"),
        ({"A_DN": np.full((4, 5), 0.5)}, "A has a positive entry, 0.5, expected none above 0"),
        ({"D_D": np.ones(5)}, r"D has shape \(5,\)"),
        ({"z_BLD": np.ones((2, 3, 1))}, r"z has shape \(2, 3, 1\)"),
        ({"delta_bias_D": np.ones((1, 4))}, r"delta_bias has shape \(1, 4\)"),
        ({"initial_state_BDN": np.ones((2, 5, 4))}, r"initial_state has shape \(2, 5, 4\)"),
        ({"segment_ids": np.ones((3, 2), int)}, r"segment_ids has shape \(3, 2\), expected \(B, L\) = \(2, 3\)"),
        ({"segment_ids": np.ones((2, 3))}, "segment_ids has dtype float64, expected integers"),
        ({"implementation": "best"}, "implementation is 'best', expected one of"),
    ],
)
def test_what_does_not_agree_is_refused(change, words):
    with pytest.raises(ValueError, match=f"selective_scan: {words}"):
        selective_scan(**arrays(**change))


@pytest.mark.parametrize("sizes", [{"chunk": 0}, {"channels": -1}, {"unroll": 0}])
def test_block_sizes_are_positive(sizes):
    with pytest.raises(ValueError, match="SelectiveScanBlocks: sizes must be positive"):
        SelectiveScanBlocks(**sizes)

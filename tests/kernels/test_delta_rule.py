"""The delta rule: the token scan against a float64 loop, and every implementation against the token scan."""

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

from kernels import DeltaRuleBlocks, delta_rule, delta_rule_step

pytestmark = pytest.mark.usefixtures("quick_compile")

B, H, K, V = 2, 3, 5, 7
BLOCKS = DeltaRuleBlocks(chunk=4)
RUN = {
    "reference": partial(delta_rule, implementation="reference"),
    "chunked": partial(delta_rule, implementation="chunked", blocks=BLOCKS),
    "tpu": partial(delta_rule, implementation="pallas_tpu", blocks=BLOCKS, interpret=True),
}
OTHERS = [name for name in RUN if name != "reference"]
# The interpreter of GPU kernels takes seconds for a call.
RUN_ON_GPU = partial(delta_rule, implementation="pallas_gpu", interpret=plgpu.InterpretGPUParams(detect_races=True))
# What each case adds to q, k, v, beta and the options that go with it.
CASES = {
    "plain": ((), {}),
    "full": (("log_decay_BLH", "initial_state_BHKV"), {"scale": 0.5}),
    "reverse": (("log_decay_BLH", "initial_state_BHKV", "segment_ids"), {"reverse": True}),
    "queries": (("queries", "log_decay_BLH", "segment_ids"), {}),
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
    heads = H * (2 if "queries" in names else 1)
    k = normal(B, L, H, K)
    arguments = {
        "q_BLHK": normal(B, L, heads, K),
        "k_BLHK": k / np.linalg.norm(k, axis=-1, keepdims=True),
        "v_BLHV": normal(B, L, H, V),
        "beta_BLH": rng.uniform(0, 2, (B, L, H)).astype(np.float32),
        "log_decay_BLH": -np.abs(normal(B, L, H)),
        "initial_state_BHKV": normal(B, H, K, V),
        "segment_ids": segment_ids(L),
    }
    kept = {name: each for name, each in arguments.items() if name in names or name in list(arguments)[:4]}
    return kept, options, (normal(B, L, heads, V), normal(B, H, K, V))


def loop(arguments, options):
    """The definition in float64, with the transition matrix written out, one head and one step at a time."""
    given = {name: np.asarray(each, np.float64) for name, each in arguments.items() if name != "segment_ids"}
    q, k, v, beta = (given[name] for name in ("q_BLHK", "k_BLHK", "v_BLHV", "beta_BLH"))
    rows, L, heads, width = k.shape
    repeats = q.shape[2] // heads
    decay = np.exp(given.get("log_decay_BLH", np.zeros(beta.shape)))
    S = given.get("initial_state_BHKV", np.zeros((rows, heads, width, v.shape[3]))).copy()
    ids = arguments.get("segment_ids", np.zeros((rows, L), int))
    o = np.zeros((*q.shape[:3], v.shape[3]))
    for b in range(rows):
        before = None
        for t in range(L)[:: -1 if options.get("reverse") else 1]:
            if before is not None and ids[b, t] != ids[b, before]:
                S[b] = 0
            for h in range(heads):
                key = k[b, t, h]
                turn = decay[b, t, h] * (np.eye(width) - beta[b, t, h] * np.outer(key, key))
                S[b, h] = turn @ S[b, h] + beta[b, t, h] * np.outer(key, v[b, t, h])
                for r in range(h * repeats, (h + 1) * repeats):
                    o[b, t, r] = options.get("scale", 1) * q[b, t, r] @ S[b, h]
            before = t
    return o, S


@cache
def compiled(implementation, frozen_options):
    """Outputs and gradients, compiled once for an implementation and its options."""

    def compute(arguments, ids, cotangents):
        run = partial(RUN.get(implementation, RUN_ON_GPU), segment_ids=ids, **dict(frozen_options))
        outputs, pull = jax.vjp(lambda arguments: run(**arguments), arguments)
        return outputs, pull(tuple(c.astype(o.dtype) for c, o in zip(cotangents, outputs, strict=True)))[0]

    return jax.jit(compute)


def compute(implementation, arguments, options, cotangents):
    """With one segment if none are given: fewer programs to compile."""
    ids = arguments.get("segment_ids", np.zeros(arguments["k_BLHK"].shape[:2], np.int32))
    floats = {name: each for name, each in arguments.items() if name != "segment_ids"}
    return compiled(implementation, tuple(options.items()))(floats, ids, cotangents)


def assert_close(found, wanted, tolerance=2e-5):
    """Equal up to a share of the largest entry, leaf by leaf; NaN equals nothing."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (path, mine), theirs in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        theirs = np.asarray(theirs, np.float64)
        error = np.abs(np.asarray(mine, np.float64) - theirs).max()
        assert error <= tolerance * max(1, np.abs(theirs).max()), (jax.tree_util.keystr(path), error)


def cut(arguments, low, high):
    return {n: each[:, low:high] if "BL" in n or n == "segment_ids" else each for n, each in arguments.items()}


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
    assert all(np.abs(gradients[name]).max() > 0.1 for name in ("k_BLHK", "v_BLHV", "beta_BLH", "log_decay_BLH"))


@pytest.mark.parametrize("implementation", RUN)
def test_decays_of_nothing_and_of_everything(implementation):
    arguments, options, cotangents = draw("full", 13)
    strengths = np.array([0, -1e-3, -1, -80, -200, -np.inf], np.float32)
    arguments["log_decay_BLH"] = np.random.default_rng(2).choice(strengths, (B, 13, H))
    outputs, gradients = compute(implementation, arguments, options, cotangents)
    assert_close(outputs, loop(arguments, options))
    assert_close(gradients, compute("reference", arguments, options, cotangents)[1])


@pytest.mark.parametrize("implementation", RUN)
def test_weak_decays_after_strong_ones_keep_their_digits(implementation):
    """Differences of cumulative sums near -6,000 would be wrong by 2e-4."""
    arguments, options, cotangents = draw("full", 13)
    arguments["log_decay_BLH"][:, :8] = -700.1
    arguments["log_decay_BLH"][:, 8:] = -0.01
    (o, final), _ = compute(implementation, arguments, options, cotangents)
    wanted, last = loop(arguments, options)
    assert_close((o, final), (wanted, last), 2e-6)


@pytest.mark.parametrize("implementation", RUN)
def test_segments_equal_separate_runs(implementation):
    arguments, options, cotangents = draw("full", 13)
    ids = np.repeat(np.array([[7, 2, 7]], np.int32), [4, 1, 8], axis=1).repeat(B, axis=0)
    (o, final), gradients = compute(implementation, arguments | {"segment_ids": ids}, options, cotangents)
    last = None
    for low, high in ((0, 4), (4, 5), (5, 13)):
        alone = cut(arguments, low, high)
        if low:
            alone["initial_state_BHKV"] = np.zeros_like(arguments["initial_state_BHKV"])
        weights = (cotangents[0][:, low:high], cotangents[1] * (high == 13))
        (wanted, last), slopes = compute("reference", alone, options, weights)
        assert_close(o[:, low:high], wanted)
        if low:
            del slopes["initial_state_BHKV"]
        assert_close({name: cut(gradients, low, high)[name] for name in slopes}, slopes)
    assert_close(final, last)


@pytest.mark.parametrize("implementation", RUN)
def test_no_gradient_crosses_a_boundary(implementation):
    """Exactly none, with the boundary at the edge of a chunk and inside one."""
    arguments, options, _ = draw("full", 13)
    for edge in (8, 9):
        ids = np.repeat([[0, 1]], [edge, 13 - edge], axis=1).repeat(B, axis=0).astype(np.int32)
        late = (np.zeros((B, 13, H, V), np.float32), np.ones((B, H, K, V), np.float32))
        late[0][:, edge:] = 1
        _, gradients = compute(implementation, arguments | {"segment_ids": ids}, options, late)
        for name, gradient in gradients.items():
            assert not np.any(gradient if name == "initial_state_BHKV" else gradient[:, :edge]), name
            assert np.all(np.isfinite(gradient)), name


@pytest.mark.parametrize("implementation", RUN)
def test_reverse_is_the_flipped_run(implementation):
    arguments, options, cotangents = draw("reverse", 13)
    flipped = {n: each[:, ::-1] if "BL" in n or n == "segment_ids" else each for n, each in arguments.items()}
    outputs, gradients = compute(implementation, arguments, options, cotangents)
    turned = compute(implementation, flipped, options | {"reverse": False}, (cotangents[0][:, ::-1], cotangents[1]))
    (wanted, last), slopes = turned
    assert_close(outputs, (wanted[:, ::-1], last), 1e-6)
    assert_close(gradients, {n: g[:, ::-1] if "BL" in n else g for n, g in slopes.items()}, 1e-6)


@pytest.mark.parametrize("implementation", RUN)
def test_a_carried_state_continues_a_run(implementation):
    arguments, options, cotangents = draw("full", 13)
    (o, final), _ = compute(implementation, arguments, options, cotangents)
    state = None
    for low, high in ((0, 5), (5, 13)):
        weights = (cotangents[0][:, low:high], cotangents[1])
        (part, state), _ = compute(implementation, cut(arguments, low, high), options, weights)
        assert_close(part, o[:, low:high], 2e-6)
        arguments["initial_state_BHKV"] = np.asarray(state)
    assert_close(state, final, 2e-6)


@pytest.mark.parametrize("case", ["plain", "full", "queries"])
def test_steps_equal_the_scan(case):
    arguments, options, cotangents = draw(case, 5)
    arguments.pop("segment_ids", None)
    (o, final), _ = compute("reference", arguments, options, cotangents)
    step = jax.jit(partial(delta_rule_step, **options))
    state = arguments.pop("initial_state_BHKV", np.zeros((B, H, K, V), np.float32))
    for t in range(5):
        o_BHV, state = step(state, **{n.replace("BL", "B"): each[:, t] for n, each in arguments.items()})
        assert_close(o_BHV, o[:, t], 1e-6)
    assert_close(state, final, 1e-6)


@pytest.mark.parametrize(
    ("implementation", "dtype"), [*((name, jnp.bfloat16) for name in RUN), ("chunked", jnp.float16)]
)
def test_narrow_inputs_are_computed_in_float32(implementation, dtype):
    arguments, options, cotangents = draw("full", 13)
    narrow = {n: jnp.asarray(each, dtype) for n, each in arguments.items()}
    (o, final), gradients = compute(implementation, narrow, options, cotangents)
    wide = {n: np.asarray(each, np.float32) for n, each in narrow.items()}
    rounded = (np.asarray(jnp.asarray(cotangents[0], dtype), np.float32), cotangents[1])
    (o_wide, _), slopes = compute("reference", wide, options, rounded)
    assert o.dtype == dtype
    assert final.dtype == jnp.float32
    assert_close(final, loop(wide, options)[1])
    digit = float(jnp.finfo(dtype).eps)
    # Exact but for the last rounding, of the output and of each gradient.
    np.testing.assert_allclose(np.asarray(o, np.float32), o_wide, rtol=digit, atol=digit / 10)
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        np.testing.assert_allclose(np.asarray(gradient, np.float32), slopes[name], rtol=digit, atol=digit / 10)


@pytest.mark.parametrize("implementation", OTHERS)
def test_vmap_and_remat_change_nothing(implementation):
    many = [draw("full", 5, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *each: np.stack(each), *(arguments for arguments, _, _ in many))
    run = partial(RUN[implementation], **many[0][1])

    def slope(arguments, c_o, c_final):
        def loss(arguments):
            o, final = jax.checkpoint(lambda arguments: run(**arguments))(arguments)
            return (o * c_o).sum() + (final * c_final).sum()

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
        outputs, gradients = compute("chunked", wide, options, cotangents)
        assert all(each.dtype == jnp.float64 for each in outputs)
        assert_close(outputs, loop(wide, options), 1e-13)
        assert_close(gradients, compute("reference", wide, options, cotangents)[1], 1e-13)


def test_orthogonal_keys_store_and_replace_values():
    """With unit keys and beta = 1 a state is a table: writing a key again replaces its value, and nothing else."""
    v = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 1, V)), jnp.float32)
    written = [0, 1, 2, 1, 0, 4]
    k = jnp.eye(K)[jnp.array(written)][None, :, None]
    _, final = delta_rule(k, k, v, jnp.ones((1, 6, 1)), implementation="chunked", blocks=BLOCKS)
    wanted = np.zeros((K, V), np.float32)
    for step, row in enumerate(written):
        wanted[row] = v[0, step, 0]
    np.testing.assert_allclose(final[0, 0], wanted, atol=1e-6)


def test_memory_is_linear_in_length_and_far_below_all_states():
    def temporary(L):
        shapes = {"q_BLHK": (1, L, 2, 32), "k_BLHK": (1, L, 2, 32), "v_BLHV": (1, L, 2, 32), "beta_BLH": (1, L, 2)}
        arguments = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
        arguments["log_decay_BLH"] = arguments["beta_BLH"]
        run = partial(delta_rule, implementation="chunked", blocks=DeltaRuleBlocks(chunk=32))
        slope = jax.jit(jax.grad(lambda each: (run(**each)[0] ** 2).sum()))
        analysis = slope.lower(arguments).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    short, long = temporary(512), temporary(2048)
    assert long < 4.2 * short
    assert long < 2048 * 2 * 32 * 32 * 4 / 2


@cache
def forward(chunk):
    run = partial(delta_rule, implementation="chunked", blocks=DeltaRuleBlocks(chunk=chunk))
    return jax.jit(run, static_argnames=("reverse", "scale"))


@settings(max_examples=10)
@given(
    L=st.sampled_from([3, 11]),
    chunk=st.sampled_from([1, 8]),
    reverse=st.booleans(),
    cuts=st.sets(st.integers(1, 10)),
    seed=st.integers(0, 99),
)
def test_any_length_chunk_and_segments(L, chunk, reverse, cuts, seed):
    arguments, _, _ = draw("queries", L, seed)
    arguments["segment_ids"] = np.cumsum([[t in cuts for t in range(L)]] * B, axis=1).astype(np.int32)
    outputs = forward(chunk)(**arguments, reverse=reverse)
    assert_close(outputs, loop(arguments, {"reverse": reverse}))


def kernel_shapes(dtype, gate):
    L, H, R, K, V = 150, 2, 2, 48, 80
    shapes = {"q_BLHK": (1, L, R * H, K), "k_BLHK": (1, L, H, K), "v_BLHV": (1, L, H, V), "beta_BLH": (1, L, H)}
    shapes |= {"log_decay_BLH": (1, L, H)} if gate else {}
    shapes |= {"initial_state_BHKV": (1, H, K, V)}
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}


def lower(run, arguments, platform):
    """Text of forward and backward pass, lowered for a platform that need not be here."""

    def slopes(arguments):
        return jax.value_and_grad(lambda arguments: sum((each**2).sum() for each in run(**arguments)))(arguments)

    return jax.jit(slopes).trace(arguments).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_tpu_kernels_lower(gate, dtype):
    text = lower(partial(delta_rule, implementation="pallas_tpu"), kernel_shapes(dtype, gate), "tpu")
    assert "delta_rule_forward" in text
    assert "delta_rule_backward" in text


def test_tpu_kernels_in_the_tpu_interpreter():
    """With uninitialised memory full of NaN and a watch for races."""
    arguments, options, cotangents = draw("full", 3)
    interpret = pltpu.InterpretParams(detect_races=True)
    blocks = DeltaRuleBlocks(chunk=2)
    run = partial(delta_rule, implementation="pallas_tpu", blocks=blocks, interpret=interpret, **options)
    outputs, pull = jax.vjp(jax.jit(lambda arguments: run(**arguments)), arguments)
    found = outputs, pull(tuple(jnp.asarray(c) for c in cotangents))[0]
    assert_close(found, compute("reference", arguments, options, cotangents))


@pytest.mark.parametrize(("case", "L"), [("reverse", 19), ("queries", 1)])
def test_gpu_kernels_in_the_gpu_interpreter(case, L):
    """With a watch for races: value and gradient, chunks that are not whole, one that follows another, any decay."""
    arguments, options, cotangents = draw(case, L)
    some = np.random.default_rng(2).choice(np.array([0, -1e-3, -80, -200, -np.inf], np.float32), (B, L, H))
    arguments["log_decay_BLH"] = np.where(np.arange(L)[:, None] % 2, arguments["log_decay_BLH"], some)
    arguments, cotangents = jax.tree.map(lambda each: each[1:], (arguments, cotangents))
    found, wanted = (compute(name, arguments, options, cotangents) for name in ("gpu", "reference"))
    assert_close(found, wanted)


H200 = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")


@pytest.mark.parametrize("mapped", [False, True])
def test_gpu_kernels_lower(mapped):
    """Also under vmap and remat, which their interpreter does not do."""
    run = partial(delta_rule, implementation="pallas_gpu")
    arguments = kernel_shapes(jnp.bfloat16 if mapped else jnp.float32, gate=mapped)
    if mapped:
        arguments = {n: jax.ShapeDtypeStruct((3, *each.shape), each.dtype) for n, each in arguments.items()}
        run = jax.vmap(jax.checkpoint(run))
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=H200)):
        text = lower(run, arguments, "cuda")
    assert "delta_rule_forward" in text
    assert "delta_rule_backward" in text


@pytest.mark.parametrize(("heads", "K", "words"), [(1, 257, "257 numbers"), (8, 256, "8 queries .* 256 need")])
def test_what_the_gpu_has_no_room_for(heads, K, words):
    q, k, v, beta = (jnp.ones(shape) for shape in ((1, 2, heads, K), (1, 2, 1, K), (1, 2, 1, 8), (1, 2, 1)))
    with pytest.raises(NotImplementedError, match=f"delta_rule: .*'pallas_gpu'.* {words}"):
        delta_rule(q, k, v, beta, implementation="pallas_gpu")


@pytest.mark.parametrize("implementation", [*OTHERS, "gpu"])
def test_values_without_gradients(implementation):
    """Kernels then keep no states."""
    arguments, options, cotangents = draw("full", 3)
    run = jax.jit(partial(RUN.get(implementation, RUN_ON_GPU), **options))
    outputs = run(**arguments)
    assert_close(outputs, compute("reference", arguments, options, cotangents)[0])


@pytest.mark.parametrize(("implementation", "platform"), [("pallas_tpu", "tpu"), ("pallas_gpu", "cuda")])
def test_kernels_lower_without_gradients(implementation, platform):
    run = partial(delta_rule, implementation=implementation)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=H200)):
        traced = jax.jit(run).trace(**kernel_shapes(jnp.float32, gate=True))
        assert "delta_rule_forward" in traced.lower(lowering_platforms=(platform,)).as_text()


def test_kernels_refuse_float64():
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match=r"delta_rule: .*'pallas_tpu'.* float64"):
        delta_rule(**{n: each.astype(np.float64) for n, each in arrays().items()}, implementation="pallas_tpu")


def arrays(**change) -> dict[str, Any]:
    """Small arguments that are right, but for `change`."""
    shapes = {"q_BLHK": (2, 3, 4, 5), "k_BLHK": (2, 3, 4, 5), "v_BLHV": (2, 3, 4, 7), "beta_BLH": (2, 3, 4)}
    return {name: np.ones(shape, np.float32) for name, shape in shapes.items()} | change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k_BLHK": np.ones((3, 4, 5))}, r"k has shape \(3, 4, 5\), expected \(B, L, H, K\)"),
        ({"k_BLHK": np.ones((2, 0, 4, 5))}, "k has length 0"),
        ({"q_BLHK": np.ones((2, 3, 6, 5))}, "q has 6 heads, expected a multiple of those of k, H = 4"),
        ({"q_BLHK": np.ones((2, 3, 4, 7))}, r"q has shape \(2, 3, 4, 7\), expected \(B, L, R H, K\) = \(2, 3, 4, 5\)"),
        ({"k_BLHK": np.ones((2, 3, 4, 5), int)}, "k has dtype int64, expected a real"),
        ({"v_BLHV": np.ones((2, 3, 1, 7))}, r"v has shape \(2, 3, 1, 7\)"),
        ({"beta_BLH": np.ones((2, 3, 1))}, r"beta has shape \(2, 3, 1\), expected \(B, L, H\) = \(2, 3, 4\)"),
        ({"log_decay_BLH": np.ones((2, 3, 4, 5))}, r"log_decay has shape \(2, 3, 4, 5\)"),
        ({"log_decay_BLH": np.full((2, 3, 4), 0.5)}, "log_decay has a positive entry, 0.5, expected none above 0"),
        ({"initial_state_BHKV": np.ones((2, 4, 7, 5))}, r"initial_state has shape \(2, 4, 7, 5\)"),
        ({"segment_ids": np.ones((3, 2), int)}, r"segment_ids has shape \(3, 2\), expected \(B, L\) = \(2, 3\)"),
        ({"segment_ids": np.ones((2, 3))}, "segment_ids has dtype float64, expected integers"),
        ({"implementation": "best"}, "implementation is 'best', expected one of"),
    ],
)
def test_what_does_not_agree_is_refused(change, words):
    with pytest.raises(ValueError, match=f"delta_rule: {words}"):
        delta_rule(**arrays(**change))


@pytest.mark.parametrize("chunk", [0, -4, 12])
def test_chunks_are_powers_of_two(chunk):
    with pytest.raises(ValueError, match=f"DeltaRuleBlocks: chunk is {chunk}, expected a power of two"):
        DeltaRuleBlocks(chunk=chunk)

"""Linear attention: every implementation against a float64 loop and float64 autodiff, and the identities it obeys."""

from functools import cache, partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import linear_attention
from kernels.linear_attention import LinearAttentionBlocks, bidirectional_linear_attention, linear_attention_step

B, H, G, K, V, L = 2, 6, 3, 5, 7, 19
SCALE = 0.3
DECAYS = ("none", "constant", "step", "channel")
SMALL = LinearAttentionBlocks(chunk=8, channel_chunk=4)
OPTIONS = {
    "reference": {},
    "chunked": {"blocks": SMALL},
    "pallas_tpu": {"blocks": LinearAttentionBlocks(8, 8), "interpret": True},
}
# The GPU kernels are held to the same by tests of their own: their chunks are longer and their interpreter slower.
pytestmark = pytest.mark.usefixtures("quick_compile")
every_implementation = pytest.mark.parametrize("name", OPTIONS)
every_fast_one = pytest.mark.parametrize("name", ["chunked", "pallas_tpu"])
every_decay = pytest.mark.parametrize("decay", DECAYS)


def draw(decay, length=L, seed=0):
    """q, k, v, log_decay, initial state, and cotangents of the outputs and of the final state."""
    generator = np.random.default_rng(seed)

    def normal(*shape):
        return generator.normal(size=shape).astype(np.float32)

    shape = {"none": None, "constant": (H,), "step": (B, length, H), "channel": (B, length, H, K)}[decay]
    q, k, v, state = normal(B, length, H, K), normal(B, length, G, K), normal(B, length, G, V), normal(B, H, K, V)
    log_decay = None if shape is None else -0.5 * normal(*shape) ** 2
    return (q, k, v, log_decay, state), (normal(B, length, H, V), normal(B, H, K, V))


def segment_ids(length=L):
    """Different boundaries in two rows: inside of chunks, at their edges, a segment of one step, an id that returns."""
    rows = [[t // 4 for t in range(length)], [int(t in (2, 3, 7, 9)) for t in range(length)]]
    return np.array(rows, np.int32)


def wide(arrays):
    return jax.tree.map(lambda array: np.asarray(array, np.float64), arrays)


def loop(q, k, v, log_decay, state, segments=None, scale=SCALE):
    """The definition, in float64."""
    q, k, v, log_decay, state = wide((q, k, v, log_decay, state))
    k, v = (np.repeat(each, q.shape[2] // k.shape[2], axis=2) for each in (k, v))
    outputs = []
    for t in range(q.shape[1]):
        if segments is not None and t:
            state = state * (segments[:, t] == segments[:, t - 1])[:, None, None, None]
        if log_decay is not None:
            g = log_decay[None] if log_decay.ndim == 1 else log_decay[:, t]
            state = np.exp(g.reshape(*g.shape, *[1] * (4 - g.ndim))) * state
        state = state + k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append(scale * np.einsum("bhk,bhkv->bhv", q[:, t], state))
    return np.stack(outputs, 1), state


def run(name, *arrays, **options):
    q, k, v, log_decay, state = arrays
    options = {"scale": SCALE} | OPTIONS.get(name, {}) | options
    return linear_attention(q, k, v, log_decay, initial_state_BHKV=state, implementation=name, **options)


def weigh(function, cotangents, *arrays):
    """A number that depends on all outputs and on the final state, and both."""
    y, state = function(*arrays)
    dtype = jnp.promote_types(jnp.float32, state.dtype)
    return sum((c.astype(dtype) * each.astype(dtype)).sum() for c, each in zip(cotangents, (y, state), strict=True)), (
        y,
        state,
    )


def floats(arrays):
    """Positions of the arguments that are there."""
    return tuple(i for i, array in enumerate(arrays) if array is not None)


@cache
def compiled(name, present, **options):
    """Jitted gradients of all arguments, and values. `options` must hash."""

    def compute(cotangents, segments, *arrays):
        function = partial(run, name, segment_ids=segments, **options)
        return jax.grad(partial(weigh, function, cotangents), argnums=present, has_aux=True)(*arrays)

    return jax.jit(compute)


def compute(name, arrays, cotangents, segments=None, **options):
    """Values and gradients. Absent segments are all of one id, so that one program serves both."""
    if segments is None:
        segments = np.zeros(arrays[0].shape[:2], np.int32)
    options = {"scale": SCALE} | options
    gradients, values = compiled(name, floats(arrays), **options)(cotangents, segments, *arrays)
    return values, gradients


def exact(arrays, cotangents, segments=None):
    """Values and gradients of the reference in float64."""
    with jax.enable_x64(True):
        return wide(compute("reference", wide(arrays), wide(cotangents), segments))


def close(found, wanted, tolerance=2e-6):
    """Errors relative to the largest entry of each array."""
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert mine.shape == theirs.shape
        mine, theirs = np.asarray(mine, np.float64), np.asarray(theirs, np.float64)
        size = np.abs(theirs).max() + 1e-30
        np.testing.assert_allclose(mine / size, theirs / size, rtol=0, atol=tolerance)


@every_decay
@pytest.mark.parametrize("segmented", [False, True])
def test_the_reference_is_the_loop_and_its_gradients_are_slopes(decay, segmented):
    arrays, cotangents = wide(draw(decay))
    segments = segment_ids() if segmented else None
    values, gradients = exact(arrays, cotangents, segments)
    close(values, loop(*arrays, segments), 1e-13)

    def weight(*moved):
        return sum((c * each).sum() for c, each in zip(cotangents, loop(*moved, segments), strict=True))

    generator, step = np.random.default_rng(1), 1e-5
    for which, gradient in zip(floats(arrays), gradients, strict=True):
        direction = generator.normal(size=arrays[which].shape)
        ends = [
            weight(*(array + sign * step * direction if i == which else array for i, array in enumerate(arrays)))
            for sign in (1, -1)
        ]
        np.testing.assert_allclose((gradient * direction).sum(), (ends[0] - ends[1]) / (2 * step), rtol=1e-7)


@every_implementation
@every_decay
@pytest.mark.parametrize("segmented", [False, True])
def test_values_and_gradients(name, decay, segmented):
    arrays, cotangents = draw(decay)
    segments = segment_ids() if segmented else None
    values, gradients = compute(name, arrays, cotangents, segments)
    assert {each.dtype for each in (*values, *gradients)} == {np.dtype(np.float32)}
    close((values, gradients), exact(arrays, cotangents, segments))


@pytest.mark.parametrize("decay", ["step", "channel"])
def test_chunked_is_exact_in_float64(decay):
    arrays, cotangents = wide(draw(decay))
    with jax.enable_x64(True):
        found = compute("chunked", arrays, cotangents, segment_ids())
    assert {each.dtype for each in jax.tree.leaves(found)} == {np.dtype(np.float64)}
    close(found, exact(arrays, cotangents, segment_ids()), 1e-13)


@every_fast_one
@pytest.mark.parametrize(("decay", "length"), [("channel", 1), ("constant", 3), ("step", 8)])
def test_short_and_whole_chunks(name, decay, length):
    arrays, cotangents = draw(decay, length)
    close(compute(name, arrays, cotangents), exact(arrays, cotangents))


@settings(max_examples=4)
@given(
    length=st.integers(1, 23),
    sizes=st.tuples(*[st.integers(1, 4)] * 5),
    chunk=st.integers(1, 9),
    rank=st.sampled_from([0, 3, 4]),
    ids=st.lists(st.integers(0, 1), min_size=23, max_size=23),
    reverse=st.booleans(),
)
def test_chunked_in_any_shape(length, sizes, chunk, rank, ids, reverse):
    groups, share, k_width, v_width, batch = sizes
    heads = groups * share
    generator = np.random.default_rng(length)
    shapes = ((heads, k_width), (groups, k_width), (groups, v_width))
    q, k, v = (generator.normal(size=(batch, length, *shape)).astype(np.float32) for shape in shapes)
    g = -generator.exponential(size=(batch, length, heads, k_width)[:rank]).astype(np.float32) if rank else None
    state = np.zeros((batch, heads, k_width, v_width), np.float32)
    segments = np.array([ids[:length]] * batch)
    options = {"segment_ids": segments, "reverse": reverse}
    found = run("chunked", q, k, v, g, state, blocks=LinearAttentionBlocks(chunk, chunk), **options)
    turn = np.s_[:, ::-1] if reverse else np.s_[:]
    outputs, final = loop(*(each if each is None else each[turn] for each in (q, k, v, g)), state, segments[turn])
    close(found, (outputs[turn], final))


def test_default_blocks():
    arrays, cotangents = draw("step", 150)
    close(compute("chunked", arrays, cotangents, blocks=LinearAttentionBlocks()), exact(arrays, cotangents), 1e-5)


EXTREMES = np.array([0, -1e-3, -1, -20, -80, -200, -np.inf, 0], np.float32)


@every_fast_one
@pytest.mark.parametrize("decay", ["step", "channel"])
@pytest.mark.parametrize("log_decay", [0.0, -80.0, -200.0, "mixed"])
def test_extreme_decays_are_exact(name, decay, log_decay):
    (q, k, v, g, state), cotangents = draw(decay)
    g = np.random.default_rng(2).choice(EXTREMES, g.shape) if log_decay == "mixed" else np.full_like(g, log_decay)
    arrays = q, k, v, g, state
    found = compute(name, arrays, cotangents)
    assert all(np.isfinite(each).all() for each in jax.tree.leaves(found))
    close(found, exact(arrays, cotangents))


@every_fast_one
def test_weak_decays_after_strong_ones_lose_no_digits(name):
    """The sum over a chunk is then large, and differences of float32 sums would be off by 1e-4."""
    (q, k, v, _, state), cotangents = draw("step", 16)
    g = np.repeat(np.array([-99.9, -1e-3], np.float32), [12, 4])[None, :, None] * np.ones((B, 1, H), np.float32)
    arrays = q, k, v, g, state
    close(compute(name, arrays, cotangents, blocks=LinearAttentionBlocks(16, 16)), exact(arrays, cotangents))


@every_fast_one
@pytest.mark.parametrize("decay", ["none", "step", "channel"])
def test_segments_equal_separate_runs(name, decay):
    (q, k, v, g, state), cotangents = draw(decay)
    cuts = (0, 5, 6, 8, L)
    ids = np.repeat(np.array([[4, 9, 4, 7]], np.int32), np.diff(cuts), axis=1).repeat(B, axis=0)
    (y, final), _ = compute(name, (q, k, v, g, state), cotangents, ids)
    for low, high in pairwise(cuts):
        part = np.s_[:, low:high]
        start = state if low == 0 else np.zeros_like(state)
        alone, last = loop(q[part], k[part], v[part], None if g is None else g[part], start)
        close(y[part], alone)
    close(final, last)


@every_fast_one
@pytest.mark.parametrize("decay", ["none", "step", "channel"])
@pytest.mark.parametrize("edge", [8, 11])
def test_no_gradient_crosses_a_boundary(name, decay, edge):
    arrays, (c_y, c_state) = draw(decay)
    ids = np.repeat(np.array([[0, 1]], np.int32), [edge, L - edge], axis=1).repeat(B, axis=0)
    for part, other in ((np.s_[:, :edge], np.s_[:, edge:]), (np.s_[:, edge:], np.s_[:, :edge])):
        c_one, c_none = np.zeros_like(c_y), np.zeros_like(c_state)
        c_one[part] = c_y[part]
        _, gradients = compute(name, arrays, (c_one, c_none), ids)
        assert all(not np.any(each[other]) for each in gradients[:-1])
        assert all(np.any(each[part]) for each in gradients[:-1])
        assert np.any(gradients[-1]) == (part == np.s_[:, :edge])
        if decay != "none":
            assert not np.any(gradients[3][:, edge])


@every_fast_one
def test_a_carried_state_continues_a_run(name):
    (q, k, v, g, state), cotangents = draw("step")
    (whole, final), _ = compute(name, (q, k, v, g, state), cotangents)
    outputs = []
    for part in (np.s_[:, :8], np.s_[:, 8:]):
        c_y, c_state = cotangents
        (y, state), _ = compute(name, (q[part], k[part], v[part], g[part], state), (c_y[part], c_state))
        outputs.append(y)
    close((np.concatenate(outputs, axis=1), state), (whole, final))


@every_fast_one
def test_reverse_is_the_flipped_forward_run(name):
    arrays, (c_y, c_state) = draw("channel")
    segments = segment_ids()
    timed = [array is not None and array.shape[1:2] == (L,) for array in arrays]
    turned = tuple(array[:, ::-1] if flips else array for array, flips in zip(arrays, timed, strict=True))
    (y, final), gradients = compute(name, arrays, (c_y, c_state), segments, reverse=True)
    (y_turned, final_turned), gradients_turned = compute(name, turned, (c_y[:, ::-1], c_state), segments[:, ::-1])
    close((y, final), (y_turned[:, ::-1], final_turned), 0)
    for mine, theirs, which in zip(gradients, gradients_turned, floats(arrays), strict=True):
        close(mine, theirs[:, ::-1] if timed[which] else theirs, 0)


@pytest.mark.parametrize(("name", "dtype"), [*((name, jnp.bfloat16) for name in OPTIONS), ("chunked", jnp.float16)])
def test_narrow_inputs_are_summed_in_float32(name, dtype):
    (q, k, v, g, state), (c_y, c_state) = draw("step")
    q, k, v = (jnp.asarray(each).astype(dtype) for each in (q, k, v))
    arrays, cotangents = (q, k, v, g, state), (jnp.asarray(c_y).astype(dtype), c_state)
    (y, final), gradients = compute(name, arrays, cotangents)
    assert (y.dtype, final.dtype) == (dtype, jnp.float32)
    assert [each.dtype for each in gradients] == [dtype, dtype, dtype, jnp.float32, jnp.float32]
    (y_exact, final_exact), gradients_exact = exact(arrays, cotangents)
    last_rounding = float(jnp.finfo(dtype).eps) / 2
    close((final, gradients[3:]), (final_exact, gradients_exact[3:]))
    close((y, gradients[:3]), (y_exact, gradients_exact[:3]), last_rounding)


@every_fast_one
def test_vmap_jit_and_remat_change_nothing(name):
    copies = [draw("step", 8, seed) for seed in range(2)]
    arrays, cotangents = jax.tree.map(lambda *each: np.stack(each), *copies)

    def gradients(cotangents, *arrays):
        function = jax.checkpoint(partial(run, name, segment_ids=segment_ids(8)))
        return jax.grad(partial(weigh, function, cotangents), argnums=range(5), has_aux=True)(*arrays)

    found = jax.jit(jax.vmap(gradients))(cotangents, *arrays)
    for i, (one, c_one) in enumerate(copies):
        values, wanted = compute(name, one, c_one, segment_ids(8))
        close(jax.tree.map(lambda each, i=i: each[i], found), (wanted, values))


def test_without_jit():
    arrays, _ = draw("step", 3)
    close(run("chunked", *arrays), loop(*arrays))


@every_fast_one
def test_the_batch_can_be_sharded(name):
    arrays, cotangents = draw("step", 8)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")

    def gradients(cotangents, *arrays):
        return jax.grad(partial(weigh, partial(run, name), cotangents), argnums=range(5), has_aux=True)(*arrays)

    specs = {"in_specs": (spec,) * 6, "out_specs": spec, "check_vma": False}
    sharded = jax.jit(jax.shard_map(gradients, mesh=mesh, **specs))
    values, wanted = compute(name, arrays, cotangents)
    close(sharded(cotangents, *arrays), (wanted, values))


def test_second_derivatives():
    arrays, _ = draw("channel", 6)

    def curvature(name):
        def slope(*arrays):
            inner = jax.grad(lambda *each: (run(name, *each)[0] ** 3).sum(), argnums=range(5))
            return sum((each**2).sum() for each in inner(*arrays))

        return jax.jit(jax.grad(slope, argnums=range(5)))(*arrays)

    close(curvature("chunked"), wide(curvature("reference")), 1e-5)


@every_fast_one
def test_groups_are_repeated_heads(name):
    (q, k, v, g, state), cotangents = draw("channel")
    values, gradients = compute(name, (q, k, v, g, state), cotangents)
    repeated = q, *(np.repeat(each, H // G, axis=2) for each in (k, v)), g, state
    values_repeated, (d_q, d_k, d_v, d_g, d_state) = compute(name, repeated, cotangents)
    d_k, d_v = (each.reshape(B, L, G, H // G, -1).sum(3) for each in (d_k, d_v))
    close((values, gradients), wide((values_repeated, (d_q, d_k, d_v, d_g, d_state))))


@every_decay
def test_steps_are_the_run(decay):
    (q, k, v, g, state), _ = draw(decay, 4)
    y, final = loop(q, k, v, g, state)
    step = jax.jit(partial(linear_attention_step, scale=SCALE))
    for t in range(4):
        now = g if g is None or g.ndim == 1 else g[:, t]
        y_t, state = step(state, q[:, t], k[:, t], v[:, t], now)
        close(y_t, y[:, t])
    close(state, final)


def matrix(q, k, g, segments=None):
    """Dense weights (B, H, L, L) of both directions, in float64; the decays of (B, L, H) count from either side."""
    q, k, g = wide((q, k, g))
    k = np.repeat(k, H // G, axis=2)
    length = q.shape[1]
    weights = np.einsum("bihk,bjhk->bhij", q, k)
    for i, j in np.ndindex(length, length):
        between = g[:, j + 1 : i + 1] if j <= i else g[:, i:j]
        weights[:, :, i, j] *= np.exp(between.sum(1))
        if segments is not None:
            joined = (np.diff(segments[:, min(i, j) : max(i, j) + 1]) == 0).all(1)
            weights[:, :, i, j] *= joined[:, None]
    return weights


def apply(weights, v, normalise):
    weights = weights / weights.sum(-1, keepdims=True) if normalise else SCALE * weights
    return np.einsum("bhij,bjhv->bihv", weights, np.repeat(wide(v), H // G, axis=2))


@pytest.mark.parametrize(
    ("name", "normalise", "segmented"),
    [("chunked", True, True), ("chunked", False, False), ("pallas_tpu", True, False)],
)
def test_both_directions_and_the_normaliser_are_the_dense_form(name, normalise, segmented):
    (q, k, v, g, _), _ = draw("step")
    q, k = np.abs(q), np.abs(k)
    segments = segment_ids() if segmented else None
    options = {"segment_ids": segments, "normalise": normalise, "scale": SCALE, "implementation": name, **OPTIONS[name]}
    weights = matrix(q, k, g, segments)
    both = jax.jit(partial(bidirectional_linear_attention, **options))
    close(both(q, k, v, g), apply(weights, v, normalise))
    y, state = jax.jit(partial(linear_attention, **options))(q, k, v, g)
    close(y, apply(np.tril(weights), v, normalise))
    assert state.shape == (B, H, K, V + normalise)


def test_the_normaliser_carries_on_and_has_a_floor():
    (q, k, v, g, _), _ = draw("step")
    q, k = np.abs(q), np.abs(k)
    attend = jax.jit(partial(linear_attention, normalise=True))
    whole, final = attend(q, k, v, g)
    cut = L - 1
    _, state = attend(q[:, :cut], k[:, :cut], v[:, :cut], g[:, :cut])
    y, state = linear_attention_step(state, q[:, cut], k[:, cut], v[:, cut], g[:, cut], normalise=True)
    close((y, state), (whole[:, cut], final))
    y, _ = attend(np.zeros_like(q), k, v, g)
    assert not np.any(y)


@pytest.mark.parametrize("decay", ["step", "channel"])
def test_memory_is_linear_in_length(decay):
    def bytes_at(length):
        arrays, cotangents = draw(decay, 1)
        stretch = partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct((B, length, *x.shape[2:]), x.dtype))
        timed = (*stretch(arrays[:4]), arrays[4]), (stretch(cotangents[0]), cotangents[1])
        program = compiled("chunked", tuple(range(5)), blocks=LinearAttentionBlocks())
        return program.lower(timed[1], None, *timed[0]).compile().memory_analysis().temp_size_in_bytes

    short, long = bytes_at(1024), bytes_at(4096)
    assert long < 4.1 * short
    quadratic = 4 * B * H * 4096**2
    assert long < quadratic / 8


def arguments(**change):
    (q, k, v, g, state), _ = draw("step", 4)
    return {"q_BLHK": q, "k_BLGK": k, "v_BLGV": v, "log_decay": g, "initial_state_BHKV": state} | change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q_BLHK": np.ones((2, 4, 6), np.float32)}, r"q has shape \(2, 4, 6\), expected \(B, L, H, K\)"),
        ({"q_BLHK": np.ones((2, 0, 6, 5), np.float32)}, "q has length 0"),
        ({"q_BLHK": np.ones((2, 4, 7, 5), np.float32)}, r"q has 7 heads of 5 and v 3 of 7, .* H a multiple of G"),
        ({"q_BLHK": np.ones((2, 4, 6, 5), int)}, "q has dtype int64, expected a real floating type"),
        ({"k_BLGK": np.ones((2, 4, 2, 5), np.float32)}, r"k has shape \(2, 4, 2, 5\), .* = \(2, 4, 3, 5\)"),
        ({"v_BLGV": np.ones((2, 5, 3, 7), np.float32)}, r"v has shape \(2, 5, 3, 7\), .* = \(2, 4, 3, 7\)"),
        ({"log_decay": -np.ones((2, 4, 5), np.float32)}, r"log_decay has shape \(2, 4, 5\), .* = \(2, 4, 6\)"),
        ({"log_decay": -np.ones((4, 6), np.float32)}, r"log_decay has shape \(4, 6\), expected \(H\) or"),
        ({"log_decay": np.full((6,), 0.5, np.float32)}, "log_decay has a positive entry, 0.5"),
        ({"initial_state_BHKV": np.ones((2, 6, 7, 5), np.float32)}, r"initial_state has shape \(2, 6, 7, 5\)"),
        ({"normalise": True}, r"initial_state has .*\(B, H, K, V \+ 1\) = \(2, 6, 5, 8\)"),
        ({"segment_ids": np.ones((4, 2), int)}, r"segment_ids has shape \(4, 2\), expected \(B, L\) = \(2, 4\)"),
        ({"segment_ids": np.ones((2, 4))}, "segment_ids has dtype float64, expected integers"),
        ({"implementation": "triton"}, "implementation is 'triton', expected one of auto, pallas, reference, chunked"),
    ],
)
def test_bad_arguments_are_named(change, words):
    with pytest.raises(ValueError, match="linear_attention: " + words):
        linear_attention(**arguments(**change))


def test_bad_blocks_are_refused():
    with pytest.raises(ValueError, match="chunks must be in"):
        LinearAttentionBlocks(chunk=0)


def test_auto_is_chunked_on_a_cpu_and_pallas_is_not_there():
    found, wanted = (linear_attention(**arguments(implementation=name)) for name in ("auto", "chunked"))
    close(found, wanted, 0)
    with pytest.raises(NotImplementedError, match="no Pallas kernel for the default platform cpu"):
        linear_attention(**arguments(implementation="pallas"))


WATCHED = plgpu.InterpretGPUParams(detect_races=True)


def small_gpu_case(decay, dtype=np.float32, seed=0):
    """One row and two heads, so that the interpreter of the GPU is not long at it: three chunks, the last in part."""
    arrays, cotangents = draw(decay, 131, seed)
    q, k, v, g, state = jax.tree.map(lambda each: each[:1], arrays)
    heads = H // G
    q, k, v = (jnp.asarray(each, dtype) for each in (q[:, :, :heads], k[:, :, :1], v[:, :, :1]))
    if g is not None:
        g = arrays[3][:heads] if decay == "constant" else g[:, :, :heads]
    c_y, c_state = cotangents
    segments = np.cumsum(np.random.default_rng(seed).random((1, 131)) < 0.1, axis=1)
    return (q, k, v, g, state[:, :heads]), (c_y[:1, :, :heads], c_state[:1, :heads]), segments


@pytest.mark.parametrize("decay", ["none", "constant", "step", "extreme"])
def test_the_gpu_kernels_in_float32(decay, capfd):
    """In the interpreter of the GPU, which looks for races, and where operands need not be narrow."""
    arrays, cotangents, segments = small_gpu_case("step" if decay == "extreme" else decay)
    if decay == "extreme":
        q, k, v, g, state = arrays
        arrays = q, k, v, np.random.default_rng(2).choice(EXTREMES, g.shape), state
    # The gradients of a state that is cleared within the first chunk say nothing of the later ones.
    segments = segments if decay == "constant" else None
    found = compute("pallas_gpu", arrays, cotangents, segments, interpret=WATCHED)
    close(found, exact(arrays, cotangents, segments))
    assert "RACE" not in "".join(capfd.readouterr())


def test_the_gpu_kernels_round_operands_to_bfloat16():
    arrays, cotangents, segments = small_gpu_case("step", jnp.bfloat16)
    found = compute("pallas_gpu", arrays, cotangents, segments, interpret=True)
    close(found, exact(arrays, cotangents, segments), 0.01)


def test_the_gpu_kernels_pass_no_gradient_across_a_boundary():
    arrays, (c_y, c_state), _ = small_gpu_case("step")
    ids = (np.arange(131) >= 70)[None].astype(np.int32)
    for part, other in ((np.s_[:, :70], np.s_[:, 70:]), (np.s_[:, 70:], np.s_[:, :70])):
        c_one = np.zeros_like(c_y)
        c_one[part] = c_y[part]
        _, gradients = compute("pallas_gpu", arrays, (c_one, np.zeros_like(c_state)), ids, interpret=WATCHED)
        assert all(not np.any(each[other]) for each in gradients[:-1])
        assert all(np.any(each[part]) for each in gradients[:-1])
        assert not np.any(gradients[3][:, 70])


def test_the_gpu_kernels_can_be_mapped():
    copies = [small_gpu_case("step", seed=seed)[:2] for seed in range(2)]
    arrays, cotangents = jax.tree.map(lambda *each: np.stack(each), *copies)

    def gradients(cotangents, *arrays):
        function = partial(run, "pallas_gpu", interpret=True)
        return jax.grad(partial(weigh, function, cotangents), argnums=range(5), has_aux=True)(*arrays)

    found = jax.jit(jax.vmap(gradients))(cotangents, *arrays)
    for i, (one, c_one) in enumerate(copies):
        values, wanted = exact(one, c_one)
        close(jax.tree.map(lambda each, i=i: each[i], found), (wanted, values))


KERNELS = [("pallas_tpu", jnp.float32), ("pallas_tpu", jnp.bfloat16), ("pallas_gpu", jnp.bfloat16)]


@pytest.mark.parametrize(("name", "dtype"), KERNELS)
@pytest.mark.parametrize("decay", ["none", "step", "channel"])
@pytest.mark.parametrize(("length", "widths"), [(200, (128, 128)), (3, (5, 7))])
def test_kernels_lower_for_their_platform(name, dtype, decay, length, widths):
    """Forward, rebuilding and backward kernels, with head widths that are and aren't those of a tile."""
    k_width, v_width = widths
    shapes = (4, k_width), (2, k_width), (2, v_width)
    q, k, v = (jax.ShapeDtypeStruct((B, length, *shape), dtype) for shape in shapes)
    rank = {"none": 0, "step": 3, "channel": 4}[decay]
    g = jax.ShapeDtypeStruct((B, length, 4, k_width)[:rank], jnp.float32) if rank else None
    state = jax.ShapeDtypeStruct((B, 4, k_width, v_width), jnp.float32)
    ids = jax.ShapeDtypeStruct((B, length), jnp.int32)

    def slope(ids, *arrays):
        def total(q, k, v, g, state):
            options = {"segment_ids": ids, "initial_state_BHKV": state, "implementation": name}
            return linear_attention(q, k, v, g, **options)[0].astype(jnp.float32).sum()

        return jax.value_and_grad(jax.checkpoint(total), argnums=floats(arrays))(*arrays)

    trace = partial(jax.jit(slope).trace, ids, q, k, v, g, state)
    if (name, decay) == ("pallas_gpu", "channel"):
        with pytest.raises(NotImplementedError, match="decays per channel are not written for it"):
            trace()
        return
    platform, call = {"pallas_tpu": ("tpu", "tpu_custom_call"), "pallas_gpu": ("cuda", "mosaic_gpu_v2")}[name]
    text = trace().lower(lowering_platforms=(platform,)).as_text()
    # Under remat there may be a second forward call.
    assert text.count(f"@{call}(") >= 3


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("pallas_tpu", {"blocks": LinearAttentionBlocks(12)}, "multiples of 8, got LinearAttentionBlocks"),
        ("pallas_gpu", {"blocks": LinearAttentionBlocks(128)}, "its chunks have 64 steps, got LinearAttentionBlocks"),
        ("pallas_gpu", {}, "queries, keys and values are bfloat16, not float32"),
        ("pallas_gpu", {"log_decay": np.zeros((2, 4, 6, 5), np.float32)}, "decays per channel are not written"),
        ("pallas_gpu", {"v_BLGV": np.ones((2, 4, 3, 130), np.float32), "initial_state_BHKV": None}, "at most 128 col"),
    ],
)
def test_kernels_say_what_they_refuse(name, change, words):
    with pytest.raises(NotImplementedError, match=f"linear_attention: .*{name}.*{words}"):
        linear_attention(**arguments(implementation=name, **change))


def test_gpu_kernels_need_hopper(monkeypatch):
    class Ampere:
        compute_capability = "8.0"

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Ampere()])
    with pytest.raises(NotImplementedError, match="only Hopper"):
        linear_attention(**arguments(implementation="pallas"))

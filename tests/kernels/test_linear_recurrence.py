"""The linear recurrence against a float64 loop, its finite differences, and autodiff through a plain scan."""

from functools import cache, partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import linear_recurrence
from kernels.linear_recurrence import LinearRecurrenceBlocks, linear_recurrence_step

B, N = 2, 3
LENGTHS = (1, 13)
OPTIONS = {
    "reference": {},
    "chunked": {},
    "pallas_tpu": {"blocks": LinearRecurrenceBlocks(steps=4), "interpret": True},
}
# The GPU kernel is held to the plain scan by a test of its own: its interpreter is slow.
XLA = ("reference", "chunked")
pytestmark = pytest.mark.usefixtures("quick_compile")


def loop(a, x, h, segments=None, reverse=False):
    """The definition, in float64 or complex128."""
    a, x, h = (np.asarray(array) for array in (a, x, h))
    states, before = np.empty(x.shape, np.result_type(a, x, h)), None
    for t in range(x.shape[1])[:: -1 if reverse else 1]:
        if segments is not None and before is not None:
            h = np.where((segments[:, t] == segments[:, before])[:, None], h, 0)
        h = a[:, t] * h + x[:, t]
        states[:, t], before = h, t
    return states, h


def plain(a, x, h, segments=None, reverse=False):
    """The same as a JAX scan that carries the segment, differentiated by JAX."""
    segments = jnp.zeros(x.shape[:2], jnp.int32) if segments is None else segments
    edge = segments[:, -1 if reverse else 0]

    def step(carry, inputs):
        h, last = carry
        a, x, segment = inputs
        h = a * jnp.where((segment == last)[:, None], h, 0.0) + x
        return (h, segment), h

    inputs = jax.tree.map(lambda array: jnp.swapaxes(array, 0, 1), (a, x, segments))
    (h, _), states = jax.lax.scan(step, (h, edge), inputs, reverse=reverse)
    return jnp.swapaxes(states, 0, 1), h


@partial(jax.jit, static_argnames=("name", "reverse"))
def run(name, a, x, h, segments=None, reverse=False):
    options = {"initial_state": h, "segment_ids": segments, "reverse": reverse, "implementation": name}
    return linear_recurrence(a, x, **options, **OPTIONS[name])


@pytest.fixture(params=OPTIONS)
def ours(request):
    """Every implementation in turn."""
    return partial(run, request.param)


@pytest.fixture(params=XLA)
def complex_ours(request):
    """Those that take complex numbers."""
    return partial(run, request.param)


def draw(L, dtype=np.float32, seed=0):
    """a, x, h and cotangents of the states and of the final state, in a dtype; exact in float64."""
    generator = np.random.default_rng(seed)

    def normal(*shape):
        real = generator.normal(size=shape)
        return (real + 1j * generator.normal(size=shape) if np.issubdtype(dtype, np.complexfloating) else real).astype(
            dtype
        )

    return 0.7 * normal(B, L, N), normal(B, L, N), normal(B, N), normal(B, L, N), normal(B, N)


@cache
def differentiated(dtype, L, segmented, reverse):
    """Gradients of `plain` by JAX."""
    a, x, h, c_states, c_final = draw(L, dtype)
    function = partial(plain, segments=segment_ids(L) if segmented else None, reverse=reverse)
    return jax.jit(jax.grad(partial(weigh, function, c_states, c_final), argnums=(0, 1, 2)))(a, x, h)


def segment_ids(L):
    """Two rows with different boundaries. An id comes back after another; the last may or may not be the first."""
    return np.array([[t // 5 for t in range(L)], [int(t in (2, 3, 7)) for t in range(L)]], np.int32)


def weigh(function, c_states, c_final, a, x, h):
    """A real number that depends on all states and on the final one."""
    states, final = function(a, x, h)
    return ((states * c_states).sum() + (final * c_final).sum()).real


def differences(function, arrays, step=1e-6):
    """Gradients by central differences, with JAX's sign for complex numbers: df/dRe - i df/dIm."""
    gradients = []
    for which, array in enumerate(arrays):
        gradient = np.zeros_like(array)
        for index in np.ndindex(array.shape):
            for unit in (1, 1j) if np.iscomplexobj(array) else (1,):
                ends = []
                for sign in (1, -1):
                    moved = [each.copy() for each in arrays]
                    moved[which][index] += sign * step * unit
                    ends.append(function(*moved))
                gradient[index] += (ends[0] - ends[1]) / (2 * step) * np.conj(unit)
        gradients.append(gradient)
    return gradients


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("L", LENGTHS)
@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, np.float32) for name in OPTIONS), *((name, np.complex64) for name in XLA)]
)
def test_values_and_gradients(name, dtype, L, segmented, reverse):
    ours = partial(run, name)
    a, x, h, c_states, c_final = draw(L, dtype)
    segments = segment_ids(L) if segmented else None
    wide = [array.astype(np.complex128 if dtype == np.complex64 else np.float64) for array in (a, x, h)]
    options = {"segments": segments, "reverse": reverse}

    def gradients(function, *arrays):
        return jax.grad(partial(weigh, partial(function, **options), c_states, c_final), argnums=(0, 1, 2))(*arrays)

    @jax.jit
    def compute(*arrays):
        return ours(*arrays, **options), gradients(ours, *arrays)

    values, found = compute(a, x, h)
    automatic = differentiated(dtype, L, segmented, reverse)
    for value, wanted in zip(values, loop(*wide, **options), strict=True):
        assert value.dtype == dtype
        np.testing.assert_allclose(value, wanted, rtol=2e-5, atol=2e-5)
    exact = differences(partial(weigh, partial(loop, **options), c_states, c_final), wide)
    for gradient, other, wanted in zip(found, automatic, exact, strict=True):
        assert gradient.dtype == dtype
        np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(gradient, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_through_the_states_alone_and_the_final_state_alone(ours, part, reverse):
    a, x, h, *cotangents = draw(3)

    def gradients(function):
        _, pull = jax.vjp(partial(function, reverse=reverse), a, x, h)
        return pull(tuple(jnp.asarray(c) if i == part else jnp.zeros_like(c) for i, c in enumerate(cotangents)))

    for found, wanted in zip(gradients(ours), gradients(plain), strict=True):
        assert np.abs(wanted).max() > 0.1
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
def test_segments_equal_separate_runs(ours, reverse):
    a, x, h, *_ = draw(13)
    cuts = (0, 5, 6, 13)
    ids = np.repeat(np.array([[4, 9, 4]], np.int32), np.diff(cuts), axis=1).repeat(B, axis=0)
    states, final = ours(a, x, h, ids, reverse=reverse)
    parts = list(pairwise(cuts))[:: -1 if reverse else 1]
    for index, (low, high) in enumerate(parts):
        start = h if index == 0 else np.zeros_like(h)
        alone, last = ours(a[:, low:high], x[:, low:high], start, reverse=reverse)
        np.testing.assert_array_equal(states[:, low:high], alone)
    np.testing.assert_array_equal(final, last)


@pytest.mark.parametrize("reverse", [False, True])
def test_no_gradient_crosses_a_boundary(ours, reverse):
    a, x, h, *_ = draw(7)
    ids = np.array([[0, 0, 0, 1, 1, 1, 1]] * B, np.int32)
    second = np.s_[:, :3] if reverse else np.s_[:, 3:]
    first = np.s_[:, 3:] if reverse else np.s_[:, :3]

    def later(a, x, h):
        return ours(a, x, h, ids, reverse=reverse)[0][second].sum()

    d_a, d_x, d_h = jax.grad(later, argnums=(0, 1, 2))(a, x, h)
    assert not np.any(d_a[first])
    assert not np.any(d_x[first])
    assert not np.any(d_h)
    assert np.all(d_x[second] != 0)


def test_a_carried_state_continues_a_run(ours):
    a, x, h, *_ = draw(11)
    whole, end = ours(a, x, h)
    left, middle = ours(a[:, :4], x[:, :4], h)
    right, last = ours(a[:, 4:], x[:, 4:], middle)
    np.testing.assert_array_equal(whole, np.concatenate([left, right], axis=1))
    np.testing.assert_array_equal(end, last)


def test_the_initial_state_is_zero_if_absent():
    a, x, h, *_ = draw(5)
    for found, wanted in zip(linear_recurrence(a, x), run("chunked", a, x, np.zeros_like(h)), strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_inputs_are_carried_in_float32(ours, dtype):
    a, x, h, c_states, c_final = (jnp.asarray(array).astype(dtype) for array in draw(13))
    states, final = ours(a, x, h)
    assert states.dtype == final.dtype == jnp.float32
    wide = [np.asarray(array, np.float64) for array in (a, x, h)]
    for found, wanted in zip((states, final), loop(*wide), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)
    exact = differences(partial(weigh, loop, np.asarray(c_states, np.float64), np.asarray(c_final, np.float64)), wide)
    found = jax.grad(partial(weigh, ours, c_states, c_final), argnums=(0, 1, 2))(a, x, h)
    for gradient, wanted in zip(found, exact, strict=True):
        assert gradient.dtype == dtype
        # Exact but for the last rounding.
        np.testing.assert_allclose(gradient.astype(jnp.float32), wanted, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("wide", [0, 1, 2])
def test_one_complex_argument_makes_all_complex(complex_ours, wide):
    real, other = draw(5), draw(5, np.complex64, seed=1)
    a, x, h = (other[i] if i == wide else real[i] for i in range(3))
    states, final = complex_ours(a, x, h)
    assert states.dtype == final.dtype == np.complex64
    for found, wanted in zip((states, final), loop(a, x, h), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    c_states, c_final = other[3:]
    found, wanted = (
        jax.grad(partial(weigh, function, c_states, c_final), argnums=(0, 1, 2))(a, x, h)
        for function in (complex_ours, lambda a, x, h: plain(a + 0j, x + 0j, h + 0j))
    )
    for mine, theirs, argument in zip(found, wanted, (a, x, h), strict=True):
        assert mine.dtype == argument.dtype
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)


def test_vmap_jit_and_remat_change_nothing(ours):
    copies, L = 5, 7
    a, x, h, *_ = (np.stack(arrays) for arrays in zip(*(draw(L, seed=seed) for seed in range(copies)), strict=True))
    segments = segment_ids(L)
    mapped = jax.jit(jax.vmap(jax.checkpoint(partial(ours, segments=segments))))

    @jax.checkpoint
    def square(a, x, h):
        return (ours(a, x, h, segments)[0] ** 2).sum()

    slope = jax.jit(jax.vmap(jax.grad(square, argnums=(0, 1, 2))))
    states, final = mapped(a, x, h)
    gradients = slope(a, x, h)
    for i in range(copies):
        wanted = loop(a[i], x[i], h[i], segments)
        np.testing.assert_allclose(states[i], wanted[0], rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(final[i], wanted[1], rtol=2e-5, atol=2e-5)
        exact = jax.grad(lambda *each: (plain(*each, segments)[0] ** 2).sum(), argnums=(0, 1, 2))(a[i], x[i], h[i])
        for found, theirs in zip(gradients, exact, strict=True):
            np.testing.assert_allclose(found[i], theirs, rtol=1e-4, atol=1e-4)


def test_only_the_inputs_can_be_mapped_over(ours):
    a, x, h, *_ = draw(5)
    many = np.stack([x, 2 * x])
    states, _ = jax.vmap(ours, in_axes=(None, 0, None))(a, many, h)
    np.testing.assert_allclose(states[1], loop(a, 2 * x, h)[0], rtol=2e-5, atol=2e-5)


def test_second_derivatives(complex_ours):
    a, x, h, *_ = draw(5)

    def curvature(function):
        def slope(a, x, h):
            inner = jax.grad(lambda *each: (function(*each)[0] ** 3).sum(), argnums=(0, 1, 2))
            return sum((each**2).sum() for each in inner(a, x, h))

        return jax.grad(slope, argnums=(0, 1, 2))(a, x, h)

    for found, wanted in zip(curvature(complex_ours), curvature(plain), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["chunked", "pallas_tpu"])
def test_memory_is_two_sequences(name):
    """What the backward pass keeps is a and h, however long the sequence."""
    a, x, h, *_ = draw(13)
    _, pull = jax.vjp(partial(run, name), a, x, h)
    kept = sum(leaf.size for leaf in jax.tree.leaves(pull) if hasattr(leaf, "size"))
    assert kept <= 2 * x.size + 2 * h.size


def test_temporary_memory_is_linear_in_length():
    def bytes_at(L):
        a, h = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((B, L, N), (B, N)))
        slope = jax.grad(lambda a, x, h: run("chunked", a, x, h)[0].sum(), argnums=(0, 1, 2))
        return jax.jit(slope).lower(a, a, h).compile().memory_analysis().temp_size_in_bytes

    assert bytes_at(4096) < 4.1 * bytes_at(1024)
    assert bytes_at(4096) < 8 * (4 * B * N * 4096)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"a_BLN": np.ones((2, 5, 2))}, r"a has shape \(2, 5, 2\) and x \(2, 5, 3\)"),
        ({"a_BLN": np.ones((5, 3)), "x_BLN": np.ones((5, 3))}, r"expected one \(B, L, N\)"),
        ({"a_BLN": np.ones((2, 0, 3)), "x_BLN": np.ones((2, 0, 3))}, "length 0"),
        ({"initial_state": np.ones((3, 2))}, r"initial_state has shape \(3, 2\), expected \(2, 3\)"),
        ({"segment_ids": np.ones((5, 2), int)}, r"segment_ids has shape \(5, 2\), expected \(B, L\) = \(2, 5\)"),
        ({"segment_ids": np.ones((2, 5))}, "segment_ids has dtype float64, expected integers"),
        ({"x_BLN": np.ones((2, 5, 3), int)}, "x has dtype int64, expected a real or complex floating type"),
        ({"implementation": "scan"}, "implementation is 'scan', expected one of auto, pallas, reference, chunked"),
    ],
)
def test_bad_arguments_are_refused(change, words):
    arguments = {"a_BLN": np.ones((2, 5, 3)), "x_BLN": np.ones((2, 5, 3))} | change
    with pytest.raises(ValueError, match=words):
        linear_recurrence(**arguments)


def test_reverse_is_the_flipped_forward_run(ours):
    a, x, h, *_ = draw(13)
    segments = segment_ids(13)
    states, final = ours(a, x, h, segments, reverse=True)
    states_turned, final_turned = ours(a[:, ::-1], x[:, ::-1], h, segments[:, ::-1])
    np.testing.assert_array_equal(states, states_turned[:, ::-1])
    np.testing.assert_array_equal(final, final_turned)


@pytest.mark.parametrize("factor", [0.0, 1.0, np.exp(-80.0), np.exp(-200.0)])
def test_extreme_factors(ours, factor):
    a, x, h, c_states, c_final = draw(13)
    a = np.full_like(a, factor)
    found = jax.value_and_grad(partial(weigh, ours, c_states, c_final), argnums=(0, 1, 2))(a, x, h)
    wanted = jax.value_and_grad(partial(weigh, plain, c_states, c_final), argnums=(0, 1, 2))(a, x, h)
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)


def test_steps_are_the_run():
    a, x, h, *_ = draw(5, np.complex64)
    states, final = linear_recurrence(a, x, initial_state=h)
    for t in range(5):
        now, h = linear_recurrence_step(h, a[:, t], x[:, t])
        np.testing.assert_array_equal(now, h)
        np.testing.assert_allclose(now, states[:, t], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(h, final, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["pallas_tpu"])
def test_kernels_take_blocks_that_do_not_divide(name):
    generator = np.random.default_rng(0)
    a, x, c_states = generator.normal(size=(3, 9, 11, 200)).astype(np.float32)
    h, c_final = generator.normal(size=(2, 9, 200)).astype(np.float32)
    options = {"implementation": name, "interpret": True, "blocks": LinearRecurrenceBlocks(4, 128)}

    def gradients(function):
        return jax.jit(jax.grad(partial(weigh, function, c_states, c_final), argnums=(0, 1, 2)))(a, x, h)

    kernel = gradients(lambda a, x, h: linear_recurrence(a, x, initial_state=h, **options))
    for found, wanted in zip(kernel, gradients(plain), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize(("segmented", "reverse"), [(False, False), (True, True)])
def test_the_gpu_kernel_is_the_plain_scan(segmented, reverse, capfd):
    """In the interpreter of the GPU, which looks for races: blocks that do not divide, and more than 128 channels."""
    generator = np.random.default_rng(0)
    a, x, c_states = generator.normal(size=(3, 2, 11, 130)).astype(np.float32)
    h, c_final = generator.normal(size=(2, 2, 130)).astype(np.float32)
    ids = segment_ids(11) if segmented else None
    options = {
        "segment_ids": ids,
        "reverse": reverse,
        "implementation": "pallas_gpu",
        "blocks": LinearRecurrenceBlocks(4),
        "interpret": plgpu.InterpretGPUParams(detect_races=True),
    }

    def gradients(function):
        return jax.jit(jax.value_and_grad(partial(weigh, function, c_states, c_final), argnums=(0, 1, 2)))(a, x, h)

    kernel = gradients(lambda a, x, h: linear_recurrence(a, x, initial_state=h, **options))
    wanted = gradients(partial(plain, segments=ids, reverse=reverse))
    for mine, theirs in zip(jax.tree.leaves(kernel), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())
    assert "RACE" not in "".join(capfd.readouterr())


def test_the_gpu_kernel_can_be_mapped():
    a, x, h, *_ = (np.stack(arrays) for arrays in zip(*(draw(5, seed=seed) for seed in range(2)), strict=True))

    def run(a, x, h):
        return linear_recurrence(a, x, initial_state=h, implementation="pallas_gpu", interpret=True)

    states, final = jax.jit(jax.vmap(run))(a, x, h)
    for i in range(2):
        wanted = loop(a[i], x[i], h[i])
        np.testing.assert_allclose(states[i], wanted[0], rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(final[i], wanted[1], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "platform", "call"), [("pallas_tpu", "tpu", "tpu_custom_call"), ("pallas_gpu", "cuda", "mosaic_gpu_v2")]
)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 300, 72), (9, 130, 640)])
def test_kernels_lower_for_their_platform(name, platform, call, shape):
    a = jax.ShapeDtypeStruct(shape, jnp.float32)
    h = jax.ShapeDtypeStruct((shape[0], shape[2]), jnp.float32)

    @jax.checkpoint
    def total(a, x, h):
        return linear_recurrence(a, x, initial_state=h, implementation=name)[0].sum()

    trace = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(a, a, h)
    assert trace.lower(lowering_platforms=(platform,)).as_text().count(f"@{call}(") >= 2


def test_the_gpu_kernel_needs_hopper(monkeypatch):
    class Ampere:
        compute_capability = "8.0"

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Ampere()])
    a, x, *_ = draw(5)
    with pytest.raises(NotImplementedError, match="only Hopper and later"):
        linear_recurrence(a, x, implementation="pallas")


def test_the_gpu_kernel_refuses_long_blocks():
    a, x, *_ = draw(5)
    with pytest.raises(NotImplementedError, match="'pallas_gpu' can't run this: its blocks have at most 96 steps"):
        linear_recurrence(a, x, implementation="pallas_gpu", blocks=LinearRecurrenceBlocks(128))


@pytest.mark.parametrize("name", ["pallas_gpu", "pallas_tpu"])
def test_kernels_refuse_complex_numbers(name):
    a, x, h, *_ = draw(5, np.complex64)
    with pytest.raises(NotImplementedError, match=rf"'{name}' can't run this: .* not complex64"):
        linear_recurrence(a, x, initial_state=h, implementation=name)

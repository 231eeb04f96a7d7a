"""What the linear recurrence has of its own: complex numbers, and an associative form."""

from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import LinearRecurrenceBlocks, linear_recurrence
from tests.kernels import family
from tests.kernels.family import assert_close, compute, draw, exact
from tests.kernels.ops import RECURRENCE

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_the_reference_is_the_published_associative_form():
    """(a, x) then (b, y) is (b a, b x + y): Orvieto et al., arXiv 2303.06349, and Smith et al., arXiv 2208.04933."""
    arguments, _, _ = draw(RECURRENCE, "complex")
    a, x, h = (np.asarray(arguments[name], np.complex128) for name in ("a_BLN", "x_BLN", "initial_state"))
    steps = [(np.ones_like(h), h), *zip(np.moveaxis(a, 1, 0), np.moveaxis(x, 1, 0), strict=True)]
    prefixes = [reduce(lambda e, f: (f[0] * e[0], f[0] * e[1] + f[1]), steps[: t + 2])[1] for t in range(x.shape[1])]
    arguments["segment_ids"] = np.zeros_like(arguments["segment_ids"])
    states, final = linear_recurrence(**arguments, implementation="reference")
    assert_close((states, final), (np.stack(prefixes, 1), prefixes[-1]), 1e-6)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("wide", ["a_BLN", "x_BLN", "initial_state"])
def test_one_complex_argument_makes_all_complex(implementation, wide):
    real, other = draw(RECURRENCE, "full", 5), draw(RECURRENCE, "complex", 5, seed=1)
    drawn = real._replace(arguments=real.arguments | {wide: other.arguments[wide]}, cotangents=other.cotangents)
    outputs, gradients = compute(RECURRENCE, implementation, drawn)
    assert {each.dtype for each in outputs} == {np.dtype(np.complex64)}
    assert_close(outputs, RECURRENCE.loop(drawn.arguments, {}), 1e-6)
    all_complex = {n: x if n == "segment_ids" else x + 0j for n, x in drawn.arguments.items()}
    _, wanted = exact(RECURRENCE, drawn._replace(arguments=all_complex))
    for name, gradient in gradients.items():
        assert gradient.dtype == drawn.arguments[name].dtype
        assert_close(gradient, wanted[name] if name == wide else wanted[name].real, 1e-6)


@pytest.mark.parametrize("implementation", family.ALL)
def test_only_the_inputs_can_be_mapped_over(implementation):
    arguments, _, _ = draw(RECURRENCE, "full", 3)
    run = partial(linear_recurrence, **family.settings(RECURRENCE, implementation))
    a, x, h = (arguments[name] for name in ("a_BLN", "x_BLN", "initial_state"))
    mapped = jax.vmap(lambda x: run(a, x, initial_state=h))
    states, _ = mapped(np.stack([x, 2 * x]))
    assert_close(states[1], RECURRENCE.loop(arguments | {"x_BLN": 2 * x}, {})[0], 1e-6)


def test_the_tpu_kernel_takes_blocks_that_do_not_divide():
    """Neither the batch, nor the length, nor the channels."""
    drawn = draw(RECURRENCE, "full", B=9, N=200)
    found = compute(RECURRENCE, "pallas_tpu", drawn, blocks=LinearRecurrenceBlocks(4, 128))
    assert_close(found, exact(RECURRENCE, drawn), 1e-6)


def test_the_gpu_kernel_can_be_mapped():
    many = [draw(RECURRENCE, "full", 5, seed).arguments for seed in range(2)]
    run = partial(linear_recurrence, implementation="pallas_gpu", interpret=plgpu.InterpretGPUParams())
    found = jax.jit(jax.vmap(lambda each: run(**each)))(jax.tree.map(lambda *each: np.stack(each), *many))
    for i, arguments in enumerate(many):
        assert_close(jax.tree.map(lambda x, i=i: x[i], found), RECURRENCE.loop(arguments, {}), 1e-6)


@pytest.mark.parametrize("implementation", ["chunked", "pallas_tpu"])
def test_kept_for_the_backward_pass_are_two_sequences(implementation):
    floats, _ = family.split(draw(RECURRENCE, "full").arguments)
    run = partial(linear_recurrence, **family.settings(RECURRENCE, implementation))
    pull = jax.eval_shape(lambda floats: jax.vjp(lambda each: run(**each), floats)[1], floats)
    kept = sum(each.size for each in jax.tree.leaves(pull))
    assert kept <= 2 * floats["x_BLN"].size + 2 * floats["initial_state"].size


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"a_BLN": np.ones((2, 5, 2))}, r"a has shape \(2, 5, 2\) and x \(2, 5, 3\)"),
        ({"a_BLN": np.ones((5, 3)), "x_BLN": np.ones((5, 3))}, r"a has shape .* expected one \(B, L, N\)"),
        ({"a_BLN": np.ones((2, 0, 3)), "x_BLN": np.ones((2, 0, 3))}, "x has length 0"),
        ({"initial_state": np.ones((3, 2))}, r"initial_state has shape \(3, 2\), expected \(2, 3\)"),
        ({"segment_ids": np.ones((5, 2), int)}, r"segment_ids has shape \(5, 2\), expected \(B, L\) = \(2, 5\)"),
        ({"segment_ids": np.ones((2, 5))}, "segment_ids has dtype float64, expected integers"),
        ({"x_BLN": np.ones((2, 5, 3), int)}, "x has dtype int64, expected a real or complex floating type"),
        ({"implementation": "scan"}, "implementation is 'scan', expected one of auto, pallas, reference, chunked"),
    ],
)
def test_bad_arguments_are_named(change, words):
    arguments = {"a_BLN": np.ones((2, 5, 3)), "x_BLN": np.ones((2, 5, 3))} | change
    with pytest.raises(ValueError, match=f"linear_recurrence: {words}"):
        linear_recurrence(**arguments)


@pytest.mark.parametrize("sizes", [{"steps": 0}, {"steps": -4}, {"channels": 64}, {"channels": 200}])
def test_bad_blocks_are_refused(sizes):
    with pytest.raises(
        ValueError, match="LinearRecurrenceBlocks: expected steps >= 1 and channels in multiples of 128"
    ):
        LinearRecurrenceBlocks(**sizes)


@pytest.mark.parametrize(
    ("implementation", "dtype", "blocks", "words"),
    [
        ("pallas_gpu", jnp.float32, LinearRecurrenceBlocks(128), "its blocks have at most 96 steps"),
        ("pallas_gpu", jnp.complex64, None, "not complex64"),
        ("pallas_tpu", jnp.complex64, None, "not complex64"),
    ],
)
def test_kernels_say_what_they_refuse(implementation, dtype, blocks, words):
    array = jnp.ones((2, 5, 3), dtype)
    with pytest.raises(NotImplementedError, match=f"'{implementation}' can't run this: .*{words}"):
        linear_recurrence(array, array, implementation=implementation, blocks=blocks)


def test_the_gpu_kernel_needs_hopper(ampere):
    with pytest.raises(NotImplementedError, match="only Hopper and later"):
        linear_recurrence(np.ones((2, 5, 3)), np.ones((2, 5, 3)), implementation="pallas")

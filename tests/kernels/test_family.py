"""What holds for every op: `reference` against a loop in float64, every implementation against `reference`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import booleans, integers, sampled_from

from tests.kernels import family
from tests.kernels.family import (
    FAST,
    LENGTH,
    Drawn,
    assert_close,
    compute,
    draw,
    every,
    every_case,
    every_op,
    exact,
)
from tests.kernels.ops import ATTENTION, OPS, RECURRENCE

pytestmark = pytest.mark.usefixtures("quick_compile")


def along(op, drawn, direction, step):
    """The outputs' number, by the loop, from arguments moved along a direction."""
    moved = {n: drawn.arguments[n] + step * each for n, each in direction.items()}
    outputs = op.loop(family.wide(drawn.arguments) | moved, drawn.options)
    return sum((c * each).sum().real for c, each in zip(drawn.cotangents, outputs, strict=True))


def directions(gradients, seed=1):
    rng = np.random.default_rng(seed)
    turn = {n: 1 + 1j if np.iscomplexobj(g) else 1.0 for n, g in gradients.items()}
    return {n: turn[n] * rng.normal(size=g.shape) for n, g in gradients.items()}


@pytest.mark.parametrize("L", [1, LENGTH])
@every_case("reference")
def test_the_reference_is_the_float64_loop_and_its_gradients_are_slopes(op, implementation, case, L):
    drawn = draw(op, case, L)
    outputs, gradients = exact(op, drawn)
    assert_close(outputs, op.loop(drawn.arguments, drawn.options), 1e-13)
    for name, direction in directions(gradients).items():
        ends = [along(op, drawn, {name: direction}, step) for step in (1e-5, -1e-5)]
        products = gradients[name] * direction
        assert abs(products.sum().real - (ends[0] - ends[1]) / 2e-5) <= 1e-8 * np.abs(products).sum(), name


@every_case(*FAST, "scan")
def test_values_and_gradients(op, implementation, case):
    """Complex numbers also at length 1: `test_any_shape` draws the others short."""
    for L in (1, LENGTH) if case == "complex" else (LENGTH,):
        drawn = draw(op, case, L)
        found = compute(op, implementation, drawn)
        wanted = jnp.complex64 if case == "complex" else jnp.float32
        assert {each.dtype for each in jax.tree.leaves(found)} == {np.dtype(wanted)}
        assert_close(found, exact(op, drawn), op.tolerance)


@pytest.mark.parametrize("part", [0, 1])
@every(*FAST)
def test_gradients_through_one_output_alone(op, implementation, part):
    arguments, options, cotangents = draw(op, "full")
    cotangents = tuple(c if i == part else np.zeros_like(c) for i, c in enumerate(cotangents))
    drawn = Drawn(arguments, options, cotangents)
    _, gradients = compute(op, implementation, drawn)
    assert_close(gradients, exact(op, drawn)[1], op.tolerance)
    assert np.abs(gradients[op.decay_argument]).max() > 0.01
    assert np.abs(gradients[op.state]).max() > 1e-4


@every_case("chunked", "scan", backwards=True)
def test_float64_where_enabled(op, implementation, case):
    drawn = draw(op, case)
    arguments, ids = family.split(drawn.arguments)
    with jax.enable_x64(True):
        wide = Drawn(family.wide(arguments) | {"segment_ids": ids}, drawn.options, family.wide(drawn.cotangents))
        found = compute(op, implementation, wide)
    assert {each.dtype for each in jax.tree.leaves(found)} == {np.dtype(np.float64)}
    assert_close(found, exact(op, drawn), 1e-13)


@every("pallas_tpu", "pallas_gpu")
def test_kernels_refuse_float64(op, implementation):
    arguments, options, _ = draw(op, "plain", 3)
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match=rf"{op.name}: .*'{implementation}'.* float64"):
        op.run(**family.wide(arguments), **options, **family.settings(op, implementation))


@every_op
def test_second_derivatives(op):
    arguments, options, _ = draw(op, "full", 3)
    arguments, ids = family.split(arguments)

    def curvature(implementation):
        run = partial(op.run, segment_ids=ids, **options, **family.settings(op, implementation))

        def slope(arguments):
            inner = jax.grad(lambda each: (run(**each)[0] ** 2).sum())(arguments)
            return sum((each**2).sum() for each in inner.values())

        return jax.jit(jax.grad(slope))

    with jax.enable_x64(True):
        wanted = family.wide(curvature("reference")(family.wide(arguments)))
    assert_close(curvature("chunked")(arguments), wanted, 1e-5)


@every_case("reference")
def test_steps_are_the_run(op, implementation, case):
    """Backwards or across boundaries there are none."""
    arguments, options, _ = draw(op, case, 4)
    arguments, _ = family.split(arguments)
    options = {name: each for name, each in options.items() if name != "reverse"}
    outputs, final = op.loop(arguments, options)
    step = jax.jit(partial(op.step, **options))
    state = arguments.pop(op.state, np.zeros(final.shape, np.float32))
    for t in range(4):
        now = {n: each[:, t] if family.is_timed(op, case, n) else each for n, each in arguments.items()}
        output, state = step(state, **{name.replace("BL", "B"): each for name, each in now.items()})
        assert_close(output, outputs[:, t], op.tolerance)
    assert_close(state, final, op.tolerance)


@every("chunked")
def test_without_jit(op, implementation):
    arguments, options, _ = draw(op, "full", 3)
    outputs = op.run(**arguments, **options, **family.settings(op, implementation))
    assert_close(outputs, op.loop(arguments, options), op.tolerance)


@every_op
@settings(max_examples=4)
@given(data=st.data())
def test_any_shape_and_flags(op, data):
    """Value, and slope along a direction in all arguments at once."""
    choose = data.draw
    case = choose(sampled_from([case for case in op.cases if case != "complex"]))
    L = choose(sampled_from([1, 2, 5, 8, 13]))
    share = choose(integers(1, 3))
    sizes = {axis: choose(integers(1, 4)) for axis in op.sizes}
    sizes |= {"H": share * sizes.get("G", sizes.get("H", 1)), "D": share * sizes.get("G", 1)}
    sizes |= {"Q": choose(integers(1, 3)) * sizes["H"]}
    drawn = draw(op, case, L, choose(integers(0, 99)), **sizes)
    cuts = choose(st.sets(integers(1, 12)))
    ids = np.cumsum([[t in cuts for t in range(L)]] * sizes["B"], axis=1).astype(np.int32)
    options = drawn.options | {"reverse": choose(booleans())}
    drawn = Drawn(drawn.arguments | {"segment_ids": ids}, options, drawn.cotangents)
    implementation = choose(sampled_from(FAST))
    chunk = 8 if op is ATTENTION and implementation == "pallas_tpu" else choose(sampled_from([1, 4]))
    blocks = type(op.default_blocks)(*[chunk] * (2 if op is ATTENTION else 1))
    outputs, gradients = compute(op, implementation, drawn, blocks=blocks)
    assert_close(outputs, op.loop(drawn.arguments, options), 1e-5)
    direction = directions(gradients)
    ends = [along(op, drawn, direction, step) for step in (1e-5, -1e-5)]
    products = [gradients[name] * each for name, each in direction.items()]
    size = sum(np.abs(each).sum() for each in products)
    assert abs(sum(each.sum() for each in products) - (ends[0] - ends[1]) / 2e-5) <= 1e-5 * size


# Kernels on platforms that are not here


def lowered_cases():
    for op in OPS:
        for platform, variants in op.lowered.items():
            for case, sizes, dtype in variants:
                numbers = "x".join(str(each) for each in sizes.values())
                yield pytest.param(
                    op, platform, case, sizes, dtype, id=f"{op.name}-{platform}-{case}-{numbers}-{dtype}"
                )


@pytest.mark.parametrize(("op", "platform", "case", "sizes", "dtype"), list(lowered_cases()))
def test_kernels_lower_for_their_platform(op, platform, case, sizes, dtype):
    """Forward and backward."""
    run = partial(op.run, **op.cases[case][1], implementation=family.PLATFORMS[platform])
    text = family.lower(family.slopes(run), family.abstract(op, case, sizes, dtype), platform)
    # Linear attention also rebuilds states.
    assert text.count(family.CALLS[platform]) == (3 if op is ATTENTION else 2)


@pytest.mark.parametrize("platform", family.PLATFORMS)
@every_op
def test_kernels_lower_under_vmap_and_remat_and_without_gradients(op, platform):
    """Interpreters of GPUs do no vmap."""
    case, sizes, dtype = op.lowered[platform][-1]
    run = partial(op.run, **op.cases[case][1], implementation=family.PLATFORMS[platform])
    mapped = jax.vmap(jax.checkpoint(lambda arguments: run(**arguments)))
    call = family.CALLS[platform]
    text = family.lower(
        family.slopes(lambda **each: mapped(each)), family.abstract(op, case, sizes, dtype, (3,)), platform
    )
    # The forward pass, which keeps nothing, again for the backward pass, and that.
    assert text.count(call) >= 2
    assert call in family.lower(lambda each: run(**each), family.abstract(op, case, sizes, dtype), platform)


# Memory


def all_states(op, L):
    """Bytes of the states of all steps."""
    return 4 * L * int(np.prod(family.shapes(op, "full", 1, **op.large)[op.state]))


@pytest.mark.parametrize("backward", [False, True])
@every_op
def test_memory_of_chunked_is_linear_in_length(op, backward):
    """As compiled; also far below the states of all steps, where they are more than the outputs."""
    case = "channel" if op is ATTENTION else op.decay_case
    run = partial(op.run, **op.cases[case][1], implementation="chunked")

    def temporary(L):
        arguments = family.abstract(op, case, op.large | {"L": L}, jnp.float32)
        program = jax.jit(family.slopes(run) if backward else lambda arguments: run(**arguments))
        return program.lower(arguments).compile().memory_analysis().temp_size_in_bytes

    short, long = temporary(1024), temporary(4096)
    assert long < 4.2 * short
    assert long < (8 if op in (RECURRENCE, ATTENTION) else 0.5) * all_states(op, 4096)


def on_chip(equation):
    """All that a kernel holds, but for references to the memory of the device."""
    found = []
    for jaxpr in family.held(equation):
        found += jaxpr.invars
        for each in jaxpr.eqns:
            found += [*each.outvars, *on_chip(each)]
    return [variable for variable in found if "gmem" not in str(variable.aval)]


@pytest.mark.parametrize("platform", family.PLATFORMS)
@every_op
def test_memory_of_kernels_is_linear_in_length(op, platform):
    """Of both passes, counted in what is traced: to compile a kernel takes its platform, and of an interpreter the
    memory of the interpreter would be measured. What lies in the memory of the device are arguments, and results of
    operations and of whole kernels: all that are made, without any reuse, is an upper bound of what is there at a time.
    Kept for the backward pass is what `vjp` closes over. What a kernel holds on the chip must not grow at all."""
    case = op.lowered[platform][-1][0]
    dtype = jnp.bfloat16 if op is ATTENTION else jnp.float32
    run = partial(op.run, **op.cases[case][1], implementation=family.PLATFORMS[platform])

    def measured(L):
        arguments = family.abstract(op, case, op.sizes | op.large | {"L": L}, dtype)
        jaxpr = jax.make_jaxpr(family.slopes(run))(arguments).jaxpr
        made, chip = 0, []
        for equation in family.equations(jaxpr, inside=False):
            made += sum(each.aval.size * each.aval.dtype.itemsize for each in equation.outvars)
            if equation.primitive.name in family.KERNELS:
                chip += [str(each.aval) for each in on_chip(equation)]
        pull = jax.eval_shape(lambda each: jax.vjp(lambda arguments: run(**arguments), each)[1], arguments)
        kept = sum(each.size * each.dtype.itemsize for each in jax.tree.leaves(pull))
        return made, kept, chip

    (made, kept, chip), (made_long, kept_long, chip_long) = measured(1024), measured(4096)
    assert made_long <= 4.01 * made
    assert kept_long <= 4.01 * kept
    assert chip == chip_long

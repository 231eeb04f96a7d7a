"""How the common tests of the recurrences draw arguments, run an implementation, and compare."""

from collections.abc import Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import AbstractDevice, AbstractMesh

from tests.kernels.ops import OPS, Arguments, Op

LENGTH = 11
# Below a chunk, one chunk and some steps, and what they add up to with one step more: few programs to compile.
PARTS = ((0, 3), (3, 4), (4, 11))
# The others are held to `reference`. Only small shapes run in the interpreters of TPUs and GPUs.
FAST = ("chunked", "pallas_tpu")
ALL = ("reference", *FAST)
PLATFORMS = {"tpu": "pallas_tpu", "cuda": "pallas_gpu"}
CALLS = {"tpu": "@tpu_custom_call(", "cuda": "@mosaic_gpu_v2("}
STRENGTHS = np.array([0, -1e-3, -1, -20, -80, -200, -np.inf, 0], np.float32)
_INTERPRET = {
    "pallas_tpu": True,
    "pallas_gpu": plgpu.InterpretGPUParams(detect_races=True),
    "tpu_interpreter": pltpu.InterpretParams(detect_races=True),
}
_H200 = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")

every_op = pytest.mark.parametrize("op", OPS, ids=repr)


def every(*implementations: str, ops: tuple[Op, ...] = OPS):
    """Every op in every one of these implementations."""
    pairs = [pytest.param(op, each, id=f"{op.name}-{each}") for op in ops for each in implementations]
    return pytest.mark.parametrize(("op", "implementation"), pairs)


def every_case(*implementations: str, backwards: bool = False):
    """The same in every case that the implementation runs, or in those that run from the last step to the first."""
    triples = [
        pytest.param(op, each, case, id=f"{op.name}-{each}-{case}")
        for op in OPS
        for each in implementations
        for case in op.cases
        if op.runs(each, case) and (not backwards or "reverse" in op.cases[case][1])
    ]
    return pytest.mark.parametrize(("op", "implementation", "case"), triples)


class Drawn(NamedTuple):
    """Arguments by name with their options, and cotangents of the outputs and of the final state."""

    arguments: Arguments
    options: dict[str, Any]
    cotangents: tuple[Any, Any]


def decay_cases(op: Op) -> tuple[str, ...]:
    """Cases that take decays as they are, by each of the ways in which they are computed."""
    return (op.decay_case, *(("channel",) if "channel" in op.cases else ()))


def shapes(op: Op, case: str, L: int, **sizes: int) -> dict[str, tuple[int, ...]]:
    lengths = op.sizes | {"L": L} | sizes
    return {name: tuple(lengths[axis] for axis in axes) for name, axes in op.cases[case][0].items()}


def boundaries(B: int, L: int) -> np.ndarray:
    """At the edges of chunks and inside of them, with segments of one step and ids that come back."""
    rows = [[t // 4 % 3 for t in range(L)], [int(t % 7 in (2, 3, 5)) for t in range(L)]]
    return np.array([rows[-1 - b % 2] for b in range(B)], np.int32)


def draw(op: Op, case: str, L: int = LENGTH, seed: int = 0, **sizes: int) -> Drawn:
    """Numbers that float64 holds exactly, none of them 0. In cases without boundaries all ids are equal, so that they
    share their programs with those that have some; only "plain" has no ids."""
    rng = np.random.default_rng(seed)

    def normal(shape):
        array = rng.normal(size=shape).astype(np.float32)
        return array + 1j * rng.normal(size=shape).astype(np.float32) if case == "complex" else array

    options = op.cases[case][1]
    arguments = {n: normal(shape) for n, shape in shapes(op, case, L, **sizes).items() if n != "segment_ids"}
    arguments = op.adjust(arguments, options)
    if case != "plain":
        B = next(iter(arguments.values())).shape[0]
        bounded = "segment_ids" in op.cases[case][0]
        arguments["segment_ids"] = boundaries(B, L) if bounded else np.zeros((B, L), np.int32)
    outputs = _output_shapes(op, case, tuple((op.sizes | {"L": L} | sizes).items()))
    return Drawn(arguments, options, tuple(normal(shape) for shape in outputs))


@cache
def _output_shapes(op: Op, case: str, sizes: tuple[tuple[str, int], ...]) -> list[tuple[int, ...]]:
    run = partial(op.run, implementation="reference", **op.cases[case][1])
    return [each.shape for each in jax.eval_shape(run, **abstract(op, case, dict(sizes), jnp.float32))]


def with_ids(drawn: Drawn, ids: Any) -> Drawn:
    """The same with these segments in all rows of the batch."""
    B = drawn.arguments["segment_ids"].shape[0]
    return drawn._replace(arguments=drawn.arguments | {"segment_ids": np.array([ids] * B, np.int32)})


def drawn_for_device(op: Op) -> Drawn:
    """Several chunks of the default size, as kernels of every device take them."""
    _, sizes, dtype = op.lowered["cuda"][-1]
    drawn = draw(op, "reverse", **(sizes | {"B": 2, "L": 150}))
    if op.name != "linear_attention":
        return drawn
    narrow = {name: jnp.asarray(drawn.arguments[name], dtype) for name in ("q_BLHK", "k_BLGK", "v_BLGV")}
    return drawn._replace(arguments=drawn.arguments | narrow)


def settings(op: Op, implementation: str) -> dict[str, Any]:
    name = "pallas_tpu" if implementation == "tpu_interpreter" else implementation
    return {
        "implementation": name,
        "interpret": _INTERPRET.get(implementation, False),
        "blocks": op.blocks.get(implementation, op.blocks.get(name)),
    }


def split(arguments: Arguments) -> tuple[Arguments, Any]:
    """Those with gradients, and the segments."""
    return {n: each for n, each in arguments.items() if n != "segment_ids"}, arguments.get("segment_ids")


@cache
def _compiled(op: Op, implementation: str, options: tuple[tuple[str, Any], ...]):
    def compute(arguments, ids, cotangents):
        run = partial(op.run, segment_ids=ids, **(settings(op, implementation) | dict(options)))
        outputs, pull = jax.vjp(lambda arguments: run(**arguments), arguments)
        return outputs, pull(tuple(c.astype(o.dtype) for c, o in zip(cotangents, outputs, strict=True)))[0]

    return jax.jit(compute)


def compute(op: Op, implementation: str, drawn: Drawn, **options: Any) -> tuple[tuple[Any, Any], dict[str, Any]]:
    """Outputs with the final state, and gradients by name."""
    given, ids = split(drawn.arguments)
    program = _compiled(op, implementation, tuple(sorted((drawn.options | options).items())))
    return program(given, ids, drawn.cotangents)


def wide(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.complex128 if np.iscomplexobj(x) else np.float64), tree)


def exact(op: Op, drawn: Drawn):
    """The same of `reference`, in float64."""
    given, ids = split(drawn.arguments)
    with jax.enable_x64(True):
        arguments = wide(given) | ({} if ids is None else {"segment_ids": ids})
        return wide(compute(op, "reference", Drawn(arguments, drawn.options, wide(drawn.cotangents))))


def assert_close(found, wanted, tolerance: float) -> None:
    """Equal up to a share of the largest entry of each array; NaN equals nothing."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (path, mine), theirs in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        mine, theirs = wide((mine, theirs))
        assert mine.shape == theirs.shape, jax.tree_util.keystr(path)
        error, size = np.abs(mine - theirs).max(), np.abs(theirs).max()
        assert error <= tolerance * size + 1e-30, (jax.tree_util.keystr(path), error / size)


def assert_rounded_once(
    op: Op, implementation: str, dtype: Any, case: str, L: int = LENGTH, **sizes: int
) -> dict[str, Any]:
    """With all inputs narrow, nothing but outputs and gradients is rounded, and those once. Returns the gradients."""
    arguments, options, cotangents = draw(op, case, L, **sizes)
    floats, ids = split(arguments)
    narrow = {name: jnp.asarray(each, dtype) for name, each in floats.items()}
    found = compute(op, implementation, Drawn(narrow | {"segment_ids": ids}, options, cotangents))
    (output, final), gradients = found
    assert final.dtype == jnp.float32
    assert {each.dtype for each in gradients.values()} == {np.dtype(dtype)}
    seen = (np.asarray(jnp.asarray(cotangents[0], output.dtype), np.float32), cotangents[1])
    wanted = exact(op, Drawn(wide(narrow) | {"segment_ids": ids}, options, seen))
    for (path, mine), theirs in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        error = np.abs(np.asarray(mine, np.float64) - theirs)
        rounding = 0 if mine.dtype == jnp.float32 else float(jnp.finfo(dtype).eps) / 2
        smallest = 0 if dtype == jnp.bfloat16 else float(jnp.finfo(dtype).smallest_subnormal)
        allowed = rounding * np.abs(theirs) + op.tolerance * np.abs(theirs).max() + smallest
        assert (error <= allowed).all(), (jax.tree_util.keystr(path), (error / allowed).max())
    return gradients


def is_timed(op: Op, case: str, name: str) -> bool:
    return name == "segment_ids" or op.cases[case][0][name].startswith("BL")


def cut(op: Op, case: str, arrays: Arguments, part: slice) -> Arguments:
    """Some steps of what has any."""
    return {n: each[:, part] if is_timed(op, case, n) else each for n, each in arrays.items()}


def abstract(op: Op, case: str, sizes: dict[str, int], dtype: Any, copies: tuple[int, ...] = ()) -> Arguments:
    """Shapes of arguments, without segments; what linear attention's kernels never take narrow is float32."""
    wide = {op.state, "log_decay"}
    return {
        name: jax.ShapeDtypeStruct((*copies, *shape), jnp.float32 if name in wide else dtype)
        for name, shape in shapes(op, case, **sizes).items()
        if name != "segment_ids"
    }


def lower(run, arguments: Arguments, platform: str) -> str:
    """Text of a program for a platform that need not be here. `arguments` may be shapes."""
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=_H200)):
        return jax.jit(run).trace(arguments).lower(lowering_platforms=(platform,)).as_text()


def slopes(run):
    """Gradients of all arguments, of a number that depends on all outputs."""

    def total(arguments):
        outputs = run(**arguments)
        return sum((each.astype(jnp.float32) ** 2).sum() for each in outputs)

    return jax.grad(total)


KERNELS = ("pallas_call", "mpmd_map")


@cache
def traced(op: Op, implementation: str, precision: str | None = None) -> list[Any]:
    """The equations of both passes, also inside of kernels, where this is the default precision of products."""
    arguments, options, _ = draw(op, "reverse", 9)
    floats, ids = split(arguments)
    run = partial(op.run, segment_ids=ids, **options, **settings(op, implementation))
    with jax.default_matmul_precision(precision):
        return list(equations(jax.make_jaxpr(slopes(run))(floats).jaxpr))


def beyond_32_bits(op: Op, platform: str) -> tuple[str, dict[str, int], Any]:
    """A case and a batch for which the largest array that is made on the way has a little more than 2^31 numbers."""
    case, sizes, dtype = op.lowered[platform][-1]
    sizes = sizes | {"B": 1, "L": 2**14}
    run = partial(op.run, **op.cases[case][1], implementation=PLATFORMS[platform])
    jaxpr = jax.make_jaxpr(lambda each: run(**each))(abstract(op, case, sizes, dtype)).jaxpr
    largest = max(variable.aval.size for each in equations(jaxpr, inside=False) for variable in each.outvars)
    return case, sizes | {"B": 2**31 // largest + 1}, dtype


def held(equation: Any) -> list[Jaxpr]:
    """The jaxprs among the parameters of an equation."""
    found = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda each: isinstance(each, Jaxpr | ClosedJaxpr))
    jaxprs = [each.jaxpr if isinstance(each, ClosedJaxpr) else each for each in found]
    return [each for each in jaxprs if isinstance(each, Jaxpr)]


def equations(jaxpr: Jaxpr, inside: bool = True) -> Iterator[Any]:
    """Those that hold no others, also those of kernels if `inside`, and kernels themselves."""
    for equation in jaxpr.eqns:
        kernel = equation.primitive.name in KERNELS
        inner = held(equation)
        if kernel or not inner:
            yield equation
        for each in inner if inside or not kernel else ():
            yield from equations(each, inside)

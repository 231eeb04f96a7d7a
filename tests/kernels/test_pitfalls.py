"""The seventeen ways in which kernels of recurrences are known to go wrong, each held against every op."""

import dataclasses
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import cases
from tests.kernels import family
from tests.kernels.family import ALL, FAST, LENGTH, PARTS, Drawn, assert_close, compute, draw, every, every_op, exact
from tests.kernels.ops import ATTENTION, DELTA, OPS, SCAN

pytestmark = pytest.mark.usefixtures("quick_compile")

ROOT = Path(__file__).parents[2]
GROUPED = tuple(op for op in OPS if op.grouped_case)
# What only the device itself can show is skipped elsewhere, with a word.
ON_DEVICE = [pytest.param(name, marks=mark) for name, mark in (("gpu", pytest.mark.gpu), ("tpu", pytest.mark.tpu))]


@pytest.mark.parametrize("strength", [0, -1e-3, -1, -20, -80, -200, "mixed"])
@every(*ALL)
def test_01_no_decay_overflows(op, implementation, strength):
    """Values and gradients at every strength, also mixed over channels, and down to -inf where that is allowed."""
    for case in family.decay_cases(op):
        drawn = draw(op, case)
        choose = partial(np.random.default_rng(2).choice, family.STRENGTHS)
        fill = choose if strength == "mixed" else lambda shape: np.full(shape, strength, np.float32)
        drawn = drawn._replace(arguments=op.mix(drawn.arguments, fill))
        found = compute(op, implementation, drawn)
        assert all(np.isfinite(each).all() for each in jax.tree.leaves(found))
        assert_close(found, exact(op, drawn), op.tolerance)


@pytest.mark.parametrize("L", [3, LENGTH])
@every(*FAST)
def test_02_cumulative_decays_are_inclusive(op, implementation, L):
    """A state decays by all steps that are run, the first and the last included; what a step writes, only by later
    ones."""
    drawn = draw(op, op.decay_case, L)
    g_BL1 = -np.abs(np.random.default_rng(3).normal(size=(op.sizes["B"], L, 1))).astype(np.float32)
    arguments = op.decay(drawn.arguments, g_BL1)
    whole = np.exp(g_BL1.astype(np.float64).sum(1))
    whole = whole.reshape(-1, *[1] * (arguments[op.state].ndim - 1))
    quiet = arguments | {name: np.zeros_like(arguments[name]) for name in op.writes}
    _, final = compute(op, implementation, drawn._replace(arguments=quiet))[0]
    assert_close(final, whole * arguments[op.state], 1e-6)
    once = arguments | {op.state: np.zeros_like(arguments[op.state])}
    for name in op.writes:
        once[name] = np.where(np.arange(L).reshape(-1, *[1] * (once[name].ndim - 2)), 0, once[name])
    _, final = compute(op, implementation, drawn._replace(arguments=once))[0]
    first = family.cut(op, op.decay_case, once, slice(1))
    _, written = op.loop(first, drawn.options)
    decay = whole / np.exp(g_BL1[:, 0].astype(np.float64)).reshape(whole.shape)
    assert_close(final, decay * written, 1e-6)


@pytest.mark.parametrize(
    ("op", "implementation", "dtype"),
    [
        pytest.param(op, name, dtype, id=f"{op.name}-{name}-{dtype.__name__}")
        for op in OPS
        for name, dtype in (*((name, jnp.bfloat16) for name in ALL), ("chunked", jnp.float16))
    ],
)
def test_03_states_and_sums_are_float32(op, implementation, dtype):
    family.assert_rounded_once(op, implementation, dtype, "full")


@pytest.mark.parametrize("L", [high - low for low, high in PARTS])
@every(*FAST)
def test_04_padding_is_inert_in_both_passes(op, implementation, L):
    """One step, less than a chunk, a chunk and some: in both passes, with the softplus of a bias where there is one."""
    drawn = draw(op, "full", L)
    assert_close(compute(op, implementation, drawn), exact(op, drawn), op.tolerance)


@every(*ALL)
def test_05_segments_equal_separate_runs(op, implementation):
    """They equal separate runs: one below a chunk, one of one step, and a longer one."""
    ids = np.repeat([7, 2, 7], [high - low for low, high in PARTS])
    drawn = family.with_ids(draw(op, "full"), ids)
    (output, final), gradients = compute(op, implementation, drawn)
    sums = {name: 0.0 for name in gradients if not family.is_timed(op, "full", name)}
    last = None
    for low, high in PARTS:
        part = slice(low, high)
        alone = family.cut(op, "full", drawn.arguments, part)
        alone["segment_ids"] = np.zeros_like(alone["segment_ids"])
        if low:
            alone[op.state] = np.zeros_like(alone[op.state])
        weights = (drawn.cotangents[0][:, part], drawn.cotangents[1] * (high == LENGTH))
        (wanted, last), slopes = exact(op, Drawn(alone, drawn.options, weights))
        assert_close(output[:, part], wanted, op.tolerance)
        if low:
            del slopes[op.state]
        sums = {name: each + slopes.get(name, 0.0) for name, each in sums.items()}
        timed = {name: each for name, each in slopes.items() if name not in sums}
        assert_close({name: gradients[name][:, part] for name in timed}, timed, op.tolerance)
    assert_close({name: gradients[name] for name in sums}, sums, op.tolerance)
    assert_close(final, last, op.tolerance)


@pytest.mark.parametrize("edge", [5, 8])
@every(*ALL)
def test_05_no_gradient_crosses_a_boundary(op, implementation, edge):
    """Exactly none, with the boundary inside of a chunk and at its edge."""
    early, late = slice(0, edge), slice(edge, LENGTH)
    for case in {"full", *family.decay_cases(op)}:
        drawn = family.with_ids(draw(op, case), np.arange(LENGTH) >= edge)
        for part, other in ((early, late), (late, early)):
            c_output, c_final = (np.zeros_like(each) for each in drawn.cotangents)
            c_output[:, part] = drawn.cotangents[0][:, part]
            if part == late:
                c_final = drawn.cotangents[1]
            _, gradients = compute(op, implementation, drawn._replace(cotangents=(c_output, c_final)))
            assert np.any(gradients[op.state]) == (part == early)
            if op is not SCAN:
                assert not np.any(gradients[op.decay_argument][:, edge])
            for name, gradient in gradients.items():
                if family.is_timed(op, case, name):
                    assert not np.any(gradient[:, other]), name
                    assert np.all(np.any(gradient[:, part], axis=tuple(range(2, gradient.ndim)))[:, 1:]), name


@pytest.mark.parametrize("cleared", [False, True])
@every(*FAST)
def test_05_weak_decays_behind_strong_ones_keep_their_digits(op, implementation, cleared):
    """Differences of sums near -1,000 would be wrong by 1e-4; with and without a new segment in between."""
    g_BL1 = np.where(np.arange(LENGTH) < 7, -170.1, -0.01).astype(np.float32)[None, :, None]
    for case in family.decay_cases(op):
        drawn = family.with_ids(draw(op, case), (np.arange(LENGTH) >= 7) & cleared)
        drawn = drawn._replace(arguments=op.decay(drawn.arguments, g_BL1))
        assert_close(compute(op, implementation, drawn), exact(op, drawn), op.tolerance)


@every(*FAST)
def test_06_the_initial_state_is_used(op, implementation):
    """Nor what a run without gradients makes of it: kernels then keep no states. Absent, it is zero."""
    arguments, options, _ = draw(op, "full", 3)
    run = jax.jit(partial(op.run, **options, **family.settings(op, implementation)))
    outputs = run(**arguments)
    assert_close(outputs, op.loop(arguments, options), op.tolerance)
    state = arguments.pop(op.state)
    absent, zero = run(**arguments), run(**arguments, **{op.state: np.zeros_like(state)})
    assert_close(absent, zero, 0)
    assert all(np.abs(one - other).max() > 0.01 for one, other in zip(outputs, zero, strict=True))


@every(*FAST)
def test_06_chained_calls_are_one_call(op, implementation):
    """Values by way of states, gradients by way of their cotangents."""
    drawn = draw(op, "full")
    whole, gradients = compute(op, implementation, drawn)
    parts = [family.cut(op, "full", drawn.arguments, slice(*part)) for part in PARTS]
    weights = [drawn.cotangents[0][:, low:high] for low, high in PARTS]
    outputs, state = [], drawn.arguments[op.state]
    for part, weight in zip(parts, weights, strict=True):
        part[op.state] = np.asarray(state)
        (output, state), _ = compute(op, implementation, Drawn(part, drawn.options, (weight, drawn.cotangents[1])))
        outputs.append(output)
    assert_close((np.concatenate(outputs, axis=1), state), whole, op.tolerance)
    d_state, found = drawn.cotangents[1], {}
    for part, weight in zip(parts[::-1], weights[::-1], strict=True):
        _, slopes = compute(op, implementation, Drawn(part, drawn.options, (weight, d_state)))
        d_state = np.asarray(slopes.pop(op.state))
        for name, slope in slopes.items():
            timed = family.is_timed(op, "full", name)
            later = found.get(name)
            found[name] = slope if later is None else np.concatenate([slope, later], 1) if timed else slope + later
    assert_close(found | {op.state: d_state}, gradients, op.tolerance)


@every(*ALL)
def test_07_reverse_is_the_flipped_run(op, implementation):
    drawn = draw(op, "reverse")

    def turned(arrays):
        return {n: each[:, ::-1] if family.is_timed(op, "reverse", n) else each for n, each in arrays.items()}

    (output, final), gradients = compute(op, implementation, drawn)
    flipped = Drawn(turned(drawn.arguments), drawn.options, (drawn.cotangents[0][:, ::-1], drawn.cotangents[1]))
    (wanted, last), slopes = compute(op, implementation, flipped, reverse=False)
    assert_close((output, final), (wanted[:, ::-1], last), 0)
    assert_close(gradients, turned(slopes), op.tolerance)


@every(*FAST, ops=GROUPED)
def test_08_gradients_of_a_group_are_summed_in_float32(op, implementation):
    """Of what heads or channels share, in bfloat16: they are rounded after the sum, and are the sum."""
    gradients = family.assert_rounded_once(op, implementation, jnp.bfloat16, op.grouped_case)
    assert all(np.abs(np.asarray(gradients[name], np.float32)).max() > 0.1 for name in op.shared)


@every(*FAST)
def test_09_gradients_of_gates_are_summed_in_float32(op, implementation):
    """Over several chunks of the size that is the default, with narrow tokens and decays in float32."""
    drawn = draw(op, op.decay_case, 150)
    gates = {op.decay_argument, op.state, "A_DN"}
    tokens = {n: jnp.asarray(x, jnp.bfloat16) for n, x in drawn.arguments.items() if n not in {*gates, "segment_ids"}}
    drawn = drawn._replace(arguments=drawn.arguments | tokens)
    (output, _), gradients = compute(op, implementation, drawn, blocks=op.default_blocks)
    assert gradients[op.decay_argument].dtype == jnp.float32
    seen = (np.asarray(jnp.asarray(drawn.cotangents[0], output.dtype), np.float32), drawn.cotangents[1])
    _, wanted = exact(op, drawn._replace(cotangents=seen))
    assert_close(gradients[op.decay_argument], wanted[op.decay_argument], 2 * op.tolerance)


def precisions(op, implementation, default=None):
    """Of all products of matrices."""
    products = [each for each in family.traced(op, implementation, default) if each.primitive.name == "dot_general"]
    return {each.params["precision"] for each in products}


@every(*ALL)
def test_10_products_are_as_precise_as_told(op, implementation):
    """Devices round what they multiply unless told otherwise. `reference`, the triangular systems of the delta rule and
    the kernels tell them; chunked linear attention does as `jax.default_matmul_precision` says."""
    highest = {(jax.lax.Precision.HIGHEST,) * 2}
    as_told = (op, implementation) == (ATTENTION, "chunked")
    products = as_told or op is DELTA or (op, implementation) == (ATTENTION, "pallas_tpu")
    assert precisions(op, implementation) == ({None} if as_told else highest if products else set())
    assert precisions(op, implementation, "highest") == (highest if products else set())


@pytest.mark.parametrize("platform", family.PLATFORMS)
@every_op
def test_11_indices_go_beyond_32_bits(op, platform):
    """Both passes lower, and no operation outside of kernels counts or addresses elements of flattened arrays."""
    case, sizes, dtype = family.beyond_32_bits(op, platform)
    arguments = family.abstract(op, case, sizes, dtype)
    run = family.slopes(partial(op.run, **op.cases[case][1], implementation=family.PLATFORMS[platform]))
    assert family.CALLS[platform] in family.lower(run, arguments, platform)
    indexed = {"gather", "scatter", "scatter-add", "dynamic_slice", "dynamic_update_slice", "iota"}
    largest = {False: 0, True: 0}
    for each in family.equations(jax.make_jaxpr(run)(arguments).jaxpr, inside=False):
        which = each.primitive.name in indexed
        largest[which] = max(largest[which], *(variable.aval.size for variable in each.outvars))
    assert largest[True] < 2**31 < largest[False]


@pytest.mark.parametrize("platform", ON_DEVICE)
@every_op
def test_11_indices_go_beyond_32_bits_on_the_device(op, platform):
    """All rows of the batch are the same row, and so must be their outputs."""
    case, sizes, dtype = family.beyond_32_bits(op, "cuda" if platform == "gpu" else platform)
    B = sizes["B"]
    drawn = draw(op, case, **(sizes | {"B": 1}))
    row = {n: jnp.asarray(x, dtype) for n, x in drawn.arguments.items() if n != "segment_ids"}
    many = {n: jnp.tile(x, (B, *[1] * (x.ndim - 1))) if op.cases[case][0][n][0] == "B" else x for n, x in row.items()}
    run = jax.jit(partial(op.run, **drawn.options, implementation="pallas"))
    outputs, wanted = run(**many), jax.jit(partial(op.run, **drawn.options, implementation="chunked"))(**row)
    assert all(bool((each == each[:1]).all()) for each in outputs)
    assert_close([each[:1] for each in outputs], list(wanted), 0.01 if op is ATTENTION else 1e-5)


@every(*ALL)
def test_12_sums_have_one_order(op, implementation):
    """Bit for bit the same again."""
    drawn = draw(op, "reverse")
    once, again = (compute(op, implementation, drawn) for _ in range(2))
    assert_close(once, again, 0)


@every(*ALL, "pallas_gpu")
def test_12_nothing_is_added_to_memory_in_any_order(op, implementation):
    """In both passes nothing adds to memory in an order of its own, in kernels neither."""
    names = {each.primitive.name for each in family.traced(op, implementation)}
    assert names & {"mul", "dot_general"}
    assert not [each for each in names if "atomic" in each or "scatter" in each or "addupdate" in each]


@pytest.mark.parametrize("platform", ON_DEVICE)
@every_op
def test_12_sums_have_one_order_on_the_device(op, platform):
    drawn = family.drawn_for_device(op)
    runs = [compute(op, "pallas", drawn) for _ in range(10)]
    for each in runs[1:]:
        assert_close(each, runs[0], 0)


@every_op
def test_13_uninitialised_memory_is_not_read_by_tpu_kernels(op, capfd):
    """In the interpreter of TPUs, whose memory is full of NaN, and which looks for races."""
    assert family.settings(op, "tpu_interpreter")["interpret"].uninitialized_memory == "nan"
    drawn = draw(op, "reverse", 9 if op is ATTENTION else 5)
    assert_close(compute(op, "tpu_interpreter", drawn), exact(op, drawn), op.tolerance)
    assert "RACE" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("op", "case", "L"), [pytest.param(op, case, L, id=f"{op.name}-{case}-{L}") for op in OPS for case, L in op.on_gpu]
)
def test_13_uninitialised_memory_is_not_read_by_gpu_kernels(op, case, L, capfd):
    """The same for GPUs, where half of the decays are of every strength."""
    assert family.settings(op, "pallas_gpu")["interpret"].uninitialized_memory == "nan"
    drawn = draw(op, case, L, **op.gpu_sizes)
    if case not in ("plain", "constant"):
        mixed = op.mix(drawn.arguments, partial(np.random.default_rng(2).choice, family.STRENGTHS))

        def half(plain, mixed):
            return np.where(np.arange(plain.size).reshape(plain.shape) % 2, plain, mixed)

        drawn = drawn._replace(arguments=jax.tree.map(half, drawn.arguments, mixed))
    assert_close(compute(op, "pallas_gpu", drawn), exact(op, drawn), op.tolerance)
    if L == 1:  # Without gradients kernels keep no states.
        run = jax.jit(partial(op.run, **drawn.options, **family.settings(op, "pallas_gpu")))
        assert_close(run(**drawn.arguments), op.loop(drawn.arguments, drawn.options), op.tolerance)
    assert "RACE" not in "".join(capfd.readouterr())


@every_op
def test_14_no_zeros_hide_what_is_wrong(op):
    """No number that these tests draw is zero, nor is any gradient of a full run: all that is wrong shows. Zeros also
    run faster, so benchmarks draw none either."""
    for case in op.cases:
        floats, _ = family.split(draw(op, case).arguments)
        assert all(np.all(each) for each in floats.values())
    drawn = draw(op, "full")
    assert all(np.all(each) for each in drawn.cotangents)
    outputs, gradients = exact(op, drawn)
    assert all(np.all(each) for each in (*outputs, *gradients.values()))
    for case in cases.CASES:
        assert all(np.all(each) for each in cases.draw(case, 7, cases.TINY).values())


@every(*FAST)
def test_15_written_gradients_under_vmap_jit_and_remat(op, implementation):
    many = [draw(op, "full", 3, seed) for seed in range(2)]
    ids, options = many[0].arguments["segment_ids"], many[0].options
    run = partial(op.run, segment_ids=ids, **options, **family.settings(op, implementation))

    def one(arguments, cotangents):
        outputs, pull = jax.vjp(jax.checkpoint(lambda arguments: run(**arguments)), arguments)
        return outputs, pull(cotangents)[0]

    floats = [family.split(each.arguments)[0] for each in many]
    stacked = jax.tree.map(lambda *each: np.stack(each), *zip(floats, (each.cotangents for each in many), strict=True))
    found = jax.jit(jax.vmap(one))(*stacked)
    for i, each in enumerate(many):
        assert_close(jax.tree.map(lambda x, i=i: x[i], found), exact(op, each), op.tolerance)


@every(*FAST)
def test_15_written_gradients_under_shard_map(op, implementation):
    """With the batch on two simulated devices; the gradients of what all rows share are summed over them."""
    drawn = draw(op, "full", 3)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices("cpu")[:2])
    rows, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    axes = op.cases["full"][0] | {"segment_ids": "BL"}
    specs = {name: rows if axes[name].startswith("B") else whole for name in drawn.arguments}
    run = partial(op.run, **drawn.options, **family.settings(op, implementation))
    sharded = jax.shard_map(
        lambda arguments: run(**arguments), mesh=mesh, in_specs=(specs,), out_specs=rows, check_vma=False
    )
    floats, ids = family.split(drawn.arguments)

    def both(floats, cotangents):
        outputs, pull = jax.vjp(lambda floats: sharded(floats | {"segment_ids": ids}), floats)
        return outputs, pull(cotangents)[0]

    found = jax.jit(both)(floats, drawn.cotangents)
    assert len(found[0][0].sharding.device_set) == 2
    assert_close(found, exact(op, drawn), op.tolerance)


@pytest.mark.parametrize("implementation", ["chunked", *ON_DEVICE])
@every_op
def test_16_the_compiler_of_the_device_is_right(op, implementation, full_compile):
    """Every value and gradient as compiled for the device that is here, with all optimisations, in the default blocks.
    Interpreters can't show this: kernels take a device."""
    drawn = family.drawn_for_device(op)
    implementation = "chunked" if implementation == "chunked" else "pallas"
    (output, final), gradients = compute(op, implementation, drawn, blocks=None, interpret=False)
    seen = (np.asarray(jnp.asarray(drawn.cotangents[0], output.dtype), np.float32), drawn.cotangents[1])
    with jax.default_device(jax.devices("cpu")[0]):
        wanted = exact(op, drawn._replace(cotangents=seen))
    assert_close(((output, final), gradients), wanted, 0.01 if op is ATTENTION else 2e-5)


def test_16_so_is_the_usual_compiler_of_the_cpu():
    """In a process of its own, as tests compile with flags (`tests/conftest.py`) that hold as long as a process."""
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-k", "test_16_the_compiler", __file__]
    env = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert f"{len(OPS)} passed" in done.stdout


@every(*FAST)
def test_17_no_tuning_changes_numbers(op, implementation):
    """Blocks are an argument that can't be changed. Left out they are the default ones, whatever was run before; those
    and the small ones of the other tests are held to the same numbers."""
    drawn = draw(op, "full")
    floats, ids = family.split(drawn.arguments)
    run = partial(op.run, segment_ids=ids, **drawn.options, **family.settings(op, implementation))

    def program(blocks):
        return str(jax.make_jaxpr(family.slopes(partial(run, blocks=blocks)))(floats))

    before = program(None)
    assert before == program(op.default_blocks) == program(type(op.default_blocks)())
    others = family.settings(op, implementation)["blocks"]
    assert others is None or before != program(others)
    assert program(None) == before
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(op.default_blocks, dataclasses.fields(op.default_blocks)[0].name, 1)

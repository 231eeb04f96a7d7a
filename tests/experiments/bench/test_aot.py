"""What `make aot` would compile, and what it makes of the answers; nothing here compiles for a device."""

import json
import os
from functools import partial
from itertools import product

import jax
import pytest

import kernels
from experiments.bench import aot
from experiments.bench.aot import Result
from experiments.bench.aot_cases import DTYPES, PASSES, SIZES, TARGETS, VARIANTS, cases

OPS = {name for name in kernels.__all__ if f"{name}_step" in kernels.__all__}


def pick(**wanted):
    """The first case with these names."""
    return next(case for case in cases() if wanted.items() <= case.names.items())


def test_every_op_is_compiled_for_every_device_in_both_passes():
    found = {tuple(case.names[key] for key in ("op", "target", "dtype", "size", "pass")) for case in cases()}
    assert found == set(product(OPS, (target.name for target in TARGETS), DTYPES, SIZES, PASSES))
    assert {target.runtime for target in TARGETS} == {"tpu", "gpu"}
    assert {target.name for target in TARGETS} == {"v5e", "v5p", "v6e", "H200"}


def test_every_op_compiles_for_every_device():
    compiled = {(case.names["op"], case.target.name, case.passes) for case in cases() if case.refused is None}
    assert compiled == set(product(OPS, (target.name for target in TARGETS), PASSES))


def test_every_kind_of_decay_and_gate_is_there():
    given = {
        op: {tuple(each.arguments.get(key, "") for key in keys) for each in VARIANTS if each.op.__name__ == op}
        for op, keys in (("linear_attention", ["log_decay"]), ("delta_rule", ["log_decay_BLH"]))
    }
    assert given["linear_attention"] == {("",), ("H",), ("BLH",), ("BLHK",)}
    assert ("",) in given["delta_rule"]
    assert ("BLH",) in given["delta_rule"]


def test_names_tell_cases_apart():
    names = [tuple(case.names.values()) for case in cases()]
    assert len(set(names)) == len(names)
    assert {case.names["op"] for case in cases("delta_rule / ")} == {"delta_rule"}
    assert cases("no such op") == []


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda each: f"{each.op.__name__} {each.name}")
@pytest.mark.parametrize("size", SIZES)
def test_arguments_are_those_of_the_op(variant, size):
    case = pick(op=variant.op.__name__, variant=variant.name, size=size, dtype="bfloat16")
    run = partial(variant.op, implementation="chunked", **variant.options)
    y, state = jax.eval_shape(lambda arguments: run(**arguments), case.arguments())
    assert y.shape[1] == SIZES[size]["L"]
    assert state.dtype == "float32"


@pytest.mark.parametrize(
    "case", [case for case in cases() if case.refused], ids=lambda case: "-".join(case.names.values())
)
def test_refusals_are_the_kernels_own(case):
    with pytest.raises(NotImplementedError, match=case.refused):
        jax.eval_shape(case.program, case.arguments())


def test_result_is_expected_if_it_is_what_the_case_says():
    compiles, refuses = pick(op="delta_rule", target="H200"), pick(variant="64 states", target="H200")
    assert Result("compiled").expected(compiles)
    assert not Result("refused", "no").expected(compiles)
    assert not Result("failed", "no").expected(compiles)
    assert Result("refused", f"op: {refuses.refused} of them").expected(refuses)
    assert not Result("refused", "for another reason").expected(refuses)
    assert not Result("compiled").expected(refuses)


def test_ptxas_report_is_read():
    text = """
Resources(smem_scratch_bytes=4096, tmem_scratch_cols=0)
Resources(smem_scratch_bytes=512, tmem_scratch_cols=0)
ptxas warning : Registers are spilled to local memory in function 'one', 8 bytes spill stores, 16 bytes spill loads
    24 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 255 registers, used 2 barriers, 24 bytes cumulative stack size, 1 bytes smem
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 1 bytes smem
"""
    assert aot.read_ptxas(text) == {"registers": [255, 40], "spilled": [8, 0], "shared": [4096, 512]}


def test_vector_memory_is_read_of_kernels_alone():
    used = '"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"%d"}],"retry_config":{}'
    call = '%%k = f32[8] custom-call(%%x), custom_call_target="%s", backend_config={"scoped_memory_configs":[],%s}'
    text = "\n".join(
        [call % ("tpu_custom_call", used % 1024), call % ("Sharding", used % 7), "%f = fusion(), " + used % 5]
    )
    assert aot.read_vmem(text) == {"vmem": [1024]}


def test_tables():
    tpu, refused = pick(op="selective_scan", target="v5e"), pick(variant="64 states", target="H200")
    gpu = pick(op="selective_scan", target="H200", **{"pass": "gradients"})
    results = [
        (tpu, Result("compiled", "", 1.26, 3 * 2**20, {"vmem": [2**19, 2**18]})),
        (gpu, Result("compiled", "", 2.0, 0, {"registers": [9, 12], "spilled": [0, 4], "shared": [2048, 1024]})),
        (refused, Result("refused", "64 states, more than 48 | all")),
    ]
    lines = aot.table(results).splitlines()
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert lines[2].endswith("| float32 | forward | compiled | 1.3 | 3.0 | 0.50, 0.25 MiB VMEM |")
    assert lines[3].endswith("| 9, 12 registers; 0, 4 B spilled; 2, 1 KiB shared |")
    assert lines[4].endswith("| refused: 64 states, more than 48 \\| all |  |  |  |")
    failed = aot.table([(tpu, Result("failed", "RuntimeError: out of memory"))])
    assert "| **unexpected** failed: RuntimeError: out of memory |" in failed
    assert aot.summary(results).splitlines()[2:] == [
        "| selective_scan | maps shared | 1 compiled; 0.50 MiB VMEM |  |  "
        "| 1 compiled; 12 registers; 4 B spilled; 2 KiB shared |",
        "| selective_scan | 64 states |  |  |  | 1 refused (64 states, more than 48) |",
    ]


def test_worker_that_dies_costs_one_case(tmp_path):
    """The stand-in reports one case and dies on the next, so that of three cases the second fails."""
    python = tmp_path / "python"
    line = json.dumps({"outcome": "compiled", "seconds": 2.0})
    python.write_text(f"#!/bin/sh\necho '[]'\necho '{line}'\nexit 3\n")
    python.chmod(0o755)
    chosen = cases("linear_recurrence / real / v5e / small")[:3]
    results = list(aot.compile_all(chosen, python, tmp_path / "log"))
    assert [case for case, _ in results] == chosen
    assert [result.outcome for _, result in results] == ["compiled", "failed", "compiled"]
    assert "status 3" in results[1][1].message


def test_environment_without_the_runtime_is_said(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho missing >&2\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(SystemExit, match="can't run the worker"):
        list(aot.compile_all(cases()[:1], python, tmp_path / "log"))
    assert (tmp_path / "log").read_text() == "missing\n"


def test_error_is_cut_to_a_line():
    assert aot.first_line(ValueError("\n  too large\nand more")) == "ValueError: too large"
    assert aot.first_line(ValueError("Code:\n\nMemory is full\nand more")) == "ValueError: Code: Memory is full"
    assert aot.first_line(ValueError()) == "ValueError:"


def test_what_libraries_print_is_caught(capfd):
    with aot.printed() as texts:
        os.write(1, b"inside")
    os.write(1, b"outside")
    assert texts == ["inside"]
    assert capfd.readouterr().out == "outside"

"""The benchmark of the kernels: contenders compute one function, workers refuse with reasons, tables say what is so."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import cases, contenders, kernel_report, kernels, numerics
from experiments.bench.kernel_report import AUTO, SCAN, Row
from experiments.bench.peers import PEERS, environment
from experiments.bench.worker import Local, Process

pytestmark = pytest.mark.usefixtures("quick_compile")
SIZES = cases.Sizes(B=2, H=3, K=5, V=7, D=6, N=4, real=5, complex=3)
L = 11


def request(**options):
    """One that asks to prepare our token scan of the real recurrence, unless told otherwise."""
    known = {"key": "one", "name": SCAN, "case": "real", "length": 8, "sizes": "tiny", "backward": True}
    known |= {"narrow": False, "platform": "cpu", "most_bytes": 1e9, "compare": "", "keep": "", "tolerance": 1e-3}
    return {"do": "prepare", "with": known | options}


def rows(case="linear", backward=False, exponent=1.0, **scales):
    """Synthetic rows: at length L each contender takes its scale times L to the exponent, in microseconds."""
    names = {"auto": AUTO, "scan": SCAN}
    return [
        Row(case, backward, length, names.get(name, name), 1e-6 * scale * length**exponent, 0.0, 0.0, 2.0**20, 0.0)
        for name, scale in scales.items()
        for length in (512, 1024, 2048, 4096)
    ]


@pytest.mark.parametrize("case", cases.CASES)
@pytest.mark.parametrize("name", ["quadratic", "associative scan"])
def test_textbook_forms_compute_the_op(case, name):
    arrays = cases.draw(case, L, SIZES)
    shape = arrays.pop("cotangent").shape
    assert {each: array.shape for each, array in arrays.items()} == cases.shapes(case, L, SIZES)
    if name == "quadratic" and case in ("selective", "real", "complex"):
        with pytest.raises(NotImplementedError, match="one mixing matrix a channel"):
            contenders.find(case, name)
        return
    found = contenders.find(case, name)
    arrays = {each: jnp.asarray(array) for each, array in arrays.items()}
    wanted = jax.jit(contenders.ours(case, "reference"))(**arrays)
    assert wanted.shape == shape
    np.testing.assert_allclose(jax.jit(found)(**arrays), wanted, rtol=0, atol=2e-6 * jnp.abs(wanted).max())


def test_work_grows_with_the_length_and_with_the_backward_pass():
    for case in cases.CASES:
        for count in (cases.flops, lambda *args: cases.traffic(*args, narrow=2)):
            short, long = (count(case, length, cases.GPU, False) for length in (1024, 4096))
            assert long == pytest.approx(4 * short, rel=0.02)
            assert count(case, 1024, cases.GPU, True) > 2 * short
    assert cases.flops("attention", 64, cases.GPU, False) == 2 * 64 * 16 * 64 * (128 + 128)


def test_a_worker_checks_before_it_times(tmp_path):
    worker, kept = Local(), str(tmp_path / "kept.npz")
    answer = worker.ask(request(keep=kept))
    assert answer["error"] is None
    assert set(np.load(kept).files) == {"y", "d_a", "d_x"}
    answer = worker.ask(request(name="associative scan", key="two", compare=kept))
    assert answer["error"] < 1e-5
    assert worker.ask({"do": "time", "with": {"key": "two", "calls": 2}})["seconds"] > 0
    with np.load(kept) as right:
        np.savez(kept, **{name: array + 1 if name == "d_a" else array for name, array in right.items()})
    assert "wrong: differs" in worker.ask(request(name="associative scan", compare=kept))["refused"]
    with np.load(kept) as right:
        np.savez(kept, **{name: array * np.nan if name == "y" else array for name, array in right.items()})
    assert "wrong: differs" in worker.ask(request(compare=kept))["refused"]
    assert "needs 0.0 GiB" in worker.ask(request(name="associative scan", most_bytes=0))["refused"]
    assert "one mixing matrix" in worker.ask(request(name="quadratic"))["refused"]
    worker.ask({"do": "drop", "with": {}})
    assert "KeyError" in worker.ask({"do": "time", "with": {"key": "two", "calls": 1}})["refused"]


def test_workers_in_other_processes(tmp_path):
    log = tmp_path / "log"
    worker = Process(Path(sys.executable), "", log, patience=120)
    try:
        assert worker.ask(request())["seconds"] > 0
        assert worker.running is not None
        worker.running.kill()
        worker.running.wait()
        assert worker.ask(request())["refused"] == "its process died"
    finally:
        worker.close()
    for patience, peer, reason in ((120, "mamba2-jax", "No module named 'mamba2_jax'"), (0, "", "no answer in 0 s")):
        worker = Process(Path(sys.executable), peer, log, patience)
        try:
            assert reason in worker.ask(request(case="linear_head"))["refused"]
        finally:
            worker.close()


def test_a_peer_says_what_it_lacks_and_why_it_is_not_installed(tmp_path, monkeypatch):
    with pytest.raises(NotImplementedError, match="it has no op for complex"):
        PEERS["mamba2-jax"].find("complex", "cpu")
    failed = subprocess.CompletedProcess([], 1, "", "first\nlast words\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(NotImplementedError, match="not installed: last words"):
        environment("ejkernel", tmp_path)
    workers, absent = kernels.start_workers("cpu", tmp_path, tmp_path / "log", 1)
    assert set(workers) == set(kernels.SETTINGS["cpu"].contenders)
    assert "- ejkernel: not installed: last words" in absent
    assert "- mamba-ssm: it is timed on gpu only" in absent
    assert "- discretax: --peers names no folder" in kernels.start_workers("cpu", None, tmp_path / "log", 1)[1]


def test_cells_that_are_known_are_not_timed_again():
    workers = {name: Local() for name in (SCAN, AUTO)}

    def run(known=(), slowest=9.0, lengths=(4, 8)):
        return [*kernels.measure("cpu", workers, ["real"], lengths, 1, 1e9, slowest, known)]

    first = run(lengths=(4,))
    assert [row.contender for row in first[0]] == [SCAN, AUTO]
    assert all(row.seconds and not row.reason for cell in first for row in cell)
    known = [row for cell in first for row in cell]
    again = run(known, slowest=0.0)
    assert [(cell[0].backward, cell[0].length) for cell in again] == [(False, 8), (True, 8)]
    assert all("a call took" in row.reason for cell in again for row in cell)


def test_the_tables():
    measured = rows(auto=1.0, scan=0.5) + rows(backward=True, auto=2.0, scan=8.0, other=4.0, exponent=1.5)
    measured.append(Row("linear", True, 8192, "other", reason="needs 9.0 GiB"))
    measured.append(Row("linear", True, 8192, "peer", reason="it has no op for linear"))
    table = kernel_report.table(measured)
    assert "| linear | forward | ours reference | 0.256 (0.5x) | 0.512 (0.5x) |" in table
    assert "| - | 1 at 4096 |" in table
    goals = kernel_report.goals(measured)
    assert "2.00 at 4096 (ours reference): misses | 0.50 at 4096 (other): holds | 1.00, 1.50 |" in goals
    assert kernel_report.missing(measured) == "- other, linear: forward+backward at 8192: needs 9.0 GiB"
    within = kernel_report.goals(rows(auto=1.0, scan=0.9))
    assert "1.11 at 4096 (ours reference): holds | not measured | 1.00, - |" in within


def test_the_growth_of_time_with_length():
    measured = rows(scan=0.5, auto=1.0) + rows(backward=True, auto=2.0, scan=8.0, exponent=1.5)
    measured += rows(backward=True, other=4.0, exponent=2.0)[:3] + rows(case="linear_head", scan=1.0)[:2]
    measured.append(Row("linear_head", False, 8192, "ours reference", reason="needs 9.0 GiB"))
    assert kernel_report.growths(measured).splitlines() == [
        "| case | pass | ours auto | ours reference | other |",
        "| --- | --- | --- | --- | --- |",
        "| linear | forward | 1.00 | 1.00 | - |",
        "| linear | forward+backward | 1.50 | 1.50 | 2.00 (512-2048) |",
        "| linear_head | forward | - | - | - |",
    ]
    seconds = (1e-3, 3e-3, 4e-3)
    uneven = [Row("linear", False, 2**n, AUTO, each) for n, each in zip((10, 11, 13), seconds, strict=True)]
    # Slope of the line through (-4/3, log 1), (-1/3, log 3), (5/3, log 4), in doublings of length.
    slope = (-np.log2(3) / 3 + 5 * np.log2(4) / 3) / (16 + 1 + 25) * 9
    assert kernel_report.growth(uneven) == pytest.approx(slope)


def test_the_figure(tmp_path):
    kernel_report.draw(rows(auto=1.0, scan=0.5), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_without_a_gpu_the_script_says_what_it_did_not_measure(capsys):
    if jax.default_backend() == "gpu":
        pytest.skip("needs a machine without a GPU")
    kernels.main(device="gpu")
    said = capsys.readouterr().out
    assert "no GPU here" in said
    for name in ("ours pallas_gpu", "flash-linear-attention", "mamba-ssm", "softmax attention", "65536"):
        assert name in said
    with pytest.raises(ValueError, match=r"which has \['lstm'\], expected some of \['linear'"):
        kernels.main(which=("lstm",))


@pytest.mark.slow
@pytest.mark.parametrize(("case", "refusal"), [("linear", ""), ("linear_channel", ""), ("complex", "complex64")])
def test_the_path_of_the_gpu_with_interpreted_kernels(case, refusal, tmp_path, capsys):
    out = tmp_path / "rows.json"
    kernels.main(device="interpret", which=(case,), repeats=1, out=out, figure=tmp_path / "figure.png")
    said = capsys.readouterr().out
    assert "ceilings: matrix product" in said
    assert "| " + case + " | forward+backward | ours auto | 64 |" in said
    assert "flash-linear-attention: it is timed on gpu only" in said
    found = [Row(**row) for row in json.loads(out.read_text())]
    interpreted = [row for row in found if row.contender == "ours pallas_gpu interpreted"]
    assert len(interpreted) == 2
    if refusal:
        assert all(refusal in row.reason for row in interpreted)
        assert f"ours pallas_gpu interpreted, {case}" in said
    else:
        assert all(row.seconds and row.error is not None and row.error < 2e-2 for row in interpreted)


def test_errors_against_float64():
    exact = numerics.compare("real", False, "chunked", L, SIZES)
    assert 0 < exact.output < 1e-6
    assert 0 < exact.gradient < 1e-6
    narrow = numerics.compare("linear_head", True, "chunked", L, SIZES)
    assert 1e-4 < narrow.output < 5e-3
    refused = numerics.compare("complex", False, "pallas_gpu interpreted", L, SIZES)
    table = numerics.table([exact, refused])
    assert "| case | inputs | chunked, 11 | pallas_gpu interpreted, 11 |" in table
    assert f"| real | float32 | {exact.output:.1e}, {exact.gradient:.1e} ({exact.worst}) | - |" in table
    assert "| complex | complex64 | - | refused |" in table
    assert "- complex: linear_recurrence: implementation 'pallas_gpu' can't run this" in table


def test_the_scan_is_measured_where_an_op_has_one():
    for case in cases.CASES:
        if case in numerics.SCANNED:
            assert numerics.compare(case, False, "scan", L, SIZES).gradient < 2e-6
        else:
            with pytest.raises(ValueError, match="implementation is 'scan', expected one of"):
                numerics.compare(case, False, "scan", L, SIZES)

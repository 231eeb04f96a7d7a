"""The mixers' benchmark: what it runs, what it skips, and the curves that it fits."""

import json

import jax
import numpy as np
import pytest

from experiments.bench import mixers
from experiments.bench.mixers import Row

pytestmark = pytest.mark.usefixtures("quick_compile")


def run(tmp_path, **options):
    return mixers.main(mixers=("attention", "rglru"), lengths=(32, 64, 128), width=8, heads=2, repeats=1, **options)


def test_every_pass_is_measured_once(tmp_path, capsys):
    out, figure = tmp_path / "rows.json", tmp_path / "figure.png"
    rows = run(tmp_path, out=out, figure=figure)
    causal = [row for row in rows if row.causal]
    assert [(row.mixer, row.run, row.length) for row in causal] == [
        (name, each, length) for name in ("attention", "rglru") for length in (32, 64, 128) for each in mixers.PASSES
    ]
    assert all(row.seconds > 0 and row.temporary > 0 for row in rows if row.run != "step")
    assert figure.stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "| attention | forward+backward |" in printed
    assert "| rglru | step |" in printed
    # The scores of attention are quadratic in length, the states of a recurrence linear.
    memory = {
        name: mixers.exponent([r for r in causal if (r.mixer, r.run) == (name, "forward+backward")], "temporary")
        for name in ("attention", "rglru")
    }
    assert memory["attention"] > 1.4
    assert 0.8 < memory["rglru"] < 1.2
    # A run that is cut short goes on.
    kept = json.loads(out.read_text())
    out.write_text(json.dumps(kept[:-4]))
    again = run(tmp_path, out=out)
    assert len(again) == len(rows)
    assert [(row.mixer, row.run, row.length) for row in again] == [(r.mixer, r.run, r.length) for r in rows]


def test_what_is_too_large_or_too_slow_is_left_out(tmp_path, capsys):
    rows = run(tmp_path, memory_gib=1e-9)
    assert all(row.seconds is None and "needs 0.0 GiB at length 32" in row.reason for row in rows if row.temporary)
    assert "Not measured:" in capsys.readouterr().out
    rows = run(tmp_path, slowest=0.0)
    assert all((row.seconds is not None) == (row.length == 32) for row in rows)


def made(name: str, curve) -> list[Row]:
    return [Row(name, True, "forward", n, curve(n), int(1e6 * curve(n))) for n in (256, 512, 1024, 4096)]


def test_exponents_and_efficiency_lengths_of_known_curves():
    attention = made("attention", lambda n: 1e-4 + 2e-9 * n**2)
    linear = made("rglru", lambda n: 4e-6 * n)
    assert abs(mixers.exponent(linear) - 1) < 1e-6
    # 1e-4 + 2e-9 n^2 = 4e-6 n
    expected = max(np.roots([2e-9, -4e-6, 1e-4]))
    np.testing.assert_allclose(mixers.efficiency_length(attention, linear), expected, rtol=1e-6)
    np.testing.assert_allclose(mixers.efficiency_length(attention, linear, "temporary"), expected, rtol=0.02)
    assert mixers.efficiency_length(attention, made("fast", lambda n: 1e-7 * n)) == 0
    assert mixers.efficiency_length(linear, linear) is None
    assert mixers.efficiency_length(attention, linear[:2]) is None
    assert mixers.exponent(linear[:2]) is None


def test_a_step_reads_a_state_of_the_whole_length():
    mixer = mixers.MIXERS["attention"]
    config = mixer.config(8, 2, 1.0, 64, True)
    _, shapes = mixers.programs(mixer, config, 3, 64)["step"]
    assert any(leaf.shape[:2] == (3, 64) for leaf in jax.tree.leaves(shapes[2]))

"""The whole experiment at the tiny preset: every stage, its files, and going on after a stop."""

import json

import numpy as np
import pytest

from experiments.internal_rl import compare
from experiments.internal_rl.__main__ import main
from experiments.internal_rl.pipeline import STAGES

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compile")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished tiny run, made in two goes: some stages, then the rest."""
    path = tmp_path_factory.mktemp("run") / "tiny"
    main(["--preset", "tiny", "--out", str(path), "--stages", "pretrain", "probe"])
    assert not (path / "metacontrollers.npz").exists()
    result = main(["--preset", "tiny", "--out", str(path), "--resume"])
    return path, result


def test_result_says_what_was_measured(finished):
    path, result = finished
    stored = json.loads((path / "result.json").read_text())
    assert set(stored) >= {"claim", "measured", "holds", "seeds", "spread", "claims"}
    assert stored["holds"] is False, "a few steps of training cannot show the claim"
    assert len(stored["claims"]) == 5
    measured = stored["measured"]
    assert len(measured["control"]["success_by_layer"]) == 3
    assert 0 <= measured["codes"]["information"] <= measured["codes"]["at_most"]
    assert set(measured["final_success"]) == {"internal", "raw", "forced"}
    assert all(len(success) == stored["seeds"] == 2 for success in measured["final_success"].values())
    assert result["claims"][0]["claim"] == stored["claims"][0]["claim"]


def test_files_a_person_looks_for(finished):
    path, _ = finished
    for name in ("config.json", "metrics.jsonl", "report.html", "base.npz", "metacontrollers.npz"):
        assert (path / name).stat().st_size > 0
    figures = {item.name for item in (path / "figures").iterdir()}
    assert figures == {
        "probe.png", "control.png", "gate.png", "sweep.png", "reinforcement.png", "before.gif", "after.gif"
    }  # fmt: skip
    stages = {json.loads(line)["stage"].split("-")[0] for line in (path / "metrics.jsonl").read_text().splitlines()}
    assert stages == set(STAGES)


def test_resuming_a_finished_run_changes_nothing(finished):
    path, result = finished
    base = (path / "base.npz").read_bytes()
    again = main(["--preset", "tiny", "--out", str(path), "--resume"])
    assert again["measured"] == result["measured"]
    assert (path / "base.npz").read_bytes() == base


def test_same_seed_same_numbers(finished, tmp_path):
    path, _ = finished
    main(["--preset", "tiny", "--out", str(tmp_path / "again"), "--stages", "pretrain"])
    one, other = np.load(path / "base.npz"), np.load(tmp_path / "again" / "base.npz")
    for name in one.files:
        np.testing.assert_array_equal(one[name], other[name])


def test_another_mixer_and_seeds_side_by_side(tmp_path):
    options = ["--base.mixer", "rglru", "--reinforce.seeds-by", "vmap", "--reinforce.no-forced-baseline"]
    result = main(["--preset", "tiny", "--out", str(tmp_path), "--stages", "discover", "reinforce", *options])
    final = result["measured"]["final_success"]
    assert set(final) == {"internal", "raw"}
    assert all(0 <= success <= 1 for seeds in final.values() for success in seeds)


def test_refusals(finished, tmp_path, capsys):
    path, _ = finished
    with pytest.raises(SystemExit):
        main(["--preset", "tiny", "--out", str(path)])
    assert "not empty" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--preset", "tiny", "--out", str(path), "--resume", "--seed", "1"])
    assert "seed" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--preset", "tiny", "--out", str(tmp_path / "new"), "--stages", "reinforce"])
    assert "needs stage discover" in capsys.readouterr().err


def test_runs_are_compared_in_a_table(finished, tmp_path, capsys):
    path, result = finished
    part = tmp_path / "part"
    main(["--preset", "tiny", "--out", str(part), "--stages", "pretrain", "--base.mixer", "rglru", "--seed", "3"])
    capsys.readouterr()
    compare.main([str(path), str(part)])
    columns, _, whole, partial = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()
    )
    assert columns == list(compare.COLUMNS)
    measured, cells = result["measured"], dict(zip(columns, whole, strict=True))
    assert (cells["mixer"], cells["seed"]) == ("attention", "0")
    success = [float(value) for value in cells["controllers, by layer"].split()]
    np.testing.assert_allclose(success, measured["control"]["success_by_layer"], atol=0.005)
    low, middle, high = np.quantile(measured["final_success"]["internal"], [0.25, 0.5, 0.75])
    assert cells["internal RL"] == f"{middle:.2g} ({low:.2g} to {high:.2g})"
    assert partial == ["rglru", "3", *[""] * 9, "0 of 0"]
    with pytest.raises(SystemExit):
        compare.main([str(tmp_path)])
    assert "is no finished run: it has no config.json" in capsys.readouterr().err

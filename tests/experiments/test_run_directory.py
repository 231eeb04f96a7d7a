"""Run directories: what they refuse, what they record, what a stage leaves in them."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.run_directory import RunDirectory, RunError, resume_command

CONFIG = {"seed": 3, "lr": 0.1, "model": {"width": 5}}


def test_config_json_says_what_the_run_was(tmp_path):
    run = RunDirectory.open(tmp_path / "a" / "run", CONFIG | {"sizes": (2, 3)}, resume=False)
    stored = json.loads((run.path / "config.json").read_text())
    assert stored["config"] == run.config == CONFIG | {"sizes": [2, 3]}
    assert stored["versions"]["jax"] == jax.__version__
    assert set(stored["versions"]) >= {"python", "flax", "optax", "gymnax", "brax"}
    assert stored["device"]["kind"] == jax.devices()[0].device_kind
    assert stored["seed"] == 3


def test_a_directory_of_no_use_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunError, match=r"cannot write to .*name a directory that can be made"):
            RunDirectory.open(path, CONFIG, resume=False)
    with pytest.raises(RunError, match="is not empty: resume the run"):
        RunDirectory.open(tmp_path, CONFIG, resume=False)
    with pytest.raises(RunError, match=r"holds something else than a run \(it has no config.json\)"):
        RunDirectory.open(tmp_path, CONFIG, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_resuming_checks_the_configuration(tmp_path):
    RunDirectory.open(tmp_path / "run", CONFIG, resume=True)  # nothing there yet: a new run
    other = CONFIG | {"lr": 0.2, "model": {"width": 7}}
    with pytest.raises(RunError) as error:
        RunDirectory.open(tmp_path / "run", other, resume=True)
    assert "lr: 0.1 stored, 0.2 asked" in str(error.value)
    assert "model.width: 5 stored, 7 asked" in str(error.value)
    assert "seed" not in str(error.value)
    with pytest.raises(RunError, match="lr"):
        RunDirectory.open(tmp_path / "run", other, resume=True, free=("model", "l"))
    run = RunDirectory.open(tmp_path / "run", other, resume=True, free=("model.width", "lr"))
    assert run.config == other


def test_resuming_under_other_versions_warns(tmp_path):
    run = RunDirectory.open(tmp_path, CONFIG, resume=False)
    path = run.path / "config.json"
    path.write_text(path.read_text().replace(jax.__version__, "0.1.2"))
    with pytest.warns(UserWarning, match="'0.1.2' stored"):
        RunDirectory.open(tmp_path, CONFIG, resume=True)


def test_stages_keep_results_and_arrays(tmp_path):
    run = RunDirectory.open(tmp_path, CONFIG, resume=False)
    assert not run.is_done("eval")
    with pytest.raises(RunError, match=r"stage eval .* is not done"):
        run.stage_results("eval")
    arrays = {"returns/raw": jnp.arange(3), "half": jnp.ones(2, jnp.bfloat16), "file": np.eye(2)}
    run.stage_done("eval", {"success": np.float32(0.5), "bad": float("nan")}, arrays)
    run = RunDirectory.open(tmp_path, CONFIG, resume=True)
    assert run.is_done("eval")
    results, stored = run.stage_results("eval")
    assert results == {"success": 0.5, "bad": None}
    np.testing.assert_array_equal(stored["returns/raw"], [0, 1, 2])
    assert stored["half"].dtype == np.float32
    with pytest.raises(RunError, match=r"stage '\.\./x'"):
        run.stage_done("../x")


def test_log_truncation_spares_other_stages(tmp_path):
    run = RunDirectory.open(tmp_path, CONFIG, resume=False)
    run.truncate_log("a", 0)
    for stage, step in (("a", 1), ("b", 9), ("a", 2), ("a", 3)):
        run.log(stage, step, {"x": jnp.float32(step)})
    run.truncate_log("a", 2)
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [(entry["stage"], entry["step"]) for entry in lines] == [
        ("a", 1),
        ("b", 9),
        ("a", 2),
    ]


def test_result_has_what_a_reader_needs(tmp_path):
    run = RunDirectory.open(tmp_path, CONFIG, resume=False)
    with pytest.raises(RunError, match="lacks seeds, spread"):
        run.write_result({"claim": "c", "measured": 1, "holds": True})
    result = {"claim": "c", "measured": np.float32(0.5), "holds": np.bool(True), "seeds": 3}
    run.write_result(result | {"spread": (0.25, 0.75)})
    stored = json.loads((tmp_path / "result.json").read_text())
    assert stored == result | {"spread": [0.25, 0.75]}


def test_the_command_to_go_on(monkeypatch, tmp_path):
    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "__spec__", type("Spec", (), {"name": "experiments.toy.__main__"}))
    monkeypatch.setattr(sys, "argv", ["x", "--seed", "3"])
    command = f"python -m experiments.toy --seed 3 --out {tmp_path} --resume"
    assert resume_command(tmp_path) == command
    monkeypatch.setattr(sys, "argv", ["x", *command.split()[3:]])
    assert resume_command(tmp_path) == command

"""Training from the command line: what a run leaves, what comes back of it, what is refused, and what a kill costs."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments.runner import RunError
from experiments.train_rl import __main__ as train_rl
from experiments.train_rl import training
from experiments.train_rl.algorithms import ALGORITHMS
from experiments.train_rl.load import load, load_data
from rl.algorithm import evaluate

pytestmark = pytest.mark.usefixtures("quick_compile")

ROOT = Path(__file__).resolve().parents[3]
CHUNKS = 12
TINY = ["--env", "CartPole-v1", "--algo", "ppo", "--preset", "tiny", "--max-steps", "23"]
TINY += ["--steps", str(14 * 2 * CHUNKS), "--evaluations", str(CHUNKS), "--checkpoints", str(CHUNKS)]


@pytest.fixture(scope="module", autouse=True)
def unchecked_keys():
    """JAX's check takes keys that a scan runs over, itself mapped over seeds, for used twice."""
    with jax.debug_key_reuse(False):
        yield


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Runs of this process share one compiled chunk, which does not depend on the hyperparameters: the state does."""
    make_chunk, made = training.make_chunk, {}

    def remember(settings, plan):
        key = replace(settings, hyper=None)
        if key not in made:
            made[key] = make_chunk(settings, plan)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_chunk", remember)
        yield


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    return out, train_rl.main([*TINY, "--out", str(out)])


def log_of(out: Path) -> list[dict]:
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in entry.items() if name != "time"} for entry in entries]


def test_a_run_leaves_its_files(uninterrupted):
    out, result = uninterrupted
    stored = json.loads((out / "result.json").read_text())
    assert stored["claim"] == "PPO solves CartPole-v1 (mean return 475)"
    assert stored["holds"] is False  # after so few steps
    assert stored["seeds"] == 2
    assert stored["measured"]["environment_steps"] == 14 * 2 * CHUNKS
    np.testing.assert_allclose(stored["measured"]["return"], np.mean(stored["measured"]["returns"]))
    assert stored["spread"]["min"] <= stored["spread"]["quartiles"][1] <= stored["spread"]["max"] <= 23
    np.testing.assert_array_equal(stored["measured"]["returns"], result["measured"]["returns"])
    report = (out / "report.html").read_text()
    assert "data:image/gif" in report
    assert f"load(&quot;{out}&quot;)" in report or f'load("{out}")' in report
    assert (out / "figures" / "curves.png").stat().st_size > 5_000
    with Image.open(out / "figures" / "episode.gif") as gif:
        assert 5 < gif.n_frames <= 24


def test_the_log_tells_of_every_chunk(uninterrupted):
    out, result = uninterrupted
    entries = log_of(out)
    assert [(entry["stage"], entry["step"]) for entry in entries] == [("train", 28 * (i + 1)) for i in range(CHUNKS)]
    last = entries[-1]["metrics"]
    assert {"loss", "episode_return", "episodes", "greedy_return", "entropy"} <= last.keys()
    np.testing.assert_allclose(last["greedy_return"], result["measured"]["returns"], rtol=1e-6)
    # Steps of two updates in two environments make up episodes, as far as these ended.
    for entry in entries:
        for episodes, length in zip(entry["metrics"]["episodes"], entry["metrics"]["episode_length"], strict=True):
            assert (length is None) == (episodes == 0)


def test_what_was_learned_comes_back(uninterrupted):
    """The policy that `load` gives is the one that was evaluated last: with the same key, the same returns."""
    out, result = uninterrupted
    for seed in range(2):
        assert_evaluated_last(out, result, seed, CHUNKS)
    with pytest.raises(ValueError, match=r"seed is 2, expected 0\.\.1"):
        load(out, seed=2)
    with pytest.raises(RunError, match="has no checkpoint of a training run"):
        load(out.parent)


def assert_evaluated_last(out: Path, result: dict, seed: int, chunks: int) -> None:
    algorithm, state, env, env_params = load(out, seed=seed)
    assert int(state.update) == 2 * chunks
    _, _, k_evaluate = jax.random.split(jax.random.key(0), 3)
    key = jax.random.split(jax.random.fold_in(k_evaluate, chunks - 1), 2)[seed]
    episodes = evaluate(algorithm, state, key, env, env_params, episodes=2, horizon=23)
    np.testing.assert_allclose(episodes.return_B.mean(), result["measured"]["returns"][seed])


def offline(algo: str, data: Path) -> list[str]:
    return ["--algo", algo, "--preset", "tiny", "--max-steps", "23", "--data", str(data), "--data.episodes", "7"]


@pytest.mark.slow
def test_an_offline_run_needs_its_data_once(tmp_path, uninterrupted):
    """It leaves what every run leaves, and then goes on bit for bit, and is loaded, without the run that acted."""
    other, out, resumed = tmp_path / "other", tmp_path / "run", tmp_path / "resumed"
    shutil.copytree(uninterrupted[0], other)
    result = train_rl.main([*offline("bc", other), "--out", str(out)])
    shutil.rmtree(other)
    assert result["measured"]["gradient_steps"] == log_of(out)[-1]["step"] == 12
    data = load_data(out)
    assert data is not None
    assert data.mask_NL.shape[0] == 7
    told = result["measured"]["data_returns"]
    assert (told["min"], told["max"]) == (data.return_N.min(), data.return_N.max())
    assert {"curves.png", "episode.gif"} == {path.name for path in (out / "figures").iterdir()}
    assert f"7 episodes of {other} with returns from" in (out / "report.html").read_text()

    shutil.copytree(out, resumed)
    shutil.rmtree(max((resumed / "stages" / "train" / "checkpoints").glob("step_*")))
    again = train_rl.main([*offline("bc", other), "--out", str(resumed), "--resume"])
    assert_identical(resumed, again, out, result)


@pytest.mark.slow
def test_a_decision_transformer_comes_back_with_an_environment_that_shows_rewards(tmp_path, uninterrupted):
    out = tmp_path / "run"
    result = train_rl.main([*offline("decision_transformer", uninterrupted[0]), "--out", str(out)])
    assert_evaluated_last(out, result, seed=1, chunks=3)
    with Image.open(out / "figures" / "episode.gif") as gif:
        assert 5 < gif.n_frames <= 24


def child(out: str) -> None:
    """What the killed processes do: chunks are slowed down, so that a kill comes before the last one."""
    make_chunk = training.make_chunk

    def slow(settings, plan):
        chunk = make_chunk(settings, plan)

        def slowly(state):
            time.sleep(0.5)
            return chunk(state)

        return slowly

    training.make_chunk = slow
    train_rl.main([*TINY, "--out", out])


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Runs that were killed some time after their first checkpoint: {signal: (directory, exit status, messages)}."""
    folder = tmp_path_factory.mktemp("killed")
    numbers = (signal.SIGKILL, signal.SIGTERM)
    with contextlib.ExitStack() as stack:
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, str(folder / number.name)],
                env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"},
                stdout=subprocess.DEVNULL,
                stderr=stack.enter_context((folder / f"{number.name}.err").open("w")),
            )
            for number in numbers
        ]
        for number, process in zip(numbers, processes, strict=True):
            saves = folder / number.name / "stages" / "train" / "checkpoints"
            while not list(saves.glob("step_*")) and process.poll() is None:
                time.sleep(0.02)
            time.sleep(random.uniform(0, 1))  # any moment will do: in a chunk, or while saving
            process.send_signal(number)
        return {
            number: (folder / number.name, process.wait(), (folder / f"{number.name}.err").read_text())
            for number, process in zip(numbers, processes, strict=True)
        }


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(uninterrupted, killed):
    out, status, messages = killed[signal.SIGKILL]
    assert status == -signal.SIGKILL, messages
    assert not (out / "result.json").exists()
    assert_identical(out, train_rl.main([*TINY, "--out", str(out), "--resume"]), *uninterrupted)


@pytest.mark.slow
def test_a_terminated_run_saves_and_goes_on_even_from_the_checkpoint_before(uninterrupted, killed):
    out, status, messages = killed[signal.SIGTERM]
    assert status == 130, messages
    assert "SIGTERM: stage train stopped at step" in messages
    assert f"{out}" in messages
    assert "Traceback" not in messages
    saves = out / "stages" / "train" / "checkpoints"
    newest = max(saves.glob("step_*"))
    victim = max(newest.rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    victim.write_bytes(victim.read_bytes()[:-9])
    with pytest.warns(UserWarning, match=f"{newest.name} is damaged"):
        result = train_rl.main([*TINY, "--out", str(out), "--resume"])
    assert_identical(out, result, *uninterrupted)


def assert_identical(out: Path, result: dict, other_out: Path, other: dict) -> None:
    for seed in range(2):
        leaves, others = (jax.tree.leaves(load(path, seed=seed)[1]) for path in (out, other_out))
        assert list(map(to_bytes, leaves)) == list(map(to_bytes, others))
    assert log_of(out) == log_of(other_out)
    different = {"steps_per_second": None}
    assert repr(result["measured"] | different) == repr(other["measured"] | different)


def to_bytes(leaf) -> bytes:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--env", "CartPol-v1"], "there is no environment 'CartPol-v1'; did you mean 'CartPole-v1'"),
        (
            ["--algo", "pp0"],
            "there is no algorithm 'pp0', expected one of a2c, bc, decision_transformer, dqn, group, ppo, sac; did you "
            "mean 'ppo'?",
        ),
        (
            ["--algo", "sac"],
            "sac cannot learn in CartPole-v1, whose actions are discrete: use a2c or dqn or group or ppo",
        ),
        (["--env", "Pendulum-v1", "--algo", "dqn"], "whose actions are continuous: use a2c or group or ppo or sac"),
        (["--steps", "200"], "--steps is 200, less than one update, which takes 256 steps"),
        (["--seeds", "0"], "--seeds is 0, expected at least 1"),
        (["--max-steps", "0"], "max_steps is 0, expected at least 1"),
        (["--config.params-per-env"], "--config.params-per-env needs parameters for every environment"),
        (["--config.updates", "7"], "--config.updates follows from --steps"),
        (["--network", "hydra"], "--network is 'hydra', expected auto, mlp, cnn, or one of"),
        (["--network", "cnn"], "observations have shape (4,), expected (H, W, C)"),
        (["--algo", "dqn", "--network", "rglru"], "the network has a memory, expected one without"),
        (["--env", "Pendulum-v1", "--algo", "sac", "--network", "lru"], "sac learns with MLPs"),
        (["--backend", "mjx"], "--backend is of Brax environments, which CartPole-v1 is not"),
        (["--preset", "huge"], "--preset is 'huge', expected 'standard' or 'tiny'"),
        (["--algo", "bc"], "bc learns from data: name with --data a run in CartPole-v1 that gathers them"),
        (["--data", "runs"], "--data is for bc and decision_transformer: ppo learns from what it does itself"),
        (["--algo", "bc", "--data", "nowhere"], "nowhere has no checkpoint of a training run"),
        (["--algo", "bc", "--data", "runs", "--steps", "7"], "less than one update, which takes 100 steps"),
        (
            ["--algo", "decision_transformer", "--data", "runs", "--network", "mlp"],
            "decision_transformer learns with a causal mixer: use --network attention or rglru, say",
        ),
    ],
)
def test_bad_arguments_end_with_one_clear_line(tmp_path, capsys, arguments, message):
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        train_rl.main([*arguments, "--out", str(out)])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert not out.exists()


def test_data_of_another_environment_are_refused(tmp_path, capsys, uninterrupted):
    arguments = ["--env", "Acrobot-v1", "--algo", "bc", "--data", str(uninterrupted[0])]
    with pytest.raises(SystemExit) as stop:
        train_rl.main([*arguments, "--out", str(tmp_path / "run")])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: --data is a run with --env CartPole-v1, expected Acrobot-v1\n"
    assert not (tmp_path / "run").exists()


def test_help_names_every_algorithm(capsys):
    with pytest.raises(SystemExit) as stop:
        train_rl.main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    told = shown[shown.index("--algo STR") : shown.index("--preset {")]
    assert set(ALGORITHMS) <= set(re.findall(r"\w+", told))


def test_an_interruption_outside_of_training_ends_without_a_traceback(tmp_path, capsys, monkeypatch):
    def interrupted(settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_rl, "plan", interrupted)
    with pytest.raises(SystemExit) as stop:
        train_rl.main([*TINY, "--out", str(tmp_path / "run")])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "\nstopped; what a checkpoint has can be gone on with by --resume\n"


def test_what_a_config_refuses_is_told(capsys):
    with pytest.raises(SystemExit) as stop:
        train_rl.main(["--config.environments", "3", "--config.minibatches", "5"])
    assert stop.value.code == 2
    said = " ".join(re.sub(r"[^\w:]", " ", capsys.readouterr().err).split())
    assert "PPOConfig: 3 environments x 32 steps are not divisible by minibatches 5" in said
    assert "Traceback" not in said


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train_rl.main([*TINY, "--hyper.learning-rate", "1e30", "--out", str(tmp_path / "run")])
    assert stop.value.code == 1
    assert "stage train: loss is not finite at step" in capsys.readouterr().err


def test_observations_that_are_not_finite_end_the_run(tmp_path, capsys, monkeypatch):
    remembered = training.make_chunk

    def make_chunk(settings, plan):
        def chunk(state):
            at, (state, metrics, bad_US) = int(state.chunks), remembered(settings, plan)(state)
            return state, metrics, bad_US.at[1, 0].set(3) if at == 2 else bad_US

        return chunk

    monkeypatch.setattr(training, "make_chunk", make_chunk)
    with pytest.raises(SystemExit) as stop:
        train_rl.main([*TINY, "--out", str(tmp_path / "run")])
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert "stage train: after step 56: observations are not finite in update 1: the environment is at fault" in said
    assert "Traceback" not in said


def test_another_setting_is_not_resumed(capsys, uninterrupted):
    out, _ = uninterrupted
    with pytest.raises(SystemExit) as stop:
        train_rl.main([*TINY, "--hyper.learning-rate", "0.5", "--out", str(out), "--resume"])
    assert stop.value.code == 1
    assert "hyper.learning_rate: 0.00025 stored, 0.5 asked" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train_rl.main([*TINY, "--out", str(out)])
    assert "is not empty: resume the run that is in it" in capsys.readouterr().err


if __name__ == "__main__":
    child(sys.argv[1])

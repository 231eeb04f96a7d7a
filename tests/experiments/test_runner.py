"""The runner: a run that is killed and resumed is the uninterrupted one, to the last bit."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import runner
from experiments.runner import Interrupted, NonFiniteLoss, RunDirectory, RunError, train_chunks
from seqmod import checkpoint

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {"seed": 3, "lr": 0.1, "model": {"width": 5}}
STEPS, CHUNKS = 7, 5


class State(NamedTuple):
    params: dict
    optimizer: optax.OptState
    key: jax.Array
    step: int | jax.Array


optimizer = optax.adam(0.1)


def initial() -> State:
    params = {"w": jnp.arange(5.0), "b": jnp.float32(1)}
    return State(params, optimizer.init(params), jax.random.key(3), 0)


def update(state: State, _) -> tuple[State, dict]:
    noise = jax.random.normal(jax.random.fold_in(state.key, state.step), (5,))

    def loss_of(params):
        return jnp.sum((params["w"] - noise) ** 2) + params["b"] ** 2

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    updates, opt_state = optimizer.update(grads, state.optimizer)
    params = optax.apply_updates(state.params, updates)
    return State(params, opt_state, state.key, state.step + 1), {"loss": loss, "w": params["w"]}


@jax.jit
def chunk(state: State) -> tuple[State, dict]:
    state, metrics = jax.lax.scan(update, state, length=STEPS)
    return state, metrics | {"chunk_step": state.step}


def train(out: Path, function=chunk, n_chunks=CHUNKS, *, resume=False, config=CONFIG, **options):
    run = RunDirectory.open(out, CONFIG, resume)
    arguments = {"units_per_chunk": STEPS, "unit": "updates", "checkpoint_every": 2} | options
    return train_chunks(run, "base", initial(), function, n_chunks, config=config, **arguments)


def calls(n: int, act):
    """A chunk that calls `act(state)` in place of its n-th call's result."""
    count = 0

    def function(state):
        nonlocal count
        count += 1
        result = chunk(state)
        return act(*result) if count == n else result

    return function


def send(number: signal.Signals):
    def act(*result):
        os.kill(os.getpid(), number)
        return result

    return act


def log_of(out: Path) -> list[dict]:
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k != "time"} for entry in entries]


def to_bytes(leaf) -> bytes:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


def assert_identical(out: Path, result, other_out: Path, other) -> None:
    (state, metrics), (other_state, other_metrics) = result, other
    assert jax.tree.structure(state) == jax.tree.structure(other_state)
    assert list(map(to_bytes, jax.tree.leaves(state))) == list(map(to_bytes, jax.tree.leaves(other_state)))
    assert metrics.keys() == other_metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_array_equal(value, other_metrics[name], strict=True)
    assert log_of(out) == log_of(other_out)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    return out, train(out)


def test_an_uninterrupted_run(uninterrupted):
    out, (state, metrics) = uninterrupted
    expected = initial()
    losses = []
    for _ in range(STEPS * CHUNKS):
        expected, step_metrics = update(expected, None)
        losses.append(step_metrics["loss"])
    np.testing.assert_allclose(state.params["w"], expected.params["w"], rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-5)
    assert metrics["w"].shape == (STEPS * CHUNKS, 5)
    np.testing.assert_array_equal(metrics["chunk_step"], STEPS * np.arange(1, CHUNKS + 1))
    entries = log_of(out)
    assert [(entry["stage"], entry["step"]) for entry in entries] == [("base", STEPS * (i + 1)) for i in range(CHUNKS)]
    np.testing.assert_allclose(entries[1]["metrics"]["loss"], np.mean(losses[7:14]), rtol=1e-5)
    assert len(entries[1]["metrics"]["w"]) == 5


def test_calling_a_finished_stage_again_returns_the_same(uninterrupted):
    out, result = uninterrupted
    again = train(out, calls(1, pytest.fail), resume=True)
    assert_identical(out, again, out, result)


def child(out: str, how: str) -> None:
    """What the killed process does: this file is also its program."""
    if how == "kill between metrics and checkpoint":
        save = checkpoint.save

        def killed_at_the_second(directory, step, *rest):
            if step == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            save(directory, step, *rest)

        checkpoint.save = killed_at_the_second
        function = chunk
    else:
        number = signal.SIGKILL if how == "kill in a chunk" else signal.SIGTERM
        function = calls(4, send(number))
    with runner.clean_exit():
        train(Path(out), function)


@pytest.mark.parametrize(
    ("how", "status", "saved"),
    [
        ("kill in a chunk", -signal.SIGKILL, 2),
        ("kill between metrics and checkpoint", -signal.SIGKILL, 2),
        ("terminate in a chunk", 130, 4),
    ],
)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, uninterrupted, how, status, saved):
    out = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, __file__, str(out), how],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stderr
    if status == 130:
        assert "SIGTERM: stage base stopped at step 28 of 35 and is saved" in done.stderr
        assert f"resume=True: {out}" in done.stderr
        assert "Traceback" not in done.stderr
    assert checkpoint.latest_step(out / "stages" / "base" / "checkpoints") == saved
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "base", "st')  # what a kill during a write leaves
    assert_identical(out, train(out, resume=True), *uninterrupted)


def test_control_c_saves_and_handlers_are_put_back(tmp_path, uninterrupted):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="stopped at step 21 of 35 and is saved"):
        train(tmp_path / "run", calls(3, send(signal.SIGINT)))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert_identical(tmp_path / "run", train(tmp_path / "run", resume=True), *uninterrupted)


def test_a_second_control_c_stops_at_once(tmp_path):
    def twice(*result):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return result

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", calls(1, twice))


def test_a_damaged_checkpoint_costs_only_the_chunks_since_the_one_before(tmp_path, uninterrupted):
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(out, calls(4, send(signal.SIGINT)))
    newest = out / "stages" / "base" / "checkpoints" / "step_000000004"
    victim = max(newest.rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    victim.write_bytes(victim.read_bytes()[:-9])
    with pytest.warns(UserWarning, match="step_000000004 is damaged"):
        result = train(out, resume=True)
    assert_identical(out, result, *uninterrupted)


def test_a_nan_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path, uninterrupted):
    def bad(state, metrics):
        return state, metrics | {"loss": metrics["loss"].at[2].set(jnp.nan)}

    out = tmp_path / "run"
    saves = out / "stages" / "base" / "checkpoints"
    with pytest.raises(NonFiniteLoss) as error:
        train(out, calls(4, bad))
    assert "stage base: loss is not finite at step 24." in str(error.value)
    assert f"The last good checkpoint is of step 14, in {saves}" in str(error.value)
    assert checkpoint.latest_step(saves) == 2
    assert log_of(out)[-1]["metrics"]["loss"] is None  # a valid JSON line about the bad chunk
    assert_identical(out, train(out, resume=True), *uninterrupted)


def test_an_infinite_loss_before_any_checkpoint(tmp_path):
    def bad(state, metrics):
        return state, metrics | {"loss": jnp.inf}

    with pytest.raises(NonFiniteLoss, match=r"at step 7\. There is no checkpoint yet"):
        train(tmp_path / "run", calls(1, bad))


def test_a_nan_in_the_state_is_not_saved(tmp_path):
    def bad(state, metrics):
        return state._replace(params=state.params | {"b": jnp.float32(jnp.nan)}), metrics

    with pytest.raises(NonFiniteLoss, match="NaN in params/b of the state at step 28"):
        train(tmp_path / "run", calls(4, bad))
    assert checkpoint.latest_step(tmp_path / "run" / "stages" / "base" / "checkpoints") == 2


def test_a_loss_that_is_not_there(tmp_path):
    with pytest.raises(RunError, match="no metric 'nll' among"):
        train(tmp_path / "run", loss_key="nll")


def test_a_time_budget_stops_early_and_is_kept_over_a_resume(tmp_path):
    out = tmp_path / "run"
    state, metrics = train(out, time_budget=1e-6)
    assert int(state.step) == STEPS
    assert metrics["loss"].shape == (STEPS,)
    state, _ = train(out, calls(1, pytest.fail), resume=True, time_budget=1e-6)
    assert int(state.step) == STEPS
    state, _ = train(out, resume=True)
    assert int(state.step) == STEPS * CHUNKS


def test_checkpoints_of_another_stage_configuration_are_refused(tmp_path):
    out = tmp_path / "run"
    train(out, n_chunks=1)
    with pytest.raises(checkpoint.CheckpointMismatch, match=r"config lr: 0\.1 stored, 0\.2 asked"):
        train(out, resume=True, config=CONFIG | {"lr": 0.2})
    with pytest.raises(checkpoint.CheckpointMismatch, match="units_per_chunk: 7 stored, 8 asked"):
        train(out, resume=True, units_per_chunk=8)


if __name__ == "__main__":
    child(*sys.argv[1:])

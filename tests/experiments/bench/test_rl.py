"""The benchmark against published reinforcement learning: what is compared, a tiny cell of each part, tables."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from experiments.bench import rl, rl_ours, rl_peers, rl_worker
from experiments.bench.rl import CELLS, Cell, Row
from rl.dqn import DQNHyper
from rl.ppo import PPOHyper

pytestmark = pytest.mark.usefixtures("quick_compile")

TINY_PPO = rl_peers.PURE_PPO | {"NUM_ENVS": 2, "NUM_STEPS": 6, "UPDATE_EPOCHS": 1, "NUM_MINIBATCHES": 2}
TINY_DQN = rl_peers.REJAX_DQN | {"num_envs": 2, "buffer_size": 50, "fill_buffer": 10, "batch_size": 3, "num_epochs": 1}


class Fake:
    """Answers as a peer's process does: so many seconds, or a refusal."""

    def __init__(self, seconds: float, refused: str = "") -> None:
        self.answer, self.asked = {"refused": refused} if refused else {"seconds": seconds}, []

    def ask(self, request):
        self.asked.append(request["do"])
        return {"compile_seconds": 7.0} if request["do"] == "compile" else self.answer

    def close(self) -> None:
        """Nothing to end."""


def test_contenders_of_a_cell_have_the_same_settings():
    cell = Cell("ppo", "CartPole-v1", 4, 128, 3, 5)
    runs = rl.runs(cell)
    assert list(runs) == ["ours", "purejaxrl", "rejax"]
    assert {run.steps for run in runs.values()} == {4 * 128 * 5}
    pure, rejax = (rl_ours.agent(runs[name]) for name in ("purejaxrl", "rejax"))
    assert pure.hyper == rejax.hyper == PPOHyper(2.5e-4, 0.99, 0.95, 0.2, 0.01, 0.5)
    assert pure.updates == rejax.updates == 5
    assert pure.algorithm.steps_per_update == rejax.algorithm.steps_per_update == 512
    for cell in CELLS:
        for name, run in rl.runs(cell).items():
            ours = rl_ours.agent(run) if name == "ours" and cell.algorithm != "brax" else None
            assert ours is None or ours.updates * ours.algorithm.steps_per_update * cell.seeds == cell.total
    assert len({cell.name for cell in CELLS}) == len(CELLS)


def test_settings_of_a_peer_become_ours():
    dqn = rl_ours.agent(rl_peers.find("rejax", "dqn", "CartPole-v1"))
    np.testing.assert_allclose(dqn.hyper.tau, 0.02)
    assert dqn.hyper._replace(tau=0.0) == DQNHyper(1e-3, 0.99, 0.0, 1, 0.05, 0.5, 1e3)
    assert dqn.updates * dqn.algorithm.steps_per_update == 100_000
    # purejaxrl's loop rounds down, rejax's up.
    run = rl_peers.find("purejaxrl", "ppo", "CartPole-v1")
    assert rl_ours.agent(run).updates == 500_000 // 512
    assert rl_ours.agent(rl_peers.find("rejax", "ppo", "MountainCar-v0")).updates == 500_000 // 200
    with pytest.raises(ValueError, match="agent: no counterpart of rejax ppo_rnn in CartPole-v1"):
        rl_ours.agent(replace(run, peer="rejax", algorithm="ppo_rnn"))


def test_a_tiny_cell_is_timed():
    run = rl_peers.Run("purejaxrl", "ppo", "CartPole-v1", 24, 2, TINY_PPO, 0)
    worker = rl_worker.Local("ours")
    assert worker.ask({"do": "run", "with": {}}) == {"refused": "ValueError: nothing is compiled"}
    assert worker.ask({"do": "compile", "with": {"run": run.__dict__}})["compile_seconds"] > 0
    assert worker.ask({"do": "run", "with": {}})["seconds"] > 0
    refused = worker.ask({"do": "compile", "with": {"run": run.__dict__ | {"env": "CartPole-v7"}}})["refused"]
    assert "there is no environment 'CartPole-v7'" in refused
    worker.close()
    assert worker.once is None


def test_contenders_take_turns_and_the_ratio_is_to_the_best():
    cell = Cell("ppo", "CartPole-v1", 4, 128, 3, 5)
    workers = {"ours": Fake(0.5), "purejaxrl": Fake(1.0), "rejax": Fake(0.0, "it broke")}
    rows = rl.measure(cell, workers, repeats=3)
    assert workers["ours"].asked == ["compile", *["run"] * 4]
    assert workers["rejax"].asked == ["compile", "run"]
    assert [row.speed for row in rows] == [cell.total / 0.5, cell.total, None]
    assert rl.ratio(rows) == 2.0
    assert rl.ratio([row for row in rows if row.contender != "ours"]) is None
    assert rl.ratio(rows[:1]) is None
    line = rl.speed_table(rows).splitlines()[-1]
    assert line == "| ppo | CartPole-v1 | 4 x 128 | 3 | 15,360 | 7,680 | - | 2.00 | 7.0 | 7.0 | 7.0 |"


def test_what_is_there_is_not_measured_again(tmp_path, capsys):
    out, figure = tmp_path / "rows.json", tmp_path / "figure.png"
    rows = [Row(CELLS[0], name, [seconds], 2.0) for name, seconds in (("ours", 1.0), ("rejax", 2.0))]
    out.write_text(json.dumps([row.__dict__ | {"cell": row.cell.__dict__} for row in rows]))
    rl.main("throughput", only=CELLS[0].name, contenders=(), out=out, figure=figure)
    assert "| 2.00 |" in capsys.readouterr().out
    assert figure.stat().st_size > 5_000


@pytest.mark.parametrize(
    ("run", "columns"),
    [
        (rl_peers.Run("purejaxrl", "ppo", "Catch-bsuite", 120, 3, TINY_PPO, 2), [60, 120]),
        (rl_peers.Run("rejax", "dqn", "Catch-bsuite", 80, 3, TINY_DQN, 2), [40, 80]),
    ],
    ids=["ppo", "dqn"],
)
def test_a_tiny_run_learns_and_is_kept(run, columns, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rl_peers, "RUNS", (run,))
    out, figure = tmp_path / "learning.json", tmp_path / "figure.png"
    with jax.debug_key_reuse(False):  # which takes keys of a mapped scan for used twice
        rl.main("learning", out=out, figure=figure)
    result = json.loads(out.read_text())[run.name]
    returns = np.array(result["returns"])
    assert returns.shape == (3, 2)
    # An episode of Catch is worth 1 or -1.
    assert (np.abs(returns) <= 1).all()
    assert result["checkpoint_steps"] == columns
    assert result["steps_taken"] == columns[-1]
    assert f"| Catch-bsuite | {run.peer} {run.algorithm} | {run.steps} | 3 |" in capsys.readouterr().out
    assert figure.stat().st_size > 5_000
    written = out.read_text()
    rl.main("learning", only="Catch", out=out)
    assert out.read_text() == written


def test_a_run_that_fails_is_told(tmp_path, monkeypatch):
    run = rl_peers.Run("purejaxrl", "a2c", "Catch-bsuite", 120, 3, TINY_PPO, 2)
    monkeypatch.setattr(rl_peers, "RUNS", (run,))
    rl.learn("", again=False, out=tmp_path / "learning.json")
    kept = json.loads((tmp_path / "learning.json").read_text())
    assert kept[run.name]["failed"] == "agent: no counterpart of purejaxrl a2c in Catch-bsuite"
    assert "| - | failed | - |" in rl.learning_table(kept, {})


def test_final_returns():
    assert rl.final(None) == "-"
    assert rl.final({"returns": [[0.0, 1.0], [0.0, 3.0]]}) == "2 ± 1"
    assert rl.final({"returns": [[0.0, None], [0.0, 3.0]]}) == "nan ± nan"


def test_returns_of_training_are_means_over_episodes():
    metrics = {"episodes": np.array([[2, 1], [0, 0]]), "episode_return": np.array([[3.0, 9.0], [np.nan] * 2])}
    np.testing.assert_array_equal(rl_ours._trained(metrics), [5.0, np.nan])


def test_wrong_cells_are_refused():
    with pytest.raises(ValueError, match="Cell: algorithm is 'trpo', expected ppo, dqn, sac or brax"):
        Cell("trpo", "CartPole-v1", 4, 128, 1, 1)
    with pytest.raises(ValueError, match="Cell: seeds is 0, expected at least 1"):
        Cell("ppo", "CartPole-v1", 4, 128, 0, 1)

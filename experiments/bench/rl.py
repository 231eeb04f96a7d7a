"""Reinforcement learning against published JAX code: steps a second of whole training runs, and what is learned.

`throughput`: rollouts and learning of some updates from the first one, with settings that are the same for all
contenders, each in a process of its own environment, one after the other in rounds: quote ratios within a cell.
Compilation is told apart. Seeds are mapped over by `jax.vmap`. Evaluations are left out. Where others use the machine,
a prefix such as "chrt -r 1" gives the measuring processes priority, while everything else waits.

`learning`: ours with the settings, steps and seeds of each run in `rl_peers.json`, measured as that peer's returns are.
Results go to `rl_learning.json` after each run; runs that are there already aren't repeated.

Peers' environments are those of `experiments.bench.rl_peers`, made on first use.

Command: python -m experiments.bench.rl [--part throughput|learning|report] [--only TEXT] [--prefix "chrt -r 1"]
"""

import json
import os
import re
import shlex
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro

from experiments import plotting
from experiments.bench import rl_ours, rl_peers
from experiments.bench.rl_peers import Run
from experiments.bench.worker import Process, Worker
from experiments.report import markdown_table

HERE = Path(__file__).parent
LEARNING = HERE / "rl_learning.json"
THROUGHPUT = HERE / "rl_throughput.json"
OURS = "ours"


@dataclass(frozen=True)
class Cell:
    """`updates` of a training run with `environments` and `steps` an update, for so many `seeds` at once."""

    algorithm: str
    env: str
    environments: int
    steps: int
    seeds: int
    updates: int

    def __post_init__(self) -> None:
        if self.algorithm not in ("ppo", "dqn", "sac", "brax"):
            raise ValueError(f"Cell: algorithm is {self.algorithm!r}, expected ppo, dqn, sac or brax")
        for name in ("environments", "steps", "seeds", "updates"):
            if getattr(self, name) < 1:
                raise ValueError(f"Cell: {name} is {getattr(self, name)}, expected at least 1")

    @property
    def name(self) -> str:
        """For people and for `--only`."""
        return f"{self.algorithm} {self.env} {self.environments}x{self.steps} {self.seeds} seeds"

    @property
    def total(self) -> int:
        """Environment steps of one call, of all seeds."""
        return self.environments * self.steps * self.updates * self.seeds


def _cells() -> Iterator[Cell]:
    for env, work in (("CartPole-v1", 2**18), ("FourRooms-misc", 2**17), ("Breakout-MinAtar", 2**16)):
        for environments in (4, 64):
            for seeds in (1, 16, 64):
                update = environments * 128 * seeds
                if update <= 4 * work:
                    yield Cell("ppo", env, environments, 128, seeds, max(2, work // update))
    for seeds in (1, 16):
        yield Cell("dqn", "CartPole-v1", 10, 10, seeds, 40 if seeds == 1 else 10)
        yield Cell("sac", "Pendulum-v1", 1, 50, seeds, 20 if seeds == 1 else 8)
    yield Cell("brax", "ant", 64, 16, 1, 3)


CELLS = tuple(_cells())


def runs(cell: Cell) -> dict[str, Run]:
    """The same training run for each contender, by the names of their settings."""
    steps = cell.environments * cell.steps * cell.updates
    if cell.algorithm == "ppo":
        pure = rl_peers.PURE_PPO | {"NUM_ENVS": cell.environments, "NUM_STEPS": cell.steps}
        rejax = {
            "agent_kwargs": {"activation": "tanh"},
            "num_envs": cell.environments,
            "num_steps": cell.steps,
            "num_epochs": pure["UPDATE_EPOCHS"],
            "num_minibatches": pure["NUM_MINIBATCHES"],
            "learning_rate": pure["LR"],
            "max_grad_norm": pure["MAX_GRAD_NORM"],
            "gamma": pure["GAMMA"],
            "gae_lambda": pure["GAE_LAMBDA"],
            "clip_eps": pure["CLIP_EPS"],
            "ent_coef": pure["ENT_COEF"],
            "vf_coef": pure["VF_COEF"],
        }
        of_pure = Run("purejaxrl", "ppo", cell.env, steps, cell.seeds, pure, 0)
        of_rejax = Run("rejax", "ppo", cell.env, steps, cell.seeds, rejax, 0)
        return {OURS: of_pure, "purejaxrl": of_pure, "rejax": of_rejax}
    if cell.algorithm == "brax":
        settings = rl_peers.BRAX_PPO | {
            "num_envs": cell.environments,
            "unroll_length": cell.steps,
            "num_minibatches": 4,
            "batch_size": cell.environments // 4,
            "num_updates_per_batch": 4,
            "discounting": 0.97,
            "entropy_cost": 0.01,
            "reward_scaling": 1,
            "max_grad_norm": 0.5,
        }
        run = Run("brax", "ppo", cell.env, steps, cell.seeds, settings, 0, "spring")
        return {OURS: run, "brax": run}
    settings = rl_peers.REJAX_DQN if cell.algorithm == "dqn" else rl_peers.REJAX_SAC
    # Learning begins early, as it is what takes time.
    settings = settings | {"num_envs": cell.environments, "fill_buffer": settings["batch_size"]}
    run = Run("rejax", cell.algorithm, cell.env, steps, cell.seeds, settings, 0)
    return {OURS: run, "rejax": run}


@dataclass(frozen=True)
class Row:
    """One contender in one cell: seconds of its calls and of its compilation, or the `reason` why there are none."""

    cell: Cell
    contender: str
    seconds: list[float] = field(default_factory=list)
    compile_seconds: float | None = None
    reason: str = ""

    @property
    def speed(self) -> float | None:
        """Environment steps a second, of all seeds together; the median call."""
        return self.cell.total / statistics.median(self.seconds) if self.seconds else None


def measure(cell: Cell, workers: Mapping[str, Worker], repeats: int) -> list[Row]:
    """Time the contenders that there are workers for, in turns; each one's first call is not counted."""
    rows = []
    for contender, run in runs(cell).items():
        if contender in workers:
            answer = workers[contender].ask({"do": "compile", "with": {"run": asdict(run)}})
            rows.append(
                Row(cell, contender, compile_seconds=answer.get("compile_seconds"), reason=answer.get("refused", ""))
            )
    reasons = {row.contender: row.reason for row in rows}
    for turn in range(repeats + 1):
        for row in rows:
            if not reasons[row.contender]:
                answer = workers[row.contender].ask({"do": "run", "with": {}})
                reasons[row.contender] = answer.get("refused", "")
                if turn and not reasons[row.contender]:
                    row.seconds.append(answer["seconds"])
    return [Row(row.cell, row.contender, row.seconds, row.compile_seconds, reasons[row.contender]) for row in rows]


def ratio(rows: Sequence[Row]) -> float | None:
    """Our steps a second over those of the fastest peer, of the rows of one cell."""
    speeds = {row.contender: row.speed for row in rows if row.speed}
    peers = [speed for name, speed in speeds.items() if name != OURS]
    return speeds[OURS] / max(peers) if OURS in speeds and peers else None


def speed_table(rows: Sequence[Row]) -> str:
    """A Markdown table: steps a second by contender, the ratio, and seconds of compilation."""
    names = list(dict.fromkeys(row.contender for row in rows))
    head = ["algorithm", "environment", "environments x steps", "seeds", *names, "ours / best peer"]
    head += [f"{name} compiles, s" for name in names]
    lines = []
    for cell in dict.fromkeys(row.cell for row in rows):
        own = {row.contender: row for row in rows if row.cell == cell}
        speeds = [own[name].speed if name in own else None for name in names]
        compiled = [own[name].compile_seconds if name in own else None for name in names]
        line = [cell.algorithm, cell.env, f"{cell.environments} x {cell.steps}", str(cell.seeds)]
        line += [_number(speed, "{:,.0f}") for speed in speeds] + [_number(ratio(list(own.values())), "{:.2f}")]
        lines.append(line + [_number(seconds, "{:.1f}") for seconds in compiled])
    return markdown_table(head, lines)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def draw_speeds(rows: Sequence[Row], path: Path) -> Path:
    """Bars of steps a second, relative to the best peer of each cell."""
    cells = list(dict.fromkeys(row.cell for row in rows))
    fig, axes = plotting.figure(width=7.0, height=0.8 + 0.42 * len(cells))
    ax, names = axes[0, 0], list(dict.fromkeys(row.contender for row in rows))
    for index, name in enumerate(names):
        values = []
        for cell in cells:
            speeds = {row.contender: row.speed for row in rows if row.cell == cell and row.speed}
            best = max((speed for other, speed in speeds.items() if other != OURS), default=np.nan)
            values.append(speeds.get(name, np.nan) / best)
        places = np.arange(len(cells)) + (index - len(names) / 2) * 0.8 / len(names)
        ax.barh(places, values, 0.8 / len(names), label=name)
    ax.axvline(1.0, color="black", linewidth=1)
    ax.set_yticks(range(len(cells)), [cell.name for cell in cells], fontsize=7)
    ax.invert_yaxis()
    ax.set_xlabel("steps a second, relative to the best peer", fontsize=9)
    return plotting.save(fig, path)


def learn(only: str, again: bool, out: Path) -> None:
    """Train ours in place of the peers' runs whose name has `only` in it, and record each."""
    for run in rl_peers.RUNS:
        kept = json.loads(out.read_text()) if out.exists() else {}
        if only not in run.name or (run.name in kept and not again):
            continue
        try:
            result = rl_ours.train(run)
        except (ValueError, FloatingPointError) as error:
            result = {"failed": str(error)}
        jax.clear_caches()
        made = {"date": datetime.now(UTC).date().isoformat(), "jax": jax.__version__, "command": _command(run)}
        result = json.loads(json.dumps(result), parse_float=lambda number: round(float(number), 3))
        kept = json.loads(out.read_text()) if out.exists() else {}
        _write(kept | {run.name: asdict(run) | made | result}, out)
        print(f"{run.name}: {result.get('failed') or [row[-1] for row in result['returns']]}", file=sys.stderr)


def _command(run: Run) -> str:
    return f"python -m experiments.bench.rl --part learning --only {run.name!r}"


def _write(content: Any, path: Path) -> None:
    """Whole at every moment; a list of numbers is one line."""
    text = re.sub(r"\[([^\[\]{}]*)\]", lambda x: "[" + " ".join(x[1].split()) + "]", json.dumps(content, indent=1))
    beside = path.with_name(path.name + ".new")
    beside.write_text(text + "\n")
    beside.replace(path)


def final(result: Mapping[str, Any] | None) -> str:
    """Mean and standard deviation over seeds of the last return, or why there is none."""
    if result is None:
        return "-"
    if "failed" in result:
        return "failed"
    last = np.array([row[-1] if row[-1] is not None else np.nan for row in result["returns"]], float)
    return f"{last.mean():.4g} ± {last.std():.2g}"


def learning_table(ours: Mapping[str, Any], peers: Mapping[str, Any]) -> str:
    """A Markdown table of final returns; ours and the peer's have the same settings where the notes say nothing."""
    head = ["environment", "peer", "steps", "seeds", "returns", "peer's", "ours", "ours, CPU s", "settings"]
    lines = []
    for name, result in ours.items():
        measured = {"purejaxrl": "of training", "brax": "32 episodes"}.get(result["peer"], "128 episodes")
        env = result["env"].removeprefix("brax/") + (f" {result['backend']}" if result["backend"] else "")
        line = [env, f"{result['peer']} {result['algorithm']}", f"{result['steps']:,}", str(result["seeds"]), measured]
        line += [final(peers.get(name)), final(result), _number(_first(result.get("cpu_seconds")), "{:.0f}")]
        lines.append([*line, rl_ours.note(Run(**{key: result[key] for key in Run.__dataclass_fields__}))])
    return markdown_table(head, lines)


def _first(values: Sequence[float] | None) -> float | None:
    return values[0] if values else None


def draw_learning(ours: Mapping[str, Any], peers: Mapping[str, Any], path: Path) -> Path:
    """Returns in the course of training, a panel for each run: ours and the peer's."""
    shown = [name for name in ours if "returns" in ours[name]]
    columns = min(5, max(1, len(shown)))
    fig, axes = plotting.figure(-(-len(shown) // columns) or 1, columns, width=3.0, height=2.4)
    for ax, name in zip(axes.flat, shown, strict=False):
        for label, result in ((OURS, ours[name]), (ours[name]["peer"], peers.get(name, {}))):
            if result.get("returns"):
                curves = np.array(result["returns"], float)
                plotting.line_with_band(ax, result["checkpoint_steps"], curves, label)
        env = ours[name]["env"].removeprefix("brax/")
        ax.set_title(f"{env} {ours[name]['backend']}, {ours[name]['algorithm']}", fontsize=9)
    for ax in list(axes.flat)[len(shown) :]:
        ax.set_visible(False)
    return plotting.save(fig, path)


def main(
    part: Literal["throughput", "learning", "report"] = "throughput",
    only: str = "",
    again: bool = False,
    repeats: int = 3,
    prefix: str = "",
    patience: float = 600.0,
    contenders: tuple[str, ...] = (OURS, *rl_peers.REQUIREMENTS),
    out: Path | None = None,
    figure: Path | None = None,
) -> None:
    """Measure and print the table.

    Args:
        part: what to measure; "report" prints both tables of what has been measured.
        only: cells or runs whose name has this in it.
        again: also those that are in `out` already.
        repeats: counted calls of each contender in each cell.
        prefix: words before the measuring processes' commands, such as "chrt -r 1".
        patience: seconds to wait for a contender to compile or run once.
        contenders: who takes part in throughput.
        out: file for the results, as JSON; beside this module if left out.
        figure: file for the figure.
    """
    if part in ("throughput", "report"):
        out_speeds = out or THROUGHPUT
        rows = _read_rows(out_speeds)
        if part == "throughput":
            rows = _throughput(only, again, repeats, prefix, patience, contenders, out_speeds)
        print(f"Environment steps a second, {os.cpu_count()} CPU cores:\n\n{speed_table(rows)}")
        for row in rows:
            if row.reason:
                print(f"- {row.cell.name}, {row.contender}: {row.reason}")
        if figure is not None and part == "throughput":
            draw_speeds(rows, figure)
    if part in ("learning", "report"):
        out_learning = out or LEARNING
        if part == "learning":
            learn(only, again, out_learning)
        ours = json.loads(out_learning.read_text()) if out_learning.exists() else {}
        peers = json.loads(rl_peers.RESULTS.read_text())
        print(f"Final returns, mean ± standard deviation over seeds:\n\n{learning_table(ours, peers)}")
        if figure is not None and part == "learning":
            draw_learning(ours, peers, figure)


def _read_rows(path: Path) -> list[Row]:
    rows = json.loads(path.read_text()) if path.exists() else []
    return [Row(**row | {"cell": Cell(**row["cell"])}) for row in rows]


def _throughput(
    only: str, again: bool, repeats: int, prefix: str, patience: float, contenders: Sequence[str], out: Path
) -> list[Row]:
    rows = _read_rows(out)
    log = Path(tempfile.mkdtemp()) / "log"
    workers: dict[str, Worker] = {
        name: Process(
            Path(sys.executable) if name == OURS else rl_peers.environment(name),
            name,
            log,
            patience,
            "experiments.bench.rl_worker",
            shlex.split(prefix),
        )
        for name in contenders
    }
    try:
        for cell in CELLS:
            if only not in cell.name or (not again and any(row.cell == cell for row in rows)):
                continue
            new = measure(cell, workers, repeats)
            rows = [row for row in rows if row.cell != cell] + new
            _write([asdict(row) for row in rows], out)
            brief = ", ".join(
                f"{row.contender} {_number(row.speed, '{:,.0f}') if row.speed else row.reason}" for row in new
            )
            print(f"{cell.name}: {brief}, ratio {_number(ratio(new), '{:.2f}')}", file=sys.stderr, flush=True)
    finally:
        for worker in workers.values():
            worker.close()
    return rows


if __name__ == "__main__":
    tyro.cli(main)

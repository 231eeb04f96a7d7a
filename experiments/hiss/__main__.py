"""Command line of the experiment with hierarchical models: `python -m experiments.hiss --help`."""

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments import plotting
from experiments.hiss import sensors
from experiments.hiss.models import Model, Size, model
from experiments.hiss.sensors import Batch, SensorConfig
from experiments.report import Claim, Figure, Section, Table, write_report
from experiments.runner import RunDirectory, clean_exit, train_chunks
from seqmod import train
from seqmod.train import AdamWConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """Every model gets the same steps, batches and learning rate."""

    models: tuple[str, ...] = ("s4d", "s4d:first", "s4d/s4d", "rglru", "rglru/rglru")
    """"MIXER" is flat, "LOW/HIGH" a hierarchy; "MIXER:first" is read at the first sample of each chunk."""
    levels: tuple[float, ...] = (0.0, 2.0)
    """Strengths of the vibration, each with models of its own."""
    seeds: int = 3
    seed: int = 0
    steps: int = 40
    """Chunks in a sequence."""
    size: Size = Size()
    sensors: SensorConfig = SensorConfig()
    optimiser: AdamWConfig = AdamWConfig(
        learning_rate=3e-3, weight_decay=0.0, steps=400, batch=8, warmup=40, schedule="cosine"
    )
    chunk: int = 20
    """Steps of training in one compiled program."""
    held_out: int = 256
    """Sequences on which a model is judged."""

    def __post_init__(self) -> None:
        if min(self.seeds, self.steps, self.held_out) < 1 or not self.levels or not self.models:
            raise ValueError("Config: seeds, steps, held_out, levels and models must not be empty or below 1")
        if self.optimiser.steps % self.chunk:
            raise ValueError(f"Config: chunk is {self.chunk}, expected a divisor of {self.optimiser.steps} steps")
        for name in self.models:
            self.model(name)

    def model(self, name: str) -> Model:
        """The model of a name."""
        s = self.sensors
        return model(name, self.size, s.sensors, s.targets, s.factor, self.steps)


TINY = Config(
    models=("rglru", "rglru/rglru"),
    levels=(0.0, 1.0),
    seeds=2,
    steps=7,
    size=Size(layers=1, width=8, mlp=8, heads=2),
    optimiser=AdamWConfig(learning_rate=3e-3, steps=4, batch=2),
    chunk=2,
    held_out=8,
)
PRESETS = {"tiny": TINY, "small": Config()}


@dataclasses.dataclass(frozen=True)
class Options:
    """Hierarchical sequence models on fast sensors. `--preset tiny|small` chooses the defaults shown here."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    out: Path = Path("runs") / "hiss"
    """Run directory; must be new or empty without --resume."""
    resume: bool = False
    """Go on with the run in --out."""


def mean_squared_error(own: Model, params: Any, batch: Batch, level: jax.Array) -> jax.Array:
    """Of the targets of a batch, with the vibration at `level`."""
    return jnp.square(own.predict(params, batch.samples(level)) - batch.target_BTO).mean()


def learn(run: RunDirectory, config: Config, name: str) -> dict[str, Any]:
    """Train a model at all levels from all seeds, side by side; its errors (levels, seeds) and what it cost."""
    stage = name.replace("/", "-").replace(":", "-")
    if run.is_done(stage):
        return run.stage_results(stage)[0]
    own, optimiser = config.model(name), config.optimiser
    k_init, k_train, k_judge = jax.random.split(jax.random.key(config.seed), 3)
    level_N = jnp.repeat(jnp.array(config.levels), config.seeds)
    # A seed starts from the same parameters at every level.
    params = jax.jit(jax.vmap(own.init))(jax.random.split(k_init, config.seeds))
    params = jax.tree.map(lambda x: jnp.concatenate([x] * len(config.levels)), params)

    def sample(key: jax.Array) -> Batch:
        return sensors.draw(key, optimiser.batch, config.steps, config.sensors)

    def loss(params: Any, batch: Batch, key: jax.Array, step: jax.Array, level: jax.Array):
        del key, step
        error = mean_squared_error(own, params, batch, level)
        return error, {"error": error}

    tx = optimiser.make()
    chunk = train.make_chunk(sample, loss, tx, config.chunk, hyper=level_N)
    seconds = []

    def timed(state: train.TrainState):
        before = time.monotonic()
        state, metrics = jax.block_until_ready(chunk(state))
        seconds.append(time.monotonic() - before)
        return state, metrics

    state, _ = train_chunks(
        run,
        stage,
        train.start(params, tx, k_train, sweep=True),
        timed,
        optimiser.steps // config.chunk,
        units_per_chunk=config.chunk,
        unit="steps",
        config=dataclasses.asdict(config),
        checkpoint_every=5,
    )
    held_out = sensors.draw(k_judge, config.held_out, config.steps, config.sensors)
    # One model after another: that many sequences at once would take much memory.
    judge = jax.jit(lambda each: jax.lax.map(lambda x: mean_squared_error(own, x[0], held_out, x[1]), each))
    error_LS = np.asarray(judge((state.params, level_N)), float).reshape(len(config.levels), config.seeds)
    results = {
        "model": name,
        "error": error_LS.tolist(),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)) // len(level_N),
        # The first chunk compiles. All levels and seeds are trained in one program.
        "milliseconds": 1e3 * float(np.median(seconds[1:] or seconds)) / config.chunk / len(level_N),
    }
    run.stage_done(stage, results)
    return results


def conclude(run: RunDirectory, config: Config, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """result.json, figure and report.html."""
    error = {row["model"]: np.array(row["error"]) for row in rows}
    claims: list[Claim] = []
    for name in error:
        low, _, high = name.partition("/")
        if low != high or low not in error:
            continue
        # The seeds of both have the same batches.
        ratio_LS = error[name] / error[low]
        ratio_L = np.median(ratio_LS, axis=1)
        shown = ", ".join(f"{level:g}: {ratio:.3f}" for level, ratio in zip(config.levels, ratio_L, strict=True))
        claims.append(
            Claim(
                f"{name} has a lower error than {low} flat, at every level of vibration",
                f"error over the flat model's, by level: {shown}; lower in {int((ratio_LS < 1).sum())} of "
                f"{ratio_LS.size} pairs",
                bool((ratio_L < 1).all()),
            )
        )
        if len(config.levels) > 1:
            claims.append(
                Claim(
                    f"{name} gains more where the vibration is stronger",
                    f"error over the flat model's {ratio_L[0]:.3f} at {config.levels[0]:g}, {ratio_L[-1]:.3f} at "
                    f"{config.levels[-1]:g}",
                    bool(ratio_L[-1] < ratio_L[0]),
                )
            )
    table = Table(
        ["model", *(f"error, vibration {level:g}" for level in config.levels), "parameters", "ms a step"],
        [
            [
                row["model"],
                *np.median(error[row["model"]], axis=1).tolist(),
                row["parameters"],
                row["milliseconds"],
            ]
            for row in rows
        ],
        f"Medians over {config.seeds} seeds of the mean squared error of targets with variance 1.",
    )
    image = _figure(run.figure("errors.png"), config.levels, error)
    result = {
        "claim": "A hierarchy of two sequence models has a lower error on fast sensors than a flat one of its depth",
        "measured": {"rows": rows},
        "holds": all(claim.holds for claim in claims),
        "seeds": config.seeds,
        "spread": {name: np.ptp(values, axis=1).tolist() for name, values in error.items()},
        "claims": [dataclasses.asdict(claim) for claim in claims],
    }
    run.write_result(result)
    summary = (
        f"{2 * config.size.layers} blocks of width {config.size.width} in every model, sequences of {config.steps} "
        f"steps of {config.sensors.factor} samples, {config.optimiser.steps} steps of {config.optimiser.batch} fresh "
        "sequences."
    )
    sections = [Section("Errors", [Figure(image), table])]
    report = write_report(run.path / "report.html", "Hierarchical models on fast sensors", summary, claims, sections)
    for claim in claims:
        print(f"[{'holds' if claim.holds else 'does not hold'}] {claim.claim}: {claim.measured}")
    print(f"report: {report}")
    return result


def _figure(path: Path, levels: tuple[float, ...], error: dict[str, np.ndarray]) -> Path:
    """Error by level of the vibration, a line a model."""
    fig, axes = plotting.figure(width=5.5, height=3.5)
    for name, error_LS in error.items():
        plotting.line_with_band(axes[0, 0], np.array(levels), error_LS.T, name)
    axes[0, 0].set_xlabel("strength of the vibration", fontsize=9)
    axes[0, 0].set_ylabel("mean squared error", fontsize=9)
    return plotting.save(fig, path)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the experiment; returns what result.json holds."""
    before = argparse.ArgumentParser(add_help=False)
    before.add_argument("--preset", default="small", choices=sorted(PRESETS))
    preset, rest = before.parse_known_args(sys.argv[1:] if arguments is None else arguments)
    try:
        options = tyro.cli(
            Options, args=rest, default=Options(config=PRESETS[preset.preset]), prog="python -m experiments.hiss"
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    config = options.config
    with clean_exit():
        run = RunDirectory.open(options.out, {"preset": preset.preset, **dataclasses.asdict(config)}, options.resume)
        rows = []
        for name in config.models:
            row = learn(run, config, name)
            shown = " ".join(
                f"{level:g}: {np.median(error):.3f}" for level, error in zip(config.levels, row["error"], strict=True)
            )
            print(f"{name}: error by vibration {shown}")
            rows.append(row)
        return conclude(run, config, rows)


if __name__ == "__main__":
    main()

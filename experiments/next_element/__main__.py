"""Command line of the next-element experiment: `python -m experiments.next_element --help`."""

import argparse
import dataclasses
import sys
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments import plotting
from experiments.next_element.tasks import BIDIRECTIONAL, CAUSAL, SOURCES, VOCABULARY, Batch
from experiments.report import Claim, Figure, Section, Table, write_report
from experiments.runner import RunDirectory, clean_exit, train_chunks
from seqmod import backbone, train
from seqmod.config import BackboneConfig, Positions
from seqmod.mixers import MIXERS
from seqmod.objectives import categorical_nll
from seqmod.train import AdamWConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """Every mixer gets the same small model, the same steps and the same batches."""

    mixers: tuple[str, ...] = tuple(MIXERS)
    """Those of MIXERS; each is run in every direction it has."""
    layers: int = 2
    width: int = 32
    heads: int = 4
    mlp: int = 64
    length: int = 48
    positions: Positions = "none"
    """What the embedding says of positions; some mixers have none of their own."""
    seeds: int = 1
    seed: int = 0
    optimiser: AdamWConfig = AdamWConfig(
        learning_rate=3e-3, weight_decay=0.0, steps=400, batch=32, warmup=40, schedule="cosine"
    )
    chunk: int = 50
    """Steps in one compiled program."""
    held_out: int = 512
    """Sequences on which a model is judged."""

    def __post_init__(self) -> None:
        for name in self.mixers:
            if name not in MIXERS:
                raise ValueError(f"Config: mixer {name!r} is unknown, expected some of {sorted(MIXERS)}")
        if self.optimiser.steps % self.chunk:
            raise ValueError(f"Config: chunk is {self.chunk}, expected a divisor of {self.optimiser.steps} steps")

    def model(self, mixer: str, causal: bool) -> BackboneConfig:
        """The model of a mixer."""
        return BackboneConfig(
            vocabulary=VOCABULARY,
            heads=(("token", VOCABULARY),),
            mixers=(mixer,) * self.layers,
            width=self.width,
            mlp=self.mlp,
            attention_heads=self.heads,
            context=self.length,
            positions=self.positions,
            causal=causal,
            scan=True,
        )


TINY = Config(
    mixers=("attention", "rglru"),
    width=16,
    mlp=32,
    length=20,
    optimiser=AdamWConfig(learning_rate=3e-3, steps=4, batch=4),
    chunk=2,
    held_out=8,
)
PRESETS = {"tiny": TINY, "small": Config()}


@dataclasses.dataclass(frozen=True)
class Options:
    """Next-element prediction with a known optimum. `--preset tiny|small` chooses the defaults shown here."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    out: Path = Path("runs") / "next_element"
    """Run directory; must be new or empty without --resume."""
    resume: bool = False
    """Go on with the run in --out."""


def batches(causal: bool, batch: int, length: int, key: jax.Array) -> Batch:
    """A batch of every task, stacked along a first axis."""
    each = list((CAUSAL if causal else BIDIRECTIONAL).values())
    keys = jax.random.split(key, len(each))
    parts = [task(key, batch, length) for task, key in zip(each, keys, strict=True)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)


def losses(model: BackboneConfig, params: Any, batch: Batch) -> dict[str, jax.Array]:
    """Mean loss of one task's batch in nats, its regret, and the share of labels that were the likeliest."""
    logits = backbone.apply(params, model, batch.tokens_BL)[0]["token"]
    weights = batch.weights_BL / batch.weights_BL.sum()
    nll = categorical_nll(logits, batch.labels_BL)
    ideal = -jnp.log(jnp.where(batch.weights_BL > 0, batch.ideal_BL, 1.0))
    right = (logits.argmax(-1) == batch.labels_BL).astype(jnp.float32)
    return {"nll": (weights * nll).sum(), "regret": (weights * (nll - ideal)).sum(), "right": (weights * right).sum()}


def learn(run: RunDirectory, config: Config, mixer: str, causal: bool) -> dict[str, Any]:
    """Train a mixer on all tasks side by side, each from every seed; regrets by task, and what it cost."""
    stage = mixer if causal else f"{mixer}-bidirectional"
    tasks = list(CAUSAL if causal else BIDIRECTIONAL)
    if run.is_done(stage):
        return run.stage_results(stage)[0]
    model, optimiser = config.model(mixer, causal), config.optimiser
    k_init, k_train, k_judge = jax.random.split(jax.random.key(config.seed), 3)
    task_N = jnp.tile(jnp.arange(len(tasks)), config.seeds)
    params = jax.jit(jax.vmap(partial(backbone.init, config=model)))(jax.random.split(k_init, len(task_N)))

    def loss(params, batch, key, step, task):
        measured = losses(model, params, jax.tree.map(lambda x: x[task], batch))
        return measured["nll"], measured

    tx = optimiser.make()
    chunk = train.make_chunk(
        partial(batches, causal, optimiser.batch, config.length), loss, tx, config.chunk, hyper=task_N
    )
    begun, seconds = time.monotonic(), []

    def timed(state):
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
        checkpoint_every=optimiser.steps // config.chunk,
    )
    held_out = batches(causal, config.held_out, config.length, k_judge)
    judged = jax.jit(jax.vmap(lambda params, task: losses(model, params, jax.tree.map(lambda x: x[task], held_out))))(
        state.params, task_N
    )
    by_task = {name: np.asarray(values).reshape(config.seeds, -1) for name, values in judged.items()}
    results = {
        "mixer": mixer,
        "causal": causal,
        "regret": dict(zip(tasks, by_task["regret"].T.tolist(), strict=True)),
        "right": dict(zip(tasks, by_task["right"].T.tolist(), strict=True)),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)) // len(task_N),
        # The first chunk compiles. All tasks and seeds are trained in one program.
        "milliseconds": 1e3 * float(np.median(seconds[1:] or seconds)) / config.chunk / len(task_N),
        "total_seconds": time.monotonic() - begun,
    }
    run.stage_done(stage, results)
    return results


def conclude(run: RunDirectory, config: Config, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """result.json, figure and report.html."""
    claims: list[Claim] = []
    sections: list[Section] = []
    least = min(np.mean(regret) for row in rows for regret in row["regret"].values())
    claims.append(
        Claim("No model predicts better than the ideal observer", f"least regret {least:.4f} nats", bool(least > -0.01))
    )
    for causal, tasks in ((True, list(CAUSAL)), (False, list(BIDIRECTIONAL))):
        own = [row for row in rows if row["causal"] == causal]
        if not own:
            continue
        kind = "causal" if causal else "bidirectional"
        worst = {name: max(float(np.mean(row["regret"][name])) for row in own) for name in SOURCES}
        near = {name: sum(float(np.mean(row["regret"][name])) < 0.1 for row in own) for name in SOURCES}
        claims.append(
            Claim(
                f"Every {kind} mixer comes within 0.1 nats of the best prediction on every source",
                ", ".join(f"{name} {near[name]} of {len(own)} (worst {worst[name]:.3f})" for name in SOURCES),
                all(count == len(own) for count in near.values()),
            )
        )
        table = Table(
            [
                "mixer",
                *(f"{name}, nats" for name in tasks),
                "recalled" if causal else "copied",
                "parameters",
                "ms a step",
            ],
            [
                [
                    row["mixer"],
                    *(float(np.median(row["regret"][name])) for name in tasks),
                    float(np.median(row["right"]["recall" if causal else "copy"])),
                    row["parameters"],
                    row["milliseconds"],
                ]
                for row in own
            ],
            "Regret above the ideal observer, nats per predicted element; medians over seeds. The last but two: share "
            "of elements whose likeliest prediction was right.",
        )
        image = _figure(run.figure(f"{kind}.png"), own, tasks)
        sections.append(Section(f"{kind.capitalize()} mixers", [Figure(image), table]))
    result = {
        "claim": "Sequence models come near the best possible prediction on all kinds of sources",
        "measured": {"rows": rows},
        "holds": all(claim.holds for claim in claims),
        "seeds": config.seeds,
        "spread": {},
        "claims": [dataclasses.asdict(claim) for claim in claims],
    }
    run.write_result(result)
    summary = (
        f"{config.layers} blocks of width {config.width}, sequences of {config.length}, {config.optimiser.steps} steps "
        f"of {config.optimiser.batch} sequences at one learning rate for all."
    )
    report = write_report(run.path / "report.html", "Next element", summary, claims, sections)
    for claim in claims:
        print(f"[{'holds' if claim.holds else 'does not hold'}] {claim.claim}: {claim.measured}")
    print(f"report: {report}")
    return result


def _figure(path: Path, rows: list[dict[str, Any]], tasks: list[str]) -> Path:
    """Regrets by mixer and task, darker for more."""
    fig, axes = plotting.figure(width=1.1 * len(tasks) + 2, height=0.28 * len(rows) + 1)
    ax = axes[0, 0]
    values = np.array([[max(float(np.median(row["regret"][name])), 1e-4) for name in tasks] for row in rows])
    ax.imshow(np.log10(values), cmap="Blues", vmin=-4, vmax=0.5, aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        ax.text(x, y, f"{value:.3f}", ha="center", va="center", fontsize=8, color="white" if value > 0.1 else "black")
    ax.set_xticks(range(len(tasks)), tasks, fontsize=8)
    ax.set_yticks(range(len(rows)), [row["mixer"] for row in rows], fontsize=8)
    ax.grid(visible=False)
    ax.set_title("Nats above the ideal observer", fontsize=9)
    return plotting.save(fig, path)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the experiment; returns what result.json holds."""
    before = argparse.ArgumentParser(add_help=False)
    before.add_argument("--preset", default="small", choices=sorted(PRESETS))
    preset, rest = before.parse_known_args(sys.argv[1:] if arguments is None else arguments)
    try:
        options = tyro.cli(
            Options,
            args=rest,
            default=Options(config=PRESETS[preset.preset]),
            prog="python -m experiments.next_element",
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    config = options.config
    with clean_exit():
        run = RunDirectory.open(options.out, {"preset": preset.preset, **dataclasses.asdict(config)}, options.resume)
        rows = []
        for causal in (True, False):
            pattern = "causal self" if causal else "noncausal self"
            for mixer in config.mixers:
                if pattern in MIXERS[mixer].patterns:
                    row = learn(run, config, mixer, causal)
                    regrets = " ".join(f"{name} {np.median(value):.3f}" for name, value in row["regret"].items())
                    print(f"{mixer}, {'causal' if causal else 'bidirectional'}: regret in nats: {regrets}")
                    rows.append(row)
        return conclude(run, config, rows)


if __name__ == "__main__":
    main()

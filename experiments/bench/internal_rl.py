"""What the stages of internal RL cost on this device: throughput, and its share of the measured matmul ceiling.

Each row is one compiled program, timed after a first call, median of several. Floating-point operations are counted by
hand, since the compiler's own count takes a loop's body once: 2 per multiply-add of every matrix product of the base
model, three times the forward pass where it is trained, twice where gradients only pass through it. Quote ratios of
rows of one run: machines are noisy.

Command: python -m experiments.bench.internal_rl [--preset small] [--repeats 5] [--out FILE.json]
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro

from experiments.internal_rl import discover, pretrain, reinforce
from experiments.internal_rl.config import Config
from experiments.internal_rl.presets import PRESETS
from rl import grpo, internal
from rl.internal import Frozen
from seqmod import backbone, metacontroller, train


@dataclass(frozen=True)
class Row:
    """One timed program: `seconds` a call, `amount` of `unit` done by it, `flops` it needs."""

    name: str
    seconds: float
    amount: float
    unit: str
    flops: float


def timed(call: Callable[[], Any], repeats: int) -> float:
    """Median seconds of a call, after one that compiles."""
    jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def forward_flops(config: Config, length: int) -> float:
    """Floating-point operations of the base model's forward pass on one token of a sequence of `length`."""
    params = jax.eval_shape(lambda: backbone.init(jax.random.key(0), config.model))
    weights = sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim > 1)
    attention = 2 * length * config.base.width * config.base.layers if config.base.mixer == "attention" else 0
    return 2.0 * (weights + attention)


def rows(config: Config, repeats: int) -> list[Row]:
    """Time every program."""
    key = jax.random.key(0)
    square = jax.random.normal(key, (2048, 2048))
    matmul = jax.jit(jnp.matmul)
    table = [Row("matmul 2048 float32", timed(lambda: matmul(square, square), repeats), 1, "calls", 2.0 * 2048**3)]

    window, token = config.world.window, forward_flops(config, config.world.window)
    batch = config.pretrain.optimiser.batch
    sample = jax.jit(pretrain.sampler(config, batch))
    table.append(Row("demonstrations", timed(lambda: sample(key), repeats), batch * window, "tokens", 0.0))

    tx = config.pretrain.optimiser.make()
    params = backbone.init(key, config.model)
    steps = 4
    chunk = train.make_chunk(
        pretrain.sampler(config, batch),
        lambda params, demos, key, step: pretrain.loss(config, params, demos),
        tx,
        steps,
    )
    state = train.start(params, tx, key)
    tokens = steps * batch * window
    table.append(Row("pretraining", timed(lambda: chunk(state), repeats), tokens, "tokens", 3 * token * tokens))

    meta = metacontroller.init(key, config.discover.metacontroller)
    # Base model: half a forward pass for the stream, a whole one for the turned view, half of one and twice that back
    # for the edited rest, in each of the models.
    once = 0.5 + config.discover.turned_view
    if config.discover.learn_steps:
        learn, first = discover.learner(config, params, meta, steps)
        tokens = steps * config.discover.learn_batch * window
        seconds = timed(lambda: learn(first), repeats)
        table.append(Row("metacontroller, first phase", seconds, tokens, "tokens", token * tokens * (once + 1)))
    models = len(config.discover.alphas)
    sweep, begun = discover.sweeper(config, params, meta, steps)
    tokens = steps * config.discover.optimiser.batch * window
    seconds = timed(lambda: sweep(begun), repeats)
    name = f"metacontroller, {models} KL weights"
    table.append(Row(name, seconds, tokens, "tokens", token * tokens * (once + models)))

    settings, env, env_params = config.reinforce, config.world.env, config.world.post_training_params
    policy, shape = reinforce.policy_config(config), reinforce.controlled(config)
    frozen = Frozen(params, meta)
    update = jax.jit(
        lambda state: internal.internal_update(
            settings.grpo, shape, policy, env, env_params, frozen, state, settings.learning_rate
        )
    )
    rl_state = grpo.start(settings.grpo, internal.init_policy(key, policy), key)
    raw_steps = float(update(rl_state)[1]["raw_steps"]) * settings.grpo.batch
    seconds = timed(lambda: update(rl_state), repeats)
    table.append(Row("internal RL", seconds, settings.grpo.batch, "episodes", token * raw_steps))

    raw = jax.jit(
        lambda state: grpo.raw_update(
            settings.raw_grpo, config.model, env, env_params, state, settings.raw_learning_rate
        )
    )
    raw_state = grpo.start(settings.raw_grpo, params, key)
    steps_taken = float(raw(raw_state)[1]["steps"]) * settings.raw_grpo.batch
    seconds = timed(lambda: raw(raw_state), repeats)
    table.append(Row("raw-action RL", seconds, settings.raw_grpo.batch, "episodes", token * steps_taken))
    return table


def main(preset: Literal["tiny", "small", "paper"] = "small", repeats: int = 5, out: Path | None = None) -> None:
    """Time the stages of a preset and print a table; `out` keeps it as JSON."""
    table = rows(PRESETS[preset](), repeats)
    peak = table[0].flops / table[0].seconds
    print(f"preset {preset} on {jax.devices()[0].device_kind}, jax {jax.__version__}, median of {repeats}")
    print("| program | ms a call | throughput | GFLOP/s | share of matmul |\n| --- | --- | --- | --- | --- |")
    for row in table:
        rate = row.flops / row.seconds
        print(
            f"| {row.name} | {1e3 * row.seconds:.1f} | {row.amount / row.seconds:,.0f} {row.unit}/s "
            f"| {rate / 1e9:.1f} | {rate / peak:.0%} |"
        )
    if out is not None:
        out.write_text(json.dumps([asdict(row) for row in table], indent=2) + "\n")


if __name__ == "__main__":
    tyro.cli(main)

"""Stage 1: train the base model on demonstrations whose goals are hidden (paper section 3 of the digest; C.1, D.1)."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.internal_rl.config import Config
from experiments.runner import RunDirectory, train_chunks
from rl.envs.experts import Demonstrations, demonstrations
from seqmod import backbone, train
from seqmod.checkpoint import CheckpointMismatch, differences, export_params, load_params
from seqmod.mixers.base import Params
from seqmod.objectives import categorical_nll, factored_nll, masked_mean

SHIPPED = Path(__file__).parent / "base_small.npz"
"""The base model of the `small` preset, trained by `make run-from-scratch`."""


def sampler(config: Config, batch: int, noise: float = 0.0) -> train.Sample:
    """key -> a batch of fresh pretraining demonstrations."""
    world = config.world
    env, params = world.env, world.pretraining_params
    return lambda key: demonstrations(key, env, params, batch, world.window, noise)


def action_nll(config: Config, outputs: dict[str, jax.Array], demos: Demonstrations) -> jax.Array:
    """Mean negative log-likelihood of the expert's actions, in nats per valid step."""
    return masked_mean(categorical_nll(outputs["action"], demos.action_BL), demos.valid_BL)


def loss(config: Config, params: Params, demos: Demonstrations) -> tuple[jax.Array, dict[str, jax.Array]]:
    """-log p(a_t | o_1..t) - lambda log p(o_{t+1} | o_1..t), averaged over valid steps."""
    outputs, _ = backbone.apply(params, config.model, demos.obs_BLF)
    action = action_nll(config, outputs, demos)
    observation = masked_mean(
        factored_nll(outputs["observation"], demos.next_obs_BLF, config.world.env.factors), demos.valid_BL
    )
    return action + config.pretrain.observation_weight * observation, {
        "action_nll": action,
        "observation_nll": observation,
    }


def what_makes_a_base(config: Config) -> dict[str, Any]:
    """The part of the configuration that a base model depends on, as JSON can hold it.

    Of the tasks, that is the demonstrations' only: one base model serves every post-training task that leaves them as
    they are.
    """
    world = dataclasses.asdict(config.world) | {"pretraining": config.world.pretraining_tasks}
    for name in ("task_length", "post_training", "withheld"):
        del world[name]
    return json.loads(json.dumps({"world": world, "base": dataclasses.asdict(config.base)}))


Snapshots = dict[float, Params]
"""Parameters by the fraction of training they have behind them, from 0.0 to 1.0, in that order."""


def pretrain(run: RunDirectory, config: Config) -> Snapshots:
    """Train from scratch. Returns the model at initialisation, at each snapshot, and at the end; keeps them in the run
    directory as `base.npz`."""
    settings = config.pretrain
    tx = settings.optimiser.make()
    k_init, k_train = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 1))
    state = train.start(backbone.init(k_init, config.model), tx, k_train)
    chunk = train.make_chunk(
        sampler(config, settings.optimiser.batch, config.world.noise),
        lambda params, demos, key, step: loss(config, params, demos),
        tx,
        settings.chunk,
    )
    total = settings.optimiser.steps // settings.chunk
    stops = sorted({max(1, round(fraction * total)) for fraction in settings.snapshots} | {total})
    models, done = {0.0: state.params}, 0
    for index, stop in enumerate(stops):
        state, _ = train_chunks(
            run,
            f"pretrain-{index + 1}of{len(stops)}",
            state,
            chunk,
            stop - done,
            units_per_chunk=settings.chunk,
            unit="steps",
            config=what_makes_a_base(config),
            checkpoint_every=5,
        )
        models[stop / total] = state.params
        done = stop
    save_base(run.path / "base.npz", config, models)
    return models


def save_base(path: Path, config: Config, models: Snapshots) -> None:
    """Keep a base model and its snapshots in one file, stacked along a leading axis."""
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *models.values())
    export_params(path, stacked, {"trained": list(models), "made_by": what_makes_a_base(config)})


def load_base(path: Path, config: Config) -> Snapshots:
    """Models kept by `save_base`. Raises CheckpointMismatch where the file is of another configuration."""
    stacked, stored = load_params(path)
    wrong = differences(stored["made_by"], what_makes_a_base(config))
    if wrong:
        raise CheckpointMismatch(
            f"{path.name} is the base model of another configuration:\n  "
            + "\n  ".join(wrong)
            + "\ntrain one for this configuration with --from-scratch"
        )
    return {share: pick(stacked, index) for index, share in enumerate(stored["trained"])}


def pick(stacked: Params, index: int) -> Params:
    """One of the models that are stacked along a leading axis."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf[index]), stacked)

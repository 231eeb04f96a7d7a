"""Animations of an episode of the post-training task, by the base model alone and by internal RL."""

from typing import Any

import jax
import numpy as np

from experiments.internal_rl.config import Config
from experiments.internal_rl.control import steered_rollout
from experiments.internal_rl.reinforce import controlled, policy_config
from experiments.runner import RunDirectory
from rl.envs.render import Episode, episode_frames, episode_gif
from rl.grpo import GRPOConfig
from rl.internal import Frozen, abstract_rollout
from seqmod.mixers.base import Params

SHOWN = 64
"""Episodes to choose from: the first that succeeds, or the first."""


def _episode(config: Config, agent_T: Any, objects_J: Any, steps: int, gate_T: Any = None) -> Episode:
    world = config.world
    return Episode(
        env=world.env,
        agent_S=np.asarray(agent_T)[: steps + 1],
        objects_J=np.asarray(objects_J),
        task_K=np.asarray(world.post_training_params.tasks_NK[0]),
        gate_T=None if gate_T is None else np.asarray(gate_T)[:steps],
        horizon=world.horizon,
    )


def base_episode(config: Config, model: Params, key: jax.Array) -> Episode:
    """An episode of the base model, acting by its own action head."""
    params = config.world.post_training_params
    episodes = steered_rollout(config, model, None, config.layer, params, key, SHOWN)
    index = int(np.asarray(episodes.length_B).argmax())
    record, steps = episodes.recorded, int(episodes.length_B[index])
    path = [*np.asarray(record["agent"][:steps, index]), int(episodes.final_state.agent[index])]
    return _episode(config, path, record["objects"][0, index], steps)


def internal_episode(config: Config, model: Params, metacontroller: Params, policy: Params, key: jax.Array) -> Episode:
    """An episode of internal RL, with the steps at which its gate opened."""
    algorithm = GRPOConfig(batch=SHOWN, horizon=config.world.horizon, minibatches=1)
    batch, raw = abstract_rollout(
        algorithm,
        controlled(config),
        policy_config(config),
        config.world.env,
        config.world.post_training_params,
        Frozen(model, metacontroller),
        policy,
        key,
        watch=lambda state: (state.agent, state.objects_J),
    )
    index = int(np.asarray(batch.return_B).argmax())
    steps = int(raw["valid_BL"][index].sum())
    agent_BL, objects_BLJ = raw["watched"]
    path = [*np.asarray(agent_BL[index, :steps]), int(raw["final_state"].agent[index])]
    return _episode(config, path, objects_BLJ[index, 0], steps, raw["open_BL"][index])


def episodes(run: RunDirectory, config: Config, model: Params, metacontroller: Params, policy: Params) -> None:
    """Write figures/before.gif and figures/after.gif."""
    k_before, k_after = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 9))
    episode_gif(run.figure("before.gif"), episode_frames(base_episode(config, model, k_before), cell=28))
    after = internal_episode(config, model, metacontroller, policy, k_after)
    episode_gif(run.figure("after.gif"), episode_frames(after, cell=28))

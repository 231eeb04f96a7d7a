"""Stage 3: supervised controllers, one low-rank edit for each subgoal, at every layer (C.3; Fig. 4).

They show that a linear edit of the residual stream makes the base model pursue a chosen subgoal, also across
transitions that no demonstration has. With the true subgoal switched on they are the honest ceiling of internal RL.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.internal_rl import codes
from experiments.internal_rl.config import Config
from experiments.internal_rl.pretrain import action_nll, sampler
from experiments.runner import RunDirectory, train_chunks
from rl.envs.gridworld_pinpad import EnvParams
from rl.rollout import Episodes, Step, rollout
from seqmod import backbone, train
from seqmod.mixers.base import Params, scaled_normal
from seqmod.residual import low_rank_update


def _steer(controllers: Params, e: jax.Array, subgoal: jax.Array) -> jax.Array:
    return low_rank_update(e, controllers["down"][subgoal], controllers["up"][subgoal])


def steered_rollout(
    config: Config,
    model: Params,
    controllers: Params | None,
    layer: int,
    params: EnvParams,
    key: jax.Array,
    episodes: int,
) -> Episodes:
    """Episodes of the base model with the true subgoal's controller at `layer`, or with none. Records agent cells."""
    world, shape = config.world, config.model

    def policy(key: jax.Array, step: Step, memory: Any):
        lower, upper = memory
        e_BD, lower = backbone.lower_step(model, shape, step.obs_BF, lower, layer)
        if controllers is not None:
            last = step.state.task_K.shape[1] - 1
            position_B1 = jnp.minimum(step.state.progress, last)[:, None]
            target_B = jnp.take_along_axis(step.state.task_K, position_B1, axis=1)[:, 0] // world.subgoal_colours
            e_BD = _steer(controllers, e_BD, target_B)
        outputs, upper = backbone.upper_step(model, shape, e_BD, upper, layer)
        action_B = jax.random.categorical(key, outputs["action"])
        record = {"agent": step.state.agent, "progress": step.state.progress, "objects": step.state.objects_J}
        return action_B, (lower, upper), record

    memory = (
        backbone.init_state(shape, episodes, world.horizon, stop=layer),
        backbone.init_state(shape, episodes, world.horizon, start=layer),
    )
    return rollout(key, world.env, params, policy, memory, episodes, world.horizon)[0]


def control(run: RunDirectory, config: Config, model: Params) -> dict[str, Any]:
    """Train and evaluate the controllers of every layer, and the base model alone.

    Returns `success_by_layer` and `nll_by_layer` (lists over layers 0..), `pretraining_success_by_layer`, `raw_success`
    of the uncontrolled base on the post-training task, `base_success` of it on the pretraining tasks, `ceiling` the
    success at the best layer, and `held_information` of the controllers at the controlled layer (see `codes`).
    """
    if run.is_done("control"):
        return run.stage_results("control")[0]
    settings, shape, world = config.control, config.model, config.world
    tx = settings.optimiser.make()
    steps, per_call = settings.optimiser.steps, min(settings.optimiser.steps, 100)
    key = jax.random.fold_in(jax.random.key(config.seed), 3)
    sample = sampler(config, settings.optimiser.batch)
    post, pre = world.post_training_params, world.pretraining_params
    measured: dict[str, Any] = {"success_by_layer": [], "nll_by_layer": [], "pretraining_success_by_layer": []}

    for layer in range(shape.layers + 1):
        k_init, k_train, k_post, k_pre, k_held = jax.random.split(jax.random.fold_in(key, layer), 5)
        D, R, G = shape.width, settings.rank, world.subgoals
        controllers = {"down": scaled_normal(k_init, (G, R, D), D, 1.0), "up": jnp.zeros((G, D, R))}

        def loss(controllers, demos, key, step, layer=layer):
            subgoal_BL = demos.target_BL // world.subgoal_colours
            e_BLD = jax.lax.stop_gradient(backbone.lower(model, shape, demos.obs_BLF, layer))
            e_BLD = _steer(controllers, e_BLD, subgoal_BL)
            nll = action_nll(config, backbone.upper(model, shape, e_BLD, layer), demos)
            return nll, {"action_nll": nll}

        chunk = train.make_chunk(sample, loss, tx, per_call)
        state = train.start(controllers, tx, k_train)
        state, metrics = train_chunks(
            run,
            f"control-layer{layer}",
            state,
            chunk,
            max(1, steps // per_call),
            units_per_chunk=per_call,
            unit="steps",
            config={},
            checkpoint_every=3,
        )
        run_episodes = jax.jit(steered_rollout, static_argnums=(0, 3, 6))
        on_post = run_episodes(config, model, state.params, layer, post, k_post, settings.episodes)
        on_pre = run_episodes(config, model, state.params, layer, pre, k_pre, settings.episodes)
        measured["success_by_layer"].append(float(on_post.return_B.mean()))
        measured["pretraining_success_by_layer"].append(float(on_pre.return_B.mean()))
        measured["nll_by_layer"].append(float(np.mean(metrics["action_nll"][-100:])))
        if layer == config.layer:
            counts_GO = codes.first_colours(config, model, partial(_steer, state.params), k_held, G, settings.episodes)
            measured["held_information"] = codes.information(counts_GO)

    batch = min(settings.raw_episodes, 4096)
    rounds = -(-settings.raw_episodes // batch)
    alone = jax.jit(lambda key, params: steered_rollout(config, model, None, config.layer, params, key, batch).return_B)
    k_raw, k_base = jax.random.split(jax.random.fold_in(key, shape.layers + 1))
    raw = [float(alone(jax.random.fold_in(k_raw, index), post).mean()) for index in range(rounds)]
    measured["raw_success"] = float(np.mean(raw))
    measured["raw_episodes"] = rounds * batch
    measured["base_success"] = float(alone(k_base, pre).mean())
    measured["ceiling"] = max(measured["success_by_layer"])
    run.stage_done("control", measured)
    return measured

"""Stage 5: reinforcement learning on the post-training task, by codes and by raw actions (C.5; Figs. 8 and A5).

Three learners, the same optimiser and number of episodes, each over several seeds: internal RL (codes held until the
gate opens), internal RL with an always-open metacontroller (the paper's forced-switching baseline), and raw-action RL
that fine-tunes the whole base model.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.internal_rl.config import Config
from experiments.runner import RunDirectory, train_chunks
from rl import grpo, internal
from rl.internal import Controlled, Frozen, PolicyConfig
from seqmod.mixers.base import Params

Learner = Literal["internal", "forced", "raw"]


def controlled(config: Config, *, always_open: bool = False) -> Controlled:
    """Static description of the controlled model."""
    return Controlled(
        model=config.model,
        metacontroller=config.discover.metacontroller,
        layer=config.layer,
        max_switches=config.world.horizon if always_open else config.reinforce.max_switches,
        always_open=always_open,
    )


def policy_config(config: Config) -> PolicyConfig:
    """Shapes of the internal policy."""
    return PolicyConfig(
        inputs=config.base.width,
        latent=config.discover.metacontroller.latent,
        width=config.reinforce.policy_width,
        initial_std=config.reinforce.initial_std,
    )


def reinforce(
    run: RunDirectory, config: Config, model: Params, metacontroller: Params | None, learner: Learner
) -> tuple[dict[str, np.ndarray], Any]:
    """Train `config.reinforce.seeds` seeds. Returns metrics (seeds, updates) and the seeds' final policies.

    `metacontroller` is the frozen one; raw-action RL needs none.
    """
    settings, world = config.reinforce, config.world
    env, env_params = world.env, world.post_training_params
    task = {"internal": 6, "forced": 7, "raw": 8}[learner]
    k_policy, k_run = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), task))
    seeds = jnp.arange(settings.seeds)
    run_keys = jax.vmap(lambda seed: jax.random.fold_in(k_run, seed))(seeds)
    policy_keys = jax.vmap(lambda seed: jax.random.fold_in(k_policy, seed))(seeds)

    if learner == "raw":
        algorithm = settings.raw_grpo
        state = jax.vmap(lambda key: grpo.start(algorithm, model, key))(run_keys)

        def update(state):
            return grpo.raw_update(algorithm, config.model, env, env_params, state, settings.raw_learning_rate)
    else:
        assert metacontroller is not None
        algorithm, policy = settings.grpo, policy_config(config)
        frozen, shape = Frozen(model, metacontroller), controlled(config, always_open=learner == "forced")
        state = jax.vmap(lambda key, k: grpo.start(algorithm, internal.init_policy(k, policy), key))(
            run_keys, policy_keys
        )

        def update(state):
            return internal.internal_update(
                algorithm, shape, policy, env, env_params, frozen, state, settings.learning_rate
            )

    def updates(state):
        return jax.lax.scan(lambda state, _: update(state), state, length=settings.chunk)

    @jax.jit
    def chunk(states):
        states, metrics = jax.lax.map(updates, states) if settings.seeds_by == "map" else jax.vmap(updates)(states)
        # Metrics of a run have the step first: (chunk, seeds).
        return states, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), metrics)

    states, metrics = train_chunks(
        run,
        f"reinforce-{learner}",
        state,
        chunk,
        max(1, settings.updates // settings.chunk),
        units_per_chunk=settings.chunk,
        unit="updates",
        config={"learner": learner, "seeds": settings.seeds},
        checkpoint_every=4,
    )
    return {name: np.swapaxes(value, 0, 1) for name, value in metrics.items()}, states.params


def final_success(success_SU: np.ndarray, share: float = 0.1) -> np.ndarray:
    """Success rate of each seed over the last `share` of its updates."""
    last = max(1, round(share * success_SU.shape[1]))
    return success_SU[:, -last:].mean(1)

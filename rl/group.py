"""Group-relative policy optimisation of any policy network in any environment: whole episodes, no critic.

Per update: G starts (tasks, where a reset draws one) and K episodes from each. An episode's advantage is its return
against those of its group (GRPO, Shao et al., arXiv 2402.03300), for each action or for the episode as a whole (GSPO,
Zheng et al., arXiv 2507.18071): see `grpo.improve`, which does the learning. All actions of a minibatch count alike, as
in DAPO (Yu et al., arXiv 2503.14476); GRPO averages over those of each episode first, as GSPO does in effect.

The return is the undiscounted sum of rewards; an episode that the time limit or `horizon` cuts has what it got so far.
No penalty keeps the policy near a reference. Starts on which all episodes fare alike teach nothing: a task whose reward
is never met needs another algorithm, or another policy to begin with.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rl import grpo, normalise
from rl.algorithm import Algorithm, Train, bad_values, check_actor_critic, check_kind, trainer
from rl.grpo import Batch, GRPOConfig, TrainState
from rl.losses import Level
from rl.networks import Network, is_discrete, unroll
from rl.policies import bounds, to_box
from rl.rollout import Episodes, Step, rollout


@dataclass(frozen=True)
class GroupConfig:
    """`groups` G and `episodes` K in each, of at most `horizon` steps, per update; `updates` in all; `epochs` passes
    over the G K episodes in `minibatches`. `level`, `max_grad_norm`, `advantage_epsilon`: see `GRPOConfig`."""

    groups: int = 8
    episodes: int = 8
    horizon: int = 500
    updates: int = 100
    epochs: int = 4
    minibatches: int = 4
    level: Level = "token"
    max_grad_norm: float = 1.0
    advantage_epsilon: float = 1e-3
    anneal: bool = True
    normalise_observations: bool = False

    def __post_init__(self) -> None:
        for name in ("groups", "horizon", "updates", "epochs", "minibatches"):
            if getattr(self, name) < 1:
                raise ValueError(f"GroupConfig: {name} is {getattr(self, name)}, expected at least 1")
        if self.episodes < 2:
            raise ValueError(
                f"GroupConfig: episodes is {self.episodes}, expected at least 2, to be compared with each other"
            )
        if (self.groups * self.episodes) % self.minibatches:
            raise ValueError(
                f"GroupConfig: {self.groups} groups x {self.episodes} episodes are not divisible by "
                f"minibatches {self.minibatches}"
            )
        _ = self.optimiser

    @property
    def optimiser(self) -> GRPOConfig:
        """What the optimiser is told."""
        return GRPOConfig(
            batch=self.groups * self.episodes,
            groups=self.groups,
            horizon=self.horizon,
            epochs=self.epochs,
            minibatches=self.minibatches,
            level=self.level,
            max_grad_norm=self.max_grad_norm,
            advantage_epsilon=self.advantage_epsilon,
        )


class GroupHyper(NamedTuple):
    """Traced hyperparameters: numbers, or arrays to sweep over by `vmap`."""

    learning_rate: float | jax.Array = 3e-4
    clip: float | jax.Array = 0.2


class GroupState(NamedTuple):
    """Everything a run is: see `rl.algorithm`."""

    params: Any
    opt_state: Any
    observations: Any
    update: jax.Array
    key: jax.Array
    hyper: GroupHyper
    env_params: Any


def make(config: GroupConfig, env: Any, network: Network) -> Algorithm:
    """Group-relative policy optimisation in `env` of an actor-critic, such as `networks.actor_critic`, whose critic is
    ignored. `steps_per_update` is the most that an update can take: episodes may end early.

    Raises ValueError, in `init`, where the network's outputs do not fit.
    """
    check_kind("group", network, Network, "actor_critic")
    space = env.action_space(env.default_params)
    box = None if is_discrete(space) else bounds(space)
    batch_size = config.groups * config.episodes

    def to_env(action: jax.Array) -> jax.Array:
        return action if box is None else to_box(box, action)

    def see(seen: Any, obs: Any) -> Any:
        return normalise.normalise(seen, obs) if config.normalise_observations else obs

    def init(key: jax.Array, hyper: GroupHyper, env_params: Any) -> GroupState:
        k_params, k_shape, k_run = jax.random.split(key, 3)
        params = network.init(k_params)
        obs = jax.eval_shape(lambda: env.reset_env(k_shape, env_params)[0])
        observations = jax.tree.map(lambda x: normalise.moments(x.shape), obs)
        obs_1 = jax.tree.map(lambda x: jnp.zeros((1, *x.shape), x.dtype), obs)
        check_actor_critic("group", network, params, see(observations, obs_1), network.init_memory(1), space)
        return GroupState(
            params=params,
            opt_state=grpo.start(config.optimiser, params, k_run).opt_state,
            observations=observations,
            update=jnp.zeros((), jnp.int32),
            key=k_run,
            hyper=jax.tree.map(jnp.float32, hyper),
            env_params=env_params,
        )

    def play(state: GroupState, key: jax.Array) -> tuple[Episodes, Batch]:
        def policy(key: jax.Array, step: Step, memory: Any):
            seen = see(state.observations, step.obs_BF)
            (policy, _), memory = network.step(state.params, seen, memory)
            action = policy.sample(key)
            return to_env(action), memory, (step.obs_BF, action, policy.log_prob(action))

        memory = network.init_memory(batch_size)
        episodes, _ = rollout(
            key, env, state.env_params, policy, memory, batch_size, config.horizon, groups=config.groups
        )
        obs, action, log_prob_BL = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), episodes.recorded)
        return episodes, Batch(obs, action, log_prob_BL, episodes.valid_TB.T, episodes.return_B)

    def log_prob(params: Any, obs: Any, action: jax.Array) -> jax.Array:
        if not network.recurrent:
            return network.step(params, obs, ())[0][0].log_prob(action)
        obs_TB, action_TB = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (obs, action))
        # One episode a row: the memory it starts with is blank, and nothing resets it.
        first_TB = jnp.zeros(action_TB.shape[:2], bool)
        (policy, _), _ = unroll(network, params, obs_TB, first_TB, network.init_memory(len(action)))
        return policy.log_prob(action_TB).T

    def update(state: GroupState) -> tuple[GroupState, dict[str, jax.Array]]:
        k_play, k_learn = jax.random.split(jax.random.fold_in(state.key, state.update))
        episodes, batch = play(state, k_play)
        valid_BL = batch.mask_BL
        # What an episode seems to show after its end is not to be learned from or counted.
        obs = jax.tree.map(
            lambda x: jnp.where(valid_BL.reshape(*valid_BL.shape, *(1,) * (x.ndim - 2)), x, 0), batch.inputs
        )
        batch = batch._replace(inputs=see(state.observations, obs))
        left = jnp.maximum(1.0 - state.update / config.updates, 0.0) if config.anneal else 1.0
        learned, metrics = grpo.improve(
            config.optimiser,
            log_prob,
            state.hyper.learning_rate * left,
            TrainState(state.params, state.opt_state, state.update, state.key),
            k_learn,
            batch,
            clip=state.hyper.clip,
        )
        new = state._replace(params=learned.params, opt_state=learned.opt_state, update=learned.step)
        if config.normalise_observations:
            new = new._replace(observations=normalise.update(state.observations, obs, valid_BL))
        return new, {
            "loss": metrics["loss"],
            "kl": metrics["kl"],
            "grad_norm": metrics["grad_norm"],
            "bad_observations": bad_values(obs),
            "episodes": jnp.array(batch_size),
            "episode_return": episodes.return_B.mean(),
            "episode_length": episodes.length_B.mean(),
        }

    def act(state: GroupState, key: jax.Array | None, obs_B: Any, memory: Any) -> tuple[jax.Array, Any]:
        (policy, _), memory = network.step(state.params, see(state.observations, obs_B), memory)
        return to_env(policy.mode() if key is None else policy.sample(key)), memory

    return Algorithm(init, update, act, network.init_memory, batch_size * config.horizon)


def make_train(config: GroupConfig, env: Any, network: Network) -> Train:
    """`train(key, hyper=GroupHyper(), env_params=None) -> (state, metrics)`, all updates as one function."""
    return trainer(make(config, env, network), config.updates, GroupHyper(), env)

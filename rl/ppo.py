"""Proximal policy optimisation (Schulman et al., arXiv 1707.06347), discrete or continuous, with or without a memory.

Per update: T steps in E environments, generalised advantages (arXiv 1506.02438), then some epochs of minibatches of the
clipped objective. Details as in Huang et al., "The 37 implementation details of PPO" (2022): orthogonal initialisation,
advantages normalised in each minibatch, Adam with epsilon 1e-5, global-norm clip, optional clip of the value's change,
learning rate falling linearly to 0 where `anneal` is set.

It differs from most: an episode cut off by a time limit is bootstrapped with the value of its own last observation,
and a memory is carried between updates and reset inside of them; then minibatches are of whole environments.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rl import normalise, vector
from rl.algorithm import Algorithm, Train, bad_values, check_actor_critic, check_kind, trainer
from rl.collect import Rollout, collect
from rl.losses import approximate_kl, clip_loss, normalise_advantage, value_loss
from rl.networks import Network, is_discrete, unroll
from rl.normalise import RewardScale
from rl.policies import bounds, to_box
from rl.returns import generalised_advantages
from rl.vector import Envs, episode_metrics


@dataclass(frozen=True)
class PPOConfig:
    """`environments` E, each `steps` T per update, `updates` in all; `epochs` passes in `minibatches`.

    `resets`: fresh starts computed per step, see `rl.vector.step`. `params_per_env`: the environment's parameters have
    a leading axis E. `shards`: a minibatch takes equally from each of so many groups of neighbouring environments; with
    a group to each device (`rl.devices`), data stay where they were collected.
    """

    environments: int = 64
    steps: int = 128
    updates: int = 60
    epochs: int = 4
    minibatches: int = 4
    max_grad_norm: float = 0.5
    anneal: bool = True
    clip_value: bool = False
    normalise_advantage: bool = True
    normalise_observations: bool = False
    normalise_rewards: bool = False
    resets: int | None = None
    params_per_env: bool = False
    shards: int = 1

    def __post_init__(self) -> None:
        for name in ("environments", "steps", "updates", "epochs", "minibatches", "shards"):
            if getattr(self, name) < 1:
                raise ValueError(f"PPOConfig: {name} is {getattr(self, name)}, expected at least 1")
        if not self.max_grad_norm > 0:
            raise ValueError(f"PPOConfig: max_grad_norm is {self.max_grad_norm}, expected a number above 0")
        if self.environments % self.shards:
            raise ValueError(f"PPOConfig: {self.environments} environments are not divisible by shards {self.shards}")
        if (self.environments * self.steps) % (self.minibatches * self.shards):
            raise ValueError(
                f"PPOConfig: {self.environments} environments x {self.steps} steps are not divisible by "
                f"minibatches {self.minibatches} x shards {self.shards}"
            )


class PPOHyper(NamedTuple):
    """Traced hyperparameters: numbers, or arrays to sweep over by `vmap`."""

    learning_rate: float | jax.Array = 2.5e-4
    discount: float | jax.Array = 0.99
    lambda_: float | jax.Array = 0.95
    clip: float | jax.Array = 0.2
    entropy: float | jax.Array = 0.01
    value: float | jax.Array = 0.5


class PPOState(NamedTuple):
    """Everything a run is: see `rl.algorithm`."""

    params: Any
    opt_state: Any
    envs: Envs
    memory: Any
    observations: Any
    rewards: RewardScale
    update: jax.Array
    key: jax.Array
    hyper: PPOHyper
    env_params: Any


def make(config: PPOConfig, env: Any, network: Network) -> Algorithm:
    """PPO in `env` with an actor-critic, such as `networks.actor_critic`.

    Raises ValueError where the network has a memory and minibatches cannot be of whole environments, and, in `init`,
    where its outputs do not fit.
    """
    check_kind("ppo", network, Network, "actor_critic")
    if network.recurrent and config.environments % (config.minibatches * config.shards):
        raise ValueError(
            f"ppo: {config.environments} environments are not divisible by minibatches {config.minibatches} x shards "
            f"{config.shards}: minibatches are of whole environments where the network has a memory"
        )
    space = env.action_space(env.default_params)
    box = None if is_discrete(space) else bounds(space)
    axis = 0 if config.params_per_env else None

    def to_env(action: jax.Array) -> jax.Array:
        return action if box is None else to_box(box, action)

    def see(seen: Any, obs: Any) -> Any:
        return normalise.normalise(seen, obs) if config.normalise_observations else obs

    def optimiser(hyper: PPOHyper, update: jax.Array) -> optax.GradientTransformation:
        left = jnp.maximum(1.0 - update / config.updates, 0.0) if config.anneal else 1.0
        return optax.chain(
            optax.clip_by_global_norm(config.max_grad_norm),
            optax.scale_by_adam(eps=1e-5),
            optax.scale(-hyper.learning_rate * left),
        )

    def init(key: jax.Array, hyper: PPOHyper, env_params: Any) -> PPOState:
        k_params, k_reset, k_run = jax.random.split(key, 3)
        params = network.init(k_params)
        keys_E = jax.random.split(k_reset, config.environments)
        envs = vector.reset(keys_E, env, env_params, params_axis=axis)
        memory = network.init_memory(config.environments)
        observations = jax.tree.map(lambda x: normalise.moments(x.shape[1:]), envs.obs)
        check_actor_critic("ppo", network, params, see(observations, envs.obs), memory, space)
        zero = jnp.zeros((), jnp.int32)
        return PPOState(
            params=params,
            opt_state=optimiser(hyper, zero).init(params),
            envs=envs,
            memory=memory,
            observations=observations,
            rewards=normalise.reward_scale(config.environments),
            update=zero,
            key=k_run,
            hyper=jax.tree.map(jnp.float32, hyper),
            env_params=env_params,
        )

    def loss(params: Any, hyper: PPOHyper, part: Rollout, advantage: jax.Array, target: jax.Array):
        (policy, value), _ = unroll(network, params, part.obs_TE, part.first_TE, part.memory)
        log_prob, everywhere = policy.log_prob(part.action_TE), jnp.ones(advantage.shape, bool)
        if config.normalise_advantage:
            advantage = normalise_advantage(advantage, everywhere)
        policy_loss = clip_loss(log_prob, part.log_prob_TE, advantage, everywhere, hyper.clip)
        old_value, clip = (part.value_TE, hyper.clip) if config.clip_value else (None, None)
        critic_loss = value_loss(value, target, everywhere, old_value, clip)
        entropy = policy.entropy().mean()
        total = policy_loss + hyper.value * critic_loss - hyper.entropy * entropy
        return total, {
            "loss": total,
            "policy_loss": policy_loss,
            "value_loss": critic_loss,
            "entropy": entropy,
            "kl": approximate_kl(log_prob, part.log_prob_TE, everywhere),
        }

    def update(state: PPOState) -> tuple[PPOState, dict[str, jax.Array]]:
        hyper = state.hyper
        k_collect, k_order = jax.random.split(jax.random.fold_in(state.key, state.update))
        rollout, envs, memory = collect(
            k_collect,
            network,
            state.params,
            state.envs,
            state.memory,
            env,
            state.env_params,
            config.steps,
            to_env=to_env,
            see=lambda obs: see(state.observations, obs),
            params_axis=axis,
            resets=config.resets,
        )
        outcome, rewards, reward_TE = rollout.outcome, state.rewards, rollout.outcome.reward_E
        if config.normalise_rewards:
            reward_TE, rewards = normalise.scale_rewards(rewards, reward_TE, outcome.done_E, hyper.discount)
        advantage_TE, target_TE = generalised_advantages(
            reward_TE,
            rollout.value_TE,
            rollout.next_value_TE,
            outcome.terminated_E,
            outcome.truncated_E,
            hyper.discount,
            hyper.lambda_,
        )
        tx = optimiser(hyper, state.update)
        pick, rows = _minibatches(config, network, rollout, advantage_TE, target_TE)

        def minibatch(carry: tuple[Any, Any], index_GI: jax.Array):
            params, opt_state = carry
            grads, metrics = jax.grad(loss, has_aux=True)(params, hyper, *pick(index_GI))
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), metrics | {"grad_norm": optax.tree.norm(grads)}

        def order(key: jax.Array) -> jax.Array:
            # jax.random.permutation sorts twice, in case that random bits coincide, which matters not here.
            order_GR = jnp.argsort(jax.random.bits(key, (config.shards, rows)), axis=1, stable=False)
            return order_GR.reshape(config.shards, config.minibatches, -1).swapaxes(0, 1)

        order_NGI = jax.vmap(order)(jax.random.split(k_order, config.epochs)).reshape(
            config.epochs * config.minibatches, config.shards, -1
        )
        (params, opt_state), metrics = jax.lax.scan(minibatch, (state.params, state.opt_state), order_NGI)
        explained = 1 - (target_TE - rollout.value_TE).var() / jnp.maximum(target_TE.var(), 1e-8)
        new = state._replace(
            params=params,
            opt_state=opt_state,
            envs=envs,
            memory=memory,
            rewards=rewards,
            update=state.update + 1,
        )
        if config.normalise_observations:
            new = new._replace(observations=normalise.update(state.observations, rollout.raw_obs_TE))
        return new, {
            **jax.tree.map(jnp.mean, metrics),
            "explained_variance": explained,
            "bad_observations": bad_values((rollout.raw_obs_TE, outcome.final_obs)),
            **episode_metrics(outcome),
        }

    def act(state: PPOState, key: jax.Array | None, obs_B: Any, memory: Any) -> tuple[jax.Array, Any]:
        (policy, _), memory = network.step(state.params, see(state.observations, obs_B), memory)
        return to_env(policy.mode() if key is None else policy.sample(key)), memory

    return Algorithm(init, update, act, network.init_memory, config.environments * config.steps)


def make_train(config: PPOConfig, env: Any, network: Network) -> Train:
    """`train(key, hyper=PPOHyper(), env_params=None) -> (state, metrics)`, all updates as one function."""
    return trainer(make(config, env, network), config.updates, PPOHyper(), env)


def _minibatches(
    config: PPOConfig, network: Network, rollout: Rollout, advantage_TE: jax.Array, target_TE: jax.Array
) -> tuple[Any, int]:
    """A function from indices (G, I) to (part of the rollout, its advantages, its targets), and the number of rows to
    index in each of the G `shards`: steps, or environments where the order of steps matters."""
    # What the loss does not read would be gathered for nothing.
    data = (rollout._replace(raw_obs_TE=None, outcome=None, next_value_TE=None, memory=None), advantage_TE, target_TE)
    groups, count = config.shards, config.environments // config.shards

    def take(x_GR: jax.Array, index_GI: jax.Array) -> jax.Array:
        return jax.vmap(lambda x, index_I: x[index_I])(x_GR, index_GI)

    # Groups lead, or follow the time, wherever data are reshaped: so a group stays on its device.
    if network.recurrent:

        def pick(index_GI: jax.Array):
            def environments(x: jax.Array) -> jax.Array:
                return take(x.reshape(groups, count, *x.shape[1:]), index_GI).reshape(-1, *x.shape[1:])

            part, advantage, target = jax.tree.map(jax.vmap(environments), data)
            return part._replace(memory=jax.tree.map(environments, rollout.memory)), advantage, target

        return pick, count

    def rows(x: jax.Array) -> jax.Array:
        x = x.reshape(config.steps, groups, count, *x.shape[2:]).swapaxes(0, 1)
        return x.reshape(groups, config.steps * count, *x.shape[3:])

    data = jax.tree.map(rows, data)
    return (
        lambda index_GI: jax.tree.map(lambda x: take(x, index_GI).reshape(-1, *x.shape[2:]), data),
        config.steps * count,
    )

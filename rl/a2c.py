"""Advantage actor-critic, synchronous (A2C; Mnih et al., arXiv 1602.01783), and REINFORCE (Williams, 1992).

Per update: T steps in E environments, generalised advantages (arXiv 1506.02438; lambda 1 gives n-step returns), and one
gradient step on all of them. RMSprop has its epsilon inside the root, as there.

REINFORCE, `baseline=False`, has no critic: an action is weighted by the discounted rewards that followed it. Every
update then starts E new episodes and learns from the first of each environment, up to T steps; one that is longer
counts as truncated there, so choose `steps` as long as an episode. What an environment plays after its first episode
is left out: to learn from whatever else happens to end in time would favour short episodes.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rl import normalise, vector
from rl.algorithm import Algorithm, Train, bad_values, check_actor_critic, check_kind, trainer
from rl.collect import Rollout, collect
from rl.losses import normalise_advantage, policy_gradient_loss, value_loss
from rl.networks import Network, is_discrete, unroll
from rl.normalise import RewardScale
from rl.policies import bounds, to_box
from rl.returns import discounted_returns, generalised_advantages
from rl.vector import Envs, episode_metrics


@dataclass(frozen=True)
class A2CConfig:
    """`environments` E, each `steps` T per update, `updates` in all; `baseline=False` is REINFORCE.

    `resets`: fresh starts computed per step, see `rl.vector.step`. `params_per_env`: the environment's parameters have
    a leading axis E.
    """

    environments: int = 64
    steps: int = 5
    updates: int = 1000
    baseline: bool = True
    optimiser: Literal["rmsprop", "adam"] = "rmsprop"
    max_grad_norm: float = 0.5
    anneal: bool = True
    normalise_advantage: bool = False
    normalise_observations: bool = False
    normalise_rewards: bool = False
    resets: int | None = None
    params_per_env: bool = False

    def __post_init__(self) -> None:
        for name in ("environments", "steps", "updates"):
            if getattr(self, name) < 1:
                raise ValueError(f"A2CConfig: {name} is {getattr(self, name)}, expected at least 1")
        if not self.max_grad_norm > 0:
            raise ValueError(f"A2CConfig: max_grad_norm is {self.max_grad_norm}, expected a number above 0")
        if self.optimiser not in ("rmsprop", "adam"):
            raise ValueError(f"A2CConfig: optimiser is {self.optimiser!r}, expected 'rmsprop' or 'adam'")


class A2CHyper(NamedTuple):
    """Traced hyperparameters: numbers, or arrays to sweep over by `vmap`. REINFORCE ignores `lambda_` and `value`."""

    learning_rate: float | jax.Array = 7e-4
    discount: float | jax.Array = 0.99
    lambda_: float | jax.Array = 1.0
    entropy: float | jax.Array = 0.01
    value: float | jax.Array = 0.5


class A2CState(NamedTuple):
    """Everything a run is: see `rl.algorithm`."""

    params: Any
    opt_state: Any
    envs: Envs
    memory: Any
    observations: Any
    rewards: RewardScale
    update: jax.Array
    key: jax.Array
    hyper: A2CHyper
    env_params: Any


def make(config: A2CConfig, env: Any, network: Network) -> Algorithm:
    """A2C or REINFORCE in `env` with an actor-critic, such as `networks.actor_critic`; REINFORCE ignores the critic.

    Raises ValueError, in `init`, where the network's outputs do not fit.
    """
    check_kind("a2c", network, Network, "actor_critic")
    space = env.action_space(env.default_params)
    box = None if is_discrete(space) else bounds(space)
    axis = 0 if config.params_per_env else None

    def to_env(action: jax.Array) -> jax.Array:
        return action if box is None else to_box(box, action)

    def see(seen: Any, obs: Any) -> Any:
        return normalise.normalise(seen, obs) if config.normalise_observations else obs

    def optimiser(hyper: A2CHyper, update: jax.Array) -> optax.GradientTransformation:
        left = jnp.maximum(1.0 - update / config.updates, 0.0) if config.anneal else 1.0
        adam = config.optimiser == "adam"
        return optax.chain(
            optax.clip_by_global_norm(config.max_grad_norm),
            optax.scale_by_adam(eps=1e-5) if adam else optax.scale_by_rms(decay=0.99, eps=1e-5),
            optax.scale(-hyper.learning_rate * left),
        )

    def start(key: jax.Array, env_params: Any) -> Envs:
        return vector.reset(jax.random.split(key, config.environments), env, env_params, params_axis=axis)

    def init(key: jax.Array, hyper: A2CHyper, env_params: Any) -> A2CState:
        k_params, k_reset, k_run = jax.random.split(key, 3)
        params = network.init(k_params)
        envs = start(k_reset, env_params)
        memory = network.init_memory(config.environments)
        observations = jax.tree.map(lambda x: normalise.moments(x.shape[1:]), envs.obs)
        check_actor_critic("a2c", network, params, see(observations, envs.obs), memory, space)
        zero = jnp.zeros((), jnp.int32)
        return A2CState(
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

    def restarted(state: A2CState, key: jax.Array) -> A2CState:
        rewards = state.rewards._replace(return_E=jnp.zeros(config.environments))
        memory = network.init_memory(config.environments)
        return state._replace(envs=start(key, state.env_params), memory=memory, rewards=rewards)

    def weights(rollout: Rollout, reward_TE: jax.Array, hyper: A2CHyper) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Advantages, targets of the critic, and which steps count."""
        outcome = rollout.outcome
        flags = (outcome.terminated_E, outcome.truncated_E)
        if not config.baseline:
            return_TE = discounted_returns(reward_TE, *flags, hyper.discount)
            ended_TE = jnp.cumsum(outcome.done_E, 0) - outcome.done_E
            return return_TE, return_TE, ended_TE == 0
        values = (rollout.value_TE, rollout.next_value_TE)
        advantage_TE, target_TE = generalised_advantages(reward_TE, *values, *flags, hyper.discount, hyper.lambda_)
        return advantage_TE, target_TE, jnp.ones(reward_TE.shape, bool)

    def loss(params: Any, hyper: A2CHyper, rollout: Rollout, advantage_TE, target_TE, mask_TE):
        (policy, value_TE), _ = unroll(network, params, rollout.obs_TE, rollout.first_TE, rollout.memory)
        if config.normalise_advantage:
            advantage_TE = normalise_advantage(advantage_TE, mask_TE)
        # Divided by T E, not by the number of steps that count: that is random and depends on the actions.
        share = mask_TE.mean()
        policy_loss = share * policy_gradient_loss(policy.log_prob(rollout.action_TE), advantage_TE, mask_TE)
        entropy = jnp.where(mask_TE, policy.entropy(), 0.0).sum() / mask_TE.sum()
        total = policy_loss - hyper.entropy * share * entropy
        metrics = {"policy_loss": policy_loss, "entropy": entropy}
        if config.baseline:
            critic_loss = value_loss(value_TE, target_TE, mask_TE)
            total, metrics = total + hyper.value * critic_loss, metrics | {"value_loss": critic_loss}
        return total, metrics | {"loss": total}

    def update(state: A2CState) -> tuple[A2CState, dict[str, jax.Array]]:
        hyper = state.hyper
        k_collect, k_start = jax.random.split(jax.random.fold_in(state.key, state.update))
        if not config.baseline:
            state = restarted(state, k_start)
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
        advantage_TE, target_TE, mask_TE = weights(rollout, reward_TE, hyper)
        grads, metrics = jax.grad(loss, has_aux=True)(state.params, hyper, rollout, advantage_TE, target_TE, mask_TE)
        updates, opt_state = optimiser(hyper, state.update).update(grads, state.opt_state, state.params)
        new = state._replace(
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
            envs=envs,
            memory=memory,
            rewards=rewards,
            update=state.update + 1,
        )
        if config.normalise_observations:
            new = new._replace(observations=normalise.update(state.observations, rollout.raw_obs_TE))
        return new, {
            **metrics,
            "grad_norm": optax.tree.norm(grads),
            "bad_observations": bad_values((rollout.raw_obs_TE, outcome.final_obs)),
            **episode_metrics(outcome, mask_TE),
        }

    def act(state: A2CState, key: jax.Array | None, obs_B: Any, memory: Any) -> tuple[jax.Array, Any]:
        (policy, _), memory = network.step(state.params, see(state.observations, obs_B), memory)
        return to_env(policy.mode() if key is None else policy.sample(key)), memory

    return Algorithm(init, update, act, network.init_memory, config.environments * config.steps)


def make_train(config: A2CConfig, env: Any, network: Network) -> Train:
    """`train(key, hyper=A2CHyper(), env_params=None) -> (state, metrics)`, all updates as one function."""
    return trainer(make(config, env, network), config.updates, A2CHyper(), env)

"""Deep Q-learning (Mnih et al., "Human-level control through deep reinforcement learning", 2015), discrete actions.

Per update: T times, a step of E environments with epsilon-greedy actions, then some gradient steps on the Huber loss of
Q(s, a) - r - discount Q_target(s', a') with samples of a replay buffer; a' maximises Q_target, or Q where `double` is
set (van Hasselt et al., arXiv 1509.06461, equation 4). A dueling network is `networks.q_network(..., dueling=True)`.

It differs from most: only termination ends the sum of rewards, a time limit does not, as the buffer has every episode's
own last observation. Observations are stored as they are, and normalised, if at all, when they are read.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rl import normalise, replay, vector
from rl.algorithm import Algorithm, Train, bad_values, check_kind, check_outputs, trainer
from rl.networks import Network, is_discrete
from rl.replay import Replay, Transition
from rl.vector import Envs, episode_metrics


@dataclass(frozen=True)
class DQNConfig:
    """`environments` E, each `steps` T per update, `updates` in all; after each of the T steps, `gradient_steps` with
    `batch` transitions each, from when the replay buffer of `capacity` transitions has `learning_starts` of them.

    The target network goes `DQNHyper.tau` of the way to the network every `target_period` gradient steps: tau 1 copies
    it now and then, tau well below 1 and a period of 1 follow it softly. `anneal`: the learning rate falls linearly to
    0. `replay_dtype`: the type of observations in the buffer, which must hold them, such as "uint8" for MinAtar's zeros
    and ones; None: their own. `resets`: fresh starts computed per step, see `rl.vector.step`. `params_per_env`: the
    environment's parameters have a leading axis E.
    """

    environments: int = 8
    steps: int = 64
    updates: int = 100
    capacity: int = 16_384
    learning_starts: int = 1_024
    gradient_steps: int = 1
    batch: int = 128
    target_period: int = 200
    double: bool = True
    max_grad_norm: float = 10.0
    anneal: bool = False
    normalise_observations: bool = False
    replay_dtype: str | None = None
    resets: int | None = None
    params_per_env: bool = False

    def __post_init__(self) -> None:
        for name in ("environments", "steps", "updates", "learning_starts", "gradient_steps", "batch", "target_period"):
            if getattr(self, name) < 1:
                raise ValueError(f"DQNConfig: {name} is {getattr(self, name)}, expected at least 1")
        if not self.max_grad_norm > 0:
            raise ValueError(f"DQNConfig: max_grad_norm is {self.max_grad_norm}, expected a number above 0")
        if self.capacity < 1 or self.capacity % self.environments:
            raise ValueError(
                f"DQNConfig: capacity is {self.capacity}, expected a multiple of {self.environments} environments"
            )
        if self.learning_starts > self.capacity:
            raise ValueError(
                f"DQNConfig: learning_starts is {self.learning_starts}, expected at most the capacity {self.capacity}"
            )
        replay.check_dtype("DQNConfig", self.replay_dtype)


class DQNHyper(NamedTuple):
    """Traced hyperparameters: numbers, or arrays to sweep over by `vmap`. Epsilon falls linearly from `epsilon_start`
    to `epsilon_end` over the fraction `exploration` of all steps. `huber`: the loss is quadratic up to an error of this
    size, linear beyond."""

    learning_rate: float | jax.Array = 1e-3
    discount: float | jax.Array = 0.99
    tau: float | jax.Array = 1.0
    epsilon_start: float | jax.Array = 1.0
    epsilon_end: float | jax.Array = 0.05
    exploration: float | jax.Array = 0.3
    huber: float | jax.Array = 1.0


class DQNState(NamedTuple):
    """Everything a run is: see `rl.algorithm`. `target` are the target network's parameters, `learned` the number of
    gradient steps so far."""

    params: Any
    target: Any
    opt_state: Any
    learned: jax.Array
    replay: Replay
    envs: Envs
    observations: Any
    update: jax.Array
    key: jax.Array
    hyper: DQNHyper
    env_params: Any


def make(config: DQNConfig, env: Any, network: Network) -> Algorithm:
    """DQN in `env` with a network whose outputs are the values of actions, such as `networks.q_network`.

    Raises ValueError for actions that are not discrete, for a network with a memory, and, in `init`, where the
    network's outputs do not fit.
    """
    space = env.action_space(env.default_params)
    if not is_discrete(space):
        raise ValueError(f"dqn: action space is {type(space).__name__}, expected a Discrete")
    check_kind("dqn", network, Network, "q_network")
    if network.recurrent:
        raise ValueError("dqn: the network has a memory, expected one without: the buffer has single transitions")
    axis = 0 if config.params_per_env else None

    def see(seen: Any, obs: Any) -> Any:
        return normalise.normalise(seen, obs) if config.normalise_observations else obs

    def q(params: Any, obs: Any) -> jax.Array:
        return network.step(params, obs, ())[0]

    def optimiser(hyper: DQNHyper, update: jax.Array) -> optax.GradientTransformation:
        left = jnp.maximum(1.0 - update / config.updates, 0.0) if config.anneal else 1.0
        return optax.chain(
            optax.clip_by_global_norm(config.max_grad_norm),
            optax.scale_by_adam(),
            optax.scale(-hyper.learning_rate * left),
        )

    def epsilon(hyper: DQNHyper, step: jax.Array) -> jax.Array:
        done = step / jnp.maximum(hyper.exploration * config.updates * config.steps, 1.0)
        return hyper.epsilon_start + (hyper.epsilon_end - hyper.epsilon_start) * jnp.minimum(done, 1.0)

    def init(key: jax.Array, hyper: DQNHyper, env_params: Any) -> DQNState:
        k_params, k_reset, k_run = jax.random.split(key, 3)
        params = network.init(k_params)
        keys_E = jax.random.split(k_reset, config.environments)
        envs = vector.reset(keys_E, env, env_params, params_axis=axis)
        observations = jax.tree.map(lambda x: normalise.moments(x.shape[1:]), envs.obs)
        shape = (config.environments, space.n)
        check_outputs("dqn: the network's step", lambda: q(params, see(observations, envs.obs)), shape, "q_network")
        obs = replay.narrow(jax.tree.map(lambda x: x[0], envs.obs), config.replay_dtype)
        zero = jnp.zeros((), jnp.int32)
        example = Transition(obs, zero, jnp.zeros(()), jnp.zeros((), bool), obs)
        return DQNState(
            params=params,
            # Arrays of its own, so that both can be donated.
            target=jax.tree.map(jnp.copy, params),
            opt_state=optimiser(hyper, zero).init(params),
            learned=zero,
            replay=replay.init(example, config.capacity),
            envs=envs,
            observations=observations,
            update=jnp.zeros_like(zero),
            key=k_run,
            hyper=jax.tree.map(jnp.float32, hyper),
            env_params=env_params,
        )

    def loss(params: Any, target: Any, hyper: DQNHyper, part: Transition):
        next_q_BA = q(target, part.next_obs)
        best_B = (q(params, part.next_obs) if config.double else next_q_BA).argmax(-1)
        goal_B = part.reward + hyper.discount * jnp.where(part.terminated, 0.0, _pick(next_q_BA, best_B))
        value_B = _pick(q(params, part.obs), part.action)
        error_B = value_B - jax.lax.stop_gradient(goal_B)
        total = optax.losses.huber_loss(error_B, delta=hyper.huber).mean()
        return total, {"loss": total, "q": value_B.mean(), "td_error": jnp.abs(error_B).mean()}

    def update(state: DQNState) -> tuple[DQNState, dict[str, jax.Array]]:
        hyper, tx = state.hyper, optimiser(state.hyper, state.update)
        k_env, k_explore, k_action, k_sample = jax.random.split(jax.random.fold_in(state.key, state.update), 4)
        shape = (config.steps, config.environments)
        # All at once: on a CPU random numbers drawn in a loop cost more than a small network.
        draws = (
            state.update * config.steps + jnp.arange(config.steps),
            jax.random.split(k_env, shape),
            jax.random.uniform(k_explore, shape),
            jax.random.randint(k_action, shape, 0, space.n),
            jax.random.bits(k_sample, (config.steps, config.gradient_steps, config.batch)),
        )

        def gradient_step(carry: tuple[Any, ...], part: Transition):
            params, target, opt_state, learned = carry
            grads, metrics = jax.grad(loss, has_aux=True)(params, target, hyper, part)
            updates, opt_state = tx.update(grads, opt_state, params)
            params, learned = optax.apply_updates(params, updates), learned + 1
            tau = jnp.where(learned % config.target_period == 0, hyper.tau, 0.0)
            target = optax.incremental_update(params, target, tau)
            return (params, target, opt_state, learned), metrics | {"grad_norm": optax.tree.norm(grads)}

        def one(carry: tuple[Any, ...], x: tuple[jax.Array, ...]):
            (learner, envs, buffer), (index, k_E, explore_E, random_E, bits_GB) = carry, x
            greedy_E = q(learner[0], see(state.observations, envs.obs)).argmax(-1)
            action_E = jnp.where(explore_E < epsilon(hyper, index), random_E, greedy_E)
            obs = envs.obs
            envs, outcome = vector.step(
                k_E, envs, action_E, env, state.env_params, params_axis=axis, resets=config.resets
            )
            buffer = replay.add(
                buffer, Transition(obs, action_E, outcome.reward_E, outcome.terminated_E, outcome.final_obs)
            )

            def read(stored: Any) -> Any:
                return see(state.observations, jax.tree.map(lambda x, like: x.astype(like.dtype), stored, obs))

            def learn(learner: tuple[Any, ...]):
                part = replay.sample(buffer, bits_GB)
                part = part._replace(obs=read(part.obs), next_obs=read(part.next_obs))
                return jax.lax.scan(gradient_step, learner, part)

            def wait(learner: tuple[Any, ...]):
                return learner, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(learn, learner)[1])

            learner, metrics = jax.lax.cond(buffer.size >= config.learning_starts, learn, wait, learner)
            return (learner, envs, buffer), (obs, outcome, metrics)

        learner = (state.params, state.target, state.opt_state, state.learned)
        (learner, envs, buffer), record = jax.lax.scan(one, (learner, state.envs, state.replay), draws)
        obs_TE, outcome, metrics = record
        params, target, opt_state, learned = learner
        new = state._replace(
            params=params,
            target=target,
            opt_state=opt_state,
            learned=learned,
            replay=buffer,
            envs=envs,
            update=state.update + 1,
        )
        if config.normalise_observations:
            new = new._replace(observations=normalise.update(state.observations, obs_TE))
        # Of the gradient steps that were taken; 0 where none was.
        count = jnp.maximum(learned - state.learned, 1)
        return new, {
            **jax.tree.map(lambda x: x.sum() / count, metrics),
            "epsilon": epsilon(hyper, draws[0][-1]),
            "bad_observations": bad_values((obs_TE, outcome.final_obs)),
            **episode_metrics(outcome),
        }

    def act(state: DQNState, key: jax.Array | None, obs_B: Any, memory: Any) -> tuple[jax.Array, Any]:
        action_B = q(state.params, see(state.observations, obs_B)).argmax(-1)
        if key is None:
            return action_B, memory
        k_explore, k_action = jax.random.split(key)
        explore_B = jax.random.uniform(k_explore, action_B.shape) < epsilon(state.hyper, state.update * config.steps)
        return jnp.where(explore_B, jax.random.randint(k_action, action_B.shape, 0, space.n), action_B), memory

    return Algorithm(init, update, act, network.init_memory, config.environments * config.steps)


def make_train(config: DQNConfig, env: Any, network: Network) -> Train:
    """`train(key, hyper=DQNHyper(), env_params=None) -> (state, metrics)`, all updates as one function."""
    return trainer(make(config, env, network), config.updates, DQNHyper(), env)


def _pick(q_BA: jax.Array, action_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(q_BA, action_B[:, None], axis=-1)[:, 0]

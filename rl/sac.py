"""Soft actor-critic (Haarnoja et al., arXiv 1812.05905), continuous actions.

Per update: T times, a step of E environments, then some gradient steps with samples of a replay buffer. A gradient step
improves two critics, towards r + discount (min Q_target(s', a') - temperature log pi(a'|s')); the actor, by minimising
temperature log pi(a|s) - min Q(s, a); and the temperature, which holds the entropy at a target (equations 5, 7 and 18).
Actions are random until learning starts.

It differs from most: only termination ends the sum of rewards, a time limit does not, as the buffer has every episode's
own last observation; critics, actor and temperature take their steps at once, from the same parameters. Actions are
between -1 and 1 for the networks, and in the entropy; the environment gets them scaled to its box.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rl import normalise, replay, vector
from rl.algorithm import Algorithm, Train, bad_values, check_kind, check_outputs, trainer
from rl.distributions import squash, tanh_gaussian_sample_and_log_prob
from rl.networks import ActorCritics, is_discrete
from rl.policies import bounds, to_box
from rl.replay import Replay, Transition
from rl.vector import Envs, episode_metrics


@dataclass(frozen=True)
class SACConfig:
    """`environments` E, each `steps` T per update, `updates` in all; after each of the T steps, `gradient_steps` with
    `batch` transitions each, from when the replay buffer of `capacity` transitions has `learning_starts` of them.

    `replay_dtype`: the type of observations in the buffer, which must hold them, such as "bfloat16"; None: their own.
    `resets`: fresh starts computed per step, see `rl.vector.step`. `params_per_env`: the environment's parameters have
    a leading axis E.
    """

    environments: int = 8
    steps: int = 64
    updates: int = 100
    capacity: int = 131_072
    learning_starts: int = 1_024
    gradient_steps: int = 8
    batch: int = 256
    normalise_observations: bool = False
    replay_dtype: str | None = None
    resets: int | None = None
    params_per_env: bool = False

    def __post_init__(self) -> None:
        for name in ("environments", "steps", "updates", "learning_starts", "gradient_steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"SACConfig: {name} is {getattr(self, name)}, expected at least 1")
        if self.capacity < 1 or self.capacity % self.environments:
            raise ValueError(
                f"SACConfig: capacity is {self.capacity}, expected a multiple of {self.environments} environments"
            )
        if self.learning_starts > self.capacity:
            raise ValueError(
                f"SACConfig: learning_starts is {self.learning_starts}, expected at most the capacity {self.capacity}"
            )
        replay.check_dtype("SACConfig", self.replay_dtype)


class SACHyper(NamedTuple):
    """Traced hyperparameters: numbers, or arrays to sweep over by `vmap`. `tau` is how far the target critics go to the
    critics at a gradient step; `target_entropy` is in nats for each dimension of an action, of which uniform ones have
    log 2; `temperature` is the first one."""

    learning_rate: float | jax.Array = 3e-4
    discount: float | jax.Array = 0.99
    tau: float | jax.Array = 0.005
    target_entropy: float | jax.Array = -1.0
    temperature: float | jax.Array = 1.0


class SACParams(NamedTuple):
    """Of both networks, and the logarithm of the temperature."""

    actor: Any
    critics: Any
    log_temperature: jax.Array


class SACState(NamedTuple):
    """Everything a run is: see `rl.algorithm`. `target` are the target critics' parameters, `learned` the number of
    gradient steps so far."""

    params: SACParams
    target: Any
    opt_state: Any
    learned: jax.Array
    replay: Replay
    envs: Envs
    observations: Any
    update: jax.Array
    key: jax.Array
    hyper: SACHyper
    env_params: Any


def make(config: SACConfig, env: Any, network: ActorCritics) -> Algorithm:
    """SAC in `env` with a squashed actor and its critics, such as `networks.squashed_actor_critics`.

    Raises ValueError for actions that are not a finite box, for networks with a memory, and, in `init`, where their
    outputs do not fit.
    """
    space = env.action_space(env.default_params)
    if is_discrete(space):
        raise ValueError(f"sac: action space is {type(space).__name__}, expected a Box")
    check_kind("sac", network, ActorCritics, "squashed_actor_critics")
    if network.actor.recurrent or network.critics.recurrent:
        raise ValueError("sac: a network has a memory, expected ones without: the buffer has single transitions")
    box = bounds(space)
    axis = 0 if config.params_per_env else None

    def see(seen: Any, obs: Any) -> Any:
        return normalise.normalise(seen, obs) if config.normalise_observations else obs

    def q(critics: Any, obs: Any, action: jax.Array) -> jax.Array:
        return network.critics.step(critics, (obs, action), ())[0]

    def draw(actor: Any, obs: Any, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return tanh_gaussian_sample_and_log_prob(key, *network.actor.step(actor, obs, ())[0])

    def check(params: SACParams, obs_E: Any) -> None:
        shape, maker = (config.environments, *space.shape), "squashed_actor_critics"
        check_outputs(
            "sac: the actor's step", lambda: network.actor.step(params.actor, obs_E, ())[0], (shape, shape), maker
        )
        check_outputs(
            "sac: the critics' step", lambda: q(params.critics, obs_E, jnp.zeros(shape)), (2, shape[0]), maker
        )

    def optimiser(hyper: SACHyper) -> optax.GradientTransformation:
        return optax.chain(optax.scale_by_adam(), optax.scale(-hyper.learning_rate))

    def init(key: jax.Array, hyper: SACHyper, env_params: Any) -> SACState:
        k_actor, k_critics, k_reset, k_run = jax.random.split(key, 4)
        hyper = jax.tree.map(jnp.float32, hyper)
        params = SACParams(
            network.actor.init(k_actor), network.critics.init(k_critics), jnp.log(jnp.asarray(hyper.temperature))
        )
        keys_E = jax.random.split(k_reset, config.environments)
        envs = vector.reset(keys_E, env, env_params, params_axis=axis)
        observations = jax.tree.map(lambda x: normalise.moments(x.shape[1:]), envs.obs)
        check(params, see(observations, envs.obs))
        obs = replay.narrow(jax.tree.map(lambda x: x[0], envs.obs), config.replay_dtype)
        example = Transition(obs, jnp.zeros(space.shape), jnp.zeros(()), jnp.zeros((), bool), obs)
        return SACState(
            params=params,
            # Arrays of its own, so that both can be donated.
            target=jax.tree.map(jnp.copy, params.critics),
            opt_state=optimiser(hyper).init(params),
            learned=jnp.zeros((), jnp.int32),
            replay=replay.init(example, config.capacity),
            envs=envs,
            observations=observations,
            update=jnp.zeros((), jnp.int32),
            key=k_run,
            hyper=hyper,
            env_params=env_params,
        )

    def loss(params: SACParams, target: Any, hyper: SACHyper, part: Transition, key: jax.Array):
        k_next, k_now = jax.random.split(key)
        temperature = jnp.exp(jax.lax.stop_gradient(params.log_temperature))

        next_action_BA, next_log_prob_B = draw(params.actor, part.next_obs, k_next)
        next_value_B = q(target, part.next_obs, next_action_BA).min(0) - temperature * next_log_prob_B
        goal_B = part.reward + hyper.discount * jnp.where(part.terminated, 0.0, next_value_B)
        q_2B = q(params.critics, part.obs, part.action)
        critic_loss = 0.5 * jnp.square(q_2B - jax.lax.stop_gradient(goal_B)[None]).sum(0).mean()

        action_BA, log_prob_B = draw(params.actor, part.obs, k_now)
        value_B = q(jax.lax.stop_gradient(params.critics), part.obs, action_BA).min(0)
        actor_loss = (temperature * log_prob_B - value_B).mean()

        entropy = -jax.lax.stop_gradient(log_prob_B).mean()
        temperature_loss = params.log_temperature * (entropy - hyper.target_entropy * action_BA.shape[-1])
        total = critic_loss + actor_loss + temperature_loss
        return total, {
            "loss": total,
            "critic_loss": critic_loss,
            "actor_loss": actor_loss,
            "temperature_loss": temperature_loss,
            "temperature": temperature,
            "entropy": entropy,
            "q": q_2B.mean(),
        }

    def update(state: SACState) -> tuple[SACState, dict[str, jax.Array]]:
        hyper, tx = state.hyper, optimiser(state.hyper)
        k_env, k_act, k_warm, k_sample, k_learn = jax.random.split(jax.random.fold_in(state.key, state.update), 5)
        shape = (config.steps, config.environments)
        # All at once: on a CPU random numbers drawn in a loop cost more than a small network.
        draws = (
            jax.random.split(k_env, shape),
            jax.random.normal(k_act, (*shape, *space.shape)),
            jax.random.uniform(k_warm, (*shape, *space.shape), minval=-1.0),
            jax.random.bits(k_sample, (config.steps, config.gradient_steps, config.batch)),
            jax.random.split(k_learn, (config.steps, config.gradient_steps)),
        )

        def gradient_step(carry: tuple[Any, ...], x: tuple[Transition, jax.Array]):
            (old, target, opt_state, learned), (part, key) = carry, x
            grads, metrics = jax.grad(loss, has_aux=True)(old, target, hyper, part, key)
            updates, opt_state = tx.update(grads, opt_state, old)
            params: Any = optax.apply_updates(old, updates)
            target = optax.incremental_update(params.critics, target, hyper.tau)
            return (params, target, opt_state, learned + 1), metrics | {"grad_norm": optax.tree.norm(grads)}

        def one(carry: tuple[Any, ...], x: tuple[jax.Array, ...]):
            (learner, envs, buffer), (k_E, noise_EA, random_EA, bits_GB, keys_G) = carry, x
            started = buffer.size >= config.learning_starts
            mean_EA, log_std_EA = network.actor.step(learner[0].actor, see(state.observations, envs.obs), ())[0]
            action_EA = jnp.where(started, squash(mean_EA + jnp.exp(log_std_EA) * noise_EA)[0], random_EA)
            obs = envs.obs
            envs, outcome = vector.step(
                k_E, envs, to_box(box, action_EA), env, state.env_params, params_axis=axis, resets=config.resets
            )
            buffer = replay.add(
                buffer, Transition(obs, action_EA, outcome.reward_E, outcome.terminated_E, outcome.final_obs)
            )

            def read(stored: Any) -> Any:
                return see(state.observations, jax.tree.map(lambda x, like: x.astype(like.dtype), stored, obs))

            def learn(learner: tuple[Any, ...]):
                part = replay.sample(buffer, bits_GB)
                part = part._replace(obs=read(part.obs), next_obs=read(part.next_obs))
                return jax.lax.scan(gradient_step, learner, (part, keys_G))

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
            "bad_observations": bad_values((obs_TE, outcome.final_obs)),
            **episode_metrics(outcome),
        }

    def act(state: SACState, key: jax.Array | None, obs_B: Any, memory: Any) -> tuple[jax.Array, Any]:
        obs_B = see(state.observations, obs_B)
        mean_BA, _ = network.actor.step(state.params.actor, obs_B, ())[0]
        return to_box(box, squash(mean_BA)[0] if key is None else draw(state.params.actor, obs_B, key)[0]), memory

    return Algorithm(init, update, act, network.actor.init_memory, config.environments * config.steps)


def make_train(config: SACConfig, env: Any, network: ActorCritics) -> Train:
    """`train(key, hyper=SACHyper(), env_params=None) -> (state, metrics)`, all updates as one function."""
    return trainer(make(config, env, network), config.updates, SACHyper(), env)

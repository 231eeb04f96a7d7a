"""Decision Transformer (Chen et al., arXiv 2106.01345) with any causal sequence model, discrete or continuous actions.

A trajectory is a sequence of three tokens a step, the return to go, the observation, the action,

    R_0 s_0 a_0  R_1 s_1 a_1  ...,        R_t = r_t + r_t+1 + ... to the end of the episode

and the action is predicted at the token of the observation, by cross-entropy, or by squared error where it is
continuous. To use it, ask for a return: R_0 is the target, and each reward is taken off it. Data are windows of K steps
as in the paper, but padded on the right: a causal model's outputs do not depend on what follows, so that nothing needs
to be masked but the loss, whatever the mixer.

In learning the model sees a window in parallel; in use it goes token by token, with its own state as the policy's
memory, so that a step costs the same anywhere in an episode. Both are one function of a trajectory:

- A recurrence carries what it has seen of the whole episode, although it learned from K steps.
- Attention keeps the last 3 K - 1 tokens, which are the K steps that the token of an observation saw at the end of a
  window: a sliding window, the same as attention with `window=3 * K - 1` over the whole trajectory in parallel. It
  differs from the paper's, which runs the model anew on the last K steps: there what a token kept was computed without
  what came before the window, here it was with. They agree in one layer, or in episodes of up to K steps.

A policy sees the rewards as part of its observation, from the environment `rl.offline.RewardObserved(env)`, so all that
runs policies runs this one. The target is an array of the state, so `vmap` asks for many:

    env = RewardObserved(env)
    returns_TE = vmap(lambda target: evaluate(algorithm, ask(state, target), key, env, ...).return_B)(target_T)
"""

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rl import normalise, offline
from rl.algorithm import Algorithm, bad_values
from rl.networks import is_discrete
from rl.normalise import Moments
from rl.offline import Places, Seen, Train, Trajectories, Windows
from rl.policies import Categorical, bounds, from_box, to_box
from seqmod import backbone
from seqmod.config import BackboneConfig
from seqmod.embedding import Inputs


@dataclass(frozen=True)
class DTConfig:
    """`updates` of `gradient_steps` each, on batches of `batch` windows of `context` K steps.

    `horizon`: steps of an episode that have an embedding of their own, added to the step's three tokens; 0 for none.
    `warmup`: gradient steps over which the learning rate rises.
    """

    updates: int = 20
    gradient_steps: int = 100
    batch: int = 64
    context: int = 20
    horizon: int = 1000
    warmup: int = 100
    max_grad_norm: float = 0.25
    normalise_observations: bool = True

    def __post_init__(self) -> None:
        for name in ("updates", "gradient_steps", "batch", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"DTConfig: {name} is {getattr(self, name)}, expected at least 1")
        for name in ("horizon", "warmup"):
            if getattr(self, name) < 0:
                raise ValueError(f"DTConfig: {name} is {getattr(self, name)}, expected 0 or more")
        if not self.max_grad_norm > 0:
            raise ValueError(f"DTConfig: max_grad_norm is {self.max_grad_norm}, expected a number above 0")


class DTHyper(NamedTuple):
    """Traced hyperparameters: numbers, or arrays to sweep over by `vmap`."""

    learning_rate: float | jax.Array = 1e-3
    weight_decay: float | jax.Array = 1e-4


class DTState(NamedTuple):
    """Everything a run is: see `rl.algorithm`. Returns are divided by `scale`, the largest magnitude in the data
    set. `target` is the return to ask for, at first the highest there; it plays no part in learning."""

    params: Any
    opt_state: Any
    data: Trajectories
    observations: Moments
    scale: jax.Array
    target: jax.Array
    update: jax.Array
    key: jax.Array
    hyper: DTHyper


class DTMemory(NamedTuple):
    """Of B episodes that began together: the `model`'s state, the return that was `earned_B`, the `time`."""

    model: Any
    earned_B: jax.Array
    time: jax.Array


def ask(state: DTState, target: float | jax.Array) -> DTState:
    """The same, asked for another return."""
    return state._replace(target=jnp.asarray(target, jnp.float32))


def model_config(config: DTConfig, env: Any, model: BackboneConfig) -> BackboneConfig:
    """The sequence model with the inputs and the head that the tokens of `env` need; mixers and sizes as in `model`.

    Its inputs are one vector with places for the return, the observation, the action, and which of them it is, so that
    each has a linear embedding of its own. Its vocabulary are the time steps. Raises ValueError for a model with
    positions of its own.
    """
    if model.positions != "none":
        raise ValueError(
            f"decision_transformer: positions of the model are {model.positions!r}, expected 'none': tokens of a step "
            "share its embedding, see DTConfig.horizon"
        )
    observations, actions = _sizes(env)
    return replace(
        model,
        inputs=1 + observations + actions + 3,
        vocabulary=config.horizon,
        heads=(("action", actions),),
        tied=None,
        conditioning=0,
    )


def action_outputs(
    params: Any,
    config: DTConfig,
    model: BackboneConfig,
    left_BK: jax.Array,
    obs_BKF: jax.Array,
    action_BKA: jax.Array,
    time_BK: jax.Array,
) -> jax.Array:
    """Logits, or actions scaled to +-1 (B, K, A), of each step from scaled returns to go, observations and embedded
    actions up to it, the model being that of `model_config`. The action of a step has no part in its own output."""
    x_BK3I = jnp.stack(_tokens(left_BK, obs_BKF, action_BKA), axis=2)
    B, K = left_BK.shape
    x_BLI = x_BK3I.reshape(B, 3 * K, model.inputs)
    outputs, _ = backbone.apply(params, model, _inputs(config, x_BLI, jnp.repeat(time_BK, 3, axis=1)))
    return outputs["action"][:, 1::3]


def predict(
    params: Any,
    config: DTConfig,
    model: BackboneConfig,
    left_B: jax.Array,
    obs_BF: jax.Array,
    time: jax.Array,
    cache: backbone.State,
) -> tuple[jax.Array, backbone.State]:
    """`action_outputs` (B, A) of one step, and the model's state after its first two tokens."""
    B, F = obs_BF.shape
    left_BI, obs_BI, _ = _tokens(left_B, obs_BF, jnp.zeros((B, model.inputs - F - 4)))
    time_B = jnp.broadcast_to(time, (B,))
    _, _, cache = backbone.step(params, model, _inputs(config, left_BI, time_B), cache)
    outputs, _, cache = backbone.step(params, model, _inputs(config, obs_BI, time_B), cache)
    return outputs["action"], cache


def remember(
    params: Any, config: DTConfig, model: BackboneConfig, action_BA: jax.Array, time: jax.Array, cache: backbone.State
) -> backbone.State:
    """The model's state after the third token, the action that was taken, embedded."""
    B, A = action_BA.shape
    *_, action_BI = _tokens(jnp.zeros(B), jnp.zeros((B, model.inputs - A - 4)), action_BA)
    return backbone.step(params, model, _inputs(config, action_BI, jnp.broadcast_to(time, (B,))), cache)[2]


def make(config: DTConfig, env: Any, model: BackboneConfig) -> Algorithm:
    """A Decision Transformer for the spaces of `env`. `init(key, hyper, data)` gets `rl.offline.Trajectories`;
    `steps_per_update` is 0. `act` takes `rl.offline.Seen` as its observation (TypeError for another), and draws
    discrete actions if it has a key; its memory is of episodes that begin together, as in `rl.rollout`.

    Raises ValueError where the model is not causal.
    """
    space = env.action_space(env.default_params)
    box = None if is_discrete(space) else bounds(space)
    model = model_config(config, env, model)
    backbone.init_state(model, 1, 1)

    def see(seen: Moments, obs: jax.Array) -> jax.Array:
        obs = obs.astype(jnp.float32)
        obs = normalise.normalise(seen, obs) if config.normalise_observations else obs
        return obs.reshape(*obs.shape[: obs.ndim - seen.mean.ndim], -1)

    def embed_action(action: jax.Array) -> jax.Array:
        if box is None:
            return jax.nn.one_hot(action, space.n)
        return from_box(box, action).reshape(*action.shape[: action.ndim - box.low.ndim], -1)

    def optimiser(hyper: DTHyper) -> optax.GradientTransformation:
        def rate(count: Any) -> jax.Array:
            return -hyper.learning_rate * jnp.minimum((count + 1) / max(config.warmup, 1), 1.0)

        return optax.chain(
            optax.clip_by_global_norm(config.max_grad_norm),
            optax.scale_by_adam(),
            optax.add_decayed_weights(hyper.weight_decay),
            optax.scale_by_schedule(rate),
        )

    def init(key: jax.Array, hyper: DTHyper, data: Trajectories) -> DTState:
        offline.check(data)
        k_params, k_run = jax.random.split(key)
        params = backbone.init(k_params, model)
        hyper = jax.tree.map(jnp.float32, hyper)
        return DTState(
            params=params,
            opt_state=optimiser(hyper).init(params),
            data=data,
            observations=offline.observation_moments(data),
            scale=jnp.maximum(jnp.abs(data.return_N).max(), 1e-6),
            target=data.return_N.max(),
            update=jnp.zeros((), jnp.int32),
            key=k_run,
            hyper=hyper,
        )

    def loss(params: Any, part: Windows) -> tuple[jax.Array, dict[str, jax.Array]]:
        embedded_BKA = embed_action(part.action_BK)
        y_BKA = action_outputs(params, config, model, part.left_BK, part.obs_BK, embedded_BKA, part.time_BK)
        if box is None:
            each_BK, error_BK = -Categorical(y_BKA).log_prob(part.action_BK), y_BKA.argmax(-1) != part.action_BK
        else:
            each_BK = error_BK = jnp.square(y_BKA - embedded_BKA).mean(-1)
        count = part.mask_BK.sum()
        total = jnp.where(part.mask_BK, each_BK, 0.0).sum() / count
        return total, {"loss": total, "action_error": jnp.where(part.mask_BK, error_BK, 0.0).sum() / count}

    def update(state: DTState) -> tuple[DTState, dict[str, jax.Array]]:
        k_update = jax.random.fold_in(state.key, state.update)
        # An update's random numbers at once: drawing is dear next to a small network. Its windows one batch at a time.
        count = config.batch * config.gradient_steps
        places = offline.draw_places(k_update, state.data.length_N, count, config.context)
        places = jax.tree.map(lambda x: x.reshape(config.gradient_steps, config.batch, *x.shape[1:]), places)
        left_NL = offline.returns_to_go(state.data.reward_NL, state.data.mask_NL) / state.scale
        tx = optimiser(state.hyper)

        def one(carry: tuple[Any, Any], place: Places):
            params, opt_state = carry
            part = offline.windows_at(state.data, place, left_NL)
            part = part._replace(obs_BK=see(state.observations, part.obs_BK))
            grads, metrics = jax.grad(loss, has_aux=True)(params, part)
            updates, opt_state = tx.update(grads, opt_state, params)
            metrics |= {"grad_norm": optax.tree.norm(grads)}
            return (optax.apply_updates(params, updates), opt_state), (metrics, bad_values(part.obs_BK))

        (params, opt_state), (metrics, bad) = jax.lax.scan(one, (state.params, state.opt_state), places)
        new = state._replace(params=params, opt_state=opt_state, update=state.update + 1)
        return new, {**jax.tree.map(jnp.mean, metrics), "bad_observations": bad.sum()}

    def init_memory(batch: int) -> DTMemory:
        cache = backbone.init_state(model, batch, 3 * config.context - 1)
        return DTMemory(cache, jnp.zeros(batch), jnp.zeros((), jnp.int32))

    def act(state: DTState, key: jax.Array | None, seen: Any, memory: DTMemory) -> tuple[jax.Array, DTMemory]:
        if not isinstance(seen, Seen):
            raise TypeError(
                f"decision_transformer: the observation is {type(seen).__name__}, expected Seen, which has the reward "
                "too: put the environment into rl.offline.RewardObserved"
            )
        earned_B = memory.earned_B + seen.reward
        left_B = (state.target - earned_B) / state.scale
        obs_BF = see(state.observations, seen.obs)
        y_BA, cache = predict(state.params, config, model, left_B, obs_BF, memory.time, memory.model)
        if box is None:
            policy = Categorical(y_BA)
            action_B = policy.mode() if key is None else policy.sample(key)
        else:
            action_B = to_box(box, y_BA.reshape(len(y_BA), *box.low.shape))
        cache = remember(state.params, config, model, embed_action(action_B), memory.time, cache)
        return action_B, DTMemory(cache, earned_B, memory.time + 1)

    return Algorithm(init, update, act, init_memory, 0)


def make_train(config: DTConfig, env: Any, model: BackboneConfig) -> Train:
    """`train(key, data, hyper=DTHyper()) -> (state, metrics)`, all updates as one function."""
    return offline.trainer(make(config, env, model), config.updates, DTHyper())


def _sizes(env: Any) -> tuple[int, int]:
    """Features of an observation and of an action."""
    params = env.default_params
    space = env.action_space(params)
    return math.prod(env.observation_space(params).shape), space.n if is_discrete(space) else math.prod(space.shape)


def _tokens(left: jax.Array, obs: jax.Array, action: jax.Array) -> list[jax.Array]:
    """The three tokens of a step (..., 1 + F + A + 3) from a scaled return (...), (..., F) and (..., A)."""
    parts = (left[..., None], obs, action)
    tokens = []
    for index, _ in enumerate(parts):
        places = [part if other == index else jnp.zeros_like(part) for other, part in enumerate(parts)]
        kind = jnp.broadcast_to(jax.nn.one_hot(index, 3), (*left.shape, 3))
        tokens.append(jnp.concatenate([*places, kind], axis=-1))
    return tokens


def _inputs(config: DTConfig, features: jax.Array, time: jax.Array) -> Inputs:
    """With the embedding of the time step, beyond the last that of the last."""
    return Inputs(features, jnp.minimum(time, config.horizon - 1) if config.horizon else None)

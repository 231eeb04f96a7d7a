"""Many environments stepped together, with an auto-reset that keeps the final observation.

An environment is anything with gymnax 1.x's functions for one episode (`Environment` below): all of gymnax, those of
`rl.envs`, Brax through `rl.envs.brax_env`. Its observations are arrays or pytrees of arrays. Termination, truncation
and resets stay apart: `step` says which happened, and gives the observation an episode ended with beside the one the
next episode starts from.
"""

from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp


class Environment(Protocol):
    """One episode at a time. `params` are traced, so tasks and physics can be mapped over."""

    def reset_env(self, key: jax.Array, params: Any) -> tuple[Any, Any]:
        """(obs, state) of a new episode."""
        ...

    def step_env(self, key: jax.Array, state: Any, action: Any, params: Any) -> tuple[Any, Any, Any, Any, Any]:
        """(obs, state, reward, terminated, info), without reset."""
        ...

    def is_truncated(self, state: Any, params: Any) -> jax.Array:
        """Whether the time limit is reached."""
        ...

    def action_space(self, params: Any) -> Any:
        """gymnax's Discrete or Box."""
        ...

    def observation_space(self, params: Any) -> Any:
        """gymnax's Box."""
        ...

    @property
    def default_params(self) -> Any:
        """Where none are given; action spaces are asked for with them."""
        ...


class Envs(NamedTuple):
    """E running episodes: their environments' `state` and `obs`, leaves (E, ...); whether that observation is the
    `first_E` of its episode; `return_E` and `length_E` so far."""

    state: Any
    obs: Any
    first_E: jax.Array
    return_E: jax.Array
    length_E: jax.Array


class Outcome(NamedTuple):
    """What a step led to: `final_obs` before any reset, `reward_E`, and how it ended: `terminated_E` by the task, or
    `truncated_E` by the time limit alone. `return_E` and `length_E` of the episode up to and with this step."""

    final_obs: Any
    reward_E: jax.Array
    terminated_E: jax.Array
    truncated_E: jax.Array
    return_E: jax.Array
    length_E: jax.Array

    @property
    def done_E(self) -> jax.Array:
        """Whether the episode ended."""
        return self.terminated_E | self.truncated_E


def reset(keys_E: jax.Array, env: Environment, params: Any, *, params_axis: int | None = None) -> Envs:
    """Start E episodes, one for each key; with `params_axis=0` each has parameters of its own. Raises ValueError for
    such parameters without one value for each."""
    count = len(keys_E)
    for path, x in jax.tree.leaves_with_path(params) if params_axis is not None else ():
        if jnp.shape(x)[:1] != (count,):
            raise ValueError(
                f"reset: params{jax.tree_util.keystr(path)} has shape {jnp.shape(x)}, expected ({count}, ...): one "
                "value for each environment"
            )
    obs, state = jax.vmap(env.reset_env, in_axes=(0, params_axis))(keys_E, params)
    zeros_E = jnp.zeros(len(keys_E))
    obs, state = jax.tree.map(_strongly_typed, (obs, state))
    return Envs(state, obs, jnp.ones(len(keys_E), bool), zeros_E, zeros_E.astype(jnp.int32))


def step(
    keys_E: jax.Array,
    envs: Envs,
    action: jax.Array,
    env: Environment,
    params: Any,
    *,
    params_axis: int | None = None,
    resets: int | None = None,
) -> tuple[Envs, Outcome]:
    """One step of every episode; those that end start anew.

    Environment e behaves as gymnax's own `env.step` does with keys_E[e]. A step computes a fresh start for every
    environment, needed or not. Where that is dear, as in Brax, `resets` says how many to compute: episodes that end in
    the same step then share them in turn, and no two do as long as no more than `resets` end at once.
    """
    k_step_E, k_reset_E = step_keys(keys_E)
    fresh = starts(k_reset_E, env, params, params_axis=params_axis, resets=resets)
    return advance(k_step_E, envs, action, fresh, env, params, params_axis=params_axis)


def step_keys(keys_E: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What `step` makes of its keys: those of the steps and those of the starts."""
    return jax.vmap(lambda key: tuple(jax.random.split(key)))(keys_E)


def starts(
    k_reset_E: jax.Array, env: Environment, params: Any, *, params_axis: int | None = None, resets: int | None = None
) -> tuple[Any, Any]:
    """Fresh (obs, state) for every environment, or `resets` of them to be shared: see `step`."""
    count = len(k_reset_E)
    if resets is not None and not 1 <= resets <= count:
        raise ValueError(f"step: resets is {resets}, expected 1..{count}, the number of environments")
    if resets is not None and resets < count and params_axis is not None:
        raise ValueError(f"step: resets is {resets}, but environments with parameters of their own cannot share starts")
    return jax.vmap(env.reset_env, in_axes=(0, params_axis))(k_reset_E[:resets], params)


def advance(
    k_step_E: jax.Array,
    envs: Envs,
    action: jax.Array,
    fresh: tuple[Any, Any],
    env: Environment,
    params: Any,
    *,
    params_axis: int | None = None,
) -> tuple[Envs, Outcome]:
    """`step` with the `starts` computed before, which a loop may do for all its steps at once. Raises TypeError where
    a step makes floats of what begins as integers."""
    obs, state, reward_E, terminated_E, _ = jax.vmap(env.step_env, in_axes=(0, 0, 0, params_axis))(
        k_step_E, envs.state, action, params
    )
    obs, state = (
        jax.tree_util.tree_map_with_path(partial(_as_before, name), new, old)
        for name, new, old in (("obs", obs, envs.obs), ("state", state, envs.state))
    )
    terminated_E = terminated_E.astype(bool)
    truncated_E = jax.vmap(env.is_truncated, in_axes=(0, params_axis))(state, params) & ~terminated_E
    done_E = terminated_E | truncated_E
    reward_E = reward_E.astype(jnp.float32)
    return_E, length_E = envs.return_E + reward_E, envs.length_E + 1

    count = len(jax.tree.leaves(fresh)[0])
    if count < len(done_E):
        slot_E = (jnp.cumsum(done_E) - 1) % count
        fresh = jax.tree.map(lambda x: x[slot_E], fresh)
    next_obs, state = jax.tree.map(
        lambda new, old: jnp.where(done_E.reshape(-1, *(1,) * (old.ndim - 1)), new.astype(old.dtype), old),
        fresh,
        (obs, state),
    )
    after = Envs(state, next_obs, done_E, jnp.where(done_E, 0.0, return_E), jnp.where(done_E, 0, length_E))
    return after, Outcome(obs, reward_E, terminated_E, truncated_E, return_E, length_E)


def episode_metrics(outcome: Outcome, mask: jax.Array | bool = True) -> dict[str, jax.Array]:
    """Of the episodes that ended within steps (T, E), in one where `mask` (T, E) is true: `episodes` their number, and
    the means of `episode_return` and `episode_length`, NaN where none ended."""
    done = outcome.done_E & mask
    count = done.sum()
    mean = {
        name: jnp.where(done, value, 0).sum() / count
        for name, value in (("episode_return", outcome.return_E), ("episode_length", outcome.length_E))
    }
    return {"episodes": count, **mean}


def _as_before(name: str, path: Any, new: jax.Array, old: jax.Array) -> jax.Array:
    """In the type of the reset, as a loop's carry must be. To cut numbers down to integers would be another task."""
    if jnp.issubdtype(new.dtype, jnp.inexact) and not jnp.issubdtype(old.dtype, jnp.inexact):
        raise TypeError(
            f"step: {name}{jax.tree_util.keystr(path)} of step_env is {new.dtype}, but {old.dtype} of reset_env, which "
            "has no fractions: let both be floats"
        )
    return new.astype(old.dtype)


def _strongly_typed(x: Any) -> jax.Array:
    """A loop's carry must keep its type, which a weak one does not."""
    array = jnp.asarray(x)
    return jax.lax.convert_element_type(array, array.dtype)

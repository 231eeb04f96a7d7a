"""Batched episodes in one compiled loop that stops when every episode has ended."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Episodes(NamedTuple):
    """`recorded` what the policy recorded, each leaf (T, B, ...), zeros after the longest episode; `valid_TB` steps
    taken; `return_B` sum of rewards; `length_B` steps; `final_state` of the environments where each episode ended."""

    recorded: Any
    valid_TB: jax.Array
    return_B: jax.Array
    length_B: jax.Array
    final_state: Any


class Step(NamedTuple):
    """What a policy sees: `obs_BF`, the environment's `state`, the step `time`, and which episodes are `running_B`."""

    obs_BF: jax.Array
    state: Any
    time: jax.Array
    running_B: jax.Array


Policy = Callable[[jax.Array, Step, Any], tuple[jax.Array, Any, Any]]
"""(key, step, memory) -> (action_B, memory, record)."""


def rollout(
    key: jax.Array, env: Any, params: Any, policy: Policy, memory: Any, batch: int, horizon: int
) -> tuple[Episodes, Any]:
    """Run `batch` episodes of at most `horizon` steps from fresh resets. Returns (episodes, final memory).

    An episode that has ended stays where it ended; its later records are not `valid_TB`. Truncation at the
    environment's own horizon ends an episode too.
    """
    k_reset, k_loop = jax.random.split(key)
    obs_BF, state = jax.vmap(env.reset_env, in_axes=(0, None))(jax.random.split(k_reset, batch), params)
    step_env = jax.vmap(env.step_env, in_axes=(0, 0, 0, None))

    def act(time, obs_BF, state, running_B, memory):
        k_policy, k_env = jax.random.split(jax.random.fold_in(k_loop, time))
        action_B, memory, record = policy(k_policy, Step(obs_BF, state, time, running_B), memory)
        return k_env, action_B, memory, record

    shapes = jax.eval_shape(act, jnp.zeros((), jnp.int32), obs_BF, state, jnp.ones(batch, bool), memory)[3]
    buffers = jax.tree.map(lambda x: jnp.zeros((horizon, *x.shape), x.dtype), shapes)
    start = (
        jnp.zeros((), jnp.int32),
        obs_BF,
        state,
        jnp.ones(batch, bool),
        memory,
        (buffers, jnp.zeros((horizon, batch), bool), jnp.zeros(batch)),
    )

    def goes_on(carry):
        time, _, _, running_B, _, _ = carry
        return (time < horizon) & running_B.any()

    def body(carry):
        time, obs_BF, state, running_B, memory, (buffers, valid_TB, return_B) = carry
        k_env, action_B, memory, record = act(time, obs_BF, state, running_B, memory)
        obs_BF, after, reward_B, terminated_B, _ = step_env(jax.random.split(k_env, batch), state, action_B, params)
        truncated_B = jax.vmap(env.is_truncated, in_axes=(0, None))(after, params)
        after = jax.tree.map(
            lambda new, old: jnp.where(running_B.reshape(-1, *(1,) * (new.ndim - 1)), new, old), after, state
        )
        buffers = jax.tree.map(lambda buffer, x: buffer.at[time].set(x), buffers, record)
        valid_TB = valid_TB.at[time].set(running_B)
        return_B = return_B + jnp.where(running_B, reward_B, 0.0)
        running_B = running_B & ~(terminated_B | truncated_B)
        return time + 1, obs_BF, after, running_B, memory, (buffers, valid_TB, return_B)

    _, _, state, _, memory, (buffers, valid_TB, return_B) = jax.lax.while_loop(goes_on, body, start)
    return Episodes(buffers, valid_TB, return_B, valid_TB.sum(0), state), memory

"""Batched episodes in one compiled loop that stops when every episode has ended."""

from collections.abc import Callable
from functools import partial
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
    key: jax.Array,
    env: Any,
    params: Any,
    policy: Policy,
    memory: Any,
    batch: int,
    horizon: int,
    keep: Callable[[Any], Any] = lambda memory: None,
    smallest: int = 32,
    groups: int | None = None,
) -> tuple[Episodes, Any]:
    """Run `batch` episodes of at most `horizon` steps from fresh resets. Returns (episodes, `keep` of the memories).

    An episode that has ended stays where it ended; its later records are not `valid_TB`. Truncation at the
    environment's own horizon ends an episode too. Whenever at most half of the episodes are still running, the loop
    goes on with those alone (down to `smallest`), so that a few long episodes cost little; every leaf of `memory` and
    of the environment's state has the episode axis first, or is a scalar shared by all.

    With `groups`, episodes come in that many groups of equal size, one after another; those of a group have the same
    start, and go apart by what the policy draws and by what the environment draws later. Raises ValueError where the
    batch is not divisible.
    """
    starts = batch if groups is None else groups
    if starts < 1 or batch % starts:
        raise ValueError(f"rollout: batch {batch} is not divisible by groups {groups}")
    k_reset, k_loop = jax.random.split(key)
    obs_BF, state = jax.vmap(env.reset_env, in_axes=(0, None))(jax.random.split(k_reset, starts), params)
    if starts != batch:
        obs_BF, state = jax.tree.map(lambda x: jnp.repeat(x, batch // starts, axis=0), (obs_BF, state))
    step_env = jax.vmap(env.step_env, in_axes=(0, 0, 0, None))
    is_truncated = jax.vmap(env.is_truncated, in_axes=(0, None))

    def act(time, obs_BF, state, running_B, memory):
        k_policy, k_env = jax.random.split(jax.random.fold_in(k_loop, time))
        action_B, memory, record = policy(k_policy, Step(obs_BF, state, time, running_B), memory)
        return k_env, action_B, memory, record

    def body(carry):
        (time, slot_B, obs_BF, state, running_B, memory), (buffers, valid_TB, return_B) = carry
        k_env, action_B, memory, record = act(time, obs_BF, state, running_B, memory)
        keys = jax.random.split(k_env, len(slot_B))
        obs_BF, after, reward_B, terminated_B, _ = step_env(keys, state, action_B, params)
        truncated_B = is_truncated(after, params)
        after = jax.tree.map(
            lambda new, old: jnp.where(running_B.reshape(-1, *(1,) * (new.ndim - 1)), new, old), after, state
        )
        buffers = jax.tree.map(lambda buffer, x: buffer.at[time, slot_B].set(x), buffers, record)
        valid_TB = valid_TB.at[time, slot_B].set(running_B)
        return_B = return_B.at[slot_B].add(jnp.where(running_B, reward_B, 0.0))
        running_B = running_B & ~(terminated_B | truncated_B)
        return (time + 1, slot_B, obs_BF, after, running_B, memory), (buffers, valid_TB, return_B)

    def goes_on(floor: int):
        def condition(carry):
            (time, _, _, _, running_B, _), _ = carry
            return (time < horizon) & (running_B.sum() > floor)

        return condition

    start = (jnp.zeros((), jnp.int32), jnp.arange(batch), obs_BF, state, jnp.ones(batch, bool), memory)
    shapes = jax.eval_shape(act, start[0], obs_BF, state, start[4], memory)[3]
    buffers = jax.tree.map(lambda x: jnp.zeros((horizon, *x.shape), x.dtype), shapes)
    carry = (start, (buffers, jnp.zeros((horizon, batch), bool), jnp.zeros(batch)))
    final = (state, keep(memory))
    size = batch
    while True:
        smaller = size // 2 if size // 2 >= smallest else 0
        (time, slot_B, obs_BF, state, running_B, memory), records = jax.lax.while_loop(goes_on(smaller), body, carry)
        final = jax.tree.map(partial(_scatter, slot_B), final, (state, keep(memory)))
        if not smaller:
            break
        # The running ones first; ended ones fill up to the static size and change nothing that is valid.
        order_B = jnp.argsort(~running_B, stable=True)[:smaller]
        part = (slot_B, obs_BF, state, running_B, memory)
        part = jax.tree.map(partial(_gather, order_B), part)
        carry, size = ((time, *part), records), smaller
    buffers, valid_TB, return_B = records
    return Episodes(buffers, valid_TB, return_B, valid_TB.sum(0), final[0]), final[1]


def _scatter(slot_B: jax.Array, whole: jax.Array, part: jax.Array) -> jax.Array:
    return whole.at[slot_B].set(part)


def _gather(slot_B: jax.Array, whole: jax.Array) -> jax.Array:
    return whole[slot_B] if whole.ndim else whole

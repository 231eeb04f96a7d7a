"""Rollouts of a policy in many environments at once, for algorithms that learn from what they have just seen."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rl import vector
from rl.networks import Network, reset_memory
from rl.vector import Environment, Envs, Outcome

SMALL = 256
"""Bytes of an environment's observation and state up to which those of all steps are made at once."""


class Rollout(NamedTuple):
    """T steps of E environments: what the network saw, `obs_TE` and `first_TE` (whether an episode begins there), from
    `memory` before the first step, and `raw_obs_TE`, that before `see`; `action_TE` as the policy drew it,
    `log_prob_TE`, `value_TE`; `next_value_TE` of what each step led to, before any reset; and the environments'
    `outcome`."""

    obs_TE: Any
    raw_obs_TE: Any
    first_TE: jax.Array
    memory: Any
    action_TE: jax.Array
    log_prob_TE: jax.Array
    value_TE: jax.Array
    next_value_TE: jax.Array
    outcome: Outcome


def collect(
    key: jax.Array,
    network: Network,
    params: Any,
    envs: Envs,
    memory: Any,
    env: Environment,
    env_params: Any,
    steps: int,
    *,
    to_env: Callable[[jax.Array], jax.Array] = lambda action: action,
    see: Callable[[Any], Any] = lambda obs: obs,
    params_axis: int | None = None,
    resets: int | None = None,
) -> tuple[Rollout, Envs, Any]:
    """Act for `steps` steps with an actor-critic whose outputs are (policy, value). Returns (rollout, envs, memory).

    `to_env` turns an action of the policy into one of the environment, `see` an observation into what the network gets
    (normalised, for instance).

    The value of an episode's final observation matters only where it was truncated; it is computed only if some was.
    Where an environment's observation and state are larger than `SMALL`, final observations are not in the outcome.
    """
    count = len(envs.return_E)
    k_env, k_act = jax.random.split(key)
    # Small things are made at once for all steps, starts of episodes too: on a CPU, to split a key in a loop costs more
    # than a small network and its environment. Of large things it is the memory of all steps that costs.
    k_step_TE, k_reset_TE = jax.vmap(vector.step_keys)(jax.random.split(k_env, (steps, count)))
    start = partial(vector.starts, env=env, params=env_params, params_axis=params_axis, resets=resets)
    small = _bytes((envs.obs, envs.state)) <= count * SMALL
    fresh_T = jax.vmap(start)(k_reset_TE) if small else k_reset_TE
    policy_E, _ = jax.eval_shape(lambda: network.step(params, see(envs.obs), memory)[0])
    noise_T = policy_E.noise(k_act, steps)
    before = memory
    # The value of a final observation needs the memory there was.
    at_once = small and not network.recurrent

    def value_of(final_obs: jax.Array, memory: Any) -> jax.Array:
        return network.step(params, see(final_obs), memory)[0][1]

    def one(carry: tuple[Envs, Any], x: tuple[jax.Array, Any, jax.Array]) -> tuple[Any, Any]:
        (envs, memory), (k_step_E, fresh, noise) = carry, x
        obs = envs.obs
        (policy, value_E), memory = network.step(params, see(obs), reset_memory(network, memory, envs.first_E))
        action = policy.draw(noise)
        fresh = fresh if small else start(fresh)
        envs, outcome = vector.advance(k_step_E, envs, to_env(action), fresh, env, env_params, params_axis=params_axis)
        record = (obs, action, policy)
        if at_once:
            return (envs, memory), (record, outcome, None)
        final_E = if_any(outcome.truncated_E, lambda: value_of(outcome.final_obs, memory), jnp.zeros_like(value_E))
        return (envs, memory), (record, outcome if small else outcome._replace(final_obs=None), (value_E, final_E))

    first_E = envs.first_E
    (envs, memory), (record, outcome, values_TE) = jax.lax.scan(one, (envs, memory), (k_step_TE, fresh_T, noise_T))
    raw_obs_TE, action_TE, policy_TE = record
    obs_TE, first_TE = see(raw_obs_TE), jnp.concatenate([first_E[None], outcome.done_E[:-1]])
    (_, last_value_E), _ = network.step(params, see(envs.obs), reset_memory(network, memory, envs.first_E))
    if at_once:
        # A critic of its own has no part in the loop, which takes as long as its operations are many on a CPU.
        value_TE = network.step(params, obs_TE, memory)[0][1]
        final_TE = if_any(outcome.truncated_E, lambda: value_of(outcome.final_obs, memory), jnp.zeros_like(value_TE))
    else:
        value_TE, final_TE = values_TE
    next_value_TE = jnp.concatenate([value_TE[1:], last_value_E[None]])
    next_value_TE = jnp.where(outcome.truncated_E, final_TE, next_value_TE)
    return (
        Rollout(
            obs_TE=obs_TE,
            raw_obs_TE=raw_obs_TE,
            first_TE=first_TE,
            memory=before,
            action_TE=action_TE,
            log_prob_TE=policy_TE.log_prob(action_TE),
            value_TE=value_TE,
            next_value_TE=next_value_TE,
            outcome=outcome,
        ),
        envs,
        memory,
    )


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def if_any(flags: jax.Array, compute: Callable[[], Any], otherwise: Any) -> Any:
    """`compute()` if any flag is set, else `otherwise`, of the same shapes. Unlike `lax.cond`, which becomes a select,
    it still spares the computation under `vmap`, when no flag of the whole batch is set."""

    def body(carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        return jnp.zeros((), bool), compute()

    return jax.lax.while_loop(lambda carry: carry[0], body, (flags.any(), otherwise))[1]

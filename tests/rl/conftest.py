"""A tiny environment with every feature that the loops must handle, for tests that are not about environments."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest


class State(NamedTuple):
    time: jax.Array
    length: jax.Array
    context: jax.Array
    good: jax.Array


class Params(NamedTuple):
    """Episodes terminate after 1 to `longest` steps and are truncated after `max_steps`."""

    longest: int = 1
    max_steps: int = 100
    step_reward: float = 0.0
    final_reward: float = 1.0


@dataclass(frozen=True)
class Tiny:
    """Three contexts, three actions: right is the action after the context. `step_reward` for every right action, and
    `final_reward` for an episode that terminates without a wrong one."""

    observation_size: int = 5
    num_actions: int = 3
    params: type[Params] = Params

    def observe(self, state: State) -> jax.Array:
        return jnp.concatenate([jax.nn.one_hot(state.context, 3), jax.nn.one_hot(state.time % 2, 2)])

    def reset_env(self, key: jax.Array, params: Params) -> tuple[jax.Array, State]:
        k_length, k_context = jax.random.split(key)
        length = jax.random.randint(k_length, (), 1, params.longest + 1)
        context = jax.random.randint(k_context, (), 0, 3)
        state = State(jnp.zeros((), jnp.int32), length, context, jnp.array(True))
        return self.observe(state), state

    def step_env(self, key: jax.Array, state: State, action: jax.Array, params: Params) -> Any:
        right = action == (state.context + 1) % 3
        state = State(state.time + 1, state.length, state.context, state.good & right)
        terminated = state.time >= state.length
        reward = params.step_reward * right + params.final_reward * (terminated & state.good)
        return self.observe(state), state, reward, terminated, {"right": right}

    def is_truncated(self, state: State, params: Params) -> jax.Array:
        return state.time >= params.max_steps


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    return Tiny()

"""What every algorithm is: a state and a compiled update of it, and what is done with any of them.

    algorithm = ppo.make(config, env, network)
    state = algorithm.init(key, hyper, env_params)
    state, metrics = algorithm.update(state)                  # under jit, scan, vmap as you like
    train = ppo.make_train(config, env, network)              # all updates as one function of one key
    states, metrics = jax.jit(jax.vmap(train))(jax.random.split(key, 16))

The state holds everything: parameters, optimiser, environments, hyperparameters, key. An update draws its random
numbers from the key and the number of updates so far, so a run that was stopped and goes on ends where it would have.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rl.rollout import Episodes, Step, rollout

State = Any
Act = Callable[[State, jax.Array | None, jax.Array, Any], tuple[jax.Array, Any]]


class Algorithm(NamedTuple):
    """`init(key, hyper, env_params) -> state`, `update(state) -> (state, metrics)` of `steps_per_update` environment
    steps, and the policy for use: `act(state, key, obs_B, memory) -> (action_B, memory)`, greedy if the key is None,
    with `init_memory(B)`."""

    init: Callable[..., State]
    update: Callable[[State], tuple[State, dict[str, jax.Array]]]
    act: Act
    init_memory: Callable[[int], Any]
    steps_per_update: int


Train = Callable[..., tuple[State, dict[str, jax.Array]]]
"""(key, hyper, env_params) -> (state, metrics (updates, ...)); the defaults of the last two are the algorithm's and the
environment's."""


def trainer(algorithm: Algorithm, updates: int, hyper: Any, env: Any) -> Train:
    """All updates as one function of one key, with defaults for hyperparameters and environment."""

    def train(key: jax.Array, hyper: Any = hyper, env_params: Any = None) -> tuple[State, dict[str, jax.Array]]:
        state = algorithm.init(key, hyper, env.default_params if env_params is None else env_params)
        return jax.lax.scan(lambda state, _: algorithm.update(state), state, length=updates)

    return train


def evaluate(
    algorithm: Algorithm,
    state: State,
    key: jax.Array,
    env: Any,
    env_params: Any,
    *,
    episodes: int,
    horizon: int,
    greedy: bool = True,
    keep: Callable[[Any], Any] = lambda state: None,
) -> Episodes:
    """Whole episodes, each at most `horizon` steps, of the policy as it is. `recorded` is what `keep` picks of the
    environments' states before each step, and the actions. Raises ValueError where there would be none."""
    for name, value in (("episodes", episodes), ("horizon", horizon)):
        if value < 1:
            raise ValueError(f"evaluate: {name} is {value}, expected at least 1")

    def policy(k_act: jax.Array, step: Step, memory: Any):
        action_B, memory = algorithm.act(state, None if greedy else k_act, step.obs_BF, memory)
        return action_B, memory, (keep(step.state), action_B)

    return rollout(key, env, env_params, policy, algorithm.init_memory(episodes), episodes, horizon)[0]


def check_finite(metrics: Mapping[str, Any]) -> None:
    """Raises FloatingPointError, naming metric and update, for observations or losses (metrics whose name has "loss")
    that are not finite; arrays (updates, ...)."""
    found = np.asarray(metrics.get("bad_observations", 0))
    if found.any():
        raise FloatingPointError(
            f"observations are not finite in update {_first(found != 0)}: the environment is at fault"
        )
    for name, values in metrics.items():
        bad = ~np.isfinite(np.asarray(values))
        if "loss" in name and bad.any():
            raise FloatingPointError(f"{name} is not finite in update {_first(bad)}: lower the learning rate, say")


def _first(bad: np.ndarray) -> int:
    return int(np.argwhere(bad)[0][0]) if bad.ndim else 0


def bad_values(obs: Any) -> jax.Array:
    """Number of values that are not finite, the metric `bad_observations`."""
    leaves = [x for x in jax.tree.leaves(obs) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return sum(((~jnp.isfinite(x)).sum() for x in leaves), jnp.zeros((), jnp.int32))

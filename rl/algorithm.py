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

from rl.networks import ActorCritics, Network, is_discrete
from rl.policies import POLICIES, Categorical, Gaussian, SquashedGaussian
from rl.rollout import Episodes, Step, rollout

State = Any
Act = Callable[[State, jax.Array | None, Any, Any], tuple[jax.Array, Any]]


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


def check_kind(algorithm: str, network: Any, kind: type[Network] | type[ActorCritics], maker: str) -> None:
    """Raises ValueError for a network that is not of a kind, naming the function which makes those."""
    if not isinstance(network, kind):
        raise ValueError(
            f"{algorithm}: network is a {type(network).__name__}, expected {kind.__name__}, as of networks.{maker}"
        )


def check_actor_critic(
    algorithm: str, network: Network, params: Any, obs_B: Any, memory: Any, action_space: Any
) -> None:
    """Raises ValueError unless the network's outputs are (policy over a gymnax space, value (B,)), and its memory is
    one of B episodes, none where it is not `recurrent`. A policy of a class other than `Policy` may have arrays of any
    shapes."""
    batch, discrete = jax.tree.leaves(obs_B)[0].shape[0], is_discrete(action_space)
    for x in jax.tree.leaves(memory):
        if not network.recurrent:
            raise ValueError(
                f"{algorithm}: the network has a memory but recurrent=False: make it with recurrent=True, or without "
                "memory, which is ()"
            )
        if jnp.shape(x)[:1] != (batch,):
            raise ValueError(
                f"{algorithm}: init_memory({batch}) has an array of shape {jnp.shape(x)}, expected ({batch}, ...): the "
                "axis of episodes comes first"
            )
    shape: Any = (batch, action_space.n) if discrete else (batch, *action_space.shape)
    expected = (Categorical(shape) if discrete else Gaussian(shape, shape), (batch,))
    check_outputs(
        f"{algorithm}: the network's step", lambda: network.step(params, obs_B, memory)[0], expected, "actor_critic"
    )


def check_outputs(name: str, step: Callable[[], Any], expected: Any, maker: str) -> None:
    """Raises ValueError unless what `step()` returns has the shapes `expected`, naming both, and the function of
    `rl.networks` which makes what fits. Nothing is computed."""
    found = jax.tree.map(lambda x: x.shape, jax.eval_shape(step))
    if not _fits(found, expected):
        raise ValueError(
            f"{name} returned arrays of shapes {found}, expected {expected}, as of networks.{maker} for the "
            "environment's action space"
        )


def _fits(found: Any, expected: Any) -> bool:
    if isinstance(expected, Categorical | Gaussian):
        # A class of one's own may hold any arrays; a mere tuple is no policy.
        own = type(found) not in (tuple, *POLICIES)
        kinds = (Gaussian, SquashedGaussian) if isinstance(expected, Gaussian) else (Categorical,)
        return own or (isinstance(found, kinds) and tuple(found) == tuple(expected))
    if isinstance(expected[0], tuple):
        return isinstance(found, tuple) and len(found) == len(expected) and all(map(_fits, found, expected))
    return found == expected


def check_finite(metrics: Mapping[str, Any], *, axis: int = 0) -> None:
    """Raises FloatingPointError for observations or losses (metrics whose name has "loss") that are not finite, naming
    the metric, the first update where it is not, and, of several runs, one. `axis` is that of the updates: 0 in arrays
    (updates, ...), -1 in those of a `train` that was mapped; the other axes are seeds, or settings and seeds."""
    found = np.asarray(metrics.get("bad_observations", 0))
    if found.any():
        where, run = _first(found != 0, axis)
        raise FloatingPointError(f"observations are not finite in {where}: the environment is at fault{run}")
    for name, values in metrics.items():
        bad = ~np.isfinite(np.asarray(values))
        if "loss" in name and bad.any():
            where, run = _first(bad, axis)
            raise FloatingPointError(
                f"{name} is not finite in {where}: lower the learning rate, or look for a reward that is not, say{run}"
            )


def _first(bad: np.ndarray, axis: int) -> tuple[str, str]:
    """The first update that has bad values, and the index of a run that has them then, in words."""
    update, *run = (int(index) for index in np.argwhere(np.moveaxis(np.atleast_1d(bad), axis, 0))[0])
    index = run[0] if len(run) == 1 else tuple(run)
    return f"update {update}", f" ({'seed' if len(run) == 1 else 'run'} {index})" if run else ""


def bad_values(obs: Any) -> jax.Array:
    """Number of values that are not finite, the metric `bad_observations`."""
    leaves = [x for x in jax.tree.leaves(obs) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return sum(((~jnp.isfinite(x)).sum() for x in leaves), jnp.zeros((), jnp.int32))

"""Any environment by name, with observations and states that compiled agents can rely on.

`make` gives environments of gymnax 1.x, of Brax and of this package one interface: `reset_env`, `step_env`,
`is_truncated`, `action_space`, `observation_space`, `default_params`. An observation is one float32 vector, or an image
(height, width, channels); a reward is a float32 scalar; a state keeps its types from step to step, as `lax.scan` asks.

What gymnax 1.0.1 does otherwise, and `Strict` and `FlattenObservation` set right: most states begin with weak types
(Python numbers) and some lose them at the first step; FourRooms observes int32 where its space says float32, and Catch
the other way round; UmbrellaChain and BernoulliBandit give int32 rewards; FrozenLake observes a cell's number. The
visual FourRooms draws its agent at (column, row) on a map of (row, column): `make` builds one that does not.

What stays as it is: observations outside the bounds of their spaces (MemoryChain, GaussianBandit, and MetaMaze, whose
last reward is 10 where the space says 1); MemoryChain's first observation comes twice, as every observation is that of
the state before the step; DeepSea terminates and is truncated in the same step; the visual FourRooms does not show the
goal.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, NamedTuple

import gymnax
import jax
import jax.numpy as jnp
from gymnax.environments import spaces
from gymnax.environments.misc.rooms import EnvState as RoomsState
from gymnax.environments.misc.rooms import FourRooms

from rl.envs.brax_env import BraxEnv, brax_environments
from rl.envs.gridworld_pinpad import GridworldPinpad

REFUSED: Mapping[str, str] = {"MNISTBandit-bsuite": "it downloads a data set when it is made"}
"""Environments of gymnax that do not work here, and why."""


def names() -> list[str]:
    """Every name that `make` knows; Brax environments go by their bare names too."""
    of_gymnax = [name for name in gymnax.registered_envs if name not in REFUSED]
    return [*of_gymnax, *(f"brax/{name}" for name in brax_environments()), "GridworldPinpad"]


def make(name: str, *, max_steps: int | None = None, flatten: bool = False, **options: Any) -> tuple[Any, Any]:
    """The environment of a name and its default parameters.

    `name`: one of `names()`. `max_steps`: steps after which an episode is truncated, in place of the environment's own,
    set in the parameters returned. `flatten`: images become vectors too. `options` go to the environment's constructor:
    `use_visual_obs` for FourRooms, `backend` for Brax, `size` for GridworldPinpad. Raises ValueError for an unknown
    name, with the nearest known ones, and for one that does not work, with the reason.
    """
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"make: max_steps is {max_steps}, expected at least 1")
    if name.startswith("brax/") or name in brax_environments():
        env = BraxEnv(name.removeprefix("brax/"), **options)
    elif name == "GridworldPinpad":
        env = GridworldPinpad(**options)
    else:
        env = _of_gymnax(name, flatten, options)
    params = env.default_params
    if max_steps is not None:
        # Of the same type: BernoulliBandit, whose own is a float, selects between it and another float.
        kind = type(params.max_steps_in_episode)
        params = replace(params, max_steps_in_episode=kind(max_steps))
    return env, params


def _of_gymnax(name: str, flatten: bool, options: dict[str, Any]) -> Any:
    if name in REFUSED:
        raise ValueError(f"make: {name!r} is refused, because {REFUSED[name]}")
    if name not in gymnax.registered_envs:
        lower = {known.lower(): known for known in [*names(), *brax_environments()]}
        near = [lower[match] for match in get_close_matches(name.lower(), lower, n=3, cutoff=0.5)]
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "names() lists what there is"
        raise ValueError(f"make: there is no environment {name!r}; {hint}")
    env = Strict(_UprightFourRooms(**options) if name == "FourRooms-misc" else gymnax.make(name, **options)[0])
    space = env.observation_space(env.default_params)
    image = isinstance(space, spaces.Box) and len(space.shape) == 3
    return env if image and not flatten else FlattenObservation(env)


@dataclass(frozen=True)
class Wrapper:
    """An environment that behaves as the one it holds; the others below change a method or two."""

    env: Any

    @property
    def default_params(self) -> Any:
        """Parameters of the environment inside."""
        return self.env.default_params

    def reset_env(self, key: jax.Array, params: Any) -> tuple[Any, Any]:
        """(observation, state) of a new episode."""
        return self.env.reset_env(key, params)

    def step_env(self, key: jax.Array, state: Any, action: Any, params: Any) -> tuple[Any, Any, Any, Any, Any]:
        """(observation, state, reward, terminated, info), without reset."""
        return self.env.step_env(key, state, action, params)

    def is_truncated(self, state: Any, params: Any) -> jax.Array:
        """Whether the episode has reached its time limit."""
        return self.env.is_truncated(state, params)

    def action_space(self, params: Any) -> Any:
        """gymnax space of actions."""
        return self.env.action_space(params)

    def observation_space(self, params: Any) -> Any:
        """gymnax space of observations."""
        return self.env.observation_space(params)


@dataclass(frozen=True)
class Strict(Wrapper):
    """No weak types, float32 rewards, bool flags, and float32 observations wherever the space is a box.

    Raises TypeError, when traced, for a step that changes the type of a part of the state. An action's type can be the
    cause: MetaMaze keeps its last action in an int32.
    """

    def reset_env(self, key: jax.Array, params: Any) -> tuple[Any, Any]:
        obs, state = self.env.reset_env(key, params)
        return _float_boxes(self.env.observation_space(params), obs), _strong(state)

    def step_env(self, key: jax.Array, state: Any, action: Any, params: Any) -> tuple[Any, Any, Any, Any, Any]:
        # gymnax's Swimmer adds arrays of different ranks.
        with jax.numpy_rank_promotion("allow"):
            obs, after, reward, terminated, info = self.env.step_env(key, state, _strong(action), params)
        after = jax.tree_util.tree_map_with_path(_same_type, _strong(after), _strong(state))
        reward, terminated = jnp.asarray(reward, jnp.float32), jnp.asarray(terminated, bool)
        return _float_boxes(self.env.observation_space(params), obs), after, reward, terminated, _strong(info)

    def is_truncated(self, state: Any, params: Any) -> jax.Array:
        return jnp.asarray(self.env.is_truncated(state, params), bool)

    def observation_space(self, params: Any) -> Any:
        return _float_space(self.env.observation_space(params))


@dataclass(frozen=True)
class FlattenObservation(Wrapper):
    """Observations as one float32 vector: boxes row by row, a category as one-hot, parts in the order of the space."""

    def reset_env(self, key: jax.Array, params: Any) -> tuple[jax.Array, Any]:
        obs, state = self.env.reset_env(key, params)
        return _vector(self.env.observation_space(params), obs), state

    def step_env(self, key: jax.Array, state: Any, action: Any, params: Any) -> tuple[Any, Any, Any, Any, Any]:
        obs, *rest = self.env.step_env(key, state, action, params)
        return _vector(self.env.observation_space(params), obs), *rest

    def observation_space(self, params: Any) -> spaces.Box:
        low_F, high_F = _bounds(self.env.observation_space(params))
        return spaces.Box(low_F, high_F, low_F.shape, jnp.float32)


@dataclass(frozen=True)
class ActionRepeat(Wrapper):
    """Every action is taken `times` times, or until the episode ends; rewards add up, the rest is that of the last
    step taken. Time limits go on counting the steps inside. Needs an environment whose states keep their types."""

    times: int

    def __post_init__(self) -> None:
        if self.times < 1:
            raise ValueError(f"ActionRepeat: times is {self.times}, expected at least 1")

    def step_env(self, key: jax.Array, state: Any, action: Any, params: Any) -> tuple[Any, Any, Any, Any, Any]:
        def goes_on(carry: tuple[Any, ...]) -> jax.Array:
            taken, (_, after, _, terminated, _) = carry
            return (taken < self.times) & ~((taken > 0) & (terminated | self.env.is_truncated(after, params)))

        def again(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            taken, (_, before, total, _, _) = carry
            k_step = jax.random.fold_in(key, taken)
            obs, after, reward, terminated, info = self.env.step_env(k_step, before, action, params)
            return taken + 1, (obs, after, total + reward, terminated, info)

        shapes = jax.eval_shape(self.env.step_env, key, state, action, params)
        obs, _, reward, terminated, info = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        start = jnp.zeros((), jnp.int32), (obs, state, reward, terminated, info)
        return jax.lax.while_loop(goes_on, again, start)[1]


class Remembered(NamedTuple):
    """`state` of the environment inside; the last action as a vector `action_A` and `reward`, zeros at first."""

    state: Any
    action_A: jax.Array
    reward: jax.Array


@dataclass(frozen=True)
class RememberLast(Wrapper):
    """Appends the last action (A: one-hot, or the vector itself) and the last reward to a vector observation, so that
    an agent with memory can learn within its episodes (Wang et al., arXiv 1611.05763; Duan et al., arXiv 1611.02779).

    Raises ValueError where observations are not vectors.
    """

    def __post_init__(self) -> None:
        space = self.env.observation_space(self.env.default_params)
        if not isinstance(space, spaces.Box) or len(space.shape) != 1:
            raise ValueError(f"RememberLast: observations are {space}, expected vectors, as of FlattenObservation")

    def reset_env(self, key: jax.Array, params: Any) -> tuple[jax.Array, Remembered]:
        obs_F, state = self.env.reset_env(key, params)
        nothing_A = jnp.zeros_like(_bounds(self.env.action_space(params))[0])
        return self._observe(obs_F, Remembered(state, nothing_A, jnp.zeros((), jnp.float32)))

    def step_env(self, key: jax.Array, state: Remembered, action: Any, params: Any) -> tuple[Any, Any, Any, Any, Any]:
        obs_F, after, reward, terminated, info = self.env.step_env(key, state.state, action, params)
        action_A = _vector(self.env.action_space(params), action)
        return *self._observe(obs_F, Remembered(after, action_A, reward)), reward, terminated, info

    def is_truncated(self, state: Remembered, params: Any) -> jax.Array:
        return self.env.is_truncated(state.state, params)

    def observation_space(self, params: Any) -> spaces.Box:
        lows_highs = [_bounds(self.env.observation_space(params)), _bounds(self.env.action_space(params))]
        largest = jnp.array([jnp.finfo(jnp.float32).max])
        low_F, high_F = map(jnp.concatenate, zip(*lows_highs, (-largest, largest), strict=True))
        # Before the first action there is none, which is zeros.
        size = lows_highs[0][0].size
        low_F, high_F = low_F.at[size:].min(0), high_F.at[size:].max(0)
        return spaces.Box(low_F, high_F, low_F.shape, jnp.float32)

    def _observe(self, obs_F: jax.Array, state: Remembered) -> tuple[jax.Array, Remembered]:
        return jnp.concatenate([obs_F, state.action_A, state.reward[None]]), state


def unwrapped(env: Any, state: Any) -> tuple[Any, Any]:
    """The environment inside all wrappers of this module, and its part of the state."""
    while isinstance(env, Wrapper):
        env, state = env.env, state.state if isinstance(env, RememberLast) else state
    return env, state


class _UprightFourRooms(FourRooms):
    def get_obs(self, state: RoomsState, params: Any = None, key: Any = None) -> jax.Array:
        # The map is (row, column), and so is `pos`, but the agent is drawn at the reverse of `pos`.
        return super().get_obs(replace(state, pos=state.pos[::-1]) if self.use_visual_obs else state)


def _strong(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), tree)


def _same_type(path: tuple[Any, ...], new: jax.Array, old: jax.Array) -> jax.Array:
    if new.dtype != old.dtype:
        at = jax.tree_util.keystr(path)
        raise TypeError(f"step_env: state{at} became {new.dtype}, expected {old.dtype} as before the step")
    return new


def _float_space(space: Any) -> Any:
    match space:
        case spaces.Box():
            return spaces.Box(space.low, space.high, space.shape, jnp.float32)
        case spaces.Dict():
            return spaces.Dict({name: _float_space(part) for name, part in space.spaces.items()})
        case spaces.Tuple():
            return spaces.Tuple([_float_space(part) for part in space.spaces])
    return space


def _float_boxes(space: Any, obs: Any) -> Any:
    match space:
        case spaces.Box():
            return jnp.asarray(obs, jnp.float32)
        case spaces.Dict():
            return {name: _float_boxes(part, obs[name]) for name, part in space.spaces.items()}
        case spaces.Tuple():
            return tuple(_float_boxes(part, obs[index]) for index, part in enumerate(space.spaces))
    return _strong(obs)


def _vector(space: Any, value: Any) -> jax.Array:
    """A member of a space as a float32 vector."""
    match space:
        case spaces.Box():
            return jnp.asarray(value, jnp.float32).reshape(-1)
        case spaces.Discrete():
            return jax.nn.one_hot(value, space.n, dtype=jnp.float32)
        case spaces.Dict():
            return jnp.concatenate([_vector(part, value[name]) for name, part in space.spaces.items()])
        case spaces.Tuple():
            return jnp.concatenate([_vector(part, value[index]) for index, part in enumerate(space.spaces)])
    raise TypeError(f"space is {space}, expected a gymnax Box, Discrete, Dict or Tuple")


def _bounds(space: Any) -> tuple[jax.Array, jax.Array]:
    """Lowest and highest values of `_vector`."""
    match space:
        case spaces.Box():
            low, high = (jnp.broadcast_to(jnp.asarray(x, jnp.float32), space.shape) for x in (space.low, space.high))
            return low.reshape(-1), high.reshape(-1)
        case spaces.Discrete():
            return jnp.zeros(space.n), jnp.ones(space.n)
        case spaces.Dict() | spaces.Tuple():
            parts = space.spaces.values() if isinstance(space, spaces.Dict) else space.spaces
            low_F, high_F = map(jnp.concatenate, zip(*map(_bounds, parts), strict=True))
            return low_F, high_F
    raise TypeError(f"space is {space}, expected a gymnax Box, Discrete, Dict or Tuple")

"""Probe environments: tasks so small that one part of an algorithm decides them, and that have known answers.

Each tests what the one before leaves out, so that the first that fails says where the fault is: the value of a
constant, a value that depends on the observation, discounting, a policy, a policy and value that both depend on the
observation, bootstrapping where an episode is truncated, memory. Each comes with discrete actions (two) and with
continuous ones (one number in [-2, 2], beyond which an action counts as the bound; no best action is on a bound).

`PROBES` has them all, each a `Probe` with its answers. A test of an algorithm goes over

    for probe in PROBES:
        ... train on probe.env with probe.env.default_params ...
        values of probe.observation_NTF, against probe.values(discount)
        greedy actions there, against probe.action_NT, where probe.matters_NT

An algorithm without memory takes the probes that are `markov` and may flatten N and T.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gymnax.environments import environment, spaces

BOUND = 2.0
"""Continuous actions are in [-BOUND, BOUND]."""


@struct.dataclass
class EnvState(environment.EnvState):
    """`time` steps so far; `cue` -1 or 1, drawn at reset."""

    time: jax.Array  # pyright: ignore[reportIncompatibleVariableOverride]  # gymnax says int but traces it too
    cue: jax.Array


EnvParams = environment.EnvParams


@dataclass(frozen=True)
class ProbeEnv(environment.Environment[EnvState, EnvParams]):
    """Episodes of `length` steps. `feature(time, cue)` is the observation, `payoff(time, cue, action)` the reward of
    the step at that time. At its end an episode terminates, or, where `endless`, is truncated by `default_params`."""

    feature: Callable[[jax.Array, jax.Array], Any]
    payoff: Callable[[jax.Array, jax.Array, jax.Array], Any]
    continuous: bool
    length: int = 1
    endless: bool = False

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"ProbeEnv: length is {self.length}, expected at least 1")

    @property
    def default_params(self) -> EnvParams:
        """A horizon that truncates endless episodes and no others."""
        return EnvParams(max_steps_in_episode=self.length if self.endless else self.length + 1)

    @property
    def num_actions(self) -> int:
        """Two, or the one dimension of the continuous ones."""
        return 1 if self.continuous else 2

    def action_space(self, params: EnvParams) -> spaces.Discrete | spaces.Box:
        """Two actions, or a number (1,) between the bounds."""
        return spaces.Box(-BOUND, BOUND, (1,), jnp.float32) if self.continuous else spaces.Discrete(2)

    def observation_space(self, params: EnvParams) -> spaces.Box:
        """One feature."""
        return spaces.Box(-1.0, 1.0, (1,), jnp.float32)

    def reset_env(self, key: jax.Array, params: EnvParams) -> tuple[jax.Array, EnvState]:
        """Draw a cue. Returns (obs_F, state)."""
        state = EnvState(time=jnp.zeros((), jnp.int32), cue=jax.random.rademacher(key, (), jnp.float32))
        return self._observation(state), state

    def step_env(
        self, key: jax.Array, state: EnvState, action: Any, params: EnvParams
    ) -> tuple[jax.Array, EnvState, jax.Array, jax.Array, dict[str, jax.Array]]:
        """One step. Returns (obs_F, state, reward, terminated, info); deterministic, `key` is unused."""
        if self.continuous:
            action = jnp.clip(jnp.reshape(action, ()), -BOUND, BOUND)
        reward = jnp.asarray(self.payoff(state.time, state.cue, action), jnp.float32)
        state = EnvState(time=state.time + 1, cue=state.cue)
        terminated = (state.time >= self.length) & (not self.endless)
        return self._observation(state), state, reward, terminated, {"discount": 1.0 - terminated}

    def _observation(self, state: EnvState) -> jax.Array:
        return jnp.asarray(self.feature(state.time, state.cue), jnp.float32)[None]


@dataclass(frozen=True, eq=False)
class Probe:
    """An environment and what is to be learned in it.

    `observation_NTF` are the observations of all N episodes that can happen, T steps each; `values(discount)` their
    values (N, T) under the best policy; `action_NT` its actions, (N, T) integers or (N, T, 1) numbers, which decide the
    return at the steps in `matters_NT` and are arbitrary elsewhere. `markov` says that the observation is the state.
    """

    name: str
    env: ProbeEnv
    observation_NTF: np.ndarray
    values: Callable[[float], np.ndarray]
    action_NT: np.ndarray
    matters_NT: np.ndarray
    markov: bool = True


def constant_value(continuous: bool) -> Probe:
    """One observation, one step, reward 1. Fails: the value's loss or its optimiser."""
    env = ProbeEnv(_zero, lambda time, cue, action: 1.0, continuous)
    return _probe("constant_value", env, [[0]], lambda discount: [[1]])


def observed_value(continuous: bool) -> Probe:
    """Observation -1 or 1, one step, the reward is the observation. Fails: the network's input, or mixed-up batches."""
    env = ProbeEnv(_cue, lambda time, cue, action: cue, continuous)
    return _probe("observed_value", env, [[-1], [1]], lambda discount: [[-1], [1]])


def discounted_value(continuous: bool) -> Probe:
    """Observation 0 and then 1, reward 1 for the second step. Fails: discounting, or returns off by a step."""
    env = ProbeEnv(lambda time, cue: jnp.minimum(time, 1), lambda time, cue, action: time, continuous, length=2)
    return _probe("discounted_value", env, [[0, 1]], lambda discount: [[discount, 1]])


def policy(continuous: bool) -> Probe:
    """One observation, one step. Reward -1 or 1 for action 0 or 1, or minus the squared distance to 0.5. Fails: the
    policy's loss, or the sign of the advantage."""
    if continuous:
        env = ProbeEnv(_zero, lambda time, cue, action: -jnp.square(action - 0.5), continuous)
        return _probe("policy", env, [[0]], lambda discount: [[0]], [[0.5]])
    env = ProbeEnv(_zero, lambda time, cue, action: 2 * action - 1, continuous)
    return _probe("policy", env, [[0]], lambda discount: [[1]], [[1]])


def policy_and_value(continuous: bool) -> Probe:
    """Observation -1 or 1, one step. Reward 1 for action 0 or 1, respectively, else 0; or minus the squared distance to
    the observation. Fails: observations, actions and advantages that don't belong together."""
    env = ProbeEnv(_cue, _distance if continuous else _match, continuous)
    best = [[-1], [1]] if continuous else [[0], [1]]
    return _probe("policy_and_value", env, [[-1], [1]], lambda discount: np.full((2, 1), not continuous), best)


def truncation(continuous: bool, steps: int = 5) -> Probe:
    """One observation, reward 1 for every step, forever, seen in episodes truncated after `steps`. Fails: truncation
    taken for termination, which gives the value of that many rewards or fewer."""
    env = ProbeEnv(_zero, lambda time, cue, action: 1.0, continuous, length=steps, endless=True)
    return _probe("truncation", env, [[0] * steps], lambda discount: np.full((1, steps), 1 / (1 - discount)))


def memory(continuous: bool, blanks: int = 3) -> Probe:
    """A cue -1 or 1, then `blanks` observations 0; the action at the last of them is rewarded as in `policy_and_value`,
    for the cue. Without memory the best return is 1/2, or -1 with continuous actions. Fails: a recurrent state that is
    lost, reset at the wrong time or not learned through."""
    payoff = _distance if continuous else _match
    env = ProbeEnv(
        lambda time, cue: jnp.where(time == 0, cue, 0.0),
        lambda time, cue, action: jnp.where(time == blanks, payoff(time, cue, action), 0.0),
        continuous,
        length=blanks + 1,
    )

    def values(discount: float) -> np.ndarray:
        return (not continuous) * np.tile(np.power(discount, np.arange(blanks, -1, -1)), (2, 1))

    observation_NT = [[cue] + [0] * blanks for cue in (-1, 1)]
    action_NT = [[action] * (blanks + 1) for action in ((-1, 1) if continuous else (0, 1))]
    matters_NT = np.tile(np.arange(blanks + 1) == blanks, (2, 1))
    return _probe("memory", env, observation_NT, values, action_NT, matters_NT, markov=blanks == 0)


def _zero(time: jax.Array, cue: jax.Array) -> float:
    return 0.0


def _cue(time: jax.Array, cue: jax.Array) -> jax.Array:
    return cue


def _match(time: jax.Array, cue: jax.Array, action: jax.Array) -> jax.Array:
    return action == (cue > 0)


def _distance(time: jax.Array, cue: jax.Array, action: jax.Array) -> jax.Array:
    return -jnp.square(action - cue)


def _probe(
    name: str,
    env: ProbeEnv,
    observation_NT: Any,
    values: Callable,
    action_NT: Any = None,
    matters_NT: Any = None,
    **rest,
) -> Probe:
    """Fill in what is not given: no action matters, or, with actions, each."""
    observation_NTF = np.array(observation_NT, np.float32)[..., None]
    shape = observation_NTF.shape[:2]
    if matters_NT is None:
        matters_NT = np.full(shape, action_NT is not None)
    action_NT = np.zeros(shape) if action_NT is None else np.array(action_NT)
    return Probe(
        name=f"{name}-{'continuous' if env.continuous else 'discrete'}",
        env=env,
        observation_NTF=observation_NTF,
        values=lambda discount: np.array(values(discount), np.float32),
        action_NT=action_NT[..., None].astype(np.float32) if env.continuous else action_NT.astype(np.int32),
        matters_NT=matters_NT,
        **rest,
    )


PROBES = (
    constant_value(continuous=False),
    constant_value(continuous=True),
    observed_value(continuous=False),
    observed_value(continuous=True),
    discounted_value(continuous=False),
    discounted_value(continuous=True),
    policy(continuous=False),
    policy(continuous=True),
    policy_and_value(continuous=False),
    policy_and_value(continuous=True),
    truncation(continuous=False),
    truncation(continuous=True),
    memory(continuous=False),
    memory(continuous=True),
)
"""All of them, in the order in which to look at failures."""

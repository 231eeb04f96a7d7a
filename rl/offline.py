"""Data sets of trajectories for algorithms that learn without an environment: collected, joined, filtered, sampled.

    data = concatenate(
        collect_trajectories(k_good, good, env, env_params, episodes=20, horizon=200),
        collect_trajectories(k_noisy, good, env, env_params, episodes=20, horizon=200, epsilon=0.5),
    )
    windows = sample_windows(key, data, batch=64, steps=20)

A data set is a pytree of arrays, episodes padded on the right to one length, so it lives on the device, is sampled in
compiled code, and can be part of a training state. `RewardObserved` shows a policy the rewards it gets.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from rl import normalise
from rl.algorithm import Algorithm, State
from rl.normalise import Moments
from rl.rollout import Step, rollout

Act = Callable[[jax.Array | None, Any, Any], tuple[jax.Array, Any]]
"""(key, obs_B, memory) -> (action_B, memory), such as `partial(algorithm.act, state)`."""


class Trajectories(NamedTuple):
    """N episodes of at most L steps: what was seen, `obs_NL` (N, L, ...), before `action_NL` (N, L, ...) was taken,
    and the reward that followed. `mask_NL` is true for an episode's steps, which come first; what stands after them
    is arbitrary. `terminated_N` says which ended by the task and not by a time limit."""

    obs_NL: Any
    action_NL: jax.Array
    reward_NL: jax.Array
    mask_NL: jax.Array
    terminated_N: jax.Array

    @property
    def length_N(self) -> jax.Array:
        """Steps of each episode."""
        return self.mask_NL.sum(1)

    @property
    def return_N(self) -> jax.Array:
        """Undiscounted return of each episode."""
        return jnp.where(self.mask_NL, self.reward_NL, 0.0).sum(1)


class Windows(NamedTuple):
    """B pieces of episodes, K steps each, (B, K, ...), where `mask_BK`; elsewhere they are padded with zeros.
    `time_BK` is the step in the episode, `left_BK` the undiscounted return from that step on (the return-to-go)."""

    obs_BK: Any
    action_BK: jax.Array
    reward_BK: jax.Array
    left_BK: jax.Array
    time_BK: jax.Array
    mask_BK: jax.Array


class Places(NamedTuple):
    """Where B windows of K steps lie in a data set: in which episode, and at which of its steps (B, K), 0 where the
    window is padded, which `mask_BK` tells. Small beside what stands there."""

    episode_B: jax.Array
    time_BK: jax.Array
    mask_BK: jax.Array


class Seen(NamedTuple):
    """An observation, and the `reward` of the step that led to it, 0 at the start of an episode."""

    obs: Any
    reward: jax.Array


class RewardedState(NamedTuple):
    """State `env` of the environment within, and how the last step ended."""

    env: Any
    reward: jax.Array
    terminated: jax.Array


@dataclass(frozen=True)
class RewardObserved:
    """An environment whose observations are `Seen`: policies that depend on rewards run wherever others do."""

    env: Any

    @property
    def default_params(self) -> Any:
        """Those of the environment within."""
        return self.env.default_params

    def action_space(self, params: Any) -> Any:
        """That of the environment within."""
        return self.env.action_space(params)

    def observation_space(self, params: Any) -> Any:
        """Of `Seen.obs`."""
        return self.env.observation_space(params)

    def reset_env(self, key: jax.Array, params: Any) -> tuple[Seen, RewardedState]:
        """(seen, state) of a new episode."""
        obs, state = self.env.reset_env(key, params)
        zero = jnp.zeros((), jnp.float32)
        return Seen(obs, zero), RewardedState(state, zero, jnp.zeros((), bool))

    def step_env(self, key: jax.Array, state: RewardedState, action: Any, params: Any) -> Any:
        """(seen, state, reward, terminated, info)."""
        obs, after, reward, terminated, info = self.env.step_env(key, state.env, action, params)
        reward, terminated = jnp.asarray(reward, jnp.float32), jnp.asarray(terminated, bool)
        return Seen(obs, reward), RewardedState(after, reward, terminated), reward, terminated, info

    def is_truncated(self, state: RewardedState, params: Any) -> jax.Array:
        """As the environment within."""
        return self.env.is_truncated(state.env, params)


def collect_trajectories(
    key: jax.Array,
    act: Act,
    env: Any,
    env_params: Any,
    *,
    episodes: int,
    horizon: int,
    memory: Any = (),
    greedy: bool = False,
    epsilon: float | jax.Array = 0.0,
) -> Trajectories:
    """Episodes of `act`, from `memory`, at most `horizon` steps each; of an algorithm, `act` is
    `partial(algorithm.act, state)` and `memory` is `algorithm.init_memory(episodes)`.

    It gets no key where `greedy`. With probability `epsilon`, of all or an array (episodes,), the action of a step is
    drawn evenly from the action space instead. Raises ValueError where there would be no episodes, or none with steps.
    """
    for name, value in (("episodes", episodes), ("horizon", horizon)):
        if value < 1:
            raise ValueError(f"collect_trajectories: {name} is {value}, expected at least 1")
    if not isinstance(epsilon, jax.Array) and not 0 <= epsilon <= 1:
        raise ValueError(f"collect_trajectories: epsilon is {epsilon}, expected a probability")
    explores = isinstance(epsilon, jax.Array) or epsilon > 0

    def policy(k_policy: jax.Array, step: Step, carried: tuple[Any, jax.Array]):
        memory, epsilon_B = carried
        k_act, k_explore, k_random = jax.random.split(k_policy, 3)
        seen: Any = step.obs_BF
        action_B, memory = act(None if greedy else k_act, seen.obs, memory)
        if explores:
            count = len(step.running_B)
            explore_B = jax.random.bernoulli(k_explore, epsilon_B)
            random_B = jax.vmap(env.action_space(env_params).sample)(jax.random.split(k_random, count))
            explore_B = explore_B.reshape(-1, *(1,) * (action_B.ndim - 1))
            action_B = jnp.where(explore_B, random_B.astype(action_B.dtype), action_B)
        return action_B, (memory, epsilon_B), (seen, action_B)

    observed = RewardObserved(env)
    # As a part of the memory: the loop goes on with some of the episodes.
    carried = memory, jnp.broadcast_to(jnp.asarray(epsilon, jnp.float32), (episodes,))
    found, _ = rollout(key, observed, env_params, policy, carried, episodes, horizon)
    (seen, action_TB), mask_TB = found.recorded, found.valid_TB
    # A reward is seen a step later, the last of an episode in its final state.
    reward_TB = jnp.concatenate([seen.reward[1:], jnp.zeros((1, episodes))])
    reward_TB = reward_TB.at[found.length_B - 1, jnp.arange(episodes)].set(found.final_state.reward)
    return Trajectories(
        obs_NL=jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), seen.obs),
        action_NL=jnp.swapaxes(action_TB, 0, 1),
        reward_NL=jnp.where(mask_TB, reward_TB, 0.0).T,
        mask_NL=mask_TB.T,
        terminated_N=found.final_state.terminated,
    )


def check(data: Trajectories) -> None:
    """Raises ValueError for a data set without episodes or steps, or whose arrays do not belong together, and, where
    its values are known (not under jit), for episodes without steps or with gaps, or rewards that are not finite."""
    _check_shapes(data)
    if isinstance(data.mask_NL, Tracer) or isinstance(data.reward_NL, Tracer):
        return
    mask_NL, reward_NL = np.asarray(data.mask_NL), np.asarray(data.reward_NL)
    for fault, bad_N in (
        ("has no steps", ~mask_NL.any(1)),
        ("has gaps: its steps must come first in mask_NL", (mask_NL[:, 1:] & ~mask_NL[:, :-1]).any(1)),
        ("has a reward that is not finite", (mask_NL & ~np.isfinite(reward_NL)).any(1)),
    ):
        if bad_N.any():
            raise ValueError(f"Trajectories: episode {int(bad_N.argmax())} of {len(bad_N)} {fault}")


def _check_shapes(data: Trajectories) -> None:
    shape = data.mask_NL.shape
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"Trajectories: mask_NL has shape {shape}, expected (N, L) with at least one episode and step")
    leaves = [("obs_NL", x) for x in jax.tree.leaves(data.obs_NL)]
    for name, x in (*leaves, ("action_NL", data.action_NL), ("reward_NL", data.reward_NL)):
        if x.shape[:2] != shape:
            raise ValueError(f"Trajectories: {name} has shape {x.shape}, expected it to begin with (N, L) = {shape}")
    if data.terminated_N.shape != shape[:1]:
        raise ValueError(f"Trajectories: terminated_N has shape {data.terminated_N.shape}, expected {shape[:1]}")


def concatenate(*parts: Trajectories) -> Trajectories:
    """All episodes of some data sets, padded to the longest. Raises ValueError for none, or if they do not match."""
    if not parts:
        raise ValueError("concatenate: no data sets are given, expected at least one")
    for part in parts:
        check(part)
    kinds = [[(x.shape[2:], x.dtype) for x in jax.tree.leaves((part.obs_NL, part.action_NL))] for part in parts]
    for index, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise ValueError(
                f"concatenate: data set {index} has observations and actions {kind}, expected those of the first, "
                f"{kinds[0]}"
            )
    steps = max(part.mask_NL.shape[1] for part in parts)

    def join(*xs: jax.Array) -> jax.Array:
        if xs[0].ndim == 1:
            return jnp.concatenate(xs)
        return jnp.concatenate([jnp.pad(x, ((0, 0), (0, steps - x.shape[1]), *((0, 0),) * (x.ndim - 2))) for x in xs])

    return jax.tree.map(join, *parts)


def best(data: Trajectories, fraction: float) -> Trajectories:
    """The episodes of highest return that hold `fraction` of the steps: the others get an empty mask.

    The best one stays in any case; the last is one that still fits. Source: "%BC", Chen et al., arXiv 2106.01345,
    section 5.2. Raises ValueError for a fraction that is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"best: fraction is {fraction}, expected a number above 0, at most 1")
    order_N = jnp.argsort(-data.return_N, stable=True)
    steps_N = jnp.cumsum(data.length_N[order_N])
    kept_N = (steps_N <= fraction * steps_N[-1]).at[0].set(True)
    kept_N = jnp.zeros_like(kept_N).at[order_N].set(kept_N)
    return data._replace(mask_NL=data.mask_NL & kept_N[:, None])


def returns_to_go(reward_NL: jax.Array, mask_NL: jax.Array, discount: float | jax.Array = 1.0) -> jax.Array:
    """Sum of an episode's rewards from each step on, (N, L), that of a step `discount` times for each step until then;
    0 after the episode."""

    def one(left_N: jax.Array, reward_N: jax.Array):
        left_N = reward_N + discount * left_N
        return left_N, left_N

    reward_LN = jnp.where(mask_NL, reward_NL, 0.0).T
    return jax.lax.scan(one, jnp.zeros_like(reward_LN[0]), reward_LN, reverse=True)[1].T


def observation_moments(data: Trajectories) -> Moments:
    """Mean and variance of the observations, an array (N, L, ...), over all steps."""
    obs_NL = data.obs_NL.astype(jnp.float32)
    mask_NL = data.mask_NL.reshape(*data.mask_NL.shape, *(1,) * (obs_NL.ndim - 2))
    count = data.mask_NL.sum().astype(jnp.float32)
    mean = jnp.where(mask_NL, obs_NL, 0.0).sum((0, 1)) / count
    variance = jnp.where(mask_NL, jnp.square(obs_NL - mean[None, None]), 0.0).sum((0, 1)) / count
    return normalise.moments(mean.shape)._replace(samples=count, mean=mean, variance=variance)


def draw_places(
    key: jax.Array,
    length_N: jax.Array,
    batch: int,
    steps: int,
    *,
    from_start: bool = False,
    pad: Literal["left", "right"] = "right",
) -> Places:
    """Where `batch` windows of `steps` K steps are, drawn with replacement from the key, in episodes of `length_N`.

    A window begins at any step of the data set, all equally likely, so that an episode counts by its length, and ends
    with its episode if that is sooner (Chen et al., arXiv 2106.01345, their code); or, `from_start`, at the first step
    of any episode, all equally likely. What it lacks in steps is padded on the given side.
    """
    if batch < 1 or steps < 1:
        raise ValueError(f"draw_places: batch is {batch} and steps {steps}, expected at least 1")
    if pad not in ("left", "right"):
        raise ValueError(f"draw_places: pad is {pad!r}, expected 'left' or 'right'")
    k_episode, k_start = jax.random.split(key)
    # The cumulated weights are exact integers, where probabilities in float32 would not be.
    weight_N = jnp.cumsum((length_N > 0).astype(jnp.int32) if from_start else length_N)
    drawn_B = jax.random.randint(k_episode, (batch,), 0, weight_N[-1])
    episode_B = jnp.searchsorted(weight_N, drawn_B, side="right")
    length_B = length_N[episode_B]
    start_B = jnp.zeros_like(length_B) if from_start else jax.random.randint(k_start, (batch,), 0, length_B)
    offset_K = jnp.arange(steps)
    shift_B = jnp.maximum(start_B + steps - length_B, 0) if pad == "left" else jnp.zeros_like(start_B)
    time_BK = (start_B - shift_B)[:, None] + offset_K[None]
    mask_BK = (time_BK >= start_B[:, None]) & (time_BK < length_B[:, None])
    return Places(episode_B, jnp.where(mask_BK, time_BK, 0), mask_BK)


def windows_at(data: Trajectories, places: Places, left_NL: jax.Array | None = None) -> Windows:
    """The windows at some places of a data set. `left_NL` are its returns to go, if they are at hand or scaled."""
    episode_B, time_BK, mask_BK = places
    if left_NL is None:
        left_NL = returns_to_go(data.reward_NL, data.mask_NL)

    def pick(x_NL: jax.Array) -> jax.Array:
        x_BK = x_NL[episode_B[:, None], time_BK]
        return jnp.where(mask_BK.reshape(*mask_BK.shape, *(1,) * (x_BK.ndim - 2)), x_BK, 0)

    obs_BK = jax.tree.map(pick, data.obs_NL)
    return Windows(obs_BK, pick(data.action_NL), pick(data.reward_NL), pick(left_NL), time_BK, mask_BK)


def sample_windows(
    key: jax.Array,
    data: Trajectories,
    batch: int,
    steps: int,
    *,
    from_start: bool = False,
    pad: Literal["left", "right"] = "right",
) -> Windows:
    """`batch` windows of `steps` K steps, at places as `draw_places` draws them.

    For many batches, places can be drawn at once, and the windows of each batch made when it is needed.
    """
    _check_shapes(data)
    places = draw_places(key, data.length_N, batch, steps, from_start=from_start, pad=pad)
    return windows_at(data, places)


Train = Callable[..., tuple[State, dict[str, jax.Array]]]
"""(key, data, hyper) -> (state, metrics (updates, ...)); the default of the last is the algorithm's."""


def trainer(algorithm: Algorithm, updates: int, hyper: Any) -> Train:
    """All updates on a data set as one function of one key, with a default for hyperparameters."""

    def train(key: jax.Array, data: Trajectories, hyper: Any = hyper) -> tuple[State, dict[str, jax.Array]]:
        state = algorithm.init(key, hyper, data)
        return jax.lax.scan(lambda state, _: algorithm.update(state), state, length=updates)

    return train

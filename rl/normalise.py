"""Running statistics by which observations and rewards are normalised; they are part of the training state.

All environments share them, wherever they run, and what was normalised by them stays so: a rollout uses those from
before it. Moments are merged by the parallel formula of Chan, Golub and LeVeque (1983).

Each array of an observation has `Moments` of its own: those of a dict of arrays are a dict of Moments.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Moments(NamedTuple):
    """Of an array: the number of `samples`, their `mean` and `variance` (shape of a sample)."""

    samples: jax.Array
    mean: jax.Array
    variance: jax.Array


def moments(shape: tuple[int, ...]) -> Moments:
    """Before any sample: mean 0 and variance 1, with next to no weight."""
    return Moments(jnp.array(1e-4), jnp.zeros(shape), jnp.ones(shape))


def update(old: Any, sample: Any, mask: jax.Array | None = None) -> Any:
    """Moments with samples (..., *shape) added; all leading axes are samples; with `mask` (...), where it is true."""
    return jax.tree.map(lambda old, x: _update(old, x, mask), old, sample, is_leaf=_is_moments)


def normalise(by: Any, x: Any, *, limit: float = 10.0) -> Any:
    """x (..., *shape) by its Moments, with mean 0 and variance 1, clipped to +-limit."""
    return jax.tree.map(lambda by, x: _normalise(by, x, limit), by, x, is_leaf=_is_moments)


def _is_moments(x: Any) -> bool:
    return isinstance(x, Moments)


def _update(old: Moments, sample: jax.Array, mask: jax.Array | None) -> Moments:
    # Reduced over axes as they are: made one, they could not stay spread over devices.
    lead = sample.shape[: sample.ndim - old.mean.ndim]
    axes = tuple(range(len(lead)))
    kept = None if mask is None else mask.reshape(*lead, *(1,) * old.mean.ndim)
    added = math.prod(lead) if mask is None else mask.sum()
    count = old.samples + added
    shift = sample.mean(axes, where=kept) - old.mean
    variance = sample.var(axes, where=kept)
    spread = old.variance * old.samples + variance * added + jnp.square(shift) * (old.samples * added / count)
    return Moments(count, old.mean + shift * (added / count), spread / count)


def _normalise(by: Moments, x: jax.Array, limit: float) -> jax.Array:
    lead = (1,) * (x.ndim - by.mean.ndim)
    mean, variance = (m.reshape(*lead, *m.shape) for m in by[1:])
    return jnp.clip((x - mean) * jax.lax.rsqrt(variance + 1e-8), -limit, limit)


class RewardScale(NamedTuple):
    """Rewards are divided by the standard deviation of discounted returns: their `moments` and `return_E` so far."""

    moments: Moments
    return_E: jax.Array


def reward_scale(environments: int) -> RewardScale:
    """Before any reward."""
    return RewardScale(moments(()), jnp.zeros(environments))


def scale_rewards(
    state: RewardScale, reward_TE: jax.Array, done_TE: jax.Array, discount: jax.Array | float, *, limit: float = 10.0
) -> tuple[jax.Array, RewardScale]:
    """Rewards (T, E) in units of the returns' standard deviation, clipped to +-limit, and the new state. The mean is
    left alone: a shifted reward would be another task where episodes may end."""

    def one(return_E: jax.Array, x: tuple[jax.Array, jax.Array]):
        reward_E, done_E = x
        return_E = return_E * discount + reward_E
        return jnp.where(done_E, 0.0, return_E), return_E

    return_E, return_TE = jax.lax.scan(one, state.return_E, (reward_TE, done_TE))
    new = update(state.moments, return_TE)
    scaled = jnp.clip(reward_TE * jax.lax.rsqrt(new.variance + 1e-8), -limit, limit)
    return scaled, RewardScale(new, return_E)

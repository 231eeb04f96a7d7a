"""Distributions over actions, as pytrees with methods: what a policy network gives."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rl.distributions import (
    categorical_entropy,
    categorical_log_prob,
    gaussian_entropy,
    gaussian_log_prob,
    squash,
    tanh_gaussian_entropy,
    tanh_gaussian_log_prob,
)


class Categorical(NamedTuple):
    """Integer actions (...) of `logits` (..., A)."""

    logits: jax.Array

    def noise(self, key: jax.Array, steps: int) -> jax.Array:
        """What `draw` needs for `steps` policies of this shape, drawn at once (steps, ..., A)."""
        return jax.random.gumbel(key, (steps, *self.logits.shape))

    def draw(self, noise: jax.Array) -> jax.Array:
        """An action (...), by the Gumbel-max trick."""
        return (self.logits + noise).argmax(-1)

    def sample(self, key: jax.Array) -> jax.Array:
        """An action (...)."""
        return self.draw(self.noise(key, 1)[0])

    def mode(self) -> jax.Array:
        """The likeliest action (...)."""
        return self.logits.argmax(-1)

    def log_prob(self, action: jax.Array) -> jax.Array:
        """Log-probability (...) of actions (...)."""
        return categorical_log_prob(self.logits, action)

    def entropy(self) -> jax.Array:
        """In nats (...)."""
        return categorical_entropy(self.logits)


class Gaussian(NamedTuple):
    """Actions (..., A) of independent normal distributions with `mean` and `log_std` (..., A).

    They are unbounded; `to_box` makes them actions of an environment.
    """

    mean: jax.Array
    log_std: jax.Array

    def noise(self, key: jax.Array, steps: int) -> jax.Array:
        """What `draw` needs for `steps` policies of this shape, drawn at once (steps, ..., A)."""
        return jax.random.normal(key, (steps, *self.mean.shape))

    def draw(self, noise: jax.Array) -> jax.Array:
        """An action (..., A)."""
        return self.mean + jnp.exp(self.log_std) * noise

    def sample(self, key: jax.Array) -> jax.Array:
        """An action (..., A)."""
        return self.draw(self.noise(key, 1)[0])

    def mode(self) -> jax.Array:
        """The mean (..., A)."""
        return self.mean

    def log_prob(self, action: jax.Array) -> jax.Array:
        """Log-density (...) of actions (..., A)."""
        return gaussian_log_prob(self.mean, self.log_std, action)

    def entropy(self) -> jax.Array:
        """In nats (...)."""
        return gaussian_entropy(self.log_std)


class SquashedGaussian(NamedTuple):
    """Actions (..., A) between -1 and 1: tanh of independent normal distributions, `mean` and `log_std` (..., A)."""

    mean: jax.Array
    log_std: jax.Array

    def noise(self, key: jax.Array, steps: int) -> jax.Array:
        """What `draw` needs for `steps` policies of this shape, drawn at once (steps, ..., A)."""
        return jax.random.normal(key, (steps, *self.mean.shape))

    def draw(self, noise: jax.Array) -> jax.Array:
        """An action (..., A)."""
        return squash(self.mean + jnp.exp(self.log_std) * noise)[0]

    def sample(self, key: jax.Array) -> jax.Array:
        """An action (..., A)."""
        return self.draw(self.noise(key, 1)[0])

    def mode(self) -> jax.Array:
        """The squashed mean (..., A): the median, which stands for a mode that has no closed form."""
        return squash(self.mean)[0]

    def log_prob(self, action: jax.Array) -> jax.Array:
        """Log-density (...) of actions (..., A); one on a bound counts as the last number before it."""
        return tanh_gaussian_log_prob(self.mean, self.log_std, action)

    def entropy(self) -> jax.Array:
        """In nats (...), by quadrature."""
        return tanh_gaussian_entropy(self.mean, self.log_std)


Policy = Categorical | Gaussian | SquashedGaussian
POLICIES = (Categorical, Gaussian, SquashedGaussian)


class Bounds(NamedTuple):
    """A box of actions: `low` and `high`, shape (A,) or that of an action."""

    low: np.ndarray
    high: np.ndarray


def bounds(space: Any) -> Bounds:
    """Bounds of a gymnax Box. Raises ValueError for a box that is not finite: policies are scaled to it."""
    # In NumPy, as this may be asked for while a whole training run is being traced.
    low, high = (np.broadcast_to(np.asarray(x, np.float32), space.shape) for x in (space.low, space.high))
    if not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()):
        raise ValueError(f"action space is a Box from {low} to {high}, expected finite bounds, low below high")
    return Bounds(low, high)


def to_box(box: Bounds, action: jax.Array) -> jax.Array:
    """Unbounded actions (..., *shape), for which -1 and 1 are the bounds, as actions of the environment; beyond the
    bounds they are clipped, and their density is still that of the unbounded action, as in most implementations of PPO
    (Huang et al., "The 37 implementation details of PPO", 2022). Raises ValueError for actions of another shape, and
    for integers, which are of a policy over a Discrete space."""
    shape = action.shape[action.ndim - box.low.ndim :]
    if shape != box.low.shape or not jnp.issubdtype(action.dtype, jnp.floating):
        raise ValueError(
            f"to_box: actions are {action.dtype} of shape {action.shape}, expected floats whose last axes are "
            f"{box.low.shape}: the network must be made for the environment's action space"
        )
    lead = (1,) * (action.ndim - box.low.ndim)
    low, high = (jnp.asarray(x).reshape(*lead, *x.shape) for x in box)
    return low + (jnp.clip(action, -1.0, 1.0) + 1.0) * 0.5 * (high - low)


def from_box(box: Bounds, action: jax.Array) -> jax.Array:
    """The inverse of `to_box`: actions of the environment (..., *shape) with the bounds at -1 and 1."""
    lead = (1,) * (action.ndim - box.low.ndim)
    low, high = (jnp.asarray(x).reshape(*lead, *x.shape) for x in box)
    return 2.0 * (action - low) / (high - low) - 1.0

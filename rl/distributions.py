"""Log-probabilities, samples and entropies of the policies' distributions, over the last axis."""

import math

import jax
import jax.numpy as jnp


def categorical_log_prob(logits: jax.Array, action: jax.Array) -> jax.Array:
    """Logits (..., A), integer actions (...)."""
    chosen = jnp.take_along_axis(logits, action[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def gaussian_log_prob(mean: jax.Array, log_std: jax.Array, value: jax.Array) -> jax.Array:
    """Diagonal Gaussian density in nats; all (..., Z) to (...)."""
    scaled = (value - mean) * jnp.exp(-log_std)
    return -(0.5 * jnp.square(scaled) + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)


def gaussian_sample(key: jax.Array, mean: jax.Array, log_std: jax.Array) -> jax.Array:
    """A sample of the diagonal Gaussian, shape of `mean`."""
    return mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)


def gaussian_entropy(log_std: jax.Array) -> jax.Array:
    """Entropy in nats of the diagonal Gaussian; (..., Z) to (...)."""
    return (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)

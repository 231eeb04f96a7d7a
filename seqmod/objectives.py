"""Losses of sequence models: per-step negative log-likelihoods, and their mean over the steps that count."""

import itertools

import jax
import jax.numpy as jnp


def categorical_nll(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-log softmax(logits)[label] in nats; logits (..., A), integer labels (...)."""
    return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]


def factored_nll(logits: jax.Array, one_hot: jax.Array, factors: tuple[int, ...]) -> jax.Array:
    """Negative log-likelihood, summed over factors, of an observation made of one-hot codes.

    `logits` and `one_hot` are (..., F) with F = sum(factors); each factor has its own softmax. Returns (...), in nats.
    """
    if logits.shape[-1] != sum(factors):
        raise ValueError(f"factored_nll: logits have {logits.shape[-1]} features, expected sum{factors}")
    # A one-hot factor's likelihood is logsumexp minus the chosen logit; the chosen logits of all factors are one sum.
    total = -(logits * one_hot).sum(-1)
    start = 0
    for size, run in itertools.groupby(factors):
        count = len(list(run))
        block = logits[..., start : start + size * count].reshape(*logits.shape[:-1], count, size)
        total = total + jax.nn.logsumexp(block, axis=-1).sum(-1)
        start += size * count
    return total


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of `values` where `mask` is true; 0 where it is true nowhere."""
    weights = mask.astype(values.dtype)
    return (values * weights).sum() / jnp.maximum(weights.sum(), 1)

"""Losses of sequence models: per-step negative log-likelihoods, and their mean over the steps that count."""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from seqmod.mixers.base import segment_runs


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


def distribution_nll(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Cross-entropy -sum_a target_a log softmax(logits)_a in nats, for targets that are distributions (..., A)."""
    # Where the target is zero there is no loss, be the logit -inf.
    log_prob = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.where(target > 0, target * log_prob, 0.0).sum(-1)


def step_weights(
    length: int,
    ahead: int = 1,
    *,
    segment_ids: jax.Array | None = None,
    mask_BL: jax.Array | None = None,
    prompt_length_B: jax.Array | None = None,
) -> jax.Array:
    """Weights (B or 1, L), 1 where a step may be asked for what comes `ahead` steps later, else 0.

    The later step must exist, be of the same segment, be valid under `mask_BL`, and lie behind the row's prompt of
    `prompt_length_B` tokens: of a prompt and a response, only the response's tokens are learned.
    """
    if ahead < 1:
        raise ValueError(f"step_weights: ahead is {ahead}, expected at least 1")
    later_BL = jnp.arange(length)[None] + ahead
    weights_BL = later_BL < length
    if segment_ids is not None:
        runs_BL = segment_runs(segment_ids)
        weights_BL = weights_BL & (runs_BL == shift(runs_BL, ahead))
    if mask_BL is not None:
        weights_BL = weights_BL & mask_BL & shift(mask_BL, ahead)
    if prompt_length_B is not None:
        weights_BL = weights_BL & (later_BL >= prompt_length_B[:, None])
    return weights_BL.astype(jnp.float32)


def shift(x_BL: jax.Array, ahead: int) -> jax.Array:
    """What comes `ahead` steps later, (B, L, ...); the last see the first, which `step_weights` excludes."""
    return jnp.roll(x_BL, -ahead, axis=1)


def next_token(logits_BLA: jax.Array, tokens_BL: jax.Array, weights_BL: jax.Array | None = None) -> jax.Array:
    """Mean negative log-likelihood of each step's successor; weights as from `step_weights`."""
    if weights_BL is None:
        weights_BL = step_weights(tokens_BL.shape[1])
    return masked_mean(categorical_nll(logits_BLA, shift(tokens_BL, 1)), jnp.broadcast_to(weights_BL, tokens_BL.shape))


def next_observation(
    logits_BLF: jax.Array, one_hot_BLF: jax.Array, factors: tuple[int, ...], weights_BL: jax.Array | None = None
) -> jax.Array:
    """Mean negative log-likelihood of the next step's observation, made of one-hot codes; see `factored_nll`."""
    B, L = one_hot_BLF.shape[:2]
    if weights_BL is None:
        weights_BL = step_weights(L)
    return masked_mean(factored_nll(logits_BLF, shift(one_hot_BLF, 1), factors), jnp.broadcast_to(weights_BL, (B, L)))


def future_tokens(
    logits_BLNA: jax.Array, tokens_BL: jax.Array, decay: float = 1.0, weights_BL: jax.Array | None = None
) -> jax.Array:
    """Mean negative log-likelihood of each step's next N tokens, the i-th weighted by decay^(i-1) (Walker, arXiv
    2410.18160). `weights_BL`, a mask of steps that may be predicted, is for what `step_weights` does not know of."""
    N, (B, L) = logits_BLNA.shape[2], tokens_BL.shape
    total, count = jnp.zeros(()), jnp.zeros(())
    for i in range(N):
        weight_BL = decay**i * jnp.broadcast_to(step_weights(L, i + 1), (B, L))
        if weights_BL is not None:
            weight_BL = weight_BL * shift(weights_BL, i + 1)
        total += (weight_BL * categorical_nll(logits_BLNA[:, :, i], shift(tokens_BL, i + 1))).sum()
        count += weight_BL.sum()
    return total / jnp.maximum(count, 1e-9)


class Corrupted(NamedTuple):
    """Tokens (B, L) with some of them hidden, and which are to be predicted, (B, L)."""

    tokens_BL: jax.Array
    hidden_BL: jax.Array


def corrupt(
    key: jax.Array,
    tokens_BL: jax.Array,
    vocabulary: int,
    mask_token: int,
    *,
    rate: float = 0.15,
    mask_BL: jax.Array | None = None,
) -> Corrupted:
    """Hide tokens for a bidirectional model to predict (Devlin et al., arXiv 1810.04805).

    Each valid token is chosen with probability `rate`; of the chosen 80% become `mask_token`, 10% a token of the
    vocabulary, 10% stay.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"corrupt: rate is {rate}, expected 0 to 1")
    k_hide, k_how, k_token = jax.random.split(key, 3)
    hidden_BL = jax.random.bernoulli(k_hide, rate, tokens_BL.shape)
    if mask_BL is not None:
        hidden_BL = hidden_BL & mask_BL
    how_BL = jax.random.uniform(k_how, tokens_BL.shape)
    other_BL = jax.random.randint(k_token, tokens_BL.shape, 0, vocabulary, tokens_BL.dtype)
    noisy_BL = jnp.where(how_BL < 0.8, mask_token, jnp.where(how_BL < 0.9, other_BL, tokens_BL))
    return Corrupted(jnp.where(hidden_BL, noisy_BL, tokens_BL), hidden_BL)


def masked_token(logits_BLA: jax.Array, tokens_BL: jax.Array, hidden_BL: jax.Array) -> jax.Array:
    """Mean negative log-likelihood of the tokens that were hidden."""
    return masked_mean(categorical_nll(logits_BLA, tokens_BL), hidden_BL)

"""Policy and value losses as pure functions of log-probabilities, advantages and values.

Advantages and targets are constants: no gradient flows into them. Averages are over the entries where a mask is true;
what stands elsewhere has no influence, whatever it is. For regression onto TD targets see `optax.losses`.
"""

from typing import Literal

import jax
import jax.numpy as jnp

Level = Literal["token", "sequence"]


def group_advantage(return_B: jax.Array, epsilon: float = 1e-3) -> jax.Array:
    """Critic-free advantage of each episode in a group that shares one task: (R - mean R) / (std R + epsilon).

    Equal returns give exactly zero. Source: GRPO (Shao et al., arXiv 2402.03300); epsilon as in arXiv 2512.20605, C.5.
    """
    # Advantages ignore a shift; shifted by one of them, equal returns are zeros, whose mean has no rounding error.
    shifted_B = return_B - return_B[0]
    return (shifted_B - shifted_B.mean()) / (shifted_B.std() + epsilon)


def normalise_advantage(advantage: jax.Array, mask: jax.Array, epsilon: float = 1e-8) -> jax.Array:
    """Advantages shifted and scaled to mean 0 and standard deviation 1 over `mask` (same shape), and 0 elsewhere.

    Equal advantages give exactly zero. Source: Huang et al., "The 37 implementation details of PPO", detail 7.
    """
    # Shifted by one of them, equal ones are zeros, whose mean has no rounding error. The largest is found by a
    # reduction, so that what is spread over devices stays there.
    shifted = jnp.where(mask, advantage - jnp.where(mask, advantage, -jnp.inf).max(), 0.0)
    centred = jnp.where(mask, shifted - _mean(shifted, mask), 0.0)
    return centred / (jnp.sqrt(_mean(jnp.square(centred), mask)) + epsilon)


def policy_gradient_loss(log_prob: jax.Array, advantage: jax.Array, mask: jax.Array) -> jax.Array:
    """REINFORCE: minus log-probability times advantage, averaged over `mask` (all shapes equal). A scalar to minimise.

    Source: Sutton & Barto, Reinforcement Learning, 2nd edition, section 13.4.
    """
    return -_mean(jnp.where(mask, log_prob, 0.0) * _constant(advantage, mask), mask)


def clip_loss(
    log_prob: jax.Array,
    old_log_prob: jax.Array,
    advantage: jax.Array,
    mask: jax.Array,
    clip: float | jax.Array,
    clip_high: float | jax.Array | None = None,
    level: Level = "token",
) -> jax.Array:
    """PPO's clipped surrogate with ratios kept in [1 - clip, 1 + clip_high]. A scalar to minimise; all shapes equal.

    `clip_high` is `clip` unless given. At level "token" every entry has its own ratio, and the average is over entries,
    as in PPO and DAPO; GRPO's is over each sequence first.
    At level "sequence" the entries along the last axis share the sequence's ratio, and the average is over sequences
    (those with any entry in `mask`), whatever their lengths. Raises ValueError for another level.

    Source: Schulman et al., arXiv 1707.06347, equation 7; the two bounds: DAPO, Yu et al., arXiv 2503.14476, section
    3.1; the sequence level: GSPO, Zheng et al., arXiv 2507.18071, equation 5.
    """
    advantage = _constant(advantage, mask)
    if level == "token":
        ratio, weight = jnp.exp(jnp.where(mask, log_prob - old_log_prob, 0.0)), mask
    elif level == "sequence":
        ratio = jnp.broadcast_to(sequence_ratio(log_prob, old_log_prob, mask)[..., None], log_prob.shape)
        weight = mask / jnp.maximum(mask.sum(-1, keepdims=True), 1)
    else:
        raise ValueError(f"clip_loss: level is {level!r}, expected 'token' or 'sequence'")
    clipped = jnp.clip(ratio, 1 - clip, 1 + (clip if clip_high is None else clip_high))
    surrogate = jnp.minimum(ratio * advantage, clipped * advantage)
    return -_mean(surrogate, weight)


def sequence_ratio(log_prob: jax.Array, old_log_prob: jax.Array, mask: jax.Array) -> jax.Array:
    """Geometric mean of the probability ratios of a sequence; (..., L) to (...), and 1 for an empty one.

    Source: GSPO, Zheng et al., arXiv 2507.18071, equation 7.
    """
    log_ratio = jnp.where(mask, log_prob - old_log_prob, 0.0)
    return jnp.exp(log_ratio.sum(-1) / jnp.maximum(mask.sum(-1), 1))


def value_loss(
    value: jax.Array,
    target: jax.Array,
    mask: jax.Array,
    old_value: jax.Array | None = None,
    clip: float | jax.Array | None = None,
) -> jax.Array:
    """Half the squared error, averaged over `mask` (all shapes equal). A scalar to minimise.

    With `old_value`, the values when the data were collected, and `clip`, PPO's clipped form: the larger of the error
    and that of the value kept within `clip` of the old one. Raises ValueError where only one of the two is given.

    Source: Huang et al., "The 37 implementation details of PPO", detail 9; Engstrom et al., arXiv 2005.12729.
    """
    if (old_value is None) != (clip is None):
        given, missing = ("clip", "old_value") if old_value is None else ("old_value", "clip")
        raise ValueError(f"value_loss: {given} is given but {missing} is None, expected both or neither")
    value, target = jnp.where(mask, value, 0.0), _constant(target, mask)
    square = jnp.square(value - target)
    if old_value is not None and clip is not None:
        old_value = _constant(old_value, mask)
        near = old_value + jnp.clip(value - old_value, -clip, clip)
        square = jnp.maximum(square, jnp.square(near - target))
    return 0.5 * _mean(square, mask)


def approximate_kl(log_prob: jax.Array, old_log_prob: jax.Array, mask: jax.Array) -> jax.Array:
    """Non-negative low-variance estimate of KL(old, new): mean of r - 1 - log r over `mask`."""
    log_ratio = jnp.where(mask, log_prob - old_log_prob, 0.0)
    return _mean(jnp.exp(log_ratio) - 1 - log_ratio, mask)


def _mean(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Weighted mean, 0 where all weights are."""
    return (x * weight).sum() / jnp.maximum(weight.sum(), 1)


def _constant(x: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.where(mask, jax.lax.stop_gradient(x), 0.0)

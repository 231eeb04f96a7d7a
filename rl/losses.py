"""Policy-gradient losses as pure functions of log-probabilities and advantages."""

import jax
import jax.numpy as jnp


def group_advantage(return_B: jax.Array, epsilon: float = 1e-3) -> jax.Array:
    """Critic-free advantage of each episode in a group that shares one task: (R - mean R) / (std R + epsilon).

    Equal returns give exactly zero. Source: GRPO (Shao et al., arXiv 2402.03300); epsilon as in arXiv 2512.20605, C.5.
    """
    # Advantages ignore a shift; shifted by one of them, equal returns are zeros, whose mean has no rounding error.
    shifted_B = return_B - return_B[0]
    return (shifted_B - shifted_B.mean()) / (shifted_B.std() + epsilon)


def clip_loss(
    log_prob: jax.Array, old_log_prob: jax.Array, advantage: jax.Array, mask: jax.Array, clip: float | jax.Array
) -> jax.Array:
    """PPO's clipped surrogate, averaged over the entries where `mask` is true (all shapes equal). A scalar to minimise.

    Source: Schulman et al., arXiv 1707.06347, equation 7.
    """
    ratio = jnp.exp(jnp.where(mask, log_prob - old_log_prob, 0.0))
    clipped = jnp.clip(ratio, 1 - clip, 1 + clip)
    surrogate = jnp.minimum(ratio * advantage, clipped * advantage)
    return -(surrogate * mask).sum() / jnp.maximum(mask.sum(), 1)


def approximate_kl(log_prob: jax.Array, old_log_prob: jax.Array, mask: jax.Array) -> jax.Array:
    """Non-negative low-variance estimate of KL(old, new): mean of r - 1 - log r over `mask`."""
    log_ratio = jnp.where(mask, log_prob - old_log_prob, 0.0)
    return ((jnp.exp(log_ratio) - 1 - log_ratio) * mask).sum() / jnp.maximum(mask.sum(), 1)

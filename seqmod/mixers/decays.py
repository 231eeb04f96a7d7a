"""What mixers with decays share: decays over several steps as they are defined, and how step sizes start."""

import math

import jax
import jax.numpy as jnp

from seqmod.mixers.base import same_segment


def past_steps(length: int, segment_ids: jax.Array | None = None) -> jax.Array:
    """Whether output t depends on step s at all, [t, s] of (1 or B, L, L): s is not later and of the same segment."""
    past_1LM = jnp.tril(jnp.ones((1, length, length), bool))
    return past_1LM if segment_ids is None else past_1LM & same_segment(segment_ids)


def decay_products(log_decay: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """What is left at step t of what entered at step s, (B, H, L, L) or (B, H, L, L, K).

        w_ts = exp(g_{s+1} + .. + g_t)    if s <= t is of the segment of t, else 0

    of log-decays g <= 0, (B, L, H) or (B, L, H, K). The sums are formed one by one, not as differences of sums from the
    start, which would lose their digits; no exponent is positive.
    """
    L = log_decay.shape[1]
    channels = (1,) * (log_decay.ndim - 3)
    g_BHL = jnp.moveaxis(log_decay, 2, 1)
    after_LM = jnp.tril(jnp.ones((L, L), bool), -1).reshape(1, 1, L, L, *channels)
    sums_BHLM = jnp.cumsum(jnp.where(after_LM, g_BHL[:, :, :, None], 0), axis=2)
    past_BLM = past_steps(L, segment_ids)
    past_BHLM = past_BLM.reshape(past_BLM.shape[0], 1, L, L, *channels)
    return jnp.exp(jnp.where(past_BHLM, sums_BHLM, -jnp.inf))


def step_size_bias(
    key: jax.Array, shape: tuple[int, ...], smallest: float = 1e-3, largest: float = 0.1, floor: float = 1e-4
) -> jax.Array:
    """Biases whose softplus is log-uniform in [smallest, largest], but not below the floor (arXiv 2312.00752, 3.6)."""
    logs = jax.random.uniform(key, shape, minval=math.log(smallest), maxval=math.log(largest))
    sizes = jnp.maximum(jnp.exp(logs), floor)
    return sizes + jnp.log(-jnp.expm1(-sizes))

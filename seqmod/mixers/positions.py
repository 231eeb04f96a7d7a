"""How softmax attention tells positions apart: T5's buckets, ALiBi's slopes, rotary embeddings.

T5      b_h[bucket(t - s)] is added to the score of query t and key s        (Raffel et al., arXiv 1910.10683, 2.1)
ALiBi   -m_h |t - s| is added,  m_h = 2^(-8 h / H),  h = 1 .. H              (Press et al., arXiv 2108.12409)
RoPE    channels i and i + R/2 of queries and keys turn by t base^(-2i/R)    (Su et al., arXiv 2104.09864)
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from seqmod.mixers.base import segment_runs


def bucket(distance: jax.Array, buckets: int, max_distance: int, *, causal: bool = True) -> jax.Array:
    """T5's bucket of a key `distance` steps before the query (after it, if negative).

    Causal: half of the buckets hold one distance each, the others divide the logarithm up to `max_distance` evenly;
    later keys count as distance 0. Otherwise earlier keys have one half of the buckets and later keys the other.
    """
    if not causal:
        half = buckets // 2
        return bucket(jnp.abs(distance), half, max_distance) + jnp.where(distance < 0, half, 0)
    distance = jnp.maximum(distance, 0)
    exact = buckets // 2
    ratio = jnp.log(jnp.maximum(distance, 1) / exact) / jnp.log(max_distance / exact)
    far = exact + (ratio * (buckets - exact)).astype(jnp.int32)
    return jnp.where(distance < exact, distance, jnp.minimum(far, buckets - 1))


def alibi_slopes(heads: int) -> np.ndarray:
    """ALiBi's slopes m (H,). For a number of heads that is no power of two, those of the power below, then every other
    one of the power above, as the authors have it."""
    power = 1 << (heads.bit_length() - 1)
    slopes_H = 2.0 ** (-8 * np.arange(1, power + 1) / power)
    between_H = 2.0 ** (-8 * np.arange(1, 2 * power, 2) / (2 * power))
    return np.concatenate([slopes_H, between_H])[:heads].astype(np.float32)


@dataclass(frozen=True)
class RopeScaling:
    """RoPE slowed down for sequences longer than those trained on.

    Without a `context`, all frequencies are divided by `factor`, which is position interpolation (arXiv 2306.15595).
    With the `context` C of training, as in Llama 3.1 (arXiv 2407.21783, as its published configs say), those
    that turn more than `high` times in C steps stay as they are, those that turn less than `low` times are divided, and
    those between pass linearly from one to the other.
    """

    factor: float
    context: int | None = None
    low: float = 1.0
    high: float = 4.0

    def __post_init__(self) -> None:
        if self.factor <= 0 or not 0 < self.low < self.high or (self.context is not None and self.context < 1):
            raise ValueError(
                f"RopeScaling: got {self}, expected a positive factor and context, and low between 0 and high"
            )


def frequencies(base: float, channels: int, scaling: RopeScaling | None = None) -> np.ndarray:
    """RoPE's angles per step (R/2,), in float64, of `channels` R."""
    frequency_R = base ** (-np.arange(channels // 2) / (channels // 2))
    if scaling is None:
        return frequency_R
    kept_R = np.zeros_like(frequency_R)
    if scaling.context is not None:
        turns_R = scaling.context * frequency_R / (2 * math.pi)
        kept_R = np.clip((turns_R - scaling.low) / (scaling.high - scaling.low), 0, 1)
    return kept_R * frequency_R + (1 - kept_R) * frequency_R / scaling.factor


def rotate(x: jax.Array, position: jax.Array, frequency_R: np.ndarray) -> jax.Array:
    """x (..., H, K) at `position` (...), its first R channels turned by `frequencies` (R/2,); half-split pairs, as in
    GPT-NeoX and Llama.

    `position` broadcasts against the leading axes of x. Computed in float32 at least.
    """
    half = len(frequency_R)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    speed_R = jnp.asarray(frequency_R, wide.dtype).reshape((1,) * (position.ndim + 1) + (-1,))
    angle = position[..., None, None] * speed_R
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1).astype(x.dtype)


def positions(length: int, segment_ids: jax.Array | None) -> jax.Array:
    """Position (1, L), or (B, L) with segments, of each step in its segment."""
    position_BL = jnp.arange(length)[None]
    if segment_ids is None:
        return position_BL
    runs_BL = segment_runs(segment_ids)
    starts_BL = jnp.pad(runs_BL[:, 1:] != runs_BL[:, :-1], ((0, 0), (1, 0)))
    return position_BL - jax.lax.cummax(jnp.where(starts_BL, position_BL, 0), axis=1)

"""How softmax attention tells positions apart: T5's buckets, ALiBi's slopes, rotary embeddings.

T5      b_h[bucket(t - s)] is added to the score of query t and key s        (Raffel et al., arXiv 1910.10683, 2.1)
ALiBi   -m_h |t - s| is added,  m_h = 2^(-8 h / H),  h = 1 .. H              (Press et al., arXiv 2108.12409)
RoPE    channels i and i + R/2 of queries and keys turn by t base^(-2i/R)    (Su et al., arXiv 2104.09864)
"""

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


def rotate(x: jax.Array, position: jax.Array, base: float, channels: int) -> jax.Array:
    """x (..., H, K) at `position` (...), its first `channels` R turned; half-split pairs, as in GPT-NeoX and Llama.

    `position` broadcasts against the leading axes of x. Computed in float32 at least.
    """
    half = channels // 2
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    frequency_R = base ** (-jnp.arange(half, dtype=wide.dtype) / half)
    angle = position[..., None, None] * frequency_R.reshape((1,) * (position.ndim + 1) + (-1,))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second, rest = wide[..., :half], wide[..., half:channels], wide[..., channels:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1).astype(x.dtype)


def positions(length: int, segment_ids: jax.Array | None) -> jax.Array:
    """Position (1, L), or (B, L) with segments, of each step in its segment."""
    position_BL = jnp.arange(length)[None]
    if segment_ids is None:
        return position_BL
    runs_BL = segment_runs(segment_ids)
    starts_BL = jnp.pad(runs_BL[:, 1:] != runs_BL[:, :-1], ((0, 0), (1, 0)))
    return position_BL - jax.lax.cummax(jnp.where(starts_BL, position_BL, 0), axis=1)

"""What the kernels of linear attention read of log-decays per head and of segments, a few rows a chunk."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.linear_attention.chunked import clamp


class Rows(NamedTuple):
    """What a kernel reads of one chunk as rows (1, C), float32: sums of log-decays, zero without, and segments.

    `coarse` and `fine` add up to the sums up to each step (see `chunked.sum_between`), `until` is the same in one
    piece, `after` the sum behind each step; `segment` counts segments, `before` is that of the step before the chunk.
    """

    coarse: jax.Array
    fine: jax.Array
    until: jax.Array
    after: jax.Array
    segment: jax.Array
    before: jax.Array


def chunk_rows(g_BHL: jax.Array | None, index_BL: jax.Array, heads: int, C: int) -> jax.Array:
    """`Rows` of all chunks as one array (B, H, N, 8, C), the last two rows empty."""
    B, L = index_BL.shape
    index = jnp.broadcast_to(index_BL.reshape(B, 1, -1, C), (B, heads, L // C, C)).astype(jnp.float32)
    before = jnp.concatenate([index[:, :, :1, :1], index[:, :, :-1, -1:]], axis=2)
    rows = {"segment": index, "before": jnp.broadcast_to(before, index.shape)}
    if g_BHL is None:
        rows |= dict.fromkeys(("coarse", "fine", "until", "after"), jnp.zeros_like(index))
    else:
        g = clamp(g_BHL.astype(jnp.float32)).reshape(index.shape)
        coarse = jnp.round(g * 256) / 256
        rows |= {"coarse": jnp.cumsum(coarse, axis=3), "fine": jnp.cumsum(g - coarse, axis=3)}
        rows["until"] = jnp.cumsum(g, axis=3)
        rows["after"] = jax.lax.cumsum(jnp.pad(g[..., 1:], ((0, 0),) * 3 + ((0, 1),)), axis=3, reverse=True)
    return jnp.pad(jnp.stack(Rows(**rows), axis=3), ((0, 0),) * 3 + ((0, 2), (0, 0)))

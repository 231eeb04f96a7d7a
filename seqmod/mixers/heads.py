"""What the efficient attentions share: projections to heads, masked scores, landmarks, a context before its queries."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from seqmod.mixers.base import Context, Params, check_heads, project, scaled_normal, segment_runs


def check_sizes(name: str, width: int, heads: int, **sizes: int) -> None:
    """Raise ValueError where heads do not divide the width, or a size is not positive."""
    check_heads(name, width, heads)
    for argument, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: {argument} is {size}, expected at least 1")


def init(key: jax.Array, width: int, heads: int, scale: float) -> Params:
    """Parameters: `qkv` (D, 3, H, K) and `out` (H, K, D), for heads that share the width."""
    k_qkv, k_out = jax.random.split(key)
    K = width // heads
    return {
        "qkv": scaled_normal(k_qkv, (width, 3, heads, K), width, scale),
        "out": scaled_normal(k_out, (heads, K, width), width, scale),
    }


def split(params: Params, x: jax.Array, context: jax.Array | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries (..., H, K) of x (..., D), keys and values of the context if there is one."""
    if context is None:
        q, k, v = project("...D,DGHK->G...HK", x, params["qkv"])
        return q, k, v
    k, v = project("...D,DGHK->G...HK", context, params["qkv"][:, 1:])
    return project("...D,DHK->...HK", x, params["qkv"][:, 0]), k, v


def values(params: Params, config: Any, x_BLD: jax.Array, segments_BL: jax.Array | None = None) -> jax.Array:
    """Values (B, L, H, K), as `Linear` has them; those of a step depend on no other."""
    return project("BLD,DHK->BLHK", x_BLD, params["qkv"][:, 2])


def read_out(params: Params, config: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """Output (..., D), in the type of x, from what the heads have read (..., H, K)."""
    return project("...HK,HKD->...D", y.astype(x.dtype), params["out"])


def wide(x: jax.Array) -> jax.Array:
    """x in float32 at least."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def hide(scores: jax.Array, visible: jax.Array) -> jax.Array:
    """Scores, so low where not visible that a softmax gives exactly zero there."""
    return jnp.where(visible, scores, -1e30)


def as_mask(x_BLD: jax.Array, mask_BL: jax.Array | None) -> jax.Array:
    """The mask of valid steps (B, L), all of them if none is given."""
    return jnp.ones(x_BLD.shape[:2], bool) if mask_BL is None else mask_BL.astype(bool)


def blank(x_BLD: jax.Array, mask_BL: jax.Array) -> jax.Array:
    """Zeros at steps that are not valid, so that not even a NaN there can matter."""
    return jnp.where(mask_BL[..., None], x_BLD, 0)


def landmark_shares(mask_BL: jax.Array, landmarks: int) -> tuple[jax.Array, jax.Array]:
    """Shares (B, L, R) of the valid steps in R means of adjacent steps, and which of these exist (B, R).

    n valid steps make min(R, n) segments, the first of n // R steps and the last, where R does not divide n, of one
    more; so they depend on the valid steps alone, whatever padding lies before, between or after them.
    """
    L = mask_BL.shape[1]
    R = min(landmarks, L)
    length_B1 = mask_BL.sum(1, keepdims=True)
    rank_BL = jnp.cumsum(mask_BL, axis=1) - 1
    live_B1 = jnp.clip(length_B1, 1, R)
    size_B1 = jnp.maximum(length_B1 // live_B1, 1)
    short_B1 = live_B1 - length_B1 % live_B1
    beyond_BL = rank_BL - short_B1 * size_B1
    landmark_BL = jnp.where(beyond_BL < 0, rank_BL // size_B1, short_B1 + beyond_BL // (size_B1 + 1))
    slots_R = jnp.arange(R)
    member_BLR = (landmark_BL[..., None] == slots_R[None, None]) & mask_BL[..., None]
    shares_BLR = member_BLR / jnp.maximum(member_BLR.sum(1, keepdims=True), 1)
    return shares_BLR.astype(jnp.float32), slots_R[None] < live_B1


def positions(x_BLD: jax.Array, segments_BL: jax.Array | None) -> jax.Array:
    """Steps (B, L) since the start of a step's own segment."""
    B, L = x_BLD.shape[:2]
    steps_BL = jnp.broadcast_to(jnp.arange(L)[None], (B, L))
    if segments_BL is None:
        return steps_BL
    runs_BL = segment_runs(segments_BL)
    first_BL = jnp.pad(runs_BL[:, 1:] != runs_BL[:, :-1], ((0, 0), (1, 0)))
    return steps_BL - jax.lax.cummax(jnp.where(first_BL, steps_BL, 0), axis=1)


class Joined(NamedTuple):
    """A context and the queries that read it as one sequence, each segment's context right before its queries.

    A causal linear attention over it, with keys of no weight at the queries, is cross attention at linear cost, and its
    segments `ids_BN` keep each other's context out.
    """

    ids_BN: jax.Array | None
    order_BN: jax.Array | None
    context_length: int

    def join(self, context: jax.Array, queries: jax.Array) -> jax.Array:
        """(B, M, ...) and (B, L, ...) as (B, M + L, ...)."""
        joined = jnp.concatenate([context, queries], axis=1)
        return joined if self.order_BN is None else _take(joined, self.order_BN)

    def queries(self, joined: jax.Array) -> jax.Array:
        """The part (B, L, ...) of the queries."""
        if self.order_BN is not None:
            joined = _take(joined, jnp.argsort(self.order_BN, axis=1))
        return joined[:, self.context_length :]


def join_context(segments_BL: jax.Array | None, context: Context) -> Joined:
    """Raises ValueError where the context has segments and the queries have none."""
    M = context.x_BMD.shape[1]
    if context.segments_BM is None:
        return Joined(None, None, M)
    if segments_BL is None:
        raise ValueError(
            "context: it has segments, but the queries have none: give the queries the segment_ids that they read"
        )
    ids_BN = jnp.concatenate([context.segments_BM.astype(jnp.int32), segments_BL.astype(jnp.int32)], axis=1)
    order_BN = jnp.argsort(ids_BN, axis=1, stable=True)
    return Joined(_take(ids_BN, order_BN), order_BN, M)


def _take(x: jax.Array, order_BN: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, order_BN.reshape(*order_BN.shape, *(1,) * (x.ndim - 2)), axis=1)

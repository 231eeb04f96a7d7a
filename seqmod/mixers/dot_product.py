"""Softmax attention of given queries, keys and values: dense, or in blocks where a window makes most of it empty.

Heads are grouped: head h of H reads head h G // H of the G heads of keys and values.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from seqmod.mixers.base import segment_runs
from seqmod.rows import map_rows

# Sequences longer than this attend by so many queries at a time, whose scores are computed again for the gradient.
LONG, ROWS = 1024, 128

Bias = Callable[[jax.Array], jax.Array | None]


def attend(
    q_BLHK: jax.Array,
    k_BMGK: jax.Array,
    v_BMGK: jax.Array,
    bias_HLM: jax.Array | None = None,
    mask_BLM: jax.Array | None = None,
    *,
    scale: float,
    soft_cap: float | None = None,
) -> jax.Array:
    """softmax(scale q k + bias) v, (B, L, H, K), over the keys where the mask (B or 1, L, M) is true.

    `soft_cap` makes cap tanh(score / cap) of the scaled scores, before the bias. Softmax is in float32 at least.
    """
    if bias_HLM is None and mask_BLM is None and soft_cap is None and fuses(q_BLHK):
        return jax.nn.dot_product_attention(q_BLHK, k_BMGK, v_BMGK, scale=scale, implementation="cudnn")
    # One key head per query head: a CPU does a product over groups several times slower, and scores are larger anyway.
    heads = q_BLHK.shape[2] // k_BMGK.shape[2]
    k_BMHK, v_BMHK = jnp.repeat(k_BMGK, heads, axis=2), jnp.repeat(v_BMGK, heads, axis=2)
    wide = jnp.promote_types(q_BLHK.dtype, jnp.float32)
    scores_BHLM = jnp.einsum("BLHK,BMHK->BHLM", q_BLHK, k_BMHK, preferred_element_type=wide) * scale
    if soft_cap is not None:
        scores_BHLM = soft_cap * jnp.tanh(scores_BHLM / soft_cap)
    if bias_HLM is not None:
        scores_BHLM = scores_BHLM + bias_HLM[None]
    if mask_BLM is not None:
        scores_BHLM = jnp.where(mask_BLM[:, None], scores_BHLM, -1e30)
    weights_BHLM = jax.nn.softmax(scores_BHLM, axis=-1).astype(v_BMHK.dtype)
    return jnp.einsum("BHLM,BMHK->BLHK", weights_BHLM, v_BMHK)


def attend_self(
    q_BLHK: jax.Array,
    k_BLGK: jax.Array,
    v_BLGK: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    causal: bool,
    scale: float,
    window: int | None = None,
    bias: Bias | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """Attention (B, L, H, K) of a sequence to itself, each segment for itself.

    Of its own segment a step sees, where causal, the last `window` steps with its own, else that many to each side
    and its own; None is all. `bias` gives what is added to the scores (H, ...) of keys some steps back (...).
    """
    L = q_BLHK.shape[1]
    plain = bias is None and soft_cap is None and segment_ids is None
    if plain and (window is None or causal) and fuses(q_BLHK):
        return jax.nn.dot_product_attention(
            q_BLHK,
            k_BLGK,
            v_BLGK,
            scale=scale,
            is_causal=causal,
            local_window_size=None if window is None else (window - 1, 0),
            implementation="cudnn",
        )
    if window is not None and 4 * block_length(window) <= L:
        return _attend_in_blocks(
            q_BLHK, k_BLGK, v_BLGK, segment_ids, causal=causal, scale=scale, window=window, bias=bias, soft_cap=soft_cap
        )
    runs_BL = None if segment_ids is None else segment_runs(segment_ids)

    def some(rows: tuple[jax.Array, jax.Array, jax.Array | None]) -> jax.Array:
        """Attention of C queries to all keys."""
        q_BCHK, step_1C, runs_BC = rows
        distance_CL = step_1C[0][:, None] - jnp.arange(L)[None]
        mask_BCL = visible(distance_CL, causal, window)[None] if causal or window is not None else None
        if runs_BL is not None and runs_BC is not None:
            same_BCL = runs_BC[:, :, None] == runs_BL[:, None]
            mask_BCL = same_BCL if mask_BCL is None else mask_BCL & same_BCL
        bias_HCL = None if bias is None else bias(distance_CL)
        return attend(q_BCHK, k_BLGK, v_BLGK, bias_HCL, mask_BCL, scale=scale, soft_cap=soft_cap)

    rows = q_BLHK, jnp.arange(L)[None], runs_BL
    # Past some length the scores of all queries at once are what fills the memory.
    return some(rows) if L <= LONG else map_rows(some, rows, ROWS)


def visible(distance: jax.Array, causal: bool, window: int | None) -> jax.Array:
    """Whether a query sees a key `distance` steps back."""
    seen = distance >= 0 if causal else jnp.ones_like(distance, bool)
    if window is None:
        return seen
    return seen & (jnp.abs(distance) < window + (not causal))


def block_length(window: int) -> int:
    """Steps in a block of queries: no less than the window, and no less than makes a matrix product worthwhile."""
    return max(window, 32)


def _attend_in_blocks(
    q_BLHK: jax.Array,
    k_BLGK: jax.Array,
    v_BLGK: jax.Array,
    segment_ids: jax.Array | None,
    *,
    causal: bool,
    scale: float,
    window: int,
    bias: Bias | None,
    soft_cap: float | None,
) -> jax.Array:
    """`attend_self` in memory linear in L: each of N blocks of C queries looks at its own keys, those of the block
    before and, where not causal, those of the block after, M in all."""
    L, C = q_BLHK.shape[1], block_length(window)
    N, after = -(-L // C), int(not causal)
    rest = N * C - L

    def blocks(x: jax.Array, before: int, after: int, fill: int = 0) -> jax.Array:
        """(B, L, ...) as (B, N, M, ...), the block of each N with those around it."""
        pads = ((0, 0), (before * C, rest + after * C), *((0, 0),) * (x.ndim - 2))
        x = jnp.pad(x, pads, constant_values=fill)
        x = x.reshape(x.shape[0], N + before + after, C, *x.shape[2:])
        return jnp.concatenate([x[:, i : i + N] for i in range(1 + before + after)], axis=2)

    distance_CM = C + jnp.arange(C)[:, None] - jnp.arange((2 + after) * C)[None]
    # Padding is a segment of its own.
    runs_BL = jnp.zeros((1, L), jnp.int32) if segment_ids is None else segment_runs(segment_ids)
    same_BNCM = blocks(runs_BL, 0, 0, -1)[..., None] == blocks(runs_BL, 1, after, -1)[:, :, None]
    mask_BNCM = same_BNCM & visible(distance_CM, causal, window)[None, None]
    bias_HCM = None if bias is None else bias(distance_CM)
    y_BNCHK = jax.vmap(
        lambda q, k, v, mask: attend(q, k, v, bias_HCM, mask, scale=scale, soft_cap=soft_cap), in_axes=1, out_axes=1
    )(blocks(q_BLHK, 0, 0), blocks(k_BLGK, 1, after), blocks(v_BLGK, 1, after), mask_BNCM)
    return y_BNCHK.reshape(q_BLHK.shape[0], N * C, *q_BLHK.shape[2:])[:, :L]


def fuses(q_BLHK: jax.Array) -> bool:
    """Whether cuDNN's flash attention takes such queries: of half precision, on Ampere or later, in the shape it asks
    for. It takes biases and masks too, but then stores one whole."""
    K = q_BLHK.shape[-1]
    if jax.default_backend() != "gpu" or q_BLHK.dtype not in (jnp.bfloat16, jnp.float16) or K % 8 or K > 128:
        return False
    # AMD's name is no number.
    major = jax.devices()[0].compute_capability.split(".")[0]
    return major.isdigit() and int(major) >= 8

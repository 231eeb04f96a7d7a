"""Long-short attention: a window beside a compressed memory, in one softmax (Zhu et al., arXiv 2107.02192, section 3).

    noncausal   window: the step's block of w steps and w // 2 on each side
                memory: R slots  P^T k, P^T v,  P = softmax over all steps of a map of x
    causal      window: the last w steps
                memory: R slots for each chunk of l steps that lies before the step's own, P = softmax within the chunk

Keys and values pass one layer norm in the window and another in the memory (DualLN). In the causal form scores have the
relative position terms of Transformer-XL, over lags in the window and over slots in the memory. Both forms follow the
authors' code: keys of the noncausal memory are compressed after the norm of the window, the causal ones before.

A chunk is read only after its end, and chunks count from the first valid step, so that a prefix gives the same at any
length, and steps agree. Unlike the authors' code, nothing precedes the sequence: its 1024 zeros before the start are
further slots in every softmax. With R = 0 this is window attention.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from seqmod.mixers import heads
from seqmod.mixers.base import CAUSAL, NONCAUSAL, Mixer, Params, check_causal, project, scaled_normal


@dataclass(frozen=True)
class LongShortConfig:
    """`width` D in and out, H `heads`, a window of w steps, R slots by `rank`, if causal for each `chunk`."""

    width: int = 64
    heads: int = 4
    window: int = 16
    rank: int = 1
    chunk: int = 16
    causal: bool = True
    init_scale: float = 1.0

    def __post_init__(self) -> None:
        heads.check_sizes("LongShortConfig", self.width, self.heads, window=self.window, chunk=self.chunk)
        if self.rank < 0:
            raise ValueError(f"LongShortConfig: rank is {self.rank}, expected at least 0")
        if self.causal and self.rank and self.window < self.chunk:
            raise ValueError(
                f"LongShortConfig: window is {self.window}, expected at least the chunk of {self.chunk}: "
                "a step would not see the start of its own chunk"
            )


class LongShortState(NamedTuple):
    """The window's keys and values (B, w, H, K), oldest first; the open chunk's largest exponents (B, H, R) and sums
    (B, H, R, 2 K + 1) of exponentials over them times (k, v, 1); the memory (B, chunks, R, H, K); the time."""

    k_BWHK: jax.Array
    v_BWHK: jax.Array
    peak_BHR: jax.Array
    sums_BHRF: jax.Array
    k_BXRHK: jax.Array
    v_BXRHK: jax.Array
    time: jax.Array


def init(key: jax.Array, config: LongShortConfig) -> Params:
    """Parameters: `qkv` (D, 3, H, K), `out` (H, K, D), `slots` (D, H, R), gains and biases (H, K) of both norms.

    Causal: `window_position` and `memory_position` (D, H, K), and biases (H, K) of position and content.
    """
    k_heads, k_slots, k_window, k_memory = jax.random.split(key, 4)
    D, H, K, scale = config.width, config.heads, config.width // config.heads, config.init_scale
    params = heads.init(k_heads, D, H, scale) | {
        "slots": scaled_normal(k_slots, (D, H, config.rank), D, scale),
        "window_norm": {"gain": jnp.ones((H, K)), "bias": jnp.zeros((H, K))},
        "memory_norm": {"gain": jnp.ones((H, K)), "bias": jnp.zeros((H, K))},
    }
    if config.causal:
        params |= {
            "window_position": scaled_normal(k_window, (D, H, K), D, scale),
            "memory_position": scaled_normal(k_memory, (D, H, K), D, scale),
            "memory_position_bias": jnp.zeros((H, K)),
            "content_bias": jnp.zeros((H, K)),
            "position_bias": jnp.zeros((H, K)),
        }
    return params


def _norm(params: Params, x: jax.Array) -> jax.Array:
    """Layer norm of (..., H, K) over all heads."""
    gain, bias = (params[name].reshape(*(1,) * (x.ndim - 2), *x.shape[-2:]) for name in ("gain", "bias"))
    x = x - x.mean((-2, -1), keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean((-2, -1), keepdims=True) + 1e-5) * gain + bias


def _positions(kernel_DHK: jax.Array, positions_P: jax.Array) -> jax.Array:
    """Sinusoids of positions, as Transformer-XL has them, mapped to (P, H, K)."""
    D = kernel_DHK.shape[0]
    frequency_F = 1e4 ** (-jnp.arange(0, D, 2) / D)
    angle_PF = positions_P.astype(frequency_F.dtype)[:, None] * frequency_F[None]
    waves_PD = jnp.concatenate([jnp.sin(angle_PF), jnp.cos(angle_PF)], axis=1)[:, :D]
    return jnp.einsum("PD,DHK->PHK", waves_PD, kernel_DHK)


def _memory_positions(params: Params, positions_P: jax.Array) -> jax.Array:
    return _positions(params["memory_position"], positions_P) + params["memory_position_bias"][None]


def _biased(q: jax.Array, bias_HK: jax.Array) -> jax.Array:
    return q + bias_HK.reshape(*(1,) * (q.ndim - 2), *bias_HK.shape)


def _at(table: jax.Array, index: jax.Array) -> jax.Array:
    """Entries of the last axis (B, X, w, H, P) at (X or 1, w, Y), as (B, X, w, H, Y)."""
    return jnp.take_along_axis(table, index[None, :, :, None], axis=-1)


def _whole(x_BL: jax.Array, size: int) -> jax.Array:
    """(B, L, ...) as (B, X, size, ...), with zeros at the end."""
    B, L = x_BL.shape[:2]
    x_BL = jnp.pad(x_BL, ((0, 0), (0, -L % size), *((0, 0),) * (x_BL.ndim - 2)))
    return x_BL.reshape(B, -(-L // size), size, *x_BL.shape[2:])


def _merge(x: jax.Array) -> jax.Array:
    """(B, X, Y, ...) as (B, X Y, ...), also where Y is zero."""
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])


def _compress(
    params: Params, config: LongShortConfig, x_BLD: jax.Array, live_BL: jax.Array, kv_BLHF: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Keys and values (B, Y, H, K) of the memory, Y slots in all."""
    logits_BLHR = heads.wide(project("BLD,DHR->BLHR", x_BLD, params["slots"]))
    size = config.chunk if config.causal else x_BLD.shape[1]
    logits_BXCHR = heads.hide(_whole(logits_BLHR, size), _whole(live_BL, size)[..., None, None])
    memory_BXRHF = jnp.einsum("BXCHR,BXCHF->BXRHF", jax.nn.softmax(logits_BXCHR, axis=2), _whole(kv_BLHF, size))
    k_BYHK, v_BYHK = jnp.split(_merge(memory_BXRHF), 2, axis=-1)
    return _norm(params["memory_norm"], k_BYHK), _norm(params["memory_norm"], v_BYHK)


def _attend(params: Params, config: LongShortConfig, x_BLD: jax.Array, live_BL: jax.Array) -> jax.Array:
    """What heads read (B, L, H, K) where the steps that live come first."""
    L, W, R = x_BLD.shape[1], config.window, config.rank
    q_BLHK, k_BLHK, v_BLHK = map(heads.wide, heads.split(params, x_BLD))
    q_BXWHK = _whole(q_BLHK * q_BLHK.shape[-1] ** -0.5, W)
    near_k_BLHK, near_v_BLHK = (_norm(params["window_norm"], each) for each in (k_BLHK, v_BLHK))
    source = (k_BLHK, v_BLHK) if config.causal else (near_k_BLHK, near_v_BLHK)
    k_BYHK, v_BYHK = _compress(params, config, x_BLD, live_BL, jnp.concatenate(source, axis=-1))

    # The keys that a block of queries reads: its own w and those behind and ahead.
    X, Y = q_BXWHK.shape[1], k_BYHK.shape[1]
    behind, ahead = (W - 1, 0) if config.causal else (W // 2, W // 2)
    key_XS = jnp.arange(X)[:, None] * W + jnp.arange(W + behind + ahead)[None] - behind
    lag_WS = jnp.arange(W)[:, None] - jnp.arange(W + behind + ahead)[None] + behind
    slot_XS = jnp.clip(key_XS, 0, L - 1)
    visible_BXS = ((key_XS >= 0) & (key_XS < L))[None] & live_BL[:, slot_XS]
    visible_BXWS = visible_BXS[:, :, None]
    if config.causal:
        visible_BXWS = visible_BXWS & ((lag_WS >= 0) & (lag_WS < W))[None, None]
    near_k_BXSHK, near_v_BXSHK = near_k_BLHK[:, slot_XS], near_v_BLHK[:, slot_XS]

    content_BXWHK = _biased(q_BXWHK, params["content_bias"]) if config.causal else q_BXWHK
    near_BXWHS = jnp.einsum("BXWHK,BXSHK->BXWHS", content_BXWHK, near_k_BXSHK)
    far_BXWHY = jnp.einsum("BXWHK,BYHK->BXWHY", q_BXWHK, k_BYHK)
    if config.causal:
        lags_PHK = _positions(params["window_position"], jnp.arange(W))
        by_lag_BXWHP = jnp.einsum("BXWHK,PHK->BXWHP", _biased(q_BXWHK, params["position_bias"]), lags_PHK)
        near_BXWHS = near_BXWHS + _at(by_lag_BXWHP, jnp.clip(lag_WS, 0, W - 1)[None])
        chunk_XW = jnp.minimum(
            (jnp.arange(X)[:, None] * W + jnp.arange(W)[None]) // config.chunk, (L - 1) // config.chunk
        )
        if R:
            slots_PHK = _memory_positions(params, jnp.arange(Y))
            by_slot_BXWHP = jnp.einsum("BXWHK,PHK->BXWHP", q_BXWHK, slots_PHK)
            distance_XWY = (chunk_XW[..., None] + 1) * R - 1 - jnp.arange(Y)[None, None]
            far_BXWHY = far_BXWHY + _at(by_slot_BXWHP, jnp.maximum(distance_XWY, 0))
            past_XWY = jnp.arange(Y)[None, None] // R < chunk_XW[..., None]
            far_BXWHY = heads.hide(far_BXWHY, past_XWY[None, :, :, None])
    scores = jnp.concatenate([heads.hide(near_BXWHS, visible_BXWS[:, :, :, None]), far_BXWHY], axis=-1)
    near_BXWHS, far_BXWHY = jnp.split(jax.nn.softmax(scores, axis=-1), [lag_WS.shape[1]], axis=-1)
    y_BXWHK = jnp.einsum("BXWHS,BXSHK->BXWHK", near_BXWHS, near_v_BXSHK)
    y_BXWHK = y_BXWHK + jnp.einsum("BXWHY,BYHK->BXWHK", far_BXWHY, v_BYHK)
    return _merge(y_BXWHK)[:, :L]


def apply(params: Params, config: LongShortConfig, x_BLD: jax.Array, mask_BL: jax.Array | None = None) -> jax.Array:
    """Parallel form, (B, L, D) to (B, L, D)."""
    if mask_BL is None:
        y_BLHK = _attend(params, config, x_BLD, heads.as_mask(x_BLD, None))
        return heads.read_out(params, config, x_BLD, y_BLHK)
    # Valid steps to the front, so that blocks and chunks are those of the sequence alone.
    valid_BL = heads.as_mask(x_BLD, mask_BL)
    order_BL = jnp.argsort(~valid_BL, axis=1, stable=True)
    x_BLD = jnp.take_along_axis(heads.blank(x_BLD, valid_BL), order_BL[..., None], axis=1)
    y_BLHK = _attend(params, config, x_BLD, jnp.take_along_axis(valid_BL, order_BL, axis=1))
    y_BLHK = jnp.take_along_axis(y_BLHK, jnp.argsort(order_BL, axis=1)[..., None, None], axis=1)
    return heads.read_out(params, config, x_BLD, y_BLHK)


def init_state(config: LongShortConfig, batch: int, length: int) -> LongShortState:
    """An empty window and memory, with slots for all chunks of `length` steps."""
    H, K, R = config.heads, config.width // config.heads, config.rank
    window = jnp.zeros((batch, config.window, H, K))
    memory = jnp.zeros((batch, -(-length // config.chunk), R, H, K))
    peak_BHR, sums_BHRF = jnp.full((batch, H, R), -1e30), jnp.zeros((batch, H, R, 2 * K + 1))
    return LongShortState(window, window, peak_BHR, sums_BHRF, memory, memory, jnp.zeros((), jnp.int32))


def step(
    params: Params, config: LongShortConfig, x_BD: jax.Array, state: LongShortState
) -> tuple[jax.Array, LongShortState]:
    """One step, (B, D) to (B, D)."""
    W, R = config.window, config.rank
    q_BHK, k_BHK, v_BHK = map(heads.wide, heads.split(params, x_BD))
    q_BHK = q_BHK * q_BHK.shape[-1] ** -0.5

    def shift(window_BWHK: jax.Array, new_BHK: jax.Array) -> jax.Array:
        return jnp.concatenate([window_BWHK[:, 1:], _norm(params["window_norm"], new_BHK)[:, None]], axis=1)

    k_BWHK, v_BWHK = shift(state.k_BWHK, k_BHK), shift(state.v_BWHK, v_BHK)
    lag_W = jnp.arange(W)[::-1]
    near_BHW = jnp.einsum("BHK,BWHK->BHW", _biased(q_BHK, params["content_bias"]), k_BWHK)
    lags_WHK = _positions(params["window_position"], lag_W)
    near_BHW = near_BHW + jnp.einsum("BHK,WHK->BHW", _biased(q_BHK, params["position_bias"]), lags_WHK)
    near_BHW = heads.hide(near_BHW, (lag_W <= state.time)[None, None])

    # The open chunk is compressed as far as it goes, into a slot that is read only after its end.
    starts = state.time % config.chunk == 0
    last_BHR = jnp.where(starts, -1e30, state.peak_BHR)
    logits_BHR = heads.wide(project("BD,DHR->BHR", x_BD, params["slots"]))
    peak_BHR = jnp.maximum(last_BHR, jax.lax.stop_gradient(logits_BHR))
    decay_BHR1, weight_BHR1 = (jnp.exp(each - peak_BHR)[..., None] for each in (last_BHR, logits_BHR))
    added_BHF = jnp.concatenate([k_BHK, v_BHK, jnp.ones_like(v_BHK[..., :1])], axis=-1)
    sums_BHRF = decay_BHR1 * jnp.where(starts, 0, state.sums_BHRF) + weight_BHR1 * added_BHF[:, :, None]
    open_BRHF = jnp.swapaxes(sums_BHRF[..., :-1] / sums_BHRF[..., -1:], 1, 2)
    chunk = state.time // config.chunk
    k_BXRHK, v_BXRHK = (
        jax.lax.dynamic_update_slice_in_dim(memory, _norm(params["memory_norm"], new)[:, None], chunk, axis=1)
        for memory, new in zip((state.k_BXRHK, state.v_BXRHK), jnp.split(open_BRHF, 2, axis=-1), strict=True)
    )
    k_BYHK, v_BYHK = _merge(k_BXRHK), _merge(v_BXRHK)
    slot_Y = jnp.arange(k_BYHK.shape[1])
    distances_YHK = _memory_positions(params, jnp.maximum((chunk + 1) * R - 1 - slot_Y, 0))
    far_BHY = jnp.einsum("BHK,BYHK->BHY", q_BHK, k_BYHK + distances_YHK[None])
    far_BHY = heads.hide(far_BHY, (slot_Y < chunk * R)[None, None])

    weights = jax.nn.softmax(jnp.concatenate([near_BHW, far_BHY], axis=-1), axis=-1)
    y_BHK = jnp.einsum("BHM,BMHK->BHK", weights, jnp.concatenate([v_BWHK, v_BYHK], axis=1))
    after = LongShortState(k_BWHK, v_BWHK, peak_BHR, sums_BHRF, k_BXRHK, v_BXRHK, state.time + 1)
    return heads.read_out(params, config, x_BD, y_BHK), after


def default_config(
    width: int, heads: int, init_scale: float = 1.0, context: int = 128, causal: bool = True
) -> LongShortConfig:
    """Window, chunks and noncausal slots of 16, or of a quarter of the context if that is less; 1 slot a chunk."""
    check_causal("longshort", causal, CAUSAL | NONCAUSAL)
    size = max(1, min(16, context // 4))
    rank = 1 if causal else size
    return LongShortConfig(
        width=width, heads=heads, window=size, rank=rank, chunk=size, causal=causal, init_scale=init_scale
    )


MIXER = Mixer(LongShortConfig, default_config, init, apply, init_state, step, patterns=CAUSAL | NONCAUSAL, packs=False)

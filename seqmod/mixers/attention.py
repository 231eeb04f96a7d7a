"""Softmax attention, to a sequence or to a context (Vaswani et al., arXiv 1706.03762), and its usual variants.

    y_t = sum_s softmax_s(scale q_t . k_s + b(t - s)) v_s,  out = W_out y

`groups` heads of keys and values, each for H / groups heads of queries (Ainslie et al., arXiv 2305.13245); positions by
T5's learned bias, ALiBi, rotary embeddings or none; a sliding `window` (Beltagy et al., arXiv 2004.05150) of the last w
keys, or, where not causal, of w keys to each side; RMS norms of queries and keys, as in Qwen3; scores capped softly by
cap tanh(score / cap) before the bias, as in Gemma 2 (arXiv 2408.00118). Scores are scaled with T5's bias too, which T5
does not do: with the other defaults this is the mixer of the paper's grid-world base model (arXiv 2512.20605, Table
A16: 4 heads of 64, 32 buckets).

To a context there is no position bias, as in T5's decoder; rotary embeddings, ALiBi and windows are refused.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from seqmod.mixers.base import (
    Context,
    Linear,
    Mixer,
    Params,
    check_heads,
    over_last,
    project,
    rms_norm,
    same_segment,
    scaled_normal,
)
from seqmod.mixers.dot_product import attend, attend_self
from seqmod.mixers.positions import RopeScaling, alibi_slopes, bucket, frequencies, positions, rotate


@dataclass(frozen=True)
class AttentionConfig:
    """`width` D in and out, H `heads` of queries and G `groups` of keys and values (None: as many), of `head_dim` K.

    `buckets` and `max_distance` are T5's; `rope_base`, `rope_fraction`, the part of the channels that is rotated, and
    `rope_scaling` are RoPE's. `window`, `soft_cap` and `scale` are absent where None; scale then is 1 / sqrt(K).
    """

    width: int = 64
    heads: int = 4
    head_dim: int = 16
    groups: int | None = None
    causal: bool = True
    position: Literal["t5", "rope", "alibi", "none"] = "t5"
    buckets: int = 32
    max_distance: int = 128
    rope_base: float = 10000.0
    rope_fraction: float = 1.0
    rope_scaling: RopeScaling | None = None
    window: int | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    qk_norm_epsilon: float = 1e-6
    soft_cap: float | None = None
    scale: float | None = None
    init_scale: float = 1.0

    def __post_init__(self) -> None:
        if min(self.width, self.heads, self.head_dim, self.kv_heads) < 1 or self.buckets < 2:
            raise ValueError(f"AttentionConfig: sizes must be positive and buckets at least 2, got {self}")
        if self.heads % self.kv_heads:
            raise ValueError(f"AttentionConfig: heads {self.heads} are not divisible by groups {self.groups}")
        if self.position not in ("t5", "rope", "alibi", "none"):
            raise ValueError(
                f"AttentionConfig: position is {self.position!r}, expected 't5', 'rope', 'alibi' or 'none'"
            )
        if self.position == "t5":
            self._check_buckets()
        rotated = self.rope_channels
        if self.position == "rope" and (rotated % 2 or not 2 <= rotated <= self.head_dim or self.rope_base <= 0):
            raise ValueError(
                f"AttentionConfig: rope_fraction {self.rope_fraction} of head_dim {self.head_dim} rotates {rotated} "
                f"channels with base {self.rope_base}, expected an even number from 2 to head_dim and a positive base"
            )
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, RopeScaling):
            raise ValueError(f"AttentionConfig: rope_scaling is {self.rope_scaling!r}, expected a RopeScaling or None")
        for name in ("window", "soft_cap", "scale"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"AttentionConfig: {name} is {value}, expected a positive number or None")

    def _check_buckets(self) -> None:
        if not self.causal and self.buckets % 4:
            raise ValueError(f"AttentionConfig: buckets is {self.buckets}, expected a multiple of 4 where not causal")
        exact = self.buckets // 2 if self.causal else self.buckets // 4
        if self.max_distance <= exact:
            raise ValueError(
                f"AttentionConfig: max_distance is {self.max_distance}, expected more than {exact}: "
                f"of {self.buckets} buckets, half hold one distance each"
            )

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values, G."""
        return self.heads if self.groups is None else self.groups

    @property
    def rope_channels(self) -> int:
        """Channels of a head that RoPE rotates."""
        return int(self.head_dim * self.rope_fraction)

    @property
    def score_scale(self) -> float:
        """Factor of the scores."""
        return self.head_dim**-0.5 if self.scale is None else self.scale


class AttentionState(NamedTuple):
    """Keys and values of the last M steps (B, M, G, K), step t in slot t mod M, and the number of steps taken."""

    k_BMGK: jax.Array
    v_BMGK: jax.Array
    time: jax.Array


def init(key: jax.Array, config: AttentionConfig) -> Params:
    """Parameters: `q` (D, H, K), `k`, `v` (D, G, K), `out` (H, K, D), and as configured `bias` (buckets, H), `q_bias`,
    `k_bias`, `v_bias`, `out_bias`, and the gains `q_norm`, `k_norm` (K,)."""
    k_qkv, k_out, k_bias = jax.random.split(key, 3)
    D, H, G, K, scale = config.width, config.heads, config.kv_heads, config.head_dim, config.init_scale
    qkv_DHK = scaled_normal(k_qkv, (D, H + 2 * G, K), D, scale)
    params = {
        "q": qkv_DHK[:, :H],
        "k": qkv_DHK[:, H : H + G],
        "v": qkv_DHK[:, H + G :],
        "out": scaled_normal(k_out, (H, K, D), H * K, scale),
    }
    if config.position == "t5":
        params["bias"] = scaled_normal(k_bias, (config.buckets, H), config.buckets, scale)
    if config.qkv_bias:
        params |= {"q_bias": jnp.zeros((H, K)), "k_bias": jnp.zeros((G, K)), "v_bias": jnp.zeros((G, K))}
    if config.out_bias:
        params["out_bias"] = jnp.zeros(D)
    if config.qk_norm:
        params |= {"q_norm": jnp.ones(K), "k_norm": jnp.ones(K)}
    return params


def _heads(name: str, params: Params, config: AttentionConfig, x: jax.Array, position: jax.Array | None) -> jax.Array:
    """Queries, keys or values (..., heads, K) of x (..., D); turned to their `position` (...) if there is one."""
    y = project("...D,DHK->...HK", x, params[name])
    if config.qkv_bias:
        bias = params[f"{name}_bias"].astype(y.dtype)
        y = y + bias.reshape((1,) * (y.ndim - 2) + bias.shape)
    if config.qk_norm and name != "v":
        y = rms_norm(params[f"{name}_norm"], y, config.qk_norm_epsilon)
    if config.position == "rope" and name != "v" and position is not None:
        y = rotate(y, position, frequencies(config.rope_base, config.rope_channels, config.rope_scaling))
    return y


def _bias(params: Params, config: AttentionConfig, distance: jax.Array) -> jax.Array | None:
    """What positions add to the scores of keys `distance` (...) steps back: (H, ...), or None."""
    if config.position == "t5":
        buckets = bucket(distance, config.buckets, config.max_distance, causal=config.causal)
        return jnp.moveaxis(params["bias"][buckets], -1, 0)
    if config.position == "alibi":
        slopes_H = jnp.asarray(alibi_slopes(config.heads)).reshape(-1, *(1,) * distance.ndim)
        return -slopes_H * jnp.abs(distance)[None].astype(jnp.float32)
    return None


def _read_out(params: Params, config: AttentionConfig, y: jax.Array) -> jax.Array:
    """Output (..., D) of what the heads gathered (..., H, K)."""
    out = project("...HK,HKD->...D", y, params["out"])
    return out + over_last(params["out_bias"].astype(out.dtype), out.ndim) if config.out_bias else out


def _check_context(config: AttentionConfig, segment_ids: jax.Array | None, context: Context) -> None:
    if config.position in ("rope", "alibi") or config.window is not None:
        raise ValueError(
            f"attention: position is {config.position!r} and window {config.window}, but a context shares no positions "
            "with the queries: expected position 'none' or 't5' (which then adds nothing) and window None"
        )
    if context.segments_BM is not None and segment_ids is None:
        raise ValueError("attention: the context has segments, expected segment_ids of the queries too")


def apply(
    params: Params,
    config: AttentionConfig,
    x_BLD: jax.Array,
    segment_ids: jax.Array | None = None,
    context: Context | None = None,
) -> jax.Array:
    """Parallel form, (B, L, D) to (B, L, D).

    A step sees itself, earlier steps and, where not causal, later ones, all of its own segment and within the window.
    With a context it sees all steps of the context that have its segment's id, and its output is that of no values if
    there are none; a context without segments is seen by all.
    """
    if context is not None:
        return _cross(params, config, x_BLD, segment_ids, context)
    position_BL = positions(x_BLD.shape[1], segment_ids) if config.position == "rope" else None
    q_BLHK, k_BLGK, v_BLGK = (_heads(name, params, config, x_BLD, position_BL) for name in "qkv")
    y_BLHK = attend_self(
        q_BLHK,
        k_BLGK,
        v_BLGK,
        segment_ids,
        causal=config.causal,
        scale=config.score_scale,
        window=config.window,
        bias=partial(_bias, params, config) if config.position in ("t5", "alibi") else None,
        soft_cap=config.soft_cap,
    )
    return _read_out(params, config, y_BLHK)


def _cross(
    params: Params, config: AttentionConfig, x_BLD: jax.Array, segment_ids: jax.Array | None, context: Context
) -> jax.Array:
    _check_context(config, segment_ids, context)
    q_BLHK = _heads("q", params, config, x_BLD, None)
    k_BMGK, v_BMGK = (_heads(name, params, config, context.x_BMD, None) for name in "kv")
    mask_BLM = None
    if segment_ids is not None and context.segments_BM is not None:
        mask_BLM = segment_ids[:, :, None] == context.segments_BM[:, None]
    y_BLHK = attend(q_BLHK, k_BMGK, v_BMGK, None, mask_BLM, scale=config.score_scale, soft_cap=config.soft_cap)
    if mask_BLM is not None:
        y_BLHK = jnp.where(mask_BLM.any(-1)[..., None, None], y_BLHK, 0)
    return _read_out(params, config, y_BLHK)


def values(
    params: Params, config: AttentionConfig, x_BLD: jax.Array, segment_ids: jax.Array | None = None
) -> jax.Array:
    """Values (B, L, H, K), those of a group once for each of its heads."""
    return jnp.repeat(_heads("v", params, config, x_BLD, None), config.heads // config.kv_heads, axis=2)


def matrix(
    params: Params, config: AttentionConfig, x_BLD: jax.Array, segment_ids: jax.Array | None = None
) -> jax.Array:
    """Weights (B, H, L, L) of keys [t, s], from the formula."""
    L = x_BLD.shape[1]
    q_BLHK, k_BLGK = (_heads(name, params, config, x_BLD, jnp.arange(L)[None]) for name in "qk")
    k_BLHK = jnp.repeat(k_BLGK, config.heads // config.kv_heads, axis=2)
    scores_BHLL = config.score_scale * jnp.einsum("BTHK,BSHK->BHTS", q_BLHK, k_BLHK).astype(jnp.float32)
    if config.soft_cap is not None:
        scores_BHLL = config.soft_cap * jnp.tanh(scores_BHLL / config.soft_cap)
    distance_LL = jnp.arange(L)[:, None] - jnp.arange(L)[None]
    bias_HLL = _bias(params, config, distance_LL)
    if bias_HLL is not None:
        scores_BHLL = scores_BHLL + bias_HLL[None]
    visible_BHLL = jnp.ones((1, 1, L, L), bool)
    if config.causal:
        visible_BHLL = visible_BHLL & (distance_LL >= 0)[None, None]
    if config.window is not None:
        furthest = config.window - 1 if config.causal else config.window
        visible_BHLL = visible_BHLL & (jnp.abs(distance_LL) <= furthest)[None, None]
    if segment_ids is not None:
        visible_BHLL = visible_BHLL & same_segment(segment_ids)[:, None]
    return jax.nn.softmax(jnp.where(visible_BHLL, scores_BHLL, -jnp.inf), axis=-1)


def read_out(params: Params, config: AttentionConfig, x_BLD: jax.Array, y_BLHK: jax.Array) -> jax.Array:
    """Output of weighted values."""
    return _read_out(params, config, y_BLHK)


def init_state(config: AttentionConfig, batch: int, length: int) -> AttentionState:
    """Empty cache of `length` steps, or of the window if that is less; of a longer sequence, `step` sees only the last
    `length` steps. Raises ValueError for a config that is not causal."""
    if not config.causal:
        raise ValueError("attention: causal is False, but only causal attention has a step form")
    kept = length if config.window is None else min(length, config.window)
    empty = jnp.zeros((batch, kept, config.kv_heads, config.head_dim))
    return AttentionState(empty, empty, jnp.zeros((), jnp.int32))


def step(
    params: Params, config: AttentionConfig, x_BD: jax.Array, state: AttentionState
) -> tuple[jax.Array, AttentionState]:
    """One step, (B, D) to (B, D). Keys are kept as they are after norm and rotation."""
    q_BHK, k_BGK, v_BGK = (_heads(name, params, config, x_BD, state.time[None]) for name in "qkv")
    dtype = state.k_BMGK.dtype
    M = state.k_BMGK.shape[1]
    slot = state.time % M
    k_BMGK = jax.lax.dynamic_update_slice_in_dim(state.k_BMGK, k_BGK[:, None].astype(dtype), slot, axis=1)
    v_BMGK = jax.lax.dynamic_update_slice_in_dim(state.v_BMGK, v_BGK[:, None].astype(dtype), slot, axis=1)
    # The age of what each slot holds; a slot older than the sequence is still empty.
    distance_M = (state.time - jnp.arange(M)) % M
    # One query an episode: a multiply and a sum need no transposed copy of the cache, as a matmul does, and are fused
    # with the repetition.
    R = config.heads // config.kv_heads
    scores_BMH = (q_BHK.astype(dtype)[:, None] * jnp.repeat(k_BMGK, R, axis=2)).sum(-1) * config.score_scale
    if config.soft_cap is not None:
        scores_BMH = config.soft_cap * jnp.tanh(scores_BMH / config.soft_cap)
    bias_HM = _bias(params, config, distance_M)
    if bias_HM is not None:
        scores_BMH = scores_BMH + bias_HM.T[None]
    scores_BMH = jnp.where((distance_M <= state.time)[None, :, None], scores_BMH, -1e30)
    y_BHK = (jax.nn.softmax(scores_BMH, axis=1)[..., None] * jnp.repeat(v_BMGK, R, axis=2)).sum(1)
    y_BD = _read_out(params, config, y_BHK.astype(x_BD.dtype))
    return y_BD, AttentionState(k_BMGK, v_BMGK, state.time + 1)


def default_config(
    width: int, heads: int, init_scale: float = 1.0, context: int = 128, causal: bool = True
) -> AttentionConfig:
    """Heads that share the width and T5's bias; `context` is the largest distance told apart."""
    head_dim = check_heads("attention", width, heads)
    return AttentionConfig(
        width=width, heads=heads, head_dim=head_dim, causal=causal, max_distance=context, init_scale=init_scale
    )


MIXER = Mixer(
    AttentionConfig,
    default_config,
    init,
    apply,
    init_state,
    step,
    Linear(values, matrix, read_out),
    frozenset({"causal self", "noncausal self", "causal cross", "noncausal cross"}),
)

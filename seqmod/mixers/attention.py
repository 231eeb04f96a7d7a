"""Causal softmax attention with T5's learned relative position bias (Raffel et al., arXiv 1910.10683, section 2.1).

The mixer of the paper's grid-world base model (arXiv 2512.20605, Table A16: 4 heads of 64, 32 buckets). Distances below
half the buckets have one bucket each; larger ones share logarithmic buckets up to `max_distance`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from seqmod.mixers.base import CAUSAL, Mixer, Params, check_causal, check_heads, scaled_normal, segment_runs


@dataclass(frozen=True)
class AttentionConfig:
    """`width` D in and out, H `heads` of `head_dim` each."""

    width: int = 64
    heads: int = 4
    head_dim: int = 16
    buckets: int = 32
    max_distance: int = 128
    init_scale: float = 1.0

    def __post_init__(self) -> None:
        if min(self.width, self.heads, self.head_dim) < 1 or self.buckets < 2:
            raise ValueError(f"AttentionConfig: sizes must be positive and buckets at least 2, got {self}")
        if self.max_distance <= self.buckets // 2:
            raise ValueError(
                f"AttentionConfig: max_distance is {self.max_distance}, expected more than {self.buckets // 2}: "
                f"of {self.buckets} buckets, half hold one distance each"
            )


class AttentionState(NamedTuple):
    """Keys and values of the last M steps (B, M, H, K), step t in slot t mod M, and the number of steps taken."""

    k_BMHK: jax.Array
    v_BMHK: jax.Array
    time: jax.Array


def bucket(distance: jax.Array, buckets: int, max_distance: int) -> jax.Array:
    """Bucket of a non-negative distance into the past, as T5's unidirectional bias has it."""
    exact = buckets // 2
    ratio = jnp.log(jnp.maximum(distance, 1) / exact) / jnp.log(max_distance / exact)
    far = exact + (ratio * (buckets - exact)).astype(jnp.int32)
    return jnp.where(distance < exact, distance, jnp.minimum(far, buckets - 1))


def init(key: jax.Array, config: AttentionConfig) -> Params:
    """Parameters: `qkv` (D, 3, H, K), `out` (H, K, D), `bias` (buckets, H)."""
    k_qkv, k_out, k_bias = jax.random.split(key, 3)
    D, H, K = config.width, config.heads, config.head_dim
    return {
        "qkv": scaled_normal(k_qkv, (D, 3, H, K), D, config.init_scale),
        "out": scaled_normal(k_out, (H, K, D), H * K, config.init_scale),
        "bias": scaled_normal(k_bias, (config.buckets, H), config.buckets, config.init_scale),
    }


def apply(params: Params, config: AttentionConfig, x_BLD: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """Parallel form, (B, L, D) to (B, L, D); a step sees itself and earlier steps of its own segment."""
    L = x_BLD.shape[1]
    qkv = jnp.einsum("BLD,DGHK->GBLHK", x_BLD, params["qkv"])
    distance_LL = jnp.arange(L)[:, None] - jnp.arange(L)[None]
    visible_BLL = (distance_LL >= 0)[None]
    if segment_ids is not None:
        runs_BL = segment_runs(segment_ids)
        visible_BLL = visible_BLL & (runs_BL[:, :, None] == runs_BL[:, None])
    bias_LLH = params["bias"][bucket(jnp.maximum(distance_LL, 0), config.buckets, config.max_distance)]
    scores_BHLL = jnp.einsum("BQHK,BMHK->BHQM", qkv[0], qkv[1]) * config.head_dim**-0.5
    scores_BHLL = scores_BHLL + jnp.moveaxis(bias_LLH, -1, 0)[None]
    weights_BHLL = jax.nn.softmax(jnp.where(visible_BLL[:, None], scores_BHLL, -1e30), axis=-1)
    y_BLHK = jnp.einsum("BHQM,BMHK->BQHK", weights_BHLL, qkv[2])
    return jnp.einsum("BLHK,HKD->BLD", y_BLHK, params["out"])


def init_state(config: AttentionConfig, batch: int, length: int) -> AttentionState:
    """Empty cache of `length` steps; of a longer sequence, `step` sees only the last `length` steps."""
    empty = jnp.zeros((batch, length, config.heads, config.head_dim))
    return AttentionState(empty, empty, jnp.zeros((), jnp.int32))


def step(
    params: Params, config: AttentionConfig, x_BD: jax.Array, state: AttentionState
) -> tuple[jax.Array, AttentionState]:
    """One step, (B, D) to (B, D)."""
    qkv = jnp.einsum("BD,DGHK->GBHK", x_BD, params["qkv"])
    M = state.k_BMHK.shape[1]
    slot = state.time % M
    k_BMHK = jax.lax.dynamic_update_slice_in_dim(state.k_BMHK, qkv[1][:, None], slot, axis=1)
    v_BMHK = jax.lax.dynamic_update_slice_in_dim(state.v_BMHK, qkv[2][:, None], slot, axis=1)
    # The age of what each slot holds; a slot older than the sequence is still empty.
    distance_M = (state.time - jnp.arange(M)) % M
    bias_MH = params["bias"][bucket(distance_M, config.buckets, config.max_distance)]
    # One query an episode: a multiply and a sum need no transposed copy of the cache, as a matmul does.
    scores_BMH = (qkv[0][:, None] * k_BMHK).sum(-1) * config.head_dim**-0.5 + bias_MH[None]
    scores_BMH = jnp.where((distance_M <= state.time)[None, :, None], scores_BMH, -1e30)
    y_BHK = (jax.nn.softmax(scores_BMH, axis=1)[..., None] * v_BMHK).sum(1)
    y_BD = jnp.einsum("BHK,HKD->BD", y_BHK, params["out"])
    return y_BD, AttentionState(k_BMHK, v_BMHK, state.time + 1)


def default_config(
    width: int, heads: int, init_scale: float = 1.0, context: int = 128, causal: bool = True
) -> AttentionConfig:
    """Heads that share the width; `context` is the largest distance told apart."""
    check_causal("attention", causal, CAUSAL)
    head_dim = check_heads("attention", width, heads)
    return AttentionConfig(width=width, heads=heads, head_dim=head_dim, max_distance=context, init_scale=init_scale)


MIXER = Mixer(AttentionConfig, default_config, init, apply, init_state, step)

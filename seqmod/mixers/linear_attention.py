"""Linear attention with a positive feature map and a normaliser (Katharopoulos et al., arXiv 2006.16236).

    phi(x) = elu(x) + 1
    y_t = sum_s phi(q_t).phi(k_s) v_s / sum_s phi(q_t).phi(k_s)

over s <= t if causal, else over all steps, of the segment or of the context. q, k, v are linear maps of the input;
heads are concatenated and mapped to the width. The projections have no biases, and the denominator is at least 1e-6.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.linear_attention import bidirectional_linear_attention, linear_attention, linear_attention_step
from seqmod.mixers.base import (
    Context,
    Linear,
    Mixer,
    Params,
    Pattern,
    check_causal,
    check_heads,
    project,
    same_segment,
    scaled_normal,
)
from seqmod.mixers.decays import past_steps
from seqmod.mixers.heads import join_context

_FLOOR = 1e-6

PATTERNS: frozenset[Pattern] = frozenset({"causal self", "noncausal self", "causal cross", "noncausal cross"})


@dataclass(frozen=True)
class LinearAttentionConfig:
    """`width` D in and out, H `heads` of `head_dim` each; `causal` self attention, or over both sides."""

    width: int = 64
    heads: int = 4
    head_dim: int = 16
    causal: bool = True
    init_scale: float = 1.0

    def __post_init__(self) -> None:
        if min(self.width, self.heads, self.head_dim) < 1:
            raise ValueError(f"LinearAttentionConfig: sizes must be positive, got {self}")


class LinearAttentionState(NamedTuple):
    """Sums (B, H, K, V + 1) of phi(k) v^T and, in the last column, of phi(k)."""

    sums_BHKV: jax.Array


def init(key: jax.Array, config: LinearAttentionConfig) -> Params:
    """Parameters: `query`, `key`, `value` (D, H, K), `out` (H, K, D)."""
    k_query, k_key, k_value, k_out = jax.random.split(key, 4)
    D, H, K, scale = config.width, config.heads, config.head_dim, config.init_scale
    return {
        "query": scaled_normal(k_query, (D, H, K), D, scale),
        "key": scaled_normal(k_key, (D, H, K), D, scale),
        "value": scaled_normal(k_value, (D, H, K), D, scale),
        "out": scaled_normal(k_out, (H, K, D), H * K, scale),
    }


def feature_map(x: jax.Array) -> jax.Array:
    """elu(x) + 1, which is x + 1 or exp(x): so written it keeps its digits where it is small."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.where(wide > 0, wide + 1, jnp.exp(jnp.minimum(wide, 0))).astype(x.dtype)


def _features(params: Params, x: jax.Array, name: str) -> jax.Array:
    return feature_map(project("...D,DHK->...HK", x, params[name]))


def values(
    params: Params, config: LinearAttentionConfig, x: jax.Array, segment_ids: jax.Array | None = None
) -> jax.Array:
    """v (..., H, V)."""
    return project("...D,DHV->...HV", x, params["value"])


def read_out(params: Params, config: LinearAttentionConfig, x: jax.Array, y: jax.Array) -> jax.Array:
    """Heads (..., H, V) to the width."""
    return project("...HV,HVD->...D", y.astype(x.dtype), params["out"])


def _read_all(q_BLHK: jax.Array, k_BMHK: jax.Array, v_BMHV: jax.Array) -> jax.Array:
    """Every query reads every step, at a cost linear in both."""
    sums_BHKV = jnp.einsum("BMHK,BMHV->BHKV", k_BMHK, v_BMHV, preferred_element_type=jnp.float32)
    z_BHK = k_BMHK.sum(1, dtype=jnp.float32)
    q_BLHK = q_BLHK.astype(jnp.float32)
    z_BLH = jnp.maximum(jnp.einsum("BLHK,BHK->BLH", q_BLHK, z_BHK), _FLOOR)
    return jnp.einsum("BLHK,BHKV->BLHV", q_BLHK, sums_BHKV) / z_BLH[..., None]


def _read_context(
    q_BLHK: jax.Array, k_BMHK: jax.Array, v_BMHV: jax.Array, segments_BL: jax.Array | None, context: Context
) -> jax.Array:
    """A query reads the steps of the context that have its id, or all if the context has no ids."""
    if context.segments_BM is None:
        return _read_all(q_BLHK, k_BMHK, v_BMHV)
    joined = join_context(segments_BL, context)
    q_BNHK = joined.join(jnp.zeros_like(k_BMHK), q_BLHK)
    k_BNHK = joined.join(k_BMHK, jnp.zeros_like(q_BLHK))
    v_BNHV = joined.join(v_BMHV, jnp.zeros_like(q_BLHK))
    y_BNHV, _ = linear_attention(q_BNHK, k_BNHK, v_BNHV, segment_ids=joined.ids_BN, normalise=True)
    return joined.queries(y_BNHV)


def apply(
    params: Params,
    config: LinearAttentionConfig,
    x_BLD: jax.Array,
    segment_ids: jax.Array | None = None,
    context: Context | None = None,
) -> jax.Array:
    """Parallel form, (B, L, D) to (B, L, D), over its own steps or over a context."""
    source_BMD = x_BLD if context is None else context.x_BMD
    q_BLHK, k_BMHK = _features(params, x_BLD, "query"), _features(params, source_BMD, "key")
    v_BMHV = values(params, config, source_BMD)
    if context is not None:
        y_BLHV = _read_context(q_BLHK, k_BMHK, v_BMHV, segment_ids, context)
    elif config.causal:
        y_BLHV, _ = linear_attention(q_BLHK, k_BMHK, v_BMHV, segment_ids=segment_ids, normalise=True)
    elif segment_ids is None:
        y_BLHV = _read_all(q_BLHK, k_BMHK, v_BMHV)
    else:
        y_BLHV = bidirectional_linear_attention(q_BLHK, k_BMHK, v_BMHV, segment_ids=segment_ids, normalise=True)
    return read_out(params, config, x_BLD, y_BLHV)


def matrix(
    params: Params, config: LinearAttentionConfig, x_BLD: jax.Array, segment_ids: jax.Array | None = None
) -> jax.Array:
    """m_BHLM = phi(q_t).phi(k_s), of the visible s, divided by its sum."""
    L = x_BLD.shape[1]
    visible_BLM = jnp.ones((1, L, L), bool) if segment_ids is None else same_segment(segment_ids)
    if config.causal:
        visible_BLM = visible_BLM & past_steps(L)
    q_BLHK, k_BMHK = _features(params, x_BLD, "query"), _features(params, x_BLD, "key")
    scores_BHLM = jnp.einsum("BLHK,BMHK->BHLM", q_BLHK, k_BMHK, preferred_element_type=jnp.float32)
    scores_BHLM = jnp.where(visible_BLM[:, None], scores_BHLM, 0)
    return scores_BHLM / jnp.maximum(scores_BHLM.sum(-1, keepdims=True), _FLOOR)


def init_state(config: LinearAttentionConfig, batch: int, length: int) -> LinearAttentionState:
    """Zero sums; `length` is not needed, since the state has a fixed size."""
    return LinearAttentionState(jnp.zeros((batch, config.heads, config.head_dim, config.head_dim + 1)))


def step(
    params: Params, config: LinearAttentionConfig, x_BD: jax.Array, state: LinearAttentionState
) -> tuple[jax.Array, LinearAttentionState]:
    """One step, (B, D) to (B, D)."""
    y_BHV, sums_BHKV = linear_attention_step(
        state.sums_BHKV,
        _features(params, x_BD, "query"),
        _features(params, x_BD, "key"),
        values(params, config, x_BD),
        normalise=True,
    )
    return read_out(params, config, x_BD, y_BHV), LinearAttentionState(sums_BHKV)


def default_config(
    width: int, heads: int, init_scale: float = 1.0, context: int = 128, causal: bool = True
) -> LinearAttentionConfig:
    """Heads that share the width; `context` has no meaning here."""
    check_causal("linear_attention", causal, PATTERNS)
    head_dim = check_heads("linear_attention", width, heads)
    return LinearAttentionConfig(width=width, heads=heads, head_dim=head_dim, causal=causal, init_scale=init_scale)


MIXER = Mixer(
    LinearAttentionConfig, default_config, init, apply, init_state, step, Linear(values, matrix, read_out), PATTERNS
)

"""Gated linear attention (GLA; Yang et al., arXiv 2312.06635, section 4).

    S_t = Diag(a_t) S_{t-1} + k_t v_t^T        a_t = sigmoid(W_up W_down x_t + b)^{1/16},  one per key channel
    y_t = K^{-1/2} q_t S_t
    out = W_out (swish(W_gate x) * norm_h(y))

W_down has 16 columns. The norm of each head is RMS with a gain that heads share, as in the authors' code; keys are half
as wide as values.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.linear_attention import linear_attention, linear_attention_step
from seqmod.mixers.base import (
    CAUSAL,
    Linear,
    Mixer,
    Params,
    check_causal,
    check_heads,
    project,
    rms_norm,
    scaled_normal,
)
from seqmod.mixers.decays import decay_products

_TEMPERATURE = 16.0


@dataclass(frozen=True)
class GLAConfig:
    """`width` D in and out, H `heads` with keys of `key_dim` and values of `value_dim`, decays of rank `decay_rank`."""

    width: int = 64
    heads: int = 4
    key_dim: int = 8
    value_dim: int = 16
    decay_rank: int = 16
    init_scale: float = 1.0

    def __post_init__(self) -> None:
        if min(self.width, self.heads, self.key_dim, self.value_dim, self.decay_rank) < 1:
            raise ValueError(f"GLAConfig: sizes must be positive, got {self}")


class GLAState(NamedTuple):
    """The decayed sums S (B, H, K, V)."""

    s_BHKV: jax.Array


def init(key: jax.Array, config: GLAConfig) -> Params:
    """Parameters: `query`, `key` (D, H, K), `value`, `gate` (D, H, V), `decay_down` (D, R), `decay_up` (R, H, K),
    `decay_bias` (H, K), `norm` (V,), `out` (H, V, D)."""
    k_query, k_key, k_value, k_gate, k_down, k_up, k_out = jax.random.split(key, 7)
    D, H, K, V, R = config.width, config.heads, config.key_dim, config.value_dim, config.decay_rank
    scale = config.init_scale
    return {
        "query": scaled_normal(k_query, (D, H, K), D, scale),
        "key": scaled_normal(k_key, (D, H, K), D, scale),
        "value": scaled_normal(k_value, (D, H, V), D, scale),
        "gate": scaled_normal(k_gate, (D, H, V), D, scale),
        "decay_down": scaled_normal(k_down, (D, R), D, scale),
        "decay_up": scaled_normal(k_up, (R, H, K), R, scale),
        "decay_bias": jnp.zeros((H, K)),
        "norm": jnp.ones(V),
        "out": scaled_normal(k_out, (H, V, D), H * V, scale),
    }


def _keys(params: Params, config: GLAConfig, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q, k and log-decays (..., H, K), the last in float32."""
    q, k = (project("...D,DHK->...HK", x, params[name]) for name in ("query", "key"))
    logits = project("...R,RHK->...HK", project("...D,DR->...R", x, params["decay_down"]), params["decay_up"])
    bias = params["decay_bias"].reshape((1,) * (x.ndim - 1) + (config.heads, config.key_dim))
    return q, k, jax.nn.log_sigmoid(logits.astype(jnp.float32) + bias) / _TEMPERATURE


def values(params: Params, config: GLAConfig, x: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """v (..., H, V)."""
    return project("...D,DHV->...HV", x, params["value"])


def read_out(params: Params, config: GLAConfig, x: jax.Array, y: jax.Array) -> jax.Array:
    """Heads (..., H, V), normed one by one and gated, to the width."""
    gate = jax.nn.silu(project("...D,DHV->...HV", x, params["gate"]))
    return project("...HV,HVD->...D", gate * rms_norm(params["norm"], y).astype(x.dtype), params["out"])


def apply(params: Params, config: GLAConfig, x_BLD: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """Parallel form, (B, L, D) to (B, L, D)."""
    q_BLHK, k_BLHK, log_decay_BLHK = _keys(params, config, x_BLD)
    v_BLHV = values(params, config, x_BLD)
    y_BLHV, _ = linear_attention(
        q_BLHK, k_BLHK, v_BLHV, log_decay_BLHK, segment_ids=segment_ids, scale=config.key_dim**-0.5
    )
    return read_out(params, config, x_BLD, y_BLHV)


def matrix(params: Params, config: GLAConfig, x_BLD: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """m_BHLM = K^{-1/2} sum_i q_ti k_si exp(g_{s+1,i} + .. + g_{t,i})."""
    q_BLHK, k_BLHK, log_decay_BLHK = _keys(params, config, x_BLD)
    w_BHLMK = decay_products(log_decay_BLHK, segment_ids)
    return config.key_dim**-0.5 * jnp.einsum("BLHK,BMHK,BHLMK->BHLM", q_BLHK, k_BLHK, w_BHLMK)


def init_state(config: GLAConfig, batch: int, length: int) -> GLAState:
    """Zero sums; `length` is not needed, since the state has a fixed size."""
    return GLAState(jnp.zeros((batch, config.heads, config.key_dim, config.value_dim)))


def step(params: Params, config: GLAConfig, x_BD: jax.Array, state: GLAState) -> tuple[jax.Array, GLAState]:
    """One step, (B, D) to (B, D)."""
    q_BHK, k_BHK, log_decay_BHK = _keys(params, config, x_BD)
    v_BHV = values(params, config, x_BD)
    y_BHV, s_BHKV = linear_attention_step(state.s_BHKV, q_BHK, k_BHK, v_BHV, log_decay_BHK, scale=config.key_dim**-0.5)
    return read_out(params, config, x_BD, y_BHV), GLAState(s_BHKV)


def default_config(
    width: int, heads: int, init_scale: float = 1.0, context: int = 128, causal: bool = True
) -> GLAConfig:
    """Values that share the width, keys half as wide; `context` has no meaning here."""
    check_causal("gla", causal, CAUSAL)
    head_dim = check_heads("gla", width, heads)
    key_dim = max(head_dim // 2, 1)
    return GLAConfig(width=width, heads=heads, key_dim=key_dim, value_dim=head_dim, init_scale=init_scale)


MIXER = Mixer(GLAConfig, default_config, init, apply, init_state, step, Linear(values, matrix, read_out))

"""Multi-scale retention (RetNet; Sun et al., arXiv 2307.08621, equations 5 to 8).

    S_t = gamma_h S_{t-1} + k_t v_t^T        gamma_h = 1 - 2^{-5-h},  h = 0 .. H - 1
    y_t = K^{-1/2} q_t S_t                   q, k rotated by t theta_i,  theta from 1 down to 1/10000
    out = W_out (swish(W_gate x) * norm_h(y))

The rotation is that of xPos, whose own decay is in gamma. The norm of each head is RMS without a gain, as in the
authors' code. Their three normalisations of scores and decays are left out: the norm that follows undoes each of them.
Of a head of odd width the last channel stays as it is.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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


@dataclass(frozen=True)
class RetNetConfig:
    """`width` D in and out, H `heads` with keys of `key_dim` and values of `value_dim`."""

    width: int = 64
    heads: int = 4
    key_dim: int = 16
    value_dim: int = 16
    init_scale: float = 1.0

    def __post_init__(self) -> None:
        if min(self.width, self.heads, self.key_dim, self.value_dim) < 1:
            raise ValueError(f"RetNetConfig: sizes must be positive, got {self}")


class RetNetState(NamedTuple):
    """The sums S (B, H, K, V), and the number of steps taken, by which queries and keys are rotated."""

    s_BHKV: jax.Array
    time: jax.Array


def log_decays(heads: int) -> np.ndarray:
    """log gamma (H,)."""
    return np.log1p(-(2.0 ** (-5.0 - np.arange(heads)))).astype(np.float32)


def angles(key_dim: int) -> np.ndarray:
    """theta (K // 2,), radians a step."""
    return (1e-4 ** np.linspace(0, 1, key_dim // 2)).astype(np.float32)


def rotate(x: jax.Array, time: jax.Array) -> jax.Array:
    """Turn channels 2i and 2i + 1 of x (..., L, H, K) by time (L,) times theta_i."""
    half = x.shape[-1] // 2
    angle_L1P = time.astype(jnp.float32)[:, None, None] * angles(x.shape[-1])[None, None]
    angle = angle_L1P.reshape((1,) * (x.ndim - 3) + angle_L1P.shape)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    even, odd = x[..., 0 : 2 * half : 2].astype(jnp.float32), x[..., 1 : 2 * half : 2].astype(jnp.float32)
    turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return jnp.concatenate([turned.reshape(*x.shape[:-1], 2 * half).astype(x.dtype), x[..., 2 * half :]], axis=-1)


def init(key: jax.Array, config: RetNetConfig) -> Params:
    """Parameters: `query`, `key` (D, H, K), `value`, `gate` (D, H, V), `out` (H, V, D)."""
    k_query, k_key, k_value, k_gate, k_out = jax.random.split(key, 5)
    D, H, K, V, scale = config.width, config.heads, config.key_dim, config.value_dim, config.init_scale
    return {
        "query": scaled_normal(k_query, (D, H, K), D, scale),
        "key": scaled_normal(k_key, (D, H, K), D, scale),
        "value": scaled_normal(k_value, (D, H, V), D, scale),
        "gate": scaled_normal(k_gate, (D, H, V), D, scale),
        "out": scaled_normal(k_out, (H, V, D), H * V, scale),
    }


def values(params: Params, config: RetNetConfig, x: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """v (..., H, V)."""
    return project("...D,DHV->...HV", x, params["value"])


def read_out(params: Params, config: RetNetConfig, x: jax.Array, y: jax.Array) -> jax.Array:
    """Heads (..., H, V), normed one by one and gated, to the width."""
    gate = jax.nn.silu(project("...D,DHV->...HV", x, params["gate"]))
    return project("...HV,HVD->...D", gate * rms_norm(None, y).astype(x.dtype), params["out"])


def apply(params: Params, config: RetNetConfig, x_BLD: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """Parallel form, (B, L, D) to (B, L, D)."""
    # Only differences of times matter, so segments need no times of their own.
    time_L = jnp.arange(x_BLD.shape[1])
    q_BLHK, k_BLHK = (rotate(project("BLD,DHK->BLHK", x_BLD, params[name]), time_L) for name in ("query", "key"))
    y_BLHV, _ = linear_attention(
        q_BLHK,
        k_BLHK,
        values(params, config, x_BLD),
        jnp.asarray(log_decays(config.heads)),
        segment_ids=segment_ids,
        scale=config.key_dim**-0.5,
    )
    return read_out(params, config, x_BLD, y_BLHV)


def matrix(params: Params, config: RetNetConfig, x_BLD: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """m_BHLM = K^{-1/2} gamma^{t-s} q_t . R(t - s) k_s, with channels 2i and 2i + 1 as one complex number."""
    B, L, _ = x_BLD.shape
    half = config.key_dim // 2
    q_BLHK, k_BLHK = (project("BLD,DHK->BLHK", x_BLD, params[name]) for name in ("query", "key"))
    q_BLHP, k_BLHP = (
        jax.lax.complex(*(each[..., start : 2 * half : 2].astype(jnp.float32) for start in (0, 1)))
        for each in (q_BLHK, k_BLHK)
    )
    lag_LM = jnp.arange(L)[:, None] - jnp.arange(L)[None]
    turn_LMP = jnp.exp(1j * (lag_LM[..., None] * jnp.asarray(angles(config.key_dim))[None, None]))
    # Query and key at (t, s) differ in time by t - s: the real part of q conj(k) e^{i theta (t - s)}.
    scores_BHLM = jnp.einsum("BLHP,BMHP,LMP->BHLM", q_BLHP, k_BLHP.conj(), turn_LMP).real
    scores_BHLM += jnp.einsum("BLHR,BMHR->BHLM", q_BLHK[..., 2 * half :], k_BLHK[..., 2 * half :])
    log_decay_BLH = jnp.broadcast_to(log_decays(config.heads)[None, None], (B, L, config.heads))
    return config.key_dim**-0.5 * decay_products(log_decay_BLH, segment_ids) * scores_BHLM


def init_state(config: RetNetConfig, batch: int, length: int) -> RetNetState:
    """Zero sums; `length` is not needed, since the state has a fixed size."""
    sums = jnp.zeros((batch, config.heads, config.key_dim, config.value_dim))
    return RetNetState(sums, jnp.zeros((), jnp.int32))


def step(params: Params, config: RetNetConfig, x_BD: jax.Array, state: RetNetState) -> tuple[jax.Array, RetNetState]:
    """One step, (B, D) to (B, D)."""
    q_BHK, k_BHK = (
        rotate(project("BD,DHK->BHK", x_BD, params[name])[:, None], state.time[None])[:, 0] for name in ("query", "key")
    )
    y_BHV, s_BHKV = linear_attention_step(
        state.s_BHKV,
        q_BHK,
        k_BHK,
        values(params, config, x_BD),
        jnp.asarray(log_decays(config.heads)),
        scale=config.key_dim**-0.5,
    )
    return read_out(params, config, x_BD, y_BHV), RetNetState(s_BHKV, state.time + 1)


def default_config(
    width: int, heads: int, init_scale: float = 1.0, context: int = 128, causal: bool = True
) -> RetNetConfig:
    """Heads that share the width, values as wide as keys; `context` has no meaning here."""
    check_causal("retnet", causal, CAUSAL)
    head_dim = check_heads("retnet", width, heads)
    return RetNetConfig(width=width, heads=heads, key_dim=head_dim, value_dim=head_dim, init_scale=init_scale)


MIXER = Mixer(RetNetConfig, default_config, init, apply, init_state, step, Linear(values, matrix, read_out))

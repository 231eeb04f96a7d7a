"""The semiseparable structure in the block of `structured`: causal (Hwang et al., arXiv 2407.09941).

    z, u, d = W_in x,   v, q, k = silu(conv u),   dt = softplus(d + b),   a_t = exp(-dt_t exp(decay))
    m_ts = q_t (a_t .. a_{s+1}) dt_s k_s   s <= t,   y = v + M v,   out = W_out (rmsnorm(y) * silu(z))

M is a 1-semiseparable mask on the low-rank form, that is the state space dual of Mamba-2 (arXiv 2405.21060):
S_t = a_t S_{t-1} + dt_t k_t v_t^T, y_t = v_t + q_t S_t. Any block of M on or below the diagonal has rank K at most. The
convolution is causal, as the mixer is; exp(decay) starts uniform in [1, 16], and dt as in `hydra`.
"""

import math
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
    over_last,
    project,
    rms_norm,
    same_segment,
    scaled_normal,
)
from seqmod.mixers.convolution import short_convolution, short_convolution_step


@dataclass(frozen=True)
class SemiseparableConfig:
    """`width` D in and out; H `heads` share `inner` channels, and have `key_dim` K numbers of q and of k each.

    The step size dt starts log-uniform between `dt_min` and `dt_max`, for an input of zero.
    """

    width: int = 64
    inner: int = 128
    heads: int = 4
    key_dim: int = 16
    kernel: int = 7
    dt_min: float = 1e-3
    dt_max: float = 0.1
    init_scale: float = 1.0

    def __post_init__(self) -> None:
        if min(self.width, self.inner, self.key_dim, self.kernel) < 1:
            raise ValueError(f"SemiseparableConfig: sizes must be positive, got {self}")
        if not 0 < self.dt_min <= self.dt_max:
            raise ValueError(
                f"SemiseparableConfig: dt_min {self.dt_min} and dt_max {self.dt_max}, expected 0 < dt_min <= dt_max"
            )
        check_heads("SemiseparableConfig", self.inner, self.heads)

    @property
    def convolved(self) -> int:
        """Channels of the convolution: v, q and k."""
        return self.inner + 2 * self.heads * self.key_dim


class SemiseparableState(NamedTuple):
    """State (B, H, K, V) and the last kernel - 1 inputs of the convolution."""

    s_BHKV: jax.Array
    window_BWN: jax.Array


def init(key: jax.Array, config: SemiseparableConfig) -> Params:
    """Parameters: `input` (D, inner + convolved + H), of z, u and d; `conv`, `conv_bias`; `decay`, `dt_bias` (H,);
    `norm` (inner,); `out` (inner, D)."""
    k_in, k_conv, k_decay, k_dt, k_out = jax.random.split(key, 5)
    D, E, H, W, N = config.width, config.inner, config.heads, config.kernel, config.convolved
    dt_H = jnp.exp(jax.random.uniform(k_dt, (H,), minval=math.log(config.dt_min), maxval=math.log(config.dt_max)))
    dt_H = jnp.maximum(dt_H, 1e-4)
    return {
        "input": scaled_normal(k_in, (D, E + N + H), D, config.init_scale),
        "conv": scaled_normal(k_conv, (W, N), W, config.init_scale),
        "conv_bias": jnp.zeros(N),
        "decay": jnp.log(jax.random.uniform(k_decay, (H,), minval=1.0, maxval=16.0)),
        "dt_bias": dt_H + jnp.log(-jnp.expm1(-dt_H)),
        "norm": jnp.ones(E),
        "out": scaled_normal(k_out, (E, D), E, config.init_scale),
    }


def _split(params: Params, config: SemiseparableConfig, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """u (..., N) before the convolution, dt and log a (..., H) in float32."""
    E, N = config.inner, config.convolved
    projected = project("...D,DN->...N", x, params["input"][:, E:])
    raw = projected[..., N:].astype(jnp.float32)
    dt = jax.nn.softplus(raw + over_last(params["dt_bias"], raw.ndim))
    return projected[..., :N], dt, -dt * over_last(jnp.exp(params["decay"]), raw.ndim)


def _heads(config: SemiseparableConfig, u: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """v (..., H, V), q and k (..., H, K)."""
    E, H, K = config.inner, config.heads, config.key_dim
    v, q, k = jnp.split(jax.nn.silu(u), (E, E + H * K), axis=-1)
    return v.reshape(*u.shape[:-1], H, -1), q.reshape(*u.shape[:-1], H, K), k.reshape(*u.shape[:-1], H, K)


def _inputs(params: Params, config: SemiseparableConfig, x_BLD: jax.Array, segments) -> tuple[jax.Array, ...]:
    u_BLN, dt_BLH, log_a_BLH = _split(params, config, x_BLD)
    u_BLN = short_convolution(u_BLN, params["conv"], params["conv_bias"], segments)
    return *_heads(config, u_BLN), dt_BLH, log_a_BLH


def apply(params: Params, config: SemiseparableConfig, x_BLD: jax.Array, segments: jax.Array | None = None):
    """Parallel form, (B, L, D) to (B, L, D)."""
    v_BLHV, q_BLHK, k_BLHK, dt_BLH, log_a_BLH = _inputs(params, config, x_BLD, segments)
    y_BLHV, _ = linear_attention(q_BLHK, k_BLHK, dt_BLH[..., None] * v_BLHV, log_a_BLH, segment_ids=segments)
    return read_out(params, config, x_BLD, v_BLHV + y_BLHV)


def init_state(config: SemiseparableConfig, batch: int, length: int) -> SemiseparableState:
    """Zero state; `length` is not needed, since the state has a fixed size."""
    return SemiseparableState(
        jnp.zeros((batch, config.heads, config.key_dim, config.inner // config.heads)),
        jnp.zeros((batch, config.kernel - 1, config.convolved)),
    )


def step(
    params: Params, config: SemiseparableConfig, x_BD: jax.Array, state: SemiseparableState
) -> tuple[jax.Array, SemiseparableState]:
    """One step, (B, D) to (B, D)."""
    u_BN, dt_BH, log_a_BH = _split(params, config, x_BD)
    u_BN, window_BWN = short_convolution_step(u_BN, state.window_BWN, params["conv"], params["conv_bias"])
    v_BHV, q_BHK, k_BHK = _heads(config, u_BN)
    y_BHV, s_BHKV = linear_attention_step(state.s_BHKV, q_BHK, k_BHK, dt_BH[..., None] * v_BHV, log_a_BH)
    y_BD = read_out(params, config, x_BD[:, None], (v_BHV + y_BHV)[:, None])[:, 0]
    return y_BD, SemiseparableState(s_BHKV, window_BWN)


def values(params: Params, config: SemiseparableConfig, x_BLD: jax.Array, segments: jax.Array | None = None):
    """v (B, L, H, V)."""
    return _inputs(params, config, x_BLD, segments)[0]


def matrix(params: Params, config: SemiseparableConfig, x_BLD: jax.Array, segments: jax.Array | None = None):
    """I + M (B, H, L, L)."""
    _, q_BLHK, k_BLHK, dt_BLH, log_a_BLH = _inputs(params, config, x_BLD, segments)
    L = x_BLD.shape[1]
    seen_LL, before_LL = jnp.tri(L, dtype=bool), jnp.tri(L, k=-1, dtype=bool)
    # Row t sums log a of steps s + 1 .. t.
    log_a_BHLL = jnp.where(before_LL[None, None], jnp.moveaxis(log_a_BLH, 2, 1)[..., None], 0).cumsum(2)
    scores_BHLL = jnp.einsum("BTHK,BSHK->BHTS", q_BLHK, dt_BLH[..., None] * k_BLHK)
    m_BHLL = scores_BHLL * jnp.exp(jnp.where(seen_LL[None, None], log_a_BHLL, -jnp.inf))
    if segments is not None:
        m_BHLL = jnp.where(same_segment(segments)[:, None], m_BHLL, 0)
    return m_BHLL + jnp.eye(L)[None, None]


def read_out(params: Params, config: SemiseparableConfig, x_BLD: jax.Array, y_BLHV: jax.Array) -> jax.Array:
    """The norm, then the gate, then the linear map out."""
    z_BLE = project("BLD,DE->BLE", x_BLD, params["input"][:, : config.inner])
    y_BLE = rms_norm(params["norm"], y_BLHV.reshape(z_BLE.shape), 1e-5).astype(x_BLD.dtype)
    return project("BLE,ED->BLD", y_BLE * jax.nn.silu(z_BLE), params["out"])


def default_config(
    width: int, heads: int, init_scale: float = 1.0, context: int = 128, causal: bool = True
) -> SemiseparableConfig:
    """Twice the width inside; `context` has no meaning here."""
    check_causal("semiseparable", causal, CAUSAL)
    return SemiseparableConfig(width=width, inner=2 * width, heads=heads, init_scale=init_scale)


MIXER = Mixer(
    SemiseparableConfig, default_config, init, apply, init_state, step, linear=Linear(values, matrix, read_out)
)

"""Hydra: a quasiseparable mixer, which sees both ways (Hwang et al., arXiv 2407.09941).

    z, u, d, d' = W_in x,   v, B, C, B', C' = silu(conv u),   dt, dt' = softplus(d + b), softplus(d' + b)
    y = shift(ssm(v; dt, B, C)) + reversed shift(reversed ssm(v; dt', B', C')) + (v W_D + D) v
    out = W_out (rmsnorm(y) * silu(z))

The convolution is centred. The state space model is that of Mamba-2: S_t = exp(A dt_t) S_{t-1} + dt_t B_t v_t^T,
y_t = C_t S_t, with a scalar A per head. The shift moves outputs by one step and puts zeros first, so that the diagonal
of the matrix is free. With a_t = exp(A dt_t), the matrix of a head is

    m_ts = C_{t-1} (a_{t-1} .. a_{s+1}) dt_s B_s          s < t
    m_tt = v_t W_D + D
    m_ts = C'_{t+1} (a'_{t+1} .. a'_{s-1}) dt'_s B'_s     s > t

whose blocks below the diagonal, and above, have rank N at most. This is what the authors' code computes; the general
definition of a quasiseparable matrix has C_t in place of C_{t-1}, and describes the same class.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from kernels.linear_attention import linear_attention
from seqmod.mixers.base import (
    NONCAUSAL,
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
    segment_runs,
)
from seqmod.mixers.convolution import short_convolution


@dataclass(frozen=True)
class HydraConfig:
    """`width` D in and out; H `heads` share `inner` channels; `groups` G of heads share B and C of `state` N numbers.

    The step size dt starts log-uniform between `dt_min` and `dt_max`, for an input of zero.
    """

    width: int = 64
    inner: int = 128
    heads: int = 4
    state: int = 64
    groups: int = 1
    kernel: int = 7
    dt_min: float = 1e-3
    dt_max: float = 0.1
    init_scale: float = 1.0

    def __post_init__(self) -> None:
        if min(self.width, self.inner, self.state, self.groups) < 1:
            raise ValueError(f"HydraConfig: sizes must be positive, got {self}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"HydraConfig: kernel is {self.kernel}, expected an odd number of a centred convolution")
        if not 0 < self.dt_min <= self.dt_max:
            raise ValueError(
                f"HydraConfig: dt_min {self.dt_min} and dt_max {self.dt_max}, expected 0 < dt_min <= dt_max"
            )
        check_heads("HydraConfig", self.inner, self.heads)
        if self.heads % self.groups:
            raise ValueError(f"HydraConfig: heads {self.heads} are not divisible by groups {self.groups}")

    @property
    def convolved(self) -> int:
        """Channels of the convolution: v, and B and C of both directions."""
        return self.inner + 4 * self.groups * self.state


def init(key: jax.Array, config: HydraConfig) -> Params:
    """Parameters: `input` (D, inner + convolved + 2 H), of z, u and dt; `conv`, `conv_bias`; `decay` = log -A,
    `dt_bias`, `skip` = D (H,); `skip_input` = W_D (inner, H); `norm` (inner,); `out` (inner, D)."""
    k_in, k_conv, k_dt, k_skip, k_out = jax.random.split(key, 5)
    D, E, H, W, N = config.width, config.inner, config.heads, config.kernel, config.convolved
    dt_H = jnp.exp(jax.random.uniform(k_dt, (H,), minval=math.log(config.dt_min), maxval=math.log(config.dt_max)))
    dt_H = jnp.maximum(dt_H, 1e-4)
    return {
        "input": scaled_normal(k_in, (D, E + N + 2 * H), D, config.init_scale),
        "conv": scaled_normal(k_conv, (W, N), W, config.init_scale),
        "conv_bias": jnp.zeros(N),
        "decay": jnp.zeros(H),
        "dt_bias": dt_H + jnp.log(-jnp.expm1(-dt_H)),
        "skip": jnp.ones(H),
        "skip_input": scaled_normal(k_skip, (E, H), E, config.init_scale),
        "norm": jnp.ones(E),
        "out": scaled_normal(k_out, (E, D), E, config.init_scale),
    }


def _convolved(params: Params, config: HydraConfig, x_BLD: jax.Array, segments) -> jax.Array:
    E, N = config.inner, config.convolved
    u_BLN = project("BLD,DN->BLN", x_BLD, params["input"][:, E : E + N])
    return jax.nn.silu(short_convolution(u_BLN, params["conv"], params["conv_bias"], segments, causal=False))


def _values(config: HydraConfig, u_BLN: jax.Array) -> jax.Array:
    return u_BLN[..., : config.inner].reshape(*u_BLN.shape[:2], config.heads, -1)


def _systems(params: Params, config: HydraConfig, x_BLD: jax.Array, u_BLN: jax.Array) -> list[tuple[jax.Array, ...]]:
    """B, C (B, L, H, N), dt and log-decay (B, L, H) of the forward and of the reverse system."""
    H, G, N = config.heads, config.groups, config.state
    bc_BLFGN = u_BLN[..., config.inner :].reshape(*u_BLN.shape[:2], 4, G, N)
    bc_BLFHN = jnp.repeat(bc_BLFGN, H // G, axis=3)
    dt_BLH = project("BLD,DH->BLH", x_BLD, params["input"][:, -2 * H :]).astype(jnp.float32)
    systems = []
    for way in range(2):
        dt = jax.nn.softplus(dt_BLH[..., way * H : (way + 1) * H] + over_last(params["dt_bias"], 3))
        log_a = -dt * over_last(jnp.exp(params["decay"]), 3)
        systems.append((bc_BLFHN[:, :, 2 * way], bc_BLFHN[:, :, 2 * way + 1], dt, log_a))
    return systems


def _diagonal(params: Params, u_BLN: jax.Array) -> jax.Array:
    """v W_D + D (B, L, H)."""
    v_BLE = u_BLN[..., : params["skip_input"].shape[0]].astype(jnp.float32)
    return project("BLE,EH->BLH", v_BLE, params["skip_input"]) + over_last(params["skip"], 3)


def _shift(y_BLHV: jax.Array, segments: jax.Array | None, reverse: bool) -> jax.Array:
    """Outputs one step later, or with `reverse` one earlier; zeros at the first step of a segment."""
    first = slice(None, -1) if reverse else slice(1, None)
    last = slice(1, None) if reverse else slice(None, -1)
    moved_BLHV = jnp.pad(y_BLHV[:, last], ((0, 0), (0, 1) if reverse else (1, 0), (0, 0), (0, 0)))
    if segments is None:
        return moved_BLHV
    runs_BL = segment_runs(segments)
    same_BL = jnp.pad(runs_BL[:, first] == runs_BL[:, last], ((0, 0), (0, 1) if reverse else (1, 0)))
    return jnp.where(same_BL[..., None, None], moved_BLHV, 0)


def apply(params: Params, config: HydraConfig, x_BLD: jax.Array, segments: jax.Array | None = None) -> jax.Array:
    """Parallel form, (B, L, D) to (B, L, D)."""
    u_BLN = _convolved(params, config, x_BLD, segments)
    v_BLHV = _values(config, u_BLN)
    y_BLHV = _diagonal(params, u_BLN)[..., None] * v_BLHV
    for way, (b_BLHN, c_BLHN, dt_BLH, log_a_BLH) in enumerate(_systems(params, config, x_BLD, u_BLN)):
        ssm_BLHV, _ = linear_attention(
            c_BLHN, b_BLHN, dt_BLH[..., None] * v_BLHV, log_a_BLH, segment_ids=segments, reverse=way == 1
        )
        y_BLHV = y_BLHV + _shift(ssm_BLHV, segments, way == 1)
    return read_out(params, config, x_BLD, y_BLHV)


def values(params: Params, config: HydraConfig, x_BLD: jax.Array, segments: jax.Array | None = None) -> jax.Array:
    """v (B, L, H, V)."""
    return _values(config, _convolved(params, config, x_BLD, segments))


def matrix(params: Params, config: HydraConfig, x_BLD: jax.Array, segments: jax.Array | None = None) -> jax.Array:
    """The quasiseparable matrix (B, H, L, L)."""
    u_BLN = _convolved(params, config, x_BLD, segments)
    L = x_BLD.shape[1]
    ahead, back = _systems(params, config, x_BLD, u_BLN)
    # Above the diagonal, the same from the other end.
    back = [jnp.flip(each, 1) for each in back]
    m_BHLL = _below(*ahead) + jnp.flip(_below(*back), (2, 3))
    m_BHLL = m_BHLL + jnp.moveaxis(_diagonal(params, u_BLN), 2, 1)[..., None] * jnp.eye(L)[None, None]
    return m_BHLL if segments is None else jnp.where(same_segment(segments)[:, None], m_BHLL, 0)


def _below(b_BLHN: jax.Array, c_BLHN: jax.Array, dt_BLH: jax.Array, log_a_BLH: jax.Array) -> jax.Array:
    """C_{t-1} (a_{t-1} .. a_{s+1}) dt_s B_s for s < t, else 0."""
    L = b_BLHN.shape[1]
    before_LL = jnp.tri(L, k=-1, dtype=bool)
    # Row t sums log a of steps s + 1 .. t, then of s + 1 .. t - 1.
    log_a_BHLL = jnp.where(before_LL[None, None], jnp.moveaxis(log_a_BLH, 2, 1)[..., None], 0).cumsum(2)
    moved = ((0, 0), (0, 0), (1, 0), (0, 0))
    log_a_BHLL = jnp.pad(log_a_BHLL, moved)[:, :, :-1]
    scores_BHLL = jnp.einsum("BTHN,BSHN->BHTS", c_BLHN, dt_BLH[..., None] * b_BLHN)
    scores_BHLL = jnp.pad(scores_BHLL, moved)[:, :, :-1]
    return scores_BHLL * jnp.exp(jnp.where(before_LL[None, None], log_a_BHLL, -jnp.inf))


def read_out(params: Params, config: HydraConfig, x_BLD: jax.Array, y_BLHV: jax.Array) -> jax.Array:
    """The norm, then the gate, then the linear map out."""
    z_BLE = project("BLD,DE->BLE", x_BLD, params["input"][:, : config.inner])
    y_BLE = rms_norm(params["norm"], y_BLHV.reshape(z_BLE.shape), 1e-5).astype(x_BLD.dtype)
    return project("BLE,ED->BLD", y_BLE * jax.nn.silu(z_BLE), params["out"])


def default_config(
    width: int, heads: int, init_scale: float = 1.0, context: int = 128, causal: bool = True
) -> HydraConfig:
    """Twice the width inside; `context` has no meaning here."""
    check_causal("hydra", causal, NONCAUSAL)
    return HydraConfig(width=width, inner=2 * width, heads=heads, init_scale=init_scale)


MIXER = Mixer(HydraConfig, default_config, init, apply, linear=Linear(values, matrix, read_out), patterns=NONCAUSAL)

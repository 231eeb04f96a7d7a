"""The recurrent block of Hawk: RG-LRU between a short convolution and a gate (De et al., arXiv 2402.19427, section 2).

    r_t = sigmoid(W_r u_t),  i_t = sigmoid(W_i u_t)          block-diagonal over heads, with biases
    log a_t = -8 softplus(lambda) r_t
    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t u_t)

u is the input after a linear map to the recurrence width and a causal convolution of width 4; the output is
W_out (gelu(W_gate x) * h). lambda is initialised so that a^8 is uniform in [0.9, 0.999]. The mixer of the paper's
ant base model (arXiv 2512.20605, Table A15), of our embedder and of the internal-RL policy.
"""

from dataclasses import dataclass
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.linear_recurrence import linear_recurrence
from seqmod.mixers.base import Mixer, Params, scaled_normal, segment_runs

_SHARPNESS = 8.0


@dataclass(frozen=True)
class RGLRUConfig:
    """`width` D in and out, `recurrence` N channels in `heads` blocks, convolution over `kernel` steps."""

    width: int = 64
    recurrence: int = 64
    heads: int = 4
    kernel: int = 4
    init_scale: float = 1.0

    def __post_init__(self) -> None:
        if min(self.width, self.recurrence, self.heads, self.kernel) < 1:
            raise ValueError(f"RGLRUConfig: sizes must be positive, got {self}")
        if self.recurrence % self.heads:
            raise ValueError(f"RGLRUConfig: recurrence {self.recurrence} is not divisible by heads {self.heads}")


class RGLRUState(NamedTuple):
    """Recurrent state (B, N) and the last kernel - 1 inputs of the convolution (B, kernel - 1, N)."""

    h_BN: jax.Array
    window_BWN: jax.Array


def init(key: jax.Array, config: RGLRUConfig) -> Params:
    """Parameters: `gate`, `input` (D, N), `conv` (kernel, N), `gates` (2, H, N/H, N/H), `decay` (N,), `out` (N, D)."""
    k_gate, k_in, k_conv, k_gates, k_decay, k_out = jax.random.split(key, 6)
    D, N, H, W, scale = config.width, config.recurrence, config.heads, config.kernel, config.init_scale
    decay = jax.random.uniform(k_decay, (N,), minval=0.9, maxval=0.999)
    return {
        "gate": scaled_normal(k_gate, (D, N), D, scale),
        "input": scaled_normal(k_in, (D, N), D, scale),
        "conv": scaled_normal(k_conv, (W, N), W, scale),
        "conv_bias": jnp.zeros(N),
        "gates": scaled_normal(k_gates, (2, H, N // H, N // H), N // H, scale),
        "gates_bias": jnp.zeros((2, N)),
        "decay": jnp.log(jnp.expm1(-jnp.log(decay) / _SHARPNESS)),
        "out": scaled_normal(k_out, (N, D), N, scale),
    }


def _recurrence_inputs(params: Params, config: RGLRUConfig, u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """a and the scaled input of the recurrence from u (..., N)."""
    blocks = u.reshape(*u.shape[:-1], config.heads, -1)
    gates = jnp.einsum("...HI,GHIJ->G...HJ", blocks, params["gates"]).reshape(2, *u.shape)
    bias = params["gates_bias"].reshape(2, *(1,) * (u.ndim - 1), -1)
    reset, pass_in = jax.nn.sigmoid(gates + bias)
    rate = _SHARPNESS * jax.nn.softplus(params["decay"])
    log_a = -rate.reshape((1,) * (u.ndim - 1) + (-1,)) * reset
    # 1 - a^2 through expm1 is exact for slow decays; the floor keeps the gradient finite where the gate has saturated.
    fresh = jnp.maximum(-jnp.expm1(2 * log_a), 1e-12)
    return jnp.exp(log_a), jnp.sqrt(fresh) * pass_in * u


def apply(params: Params, config: RGLRUConfig, x_BLD: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """Parallel form, (B, L, D) to (B, L, D)."""
    L, W = x_BLD.shape[1], config.kernel
    u_BLN = x_BLD @ params["input"]
    padded = jnp.pad(u_BLN, ((0, 0), (W - 1, 0), (0, 0)))
    runs_BL = None if segment_ids is None else segment_runs(segment_ids)
    conv_BLN = params["conv_bias"][None, None]
    for lag in range(W):
        tap_BLN = padded[:, W - 1 - lag : W - 1 - lag + L]
        if runs_BL is not None:
            # Steps before the first see the zeros of the padding, whatever their segment.
            delayed_BL = jnp.pad(runs_BL, ((0, 0), (lag, 0)))[:, :L]
            tap_BLN = tap_BLN * (runs_BL == delayed_BL)[..., None]
        conv_BLN = conv_BLN + tap_BLN * params["conv"][W - 1 - lag][None, None]
    a_BLN, scaled_BLN = _recurrence_inputs(params, config, conv_BLN)
    h_BLN, _ = linear_recurrence(a_BLN, scaled_BLN, segment_ids=segment_ids)
    return (jax.nn.gelu(x_BLD @ params["gate"]) * h_BLN) @ params["out"]


def init_state(config: RGLRUConfig, batch: int, length: int) -> RGLRUState:
    """Zero state; `length` is not needed, since the state has a fixed size."""
    return RGLRUState(jnp.zeros((batch, config.recurrence)), jnp.zeros((batch, config.kernel - 1, config.recurrence)))


def step(params: Params, config: RGLRUConfig, x_BD: jax.Array, state: RGLRUState) -> tuple[jax.Array, RGLRUState]:
    """One step, (B, D) to (B, D)."""
    window = jnp.concatenate([state.window_BWN, (x_BD @ params["input"])[:, None]], axis=1)
    conv_BN = (window * params["conv"][None]).sum(1) + params["conv_bias"][None]
    a_BN, scaled_BN = _recurrence_inputs(params, config, conv_BN)
    h_BN = a_BN * state.h_BN + scaled_BN
    y_BD = (jax.nn.gelu(x_BD @ params["gate"]) * h_BN) @ params["out"]
    return y_BD, RGLRUState(h_BN, window[:, 1:])


def default_config(width: int, heads: int, init_scale: float = 1.0, context: int = 128) -> RGLRUConfig:
    """Recurrence as wide as the model; `context` has no meaning here."""
    return RGLRUConfig(width=width, recurrence=width, heads=heads, init_scale=init_scale)


class RGLRU(nn.Module):
    """Linen module around `init` and `apply`."""

    config: RGLRUConfig

    @nn.compact
    def __call__(self, x_BLD: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        params = self.param("mixer", lambda key: init(key, self.config))
        return apply(params, self.config, x_BLD, segment_ids)


MIXER = Mixer(default_config, init, apply, init_state, step)

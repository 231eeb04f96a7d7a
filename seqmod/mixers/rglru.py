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

import jax
import jax.numpy as jnp

from kernels.linear_recurrence import linear_recurrence
from seqmod.mixers.base import CAUSAL, Mixer, Params, check_causal, over_last, project, scaled_normal
from seqmod.mixers.convolution import short_convolution, short_convolution_step

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
    """a and the scaled input of the recurrence from u (..., N), in float32."""
    blocks = u.reshape(*u.shape[:-1], config.heads, -1)
    gates = project("...HI,GHIJ->G...HJ", blocks, params["gates"]).reshape(2, *u.shape).astype(jnp.float32)
    bias = params["gates_bias"].reshape(2, *(1,) * (u.ndim - 1), -1)
    reset, pass_in = jax.nn.sigmoid(gates + bias)
    log_a = -over_last(_SHARPNESS * jax.nn.softplus(params["decay"]), u.ndim) * reset
    # 1 - a^2 through expm1 is exact for slow decays; the floor keeps the gradient finite where the gate has saturated.
    fresh = jnp.maximum(-jnp.expm1(2 * log_a), 1e-12)
    return jnp.exp(log_a), jnp.sqrt(fresh) * pass_in * u


def _read_out(params: Params, x: jax.Array, h: jax.Array) -> jax.Array:
    gate = jax.nn.gelu(project("...D,DN->...N", x, params["gate"]))
    return project("...N,ND->...D", gate * h.astype(x.dtype), params["out"])


def apply(params: Params, config: RGLRUConfig, x_BLD: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """Parallel form, (B, L, D) to (B, L, D)."""
    u_BLN = project("BLD,DN->BLN", x_BLD, params["input"])
    u_BLN = short_convolution(u_BLN, params["conv"], params["conv_bias"], segment_ids)
    a_BLN, scaled_BLN = _recurrence_inputs(params, config, u_BLN)
    h_BLN, _ = linear_recurrence(a_BLN, scaled_BLN, segment_ids=segment_ids)
    return _read_out(params, x_BLD, h_BLN)


def init_state(config: RGLRUConfig, batch: int, length: int) -> RGLRUState:
    """Zero state; `length` is not needed, since the state has a fixed size."""
    return RGLRUState(jnp.zeros((batch, config.recurrence)), jnp.zeros((batch, config.kernel - 1, config.recurrence)))


def step(params: Params, config: RGLRUConfig, x_BD: jax.Array, state: RGLRUState) -> tuple[jax.Array, RGLRUState]:
    """One step, (B, D) to (B, D)."""
    u_BN = project("BD,DN->BN", x_BD, params["input"])
    u_BN, window_BWN = short_convolution_step(u_BN, state.window_BWN, params["conv"], params["conv_bias"])
    a_BN, scaled_BN = _recurrence_inputs(params, config, u_BN)
    h_BN = a_BN * state.h_BN + scaled_BN
    return _read_out(params, x_BD, h_BN), RGLRUState(h_BN, window_BWN)


def default_config(
    width: int, heads: int, init_scale: float = 1.0, context: int = 128, causal: bool = True
) -> RGLRUConfig:
    """Recurrence as wide as the model; `context` has no meaning here."""
    check_causal("rglru", causal, CAUSAL)
    return RGLRUConfig(width=width, recurrence=width, heads=heads, init_scale=init_scale)


MIXER = Mixer(RGLRUConfig, default_config, init, apply, init_state, step)

"""The recurrent block of Hawk: RG-LRU between a short convolution and a gate (De et al., arXiv 2402.19427, section 2).

    r_t = sigmoid(W_r u_t),  i_t = sigmoid(W_i u_t)          block-diagonal over heads, with biases
    log a_t = -8 softplus(lambda) r_t
    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t u_t)

u is the input after a linear map to the recurrence width and a causal convolution of width 4; the output is
W_out (gelu(W_gate x) * h). lambda is initialised so that a^8 is uniform in [0.9, 0.999]. The mixer of the paper's
ant base model (arXiv 2512.20605, Table A15), of our embedder and of the internal-RL policy.

The text says so of a^8, a at an open gate being exp(-softplus(lambda))^8. The published code (recurrentgemma) draws
exp(-softplus(lambda)) from that range, uniform in area, so that a at an open gate starts in [0.43, 0.992]. That code
also has biases in the linear maps, `bias`, and at the first step of a sequence takes i_t u_t as it is, `whole_first`.
With both, `from_published` gives its block.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.linear_recurrence import linear_recurrence
from seqmod.mixers.base import (
    CAUSAL,
    Linear,
    Mixer,
    Params,
    check_causal,
    over_last,
    project,
    same_segment,
    scaled_normal,
    segment_runs,
)
from seqmod.mixers.convolution import short_convolution, short_convolution_step

_SHARPNESS = 8.0


@dataclass(frozen=True)
class RGLRUConfig:
    """`width` D in and out, `recurrence` N channels in `heads` blocks, convolution over `kernel` steps. `bias`: biases
    of the linear maps; `whole_first`: the first input of a sequence is not multiplied by sqrt(1 - a^2)."""

    width: int = 64
    recurrence: int = 64
    heads: int = 4
    kernel: int = 4
    init_scale: float = 1.0
    bias: bool = False
    whole_first: bool = False

    def __post_init__(self) -> None:
        if min(self.width, self.recurrence, self.heads, self.kernel) < 1:
            raise ValueError(f"RGLRUConfig: sizes must be positive, got {self}")
        if self.recurrence % self.heads:
            raise ValueError(f"RGLRUConfig: recurrence {self.recurrence} is not divisible by heads {self.heads}")


class RGLRUState(NamedTuple):
    """Recurrent state (B, N) and the last kernel - 1 inputs of the convolution (B, kernel - 1, N); with `whole_first`
    also whether the next step is the first (B,)."""

    h_BN: jax.Array
    window_BWN: jax.Array
    first_B: jax.Array | None = None


def init(key: jax.Array, config: RGLRUConfig) -> Params:
    """Parameters: `gate`, `input` (D, N), `conv` (kernel, N), `gates` (2, H, N/H, N/H), `decay` (N,), `out` (N, D);
    with `bias` also `gate_bias`, `input_bias` and `out_bias`."""
    k_gate, k_in, k_conv, k_gates, k_decay, k_out = jax.random.split(key, 6)
    D, N, H, W, scale = config.width, config.recurrence, config.heads, config.kernel, config.init_scale
    decay = jax.random.uniform(k_decay, (N,), minval=0.9, maxval=0.999)
    params = {
        "gate": scaled_normal(k_gate, (D, N), D, scale),
        "input": scaled_normal(k_in, (D, N), D, scale),
        "conv": scaled_normal(k_conv, (W, N), W, scale),
        "conv_bias": jnp.zeros(N),
        "gates": scaled_normal(k_gates, (2, H, N // H, N // H), N // H, scale),
        "gates_bias": jnp.zeros((2, N)),
        "decay": jnp.log(jnp.expm1(-jnp.log(decay) / _SHARPNESS)),
        "out": scaled_normal(k_out, (N, D), N, scale),
    }
    if config.bias:
        params |= {"gate_bias": jnp.zeros(N), "input_bias": jnp.zeros(N), "out_bias": jnp.zeros(D)}
    return params


def from_published(config: RGLRUConfig, tensors: Mapping[str, Any]) -> Params:
    """Parameters from arrays named as in the `transformers` package: `linear_y.weight`, `linear_x.weight`,
    `linear_out.weight`, `conv_1d.weight`, `rg_lru.recurrent_param`, `rg_lru.recurrent_gate_weight`,
    `rg_lru.input_gate_weight` and the biases. Raises ValueError where shapes are others than those of the config,
    which must have biases."""
    if not config.bias:
        raise ValueError("from_published: the config has no biases, expected bias=True, since published blocks have")
    arrays = {name: jnp.asarray(tensor, jnp.float32) for name, tensor in tensors.items()}
    gates = [arrays[f"rg_lru.{gate}_gate_weight"] for gate in ("recurrent", "input")]
    gate_biases = [arrays[f"rg_lru.{gate}_gate_bias"].reshape(-1) for gate in ("recurrent", "input")]
    params = {
        "gate": arrays["linear_y.weight"].T,
        "gate_bias": arrays["linear_y.bias"],
        "input": arrays["linear_x.weight"].T,
        "input_bias": arrays["linear_x.bias"],
        "conv": arrays["conv_1d.weight"].reshape(config.recurrence, -1).T,
        "conv_bias": arrays["conv_1d.bias"],
        "gates": jnp.stack(gates),
        "gates_bias": jnp.stack(gate_biases),
        "decay": arrays["rg_lru.recurrent_param"],
        "out": arrays["linear_out.weight"].T,
        "out_bias": arrays["linear_out.bias"],
    }
    expected = jax.tree.map(jnp.shape, jax.eval_shape(lambda: init(jax.random.key(0), config)))
    if (shapes := jax.tree.map(jnp.shape, params)) != expected:
        raise ValueError(f"from_published: tensors become {shapes}, expected {expected}")
    return params


def _affine(params: Params, name: str, x: jax.Array) -> jax.Array:
    y = project("...I,IO->...O", x, params[name])
    return y + over_last(params[f"{name}_bias"], y.ndim).astype(y.dtype) if f"{name}_bias" in params else y


def _recurrence_inputs(
    params: Params, config: RGLRUConfig, u: jax.Array, first: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """log a and the factor of u (..., N) in the recurrence, in float32; `first` (...) marks first steps, if they are
    to be taken whole."""
    blocks = u.reshape(*u.shape[:-1], config.heads, -1)
    gates = project("...HI,GHIJ->G...HJ", blocks, params["gates"]).reshape(2, *u.shape).astype(jnp.float32)
    bias = params["gates_bias"].reshape(2, *(1,) * (u.ndim - 1), -1)
    reset, pass_in = jax.nn.sigmoid(gates + bias)
    log_a = -over_last(_SHARPNESS * jax.nn.softplus(params["decay"]), u.ndim) * reset
    # 1 - a^2 through expm1 is exact for slow decays; the floor keeps the gradient finite where the gate has saturated.
    fresh = jnp.maximum(-jnp.expm1(2 * log_a), 1e-12)
    share = jnp.sqrt(fresh)
    if first is not None:
        share = jnp.where(first[..., None], 1, share)
    return log_a, share * pass_in


def _read_out(params: Params, x: jax.Array, h: jax.Array) -> jax.Array:
    return _affine(params, "out", jax.nn.gelu(_affine(params, "gate", x)) * h.astype(x.dtype))


def _convolved(params: Params, x_BLD: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    return short_convolution(_affine(params, "input", x_BLD), params["conv"], params["conv_bias"], segment_ids)


def _first_steps(config: RGLRUConfig, x_BLD: jax.Array, segment_ids: jax.Array | None) -> jax.Array | None:
    if not config.whole_first:
        return None
    runs_BL = jnp.zeros(x_BLD.shape[:2], jnp.int32) if segment_ids is None else segment_runs(segment_ids)
    return jnp.diff(runs_BL, axis=1, prepend=-1) > 0


def apply(params: Params, config: RGLRUConfig, x_BLD: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """Parallel form, (B, L, D) to (B, L, D)."""
    u_BLN = _convolved(params, x_BLD, segment_ids)
    log_a_BLN, share_BLN = _recurrence_inputs(params, config, u_BLN, _first_steps(config, x_BLD, segment_ids))
    h_BLN, _ = linear_recurrence(jnp.exp(log_a_BLN), share_BLN * u_BLN, segment_ids=segment_ids)
    return _read_out(params, x_BLD, h_BLN)


def init_state(config: RGLRUConfig, batch: int, length: int) -> RGLRUState:
    """Zero state; `length` is not needed, since the state has a fixed size."""
    h_BN = jnp.zeros((batch, config.recurrence))
    window_BWN = jnp.zeros((batch, config.kernel - 1, config.recurrence))
    return RGLRUState(h_BN, window_BWN, jnp.ones(batch, bool) if config.whole_first else None)


def step(params: Params, config: RGLRUConfig, x_BD: jax.Array, state: RGLRUState) -> tuple[jax.Array, RGLRUState]:
    """One step, (B, D) to (B, D)."""
    u_BN = _affine(params, "input", x_BD)
    u_BN, window_BWN = short_convolution_step(u_BN, state.window_BWN, params["conv"], params["conv_bias"])
    log_a_BN, share_BN = _recurrence_inputs(params, config, u_BN, state.first_B)
    h_BN = jnp.exp(log_a_BN) * state.h_BN + share_BN * u_BN
    first_B = None if state.first_B is None else jnp.zeros_like(state.first_B)
    return _read_out(params, x_BD, h_BN), RGLRUState(h_BN, window_BWN, first_B)


def values(params: Params, config: RGLRUConfig, x_BLD: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """u after the convolution, (B, L, N, 1)."""
    del config
    return _convolved(params, x_BLD, segment_ids)[..., None]


def matrix(params: Params, config: RGLRUConfig, x_BLD: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """a_{s+1} .. a_t sqrt(1 - a_s^2) i_s at [t, s], (B, N, L, L)."""
    B, L, _ = x_BLD.shape
    u_BLN = values(params, config, x_BLD, segment_ids)[..., 0]
    log_a_BLN, share_BLN = _recurrence_inputs(params, config, u_BLN, _first_steps(config, x_BLD, segment_ids))
    # Only the steps after s are summed, so that no large sums cancel.
    after_LL = jnp.tril(jnp.ones((L, L), bool), -1)
    log_a_BNL, share_BNL = jnp.swapaxes(log_a_BLN, 1, 2), jnp.swapaxes(share_BLN, 1, 2)
    decay_BNLL = jnp.exp(jnp.cumsum(jnp.where(after_LL[None, None], log_a_BNL[..., None], 0), axis=2))
    seen_BLL = jnp.broadcast_to(jnp.tril(jnp.ones((L, L), bool)), (B, L, L))
    if segment_ids is not None:
        seen_BLL = seen_BLL & same_segment(segment_ids)
    return jnp.where(seen_BLL[:, None], decay_BNLL * share_BNL[:, :, None], 0)


def read_out(params: Params, config: RGLRUConfig, x_BLD: jax.Array, y_BLNV: jax.Array) -> jax.Array:
    """The output from states (B, L, N, 1)."""
    del config
    return _read_out(params, x_BLD, y_BLNV[..., 0])


def default_config(
    width: int, heads: int, init_scale: float = 1.0, context: int = 128, causal: bool = True
) -> RGLRUConfig:
    """Recurrence as wide as the model; `context` has no meaning here."""
    check_causal("rglru", causal, CAUSAL)
    return RGLRUConfig(width=width, recurrence=width, heads=heads, init_scale=init_scale)


MIXER = Mixer(RGLRUConfig, default_config, init, apply, init_state, step, linear=Linear(values, matrix, read_out))

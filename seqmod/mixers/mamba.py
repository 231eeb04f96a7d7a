"""The Mamba block: a selective state space between a short convolution and a gate (Gu and Dao, arXiv 2312.00752).

    u, z = W_in x,   u <- silu(conv(u)),   (r, B, C) = W_x u,   dt = softplus(W_dt r + b_dt)
    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t,   A = -exp(A_log)          N states for each of expand * width channels
    output = W_out ((C_t h_t + skip u_t) * silu(z))

B and C are shared by all channels. A starts at -1 .. -N, the skip at one, b_dt so that dt is log-uniform in
[0.001, 0.1], and W_dt uniform within rank^-1/2; W_out is divided by the root of the number of layers. Other matrices
start as those of all mixers here do. `from_published` takes the tensors of a trained block.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.selective_scan import selective_scan, selective_scan_step
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
)
from seqmod.mixers.convolution import short_convolution, short_convolution_step
from seqmod.mixers.diagonal import check_step_sizes, log_step_sizes, widen


@dataclass(frozen=True)
class MambaConfig:
    """`width` D (`hidden_size` of published configs), `states` N (`state_size`), `expand`, `kernel` (`conv_kernel`),
    `rank` of dt (`time_step_rank`), width / 16 rounded up if not given; `bias` of W_in and W_out (`use_bias`) and
    `conv_bias` (`use_conv_bias`). dt starts in [`dt_min`, `dt_max`] and no lower than `dt_floor`; `layers` of the model
    that the block is for scale W_out."""

    width: int = 64
    states: int = 16
    expand: int = 2
    kernel: int = 4
    rank: int | None = None
    bias: bool = False
    conv_bias: bool = True
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_floor: float = 1e-4
    layers: int = 1
    init_scale: float = 1.0

    def __post_init__(self) -> None:
        if min(self.width, self.states, self.expand, self.kernel, self.dt_rank, self.layers) < 1:
            raise ValueError(f"MambaConfig: sizes must be positive, got {self}")
        check_step_sizes("MambaConfig", self.dt_min, self.dt_max)
        if self.dt_floor <= 0:
            raise ValueError(f"MambaConfig: dt_floor is {self.dt_floor}, expected a positive step size")

    @property
    def inner(self) -> int:
        """Channels I of the state space (`intermediate_size`)."""
        return self.expand * self.width

    @property
    def dt_rank(self) -> int:
        """Rank R of dt."""
        return math.ceil(self.width / 16) if self.rank is None else self.rank


class MambaState(NamedTuple):
    """States (B, I, N) and the last kernel - 1 inputs of the convolution (B, kernel - 1, I)."""

    h_BIN: jax.Array
    window_BWI: jax.Array


def init(key: jax.Array, config: MambaConfig) -> Params:
    """Parameters: `in_proj` (D, 2 I), `conv` (kernel, I), `x_proj` (I, R + 2 N), `dt_proj` (R, I) and `dt_bias` (I,),
    `A_log` (I, N), `skip` (I,), `out_proj` (I, D); with biases `conv_bias`, `in_bias`, `out_bias`."""
    k_in, k_conv, k_x, k_dt, k_step, k_out = jax.random.split(key, 6)
    D, I, N, R, W, scale = config.width, config.inner, config.states, config.dt_rank, config.kernel, config.init_scale
    dt_I = jnp.maximum(jnp.exp(log_step_sizes(k_step, (I,), config.dt_min, config.dt_max)), config.dt_floor)
    params = {
        "in_proj": scaled_normal(k_in, (D, 2 * I), D, scale),
        "conv": scaled_normal(k_conv, (W, I), W, scale),
        "x_proj": scaled_normal(k_x, (I, R + 2 * N), I, scale),
        "dt_proj": jax.random.uniform(k_dt, (R, I), minval=-(R**-0.5), maxval=R**-0.5),
        # The inverse of softplus, for small arguments too.
        "dt_bias": dt_I + jnp.log(-jnp.expm1(-dt_I)),
        "A_log": jnp.broadcast_to(jnp.log(jnp.arange(1, N + 1, dtype=jnp.float32)), (I, N)),
        "skip": jnp.ones(I),
        "out_proj": scaled_normal(k_out, (I, D), I, scale / config.layers),
    }
    if config.conv_bias:
        params["conv_bias"] = jnp.zeros(I)
    if config.bias:
        params |= {"in_bias": jnp.zeros(2 * I), "out_bias": jnp.zeros(D)}
    return params


def from_published(config: MambaConfig, tensors: Mapping[str, Any]) -> Params:
    """Parameters from arrays named as in the authors' and the `transformers` packages: `in_proj.weight`,
    `conv1d.weight`, `x_proj.weight`, `dt_proj.weight`, `A_log`, `D` and so on. Raises ValueError where shapes or names
    are others than those of the config."""
    names = {
        "in_proj": "in_proj.weight",
        "conv": "conv1d.weight",
        "conv_bias": "conv1d.bias",
        "x_proj": "x_proj.weight",
        "dt_proj": "dt_proj.weight",
        "dt_bias": "dt_proj.bias",
        "out_proj": "out_proj.weight",
        "in_bias": "in_proj.bias",
        "out_bias": "out_proj.bias",
        "A_log": "A_log",
        "skip": "D",
    }
    shapes = {name: leaf.shape for name, leaf in jax.eval_shape(lambda: init(jax.random.key(0), config)).items()}
    expected = {names[name] for name in shapes}
    if set(tensors) != expected:
        raise ValueError(f"from_published: tensors are {sorted(tensors)}, expected {sorted(expected)}")
    params = {}
    for name, shape in shapes.items():
        array = jnp.asarray(tensors[names[name]], jnp.float32)
        if name == "conv":
            array = array.reshape(array.shape[0], -1).T
        elif name.endswith("_proj"):
            array = array.T
        if array.shape != shape:
            raise ValueError(f"from_published: {names[name]} becomes {array.shape}, expected {shape}")
        params[name] = array
    return params


def _bias(params: Params, name: str, x: jax.Array) -> jax.Array:
    return x + over_last(params[name], x.ndim).astype(x.dtype) if name in params else x


def _inputs(params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """u before the convolution, and z."""
    u, z = jnp.split(_bias(params, "in_bias", project("...D,DI->...I", x, params["in_proj"])), 2, axis=-1)
    return u, z


def _selection(params: Params, config: MambaConfig, u: jax.Array) -> tuple[jax.Array, ...]:
    """dt (..., I) before its bias and softplus, B and C (..., N), from u (..., I)."""
    R, N = config.dt_rank, config.states
    r, B, C = jnp.split(project("...I,IR->...R", u, params["x_proj"]), [R, R + N], axis=-1)
    return project("...R,RI->...I", r, params["dt_proj"]), B, C


def apply(params: Params, config: MambaConfig, x_BLD: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """Parallel form, (B, L, D) to (B, L, D)."""
    u_BLI, z_BLI = _inputs(params, x_BLD)
    u_BLI = jax.nn.silu(short_convolution(u_BLI, params["conv"], params.get("conv_bias"), segment_ids))
    dt_BLI, B_BLN, C_BLN = _selection(params, config, u_BLI)
    y_BLI, _ = selective_scan(
        u_BLI,
        dt_BLI,
        -jnp.exp(params["A_log"]),
        B_BLN,
        C_BLN,
        params["skip"],
        z_BLI,
        params["dt_bias"],
        delta_softplus=True,
        segment_ids=segment_ids,
    )
    return _bias(params, "out_bias", project("BLI,ID->BLD", y_BLI, params["out_proj"]))


def init_state(config: MambaConfig, batch: int, length: int) -> MambaState:
    """Zero state; `length` is not needed, since the state has a fixed size."""
    return MambaState(
        jnp.zeros((batch, config.inner, config.states)), jnp.zeros((batch, config.kernel - 1, config.inner))
    )


def step(params: Params, config: MambaConfig, x_BD: jax.Array, state: MambaState) -> tuple[jax.Array, MambaState]:
    """One step, (B, D) to (B, D)."""
    u_BI, z_BI = _inputs(params, x_BD)
    u_BI, window_BWI = short_convolution_step(u_BI, state.window_BWI, params["conv"], params.get("conv_bias"))
    u_BI = jax.nn.silu(u_BI)
    dt_BI, B_BN, C_BN = _selection(params, config, u_BI)
    y_BI, h_BIN = selective_scan_step(
        state.h_BIN,
        u_BI,
        dt_BI,
        -jnp.exp(params["A_log"]),
        B_BN,
        C_BN,
        params["skip"],
        z_BI,
        params["dt_bias"],
        delta_softplus=True,
    )
    return _bias(params, "out_bias", project("BI,ID->BD", y_BI, params["out_proj"])), MambaState(h_BIN, window_BWI)


def values(params: Params, config: MambaConfig, x_BLD: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """u after the convolution, (B, L, I, 1)."""
    del config
    u_BLI, _ = _inputs(params, x_BLD)
    return jax.nn.silu(short_convolution(u_BLI, params["conv"], params.get("conv_bias"), segment_ids))[..., None]


def matrix(params: Params, config: MambaConfig, x_BLD: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """sum_n C_t exp(A (dt_{s+1} + .. + dt_t)) dt_s B_s + skip [t = s] at [t, s], (B, I, L, L)."""
    u_BLI = values(params, config, x_BLD, segment_ids)[..., 0]
    dt_BLI, B_BLN, C_BLN = (widen(array) for array in _selection(params, config, u_BLI))
    dt_BIL = jnp.swapaxes(jax.nn.softplus(dt_BLI + over_last(params["dt_bias"], 3)), 1, 2)
    L = x_BLD.shape[1]
    seen_BLL = jnp.broadcast_to(jnp.tril(jnp.ones((L, L), bool)), (x_BLD.shape[0], L, L))
    if segment_ids is not None:
        seen_BLL = seen_BLL & same_segment(segment_ids)
    # Only the steps after s are summed, so that no large sums cancel.
    after_LL = jnp.tril(jnp.ones((L, L), bool), -1)
    elapsed_BILL = jnp.cumsum(jnp.where(after_LL[None, None], dt_BIL[..., None], 0), axis=2)
    m_BILL = jnp.zeros_like(elapsed_BILL)
    for n in range(config.states):
        decay_BILL = jnp.exp(-jnp.exp(params["A_log"][:, n])[None, :, None, None] * elapsed_BILL)
        m_BILL = m_BILL + (C_BLN[..., n][:, :, None] * B_BLN[..., n][:, None])[:, None] * decay_BILL
    m_BILL = jnp.where(seen_BLL[:, None], m_BILL * dt_BIL[:, :, None], 0)
    return m_BILL + params["skip"][None, :, None, None] * jnp.eye(L)[None, None]


def read_out(params: Params, config: MambaConfig, x_BLD: jax.Array, y_BLIV: jax.Array) -> jax.Array:
    """The output from y (B, L, I, 1)."""
    del config
    y_BLI = (y_BLIV[..., 0] * jax.nn.silu(widen(_inputs(params, x_BLD)[1]))).astype(x_BLD.dtype)
    return _bias(params, "out_bias", project("BLI,ID->BLD", y_BLI, params["out_proj"]))


def default_config(
    width: int, heads: int, init_scale: float = 1.0, context: int = 128, causal: bool = True
) -> MambaConfig:
    """The published sizes; `heads` and `context` have no meaning here."""
    check_causal("mamba", causal, CAUSAL)
    return MambaConfig(width=width, init_scale=init_scale)


MIXER = Mixer(MambaConfig, default_config, init, apply, init_state, step, linear=Linear(values, matrix, read_out))

"""Mamba-2, the state space dual of attention with decays (SSD; Dao and Gu, arXiv 2405.21060, section 7).

    z, u, dt = W_in x                              u holds x, B and C side by side
    x, B, C = silu(conv(u) + b)
    dt_t = softplus(dt_t + dt_bias), clipped to `time_step_limit`;  A = -exp(A_log), both one per head
    S_t = exp(dt_t A) S_{t-1} + B_t (dt_t x_t)^T   heads of a group share B and C
    y_t = C_t S_t + D x_t
    out = W_out norm(y * silu(z))

The parameters are those of published models, with matrices as (in, out): `from_published` maps the tensors of a block.
The authors norm the groups of heads apart, which `norm_groups` asks for; with one group there is no difference.
"""

import math
from collections.abc import Mapping
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
    over_last,
    project,
    rms_norm,
    scaled_normal,
)
from seqmod.mixers.convolution import short_convolution, short_convolution_step
from seqmod.mixers.decays import decay_products, step_size_bias


@dataclass(frozen=True)
class Mamba2Config:
    """`width` D in and out, inside E = `expand` D, in heads of `head_dim` P; `state` N numbers a channel, whose maps B
    and C are shared by the heads of a group; convolution over `kernel` steps.

    Step sizes start log-uniform in [`time_step_min`, `time_step_max`], but at no less than `time_step_floor`, and
    always stay within `time_step_limit`.
    """

    width: int = 64
    expand: int = 2
    head_dim: int = 32
    state: int = 64
    groups: int = 1
    norm_groups: int = 1
    kernel: int = 4
    time_step_min: float = 1e-3
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    norm_epsilon: float = 1e-5
    init_scale: float = 1.0

    def __post_init__(self) -> None:
        sizes = (self.width, self.expand, self.head_dim, self.state, self.groups, self.norm_groups, self.kernel)
        if min(sizes) < 1:
            raise ValueError(f"Mamba2Config: sizes must be positive, got {self}")
        if self.inner % self.head_dim:
            raise ValueError(f"Mamba2Config: inner width {self.inner} is not divisible by head_dim {self.head_dim}")
        for name, groups in (("groups", self.groups), ("norm_groups", self.norm_groups)):
            if self.heads % groups:
                raise ValueError(f"Mamba2Config: {self.heads} heads are not divisible by {name} {groups}")
        if not 0 < self.time_step_min <= self.time_step_max:
            raise ValueError(
                f"Mamba2Config: time_step_min is {self.time_step_min} and time_step_max {self.time_step_max}, "
                "expected 0 < time_step_min <= time_step_max"
            )
        low, high = self.time_step_limit
        if not 0 <= low < high:
            raise ValueError(f"Mamba2Config: time_step_limit is {self.time_step_limit}, expected 0 <= low < high")

    @property
    def inner(self) -> int:
        """E, the width of all heads."""
        return self.expand * self.width

    @property
    def heads(self) -> int:
        return self.inner // self.head_dim

    @property
    def channels(self) -> int:
        """Channels of the convolution: those of x, B and C."""
        return self.inner + 2 * self.groups * self.state


class Mamba2State(NamedTuple):
    """S (B, H, N, P) and the last kernel - 1 inputs of the convolution (B, kernel - 1, channels)."""

    s_BHNP: jax.Array
    window_BWU: jax.Array


def init(key: jax.Array, config: Mamba2Config) -> Params:
    """Parameters: `in_proj` (D, E + channels + H) with z, x, B, C and dt side by side, `conv` (kernel, channels),
    `conv_bias` (channels,), `A_log`, `D`, `dt_bias` (H,), `norm` (E,), `out_proj` (E, D)."""
    k_in, k_conv, k_rate, k_bias, k_out = jax.random.split(key, 5)
    D, E, H, U, W = config.width, config.inner, config.heads, config.channels, config.kernel
    return {
        "in_proj": scaled_normal(k_in, (D, E + U + H), D, config.init_scale),
        "conv": scaled_normal(k_conv, (W, U), W, config.init_scale),
        "conv_bias": jnp.zeros(U),
        "A_log": jnp.log(jax.random.uniform(k_rate, (H,), minval=1.0, maxval=16.0)),
        "D": jnp.ones(H),
        "dt_bias": step_size_bias(k_bias, (H,), config.time_step_min, config.time_step_max, config.time_step_floor),
        "norm": jnp.ones(E),
        "out_proj": scaled_normal(k_out, (E, D), E, config.init_scale),
    }


def from_published(tensors: Mapping[str, np.ndarray]) -> Params:
    """Parameters from the tensors of a block in a published model, by their names below `mixer.`; without biases of the
    projections, which no released model has. Raises KeyError if one is missing."""
    return {
        "in_proj": jnp.asarray(tensors["in_proj.weight"].T, jnp.float32),
        "conv": jnp.asarray(tensors["conv1d.weight"][:, 0].T, jnp.float32),
        "conv_bias": jnp.asarray(tensors["conv1d.bias"], jnp.float32),
        "A_log": jnp.asarray(tensors["A_log"], jnp.float32),
        "D": jnp.asarray(tensors["D"], jnp.float32),
        "dt_bias": jnp.asarray(tensors["dt_bias"], jnp.float32),
        "norm": jnp.asarray(tensors["norm.weight"], jnp.float32),
        "out_proj": jnp.asarray(tensors["out_proj.weight"].T, jnp.float32),
    }


def _split(params: Params, config: Mamba2Config, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The convolution's inputs (..., channels), and step sizes (..., H) in float32."""
    E = config.inner
    projected = project("...D,DU->...U", x, params["in_proj"][:, E:])
    u, dt = jnp.split(projected, [config.channels], axis=-1)
    dt = jax.nn.softplus(dt.astype(jnp.float32) + over_last(params["dt_bias"], x.ndim))
    return u, jnp.clip(dt, *config.time_step_limit)


def _heads(config: Mamba2Config, u: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x (..., H, P), and B and C (..., H, N) repeated for the heads of a group, from the convolution's outputs."""
    E, G, N = config.inner, config.groups, config.state
    x, b, c = jnp.split(jax.nn.silu(u), [E, E + G * N], axis=-1)
    b, c = (jnp.repeat(each.reshape(*u.shape[:-1], G, N), config.heads // G, axis=-2) for each in (b, c))
    return x.reshape(*u.shape[:-1], config.heads, config.head_dim), b, c


def _inputs(
    params: Params, config: Mamba2Config, x_BLD: jax.Array, segment_ids: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """x_BLHP, b_BLHN, c_BLHN and dt_BLH."""
    u_BLU, dt_BLH = _split(params, config, x_BLD)
    u_BLU = short_convolution(u_BLU, params["conv"], params["conv_bias"], segment_ids)
    return *_heads(config, u_BLU), dt_BLH


def _log_decays(params: Params, dt: jax.Array) -> jax.Array:
    return -over_last(jnp.exp(params["A_log"]), dt.ndim) * dt


def _with_skip(params: Params, y: jax.Array, v: jax.Array) -> jax.Array:
    """y + D v of heads (..., H, P), in float32."""
    return y.astype(jnp.float32) + params["D"].reshape((1,) * (v.ndim - 2) + (-1, 1)) * v


def values(params: Params, config: Mamba2Config, x_BLD: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """x_BLHP after the convolution."""
    return _inputs(params, config, x_BLD, segment_ids)[0]


def read_out(params: Params, config: Mamba2Config, x: jax.Array, y: jax.Array) -> jax.Array:
    """Heads (..., H, P), gated and then normed, to the width."""
    z = project("...D,DE->...E", x, params["in_proj"][:, : config.inner])
    gated = y.reshape(*y.shape[:-2], config.inner).astype(jnp.float32) * jax.nn.silu(z.astype(jnp.float32))
    normed = rms_norm(None, gated.reshape(*gated.shape[:-1], config.norm_groups, -1), config.norm_epsilon)
    normed = normed.reshape(gated.shape) * over_last(params["norm"], gated.ndim)
    return project("...E,ED->...D", normed.astype(x.dtype), params["out_proj"])


def apply(params: Params, config: Mamba2Config, x_BLD: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """Parallel form, (B, L, D) to (B, L, D)."""
    v_BLHP, b_BLHN, c_BLHN, dt_BLH = _inputs(params, config, x_BLD, segment_ids)
    scaled_BLHP = (dt_BLH[..., None] * v_BLHP).astype(v_BLHP.dtype)
    y_BLHP, _ = linear_attention(c_BLHN, b_BLHN, scaled_BLHP, _log_decays(params, dt_BLH), segment_ids=segment_ids)
    return read_out(params, config, x_BLD, _with_skip(params, y_BLHP, v_BLHP))


def matrix(params: Params, config: Mamba2Config, x_BLD: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """m_BHLM = C_t.B_s exp(A (dt_{s+1} + .. + dt_t)) dt_s, and D on the diagonal: a semiseparable matrix."""
    _, b_BLHN, c_BLHN, dt_BLH = _inputs(params, config, x_BLD, segment_ids)
    m_BHLM = decay_products(_log_decays(params, dt_BLH), segment_ids) * jnp.einsum("BLHN,BMHN->BHLM", c_BLHN, b_BLHN)
    skip_HLL = params["D"][:, None, None] * jnp.eye(x_BLD.shape[1])[None]
    return m_BHLM * jnp.moveaxis(dt_BLH, 1, 2)[:, :, None] + skip_HLL[None]


def init_state(config: Mamba2Config, batch: int, length: int) -> Mamba2State:
    """Zero state; `length` is not needed, since the state has a fixed size."""
    return Mamba2State(
        jnp.zeros((batch, config.heads, config.state, config.head_dim)),
        jnp.zeros((batch, config.kernel - 1, config.channels)),
    )


def step(params: Params, config: Mamba2Config, x_BD: jax.Array, state: Mamba2State) -> tuple[jax.Array, Mamba2State]:
    """One step, (B, D) to (B, D)."""
    u_BU, dt_BH = _split(params, config, x_BD)
    u_BU, window_BWU = short_convolution_step(u_BU, state.window_BWU, params["conv"], params["conv_bias"])
    v_BHP, b_BHN, c_BHN = _heads(config, u_BU)
    scaled_BHP = (dt_BH[..., None] * v_BHP).astype(v_BHP.dtype)
    y_BHP, s_BHNP = linear_attention_step(state.s_BHNP, c_BHN, b_BHN, scaled_BHP, _log_decays(params, dt_BH))
    return read_out(params, config, x_BD, _with_skip(params, y_BHP, v_BHP)), Mamba2State(s_BHNP, window_BWU)


def default_config(
    width: int, heads: int, init_scale: float = 1.0, context: int = 128, causal: bool = True
) -> Mamba2Config:
    """Heads that share twice the width; `context` has no meaning here."""
    check_causal("mamba2", causal, CAUSAL)
    head_dim = 2 * check_heads("mamba2", width, heads)
    return Mamba2Config(width=width, head_dim=head_dim, init_scale=init_scale)


MIXER = Mixer(Mamba2Config, default_config, init, apply, init_state, step, Linear(values, matrix, read_out))

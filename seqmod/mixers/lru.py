"""The linear recurrent unit: a diagonal recurrence with eigenvalues from a ring (Orvieto et al., arXiv 2303.06349).

    h_t = lambda h_{t-1} + gamma (B u_t),   lambda = exp(-exp(nu) + i exp(theta))         N complex states
    y_t = Re(C h_t) + skip u_t,   then GELU, a linear map to twice the width and a gated linear unit

lambda starts uniform on the ring r_min < |lambda| < r_max with phases up to max_phase, and gamma at
sqrt(1 - |lambda|^2), which keeps the variance of states at that of inputs; both are then learned. Not causal, the
states of a reverse run with the same parameters are concatenated before C, as S5 does; both runs include the step
itself.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from seqmod.mixers.base import CAUSAL, NONCAUSAL, Linear, Mixer, Params, check_causal, over_last, scaled_normal
from seqmod.mixers.diagonal import decay_matrix, gated_linear_unit, scan_states, to_complex, to_pairs, widen


@dataclass(frozen=True)
class LRUConfig:
    """`width` D; `states` N complex states; initial moduli in [`r_min`, `r_max`], phases in [0, `max_phase`]."""

    width: int = 64
    states: int = 64
    r_min: float = 0.9
    r_max: float = 0.999
    max_phase: float = 2 * math.pi
    causal: bool = True
    init_scale: float = 1.0

    def __post_init__(self) -> None:
        if min(self.width, self.states) < 1:
            raise ValueError(f"LRUConfig: sizes must be positive, got {self}")
        if not 0 <= self.r_min < self.r_max < 1:
            raise ValueError(
                f"LRUConfig: r_min is {self.r_min} and r_max {self.r_max}, expected 0 <= r_min < r_max < 1"
            )
        if self.max_phase <= 0:
            raise ValueError(f"LRUConfig: max_phase is {self.max_phase}, expected a positive angle")


class LRUState(NamedTuple):
    """States (B, N, 2), real and imaginary."""

    h_BN2: jax.Array


def init(key: jax.Array, config: LRUConfig) -> Params:
    """Parameters: `nu`, `theta` and `log_gamma` (N,), `B` (N, D, 2), `C` (D, N or 2 N, 2), `skip` (D,), `out` (D, 2 D)
    and its bias."""
    k_nu, k_theta, k_B, k_C, k_skip, k_out = jax.random.split(key, 6)
    D, N = config.width, config.states
    # Uniform in area; at zero, nu and theta would be infinite.
    square_N = jax.random.uniform(k_nu, (N,), minval=max(config.r_min**2, 1e-6), maxval=config.r_max**2)
    phase_N = jax.random.uniform(k_theta, (N,), minval=1e-6, maxval=config.max_phase)
    directions = 1 if config.causal else 2
    return {
        "nu": jnp.log(-0.5 * jnp.log(square_N)),
        "theta": jnp.log(phase_N),
        "log_gamma": 0.5 * jnp.log1p(-square_N),
        "B": jax.random.normal(k_B, (N, D, 2)) / math.sqrt(2 * D),
        "C": jax.random.normal(k_C, (D, directions * N, 2)) / math.sqrt(directions * N),
        "skip": jax.random.normal(k_skip, (D,)),
        "out": scaled_normal(k_out, (D, 2 * D), D, config.init_scale),
        "out_bias": jnp.zeros(2 * D),
    }


def _discrete(params: Params) -> tuple[jax.Array, jax.Array]:
    """log lambda_N and the map from inputs to states (N, D)."""
    log_a_N = jax.lax.complex(-jnp.exp(params["nu"]), jnp.exp(params["theta"]))
    return log_a_N, jnp.exp(params["log_gamma"])[:, None] * to_complex(params["B"])


def read_out(params: Params, config: LRUConfig, x: jax.Array, h: jax.Array) -> jax.Array:
    """The output from states (..., N, 1), or of both directions (..., 2 N, 1)."""
    del config
    y = jnp.einsum("...N,DN->...D", h[..., 0], to_complex(params["C"])).real
    y = (y + over_last(params["skip"], y.ndim) * widen(x)).astype(x.dtype)
    return gated_linear_unit(params, jax.nn.gelu(y))


def apply(params: Params, config: LRUConfig, x_BLD: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """Parallel form, (B, L, D) to (B, L, D)."""
    log_a_N, B_ND = _discrete(params)
    v_BLN = jnp.einsum("BLD,ND->BLN", widen(x_BLD), B_ND)
    h_BLN = scan_states(log_a_N, v_BLN, segment_ids, causal=config.causal)
    return read_out(params, config, x_BLD, h_BLN[..., None])


def init_state(config: LRUConfig, batch: int, length: int) -> LRUState:
    """Zero state; `length` is not needed, since the state has a fixed size."""
    return LRUState(jnp.zeros((batch, config.states, 2)))


def step(params: Params, config: LRUConfig, x_BD: jax.Array, state: LRUState) -> tuple[jax.Array, LRUState]:
    """One step, (B, D) to (B, D)."""
    log_a_N, B_ND = _discrete(params)
    h_BN = jnp.exp(log_a_N)[None] * to_complex(state.h_BN2) + jnp.einsum("BD,ND->BN", widen(x_BD), B_ND)
    return read_out(params, config, x_BD, h_BN[..., None]), LRUState(to_pairs(h_BN))


def values(params: Params, config: LRUConfig, x_BLD: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """What enters each complex state, (B, L, N, 1), or (B, L, 2 N, 1) for both directions: with many inputs the map
    from step to step is a matrix per state, not per channel."""
    del segment_ids
    v_BLN = jnp.einsum("BLD,ND->BLN", widen(x_BLD), _discrete(params)[1])
    return jnp.concatenate([v_BLN] * (1 if config.causal else 2), axis=-1)[..., None]


def matrix(params: Params, config: LRUConfig, x_BLD: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """The complex lambda^(t - s) at [t, s], (B, N, L, L), and its transpose for the reverse run, (B, 2 N, L, L)."""
    B, L, _ = x_BLD.shape
    return decay_matrix(_discrete(params)[0], B, L, segment_ids, causal=config.causal)


def default_config(
    width: int, heads: int, init_scale: float = 1.0, context: int = 128, causal: bool = True
) -> LRUConfig:
    """As many complex states as the model is wide; `heads` and `context` have no meaning here."""
    check_causal("lru", causal, CAUSAL | NONCAUSAL)
    return LRUConfig(width=width, states=width, causal=causal, init_scale=init_scale)


MIXER = Mixer(
    LRUConfig,
    default_config,
    init,
    apply,
    init_state,
    step,
    linear=Linear(values, matrix, read_out),
    patterns=CAUSAL | NONCAUSAL,
)

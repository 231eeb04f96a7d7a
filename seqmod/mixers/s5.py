"""S5: one diagonal state space with as many inputs and outputs as the model is wide (Smith et al., arXiv 2208.04933).

    h_t = a h_{t-1} + b (B u_t),   a = exp(dt Lambda),   b = (a - 1) / Lambda          zero-order hold, N complex states
    y_t = 2 Re(C h_t) + skip u_t,   output = gelu(y_t) * sigmoid(W gelu(y_t) + bias)

One of each pair of conjugate states is kept. Lambda starts at eigenvalues of the normal part of HiPPO-LegS, in `blocks`
of the same, and B and C are drawn as real maps of the basis in which that part is a matrix. Not causal, the states of
the reverse run are concatenated before C; both runs have the same Lambda and B and include the step itself.

The published code clips real parts to at most -0.0001 where asked to; here they always are. Its initial variances are
kept: 1 / states for B, as for C.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqmod.mixers.base import (
    CAUSAL,
    NONCAUSAL,
    Linear,
    Mixer,
    Params,
    check_causal,
    over_last,
    project,
    scaled_normal,
)
from seqmod.mixers.diagonal import (
    check_step_sizes,
    decay_matrix,
    log_step_sizes,
    scan_states,
    to_complex,
    to_pairs,
    widen,
    zero_order_hold,
)

_LEAST_RATE = 1e-4


@dataclass(frozen=True)
class S5Config:
    """`width` D; `states` real states, N = states / 2 complex ones, in `blocks` with initial values in common."""

    width: int = 64
    states: int = 64
    blocks: int = 1
    dt_min: float = 0.001
    dt_max: float = 0.1
    causal: bool = True
    init_scale: float = 1.0

    def __post_init__(self) -> None:
        if min(self.width, self.states, self.blocks) < 1:
            raise ValueError(f"S5Config: sizes must be positive, got {self}")
        if self.states % (2 * self.blocks):
            raise ValueError(
                f"S5Config: states is {self.states}, expected conjugate pairs in {self.blocks} equal blocks, "
                f"a multiple of {2 * self.blocks}"
            )
        check_step_sizes("S5Config", self.dt_min, self.dt_max)

    @property
    def pairs(self) -> int:
        """Complex states N."""
        return self.states // 2


class S5State(NamedTuple):
    """States (B, N, 2), real and imaginary."""

    h_BN2: jax.Array


def hippo_normal(states: int) -> tuple[np.ndarray, np.ndarray]:
    """Imaginary parts of eigenvalues (N,) and eigenvectors (states, N) of the normal part of HiPPO-LegS, one of each
    conjugate pair. That part is -1/2 plus a skew-symmetric matrix, so that the real parts are all -1/2."""
    root = np.sqrt(np.arange(states) + 0.5)
    skew = np.triu(np.outer(root, root), 1)
    imaginary, vectors = np.linalg.eigh(-1j * (skew - skew.T))
    half = slice(states // 2, None)
    return imaginary[half], vectors[:, half]


def init(key: jax.Array, config: S5Config) -> Params:
    """Parameters: `rate` and `frequency`, the parts of Lambda, and `log_dt` (N,), `B` (N, D, 2), `C` (D, N or 2 N, 2),
    `skip` (D,), `gate` (D, D) and its bias."""
    k_dt, k_B, k_C, k_skip, k_gate = jax.random.split(key, 5)
    D, N, P, K = config.width, config.pairs, config.states, config.blocks
    frequency_M, vectors_QM = hippo_normal(P // K)
    basis_KQM = jnp.broadcast_to(jnp.asarray(vectors_QM, jnp.complex64)[None], (K, *vectors_QM.shape))
    B_KQD = scaled_normal(k_B, (K, P // K, D), P, 1.0)
    directions = 1 if config.causal else 2
    C_GDKQ = to_complex(scaled_normal(k_C, (directions, D, K, P // K, 2), P, 1.0))
    B_ND = jnp.einsum("KQM,KQD->KMD", basis_KQM.conj(), B_KQD).reshape(N, D)
    C_DGN = jnp.einsum("GDKQ,KQM->DGKM", C_GDKQ, basis_KQM).reshape(D, directions * N)
    return {
        "rate": jnp.tile(jnp.full(N // K, -0.5), K),
        "frequency": jnp.tile(jnp.asarray(frequency_M, jnp.float32), K),
        "log_dt": log_step_sizes(k_dt, (N,), config.dt_min, config.dt_max),
        "B": to_pairs(B_ND),
        "C": to_pairs(C_DGN),
        "skip": jax.random.normal(k_skip, (D,)),
        "gate": scaled_normal(k_gate, (D, D), D, config.init_scale),
        "gate_bias": jnp.zeros(D),
    }


def _discrete(params: Params) -> tuple[jax.Array, jax.Array]:
    """log a_N and the map from inputs to states (N, D)."""
    rate_N = jax.lax.complex(jnp.minimum(params["rate"], -_LEAST_RATE), params["frequency"])
    log_a_N, b_N = zero_order_hold(rate_N, jnp.exp(params["log_dt"]))
    return log_a_N, b_N[:, None] * to_complex(params["B"])


def read_out(params: Params, config: S5Config, x: jax.Array, h: jax.Array) -> jax.Array:
    """The output from states (..., N, 1), or of both directions (..., 2 N, 1)."""
    del config
    y = 2 * jnp.einsum("...N,DN->...D", h[..., 0], to_complex(params["C"])).real
    y = jax.nn.gelu((y + over_last(params["skip"], y.ndim) * widen(x)).astype(x.dtype))
    gate = project("...D,DE->...E", y, params["gate"]) + over_last(params["gate_bias"], y.ndim).astype(y.dtype)
    return y * jax.nn.sigmoid(gate)


def apply(params: Params, config: S5Config, x_BLD: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """Parallel form, (B, L, D) to (B, L, D)."""
    log_a_N, B_ND = _discrete(params)
    v_BLN = jnp.einsum("BLD,ND->BLN", widen(x_BLD), B_ND)
    h_BLN = scan_states(log_a_N, v_BLN, segment_ids, causal=config.causal)
    return read_out(params, config, x_BLD, h_BLN[..., None])


def init_state(config: S5Config, batch: int, length: int) -> S5State:
    """Zero state; `length` is not needed, since the state has a fixed size."""
    return S5State(jnp.zeros((batch, config.pairs, 2)))


def step(params: Params, config: S5Config, x_BD: jax.Array, state: S5State) -> tuple[jax.Array, S5State]:
    """One step, (B, D) to (B, D)."""
    log_a_N, B_ND = _discrete(params)
    h_BN = jnp.exp(log_a_N)[None] * to_complex(state.h_BN2) + jnp.einsum("BD,ND->BN", widen(x_BD), B_ND)
    return read_out(params, config, x_BD, h_BN[..., None]), S5State(to_pairs(h_BN))


def values(params: Params, config: S5Config, x_BLD: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """What enters each complex state, (B, L, N, 1), or (B, L, 2 N, 1) for both directions: with many inputs the map
    from step to step is a matrix per state, not per channel."""
    del segment_ids
    v_BLN = jnp.einsum("BLD,ND->BLN", widen(x_BLD), _discrete(params)[1])
    return jnp.concatenate([v_BLN] * (1 if config.causal else 2), axis=-1)[..., None]


def matrix(params: Params, config: S5Config, x_BLD: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """The complex a^(t - s) at [t, s], (B, N, L, L), and its transpose for the reverse run, (B, 2 N, L, L)."""
    B, L, _ = x_BLD.shape
    return decay_matrix(_discrete(params)[0], B, L, segment_ids, causal=config.causal)


def default_config(
    width: int, heads: int, init_scale: float = 1.0, context: int = 128, causal: bool = True
) -> S5Config:
    """64 real states in one block; `heads` and `context` have no meaning here."""
    check_causal("s5", causal, CAUSAL | NONCAUSAL)
    return S5Config(width=width, causal=causal, init_scale=init_scale)


MIXER = Mixer(
    S5Config,
    default_config,
    init,
    apply,
    init_state,
    step,
    linear=Linear(values, matrix, read_out),
    patterns=CAUSAL | NONCAUSAL,
)

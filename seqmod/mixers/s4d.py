"""S4D-Lin: a diagonal state space of its own for every channel (Gu et al., arXiv 2206.11893).

    h' = A h + u,   y = 2 Re(C h) + skip u         per channel; A_n = -exp(log_rate_n) + i frequency_n
    h_t = a h_{t-1} + b u_t,   a = exp(dt A),   b = (a - 1) / A                    zero-order hold
    K_l = 2 Re sum_n C_n b_n a_n^l,   y_t = sum_l K_l u_{t-l} + skip u_t

then GELU, a linear map to twice the width and a gated linear unit. Not causal, it has a second kernel K' from a second
C, which starts at the next step: y_t += sum_{l >= 0} K'_l u_{t+1+l}.

Initial values are A_n = -1/2 + i pi n, dt log-uniform in [0.001, 0.1] and a normal C and skip. The convolution is done
in chunks, as matrix products inside of them and through the states between them. The published FFT of twice the
length lets rounding of later steps into earlier ones and cannot keep packed sequences apart.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.linear_recurrence import linear_recurrence
from seqmod.mixers.base import (
    CAUSAL,
    NONCAUSAL,
    Linear,
    Mixer,
    Params,
    check_causal,
    over_last,
    same_segment,
    scaled_normal,
    segment_runs,
)
from seqmod.mixers.diagonal import (
    check_step_sizes,
    gated_linear_unit,
    log_step_sizes,
    to_complex,
    to_pairs,
    widen,
    zero_order_hold,
)


@dataclass(frozen=True)
class S4DConfig:
    """`width` D channels of `states` real states, which are N = states / 2 complex ones; `chunk` steps C at a time."""

    width: int = 64
    states: int = 64
    dt_min: float = 0.001
    dt_max: float = 0.1
    causal: bool = True
    chunk: int = 64
    init_scale: float = 1.0

    def __post_init__(self) -> None:
        if min(self.width, self.states, self.chunk) < 1:
            raise ValueError(f"S4DConfig: sizes must be positive, got {self}")
        if self.states % 2:
            raise ValueError(f"S4DConfig: states is {self.states}, expected an even number, of conjugate pairs")
        check_step_sizes("S4DConfig", self.dt_min, self.dt_max)

    @property
    def pairs(self) -> int:
        """Complex states N of a channel."""
        return self.states // 2


class S4DState(NamedTuple):
    """States (B, D, N, 2), real and imaginary."""

    h_BDN2: jax.Array


def init(key: jax.Array, config: S4DConfig) -> Params:
    """Parameters: `log_dt` (D,), `log_rate` and `frequency` (D, N), `C` (directions, D, N, 2), `skip` (D,), `out`
    (D, 2 D) and its bias."""
    k_dt, k_C, k_skip, k_out = jax.random.split(key, 4)
    D, N = config.width, config.pairs
    return {
        "log_dt": log_step_sizes(k_dt, (D,), config.dt_min, config.dt_max),
        "log_rate": jnp.full((D, N), math.log(0.5)),
        "frequency": jnp.broadcast_to(math.pi * jnp.arange(N, dtype=jnp.float32), (D, N)),
        # A complex normal number of variance one.
        "C": math.sqrt(0.5) * jax.random.normal(k_C, (1 if config.causal else 2, D, N, 2)),
        "skip": jax.random.normal(k_skip, (D,)),
        "out": scaled_normal(k_out, (D, 2 * D), D, config.init_scale),
        "out_bias": jnp.zeros(2 * D),
    }


def _discrete(params: Params) -> tuple[jax.Array, jax.Array, jax.Array]:
    """log a_DN, b_DN and C_GDN."""
    rate_DN = jax.lax.complex(-jnp.exp(params["log_rate"]), params["frequency"])
    return *zero_order_hold(rate_DN, jnp.exp(params["log_dt"])[:, None]), to_complex(params["C"])


def _powers(log_a_DN: jax.Array, exponents_C: jax.Array) -> jax.Array:
    return jnp.exp(log_a_DN[None] * exponents_C[:, None, None])


def _kernel(log_a_DN: jax.Array, b_DN: jax.Array, C_DN: jax.Array, length: int) -> jax.Array:
    """K_l (length, D)."""
    # The real part as a product of pairs, which XLA does not repeat for every entry of a Toeplitz matrix.
    powers_LDN2 = to_pairs(_powers(log_a_DN, jnp.arange(length)))
    return jnp.einsum("LDNR,DNR->LD", powers_LDN2, to_pairs(jnp.conj(2 * C_DN * b_DN)))


def _causal_toeplitz(kernel_LD: jax.Array) -> jax.Array:
    """K_{t-s} at [t, s] (L, L, D), and zeros where s > t."""
    steps_L = jnp.arange(kernel_LD.shape[0])
    lag_LL = steps_L[:, None] - steps_L[None]
    return jnp.where((lag_LL >= 0)[..., None], kernel_LD[jnp.maximum(lag_LL, 0)], 0)


def _convolve(
    log_a_DN: jax.Array, b_DN: jax.Array, C_DN: jax.Array, u_BLD: jax.Array, runs_BL: jax.Array | None, chunk: int
) -> jax.Array:
    """sum_l K_l u_{t-l} over the steps of t's own run, (B, L, D), in J chunks of C steps."""
    B, L, D = u_BLD.shape
    C = min(chunk, L)
    padding = ((0, 0), (0, -L % C))
    u_BJCD = jnp.pad(u_BLD, (*padding, (0, 0))).reshape(B, -1, C, D)
    steps_C = jnp.arange(C)
    toeplitz_CCD = _causal_toeplitz(_kernel(log_a_DN, b_DN, C_DN, C))
    into_CDN2 = to_pairs(_powers(log_a_DN, C - 1 - steps_C) * b_DN[None])
    # Re(w h) as a product of pairs: with w conjugated, both parts have a plus.
    out_CDN2 = to_pairs(jnp.conj(2 * C_DN[None] * _powers(log_a_DN, steps_C + 1)))
    a_BJDN = jnp.broadcast_to(jnp.exp(C * log_a_DN)[None, None], (*u_BJCD.shape[:2], *log_a_DN.shape))
    if runs_BL is None:
        y_BJCD = jnp.einsum("TSD,BJSD->BJTD", toeplitz_CCD, u_BJCD)
        last_BJCD, from_before_BJC = u_BJCD, None
    else:
        runs_BJC = jnp.pad(runs_BL, padding, mode="edge").reshape(B, -1, C)
        ends_BJ = runs_BJC[..., -1]
        before_BJ = jnp.pad(ends_BJ[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
        last_BJCD = jnp.where((runs_BJC == ends_BJ[..., None])[..., None], u_BJCD, 0)
        a_BJDN = jnp.where((before_BJ == ends_BJ)[..., None, None], a_BJDN, 0)
        from_before_BJC = runs_BJC == before_BJ[..., None]

        # The matrices now differ from row to row of the batch: those of one chunk at a time.
        @jax.checkpoint
        def within(inputs):
            u_BCD, runs_BC = inputs
            same_BCC = (runs_BC[:, :, None] == runs_BC[:, None]).astype(u_BCD.dtype)
            return jnp.einsum("TSD,BTS,BSD->BTD", toeplitz_CCD, same_BCC, u_BCD)

        y_JBCD = jax.lax.map(within, (jnp.swapaxes(u_BJCD, 0, 1), jnp.swapaxes(runs_BJC, 0, 1)))
        y_BJCD = jnp.swapaxes(y_JBCD, 0, 1)
    entering_BJDN = to_complex(jnp.einsum("BJSD,SDNR->BJDNR", last_BJCD, into_CDN2))
    J = u_BJCD.shape[1]
    h_BJM, _ = linear_recurrence(a_BJDN.reshape(B, J, -1), entering_BJDN.reshape(B, J, -1))
    h_BJDN2 = to_pairs(jnp.pad(h_BJM[:, :-1], ((0, 0), (1, 0), (0, 0)))).reshape(*entering_BJDN.shape, 2)
    carried_BJCD = jnp.einsum("BJDNR,TDNR->BJTD", h_BJDN2, out_CDN2)
    if from_before_BJC is not None:
        carried_BJCD = jnp.where(from_before_BJC[..., None], carried_BJCD, 0)
    return (y_BJCD + carried_BJCD).reshape(B, -1, D)[:, :L]


def read_out(params: Params, config: S4DConfig, x: jax.Array, y: jax.Array) -> jax.Array:
    """The output from y (..., D, 1) of the state space."""
    del config
    return gated_linear_unit(params, jax.nn.gelu(y[..., 0].astype(x.dtype), approximate=False))


def apply(params: Params, config: S4DConfig, x_BLD: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """Parallel form, (B, L, D) to (B, L, D)."""
    u_BLD = widen(x_BLD)
    log_a_DN, b_DN, C_GDN = _discrete(params)
    runs_BL = None if segment_ids is None else segment_runs(segment_ids)
    y_BLD = _convolve(log_a_DN, b_DN, C_GDN[0], u_BLD, runs_BL, config.chunk) + over_last(params["skip"], 3) * u_BLD
    if not config.causal:
        # Runs count upwards in both directions, as far as it matters which steps share one.
        flipped = None if runs_BL is None else segment_runs(runs_BL[:, ::-1])
        back_BLD = _convolve(log_a_DN, b_DN, C_GDN[1], u_BLD[:, ::-1], flipped, config.chunk)[:, ::-1]
        later_BLD = jnp.pad(back_BLD[:, 1:], ((0, 0), (0, 1), (0, 0)))
        if runs_BL is not None:
            goes_on_BL = jnp.pad(runs_BL[:, 1:] == runs_BL[:, :-1], ((0, 0), (0, 1)))
            later_BLD = jnp.where(goes_on_BL[..., None], later_BLD, 0)
        y_BLD = y_BLD + later_BLD
    return read_out(params, config, x_BLD, y_BLD[..., None])


def init_state(config: S4DConfig, batch: int, length: int) -> S4DState:
    """Zero state; `length` is not needed, since the state has a fixed size."""
    return S4DState(jnp.zeros((batch, config.width, config.pairs, 2)))


def step(params: Params, config: S4DConfig, x_BD: jax.Array, state: S4DState) -> tuple[jax.Array, S4DState]:
    """One step, (B, D) to (B, D)."""
    u_BD = widen(x_BD)
    log_a_DN, b_DN, C_GDN = _discrete(params)
    h_BDN = jnp.exp(log_a_DN)[None] * to_complex(state.h_BDN2) + b_DN[None] * u_BD[..., None]
    y_BD = 2 * (C_GDN[0][None] * h_BDN).sum(-1).real + params["skip"][None] * u_BD
    return read_out(params, config, x_BD, y_BD[..., None]), S4DState(to_pairs(h_BDN))


def values(params: Params, config: S4DConfig, x_BLD: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """The inputs themselves, (B, L, D, 1)."""
    del params, config, segment_ids
    return widen(x_BLD)[..., None]


def matrix(params: Params, config: S4DConfig, x_BLD: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """K_{t-s} + skip [t = s] at [t, s], and K'_{s-t-1} where s > t if not causal; (B, D, L, L)."""
    B, L, _ = x_BLD.shape
    log_a_DN, b_DN, C_GDN = _discrete(params)
    m_LLD = _causal_toeplitz(_kernel(log_a_DN, b_DN, C_GDN[0], L)) + jnp.eye(L)[..., None] * over_last(
        params["skip"], 3
    )
    if not config.causal:
        later_LLD = _causal_toeplitz(_kernel(log_a_DN, b_DN, C_GDN[1], L))
        m_LLD = m_LLD + jnp.pad(jnp.swapaxes(later_LLD, 0, 1)[:, :-1], ((0, 0), (1, 0), (0, 0)))
    m_BDLL = jnp.broadcast_to(jnp.moveaxis(m_LLD, -1, 0)[None], (B, config.width, L, L))
    return m_BDLL if segment_ids is None else jnp.where(same_segment(segment_ids)[:, None], m_BDLL, 0)


def default_config(
    width: int, heads: int, init_scale: float = 1.0, context: int = 128, causal: bool = True
) -> S4DConfig:
    """64 real states per channel; `heads` and `context` have no meaning here."""
    check_causal("s4d", causal, CAUSAL | NONCAUSAL)
    return S4DConfig(width=width, causal=causal, init_scale=init_scale)


MIXER = Mixer(
    S4DConfig,
    default_config,
    init,
    apply,
    init_state,
    step,
    linear=Linear(values, matrix, read_out),
    patterns=CAUSAL | NONCAUSAL,
)

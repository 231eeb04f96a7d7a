"""Diagonal state spaces with complex states: what S4D, S5 and LRU have in common.

    h_t = a * h_{t-1} + v_t,    |a| < 1

Complex parameters and states are kept as real arrays with a last axis of two, (real, imaginary), which every optimiser
and checkpoint can take; the arithmetic is in complex64.
"""

import math

import jax
import jax.numpy as jnp

from kernels.linear_recurrence import linear_recurrence
from seqmod.mixers.base import Params, over_last, project, same_segment


def to_complex(pairs: jax.Array) -> jax.Array:
    """(..., 2) to complex numbers (...)."""
    return jax.lax.complex(pairs[..., 0], pairs[..., 1])


def to_pairs(numbers: jax.Array) -> jax.Array:
    """Complex numbers (...) to (..., 2)."""
    return jnp.stack([numbers.real, numbers.imag], axis=-1)


def widen(x: jax.Array) -> jax.Array:
    """x in float32 at least, in which states are computed."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def check_step_sizes(name: str, dt_min: float, dt_max: float) -> None:
    """Raise ValueError where step sizes cannot be drawn between two bounds."""
    if not 0 < dt_min <= dt_max:
        raise ValueError(f"{name}: dt_min is {dt_min} and dt_max {dt_max}, expected 0 < dt_min <= dt_max")


def log_step_sizes(key: jax.Array, shape: tuple[int, ...], dt_min: float, dt_max: float) -> jax.Array:
    """Logarithms of step sizes that are log-uniform in [dt_min, dt_max]."""
    return jax.random.uniform(key, shape, minval=math.log(dt_min), maxval=math.log(dt_max))


def zero_order_hold(rate: jax.Array, dt: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log a and the gain of the input of h' = rate h + u, where u is constant over a step of length dt."""
    log_a = rate * dt
    # exp(log_a) - 1 would lose all but three digits for the shortest steps.
    return log_a, jnp.expm1(log_a) / rate


def scan_states(
    log_a_N: jax.Array, v_BLN: jax.Array, segment_ids: jax.Array | None, *, causal: bool = True
) -> jax.Array:
    """States h_BLN; if not causal (B, L, 2N), those of the forward and of the reverse run, both with v_t in h_t."""
    a_BLN = jnp.broadcast_to(over_last(jnp.exp(log_a_N), 3), v_BLN.shape)
    h_BLN, _ = linear_recurrence(a_BLN, v_BLN, segment_ids=segment_ids)
    if causal:
        return h_BLN
    back_BLN, _ = linear_recurrence(a_BLN, v_BLN, segment_ids=segment_ids, reverse=True)
    return jnp.concatenate([h_BLN, back_BLN], axis=-1)


def decay_matrix(
    log_a_N: jax.Array, batch: int, length: int, segment_ids: jax.Array | None, *, causal: bool = True
) -> jax.Array:
    """The matrices (B, N, L, L), or (B, 2N, L, L) if not causal, of `scan_states`: a^(t - s) at [t, s] for s <= t."""
    steps_L = jnp.arange(length)
    lag_LL = steps_L[:, None] - steps_L[None]
    seen_BLL = jnp.broadcast_to(lag_LL >= 0, (batch, length, length))
    if segment_ids is not None:
        seen_BLL = seen_BLL & same_segment(segment_ids)
    powers_NLL = jnp.exp(log_a_N[:, None, None] * jnp.maximum(lag_LL, 0)[None])
    m_BNLL = jnp.where(seen_BLL[:, None], powers_NLL[None], 0)
    return m_BNLL if causal else jnp.concatenate([m_BNLL, jnp.swapaxes(m_BNLL, 2, 3)], axis=1)


def gated_linear_unit(params: Params, y: jax.Array) -> jax.Array:
    """The first half of a linear map of y, times the sigmoid of the second."""
    value, gate = jnp.split(
        project("...D,DE->...E", y, params["out"]) + over_last(params["out_bias"], y.ndim).astype(y.dtype), 2, axis=-1
    )
    return value * jax.nn.sigmoid(gate)

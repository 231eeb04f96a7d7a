"""Diagonal linear recurrence as a token scan with a written backward pass.

    h_t = a_t * h_{t-1} + x_t,   t = 1..L

The backward pass is the same recurrence run the other way: with incoming cotangents c_t, the adjoint is
m_t = c_t + a_{t+1} m_{t+1}; then dx_t = m_t, da_t = m_t h_{t-1} and dh_0 = a_1 m_1. Only a and h are kept, so memory is
linear in L with no per-step residuals, and on a CPU this beats both autodiff through the scan and an associative scan.
Complex numbers need no conjugates: JAX's cotangents are linear in the incoming ones.
"""

import jax
import jax.numpy as jnp


def linear_recurrence(
    a_BLN: jax.Array,
    x_BLN: jax.Array,
    *,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    reverse: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Run h_t = a_t h_{t-1} + x_t over axis 1.

    Args:
        a_BLN, x_BLN: factors and inputs of one shape.
        initial_state: h_0 (B, N), zeros if absent; it enters the segment that is run first.
        segment_ids: (B, L) integers; the state is cleared wherever the id differs from the step before.
        reverse: run from the last step to the first.

    Returns:
        All states h_BLN and the final state (B, N), in the promoted dtype of a, x and h_0, at least float32.

    Raises:
        ValueError: shapes that do not agree, or an empty sequence.
    """
    if a_BLN.shape != x_BLN.shape or a_BLN.ndim != 3:
        raise ValueError(f"linear_recurrence: a has shape {a_BLN.shape} and x {x_BLN.shape}, expected one (B, L, N)")
    B, L, N = a_BLN.shape
    if L == 0:
        raise ValueError("linear_recurrence: x has length 0, expected at least 1")
    dtype = jnp.result_type(a_BLN, x_BLN, jnp.float32)
    if initial_state is None:
        initial_state = jnp.zeros((B, N), dtype)
    dtype = jnp.result_type(dtype, initial_state)
    if initial_state.shape != (B, N):
        raise ValueError(f"linear_recurrence: initial_state has shape {initial_state.shape}, expected {(B, N)}")
    if segment_ids is not None:
        if segment_ids.shape != (B, L):
            raise ValueError(f"linear_recurrence: segment_ids has shape {segment_ids.shape}, expected {(B, L)}")
        before = jnp.roll(segment_ids, -1 if reverse else 1, axis=1)
        edge = L - 1 if reverse else 0
        starts_BL = (segment_ids != before).at[:, edge].set(False)
        a_BLN = jnp.where(starts_BL[..., None], 0.0, a_BLN)
    a_LBN, x_LBN = (jnp.swapaxes(array, 0, 1).astype(dtype) for array in (a_BLN, x_BLN))
    h_LBN = _scan(a_LBN, x_LBN, initial_state.astype(dtype), reverse)
    return jnp.swapaxes(h_LBN, 0, 1), h_LBN[0 if reverse else -1]


def _run(a_LBN: jax.Array, x_LBN: jax.Array, h_BN: jax.Array, reverse: bool) -> jax.Array:
    def step(h_BN, inputs):
        a_BN, x_BN = inputs
        h_BN = a_BN * h_BN + x_BN
        return h_BN, h_BN

    return jax.lax.scan(step, h_BN, (a_LBN, x_LBN), reverse=reverse)[1]


def _shift(x_LBN: jax.Array, first_BN: jax.Array, reverse: bool) -> jax.Array:
    """Sequence delayed by one step in running order, `first_BN` coming in."""
    if reverse:
        return jnp.concatenate([x_LBN[1:], first_BN[None]])
    return jnp.concatenate([first_BN[None], x_LBN[:-1]])


@jax.custom_vjp
def _scan_forward(a_LBN, x_LBN, h_BN):
    return _run(a_LBN, x_LBN, h_BN, False)


def _forward(a_LBN, x_LBN, h_BN):
    h_LBN = _run(a_LBN, x_LBN, h_BN, False)
    return h_LBN, (a_LBN, h_BN, h_LBN)


def _backward(residuals, c_LBN):
    a_LBN, h_BN, h_LBN = residuals
    zero_BN = jnp.zeros_like(h_BN)
    m_LBN = _run(_shift(a_LBN, zero_BN, True), c_LBN, zero_BN, True)
    return m_LBN * _shift(h_LBN, h_BN, False), m_LBN, a_LBN[0] * m_LBN[0]


_scan_forward.defvjp(_forward, _backward)


def _scan(a_LBN: jax.Array, x_LBN: jax.Array, h_BN: jax.Array, reverse: bool) -> jax.Array:
    if reverse:
        return _scan_forward(a_LBN[::-1], x_LBN[::-1], h_BN)[::-1]
    return _scan_forward(a_LBN, x_LBN, h_BN)

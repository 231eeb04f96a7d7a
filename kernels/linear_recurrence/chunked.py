"""The diagonal linear recurrence as a token scan with a written backward pass.

The backward pass is the same recurrence run the other way: with incoming cotangents c_t, the adjoint is
m_t = c_t + a_{t+1} m_{t+1}; then dx_t = m_t, da_t = m_t h_{t-1} and dh_0 = a_1 m_1. Only a and h are kept, so memory is
linear in L with no per-step residuals, and on a CPU this beats both autodiff through the scan and an associative scan.
It goes by the name of `chunked`, as the XLA form of every op does, though its chunks are single tokens: a diagonal
recurrence has no matrix products that longer ones would make.
Complex numbers need no conjugates: JAX's cotangents are linear in the incoming ones.
"""

import jax
import jax.numpy as jnp

from kernels.linear_recurrence.blocks import LinearRecurrenceBlocks


def scan(
    a_BLN: jax.Array, x_BLN: jax.Array, h_BN: jax.Array, starts_BL: jax.Array | None, blocks: LinearRecurrenceBlocks
) -> tuple[jax.Array, jax.Array]:
    """As `reference.scan`."""
    del blocks
    if starts_BL is not None:
        a_BLN = jnp.where(starts_BL[..., None], 0, a_BLN)
    h_LBN = _scan(jnp.swapaxes(a_BLN, 0, 1), jnp.swapaxes(x_BLN, 0, 1), h_BN)
    return jnp.swapaxes(h_LBN, 0, 1), h_LBN[-1]


def _run(a_LBN: jax.Array, x_LBN: jax.Array, h_BN: jax.Array, reverse: bool) -> jax.Array:
    def step(h_BN, inputs):
        a_BN, x_BN = inputs
        h_BN = a_BN * h_BN + x_BN
        return h_BN, h_BN

    return jax.lax.scan(step, h_BN, (a_LBN, x_LBN), reverse=reverse)[1]


@jax.custom_vjp
def _scan(a_LBN, x_LBN, h_BN):
    return _run(a_LBN, x_LBN, h_BN, False)


def _forward(a_LBN, x_LBN, h_BN):
    h_LBN = _run(a_LBN, x_LBN, h_BN, False)
    return h_LBN, (a_LBN, h_BN, h_LBN)


def _backward(residuals, c_LBN):
    a_LBN, h_BN, h_LBN = residuals
    zero_BN = jnp.zeros_like(h_BN)
    m_LBN = _run(jnp.concatenate([a_LBN[1:], zero_BN[None]]), c_LBN, zero_BN, True)
    before_LBN = jnp.concatenate([h_BN[None], h_LBN[:-1]])
    return m_LBN * before_LBN, m_LBN, a_LBN[0] * m_LBN[0]


_scan.defvjp(_forward, _backward)

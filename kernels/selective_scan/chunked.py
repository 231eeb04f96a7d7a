"""The selective scan in chunks, with a written backward pass.

Every channel has decays of its own for every state, so that no matrix product can stand for a chunk, and each token is
one elementwise step of N D numbers. The forward pass keeps the state that enters each chunk, nothing else. The backward
pass takes the chunks from the last to the first: it recomputes the states of one chunk and runs the adjoint

    m_t = C_t dy_t + a_{t+1} m_{t+1},    a_t = exp(delta_t A)

through it. Memory is L N D / chunk for the kept states and chunk N D for the recomputed ones, against L N D for
autodiff through the scan, at the price of one more forward pass. A cumulative form (prefix products inside the chunk,
or an associative scan) would need quotients of decays that underflow, or several passes over chunk N D numbers.

States lie as (B, G, N, P), for G groups of P channels each: the long axis is last, and sums over N are elementwise.
"""

import jax
import jax.numpy as jnp

from kernels.segments import pad_length
from kernels.selective_scan.blocks import SelectiveScanBlocks


def selective_scan_chunked(
    u_BLD: jax.Array,
    delta_BLD: jax.Array,
    A_DN: jax.Array,
    B_BLGN: jax.Array,
    C_BLGN: jax.Array,
    state_BDN: jax.Array,
    starts_BL: jax.Array,
    blocks: SelectiveScanBlocks,
) -> tuple[jax.Array, jax.Array]:
    """y_BLD without skip and gate, and the final state. The state is cleared before each step of `starts_BL`."""
    B, L, D = u_BLD.shape
    G, N = B_BLGN.shape[2:]
    chunk = min(blocks.chunk, L)
    count = -(-L // chunk)

    def split(x: jax.Array) -> jax.Array:
        """(B, L, ...) to (chunks, chunk, B, ...); padding has delta = 0, which leaves the state as it is."""
        x = pad_length(x, chunk)
        return jnp.swapaxes(x, 0, 1).reshape(count, chunk, B, *x.shape[2:])

    def grouped(x_BLD: jax.Array) -> jax.Array:
        return split(x_BLD.reshape(B, L, G, D // G))

    A_GNP = jnp.swapaxes(A_DN.reshape(G, D // G, N), 1, 2)
    state_BGNP = jnp.swapaxes(state_BDN.reshape(B, G, D // G, N), 2, 3)
    tokens = (grouped(u_BLD), grouped(delta_BLD), split(B_BLGN), split(C_BLGN))
    y, state_BGNP = _scan(tokens, A_GNP, state_BGNP, split(starts_BL), min(blocks.unroll, chunk))
    y_BLD = jnp.swapaxes(y.reshape(count * chunk, B, D)[:L], 0, 1)
    return y_BLD, jnp.swapaxes(state_BGNP, 2, 3).reshape(B, D, N)


def _clear(state_BGNP: jax.Array, start_B: jax.Array) -> jax.Array:
    return jnp.where(start_B[:, None, None, None], 0, state_BGNP)


def _advance(h_BGNP: jax.Array, token, A_GNP: jax.Array) -> jax.Array:
    u_BGP, delta_BGP, B_BGN, _ = token
    return jnp.exp(delta_BGP[:, :, None] * A_GNP[None]) * h_BGNP + B_BGN[..., None] * (delta_BGP * u_BGP)[:, :, None]


def _retreat(m_BGNP, dA_GNP, token, A_GNP, before_BGNP, dy_BGP):
    """One step of the adjoint: from that of h_t to that of h_{t-1}, with the gradients of the token."""
    u_BGP, delta_BGP, B_BGN, C_BGN = token
    decay_BGNP = jnp.exp(delta_BGP[:, :, None] * A_GNP[None])
    input_BGP = delta_BGP * u_BGP
    h_BGNP = decay_BGNP * before_BGNP + B_BGN[..., None] * input_BGP[:, :, None]
    m_BGNP = m_BGNP + C_BGN[..., None] * dy_BGP[:, :, None]
    dC_BGN = (h_BGNP * dy_BGP[:, :, None]).sum(-1)
    dB_BGN = (m_BGNP * input_BGP[:, :, None]).sum(-1)
    dinput_BGP = (m_BGNP * B_BGN[..., None]).sum(2)
    m_BGNP = m_BGNP * decay_BGNP
    dlog_BGNP = m_BGNP * before_BGNP
    ddelta_BGP = (dlog_BGNP * A_GNP[None]).sum(2) + dinput_BGP * u_BGP
    dA_GNP = dA_GNP + (dlog_BGNP * delta_BGP[:, :, None]).sum(0)
    return m_BGNP, dA_GNP, (dinput_BGP * delta_BGP, ddelta_BGP, dB_BGN, dC_BGN)


def _run(tokens, A_GNP, state_BGNP, starts, unroll):
    return _forward(tokens, A_GNP, state_BGNP, starts, unroll)[0]


def _forward(tokens, A_GNP, state_BGNP, starts, unroll):
    def run_token(h_BGNP, inputs):
        token, start_B = inputs
        h_BGNP = _advance(_clear(h_BGNP, start_B), token, A_GNP)
        return h_BGNP, (token[3][..., None] * h_BGNP).sum(2)

    def run_chunk(h_BGNP, inputs):
        after_BGNP, y = jax.lax.scan(run_token, h_BGNP, inputs, unroll=unroll)
        return after_BGNP, (y, h_BGNP)

    final_BGNP, (y, entering) = jax.lax.scan(run_chunk, state_BGNP, (tokens, starts))
    return (y, final_BGNP), (tokens, A_GNP, entering, starts)


def _backward(unroll, residuals, cotangents):
    tokens, A_GNP, entering, starts = residuals
    dy, m_BGNP = cotangents

    def recompute(h_BGNP, inputs):
        token, start_B = inputs
        h_BGNP = _clear(h_BGNP, start_B)
        return _advance(h_BGNP, token, A_GNP), h_BGNP

    def run_token(carry, inputs):
        token, start_B, before_BGNP, dy_BGP = inputs
        m_BGNP, dA_GNP = carry
        m_BGNP, dA_GNP, gradients = _retreat(m_BGNP, dA_GNP, token, A_GNP, before_BGNP, dy_BGP)
        return (_clear(m_BGNP, start_B), dA_GNP), gradients

    def run_chunk(carry, inputs):
        token, start, h_BGNP, dy = inputs
        _, before = jax.lax.scan(recompute, h_BGNP, (token, start), unroll=unroll)
        return jax.lax.scan(run_token, carry, (token, start, before, dy), reverse=True, unroll=unroll)

    carry = (m_BGNP, jnp.zeros_like(A_GNP))
    (m_BGNP, dA_GNP), gradients = jax.lax.scan(run_chunk, carry, (tokens, starts, entering, dy), reverse=True)
    return gradients, dA_GNP, m_BGNP, None


_scan = jax.custom_vjp(_run, nondiff_argnums=(4,))
_scan.defvjp(_forward, _backward)

"""The selective scan as two Pallas kernels for TPUs.

A program runs the channels of one block through one chunk; the chunks of a block follow each other on the grid and hand
the state on in scratch memory. Channels lie along the lanes and states along the sublanes, so that a step is
elementwise but for sums over the states. Where gradients are asked for, the forward kernel writes the state that enters
each chunk; the backward kernel takes the chunks from the last to the first, recomputes their states into scratch memory
and runs the adjoint over them, as in `chunked`. Gradients of B and C are sums over channels: each block writes its own,
and they are added up outside.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.segments import pad_length
from kernels.selective_scan.blocks import SelectiveScanBlocks

_LANES = 128
# What the states of a chunk, which the backward kernel keeps, may take of the 16 MiB of vector memory that it has.
_STATE_BYTES = 8 * 2**20


def selective_scan_tpu(
    u_BLD: jax.Array,
    delta_BLD: jax.Array,
    A_DN: jax.Array,
    B_BLGN: jax.Array,
    C_BLGN: jax.Array,
    state_BDN: jax.Array,
    starts_BL: jax.Array,
    blocks: SelectiveScanBlocks,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """y_BLD without skip and gate, and the final state. The state is cleared before each step of `starts_BL`."""
    B, L, D = u_BLD.shape
    G, N = B_BLGN.shape[2:]
    channels, chunk = D // G, min(blocks.chunk, L, max(1, _STATE_BYTES // (4 * N * _LANES)))
    width = channels
    most = min(blocks.channels, max(_LANES, _STATE_BYTES // (4 * chunk * N) // _LANES * _LANES))
    if channels > most:
        count = -(-channels // most)
        width = -(-channels // (count * _LANES)) * _LANES

    # Padded steps and channels have delta = 0, which leaves the state as it is.
    def grouped(x_BLD: jax.Array) -> jax.Array:
        """(B, L, D) to (B, G, chunks, chunk, P)."""
        x = pad_length(x_BLD.reshape(B, L, G, channels), chunk)
        x = pad_length(x.reshape(B, -1, chunk, G, channels), width, axis=4)
        return jnp.moveaxis(x, 3, 1)

    def turned(x_BLGN: jax.Array) -> jax.Array:
        """(B, L, G, N) to (B, G, chunks, N, chunk)."""
        x = pad_length(x_BLGN, chunk).reshape(B, -1, chunk, G, N)
        return jnp.transpose(x, (0, 3, 1, 4, 2))

    def states(x: jax.Array) -> jax.Array:
        """(..., D, N) to (..., G, N, P)."""
        x = pad_length(x.reshape(*x.shape[:-2], G, channels, N), width, axis=-2)
        return jnp.swapaxes(x, -1, -2)

    starts = pad_length(starts_BL.astype(jnp.int32), chunk).reshape(B, -1, 1, chunk)
    y, final = _scan(
        grouped(u_BLD),
        grouped(delta_BLD),
        states(A_DN),
        turned(B_BLGN),
        turned(C_BLGN),
        states(state_BDN),
        starts,
        width,
        interpret,
    )
    y_BLD = jnp.moveaxis(y[..., :channels], 1, 3).reshape(B, -1, D)[:, :L]
    return y_BLD, jnp.swapaxes(final[..., :channels], 2, 3).reshape(B, D, N)


def _column(x_NC: jax.Array, t: jax.Array) -> jax.Array:
    """Column t as (N, 1): a dynamic position along lanes can't be sliced."""
    here_NC = jax.lax.broadcasted_iota(jnp.int32, x_NC.shape, 1) == t
    return jnp.where(here_NC, x_NC, 0).sum(1, keepdims=True)


def _put(x_NC: jax.Array, t: jax.Array, column_N1: jax.Array) -> jax.Array:
    here_NC = jax.lax.broadcasted_iota(jnp.int32, x_NC.shape, 1) == t
    return jnp.where(here_NC, column_N1, x_NC)


def _clear(x_NP: jax.Array, starts_ref, t: jax.Array) -> jax.Array:
    return jax.lax.select(starts_ref[0, t] != 0, jnp.zeros_like(x_NP), x_NP)


def _forward_kernel(u_ref, delta_ref, A_ref, B_ref, C_ref, h_ref, starts_ref, y_ref, final_ref, *rest):
    *kept, scratch = rest

    @pl.when(pl.program_id(3) == 0)
    def _():
        scratch[...] = h_ref[...]

    for entering_ref in kept:
        entering_ref[...] = scratch[...]
    A_NP, B_NC, C_NC = A_ref[...], B_ref[...], C_ref[...]

    def step(t, h_NP):
        delta_1P = delta_ref[pl.ds(t, 1), :]
        input_1P = delta_1P * u_ref[pl.ds(t, 1), :]
        h_NP = jnp.exp(delta_1P * A_NP) * _clear(h_NP, starts_ref, t) + _column(B_NC, t) * input_1P
        y_ref[pl.ds(t, 1), :] = (_column(C_NC, t) * h_NP).sum(0, keepdims=True)
        return h_NP

    h_NP = jax.lax.fori_loop(0, u_ref.shape[0], step, scratch[...])
    scratch[...] = h_NP
    final_ref[...] = h_NP


def _backward_kernel(
    u_ref,
    delta_ref,
    A_ref,
    B_ref,
    C_ref,
    entering_ref,
    starts_ref,
    dy_ref,
    dfinal_ref,
    du_ref,
    ddelta_ref,
    dA_ref,
    dB_ref,
    dC_ref,
    dh_ref,
    scratch,
    before_ref,
):
    @pl.when(pl.program_id(3) == 0)
    def _():
        scratch[...] = dfinal_ref[...]
        dA_ref[...] = jnp.zeros_like(dA_ref)

    A_NP, B_NC, C_NC = A_ref[...], B_ref[...], C_ref[...]
    chunk = u_ref.shape[0]

    def recompute(t, h_NP):
        h_NP = _clear(h_NP, starts_ref, t)
        before_ref[t] = h_NP
        delta_1P = delta_ref[pl.ds(t, 1), :]
        return jnp.exp(delta_1P * A_NP) * h_NP + _column(B_NC, t) * (delta_1P * u_ref[pl.ds(t, 1), :])

    jax.lax.fori_loop(0, chunk, recompute, entering_ref[...])

    def step(i, carry):
        t = chunk - 1 - i
        m_NP, dA_NP, dB_NC, dC_NC = carry
        row = pl.ds(t, 1)
        u_1P, delta_1P, dy_1P, B_N1 = u_ref[row, :], delta_ref[row, :], dy_ref[row, :], _column(B_NC, t)
        before_NP, decay_NP, input_1P = before_ref[t], jnp.exp(delta_1P * A_NP), delta_1P * u_1P
        h_NP = decay_NP * before_NP + B_N1 * input_1P
        m_NP = m_NP + _column(C_NC, t) * dy_1P
        dC_NC = _put(dC_NC, t, (h_NP * dy_1P).sum(1, keepdims=True))
        dB_NC = _put(dB_NC, t, (m_NP * input_1P).sum(1, keepdims=True))
        dinput_1P = (m_NP * B_N1).sum(0, keepdims=True)
        m_NP = m_NP * decay_NP
        dlog_NP = m_NP * before_NP
        du_ref[row, :] = dinput_1P * delta_1P
        ddelta_ref[row, :] = (dlog_NP * A_NP).sum(0, keepdims=True) + dinput_1P * u_1P
        return _clear(m_NP, starts_ref, t), dA_NP + dlog_NP * delta_1P, dB_NC, dC_NC

    carry = (scratch[...], dA_ref[...], jnp.zeros_like(B_NC), jnp.zeros_like(C_NC))
    m_NP, dA_ref[...], dB_ref[...], dC_ref[...] = jax.lax.fori_loop(0, chunk, step, carry)
    scratch[...] = m_NP
    dh_ref[...] = m_NP


class _Specs:
    """Blocks of each kind of array for the grid (B, G, blocks of channels, chunks)."""

    def __init__(self, chunk: int, N: int, width: int, count: int, backwards: bool):
        def at(c):
            return count - 1 - c if backwards else c

        self.token = pl.BlockSpec((None, None, None, chunk, width), lambda b, g, p, c: (b, g, at(c), 0, p))
        self.map = pl.BlockSpec((None, None, None, N, chunk), lambda b, g, p, c: (b, g, at(c), 0, 0))
        self.map_slope = pl.BlockSpec((None, None, None, None, N, chunk), lambda b, g, p, c: (b, g, p, at(c), 0, 0))
        self.rates = pl.BlockSpec((None, N, width), lambda b, g, p, c: (g, 0, p))
        self.state = pl.BlockSpec((None, None, N, width), lambda b, g, p, c: (b, g, 0, p))
        self.entering = pl.BlockSpec((None, None, None, N, width), lambda b, g, p, c: (b, g, at(c), 0, p))
        self.starts = pl.BlockSpec((None, None, 1, chunk), lambda b, g, p, c: (b, at(c), 0, 0), memory_space=pltpu.SMEM)


_ORDER = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"))


def _run(u, delta, A_GNP, B_BGcNC, C_BGcNC, state_BGNP, starts, width, interpret):
    return tuple(_call(u, delta, A_GNP, B_BGcNC, C_BGcNC, state_BGNP, starts, width, interpret, keep=False))


def _call(u, delta, A_GNP, B_BGcNC, C_BGcNC, state_BGNP, starts, width, interpret, keep):
    B, G, count, chunk, P = u.shape
    N = A_GNP.shape[1]
    specs = _Specs(chunk, N, width, count, False)
    like = jax.ShapeDtypeStruct
    kept = [like((B, G, count, N, P), u.dtype)] if keep else []
    return pl.pallas_call(
        _forward_kernel,
        grid=(B, G, P // width, count),
        in_specs=[specs.token, specs.token, specs.rates, specs.map, specs.map, specs.state, specs.starts],
        out_specs=[specs.token, specs.state, specs.entering][: 2 + keep],
        out_shape=[like(u.shape, u.dtype), like(state_BGNP.shape, u.dtype), *kept],
        scratch_shapes=[pltpu.VMEM((N, width), jnp.float32)],
        compiler_params=_ORDER,
        interpret=interpret,
        name="selective_scan_forward",
    )(u, delta, A_GNP, B_BGcNC, C_BGcNC, state_BGNP, starts)


def _forward(u, delta, A_GNP, B_BGcNC, C_BGcNC, state_BGNP, starts, width, interpret):
    given = (u, delta, A_GNP, B_BGcNC, C_BGcNC, state_BGNP, starts)
    y, final, entering = _call(*given, width, interpret, keep=True)
    return (y, final), (u, delta, A_GNP, B_BGcNC, C_BGcNC, entering, starts)


def _backward(width, interpret, residuals, cotangents):
    u, delta, A_GNP, B_BGcNC, C_BGcNC, entering, starts = residuals
    dy, dfinal = cotangents
    B, G, count, chunk, P = u.shape
    N, parts = A_GNP.shape[1], P // width
    specs = _Specs(chunk, N, width, count, True)
    like = jax.ShapeDtypeStruct
    du, ddelta, dA, dB, dC, dstate = pl.pallas_call(
        _backward_kernel,
        grid=(B, G, parts, count),
        in_specs=[
            *(specs.token, specs.token, specs.rates, specs.map, specs.map),
            *(specs.entering, specs.starts, specs.token, specs.state),
        ],
        out_specs=[specs.token, specs.token, specs.state, specs.map_slope, specs.map_slope, specs.state],
        out_shape=[
            like(u.shape, u.dtype),
            like(u.shape, u.dtype),
            like((B, G, N, P), u.dtype),
            like((B, G, parts, count, N, chunk), u.dtype),
            like((B, G, parts, count, N, chunk), u.dtype),
            like((B, G, N, P), u.dtype),
        ],
        scratch_shapes=[pltpu.VMEM((N, width), jnp.float32), pltpu.VMEM((chunk, N, width), jnp.float32)],
        compiler_params=_ORDER,
        interpret=interpret,
        name="selective_scan_backward",
    )(u, delta, A_GNP, B_BGcNC, C_BGcNC, entering, starts, dy, dfinal)
    return du, ddelta, dA.sum(0), dB.sum(2), dC.sum(2), dstate, None


_scan = jax.custom_vjp(_run, nondiff_argnums=(7, 8))
_scan.defvjp(_forward, _backward)

"""The selective scan as two Mosaic GPU kernels (Hopper and later).

A warpgroup runs 128 channels, one in each thread, over all chunks: the N states of a channel stay in registers, and a
step needs nothing from another thread. The next chunk is copied to shared memory while one is at work.

Where gradients are asked for, the forward kernel writes the state that enters each chunk. The backward kernel takes the
chunks from the last to the first and runs over each three times: once for the gradient of C, once to keep the states in
shared memory, and once backwards for the adjoint, as in `chunked`. The gradients of B and C are sums over channels: one
buffer in shared memory takes the terms of a chunk, which are then added up along its rows; each warpgroup writes its
own sums, and those are added up outside. Chunks are as short as that buffer needs.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.mosaic import over_chunks
from kernels.segments import pad_length
from kernels.selective_scan.blocks import SelectiveScanBlocks

LANES = 128
CHUNK = 8
# The buffer takes CHUNK N rows of 512 bytes, of the 227 KiB that a program may have.
MOST_STATES = 48
_GRID = ("batch", "group", "part")
# A thread's own channel: what it writes to shared memory in this layout it can read again without a barrier.
_OWN = plgpu.Layout.WG_STRIDED((LANES,), vec_size=1)
# Barriers stand where the layout changes, in `add_up`, not around every store.
_PARAMS = plgpu.CompilerParams(unsafe_no_auto_barriers=True)


def selective_scan_gpu(
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
    del blocks
    if interpret is True:
        interpret = plgpu.InterpretGPUParams()
    B, L, D = u_BLD.shape
    G, N = B_BLGN.shape[2:]

    # Padded steps and channels have delta = 0, padded states B = 0: all leave the state as it is.
    def grouped(x_BLD: jax.Array) -> jax.Array:
        """(B, L, D) to (B, G, L, P)."""
        x = pad_length(pad_length(x_BLD.reshape(B, L, G, D // G), CHUNK), LANES, axis=3)
        return jnp.swapaxes(x, 1, 2)

    def mapped(x_BLGN: jax.Array) -> jax.Array:
        """(B, L, G, N) to (B, G, L, N)."""
        return jnp.swapaxes(pad_length(pad_length(x_BLGN, CHUNK), 8, axis=3), 1, 2)

    def states(x: jax.Array) -> jax.Array:
        """(..., D, N) to (..., G, N, P)."""
        x = x.reshape(*x.shape[:-2], G, D // G, N)
        return jnp.swapaxes(pad_length(pad_length(x, LANES, axis=-2), 8, axis=-1), -1, -2)

    y, final = _scan(
        grouped(u_BLD),
        grouped(delta_BLD),
        states(A_DN),
        mapped(B_BLGN),
        mapped(C_BLGN),
        states(state_BDN),
        pad_length(starts_BL.astype(jnp.int32), CHUNK),
        interpret or None,
    )
    y_BLD = jnp.swapaxes(y[:, :, :L, : D // G], 1, 2).reshape(B, L, D)
    return y_BLD, jnp.swapaxes(final[..., :N, : D // G], 2, 3).reshape(B, D, N)


def _place():
    """Batch, group, and the channels of this program."""
    lanes = pl.ds(jax.lax.axis_index("part") * LANES, LANES)
    return jax.lax.axis_index("batch"), jax.lax.axis_index("group"), lanes


def _spread(scalar: jax.Array) -> jax.Array:
    return jnp.broadcast_to(scalar, (LANES,))


def _clear(states: list[jax.Array], start: jax.Array) -> list[jax.Array]:
    here = _spread(start != 0)
    return [jnp.where(here, jnp.zeros_like(each), each) for each in states]


def _step(h, A, t, u, delta, maps_in):
    """The states after step t of a chunk."""
    input_P = delta[t] * u[t]
    return [jnp.exp(delta[t] * A[n]) * h[n] + _spread(maps_in[t, n]) * input_P for n in range(len(h))]


def _forward_kernel(keep, u, delta, A, maps_in, maps_out, h, starts, y, final, *rest):
    entering, (*buffers, barrier) = (rest[0], rest[1:]) if keep else (None, rest)
    b, g, lanes = _place()
    N, count = A.shape[1], u.shape[2] // CHUNK
    rates = [A[g, n, lanes] for n in range(N)]

    def run_chunk(chunk, tiles, h):
        u, delta, maps_in, maps_out, starts = tiles
        if entering is not None:
            for n in range(N):
                entering[b, g, chunk, n, lanes] = h[n]

        def run_token(t, h):
            h = _step(_clear(h, starts[t]), rates, t, u, delta, maps_in)
            y[b, g, chunk * CHUNK + t, lanes] = sum(_spread(maps_out[t, n]) * h[n] for n in range(N))
            return h

        return jax.lax.fori_loop(0, CHUNK, run_token, h)

    sources = (
        lambda rows: u.at[b, g, rows, lanes],
        lambda rows: delta.at[b, g, rows, lanes],
        lambda rows: maps_in.at[b, g, rows],
        lambda rows: maps_out.at[b, g, rows],
        lambda rows: starts.at[b, rows],
    )
    h_P = over_chunks(run_chunk, [h[b, g, n, lanes] for n in range(N)], sources, buffers, barrier, CHUNK, count)
    for n in range(N):
        final[b, g, n, lanes] = h_P[n]


def _buffers(N: int, tokens: int):
    """Both halves of the buffers for `tokens` arrays of channels, the maps and the starts, and the barriers."""
    rows = [plgpu.SMEM((2, CHUNK, LANES), jnp.float32)] * tokens
    maps = [plgpu.SMEM((2, CHUNK, N), jnp.float32)] * 2
    return [*rows, *maps, plgpu.SMEM((2, CHUNK), jnp.int32), plgpu.Barrier(num_arrivals=tokens + 3, num_barriers=2)]


def _run(u, delta, A_GNP, B_BGLN, C_BGLN, state_BGNP, starts_BL, interpret):
    return tuple(_call(u, delta, A_GNP, B_BGLN, C_BGLN, state_BGNP, starts_BL, interpret, keep=False))


def _call(u, delta, A_GNP, B_BGLN, C_BGLN, state_BGNP, starts_BL, interpret, keep):
    B, G, L, P = u.shape
    N = A_GNP.shape[1]
    like = jax.ShapeDtypeStruct
    kept = [like((B, G, L // CHUNK, N, P), jnp.float32)] if keep else []
    return plgpu.kernel(
        partial(_forward_kernel, keep),
        out_type=[like(u.shape, jnp.float32), like(state_BGNP.shape, jnp.float32), *kept],
        scratch_types=_buffers(N, 2),
        grid=(B, G, P // LANES),
        grid_names=_GRID,
        compiler_params=_PARAMS,
        interpret=interpret,
        kernel_name="selective_scan_forward",
    )(u, delta, A_GNP, B_BGLN, C_BGLN, state_BGNP, starts_BL)


def _forward(u, delta, A_GNP, B_BGLN, C_BGLN, state_BGNP, starts_BL, interpret):
    given = (u, delta, A_GNP, B_BGLN, C_BGLN, state_BGNP, starts_BL)
    y, final, entering = _call(*given, interpret, keep=True)
    return (y, final), (u, delta, A_GNP, B_BGLN, C_BGLN, entering, starts_BL)


def _backward_kernel(
    u, delta, A, maps_in, maps_out, entering, starts, dy, dfinal, du, ddelta, dA, dB, dC, dh, *scratch
):
    *buffers, barrier, terms = scratch
    b, g, lanes = _place()
    part = jax.lax.axis_index("part")
    N, count = A.shape[1], u.shape[2] // CHUNK
    rates = [A[g, n, lanes] for n in range(N)]

    def add_up(chunk, sums):
        """Sums of the rows of `terms`, once all threads have written them."""
        plgpu.commit_smem()
        for row in range(0, CHUNK * N, 64):
            tile = plgpu.load(terms.at[pl.ds(row, 64)], layout=plgpu.Layout.WGMMA, optimized=False)
            sums[b, g, part, chunk, pl.ds(row, 64)] = tile.sum(1)

    def run_chunk(chunk, tiles, carry):
        u, delta, dy, maps_in, maps_out, starts = tiles
        enter = [entering[b, g, chunk, n, lanes] for n in range(N)]

        def weigh_token(t, h):
            h = _step(_clear(h, starts[t]), rates, t, u, delta, maps_in)
            for n in range(N):
                terms[t * N + n] = h[n] * dy[t]
            return h

        jax.lax.fori_loop(0, CHUNK, weigh_token, enter)
        add_up(chunk, dC)
        plgpu.commit_smem()

        def keep_token(t, h):
            h = _clear(h, starts[t])
            for n in range(N):
                terms[t * N + n] = plgpu.layout_cast(h[n], _OWN)
            return _step(h, rates, t, u, delta, maps_in)

        jax.lax.fori_loop(0, CHUNK, keep_token, enter)

        def retreat(i, carry):
            t = CHUNK - 1 - i
            m, d_rates = carry
            u_P, delta_P, dy_P = u[t], delta[t], dy[t]
            dinput_P, dlog_P, before, slopes = jnp.zeros_like(u_P), jnp.zeros_like(u_P), [], []
            for n in range(N):
                h_P = plgpu.load(terms.at[t * N + n], layout=_OWN)
                m_P = m[n] + _spread(maps_out[t, n]) * dy_P
                terms[t * N + n] = plgpu.layout_cast(m_P * (delta_P * u_P), _OWN)
                dinput_P = dinput_P + _spread(maps_in[t, n]) * m_P
                m_P = m_P * jnp.exp(delta_P * rates[n])
                dlog_P = dlog_P + rates[n] * m_P * h_P
                slopes.append(d_rates[n] + delta_P * m_P * h_P)
                before.append(m_P)
            du[b, g, chunk * CHUNK + t, lanes] = dinput_P * delta_P
            ddelta[b, g, chunk * CHUNK + t, lanes] = dlog_P + dinput_P * u_P
            return _clear(before, starts[t]), slopes

        carry = jax.lax.fori_loop(0, CHUNK, retreat, carry)
        add_up(chunk, dB)
        return carry

    sources = (
        lambda rows: u.at[b, g, rows, lanes],
        lambda rows: delta.at[b, g, rows, lanes],
        lambda rows: dy.at[b, g, rows, lanes],
        lambda rows: maps_in.at[b, g, rows],
        lambda rows: maps_out.at[b, g, rows],
        lambda rows: starts.at[b, rows],
    )
    carry = ([dfinal[b, g, n, lanes] for n in range(N)], [jnp.zeros((LANES,), jnp.float32) for _ in range(N)])
    m, d_rates = over_chunks(run_chunk, carry, sources, buffers, barrier, CHUNK, count, backwards=True)
    for n in range(N):
        dh[b, g, n, lanes] = m[n]
        dA[b, g, n, lanes] = d_rates[n]


def _backward(interpret, residuals, cotangents):
    u, delta, A_GNP, B_BGLN, C_BGLN, entering, starts_BL = residuals
    dy, dfinal = cotangents
    B, G, L, P = u.shape
    N, parts = A_GNP.shape[1], P // LANES
    like = jax.ShapeDtypeStruct
    sums = like((B, G, parts, L // CHUNK, CHUNK * N), jnp.float32)
    states = like((B, G, N, P), jnp.float32)
    du, ddelta, dA, dB, dC, dstate = plgpu.kernel(
        _backward_kernel,
        out_type=[like(u.shape, jnp.float32), like(u.shape, jnp.float32), states, sums, sums, states],
        scratch_types=[*_buffers(N, 3), plgpu.SMEM((CHUNK * N, LANES), jnp.float32)],
        grid=(B, G, parts),
        grid_names=_GRID,
        compiler_params=_PARAMS,
        interpret=interpret,
        kernel_name="selective_scan_backward",
    )(u, delta, A_GNP, B_BGLN, C_BGLN, entering, starts_BL, dy, dfinal)
    dB, dC = (each.sum(2).reshape(B, G, L, N) for each in (dB, dC))
    return du, ddelta, dA.sum(0), dB, dC, dstate, None


_scan = jax.custom_vjp(_run, nondiff_argnums=(7,))
_scan.defvjp(_forward, _backward)

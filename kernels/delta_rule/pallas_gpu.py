"""The delta rule as two Mosaic GPU kernels (Hopper and later), one token at a time.

A warpgroup holds 64 or 32 columns of the state of a head in registers, as a matrix whose rows are keys, and runs over
all chunks while the next one is copied to shared memory. A token reads S^T k and adds k u^T; columns do not need each
other. Everything is in float32, without tensor cores: they round what they multiply to 8 or 11 bits, which the
triangular system of the chunked form does not bear.

Where gradients are asked for, the forward kernel writes the state that enters each chunk. The backward kernel takes the
chunks from the last to the first, recomputes the states of one into global memory, chunk K V numbers for a program that
stay in the cache, and runs the adjoint over them. Gradients that are sums over columns are written by each program and
added up outside.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.delta_rule.blocks import DeltaRuleBlocks
from kernels.mosaic import over_chunks
from kernels.segments import pad_length

CHUNK = 16
_MOST_KEYS = 256
_SHARED_BYTES = 220 * 1024
_MATRIX = plgpu.Layout.WGMMA
_KEYS, _COLUMNS = _MATRIX.reduce(1), _MATRIX.reduce(0)
_GRID = ("batch", "head", "part")


def delta_rule_gpu(
    q_BLHRK: jax.Array,
    k_BLHK: jax.Array,
    v_BLHV: jax.Array,
    beta_BLH: jax.Array,
    log_decay_BLH: jax.Array | None,
    state_BHKV: jax.Array,
    starts_BL: jax.Array,
    blocks: DeltaRuleBlocks,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """o_BLHRV for R queries that share a state, and the final state, cleared before each step of `starts_BL`."""
    del blocks
    if interpret is True:
        interpret = plgpu.InterpretGPUParams()
    (L, K), V = (k_BLHK.shape[1], k_BLHK.shape[3]), v_BLHV.shape[3]
    width = min(_most_columns(K), V + -V % 8)
    # Padded steps have beta = 0 and decay = 1, which leaves the state as it is.
    decay_BLH = jnp.exp(pad_length(jnp.zeros_like(beta_BLH) if log_decay_BLH is None else log_decay_BLH, CHUNK))
    keys, columns = (lambda x, axis=-1, size=size: pad_length(x, size, axis=axis) for size in (64, width))
    q, k, v, beta = (pad_length(x, CHUNK) for x in (keys(q_BLHRK), keys(k_BLHK), columns(v_BLHV), beta_BLH))
    o, final = _scan(
        jnp.transpose(q, (0, 2, 3, 1, 4)),
        *(jnp.swapaxes(x, 1, 2) for x in (k, v, beta, decay_BLH)),
        columns(keys(state_BHKV, axis=2)),
        pad_length(starts_BL.astype(jnp.int32), CHUNK),
        width,
        interpret or None,
    )
    return jnp.transpose(o, (0, 3, 1, 2, 4))[:, :L, ..., :V], final[:, :, :K, :V]


def refuse(R: int, K: int) -> dict[str, str]:
    """Reasons for `kernels.dispatch.select` against the kernels: registers and shared memory are limited."""
    if K > _MOST_KEYS:
        return {"pallas_gpu": f"keys have {K} numbers, more than {_MOST_KEYS}"}
    size = 2 * 4 * CHUNK * (R + 1) * (K + -K % 64 + _most_columns(K))
    if size > _SHARED_BYTES:
        return {"pallas_gpu": f"{R} queries that share a key of {K} need {size} bytes of {_SHARED_BYTES}"}
    return {}


def _most_columns(K: int) -> int:
    """So many that the states before and after a step and their adjoint fit into the registers."""
    return 64 if K <= 64 else 32


def _place(width: int):
    """Batch, head, part, and the columns of this program."""
    part = jax.lax.axis_index("part")
    return jax.lax.axis_index("batch"), jax.lax.axis_index("head"), part, pl.ds(part * width, width)


def _load(ref, layout) -> jax.Array:
    return plgpu.load(ref, layout=layout, optimized=False)


def _outer(x_K: jax.Array, y_V: jax.Array) -> jax.Array:
    return _rows(x_K, y_V.shape[0]) * _cols(x_K.shape[0], y_V)


def _rows(x_K: jax.Array, V: int) -> jax.Array:
    return jax.lax.broadcast_in_dim(x_K, (x_K.shape[0], V), (0,))


def _cols(K: int, y_V: jax.Array) -> jax.Array:
    return jax.lax.broadcast_in_dim(y_V, (K, y_V.shape[0]), (1,))


def _read(x_K: jax.Array, S_KV: jax.Array) -> jax.Array:
    return (_rows(x_K, S_KV.shape[1]) * S_KV).sum(0)


def _clear(S_KV: jax.Array, start: jax.Array) -> jax.Array:
    return jnp.where(jnp.broadcast_to(start != 0, S_KV.shape), jnp.zeros_like(S_KV), S_KV)


def _write(S_KV: jax.Array, t, k, v, beta, decay):
    """The decayed state, what the key reads from it, what is written, and the state after step t of a chunk."""
    k_K, v_V = _load(k.at[t], _KEYS), _load(v.at[t], _COLUMNS)
    S_KV = decay[t] * S_KV
    read_V = _read(k_K, S_KV)
    write_V = beta[t] * (v_V - read_V)
    return S_KV, read_V, write_V, S_KV + _outer(k_K, write_V)


def _sources(arrays, b, h, columns):
    q, k, v, beta, decay, starts = arrays
    return [
        lambda rows: q.at[b, h, :, rows],
        lambda rows: k.at[b, h, rows],
        lambda rows: v.at[b, h, rows, columns],
        lambda rows: beta.at[b, h, rows],
        lambda rows: decay.at[b, h, rows],
        lambda rows: starts.at[b, rows],
    ]


def _buffers(R: int, K: int, width: int, backwards: bool):
    def tile(*shape, dtype=jnp.float32):
        return plgpu.SMEM((2, *shape), dtype)

    tiles = [tile(R, CHUNK, K), tile(CHUNK, K), tile(CHUNK, width), tile(CHUNK), tile(CHUNK)]
    tiles += [tile(CHUNK, dtype=jnp.int32), *([tile(R, CHUNK, width)] if backwards else [])]
    return [*tiles, plgpu.Barrier(num_arrivals=len(tiles), num_barriers=2)]


def _forward_kernel(keep, q, k, v, beta, decay, state, starts, o, final, *rest):
    entering, (*buffers, barrier) = (rest[0], rest[1:]) if keep else (None, rest)
    width = buffers[2].shape[-1]
    b, h, _, columns = _place(width)
    R, L = q.shape[2:4]

    def run_chunk(chunk, tiles, S_KV):
        q, k, v, beta, decay, starts = tiles
        if entering is not None:
            entering[b, h, chunk, :, columns] = S_KV

        def run_token(t, S_KV):
            _, _, _, S_KV = _write(_clear(S_KV, starts[t]), t, k, v, beta, decay)
            for r in range(R):
                o[b, h, r, chunk * CHUNK + t, columns] = _read(_load(q.at[r, t], _KEYS), S_KV)
            return S_KV

        return jax.lax.fori_loop(0, CHUNK, run_token, S_KV)

    sources = _sources((q, k, v, beta, decay, starts), b, h, columns)
    S_KV = _load(state.at[b, h, :, columns], _MATRIX)
    final[b, h, :, columns] = over_chunks(run_chunk, S_KV, sources, buffers, barrier, CHUNK, L // CHUNK)


def _backward_kernel(q, k, v, beta, decay, entering, starts, do, dfinal, *rest):
    dq, dk, dv, dbeta, ddecay, dstate, states, *buffers, barrier = rest
    width = buffers[2].shape[-1]
    b, h, part, columns = _place(width)
    R, L, K = q.shape[2:]

    def run_chunk(chunk, tiles, M_KV):
        q, k, v, beta, decay, starts, do = tiles

        def keep_token(t, S_KV):
            S_KV = _clear(S_KV, starts[t])
            states[b, h, part, t] = S_KV
            return _write(S_KV, t, k, v, beta, decay)[3]

        jax.lax.fori_loop(0, CHUNK, keep_token, _load(entering.at[b, h, chunk, :, columns], _MATRIX))

        def retreat(i, M_KV):
            t = CHUNK - 1 - i
            row = chunk * CHUNK + t
            before_KV = _load(states.at[b, h, part, t], _MATRIX)
            S_KV, read_V, write_V, after_KV = _write(before_KV, t, k, v, beta, decay)
            for r in range(R):
                do_V = _load(do.at[r, t], _COLUMNS)
                dq[b, h, part, r, row] = (after_KV * _cols(K, do_V)).sum(1)
                M_KV = M_KV + _outer(_load(q.at[r, t], _KEYS), do_V)
            k_K = _load(k.at[t], _KEYS)
            dwrite_V = _read(k_K, M_KV)
            dread_V = -beta[t] * dwrite_V
            dk[b, h, part, row] = (M_KV * _cols(K, write_V) + S_KV * _cols(K, dread_V)).sum(1)
            dv[b, h, row, columns] = beta[t] * dwrite_V
            dbeta[b, h, row, columns] = dwrite_V * (_load(v.at[t], _COLUMNS) - read_V)
            M_KV = M_KV + _outer(k_K, dread_V)
            ddecay[b, h, part, row] = (before_KV * M_KV).sum(1)
            return _clear(decay[t] * M_KV, starts[t])

        return jax.lax.fori_loop(0, CHUNK, retreat, M_KV)

    sources = [*_sources((q, k, v, beta, decay, starts), b, h, columns), lambda rows: do.at[b, h, :, rows, columns]]
    M_KV = _load(dfinal.at[b, h, :, columns], _MATRIX)
    dstate[b, h, :, columns] = over_chunks(run_chunk, M_KV, sources, buffers, barrier, CHUNK, L // CHUNK, True)


def _run(q, k, v, beta, decay, state_BHKV, starts_BL, width, interpret):
    return tuple(_call(q, k, v, beta, decay, state_BHKV, starts_BL, width, interpret, keep=False))


def _call(q, k, v, beta, decay, state_BHKV, starts_BL, width, interpret, keep):
    B, H, R, L, K = q.shape
    V = v.shape[-1]
    kept = [_like(B, H, L // CHUNK, K, V)] if keep else []
    return plgpu.kernel(
        partial(_forward_kernel, keep),
        out_type=[_like(B, H, R, L, V), _like(B, H, K, V), *kept],
        scratch_types=_buffers(R, K, width, False),
        grid=(B, H, V // width),
        grid_names=_GRID,
        interpret=interpret,
        kernel_name="delta_rule_forward",
    )(q, k, v, beta, decay, state_BHKV, starts_BL)


def _forward(q, k, v, beta, decay, state_BHKV, starts_BL, width, interpret):
    given = (q, k, v, beta, decay, state_BHKV, starts_BL)
    o, final_BHKV, entering = _call(*given, width, interpret, keep=True)
    return (o, final_BHKV), (q, k, v, beta, decay, entering, starts_BL)


def _like(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _backward(width, interpret, residuals, cotangents):
    q, k, v, beta, decay, entering, starts_BL = residuals
    do, dfinal_BHKV = cotangents
    B, H, R, L, K = q.shape
    V = v.shape[-1]
    parts = V // width
    dq, dk, dv, dbeta, ddecay, dstate_BHKV, _ = plgpu.kernel(
        _backward_kernel,
        out_type=[
            _like(B, H, parts, R, L, K),
            _like(B, H, parts, L, K),
            _like(B, H, L, V),
            _like(B, H, L, V),
            _like(B, H, parts, L, K),
            _like(B, H, K, V),
            _like(B, H, parts, CHUNK, K, width),
        ],
        scratch_types=_buffers(R, K, width, True),
        grid=(B, H, parts),
        grid_names=_GRID,
        interpret=interpret,
        kernel_name="delta_rule_backward",
    )(q, k, v, beta, decay, entering, starts_BL, do, dfinal_BHKV)
    return dq.sum(2), dk.sum(2), dv, dbeta.sum(-1), ddecay.sum((2, 4)), dstate_BHKV, None


_scan = jax.custom_vjp(_run, nondiff_argnums=(7, 8))
_scan.defvjp(_forward, _backward)

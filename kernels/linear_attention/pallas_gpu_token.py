"""Linear attention one token at a time in float32, as Mosaic GPU kernels (Hopper and later).

For decays per channel and for inputs that tensor cores would round: float32, and float16, in which a state of many
steps overflows. Rows and columns of a state do not need each other, so one warpgroup holds a tile of 64 keys by 64
columns in registers and runs over all chunks, while the next one is copied to shared memory; heads of any width are
several tiles, and what is a sum over keys or columns is added up outside. No decay is ever divided by: a step
multiplies by its own, which is 0 where a segment starts.

Sums within a row of a tile stay in a warp, those within a column do not. The forward kernel holds the state transposed,
so that reading it is a sum of the first kind. The backward pass rebuilds the state that enters each chunk, takes the
chunks from the last to the first, recomputes the states of one into global memory, and runs the adjoint over them.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.mosaic import over_chunks
from kernels.segments import pad_length

CHUNK = 32
TILE = 64
_MATRIX = plgpu.Layout.WGMMA
_GRID = ("batch", "head", "keys", "columns")


def attend(
    q_BLHK: jax.Array,
    k_BLGK: jax.Array,
    v_BLGV: jax.Array,
    log_decay: jax.Array | None,
    state_BHKV: jax.Array,
    index_BL: jax.Array | None,
    scale: float,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """As `reference.attend`, for states in float32."""
    (B, L, H, K), V = q_BLHK.shape, v_BLGV.shape[3]

    def steps(array: jax.Array) -> jax.Array:
        """(B, L, H, X) or (B, L, H) to (B, H, L, X) or (B, H, L), padded. Padding has no keys and no decay."""
        array = jnp.swapaxes(pad_length(array.astype(jnp.float32), CHUNK), 1, 2)
        return pad_length(array, TILE, axis=3) if array.ndim == 4 else array

    decay = jnp.exp(steps(jnp.zeros((B, L, H)) if log_decay is None else log_decay))
    if index_BL is not None:
        starts_BL = pad_length(jnp.diff(index_BL, axis=1, prepend=index_BL[:, :1]) != 0, CHUNK)
        decay = jnp.where(jnp.expand_dims(starts_BL, [1, 3][: decay.ndim - 2]), 0, decay)
    state_BHKV = pad_length(pad_length(state_BHKV, TILE, axis=2), TILE, axis=3)
    y, last = _attend(steps(q_BLHK), steps(k_BLGK), steps(v_BLGV), decay, state_BHKV, interpret or None)
    return scale * jnp.swapaxes(y, 1, 2)[:, :L, :, :V], last[:, :, :K, :V]


def _place(heads_a_group: int):
    """Batch, head and its group, parts of keys and of columns, and the keys and columns of this program."""
    head, parts = jax.lax.axis_index("head"), [jax.lax.axis_index(name) for name in ("keys", "columns")]
    group = jax.lax.div(head, jnp.int32(heads_a_group))
    return jax.lax.axis_index("batch"), head, group, *parts, *(pl.ds(part * TILE, TILE) for part in parts)


def _load(ref) -> jax.Array:
    return plgpu.load(ref, layout=_MATRIX, optimized=False)


def _spread(ref, axis: int) -> jax.Array:
    """A vector in shared memory as a matrix in which it lies along this axis."""
    vector = plgpu.load(ref, layout=_MATRIX.reduce(1 - axis), optimized=False)
    return jax.lax.broadcast_in_dim(vector, (TILE, TILE), (axis,))


def _decayed(matrix: jax.Array, decay, t, axis: int) -> jax.Array:
    """By the decay of step t, of the head or of the keys, which lie along this axis."""
    return (decay[t] if len(decay.shape) == 1 else _spread(decay.at[t], axis)) * matrix


def _write(S_KV: jax.Array, t, k, v, decay) -> jax.Array:
    """The state after step t of a chunk."""
    return _decayed(S_KV, decay, t, 0) + _spread(k.at[t], 0) * _spread(v.at[t], 1)


def _decays(decay, b, h, keys):
    """Those of a range of steps."""
    return lambda rows: decay.at[b, h, rows, keys] if len(decay.shape) == 4 else decay.at[b, h, rows]


def _forward_kernel(share, q, k, v, decay, first, y, last, *scratch):
    *buffers, barrier = scratch
    b, h, g, part, _, keys, columns = _place(share)

    def run_chunk(chunk, tiles, S_VK):
        q, k, v, decay = tiles

        def run_token(t, S_VK):
            S_VK = _decayed(S_VK, decay, t, 1) + _spread(v.at[t], 0) * _spread(k.at[t], 1)
            y[part, b, h, chunk * CHUNK + t, columns] = (S_VK * _spread(q.at[t], 1)).sum(1)
            return S_VK

        return jax.lax.fori_loop(0, CHUNK, run_token, S_VK)

    sources = [
        lambda rows: q.at[b, h, rows, keys],
        lambda rows: k.at[b, g, rows, keys],
        lambda rows: v.at[b, g, rows, columns],
        _decays(decay, b, h, keys),
    ]
    S_VK = _load(first.at[b, h, columns, keys])
    last[b, h, columns, keys] = over_chunks(run_chunk, S_VK, sources, buffers, barrier, CHUNK, q.shape[2] // CHUNK)


def _states_kernel(share, k, v, decay, first, entering, *scratch):
    *buffers, barrier = scratch
    b, h, g, _, _, keys, columns = _place(share)

    def run_chunk(chunk, tiles, S_KV):
        entering[b, h, chunk, keys, columns] = S_KV
        return jax.lax.fori_loop(0, CHUNK, lambda t, S_KV: _write(S_KV, t, *tiles), S_KV)

    sources = [
        lambda rows: k.at[b, g, rows, keys],
        lambda rows: v.at[b, g, rows, columns],
        _decays(decay, b, h, keys),
    ]
    over_chunks(run_chunk, _load(first.at[b, h, keys, columns]), sources, buffers, barrier, CHUNK, k.shape[2] // CHUNK)


def _gradients_kernel(share, q, k, v, decay, d_y, entering, d_last, *rest):
    d_q, d_k, d_v, d_decay, d_first, states, *buffers, barrier = rest
    b, h, g, part_K, part_V, keys, columns = _place(share)

    def run_chunk(chunk, tiles, M_KV):
        q, k, v, decay, d_y = tiles

        def keep_token(t, S_KV):
            states[b, h, part_K, part_V, t] = S_KV
            return _write(S_KV, t, k, v, decay)

        jax.lax.fori_loop(0, CHUNK, keep_token, _load(entering.at[b, h, chunk, keys, columns]))

        def retreat(i, M_KV):
            t = CHUNK - 1 - i
            row = chunk * CHUNK + t
            before_KV = _load(states.at[b, h, part_K, part_V, t])
            d_q[part_V, b, h, row, keys] = (_write(before_KV, t, k, v, decay) * _spread(d_y.at[t], 1)).sum(1)
            M_KV = M_KV + _spread(q.at[t], 0) * _spread(d_y.at[t], 1)
            d_k[part_V, b, h, row, keys] = (M_KV * _spread(v.at[t], 1)).sum(1)
            d_v[part_K, b, h, row, columns] = (M_KV * _spread(k.at[t], 0)).sum(0)
            d_decay[part_V, b, h, row, keys] = (before_KV * M_KV).sum(1)
            return _decayed(M_KV, decay, t, 0)

        return jax.lax.fori_loop(0, CHUNK, retreat, M_KV)

    sources = [
        lambda rows: q.at[b, h, rows, keys],
        lambda rows: k.at[b, g, rows, keys],
        lambda rows: v.at[b, g, rows, columns],
        _decays(decay, b, h, keys),
        lambda rows: d_y.at[b, h, rows, columns],
    ]
    M_KV = _load(d_last.at[b, h, keys, columns])
    count = q.shape[2] // CHUNK
    d_first[b, h, keys, columns] = over_chunks(run_chunk, M_KV, sources, buffers, barrier, CHUNK, count, True)


def _like(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _launch(kernel, name: str, share: int, decay: jax.Array, state_BHKV: jax.Array, tiles: int, outputs, interpret):
    """A program for every tile of the state; chunks of so many arrays of tokens and of the decays are copied."""
    B, H, K, V = state_BHKV.shape
    steps = [plgpu.SMEM((2, CHUNK, TILE), jnp.float32)] * tiles
    steps.insert(tiles if name == "states" else 3, plgpu.SMEM((2, CHUNK, TILE)[: decay.ndim - 1], jnp.float32))
    return plgpu.kernel(
        partial(kernel, share),
        out_type=outputs,
        scratch_types=[*steps, plgpu.Barrier(num_arrivals=len(steps), num_barriers=2)],
        grid=(B, H, K // TILE, V // TILE),
        grid_names=_GRID,
        interpret=interpret,
        kernel_name=f"linear_attention_by_tokens_{name}",
    )


def _run(q, k, v, decay, state_BHKV, interpret):
    """y (B, H, L, V) and the last state, for whole chunks and tiles."""
    (B, H, K, V), L = state_BHKV.shape, q.shape[2]
    outputs = [_like(K // TILE, B, H, L, V), _like(B, H, V, K)]
    run = _launch(_forward_kernel, "forward", H // k.shape[1], decay, state_BHKV, 3, outputs, interpret)
    y, last_BHVK = run(q, k, v, decay, jnp.swapaxes(state_BHKV, 2, 3))
    return y.sum(0), jnp.swapaxes(last_BHVK, 2, 3)


def _forward(q, k, v, decay, state_BHKV, interpret):
    arguments = (q, k, v, decay, state_BHKV)
    return _run(*arguments, interpret), arguments


def _backward(interpret, arguments, cotangents):
    q, k, v, decay, state_BHKV = arguments
    d_y, d_last = cotangents
    (B, H, K, V), L, G = state_BHKV.shape, q.shape[2], k.shape[1]
    parts_K, parts_V = K // TILE, V // TILE
    launch = partial(_launch, share=H // G, decay=decay, state_BHKV=state_BHKV, interpret=interpret)
    entering = _like(B, H, L // CHUNK, K, V)
    entering = launch(_states_kernel, "states", tiles=2, outputs=entering)(k, v, decay, state_BHKV)
    keys, columns = _like(parts_V, B, H, L, K), _like(parts_K, B, H, L, V)
    outputs = [keys, keys, columns, keys, _like(B, H, K, V), _like(B, H, parts_K, parts_V, CHUNK, TILE, TILE)]
    run = launch(_gradients_kernel, "gradients", tiles=4, outputs=outputs)
    d_q, d_k, d_v, d_decay, d_first, _ = run(q, k, v, decay, d_y, entering, d_last)
    d_q, d_k, d_v, d_decay = (each.sum(0) for each in (d_q, d_k, d_v, d_decay))
    d_k, d_v = (each.reshape(B, G, H // G, L, -1).sum(2) for each in (d_k, d_v))
    return d_q, d_k, d_v, d_decay if decay.ndim == 4 else d_decay.sum(3), d_first


_attend = jax.custom_vjp(_run, nondiff_argnums=(5,))
_attend.defvjp(_forward, _backward)

"""Linear attention on the tensor cores of Hopper (Mosaic GPU): the chunks of `chunked`, with the state in registers.

One warpgroup runs a tile of 64 keys by 64 columns of the state of one head, chunk after chunk of 64 steps. Matrix
products take bfloat16 from shared memory and add up in float32; the state stays in float32 and is rounded for a product
only. Decays are per head, and scale rows: those of q S and of what a product reads. Heads of any width are several
tiles: everything is linear in keys and in columns, but for what a log-decay's gradient needs, which is linear in both
together, so that what tiles share is added up outside. A tile of 128 would repeat less but spill registers.
As in `chunked`, only the inputs are kept; the backward pass rebuilds the states and goes over the chunks in reverse.
What a log-decay's gradient needs of a chunk comes out as sums over channels and one matrix of pairs; XLA adds them up.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.linear_attention.rows import Rows, chunk_rows
from kernels.segments import pad_length

CHUNK = 64
TILE = 64
_MATRIX = plgpu.Layout.WGMMA
_BY_ROW, _BY_COLUMN = _MATRIX.reduce(1), _MATRIX.reduce(0)


class Factors(NamedTuple):
    """Rows (C,) of the array that a kernel reads of one chunk: both parts of the sums of log-decays and the segment,
    for the decays between two steps, and those from the state before, to the state after, and between the states."""

    coarse: jax.Array
    fine: jax.Array
    segment: jax.Array
    through: jax.Array
    beyond: jax.Array
    whole: jax.Array


def factor_rows(log_decay_BHL: jax.Array | None, index_BL: jax.Array, heads: int) -> jax.Array:
    """`Factors` of all chunks, (B, H, N, 8, C) with the last two rows empty."""
    rows = Rows(*jnp.moveaxis(chunk_rows(log_decay_BHL, index_BL, heads, CHUNK), 3, 0)[: len(Rows._fields)])

    def decay(exponent, mask):
        return jnp.exp(jnp.where(mask, exponent, -jnp.inf))

    last, whole = rows.segment[..., -1:], rows.until[..., -1:]
    through = decay(rows.until, rows.segment == rows.before)
    beyond = decay(rows.after, rows.segment == last)
    whole = jnp.broadcast_to(decay(whole, last == rows.before[..., :1]), through.shape)
    factors = Factors(rows.coarse, rows.fine, rows.segment, through, beyond, whole)
    return jnp.pad(jnp.stack(factors, axis=3), ((0, 0),) * 3 + ((0, 2), (0, 0)))


def _product(x, y) -> jax.Array:
    """x @ y of two matrices in shared memory."""

    def run(accumulator):
        plgpu.wgmma(accumulator, x, y)
        return accumulator[...]

    return pl.run_scoped(run, plgpu.ACC((x.shape[0], y.shape[1]), jnp.float32))


def _row(rows, name: str, layout):
    return plgpu.load(rows.at[Factors._fields.index(name)], layout=layout)


def _scale_rows(rows, name: str, matrix: jax.Array) -> jax.Array:
    return matrix * lax.broadcast_in_dim(_row(rows, name, _BY_ROW), matrix.shape, [0])


def _between(rows) -> jax.Array:
    """D of one chunk, (C, C)."""
    shape = (CHUNK, CHUNK)

    def both(name):
        i = lax.broadcast_in_dim(_row(rows, name, _BY_ROW), shape, [0])
        return i, lax.broadcast_in_dim(_row(rows, name, _BY_COLUMN), shape, [1])

    (coarse_i, coarse_j), (fine_i, fine_j), (segment_i, segment_j) = map(both, ("coarse", "fine", "segment"))
    i, j = (plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=_MATRIX) for axis in (0, 1))
    sums = (coarse_i - coarse_j) + (fine_i - fine_j)
    return jnp.exp(jnp.where((j <= i) & (segment_i == segment_j), sums, -jnp.inf))


def _wide(ref) -> jax.Array:
    return plgpu.load(ref, layout=_MATRIX).astype(jnp.float32)


def _put(matrix: jax.Array, stage, target) -> None:
    """Registers to global memory by way of shared memory."""
    stage[...] = matrix
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(stage, target)
    plgpu.wait_smem_to_gmem(0)


def _get_state(source, stage, barrier) -> jax.Array:
    plgpu.copy_gmem_to_smem(source, stage, barrier)
    plgpu.barrier_wait(barrier)
    state = plgpu.load(stage, layout=_MATRIX)
    plgpu.commit_smem()
    return state


def _sum(terms: jax.Array, sums, place: int) -> None:
    """Sums over channels to their place, where a log-decay's gradient asks for them."""
    if sums is not None:
        sums.at[place][...] = terms.sum(axis=1)


def _load(pairs, barrier) -> None:
    """Copies all sources to their places; the barrier counts them."""
    for source, place in pairs:
        plgpu.copy_gmem_to_smem(source, place, barrier)
    plgpu.barrier_wait(barrier)


def _place(heads_a_group: int):
    """Batch, head and its group, parts of keys and of columns, and the keys and columns of this program."""
    head, parts = lax.axis_index("head"), [lax.axis_index(name) for name in ("keys", "columns")]
    group = lax.div(head, jnp.int32(heads_a_group))
    return lax.axis_index("batch"), head, group, *parts, *(pl.ds(part * TILE, TILE) for part in parts)


def _whole(rows) -> jax.Array:
    """Read it before the last `commit_smem` of a chunk: that is what the next chunk's copies wait for."""
    return rows[Factors._fields.index("whole"), 0]


def _advance(state, k, v_out, whole) -> jax.Array:
    """exp(G_C) S + k^T v_out, where v_out has decayed to the end of the chunk."""
    return whole * state + _product(k.transpose((1, 0)), v_out)


def _forward_kernel(
    q_gmem, k_gmem, v_gmem, rows_gmem, first_gmem, y_gmem, last_gmem,
    q, k, v, scores, rounded, v_out, rows, stage, loaded, ready, *, scale, share, N,
):  # fmt: skip
    batch, head, group, part, _, keys, columns = _place(share)

    def chunk(n, state):
        steps = pl.ds(n * CHUNK, CHUNK)
        _load(
            [(q_gmem.at[batch, head, steps, keys], q), (k_gmem.at[batch, group, steps, keys], k),
             (v_gmem.at[batch, group, steps, columns], v), (rows_gmem.at[batch, head, n], rows)],
            loaded,
        )  # fmt: skip
        scores[...] = (_product(q, k.transpose((1, 0))) * _between(rows)).astype(scores.dtype)
        whole = _whole(rows)
        rounded[...] = state.astype(rounded.dtype)
        v_out[...] = _scale_rows(rows, "beyond", _wide(v)).astype(v_out.dtype)
        plgpu.commit_smem()
        y = _product(scores, v) + _scale_rows(rows, "through", _product(q, rounded))
        state = _advance(state, k, v_out, whole)
        _put(scale * y, stage, y_gmem.at[part, batch, head, steps, columns])
        return state

    state = _get_state(first_gmem.at[batch, head, keys, columns], stage, ready)
    _put(lax.fori_loop(0, N, chunk, state), stage, last_gmem.at[batch, head, keys, columns])


def _states_kernel(
    k_gmem, v_gmem, rows_gmem, first_gmem, states_gmem, k, v, rounded, v_out, rows, stage, loaded, ready, *, share, N
):
    batch, head, group, _, _, keys, columns = _place(share)

    def chunk(n, state):
        steps = pl.ds(n * CHUNK, CHUNK)
        _load(
            [(k_gmem.at[batch, group, steps, keys], k), (v_gmem.at[batch, group, steps, columns], v),
             (rows_gmem.at[batch, head, n], rows)],
            loaded,
        )  # fmt: skip
        whole = _whole(rows)
        rounded[...] = state.astype(rounded.dtype)
        v_out[...] = _scale_rows(rows, "beyond", _wide(v)).astype(v_out.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(rounded, states_gmem.at[batch, head, n, keys, columns])
        state = _advance(state, k, v_out, whole)
        plgpu.wait_smem_to_gmem(0)
        return state

    lax.fori_loop(0, N, chunk, _get_state(first_gmem.at[batch, head, keys, columns], stage, ready))


def _gradients_kernel(
    q_gmem, k_gmem, v_gmem, rows_gmem, states_gmem, d_y_gmem, d_last_gmem,
    d_q_gmem, d_k_gmem, d_v_gmem, pairs_gmem, sums_gmem, d_first_gmem,
    q, k, v, state, d_y, scores, d_scores, d_state, d_y_in, rows, stage, pairs, sums, loaded, ready,
    *, share, N,
):  # fmt: skip
    batch, head, group, part_K, part_V, keys, columns = _place(share)

    def chunk(step, d_next):
        n = N - 1 - step
        steps = pl.ds(n * CHUNK, CHUNK)
        _load(
            [(q_gmem.at[batch, head, steps, keys], q), (k_gmem.at[batch, group, steps, keys], k),
             (v_gmem.at[batch, group, steps, columns], v), (rows_gmem.at[batch, head, n], rows),
             (states_gmem.at[batch, head, n, keys, columns], state),
             (d_y_gmem.at[batch, head, steps, columns], d_y)],
            loaded,
        )  # fmt: skip
        between, whole = _between(rows), _whole(rows)
        products = _product(q, k.transpose((1, 0))) * between
        scores[...] = products.astype(scores.dtype)
        # Registers are short here: what can wait in shared memory does.
        if pairs is not None:
            pairs[...] = products
        d_products = _product(d_y, v.transpose((1, 0)))
        if pairs is not None:
            pairs[...] = _wide(pairs) * d_products
        d_scores[...] = (d_products * between).astype(d_scores.dtype)
        d_state[...] = d_next.astype(d_state.dtype)
        d_y_in[...] = _scale_rows(rows, "through", _wide(d_y)).astype(d_y_in.dtype)
        plgpu.commit_smem()
        if pairs is not None:
            plgpu.copy_smem_to_gmem(pairs, pairs_gmem.at[part_K, part_V, batch, head, n])
        from_state = _scale_rows(rows, "through", _product(d_y, state.transpose((1, 0))))
        _sum(_wide(q) * from_state, sums, 0)
        _put(_product(d_scores, k) + from_state, stage, d_q_gmem.at[part_V, batch, head, steps, keys])
        to_state = _scale_rows(rows, "beyond", _product(v, d_state.transpose((1, 0))))
        _sum(_wide(k) * to_state, sums, 1)
        d_k = _product(d_scores.transpose((1, 0)), q) + to_state
        _put(d_k, stage, d_k_gmem.at[part_V, batch, head, steps, keys])
        _sum(_wide(state) * d_next, sums, 2)
        if sums is not None:
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(sums, sums_gmem.at[part_K, part_V, batch, head, n])
        d_v = _product(scores.transpose((1, 0)), d_y) + _scale_rows(rows, "beyond", _product(k, d_state))
        _put(d_v, stage, d_v_gmem.at[part_K, batch, head, steps, columns])
        return _advance(d_next, q, d_y_in, whole)

    d_last = _get_state(d_last_gmem.at[batch, head, keys, columns], stage, ready)
    _put(lax.fori_loop(0, N, chunk, d_last), stage, d_first_gmem.at[batch, head, keys, columns])


def _tile(dtype: Any) -> Any:
    """A matrix in shared memory as matrix products want it, in rows of 128 bytes; chunks are as long as tiles."""
    elements = 128 // jnp.dtype(dtype).itemsize
    # Pyright takes these two for abstract classes.
    tiling = plgpu.TilingTransform((8, elements))  # pyright: ignore[reportAbstractUsage]
    swizzle = plgpu.SwizzleTransform(128)  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM((TILE, TILE), dtype, transforms=(tiling, swizzle))


def _shape(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


class Setting(NamedTuple):
    """Static facts of a call."""

    scale: float
    interpret: Any


def _launch(kernel, name: str, state_BHKV: jax.Array, outputs, tiles, others, sources: int, interpret: Any):
    """A program for every tile of the state. Beside other memory it has tiles, the rows of a chunk, and a stage for
    results in float32; it waits for so many sources of each chunk."""
    B, H, K, V = state_BHKV.shape
    always = [plgpu.SMEM((8, CHUNK), jnp.float32), _tile(jnp.float32)]
    return plgpu.kernel(
        kernel,
        out_type=outputs,
        scratch_types=[*tiles, *always, *others, plgpu.Barrier(num_arrivals=sources), plgpu.Barrier()],
        grid=(B, H, K // TILE, V // TILE),
        grid_names=("batch", "head", "keys", "columns"),
        # The search for layouts under the default semantics does not come to an end.
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret or None,
        kernel_name=f"linear_attention_by_chunks_{name}",
    )


def _attend(q, k, v, g, index_BL, first, setting: Setting):
    """y (B, H, L, V) and the last state, for whole chunks and tiles."""
    (B, H, K, V), L = first.shape, q.shape[2]
    kernel = partial(_forward_kernel, scale=setting.scale, share=H // k.shape[1], N=L // CHUNK)
    outputs = (_shape(K // TILE, B, H, L, V), _shape(B, H, K, V))
    run = _launch(kernel, "forward", first, outputs, [_tile(q.dtype)] * 6, [], 4, setting.interpret)
    y, last = run(q, k, v, factor_rows(g, index_BL, H), first)
    return y.sum(0), last


def _forward(q, k, v, g, index_BL, first, setting):
    arguments = (q, k, v, g, index_BL, first)
    return _attend(*arguments, setting), arguments


def _backward(setting: Setting, arguments, cotangents):
    q, k, v, g, index_BL, first = arguments
    d_y, d_last = cotangents
    (B, H, K, V), L, G, dtype, C = first.shape, q.shape[2], k.shape[1], q.dtype, CHUNK
    N, parts_K, parts_V = L // C, K // TILE, V // TILE
    rows, tile = factor_rows(g, index_BL, H), _tile(dtype)
    kernel, outputs = partial(_states_kernel, share=H // G, N=N), _shape(B, H, N, K, V, dtype=dtype)
    states = _launch(kernel, "states", first, outputs, [tile] * 4, [], 3, setting.interpret)(k, v, rows, first)
    decays = g is not None
    outputs = (
        _shape(parts_V, B, H, L, K),
        _shape(parts_V, B, H, L, K),
        _shape(parts_K, B, H, L, V),
        _shape(parts_K, parts_V, B, H, N, C, C) if decays else None,
        _shape(parts_K, parts_V, B, H, N, 3, C) if decays else None,
        _shape(B, H, K, V),
    )
    others = [_tile(jnp.float32), plgpu.SMEM((3, C), jnp.float32)] if decays else [None, None]
    kernel = partial(_gradients_kernel, share=H // G, N=N)
    run = _launch(kernel, "gradients", first, outputs, [tile] * 9, others, 6, setting.interpret)
    d_q, d_k, d_v, pairs, sums, d_first = run(q, k, v, rows, states, (setting.scale * d_y).astype(dtype), d_last)
    d_q, d_k, d_v = (each.sum(0) for each in (d_q, d_k, d_v))
    d_k, d_v = (each.reshape(B, G, H // G, L, -1).sum(2).astype(dtype) for each in (d_k, d_v))
    d_g = None
    if g is not None:
        whole = rows[:, :, :, Factors._fields.index("whole"), 0]
        d_g = _decay_gradient(pairs.sum((0, 1)), sums.sum((0, 1)), whole).reshape(g.shape)
        lives_BL = jnp.diff(index_BL, axis=1, prepend=index_BL[:, :1]) == 0
        d_g = jnp.where(lives_BL[:, None], d_g, 0).astype(g.dtype)
    return d_q.astype(dtype), d_k, d_v, d_g, None, d_first


def _decay_gradient(pairs, sums, whole) -> jax.Array:
    """(B, H, N, C) from what the kernel leaves: see `chunked` on the four kinds of paths."""
    C = pairs.shape[-1]
    suffix = jnp.triu(jnp.ones((C, C), jnp.float32))
    later = jnp.einsum("ti,bhnij->bhntj", suffix, pairs, precision="highest")
    crossing = jnp.where(jnp.tri(C, k=-1, dtype=bool)[None, None, None], later, 0).sum(-1)
    incoming = lax.cumsum(sums[:, :, :, 0], axis=3, reverse=True)
    outgoing = jnp.cumsum(jnp.pad(sums[:, :, :, 1, :-1], ((0, 0),) * 3 + ((1, 0),)), axis=3)
    return crossing + incoming + outgoing + (whole * sums[:, :, :, 2].sum(-1))[..., None]


_attend_chunks = jax.custom_vjp(_attend, nondiff_argnums=(6,))
_attend_chunks.defvjp(_forward, _backward)


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
    """As `reference.attend`, for tokens in one dtype that tensor cores take, and decays per head."""
    L, (K, V) = q_BLHK.shape[1], state_BHKV.shape[2:]
    index_BL = jnp.zeros(q_BLHK.shape[:2], jnp.int32) if index_BL is None else index_BL
    q, k, v, g = jax.tree.map(
        lambda each: jnp.swapaxes(pad_length(each, CHUNK), 1, 2), (q_BLHK, k_BLGK, v_BLGV, log_decay)
    )
    q, k, v = (pad_length(each, TILE, axis=3) for each in (q, k, v))
    state = pad_length(pad_length(state_BHKV, TILE, axis=2), TILE, axis=3)
    y, last = _attend_chunks(q, k, v, g, pad_length(index_BL, CHUNK, edge=True), state, Setting(scale, interpret))
    return jnp.swapaxes(y, 1, 2)[:, :L, :, :V], last[:, :, :K, :V]

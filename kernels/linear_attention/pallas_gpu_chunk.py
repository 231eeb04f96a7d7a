"""Linear attention on Hopper GPUs (Mosaic GPU): the chunks of `chunked`, with the state in registers.

One warpgroup runs one head of one row of the batch, chunk after chunk of 64 steps. Matrix products take bfloat16 from
shared memory and add up in float32; the state stays in float32 and is rounded for a product only. Decays are per head,
and scale rows: those of q S and of what a product reads. Head widths are padded to 64 or 128, the sizes of tiles.
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

from kernels.linear_attention.blocks import LinearAttentionBlocks
from kernels.linear_attention.rows import Rows, chunk_rows
from kernels.segments import pad_length

CHUNK = 64
WIDTHS = (64, 128)
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


def _bands(ref) -> list:
    """A matrix in shared memory as bands of 64 rows, which is how a state is held in registers."""
    return [ref.at[pl.ds(start, CHUNK)] for start in range(0, ref.shape[0], CHUNK)]


def _columns(ref, band: int):
    """The transpose of 64 columns, as the left side of a product."""
    return ref.at[:, pl.ds(band * CHUNK, CHUNK)].transpose((1, 0))


def _put(matrix: jax.Array, stage, target) -> None:
    """Registers to global memory by way of shared memory."""
    stage[...] = matrix
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(stage, target)
    plgpu.wait_smem_to_gmem(0)


def _get_state(source, stage, barrier) -> list[jax.Array]:
    state = []
    for band in _bands(source):
        plgpu.copy_gmem_to_smem(band, stage, barrier)
        plgpu.barrier_wait(barrier)
        state.append(plgpu.load(stage, layout=_MATRIX))
        plgpu.commit_smem()
    return state


def _put_state(state, stage, target) -> None:
    for band, matrix in zip(_bands(target), state, strict=True):
        _put(matrix, stage, band)


def _round_state(state, target) -> None:
    for band, matrix in zip(_bands(target), state, strict=True):
        band[...] = matrix.astype(target.dtype)


def _load(pairs, barrier) -> None:
    """Copies all sources to their places; the barrier counts them."""
    for source, place in pairs:
        plgpu.copy_gmem_to_smem(source, place, barrier)
    plgpu.barrier_wait(barrier)


def _at(heads_a_group: int):
    """Indices of the batch, the head and its group."""
    head = lax.axis_index("head")
    return lax.axis_index("batch"), head, lax.div(head, jnp.int32(heads_a_group))


def _whole(rows) -> jax.Array:
    """Read it before the last `commit_smem` of a chunk: that is what the next chunk's copies wait for."""
    return rows[Factors._fields.index("whole"), 0]


def _advance(state, k, v_out, whole) -> tuple[jax.Array, ...]:
    """exp(G_C) S + k^T v_out, where v_out has decayed to the end of the chunk."""
    return tuple(whole * band + _product(_columns(k, i), v_out) for i, band in enumerate(state))


def _forward_kernel(
    q_gmem, k_gmem, v_gmem, rows_gmem, first_gmem, y_gmem, last_gmem,
    q, k, v, rows, scores, rounded, v_out, stage, loaded, ready, *, scale, share, N,
):  # fmt: skip
    batch, head, group = _at(share)

    def chunk(n, state):
        steps = pl.ds(n * CHUNK, CHUNK)
        _load(
            [(q_gmem.at[batch, head, steps], q), (k_gmem.at[batch, group, steps], k),
             (v_gmem.at[batch, group, steps], v), (rows_gmem.at[batch, head, n], rows)],
            loaded,
        )  # fmt: skip
        scores[...] = (_product(q, k.transpose((1, 0))) * _between(rows)).astype(scores.dtype)
        whole = _whole(rows)
        _round_state(state, rounded)
        v_out[...] = _scale_rows(rows, "beyond", _wide(v)).astype(v_out.dtype)
        plgpu.commit_smem()
        y = _product(scores, v) + _scale_rows(rows, "through", _product(q, rounded))
        state = _advance(state, k, v_out, whole)
        _put(scale * y, stage, y_gmem.at[batch, head, steps])
        return state

    state = tuple(_get_state(first_gmem.at[batch, head], stage, ready))
    _put_state(lax.fori_loop(0, N, chunk, state), stage, last_gmem.at[batch, head])


def _states_kernel(
    k_gmem, v_gmem, rows_gmem, first_gmem, states_gmem, k, v, rows, rounded, v_out, stage, loaded, ready, *, share, N
):
    batch, head, group = _at(share)

    def chunk(n, state):
        steps = pl.ds(n * CHUNK, CHUNK)
        _load(
            [(k_gmem.at[batch, group, steps], k), (v_gmem.at[batch, group, steps], v),
             (rows_gmem.at[batch, head, n], rows)],
            loaded,
        )  # fmt: skip
        whole = _whole(rows)
        _round_state(state, rounded)
        v_out[...] = _scale_rows(rows, "beyond", _wide(v)).astype(v_out.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(rounded, states_gmem.at[batch, head, n])
        state = _advance(state, k, v_out, whole)
        plgpu.wait_smem_to_gmem(0)
        return state

    lax.fori_loop(0, N, chunk, tuple(_get_state(first_gmem.at[batch, head], stage, ready)))


def _gradients_kernel(
    q_gmem, k_gmem, v_gmem, rows_gmem, states_gmem, d_y_gmem, d_last_gmem,
    d_q_gmem, d_k_gmem, d_v_gmem, pairs_gmem, sums_gmem, d_first_gmem,
    q, k, v, rows, state, d_y, scores, d_scores, d_state, d_y_in, stage_K, stage_V, pairs, sums, loaded, ready,
    *, share, N,
):  # fmt: skip
    batch, head, group = _at(share)
    stage_V = stage_K if stage_V is None else stage_V

    def chunk(step, d_next):
        n = N - 1 - step
        steps = pl.ds(n * CHUNK, CHUNK)
        _load(
            [(q_gmem.at[batch, head, steps], q), (k_gmem.at[batch, group, steps], k),
             (v_gmem.at[batch, group, steps], v), (rows_gmem.at[batch, head, n], rows),
             (states_gmem.at[batch, head, n], state), (d_y_gmem.at[batch, head, steps], d_y)],
            loaded,
        )  # fmt: skip
        between, whole = _between(rows), _whole(rows)
        products = _product(q, k.transpose((1, 0))) * between
        d_products = _product(d_y, v.transpose((1, 0)))
        if pairs is not None:
            pairs[...] = products * d_products
        scores[...] = products.astype(scores.dtype)
        d_scores[...] = (d_products * between).astype(d_scores.dtype)
        _round_state(d_next, d_state)
        d_y_in[...] = _scale_rows(rows, "through", _wide(d_y)).astype(d_y_in.dtype)
        plgpu.commit_smem()
        if pairs is not None:
            plgpu.copy_smem_to_gmem(pairs, pairs_gmem.at[batch, head, n])
        from_state = _scale_rows(rows, "through", _product(d_y, state.transpose((1, 0))))
        to_state = _scale_rows(rows, "beyond", _product(v, d_state.transpose((1, 0))))
        if sums is not None:
            sums.at[0, pl.ds(0, CHUNK)][...] = (_wide(q) * from_state).sum(axis=1)
            sums.at[1, pl.ds(0, CHUNK)][...] = (_wide(k) * to_state).sum(axis=1)
            for i, (band, d_band) in enumerate(zip(_bands(state), d_next, strict=True)):
                sums.at[2, pl.ds(i * CHUNK, CHUNK)][...] = (_wide(band) * d_band).sum(axis=1)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(sums, sums_gmem.at[batch, head, n])
        _put(_product(d_scores, k) + from_state, stage_K, d_q_gmem.at[batch, head, steps])
        _put(_product(d_scores.transpose((1, 0)), q) + to_state, stage_K, d_k_gmem.at[batch, head, steps])
        inside = _product(scores.transpose((1, 0)), d_y)
        _put(inside + _scale_rows(rows, "beyond", _product(k, d_state)), stage_V, d_v_gmem.at[batch, head, steps])
        return _advance(d_next, q, d_y_in, whole)

    d_last = tuple(_get_state(d_last_gmem.at[batch, head], stage_V, ready))
    _put_state(lax.fori_loop(0, N, chunk, d_last), stage_V, d_first_gmem.at[batch, head])


class Setting(NamedTuple):
    """Static facts of a call."""

    scale: float
    interpret: Any


def _tile(*shape: int, dtype) -> Any:
    """A matrix in shared memory as matrix products want it, in rows of 128 bytes."""
    elements = 128 // jnp.dtype(dtype).itemsize
    # Pyright takes these two for abstract classes.
    tiling = plgpu.TilingTransform((8, elements))  # pyright: ignore[reportAbstractUsage]
    swizzle = plgpu.SwizzleTransform(128)  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM(shape, dtype, transforms=(tiling, swizzle))


def _wide_tile(*shape: int) -> Any:
    return _tile(*shape, dtype=jnp.float32)


def _shape(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _launch(kernel, B: int, H: int, outputs, scratch, interpret):
    return plgpu.kernel(
        kernel,
        out_type=outputs,
        scratch_types=scratch,
        grid=(B, H),
        grid_names=("batch", "head"),
        # The search for layouts under the default semantics does not come to an end.
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret or None,
    )


def _attend(q, k, v, g, index_BL, first, setting: Setting):
    """y (B, H, L, V) and the last state, for whole chunks and padded widths."""
    (B, H, L, K), (G, V), dtype, C = q.shape, (v.shape[1], v.shape[3]), q.dtype, CHUNK
    tile = partial(_tile, dtype=dtype)
    scratch = [
        tile(C, K), tile(C, K), tile(C, V), plgpu.SMEM((8, C), jnp.float32), tile(C, C), tile(K, V), tile(C, V),
        _wide_tile(C, V), plgpu.Barrier(num_arrivals=4), plgpu.Barrier(),
    ]  # fmt: skip
    kernel = partial(_forward_kernel, scale=setting.scale, share=H // G, N=L // C)
    outputs = (_shape(B, H, L, V), _shape(B, H, K, V))
    return _launch(kernel, B, H, outputs, scratch, setting.interpret)(q, k, v, factor_rows(g, index_BL, H), first)


def _forward(q, k, v, g, index_BL, first, setting):
    arguments = (q, k, v, g, index_BL, first)
    return _attend(*arguments, setting), arguments


def _backward(setting: Setting, arguments, cotangents):
    q, k, v, g, index_BL, first = arguments
    d_y, d_last = cotangents
    (B, H, L, K), (G, V), dtype, C = q.shape, (v.shape[1], v.shape[3]), q.dtype, CHUNK
    N, share = L // C, H // G
    rows = factor_rows(g, index_BL, H)
    tile, row_tile = partial(_tile, dtype=dtype), plgpu.SMEM((8, C), jnp.float32)
    states = _launch(
        partial(_states_kernel, share=share, N=N),
        B, H, _shape(B, H, N, K, V, dtype=dtype),
        [tile(C, K), tile(C, V), row_tile, tile(K, V), tile(C, V), _wide_tile(C, V),
         plgpu.Barrier(num_arrivals=3), plgpu.Barrier()],
        setting.interpret,
    )(k, v, rows, first)  # fmt: skip
    decays = g is not None
    outputs = (
        *(_shape(B, H, L, each) for each in (K, K, V)),
        _shape(B, H, N, C, C) if decays else None,
        _shape(B, H, N, 3, max(C, K)) if decays else None,
        _shape(B, H, K, V),
    )
    scratch = [
        tile(C, K), tile(C, K), tile(C, V), row_tile, tile(K, V), tile(C, V), tile(C, C), tile(C, C), tile(K, V),
        tile(C, V), _wide_tile(C, K), None if K == V else _wide_tile(C, V), _wide_tile(C, C) if decays else None,
        plgpu.SMEM((3, max(C, K)), jnp.float32) if decays else None, plgpu.Barrier(num_arrivals=6), plgpu.Barrier(),
    ]  # fmt: skip
    d_q, d_k, d_v, pairs, sums, d_first = _launch(
        partial(_gradients_kernel, share=share, N=N), B, H, outputs, scratch, setting.interpret
    )(q, k, v, rows, states, (setting.scale * d_y).astype(dtype), d_last)
    d_k, d_v = (each.reshape(B, G, share, L, -1).sum(2).astype(dtype) for each in (d_k, d_v))
    d_g = None
    if g is not None:
        whole = rows[:, :, :, Factors._fields.index("whole"), 0]
        d_g = _decay_gradient(pairs, sums, whole, K).reshape(g.shape)
        lives_BL = jnp.diff(index_BL, axis=1, prepend=index_BL[:, :1]) == 0
        d_g = jnp.where(lives_BL[:, None], d_g, 0).astype(g.dtype)
    return d_q.astype(dtype), d_k, d_v, d_g, None, d_first


def _decay_gradient(pairs, sums, whole, K: int) -> jax.Array:
    """(B, H, N, C) from what the kernel leaves: see `chunked` on the four kinds of paths."""
    C = pairs.shape[-1]
    suffix = jnp.triu(jnp.ones((C, C), jnp.float32))
    later = jnp.einsum("ti,bhnij->bhntj", suffix, pairs, precision="highest")
    crossing = jnp.where(jnp.tri(C, k=-1, dtype=bool)[None, None, None], later, 0).sum(-1)
    incoming = lax.cumsum(sums[:, :, :, 0, :C], axis=3, reverse=True)
    outgoing = jnp.cumsum(jnp.pad(sums[:, :, :, 1, : C - 1], ((0, 0),) * 3 + ((1, 0),)), axis=3)
    return crossing + incoming + outgoing + (whole * sums[:, :, :, 2, :K].sum(-1))[..., None]


_attend_chunks = jax.custom_vjp(_attend, nondiff_argnums=(6,))
_attend_chunks.defvjp(_forward, _backward)


def refusal(
    q: jax.Array, k: jax.Array, v: jax.Array, columns: int, rank: int, blocks: LinearAttentionBlocks, interpret: Any
) -> str | None:
    """Why the kernels can't run this, or None. The interpreter, which has no tensor cores, also takes float32."""
    if jax.default_backend() == "gpu" and not jax.devices()[0].compute_capability.startswith("9."):
        return "it multiplies matrices as only Hopper does"
    if rank == 4:
        return "decays per channel are not written for it"
    if max(q.shape[3], columns) > WIDTHS[-1]:
        return f"queries and states have at most {WIDTHS[-1]} columns, not {max(q.shape[3], columns)}"
    if blocks.chunk != CHUNK:
        return f"its chunks have {CHUNK} steps, got {blocks}"
    dtypes = {str(each.dtype) for each in (q, k, v)}
    if dtypes != {"bfloat16"} and not (interpret and dtypes == {"float32"}):
        return f"queries, keys and values are bfloat16, not {', '.join(sorted(dtypes))}"
    return None


def _pad_width(array: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    for axis in axes:
        array = pad_length(array, next(width for width in WIDTHS if width >= array.shape[axis]), axis=axis)
    return array


def attend(
    q_BLHK: jax.Array,
    k_BLGK: jax.Array,
    v_BLGV: jax.Array,
    log_decay: jax.Array | None,
    state_BHKV: jax.Array,
    index_BL: jax.Array | None,
    scale: float,
    blocks: LinearAttentionBlocks,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """As `reference.attend`, for what `refusal` lets through."""
    del blocks
    if interpret is True:
        interpret = plgpu.InterpretGPUParams()
    L, (K, V) = q_BLHK.shape[1], state_BHKV.shape[2:]
    index_BL = jnp.zeros(q_BLHK.shape[:2], jnp.int32) if index_BL is None else index_BL
    q, k, v, g = jax.tree.map(
        lambda each: jnp.swapaxes(pad_length(each, CHUNK), 1, 2), (q_BLHK, k_BLGK, v_BLGV, log_decay)
    )
    q, k, v = (_pad_width(each, (3,)) for each in (q, k, v))
    index_BL = pad_length(index_BL, CHUNK, edge=True)
    y, last = _attend_chunks(q, k, v, g, index_BL, _pad_width(state_BHKV, (2, 3)), Setting(scale, interpret))
    return jnp.swapaxes(y, 1, 2)[:, :L, :, :V], last[:, :, :K, :V]

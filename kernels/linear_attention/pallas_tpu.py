"""Linear attention on TPU: the chunks of `chunked`, one after the other, with the state in vector memory.

One program runs one head of one row of the batch. States are kept transposed, (V, K), so that decays per channel lie
along lanes. Sums of log-decays per head come in as rows of a small array, `Rows`; with decays per channel the kernel
forms them by products with triangles, and goes over the queries of a chunk one by one for the pairwise decays.
As in `chunked`, only the inputs are kept; the backward pass rebuilds the states. Operands are rounded to bfloat16 on
the way into a product if an input is narrow, and take all passes of the matrix unit if all are float32.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.lax import Precision

from kernels.linear_attention.blocks import LinearAttentionBlocks
from kernels.linear_attention.chunked import clamp
from kernels.linear_attention.rows import Rows, chunk_rows
from kernels.segments import pad_length


class Pairs(NamedTuple):
    """What the pairwise decays need if they are per channel: both parts of the sums (C, K), and who sees whom."""

    coarse: jax.Array
    fine: jax.Array
    seen_by: jax.Array


class Factors(NamedTuple):
    """Decays of one chunk, as in `chunked.Decays`: (C, X), (C, X), (1, X); `between` is (C, C) if X is 1."""

    through: jax.Array
    beyond: jax.Array
    whole: jax.Array
    between: jax.Array | Pairs


def _iota(C: int, axis: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, (C, C), axis)


def _column(row: jax.Array) -> jax.Array:
    """(C, 1) from (1, C)."""
    C = row.shape[1]
    return jnp.where(_iota(C, 0) == _iota(C, 1), row, 0.0).sum(1, keepdims=True)


def _dot(x: jax.Array, y: jax.Array, contract: tuple[int, int], precision: Precision) -> jax.Array:
    axes = ((contract[:1], contract[1:]), ((), ()))
    return jax.lax.dot_general(x, y, axes, precision=precision, preferred_element_type=jnp.float32)


def _decay(exponent: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.exp(jnp.where(mask, exponent, -jnp.inf))


def _factors(rows: Rows, g_CK: jax.Array | None) -> Factors:
    C = rows.segment.shape[1]
    i, j = _iota(C, 0), _iota(C, 1)
    index, last, before = _column(rows.segment), rows.segment[:, C - 1 :], rows.before[:, :1]
    if g_CK is None:
        until, after = _column(rows.until), _column(rows.after)
        sums = (_column(rows.coarse) - rows.coarse) + (_column(rows.fine) - rows.fine)
        between = _decay(sums, (index == rows.segment) & (j <= i))
    else:
        g_CK = clamp(g_CK)
        coarse = jnp.round(g_CK * 256) / 256
        lower, above = (j <= i).astype(jnp.float32), (j > i).astype(jnp.float32)
        coarse, fine, until, after = (
            _dot(triangle, part, (1, 0), Precision.HIGHEST)
            for triangle, part in ((lower, coarse), (lower, g_CK - coarse), (lower, g_CK), (above, g_CK))
        )
        between = Pairs(coarse, fine, (index == rows.segment) & (i <= j))
    through = _decay(until, index == before)
    beyond = _decay(after, index == last)
    whole = _decay(until[C - 1 :], last == before)
    return Factors(through, beyond, whole, between)


def _pair(pairs: Pairs, i: int) -> jax.Array:
    """Decays from all steps (C, K) to step i."""
    sums = (pairs.coarse[i : i + 1] - pairs.coarse) + (pairs.fine[i : i + 1] - pairs.fine)
    return _decay(sums, pairs.seen_by[:, i : i + 1])


def _scores(q, k, between: jax.Array | Pairs, precision) -> jax.Array:
    """(q k^T * D) with decays per head, or transposed, (C, C) with keys first, with decays per channel."""
    if not isinstance(between, Pairs):
        return _dot(q, k, (1, 1), precision) * between
    C = q.shape[0]
    scores = jnp.zeros((C, C), jnp.float32)
    for i in range(C):
        column = (q[i : i + 1] * k * _pair(between, i)).sum(1, keepdims=True)
        scores = jnp.where(_iota(C, 1) == i, column, scores)
    return scores


def _read(ref) -> jax.Array:
    return ref[0, 0].astype(jnp.float32)


def _read_rows(ref) -> Rows:
    rows = ref[0, 0, 0]
    return Rows(*(rows[i : i + 1] for i in range(len(Rows._fields))))


def _advance(k, v, factors: Factors, state_VK, precision):
    return factors.whole * state_VK + _dot(v, factors.beyond * k, (0, 0), precision)


def _forward_kernel(q_ref, k_ref, v_ref, g_ref, rows_ref, first_ref, y_ref, last_ref, state_VK, *, scale, precision):
    @pl.when(pl.program_id(2) == 0)
    def _():
        state_VK[...] = first_ref[0, 0]

    q, k, v = (_read(ref) for ref in (q_ref, k_ref, v_ref))
    factors = _factors(_read_rows(rows_ref), None if g_ref is None else _read(g_ref))
    scores, turned = _scores(q, k, factors.between, precision), g_ref is not None
    inside = _dot(scores, v, (0, 0) if turned else (1, 0), precision)
    y = inside + _dot(factors.through * q, state_VK[...], (1, 1), precision)
    y_ref[0, 0] = (scale * y).astype(y_ref.dtype)
    state_VK[...] = _advance(k, v, factors, state_VK[...], precision)
    last_ref[0, 0] = state_VK[...]


def _states_kernel(k_ref, v_ref, g_ref, rows_ref, first_ref, states_ref, last_ref, state_VK, *, precision):
    @pl.when(pl.program_id(2) == 0)
    def _():
        state_VK[...] = first_ref[0, 0]

    states_ref[0, 0, 0] = state_VK[...]
    factors = _factors(_read_rows(rows_ref), None if g_ref is None else _read(g_ref))
    state_VK[...] = _advance(_read(k_ref), _read(v_ref), factors, state_VK[...], precision)
    last_ref[0, 0] = state_VK[...]


def _inner_gradients(q, k, scores, d_scores, between: jax.Array | Pairs, precision):
    """Gradients of q and k by way of the pairs of a chunk, and what of the log-decay's gradient crosses each step.

    The last is a row (1, C) with decays per head, (C, K) with decays per channel. Scores are (C, C), with keys first if
    decays are per channel.
    """
    C, K = q.shape
    i, j = _iota(C, 0), _iota(C, 1)
    if not isinstance(between, Pairs):
        d_products = d_scores * between
        suffix = (i >= j).astype(jnp.float32)
        crossing = jnp.where(i < j, _dot(scores * d_scores, suffix, (0, 0), Precision.HIGHEST), 0.0)
        d_q, d_k = _dot(d_products, k, (1, 0), precision), _dot(d_products, q, (0, 0), precision)
        return d_q, d_k, crossing.sum(0, keepdims=True)
    row = jax.lax.broadcasted_iota(jnp.int32, (C, K), 0)
    d_q, d_k, later, crossing = (jnp.zeros((C, K), jnp.float32) for _ in range(4))
    for step in reversed(range(C)):
        weights = d_scores[:, step : step + 1] * _pair(between, step)
        d_q = jnp.where(row == step, (weights * k).sum(0, keepdims=True), d_q)
        d_k = d_k + weights * q[step : step + 1]
        later = later + weights * q[step : step + 1] * k
        crossing = jnp.where(row == step, jnp.where(row < step, later, 0.0).sum(0, keepdims=True), crossing)
    return d_q, d_k, crossing


def _gradients_kernel(
    q_ref, k_ref, v_ref, g_ref, rows_ref, states_ref, d_y_ref, d_last_ref,
    d_q_ref, d_k_ref, d_v_ref, d_g_ref, d_first_ref, d_state_VK, *, scale, precision,
):  # fmt: skip
    @pl.when(pl.program_id(2) == 0)
    def _():
        d_state_VK[...] = d_last_ref[0, 0]

    q, k, v, d_y = (_read(ref) for ref in (q_ref, k_ref, v_ref, d_y_ref))
    d_y, state, d_next = scale * d_y, states_ref[0, 0, 0], d_state_VK[...]
    rows = _read_rows(rows_ref)
    factors = _factors(rows, None if g_ref is None else _read(g_ref))
    scores = _scores(q, k, factors.between, precision)
    turned = g_ref is not None
    d_scores = _dot(v, d_y, (1, 1), precision) if turned else _dot(d_y, v, (1, 1), precision)
    d_q, d_k, crossing = _inner_gradients(q, k, scores, d_scores, factors.between, precision)
    q_in, k_out = factors.through * q, factors.beyond * k
    from_state, to_state = _dot(d_y, state, (1, 0), precision), _dot(v, d_next, (1, 0), precision)
    d_q_ref[0, 0] = (d_q + factors.through * from_state).astype(d_q_ref.dtype)
    d_k_ref[0, 0] = (d_k + factors.beyond * to_state).astype(d_k_ref.dtype)
    inside = _dot(scores, d_y, (1, 0) if turned else (0, 0), precision)
    d_v_ref[0, 0] = (inside + _dot(k_out, d_next, (1, 1), precision)).astype(d_v_ref.dtype)
    d_state_VK[...] = factors.whole * d_next + _dot(d_y, q_in, (0, 0), precision)
    d_first_ref[0, 0] = d_state_VK[...]
    if d_g_ref is None:
        return
    C = q.shape[0]
    i, j = _iota(C, 0), _iota(C, 1)
    incoming, outgoing = q_in * from_state, k_out * to_state
    right_through = factors.whole * (state * d_next).sum(0, keepdims=True)
    if not turned:
        incoming, outgoing, right_through = (each.sum(1, keepdims=True) for each in (incoming, outgoing, right_through))
        incoming = jnp.where(i >= j, incoming, 0.0).sum(0, keepdims=True)
        outgoing = jnp.where(i < j, outgoing, 0.0).sum(0, keepdims=True)
        d_g_ref[0, 0, 0] = crossing + incoming + outgoing + right_through
    else:
        incoming = _dot((i <= j).astype(jnp.float32), incoming, (1, 0), Precision.HIGHEST)
        outgoing = _dot((i > j).astype(jnp.float32), outgoing, (1, 0), Precision.HIGHEST)
        d_g_ref[0, 0] = crossing + incoming + outgoing + right_through


class Setting(NamedTuple):
    """Static facts of a call."""

    scale: float
    C: int
    per_channel: bool
    interpret: Any


def _call(kernel, setting: Setting, arrays, outputs, *, reverse: bool = False):
    """Runs `kernel` over (B, H, N) with a state (V, K) in scratch; the last of `outputs` tells its shape.

    `arrays` and `outputs` go by kind: "steps" are (B, H, L, X) and come in blocks of C, "chunk" (B, H, N, X, Y) one by
    one, "whole" (B, H, V, K) at once. Keys and values may have fewer heads. None is passed on.
    """
    B, H = outputs[-1][1].shape[:2]
    N = next(array.shape[2] // setting.C for kind, array in arrays if kind == "steps")

    def spec(kind, array):
        if array is None:
            return None
        share = H // array.shape[1]

        def at(b, h, n):
            n = N - 1 - n if reverse else n
            return {"steps": (b, jax.lax.div(h, share), n, 0), "chunk": (b, h, n, 0, 0), "whole": (b, h, 0, 0)}[kind]

        size = {"steps": (setting.C, *array.shape[3:]), "chunk": (1, *array.shape[3:]), "whole": array.shape[2:]}[kind]
        return pl.BlockSpec((1, 1, *size), at)

    return pl.pallas_call(
        kernel,
        grid=(B, H, N),
        in_specs=[spec(*each) for each in arrays],
        out_specs=[spec(*each) for each in outputs],
        out_shape=[shape for _, shape in outputs],
        scratch_shapes=[pltpu.VMEM(outputs[-1][1].shape[2:], jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=setting.interpret,
    )(*(array for _, array in arrays))


def _shape(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _precision(*arrays: jax.Array) -> Precision:
    return Precision.HIGHEST if all(each.dtype == jnp.float32 for each in arrays) else Precision.DEFAULT


def _run(q_BHLK, k_BGLK, v_BGLV, g, rows, first_BHVK, setting: Setting) -> tuple[jax.Array, jax.Array]:
    """y (B, H, L, V) and the last state, for whole chunks. `g` is (B, H, L, K) or None."""
    kernel = partial(_forward_kernel, scale=setting.scale, precision=_precision(q_BHLK, k_BGLK, v_BGLV))
    arrays = [("steps", q_BHLK), ("steps", k_BGLK), ("steps", v_BGLV), ("steps", g), ("chunk", rows)]
    y = _shape(*q_BHLK.shape[:3], v_BGLV.shape[3])
    outputs = [("steps", y), ("whole", _shape(*first_BHVK.shape))]
    y, last = _call(kernel, setting, [*arrays, ("whole", first_BHVK)], outputs)
    return y, last


def _attend(q_BHLK, k_BGLK, v_BGLV, g, index_BL, first_BHVK, setting: Setting):
    rows = chunk_rows(None if setting.per_channel else g, index_BL, q_BHLK.shape[1], setting.C)
    return _run(q_BHLK, k_BGLK, v_BGLV, g if setting.per_channel else None, rows, first_BHVK, setting)


def _forward(q_BHLK, k_BGLK, v_BGLV, g, index_BL, first_BHVK, setting):
    arguments = (q_BHLK, k_BGLK, v_BGLV, g, index_BL, first_BHVK)
    return _attend(*arguments, setting), arguments


def _backward(setting: Setting, arguments, cotangents):
    q, k, v, g, index_BL, first = arguments
    d_y, d_last = cotangents
    (B, H, L, K), (G, V) = q.shape, (v.shape[1], v.shape[3])
    N, precision = L // setting.C, _precision(q, k, v)
    rows = ("chunk", chunk_rows(None if setting.per_channel else g, index_BL, H, setting.C))
    channels = ("steps", g if setting.per_channel else None)
    q_in, k_in, v_in = (("steps", each) for each in (q, k, v))
    states, _ = _call(
        partial(_states_kernel, precision=precision),
        setting,
        [k_in, v_in, channels, rows, ("whole", first)],
        [("chunk", _shape(B, H, N, V, K)), ("whole", _shape(B, H, V, K))],
    )
    if g is None:
        d_g = None
    elif setting.per_channel:
        d_g = ("steps", _shape(B, H, L, K))
    else:
        d_g = ("chunk", _shape(B, H, N, 1, setting.C))
    widths = [each.dtype if G == H else jnp.float32 for each in (k, v)]
    d_q, d_k, d_v, d_g, d_first = _call(
        partial(_gradients_kernel, scale=setting.scale, precision=precision),
        setting,
        [q_in, k_in, v_in, channels, rows, ("chunk", states), ("steps", d_y), ("whole", d_last)],
        [
            ("steps", _shape(B, H, L, K, dtype=q.dtype)),
            ("steps", _shape(B, H, L, K, dtype=widths[0])),
            ("steps", _shape(B, H, L, V, dtype=widths[1])),
            d_g or ("steps", None),
            ("whole", _shape(B, H, V, K)),
        ],
        reverse=True,
    )
    if G != H:
        d_k, d_v = (each.reshape(B, G, H // G, L, -1).sum(2).astype(like.dtype) for each, like in ((d_k, k), (d_v, v)))
    if g is not None:
        lives_BL = jnp.diff(index_BL, axis=1, prepend=index_BL[:, :1]) == 0
        mask = lives_BL[:, None, :, None] if setting.per_channel else lives_BL[:, None]
        d_g = jnp.where(mask, d_g.reshape(g.shape), 0).astype(g.dtype)
    return d_q, d_k, d_v, d_g, None, d_first


_attend_chunks = jax.custom_vjp(_attend, nondiff_argnums=(6,))
_attend_chunks.defvjp(_forward, _backward)


def refusal(rank: int, blocks: LinearAttentionBlocks) -> str | None:
    """Why the kernels can't run log-decays of that rank with these blocks, or None."""
    return f"chunks must be multiples of 8, got {blocks}" if blocks.steps(rank) % 8 else None


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
    """As `reference.attend`, for states in float32."""
    rank = 0 if log_decay is None else log_decay.ndim
    L, C = q_BLHK.shape[1], blocks.steps(rank)
    setting = Setting(scale, C, rank == 4, interpret)
    index_BL = jnp.zeros(q_BLHK.shape[:2], jnp.int32) if index_BL is None else index_BL
    q, k, v, g = jax.tree.map(lambda each: jnp.swapaxes(pad_length(each, C), 1, 2), (q_BLHK, k_BLGK, v_BLGV, log_decay))
    y, last = _attend_chunks(q, k, v, g, pad_length(index_BL, C, edge=True), jnp.swapaxes(state_BHKV, 2, 3), setting)
    return jnp.swapaxes(y, 1, 2)[:, :L], jnp.swapaxes(last, 2, 3)

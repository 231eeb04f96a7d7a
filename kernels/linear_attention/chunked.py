"""Linear attention by chunks: a masked product inside a chunk, a state between chunks, and a written backward pass.

With G_i the sum of log-decays of a chunk up to step i, S the state before it, S' the one after it, and D_ij =
exp(G_i - G_j) for j <= i in one segment, else 0 (the tiling of Lightning Attention-2, Qin et al., arXiv 2401.04658,
which has one constant decay per head):

    y   = (q k^T * D) v + (exp(G) q) S                 S'  = exp(G_C) S + (exp(G_C - G) k)^T v
    dq  = (dy v^T * D) k + exp(G) (dy S^T)             dS  = exp(G_C) dS' + (exp(G) q)^T dy
    dk  = (dy v^T * D)^T q + exp(G_C - G) (v dS'^T)    dv  = (q k^T * D)^T dy + (exp(G_C - G) k) dS'

A log-decay's gradient sums over all paths that cross its step: between two steps of the chunk, in from S, out to S',
and right through. Each is summed by itself, so that nothing cancels. With decays per channel D_ij has a channel axis
and is formed pair by pair, in shorter chunks. Exponents are sums of log-decays, at most 0, and masks come before exp.

Only the inputs are kept for the backward pass. It first rebuilds the states between chunks, which costs one product of
ten, and then goes over the chunks from the last to the first: memory is linear in length, K V / chunk numbers a step.

Both passes take a few neighbouring chunks a turn: all products of a turn are batched, and only the sums that carry the
state from chunk to chunk are formed one after the other. On two CPU cores, at 4096 steps with decays, that halves
the forward pass and takes a third off the backward pass.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.linear_attention.blocks import LinearAttentionBlocks
from kernels.segments import pad_length

# Most chunks in a turn, and most bytes of their states: beyond, what a turn makes on the way leaves a core's cache.
TURN = 8
TURN_BYTES = 512 * 1024


class Decays(NamedTuple):
    """Factors of a chunk, zero across segment boundaries; X is 1, or K with decays per channel.

    `through` (B, G, R, C, X) from the state before the chunk to each step, `beyond` from each step to the state after
    it, `whole` (B, G, R, 1, X) from state to state, `between` (B, G, R, C, C, X) from step j to step i, at [i, j].
    `lives` (B, 1, 1, C, 1) is 0 where a step starts a segment. G and R are 1 without decays.
    """

    through: jax.Array
    beyond: jax.Array
    whole: jax.Array
    between: jax.Array
    lives: jax.Array


def clamp(log_decay: jax.Array) -> jax.Array:
    """Bounds log-decays from below where their exponential is zero anyway, so that sums stay finite and exact."""
    return jnp.maximum(log_decay, -200.0 if log_decay.dtype == jnp.float32 else -1000.0)


def sum_between(log_decay: jax.Array, axis: int) -> jax.Array:
    """Sums over (j, i], a new axis j after the axis i: meaningful for j <= i.

    Differences of running sums lose what the sums have grown by. Multiples of 1 / 256 add and subtract exactly, and the
    rests stay small.
    """

    def differences(part):
        sums = jnp.cumsum(part, axis=axis)
        return jnp.expand_dims(sums, axis + 1) - jnp.expand_dims(sums, axis)

    coarse = jnp.round(log_decay * 256) / 256
    return differences(coarse) + differences(log_decay - coarse)


def decays(log_decay: jax.Array | None, index_BC: jax.Array, before_B: jax.Array, dtype: jnp.dtype) -> Decays:
    """From log-decays (B, G, R, C, X) or None, segment indices, and the index of the last step before the chunk."""

    def factor(exponent, mask):
        return jnp.exp(jnp.where(mask, exponent, -jnp.inf))

    C = index_BC.shape[1]
    last_B = index_BC[:, -1]
    previous_BC = jnp.concatenate([before_B[:, None], index_BC[:, :-1]], axis=1)
    same_BCC = (index_BC[:, :, None] == index_BC[:, None]) & jnp.tri(C, dtype=bool)[None]
    through, beyond, lives = (
        mask[:, None, None, :, None]
        for mask in (index_BC == before_B[:, None], index_BC == last_B[:, None], index_BC == previous_BC)
    )
    whole, between = (last_B == before_B)[:, None, None, None, None], same_BCC[:, None, None, ..., None]
    if log_decay is None:
        return Decays(*(mask.astype(dtype) for mask in (through, beyond, whole, between, lives)))
    log_decay = clamp(log_decay.astype(dtype))
    return Decays(
        factor(jnp.cumsum(log_decay, axis=3), through),
        factor(jax.lax.cumsum(_shifted(log_decay, -1), axis=3, reverse=True), beyond),
        factor(log_decay.sum(3, keepdims=True), whole),
        factor(sum_between(log_decay, 3), between),
        lives.astype(dtype),
    )


def _shifted(array: jax.Array, steps: int) -> jax.Array:
    """Later (1) or earlier (-1) along the chunk, with a zero coming in."""
    zero = jnp.zeros_like(array[..., :1, :])
    ends = (zero, array[..., :-1, :]) if steps > 0 else (array[..., 1:, :], zero)
    return jnp.concatenate(ends, axis=-2)


def _turned(array: jax.Array) -> jax.Array:
    return jnp.swapaxes(array, -1, -2)


def _scores(q: jax.Array, k: jax.Array, between: jax.Array) -> jax.Array:
    """(q k^T * D), (B, G, R, C, C)."""
    if between.shape[-1] == 1:
        return (q @ _turned(k)) * between[..., 0]
    return (q[..., None, :] * k[..., None, :, :] * between).sum(-1)


def _carry(state: jax.Array, whole: jax.Array, added: jax.Array, reverse: bool = False) -> tuple[jax.Array, jax.Array]:
    """S' = whole S + added over the chunks of a turn: the last state, and that before each, (M B, G, R, K, V)."""

    def chunks(array):
        return array.reshape(-1, state.shape[0], *array.shape[1:])

    def step(state, inputs):
        return inputs[0] * state + inputs[1], state

    state, before = jax.lax.scan(step, state, (chunks(whole), chunks(added)), reverse=reverse, unroll=True)
    return state, before.reshape(-1, *state.shape[1:])


def _advance(k: jax.Array, v: jax.Array, factors: Decays, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The state after the turn, and those before each of its chunks."""
    return _carry(state, _turned(factors.whole), _turned(factors.beyond * k) @ v)


def _gradients(q, k, v, factors: Decays, state, d_y, d_next, decay_rank: int):
    """Gradients of q, k, v and the log-decay (None if it has rank 0), from those of the state after each chunk.

    All arrays are (M B, G, R, C, X); k and v have R = 1, states are (..., K, V).
    """
    between = factors.between
    scores, d_scores = _scores(q, k, between), d_y @ _turned(v)
    q_in, k_out = factors.through * q, factors.beyond * k
    from_state, to_state = d_y @ _turned(state), v @ _turned(d_next)
    if between.shape[-1] == 1:
        d_products = d_scores * between[..., 0]
        d_q, d_k = d_products @ k, _turned(d_products) @ q
    else:
        d_products = d_scores[..., None] * between
        d_q = (d_products * k[..., None, :, :]).sum(-2)
        d_k = (d_products * q[..., None, :]).sum(-3)
    d_v = _turned(scores) @ d_y + k_out @ d_next
    d_log_decay = None
    if decay_rank:
        C = q.shape[-2]
        earlier = jnp.tri(C, k=-1, dtype=q.dtype)
        if between.shape[-1] == 1:
            pairs = (jnp.triu(jnp.ones((C, C), q.dtype)) @ (scores * d_scores)) * earlier[None, None, None]
            crossing, axis = pairs.sum(-1)[..., None], -1
        else:
            pairs = d_products * q[..., None, :] * k[..., None, :, :]
            pairs = jax.lax.cumsum(pairs, axis=3, reverse=True) * earlier[None, None, None, ..., None]
            crossing, axis = pairs.sum(-2), None
        incoming, outgoing, right_through = q_in * from_state, k_out * to_state, (state * d_next).sum(-1)[..., None, :]
        right_through = factors.whole * right_through
        if axis is not None:
            incoming, outgoing, right_through = (
                each.sum(axis, keepdims=True) for each in (incoming, outgoing, right_through)
            )
        incoming = jax.lax.cumsum(incoming, axis=3, reverse=True)
        outgoing = jnp.cumsum(_shifted(outgoing, 1), axis=3)
        d_log_decay = (crossing + incoming + outgoing + right_through) * factors.lives
    d_q = d_q + factors.through * from_state
    d_k = (d_k + factors.beyond * to_state).sum(2, keepdims=True)
    return d_q, d_k, d_v.sum(2, keepdims=True), d_log_decay


def _split(array_BLX: jax.Array, M: int, C: int) -> jax.Array:
    """Turns first, for `lax.scan`: (T, B, M, C, ...), padded with zeros."""
    array_BLX = pad_length(array_BLX, M * C)
    return jnp.moveaxis(array_BLX.reshape(array_BLX.shape[0], -1, M, C, *array_BLX.shape[2:]), 1, 0)


def _join(array: jax.Array, L: int) -> jax.Array:
    """Back from (T, B, M, C, ...) to (B, L, ...), without the padding."""
    T, B, M, C = array.shape[:4]
    return jnp.moveaxis(array, 0, 1).reshape(B, T * M * C, *array.shape[4:])[:, :L]


def _fold(array_BMCX: jax.Array, G: int, dtype: jnp.dtype) -> jax.Array:
    """(M B, G, R, C, X) from (B, M, C, H) or (B, M, C, H, X): done turn by turn, so that no second copy is kept."""
    B, M, C, H = array_BMCX.shape[:4]
    array = array_BMCX.astype(dtype).reshape(B, M, C, G, H // G, -1).transpose(1, 0, 3, 4, 2, 5)
    return array.reshape(M * B, *array.shape[2:])


def _unfold(array: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """The way back, to a shape (B, M, C, H) or (B, M, C, H, X)."""
    B, M = shape[:2]
    return array.reshape(M, B, *array.shape[1:]).transpose(1, 0, 4, 2, 3, 5).reshape(shape).astype(dtype)


def _turn(chunks: int, state_bytes: int) -> int:
    """Chunks in a turn, so that the last turn is almost full."""
    most = max(1, min(TURN, chunks, TURN_BYTES // state_bytes))
    return -(-chunks // -(-chunks // most))


def _turns(q_BLHK, k_BLGK, v_BLGV, log_decay, state_BHKV, index_BL, blocks: LinearAttentionBlocks):
    """All inputs by turns. Padding has zero keys and no decay, so it leaves the state alone."""
    C = blocks.steps(0 if log_decay is None else log_decay.ndim)
    M = _turn(-(-q_BLHK.shape[1] // C), state_BHKV.size * state_BHKV.dtype.itemsize)
    index_BL = jnp.zeros(q_BLHK.shape[:2], jnp.int32) if index_BL is None else index_BL
    index_BL = pad_length(index_BL, M * C, edge=True)
    before_BN = jnp.concatenate([index_BL[:, :1], index_BL[:, C - 1 : -1 : C]], axis=1)
    index, before = _split(index_BL, M, C), _split(before_BN, M, 1)[..., 0]
    g = None if log_decay is None else _split(log_decay, M, C)
    return _split(q_BLHK, M, C), _split(k_BLGK, M, C), _split(v_BLGV, M, C), g, index, before


def _open(inputs, dtype) -> tuple[jax.Array, jax.Array, jax.Array, Decays]:
    """One turn: q, k, v (M B, G, R, C, X) and the decays of its chunks."""
    q, k, v, g, index, before = inputs
    G = k.shape[3]
    index, before = (jnp.swapaxes(each, 0, 1).reshape(-1, *each.shape[2:]) for each in (index, before))
    g = None if g is None else _fold(g, G, dtype)
    return _fold(q, G, dtype), _fold(k, G, dtype), _fold(v, G, dtype), decays(g, index, before, dtype)


def _grouped(state_BHKV: jax.Array, G: int) -> jax.Array:
    B, H, K, V = state_BHKV.shape
    return state_BHKV.reshape(B, G, H // G, K, V)


@partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def attend(
    q_BLHK: jax.Array,
    k_BLGK: jax.Array,
    v_BLGV: jax.Array,
    log_decay: jax.Array | None,
    state_BHKV: jax.Array,
    index_BL: jax.Array | None,
    scale: float,
    blocks: LinearAttentionBlocks,
) -> tuple[jax.Array, jax.Array]:
    """As `reference.attend`."""
    dtype = state_BHKV.dtype

    def step(state, inputs):
        q, k, v, factors = _open(inputs, dtype)
        state, before = _advance(k, v, factors, state)
        y = _scores(q, k, factors.between) @ v + (factors.through * q) @ before
        return state, _unfold(scale * y, (*inputs[0].shape[:4], v.shape[-1]), dtype)

    inputs = _turns(q_BLHK, k_BLGK, v_BLGV, log_decay, state_BHKV, index_BL, blocks)
    state, y = jax.lax.scan(step, _grouped(state_BHKV, k_BLGK.shape[2]), inputs)
    return _join(y, q_BLHK.shape[1]), state.reshape(state_BHKV.shape)


def _forward(q_BLHK, k_BLGK, v_BLGV, log_decay, state_BHKV, index_BL, scale, blocks):
    arguments = (q_BLHK, k_BLGK, v_BLGV, log_decay, state_BHKV, index_BL)
    return attend(*arguments, scale, blocks), arguments


def backward(scale, blocks, arguments, cotangents):
    """Cotangents of the arguments, from the arguments themselves."""
    q_BLHK, k_BLGK, v_BLGV, log_decay, state_BHKV, index_BL = arguments
    d_y_BLHV, d_final_BHKV = cotangents
    dtype, L, G = state_BHKV.dtype, q_BLHK.shape[1], k_BLGK.shape[2]
    inputs = _turns(q_BLHK, k_BLGK, v_BLGV, log_decay, state_BHKV, index_BL, blocks)
    M, C = inputs[0].shape[2:4]

    def rebuild(state, inputs):
        _, k, v, factors = _open(inputs, dtype)
        return _advance(k, v, factors, state)

    def step(d_state, inputs):
        states, d_y, inputs = inputs
        q, k, v, factors = _open(inputs, dtype)
        d_y = scale * _fold(d_y, G, dtype)
        added = _turned(factors.through * q) @ d_y
        d_state, d_next = _carry(d_state, _turned(factors.whole), added, reverse=True)
        rank = 0 if log_decay is None else log_decay.ndim
        gradients = _gradients(q, k, v, factors, states, d_y, d_next, rank)
        return d_state, tuple(
            None if each is None or like is None else _unfold(each, like.shape, like.dtype)
            for each, like in zip(gradients, inputs[:4], strict=True)
        )

    _, states = jax.lax.scan(rebuild, _grouped(state_BHKV, G), inputs)
    d_y = _split(d_y_BLHV, M, C)
    d_state, gradients = jax.lax.scan(step, _grouped(d_final_BHKV, G), (states, d_y, inputs), reverse=True)
    d_q, d_k, d_v, d_decay = (None if each is None else _join(each, L) for each in gradients)
    return d_q, d_k, d_v, d_decay, d_state.reshape(state_BHKV.shape), None


attend.defvjp(_forward, backward)

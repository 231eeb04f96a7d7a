"""The delta rule in chunks, with a written backward pass.

The forward pass is a scan over chunks that keeps the state that enters each, nothing else. The backward pass takes the
chunks from the last to the first, recomputes one at a time and pulls the cotangents of its outputs and of the state
that leaves it back through it. Memory is L H K V / chunk for the kept states and about H chunk (chunk + K + V) for the
chunk at hand, against L H K V for autodiff through the scan over tokens. `split` and `join` are for kernels.
"""

import jax
import jax.numpy as jnp

from kernels.delta_rule.blocks import DeltaRuleBlocks
from kernels.delta_rule.chunk import run_chunk
from kernels.segments import pad_length


def delta_rule_chunked(
    q_BLHRK: jax.Array,
    k_BLHK: jax.Array,
    v_BLHV: jax.Array,
    beta_BLH: jax.Array,
    log_decay_BLH: jax.Array | None,
    state_BHKV: jax.Array,
    starts_BL: jax.Array,
    blocks: DeltaRuleBlocks,
) -> tuple[jax.Array, jax.Array]:
    """o_BLHRV for R queries that share a state, and the final state, cleared before each step of `starts_BL`."""

    def cut(x: jax.Array | None) -> jax.Array | None:
        """(B, L, ...) to (chunks, B, C, ...): chunks lead, since they are scanned over."""
        if x is None:
            return None
        x = pad_length(x, blocks.chunk)
        return jnp.moveaxis(x.reshape(x.shape[0], -1, blocks.chunk, *x.shape[2:]), 1, 0)

    tokens = tuple(map(cut, (q_BLHRK, k_BLHK, v_BLHV, beta_BLH, log_decay_BLH)))
    starts = pad_length(starts_BL, blocks.chunk)
    run = jnp.cumsum(starts.reshape(starts.shape[0], -1, 1, blocks.chunk), -1, dtype=jnp.int32)
    o, state_BHKV = _scan(tokens, jnp.moveaxis(run, 1, 0), state_BHKV)
    o = jnp.moveaxis(o, 0, 1)
    return o.reshape(o.shape[0], -1, *o.shape[3:])[:, : q_BLHRK.shape[1]], state_BHKV


def split(q_BLHRK, k_BLHK, v_BLHV, beta_BLH, log_decay_BLH, starts_BL, chunk):
    """Matrices of one head and chunk, as `run_chunk` has them, behind (B, H, chunks), and runs (B, chunks, 1, C).

    Padding has beta = 0 and log_decay = 0, which leaves the state as it is.
    """

    def cut(x: jax.Array) -> jax.Array:
        """(B, L, H, ..., K) to (B, H, chunks, ... C, K)."""
        x = pad_length(x, chunk)
        x = x.reshape(x.shape[0], -1, chunk, *x.shape[2:])
        x = jnp.moveaxis(x, (3, 2), (1, -2))
        return x.reshape(*x.shape[:3], -1, x.shape[-1])

    def row(x_BLH: jax.Array) -> jax.Array:
        return jnp.swapaxes(cut(x_BLH[..., None]), 3, 4)

    log_decay = None if log_decay_BLH is None else row(log_decay_BLH)
    starts = pad_length(starts_BL, chunk)
    run = jnp.cumsum(starts.reshape(starts.shape[0], -1, 1, chunk), -1, dtype=jnp.int32)
    return (cut(q_BLHRK), cut(k_BLHK), cut(v_BLHV), row(beta_BLH), log_decay), run


def join(o: jax.Array, L: int, R: int) -> jax.Array:
    """Outputs (B, H, chunks, R C, V) to (B, L, H, R, V)."""
    B, H, count, rows, V = o.shape
    o = o.reshape(B, H, count, R, rows // R, V)
    return jnp.moveaxis(o, (2, 4), (1, 2)).reshape(B, -1, H, R, V)[:, :L]


def _chunk(S_BHKV, tokens, run):
    """`run_chunk` over heads and batch, which share the runs: o (B, C, H, R, V).

    Heads come before steps here, chunk by chunk, so that no second copy of the inputs is kept.
    """
    q_BCHRK, k_BCHK, v_BCHV, *numbers = tokens
    B, C, H, R, K = q_BCHRK.shape
    q_BHCK = jnp.moveaxis(q_BCHRK, 1, 3).reshape(B, H, R * C, K)
    k_BHCK, v_BHCV = (jnp.swapaxes(x, 1, 2) for x in (k_BCHK, v_BCHV))
    rows_BH1C = (None if x is None else jnp.swapaxes(x, 1, 2)[:, :, None] for x in numbers)

    def one(S_KV, token, run_1C):
        q, k, v, beta, log_decay = token
        return run_chunk(S_KV, q, k, v, beta, log_decay, run_1C)

    after_BHKV, o = jax.vmap(jax.vmap(one, in_axes=(0, 0, None)))(S_BHKV, (q_BHCK, k_BHCK, v_BHCV, *rows_BH1C), run)
    return after_BHKV, jnp.moveaxis(o.reshape(B, H, R, C, -1), 3, 1)


@jax.custom_vjp
def _scan(tokens, run, state_BHKV) -> tuple[jax.Array, jax.Array]:
    return _forward(tokens, run, state_BHKV)[0]


def _forward(tokens, run, state_BHKV):
    def step(S_BHKV, inputs):
        after_BHKV, o = _chunk(S_BHKV, *inputs)
        return after_BHKV, (o, S_BHKV)

    final_BHKV, (o, entering) = jax.lax.scan(step, state_BHKV, (tokens, run))
    return (o, final_BHKV), (tokens, run, entering)


def _backward(residuals, cotangents):
    tokens, run, entering = residuals
    do, dS_BHKV = cotangents

    def step(dS_BHKV, inputs):
        token, run, S_BHKV, do = inputs
        _, pull = jax.vjp(lambda S, token: _chunk(S, token, run), S_BHKV, token)
        return pull((dS_BHKV, do))

    dS_BHKV, gradients = jax.lax.scan(step, dS_BHKV, (tokens, run, entering, do), reverse=True)
    return gradients, None, dS_BHKV


_scan.defvjp(_forward, _backward)

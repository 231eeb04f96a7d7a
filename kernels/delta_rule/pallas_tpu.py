"""The delta rule as two Pallas kernels for TPUs.

A program runs one chunk of one head, as in `chunk`; the chunks of a head follow each other on the grid and hand the
state on in scratch memory. Where gradients are asked for, the forward kernel writes the state that enters each chunk.
The backward kernel takes the chunks from the last to the first, recomputes each one and pulls the cotangents of its
outputs and of the state that leaves it back through it, inside the kernel. Products are in float32 precision, also for
narrow inputs.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.delta_rule.blocks import DeltaRuleBlocks
from kernels.delta_rule.chunk import run_chunk
from kernels.delta_rule.chunked import join, split


def delta_rule_tpu(
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
    L, R = q_BLHRK.shape[1], q_BLHRK.shape[3]
    tokens, run = split(q_BLHRK, k_BLHK, v_BLHV, beta_BLH, log_decay_BLH, starts_BL, blocks.chunk)
    o, state_BHKV = _scan(tokens, run, state_BHKV, interpret)
    return join(o, L, R), state_BHKV


def _chunk(run_1C, S_KV, token):
    q, k, v, beta, log_decay = token
    return run_chunk(S_KV, q, k, v, beta, log_decay, run_1C)


def _load(refs):
    return jax.tree.map(lambda ref: ref[...], refs)


def _forward_kernel(tokens, run, state, o, final, *rest):
    *kept, scratch = rest

    @pl.when(pl.program_id(2) == 0)
    def _():
        scratch[...] = state[...]

    for entering in kept:
        entering[...] = scratch[...]
    S_KV, o_RCV = _chunk(run[...], scratch[...], _load(tokens))
    o[...] = o_RCV
    scratch[...] = S_KV
    final[...] = S_KV


def _backward_kernel(tokens, run, entering, do, dfinal, dtokens, dstate, scratch):
    @pl.when(pl.program_id(2) == 0)
    def _():
        scratch[...] = dfinal[...]

    run_1C = run[...]
    _recomputed, pull = jax.vjp(partial(_chunk, run_1C), entering[...], _load(tokens))
    dS_KV, slopes = pull((scratch[...], do[...]))
    for ref, slope in zip(jax.tree.leaves(dtokens), jax.tree.leaves(slopes), strict=True):
        ref[...] = slope
    scratch[...] = dS_KV
    dstate[...] = dS_KV


def _specs(arrays, backwards: bool):
    """Whole matrices of one head and one chunk, for the grid (B, H, chunks)."""

    def spec(array):
        count = array.shape[2]
        return pl.BlockSpec(
            (None, None, None, *array.shape[3:]),
            lambda b, h, c: (b, h, count - 1 - c if backwards else c, 0, 0),
        )

    return jax.tree.map(spec, arrays)


def _run_spec(run, backwards: bool) -> pl.BlockSpec:
    count = run.shape[1]
    return pl.BlockSpec((None, None, *run.shape[2:]), lambda b, h, c: (b, count - 1 - c if backwards else c, 0, 0))


def _state_spec(state_BHKV) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, *state_BHKV.shape[2:]), lambda b, h, c: (b, h, 0, 0))


_ORDER = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))


def _run(tokens, run, state_BHKV, interpret):
    return tuple(_call(tokens, run, state_BHKV, interpret, keep=False))


def _call(tokens, run, state_BHKV, interpret, keep):
    q, _, v, _, _ = tokens
    (B, H, count), (K, V) = v.shape[:3], state_BHKV.shape[2:]
    readings = jax.ShapeDtypeStruct((*q.shape[:-1], V), q.dtype)
    states = jax.ShapeDtypeStruct((B, H, count, K, V), q.dtype)
    return pl.pallas_call(
        _forward_kernel,
        grid=(B, H, count),
        in_specs=[_specs(tokens, False), _run_spec(run, False), _state_spec(state_BHKV)],
        out_specs=[_specs(readings, False), _state_spec(state_BHKV), _specs(states, False)][: 2 + keep],
        out_shape=[readings, jax.ShapeDtypeStruct(state_BHKV.shape, q.dtype), states][: 2 + keep],
        scratch_shapes=[pltpu.VMEM((K, V), jnp.float32)],
        compiler_params=_ORDER,
        interpret=interpret,
        name="delta_rule_forward",
    )(tokens, run, state_BHKV)


def _forward(tokens, run, state_BHKV, interpret):
    o, final_BHKV, entering = _call(tokens, run, state_BHKV, interpret, keep=True)
    return (o, final_BHKV), (tokens, run, entering)


def _backward(interpret, residuals, cotangents):
    tokens, run, entering = residuals
    do, dfinal_BHKV = cotangents
    B, H, count, K, V = entering.shape
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tokens)
    state = _state_spec(dfinal_BHKV)
    dtokens, dstate_BHKV = pl.pallas_call(
        _backward_kernel,
        grid=(B, H, count),
        in_specs=[_specs(tokens, True), _run_spec(run, True), _specs(entering, True), _specs(do, True), state],
        out_specs=[_specs(tokens, True), state],
        out_shape=[shapes, jax.ShapeDtypeStruct(dfinal_BHKV.shape, do.dtype)],
        scratch_shapes=[pltpu.VMEM((K, V), jnp.float32)],
        compiler_params=_ORDER,
        interpret=interpret,
        name="delta_rule_backward",
    )(tokens, run, entering, do, dfinal_BHKV)
    return dtokens, None, dstate_BHKV


_scan = jax.custom_vjp(_run, nondiff_argnums=(3,))
_scan.defvjp(_forward, _backward)

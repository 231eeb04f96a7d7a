"""The diagonal linear recurrence on TPU: the state stays in vector memory while blocks of steps stream by.

Time comes first, so that a step is a tile of up to 8 rows of the batch by 128 channels or more. The backward pass is
the adjoint of `chunked`, with the state p_t = a_t m_t carried from the last step to the first: m_t = c_t + p_{t+1}.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.linear_recurrence.blocks import LinearRecurrenceBlocks


def scan(
    a_BLN: jax.Array,
    x_BLN: jax.Array,
    h_BN: jax.Array,
    starts_BL: jax.Array | None,
    blocks: LinearRecurrenceBlocks,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """As `reference.scan`, for float32."""
    if starts_BL is not None:
        a_BLN = jnp.where(starts_BL[..., None], 0, a_BLN)
    h_LBN = _scan(jnp.swapaxes(a_BLN, 0, 1), jnp.swapaxes(x_BLN, 0, 1), h_BN, blocks, interpret)
    return jnp.swapaxes(h_LBN, 0, 1), h_LBN[-1]


def _kernel(a_LBN, x_LBN, first_BN, out_LBN, last_BN, carry_BN, *, L: int, adjoint: bool):
    block, steps = pl.program_id(2), a_LBN.shape[0]
    start = (pl.num_programs(2) - 1 - block if adjoint else block) * steps

    @pl.when(block == 0)
    def _():
        carry_BN[...] = first_BN[...]

    def step(i, carry):
        t = steps - 1 - i if adjoint else i
        a_BN, x_BN = a_LBN[t], x_LBN[t]
        out_BN = x_BN + carry if adjoint else a_BN * carry + x_BN
        out_LBN[t] = out_BN
        # What lies beyond the sequence in its last block is undefined.
        return jnp.where(start + t < L, a_BN * out_BN if adjoint else out_BN, carry)

    carry_BN[...] = jax.lax.fori_loop(0, steps, step, carry_BN[...])
    last_BN[...] = carry_BN[...]


def _call(a_LBN, x_LBN, first_BN, adjoint: bool, blocks: LinearRecurrenceBlocks, interpret):
    """All outputs and the last carry, of the recurrence or of its adjoint."""
    L, B, N = x_LBN.shape
    size = (min(blocks.steps, L), min(B, 8), min(blocks.channels, N))
    grid = (pl.cdiv(B, size[1]), pl.cdiv(N, size[2]), pl.cdiv(L, size[0]))
    timed = pl.BlockSpec(size, lambda b, n, t: (grid[2] - 1 - t if adjoint else t, b, n))
    once = pl.BlockSpec(size[1:], lambda b, n, t: (b, n))
    return pl.pallas_call(
        partial(_kernel, L=L, adjoint=adjoint),
        grid=grid,
        in_specs=[timed, timed, once],
        out_specs=[timed, once],
        out_shape=[jax.ShapeDtypeStruct(each.shape, each.dtype) for each in (x_LBN, first_BN)],
        scratch_shapes=[pltpu.VMEM(size[1:], x_LBN.dtype)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="linear_recurrence_adjoint" if adjoint else "linear_recurrence",
    )(a_LBN, x_LBN, first_BN)


def _run(a_LBN, x_LBN, h_BN, blocks, interpret) -> jax.Array:
    return _call(a_LBN, x_LBN, h_BN, False, blocks, interpret)[0]


def _forward(a_LBN, x_LBN, h_BN, blocks, interpret):
    h_LBN = _run(a_LBN, x_LBN, h_BN, blocks, interpret)
    return h_LBN, (a_LBN, h_BN, h_LBN)


def _backward(blocks, interpret, residuals, c_LBN):
    a_LBN, h_BN, h_LBN = residuals
    m_LBN, d_h_BN = _call(a_LBN, c_LBN, jnp.zeros_like(h_BN), True, blocks, interpret)
    return m_LBN * jnp.concatenate([h_BN[None], h_LBN[:-1]]), m_LBN, d_h_BN


_scan = jax.custom_vjp(_run, nondiff_argnums=(3, 4))
_scan.defvjp(_forward, _backward)

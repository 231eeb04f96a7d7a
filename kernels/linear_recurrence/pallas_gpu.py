"""The diagonal linear recurrence on GPUs (Mosaic GPU, Hopper and later): one channel a thread, from step to step.

A warpgroup runs 128 channels of one row of the batch. Blocks of steps are copied to shared memory, the next one while
one is at work; states go straight to global memory. The backward pass is the adjoint of `pallas_tpu`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.linear_recurrence.blocks import LinearRecurrenceBlocks
from kernels.segments import pad_length

LANES = 128
# Four blocks of steps lie in shared memory.
MOST_STEPS = 96


def scan(
    a_BLN: jax.Array,
    x_BLN: jax.Array,
    h_BN: jax.Array,
    starts_BL: jax.Array | None,
    blocks: LinearRecurrenceBlocks,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """As `reference.scan`, for float32."""
    if interpret is True:
        interpret = plgpu.InterpretGPUParams()
    if starts_BL is not None:
        a_BLN = jnp.where(starts_BL[..., None], 0, a_BLN)
    _, L, N = x_BLN.shape
    steps = min(blocks.steps, L)
    a_BLN, x_BLN = (pad_length(pad_length(each, steps), LANES, axis=2) for each in (a_BLN, x_BLN))
    h_BLN = _scan(a_BLN, x_BLN, pad_length(h_BN, LANES), steps, interpret or None)[:, :L, :N]
    return h_BLN, h_BLN[:, -1]


def _kernel(a_gmem, x_gmem, first, out, last, a, x, loaded, *, steps: int, adjoint: bool):
    batch, lanes = lax.axis_index("batch"), pl.ds(lax.axis_index("part") * LANES, LANES)
    count = x_gmem.shape[1] // steps

    def start_of(block):
        return (count - 1 - block if adjoint else block) * steps

    def fetch(block):
        slot = lax.rem(block, 2)
        for source, place in ((a_gmem, a), (x_gmem, x)):
            rows = source.at[batch, pl.ds(start_of(block), steps), lanes]
            plgpu.copy_gmem_to_smem(rows, place.at[slot], loaded.at[slot])

    def run_block(block, carry):
        slot = lax.rem(block, 2)

        @pl.when(block + 1 < count)
        def _():
            fetch(block + 1)

        plgpu.barrier_wait(loaded.at[slot])

        def run_step(i, carry):
            t = steps - 1 - i if adjoint else i
            state = x[slot, t] + carry if adjoint else a[slot, t] * carry + x[slot, t]
            out[batch, start_of(block) + t, lanes] = state
            return a[slot, t] * state if adjoint else state

        carry = lax.fori_loop(0, steps, run_step, carry)
        # All threads have read this half before it is overwritten.
        plgpu.commit_smem()
        return carry

    fetch(jnp.int32(0))
    last[batch, lanes] = lax.fori_loop(0, count, run_block, first[batch, lanes])


def _call(a_BLN, x_BLN, first_BN, adjoint: bool, steps: int, interpret) -> tuple[jax.Array, jax.Array]:
    """All outputs and the last carry, of the recurrence or of its adjoint."""
    B, _, N = x_BLN.shape
    stage = plgpu.SMEM((2, steps, LANES), jnp.float32)
    return plgpu.kernel(
        partial(_kernel, steps=steps, adjoint=adjoint),
        out_type=tuple(jax.ShapeDtypeStruct(each.shape, jnp.float32) for each in (x_BLN, first_BN)),
        scratch_types=[stage, stage, plgpu.Barrier(num_arrivals=2, num_barriers=2)],
        grid=(B, N // LANES),
        grid_names=("batch", "part"),
        # No thread reads what another has written.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret,
    )(a_BLN, x_BLN, first_BN)


def _run(a_BLN, x_BLN, h_BN, steps, interpret) -> jax.Array:
    return _call(a_BLN, x_BLN, h_BN, False, steps, interpret)[0]


def _forward(a_BLN, x_BLN, h_BN, steps, interpret):
    h_BLN = _run(a_BLN, x_BLN, h_BN, steps, interpret)
    return h_BLN, (a_BLN, h_BN, h_BLN)


def _backward(steps, interpret, residuals, c_BLN):
    a_BLN, h_BN, h_BLN = residuals
    m_BLN, d_h_BN = _call(a_BLN, c_BLN, jnp.zeros_like(h_BN), True, steps, interpret)
    return m_BLN * jnp.concatenate([h_BN[:, None], h_BLN[:, :-1]], axis=1), m_BLN, d_h_BN


_scan = jax.custom_vjp(_run, nondiff_argnums=(3, 4))
_scan.defvjp(_forward, _backward)

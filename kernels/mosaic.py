"""What Mosaic GPU kernels of the recurrences share."""

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def over_chunks(body, carry, sources, buffers, barrier, chunk: int, count: int, backwards: bool = False):
    """Fold `body(i, tiles of chunk i, carry)` over the chunks, while the next one is copied to shared memory.

    `sources` give the slices of global memory for a range of steps; `buffers` have two halves, and `barrier` two
    barriers with one arrival for each source.
    """

    def fetch(step):
        place = count - 1 - step if backwards else step
        for at, buffer in zip(sources, buffers, strict=True):
            plgpu.copy_gmem_to_smem(at(pl.ds(place * chunk, chunk)), buffer.at[step % 2], barrier.at[step % 2])

    def advance(step, carry):
        @pl.when(step + 1 < count)
        def _():
            fetch(step + 1)

        plgpu.barrier_wait(barrier.at[step % 2])
        place = count - 1 - step if backwards else step
        carry = body(place, [buffer.at[step % 2] for buffer in buffers], carry)
        # All threads have read this half before it is overwritten.
        plgpu.commit_smem()
        return carry

    fetch(0)
    return jax.lax.fori_loop(0, count, advance, carry)

"""Diagonal linear recurrence h_t = a_t * h_{t-1} + x_t: the core of LRU, S4D, S5 and RG-LRU / Hawk."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from kernels.checks import check_segments
from kernels.dispatch import select
from kernels.linear_recurrence import chunked, pallas_gpu, pallas_tpu, reference
from kernels.linear_recurrence.blocks import LinearRecurrenceBlocks
from kernels.segments import flip, segment_starts

__all__ = ["LinearRecurrenceBlocks", "linear_recurrence", "linear_recurrence_step"]


def linear_recurrence(
    a_BLN: jax.Array,
    x_BLN: jax.Array,
    *,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    reverse: bool = False,
    implementation: str = "auto",
    blocks: LinearRecurrenceBlocks | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Run h_t = a_t h_{t-1} + x_t over axis 1.

    Args:
        a_BLN, x_BLN: factors and inputs of one shape, real or complex.
        initial_state: h_0 (B, N), zeros if absent; it enters the segment that is run first.
        segment_ids: (B, L) integers; the state is cleared wherever the id differs from the step before.
        reverse: run from the last step to the first.
        implementation: "auto", "reference", "chunked" or "pallas"; kernels are for real numbers.
        blocks: block sizes of the kernels.
        interpret: run a kernel in the interpreter of its platform, as `pallas_call` takes it.

    Returns:
        All states h_BLN and the final state (B, N), in the promoted dtype of a, x and h_0, at least float32.

    Raises:
        ValueError: shapes that do not agree, an empty sequence, an unknown implementation.
        NotImplementedError: the named implementation can't run here or with these arguments.
    """
    op = "linear_recurrence"
    if a_BLN.shape != x_BLN.shape or a_BLN.ndim != 3:
        raise ValueError(f"{op}: a has shape {a_BLN.shape} and x {x_BLN.shape}, expected one (B, L, N)")
    B, L, N = a_BLN.shape
    if L == 0:
        raise ValueError(f"{op}: x has length 0, expected at least 1")
    for name, array in (("a", a_BLN), ("x", x_BLN), ("initial_state", initial_state)):
        if array is not None and not jnp.issubdtype(array.dtype, jnp.inexact):
            raise ValueError(f"{op}: {name} has dtype {array.dtype}, expected a real or complex floating type")
    dtype = jnp.result_type(a_BLN, x_BLN, jnp.float32)
    if initial_state is None:
        initial_state = jnp.zeros((B, N), dtype)
    dtype = jnp.result_type(dtype, initial_state)
    if initial_state.shape != (B, N):
        raise ValueError(f"{op}: initial_state has shape {initial_state.shape}, expected {(B, N)}")
    check_segments(op, segment_ids, B, L)
    blocks = blocks or LinearRecurrenceBlocks()
    refused: dict[str, str] = {}
    if jax.default_backend() == "gpu" and float(jax.devices()[0].compute_capability) < 9:
        refused["pallas_gpu"] = "it copies blocks as only Hopper and later do"
    if blocks.steps > pallas_gpu.MOST_STEPS:
        refused["pallas_gpu"] = f"its blocks have at most {pallas_gpu.MOST_STEPS} steps, got {blocks}"
    if dtype != jnp.float32:
        refused |= dict.fromkeys(("pallas_gpu", "pallas_tpu"), f"it computes in float32, not {dtype}")
    available = {
        "reference": reference.scan,
        "chunked": chunked.scan,
        "pallas_tpu": partial(pallas_tpu.scan, interpret=interpret),
        "pallas_gpu": partial(pallas_gpu.scan, interpret=interpret),
    }
    run = select(op, implementation, available, refused=refused)

    a_BLN, x_BLN, segment_ids = flip((a_BLN.astype(dtype), x_BLN.astype(dtype), segment_ids), reverse)
    starts_BL = None if segment_ids is None else segment_starts(segment_ids)
    h_BLN, final_BN = run(a_BLN, x_BLN, initial_state.astype(dtype), starts_BL, blocks)
    return flip(h_BLN, reverse), final_BN


def linear_recurrence_step(state_BN: jax.Array, a_BN: jax.Array, x_BN: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One token from a carried state: h_BN, twice, as output and as the next state, with dtypes as of the op."""
    h_BLN, state_BN = linear_recurrence(
        a_BN[:, None], x_BN[:, None], initial_state=state_BN, implementation="reference"
    )
    return h_BLN[:, 0], state_BN

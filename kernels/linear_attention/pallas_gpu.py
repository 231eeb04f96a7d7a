"""Linear attention on GPUs (Mosaic GPU): by chunks on the tensor cores of Hopper, or else token by token in float32.

Tensor cores take bfloat16 and decays per head. Token by token go decays per channel, float32 and float16, and all on
GPUs later than Hopper, whose tensor cores are another kind.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.linear_attention import pallas_gpu_chunk, pallas_gpu_token
from kernels.linear_attention.blocks import LinearAttentionBlocks


def _by_chunks(q: jax.Array, k: jax.Array, v: jax.Array, rank: int, interpret: Any) -> bool:
    """Whether tensor cores take this. In the interpreter, which has none, they also take float32, so that their kernels
    can be held to its precision; float16 goes the way that float32 goes on a device."""
    if rank == 4 or (jax.default_backend() == "gpu" and not jax.devices()[0].compute_capability.startswith("9.")):
        return False
    dtypes = {each.dtype for each in (q, k, v)}
    return dtypes == {jnp.dtype(jnp.bfloat16)} or (bool(interpret) and dtypes == {jnp.dtype(jnp.float32)})


def refusal(
    q: jax.Array, k: jax.Array, v: jax.Array, rank: int, blocks: LinearAttentionBlocks, interpret: Any
) -> str | None:
    """Why the kernels can't run log-decays of that rank with these blocks, or None."""
    if _by_chunks(q, k, v, rank, interpret) and blocks.chunk != pallas_gpu_chunk.CHUNK:
        return f"its chunks have {pallas_gpu_chunk.CHUNK} steps, got {blocks}"
    return None


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
    del blocks
    if interpret is True:
        interpret = plgpu.InterpretGPUParams()
    by_chunks = _by_chunks(q_BLHK, k_BLGK, v_BLGV, 0 if log_decay is None else log_decay.ndim, interpret)
    run = pallas_gpu_chunk.attend if by_chunks else pallas_gpu_token.attend
    return run(q_BLHK, k_BLGK, v_BLGV, log_decay, state_BHKV, index_BL, scale, interpret)

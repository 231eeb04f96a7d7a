"""Linear attention with the forward pass of `reference` and the backward pass of `chunked`: the pair for CPUs.

A CPU runs the scan over tokens as fast as memory lets it, faster than a chunk's products, whose masks and decays are
extra work. Its backward pass by JAX keeps the state of every step, which is what makes it slow and large; the chunked
one keeps the inputs only.
"""

from functools import partial

import jax

from kernels.linear_attention import chunked, reference
from kernels.linear_attention.blocks import LinearAttentionBlocks


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
    return reference.attend(q_BLHK, k_BLGK, v_BLGV, log_decay, state_BHKV, index_BL, scale, blocks)


def _forward(q_BLHK, k_BLGK, v_BLGV, log_decay, state_BHKV, index_BL, scale, blocks):
    arguments = (q_BLHK, k_BLGK, v_BLGV, log_decay, state_BHKV, index_BL)
    return attend(*arguments, scale, blocks), arguments


attend.defvjp(_forward, chunked.backward)

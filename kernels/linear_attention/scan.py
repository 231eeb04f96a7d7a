"""Linear attention with the forward pass of `reference` and the backward pass of `chunked`: the pair for CPUs.

A CPU runs the scan over tokens faster than a chunk's products while the state stays in its cache. Its backward pass by
JAX keeps the state of every step, which is what makes it slow and large; the chunked one keeps the inputs only.
"""

import jax

from kernels.linear_attention import chunked, reference

attend = jax.custom_vjp(reference.attend, nondiff_argnums=(6, 7))


def _forward(q_BLHK, k_BLGK, v_BLGV, log_decay, state_BHKV, index_BL, scale, blocks):
    arguments = (q_BLHK, k_BLGK, v_BLGV, log_decay, state_BHKV, index_BL)
    return reference.attend(*arguments, scale, blocks), arguments


attend.defvjp(_forward, chunked.backward)

"""Linear attention for CPUs: the scan over tokens of `reference` forward, and the written backward pass of `chunked`.

A CPU runs the scan over tokens about as fast as a chunk's products while the state stays in its cache, and needs less
memory. Its backward pass by JAX keeps the state of every step, which is what makes it slow and large; the chunked one
keeps the inputs only. Where gradients are asked for, sequences of a chunk and more go by chunks both ways, unless
decays are per channel. On two CPU cores that took up to 56% less time than this pair (heads of 16 to 64, 64 to 1024
steps), and 16% more at worst, with states of 16 by 16.
"""

import jax

from kernels.linear_attention import chunked, reference

attend = jax.custom_vjp(reference.attend, nondiff_argnums=(6, 7))


def _forward(q_BLHK, k_BLGK, v_BLGV, log_decay, state_BHKV, index_BL, scale, blocks):
    arguments = (q_BLHK, k_BLGK, v_BLGV, log_decay, state_BHKV, index_BL)
    by_chunks = q_BLHK.shape[1] >= blocks.chunk and (log_decay is None or log_decay.ndim == 3)
    run = chunked.attend if by_chunks else reference.attend
    return run(*arguments, scale, blocks), arguments


attend.defvjp(_forward, chunked.backward)

"""Linear attention for CPUs: the scan over tokens of `reference` forward, and the written backward pass of `chunked`.

A CPU runs the scan over tokens about as fast as a chunk's products while the state stays in its cache, and needs less
memory. Its backward pass by JAX keeps the state of every step, which is what makes it slow and large; the chunked one
keeps the inputs only. Where gradients are asked for, long sequences go by chunks both ways, unless decays are per
channel: their forward pass is then faster too.
"""

import jax

from kernels.linear_attention import chunked, reference

# From here up both passes by chunks took 6 to 43% less time than this pair (4 heads of 64 by 64, two CPU cores); states
# of a quarter of that size and less took up to 16% more.
LONG = 1024

attend = jax.custom_vjp(reference.attend, nondiff_argnums=(6, 7))


def _forward(q_BLHK, k_BLGK, v_BLGV, log_decay, state_BHKV, index_BL, scale, blocks):
    arguments = (q_BLHK, k_BLGK, v_BLGV, log_decay, state_BHKV, index_BL)
    long = q_BLHK.shape[1] >= LONG and (log_decay is None or log_decay.ndim == 3)
    run = chunked.attend if long else reference.attend
    return run(*arguments, scale, blocks), arguments


attend.defvjp(_forward, chunked.backward)

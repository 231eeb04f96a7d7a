"""The diagonal linear recurrence as a scan over tokens, differentiated by JAX: the definition."""

import jax
import jax.numpy as jnp

from kernels.linear_recurrence.blocks import LinearRecurrenceBlocks


def scan(
    a_BLN: jax.Array, x_BLN: jax.Array, h_BN: jax.Array, starts_BL: jax.Array | None, blocks: LinearRecurrenceBlocks
) -> tuple[jax.Array, jax.Array]:
    """All states (B, L, N) and the last, from arrays of one dtype; the state is cleared before each start."""
    del blocks
    inputs = jax.tree.map(lambda array: jnp.swapaxes(array, 0, 1), (a_BLN, x_BLN, starts_BL))

    def step(h_BN, inputs):
        a_BN, x_BN, starts_B = inputs
        if starts_B is not None:
            h_BN = jnp.where(starts_B[:, None], 0, h_BN)
        h_BN = a_BN * h_BN + x_BN
        return h_BN, h_BN

    h_BN, h_LBN = jax.lax.scan(step, h_BN, inputs)
    return jnp.swapaxes(h_LBN, 0, 1), h_BN

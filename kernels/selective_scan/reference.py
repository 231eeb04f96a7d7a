"""The selective scan as a scan over tokens: the definition, differentiated by JAX. Memory is all states, L N D."""

import jax
import jax.numpy as jnp

from kernels.selective_scan.blocks import SelectiveScanBlocks


def selective_scan_reference(
    u_BLD: jax.Array,
    delta_BLD: jax.Array,
    A_DN: jax.Array,
    B_BLGN: jax.Array,
    C_BLGN: jax.Array,
    state_BDN: jax.Array,
    starts_BL: jax.Array,
    blocks: SelectiveScanBlocks,
) -> tuple[jax.Array, jax.Array]:
    """y_BLD without skip and gate, and the final state. The state is cleared before each step of `starts_BL`."""
    del blocks
    repeats = A_DN.shape[0] // B_BLGN.shape[2]

    def step(h_BDN, token):
        u_BD, delta_BD, B_BGN, C_BGN, start_B = token
        B_BDN, C_BDN = (jnp.repeat(array, repeats, axis=1) for array in (B_BGN, C_BGN))
        h_BDN = jnp.where(start_B[:, None, None], 0, h_BDN)
        h_BDN = jnp.exp(delta_BD[..., None] * A_DN[None]) * h_BDN + (delta_BD * u_BD)[..., None] * B_BDN
        return h_BDN, (C_BDN * h_BDN).sum(-1)

    tokens = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (u_BLD, delta_BLD, B_BLGN, C_BLGN, starts_BL))
    state_BDN, y_LBD = jax.lax.scan(step, state_BDN, tokens)
    return jnp.swapaxes(y_LBD, 0, 1), state_BDN

"""Linear attention as a scan over tokens, differentiated by JAX: the definition that the others are held to."""

import jax
import jax.numpy as jnp

from kernels.linear_attention.blocks import LinearAttentionBlocks


def update(
    q_BHK: jax.Array, k_BGK: jax.Array, v_BGV: jax.Array, decay: jax.Array | None, state_BHKV: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One step: the query's reading of the new state (B, H, V), and that state. `decay` (B, H), (B, H, K) or None."""
    k_BHK, v_BHV = (jnp.repeat(each, q_BHK.shape[1] // each.shape[1], axis=1) for each in (k_BGK, v_BGV))
    if decay is not None:
        state_BHKV = state_BHKV * (decay[..., None] if decay.ndim == 3 else decay[..., None, None])
    state_BHKV = state_BHKV + k_BHK[..., None] * v_BHV[:, :, None]
    return (q_BHK[..., None] * state_BHKV).sum(2), state_BHKV


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
    """All readings, in the dtype of the state, and the final state. `index_BL` counts segments, see `kernels.segments`.

    `log_decay` is (B, L, H), (B, L, H, K) or None. LinearAttentionBlocks have no meaning here.
    """
    del blocks
    dtype = state_BHKV.dtype
    starts_BL = None if index_BL is None else jnp.diff(index_BL, axis=1, prepend=index_BL[:, :1]) != 0
    inputs = jax.tree.map(lambda each: jnp.swapaxes(each, 0, 1), (q_BLHK, k_BLGK, v_BLGV, log_decay, starts_BL))

    def step(state_BHKV, inputs):
        q_BHK, k_BGK, v_BGV, log_decay, starts_B = inputs
        if starts_B is not None:
            state_BHKV = jnp.where(starts_B[:, None, None, None], 0, state_BHKV)
        decay = None if log_decay is None else jnp.exp(log_decay.astype(dtype))
        y_BHV, state_BHKV = update(q_BHK.astype(dtype), k_BGK.astype(dtype), v_BGV.astype(dtype), decay, state_BHKV)
        return state_BHKV, scale * y_BHV

    state_BHKV, y_LBHV = jax.lax.scan(step, state_BHKV, inputs)
    return jnp.swapaxes(y_LBHV, 0, 1), state_BHKV

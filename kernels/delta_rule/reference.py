"""The delta rule as a scan over tokens: the definition, differentiated by JAX. Memory is all states, L H K V."""

import jax
import jax.numpy as jnp

from kernels.delta_rule.blocks import DeltaRuleBlocks


def delta_rule_reference(
    q_BLHRK: jax.Array,
    k_BLHK: jax.Array,
    v_BLHV: jax.Array,
    beta_BLH: jax.Array,
    log_decay_BLH: jax.Array | None,
    state_BHKV: jax.Array,
    starts_BL: jax.Array,
    blocks: DeltaRuleBlocks,
) -> tuple[jax.Array, jax.Array]:
    """o_BLHRV for R queries that share a state, and the final state, cleared before each step of `starts_BL`."""
    del blocks

    def step(S_BHKV, token):
        q_BHRK, k_BHK, v_BHV, beta_BH, log_decay_BH, start_B = token
        S_BHKV = jnp.where(start_B[:, None, None, None], 0, S_BHKV)
        if log_decay_BH is not None:
            S_BHKV = jnp.exp(log_decay_BH)[..., None, None] * S_BHKV
        read_BHV = jnp.einsum("bhk,bhkv->bhv", k_BHK, S_BHKV, precision="highest")
        write_BHV = beta_BH[..., None] * (v_BHV - read_BHV)
        S_BHKV = S_BHKV + k_BHK[..., None] * write_BHV[..., None, :]
        return S_BHKV, jnp.einsum("bhrk,bhkv->bhrv", q_BHRK, S_BHKV, precision="highest")

    given = (q_BLHRK, k_BLHK, v_BLHV, beta_BLH, log_decay_BLH, starts_BL)
    tokens = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), given)
    state_BHKV, o_LBHRV = jax.lax.scan(step, state_BHKV, tokens)
    return jnp.swapaxes(o_LBHRV, 0, 1), state_BHKV

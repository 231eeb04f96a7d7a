"""The delta rule for CPUs: the scan over tokens of `reference`, and where gradients are asked for, `chunked`.

While the state fits into the cache, a CPU runs the scan over tokens as fast as any chunk, but its backward pass by JAX
keeps the state of every step.
"""

from functools import partial

import jax

from kernels.delta_rule.blocks import DeltaRuleBlocks
from kernels.delta_rule.chunked import delta_rule_chunked
from kernels.delta_rule.reference import delta_rule_reference


@partial(jax.custom_vjp, nondiff_argnums=(7,))
def delta_rule_scan(
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
    return delta_rule_reference(q_BLHRK, k_BLHK, v_BLHV, beta_BLH, log_decay_BLH, state_BHKV, starts_BL, blocks)


def _forward(q_BLHRK, k_BLHK, v_BLHV, beta_BLH, log_decay_BLH, state_BHKV, starts_BL, blocks):
    def run(q, k, v, beta, log_decay, state):
        return delta_rule_chunked(q, k, v, beta, log_decay, state, starts_BL, blocks)

    return jax.vjp(run, q_BLHRK, k_BLHK, v_BLHV, beta_BLH, log_decay_BLH, state_BHKV)


def _backward(blocks, pull, cotangents):
    return *pull(cotangents), None


delta_rule_scan.defvjp(_forward, _backward)

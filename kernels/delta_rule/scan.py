"""The delta rule for CPUs: the scan over tokens of `reference`, and where gradients are asked for, `chunked`.

While the state fits into the cache, a CPU runs the scan over tokens as fast as any chunk, but its backward pass by JAX
keeps the state of every step.
"""

import jax

from kernels.delta_rule.chunked import delta_rule_chunked
from kernels.delta_rule.reference import delta_rule_reference

delta_rule_scan = jax.custom_vjp(delta_rule_reference, nondiff_argnums=(7,))


def _forward(q_BLHRK, k_BLHK, v_BLHV, beta_BLH, log_decay_BLH, state_BHKV, starts_BL, blocks):
    def run(q, k, v, beta, log_decay, state):
        return delta_rule_chunked(q, k, v, beta, log_decay, state, starts_BL, blocks)

    return jax.vjp(run, q_BLHRK, k_BLHK, v_BLHV, beta_BLH, log_decay_BLH, state_BHKV)


def _backward(blocks, pull, cotangents):
    return *pull(cotangents), None


delta_rule_scan.defvjp(_forward, _backward)

"""Delta rule: DeltaNet (Yang et al., arXiv 2406.06484) and, with decays, Gated DeltaNet (arXiv 2412.06464).

    S_t = exp(g_t) (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T
    o_t = scale * S_t^T q_t

The state S (K, V) maps keys to values. Each step reads what it holds for k_t and moves that towards v_t by the share
b_t. Keys are used as they are: give them unit length (L2), and b in [0, 1], or up to 2 for transitions with negative
eigenvalues. Longer keys make I - b k k^T expand, and the state grows without bound.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from kernels.checks import (
    check_array,
    check_length,
    check_not_positive,
    check_rank,
    check_segments,
    refuse_float64,
    refuse_old_gpu,
)
from kernels.delta_rule.blocks import DeltaRuleBlocks
from kernels.delta_rule.chunked import delta_rule_chunked
from kernels.delta_rule.pallas_gpu import delta_rule_gpu, refuse
from kernels.delta_rule.pallas_tpu import delta_rule_tpu
from kernels.delta_rule.reference import delta_rule_reference
from kernels.delta_rule.scan import delta_rule_scan
from kernels.dispatch import auto_for, select
from kernels.segments import flip, segment_starts

__all__ = ["DeltaRuleBlocks", "delta_rule", "delta_rule_step"]

_FLOOR = -1e4


def delta_rule(
    q_BLHK: jax.Array,
    k_BLHK: jax.Array,
    v_BLHV: jax.Array,
    beta_BLH: jax.Array,
    log_decay_BLH: jax.Array | None = None,
    *,
    initial_state_BHKV: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    reverse: bool = False,
    scale: float = 1.0,
    implementation: str = "auto",
    blocks: DeltaRuleBlocks | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Run the (gated) delta rule over axis 1.

    Args:
        q_BLHK: queries, of H heads or of a multiple; R query heads that follow each other then share a state.
        k_BLHK, v_BLHV: keys, which should have unit length, and values.
        beta_BLH: shares of the old value that are replaced.
        log_decay_BLH: g <= 0, down to -inf; None for no decay.
        initial_state_BHKV: S_0, zeros if absent; it enters the segment that is run first.
        segment_ids: (B, L) integers; the state is cleared wherever the id differs from the step before.
        reverse: run from the last step to the first.
        scale: factor of the outputs.
        implementation: "auto", "reference", "scan", "chunked" or "pallas".
        blocks: block sizes of the chunked form and of the kernels.
        interpret: run a kernel in the interpreter of its platform, as `pallas_call` or `plgpu.kernel` take it, or True.

    Returns:
        o, with the heads of q, (B, L, R H, V) in the dtype of v, and the final state (B, H, K, V) in the widest dtype
        of the inputs, at least float32, in which everything is computed.

    Raises:
        ValueError: shapes or dtypes that do not agree, an empty sequence, positive log-decays (seen only outside of
            transformations), an unknown implementation.
        NotImplementedError: the named implementation can't run here or with these arguments.
    """
    op = "delta_rule"
    check_rank(op, "k", k_BLHK, "(B, L, H, K)")
    check_rank(op, "v", v_BLHV, "(B, L, H, V)")
    check_rank(op, "q", q_BLHK, "(B, L, H, K)")
    B, L, H, K = k_BLHK.shape
    V, heads = v_BLHV.shape[3], q_BLHK.shape[2]
    check_length(op, "k", L)
    if H == 0 or heads == 0 or heads % H:
        raise ValueError(f"{op}: q has {heads} heads, expected a multiple of those of k, H = {H}")
    check_array(op, "q", q_BLHK, "(B, L, R H, K)", (B, L, heads, K))
    check_array(op, "k", k_BLHK, "(B, L, H, K)", (B, L, H, K))
    check_array(op, "v", v_BLHV, "(B, L, H, V)", (B, L, H, V))
    check_array(op, "beta", beta_BLH, "(B, L, H)", (B, L, H))
    check_array(op, "log_decay", log_decay_BLH, "(B, L, H)", (B, L, H))
    check_array(op, "initial_state", initial_state_BHKV, "(B, H, K, V)", (B, H, K, V))
    check_segments(op, segment_ids, B, L)
    check_not_positive(op, "log_decay", log_decay_BLH)
    given = (q_BLHK, k_BLHK, v_BLHV, beta_BLH, log_decay_BLH, initial_state_BHKV)
    dtype = jnp.result_type(jnp.float32, *(array for array in given if array is not None))
    available = {
        "reference": delta_rule_reference,
        "scan": delta_rule_scan,
        "chunked": delta_rule_chunked,
        "pallas_tpu": partial(delta_rule_tpu, interpret=interpret),
        "pallas_gpu": partial(delta_rule_gpu, interpret=interpret),
    }
    refused = refuse_float64(dtype) | refuse_old_gpu(interpret) | refuse(heads // H, K)
    auto = auto_for(op, 4 * B * H * K * V)
    run = select(op, implementation, available, refused=refused, auto=auto)
    if initial_state_BHKV is None:
        initial_state_BHKV = jnp.zeros((B, H, K, V), dtype)
    tokens = jax.tree.map(lambda array: array.astype(dtype), (q_BLHK, k_BLHK, v_BLHV, beta_BLH, log_decay_BLH))
    if segment_ids is None:
        starts_BL = jnp.zeros((B, L), bool)
    else:
        starts_BL = segment_starts(flip(segment_ids, reverse))
    q, k, v, beta, log_decay = flip(tokens, reverse)
    if log_decay is not None:
        # exp is 0 far above the floor, and sums of what lies below it would be infinite or NaN.
        log_decay = jnp.maximum(log_decay, _FLOOR)
    o_BLHRV, final_BHKV = run(
        (scale * q).reshape(B, L, H, heads // H, K),
        k,
        v,
        beta,
        log_decay,
        initial_state_BHKV.astype(dtype),
        starts_BL,
        blocks or DeltaRuleBlocks(),
    )
    return flip(o_BLHRV, reverse).reshape(B, L, heads, V).astype(jnp.result_type(v_BLHV)), final_BHKV


def delta_rule_step(
    state_BHKV: jax.Array,
    q_BHK: jax.Array,
    k_BHK: jax.Array,
    v_BHV: jax.Array,
    beta_BH: jax.Array,
    log_decay_BH: jax.Array | None = None,
    *,
    scale: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """One token from a carried state: o (B, R H, V) and the next state. Arguments as of `delta_rule`, without L."""
    o_BLHV, state_BHKV = delta_rule(
        q_BHK[:, None],
        k_BHK[:, None],
        v_BHV[:, None],
        beta_BH[:, None],
        None if log_decay_BH is None else log_decay_BH[:, None],
        initial_state_BHKV=state_BHKV,
        scale=scale,
        implementation="reference",
    )
    return o_BLHV[:, 0], state_BHKV

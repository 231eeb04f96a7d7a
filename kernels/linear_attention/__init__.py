"""Linear attention with every kind of decay: a matrix state that is read by queries.

    S_t = Diag(exp g_t) S_{t-1} + k_t v_t^T        y_t = scale * q_t S_t

Without decay it is the linear transformer (Katharopoulos et al., arXiv 2006.16236); with a constant one per head,
RetNet (arXiv 2307.08621) and Lightning Attention-2 (arXiv 2401.04658); with a scalar per step, Mamba-2 (arXiv
2405.21060); with a vector per step, gated linear attention (arXiv 2312.06635). A query reads the state that already
holds its own step. Heads of queries may share keys and values: query head h uses group h // (H / G).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from kernels.checks import check_array, check_length, check_rank, check_segments, refuse_float64, refuse_old_gpu
from kernels.dispatch import auto_for, select
from kernels.linear_attention import chunked, pallas_gpu, pallas_tpu, reference, scan
from kernels.linear_attention.blocks import LinearAttentionBlocks
from kernels.segments import flip, segment_index

__all__ = ["LinearAttentionBlocks", "bidirectional_linear_attention", "linear_attention", "linear_attention_step"]

_FLOOR = 1e-6


def linear_attention(
    q_BLHK: jax.Array,
    k_BLGK: jax.Array,
    v_BLGV: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    initial_state_BHKV: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    reverse: bool = False,
    normalise: bool = False,
    scale: float = 1.0,
    implementation: str = "auto",
    blocks: LinearAttentionBlocks | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Run linear attention over axis 1.

    Args:
        q_BLHK, k_BLGK, v_BLGV: queries, keys and values; H is a multiple of the number of groups G.
        log_decay: g <= 0, as (H,), (B, L, H) or (B, L, H, K); no decay if absent. Anything down to -inf is finite.
        initial_state_BHKV: S_0, zeros if absent; it enters the segment that is run first.
        segment_ids: (B, L) integers; the state is cleared wherever the id differs from the step before.
        reverse: run from the last step to the first.
        normalise: divide by q_t z_t, where z is the same sum over keys alone, not less than 1e-6: meant for queries and
            keys that are not negative. States then have V + 1 columns, of which the last is z.
        scale: a number that multiplies the outputs, where they are not normalised.
        implementation: "auto", "reference", "scan", "chunked" or "pallas".
        blocks: block sizes of the chunked form and of the kernels.
        interpret: run a kernel in the interpreter of its platform, as `pallas_call` takes it.

    Returns:
        y_BLHV in the dtype of v, and the final state (B, H, K, V) in the widest dtype of the inputs, at least float32,
        in which sums are taken.

    Raises:
        ValueError: shapes or dtypes that do not agree, an empty sequence, positive log-decays (seen only outside of
            transformations), an unknown implementation.
        NotImplementedError: the named implementation can't run here or with these arguments.
    """
    y_BLHV, final_BHKV = _read(
        q_BLHK,
        k_BLGK,
        v_BLGV,
        log_decay,
        initial_state_BHKV=initial_state_BHKV,
        segment_ids=segment_ids,
        reverse=reverse,
        normalise=normalise,
        scale=scale,
        implementation=implementation,
        blocks=blocks,
        interpret=interpret,
    )
    return (_divide(y_BLHV) if normalise else y_BLHV).astype(v_BLGV.dtype), final_BHKV


def bidirectional_linear_attention(
    q_BLHK: jax.Array,
    k_BLGK: jax.Array,
    v_BLGV: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    segment_ids: jax.Array | None = None,
    normalise: bool = False,
    scale: float = 1.0,
    implementation: str = "auto",
    blocks: LinearAttentionBlocks | None = None,
    interpret: Any = False,
) -> jax.Array:
    """Each step reads all steps of its segment: the forward and the reverse run, with the step itself counted once.

        y_t = scale * sum_s (q_t * exp(a_ts)) k_s v_s,   a_ts = g_{s+1} + .. + g_t if s <= t else g_t + .. + g_{s-1}

    Arguments, result y_BLHV and errors are those of `linear_attention`; there is no state to carry.
    """
    options = {
        "segment_ids": segment_ids,
        "normalise": normalise,
        "scale": scale,
        "implementation": implementation,
        "blocks": blocks,
        "interpret": interpret,
    }
    ahead_BLHV, _ = _read(q_BLHK, k_BLGK, v_BLGV, log_decay, reverse=False, **options)
    back_BLHV, _ = _read(q_BLHK, k_BLGK, v_BLGV, log_decay, reverse=True, **options)
    values = _with_ones(v_BLGV) if normalise else scale * v_BLGV.astype(ahead_BLHV.dtype)
    share = q_BLHK.shape[2] // k_BLGK.shape[2]
    k_BLHK, v_BLHV = (jnp.repeat(each.astype(ahead_BLHV.dtype), share, axis=2) for each in (k_BLGK, values))
    twice_BLHV = (q_BLHK.astype(ahead_BLHV.dtype) * k_BLHK).sum(-1, keepdims=True) * v_BLHV
    y_BLHV = ahead_BLHV + back_BLHV - twice_BLHV
    return (_divide(y_BLHV) if normalise else y_BLHV).astype(v_BLGV.dtype)


def linear_attention_step(
    state_BHKV: jax.Array,
    q_BHK: jax.Array,
    k_BGK: jax.Array,
    v_BGV: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    normalise: bool = False,
    scale: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """One token from a carried state: y_BHV and the next state. Arguments as of `linear_attention`, without L."""
    if log_decay is not None and log_decay.ndim > 1:
        log_decay = log_decay[:, None]
    y_BLHV, state_BHKV = linear_attention(
        q_BHK[:, None],
        k_BGK[:, None],
        v_BGV[:, None],
        log_decay,
        initial_state_BHKV=state_BHKV,
        normalise=normalise,
        scale=scale,
        implementation="reference",
    )
    return y_BLHV[:, 0], state_BHKV


def _read(
    q_BLHK,
    k_BLGK,
    v_BLGV,
    log_decay,
    *,
    initial_state_BHKV=None,
    segment_ids,
    reverse,
    normalise,
    scale,
    implementation,
    blocks,
    interpret,
) -> tuple[jax.Array, jax.Array]:
    """Outputs in the dtype of the state, not yet normalised but with the column of z, and the final state."""
    op = "linear_attention"
    check_rank(op, "q", q_BLHK, "(B, L, H, K)")
    check_rank(op, "v", v_BLGV, "(B, L, G, V)")
    (B, L, H, K), (G, V) = q_BLHK.shape, v_BLGV.shape[2:]
    check_length(op, "q", L)
    if min(H, G, K, V) < 1 or H % G:
        raise ValueError(f"{op}: q has {H} heads of {K} and v {G} of {V}, expected positive sizes, H a multiple of G")
    check_array(op, "q", q_BLHK, "(B, L, H, K)", (B, L, H, K))
    check_array(op, "k", k_BLGK, "(B, L, G, K)", (B, L, G, K))
    check_array(op, "v", v_BLGV, "(B, L, G, V)", (B, L, G, V))
    if log_decay is not None:
        check_rank(op, "log_decay", log_decay, "(H)", "(B, L, H)", "(B, L, H, K)")
        axes = {1: "(H,)", 3: "(B, L, H)", 4: "(B, L, H, K)"}[log_decay.ndim]
        _check_decay(op, log_decay, axes, (H,) if log_decay.ndim == 1 else (B, L, H, K)[: log_decay.ndim])
    columns, axes = (V + 1, "(B, H, K, V + 1)") if normalise else (V, "(B, H, K, V)")
    check_array(op, "initial_state", initial_state_BHKV, axes, (B, H, K, columns))
    check_segments(op, segment_ids, B, L)
    blocks = blocks or LinearAttentionBlocks()
    dtype = _widest(q_BLHK, k_BLGK, v_BLGV, log_decay, initial_state_BHKV)
    available = {
        "reference": reference.attend,
        "scan": scan.attend,
        "chunked": chunked.attend,
        "pallas_tpu": partial(pallas_tpu.attend, interpret=interpret),
        "pallas_gpu": partial(pallas_gpu.attend, interpret=interpret),
    }
    rank = 0 if log_decay is None else log_decay.ndim
    refused = {
        "pallas_tpu": pallas_tpu.refusal(rank, blocks),
        "pallas_gpu": pallas_gpu.refusal(q_BLHK, k_BLGK, v_BLGV, rank, blocks, interpret),
    }
    refused = {name: reason for name, reason in refused.items() if reason}
    refused |= refuse_float64(dtype) | refuse_old_gpu(interpret)
    # With decays per channel, chunks have pairwise decays to form, and the scan is ahead at any size.
    auto = auto_for(op, 0 if rank == 4 else 4 * B * H * K * columns)
    run = select(op, implementation, available, refused=refused, auto=auto)

    if initial_state_BHKV is None:
        initial_state_BHKV = jnp.zeros((B, H, K, columns), dtype)
    if log_decay is not None and log_decay.ndim == 1:  # its gradient is rounded after the sum over steps
        log_decay = jnp.broadcast_to(log_decay.astype(dtype)[None, None], (B, L, H))
    values = _with_ones(v_BLGV) if normalise else v_BLGV
    q, k, values, log_decay, ids = flip((q_BLHK, k_BLGK, values, log_decay, segment_ids), reverse)
    index_BL = None if ids is None else segment_index(ids)
    factor = 1.0 if normalise else float(scale)
    y_BLHV, final_BHKV = run(q, k, values, log_decay, initial_state_BHKV.astype(dtype), index_BL, factor, blocks)
    return flip(y_BLHV, reverse), final_BHKV


def _check_decay(op: str, log_decay: jax.Array, axes: str, shape: tuple[int, ...]) -> None:
    check_array(op, "log_decay", log_decay, axes, shape)
    if isinstance(log_decay, Tracer) or not log_decay.size:
        return
    with jax.ensure_compile_time_eval():  # a constant may be given inside of a jit
        largest = float(log_decay.max())
    if largest > 0:
        raise ValueError(f"{op}: log_decay has a positive entry, {largest}, expected none above 0")


def _widest(*arrays: jax.Array | None) -> jnp.dtype:
    return jnp.result_type(jnp.float32, *(array for array in arrays if array is not None))


def _with_ones(v_BLGV: jax.Array) -> jax.Array:
    return jnp.concatenate([v_BLGV, jnp.ones_like(v_BLGV[..., :1])], axis=-1)


def _divide(y_BLHV: jax.Array) -> jax.Array:
    return y_BLHV[..., :-1] / jnp.maximum(y_BLHV[..., -1:], _FLOOR)

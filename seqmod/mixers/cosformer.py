"""cosFormer: linear attention with a cosine that favours near steps (Qin et al., arXiv 2202.08791, eq. 10).

    m_ts = relu(q_t).relu(k_s) cos(pi (t - s) / (2 M)),    y_t = sum_s m_ts v_s / max(sum_s m_ts, 1e-6)

The cosine of a difference is a product of features, x sin(pi t / (2 M)) and x cos(pi t / (2 M)), so sums over s are
taken once. A query without a positive entry reads zeros.

M is the `horizon` of the config, not the length of the sequence as in the paper: then a prefix gives the same outputs
whatever follows it, and the mixer can be causal and take steps. Steps further apart than M would have negative weights,
so longer sequences are refused. Times count from the start of a segment; in cross attention, of the context and of
the queries.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels import bidirectional_linear_attention, linear_attention, linear_attention_step
from seqmod.mixers import heads
from seqmod.mixers.base import Context, Linear, Mixer, Params, Pattern, check_causal, same_segment

_PATTERNS: frozenset[Pattern] = frozenset({"causal self", "noncausal self", "causal cross", "noncausal cross"})


@dataclass(frozen=True)
class CosFormerConfig:
    """`width` D in and out, H `heads`, sequences of at most `horizon` steps."""

    width: int = 64
    heads: int = 4
    horizon: int = 128
    causal: bool = True
    init_scale: float = 1.0

    def __post_init__(self) -> None:
        heads.check_sizes("CosFormerConfig", self.width, self.heads, horizon=self.horizon)


class CosFormerState(NamedTuple):
    """Sums (B, H, 2 K, K + 1) of features of keys times (v, 1), and the number of steps taken."""

    sums_BHFK: jax.Array
    time: jax.Array


def init(key: jax.Array, config: CosFormerConfig) -> Params:
    """Parameters: `qkv` (D, 3, H, K), `out` (H, K, D)."""
    return heads.init(key, config.width, config.heads, config.init_scale)


def _check_length(config: CosFormerConfig, length: int) -> None:
    if length > config.horizon:
        raise ValueError(
            f"cosformer: a sequence has {length} steps, more than the horizon {config.horizon}: "
            "steps further apart would have negative weights"
        )


def features(x: jax.Array, time: jax.Array, horizon: int) -> jax.Array:
    """Features (..., H, 2 K) of queries or keys (..., H, K) at times (...), in float32 at least."""
    x = jax.nn.relu(heads.wide(x))
    angle = (jnp.pi / 2 / horizon * time.astype(x.dtype))[..., None, None]
    return jnp.concatenate([x * jnp.cos(angle), x * jnp.sin(angle)], axis=-1)


def apply(
    params: Params,
    config: CosFormerConfig,
    x_BLD: jax.Array,
    segments_BL: jax.Array | None = None,
    context: Context | None = None,
) -> jax.Array:
    """Parallel form, (B, L, D) to (B, L, D). Raises ValueError for a sequence longer than the horizon.

    A row of several segments may be longer, as long as none of them is; this is not checked.
    """
    if segments_BL is None:
        _check_length(config, x_BLD.shape[1])
    q_BLHK, k_BLHK, v_BLHK = heads.split(params, x_BLD, None if context is None else context.x_BMD)
    times_BL = heads.positions(x_BLD, segments_BL)
    q_BLHF = features(q_BLHK, times_BL, config.horizon)
    if context is not None:
        if context.segments_BM is None:
            _check_length(config, context.x_BMD.shape[1])
        times_BM = heads.positions(context.x_BMD, context.segments_BM)
        k_BMHF = features(k_BLHK, times_BM, config.horizon)
        joined = heads.join_context(segments_BL, context)
        q_BNHF = joined.join(jnp.zeros_like(k_BMHF), q_BLHF)
        k_BNHF = joined.join(k_BMHF, jnp.zeros_like(q_BLHF))
        v_BNHK = joined.join(v_BLHK, jnp.zeros_like(q_BLHK))
        y_BNHK, _ = linear_attention(q_BNHF, k_BNHF, v_BNHK, segment_ids=joined.ids_BN, normalise=True)
        y_BLHK = joined.queries(y_BNHK)
    else:
        k_BLHF = features(k_BLHK, times_BL, config.horizon)
        if config.causal:
            y_BLHK, _ = linear_attention(q_BLHF, k_BLHF, v_BLHK, segment_ids=segments_BL, normalise=True)
        else:
            y_BLHK = bidirectional_linear_attention(q_BLHF, k_BLHF, v_BLHK, segment_ids=segments_BL, normalise=True)
    return heads.read_out(params, config, x_BLD, y_BLHK)


def init_state(config: CosFormerConfig, batch: int, length: int) -> CosFormerState:
    """Nothing read yet. Raises ValueError for sequences longer than the horizon."""
    _check_length(config, length)
    K = config.width // config.heads
    return CosFormerState(jnp.zeros((batch, config.heads, 2 * K, K + 1)), jnp.zeros((), jnp.int32))


def step(
    params: Params, config: CosFormerConfig, x_BD: jax.Array, state: CosFormerState
) -> tuple[jax.Array, CosFormerState]:
    """One step, (B, D) to (B, D)."""
    q_BHK, k_BHK, v_BHK = heads.split(params, x_BD)
    time_B = jnp.broadcast_to(state.time, x_BD.shape[:1])
    q_BHF, k_BHF = (features(x_BHK, time_B, config.horizon) for x_BHK in (q_BHK, k_BHK))
    y_BHK, sums_BHFK = linear_attention_step(state.sums_BHFK, q_BHF, k_BHF, v_BHK, normalise=True)
    return heads.read_out(params, config, x_BD, y_BHK), CosFormerState(sums_BHFK, state.time + 1)


def matrix(
    params: Params, config: CosFormerConfig, x_BLD: jax.Array, segments_BL: jax.Array | None = None
) -> jax.Array:
    """m over its row sums, (B, H, L, L), from the cosines of differences."""
    L = x_BLD.shape[1]
    q_BLHK, k_BLHK, _ = (jax.nn.relu(heads.wide(x)) for x in heads.split(params, x_BLD))
    lag_LM = jnp.arange(L)[:, None] - jnp.arange(L)[None]
    visible_BLM = (lag_LM >= 0)[None] if config.causal else jnp.ones((1, L, L), bool)
    if segments_BL is not None:
        visible_BLM = visible_BLM & same_segment(segments_BL)
    near_LM = jnp.cos(jnp.pi / 2 / config.horizon * lag_LM)
    m_BHLM = jnp.einsum("BLHK,BMHK->BHLM", q_BLHK, k_BLHK) * near_LM[None, None]
    m_BHLM = jnp.where(visible_BLM[:, None], m_BHLM, 0)
    return m_BHLM / jnp.maximum(m_BHLM.sum(-1, keepdims=True), 1e-6)


def default_config(
    width: int, heads: int, init_scale: float = 1.0, context: int = 128, causal: bool = True
) -> CosFormerConfig:
    """The context as horizon."""
    check_causal("cosformer", causal, _PATTERNS)
    return CosFormerConfig(width=width, heads=heads, horizon=context, causal=causal, init_scale=init_scale)


MIXER = Mixer(
    CosFormerConfig,
    default_config,
    init,
    apply,
    init_state,
    step,
    linear=Linear(heads.values, matrix, heads.read_out),
    patterns=_PATTERNS,
)

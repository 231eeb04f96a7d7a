"""Performer: softmax attention in expectation, by positive random features (Choromanski et al., arXiv 2009.14794).

    phi_c(x) = exp(w_c.x / K^(1/4) - |x|^2 / (2 sqrt(K)))        E_w[phi(q) phi(k)] = exp(q.k / sqrt(K))
    y_t = sum_s sum_c phi_c(q_t) phi_c(k_s) v_s / sum_s sum_c phi_c(q_t) phi_c(k_s)

The directions w are Gaussian, orthogonal in blocks of K, and the same for all heads; `resample` draws new ones, as the
authors do every so many training steps.

Sums of phi_c(k_s) are kept over their largest term so far, per channel c: a running maximum with rescaled sums. Every
exponent is then at most 0 and the divisor at least 1, so there is neither the 1e-4 that the authors add to phi nor a
floor. A maximum over all keys, with that 1e-4, lets the future into a causal output. Cross attention runs over the
context and then the queries.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels import bidirectional_linear_attention, linear_attention, linear_attention_step
from seqmod.mixers import heads
from seqmod.mixers.base import Context, Linear, Mixer, Params, Pattern, check_causal, same_segment, segment_runs

_PATTERNS: frozenset[Pattern] = frozenset({"causal self", "noncausal self", "causal cross", "noncausal cross"})


@dataclass(frozen=True)
class PerformerConfig:
    """`width` D in and out, H `heads`, C `features`."""

    width: int = 64
    heads: int = 4
    features: int = 16
    causal: bool = True
    init_scale: float = 1.0

    def __post_init__(self) -> None:
        heads.check_sizes("PerformerConfig", self.width, self.heads, features=self.features)


class PerformerState(NamedTuple):
    """Largest log features of keys (B, H, C), and sums (B, H, C, K + 1) of features over them times (v, 1)."""

    peak_BHC: jax.Array
    sums_BHCK: jax.Array


def init(key: jax.Array, config: PerformerConfig) -> Params:
    """Parameters: `qkv` (D, 3, H, K), `out` (H, K, D); fixed: `features` (C, K)."""
    k_heads, k_features = jax.random.split(key)
    params = heads.init(k_heads, config.width, config.heads, config.init_scale)
    return resample(k_features, params, config)


def resample(key: jax.Array, params: Params, config: PerformerConfig) -> Params:
    """Parameters with new random features: rows of random rotations, as long as Gaussian vectors are."""
    k_rotation, k_length = jax.random.split(key)
    C, K = config.features, config.width // config.heads
    blocks = -(-C // K)
    rotation_XKK, triangle_XKK = jnp.linalg.qr(jax.random.normal(k_rotation, (blocks, K, K)))
    # With the diagonal of R positive the rotations are uniform.
    signs_XK = jnp.where(jnp.diagonal(triangle_XKK, axis1=-2, axis2=-1) < 0, -1.0, 1.0)
    rows_CK = (rotation_XKK * signs_XK[:, None]).reshape(blocks * K, K)[:C]
    length_C1 = jnp.linalg.norm(jax.random.normal(k_length, (C, K)), axis=-1, keepdims=True)
    return params | {"fixed": {"features": rows_CK * length_C1}}


def log_features(params: Params, x: jax.Array) -> jax.Array:
    """log phi (..., H, C) of queries or keys (..., H, K)."""
    features_CK = jax.lax.stop_gradient(params["fixed"]["features"])
    x = heads.wide(x) * x.shape[-1] ** -0.25
    return jnp.einsum("...HK,CK->...HC", x, features_CK) - (x**2).sum(-1, keepdims=True) / 2


def running_peak(log_BLHC: jax.Array, segments_BL: jax.Array | None, *, reverse: bool = False) -> jax.Array:
    """The largest of each channel so far, in a step's own segment; a constant to gradients."""
    log_BLHC = jax.lax.stop_gradient(log_BLHC)
    if segments_BL is None:
        return jax.lax.cummax(log_BLHC, axis=1, reverse=reverse)

    def later(one: tuple[jax.Array, jax.Array], two: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return two[0], jnp.where(one[0] == two[0], jnp.maximum(one[1], two[1]), two[1])

    runs_BL11 = segment_runs(segments_BL)[..., None, None]
    return jax.lax.associative_scan(later, (runs_BL11, log_BLHC), axis=1, reverse=reverse)[1]


def _query_features(log_q: jax.Array, peak: jax.Array) -> jax.Array:
    """Features of queries that go with those of keys over their peak; what all channels share falls out."""
    logits = log_q + peak
    return jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))


def _read_past(
    log_q_BLHC: jax.Array, log_k_BLHC: jax.Array, v_BLHK: jax.Array, segments_BL: jax.Array | None
) -> jax.Array:
    peak_BLHC = running_peak(log_k_BLHC, segments_BL)
    before_BLHC = jnp.concatenate([peak_BLHC[:, :1], peak_BLHC[:, :-1]], axis=1)
    # Where a segment starts there is nothing to rescale, and the maximum may fall.
    log_decay_BLHC = jnp.minimum(before_BLHC - peak_BLHC, 0)
    q_BLHC, k_BLHC = _query_features(log_q_BLHC, peak_BLHC), jnp.exp(log_k_BLHC - peak_BLHC)
    return linear_attention(q_BLHC, k_BLHC, v_BLHK, log_decay_BLHC, segment_ids=segments_BL, normalise=True)[0]


def apply(
    params: Params,
    config: PerformerConfig,
    x_BLD: jax.Array,
    segments_BL: jax.Array | None = None,
    context: Context | None = None,
) -> jax.Array:
    """Parallel form, (B, L, D) to (B, L, D)."""
    q_BLHK, k_BLHK, v_BLHK = heads.split(params, x_BLD, None if context is None else context.x_BMD)
    log_q_BLHC, log_k_BLHC = log_features(params, q_BLHK), log_features(params, k_BLHK)
    if context is not None:
        joined = heads.join_context(segments_BL, context)
        log_q_BNHC = joined.join(jnp.zeros_like(log_k_BLHC), log_q_BLHC)
        log_k_BNHC = joined.join(log_k_BLHC, jnp.full_like(log_q_BLHC, -1e30))
        v_BNHK = joined.join(v_BLHK, jnp.zeros_like(q_BLHK))
        y_BLHK = joined.queries(_read_past(log_q_BNHC, log_k_BNHC, v_BNHK, joined.ids_BN))
    elif config.causal:
        y_BLHK = _read_past(log_q_BLHC, log_k_BLHC, v_BLHK, segments_BL)
    else:
        ahead_BLHC, back_BLHC = (running_peak(log_k_BLHC, segments_BL, reverse=reverse) for reverse in (False, True))
        peak_BLHC = jnp.maximum(ahead_BLHC, back_BLHC)
        q_BLHC, k_BLHC = _query_features(log_q_BLHC, peak_BLHC), jnp.exp(log_k_BLHC - peak_BLHC)
        y_BLHK = bidirectional_linear_attention(q_BLHC, k_BLHC, v_BLHK, segment_ids=segments_BL, normalise=True)
    return heads.read_out(params, config, x_BLD, y_BLHK)


def init_state(config: PerformerConfig, batch: int, length: int) -> PerformerState:
    """Nothing read yet; `length` is not needed, since the state has a fixed size."""
    H, C, K = config.heads, config.features, config.width // config.heads
    return PerformerState(jnp.full((batch, H, C), -1e30), jnp.zeros((batch, H, C, K + 1)))


def step(
    params: Params, config: PerformerConfig, x_BD: jax.Array, state: PerformerState
) -> tuple[jax.Array, PerformerState]:
    """One step, (B, D) to (B, D)."""
    q_BHK, k_BHK, v_BHK = heads.split(params, x_BD)
    log_q_BHC, log_k_BHC = log_features(params, q_BHK), log_features(params, k_BHK)
    peak_BHC = jnp.maximum(state.peak_BHC, jax.lax.stop_gradient(log_k_BHC))
    q_BHC, k_BHC = _query_features(log_q_BHC, peak_BHC), jnp.exp(log_k_BHC - peak_BHC)
    y_BHK, sums_BHCK = linear_attention_step(
        state.sums_BHCK, q_BHC, k_BHC, v_BHK, state.peak_BHC - peak_BHC, normalise=True
    )
    return heads.read_out(params, config, x_BD, y_BHK), PerformerState(peak_BHC, sums_BHCK)


def matrix(
    params: Params, config: PerformerConfig, x_BLD: jax.Array, segments_BL: jax.Array | None = None
) -> jax.Array:
    """The normalised products of features (B, H, L, L), formed pair by pair as logarithms."""
    L = x_BLD.shape[1]
    q_BLHK, k_BLHK, _ = heads.split(params, x_BLD)
    pairs_BLMHC = log_features(params, q_BLHK)[:, :, None] + log_features(params, k_BLHK)[:, None]
    log_BHLM = jnp.moveaxis(jax.nn.logsumexp(pairs_BLMHC, axis=-1), -1, 1)
    visible_BLM = jnp.tril(jnp.ones((L, L), bool))[None] if config.causal else jnp.ones((1, L, L), bool)
    if segments_BL is not None:
        visible_BLM = visible_BLM & same_segment(segments_BL)
    return jax.nn.softmax(heads.hide(log_BHLM, visible_BLM[:, None]), axis=-1)


def default_config(
    width: int, heads: int, init_scale: float = 1.0, context: int = 128, causal: bool = True
) -> PerformerConfig:
    """16 features, as Zhang et al. (arXiv 2210.07661) compare it; `context` has no meaning here."""
    check_causal("performer", causal, _PATTERNS)
    return PerformerConfig(width=width, heads=heads, causal=causal, init_scale=init_scale)


MIXER = Mixer(
    PerformerConfig,
    default_config,
    init,
    apply,
    init_state,
    step,
    linear=Linear(heads.values, matrix, heads.read_out),
    patterns=_PATTERNS,
)

"""ABC: attention with bounded memory, whose slots are written by softmax (Peng et al., arXiv 2110.02488, section 4).

    a_s = C x_s,    share_sc = exp(a_sc) / sum_s exp(a_sc)          over all steps, or those up to t if causal
    K_c = sum_s share_sc k_s,    V_c = sum_s share_sc v_s
    y_t = sum_c softmax_c(q_t.K_c / sqrt(K)) V_c

C maps the input to R slots per head and writes keys and values alike, as in the paper's ABC with an MLP; it starts
uniform as Glorot and Bengio have it, with gain 2^-1/2. If every step has a slot of its own, y is full attention.

In the causal form both sums run with t, over the largest exponent so far. The code of Zhang et al. (arXiv 2210.07661)
forgets to accumulate the numerator, so that each slot holds its current step alone. It also has one control for keys,
made of the keys, and another for values, made of the values; then y is no linear map of values.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels import linear_recurrence
from seqmod.mixers import heads
from seqmod.mixers.base import Context, Linear, Mixer, Params, Pattern, check_causal, project

_PATTERNS: frozenset[Pattern] = frozenset({"causal self", "noncausal self", "causal cross", "noncausal cross"})
_CHUNK = 32


@dataclass(frozen=True)
class ABCConfig:
    """`width` D in and out, H `heads`, R `slots` of memory a head."""

    width: int = 64
    heads: int = 4
    slots: int = 16
    causal: bool = True
    init_scale: float = 1.0

    def __post_init__(self) -> None:
        heads.check_sizes("ABCConfig", self.width, self.heads, slots=self.slots)


class ABCState(NamedTuple):
    """Largest exponents (B, H, R), and sums (B, H, R, 2 K + 1) of exponentials over them times (k, v, 1)."""

    peak_BHR: jax.Array
    sums_BHRF: jax.Array


def init(key: jax.Array, config: ABCConfig) -> Params:
    """Parameters: `qkv` (D, 3, H, K), `out` (H, K, D), `control` (D, H, R)."""
    k_heads, k_control = jax.random.split(key)
    D, H, R = config.width, config.heads, config.slots
    bound = (3 / (D + R)) ** 0.5
    return heads.init(k_heads, D, H, config.init_scale) | {
        "control": jax.random.uniform(k_control, (D, H, R), minval=-bound, maxval=bound)
    }


def _control(params: Params, x: jax.Array) -> jax.Array:
    """Exponents (..., H, R) of inputs (..., D)."""
    return heads.wide(project("...D,DHR->...HR", x, params["control"]))


def _read(q: jax.Array, memory_k: jax.Array, memory_v: jax.Array) -> jax.Array:
    """What queries (..., H, K) read of memories (..., H, R, K)."""
    scores = jnp.einsum("...HK,...HRK->...HR", q, memory_k) * q.shape[-1] ** -0.5
    return jnp.einsum("...HR,...HRK->...HK", jax.nn.softmax(scores, axis=-1), memory_v)


def _read_sums(q: jax.Array, sums: jax.Array) -> jax.Array:
    """What queries read of running sums (..., H, R, 2 K + 1); the last column is 1 at least where there is a step."""
    memory_k, memory_v = jnp.split(sums[..., :-1] / jnp.maximum(sums[..., -1:], 1), 2, axis=-1)
    return _read(q, memory_k, memory_v)


def _with_ones(k: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.concatenate([k, v, jnp.ones_like(v[..., :1])], axis=-1)


def _read_past(
    a_BLHR: jax.Array, q_BLHK: jax.Array, k_BLHK: jax.Array, v_BLHK: jax.Array, mask_BL: jax.Array
) -> jax.Array:
    """Running memories, chunk by chunk: only those of one chunk are in memory at a time, also for gradients."""
    L = a_BLHR.shape[1]
    a_BLHR = heads.hide(a_BLHR, mask_BL[..., None, None])
    peak_BLHR = jax.lax.cummax(jax.lax.stop_gradient(a_BLHR), axis=1)
    weight_BLHR = jnp.where(mask_BL[..., None, None], jnp.exp(a_BLHR - peak_BLHR), 0)
    decay_BLHR = jnp.exp(jnp.concatenate([peak_BLHR[:, :1], peak_BLHR[:, :-1]], axis=1) - peak_BLHR)
    C = min(_CHUNK, L)

    def chunks(x_BL: jax.Array) -> jax.Array:
        x_BL = jnp.pad(x_BL, ((0, 0), (0, -L % C), *((0, 0),) * (x_BL.ndim - 2)))
        return jnp.moveaxis(x_BL.reshape(x_BL.shape[0], -1, C, *x_BL.shape[2:]), 1, 0)

    @jax.checkpoint
    def chunk(sums_BN: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        weight_BCHR, decay_BCHR, q_BCHK, kv_BCHF = inputs
        added_BCHRF = weight_BCHR[..., None] * kv_BCHF[..., None, :]
        flat = (*added_BCHRF.shape[:2], -1)
        decays_BCN = jnp.broadcast_to(decay_BCHR[..., None], added_BCHRF.shape).reshape(flat)
        sums_BCN, sums_BN = linear_recurrence(decays_BCN, added_BCHRF.reshape(flat), initial_state=sums_BN)
        return sums_BN, _read_sums(q_BCHK, sums_BCN.reshape(added_BCHRF.shape))

    kv_BLHF = _with_ones(k_BLHK, v_BLHK)
    B, _, H, R = a_BLHR.shape
    sums_BN = jnp.zeros((B, H * R * kv_BLHF.shape[-1]), kv_BLHF.dtype)
    _, y_XBCHK = jax.lax.scan(chunk, sums_BN, tuple(map(chunks, (weight_BLHR, decay_BLHR, q_BLHK, kv_BLHF))))
    return jnp.moveaxis(y_XBCHK, 0, 1).reshape(B, -1, *q_BLHK.shape[2:])[:, :L]


def apply(
    params: Params,
    config: ABCConfig,
    x_BLD: jax.Array,
    mask_BL: jax.Array | None = None,
    context: Context | None = None,
) -> jax.Array:
    """Parallel form, (B, L, D) to (B, L, D). The memory is of the context, if there is one."""
    source_BMD = x_BLD if context is None else context.x_BMD
    valid_BM = heads.as_mask(source_BMD, mask_BL if context is None else context.segments_BM)
    source_BMD = heads.blank(source_BMD, valid_BM)
    q_BLHK, k_BMHK, v_BMHK = heads.split(params, *((source_BMD,) if context is None else (x_BLD, source_BMD)))
    q_BLHK, k_BMHK, v_BMHK = map(heads.wide, (q_BLHK, k_BMHK, v_BMHK))
    a_BMHR = _control(params, source_BMD)
    if context is None and config.causal:
        y_BLHK = _read_past(a_BMHR, q_BLHK, k_BMHK, v_BMHK, valid_BM)
    else:
        share_BMHR = jax.nn.softmax(heads.hide(a_BMHR, valid_BM[..., None, None]), axis=1)
        memory_k, memory_v = (jnp.einsum("BMHR,BMHK->BHRK", share_BMHR, each) for each in (k_BMHK, v_BMHK))
        y_BLHK = _read(q_BLHK, memory_k[:, None], memory_v[:, None])
    return heads.read_out(params, config, x_BLD, y_BLHK)


def init_state(config: ABCConfig, batch: int, length: int) -> ABCState:
    """An empty memory; `length` is not needed, since the state has a fixed size."""
    H, R, K = config.heads, config.slots, config.width // config.heads
    return ABCState(jnp.full((batch, H, R), -1e30), jnp.zeros((batch, H, R, 2 * K + 1)))


def step(params: Params, config: ABCConfig, x_BD: jax.Array, state: ABCState) -> tuple[jax.Array, ABCState]:
    """One step, (B, D) to (B, D)."""
    q_BHK, k_BHK, v_BHK = map(heads.wide, heads.split(params, x_BD))
    a_BHR = _control(params, x_BD)
    peak_BHR = jnp.maximum(state.peak_BHR, jax.lax.stop_gradient(a_BHR))
    decay_BHR1, weight_BHR1 = (jnp.exp(each - peak_BHR)[..., None] for each in (state.peak_BHR, a_BHR))
    sums_BHRF = decay_BHR1 * state.sums_BHRF + weight_BHR1 * _with_ones(k_BHK, v_BHK)[:, :, None]
    return heads.read_out(params, config, x_BD, _read_sums(q_BHK, sums_BHRF)), ABCState(peak_BHR, sums_BHRF)


def matrix(params: Params, config: ABCConfig, x_BLD: jax.Array, mask_BL: jax.Array | None = None) -> jax.Array:
    """The weights of steps through all slots, (B, H, L, L), with the shares of every prefix written out."""
    L = x_BLD.shape[1]
    valid_BM = heads.as_mask(x_BLD, mask_BL)
    x_BLD = heads.blank(x_BLD, valid_BM)
    q_BLHK, k_BMHK, _ = map(heads.wide, heads.split(params, x_BLD))
    visible_BLM = valid_BM[:, None] & (jnp.tril(jnp.ones((L, L), bool))[None] if config.causal else True)
    logits_BLMHR = heads.hide(_control(params, x_BLD)[:, None], visible_BLM[..., None, None])
    share_BLMHR = jax.nn.softmax(logits_BLMHR, axis=2)
    memory_BLHRK = jnp.einsum("BLMHR,BMHK->BLHRK", share_BLMHR, k_BMHK)
    scores_BLHR = jnp.einsum("BLHK,BLHRK->BLHR", q_BLHK, memory_BLHRK) * q_BLHK.shape[-1] ** -0.5
    return jnp.einsum("BLHR,BLMHR->BHLM", jax.nn.softmax(scores_BLHR, axis=-1), share_BLMHR)


def default_config(
    width: int, heads: int, init_scale: float = 1.0, context: int = 128, causal: bool = True
) -> ABCConfig:
    """16 slots, as Zhang et al. compare it; `context` has no meaning here."""
    check_causal("abc", causal, _PATTERNS)
    return ABCConfig(width=width, heads=heads, causal=causal, init_scale=init_scale)


MIXER = Mixer(
    ABCConfig,
    default_config,
    init,
    apply,
    init_state,
    step,
    linear=Linear(heads.values, matrix, heads.read_out),
    patterns=_PATTERNS,
    packs=False,
)

"""Matrix mixers of other structures than attention, in one block (Hwang et al., arXiv 2407.09941).

    z, v, q, k = W_in x,   v = silu(conv v),   y = v + M v,   out = W_out (rmsnorm(y) * silu(z))

with a centred convolution of width 7. M is an L x L matrix per head. From positions i and j, and vectors q_i, k_j of d
numbers, which are tables of parameters (data independent, up to C = `context` steps) or projections of the input after
the convolution (data dependent, any length):

    dense         C^-1/2 W_ij                                              data independent only
    toeplitz      C^-1/2 / 2 (q_{i-j} if i >= j else k_{j-i})              one number a step
    dft           C^-1/2 cos(2 pi i j / C)                                 data independent only, without parameters
    vandermonde   (2 C d)^-1/2 sum_d cos(2 pi q_i j) + cos(2 pi k_j i)
                  (2 C d)^-1/2 sum_d cos(2 pi e q_i j) - cos(2 pi e k_j i), e = 1e-3, data dependent
    cauchy        (C d)^-1/2 sum_d 1 / (exp q_i + exp k_j + 1e-8 (+ 2 bias, data dependent))
    low_rank      (C d)^-1/2 q_i . k_j

Of data-dependent forms, toeplitz and low_rank have SiLU after the convolution of q and k, as v has. Positions count
from the start of a segment.

Deviations from the authors' code: the bias of the Cauchy form is exp of a parameter, so that no denominator is zero;
the Toeplitz product is exact, where the padding of their FFT moves it by a step; the data-independent Vandermonde form
sums values over j, where theirs does not mix. The other structures are `semiseparable` and `hydra`.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from kernels.linear_attention import bidirectional_linear_attention
from seqmod.mixers.base import (
    NONCAUSAL,
    Linear,
    Mixer,
    Params,
    check_causal,
    check_heads,
    project,
    rms_norm,
    same_segment,
    scaled_normal,
    segment_runs,
)
from seqmod.mixers.convolution import short_convolution

Structure = Literal["dense", "toeplitz", "dft", "vandermonde", "cauchy", "low_rank"]
_WITHOUT_DATA = ("dense", "dft")
_FREQUENCY = 1e-3
_FLOOR = 1e-8
# From this length on, a Toeplitz matrix is applied by FFT.
_FFT_LENGTH = 128


@dataclass(frozen=True)
class StructuredConfig:
    """`width` D in and out; H `heads` share `inner` channels; d = `key_dim` numbers of q and k per head.

    `context` is the number of steps that data-independent forms have parameters for, and C in the scale of all.
    """

    structure: Structure = "low_rank"
    data_dependent: bool = True
    width: int = 64
    inner: int = 128
    heads: int = 4
    key_dim: int = 16
    kernel: int = 7
    context: int = 128
    init_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.structure not in get_args(Structure):
            raise ValueError(
                f"StructuredConfig: structure is {self.structure!r}, expected one of {get_args(Structure)}"
            )
        if self.data_dependent and self.structure in _WITHOUT_DATA:
            raise ValueError(
                f"StructuredConfig: data_dependent is True, but {self.structure} has only a data-independent form"
            )
        if min(self.width, self.inner, self.key_dim, self.context) < 1:
            raise ValueError(f"StructuredConfig: sizes must be positive, got {self}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(
                f"StructuredConfig: kernel is {self.kernel}, expected an odd number of a centred convolution"
            )
        check_heads("StructuredConfig", self.inner, self.heads)

    @property
    def numbers(self) -> int:
        """Numbers in q, and in k, per step and head."""
        if self.structure in _WITHOUT_DATA:
            return 0
        return 1 if self.structure == "toeplitz" else self.key_dim

    @property
    def convolved(self) -> int:
        """Channels of the convolution."""
        return self.inner + (2 * self.heads * self.numbers if self.data_dependent else 0)


def init(key: jax.Array, config: StructuredConfig) -> Params:
    """Parameters: `input` (D, inner + convolved), `conv`, `conv_bias`, `norm` (inner,), `out` (inner, D).

    Data-independent forms have `q` and `k` (C, H, d), or `matrix` (H, C, C), initialised as in the authors' code; the
    data-dependent Cauchy form has `log_bias`, of bias 1/2.
    """
    k_in, k_conv, k_out, k_q, k_k = jax.random.split(key, 5)
    D, E, H, C, W, N = config.width, config.inner, config.heads, config.context, config.kernel, config.convolved
    params = {
        "input": scaled_normal(k_in, (D, E + N), D, config.init_scale),
        "conv": scaled_normal(k_conv, (W, N), W, config.init_scale),
        "conv_bias": jnp.zeros(N),
        "norm": jnp.ones(E),
        "out": scaled_normal(k_out, (E, D), E, config.init_scale),
    }
    shape = (C, H, config.numbers)
    if config.structure == "dense":
        params["matrix"] = (2 / (C * (C + H))) ** 0.5 * jax.random.normal(k_q, (H, C, C))
    elif config.data_dependent:
        if config.structure == "cauchy":
            params["log_bias"] = jnp.log(0.5)
    elif config.structure == "toeplitz":
        limit = (6 / (H + 2 * C - 1)) ** 0.5
        params["q"], params["k"] = (jax.random.uniform(k, shape, minval=-limit, maxval=limit) for k in (k_q, k_k))
    elif config.structure == "vandermonde":
        params["q"], params["k"] = jnp.zeros(shape), jnp.zeros(shape)
    elif config.structure != "dft":
        deviation = (2 / ((H + C) * config.numbers)) ** 0.5
        params["q"], params["k"] = (deviation * jax.random.normal(k, shape) for k in (k_q, k_k))
    return params


def _positions(segments: jax.Array | None, L: int) -> jax.Array:
    """Position (B, L) of each step in its segment; (1, L) without segments."""
    index_1L = jnp.arange(L)[None]
    if segments is None:
        return index_1L
    runs_BL = segment_runs(segments)
    starts_BL = jnp.pad(runs_BL[:, 1:] != runs_BL[:, :-1], ((0, 0), (1, 0)))
    return index_1L - jax.lax.cummax(jnp.where(starts_BL, index_1L, 0), axis=1)


def _convolved(params: Params, config: StructuredConfig, x_BLD: jax.Array, segments) -> jax.Array:
    u_BLN = project("BLD,DN->BLN", x_BLD, params["input"][:, config.inner :])
    return short_convolution(u_BLN, params["conv"], params["conv_bias"], segments, causal=False)


def _values(config: StructuredConfig, u_BLN: jax.Array) -> jax.Array:
    v_BLE = jax.nn.silu(u_BLN[..., : config.inner])
    return v_BLE.reshape(*v_BLE.shape[:2], config.heads, -1)


def _generators(params, config: StructuredConfig, u_BLN: jax.Array, position_BL) -> tuple[jax.Array, jax.Array]:
    """q and k (B, L, H, d) in float32, or (1, L, H, d) if they are the same in every row."""
    if not config.data_dependent:
        return params["q"][position_BL], params["k"][position_BL]
    qk_BLN = u_BLN[..., config.inner :].astype(jnp.float32)
    if config.structure in ("toeplitz", "low_rank"):
        qk_BLN = jax.nn.silu(qk_BLN)
    q_BLN, k_BLN = jnp.split(qk_BLN, 2, axis=-1)
    shape = (*u_BLN.shape[:2], config.heads, config.numbers)
    return q_BLN.reshape(shape), k_BLN.reshape(shape)


def _toeplitz(params, config: StructuredConfig, q_BLHK, k_BLHK, position_BL) -> jax.Array:
    L = q_BLHK.shape[1]
    start_BL = jnp.arange(L)[None] - position_BL
    lag_BLL = position_BL[:, :, None] - position_BL[:, None]
    # A step of another segment has no lag; it is masked later.
    index_BLL = jnp.clip(start_BL[:, :, None] + jnp.abs(lag_BLL), 0, L - 1)
    index_BLL = jnp.broadcast_to(index_BLL, (q_BLHK.shape[0], L, L))
    pick = jax.vmap(lambda taps_LH, index_LL: taps_LH[index_LL])
    m_BLLH = jnp.where((lag_BLL >= 0)[..., None], pick(q_BLHK[..., 0], index_BLL), pick(k_BLHK[..., 0], index_BLL))
    return jnp.moveaxis(m_BLLH, -1, 1)


def _vandermonde(params, config: StructuredConfig, q_BLHK, k_BLHK, position_BL) -> jax.Array:
    frequency, sign = (_FREQUENCY, -1) if config.data_dependent else (1.0, 1)
    q_BHLK, k_BHLK = (jnp.swapaxes(2 * jnp.pi * frequency * each, 1, 2) for each in (q_BLHK, k_BLHK))
    position_BL = position_BL.astype(jnp.float32)
    rows_BHLL = jnp.cos(q_BHLK[:, :, :, None] * position_BL[:, None, None, :, None]).sum(-1)
    return rows_BHLL + sign * jnp.cos(k_BHLK[:, :, None] * position_BL[:, None, :, None, None]).sum(-1)


def _cauchy(params, config: StructuredConfig, q_BLHK, k_BLHK, position_BL) -> jax.Array:
    shift = _FLOOR + (2 * jnp.exp(params["log_bias"]) if config.data_dependent else 0.0)
    # Where exp would come near the end of float32, the fraction is zero to all its digits.
    q_KBHL, k_KBHL = (jnp.einsum("BLHK->KBHL", jnp.exp(jnp.minimum(each, 80.0))) for each in (q_BLHK, k_BLHK))
    # One by one: the gradient of a sum over all d would hold L x L x d numbers.
    fraction = jax.checkpoint(lambda q_BHL, k_BHL: 1 / (q_BHL[..., None] + k_BHL[:, :, None] + shift))
    m_BHLL = fraction(q_KBHL[0], k_KBHL[0])
    return jax.lax.scan(lambda m, qk: (m + fraction(*qk), None), m_BHLL, (q_KBHL[1:], k_KBHL[1:]))[0]


def _low_rank(params, config: StructuredConfig, q_BLHK, k_BLHK, position_BL) -> jax.Array:
    return jnp.einsum("BLHK,BMHK->BHLM", q_BLHK, k_BLHK)


_FORMS = {"toeplitz": _toeplitz, "vandermonde": _vandermonde, "cauchy": _cauchy, "low_rank": _low_rank}


def _structure(params: Params, config: StructuredConfig, u_BLN: jax.Array, segments) -> jax.Array:
    """M (B, H, L, L) in float32, or (1, H, L, L) if it is the same in every row."""
    position_BL = _positions(segments, u_BLN.shape[1])
    if config.structure == "dense":
        m_BHLL = params["matrix"][:, position_BL[:, :, None], position_BL[:, None]].swapaxes(0, 1)
    elif config.structure == "dft":
        # The product modulo C keeps the angle exact.
        turns_BLL = (position_BL[:, :, None] * position_BL[:, None]) % config.context / config.context
        m_BHLL = jnp.repeat(jnp.cos(2 * jnp.pi * turns_BLL)[:, None], config.heads, axis=1)
    else:
        # Without the checkpoint, the backward pass would keep L x L x d numbers.
        form = jax.checkpoint(_FORMS[config.structure], static_argnums=1)
        m_BHLL = form(params, config, *_generators(params, config, u_BLN, position_BL), position_BL)
    m_BHLL = _scale(config) * m_BHLL
    return m_BHLL if segments is None else jnp.where(same_segment(segments)[:, None], m_BHLL, 0)


def _scale(config: StructuredConfig) -> float:
    if config.structure == "toeplitz":
        return 0.5 * config.context**-0.5
    share = {"dense": 1, "dft": 1, "vandermonde": 2 * config.key_dim}.get(config.structure, config.key_dim)
    return (share * config.context) ** -0.5


def _convolve(q_BLH: jax.Array, k_BLH: jax.Array, v_BLHV: jax.Array) -> jax.Array:
    """The product with a Toeplitz matrix, by FFT over twice the length, so that nothing wraps around."""
    L = v_BLHV.shape[1]
    taps_BLH = jnp.concatenate([q_BLH, jnp.zeros_like(q_BLH[:, :1]), jnp.flip(k_BLH[:, 1:], 1)], axis=1)
    spectrum = jnp.fft.rfft(taps_BLH, axis=1)[..., None] * jnp.fft.rfft(v_BLHV, n=2 * L, axis=1)
    return jnp.fft.irfft(spectrum, n=2 * L, axis=1)[:, :L]


def _mix(params: Params, config: StructuredConfig, u_BLN: jax.Array, v_BLHV: jax.Array, segments) -> jax.Array:
    """M v in float32, by the shortest way that the structure has."""
    L = v_BLHV.shape[1]
    v_BLHV = v_BLHV.astype(jnp.float32)
    if config.structure == "low_rank":
        pair = _generators(params, config, u_BLN, _positions(segments, L))
        q_BLHK, k_BLHK = (jnp.broadcast_to(each, (*v_BLHV.shape[:3], config.key_dim)) for each in pair)
        if segments is None:
            return _scale(config) * jnp.einsum("BLHK,BHKV->BLHV", q_BLHK, jnp.einsum("BLHK,BLHV->BHKV", k_BLHK, v_BLHV))
        return bidirectional_linear_attention(q_BLHK, k_BLHK, v_BLHV, segment_ids=segments, scale=_scale(config))
    if config.structure == "toeplitz" and segments is None and L >= _FFT_LENGTH:
        q_BLHK, k_BLHK = _generators(params, config, u_BLN, _positions(None, L))
        return _scale(config) * _convolve(q_BLHK[..., 0], k_BLHK[..., 0], v_BLHV)
    m_BHLL = _structure(params, config, u_BLN, segments)
    if m_BHLL.shape[0] == 1:
        return jnp.einsum("HLM,BMHV->BLHV", m_BHLL[0], v_BLHV)
    return jnp.einsum("BHLM,BMHV->BLHV", m_BHLL, v_BLHV)


def _check_length(config: StructuredConfig, L: int) -> None:
    if not config.data_dependent and config.context < L:
        raise ValueError(
            f"{config.structure}: the sequence has {L} steps, expected at most context {config.context}, "
            "for which this data-independent form has parameters"
        )


def apply(params: Params, config: StructuredConfig, x_BLD: jax.Array, segments: jax.Array | None = None) -> jax.Array:
    """Parallel form, (B, L, D) to (B, L, D). Raises ValueError for more steps than a data-independent form has."""
    _check_length(config, x_BLD.shape[1])
    u_BLN = _convolved(params, config, x_BLD, segments)
    v_BLHV = _values(config, u_BLN)
    return read_out(params, config, x_BLD, v_BLHV + _mix(params, config, u_BLN, v_BLHV, segments))


def values(params: Params, config: StructuredConfig, x_BLD: jax.Array, segments: jax.Array | None = None) -> jax.Array:
    """v (B, L, H, V)."""
    return _values(config, _convolved(params, config, x_BLD, segments))


def matrix(params: Params, config: StructuredConfig, x_BLD: jax.Array, segments: jax.Array | None = None) -> jax.Array:
    """I + M (B, H, L, L)."""
    B, L = x_BLD.shape[:2]
    _check_length(config, L)
    m_BHLL = _structure(params, config, _convolved(params, config, x_BLD, segments), segments)
    return jnp.broadcast_to(m_BHLL + jnp.eye(L)[None, None], (B, config.heads, L, L))


def read_out(params: Params, config: StructuredConfig, x_BLD: jax.Array, y_BLHV: jax.Array) -> jax.Array:
    """The norm, then the gate, then the linear map out."""
    z_BLE = project("BLD,DE->BLE", x_BLD, params["input"][:, : config.inner])
    y_BLE = rms_norm(params["norm"], y_BLHV.reshape(z_BLE.shape), 1e-5).astype(x_BLD.dtype)
    return project("BLE,ED->BLD", y_BLE * jax.nn.silu(z_BLE), params["out"])


def default_config(
    width: int,
    heads: int,
    init_scale: float = 1.0,
    context: int = 128,
    causal: bool = True,
    *,
    structure: Structure,
    data_dependent: bool | None = None,
) -> StructuredConfig:
    """Twice the width inside; data dependent where the structure has such a form."""
    check_causal(structure, causal, NONCAUSAL)
    if data_dependent is None:
        data_dependent = structure not in _WITHOUT_DATA
    return StructuredConfig(structure, data_dependent, width, 2 * width, heads, context=context, init_scale=init_scale)


def _mixer(structure: Structure) -> Mixer:
    config = partial(default_config, structure=structure)
    linear = Linear(values, matrix, read_out)
    return Mixer(StructuredConfig, config, init, apply, linear=linear, patterns=NONCAUSAL)


DENSE = _mixer("dense")
TOEPLITZ = _mixer("toeplitz")
DFT = _mixer("dft")
VANDERMONDE = _mixer("vandermonde")
CAUCHY = _mixer("cauchy")
LOW_RANK = _mixer("low_rank")

"""The gated long convolution of Monarch Mixer, both ways or causal (Fu et al., arXiv 2310.12109).

    x1, x2, v = conv(W_in x),   u = x1 * v,   y = W_out (x2 * (k u + c u) + (k' x + c' x))

with a causal convolution of width 3, and filters k that a small MLP makes of the time. The second long convolution k',
of the input itself, is optional.

Both ways, as M2-BERT:  (k u)_t = sum_{s <= t} ahead_{t-s} u_s + sum_{s > t} back_{s-t-1} u_s. The reverse filter starts
at lag 1, so that a step counts itself once.

Causal, by evaluation and interpolation of polynomials:  k u = M^-1 (M k * M u), zeros behind k and u, the first half.
Column j1 b + j0 of M is the polynomial l_{j0}(Z) r_{j0, j1}(Z^b) at the N-th roots of unity, N = b^2; lowest powers are
j0 and j1, degrees at most b - 1 and, for the columns in use, b / 2 - 1. So M = F Q, with the Fourier matrix F and lower
triangular coefficients Q, and k u = Q^-1 (Q k conv Q u). Q is itself a real Monarch matrix, but for the order of its
outputs: Q[k b + m, j1 b + j0] = l_{j0}[m] r_{j0, j1}[k]. It is applied, and inverted, by its triangular blocks: that is
what is computed here, without complex numbers. Q = I is the causal long convolution.
The causal model of the paper has no published code; this construction has the paper's form of M, and one l for all i0.

Below 128 steps, of whole blocks, convolutions are products with a matrix, and causal to the last bit; above they use
FFTs, whose rounding lets less than 1e-6 of the largest value through. The step form keeps all inputs and runs the
parallel form on them, since Q^-1 T(Q k) Q has no low rank that a smaller state could use.
"""

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from seqmod.mixers.base import CAUSAL, NONCAUSAL, Linear, Mixer, Params, over_last, project, scaled_normal
from seqmod.mixers.convolution import short_convolution

_FFT_LENGTH = 128


@dataclass(frozen=True)
class MonarchConfig:
    """`width` D in and out, for sequences of up to `context` steps.

    Filters are MLPs of `filter_layers` layers of `filter_width` on `features` functions of the time, with sines of
    `frequency`; `second` adds the convolution of the input itself.
    """

    width: int = 64
    context: int = 128
    causal: bool = False
    kernel: int = 3
    features: int = 5
    filter_width: int = 128
    filter_layers: int = 3
    frequency: float = 10.0
    second: bool = True
    init_scale: float = 1.0

    def __post_init__(self) -> None:
        if min(self.width, self.context, self.kernel, self.filter_width, self.filter_layers) < 1:
            raise ValueError(f"MonarchConfig: sizes must be positive, got {self}")
        if self.features < 3 or self.features % 2 == 0:
            raise ValueError(
                f"MonarchConfig: features is {self.features}, expected an odd number from 3 up: time, sines, cosines"
            )

    @property
    def block(self) -> int:
        """b, even: b^2 is at least twice the context."""
        return 2 * math.ceil(math.sqrt(self.context / 2) - 1e-9)


class MonarchState(NamedTuple):
    """Inputs so far (B, L, D), and their number."""

    x_BLD: jax.Array
    time: jax.Array


def init(key: jax.Array, config: MonarchConfig) -> Params:
    """Parameters: `input` (D, 3 D), `conv` (kernel, 3 D), `out` (D, D), each with a bias; `filters`, for each long
    convolution a dict of filters `ahead` and, if not causal, `back`, and of the `direct` term c (D,).

    If causal, `low` (b, b) is l, and `high` (b, b / 2, b / 2) is r: coefficients below the diagonals, and logarithms of
    the leading ones on them. Both start near the identity.
    """
    k_in, k_conv, k_out, k_low, k_high, *k_filters = jax.random.split(key, 7)
    D, b, W, scale = config.width, config.block, config.kernel, config.init_scale
    params = {
        "input": scaled_normal(k_in, (D, 3 * D), D, scale),
        "input_bias": jnp.zeros(3 * D),
        "conv": scaled_normal(k_conv, (W, 3 * D), W, scale),
        "conv_bias": jnp.zeros(3 * D),
        "out": scaled_normal(k_out, (D, D), D, scale),
        "out_bias": jnp.zeros(D),
        "filters": [_init_filters(k, config) for k in k_filters[: 1 + config.second]],
    }
    if config.causal:
        params["low"] = 0.1 * b**-0.5 * jax.random.normal(k_low, (b, b))
        params["high"] = 0.1 * b**-0.5 * jax.random.normal(k_high, (b, b // 2, b // 2))
    return params


def _init_filters(key: jax.Array, config: MonarchConfig) -> Params:
    k_direct, *k_ways = jax.random.split(key, 3)
    ways = ("ahead",) if config.causal else ("ahead", "back")
    filters = {way: _init_filter(k, config) for way, k in zip(ways, k_ways, strict=False)}
    return {"direct": jax.random.normal(k_direct, (config.width,)), **filters}


def _init_filter(key: jax.Array, config: MonarchConfig) -> Params:
    sizes = (config.features, *(config.filter_width,) * config.filter_layers, config.width)
    layers = []
    for index, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        k_kernel, k_bias = jax.random.split(jax.random.fold_in(key, index))
        limit = fan_in**-0.5
        layers.append({"kernel": jax.random.uniform(k_kernel, (fan_in, fan_out), minval=-limit, maxval=limit)})
        if index < config.filter_layers:
            layers[-1]["bias"] = jax.random.uniform(k_bias, (fan_out,), minval=-limit, maxval=limit)
    return {"layers": layers, "frequency": jnp.full(config.filter_width, config.frequency)}


def _filter(params: Params, config: MonarchConfig, L: int) -> jax.Array:
    """A filter (L, D): sin(frequency * linear) layers of (t, cos f w, -sin f w), times exp(-t delta)."""
    t_L1 = jnp.arange(L)[:, None] / max(config.context - 1, 1)
    bands = (config.features - 1) // 2
    f_1F = jnp.linspace(1e-4, bands - 1, bands)[None] if bands > 1 else jnp.full((1, 1), 1e-4)
    angle_LF = f_1F * 2 * jnp.pi * jnp.arange(L)[:, None] / config.context
    h = jnp.concatenate([t_L1, jnp.cos(angle_LF), -jnp.sin(angle_LF)], axis=1)
    *hidden, last = params["layers"]
    for layer in hidden:
        h = jnp.sin(params["frequency"][None] * (h @ layer["kernel"] + layer["bias"][None]))
    delta_D = jnp.linspace(-math.log(0.01) / 1.5, -math.log(0.01) / 0.3, config.width)
    return (h @ last["kernel"]) * jnp.exp(-t_L1 * delta_D[None])


def _taps(filters: Params, config: MonarchConfig, L: int) -> jax.Array:
    """Weights (2 L - 1, D) of lags -(L - 1) .. L - 1."""
    ahead_LD = _filter(filters["ahead"], config, L)
    if config.causal:
        return jnp.pad(ahead_LD, ((L - 1, 0), (0, 0)))
    return jnp.concatenate([jnp.flip(_filter(filters["back"], config, L - 1), 0), ahead_LD])


def _toeplitz(taps_SD: jax.Array) -> jax.Array:
    L = (taps_SD.shape[0] + 1) // 2
    return taps_SD[jnp.arange(L)[:, None] - jnp.arange(L)[None] + L - 1]


def _convolve(taps_SD: jax.Array, u_BLD: jax.Array) -> jax.Array:
    L = u_BLD.shape[1]
    if L < _FFT_LENGTH:
        return jnp.einsum("TSD,BSD->BTD", _toeplitz(taps_SD), u_BLD)
    # Lag 0 first; twice the length holds all lags, so that nothing wraps around.
    ring_SD = jnp.roll(jnp.pad(taps_SD, ((0, 1), (0, 0))), -(L - 1), axis=0)
    spectrum = jnp.fft.rfft(ring_SD, axis=0)[None] * jnp.fft.rfft(u_BLD, n=2 * L, axis=1)
    return jnp.fft.irfft(spectrum, n=2 * L, axis=1)[:, :L]


def _triangular(raw: jax.Array) -> jax.Array:
    """Lower triangular, with the exponential of the diagonal on it."""
    return jnp.tril(raw, -1) + jnp.exp(jnp.where(jnp.eye(raw.shape[-1], dtype=bool), raw, -jnp.inf))


def _blocks(params: Params, config: MonarchConfig, L: int) -> tuple[jax.Array, jax.Array]:
    """Triangular blocks of Q for the first L steps, l as (b, b), and r as (b, J, J) with J the whole blocks of b."""
    raw = params["high"]
    J = -(-L // config.block)
    return _triangular(params["low"]), _triangular(raw[:, :J, :J])


def _causal_convolution(params: Params, config: MonarchConfig, taps_SD: jax.Array, u_BLD: jax.Array) -> jax.Array:
    """Q^-1 (Q k conv Q u)."""
    B, L, D = u_BLD.shape
    low_bb, high_bJJ = _blocks(params, config, L)
    b, J = low_bb.shape[0], high_bJJ.shape[1]

    def coefficients(u_BLD):
        u_BJbD = jnp.pad(u_BLD, ((0, 0), (0, J * b - L), (0, 0))).reshape(-1, J, b, D)
        return jnp.einsum("mj,jki,BijD->BkmD", low_bb, high_bJJ, u_BJbD).reshape(-1, J * b, D)

    k_LD = coefficients(taps_SD[None, L - 1 :])[0]
    y_BLD = _convolve(jnp.pad(k_LD, ((J * b - 1, 0), (0, 0))), coefficients(u_BLD))
    low_bb = jax.scipy.linalg.solve_triangular(low_bb, jnp.eye(b), lower=True)
    high_bJJ = jax.scipy.linalg.solve_triangular(high_bJJ, jnp.broadcast_to(jnp.eye(J), (b, J, J)), lower=True)
    y_BJbD = jnp.einsum("jik,jm,BkmD->BijD", high_bJJ, low_bb, y_BLD.reshape(B, J, b, D))
    return y_BJbD.reshape(B, J * b, D)[:, :L]


def _check_length(config: MonarchConfig, L: int) -> None:
    if config.context < L:
        raise ValueError(f"monarch: the sequence has {L} steps, expected at most context {config.context}")


def _valid_first(mask_BL: jax.Array | None, x_BLD: jax.Array) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """x with valid steps first and zeros behind, the mask in that order, and the place of each step in it."""
    if mask_BL is None:
        return x_BLD, None, None
    order_BL = jnp.argsort(~mask_BL, axis=1, stable=True)
    valid_BL = jnp.take_along_axis(mask_BL, order_BL, axis=1)
    x_BLD = jnp.take_along_axis(x_BLD, order_BL[..., None], axis=1)
    return jnp.where(valid_BL[..., None], x_BLD, 0), valid_BL, jnp.argsort(order_BL, axis=1)


def _inputs(params: Params, config: MonarchConfig, x_BLD: jax.Array, valid_BL) -> tuple[jax.Array, list[jax.Array]]:
    """The gate x2 and what is convolved, u and if it is used the input, in float32."""
    raw = project("BLD,DE->BLE", x_BLD, params["input"]) + over_last(params["input_bias"], 3).astype(x_BLD.dtype)
    first, gate, value = jnp.split(short_convolution(raw, params["conv"], params["conv_bias"]), 3, axis=-1)
    u_BLD = (first * value).astype(jnp.float32)
    if valid_BL is not None:
        u_BLD = jnp.where(valid_BL[..., None], u_BLD, 0)
    return gate, [u_BLD, x_BLD.astype(jnp.float32)][: 1 + config.second]


def apply(params: Params, config: MonarchConfig, x_BLD: jax.Array, mask_BL: jax.Array | None = None) -> jax.Array:
    """Parallel form, (B, L, D) to (B, L, D). Raises ValueError for more than `context` steps."""
    L = x_BLD.shape[1]
    _check_length(config, L)
    x_BLD, valid_BL, place_BL = _valid_first(mask_BL, x_BLD)
    gate_BLD, inputs = _inputs(params, config, x_BLD, valid_BL)
    y_BLD = jnp.zeros(())
    for index, (filters, u_BLD) in enumerate(zip(params["filters"], inputs, strict=True)):
        taps_SD = _taps(filters, config, L)
        mixed = _causal_convolution(params, config, taps_SD, u_BLD) if config.causal else _convolve(taps_SD, u_BLD)
        mixed = mixed + over_last(filters["direct"], 3) * u_BLD
        y_BLD = gate_BLD * mixed if index == 0 else y_BLD + mixed
    if place_BL is not None:
        y_BLD = jnp.take_along_axis(y_BLD, place_BL[..., None], axis=1)
    return read_out(params, config, x_BLD, y_BLD[..., None])


def init_state(config: MonarchConfig, batch: int, length: int) -> MonarchState:
    """No inputs so far. Raises ValueError for more than `context` steps."""
    _check_length(config, length)
    return MonarchState(jnp.zeros((batch, length, config.width)), jnp.zeros((), jnp.int32))


def step(params: Params, config: MonarchConfig, x_BD: jax.Array, state: MonarchState) -> tuple[jax.Array, MonarchState]:
    """One step, (B, D) to (B, D), at the cost of the parallel form over the length of the state."""
    row_B1D = x_BD[:, None].astype(state.x_BLD.dtype)
    x_BLD = jax.lax.dynamic_update_slice_in_dim(state.x_BLD, row_B1D, state.time, axis=1)
    y_BLD = apply(params, config, x_BLD.astype(x_BD.dtype))
    y_BD = jax.lax.dynamic_index_in_dim(y_BLD, state.time, axis=1, keepdims=False)
    return y_BD, MonarchState(x_BLD, state.time + 1)


def values(params: Params, config: MonarchConfig, x_BLD: jax.Array, mask_BL: jax.Array | None = None) -> jax.Array:
    """u, then if it is used the input (B, L, D or 2 D, 1): zeros at padding."""
    x_BLD, valid_BL, place_BL = _valid_first(mask_BL, x_BLD)
    v_BLH = jnp.concatenate(_inputs(params, config, x_BLD, valid_BL)[1], axis=-1)
    return (v_BLH if place_BL is None else jnp.take_along_axis(v_BLH, place_BL[..., None], axis=1))[..., None]


def matrix(params: Params, config: MonarchConfig, x_BLD: jax.Array, mask_BL: jax.Array | None = None) -> jax.Array:
    """x2 times the matrix of the first convolution, then that of the second (B, D or 2 D, L, L)."""
    L = x_BLD.shape[1]
    _check_length(config, L)
    x_BLD, valid_BL, place_BL = _valid_first(mask_BL, x_BLD)
    gate_BDL = jnp.swapaxes(_inputs(params, config, x_BLD, valid_BL)[0], 1, 2).astype(jnp.float32)
    matrices = []
    for index, filters in enumerate(params["filters"]):
        m_DLL = jnp.moveaxis(_toeplitz(_taps(filters, config, L)), -1, 0)
        if config.causal:
            q_LL = _coefficients(params, config, L)
            k_LD = q_LL @ _filter(filters["ahead"], config, L)
            m_DLL = jnp.moveaxis(_toeplitz(jnp.pad(k_LD, ((L - 1, 0), (0, 0)))), -1, 0) @ q_LL[None]
            m_DLL = jax.scipy.linalg.solve_triangular(jnp.broadcast_to(q_LL, m_DLL.shape), m_DLL, lower=True)
        m_DLL = m_DLL + filters["direct"][:, None, None] * jnp.eye(L)[None]
        share_BDL = gate_BDL if index == 0 else jnp.ones_like(gate_BDL)
        matrices.append(share_BDL[..., None] * m_DLL[None])
    m_BHLL = jnp.concatenate(matrices, axis=1)
    if valid_BL is None or place_BL is None:
        return m_BHLL
    m_BHLL = jnp.where(valid_BL[:, None, :, None] & valid_BL[:, None, None], m_BHLL, 0)
    m_BHLL = jnp.take_along_axis(m_BHLL, place_BL[:, None, :, None], axis=2)
    return jnp.take_along_axis(m_BHLL, place_BL[:, None, None], axis=3)


def _coefficients(params: Params, config: MonarchConfig, L: int) -> jax.Array:
    """Q (L, L), lower triangular: column j1 b + j0 has the coefficients of l_{j0}(Z) r_{j0, j1}(Z^b)."""
    low_bb, high_bJJ = _blocks(params, config, L)
    q_JbJb = jnp.einsum("mj,jki->kmij", low_bb, high_bJJ)
    return q_JbJb.reshape(q_JbJb.shape[0] * q_JbJb.shape[1], -1)[:L, :L]


def read_out(params: Params, config: MonarchConfig, x_BLD: jax.Array, y_BLH1: jax.Array) -> jax.Array:
    """The sum of both convolutions, then the linear map out."""
    y_BLD = y_BLH1.reshape(*x_BLD.shape[:2], -1, config.width).sum(2).astype(x_BLD.dtype)
    return project("BLD,DE->BLE", y_BLD, params["out"]) + over_last(params["out_bias"], 3).astype(x_BLD.dtype)


def default_config(
    width: int, heads: int, init_scale: float = 1.0, context: int = 128, causal: bool = True
) -> MonarchConfig:
    """The sizes of M2-BERT; `heads` has no meaning here."""
    return MonarchConfig(width=width, context=context, causal=causal, init_scale=init_scale)


MIXER = Mixer(
    MonarchConfig,
    default_config,
    init,
    apply,
    init_state,
    step,
    linear=Linear(values, matrix, read_out),
    patterns=CAUSAL | NONCAUSAL,
    packs=False,
)

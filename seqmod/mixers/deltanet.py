"""DeltaNet (Yang et al., arXiv 2406.06484): a state that is corrected towards each value.

    q, k, v = silu(conv(W x)),  q and k of unit length in each head
    b_t = sigmoid(W_b x_t), one per head, or twice that
    S_t = (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T
    y_t = K^{-1/2} S_t^T q_t
    out = W_out norm_h(y)

The convolutions are causal, of width 4 and without biases. The norm of each head is RMS with a gain that heads share.
Shares of up to 2 let the state flip a direction (Grazzi et al., arXiv 2411.12537). `gated_deltanet` shares what is
public here.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.delta_rule import delta_rule, delta_rule_step
from seqmod.mixers.base import (
    CAUSAL,
    Linear,
    Mixer,
    Params,
    check_causal,
    check_heads,
    project,
    rms_norm,
    scaled_normal,
)
from seqmod.mixers.convolution import short_convolution, short_convolution_step
from seqmod.mixers.decays import decay_products


@dataclass(frozen=True)
class DeltaNetConfig:
    """`width` D in and out, H `heads` with keys of `key_dim` and values of `value_dim`, convolutions over `kernel`
    steps; with `negative_eigenvalues`, shares of the old value that are replaced go up to 2."""

    width: int = 64
    heads: int = 4
    key_dim: int = 16
    value_dim: int = 16
    kernel: int = 4
    negative_eigenvalues: bool = False
    init_scale: float = 1.0

    def __post_init__(self) -> None:
        if min(self.width, self.heads, self.key_dim, self.value_dim, self.kernel) < 1:
            raise ValueError(f"DeltaNetConfig: sizes must be positive, got {self}")

    @property
    def channels(self) -> int:
        """Channels N of the convolution: those of q, k and v of all heads."""
        return self.heads * (2 * self.key_dim + self.value_dim)


class DeltaNetState(NamedTuple):
    """What keys map to S (B, H, K, V) and the last kernel - 1 inputs of the convolution (B, kernel - 1, N)."""

    s_BHKV: jax.Array
    window_BWN: jax.Array


def init(key: jax.Array, config: DeltaNetConfig) -> Params:
    """Parameters: `qkv` (D, N), `conv` (kernel, N), `share` (D, H), `norm` (V,), `out` (H, V, D)."""
    k_qkv, k_conv, k_share, k_out = jax.random.split(key, 4)
    D, H, V, N, W = config.width, config.heads, config.value_dim, config.channels, config.kernel
    scale = config.init_scale
    return {
        "qkv": scaled_normal(k_qkv, (D, N), D, scale),
        "conv": scaled_normal(k_conv, (W, N), W, scale),
        "share": scaled_normal(k_share, (D, H), D, scale),
        "norm": jnp.ones(V),
        "out": scaled_normal(k_out, (H, V, D), H * V, scale),
    }


def convolved(params: Params, x_BLD: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """Queries, keys and values (B, L, N) of all heads, side by side."""
    u_BLN = project("BLD,DN->BLN", x_BLD, params["qkv"])
    return jax.nn.silu(short_convolution(u_BLN, params["conv"], segment_ids=segment_ids))


def convolved_step(params: Params, x_BD: jax.Array, window_BWN: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One step of `convolved`, (B, N), and the next window."""
    u_BN, window_BWN = short_convolution_step(project("BD,DN->BN", x_BD, params["qkv"]), window_BWN, params["conv"])
    return jax.nn.silu(u_BN), window_BWN


def split_heads(u: jax.Array, heads: int, key_dim: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries and keys (..., H, K), in float32 and of unit length, and values (..., H, V), from u (..., N).

    The unit is not rounded to the type of u: a share of 2 of a key that is too long would make the state grow.
    """
    N = heads * key_dim
    q, k, v = (part.reshape(*u.shape[:-1], heads, -1) for part in jnp.split(u, [N, 2 * N], axis=-1))
    return unit(q), unit(k), v


def unit(x: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """x / |x| over the last axis, in float32; zero where x is."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return wide * jax.lax.rsqrt(jnp.square(wide).sum(-1, keepdims=True) + epsilon)


def shares(params: Params, x: jax.Array, negative_eigenvalues: bool) -> jax.Array:
    """b (..., H), in float32."""
    largest = 2.0 if negative_eigenvalues else 1.0
    return largest * jax.nn.sigmoid(project("...D,DH->...H", x, params["share"]).astype(jnp.float32))


def delta_matrix(
    q_BLHK: jax.Array,
    k_BLHK: jax.Array,
    share_BLH: jax.Array,
    log_decay_BLH: jax.Array,
    segment_ids: jax.Array | None,
    scale: float,
) -> jax.Array:
    """m_BHLM of the gated delta rule, by what each step really adds to the state.

    With S_t = exp(g_t) S_{t-1} + k_t u_t^T, the additions solve u_t + b_t sum_{s<t} w_ts (k_t.k_s) u_s = b_t v_t for
    the products of decays w, a lower triangular system, and the outputs are y_t = scale sum_{s<=t} w_ts (q_t.k_s) u_s.
    """
    L = k_BLHK.shape[1]
    w_BHLM = decay_products(log_decay_BLH, segment_ids)
    share_BHL1 = jnp.moveaxis(share_BLH, 1, 2)[..., None]
    system_BHLM = share_BHL1 * jnp.tril(w_BHLM * jnp.einsum("BLHK,BMHK->BHLM", k_BLHK, k_BLHK), -1)
    right_BHLM = share_BHL1 * jnp.eye(L)[None, None]
    additions_BHLM = jax.scipy.linalg.solve_triangular(system_BHLM, right_BHLM, lower=True, unit_diagonal=True)
    return scale * (w_BHLM * jnp.einsum("BLHK,BMHK->BHLM", q_BLHK, k_BLHK)) @ additions_BHLM


def values(params: Params, config: DeltaNetConfig, x_BLD: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """v_BLHV."""
    return split_heads(convolved(params, x_BLD, segment_ids), config.heads, config.key_dim)[2]


def read_out(params: Params, config: DeltaNetConfig, x: jax.Array, y: jax.Array) -> jax.Array:
    """Heads (..., H, V), normed one by one, to the width."""
    return project("...HV,HVD->...D", rms_norm(params["norm"], y).astype(x.dtype), params["out"])


def apply(params: Params, config: DeltaNetConfig, x_BLD: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """Parallel form, (B, L, D) to (B, L, D)."""
    q_BLHK, k_BLHK, v_BLHV = split_heads(convolved(params, x_BLD, segment_ids), config.heads, config.key_dim)
    share_BLH = shares(params, x_BLD, config.negative_eigenvalues)
    y_BLHV, _ = delta_rule(q_BLHK, k_BLHK, v_BLHV, share_BLH, segment_ids=segment_ids, scale=config.key_dim**-0.5)
    return read_out(params, config, x_BLD, y_BLHV)


def matrix(params: Params, config: DeltaNetConfig, x_BLD: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """m_BHLM, by a triangular system."""
    q_BLHK, k_BLHK, _ = split_heads(convolved(params, x_BLD, segment_ids), config.heads, config.key_dim)
    share_BLH = shares(params, x_BLD, config.negative_eigenvalues)
    return delta_matrix(q_BLHK, k_BLHK, share_BLH, jnp.zeros_like(share_BLH), segment_ids, config.key_dim**-0.5)


def init_state(config: DeltaNetConfig, batch: int, length: int) -> DeltaNetState:
    """Zero state; `length` is not needed, since the state has a fixed size."""
    return DeltaNetState(
        jnp.zeros((batch, config.heads, config.key_dim, config.value_dim)),
        jnp.zeros((batch, config.kernel - 1, config.channels)),
    )


def step(
    params: Params, config: DeltaNetConfig, x_BD: jax.Array, state: DeltaNetState
) -> tuple[jax.Array, DeltaNetState]:
    """One step, (B, D) to (B, D)."""
    u_BN, window_BWN = convolved_step(params, x_BD, state.window_BWN)
    q_BHK, k_BHK, v_BHV = split_heads(u_BN, config.heads, config.key_dim)
    share_BH = shares(params, x_BD, config.negative_eigenvalues)
    y_BHV, s_BHKV = delta_rule_step(state.s_BHKV, q_BHK, k_BHK, v_BHV, share_BH, scale=config.key_dim**-0.5)
    return read_out(params, config, x_BD, y_BHV), DeltaNetState(s_BHKV, window_BWN)


def default_config(
    width: int, heads: int, init_scale: float = 1.0, context: int = 128, causal: bool = True
) -> DeltaNetConfig:
    """Heads that share the width; `context` has no meaning here."""
    check_causal("deltanet", causal, CAUSAL)
    head_dim = check_heads("deltanet", width, heads)
    return DeltaNetConfig(width=width, heads=heads, key_dim=head_dim, value_dim=head_dim, init_scale=init_scale)


MIXER = Mixer(DeltaNetConfig, default_config, init, apply, init_state, step, Linear(values, matrix, read_out))

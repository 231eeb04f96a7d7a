"""Gated DeltaNet (Yang et al., arXiv 2412.06464): the delta rule on a state that also decays.

    g_t = -exp(A_log) softplus(W_a x_t + dt_bias), one per head
    S_t = exp(g_t) (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T
    y_t = K^{-1/2} S_t^T q_t
    out = W_out (norm_h(y) * silu(W_gate x))

q, k, v and b are those of `deltanet`. A starts uniform in [0, 16] and the softplus at zero input log-uniform in
[0.001, 0.1], as in Mamba-2.
"""

from dataclasses import dataclass

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
    over_last,
    project,
    rms_norm,
    scaled_normal,
)
from seqmod.mixers.decays import step_size_bias
from seqmod.mixers.deltanet import DeltaNetState, convolved, convolved_step, delta_matrix, shares, split_heads


@dataclass(frozen=True)
class GatedDeltaNetConfig:
    """`width` D in and out, H `heads` with keys of `key_dim` and values of `value_dim`, convolutions over `kernel`
    steps; with `negative_eigenvalues`, shares of the old value that are replaced go up to 2."""

    width: int = 64
    heads: int = 4
    key_dim: int = 16
    value_dim: int = 32
    kernel: int = 4
    negative_eigenvalues: bool = False
    init_scale: float = 1.0

    def __post_init__(self) -> None:
        if min(self.width, self.heads, self.key_dim, self.value_dim, self.kernel) < 1:
            raise ValueError(f"GatedDeltaNetConfig: sizes must be positive, got {self}")

    @property
    def channels(self) -> int:
        """Channels N of the convolution: those of q, k and v of all heads."""
        return self.heads * (2 * self.key_dim + self.value_dim)


def init(key: jax.Array, config: GatedDeltaNetConfig) -> Params:
    """Parameters: `qkv` (D, N), `conv` (kernel, N), `share`, `decay` (D, H), `A_log`, `dt_bias` (H,), `gate` (D, H, V),
    `norm` (V,), `out` (H, V, D)."""
    k_qkv, k_conv, k_share, k_decay, k_rate, k_bias, k_gate, k_out = jax.random.split(key, 8)
    D, H, V, N, W = config.width, config.heads, config.value_dim, config.channels, config.kernel
    scale = config.init_scale
    return {
        "qkv": scaled_normal(k_qkv, (D, N), D, scale),
        "conv": scaled_normal(k_conv, (W, N), W, scale),
        "share": scaled_normal(k_share, (D, H), D, scale),
        "decay": scaled_normal(k_decay, (D, H), D, scale),
        # Not quite from 0, whose logarithm is infinite.
        "A_log": jnp.log(jax.random.uniform(k_rate, (H,), minval=1e-4, maxval=16.0)),
        "dt_bias": step_size_bias(k_bias, (H,)),
        "gate": scaled_normal(k_gate, (D, H, V), D, scale),
        "norm": jnp.ones(V),
        "out": scaled_normal(k_out, (H, V, D), H * V, scale),
    }


def _log_decays(params: Params, x: jax.Array) -> jax.Array:
    """g (..., H), in float32."""
    size = project("...D,DH->...H", x, params["decay"]).astype(jnp.float32)
    size = jax.nn.softplus(size + over_last(params["dt_bias"], x.ndim))
    return -over_last(jnp.exp(params["A_log"]), x.ndim) * size


def values(
    params: Params, config: GatedDeltaNetConfig, x_BLD: jax.Array, segment_ids: jax.Array | None = None
) -> jax.Array:
    """v_BLHV."""
    return split_heads(convolved(params, x_BLD, segment_ids), config.heads, config.key_dim)[2]


def read_out(params: Params, config: GatedDeltaNetConfig, x: jax.Array, y: jax.Array) -> jax.Array:
    """Heads (..., H, V), normed one by one and gated, to the width."""
    gate = jax.nn.silu(project("...D,DHV->...HV", x, params["gate"]))
    return project("...HV,HVD->...D", gate * rms_norm(params["norm"], y).astype(x.dtype), params["out"])


def apply(
    params: Params, config: GatedDeltaNetConfig, x_BLD: jax.Array, segment_ids: jax.Array | None = None
) -> jax.Array:
    """Parallel form, (B, L, D) to (B, L, D)."""
    q_BLHK, k_BLHK, v_BLHV = split_heads(convolved(params, x_BLD, segment_ids), config.heads, config.key_dim)
    y_BLHV, _ = delta_rule(
        q_BLHK,
        k_BLHK,
        v_BLHV,
        shares(params, x_BLD, config.negative_eigenvalues),
        _log_decays(params, x_BLD),
        segment_ids=segment_ids,
        scale=config.key_dim**-0.5,
    )
    return read_out(params, config, x_BLD, y_BLHV)


def matrix(
    params: Params, config: GatedDeltaNetConfig, x_BLD: jax.Array, segment_ids: jax.Array | None = None
) -> jax.Array:
    """m_BHLM, by a triangular system."""
    q_BLHK, k_BLHK, _ = split_heads(convolved(params, x_BLD, segment_ids), config.heads, config.key_dim)
    share_BLH = shares(params, x_BLD, config.negative_eigenvalues)
    return delta_matrix(q_BLHK, k_BLHK, share_BLH, _log_decays(params, x_BLD), segment_ids, config.key_dim**-0.5)


def init_state(config: GatedDeltaNetConfig, batch: int, length: int) -> DeltaNetState:
    """Zero state; `length` is not needed, since the state has a fixed size."""
    return DeltaNetState(
        jnp.zeros((batch, config.heads, config.key_dim, config.value_dim)),
        jnp.zeros((batch, config.kernel - 1, config.channels)),
    )


def step(
    params: Params, config: GatedDeltaNetConfig, x_BD: jax.Array, state: DeltaNetState
) -> tuple[jax.Array, DeltaNetState]:
    """One step, (B, D) to (B, D)."""
    u_BN, window_BWN = convolved_step(params, x_BD, state.window_BWN)
    q_BHK, k_BHK, v_BHV = split_heads(u_BN, config.heads, config.key_dim)
    y_BHV, s_BHKV = delta_rule_step(
        state.s_BHKV,
        q_BHK,
        k_BHK,
        v_BHV,
        shares(params, x_BD, config.negative_eigenvalues),
        _log_decays(params, x_BD),
        scale=config.key_dim**-0.5,
    )
    return read_out(params, config, x_BD, y_BHV), DeltaNetState(s_BHKV, window_BWN)


def default_config(
    width: int, heads: int, init_scale: float = 1.0, context: int = 128, causal: bool = True
) -> GatedDeltaNetConfig:
    """Heads that share the width, values twice as wide; `context` has no meaning here."""
    check_causal("gated_deltanet", causal, CAUSAL)
    head_dim = check_heads("gated_deltanet", width, heads)
    return GatedDeltaNetConfig(
        width=width, heads=heads, key_dim=head_dim, value_dim=2 * head_dim, init_scale=init_scale
    )


MIXER = Mixer(GatedDeltaNetConfig, default_config, init, apply, init_state, step, Linear(values, matrix, read_out))

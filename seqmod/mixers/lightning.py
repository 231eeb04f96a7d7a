"""The block of TransNormerLLM around Lightning Attention-2 (Qin et al., arXiv 2401.04658 and 2307.14995).

    q, k, v = silu(W x)
    S_t = exp(-c s_h) S_{t-1} + k_t v_t^T        y_t = q_t S_t
    out = W_out (sigmoid(W_up W_down x) * norm(y))

s are the slopes of ALiBi, 2^{-8 (h + 1) / H}; c is a factor for each layer, 1 - l / (layers - 1) + 1e-5, so that the
last layer hardly forgets. The RMS norm is over all heads together and has no gain; there is neither a scale nor a
denominator, which the norm would undo. Of a model of one layer, where the published factor divides by zero, it is 1.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.linear_attention import linear_attention, linear_attention_step
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
from seqmod.mixers.decays import decay_products


@dataclass(frozen=True)
class LightningConfig:
    """`width` D in and out, H `heads` of `head_dim`, an output gate of rank `gate_rank`; `layer_factor` c."""

    width: int = 64
    heads: int = 4
    head_dim: int = 16
    gate_rank: int = 16
    layer_factor: float = 1.0
    init_scale: float = 1.0

    def __post_init__(self) -> None:
        if min(self.width, self.heads, self.head_dim, self.gate_rank) < 1:
            raise ValueError(f"LightningConfig: sizes must be positive, got {self}")
        if self.layer_factor < 0:
            raise ValueError(f"LightningConfig: layer_factor is {self.layer_factor}, expected at least 0")


class LightningState(NamedTuple):
    """The decayed sums S (B, H, K, V)."""

    s_BHKV: jax.Array


def slopes(heads: int) -> np.ndarray:
    """ALiBi's slopes (H,): 2^{-8 (h + 1) / H} for a power of two, else those of the power below and, of the power
    above, every other one until there are enough."""
    below = 2 ** math.floor(math.log2(heads))
    first = 2.0 ** (-8 * np.arange(1, below + 1) / below)
    between = 2.0 ** (-8 * np.arange(1, 2 * below + 1, 2) / (2 * below))
    return np.concatenate([first, between[: heads - below]])


def layer_factor(layer: int, layers: int) -> float:
    """c of layer 0 .. layers - 1."""
    return 1.0 if layers == 1 else 1 - layer / (layers - 1) + 1e-5


def init(key: jax.Array, config: LightningConfig) -> Params:
    """Parameters: `qkv` (D, 3, H, K), `gate_down` (D, R), `gate_up` (R, H, K), `out` (H, K, D)."""
    k_qkv, k_down, k_up, k_out = jax.random.split(key, 4)
    D, H, K, R, scale = config.width, config.heads, config.head_dim, config.gate_rank, config.init_scale
    return {
        "qkv": scaled_normal(k_qkv, (D, 3, H, K), D, scale),
        "gate_down": scaled_normal(k_down, (D, R), D, scale),
        "gate_up": scaled_normal(k_up, (R, H, K), R, scale),
        "out": scaled_normal(k_out, (H, K, D), H * K, scale),
    }


def _qkv(params: Params, x: jax.Array) -> jax.Array:
    """q, k, v (3, ..., H, K)."""
    return jax.nn.silu(project("...D,DGHK->G...HK", x, params["qkv"]))


def _log_decays(config: LightningConfig) -> jax.Array:
    return jnp.asarray(-config.layer_factor * slopes(config.heads), jnp.float32)


def values(params: Params, config: LightningConfig, x: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """v (..., H, V)."""
    return _qkv(params, x)[2]


def read_out(params: Params, config: LightningConfig, x: jax.Array, y: jax.Array) -> jax.Array:
    """Heads (..., H, V), normed together and gated, to the width."""
    gate = project("...D,DR->...R", x, params["gate_down"])
    gate = jax.nn.sigmoid(project("...R,RHK->...HK", gate, params["gate_up"]))
    normed = rms_norm(None, y.reshape(*y.shape[:-2], -1)).reshape(y.shape)
    return project("...HK,HKD->...D", gate * normed.astype(x.dtype), params["out"])


def apply(params: Params, config: LightningConfig, x_BLD: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """Parallel form, (B, L, D) to (B, L, D)."""
    q_BLHK, k_BLHK, v_BLHV = _qkv(params, x_BLD)
    y_BLHV, _ = linear_attention(q_BLHK, k_BLHK, v_BLHV, _log_decays(config), segment_ids=segment_ids)
    return read_out(params, config, x_BLD, y_BLHV)


def matrix(
    params: Params, config: LightningConfig, x_BLD: jax.Array, segment_ids: jax.Array | None = None
) -> jax.Array:
    """m_BHLM = exp(-c s_h (t - s)) q_t.k_s."""
    B, L, _ = x_BLD.shape
    q_BLHK, k_BLHK, _ = _qkv(params, x_BLD)
    log_decay_BLH = jnp.broadcast_to(_log_decays(config)[None, None], (B, L, config.heads))
    return decay_products(log_decay_BLH, segment_ids) * jnp.einsum("BLHK,BMHK->BHLM", q_BLHK, k_BLHK)


def init_state(config: LightningConfig, batch: int, length: int) -> LightningState:
    """Zero sums; `length` is not needed, since the state has a fixed size."""
    return LightningState(jnp.zeros((batch, config.heads, config.head_dim, config.head_dim)))


def step(
    params: Params, config: LightningConfig, x_BD: jax.Array, state: LightningState
) -> tuple[jax.Array, LightningState]:
    """One step, (B, D) to (B, D)."""
    q_BHK, k_BHK, v_BHV = _qkv(params, x_BD)
    y_BHV, s_BHKV = linear_attention_step(state.s_BHKV, q_BHK, k_BHK, v_BHV, _log_decays(config))
    return read_out(params, config, x_BD, y_BHV), LightningState(s_BHKV)


def default_config(
    width: int, heads: int, init_scale: float = 1.0, context: int = 128, causal: bool = True
) -> LightningConfig:
    """Heads that share the width and a gate of the rank of one; `context` has no meaning here."""
    check_causal("lightning", causal, CAUSAL)
    head_dim = check_heads("lightning", width, heads)
    return LightningConfig(width=width, heads=heads, head_dim=head_dim, gate_rank=head_dim, init_scale=init_scale)


MIXER = Mixer(LightningConfig, default_config, init, apply, init_state, step, Linear(values, matrix, read_out))

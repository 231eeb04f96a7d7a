"""LARA: linear randomised attention (Zheng et al., arXiv 2204.04667), with R landmarks as means of its proposals.

    mu_c = mean of q + mean of k over the segment c of adjacent steps,  w_c = mu_c + noise_c
    l(x, w) = w.x / sqrt(K) - |x|^2 / (2 sqrt(K))
    read_c = sum_s softmax_s(l(k_s, w_c)) v_s
    y_t = sum_c softmax_c(mu_c.q_t / sqrt(K) + l(q_t, w_c) + logsumexp_s l(k_s, w_c) - l(mu_c, w_c)) read_c

The noise is zero at first, as the authors evaluate; `resample` draws a standard normal one, as they train with one per
training step. Padding is left out of both softmax and sum, of which the authors' code forgets the second.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from seqmod.mixers import heads
from seqmod.mixers.base import NONCAUSAL, Linear, Mixer, Params, check_causal


@dataclass(frozen=True)
class LARAConfig:
    """`width` D in and out, H `heads`, R `landmarks`."""

    width: int = 64
    heads: int = 4
    landmarks: int = 16
    init_scale: float = 1.0

    def __post_init__(self) -> None:
        heads.check_sizes("LARAConfig", self.width, self.heads, landmarks=self.landmarks)


def init(key: jax.Array, config: LARAConfig) -> Params:
    """Parameters: `qkv` (D, 3, H, K), `out` (H, K, D); fixed: `noise` (R, H, K), zeros."""
    noise_RHK = jnp.zeros((config.landmarks, config.heads, config.width // config.heads))
    return heads.init(key, config.width, config.heads, config.init_scale) | {"fixed": {"noise": noise_RHK}}


def resample(key: jax.Array, params: Params, config: LARAConfig) -> Params:
    """Parameters with new noise, for the next training step."""
    return params | {"fixed": {"noise": jax.random.normal(key, params["fixed"]["noise"].shape)}}


def _weights(
    params: Params, config: LARAConfig, q_BLHK: jax.Array, k_BLHK: jax.Array, mask_BL: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Weights of landmarks in outputs (B, H, L, R), and of steps in landmarks (B, H, R, L)."""
    root = q_BLHK.shape[-1] ** -0.5
    q_BLHK, k_BLHK = heads.wide(q_BLHK), heads.wide(k_BLHK)
    shares_BLR, live_BR = heads.landmark_shares(mask_BL, config.landmarks)
    mu_BRHK = jnp.einsum("BLR,BLHK->BRHK", shares_BLR, q_BLHK + k_BLHK)
    noise_RHK = jax.lax.stop_gradient(params["fixed"]["noise"])[: shares_BLR.shape[-1]]
    w_BRHK = mu_BRHK + noise_RHK[None]

    keys_BHRL = jnp.einsum("BRHK,BLHK->BHRL", w_BRHK, k_BLHK) - jnp.moveaxis(k_BLHK**2, 1, 2).sum(-1)[:, :, None] / 2
    keys_BHRL = heads.hide(keys_BHRL * root, mask_BL[:, None, None])
    log_mass_BHR = jax.nn.logsumexp(keys_BHRL, axis=-1)
    own_BRH = ((w_BRHK - mu_BRHK / 2) * mu_BRHK).sum(-1) * root
    # Of l(q, w), the part with |q|^2 is the same for all landmarks and falls out of the softmax.
    queries_BHLR = jnp.einsum("BLHK,BRHK->BHLR", q_BLHK, mu_BRHK + w_BRHK) * root
    logits_BHLR = queries_BHLR + (log_mass_BHR - jnp.swapaxes(own_BRH, 1, 2))[:, :, None]
    weights_BHLR = jax.nn.softmax(heads.hide(logits_BHLR, live_BR[:, None, None]), axis=-1)
    return weights_BHLR, jax.nn.softmax(keys_BHRL, axis=-1)


def apply(params: Params, config: LARAConfig, x_BLD: jax.Array, mask_BL: jax.Array | None = None) -> jax.Array:
    """Parallel form, (B, L, D) to (B, L, D); every step sees all valid steps."""
    valid_BL = heads.as_mask(x_BLD, mask_BL)
    q_BLHK, k_BLHK, v_BLHK = heads.split(params, heads.blank(x_BLD, valid_BL))
    out_BHLR, in_BHRL = _weights(params, config, q_BLHK, k_BLHK, valid_BL)
    read_BHRK = jnp.einsum("BHRL,BLHK->BHRK", in_BHRL, heads.wide(v_BLHK))
    return heads.read_out(params, config, x_BLD, jnp.einsum("BHLR,BHRK->BLHK", out_BHLR, read_BHRK))


def matrix(params: Params, config: LARAConfig, x_BLD: jax.Array, mask_BL: jax.Array | None = None) -> jax.Array:
    """The weights of steps through all landmarks, (B, H, L, L); they do not depend on values."""
    valid_BL = heads.as_mask(x_BLD, mask_BL)
    q_BLHK, k_BLHK, _ = heads.split(params, heads.blank(x_BLD, valid_BL))
    out_BHLR, in_BHRL = _weights(params, config, q_BLHK, k_BLHK, valid_BL)
    return out_BHLR @ in_BHRL


def default_config(
    width: int, heads: int, init_scale: float = 1.0, context: int = 128, causal: bool = True
) -> LARAConfig:
    """16 landmarks, or a quarter of the context if that is fewer."""
    check_causal("lara", causal, NONCAUSAL)
    landmarks = max(1, min(16, context // 4))
    return LARAConfig(width=width, heads=heads, landmarks=landmarks, init_scale=init_scale)


MIXER = Mixer(
    LARAConfig,
    default_config,
    init,
    apply,
    linear=Linear(heads.values, matrix, heads.read_out),
    patterns=NONCAUSAL,
    packs=False,
)

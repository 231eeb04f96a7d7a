"""Nystromformer: softmax attention through landmarks (Xiong et al., arXiv 2102.03902, algorithm 1).

    F = softmax(q kl^T),  A = softmax(ql kl^T),  G = softmax(ql k^T)        scores over sqrt(K)
    y = F Z (G v),  Z near the pseudo-inverse of A

ql and kl are means of queries and keys over R segments of adjacent steps. Z comes of `iterations` steps of
Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4, which start from A^T over its largest column sum. With one landmark a
step and the exact inverse, y is full attention.

That largest sum is taken within a head of a sequence. Taken over the whole batch, as is common, it makes an output
depend on the other sequences. Segments divide the valid steps, so padding changes nothing. There is no convolution of
the values beside the attention, which the paper has as an option.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from seqmod.mixers import heads
from seqmod.mixers.base import NONCAUSAL, Linear, Mixer, Params, check_causal


@dataclass(frozen=True)
class NystromformerConfig:
    """`width` D in and out, H `heads`, R `landmarks`, steps towards the inverse."""

    width: int = 64
    heads: int = 4
    landmarks: int = 16
    iterations: int = 6
    init_scale: float = 1.0

    def __post_init__(self) -> None:
        heads.check_sizes("NystromformerConfig", self.width, self.heads, landmarks=self.landmarks)
        if self.iterations < 0:
            raise ValueError(f"NystromformerConfig: iterations is {self.iterations}, expected at least 0")


def init(key: jax.Array, config: NystromformerConfig) -> Params:
    """Parameters: `qkv` (D, 3, H, K), `out` (H, K, D)."""
    return heads.init(key, config.width, config.heads, config.init_scale)


def pseudo_inverse(a_BHRR: jax.Array, iterations: int) -> jax.Array:
    """An approximation of the pseudo-inverse of matrices whose rows sum to one, or are zero."""
    eye_RR = jnp.eye(a_BHRR.shape[-1], dtype=a_BHRR.dtype)[None, None]

    def times(x_BHRR: jax.Array, y_BHRR: jax.Array) -> jax.Array:
        # The rounding of tensor cores would outlast the iteration.
        return jnp.matmul(x_BHRR, y_BHRR, precision="highest")

    z_BHRR = jnp.swapaxes(a_BHRR, -1, -2) / a_BHRR.sum(-2, keepdims=True).max(-1, keepdims=True)
    for _ in range(iterations):
        az_BHRR = times(a_BHRR, z_BHRR)
        inner_BHRR = 15 * eye_RR - times(az_BHRR, 7 * eye_RR - az_BHRR)
        z_BHRR = times(z_BHRR, 13 * eye_RR - times(az_BHRR, inner_BHRR)) / 4
    return z_BHRR


def _factors(
    config: NystromformerConfig, q_BLHK: jax.Array, k_BLHK: jax.Array, mask_BL: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """F (B, H, L, R), Z (B, H, R, R) and G (B, H, R, L). Landmarks that do not exist have zeros."""
    q_BLHK, k_BLHK = heads.wide(q_BLHK) * q_BLHK.shape[-1] ** -0.5, heads.wide(k_BLHK)
    shares_BLR, live_BR = heads.landmark_shares(mask_BL, config.landmarks)
    ql_BRHK = jnp.einsum("BLR,BLHK->BRHK", shares_BLR, q_BLHK)
    kl_BRHK = jnp.einsum("BLR,BLHK->BRHK", shares_BLR, k_BLHK)

    def softmax(q_BXHK: jax.Array, k_BYHK: jax.Array, visible_BY: jax.Array) -> jax.Array:
        scores_BHXY = jnp.einsum("BXHK,BYHK->BHXY", q_BXHK, k_BYHK)
        return jax.nn.softmax(heads.hide(scores_BHXY, visible_BY[:, None, None]), axis=-1)

    a_BHRR = jnp.where(live_BR[:, None, :, None], softmax(ql_BRHK, kl_BRHK, live_BR), 0)
    z_BHRR = pseudo_inverse(a_BHRR, config.iterations)
    return softmax(q_BLHK, kl_BRHK, live_BR), z_BHRR, softmax(ql_BRHK, k_BLHK, mask_BL)


def apply(params: Params, config: NystromformerConfig, x_BLD: jax.Array, mask_BL: jax.Array | None = None) -> jax.Array:
    """Parallel form, (B, L, D) to (B, L, D); every step sees all valid steps."""
    valid_BL = heads.as_mask(x_BLD, mask_BL)
    q_BLHK, k_BLHK, v_BLHK = heads.split(params, heads.blank(x_BLD, valid_BL))
    f_BHLR, z_BHRR, g_BHRL = _factors(config, q_BLHK, k_BLHK, valid_BL)
    read_BHRK = jnp.einsum("BHRL,BLHK->BHRK", g_BHRL, heads.wide(v_BLHK))
    y_BLHK = jnp.einsum("BHLR,BHRK->BLHK", f_BHLR, jnp.matmul(z_BHRR, read_BHRK))
    return heads.read_out(params, config, x_BLD, y_BLHK)


def matrix(
    params: Params, config: NystromformerConfig, x_BLD: jax.Array, mask_BL: jax.Array | None = None
) -> jax.Array:
    """F Z G, (B, H, L, L)."""
    valid_BL = heads.as_mask(x_BLD, mask_BL)
    q_BLHK, k_BLHK, _ = heads.split(params, heads.blank(x_BLD, valid_BL))
    f_BHLR, z_BHRR, g_BHRL = _factors(config, q_BLHK, k_BLHK, valid_BL)
    return f_BHLR @ z_BHRR @ g_BHRL


def default_config(
    width: int, heads: int, init_scale: float = 1.0, context: int = 128, causal: bool = True
) -> NystromformerConfig:
    """16 landmarks, or a quarter of the context if that is fewer."""
    check_causal("nystromformer", causal, NONCAUSAL)
    landmarks = max(1, min(16, context // 4))
    return NystromformerConfig(width=width, heads=heads, landmarks=landmarks, init_scale=init_scale)


MIXER = Mixer(
    NystromformerConfig,
    default_config,
    init,
    apply,
    linear=Linear(heads.values, matrix, heads.read_out),
    patterns=NONCAUSAL,
    packs=False,
)

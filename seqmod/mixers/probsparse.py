"""ProbSparse attention of Informer (Zhou et al., arXiv 2012.07436, algorithm 1).

    score every query on U sampled keys:  M(q) = max_j q.k_j - mean_j q.k_j
    the u queries of the highest M read all keys by softmax; the others get the mean of the values

U = c ceil(ln n) and u alike for n valid steps; with u = n it is full attention. The selection compares all queries, so
later steps decide what an earlier one reads, and the mixer is never causal. Informer's causal form leaks the future in
this way.

Sampled keys are the same for all heads and sequences, as in the authors' code: those of the lowest numbers of a fixed
random row, which `seed` draws, so that the sample of n steps depends on n alone. Informer draws anew at every call. M
subtracts the mean of the sample, as the paper has it, where the authors' code divides the sample's sum by n.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from seqmod.mixers import heads
from seqmod.mixers.base import NONCAUSAL, Linear, Mixer, Params, check_causal


@dataclass(frozen=True)
class ProbSparseConfig:
    """`width` D in and out, H `heads`, the `factor` c, and the seed of the sampled keys."""

    width: int = 64
    heads: int = 4
    factor: int = 5
    seed: int = 0
    init_scale: float = 1.0

    def __post_init__(self) -> None:
        heads.check_sizes("ProbSparseConfig", self.width, self.heads, factor=self.factor)
        if self.seed < 0:
            raise ValueError(f"ProbSparseConfig: seed is {self.seed}, expected at least 0")


def init(key: jax.Array, config: ProbSparseConfig) -> Params:
    """Parameters: `qkv` (D, 3, H, K), `out` (H, K, D)."""
    return heads.init(key, config.width, config.heads, config.init_scale)


def sample_size(config: ProbSparseConfig, length: int) -> int:
    """U, and u, for a number of valid steps: at least 1, at most all."""
    return max(1, min(length, config.factor * math.ceil(math.log(max(length, 1)))))


def _selection(
    config: ProbSparseConfig, q_BLHK: jax.Array, k_BLHK: jax.Array, mask_BL: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Steps of the selected queries (B, H, U), and which of these are there (B, H, U)."""
    L = q_BLHK.shape[1]
    most = sample_size(config, L)
    sizes_B = jnp.array([sample_size(config, n) for n in range(L + 1)])[mask_BL.sum(1)]
    counted_BU = jnp.arange(most)[None] < sizes_B[:, None]
    order_L = jnp.asarray(np.random.default_rng(config.seed).random(L), jnp.float32)
    order_BL = jnp.where(mask_BL, order_L[jnp.cumsum(mask_BL, axis=1) - 1], jnp.inf)
    _, sampled_BU = jax.lax.top_k(-order_BL, most)
    sampled_BUHK = jnp.take_along_axis(k_BLHK, sampled_BU[..., None, None], axis=1)
    scores_BHLU = jnp.einsum("BLHK,BUHK->BHLU", q_BLHK, sampled_BUHK)
    counted_B11U = counted_BU[:, None, None]
    mean_BHL = jnp.where(counted_B11U, scores_BHLU, 0).sum(-1) / sizes_B[:, None, None]
    sparsity_BHL = heads.hide(scores_BHLU, counted_B11U).max(-1) - mean_BHL
    _, steps_BHU = jax.lax.top_k(jnp.where(mask_BL[:, None], sparsity_BHL, -jnp.inf), most)
    return steps_BHU, jnp.broadcast_to(counted_BU[:, None], steps_BHU.shape)


def _attention(q_BHUK: jax.Array, k_BLHK: jax.Array, mask_BL: jax.Array) -> jax.Array:
    scores_BHUL = jnp.einsum("BHUK,BLHK->BHUL", q_BHUK, k_BLHK) * k_BLHK.shape[-1] ** -0.5
    return jax.nn.softmax(heads.hide(scores_BHUL, mask_BL[:, None, None]), axis=-1)


def _mean(mask_BL: jax.Array) -> jax.Array:
    """Weights (B, L) of the mean of the valid steps."""
    return mask_BL / jnp.maximum(mask_BL.sum(1, keepdims=True), 1).astype(jnp.float32)


def apply(params: Params, config: ProbSparseConfig, x_BLD: jax.Array, mask_BL: jax.Array | None = None) -> jax.Array:
    """Parallel form, (B, L, D) to (B, L, D); a step sees all valid steps, if only by their mean."""
    valid_BL = heads.as_mask(x_BLD, mask_BL)
    q_BLHK, k_BLHK, v_BLHK = map(heads.wide, heads.split(params, heads.blank(x_BLD, valid_BL)))
    steps_BHU, there_BHU = _selection(config, q_BLHK, k_BLHK, valid_BL)
    q_BHLK = jnp.swapaxes(q_BLHK, 1, 2)
    q_BHUK = jnp.take_along_axis(q_BHLK, steps_BHU[..., None], axis=2)
    read_BHUK = jnp.einsum("BHUL,BLHK->BHUK", _attention(q_BHUK, k_BLHK, valid_BL), v_BLHK)
    mean_BH1K = jnp.einsum("BL,BLHK->BHK", _mean(valid_BL), v_BLHK)[:, :, None]
    y_BHLK = jnp.broadcast_to(mean_BH1K, q_BHLK.shape)
    B, H, _ = steps_BHU.shape
    row_B11, head_1H1 = jnp.arange(B)[:, None, None], jnp.arange(H)[None, :, None]
    y_BHLK = y_BHLK.at[row_B11, head_1H1, steps_BHU].set(jnp.where(there_BHU[..., None], read_BHUK, mean_BH1K))
    return heads.read_out(params, config, x_BLD, jnp.swapaxes(y_BHLK, 1, 2))


def matrix(params: Params, config: ProbSparseConfig, x_BLD: jax.Array, mask_BL: jax.Array | None = None) -> jax.Array:
    """Full attention in the rows (B, H, L, L) of selected queries, the mean in the others."""
    valid_BL = heads.as_mask(x_BLD, mask_BL)
    q_BLHK, k_BLHK, _ = map(heads.wide, heads.split(params, heads.blank(x_BLD, valid_BL)))
    steps_BHU, there_BHU = _selection(config, q_BLHK, k_BLHK, valid_BL)
    chosen_BHL = ((steps_BHU[..., None] == jnp.arange(x_BLD.shape[1])[None, None, None]) & there_BHU[..., None]).any(2)
    full_BHLL = _attention(jnp.swapaxes(q_BLHK, 1, 2), k_BLHK, valid_BL)
    return jnp.where(chosen_BHL[..., None], full_BHLL, _mean(valid_BL)[:, None, None])


def default_config(
    width: int, heads: int, init_scale: float = 1.0, context: int = 128, causal: bool = True
) -> ProbSparseConfig:
    """The published factor of 5; `context` has no meaning here."""
    check_causal("probsparse", causal, NONCAUSAL)
    return ProbSparseConfig(width=width, heads=heads, init_scale=init_scale)


MIXER = Mixer(
    ProbSparseConfig,
    default_config,
    init,
    apply,
    linear=Linear(heads.values, matrix, heads.read_out),
    patterns=NONCAUSAL,
    packs=False,
)

"""Multi-path scanning: one Mamba mixer along several orders of the steps (RSMamba, Chen et al., arXiv 2403.19654).

    f_p = unpermute_p(Mamba(permute_p(x)))         p: forward, reverse, shuffled; one shared Mamba
    g = softmax(W [mean_t f_1, .., mean_t f_P])    y = sum_p g_p f_p

The shuffle is drawn from the seed of the config, so that the mixer is a function; a key given to `apply` draws another
one, as for training. The authors' code draws one in evaluation too. Without gates, paths are averaged. Padding comes
last in every path, and the place of a step in a shuffle depends on the number of steps before it alone.
"""

from dataclasses import dataclass, field
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from seqmod.mixers import mamba
from seqmod.mixers.base import NONCAUSAL, Mixer, Params, check_causal, scaled_normal
from seqmod.mixers.mamba import MambaConfig

Path = Literal["forward", "reverse", "shuffle"]


@dataclass(frozen=True)
class MultipathConfig:
    """The shared `mamba`, its P `paths`, each shuffle being another one, and the `seed` of shuffles."""

    mamba: MambaConfig = field(default_factory=MambaConfig)
    paths: tuple[Path, ...] = ("forward", "reverse", "shuffle")
    gated: bool = True
    seed: int = 0
    init_scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.paths or not set(self.paths) <= set(get_args(Path)):
            raise ValueError(f"MultipathConfig: paths are {self.paths}, expected some of {get_args(Path)}")

    @property
    def width(self) -> int:
        """D in and out."""
        return self.mamba.width


def init(key: jax.Array, config: MultipathConfig) -> Params:
    """Parameters: those of `mamba`, and with gates `gate` (P, D, P)."""
    k_mamba, k_gate = jax.random.split(key)
    params: Params = {"mamba": mamba.init(k_mamba, config.mamba)}
    if config.gated:
        P, D = len(config.paths), config.mamba.width
        params["gate"] = scaled_normal(k_gate, (P, D, P), P * D, config.init_scale)
    return params


def orders(config: MultipathConfig, mask_BL: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """The step (P, B, L) that is at each place of each path: valid steps, then padding."""
    place_BL = jnp.cumsum(mask_BL, axis=1) - 1
    key = jax.random.key(config.seed) if key is None else key
    indices = jnp.arange(mask_BL.shape[1])
    ranks = []
    for index, path in enumerate(config.paths):
        rank_BL = place_BL.astype(jnp.float32)
        if path == "reverse":
            rank_BL = -rank_BL
        elif path == "shuffle":
            # One number for each place, whatever the length.
            k_places = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, index), indices)
            rank_BL = jax.vmap(jax.random.uniform)(k_places)[place_BL]
        ranks.append(jnp.where(mask_BL, rank_BL, jnp.inf))
    return jnp.argsort(jnp.stack(ranks), axis=2, stable=True)


def apply(
    params: Params,
    config: MultipathConfig,
    x_BLD: jax.Array,
    mask_BL: jax.Array | None = None,
    *,
    key: jax.Array | None = None,
) -> jax.Array:
    """Parallel form, (B, L, D) to (B, L, D). With a key, shuffles are drawn from it and not from the config's seed."""
    L, D = x_BLD.shape[1:]
    valid_BL = jnp.ones((1, L), bool) if mask_BL is None else mask_BL
    order_PBL = orders(config, valid_BL, key)
    x_PBLD = jnp.take_along_axis(x_BLD[None], order_PBL[..., None], axis=2)
    f_PBLD = mamba.apply(params["mamba"], config.mamba, x_PBLD.reshape(-1, L, D)).reshape(x_PBLD.shape)
    f_PBLD = jnp.take_along_axis(f_PBLD, jnp.argsort(order_PBL, axis=2)[..., None], axis=2)
    if not config.gated:
        return f_PBLD.mean(0)
    total_PBD = jnp.where(valid_BL[None, ..., None], f_PBLD, 0).astype(jnp.float32).sum(2)
    mean_PBD = total_PBD / jnp.maximum(valid_BL.sum(1), 1)[None, :, None]
    g_BP = jax.nn.softmax(jnp.einsum("PBD,PDQ->BQ", mean_PBD, params["gate"]), axis=-1)
    return jnp.einsum("BP,PBLD->BLD", g_BP, f_PBLD.astype(jnp.float32)).astype(x_BLD.dtype)


def default_config(
    width: int, heads: int, init_scale: float = 1.0, context: int = 128, causal: bool = True
) -> MultipathConfig:
    """Three paths with gates; `heads` and `context` have no meaning here."""
    check_causal("multipath", causal, NONCAUSAL)
    return MultipathConfig(mamba.default_config(width, heads, init_scale, context), init_scale=init_scale)


MIXER = Mixer(MultipathConfig, default_config, init, apply, patterns=NONCAUSAL, packs=False)

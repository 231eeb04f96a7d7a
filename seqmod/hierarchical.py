"""Two sequence models on top of each other, for samples that come faster than targets (HiSS: Bhirangi et al.,
arXiv 2402.10211).

    z_i = low(x_{i k}, .., x_{i k + k - 1}), its output at the last of the k samples, each chunk from a zero state
    outputs_i = high(z_0, .., z_i)

Samples x come at k times the rate of targets. Both models are causal backbones of any mixers. `step` takes one sample
at a time and puts out something new after every k-th. In the paper k is 10, and inputs are samples beside their
differences (`with_differences`).

The flat model to compare with runs over all samples and is read where the hierarchy is, at the last sample of every
chunk (`chunk_ends`). The published code reads it at the first, k - 1 samples early, which favours the hierarchy.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from seqmod import backbone
from seqmod.config import BackboneConfig
from seqmod.mixers.base import Params


@dataclass(frozen=True)
class HierarchicalConfig:
    """`low` runs on chunks of `factor` k samples; its one head has the size of the inputs of `high`, which has the
    heads of the whole."""

    low: BackboneConfig
    high: BackboneConfig
    factor: int = 10

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"HierarchicalConfig: factor is {self.factor}, expected at least 1 sample per chunk")
        if len(self.low.heads) != 1 or self.low.heads[0][1] != self.high.inputs:
            raise ValueError(
                f"HierarchicalConfig: low has the heads {self.low.heads}, expected one, of the {self.high.inputs} "
                "inputs of high"
            )
        for name, model in (("low", self.low), ("high", self.high)):
            if not all(model.block(layer).causal for layer in range(model.layers)):
                raise ValueError(
                    f"HierarchicalConfig: {name} has blocks that are not causal, expected causal ones only"
                )


class HierarchicalState(NamedTuple):
    """States of both models, samples of the current chunk seen so far (), and the outputs after the last whole one."""

    low: backbone.State
    high: backbone.State
    seen: jax.Array
    outputs: dict[str, jax.Array]


def init(key: jax.Array, config: HierarchicalConfig) -> Params:
    """Fresh parameters, those of the two models under `low` and `high`."""
    k_low, k_high = jax.random.split(key)
    return {"low": backbone.init(k_low, config.low), "high": backbone.init(k_high, config.high)}


def _summary(params: Params, config: HierarchicalConfig, e: jax.Array) -> jax.Array:
    (summary,) = backbone.read_out(params["low"], config.low, e).values()
    return summary


def apply(
    params: Params, config: HierarchicalConfig, x_BLF: jax.Array, *, segment_ids: jax.Array | None = None
) -> dict[str, jax.Array]:
    """Outputs by head name, each (B, T, size), from samples (B, L = T k, F).

    `segment_ids` (B, T) pack several sequences, of whole chunks, into a row. Raises ValueError where the length is no
    multiple of k.
    """
    B, L, F = x_BLF.shape
    k = config.factor
    if L % k:
        raise ValueError(f"apply: x has {L} samples, expected a multiple of factor {k}")
    # Chunks are rows of a batch of their own.
    _, taps = backbone.apply(params["low"], config.low, x_BLF.reshape(B * L // k, k, F))
    z_BTZ = _summary(params, config, taps[-1][:, -1]).reshape(B, L // k, -1)
    return backbone.apply(params["high"], config.high, z_BTZ, segment_ids=segment_ids)[0]


def init_state(config: HierarchicalConfig, batch: int, length: int) -> HierarchicalState:
    """State before the first sample, for at most `length` samples; until a chunk is whole, outputs are zeros."""
    low = backbone.init_state(config.low, batch, config.factor)
    high = backbone.init_state(config.high, batch, max(length // config.factor, 1))
    outputs = {name: jnp.zeros((batch, size)) for name, size in config.high.heads}
    return HierarchicalState(low, high, jnp.zeros((), jnp.int32), outputs)


def step(
    params: Params, config: HierarchicalConfig, x_BF: jax.Array, state: HierarchicalState
) -> tuple[dict[str, jax.Array], jax.Array, HierarchicalState]:
    """One sample of every row: outputs (B, size) after the last whole chunk, whether they are new (), and the state.

    Rows share one clock, so that the high model runs once in k samples and not at every one.
    """
    _, taps, low = backbone.step(params["low"], config.low, x_BF, state.low)
    new = state.seen == config.factor - 1

    def finish(high):
        outputs, _, high = backbone.step(params["high"], config.high, _summary(params, config, taps[-1]), high)
        return outputs, high, backbone.init_state(config.low, x_BF.shape[0], config.factor)

    def go_on(high):
        return state.outputs, high, low

    outputs, high, low = jax.lax.cond(new, finish, go_on, state.high)
    seen = jnp.where(new, 0, state.seen + 1)
    return outputs, new, HierarchicalState(low, high, seen, outputs)


def chunk_ends(length: int, factor: int) -> jax.Array:
    """Indices (T,) of the last sample of every whole chunk: k - 1, 2 k - 1, ..."""
    return jnp.arange(factor - 1, length, factor)


def with_differences(x_BLF: jax.Array) -> jax.Array:
    """Samples beside their differences to the sample before, (B, L, 2 F); the first difference is zero."""
    differences_BLF = jnp.pad(x_BLF[:, 1:] - x_BLF[:, :-1], ((0, 0), (1, 0), (0, 0)))
    return jnp.concatenate([x_BLF, differences_BLF], axis=-1)

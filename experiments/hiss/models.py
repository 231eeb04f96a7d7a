"""The models that are compared, by name: "MIXER" is flat, "LOW/HIGH" a hierarchy, "MIXER:first" a flat one that is read
at the first sample of each chunk."""

from dataclasses import dataclass
from typing import Any, Literal

import jax

from seqmod import backbone, hierarchical
from seqmod.config import BackboneConfig
from seqmod.hierarchical import HierarchicalConfig

HEAD = "target"


@dataclass(frozen=True)
class Size:
    """Both levels of a hierarchy have `layers` blocks, a flat model twice as many; all of one width."""

    layers: int = 2
    width: int = 32
    mlp: int = 64
    heads: int = 4


@dataclass(frozen=True)
class Model:
    """A flat `config` or a hierarchy; `factor` k samples make a chunk, and the flat one is `read` at its last or first.

    Inputs are samples beside their differences.
    """

    config: BackboneConfig | HierarchicalConfig
    factor: int
    read: Literal["last", "first"] = "last"

    def init(self, key: jax.Array) -> Any:
        """Fresh parameters."""
        if isinstance(self.config, HierarchicalConfig):
            return hierarchical.init(key, self.config)
        return backbone.init(key, self.config)

    def predict(self, params: Any, x_BLF: jax.Array) -> jax.Array:
        """Targets (B, T, O) from samples (B, L, F)."""
        x_BLF = hierarchical.with_differences(x_BLF)
        if isinstance(self.config, HierarchicalConfig):
            return hierarchical.apply(params, self.config, x_BLF)[HEAD]
        y_BLO = backbone.apply(params, self.config, x_BLF)[0][HEAD]
        ends_T = hierarchical.chunk_ends(x_BLF.shape[1], self.factor)
        return y_BLO[:, ends_T if self.read == "last" else ends_T - self.factor + 1]


def model(name: str, size: Size, inputs: int, targets: int, factor: int, steps: int) -> Model:
    """The model of a name for `inputs` sensors and sequences of `steps` chunks. Raises ValueError for a bad name."""
    mixers, _, read = name.partition(":")
    if read not in ("", "first") or (read and "/" in mixers) or mixers.count("/") > 1:
        raise ValueError(f"model: {name!r}, expected MIXER, MIXER:first or LOW/HIGH")

    def stack(mixer: str, layers: int, inputs: int, head: tuple[str, int], length: int) -> BackboneConfig:
        return BackboneConfig(
            inputs=inputs,
            heads=(head,),
            mixers=(mixer,) * layers,
            width=size.width,
            mlp=size.mlp,
            attention_heads=size.heads,
            context=length,
            scan=True,
        )

    if "/" in mixers:
        low, high = mixers.split("/")
        config = HierarchicalConfig(
            stack(low, size.layers, 2 * inputs, ("summary", size.width), factor),
            stack(high, size.layers, size.width, (HEAD, targets), steps),
            factor,
        )
        return Model(config, factor)
    config = stack(mixers, 2 * size.layers, 2 * inputs, (HEAD, targets), steps * factor)
    return Model(config, factor, "first" if read else "last")

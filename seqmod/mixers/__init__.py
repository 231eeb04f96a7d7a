"""Mixers by name. One file each; `base` holds the contract."""

from typing import Any

from seqmod.mixers import (
    abc,
    attention,
    cosformer,
    deltanet,
    gam,
    gated_deltanet,
    gla,
    hydra,
    lara,
    lightning,
    linear_attention,
    local,
    longshort,
    lru,
    mamba,
    mamba2,
    monarch,
    multipath,
    nystromformer,
    performer,
    probsparse,
    retnet,
    rglru,
    s4d,
    s5,
    semiseparable,
    structured,
)
from seqmod.mixers.abc import ABCConfig
from seqmod.mixers.attention import AttentionConfig
from seqmod.mixers.base import Context, Mixer, MixerLayer, apply_mixer, mixing_matrix
from seqmod.mixers.cosformer import CosFormerConfig
from seqmod.mixers.deltanet import DeltaNetConfig
from seqmod.mixers.gam import GAMConfig
from seqmod.mixers.gated_deltanet import GatedDeltaNetConfig
from seqmod.mixers.gla import GLAConfig
from seqmod.mixers.hydra import HydraConfig
from seqmod.mixers.lara import LARAConfig
from seqmod.mixers.lightning import LightningConfig
from seqmod.mixers.linear_attention import LinearAttentionConfig
from seqmod.mixers.longshort import LongShortConfig
from seqmod.mixers.lru import LRUConfig
from seqmod.mixers.mamba import MambaConfig
from seqmod.mixers.mamba2 import Mamba2Config
from seqmod.mixers.monarch import MonarchConfig
from seqmod.mixers.multipath import MultipathConfig
from seqmod.mixers.nystromformer import NystromformerConfig
from seqmod.mixers.performer import PerformerConfig
from seqmod.mixers.positions import RopeScaling
from seqmod.mixers.probsparse import ProbSparseConfig
from seqmod.mixers.retnet import RetNetConfig
from seqmod.mixers.rglru import RGLRUConfig
from seqmod.mixers.s4d import S4DConfig
from seqmod.mixers.s5 import S5Config
from seqmod.mixers.semiseparable import SemiseparableConfig
from seqmod.mixers.structured import StructuredConfig

MIXERS: dict[str, Mixer] = {
    # Softmax attention
    "attention": attention.MIXER,
    "local": local.MIXER,
    # Linear attention
    "linear_attention": linear_attention.MIXER,
    "retnet": retnet.MIXER,
    "lightning": lightning.MIXER,
    "gla": gla.MIXER,
    "deltanet": deltanet.MIXER,
    "gated_deltanet": gated_deltanet.MIXER,
    # State spaces and gated recurrences
    "s4d": s4d.MIXER,
    "s5": s5.MIXER,
    "lru": lru.MIXER,
    "rglru": rglru.MIXER,
    "mamba": mamba.MIXER,
    "mamba2": mamba2.MIXER,
    # Bidirectional and structured matrices
    "hydra": hydra.MIXER,
    "multipath": multipath.MIXER,
    "dense": structured.DENSE,
    "toeplitz": structured.TOEPLITZ,
    "dft": structured.DFT,
    "vandermonde": structured.VANDERMONDE,
    "cauchy": structured.CAUCHY,
    "low_rank": structured.LOW_RANK,
    "semiseparable": semiseparable.MIXER,
    "monarch": monarch.MIXER,
    # Efficient attention
    "nystromformer": nystromformer.MIXER,
    "performer": performer.MIXER,
    "cosformer": cosformer.MIXER,
    "lara": lara.MIXER,
    "abc": abc.MIXER,
    "probsparse": probsparse.MIXER,
    "longshort": longshort.MIXER,
    # Local
    "gam": gam.MIXER,
}


def mixer_of(config: Any) -> Mixer:
    """The mixer that a config is of. Raises ValueError if there is none."""
    for mixer in MIXERS.values():
        if type(config) is mixer.kind:
            return mixer
    raise ValueError(f"{config!r} is no config of a mixer, expected a name of {sorted(MIXERS)} or one of their configs")


__all__ = [
    "MIXERS",
    "ABCConfig",
    "AttentionConfig",
    "Context",
    "CosFormerConfig",
    "DeltaNetConfig",
    "GAMConfig",
    "GLAConfig",
    "GatedDeltaNetConfig",
    "HydraConfig",
    "LARAConfig",
    "LRUConfig",
    "LightningConfig",
    "LinearAttentionConfig",
    "LongShortConfig",
    "Mamba2Config",
    "MambaConfig",
    "Mixer",
    "MixerLayer",
    "MonarchConfig",
    "MultipathConfig",
    "NystromformerConfig",
    "PerformerConfig",
    "ProbSparseConfig",
    "RGLRUConfig",
    "RetNetConfig",
    "RopeScaling",
    "S4DConfig",
    "S5Config",
    "SemiseparableConfig",
    "StructuredConfig",
    "apply_mixer",
    "mixer_of",
    "mixing_matrix",
]

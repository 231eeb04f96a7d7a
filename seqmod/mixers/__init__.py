"""Mixers by name. One file each; `base` holds the contract."""

from seqmod.mixers import attention, rglru
from seqmod.mixers.attention import AttentionConfig
from seqmod.mixers.base import Context, Mixer, MixerLayer, apply_mixer, mixing_matrix
from seqmod.mixers.rglru import RGLRUConfig

MIXERS: dict[str, Mixer] = {
    "attention": attention.MIXER,
    "rglru": rglru.MIXER,
}

__all__ = [
    "MIXERS",
    "AttentionConfig",
    "Context",
    "Mixer",
    "MixerLayer",
    "RGLRUConfig",
    "apply_mixer",
    "mixing_matrix",
]

"""Mixers by name. One file each; `base` holds the contract."""

from seqmod.mixers import attention, rglru
from seqmod.mixers.attention import Attention, AttentionConfig
from seqmod.mixers.base import Mixer
from seqmod.mixers.rglru import RGLRU, RGLRUConfig

MIXERS: dict[str, Mixer] = {"attention": attention.MIXER, "rglru": rglru.MIXER}

__all__ = ["MIXERS", "RGLRU", "Attention", "AttentionConfig", "Mixer", "RGLRUConfig"]

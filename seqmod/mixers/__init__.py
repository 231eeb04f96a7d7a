"""Mixers by name. One file each; `base` holds the contract."""

from typing import Any

from seqmod.mixers import attention, rglru
from seqmod.mixers.attention import AttentionConfig
from seqmod.mixers.base import Context, Mixer, MixerLayer, apply_mixer, mixing_matrix
from seqmod.mixers.rglru import RGLRUConfig

MIXERS: dict[str, Mixer] = {
    "attention": attention.MIXER,
    "rglru": rglru.MIXER,
}


def mixer_of(config: Any) -> Mixer:
    """The mixer that a config is of. Raises ValueError if there is none."""
    for mixer in MIXERS.values():
        if type(config) is mixer.kind:
            return mixer
    raise ValueError(f"{config!r} is no config of a mixer, expected a name of {sorted(MIXERS)} or one of their configs")


__all__ = [
    "MIXERS",
    "AttentionConfig",
    "Context",
    "Mixer",
    "MixerLayer",
    "RGLRUConfig",
    "apply_mixer",
    "mixer_of",
    "mixing_matrix",
]

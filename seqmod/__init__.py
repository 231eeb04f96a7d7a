"""Sequence models whose residual stream can be read and edited.

`backbone` is the model, `metacontroller` what discovers edits of it, `objectives` their losses; each is a module of
pure functions over a config and parameters. `Backbone`, `Metacontroller` and the mixers are linen modules around them.
"""

from seqmod import backbone, generate, metacontroller, objectives
from seqmod.backbone import Backbone
from seqmod.config import BackboneConfig
from seqmod.embedding import Inputs
from seqmod.metacontroller import Metacontroller, MetacontrollerConfig
from seqmod.mixers import MIXERS, AttentionConfig, Mixer, MixerLayer, RGLRUConfig, apply_mixer, mixing_matrix
from seqmod.residual import Edit, Operator, low_rank_update

__all__ = [
    "MIXERS",
    "AttentionConfig",
    "Backbone",
    "BackboneConfig",
    "Edit",
    "Inputs",
    "Metacontroller",
    "MetacontrollerConfig",
    "Mixer",
    "MixerLayer",
    "Operator",
    "RGLRUConfig",
    "apply_mixer",
    "backbone",
    "generate",
    "low_rank_update",
    "metacontroller",
    "mixing_matrix",
    "objectives",
]

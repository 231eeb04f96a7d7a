"""Sequence models whose residual stream can be read, edited and cut in two.

Each of these is a module of pure functions over a config and parameters; `Backbone`, `Metacontroller` and `MixerLayer`
are linen modules around them.

- `mixers`: what moves information along a sequence, by name in `MIXERS`; `backbone`: the model made of them;
  `generate`: sampling and beam search; `hierarchical`: two models of two rates; `stream`: gradients of long sequences
- `residual`, `bijections`: edits of the stream; `probes`: what it holds, and what it does (interchange interventions);
  `metacontroller`: what discovers edits
- `objectives`: losses; `train`: supervised training; `checkpoint`, `npz`: what is kept
- `interop`: published weights
"""

from seqmod import (
    backbone,
    bijections,
    generate,
    hierarchical,
    interop,
    metacontroller,
    objectives,
    probes,
    stream,
    train,
)
from seqmod.backbone import Backbone
from seqmod.config import BackboneConfig
from seqmod.embedding import Inputs
from seqmod.generate import Legality, beam_search, sample
from seqmod.metacontroller import Metacontroller, MetacontrollerConfig
from seqmod.mixers import MIXERS, Context, Mixer, MixerLayer, apply_mixer, mixing_matrix
from seqmod.probes import ProbeConfig, fit_alignment, fit_probe, interchange, interchange_accuracy
from seqmod.residual import Edit, Operator, low_rank_update
from seqmod.stream import stream_loss
from seqmod.train import AdamWConfig, fit

__all__ = [
    "MIXERS",
    "AdamWConfig",
    "Backbone",
    "BackboneConfig",
    "Context",
    "Edit",
    "Inputs",
    "Legality",
    "Metacontroller",
    "MetacontrollerConfig",
    "Mixer",
    "MixerLayer",
    "Operator",
    "ProbeConfig",
    "apply_mixer",
    "backbone",
    "beam_search",
    "bijections",
    "fit",
    "fit_alignment",
    "fit_probe",
    "generate",
    "hierarchical",
    "interchange",
    "interchange_accuracy",
    "interop",
    "low_rank_update",
    "metacontroller",
    "mixing_matrix",
    "objectives",
    "probes",
    "sample",
    "stream",
    "stream_loss",
    "train",
]

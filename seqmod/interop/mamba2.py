"""Mamba-2 (Dao and Gu, arXiv 2405.21060): RMS norms and mixers alone, without MLPs."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from seqmod.config import BackboneConfig
from seqmod.interop.published import HEAD, Arrays, Options, Tensors, among, flag, heads, size
from seqmod.mixers import mamba2
from seqmod.mixers.base import Params
from seqmod.mixers.mamba2 import Mamba2Config


def convert(options: Options, arrays: Arrays) -> tuple[BackboneConfig, Params]:
    """The backbone of a published config, with its parameters."""
    D, expand = size(options, "hidden_size"), size(options, "expand", 2)
    head_dim, groups = size(options, "head_dim", 64), size(options, "n_groups", 8)
    if size(options, "num_heads", 128) * head_dim != expand * D:
        raise ValueError(
            f"load: num_heads is {options.get('num_heads', 128)}, expected expand {expand} times hidden_size {D} / "
            f"head_dim {head_dim}"
        )
    among(options, "hidden_act", "silu", {"silu": None, "swish": None})
    among(options, "use_bias", False, {False: None})
    epsilon = options.get("layer_norm_epsilon", 1e-5)
    low, high = (_number(limit) for limit in options.get("time_step_limit", (0.0, math.inf)))
    mixer = Mamba2Config(
        width=D,
        expand=expand,
        head_dim=head_dim,
        state=size(options, "state_size", 128),
        groups=groups,
        norm_groups=groups,
        kernel=size(options, "conv_kernel", 4),
        time_step_limit=(low, high),
        norm_epsilon=epsilon,
    )
    tied = flag(options, "tie_word_embeddings", False)
    vocabulary = size(options, "vocab_size")
    config = BackboneConfig(
        heads=((HEAD, vocabulary),),
        mixers=(mixer,) * size(options, "num_hidden_layers"),
        width=D,
        mlp=0,
        vocabulary=vocabulary,
        epsilon=epsilon,
        tied=HEAD if tied else None,
    )
    conv_bias = flag(options, "use_conv_bias", True)
    return config, _params(config, Tensors(arrays, "backbone."), tied, conv_bias)


def _number(value: Any) -> float:
    """A float; those that JSON does not have are stored as {"__float__": "Infinity"}."""
    return float(value["__float__"] if isinstance(value, Mapping) else value)


def _params(config: BackboneConfig, tensors: Tensors, tied: bool, conv_bias: bool) -> Params:
    D, embedding = config.width, "backbone.embeddings.weight"
    tokens_VD = tensors.take(embedding, config.vocabulary, D)
    params: Params = {
        "tokens": tokens_VD,
        "norm": tensors.take("backbone.norm_f.weight", D),
        "heads": heads(tensors, tied, embedding, tokens_VD),
    }
    for layer, mixer in enumerate(config.mixers):
        at = f"backbone.layers.{layer}"
        shapes = _shapes(mixer)
        if not conv_bias:
            del shapes["conv1d.bias"]
        block = {name: tensors.take(f"{at}.mixer.{name}", *shape) for name, shape in shapes.items()}
        params[f"block_{layer}"] = {
            "mixer_norm": tensors.take(f"{at}.norm.weight", D),
            "mixer": mamba2.from_published({"conv1d.bias": np.zeros(mixer.channels, np.float32)} | block),
        }
    tensors.finish()
    return params


def _shapes(mixer: Mamba2Config) -> dict[str, tuple[int, ...]]:
    D, E, H, U = mixer.width, mixer.inner, mixer.heads, mixer.channels
    return {
        "in_proj.weight": (E + U + H, D),
        "conv1d.weight": (U, 1, mixer.kernel),
        "conv1d.bias": (U,),
        "A_log": (H,),
        "D": (H,),
        "dt_bias": (H,),
        "norm.weight": (E,),
        "out_proj.weight": (D, E),
    }

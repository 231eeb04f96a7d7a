"""Mamba (Gu and Dao, arXiv 2312.00752): RMS norms and mixers alone, without MLPs."""

import math

from seqmod.config import BackboneConfig
from seqmod.interop.published import HEAD, Arrays, Options, Tensors, among, flag, heads, size
from seqmod.mixers import mamba
from seqmod.mixers.base import Params
from seqmod.mixers.mamba import MambaConfig


def convert(options: Options, arrays: Arrays) -> tuple[BackboneConfig, Params]:
    """The backbone of a published config, with its parameters."""
    D = size(options, "hidden_size")
    expand = size(options, "expand", 2)
    if size(options, "intermediate_size", expand * D) != expand * D:
        raise ValueError(
            f"load: intermediate_size is {options['intermediate_size']}, expected expand * hidden_size, {expand * D}"
        )
    among(options, "hidden_act", "silu", {"silu": None, "swish": None})
    automatic = options.get("time_step_rank", "auto") == "auto"
    mixer = MambaConfig(
        width=D,
        states=size(options, "state_size", 16),
        expand=expand,
        kernel=size(options, "conv_kernel", 4),
        rank=math.ceil(D / 16) if automatic else size(options, "time_step_rank"),
        bias=flag(options, "use_bias", False),
        conv_bias=flag(options, "use_conv_bias", True),
    )
    tied = flag(options, "tie_word_embeddings", True)
    vocabulary = size(options, "vocab_size")
    config = BackboneConfig(
        heads=((HEAD, vocabulary),),
        mixers=(mixer,) * size(options, "num_hidden_layers"),
        width=D,
        mlp=0,
        vocabulary=vocabulary,
        epsilon=options.get("layer_norm_epsilon", 1e-5),
        tied=HEAD if tied else None,
    )
    return config, _params(config, Tensors(arrays, "backbone."), tied)


def _params(config: BackboneConfig, tensors: Tensors, tied: bool) -> Params:
    D, embedding = config.width, "backbone.embeddings.weight"
    tokens_VD = tensors.take(embedding, config.vocabulary, D)
    params: Params = {
        "tokens": tokens_VD,
        "norm": tensors.take("backbone.norm_f.weight", D),
        "heads": heads(tensors, tied, embedding, tokens_VD),
    }
    for layer, mixer in enumerate(config.mixers):
        at = f"backbone.layers.{layer}"
        block = {name: tensors.take(f"{at}.mixer.{name}", *shape) for name, shape in _shapes(mixer).items()}
        params[f"block_{layer}"] = {
            "mixer_norm": tensors.take(f"{at}.norm.weight", D),
            "mixer": mamba.from_published(mixer, block),
        }
    tensors.finish()
    return params


def _shapes(mixer: MambaConfig) -> dict[str, tuple[int, ...]]:
    D, I, N, R = mixer.width, mixer.inner, mixer.states, mixer.dt_rank
    shapes = {
        "in_proj.weight": (2 * I, D),
        "conv1d.weight": (I, 1, mixer.kernel),
        "x_proj.weight": (R + 2 * N, I),
        "dt_proj.weight": (I, R),
        "dt_proj.bias": (I,),
        "A_log": (I, N),
        "D": (I,),
        "out_proj.weight": (D, I),
    }
    if mixer.conv_bias:
        shapes["conv1d.bias"] = (I,)
    if mixer.bias:
        shapes |= {"in_proj.bias": (2 * I,), "out_proj.bias": (D,)}
    return shapes

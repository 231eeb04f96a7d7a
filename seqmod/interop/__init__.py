"""Published weights, from safetensors into a backbone that computes the same logits.

    config, params = interop.load("path/to/folder")
    logits_BLV = backbone.apply(params, config, tokens_BL)[0]["logits"]

`model_type`      options that are followed                                   refused
mamba             expand, kernel, rank of dt, all biases, tied or not         an activation other than silu
mamba2            expand, kernel, groups, limits of dt, bias of the           biases of projections, an activation
                  convolution, tied or not                                    other than silu
recurrent_gemma   pattern of blocks, width of recurrence, window, grouped     an activation other than tanh GELU
                  heads, biases of attention, soft cap, tied or not
gpt2              scales of scores, width of MLPs, tied or not                cross attention, activations other than
                                                                              tanh GELU and relu
llama, mistral,   grouped heads, width of heads, biases, base of rotations,   scaled or partial rotations, activations
qwen2, qwen3      windows of all or some blocks, tied or not                  other than silu

Quantised weights and options by block (`per_layer_config`) are refused too; options not mentioned here are not looked
at, since those of training and generation change nothing. Tensors must be those of the config, no more and no less.
Parameters are float32, whatever the type they are stored in. What is computed is what the `transformers` package
computes, whose results the tests compare with.
"""

from pathlib import Path

import jax
import jax.numpy as jnp

from seqmod.config import BackboneConfig
from seqmod.interop import gpt2, llama, mamba, mamba2, recurrent_gemma
from seqmod.interop.published import Arrays, Family, Options, read, refuse
from seqmod.mixers.base import Params

FAMILIES: dict[str, Family] = {
    "mamba": mamba.convert,
    "mamba2": mamba2.convert,
    "recurrent_gemma": recurrent_gemma.convert,
    "gpt2": gpt2.convert,
    "llama": llama.convert,
    "mistral": llama.convert,
    "qwen2": llama.convert,
    "qwen3": llama.convert,
}

__all__ = ["FAMILIES", "convert", "load"]


def load(path: str | Path, options: Options | None = None) -> tuple[BackboneConfig, Params]:
    """Config and parameters of a published model, with the one head "logits".

    `path` is a folder with `config.json` and `model.safetensors`, or shards of it and their index, or a safetensors
    file; `options` are then what would be in `config.json`. Raises ValueError for models that a backbone cannot be, and
    for tensors that are missing, unexpected, or have another shape than the config says.
    """
    return convert(*read(path, options))


def convert(options: Options, arrays: Arrays) -> tuple[BackboneConfig, Params]:
    """`load` from what is already in memory."""
    kind = options.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"load: model_type is {kind!r}, expected one of {sorted(FAMILIES)}")
    refuse(options, "quantization_config", "per_layer_config")
    config, params = FAMILIES[kind](options, arrays)
    return config, jax.tree.map(jnp.asarray, params)

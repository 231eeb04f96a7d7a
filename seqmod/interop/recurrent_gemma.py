"""RecurrentGemma (Botev et al., arXiv 2404.07839), a Griffin: RG-LRUs and local attention in turn, gated MLPs.

Gains of norms are stored as their differences from one. Embedded tokens are multiplied by the root of the width,
rounded to bfloat16, whatever the type of the rest.
"""

import jax.numpy as jnp
import numpy as np

from seqmod.blocks import Activation
from seqmod.config import BackboneConfig
from seqmod.interop.parts import attention, gated_mlp
from seqmod.interop.published import HEAD, Arrays, Options, Tensors, among, flag, heads, rotation, size
from seqmod.mixers import rglru
from seqmod.mixers.attention import AttentionConfig
from seqmod.mixers.base import Params, check_heads
from seqmod.mixers.rglru import RGLRUConfig

_ACTIVATIONS: dict[str, Activation] = {"gelu_pytorch_tanh": "geglu"}


def convert(options: Options, arrays: Arrays) -> tuple[BackboneConfig, Params]:
    """The backbone of a published config, with its parameters."""
    D, H, layers = (
        size(options, "hidden_size"),
        size(options, "num_attention_heads"),
        size(options, "num_hidden_layers"),
    )
    activation = among(options, "hidden_activation", "gelu_pytorch_tanh", _ACTIVATIONS)
    rope = rotation(options)
    kinds: dict[str, RGLRUConfig | AttentionConfig] = {
        "recurrent": RGLRUConfig(
            width=D,
            recurrence=size(options, "lru_width", D),
            heads=H,
            kernel=size(options, "conv1d_width", 4),
            bias=True,
            whole_first=True,
        ),
        "attention": AttentionConfig(
            width=D,
            heads=H,
            head_dim=check_heads("load", D, H),
            groups=size(options, "num_key_value_heads", H),
            position="rope",
            rope_base=rope.base,
            rope_fraction=0.5 if rope.fraction is None else rope.fraction,
            rope_scaling=rope.scaling,
            window=size(options, "attention_window_size", 2048),
            qkv_bias=flag(options, "attention_bias", False),
            out_bias=True,
        ),
    }
    pattern = options.get("block_types") or ("recurrent", "recurrent", "attention")
    mixers = [among({"block_types": each}, "block_types", None, kinds) for each in pattern]
    tied = flag(options, "tie_word_embeddings", True)
    vocabulary = size(options, "vocab_size")
    hidden = size(options, "intermediate_size")
    if hidden % 2:
        raise ValueError(f"load: intermediate_size is {hidden}, expected an even number: MLPs are half as wide")
    config = BackboneConfig(
        heads=((HEAD, vocabulary),),
        mixers=tuple(mixers[layer % len(mixers)] for layer in range(layers)),
        width=D,
        mlp=hidden // 2,
        vocabulary=vocabulary,
        activation=activation,
        epsilon=options.get("rms_norm_eps", 1e-6),
        output_bias=True,
        tied=HEAD if tied else None,
        embedding_scale=float(jnp.bfloat16(D**0.5)),
        logit_cap=options.get("logits_soft_cap", 30.0),
    )
    return config, _params(config, Tensors(arrays, "model."), tied)


def _params(config: BackboneConfig, tensors: Tensors, tied: bool) -> Params:
    D, embedding = config.width, "model.embed_tokens.weight"
    tokens_VD = tensors.take(embedding, config.vocabulary, D)

    def gain(name: str) -> np.ndarray:
        return 1 + tensors.take(f"{name}.weight", D)

    params: Params = {
        "tokens": tokens_VD,
        "norm": gain("model.final_norm"),
        "heads": heads(tensors, tied, embedding, tokens_VD),
    }
    for layer, mixer in enumerate(config.mixers):
        at = f"model.layers.{layer}"
        inside = f"{at}.temporal_block"
        recurrent = isinstance(mixer, RGLRUConfig)
        params[f"block_{layer}"] = {
            "mixer_norm": gain(f"{at}.temporal_pre_norm"),
            "mixer": _recurrence(tensors, inside, mixer) if recurrent else attention(tensors, inside, mixer),
            "mlp_norm": gain(f"{at}.channel_pre_norm"),
            **gated_mlp(tensors, f"{at}.mlp_block", D, config.mlp, True),
        }
    tensors.finish()
    return params


def _recurrence(tensors: Tensors, at: str, mixer: RGLRUConfig) -> Params:
    D, N, H = mixer.width, mixer.recurrence, mixer.heads
    shapes = {
        "linear_y.weight": (N, D),
        "linear_y.bias": (N,),
        "linear_x.weight": (N, D),
        "linear_x.bias": (N,),
        "linear_out.weight": (D, N),
        "linear_out.bias": (D,),
        "conv_1d.weight": (N, 1, mixer.kernel),
        "conv_1d.bias": (N,),
        "rg_lru.recurrent_param": (N,),
    }
    for gate in ("recurrent", "input"):
        shapes[f"rg_lru.{gate}_gate_weight"] = (H, N // H, N // H)
        shapes[f"rg_lru.{gate}_gate_bias"] = (H, N // H)
    return rglru.from_published(mixer, {name: tensors.take(f"{at}.{name}", *shape) for name, shape in shapes.items()})

"""GPT-2 (Radford et al., 2019): learned positions, layer norms, biases everywhere. Matrices are stored as (in, out)."""

from seqmod.blocks import Activation
from seqmod.config import BackboneConfig
from seqmod.interop.published import HEAD, Arrays, Options, Tensors, among, flag, heads, refuse, size
from seqmod.mixers.attention import AttentionConfig
from seqmod.mixers.base import Params, check_heads

# Both names stand for the same formula, with a tanh, which "gelu" here means too; "gelu" there is another one.
_ACTIVATIONS: dict[str, Activation] = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "relu": "relu"}


def convert(options: Options, arrays: Arrays) -> tuple[BackboneConfig, Params]:
    """The backbone of a published config, with its parameters."""
    refuse(options, "add_cross_attention")
    D, H = size(options, "n_embd"), size(options, "n_head")
    K = check_heads("load", D, H)
    scale = K**-0.5 if flag(options, "scale_attn_weights", True) else 1.0
    by_layer = flag(options, "scale_attn_by_inverse_layer_idx", False)
    mixers = tuple(
        AttentionConfig(
            width=D,
            heads=H,
            head_dim=K,
            position="none",
            qkv_bias=True,
            out_bias=True,
            scale=scale / (layer + 1) if by_layer else scale,
        )
        for layer in range(size(options, "n_layer"))
    )
    tied = flag(options, "tie_word_embeddings", True)
    vocabulary = size(options, "vocab_size")
    config = BackboneConfig(
        heads=((HEAD, vocabulary),),
        mixers=mixers,
        width=D,
        mlp=size(options, "n_inner", 4 * D),
        context=size(options, "n_positions"),
        vocabulary=vocabulary,
        activation=among(options, "activation_function", "gelu_new", _ACTIVATIONS),
        norm="layer",
        epsilon=options.get("layer_norm_epsilon", 1e-5),
        output_bias=True,
        positions="learned",
        tied=HEAD if tied else None,
    )
    # The first releases hold the causal masks too.
    return config, _params(config, Tensors(arrays, "transformer.", (".attn.bias", ".attn.masked_bias")), tied)


def _params(config: BackboneConfig, tensors: Tensors, tied: bool) -> Params:
    D, F, embedding = config.width, config.mlp, "transformer.wte.weight"
    tokens_VD = tensors.take(embedding, config.vocabulary, D)
    params: Params = {
        "tokens": tokens_VD,
        "positions": tensors.take("transformer.wpe.weight", config.context, D),
        "norm": _norm(tensors, "transformer.ln_f", D),
        "heads": heads(tensors, tied, embedding, tokens_VD),
    }
    for layer, mixer in enumerate(config.mixers):
        at = f"transformer.h.{layer}"
        params[f"block_{layer}"] = {
            "mixer_norm": _norm(tensors, f"{at}.ln_1", D),
            "mixer": _attention(tensors, f"{at}.attn", mixer),
            "mlp_norm": _norm(tensors, f"{at}.ln_2", D),
            "mlp_up": tensors.take(f"{at}.mlp.c_fc.weight", D, F),
            "mlp_up_bias": tensors.take(f"{at}.mlp.c_fc.bias", F),
            "mlp_down": tensors.take(f"{at}.mlp.c_proj.weight", F, D),
            "mlp_down_bias": tensors.take(f"{at}.mlp.c_proj.bias", D),
        }
    tensors.finish()
    return params


def _norm(tensors: Tensors, at: str, width: int) -> Params:
    return {"gain": tensors.take(f"{at}.weight", width), "bias": tensors.take(f"{at}.bias", width)}


def _attention(tensors: Tensors, at: str, mixer: AttentionConfig) -> Params:
    D, H, K = mixer.width, mixer.heads, mixer.head_dim
    qkv_D3HK = tensors.take(f"{at}.c_attn.weight", D, 3 * D).reshape(D, 3, H, K)
    bias_3HK = tensors.take(f"{at}.c_attn.bias", 3 * D).reshape(3, H, K)
    params = {name: qkv_D3HK[:, index] for index, name in enumerate("qkv")}
    params |= {f"{name}_bias": bias_3HK[index] for index, name in enumerate("qkv")}
    params["out"] = tensors.take(f"{at}.c_proj.weight", D, D).reshape(H, K, D)
    params["out_bias"] = tensors.take(f"{at}.c_proj.bias", D)
    return params

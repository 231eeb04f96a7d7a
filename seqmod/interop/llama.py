"""Llama (Touvron et al., arXiv 2302.13971) and its kin: Mistral with a sliding window, Qwen2 with biases of queries,
keys and values, Qwen3 with norms of queries and keys."""

from seqmod.config import BackboneConfig
from seqmod.interop.parts import attention, gated_mlp
from seqmod.interop.published import HEAD, Arrays, Options, Tensors, among, flag, heads, rotation, size
from seqmod.mixers.attention import AttentionConfig
from seqmod.mixers.base import Params


def convert(options: Options, arrays: Arrays) -> tuple[BackboneConfig, Params]:
    """The backbone of a published config, with its parameters."""
    kind, D = options["model_type"], size(options, "hidden_size")
    among(options, "hidden_act", "silu", {"silu": None, "swish": None})
    rope = rotation(options)
    if rope.fraction not in (None, 1.0):
        raise ValueError(f"load: partial_rotary_factor is {rope.fraction}, expected 1.0")
    H = size(options, "num_attention_heads")
    epsilon = options.get("rms_norm_eps", 1e-6)
    # Mistral has no such option, Qwen2's biases are not one.
    bias = kind in ("llama", "qwen3") and flag(options, "attention_bias", False)
    mixers = tuple(
        AttentionConfig(
            width=D,
            heads=H,
            head_dim=size(options, "head_dim", 128 if kind == "qwen3" else D // H),
            groups=size(options, "num_key_value_heads", H),
            position="rope",
            rope_base=rope.base,
            rope_scaling=rope.scaling,
            window=window,
            qkv_bias=bias or kind == "qwen2",
            out_bias=bias,
            qk_norm=kind == "qwen3",
            qk_norm_epsilon=epsilon,
        )
        for window in _windows(kind, options, size(options, "num_hidden_layers"))
    )
    tied = flag(options, "tie_word_embeddings", False)
    vocabulary = size(options, "vocab_size")
    config = BackboneConfig(
        heads=((HEAD, vocabulary),),
        mixers=mixers,
        width=D,
        mlp=size(options, "intermediate_size"),
        context=size(options, "max_position_embeddings", 2048),
        vocabulary=vocabulary,
        activation="swiglu",
        epsilon=epsilon,
        output_bias=kind == "llama" and flag(options, "mlp_bias", False),
        tied=HEAD if tied else None,
    )
    return config, _params(config, Tensors(arrays, "model.", (".rotary_emb.inv_freq",)), tied)


def _windows(kind: str, options: Options, layers: int) -> list[int | None]:
    """Keys that each block sees, None for all."""
    window = options.get("sliding_window", 4096)
    if kind == "mistral":
        return [window] * layers
    if kind == "llama":
        return [None] * layers
    if not flag(options, "use_sliding_window", False):
        window = None
    first = size(options, "max_window_layers", 28) if options.get("max_window_layers") != 0 else 0
    default = ["full_attention" if window is None or i < first else "sliding_attention" for i in range(layers)]
    types = options.get("layer_types") or default
    if len(types) != layers:
        raise ValueError(f"load: layer_types has {len(types)} entries, expected num_hidden_layers {layers}")
    meanings: dict[str, int | None] = {"full_attention": None}
    if window is not None:
        meanings["sliding_attention"] = window
    return [among({"layer_types": each}, "layer_types", None, meanings) for each in types]


def _params(config: BackboneConfig, tensors: Tensors, tied: bool) -> Params:
    D, embedding = config.width, "model.embed_tokens.weight"
    tokens_VD = tensors.take(embedding, config.vocabulary, D)
    params: Params = {
        "tokens": tokens_VD,
        "norm": tensors.take("model.norm.weight", D),
        "heads": heads(tensors, tied, embedding, tokens_VD),
    }
    for layer, mixer in enumerate(config.mixers):
        at = f"model.layers.{layer}"
        params[f"block_{layer}"] = {
            "mixer_norm": tensors.take(f"{at}.input_layernorm.weight", D),
            "mixer": attention(tensors, f"{at}.self_attn", mixer),
            "mlp_norm": tensors.take(f"{at}.post_attention_layernorm.weight", D),
            **gated_mlp(tensors, f"{at}.mlp", D, config.mlp, config.output_bias),
        }
    tensors.finish()
    return params

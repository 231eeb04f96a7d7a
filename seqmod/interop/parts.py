"""Tensors of blocks that several families have: attention with a map each for queries, keys and values; gated MLPs."""

import numpy as np

from seqmod.interop.published import Tensors
from seqmod.mixers.attention import AttentionConfig
from seqmod.mixers.base import Params


def attention(tensors: Tensors, at: str, mixer: AttentionConfig) -> Params:
    """Parameters of `mixer` from `q_proj`, `k_proj`, `v_proj`, `o_proj` and, with `qk_norm`, `q_norm` and `k_norm`."""
    D, H, G, K = mixer.width, mixer.heads, mixer.kv_heads, mixer.head_dim
    params: dict[str, np.ndarray] = {}
    for name, count in (("q", H), ("k", G), ("v", G)):
        params[name] = tensors.matrix(f"{at}.{name}_proj", D, count * K).reshape(D, count, K)
        if mixer.qkv_bias:
            params[f"{name}_bias"] = tensors.take(f"{at}.{name}_proj.bias", count * K).reshape(count, K)
    params["out"] = tensors.matrix(f"{at}.o_proj", H * K, D).reshape(H, K, D)
    if mixer.out_bias:
        params["out_bias"] = tensors.take(f"{at}.o_proj.bias", D)
    if mixer.qk_norm:
        params |= {f"{name}_norm": tensors.take(f"{at}.{name}_norm.weight", K) for name in "qk"}
    return params


def gated_mlp(tensors: Tensors, at: str, width: int, hidden: int, bias: bool) -> Params:
    """Parameters of a block's gated MLP from `gate_proj`, `up_proj` and `down_proj`."""
    params = {}
    for name in ("gate", "up"):
        params[f"mlp_{name}"] = tensors.matrix(f"{at}.{name}_proj", width, hidden)
        params[f"mlp_{name}_bias"] = tensors.bias(f"{at}.{name}_proj", hidden, bias)
    params["mlp_down"] = tensors.matrix(f"{at}.down_proj", hidden, width)
    if bias:
        params["mlp_down_bias"] = tensors.take(f"{at}.down_proj.bias", width)
    return params

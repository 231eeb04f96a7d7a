"""The two ends of a backbone: what is embedded, and what is read out of the residual stream."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from seqmod.blocks import affine, init_norm, normalise
from seqmod.config import BackboneConfig
from seqmod.mixers.base import Params, over_last, project, scaled_normal, segment_runs


class Inputs(NamedTuple):
    """What enters the model at each step: `features` (..., F), `tokens` (...) whose negative ids stand for no token,
    and `conditioning` (..., C). What is embedded is summed."""

    features: jax.Array | None = None
    tokens: jax.Array | None = None
    conditioning: jax.Array | None = None


Input = jax.Array | Inputs
"""An array is features, or tokens if it holds integers."""


def init(k_embed: jax.Array, k_heads: jax.Array, config: BackboneConfig) -> Params:
    """Fresh parameters "embed", "tokens" and "positions", as far as the config has them, "norm" and "heads"."""
    D, scale = config.width, config.init_scale
    params: Params = {}
    if config.inputs:
        kernel = scaled_normal(k_embed, (config.inputs, D), config.inputs, scale)
        params["embed"] = {"kernel": kernel, "bias": jnp.zeros(D)}
    if config.vocabulary:
        params["tokens"] = scaled_normal(jax.random.fold_in(k_embed, 1), (config.vocabulary, D), D, scale)
    if config.positions == "learned":
        params["positions"] = scaled_normal(jax.random.fold_in(k_embed, 2), (config.context, D), D, scale)
    params["norm"] = init_norm(config.block(0))
    params["heads"] = {}
    for index, (name, size) in enumerate(config.heads):
        head = {"bias": jnp.zeros(size)}
        if name != config.tied:
            head["kernel"] = scaled_normal(jax.random.fold_in(k_heads, index), (D, size), D, scale)
        params["heads"][name] = head
    return params


def as_inputs(config: BackboneConfig, inputs: Input) -> Inputs:
    """`Inputs` of an array. Raises ValueError for what the config has no room for."""
    if not isinstance(inputs, Inputs):
        integer = jnp.issubdtype(inputs.dtype, jnp.integer)
        inputs = Inputs(tokens=inputs) if integer else Inputs(features=inputs)
    for name, array, size in (
        ("features", inputs.features, config.inputs),
        ("tokens", inputs.tokens, config.vocabulary),
        ("conditioning", inputs.conditioning, config.conditioning),
    ):
        if array is not None and not size:
            raise ValueError(f"inputs have {name}, but the config has a size of 0 for them")
        if array is not None and name != "tokens" and array.shape[-1] != size:
            raise ValueError(f"inputs: {name} has shape {array.shape}, expected {size} in its last axis")
    if inputs.features is None and inputs.tokens is None:
        raise ValueError("inputs have neither features nor tokens")
    return inputs


def embed(params: Params, config: BackboneConfig, inputs: Inputs) -> jax.Array:
    """Embedding (..., D) without positions."""
    e = None
    if inputs.features is not None:
        features = inputs.features.astype(config.dtype)
        e = affine(features, params["embed"]["kernel"], params["embed"]["bias"])
    if inputs.tokens is not None:
        rows = params["tokens"][jnp.maximum(inputs.tokens, 0)] * config.embedding_scale
        rows = jnp.where(inputs.tokens[..., None] >= 0, rows, 0).astype(config.dtype)
        e = rows if e is None else e + rows
    assert e is not None  # `as_inputs` has seen to it
    return e


def positions(params: Params, config: BackboneConfig, length: int, segment_ids: jax.Array | None) -> jax.Array:
    """Learned positions (1 or B, L, D), which start anew in each segment."""
    if length > config.context:
        raise ValueError(f"inputs have {length} steps, more than the {config.context} learned positions of context")
    index_BL = jnp.arange(length)[None]
    if segment_ids is not None:
        runs_BL = segment_runs(segment_ids)
        starts_BL = jnp.pad(runs_BL[:, 1:] != runs_BL[:, :-1], ((0, 0), (1, 0)))
        index_BL = index_BL - jax.lax.cummax(jnp.where(starts_BL, index_BL, 0), axis=1)
    return params["positions"][index_BL].astype(config.dtype)


def read_out(params: Params, config: BackboneConfig, e: jax.Array) -> dict[str, jax.Array]:
    """Outputs by head name, float32, from the residual stream (..., D)."""
    normed = normalise(config.block(0), params["norm"], e)
    outputs = {}
    for name, head in params["heads"].items():
        if name == config.tied:
            y = project("...D,VD->...V", normed, params["tokens"]) + over_last(head["bias"], e.ndim).astype(e.dtype)
        else:
            y = affine(normed, head["kernel"], head["bias"])
        y = y.astype(jnp.float32)
        outputs[name] = y if config.logit_cap is None else config.logit_cap * jnp.tanh(y / config.logit_cap)
    return outputs

"""A causal sequence model of pre-norm residual blocks whose residual stream can be read, edited and cut in two.

    e_0 = W_in x,   e_l = e_{l-1} + mixer_l(norm(e_{l-1})),  then  + mlp_l(norm(.)),   outputs = W_h norm(e_last)

`apply` runs it in parallel over a sequence, `step` one token at a time; both take edits and return taps. `lower` and
`upper` are the model before and after a layer of the residual stream, in both forms: internal RL needs both halves.
Base models of the paper: arXiv 2512.20605, D.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmod.mixers import MIXERS
from seqmod.mixers.base import Params, rms_norm, scaled_normal
from seqmod.residual import Edit, apply_edits


@dataclass(frozen=True)
class BackboneConfig:
    """`inputs` F features in; `heads` output sizes by name; `mixers` one name per block.

    `attention_heads` heads for every mixer; `mlp` hidden width of the ReLU MLP; `context` the distance beyond which
    earlier steps look alike to a relative position bias. A config that a mixer cannot serve raises ValueError.
    """

    inputs: int
    heads: tuple[tuple[str, int], ...]
    mixers: tuple[str, ...] = ("attention",) * 4
    width: int = 64
    mlp: int = 256
    attention_heads: int = 4
    context: int = 128
    init_scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.mixers:
            raise ValueError("BackboneConfig: mixers is empty, expected one name per block")
        for name in self.mixers:
            if name not in MIXERS:
                raise ValueError(f"BackboneConfig: mixer {name!r} is unknown, expected one of {sorted(MIXERS)}")
        if min(self.inputs, self.width, self.mlp, self.attention_heads) < 1:
            raise ValueError(
                f"BackboneConfig: inputs {self.inputs}, width {self.width}, mlp {self.mlp} and "
                f"attention_heads {self.attention_heads} must be positive"
            )
        if len(dict(self.heads)) != len(self.heads):
            raise ValueError(f"BackboneConfig: heads {self.heads} name a head twice")
        for layer in range(self.layers):
            self.mixer_config(layer)

    @property
    def layers(self) -> int:
        """Number of blocks; the residual stream has layers 0..layers."""
        return len(self.mixers)

    def mixer_config(self, layer: int) -> Any:
        """Config of the mixer of a block."""
        return MIXERS[self.mixers[layer]].config(self.width, self.attention_heads, self.init_scale, self.context)

    def check_layer(self, layer: int) -> None:
        """Raise ValueError where the residual stream has no such layer."""
        if not 0 <= layer <= self.layers:
            raise ValueError(f"layer is {layer}, expected 0 (the embedding) to {self.layers} (the last block)")


def _check_edits(config: BackboneConfig, edits: Sequence[Edit]) -> tuple[Edit, ...]:
    for edit in edits:
        config.check_layer(edit.layer)
    return tuple(edits)


def _check_state(name: str, state: "State", blocks: int) -> None:
    if len(state) != blocks:
        raise ValueError(f"{name}: state has {len(state)} blocks, expected {blocks}")


def init(key: jax.Array, config: BackboneConfig) -> Params:
    """Fresh parameters as a nested dict."""
    k_embed, k_heads, *k_blocks = jax.random.split(key, 2 + config.layers)
    D, scale = config.width, config.init_scale
    blocks = {}
    for layer, k_block in enumerate(k_blocks):
        k_mixer, k_up, k_down = jax.random.split(k_block, 3)
        blocks[f"block_{layer}"] = {
            "mixer_norm": jnp.ones(D),
            "mixer": MIXERS[config.mixers[layer]].init(k_mixer, config.mixer_config(layer)),
            "mlp_norm": jnp.ones(D),
            "mlp_up": scaled_normal(k_up, (D, config.mlp), D, scale),
            "mlp_up_bias": jnp.zeros(config.mlp),
            "mlp_down": scaled_normal(k_down, (config.mlp, D), config.mlp, scale),
        }
    heads = {}
    for index, (name, size) in enumerate(config.heads):
        k_head = jax.random.fold_in(k_heads, index)
        heads[name] = {"kernel": scaled_normal(k_head, (D, size), D, scale), "bias": jnp.zeros(size)}
    embed = {"kernel": scaled_normal(k_embed, (config.inputs, D), config.inputs, scale), "bias": jnp.zeros(D)}
    return {"embed": embed, **blocks, "norm": jnp.ones(D), "heads": heads}


def _affine(params: Params, x: jax.Array) -> jax.Array:
    return x @ params["kernel"] + params["bias"].reshape((1,) * (x.ndim - 1) + (-1,))


def _mlp(block: Params, e: jax.Array) -> jax.Array:
    bias = block["mlp_up_bias"].reshape((1,) * (e.ndim - 1) + (-1,))
    return jax.nn.relu(rms_norm(block["mlp_norm"], e) @ block["mlp_up"] + bias) @ block["mlp_down"]


def _read_out(params: Params, e: jax.Array) -> dict[str, jax.Array]:
    normed = rms_norm(params["norm"], e)
    return {name: _affine(head, normed) for name, head in params["heads"].items()}


def _block(params: Params, config: BackboneConfig, layer: int, e_BLD, segment_ids) -> jax.Array:
    block, mixer = params[f"block_{layer}"], MIXERS[config.mixers[layer]]
    normed = rms_norm(block["mixer_norm"], e_BLD)
    e_BLD = e_BLD + mixer.apply(block["mixer"], config.mixer_config(layer), normed, segment_ids)
    return e_BLD + _mlp(block, e_BLD)


def _block_step(params: Params, config: BackboneConfig, layer: int, e_BD, state) -> tuple[jax.Array, Any]:
    block, mixer = params[f"block_{layer}"], MIXERS[config.mixers[layer]]
    normed = rms_norm(block["mixer_norm"], e_BD)
    y_BD, state = mixer.step(block["mixer"], config.mixer_config(layer), normed, state)
    e_BD = e_BD + y_BD
    return e_BD + _mlp(block, e_BD), state


def apply(
    params: Params,
    config: BackboneConfig,
    x_BLF: jax.Array,
    *,
    edits: Sequence[Edit] = (),
    segment_ids: jax.Array | None = None,
) -> tuple[dict[str, jax.Array], tuple[jax.Array, ...]]:
    """Outputs by head name, each (B, L, size), and taps: the residual stream (B, L, D) after each layer 0..layers,
    after that layer's edits. Taps that are not used cost nothing under jit."""
    edits = _check_edits(config, edits)
    e_BLD = apply_edits(edits, 0, _affine(params["embed"], x_BLF))
    taps = [e_BLD]
    for layer in range(config.layers):
        e_BLD = apply_edits(edits, layer + 1, _block(params, config, layer, e_BLD, segment_ids))
        taps.append(e_BLD)
    return _read_out(params, e_BLD), tuple(taps)


def lower(
    params: Params, config: BackboneConfig, x_BLF: jax.Array, layer: int, *, segment_ids: jax.Array | None = None
) -> jax.Array:
    """Residual stream (B, L, D) at `layer`: the embedding and the first `layer` blocks."""
    config.check_layer(layer)
    e_BLD = _affine(params["embed"], x_BLF)
    for block in range(layer):
        e_BLD = _block(params, config, block, e_BLD, segment_ids)
    return e_BLD


def upper(
    params: Params, config: BackboneConfig, e_BLD: jax.Array, layer: int, *, segment_ids: jax.Array | None = None
) -> dict[str, jax.Array]:
    """Outputs from the residual stream at `layer`: the remaining blocks and the heads."""
    config.check_layer(layer)
    for block in range(layer, config.layers):
        e_BLD = _block(params, config, block, e_BLD, segment_ids)
    return _read_out(params, e_BLD)


State = tuple[Any, ...]


def init_state(config: BackboneConfig, batch: int, length: int, *, start: int = 0, stop: int | None = None) -> State:
    """States of the blocks between layers start and stop for the step form, for sequences of at most `length` steps."""
    stop = config.layers if stop is None else stop
    config.check_layer(start)
    config.check_layer(stop)
    return tuple(
        MIXERS[config.mixers[layer]].init_state(config.mixer_config(layer), batch, length)
        for layer in range(start, stop)
    )


def step(
    params: Params, config: BackboneConfig, x_BF: jax.Array, state: State, *, edits: Sequence[Edit] = ()
) -> tuple[dict[str, jax.Array], tuple[jax.Array, ...], State]:
    """One token through the whole model: (outputs, taps, state). Operands and masks of edits have no L axis here."""
    edits = _check_edits(config, edits)
    _check_state("step", state, config.layers)
    e_BD = apply_edits(edits, 0, _affine(params["embed"], x_BF))
    taps, states = [e_BD], []
    for layer in range(config.layers):
        e_BD, block_state = _block_step(params, config, layer, e_BD, state[layer])
        e_BD = apply_edits(edits, layer + 1, e_BD)
        taps.append(e_BD)
        states.append(block_state)
    return _read_out(params, e_BD), tuple(taps), tuple(states)


def lower_step(
    params: Params, config: BackboneConfig, x_BF: jax.Array, state: State, layer: int
) -> tuple[jax.Array, State]:
    """`lower` for one token; `state` from `init_state(..., stop=layer)`."""
    config.check_layer(layer)
    _check_state("lower_step", state, layer)
    e_BD, states = _affine(params["embed"], x_BF), []
    for block in range(layer):
        e_BD, block_state = _block_step(params, config, block, e_BD, state[block])
        states.append(block_state)
    return e_BD, tuple(states)


def upper_step(
    params: Params, config: BackboneConfig, e_BD: jax.Array, state: State, layer: int
) -> tuple[dict[str, jax.Array], State]:
    """`upper` for one token; `state` from `init_state(..., start=layer)`."""
    config.check_layer(layer)
    _check_state("upper_step", state, config.layers - layer)
    states = []
    for block in range(layer, config.layers):
        e_BD, block_state = _block_step(params, config, block, e_BD, state[block - layer])
        states.append(block_state)
    return _read_out(params, e_BD), tuple(states)


class Backbone(nn.Module):
    """Linen module around `init` and `apply`."""

    config: BackboneConfig

    @nn.compact
    def __call__(self, x_BLF: jax.Array, edits: Sequence[Edit] = (), segment_ids: jax.Array | None = None):
        params = self.param("backbone", lambda key: init(key, self.config))
        return apply(params, self.config, x_BLF, edits=edits, segment_ids=segment_ids)

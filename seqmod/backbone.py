"""A sequence model of pre-norm residual blocks whose residual stream can be read, edited and cut in two.

    e_0 = embedding,   e_l = e_{l-1} + mixer_l(norm(e_{l-1})),  then  + mlp_l(norm(.)),   outputs = W_h norm(e_last)

Inputs are features, tokens, or both. Each block has a mixer of its own, causal or bidirectional. `apply` runs the model
in parallel over a sequence, `step` one token at a time; both take edits and return taps. `lower` and `upper` are the
model before and after a layer of the residual stream, in both forms: internal RL needs both halves. Base models of the
paper: arXiv 2512.20605, D.1.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmod import blocks, embedding
from seqmod.config import BackboneConfig
from seqmod.embedding import Input, Inputs, as_inputs, embed, positions, read_out
from seqmod.mixers.base import Params
from seqmod.residual import Edit, apply_edits

State = tuple[Any, ...]
"""States of blocks, behind the number of steps taken where positions are learned and the first block is among them."""


def _check_edits(config: BackboneConfig, edits: Sequence[Edit]) -> tuple[Edit, ...]:
    for edit in edits:
        config.check_layer(edit.layer)
    return tuple(edits)


def _check_state(name: str, config: BackboneConfig, state: State, start: int, stop: int) -> None:
    expected = stop - start + _clocked(config, start)
    if len(state) != expected:
        raise ValueError(f"{name}: state has {len(state)} blocks, expected {expected}")


def _clocked(config: BackboneConfig, start: int) -> bool:
    return start == 0 and config.positions == "learned"


def init(key: jax.Array, config: BackboneConfig) -> Params:
    """Fresh parameters as a nested dict: those of both ends, and "block_N" or, with `scan`, the stacked "blocks"."""
    keys = jax.random.split(key, 2 + config.layers)
    params, k_blocks = embedding.init(keys[0], keys[1], config), keys[2:]
    if not config.scan:
        each = [blocks.init(k_block, config.block(layer)) for layer, k_block in enumerate(k_blocks)]
        return params | {f"block_{layer}": block for layer, block in enumerate(each)}
    # As one program for all repeats of a block, compilation takes no longer than for one.
    stacked = [
        jax.vmap(partial(blocks.init, config=config.block(member)))(k_blocks[member :: config.period])
        for member in range(config.period)
    ]
    return params | {"blocks": stacked}


def _block_params(params: Params, config: BackboneConfig, layer: int) -> Params:
    if not config.scan:
        return params[f"block_{layer}"]
    group, member = divmod(layer, config.period)
    return jax.tree.map(lambda leaf: leaf[group], params["blocks"][member])


def _apply_edits_in_scan(edits: tuple[Edit, ...], layers: range, repeat: jax.Array, e_BLD: jax.Array) -> jax.Array:
    """The stream after the edits of layers[repeat], a traced number."""
    for edit in edits:
        if edit.layer in layers:
            edited_BLD = apply_edits((edit,), edit.layer, e_BLD)
            e_BLD = jnp.where(repeat == layers.index(edit.layer), edited_BLD, e_BLD)
    return e_BLD


def _run(params, config, e_BLD, start, stop, edits, segment_ids, mask_BL, conditioning_BLC) -> list[jax.Array]:
    """The stream after each of the blocks start .. stop - 1, with edits."""

    def block(layer_config, block_params, e_BLD):
        return blocks.apply(
            block_params,
            layer_config,
            e_BLD,
            segment_ids=segment_ids,
            mask_BL=mask_BL,
            conditioning_BLC=conditioning_BLC,
        )

    if config.remat:
        block = jax.checkpoint(block, static_argnums=0)
    period, taps = config.period, []
    while start < stop:
        groups = 0 if start % period or not config.scan else (stop - start) // period
        if groups > 1:
            first = start // period
            stacked = jax.tree.map(lambda leaf, first=first, n=groups: leaf[first : first + n], params["blocks"])

            def group(e_BLD, scanned, start=start):
                members, repeat = scanned
                after = []
                for member in range(period):
                    e_BLD = block(config.block(member), members[member], e_BLD)
                    e_BLD = _apply_edits_in_scan(edits, range(start + member + 1, stop + 1, period), repeat, e_BLD)
                    after.append(e_BLD)
                return e_BLD, after

            e_BLD, after = jax.lax.scan(group, e_BLD, (stacked, jnp.arange(groups)))
            taps += [after[member][repeat] for repeat in range(groups) for member in range(period)]
            start += groups * period
        else:
            e_BLD = block(config.block(start), _block_params(params, config, start), e_BLD)
            e_BLD = apply_edits(edits, start + 1, e_BLD)
            taps.append(e_BLD)
            start += 1
    return taps


def apply(
    params: Params,
    config: BackboneConfig,
    inputs: Input,
    *,
    edits: Sequence[Edit] = (),
    segment_ids: jax.Array | None = None,
    mask_BL: jax.Array | None = None,
    prefix_BPD: jax.Array | None = None,
) -> tuple[dict[str, jax.Array], tuple[jax.Array, ...]]:
    """Outputs by head name, each (B, L, size), and taps: the residual stream (B, L, D) after each layer 0..layers,
    after that layer's edits. Taps that are not used cost nothing under jit.

    `segment_ids` (B, L): a run of one id is a sequence of its own. `mask_BL` is false at padding. `prefix_BPD` are
    embeddings that come before the inputs, as part of the first segment: taps, and so edits, then have P + L steps.
    """
    edits = _check_edits(config, edits)
    inputs = as_inputs(config, inputs)
    e_BLD = embed(params, config, inputs)
    L, P, conditioning_BLC = e_BLD.shape[1], 0, inputs.conditioning
    if prefix_BPD is not None:
        P = prefix_BPD.shape[1]
        e_BLD = jnp.concatenate([prefix_BPD.astype(e_BLD.dtype), e_BLD], axis=1)
        before = ((0, 0), (P, 0))
        segment_ids = None if segment_ids is None else jnp.pad(segment_ids, before, mode="edge")
        mask_BL = None if mask_BL is None else jnp.pad(mask_BL, before, constant_values=True)
        if conditioning_BLC is not None:
            conditioning_BLC = jnp.pad(conditioning_BLC, (*before, (0, 0)))
    if config.positions == "learned":
        e_BLD = e_BLD + positions(params, config, P + L, segment_ids)
    e_BLD = apply_edits(edits, 0, e_BLD)
    taps = _run(params, config, e_BLD, 0, config.layers, edits, segment_ids, mask_BL, conditioning_BLC)
    return read_out(params, config, taps[-1][:, P:]), (e_BLD, *taps)


def lower(
    params: Params,
    config: BackboneConfig,
    inputs: Input,
    layer: int,
    *,
    segment_ids: jax.Array | None = None,
    mask_BL: jax.Array | None = None,
) -> jax.Array:
    """Residual stream (B, L, D) at `layer`: the embedding and the first `layer` blocks."""
    config.check_layer(layer)
    inputs = as_inputs(config, inputs)
    e_BLD = embed(params, config, inputs)
    if config.positions == "learned":
        e_BLD = e_BLD + positions(params, config, e_BLD.shape[1], segment_ids)
    return [e_BLD, *_run(params, config, e_BLD, 0, layer, (), segment_ids, mask_BL, inputs.conditioning)][-1]


def upper(
    params: Params,
    config: BackboneConfig,
    e_BLD: jax.Array,
    layer: int,
    *,
    segment_ids: jax.Array | None = None,
    mask_BL: jax.Array | None = None,
    conditioning_BLC: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Outputs from the residual stream at `layer`: the remaining blocks and the heads."""
    config.check_layer(layer)
    taps = _run(params, config, e_BLD, layer, config.layers, (), segment_ids, mask_BL, conditioning_BLC)
    return read_out(params, config, [e_BLD, *taps][-1])


def init_state(config: BackboneConfig, batch: int, length: int, *, start: int = 0, stop: int | None = None) -> State:
    """States of the blocks between layers start and stop for the step form, for sequences of at most `length` steps.

    Leaves have a leading axis of `batch`, or no axes. Raises ValueError where a block is not causal.
    """
    stop = config.layers if stop is None else stop
    config.check_layer(start)
    config.check_layer(stop)
    states = []
    for layer in range(start, stop):
        block = config.block(layer)
        if block.mixer.init_state is None or not block.causal:
            raise ValueError(f"block {layer} is {block.mixer.kind.__name__}, not causal: it has no step form")
        states.append(block.mixer.init_state(block.mixer_config, batch, length))
    clock = (jnp.zeros((), jnp.int32),) if _clocked(config, start) else ()
    return (*clock, *states)


def _run_step(params, config, e_BD, state, start, stop, edits, conditioning_BC) -> tuple[list[jax.Array], State]:
    taps, states = [], []
    for layer, block_state in zip(range(start, stop), state, strict=True):
        block_params = _block_params(params, config, layer)
        e_BD, block_state = blocks.step(block_params, config.block(layer), e_BD, block_state, conditioning_BC)
        e_BD = apply_edits(edits, layer + 1, e_BD)
        taps.append(e_BD)
        states.append(block_state)
    return taps, tuple(states)


def _embed_step(params: Params, config: BackboneConfig, inputs: Inputs, state: State) -> tuple[jax.Array, State, State]:
    """Embedding (B, D) of one step, the clock after it, and the states of the blocks."""
    return _tick(params, config, embed(params, config, inputs), state)


def _tick(params: Params, config: BackboneConfig, e_BD: jax.Array, state: State) -> tuple[jax.Array, State, State]:
    if config.positions != "learned":
        return e_BD, (), state
    # Past the last position the last one is used: a compiled step can't raise.
    position_D = params["positions"][jnp.minimum(state[0], config.context - 1)]
    return e_BD + position_D[None].astype(e_BD.dtype), (state[0] + 1,), state[1:]


def step(
    params: Params, config: BackboneConfig, inputs: Input, state: State, *, edits: Sequence[Edit] = ()
) -> tuple[dict[str, jax.Array], tuple[jax.Array, ...], State]:
    """One token through the whole model: (outputs, taps, state). Inputs, operands and masks of edits have no L axis."""
    edits = _check_edits(config, edits)
    _check_state("step", config, state, 0, config.layers)
    inputs = as_inputs(config, inputs)
    e_BD, clock, state = _embed_step(params, config, inputs, state)
    e_BD = apply_edits(edits, 0, e_BD)
    taps, state = _run_step(params, config, e_BD, state, 0, config.layers, edits, inputs.conditioning)
    return read_out(params, config, taps[-1]), (e_BD, *taps), (*clock, *state)


def lower_step(
    params: Params, config: BackboneConfig, inputs: Input, state: State, layer: int
) -> tuple[jax.Array, State]:
    """`lower` for one token; `state` from `init_state(..., stop=layer)`."""
    config.check_layer(layer)
    _check_state("lower_step", config, state, 0, layer)
    inputs = as_inputs(config, inputs)
    e_BD, clock, state = _embed_step(params, config, inputs, state)
    taps, state = _run_step(params, config, e_BD, state, 0, layer, (), inputs.conditioning)
    return [e_BD, *taps][-1], (*clock, *state)


def upper_step(
    params: Params,
    config: BackboneConfig,
    e_BD: jax.Array,
    state: State,
    layer: int,
    *,
    conditioning_BC: jax.Array | None = None,
) -> tuple[dict[str, jax.Array], State]:
    """`upper` for one token; `state` from `init_state(..., start=layer)`. At layer 0 it takes a prefix embedding."""
    config.check_layer(layer)
    _check_state("upper_step", config, state, layer, config.layers)
    clock: State = ()
    if _clocked(config, layer):
        e_BD, clock, state = _tick(params, config, e_BD, state)
    taps, state = _run_step(params, config, e_BD, state, layer, config.layers, (), conditioning_BC)
    return read_out(params, config, [e_BD, *taps][-1]), (*clock, *state)


class Backbone(nn.Module):
    """Linen module around `init` and `apply`."""

    config: BackboneConfig

    @nn.compact
    def __call__(self, inputs: Input, **options: Any):
        params = self.param("backbone", lambda key: init(key, self.config))
        return apply(params, self.config, inputs, **options)

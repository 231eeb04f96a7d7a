"""Exact gradients of long sequences in little memory: StreamBP (Luo et al., arXiv 2506.03077) for any causal backbone.

The gradient of a loss that is a sum over steps is a sum over chunks of steps. Of each block only its input is kept. In
the backward pass a block's mixer is recomputed, for all steps, since every mixer's own memory is linear in length; its
MLP, the heads and the loss are recomputed chunk by chunk, so that neither hidden layers nor logits are ever there for
more than a chunk. The loss and its gradient are those of the whole sequence, for every chunk.

A loss that is no sum over steps can be made one: of direct preference optimisation, with the log-probabilities' sums
taken first, the rest is a sum with constant weights.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax

from seqmod import backbone
from seqmod.config import BackboneConfig
from seqmod.embedding import Input, read_out
from seqmod.mixers.base import Params
from seqmod.rows import sum_rows

StepLoss = Callable[[dict[str, jax.Array], Any], Any]


def streamed(config: BackboneConfig, chunk: int) -> BackboneConfig:
    """The same model with blocks that are recomputed in the backward pass, their MLPs `chunk` steps at a time."""
    return replace(config, remat=True, row_chunk=chunk)


def stream_loss(
    params: Params,
    config: BackboneConfig,
    inputs: Input,
    targets: Any,
    step_loss: StepLoss,
    *,
    chunk: int = 512,
    segment_ids: jax.Array | None = None,
    mask_BL: jax.Array | None = None,
) -> Any:
    """A pytree of sums over steps of a loss, whose gradient needs little memory.

    `step_loss(outputs, targets)` gets the outputs (B, C, size) by head name and the targets, a pytree of (B, L, ...),
    of some steps (B, C, ...), and gives a pytree of sums over them, for instance a negative log-likelihood and the
    number of tokens that count. `inputs`, `segment_ids` and `mask_BL` are those of `backbone.apply`; steps that should
    not count get no weight in `step_loss`.
    """
    e_BLD = backbone.lower(
        params, streamed(config, chunk), inputs, config.layers, segment_ids=segment_ids, mask_BL=mask_BL
    )
    return stream_heads(params, config, e_BLD, targets, step_loss, chunk=chunk)


def stream_heads(
    params: Params, config: BackboneConfig, e_BLD: jax.Array, targets: Any, step_loss: StepLoss, *, chunk: int = 512
) -> Any:
    """`stream_loss` from the last residual stream: the heads and the loss, without logits of all steps."""

    def some(rows: tuple[jax.Array, Any]) -> Any:
        return step_loss(read_out(params, config, rows[0]), rows[1])

    return sum_rows(some, (e_BLD, targets), chunk)

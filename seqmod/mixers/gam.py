"""Gated associative memory: a short convolution beside a learned table that every step looks up by itself
(Acharya, arXiv 2509.00605).

    local_t = b + sum_i w_i x_{t - (W - 1) + i},   global_t = softmax(x_t M^T) M,   M (slots, D) learned
    output_t = sigmoid(g_t) * local_t + sigmoid(g'_t) * global_t,   (g_t, g'_t) = W x_t + bias

What the paper calls the global path reads parameters and nothing else: no information goes from step to step but
through the convolution, so that a model of n such mixers sees the last n (W - 1) steps, 12 for the published six with
W = 3. Expect no recall beyond that. It costs the same for every step, and serves as a baseline that says how much of a
task is local.

The normalisation before it and the MLP after it belong to the model around a mixer.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from seqmod.mixers.base import CAUSAL, Mixer, Params, check_causal, over_last, project, scaled_normal
from seqmod.mixers.convolution import short_convolution, short_convolution_step


@dataclass(frozen=True)
class GAMConfig:
    """`width` D, a memory of `slots` M vectors, convolution over `kernel` steps."""

    width: int = 64
    slots: int = 512
    kernel: int = 3
    init_scale: float = 1.0

    def __post_init__(self) -> None:
        if min(self.width, self.slots, self.kernel) < 1:
            raise ValueError(f"GAMConfig: sizes must be positive, got {self}")


class GAMState(NamedTuple):
    """The last kernel - 1 inputs (B, kernel - 1, D)."""

    window_BWD: jax.Array


def init(key: jax.Array, config: GAMConfig) -> Params:
    """Parameters: `conv` (kernel, D), `memory` (M, D), `gate` (D, 2 D), and biases of the first and the last."""
    k_conv, k_memory, k_gate = jax.random.split(key, 3)
    D, M, W, scale = config.width, config.slots, config.kernel, config.init_scale
    return {
        "conv": scaled_normal(k_conv, (W, D), W, scale),
        "conv_bias": jnp.zeros(D),
        "memory": jax.nn.initializers.glorot_uniform()(k_memory, (M, D)),
        "gate": scaled_normal(k_gate, (D, 2 * D), D, scale),
        "gate_bias": jnp.zeros(2 * D),
    }


def _fuse(params: Params, x: jax.Array, local: jax.Array) -> jax.Array:
    scores = project("...D,MD->...M", x, params["memory"])
    weights = jax.nn.softmax(scores.astype(jnp.promote_types(x.dtype, jnp.float32)), axis=-1).astype(x.dtype)
    recalled = project("...M,MD->...D", weights, params["memory"])
    gates = project("...D,DE->...E", x, params["gate"]) + over_last(params["gate_bias"], x.ndim).astype(x.dtype)
    open_local, open_recalled = jnp.split(jax.nn.sigmoid(gates), 2, axis=-1)
    return open_local * local + open_recalled * recalled


def apply(params: Params, config: GAMConfig, x_BLD: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """Parallel form, (B, L, D) to (B, L, D)."""
    return _fuse(params, x_BLD, short_convolution(x_BLD, params["conv"], params["conv_bias"], segment_ids))


def init_state(config: GAMConfig, batch: int, length: int) -> GAMState:
    """Zeros before the first step; `length` is not needed, since the state has a fixed size."""
    return GAMState(jnp.zeros((batch, config.kernel - 1, config.width)))


def step(params: Params, config: GAMConfig, x_BD: jax.Array, state: GAMState) -> tuple[jax.Array, GAMState]:
    """One step, (B, D) to (B, D)."""
    local_BD, window_BWD = short_convolution_step(x_BD, state.window_BWD, params["conv"], params["conv_bias"])
    return _fuse(params, x_BD, local_BD), GAMState(window_BWD)


def default_config(
    width: int, heads: int, init_scale: float = 1.0, context: int = 128, causal: bool = True
) -> GAMConfig:
    """The published 512 slots and 3 steps; `heads` and `context` have no meaning here."""
    check_causal("gam", causal, CAUSAL)
    return GAMConfig(width=width, init_scale=init_scale)


MIXER = Mixer(GAMConfig, default_config, init, apply, init_state, step)

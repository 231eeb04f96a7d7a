"""What a mixer is: a frozen config and five pure functions over it.

A mixer moves information along a sequence. It has a parallel form over x_BLD and, if causal, a step form that carries a
state; the two agree to float tolerance from any carried state. Functions take the config second, so that one literal
dict of names (`seqmod.mixers.MIXERS`) is the whole dispatch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Params = dict[str, Any]


class Mixer(NamedTuple):
    """The functions of one mixer, as `MIXERS` holds them.

    `config(width, heads, init_scale, context)` builds a config; `init(key, config)` its parameters;
    `apply(params, config, x_BLD, segment_ids)` is the parallel form, where a run of one id (B, L) is a sequence of its
    own; `init_state(config, batch, length)` serves sequences of at most `length`, and `step(params, config, x_BD,
    state)` gives (y_BD, state).
    """

    config: Callable[..., Any]
    init: Callable[[jax.Array, Any], Params]
    apply: Callable[..., jax.Array]
    init_state: Callable[[Any, int, int], Any]
    step: Callable[[Params, Any, jax.Array, Any], tuple[jax.Array, Any]]


def scaled_normal(key: jax.Array, shape: tuple[int, ...], fan_in: int, scale: float) -> jax.Array:
    """Truncated normal of variance scale / fan_in (variance scaling, "fan in")."""
    return jax.nn.initializers.truncated_normal(1.0)(key, shape) * (scale / fan_in) ** 0.5 / 0.8796


def rms_norm(gain_D: jax.Array, x: jax.Array) -> jax.Array:
    """x / rms(x) times a gain, over the last axis."""
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * gain_D.reshape((1,) * (x.ndim - 1) + (-1,))


def segment_runs(segment_ids: jax.Array) -> jax.Array:
    """Number (B, L) of the segment each step is in; a segment ends wherever the id changes, even if it comes back."""
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(jnp.cumsum(changes, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))

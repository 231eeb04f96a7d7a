"""What a mixer is: a frozen config and a few pure functions over it.

A mixer moves information along a sequence. It has a parallel form over x_BLD and, if causal, a step form that carries a
state; the two agree to float tolerance from any carried state. Functions take the config second, so that one literal
dict of names (`seqmod.mixers.MIXERS`) is the whole dispatch.

Parameters are float32, inputs of any float type: matrices are cast to the input's type, while decays, step sizes,
normalisers, softmax and states are computed in float32 at least. The output has the type of the input.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

Params = dict[str, Any]
Pattern = Literal["causal self", "noncausal self", "causal cross", "noncausal cross"]
CAUSAL: frozenset[Pattern] = frozenset({"causal self"})
NONCAUSAL: frozenset[Pattern] = frozenset({"noncausal self"})


class Context(NamedTuple):
    """What a mixer attends to instead of its own input: x_BMD, and the ids (B, M) of segments, or for a mixer that
    does not pack the mask (B, M) of valid steps."""

    x_BMD: jax.Array
    segments_BM: jax.Array | None = None


class Linear(NamedTuple):
    """A mixer taken apart, where it is a linear map of its values.

    `values(params, config, x_BLD, segments)` are v_BLHV, which a convolution may keep apart by segments;
    `matrix(params, config, x_BLD, segments)` is m_BHLM, the weight of value s in output t at [t, s];
    `read_out(params, config, x_BLD, y_BLHV)` makes the mixer's output of m v. With channels in place of heads H is
    their number and V is 1.
    """

    values: Callable[..., jax.Array]
    matrix: Callable[..., jax.Array]
    read_out: Callable[[Params, Any, jax.Array, jax.Array], jax.Array]


class Mixer(NamedTuple):
    """The functions of one mixer, as `MIXERS` holds them.

    `kind` is the type of its config. `config(width, heads, init_scale, context, causal)` builds one for sequences of up
    to `context` steps, and raises ValueError where it cannot be causal, or not; `init(key, config)` builds parameters,
    of which those under the key "fixed" are constants that receive no gradient.

    `apply(params, config, x_BLD, segments)` is the parallel form. With `packs`, `segments` are ids (B, L), and a run of
    one id is a sequence of its own; without, they are a mask (B, L) of valid steps, each row being one sequence, and
    outputs at other steps mean nothing. `apply_mixer` sorts this out. A mixer with a cross pattern takes a `Context` as
    a fifth argument.

    Causal mixers have `init_state(config, batch, length)`, which serves sequences of at most `length`, and
    `step(params, config, x_BD, state)`, which gives (y_BD, state). `linear` is there where the mixer is a linear map of
    its values; `patterns` says which of the four forms of Zhang et al. (arXiv 2210.07661) it has. Causal cross
    attention sees all of the context and, of the queries, none after its own.
    """

    kind: type
    config: Callable[..., Any]
    init: Callable[[jax.Array, Any], Params]
    apply: Callable[..., jax.Array]
    init_state: Callable[[Any, int, int], Any] | None = None
    step: Callable[[Params, Any, jax.Array, Any], tuple[jax.Array, Any]] | None = None
    linear: Linear | None = None
    patterns: frozenset[Pattern] = CAUSAL
    packs: bool = True


def apply_mixer(
    mixer: Mixer,
    params: Params,
    config: Any,
    x_BLD: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    mask_BL: jax.Array | None = None,
    context: Context | None = None,
) -> jax.Array:
    """The parallel form of a mixer, (B, L, D) to (B, L, D).

    `segment_ids` (B, L) pack several sequences into a row; `mask_BL` is false at padding, whose outputs mean nothing.
    Raises ValueError where the mixer cannot keep packed sequences apart, or has no cross pattern.
    """
    if mixer.packs:
        # A context is masked by its own segments, which are compared with those of the queries as they are.
        segments = segment_ids
        if mask_BL is not None and context is None:
            segments = isolate_padding(segment_ids, mask_BL)
    elif segment_ids is not None:
        raise ValueError(
            f"{mixer.kind.__name__}: segment_ids are given, but this mixer cannot keep packed sequences apart: "
            "put one sequence in a row and mark its padding with mask_BL"
        )
    else:
        segments = mask_BL
    if context is None:
        return mixer.apply(params, config, x_BLD, segments)
    if not any(pattern.endswith("cross") for pattern in mixer.patterns):
        raise ValueError(f"{mixer.kind.__name__}: a context is given, but this mixer has only {sorted(mixer.patterns)}")
    return mixer.apply(params, config, x_BLD, segments, context)


def mixing_matrix(
    mixer: Mixer,
    params: Params,
    config: Any,
    x_BLD: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    mask_BL: jax.Array | None = None,
) -> jax.Array:
    """The matrices m_BHLM by which a mixer maps its values to its outputs, one per head or channel.

    Raises ValueError where the mixer is no linear map of its values.
    """
    if mixer.linear is None:
        raise ValueError(f"{mixer.kind.__name__}: this mixer is not a linear map of its values")
    segments = mask_BL if not mixer.packs or segment_ids is None else segment_ids
    if mixer.packs and mask_BL is not None:
        segments = isolate_padding(segment_ids, mask_BL)
    return mixer.linear.matrix(params, config, x_BLD, segments)


def isolate_padding(segment_ids: jax.Array | None, mask_BL: jax.Array) -> jax.Array:
    """Segment ids (B, L) in which padding, where the mask is false, has segments of its own."""
    ids_BL = jnp.zeros(mask_BL.shape, jnp.int32) if segment_ids is None else segment_runs(segment_ids)
    return 2 * ids_BL + mask_BL.astype(jnp.int32)


def check_causal(name: str, causal: bool, patterns: frozenset[Pattern]) -> None:
    """Raise ValueError where a mixer with these patterns cannot be causal, or cannot be otherwise."""
    wanted = "causal self" if causal else "noncausal self"
    if wanted not in patterns:
        raise ValueError(f"{name}: causal is {causal}, but this mixer has only {sorted(patterns)}")


def check_heads(name: str, width: int, heads: int) -> int:
    """Width of a head. Raises ValueError where heads do not divide the width."""
    if heads < 1 or width % heads:
        raise ValueError(f"{name}: width {width} is not divisible by heads {heads}")
    return width // heads


def scaled_normal(key: jax.Array, shape: tuple[int, ...], fan_in: int, scale: float) -> jax.Array:
    """Truncated normal of variance scale / fan_in (variance scaling, "fan in")."""
    return jax.nn.initializers.truncated_normal(1.0)(key, shape) * (scale / fan_in) ** 0.5 / 0.8796


def project(spec: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """An einsum of inputs and a parameter, which is cast to the inputs' type."""
    return jnp.einsum(spec, x, kernel.astype(x.dtype))


def over_last(vector: jax.Array, ndim: int) -> jax.Array:
    """A vector as an array of `ndim` axes, to be broadcast along the last."""
    return vector.reshape((1,) * (ndim - 1) + (-1,))


def rms_norm(gain_D: jax.Array | None, x: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """x / rms(x), times a gain if there is one, over the last axis; computed in float32 at least."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    normed = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + epsilon)
    if gain_D is not None:
        normed = normed * over_last(gain_D, x.ndim)
    return normed.astype(x.dtype)


def segment_runs(segment_ids: jax.Array) -> jax.Array:
    """Number (B, L) of the segment each step is in; a segment ends wherever the id changes, even if it comes back."""
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(jnp.cumsum(changes, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))


def same_segment(segments_BL: jax.Array) -> jax.Array:
    """Whether two steps (B, L, L) are of one segment."""
    runs_BL = segment_runs(segments_BL)
    return runs_BL[:, :, None] == runs_BL[:, None]


class MixerLayer(nn.Module):
    """Linen module around a mixer's `init` and `apply`: `MixerLayer(MIXERS["mamba"], MambaConfig(width=64))`."""

    mixer: Mixer
    config: Any

    @nn.compact
    def __call__(
        self,
        x_BLD: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        mask_BL: jax.Array | None = None,
        context: Context | None = None,
    ) -> jax.Array:
        params = self.param("mixer", lambda key: self.mixer.init(key, self.config))
        return apply_mixer(
            self.mixer, params, self.config, x_BLD, segment_ids=segment_ids, mask_BL=mask_BL, context=context
        )

"""Bijections of a D-dimensional representation: the alignment maps of distributed alignment search.

- ``IdentityConfig``    z = h
- ``OrthogonalConfig``  z = Q h; Q is a product of D Householder reflections, one per row v of the parameter, and so
  orthogonal to float precision whatever the parameter is
- ``RevNetConfig``      blocks y1 = x1 + F(x2), y2 = x2 + G(y1) of the halves of h; F, G one-hidden-layer ReLU MLPs

Each has `init(key, config)`, `forward(params, config, h)` and its `inverse`, over any leading axes. Both directions
compute at the highest matmul precision in float32, or in what h has if that is wider, and return that: an inverse that
rounds differently from its forward map is none. Alignment maps of Geiger et al., arXiv 2303.02536 (orthogonal), and of
Sutter et al., arXiv 2507.08802 (RevNet).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from seqmod.mixers.base import Params, scaled_normal


def _check_positive(config: Any, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{type(config).__name__}: {name} is {size}, expected at least 1")


@dataclass(frozen=True)
class IdentityConfig:
    """`width` D; no parameters."""

    width: int

    def __post_init__(self) -> None:
        _check_positive(self, width=self.width)


@dataclass(frozen=True)
class OrthogonalConfig:
    """`width` D."""

    width: int

    def __post_init__(self) -> None:
        _check_positive(self, width=self.width)


@dataclass(frozen=True)
class RevNetConfig:
    """`width` D, even; `blocks` of two MLPs with `hidden` units each."""

    width: int
    blocks: int = 10
    hidden: int = 16

    def __post_init__(self) -> None:
        _check_positive(self, width=self.width, blocks=self.blocks, hidden=self.hidden)
        if self.width % 2:
            raise ValueError(
                f"RevNetConfig: width is {self.width}, expected an even number: its halves update each other"
            )


BijectionConfig = IdentityConfig | OrthogonalConfig | RevNetConfig


class Bijection(NamedTuple):
    """`init(key, config)`, `forward(params, config, h)` and `inverse(params, config, z)` of one bijection."""

    init: Callable[[jax.Array, Any], Params]
    forward: Callable[[Params, Any, jax.Array], jax.Array]
    inverse: Callable[[Params, Any, jax.Array], jax.Array]


def _widen(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _keep(params: Params, config: IdentityConfig, h: jax.Array) -> jax.Array:
    return _widen(h)


def orthogonal_matrix(vectors_DD: jax.Array) -> jax.Array:
    """The product (I - 2 v_1 v_1') ... (I - 2 v_D v_D') over the unit rows v of `vectors_DD`, none of them zero.

    In the compact form I - V' T V, where T inverts the upper triangle of V V' with its diagonal halved: a triangular
    solve in place of D products one after another.
    """
    eye_DD = jnp.eye(len(vectors_DD), dtype=vectors_DD.dtype)
    unit_DD = vectors_DD / jnp.linalg.norm(vectors_DD, axis=-1, keepdims=True)
    gram_DD = jnp.matmul(unit_DD, unit_DD.T, precision="highest")
    solved_DD = jax.scipy.linalg.solve_triangular(jnp.triu(gram_DD, 1) + eye_DD / 2, unit_DD)
    return eye_DD - jnp.matmul(unit_DD.T, solved_DD, precision="highest")


def _init_orthogonal(key: jax.Array, config: OrthogonalConfig) -> Params:
    return {"vectors": jax.random.normal(key, (config.width, config.width))}


def _rotate(params: Params, config: OrthogonalConfig, h: jax.Array) -> jax.Array:
    return jnp.matmul(_widen(h), orthogonal_matrix(params["vectors"]).T, precision="highest")


def _rotate_back(params: Params, config: OrthogonalConfig, z: jax.Array) -> jax.Array:
    return jnp.matmul(_widen(z), orthogonal_matrix(params["vectors"]), precision="highest")


def _init_revnet(key: jax.Array, config: RevNetConfig) -> Params:
    half, hidden = config.width // 2, config.hidden

    def init_mlp(key: jax.Array) -> Params:
        k_up, k_down = jax.random.split(key)
        return {
            "up": scaled_normal(k_up, (config.blocks, half, hidden), half, 1.0),
            "up_bias": jnp.zeros((config.blocks, hidden)),
            "down": scaled_normal(k_down, (config.blocks, hidden, half), hidden, 1.0 / config.blocks),
            "down_bias": jnp.zeros((config.blocks, half)),
        }

    k_first, k_second = jax.random.split(key)
    return {"first": init_mlp(k_first), "second": init_mlp(k_second)}


def _mlp(params: Params, x: jax.Array) -> jax.Array:
    def affine(x: jax.Array, name: str) -> jax.Array:
        bias = params[f"{name}_bias"].reshape((1,) * (x.ndim - 1) + (-1,))
        return jnp.matmul(x, params[name], precision="highest") + bias

    return affine(jax.nn.relu(affine(x, "up")), "down")


def _couple(params: Params, config: RevNetConfig, h: jax.Array) -> jax.Array:
    def block(halves, params):
        one, two = halves
        one = one + _mlp(params["first"], two)
        two = two + _mlp(params["second"], one)
        return (one, two), None

    halves, _ = jax.lax.scan(block, tuple(jnp.split(_widen(h), 2, axis=-1)), params)
    return jnp.concatenate(halves, axis=-1)


def _uncouple(params: Params, config: RevNetConfig, z: jax.Array) -> jax.Array:
    def block(halves, params):
        one, two = halves
        two = two - _mlp(params["second"], one)
        one = one - _mlp(params["first"], two)
        return (one, two), None

    halves, _ = jax.lax.scan(block, tuple(jnp.split(_widen(z), 2, axis=-1)), params, reverse=True)
    return jnp.concatenate(halves, axis=-1)


BIJECTIONS: dict[type, Bijection] = {
    IdentityConfig: Bijection(lambda key, config: {}, _keep, _keep),
    OrthogonalConfig: Bijection(_init_orthogonal, _rotate, _rotate_back),
    RevNetConfig: Bijection(_init_revnet, _couple, _uncouple),
}


def _functions(name: str, config: BijectionConfig) -> Bijection:
    if type(config) not in BIJECTIONS:
        raise ValueError(f"{name}: config is {config!r}, expected one of {[kind.__name__ for kind in BIJECTIONS]}")
    return BIJECTIONS[type(config)]


def _check_width(name: str, config: BijectionConfig, x: jax.Array) -> None:
    if x.shape[-1] != config.width:
        raise ValueError(f"{name}: the last axis has size {x.shape[-1]}, expected the width {config.width} of {config}")


def init(key: jax.Array, config: BijectionConfig) -> Params:
    """Fresh parameters as a nested dict; empty for the identity."""
    return _functions("init", config).init(key, config)


def forward(params: Params, config: BijectionConfig, h: jax.Array) -> jax.Array:
    """z (..., D), at least float32, of h (..., D). ValueError where the width is another."""
    functions = _functions("forward", config)
    _check_width("forward", config, h)
    return functions.forward(params, config, h)


def inverse(params: Params, config: BijectionConfig, z: jax.Array) -> jax.Array:
    """h (..., D), at least float32, of z (..., D). ValueError where the width is another."""
    functions = _functions("inverse", config)
    _check_width("inverse", config, z)
    return functions.inverse(params, config, z)


def swap(params: Params, config: BijectionConfig, h: jax.Array, source: jax.Array, coordinates: jax.Array) -> jax.Array:
    """inverse(where(coordinates, forward(source), forward(h))), in the dtype of h.

    h and source (..., D) of one shape; `coordinates` bool (D,), or with all axes of h, of size 1 where they share.
    ValueError for other shapes. The interchange intervention of arXiv 2507.08802 on one node.
    """
    if source.shape != h.shape:
        raise ValueError(f"swap: source has shape {source.shape}, expected {h.shape}, that of the stream")
    if coordinates.dtype != bool or coordinates.shape[-1:] != h.shape[-1:] or coordinates.ndim not in (1, h.ndim):
        raise ValueError(
            f"swap: coordinates are {coordinates.dtype}{coordinates.shape}, expected bool ({h.shape[-1]},), "
            f"or all {h.ndim} axes of the stream"
        )
    coordinates = coordinates.reshape((1,) * (h.ndim - coordinates.ndim) + coordinates.shape)
    z = jnp.where(coordinates, forward(params, config, source), forward(params, config, h))
    return inverse(params, config, z).astype(h.dtype)

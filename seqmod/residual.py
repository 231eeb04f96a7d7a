"""Edits of a residual stream: where, which operator, at which steps, with what operand.

An edit acts on the stream after block `layer` (0 is the embedding). The operators:

- ``replace``      e <- operand (B, L, D) or, for all steps, (D,)
- ``add``          e <- e + operand (B, L, D) or (D,)
- ``low_rank``     e <- e + B (A e): operand (A, B) of shapes (B, L, R, D) and (B, L, D, R), or without the first axes
- ``project_out``  e <- e - (e . v) v / (v . v): operand v (D,), not zero
- ``reverse_gradient``  identity forward; the gradient going back is multiplied by -operand (scalar)
- ``swap``         e <- phi^-1(where(coordinates, phi(source), phi(e))): operand (params of phi, source (B, L, D),
  coordinates bool (D,) or (B, L, D), of size 1 where they share), and the config of phi as `bijection`; the
  interchange intervention of arXiv 2507.08802
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import struct

from seqmod import bijections

Operator = Literal["replace", "add", "low_rank", "project_out", "reverse_gradient", "swap"]


@struct.dataclass
class Edit:
    """One edit. `operand` and `mask_BL` (all steps if None) are traced; `layer`, `operator` and `bijection`, which is
    for ``swap`` alone, are static."""

    layer: int = struct.field(pytree_node=False)
    operator: Operator = struct.field(pytree_node=False)
    operand: Any
    mask_BL: jax.Array | None = None
    bijection: bijections.BijectionConfig | None = struct.field(pytree_node=False, default=None)


def low_rank_update(e: jax.Array, down: jax.Array, up: jax.Array) -> jax.Array:
    """e + up (down e) for e (..., D), down (..., R, D), up (..., D, R): the controller of the paper (C.3, D.2)."""
    inner = jnp.einsum("...RD,...D->...R", down, e)
    return e + jnp.einsum("...DR,...R->...D", up, inner)


@jax.custom_vjp
def reverse_gradient(e: jax.Array, strength: jax.Array) -> jax.Array:
    """Identity whose gradient is multiplied by -strength (gradient reversal)."""
    return e


reverse_gradient.defvjp(
    lambda e, strength: (e, strength), lambda strength, cotangent: (-strength * cotangent, jnp.zeros_like(strength))
)


def apply_edits(edits: tuple[Edit, ...], layer: int, e_BLD: jax.Array) -> jax.Array:
    """The stream after all edits of `layer`, in order; it keeps its dtype whatever the operands have."""
    for edit in edits:
        if edit.layer != layer:
            continue
        edited = _operate(edit, e_BLD).astype(e_BLD.dtype)
        e_BLD = edited if edit.mask_BL is None else jnp.where(edit.mask_BL[..., None], edited, e_BLD)
    return e_BLD


def _operate(edit: Edit, e: jax.Array) -> jax.Array:
    operand = edit.operand
    match edit.operator:
        case "replace":
            return jnp.broadcast_to(operand, e.shape).astype(e.dtype)
        case "add":
            return e + jnp.broadcast_to(operand, e.shape)
        case "low_rank":
            return low_rank_update(e, *operand)
        case "project_out":
            unit = operand / jnp.linalg.norm(operand)
            return e - jnp.einsum("...D,D->...", e, unit)[..., None] * unit.reshape((1,) * (e.ndim - 1) + (-1,))
        case "reverse_gradient":
            return reverse_gradient(e, jnp.asarray(operand, e.dtype))
        case "swap":
            if edit.bijection is None:
                raise ValueError("Edit: bijection is None, expected a config of seqmod.bijections for operator 'swap'")
            params, source, coordinates = operand
            return bijections.swap(params, edit.bijection, e, source, coordinates)
    raise ValueError(f"Edit: operator is {edit.operator!r}, expected one of {get_args(Operator)}")

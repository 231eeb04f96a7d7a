"""Edits of a residual stream: where, which operator, at which steps, with what operand.

An edit acts on the stream after block `layer` (0 is the embedding). The operators:

- ``replace``      e <- operand (B, L, D) or, for all steps, (D,)
- ``add``          e <- e + operand (B, L, D) or (D,)
- ``low_rank``     e <- e + B (A e): operand (A, B) of shapes (B, L, R, D) and (B, L, D, R), or without the first axes
- ``project_out``  e <- e - (e . v) v / (v . v): operand v (D,), not zero
- ``reverse_gradient``  identity forward; the gradient going back is multiplied by -operand (scalar)
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import struct

Operator = Literal["replace", "add", "low_rank", "project_out", "reverse_gradient"]


@struct.dataclass
class Edit:
    """One edit. `layer` and `operator` are static; `operand` and `mask_BL` (all steps if None) are traced."""

    layer: int = struct.field(pytree_node=False)
    operator: Operator = struct.field(pytree_node=False)
    operand: Any
    mask_BL: jax.Array | None = None


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
    """The stream after all edits of `layer`, in order."""
    for edit in edits:
        if edit.layer != layer:
            continue
        edited = _operate(edit.operator, edit.operand, e_BLD)
        e_BLD = edited if edit.mask_BL is None else jnp.where(edit.mask_BL[..., None], edited, e_BLD)
    return e_BLD


def _operate(operator: Operator, operand: Any, e: jax.Array) -> jax.Array:
    match operator:
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
    raise ValueError(f"Edit: operator is {operator!r}, expected one of {get_args(Operator)}")

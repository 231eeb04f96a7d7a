"""Functions of single steps, computed for some steps of a sequence at a time, forward and backward."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def map_rows(function: Callable[..., jax.Array], rows: Any, chunk: int) -> jax.Array:
    """`function(rows)` for a function of single steps: a pytree of (B, L, ...) to (B, L, ...).

    It sees `chunk` steps at a time and is recomputed in the backward pass, so that nothing of size L but its argument
    and its result is kept.
    """
    function = jax.checkpoint(function)
    whole, rest = split_rows(rows, chunk)
    parts = []
    if whole is not None:
        y_NBC = jax.lax.map(function, whole)
        parts.append(jnp.moveaxis(y_NBC, 0, 1).reshape(y_NBC.shape[1], -1, *y_NBC.shape[3:]))
    if rest is not None:
        parts.append(function(rest))
    return jnp.concatenate(parts, axis=1)


def sum_rows(function: Callable[..., Any], rows: Any, chunk: int) -> Any:
    """Sum over chunks of what a function makes of `chunk` steps, recomputed in the backward pass.

    `function` maps a pytree of (B, C, ...) to a pytree of sums over these steps, in which C is at most `chunk`.
    """
    function = jax.checkpoint(function)
    whole, rest = split_rows(rows, chunk)
    total = None if rest is None else function(rest)
    if whole is None:
        return total
    if total is None:
        first = jax.eval_shape(function, jax.tree.map(lambda x: x[0], whole))
        total = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(part)), None

    return jax.lax.scan(add, total, whole)[0]


def split_rows(rows: Any, chunk: int) -> tuple[Any, Any]:
    """A pytree of (B, L, ...) as N whole chunks (N, B, C, ...) and the steps that are left, each None if empty."""
    if chunk < 1:
        raise ValueError(f"split_rows: chunk is {chunk}, expected at least 1")
    L = jax.tree.leaves(rows)[0].shape[1]
    N, rest = divmod(L, chunk)

    def whole(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x[:, : N * chunk].reshape(x.shape[0], N, chunk, *x.shape[2:]), 1, 0)

    return (
        jax.tree.map(whole, rows) if N else None,
        jax.tree.map(lambda x: x[:, N * chunk :], rows) if rest else None,
    )

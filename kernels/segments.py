"""What all ops share about time: segment boundaries, padding to whole chunks, running order."""

import jax
import jax.numpy as jnp


def segment_index(segment_ids_BL: jax.Array) -> jax.Array:
    """Counts the boundaries up to each step: (B, L) int32, 0 at first and never falling.

    Two steps lie in one run of equal ids exactly if their indices are equal, also where an id comes back later.
    """
    starts_BL = segment_ids_BL[:, 1:] != segment_ids_BL[:, :-1]
    return jnp.pad(jnp.cumsum(starts_BL, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))


def segment_starts(segment_ids_BL: jax.Array) -> jax.Array:
    """Whether the carried state is cleared before each step: (B, L) bool, False at the first."""
    starts_BL = segment_ids_BL[:, 1:] != segment_ids_BL[:, :-1]
    return jnp.pad(starts_BL, ((0, 0), (1, 0)))


def pad_length(array: jax.Array, multiple: int, *, axis: int = 1, edge: bool = False) -> jax.Array:
    """Lengthens `axis` to the next multiple, with zeros, or with the last entry if `edge` (for segment indices)."""
    extra = -array.shape[axis] % multiple
    if not extra:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, extra)
    return jnp.pad(array, widths, mode="edge" if edge else "constant")


def flip[Tree](arrays: Tree, reverse: bool, *, axis: int = 1) -> Tree:
    """Arrays in running order, or in given order again: reversed along `axis` if `reverse`. None stays None."""
    return jax.tree.map(lambda array: jnp.flip(array, axis), arrays) if reverse else arrays

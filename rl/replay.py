"""A circular buffer of transitions, as arrays inside the training state.

It has a fixed capacity, takes the transitions of all environments at once, and gives uniform samples (Lin, "Self-
improving reactive agents", 1992; Mnih et al., 2015). Compiled with its state donated, an update writes into the buffer
where it is:

    buffer = replay.init(example, capacity)                     # example: a transition without leading axis
    buffer = replay.add(buffer, transitions)                    # leaves (E, ...)
    batch = replay.sample(buffer, jax.random.bits(key, (B,)))   # leaves (B, ...)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Transition(NamedTuple):
    """A step: `obs`, `action`, `reward`, and what it led to: whether the task `terminated`, and `next_obs` before any
    reset. A truncated episode has not terminated: the value of its last observation counts."""

    obs: Any
    action: jax.Array
    reward: jax.Array
    terminated: jax.Array
    next_obs: Any


class Replay(NamedTuple):
    """`data`, leaves (capacity, ...), of which the first `size` are filled; `position` of the next to be written."""

    data: Any
    position: jax.Array
    size: jax.Array

    @property
    def capacity(self) -> int:
        """The most that it holds."""
        return len(jax.tree.leaves(self.data)[0])


def init(example: Any, capacity: int) -> Replay:
    """An empty buffer for data like `example`. Raises ValueError for a capacity below 1."""
    if capacity < 1:
        raise ValueError(f"replay: capacity is {capacity}, expected at least 1")
    data = jax.tree.map(lambda x: jnp.zeros((capacity, *jnp.shape(x)), jnp.result_type(x)), example)
    return Replay(data, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def narrow(example: Any, dtype: str | None) -> Any:
    """`example` with its floating-point arrays as `dtype`, for an `init` whose buffer takes less memory: `add` converts
    to the types of the buffer. None leaves them as they are."""
    if dtype is None:
        return example
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, example)


def check_dtype(owner: str, dtype: str | None) -> None:
    """Raises ValueError, in the name of an algorithm's config, for what is neither None nor the name of a type."""
    try:
        if dtype is not None:
            jnp.dtype(dtype)
    except TypeError:
        raise ValueError(
            f"{owner}: replay_dtype is {dtype!r}, expected the name of a type, such as 'uint8' or 'bfloat16', or None"
        ) from None


def add(buffer: Replay, batch: Any) -> Replay:
    """With `batch` (leaves (N, ...)) in place of the oldest data. Raises ValueError unless N, which should be the same
    at every call, divides the capacity: then a batch never crosses the end, and writing it is one slice."""
    count, capacity = len(jax.tree.leaves(batch)[0]), buffer.capacity
    if capacity % count:
        raise ValueError(f"replay: {count} transitions at a time, expected a divisor of the capacity {capacity}")
    data = jax.tree.map(
        lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), buffer.position, axis=0),
        buffer.data,
        batch,
    )
    return Replay(data, (buffer.position + count) % capacity, jnp.minimum(buffer.size + count, capacity))


def sample(buffer: Replay, bits: jax.Array) -> Any:
    """Data (..., *) drawn uniformly, with replacement, by random `bits` (...), uint32.

    Random bits rather than a key, because those of many samples are drawn cheaper at once. The probability of an entry
    is off by a factor of at most 1 + size / 2^32. An empty buffer gives zeros.
    """
    index = (bits % jnp.maximum(buffer.size, 1).astype(jnp.uint32)).astype(jnp.int32)
    return jax.tree.map(lambda x: x[index], buffer.data)

"""What a model is asked, with the answer of an ideal observer.

Causal models say what comes next in a source of symbols, recall the value of a key that they saw (multi-query
associative recall: Arora et al., arXiv 2312.04927) and repeat a string. Bidirectional models fill in hidden symbols of
the same sources, and of a string that comes twice. All tasks share one vocabulary, so that models of all tasks are
trained side by side.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments.next_element import sources

VOCABULARY = 18
HIDDEN = 16  # what stands for a hidden symbol
MARK = 17  # what separates a string from its repetition
SOURCES = {
    "markov": sources.markov(0, 4, 2),
    "hidden markov": sources.hidden_markov(0, 6, 8),
    "automaton": sources.reber(),
    "process": sources.process(),
}


class Batch(NamedTuple):
    """Tokens (B, L) that are read, the labels to be predicted at each of them, weights 1 where that counts, and the
    ideal observer's probabilities of the labels, all (B, L)."""

    tokens_BL: jax.Array
    labels_BL: jax.Array
    weights_BL: jax.Array
    ideal_BL: jax.Array


Task = Callable[[jax.Array, int, int], Batch]
"""(key, batch, length) -> Batch."""


def next_symbol(source: sources.Source) -> Task:
    """What comes next."""

    def task(key: jax.Array, batch: int, length: int) -> Batch:
        symbols = sources.draw(source, key, batch, length + 1)
        ideal = _of_labels(sources.predict(source, symbols[:, :-1]), symbols[:, 1:])
        return Batch(symbols[:, :-1], symbols[:, 1:], jnp.ones((batch, length)), ideal)

    return task


def hidden_symbols(source: sources.Source, rate: float = 0.25) -> Task:
    """What has been hidden."""

    def task(key: jax.Array, batch: int, length: int) -> Batch:
        k_symbols, k_hidden = jax.random.split(key)
        symbols = sources.draw(source, k_symbols, batch, length)
        hidden = jax.random.bernoulli(k_hidden, rate, symbols.shape)
        ideal = _of_labels(sources.fill_in(source, symbols, hidden), symbols)
        return Batch(jnp.where(hidden, HIDDEN, symbols), symbols, hidden.astype(jnp.float32), ideal)

    return task


def recall(key: jax.Array, batch: int, length: int, pairs: int = 6) -> Batch:
    """Pairs of a key (0 to 7) and a value (8 to 15), then keys again, each followed by its value: asked at the keys."""
    if length < 2 * pairs + 2 or length % 2:
        raise ValueError(f"recall: length is {length}, expected an even number of at least {2 * pairs + 2}")
    k_keys, k_values, k_queries = jax.random.split(key, 3)
    keys = jax.vmap(lambda k: jax.random.permutation(k, 8)[:pairs])(jax.random.split(k_keys, batch))
    values = jax.random.randint(k_values, (batch, pairs), 8, 16)
    which = jax.random.randint(k_queries, (batch, length // 2 - pairs), 0, pairs)
    which = jnp.concatenate([jnp.broadcast_to(jnp.arange(pairs)[None], (batch, pairs)), which], axis=1)
    each = [jnp.take_along_axis(x, which, axis=1) for x in (keys, values)]
    tokens = jnp.stack(each, axis=-1).reshape(batch, length)
    asked = (jnp.arange(length) % 2 == 0) & (jnp.arange(length) >= 2 * pairs)
    weights = jnp.broadcast_to(asked[None].astype(jnp.float32), tokens.shape)
    return Batch(tokens, jnp.roll(tokens, -1, axis=1), weights, jnp.ones(tokens.shape))


def copy(key: jax.Array, batch: int, length: int) -> Batch:
    """A random string, a mark, and the string again: asked from the mark on."""
    half = length // 2
    string = jax.random.randint(key, (batch, half), 0, 16)
    whole = jnp.concatenate([string, jnp.full((batch, 1), MARK), string], axis=1)[:, : length + 1]
    weights = jnp.broadcast_to((jnp.arange(length)[None] >= half).astype(jnp.float32), (batch, length))
    labels = jnp.pad(whole[:, 1:], ((0, 0), (0, length + 1 - whole.shape[1])))[:, :length]
    weights = weights * (jnp.arange(length)[None] < 2 * half)
    return Batch(whole[:, :length], labels, weights, jnp.ones((batch, length)))


def fill_in_copy(key: jax.Array, batch: int, length: int, rate: float = 0.25) -> Batch:
    """A random string that comes twice, some of it hidden: known where the other occurrence is not hidden too."""
    k_string, k_hidden = jax.random.split(key)
    half = length // 2
    string = jax.random.randint(k_string, (batch, half), 0, 16)
    tokens = jnp.concatenate([string, string], axis=1)
    hidden = jax.random.bernoulli(k_hidden, rate, tokens.shape)
    ideal = jnp.where(jnp.roll(hidden, half, axis=1), 1 / 16, 1.0)
    return Batch(jnp.where(hidden, HIDDEN, tokens), tokens, hidden.astype(jnp.float32), ideal)


CAUSAL: dict[str, Task] = {name: next_symbol(source) for name, source in SOURCES.items()} | {
    "recall": recall,
    "copy": copy,
}
BIDIRECTIONAL: dict[str, Task] = {name: hidden_symbols(source) for name, source in SOURCES.items()} | {
    "copy": fill_in_copy
}


def _of_labels(p_BLX: jax.Array, labels_BL: jax.Array) -> jax.Array:
    return jnp.take_along_axis(p_BLX, labels_BL[..., None], axis=-1)[..., 0]

"""The replay buffer against a deque, its samples, and that it is written in place."""

from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl import replay
from rl.replay import Transition

pytestmark = pytest.mark.usefixtures("quick_compile")


def _batch(rng: np.random.Generator, count: int) -> Transition:
    return Transition(
        obs=rng.standard_normal((count, 3)).astype(np.float32),
        action=rng.integers(0, 5, count).astype(np.int32),
        reward=rng.standard_normal(count).astype(np.float32),
        terminated=rng.random(count) < 0.5,
        next_obs=rng.standard_normal((count, 3)).astype(np.float32),
    )


def _empty(capacity: int) -> replay.Replay:
    example = jax.tree.map(lambda x: jnp.asarray(x[0]), _batch(np.random.default_rng(0), 1))
    return replay.init(example, capacity)


@pytest.mark.parametrize(("count", "capacity", "adds"), [(1, 7, 17), (5, 35, 6), (5, 35, 23), (11, 11, 3)])
def test_it_holds_what_a_deque_does(count, capacity, adds):
    rng = np.random.default_rng(capacity + adds)
    buffer, oracle = _empty(capacity), deque(maxlen=capacity)
    add = jax.jit(replay.add, donate_argnums=0)
    for _ in range(adds):
        batch = _batch(rng, count)
        buffer = add(buffer, batch)
        oracle.extend(Transition(*row) for row in zip(*batch, strict=True))
        assert int(buffer.size) == len(oracle)
    # The oldest is where the next will be written, once the buffer is full.
    start = int(buffer.position) if len(oracle) == capacity else 0
    order = (start + np.arange(len(oracle))) % capacity
    for name, held in buffer.data._asdict().items():
        expected = np.stack([getattr(row, name) for row in oracle])
        assert held.dtype == expected.dtype
        np.testing.assert_array_equal(np.asarray(held)[order], expected, err_msg=name)


@pytest.mark.parametrize("adds", [3, 7, 12])
def test_samples_are_whole_entries_drawn_uniformly_from_what_is_filled(adds):
    buffer = _empty(35)
    for index in range(adds):
        number_N = 5.0 * index + jnp.arange(5.0)
        obs_NF = jnp.broadcast_to(number_N[:, None], (5, 3))
        buffer = replay.add(
            buffer, Transition(obs_NF, number_N.astype(jnp.int32), -number_N, number_N % 2 == 0, obs_NF + 0.5)
        )
    bits = jax.random.bits(jax.random.key(adds), (211, 317))
    drawn = jax.tree.map(np.asarray, replay.sample(buffer, bits))
    assert drawn.obs.shape == (211, 317, 3)
    number = drawn.action
    np.testing.assert_array_equal(drawn.obs, np.repeat(number[..., None], 3, -1))
    np.testing.assert_array_equal(drawn.next_obs, np.repeat(number[..., None], 3, -1) + 0.5)
    np.testing.assert_array_equal(drawn.reward, -number)
    np.testing.assert_array_equal(drawn.terminated, number % 2 == 0)
    values, counts = np.unique(number, return_counts=True)
    newest = 5 * adds
    np.testing.assert_array_equal(values, np.arange(max(newest - 35, 0), newest))
    expected = number.size / len(values)
    # Chi-squared with len(values) - 1 degrees of freedom: its mean plus 4 standard deviations.
    degrees = len(values) - 1
    assert (np.square(counts - expected) / expected).sum() < degrees + 4 * np.sqrt(2 * degrees)


def test_an_empty_buffer_gives_zeros():
    drawn = replay.sample(_empty(7), jnp.array([5, 2**32 - 1], jnp.uint32))
    assert all(np.asarray(x).shape[0] == 2 and not np.asarray(x).any() for x in drawn)


def test_a_compiled_loop_writes_in_place():
    buffer = replay.init(jnp.zeros(64), 8192)

    def loop(buffer, x_TNF, bits_TB):
        def one(buffer, x):
            x_NF, bits_B = x
            buffer = replay.add(buffer, x_NF)
            return buffer, replay.sample(buffer, bits_B).sum()

        return jax.lax.scan(one, buffer, (x_TNF, bits_TB))

    compiled = jax.jit(loop, donate_argnums=0).lower(buffer, jnp.ones((3, 4, 64)), jnp.ones((3, 5), jnp.uint32))
    memory = compiled.compile().memory_analysis()
    size = buffer.data.nbytes
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size / 10


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="capacity is 0, expected at least 1"):
        replay.init(jnp.zeros(3), 0)
    with pytest.raises(ValueError, match="3 transitions at a time, expected a divisor of the capacity 7"):
        replay.add(replay.init(jnp.zeros(2), 7), jnp.zeros((3, 2)))

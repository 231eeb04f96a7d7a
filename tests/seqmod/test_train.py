"""The compiled training loop: schedules, sweeps, and learning on a problem with a known answer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmod import train
from seqmod.train import AdamWConfig

TRUE = jnp.array([[1.5], [-0.5], [0.25]])


def sample(key):
    """Inputs and targets of a linear map."""
    x = jax.random.normal(key, (17, 3))
    return x, x @ TRUE


def loss(weights, batch, key, step, scale=1.0):
    x, y = batch
    error = jnp.square(x @ weights - scale * y).mean()
    return error, {"error": error}


def test_constant_rate_is_there_from_the_first_step():
    config = AdamWConfig(learning_rate=0.3, steps=10)
    np.testing.assert_allclose([config.rate(step) for step in range(12)], 0.3, rtol=1e-6)


def test_warmup_and_cosine():
    config = AdamWConfig(learning_rate=2.0, steps=104, warmup=4, schedule="cosine")
    rates = np.array([config.rate(step) for step in range(106)])
    np.testing.assert_allclose(rates[:5], 2.0 * np.arange(1, 6) / 5, rtol=1e-6)
    np.testing.assert_allclose(rates[54], 2.0 * (0.02 + 0.98 / 2), rtol=1e-5)
    np.testing.assert_allclose(rates[104:], 0.04, rtol=1e-5)
    assert (np.diff(rates[5:105]) < 0).all()


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_linear_map_is_learned(schedule):
    config = AdamWConfig(learning_rate=0.05, weight_decay=0.0, steps=300, schedule=schedule)
    tx = config.make()
    state = train.start(jnp.zeros((3, 1)), tx, jax.random.key(0))
    state, metrics = train.make_chunk(sample, loss, tx, 300)(state)
    assert metrics["error"].shape == (300,)
    np.testing.assert_allclose(state.params, TRUE, atol=2e-2)


def test_chunks_make_no_difference():
    tx = AdamWConfig(learning_rate=0.05, steps=12).make()
    start = train.start(jnp.zeros((3, 1)), tx, jax.random.key(1))
    whole, _ = train.make_chunk(sample, loss, tx, 12)(start)
    parts, chunk = start, train.make_chunk(sample, loss, tx, 4)
    for _ in range(3):
        parts, _ = chunk(parts)
    np.testing.assert_array_equal(whole.params, parts.params)
    assert int(parts.step) == 12


def test_each_model_of_a_sweep_is_trained_as_if_alone():
    tx = AdamWConfig(learning_rate=0.05, steps=20).make()
    scales = jnp.array([1.0, 2.0, -1.0])
    stacked = train.start(jnp.zeros((3, 3, 1)), tx, jax.random.key(2), sweep=True)
    swept, metrics = train.make_chunk(sample, loss, tx, 20, hyper=scales)(stacked)
    assert metrics["loss"].shape == (20, 3)
    for index, scale in enumerate(scales):
        alone, _ = train.make_chunk(sample, lambda *args, scale=scale: loss(*args, scale), tx, 20)(
            train.start(jnp.zeros((3, 1)), tx, jax.random.key(2))
        )
        np.testing.assert_allclose(swept.params[index], alone.params, rtol=1e-5, atol=1e-6)


def test_impossible_settings():
    with pytest.raises(ValueError, match="warmup 10 below steps"):
        AdamWConfig(steps=10, warmup=10)

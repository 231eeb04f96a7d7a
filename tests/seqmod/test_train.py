"""The compiled training loop: schedules, sweeps, and learning on a problem with a known answer."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmod import checkpoint, train
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 10, "warmup": 10}, "warmup 10 below steps"),
        ({"batch": 10, "accumulate": 3}, "batch 10 is not divisible by accumulate 3"),
        ({"average": 1.0}, r"average is 1\.0, expected at least 0 and below 1"),
    ],
)
def test_impossible_settings(options, message):
    with pytest.raises(ValueError, match=message):
        AdamWConfig(**options)


def test_linear_schedule():
    config = AdamWConfig(learning_rate=2.0, steps=14, warmup=4, schedule="linear")
    np.testing.assert_allclose([config.rate(step) for step in (4, 9, 14, 20)], [2.0, 1.0, 0.0, 0.0], atol=1e-6)


def even(key):
    """A batch of 16, to be split."""
    x = jax.random.normal(key, (16, 3))
    return x, x @ TRUE


def test_accumulated_gradients_are_those_of_the_whole_batch():
    tx = AdamWConfig(learning_rate=0.05, steps=6).make()
    begin = train.start(jnp.zeros((3, 1)), tx, jax.random.key(1))
    whole, metrics = train.make_chunk(even, loss, tx, 6)(begin)
    parts, same = train.make_chunk(even, loss, tx, 6, accumulate=4)(begin)
    np.testing.assert_allclose(parts.params, whole.params, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(same["error"], metrics["error"], rtol=1e-5)


def test_the_average_is_that_of_its_formula():
    tx = AdamWConfig(learning_rate=0.05, steps=30).make()
    state = train.start(jnp.zeros((3, 1)), tx, jax.random.key(1), average=True)
    mean, one = np.zeros((3, 1)), train.make_chunk(sample, loss, tx, 1, average=0.6)
    for step in range(30):
        state, _ = one(state)
        keep = min(0.6, (1 + step) / (10 + step))
        mean = keep * mean + (1 - keep) * np.asarray(state.params)
        np.testing.assert_allclose(state.average, mean, rtol=1e-4, atol=1e-6)


def test_weight_decay_of_matrices_alone():
    params = {
        "mlp_up": jnp.ones((2, 3)),
        "mlp_up_bias": jnp.ones(3),
        "mixer_norm": jnp.ones((4, 3)),
        "mixer": {"A_log": jnp.ones((2, 3)), "out": jnp.ones((2, 2, 3)), "fixed": {"w": jnp.ones((2, 2))}},
    }
    tx = AdamWConfig(learning_rate=0.1, weight_decay=0.5, steps=3, decayed="matrices").make()
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    changed = {
        "/".join(key.key for key in path) for path, leaf in jax.tree.leaves_with_path(updates) if np.abs(leaf).max() > 0
    }
    assert changed == {"mlp_up", "mixer/out"}


def test_evaluation_is_a_mean_over_batches():
    got = train.evaluate(jnp.zeros((3, 1)), sample, loss, jax.random.key(3), 400)
    # The error of predicting nothing is the squared norm of the map.
    assert abs(float(got["error"]) / float(jnp.square(TRUE).sum()) - 1) < 0.05
    assert train.evaluate(TRUE, sample, loss, jax.random.key(3), 4)["loss"] < 1e-10


def test_training_over_devices_is_training_on_one():
    """Two simulated devices, each with half of the batch."""
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    config = AdamWConfig(learning_rate=0.05, steps=20)
    runs = {
        mesh is None: train.fit(lambda _: jnp.zeros((3, 1)), even, loss, config, jax.random.key(0), every=10, mesh=mesh)
        for mesh in (None, mesh)
    }
    (alone, curve), (spread, same) = runs[True], runs[False]
    np.testing.assert_allclose(spread.params, alone.params, rtol=1e-5)
    np.testing.assert_allclose(same["loss"], curve["loss"], rtol=1e-4, atol=1e-6)
    assert spread.params.sharding.is_fully_replicated
    assert len(spread.params.sharding.device_set) == 2


class Stop(Exception):
    """What a test raises to interrupt a run."""


def test_an_interrupted_fit_ends_as_if_it_had_not_been(tmp_path):
    config = AdamWConfig(learning_rate=0.05, steps=40, average=0.9, accumulate=2, batch=16)

    def run(directory=None, stop=None):
        seen = []

        def report(step, metrics):
            seen.append((step, sorted(metrics)))
            if step == stop:
                raise Stop

        return *train.fit(
            lambda key: jax.random.normal(key, (3, 1)),
            even,
            loss,
            config,
            jax.random.key(5),
            directory=directory,
            every=10,
            evaluation=lambda params: {"distance": jnp.abs(params - TRUE).max()},
            report=report,
        ), seen

    whole, curves, seen = run()
    assert curves["loss"].shape == (40,)
    assert seen == [(step, ["error", "eval/distance", "loss"]) for step in (10, 20, 30, 40)]
    with pytest.raises(Stop):
        run(tmp_path, stop=20)
    resumed, rest, seen = run(tmp_path)
    assert [step for step, _ in seen] == [30, 40]
    np.testing.assert_array_equal(rest["loss"], curves["loss"][20:])
    for got, want in zip(jax.tree.leaves(resumed._replace(key=0)), jax.tree.leaves(whole._replace(key=0)), strict=True):
        np.testing.assert_array_equal(got, want)
    again, nothing, _ = run(tmp_path)
    assert nothing == {}
    np.testing.assert_array_equal(again.params, whole.params)
    with pytest.raises(checkpoint.CheckpointMismatch):
        train.fit(
            lambda _: jnp.zeros((3, 1)),
            even,
            loss,
            replace(config, learning_rate=0.1),
            jax.random.key(5),
            directory=tmp_path,
            every=10,
        )


def test_a_loss_that_blows_up_is_an_error():
    def diverging(params, batch, key, step):
        value = jnp.where(step < 7, loss(params, batch, key, step)[0], jnp.nan)
        return value, {}

    config = AdamWConfig(steps=20)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 7"):
        train.fit(lambda _: jnp.zeros((3, 1)), sample, diverging, config, jax.random.key(0), every=5)
    with pytest.raises(ValueError, match="every is 6, expected a divisor of the 20 steps"):
        train.fit(lambda _: jnp.zeros((3, 1)), sample, loss, config, jax.random.key(0), every=6)

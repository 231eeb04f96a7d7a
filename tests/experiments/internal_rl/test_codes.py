"""What codes name: the information in a table of counts, and rollouts that hold a code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2_contingency

from experiments.internal_rl import codes
from experiments.internal_rl.presets import tiny
from seqmod import backbone, metacontroller


def test_information_by_hand():
    assert codes.information(np.full((4, 3), 7)) == pytest.approx(0.0, abs=1e-12)
    assert codes.information(5 * np.eye(4)) == pytest.approx(np.log(4))
    half = np.array([[2, 0, 1], [0, 2, 1]])
    assert codes.information(half) == pytest.approx(2 / 3 * np.log(2))


def test_information_of_independent_counts_is_the_sampling_bias():
    draws = np.random.default_rng(0).multinomial(256, [0.3, 0.3, 0.2, 0.2], size=(300, 16))
    mean = np.mean([codes.information(counts) for counts in draws])
    assert mean == pytest.approx((16 - 1) * (4 - 1) / (2 * 16 * 256), rel=0.1)


def test_codes_that_steer_and_codes_that_do_not():
    config = tiny()
    model = backbone.init(jax.random.key(0), config.model)
    controller = metacontroller.init(jax.random.key(1), config.discover.metacontroller)
    measured = codes.measure(config, model, controller, jax.random.key(2), 6, 32)
    counts = np.array(measured["counts"])
    assert counts.shape == (6, config.world.colours + 1)
    assert (counts.sum(1) == 32).all()
    assert measured["information"] == codes.information(counts)
    idle = {**controller, "decoder": jax.tree.map(jnp.zeros_like, controller["decoder"])}
    strong = {**controller, "decoder": jax.tree.map(lambda leaf: 30.0 * leaf, controller["decoder"])}
    for steering, dependent in ((idle, False), (strong, True)):
        table = np.array(codes.measure(config, model, steering, jax.random.key(3), 6, 256)["counts"])
        p_value = chi2_contingency(table[:, table.sum(0) > 0]).pvalue
        assert (p_value < 1e-6) == dependent

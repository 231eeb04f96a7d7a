"""Running moments against those of all data at once, and scaled rewards against a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl import normalise

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_moments_in_parts_are_those_of_the_whole():
    rng = np.random.default_rng(0)
    parts = [rng.normal(100.0, 3.0, size=(rows, 2, 3)).astype(np.float32) for rows in (1, 7, 40)]
    seen = normalise.moments((3,))
    for part in parts:
        seen = normalise.update(seen, jnp.asarray(part))
    whole = np.concatenate(parts).reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(seen.samples, len(whole), rtol=1e-5)
    np.testing.assert_allclose(seen.mean, whole.mean(0), rtol=1e-5)
    # The start has the weight of 1e-4 samples, at a distance of 100.
    np.testing.assert_allclose(seen.variance, whole.var(0), rtol=3e-3)
    x = np.float32([[100.0, 103.0, 97.0], [1e6, -1e6, 100.0]])
    expected = np.clip((x - whole.mean(0)) / whole.std(0), -10, 10)
    np.testing.assert_allclose(normalise.normalise(seen, jnp.asarray(x)), expected, atol=5e-3)


def test_rewards_are_divided_by_the_spread_of_discounted_returns():
    rng = np.random.default_rng(1)
    reward = rng.normal(2.0, 5.0, size=(3, 11, 4))
    done = rng.random((3, 11, 4)) < 0.2
    state, running, seen = normalise.reward_scale(4), np.zeros(4), []
    for part in range(3):
        scaled, state = normalise.scale_rewards(state, jnp.float32(reward[part]), jnp.asarray(done[part]), 0.9)
        for t in range(11):
            running = 0.9 * running + reward[part, t]
            seen.append(running.copy())
            running = np.where(done[part, t], 0.0, running)
        spread = np.concatenate(seen).std()
        np.testing.assert_allclose(scaled, np.clip(reward[part] / spread, -10, 10), rtol=1e-4)
        np.testing.assert_allclose(state.return_E, running, rtol=1e-5, atol=1e-5)


def test_the_state_is_mapped_over_seeds():
    samples = jax.random.normal(jax.random.key(0), (2, 5, 3))
    both = jax.vmap(normalise.update, in_axes=(None, 0))(normalise.moments((3,)), samples)
    one = normalise.update(normalise.moments((3,)), samples[1])
    np.testing.assert_allclose(both.variance[1], one.variance, rtol=1e-6)

"""Products of decays and initial step sizes, against loops and their definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmod.mixers.decays import decay_products, past_steps, step_size_bias

pytestmark = pytest.mark.usefixtures("quick_compile")

SEGMENTS = np.array([[3, 3, 3, 1, 1, 3, 3], [2, 2, 2, 2, 2, 2, 2]])
RUNS = np.array([[0, 0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 0, 0, 0]])


@pytest.mark.parametrize("channels", [(), (5,)])
def test_products_of_decays_are_products(channels):
    rng = np.random.default_rng(0)
    g_BLH = -np.exp(3 * rng.standard_normal((2, 7, 3, *channels)))
    g_BLH[0, 2, 1] = -np.inf
    got = np.asarray(jax.jit(decay_products)(jnp.asarray(g_BLH, jnp.float32), jnp.asarray(SEGMENTS)))
    expected = np.zeros((2, 3, 7, 7, *channels))
    for b in range(2):
        for t in range(7):
            for s in range(t + 1):
                if RUNS[b, t] == RUNS[b, s]:
                    expected[b, :, t, s] = np.exp(g_BLH[b, s + 1 : t + 1].sum(0))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-30)


def test_gradients_of_products_are_finite_where_nothing_is_left():
    gradient = jax.grad(lambda g: decay_products(g).sum())(jnp.full((1, 5, 2), -1e30))
    assert np.isfinite(gradient).all()


def test_past_steps():
    expected = np.tril(RUNS[:, :, None] == RUNS[:, None])
    np.testing.assert_array_equal(past_steps(7, jnp.asarray(SEGMENTS)), expected)
    np.testing.assert_array_equal(past_steps(4)[0], np.tril(np.ones((4, 4), bool)))


def test_step_sizes_are_log_uniform_above_the_floor():
    bias = step_size_bias(jax.random.key(0), (4000,), smallest=1e-5, largest=0.1, floor=1e-4)
    sizes = np.log1p(np.exp(np.asarray(bias, np.float64)))
    # A quarter of the decades between 1e-5 and 0.1 lies below the floor.
    assert abs(np.mean(sizes < 1.001e-4) - 0.25) < 0.03
    above = np.log10(sizes[sizes > 1.001e-4])
    assert (above > -4).all()
    assert above.max() < -1 + 1e-4
    np.testing.assert_allclose(np.quantile(above, [0.25, 0.5, 0.75]), [-3.25, -2.5, -1.75], atol=0.1)

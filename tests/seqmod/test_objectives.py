"""Losses against NumPy, factor by factor."""

import jax.numpy as jnp
import numpy as np
import pytest

from seqmod.objectives import categorical_nll, factored_nll, masked_mean

pytestmark = pytest.mark.usefixtures("quick_compile")

RNG = np.random.default_rng(0)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = np.float64(x)
    return x - np.log(np.exp(x).sum())


def test_categorical_nll():
    logits, labels = 3 * RNG.standard_normal((2, 3, 5)), RNG.integers(5, size=(2, 3))
    expected = [[-log_softmax(logits[b, t])[labels[b, t]] for t in range(3)] for b in range(2)]
    np.testing.assert_allclose(categorical_nll(jnp.asarray(logits), jnp.asarray(labels)), expected, rtol=1e-5)


@pytest.mark.parametrize("factors", [(7,), (3, 3, 3), (2, 5, 5, 3, 2), (1, 4)])
def test_factored_nll_is_the_sum_over_factors(factors):
    logits = 3 * RNG.standard_normal((2, 3, sum(factors)))
    labels = np.stack([RNG.integers(size, size=(2, 3)) for size in factors], axis=-1)
    one_hot, expected = np.zeros_like(logits), np.zeros((2, 3))
    for index in np.ndindex(2, 3):
        start = 0
        for size, label in zip(factors, labels[index], strict=True):
            one_hot[index][start + label] = 1
            expected[index] -= log_softmax(logits[index][start : start + size])[label]
            start += size
    got = factored_nll(jnp.asarray(logits), jnp.asarray(one_hot), factors)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_factors_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"logits have 7 features, expected sum\(3, 5\)"):
        factored_nll(jnp.zeros((2, 7)), jnp.zeros((2, 7)), (3, 5))


def test_masked_mean():
    values, mask = jnp.array([[1.0, 2.0, 30.0], [4.0, 50.0, 60.0]]), jnp.array([[1, 1, 0], [1, 0, 0]], bool)
    np.testing.assert_allclose(masked_mean(values, mask), 7 / 3, rtol=1e-6)
    assert masked_mean(values, jnp.zeros((2, 3), bool)) == 0

"""What mixers share: initialisation, norms, segments, short convolutions."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmod.mixers import base
from seqmod.mixers.convolution import short_convolution, short_convolution_step

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_scaled_normal_has_the_variance_it_says():
    x = scaled = np.asarray(base.scaled_normal(jax.random.key(0), (400, 250), 7, 0.1))
    assert abs(x.var() / (0.1 / 7) - 1) < 0.02
    assert abs(scaled.mean()) < 0.001
    # Truncated at two standard deviations of the normal that it is cut from.
    assert np.abs(scaled).max() <= 2 / 0.8796 * math.sqrt(0.1 / 7) * 1.0001


def test_rms_norm_by_hand():
    x = jnp.array([[3.0, -4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    gain = jnp.array([1.0, 2.0, 1.0, 1.0])
    np.testing.assert_allclose(base.rms_norm(gain, x), [[1.2, -3.2, 0, 0], [0, 0, 0, 0]], rtol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_a_short_convolution_is_numpys_over_each_segment(causal):
    rng = np.random.default_rng(0)
    u_BLN, kernel_WN, bias_N = (rng.standard_normal(shape) for shape in ((2, 7, 5), (3, 5), (5,)))
    ids_BL = np.array([[1, 1, 1, 1, 2, 2, 1], [3, 3, 3, 3, 3, 3, 3]])
    u, kernel, bias = (jnp.asarray(array, jnp.float32) for array in (u_BLN, kernel_WN, bias_N))
    got = short_convolution(u, kernel, bias, jnp.asarray(ids_BL), causal=causal)
    start = 0 if causal else 1
    for row, cuts in enumerate(([0, 4, 6, 7], [0, 7])):
        for first, last in itertools.pairwise(cuts):
            for n in range(5):
                full = np.convolve(u_BLN[row, first:last, n], kernel_WN[::-1, n])[start : start + last - first]
                np.testing.assert_allclose(got[row, first:last, n], full + bias_N[n], rtol=1e-5, atol=1e-5)
    if not causal:
        with pytest.raises(ValueError, match="kernel has 4 steps, expected an odd number"):
            short_convolution(u, jnp.ones((4, 5)), causal=False)


def test_a_short_convolution_step_by_step():
    rng = np.random.default_rng(0)
    u_BLN, kernel_WN, bias_N = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, 7, 5), (4, 5), (5,))
    )
    window_BWN, stepped = jnp.zeros((2, 3, 5)), []
    for t in range(7):
        y_BN, window_BWN = short_convolution_step(u_BLN[:, t], window_BWN, kernel_WN, bias_N)
        stepped.append(y_BN)
    expected = short_convolution(u_BLN, kernel_WN, bias_N)
    np.testing.assert_allclose(jnp.stack(stepped, 1), expected, rtol=1e-5, atol=1e-6)

"""The RG-LRU block against its equations, one step at a time."""

import math

import jax
import numpy as np
import pytest
from scipy.special import erf

from seqmod.mixers import RGLRUConfig, rglru
from tests.seqmod.mixers.family import Case, run, sequence

pytestmark = pytest.mark.usefixtures("quick_compile")


def rglru_reference(params, config: RGLRUConfig, x_LD: np.ndarray) -> np.ndarray:
    """The equations of the module's docstring, one step at a time."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    size = config.recurrence // config.heads
    u_LN, h_N, y_LD = x_LD @ p["input"], np.zeros(config.recurrence), np.zeros_like(x_LD)
    for t, x_D in enumerate(x_LD):
        conv_N = p["conv_bias"].copy()
        for lag in range(min(config.kernel, t + 1)):
            conv_N += p["conv"][config.kernel - 1 - lag] * u_LN[t - lag]
        r_N, i_N = np.zeros_like(h_N), np.zeros_like(h_N)
        for head in range(config.heads):
            block = slice(head * size, (head + 1) * size)
            for gate, g_N in enumerate((r_N, i_N)):
                logit = conv_N[block] @ p["gates"][gate, head] + p["gates_bias"][gate, block]
                g_N[block] = 1 / (1 + np.exp(-logit))
        a_N = np.exp(-8 * np.log1p(np.exp(p["decay"])) * r_N)
        h_N = a_N * h_N + np.sqrt(1 - a_N**2) * i_N * conv_N
        branch = x_D @ p["gate"]
        gelu = 0.5 * branch * (1 + np.tanh(math.sqrt(2 / math.pi) * (branch + 0.044715 * branch**3)))
        assert np.abs(gelu - 0.5 * branch * (1 + erf(branch / math.sqrt(2)))).max() < 1e-3
        y_LD[t] = (gelu * h_N) @ p["out"]
    return y_LD


def test_rglru_against_the_equations(random_params):
    config = RGLRUConfig(width=5, recurrence=6, heads=3, kernel=4)
    params = random_params(rglru.init, config, scale=0.5)
    x_BLD = sequence(2, 11, 5)
    case = Case(rglru.MIXER, config, params, x_BLD)
    expected = rglru_reference(params, config, np.asarray(x_BLD[1], np.float64))
    np.testing.assert_allclose(run(case, x_BLD)[1], expected, rtol=1e-4, atol=1e-5)


def test_rglru_starts_with_slow_decays():
    config = RGLRUConfig(width=3, recurrence=1000, heads=2)
    decay_N = jax.jit(lambda key: rglru.init(key, config)["decay"])(jax.random.key(0))
    decay_N = np.exp(-8 * np.log1p(np.exp(np.asarray(decay_N, np.float64))))
    assert 0.9 <= decay_N.min() < 0.901
    assert 0.998 < decay_N.max() <= 0.9991


def test_rglru_refuses_a_bad_config():
    with pytest.raises(ValueError, match="recurrence 7 is not divisible by heads 2"):
        RGLRUConfig(width=5, recurrence=7, heads=2)
    with pytest.raises(ValueError, match="sizes must be positive"):
        RGLRUConfig(width=5, recurrence=0, heads=2)

"""Gated linear attention against its recurrence, one step and head at a time."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmod.mixers import MIXERS, GLAConfig, gla, mixing_matrix
from tests.seqmod.mixers.family import Case, run, sequence

pytestmark = pytest.mark.usefixtures("quick_compile")

matrix = jax.jit(mixing_matrix, static_argnums=(0, 2))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def reference(params, config: GLAConfig, x_LD: np.ndarray) -> np.ndarray:
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    y_LD = np.zeros_like(x_LD)
    for h in range(config.heads):
        s_KV = np.zeros((config.key_dim, config.value_dim))
        for t, x_D in enumerate(x_LD):
            a_K = sigmoid(x_D @ p["decay_down"] @ p["decay_up"][:, h] + p["decay_bias"][h]) ** (1 / 16)
            s_KV = a_K[:, None] * s_KV + np.outer(x_D @ p["key"][:, h], x_D @ p["value"][:, h])
            y_V = (x_D @ p["query"][:, h]) @ s_KV / math.sqrt(config.key_dim)
            gate_V = x_D @ p["gate"][:, h]
            normed_V = y_V / np.sqrt(np.mean(y_V**2) + 1e-6) * p["norm"]
            y_LD[t] += (gate_V * sigmoid(gate_V) * normed_V) @ p["out"][h]
    return y_LD


def make(random_params) -> Case:
    config = GLAConfig(width=5, heads=3, key_dim=2, value_dim=7, decay_rank=4)
    return Case(gla.MIXER, config, random_params(gla.init, config, scale=0.7), sequence(2, 11, 5))


# Biases at which the decays are about 0.6 and hardly any are left.
@pytest.mark.parametrize("bias", [0.0, -8.0, -100.0])
def test_gla_against_the_recurrence(random_params, bias):
    case = make(random_params)
    case.params["decay_bias"] += bias
    expected = reference(case.params, case.config, np.asarray(case.x_BLD[1], np.float64))
    np.testing.assert_allclose(run(case, case.x_BLD)[1], expected, rtol=1e-3, atol=1e-4)


def scores(case: Case) -> np.ndarray:
    q_BLHK, k_BLHK = (
        np.einsum("BLD,DHK->BLHK", np.asarray(case.x_BLD, np.float64), np.asarray(case.params[name], np.float64))
        for name in ("query", "key")
    )
    return np.einsum("BLHK,BMHK->BHLM", q_BLHK, k_BLHK) / math.sqrt(case.config.key_dim)


def test_gates_that_are_open_or_shut_are_the_limits(random_params):
    """Open, it is linear attention without decay; shut, each step sees itself. Equal gates are one decay per head."""
    case = make(random_params)
    flat = case.params | {"decay_up": jnp.zeros_like(case.params["decay_up"])}
    lag_LM = np.arange(11)[:, None] - np.arange(11)[None]
    for bias, decay in ((1e4, 1.0), (-1e6, 0.0), (0.0, 0.5 ** (1 / 16))):
        params = flat | {"decay_bias": jnp.full_like(case.params["decay_bias"], bias)}
        expected = np.tril(scores(case) * decay ** np.maximum(lag_LM, 0.0))
        np.testing.assert_allclose(matrix(gla.MIXER, params, case.config, case.x_BLD), expected, rtol=1e-4, atol=1e-5)


def test_decays_start_at_the_sixteenth_root_of_a_half():
    """Which is what a bias of zero gives for an input of zero."""
    params = jax.jit(gla.init, static_argnums=1)(jax.random.key(0), GLAConfig(width=3, heads=2, key_dim=5, value_dim=3))
    np.testing.assert_array_equal(params["decay_bias"], np.zeros((2, 5)))
    np.testing.assert_array_equal(params["norm"], np.ones(3))


def test_gla_refuses_a_bad_config():
    with pytest.raises(ValueError, match="sizes must be positive"):
        GLAConfig(decay_rank=0)
    with pytest.raises(ValueError, match="width 15 is not divisible by heads 4"):
        MIXERS["gla"].config(15, 4)


def test_keys_are_half_as_wide_as_values():
    for width, heads, key_dim in ((18, 3, 3), (15, 3, 2), (3, 3, 1)):
        config = MIXERS["gla"].config(width, heads)
        assert (config.key_dim, config.value_dim, config.decay_rank) == (key_dim, width // heads, 16)

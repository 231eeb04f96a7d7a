"""Gated associative memory: its equations, its two halves, and how little it sees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmod.mixers import GAMConfig, gam
from tests.seqmod.mixers.family import Case, run, sequence

pytestmark = pytest.mark.usefixtures("quick_compile")

B, L, D, M = 2, 11, 5, 7
CONFIG = GAMConfig(width=D, slots=M, kernel=3)
X_BLD = sequence(B, L, D)


@pytest.fixture(scope="module")
def params(random_params):
    return random_params(gam.init, CONFIG)


def halves(params, x_LD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The convolution and what is recalled, step by step."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    local_LD, recalled_LD = np.zeros_like(x_LD), np.zeros_like(x_LD)
    for t, x_D in enumerate(x_LD):
        local_LD[t] = p["conv_bias"] + sum(p["conv"][2 - lag] * x_LD[t - lag] for lag in range(min(3, t + 1)))
        weights_M = np.exp(p["memory"] @ x_D)
        recalled_LD[t] = weights_M / weights_M.sum() @ p["memory"]
    return local_LD, recalled_LD


def test_against_the_equations(params):
    x_LD = np.asarray(X_BLD[1], np.float64)
    gates_LE = 1 / (1 + np.exp(-(x_LD @ np.asarray(params["gate"], np.float64) + np.asarray(params["gate_bias"]))))
    local_LD, recalled_LD = halves(params, x_LD)
    expected = gates_LE[:, :D] * local_LD + gates_LE[:, D:] * recalled_LD
    y_BLD = run(Case(gam.MIXER, CONFIG, params, X_BLD), X_BLD)
    np.testing.assert_allclose(y_BLD[1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("half", [0, 1])
def test_gates_shut_off_either_half(params, half):
    bias = jnp.where((jnp.arange(2 * D) < D) == (half == 0), 1e4, -1e4)
    y_BLD = run(Case(gam.MIXER, CONFIG, params | {"gate_bias": bias}, X_BLD), X_BLD)
    expected = halves(params, np.asarray(X_BLD[1], np.float64))[half]
    np.testing.assert_allclose(y_BLD[1], expected, rtol=1e-4, atol=1e-5)


def test_memory_carries_nothing_from_step_to_step(params):
    """Without the convolution, steps in another order give outputs in that order."""
    alone = Case(gam.MIXER, CONFIG, params | {"conv": jnp.zeros((3, D))}, X_BLD)
    order = np.random.default_rng(0).permutation(L)
    np.testing.assert_allclose(run(alone, X_BLD[:, order]), run(alone, X_BLD)[:, order], rtol=1e-5, atol=1e-6)


def test_four_layers_see_eight_steps_back(params):
    @jax.jit
    def jacobian(x_LD):
        def stack(x_LD):
            x_BLD = x_LD[None]
            for _ in range(4):
                x_BLD = x_BLD + gam.apply(params, CONFIG, x_BLD)
            return x_BLD[0]

        return jax.jacrev(stack)(x_LD)

    seen_LL = np.abs(jacobian(X_BLD[0])).max((1, 3)) > 0
    lag_LL = np.arange(L)[:, None] - np.arange(L)
    np.testing.assert_array_equal(seen_LL, (lag_LL >= 0) & (lag_LL <= 8))


def test_initial_values():
    params = jax.jit(gam.init, static_argnums=1)(jax.random.key(0), GAMConfig(width=40, slots=110))
    assert 0.19 < np.abs(params["memory"]).max() <= 0.2
    np.testing.assert_allclose(np.square(params["memory"]).mean(), 0.04 / 3, rtol=0.05)
    assert gam.default_config(64, 4).slots == 512


def test_a_bad_config_is_refused():
    with pytest.raises(ValueError, match="sizes must be positive"):
        GAMConfig(slots=0)

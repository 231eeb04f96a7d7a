"""Retention against its recurrence, one step and head at a time."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmod.mixers import MIXERS, RetNetConfig, mixing_matrix, retnet
from tests.seqmod.mixers.family import Case, run, sequence, steps

pytestmark = pytest.mark.usefixtures("quick_compile")

matrix = jax.jit(mixing_matrix, static_argnums=(0, 2))


def turn(x_K: np.ndarray, time: int) -> np.ndarray:
    """Channels in pairs, as complex numbers, times e^{i theta time}; a last odd channel stays."""
    turned, pairs = x_K.copy(), len(x_K) // 2
    for i in range(pairs):
        theta = 10000 ** (-i / (pairs - 1)) if pairs > 1 else 1.0
        z = complex(x_K[2 * i], x_K[2 * i + 1]) * complex(math.cos(theta * time), math.sin(theta * time))
        turned[2 * i : 2 * i + 2] = z.real, z.imag
    return turned


def reference(params, config: RetNetConfig, x_LD: np.ndarray) -> np.ndarray:
    """The recurrent form: paper's equation 6, then group norm, gate and projection."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    y_LD = np.zeros_like(x_LD)
    for h in range(config.heads):
        s_KV = np.zeros((config.key_dim, config.value_dim))
        for t, x_D in enumerate(x_LD):
            q_K, k_K, v_V = turn(x_D @ p["query"][:, h], t), turn(x_D @ p["key"][:, h], t), x_D @ p["value"][:, h]
            s_KV = (1 - 2.0 ** (-5 - h)) * s_KV + np.outer(k_K, v_V)
            y_V = q_K @ s_KV / math.sqrt(config.key_dim)
            gate_V = x_D @ p["gate"][:, h]
            gated_V = gate_V / (1 + np.exp(-gate_V)) * y_V / np.sqrt(np.mean(y_V**2) + 1e-6)
            y_LD[t] += gated_V @ p["out"][h]
    return y_LD


@pytest.mark.parametrize("key_dim", [1, 2, 7])
def test_retnet_against_the_recurrence(random_params, key_dim):
    config = RetNetConfig(width=5, heads=3, key_dim=key_dim, value_dim=4)
    params = random_params(retnet.init, config, scale=0.7)
    x_BLD = sequence(2, 11, 5)
    expected = reference(params, config, np.asarray(x_BLD[1], np.float64))
    np.testing.assert_allclose(run(Case(retnet.MIXER, config, params, x_BLD), x_BLD)[1], expected, 1e-3, 1e-4)


def test_decays_and_angles_are_those_of_the_paper():
    np.testing.assert_allclose(np.exp(retnet.log_decays(4)), [31 / 32, 63 / 64, 127 / 128, 255 / 256], rtol=1e-6)
    np.testing.assert_allclose(retnet.angles(6), [1, 0.01, 0.0001], rtol=1e-5)


def test_scores_know_only_how_far_apart_two_steps_are(random_params):
    config = RetNetConfig(width=5, heads=2, key_dim=5, value_dim=3)
    params = random_params(retnet.init, config)
    same_BLD = jnp.broadcast_to(sequence(1, 1, 5), (1, 9, 5))
    m_BHLM = np.asarray(matrix(retnet.MIXER, params, config, same_BLD))
    for lag in range(9):
        diagonal = np.diagonal(m_BHLM, -lag, 2, 3)
        np.testing.assert_allclose(diagonal, np.broadcast_to(diagonal[..., :1], diagonal.shape), rtol=1e-4, atol=1e-6)


def test_the_state_counts_its_steps(random_params):
    config = RetNetConfig(width=5, heads=2, key_dim=4, value_dim=3)
    x_BLD = sequence(2, 6, 5)
    case = Case(retnet.MIXER, config, random_params(retnet.init, config), x_BLD)
    _, state = steps(case, x_BLD, retnet.init_state(config, 2, 6))
    assert int(state.time) == 6


def test_retnet_refuses_a_bad_config():
    with pytest.raises(ValueError, match="sizes must be positive"):
        RetNetConfig(value_dim=0)
    with pytest.raises(ValueError, match="width 15 is not divisible by heads 4"):
        MIXERS["retnet"].config(15, 4)

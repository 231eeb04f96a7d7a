"""The semiseparable mixer against its recurrence, and the structure of its matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmod.mixers import SemiseparableConfig, semiseparable
from tests.seqmod.mixers.family import Case, run, sequence

pytestmark = pytest.mark.usefixtures("quick_compile")

SMALL = SemiseparableConfig(width=5, inner=6, heads=3, key_dim=2, kernel=3)


def silu(x):
    return x / (1 + np.exp(-x))


def semiseparable_reference(params, config: SemiseparableConfig, x_LD: np.ndarray) -> np.ndarray:
    """The equations of the module's docstring, one step at a time."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    E, H, K, W = config.inner, config.heads, config.key_dim, config.kernel
    z_LE, u_LN, d_LH = np.split(x_LD @ p["input"], [E, E + config.convolved], axis=1)
    state_HKV, y_LE = np.zeros((H, K, E // H)), np.zeros_like(z_LE)
    for t in range(len(x_LD)):
        conv_N = p["conv_bias"] + sum(p["conv"][W - 1 - lag] * u_LN[t - lag] for lag in range(min(W, t + 1)))
        v_E, q, k = np.split(silu(conv_N), [E, E + H * K])
        v_HV, q_HK, k_HK = v_E.reshape(H, -1), q.reshape(H, K), k.reshape(H, K)
        dt_H = np.log1p(np.exp(d_LH[t] + p["dt_bias"]))
        decay_H = np.exp(-dt_H * np.exp(p["decay"]))
        state_HKV = decay_H[:, None, None] * state_HKV + dt_H[:, None, None] * k_HK[..., None] * v_HV[:, None]
        y_E = (v_HV + np.einsum("HK,HKV->HV", q_HK, state_HKV)).reshape(E)
        y_LE[t] = y_E / np.sqrt((y_E**2).mean() + 1e-5) * p["norm"]
    return (y_LE * silu(z_LE)) @ p["out"]


def test_semiseparable_against_the_equations(random_params):
    config = SemiseparableConfig(width=5, inner=6, heads=3, key_dim=4, kernel=7)
    params = random_params(semiseparable.init, config)
    x_BLD = sequence(2, 11, 5)
    case = Case(semiseparable.MIXER, config, params, x_BLD)
    expected = semiseparable_reference(params, config, np.asarray(x_BLD[1], np.float64))
    np.testing.assert_allclose(run(case, x_BLD)[1], expected, rtol=1e-4, atol=1e-5)


def test_blocks_of_the_matrix_have_the_rank_of_the_keys(random_params):
    params = random_params(semiseparable.init, SMALL)
    m_BHLL = jax.jit(semiseparable.matrix, static_argnums=1)(params, SMALL, sequence(1, 11, 5))
    for m_LL in np.asarray(m_BHLL[0], np.float64) - np.eye(11):
        for cut in (4, 7):
            # On the diagonal too: the entry at [cut, cut] is in the block.
            singular = np.linalg.svd(m_LL[cut:, : cut + 1], compute_uv=False)
            assert singular[1] > 1e-4 * singular[0]
            assert singular[2] < 1e-6 * singular[0]


def test_without_decay_the_matrix_is_a_masked_one_of_low_rank(random_params):
    params = random_params(semiseparable.init, SMALL) | {"decay": jnp.full(3, -jnp.inf)}
    m_BHLL = jax.jit(semiseparable.matrix, static_argnums=1)(params, SMALL, sequence(1, 7, 5))
    for m_LL in np.asarray(m_BHLL[0], np.float64) - np.eye(7):
        # What is below the diagonal goes on above it: any two columns agree to a combination of two others.
        rows = np.linalg.svd(m_LL[4:, :5], compute_uv=False)
        assert rows[2] < 1e-6 * rows[0]
        assert (m_LL[np.triu_indices(7, 1)] == 0).all()


def test_initial_values():
    config = SemiseparableConfig(width=3, inner=1000, heads=1000, key_dim=2)
    params = jax.jit(lambda key: semiseparable.init(key, config))(jax.random.key(0))
    dt_H = np.log1p(np.exp(np.asarray(params["dt_bias"], np.float64)))
    assert 0.999e-3 < dt_H.min() < 1.1e-3
    assert 0.09 < dt_H.max() < 0.1001
    decay_H = np.exp(np.asarray(params["decay"]))
    assert 1 <= decay_H.min() < 1.1
    assert 15.9 < decay_H.max() < 16.001


def test_semiseparable_refuses_a_bad_config():
    with pytest.raises(ValueError, match="sizes must be positive"):
        SemiseparableConfig(key_dim=0)
    with pytest.raises(ValueError, match="not divisible by heads 5"):
        SemiseparableConfig(heads=5)
    with pytest.raises(ValueError, match="expected 0 < dt_min <= dt_max"):
        SemiseparableConfig(dt_max=0)

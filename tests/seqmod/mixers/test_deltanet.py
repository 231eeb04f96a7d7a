"""DeltaNet and its gated form against their recurrences, one step and head at a time."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmod.mixers import MIXERS, DeltaNetConfig, GatedDeltaNetConfig, deltanet, gated_deltanet, mixing_matrix
from tests.seqmod.mixers.family import Case, run, sequence

pytestmark = pytest.mark.usefixtures("quick_compile")

matrix = jax.jit(mixing_matrix, static_argnums=(0, 2))

KINDS = pytest.mark.parametrize(
    ("module", "kind"), [(deltanet, DeltaNetConfig), (gated_deltanet, GatedDeltaNetConfig)], ids=["plain", "gated"]
)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def reference(params, config: DeltaNetConfig | GatedDeltaNetConfig, x_LD: np.ndarray) -> np.ndarray:
    """The equations of the modules' docstrings, with the transition as a dense matrix."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    H, K, V = config.heads, config.key_dim, config.value_dim
    u_LN, s_HKV, y_LD = x_LD @ p["qkv"], np.zeros((H, K, V)), np.zeros_like(x_LD)
    for t, x_D in enumerate(x_LD):
        conv_N = sum(p["conv"][config.kernel - 1 - lag] * u_LN[t - lag] for lag in range(min(config.kernel, t + 1)))
        silu_N = conv_N * sigmoid(conv_N)
        q_HK, k_HK, v_HV = (part.reshape(H, -1) for part in np.split(silu_N, [H * K, 2 * H * K]))
        for h in range(H):
            q_K, k_K = (each / np.sqrt(each @ each + 1e-6) for each in (q_HK[h], k_HK[h]))
            share = (2 if config.negative_eigenvalues else 1) * sigmoid(x_D @ p["share"][:, h])
            transition_KK = np.eye(K) - share * np.outer(k_K, k_K)
            if isinstance(config, GatedDeltaNetConfig):
                size = np.log1p(np.exp(x_D @ p["decay"][:, h] + p["dt_bias"][h]))
                transition_KK *= np.exp(-np.exp(p["A_log"][h]) * size)
            s_HKV[h] = transition_KK @ s_HKV[h] + share * np.outer(k_K, v_HV[h])
            y_V = q_K @ s_HKV[h] / math.sqrt(K)
            y_V = y_V / np.sqrt(np.mean(y_V**2) + 1e-6) * p["norm"]
            if isinstance(config, GatedDeltaNetConfig):
                gate_V = x_D @ p["gate"][:, h]
                y_V = y_V * gate_V * sigmoid(gate_V)
            y_LD[t] += y_V @ p["out"][h]
    return y_LD


def make(random_params, module, kind, **kwargs) -> Case:
    config = kind(width=5, heads=3, key_dim=2, value_dim=7, kernel=4, **kwargs)
    return Case(module.MIXER, config, random_params(module.init, config, scale=0.7), sequence(2, 11, 5))


@KINDS
@pytest.mark.parametrize("negative", [False, True])
def test_delta_rule_against_the_recurrence(random_params, module, kind, negative):
    case = make(random_params, module, kind, negative_eigenvalues=negative)
    expected = reference(case.params, case.config, np.asarray(case.x_BLD[1], np.float64))
    np.testing.assert_allclose(run(case, case.x_BLD)[1], expected, rtol=1e-3, atol=1e-4)


def test_without_decay_the_gated_form_is_deltanet(random_params):
    case = make(random_params, gated_deltanet, GatedDeltaNetConfig)
    still = case.params | {"A_log": jnp.full_like(case.params["A_log"], -100.0)}
    plain = DeltaNetConfig(width=5, heads=3, key_dim=2, value_dim=7)
    names = ("qkv", "conv", "share", "norm", "out")
    expected = matrix(deltanet.MIXER, {name: case.params[name] for name in names}, plain, case.x_BLD)
    got = matrix(gated_deltanet.MIXER, still, case.config, case.x_BLD)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)
    # With decays it is another matrix, and a strong one leaves only the step itself.
    assert np.abs(matrix(gated_deltanet.MIXER, case.params, case.config, case.x_BLD) - expected).max() > 0.01
    gone = case.params | {"A_log": jnp.full_like(case.params["A_log"], 20.0)}
    m_BHLM = np.asarray(matrix(gated_deltanet.MIXER, gone, case.config, case.x_BLD))
    assert (np.tril(m_BHLM, -1) == 0).all()
    assert (np.diagonal(m_BHLM, 0, 2, 3) != 0).all()


def test_a_share_of_one_stores_the_last_value_of_a_key():
    """Rows of the matrix where each query is its key: the state answers with what was last written there."""
    k_LK = np.array([[1.0, 0], [0, 1], [1, 0], [0.6, 0.8], [0, 1]], np.float32)
    k_BLHK = jnp.asarray(k_LK)[None, :, None]
    ones_BLH = jnp.ones((1, 5, 1))
    m_LM = deltanet.delta_matrix(k_BLHK, k_BLHK, ones_BLH, 0 * ones_BLH, None, 1.0)[0, 0]
    np.testing.assert_allclose(m_LM, np.eye(5), atol=1e-6)
    # Reading a key that was written first and is orthogonal to what was written since gives its value alone.
    m_LM = deltanet.delta_matrix(k_BLHK[:, :1] + 0 * k_BLHK, k_BLHK, ones_BLH, 0 * ones_BLH, None, 1.0)[0, 0]
    np.testing.assert_allclose(m_LM[1], [1, 0, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(m_LM[2], [0, 0, 1, 0, 0], atol=1e-6)


def test_shares_of_two_reflect(random_params):
    """I - 2 k k^T turns the sign of what was stored under k: a second write of the value zero reads as minus it."""
    k_BLHK = jnp.broadcast_to(jnp.array([0.6, 0.8]), (1, 2, 1, 2))
    twos_BLH = jnp.full((1, 2, 1), 2.0)
    m_LM = deltanet.delta_matrix(k_BLHK, k_BLHK, twos_BLH, 0 * twos_BLH, None, 1.0)[0, 0]
    np.testing.assert_allclose(m_LM, [[2, 0], [-2, 2]], atol=1e-6)
    params = {"share": jnp.array([[-1e3], [1e3]])}
    x_LD = jnp.eye(2)
    np.testing.assert_allclose(deltanet.shares(params, x_LD, True), [[0], [2]])
    np.testing.assert_allclose(deltanet.shares(params, x_LD, False), [[0], [1]])


def test_gates_start_as_published():
    config = GatedDeltaNetConfig(width=3, heads=2000, key_dim=1, value_dim=1)
    params = jax.jit(gated_deltanet.init, static_argnums=1)(jax.random.key(0), config)
    rate_H = np.exp(np.asarray(params["A_log"], np.float64))
    np.testing.assert_allclose(np.quantile(rate_H, [0, 0.25, 0.5, 0.75, 1]), [0, 4, 8, 12, 16], atol=0.6)
    size_H = np.log1p(np.exp(np.asarray(params["dt_bias"], np.float64)))
    assert 1e-3 * 0.999 < size_H.min() < 1.1e-3
    assert 0.09 < size_H.max() < 0.1001
    np.testing.assert_array_equal(params["norm"], 1)


@KINDS
def test_delta_rule_refuses_a_bad_config(module, kind):
    with pytest.raises(ValueError, match=f"{kind.__name__}: sizes must be positive"):
        kind(kernel=0)
    name = module.__name__.rsplit(".", 1)[-1]
    with pytest.raises(ValueError, match=f"{name}: width 15 is not divisible by heads 4"):
        MIXERS[name].config(15, 4)

"""S5 and LRU, which read all channels into one state, against loops in float64, each other and S4D."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmod.mixers import LRUConfig, S4DConfig, S5Config, lru, s4d, s5
from tests.seqmod.mixers.family import Case, run, sequence

pytestmark = pytest.mark.usefixtures("quick_compile")


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def float64(params):
    """Parameters in float64, with pairs as complex numbers."""
    p = {name: np.asarray(x, np.float64) for name, x in params.items()}
    return p | {name: p[name][..., 0] + 1j * p[name][..., 1] for name in ("B", "C")}


def states_reference(a_N, B_ND, x_LD, causal: bool) -> np.ndarray:
    def forward(x_LD):
        h_N, h_LN = np.zeros_like(a_N), []
        for x_D in x_LD:
            h_N = a_N * h_N + B_ND @ x_D
            h_LN.append(h_N)
        return np.array(h_LN)

    return forward(x_LD) if causal else np.concatenate([forward(x_LD), forward(x_LD[::-1])[::-1]], axis=-1)


def s5_reference(params, config: S5Config, x_LD: np.ndarray) -> np.ndarray:
    p = float64(params)
    rate_N, dt_N = np.minimum(p["rate"], -1e-4) + 1j * p["frequency"], np.exp(p["log_dt"])
    a_N = np.exp(dt_N * rate_N)
    h_LN = states_reference(a_N, ((a_N - 1) / rate_N)[:, None] * p["B"], x_LD, config.causal)
    y_LD = gelu(2 * (h_LN @ p["C"].T).real + p["skip"] * x_LD)
    return y_LD * sigmoid(y_LD @ p["gate"] + p["gate_bias"])


def lru_reference(params, config: LRUConfig, x_LD: np.ndarray) -> np.ndarray:
    p = float64(params)
    a_N = np.exp(-np.exp(p["nu"]) + 1j * np.exp(p["theta"]))
    h_LN = states_reference(a_N, np.exp(p["log_gamma"])[:, None] * p["B"], x_LD, config.causal)
    value_LD, gate_LD = np.split(gelu((h_LN @ p["C"].T).real + p["skip"] * x_LD) @ p["out"] + p["out_bias"], 2, axis=-1)
    return value_LD * sigmoid(gate_LD)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("module", "config", "reference"),
    [(s5, S5Config(width=5, states=14), s5_reference), (lru, LRUConfig(width=5, states=7), lru_reference)],
    ids=["s5", "lru"],
)
def test_against_the_equations(random_params, module, config, reference, causal):
    config = replace(config, causal=causal)
    params = random_params(module.init, config)
    case = Case(module.MIXER, config, params, sequence(2, 11, 5))
    expected = reference(params, config, np.asarray(case.x_BLD[1], np.float64))
    np.testing.assert_allclose(run(case, case.x_BLD)[1], expected, rtol=1e-4, atol=1e-5)


def test_s5_of_one_channel_is_s4d(random_params):
    """With an input map of ones and one step size, through the matrices of both."""
    L, N = 9, 3
    config = S4DConfig(width=1, states=2 * N)
    wide = random_params(s4d.init, config)

    @jax.jit
    def matrices(wide):
        params = {
            "rate": -jnp.exp(wide["log_rate"][0]),
            "frequency": wide["frequency"][0],
            "log_dt": jnp.full(N, wide["log_dt"][0]),
            "B": jnp.stack([jnp.ones((N, 1)), jnp.zeros((N, 1))], axis=-1),
        }
        x_1LD = jnp.eye(L)[:, :, None]  # every row a pulse at a step of its own
        small = S5Config(width=1, states=2 * N)
        values_MLN = s5.values(params, small, x_1LD)[..., 0]
        h_MNL = jnp.einsum("MNLK,MKN->MNL", s5.matrix(params, small, x_1LD), values_MLN)
        return h_MNL, s4d.matrix(wide, config, x_1LD)[0, 0]

    h_MNL, m_LL = matrices(wide)
    C_N = np.asarray(wide["C"][0, 0, :, 0] + 1j * wide["C"][0, 0, :, 1])
    responses_LM = 2 * np.einsum("MNL,N->LM", h_MNL, C_N).real
    np.testing.assert_allclose(responses_LM + float(wide["skip"][0]) * np.eye(L), m_LL, rtol=1e-4, atol=1e-5)


def test_hippo_is_a_normal_matrix_less_one_of_rank_one():
    """HiPPO-LegS, entry by entry, against the basis in which S5 starts."""
    P = 8
    n, k = np.arange(P)[:, None], np.arange(P)[None]
    hippo = -np.where(n > k, np.sqrt((2 * n + 1) * (2 * k + 1)), np.where(n == k, n + 1, 0))
    frequency_N, vectors_PN = s5.hippo_normal(P)
    half = (vectors_PN * (-0.5 + 1j * frequency_N)) @ vectors_PN.conj().T
    normal = 2 * half.real
    root_P = np.sqrt(np.arange(P) + 0.5)
    np.testing.assert_allclose(normal - np.outer(root_P, root_P), hippo, atol=1e-12)
    assert (frequency_N > 0).all()


def test_s5_initial_values():
    config = S5Config(width=50, states=64, blocks=2, causal=False)
    params = jax.jit(s5.init, static_argnums=1)(jax.random.key(0), config)
    frequency_M, vectors_QM = s5.hippo_normal(32)
    np.testing.assert_array_equal(params["rate"], -0.5)
    np.testing.assert_allclose(params["frequency"], np.tile(frequency_M, 2), rtol=1e-5)
    # Of both of each pair of conjugates together, B is real, of variance 1 / states.
    B_KMD = float64(params)["B"].reshape(2, 16, 50)
    B_KQD = 2 * np.einsum("QM,KMD->KQD", vectors_QM, B_KMD).real
    np.testing.assert_allclose(np.einsum("QM,KQD->KMD", vectors_QM.conj(), B_KQD), B_KMD, atol=1e-6)
    np.testing.assert_allclose(np.square(B_KQD).mean() * 64, 1, atol=0.05)
    np.testing.assert_allclose(np.square(params["C"]).mean() * 64, 1, atol=0.05)
    assert params["C"].shape == (50, 64, 2)
    assert 0.001 <= np.exp(params["log_dt"]).min() < np.exp(params["log_dt"]).max() <= 0.1001


def test_lru_starts_on_a_ring_and_keeps_the_variance_of_its_inputs():
    config = LRUConfig(width=30, states=2000, r_min=0.4, r_max=0.8, max_phase=1.5)
    p = float64(jax.jit(lru.init, static_argnums=1)(jax.random.key(0), config))
    modulus_N, phase_N = np.exp(-np.exp(p["nu"])), np.exp(p["theta"])
    assert 0.4 <= modulus_N.min() < 0.41
    assert 0.79 < modulus_N.max() <= 0.8001
    # Uniform in area, not in the modulus: that would have a mean of 0.6.
    np.testing.assert_allclose(np.square(modulus_N).mean(), (0.16 + 0.64) / 2, atol=0.01)
    assert 0 < phase_N.min() < 0.01
    assert 1.49 < phase_N.max() <= 1.5001
    # Summed over the past, the power of the weights of each input is that of B.
    np.testing.assert_allclose(np.exp(2 * p["log_gamma"]) / (1 - modulus_N**2), 1, rtol=1e-5)
    np.testing.assert_allclose(np.square(np.abs(p["B"])).sum(-1).mean(), 1, atol=0.05)
    np.testing.assert_allclose(np.square(np.abs(p["C"])).sum(-1).mean(), 2, atol=0.1)


def test_a_bad_config_is_refused():
    with pytest.raises(ValueError, match="states is 10, expected conjugate pairs in 2 equal blocks, a multiple of 4"):
        S5Config(states=10, blocks=2)
    with pytest.raises(ValueError, match="S5Config: sizes must be positive"):
        S5Config(width=0)
    with pytest.raises(ValueError, match=r"S5Config: dt_min is 0.0"):
        S5Config(dt_min=0.0)
    with pytest.raises(ValueError, match=r"r_min is 0\.9 and r_max 1\.0, expected 0 <= r_min < r_max < 1"):
        LRUConfig(r_max=1.0)
    with pytest.raises(ValueError, match="LRUConfig: sizes must be positive"):
        LRUConfig(states=0)
    with pytest.raises(ValueError, match="max_phase is 0, expected a positive angle"):
        LRUConfig(max_phase=0)

"""S4D against its recurrence in float64, its continuous-time solution and its initial values."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from seqmod.mixers import S4DConfig, s4d
from tests.seqmod.mixers.family import Case, run, sequence, steps

pytestmark = pytest.mark.usefixtures("quick_compile")


def states_reference(p, u_LD: np.ndarray, direction: int) -> np.ndarray:
    """2 Re(C h_t), one step at a time."""
    A_DN = -np.exp(p["log_rate"]) + 1j * p["frequency"]
    a_DN = np.exp(np.exp(p["log_dt"])[:, None] * A_DN)
    C_DN = p["C"][direction, ..., 0] + 1j * p["C"][direction, ..., 1]
    h_DN, y_LD = np.zeros_like(a_DN), np.zeros_like(u_LD)
    for t, u_D in enumerate(u_LD):
        h_DN = a_DN * h_DN + (a_DN - 1) / A_DN * u_D[:, None]
        y_LD[t] = 2 * (C_DN * h_DN).sum(-1).real
    return y_LD


def s4d_reference(params, config: S4DConfig, x_LD: np.ndarray) -> np.ndarray:
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    y_LD = states_reference(p, x_LD, 0) + p["skip"] * x_LD
    if not config.causal:
        y_LD[:-1] += states_reference(p, x_LD[::-1], 1)[::-1][1:]
    gelu_LD = y_LD * (1 + erf(y_LD / math.sqrt(2))) / 2
    value_LD, gate_LD = np.split(gelu_LD @ p["out"] + p["out_bias"], 2, axis=-1)
    return value_LD / (1 + np.exp(-gate_LD))


@pytest.mark.parametrize("causal", [True, False])
def test_chunks_are_the_recurrence(random_params, causal):
    """Also where segments end inside of chunks, at their ends, and span several of them."""
    config = S4DConfig(width=5, states=6, causal=causal, chunk=4)
    params = random_params(s4d.init, config)
    x_BLD = sequence(2, 17, 5)
    case = Case(s4d.MIXER, config, params, x_BLD)
    exact = np.asarray(x_BLD, np.float64)
    for row, y_LD in enumerate(run(case, x_BLD)):
        np.testing.assert_allclose(y_LD, s4d_reference(params, config, exact[row]), rtol=1e-4, atol=1e-5)
    lengths = [[1, 2, 1, 11, 2], [6, 6, 3, 1, 1]]
    ids_BL = jnp.array([np.repeat(np.arange(5), each) for each in lengths])
    packed = run(case, x_BLD, ids_BL)
    for row, each in enumerate(lengths):
        parts = np.split(exact[row], np.cumsum(each)[:-1])
        expected = np.concatenate([s4d_reference(params, config, part) for part in parts])
        np.testing.assert_allclose(packed[row], expected, rtol=1e-4, atol=1e-5)


def test_long_sequences_from_initial_values():
    config = S4DConfig(width=3, states=64)
    params = jax.jit(s4d.init, static_argnums=1)(jax.random.key(0), config)
    case = Case(s4d.MIXER, config, params, sequence(1, 331, 3))
    expected = s4d_reference(params, config, np.asarray(case.x_BLD[0], np.float64))
    np.testing.assert_allclose(run(case, case.x_BLD)[0], expected, rtol=1e-3, atol=2e-5)
    streamed, _ = steps(case, case.x_BLD, s4d.init_state(config, 1, 331))
    np.testing.assert_allclose(streamed[0], expected, rtol=1e-3, atol=2e-5)


def test_a_constant_input_gives_the_solution_in_continuous_time(random_params):
    """Zero-order hold is exact there: y(t) = 2 Re C (exp(A t) - 1) / A at t = dt, 2 dt, ..."""
    config = S4DConfig(width=2, states=6)
    params = random_params(s4d.init, config)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    m_DLL = jax.jit(s4d.matrix, static_argnums=1)(params, config, jnp.ones((1, 9, 2)))[0]
    A_DN = -np.exp(p["log_rate"]) + 1j * p["frequency"]
    time_DL = np.exp(p["log_dt"])[:, None] * np.arange(1, 10)
    C_DN = p["C"][0, ..., 0] + 1j * p["C"][0, ..., 1]
    y_DL = 2 * ((C_DN / A_DN)[:, None] * (np.exp(A_DN[:, None] * time_DL[..., None]) - 1)).sum(-1).real
    np.testing.assert_allclose(m_DLL.sum(-1), y_DL + p["skip"][:, None], rtol=1e-4, atol=1e-5)


def test_initial_values():
    config = S4DConfig(width=400, states=8, causal=False)
    params = jax.jit(s4d.init, static_argnums=1)(jax.random.key(0), config)
    np.testing.assert_allclose(np.exp(params["log_rate"]), 0.5, rtol=1e-6)
    np.testing.assert_allclose(params["frequency"], np.broadcast_to(np.pi * np.arange(4), (400, 4)), rtol=1e-6)
    dt_D = np.exp(params["log_dt"])
    assert 0.001 <= dt_D.min() < 0.0011
    assert 0.09 < dt_D.max() <= 0.1001
    assert abs(np.median(dt_D) - 0.01) < 0.003
    assert params["C"].shape == (2, 400, 4, 2)
    np.testing.assert_allclose(np.square(params["C"]).sum(-1).mean(), 1, atol=0.05)


def test_a_bad_config_is_refused():
    with pytest.raises(ValueError, match="states is 5, expected an even number"):
        S4DConfig(states=5)
    with pytest.raises(ValueError, match="sizes must be positive"):
        S4DConfig(chunk=0)
    with pytest.raises(ValueError, match=r"dt_min is 0.2 and dt_max 0.1"):
        S4DConfig(dt_min=0.2)

"""Hydra against its definition, two state space models and a shift, and the structure of its matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmod.mixers import HydraConfig, hydra
from tests.seqmod.mixers.family import Case, run, sequence

pytestmark = pytest.mark.usefixtures("quick_compile")

SMALL = HydraConfig(width=5, inner=6, heads=3, state=2, groups=1, kernel=3)


def silu(x):
    return x / (1 + np.exp(-x))


def ssm(v_LHV, b_LHN, c_LHN, dt_LH, a_H):
    """Mamba-2's recurrence, one step at a time."""
    state_HNV, y_LHV = np.zeros((b_LHN.shape[1], b_LHN.shape[2], v_LHV.shape[2])), np.zeros_like(v_LHV)
    for t in range(len(v_LHV)):
        decay_H = np.exp(dt_LH[t] * a_H)
        fresh_HNV = (dt_LH[t][:, None] * b_LHN[t])[:, :, None] * v_LHV[t][:, None]
        state_HNV = decay_H[:, None, None] * state_HNV + fresh_HNV
        y_LHV[t] = np.einsum("HN,HNV->HV", c_LHN[t], state_HNV)
    return y_LHV


def hydra_reference(params, config: HydraConfig, x_LD: np.ndarray) -> np.ndarray:
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    L, E, H, G, N = len(x_LD), config.inner, config.heads, config.groups, config.state
    z_LE, u_LN, dt_LH = np.split(x_LD @ p["input"], [E, E + config.convolved], axis=1)
    half = config.kernel // 2
    padded = np.pad(u_LN, ((half, half), (0, 0)))
    u_LN = silu(sum(padded[i : i + L] * p["conv"][i] for i in range(config.kernel)) + p["conv_bias"])
    v_LHV = u_LN[:, :E].reshape(L, H, -1)
    parts = [part.reshape(L, G, N).repeat(H // G, axis=1) for part in np.split(u_LN[:, E:], 4, axis=1)]
    dt = [np.log1p(np.exp(half + p["dt_bias"])) for half in np.split(dt_LH, 2, axis=1)]
    a_H = -np.exp(p["decay"])
    ahead = np.roll(ssm(v_LHV, parts[0], parts[1], dt[0], a_H), 1, axis=0)
    back = np.roll(ssm(v_LHV[::-1], parts[2][::-1], parts[3][::-1], dt[1][::-1], a_H), 1, axis=0)
    ahead[0] = back[0] = 0
    skip_LH = u_LN[:, :E] @ p["skip_input"] + p["skip"]
    y_LE = (ahead + back[::-1] + skip_LH[..., None] * v_LHV).reshape(L, E)
    normed = y_LE / np.sqrt((y_LE**2).mean(-1, keepdims=True) + 1e-5) * p["norm"]
    return (normed * silu(z_LE)) @ p["out"]


@pytest.mark.parametrize("groups", [1, 3])
def test_hydra_against_the_equations(random_params, groups):
    config = HydraConfig(width=5, inner=6, heads=3, state=4, groups=groups, kernel=7)
    params = random_params(hydra.init, config)
    x_BLD = sequence(2, 11, 5)
    case = Case(hydra.MIXER, config, params, x_BLD)
    expected = hydra_reference(params, config, np.asarray(x_BLD[1], np.float64))
    np.testing.assert_allclose(run(case, x_BLD)[1], expected, rtol=1e-4, atol=1e-5)


def matrix_of(params, config, x_BLD) -> np.ndarray:
    return np.asarray(jax.jit(hydra.matrix, static_argnums=1)(params, config, x_BLD), np.float64)


def test_blocks_off_the_diagonal_have_the_rank_of_the_state(random_params):
    m_BHLL = matrix_of(random_params(hydra.init, SMALL), SMALL, sequence(1, 11, 5))
    for m_LL in (*m_BHLL[0], *np.swapaxes(m_BHLL[0], 1, 2)):
        for cut in (4, 7):
            singular = np.linalg.svd(m_LL[cut:, :cut], compute_uv=False)
            assert singular[1] > 1e-4 * singular[0]
            assert singular[2] < 1e-6 * singular[0]
        # With the diagonal inside, the rank is full.
        singular = np.linalg.svd(m_LL[:5, :5], compute_uv=False)
        assert singular[4] > 1e-4 * singular[0]


def test_the_diagonal_is_the_skip_alone(random_params):
    params, x_BLD = random_params(hydra.init, SMALL), sequence(1, 7, 5)
    bare = params | {"skip": jnp.zeros(3), "skip_input": jnp.zeros((6, 3))}
    m_BHLL, full_BHLL = matrix_of(bare, SMALL, x_BLD), matrix_of(params, SMALL, x_BLD)
    assert (np.diagonal(m_BHLL, axis1=2, axis2=3) == 0).all()
    assert (np.diagonal(full_BHLL, axis1=2, axis2=3) != 0).all()
    off = ~np.eye(7, dtype=bool)
    np.testing.assert_array_equal(m_BHLL[..., off], full_BHLL[..., off])
    assert (m_BHLL[..., off] != 0).all()


def test_reversed_inputs_with_exchanged_directions_give_reversed_outputs(random_params):
    params, x_BLD = random_params(hydra.init, SMALL), sequence(2, 7, 5)
    E, GN, H = SMALL.inner, SMALL.groups * SMALL.state, SMALL.heads

    def exchange(array, start, half):
        middle, stop = start + half, start + 2 * half
        return np.concatenate(
            [array[..., :start], array[..., middle:stop], array[..., start:middle], array[..., stop:]], axis=-1
        )

    exchanged = params | {
        "input": exchange(exchange(np.asarray(params["input"]), 2 * E, 2 * GN), 2 * E + 4 * GN, H),
        "conv": exchange(np.asarray(params["conv"])[::-1], E, 2 * GN),
        "conv_bias": exchange(np.asarray(params["conv_bias"]), E, 2 * GN),
    }
    case = Case(hydra.MIXER, SMALL, params, x_BLD)
    y_BLD = run(case._replace(params=exchanged), x_BLD[:, ::-1])[:, ::-1]
    np.testing.assert_allclose(y_BLD, run(case, x_BLD), rtol=1e-4, atol=1e-6)


def test_initial_values():
    config = HydraConfig(width=3, inner=2000, heads=1000, state=2)
    params = jax.jit(lambda key: hydra.init(key, config))(jax.random.key(0))
    dt_H = np.log1p(np.exp(np.asarray(params["dt_bias"], np.float64)))
    assert 0.999e-3 < dt_H.min() < 1.1e-3
    assert 0.09 < dt_H.max() < 0.1001
    # Log-uniform: the median is the geometric mean.
    assert 0.8e-2 < np.median(dt_H) < 1.25e-2
    assert (params["decay"] == 0).all()
    assert (params["skip"] == 1).all()


def test_hydra_refuses_a_bad_config():
    with pytest.raises(ValueError, match="sizes must be positive"):
        HydraConfig(state=0)
    with pytest.raises(ValueError, match="kernel is 4, expected an odd number"):
        HydraConfig(kernel=4)
    with pytest.raises(ValueError, match="not divisible by heads 5"):
        HydraConfig(heads=5)
    with pytest.raises(ValueError, match="heads 4 are not divisible by groups 3"):
        HydraConfig(groups=3)
    with pytest.raises(ValueError, match="expected 0 < dt_min <= dt_max"):
        HydraConfig(dt_min=0.2)

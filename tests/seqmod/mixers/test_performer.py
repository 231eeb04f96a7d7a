"""Performer: its features are softmax attention in expectation, and no key is too large or too late."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmod.mixers import Context, heads, performer
from seqmod.mixers.performer import PerformerConfig
from tests.seqmod.mixers.dense import join, split
from tests.seqmod.mixers.family import Case, run, sequence, steps

pytestmark = pytest.mark.usefixtures("quick_compile")

D, H, L = 6, 3, 11


def case_of(random_params, *, causal: bool, **sizes: int) -> Case:
    config = PerformerConfig(width=D, heads=H, causal=causal, **sizes)
    return Case(performer.MIXER, config, random_params(performer.init, config, scale=1.0), sequence(2, L, D))


def formula(params, x_LD, causal: bool) -> np.ndarray:
    q, k, v = split(params, x_LD)
    w_CK = np.asarray(params["fixed"]["features"], np.float64)

    def phi(x_HLK):
        x_HLK = x_HLK / q.shape[-1] ** 0.25
        return np.exp(x_HLK @ w_CK.T - (x_HLK**2).sum(-1, keepdims=True) / 2)

    m_HLM = phi(q) @ phi(k).swapaxes(1, 2)
    if causal:
        m_HLM = np.tril(m_HLM)
    return join(params, m_HLM / m_HLM.sum(-1, keepdims=True) @ v)


@pytest.mark.parametrize("causal", [True, False])
def test_it_is_the_formula(random_params, causal):
    case = case_of(random_params, causal=causal, features=5)
    y_BLD = run(case, case.x_BLD)
    np.testing.assert_allclose(y_BLD[1], formula(case.params, case.x_BLD[1], causal), rtol=1e-4, atol=1e-5)


def test_features_have_the_softmax_kernel_as_their_mean():
    """The mean over Gaussian directions by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(30)
    features_CK = np.stack(np.meshgrid(nodes, nodes), axis=-1).reshape(-1, 2)
    weights_C = np.outer(weights, weights).ravel() / (2 * np.pi)
    q_LHK, k_LHK = np.random.default_rng(0).standard_normal((2, 7, 3, 2))
    with jax.enable_x64(True):
        params = {"fixed": {"features": jnp.asarray(features_CK)}}
        phi_q, phi_k = (np.exp(performer.log_features(params, jnp.asarray(x))) for x in (q_LHK, k_LHK))
    mean_LH = (phi_q * phi_k * weights_C).sum(-1)
    np.testing.assert_allclose(mean_LH, np.exp((q_LHK * k_LHK).sum(-1) / np.sqrt(2)), rtol=1e-9)


def test_directions_are_gaussian_and_orthogonal_in_blocks():
    config = PerformerConfig(width=20, heads=4, features=5003)
    params = jax.jit(performer.init, static_argnums=1)(jax.random.key(0), config)
    w_CK = np.asarray(params["fixed"]["features"])
    assert w_CK.shape == (5003, 5)
    blocks = w_CK[:5000].reshape(1000, 5, 5)
    angles = blocks @ blocks.swapaxes(1, 2)
    np.testing.assert_allclose(angles * (1 - np.eye(5)), 0, atol=2e-5)
    assert np.abs(w_CK.mean(0)).max() < 0.05
    np.testing.assert_allclose(np.cov(w_CK.T), np.eye(5), atol=0.08)
    lengths = (w_CK**2).sum(1)
    # Those of chi squared with 5 degrees of freedom.
    assert abs(lengths.mean() - 5) < 0.2
    assert abs(lengths.var() - 10) < 1.0
    again = jax.jit(performer.resample, static_argnums=2)(jax.random.key(1), params, config)
    assert (again["qkv"] == params["qkv"]).all()
    assert (again["fixed"]["features"] != params["fixed"]["features"]).any()


def test_a_large_key_to_come_changes_nothing(random_params):
    """A maximum over all keys would push the past below the constant that goes with it."""
    case = case_of(random_params, causal=True)
    y_BLD = run(case, case.x_BLD)
    large_BLD = run(case, case.x_BLD.at[:, 8].multiply(50))
    np.testing.assert_array_equal(large_BLD[:, :8], y_BLD[:, :8])


@pytest.mark.parametrize("order", [1, -1])
def test_keys_of_all_sizes(random_params, order):
    """Features far below float32's range, in growing and in falling order: weights sum to one, and steps agree."""
    case = case_of(random_params, causal=True)
    x_BLD = case.x_BLD * jnp.logspace(-1, 1.5, L)[::order][None, :, None]

    @jax.jit
    def dense(params):
        m_BHLM = performer.matrix(params, case.config, x_BLD)
        y_BLHK = jnp.einsum("BHLM,BMHK->BLHK", m_BHLM, heads.values(params, case.config, x_BLD))
        return heads.read_out(params, case.config, x_BLD, y_BLHK), m_BHLM.sum(-1)

    expected, sums_BHL = dense(case.params)
    np.testing.assert_allclose(sums_BHL, 1, rtol=1e-4)
    size = float(jnp.abs(expected).max())
    np.testing.assert_allclose(run(case, x_BLD), expected, atol=1e-3 * size)
    stepped, _ = steps(case, x_BLD, performer.init_state(case.config, 2, L))
    np.testing.assert_allclose(stepped, expected, atol=1e-3 * size)


def test_the_running_peak_is_that_of_a_segment():
    values = np.random.default_rng(0).standard_normal((2, 7, 3, 2)).astype(np.float32)
    ids = np.array([[2, 5, 5, 2, 2, 2, 2], [4, 4, 4, 4, 1, 1, 6]])
    bounds = [[0, 1, 3, 7], [0, 4, 6, 7]]
    for reverse in (False, True):
        got = performer.running_peak(jnp.asarray(values), jnp.asarray(ids), reverse=reverse)
        for row in range(2):
            for start, stop in zip(bounds[row][:-1], bounds[row][1:], strict=True):
                part = values[row, start:stop][:: -1 if reverse else 1]
                expected = np.maximum.accumulate(part, axis=0)[:: -1 if reverse else 1]
                np.testing.assert_array_equal(got[row, start:stop], expected)


def test_queries_read_the_context_of_their_segment(random_params):
    case = case_of(random_params, causal=True)
    context_BMD = sequence(2, 5, D, seed=2)
    # Out of order, one id without queries and one without a context.
    ids_BM = jnp.array([[3, 1, 3, 8, 1]] * 2)
    ids_BL = jnp.array([[1] * 4 + [3] * 5 + [7] * 2] * 2)
    y_BLD = run(case, case.x_BLD, ids_BL, Context(context_BMD, ids_BM))
    for name, queries in ((1, slice(0, 4)), (3, slice(4, 9))):
        alone = run(case, case.x_BLD[:, queries], None, Context(context_BMD[:, np.array(ids_BM[0]) == name]))
        np.testing.assert_allclose(y_BLD[:, queries], alone, rtol=1e-4, atol=3e-6)
    np.testing.assert_array_equal(y_BLD[:, 9:], 0)
    with pytest.raises(ValueError, match="it has segments, but the queries have none"):
        run(case, case.x_BLD, None, Context(context_BMD, ids_BM))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"heads": 5}, "width 64 is not divisible by heads 5"), ({"features": 0}, "features is 0, expected at least 1")],
)
def test_a_bad_config_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PerformerConfig(**arguments)

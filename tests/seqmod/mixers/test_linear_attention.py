"""Linear attention against its formula, one query and head at a time."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from seqmod.mixers import MIXERS, Context, LinearAttentionConfig, linear_attention
from tests.seqmod.mixers.family import Case, run, sequence, steps

pytestmark = pytest.mark.usefixtures("quick_compile")


def phi(x: np.ndarray) -> np.ndarray:
    """elu(x) + 1."""
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0))) + 1


def reference(params, x_LD: np.ndarray, context_MD: np.ndarray, visible) -> np.ndarray:
    """The formula, where visible(t, s) says whether query t reads step s of the context."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    q_LHK, k_MHK = phi(np.einsum("LD,DHK->LHK", x_LD, p["query"])), phi(np.einsum("MD,DHK->MHK", context_MD, p["key"]))
    v_MHK, y_LD = np.einsum("MD,DHK->MHK", context_MD, p["value"]), np.zeros_like(x_LD)
    for t in range(len(x_LD)):
        for h in range(q_LHK.shape[1]):
            weights = {s: q_LHK[t, h] @ k_MHK[s, h] for s in range(len(context_MD)) if visible(t, s)}
            mixed = sum(weight * v_MHK[s, h] for s, weight in weights.items()) / sum(weights.values())
            y_LD[t] += mixed @ p["out"][h]
    return y_LD


def make(random_params, causal: bool) -> tuple[Case, np.ndarray]:
    config = LinearAttentionConfig(width=5, heads=3, head_dim=2, causal=causal)
    x_BLD = sequence(2, 11, 5)
    params = random_params(linear_attention.init, config, scale=1.0)
    return Case(linear_attention.MIXER, config, params, x_BLD), np.asarray(x_BLD[1], np.float64)


@pytest.mark.parametrize("causal", [True, False])
def test_self_attention_against_the_formula(random_params, causal):
    case, exact_LD = make(random_params, causal)
    expected = reference(case.params, exact_LD, exact_LD, lambda t, s: s <= t or not causal)
    np.testing.assert_allclose(run(case, case.x_BLD)[1], expected, rtol=1e-4, atol=1e-5)
    ids_BL = jnp.broadcast_to(jnp.array([0] * 4 + [7] * 7)[None], (2, 11))
    expected = reference(case.params, exact_LD, exact_LD, lambda t, s: (t < 4) == (s < 4) and (s <= t or not causal))
    np.testing.assert_allclose(run(case, case.x_BLD, ids_BL)[1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_cross_attention_against_the_formula(random_params, causal):
    """A context without ids is read by all; with ids, equal ones read each other, in whatever order."""
    case, exact_LD = make(random_params, causal)
    context_BMD = sequence(2, 7, 5, seed=2)
    exact_MD = np.asarray(context_BMD[1], np.float64)
    ids_L, ids_M = np.array([4] * 3 + [0] * 7 + [4]), np.array([0, 0, 4, 4, 9, 9, 4])
    ids_BL, ids_BM = (jnp.broadcast_to(jnp.asarray(ids)[None], (2, len(ids))) for ids in (ids_L, ids_M))
    for queries, keys, visible in (
        (None, None, lambda t, s: True),
        (ids_BL, None, lambda t, s: True),
        (ids_BL, ids_BM, lambda t, s: ids_L[t] == ids_M[s]),
    ):
        got = run(case, case.x_BLD, queries, Context(context_BMD, keys))[1]
        np.testing.assert_allclose(got, reference(case.params, exact_LD, exact_MD, visible), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="the queries have none"):
        run(case, case.x_BLD, None, Context(context_BMD, ids_BM))


def test_weights_are_shares(random_params):
    for causal in (True, False):
        case, _ = make(random_params, causal)
        m_BHLM = linear_attention.matrix(case.params, case.config, case.x_BLD)
        assert (np.asarray(m_BHLM) >= 0).all()
        np.testing.assert_allclose(m_BHLM.sum(-1), 1, rtol=1e-5)


def test_the_feature_map_keeps_small_numbers():
    """Where elu(x) + 1 itself would round to zero."""
    x = jnp.array([-40.0, -20.0, -1.0, 0.0, 1.0, 300.0])
    expected = [math.exp(-40), math.exp(-20), math.exp(-1), 1, 2, 301]
    np.testing.assert_allclose(linear_attention.feature_map(x), expected, rtol=1e-6)


def test_the_state_holds_the_sums(random_params):
    case, exact_LD = make(random_params, True)
    _, state = steps(case, case.x_BLD, linear_attention.init_state(case.config, 2, 11))
    k_LHK = phi(np.einsum("LD,DHK->LHK", exact_LD, np.asarray(case.params["key"], np.float64)))
    np.testing.assert_allclose(state.sums_BHKV[1, ..., -1], k_LHK.sum(0), rtol=1e-5)


def test_linear_attention_refuses_a_bad_config():
    with pytest.raises(ValueError, match="sizes must be positive"):
        LinearAttentionConfig(head_dim=0)
    with pytest.raises(ValueError, match="width 15 is not divisible by heads 4"):
        MIXERS["linear_attention"].config(15, 4)

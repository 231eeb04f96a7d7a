"""Losses and distributions against hand-worked values, NumPy and SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from rl.distributions import categorical_log_prob, gaussian_entropy, gaussian_log_prob, gaussian_sample
from rl.losses import approximate_kl, clip_loss, group_advantage

pytestmark = pytest.mark.usefixtures("quick_compile")

RNG = np.random.default_rng(0)
LOGITS_BLA = jnp.asarray(RNG.standard_normal((5, 3, 4)), jnp.float32)
ACTION_BL = jnp.asarray(RNG.integers(4, size=(5, 3)))
MASK_BL = jnp.arange(3)[None] < jnp.array([[3], [1], [2], [3], [1]])


@jax.jit
def loss_gradient(logits_BLA, return_B):
    old_BL = categorical_log_prob(LOGITS_BLA, ACTION_BL)
    advantage_BL = jnp.broadcast_to(group_advantage(return_B)[:, None], old_BL.shape)
    return jax.grad(
        lambda logits: clip_loss(categorical_log_prob(logits, ACTION_BL), old_BL, advantage_BL, MASK_BL, 0.2)
    )(logits_BLA)


def test_advantage_is_the_formula_of_the_paper():
    returns = np.array([0.0, 1.0, 0.25, 1.0, 0.0, 3.0])
    expected = (returns - returns.mean()) / (returns.std() + 1e-3)
    np.testing.assert_allclose(group_advantage(jnp.asarray(returns, jnp.float32)), expected, rtol=1e-5)
    expected = (returns - returns.mean()) / (returns.std() + 0.5)
    np.testing.assert_allclose(group_advantage(jnp.asarray(returns, jnp.float32), 0.5), expected, rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 7 / 3])
def test_equal_returns_give_exactly_no_advantage_and_no_gradient(value):
    # The mean of 13 such numbers is none of them, once rounded.
    np.testing.assert_array_equal(group_advantage(jnp.full(13, value, jnp.float32)), np.zeros(13))
    gradient = loss_gradient(LOGITS_BLA + 0.3, jnp.full(5, value, jnp.float32))
    np.testing.assert_array_equal(gradient, np.zeros((5, 3, 4)))


def test_at_the_old_parameters_the_gradient_is_that_of_reinforce():
    return_B = jnp.array([0.0, 1.0, 0.0, 1.0, 1.0])
    advantage_B = np.float64(group_advantage(return_B))
    expected = np.zeros((5, 3, 4))
    for b, t in np.argwhere(MASK_BL):
        probability_A = np.exp(np.float64(LOGITS_BLA[b, t]))
        score_A = np.eye(4)[ACTION_BL[b, t]] - probability_A / probability_A.sum()
        expected[b, t] = -advantage_B[b] * score_A / 10
    assert int(MASK_BL.sum()) == 10
    np.testing.assert_allclose(loss_gradient(LOGITS_BLA, return_B), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.5, 2.0, -2.4, 0.0),  # already likelier by more than the clip: no further
        (1.5, -2.0, 3.0, 3.0),  # likelier though bad: the unclipped value, to come back
        (0.5, 2.0, -1.0, -1.0),  # less likely though good
        (0.5, -2.0, 1.6, 0.0),
        (1.1, 2.0, -2.2, -2.2),
    ],
)
def test_clip_by_hand(ratio, advantage, loss, slope):
    def value(log_prob):
        two = jnp.stack([log_prob, jnp.float32(7)])
        return clip_loss(two, jnp.zeros(2), jnp.array([advantage, 5.0]), jnp.array([True, False]), 0.2)

    got = jax.value_and_grad(value)(jnp.log(jnp.float32(ratio)))
    np.testing.assert_allclose(got, (loss, slope), rtol=1e-5, atol=1e-6)


def test_nothing_to_learn_from_is_zero_and_the_masked_may_be_anything():
    nothing = jnp.zeros(3, bool)
    wild = jnp.array([-jnp.inf, jnp.nan, 1e30])
    for loss in (clip_loss(wild, wild, jnp.ones(3), nothing, 0.2), approximate_kl(wild, wild, nothing)):
        assert loss == 0


def test_approximate_kl_is_the_divergence_on_average():
    new, old = RNG.standard_normal((2, 4))
    action_N = jax.random.categorical(jax.random.key(0), jnp.asarray(old, jnp.float32), shape=(100_000,))
    log_new, log_old = (np.log(np.exp(x) / np.exp(x).sum()) for x in (new, old))
    got = approximate_kl(jnp.asarray(log_new)[action_N], jnp.asarray(log_old)[action_N], jnp.ones(100_000, bool))
    np.testing.assert_allclose(got, stats.entropy(np.exp(log_old), np.exp(log_new)), rtol=0.02)
    one = approximate_kl(jnp.array([-1.0, 5.0]), jnp.array([-3.0, 0.0]), jnp.array([True, False]))
    np.testing.assert_allclose(one, np.exp(2) - 1 - 2, rtol=1e-5)


def test_categorical_against_scipy():
    got = categorical_log_prob(LOGITS_BLA, ACTION_BL)
    for b, t in np.ndindex(5, 3):
        probability_A = np.exp(np.float64(LOGITS_BLA[b, t]))
        expected = stats.multinomial.logpmf(np.eye(4)[ACTION_BL[b, t]], 1, probability_A / probability_A.sum())
        np.testing.assert_allclose(got[b, t], expected, rtol=1e-5)


def test_gaussian_against_scipy():
    mean, log_std, value = RNG.standard_normal((3, 2, 3))
    density = stats.norm(mean, np.exp(log_std))
    as_jax = [jnp.asarray(x, jnp.float32) for x in (mean, log_std, value)]
    np.testing.assert_allclose(gaussian_log_prob(*as_jax), density.logpdf(value).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(gaussian_entropy(as_jax[1]), density.entropy().sum(-1), rtol=1e-5)


def test_gaussian_sample_has_the_distribution_it_says():
    mean, log_std = jnp.array([0.5, -2.0, 3.0]), jnp.array([-1.0, 0.0, 0.5])
    shape = (20_000, 3)
    draws = gaussian_sample(jax.random.key(1), jnp.broadcast_to(mean, shape), jnp.broadcast_to(log_std, shape))
    for z in range(3):
        p_value = stats.kstest(np.asarray(draws[:, z]), stats.norm(mean[z], np.exp(log_std[z])).cdf).pvalue
        assert p_value > 0.01
    assert np.abs(np.corrcoef(draws.T) - np.eye(3)).max() < 0.03

"""Distributions against SciPy, numerical integration and float64, and at extremes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from rl.distributions import (
    categorical_entropy,
    categorical_kl,
    categorical_log_prob,
    gaussian_entropy,
    gaussian_kl,
    gaussian_log_prob,
    gaussian_sample,
    squash,
    tanh_gaussian_log_prob,
    tanh_gaussian_sample_and_log_prob,
)

pytestmark = pytest.mark.usefixtures("quick_compile")

RNG = np.random.default_rng(0)
LOGITS_BLA = jnp.asarray(RNG.standard_normal((5, 3, 4)), jnp.float32)
ACTION_BL = jnp.asarray(RNG.integers(4, size=(5, 3)))


def float32(*arrays):
    return [jnp.asarray(x, jnp.float32) for x in arrays]


def probabilities(logits):
    p = np.exp(np.float64(logits))
    return p / p.sum(-1, keepdims=True)


def test_categorical_against_scipy():
    got = categorical_log_prob(LOGITS_BLA, ACTION_BL)
    entropy = categorical_entropy(LOGITS_BLA)
    kl = categorical_kl(LOGITS_BLA, LOGITS_BLA[::-1])
    p = probabilities(LOGITS_BLA)
    for b, t in np.ndindex(5, 3):
        expected = stats.multinomial.logpmf(np.eye(4)[ACTION_BL[b, t]], 1, p[b, t])
        np.testing.assert_allclose(got[b, t], expected, rtol=1e-5)
        np.testing.assert_allclose(entropy[b, t], stats.entropy(p[b, t]), rtol=1e-5)
        np.testing.assert_allclose(kl[b, t], stats.entropy(p[b, t], p[4 - b, t]), rtol=1e-4, atol=1e-6)


def test_categorical_with_actions_ruled_out():
    """As if they were not there: the value and the gradient of the others, no NaN."""
    p, q = jnp.array([0.3, -0.7, 1.1]), jnp.array([-0.2, 0.4, 0.1])

    def without(x):
        return jnp.concatenate([x, jnp.array([-jnp.inf])])

    for function in (
        lambda p, q, widen: categorical_entropy(widen(p)),
        lambda p, q, widen: categorical_kl(widen(p), widen(q)),
    ):
        got = jax.value_and_grad(lambda p, q, f=function: f(p, q, without), argnums=(0, 1))(p, q)
        expected = jax.value_and_grad(lambda p, q, f=function: f(p, q, lambda x: x), argnums=(0, 1))(p, q)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got, expected)
    assert categorical_kl(without(p), jnp.zeros(4)) < jnp.inf
    assert categorical_kl(jnp.zeros(4), without(p)) == jnp.inf
    certain = jnp.array([1000.0, 0.0, -1000.0])
    assert categorical_entropy(certain) == 0
    assert jnp.isfinite(jax.grad(categorical_entropy)(certain)).all()


def test_gaussian_against_scipy():
    mean, log_std, value = RNG.standard_normal((3, 2, 3))
    density = stats.norm(mean, np.exp(log_std))
    as_jax = float32(mean, log_std, value)
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


def test_gaussian_kl_is_the_integral():
    mean, log_std, other_mean, other_log_std = RNG.standard_normal((4, 3))
    expected = 0.0
    for z in range(3):
        p = stats.norm(mean[z], np.exp(log_std[z]))
        q = stats.norm(other_mean[z], np.exp(other_log_std[z]))
        low, high = p.ppf(1e-15), p.isf(1e-15)
        expected += integrate.quad(lambda x, p=p, q=q: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), low, high)[0]
    got = gaussian_kl(*float32(mean, log_std, other_mean, other_log_std))
    np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_gaussian_kl_of_near_equals_keeps_its_digits():
    zeros = jnp.zeros(1)
    assert gaussian_kl(zeros, zeros, zeros, zeros) == 0
    # KL is x^2 to leading order in a difference x of the log-scales, and half the square of one of the means.
    np.testing.assert_allclose(gaussian_kl(zeros, zeros + 1e-2, zeros, zeros), np.expm1(0.02) / 2 - 0.01, rtol=1e-3)
    np.testing.assert_allclose(gaussian_kl(zeros + 1e-5, zeros, zeros, zeros), 0.5e-10, rtol=1e-4)


LOW_Z, HIGH_Z = np.array([-1.0, 0.0, -3.0]), np.array([1.0, 0.5, 7.0])


@pytest.mark.parametrize("z", range(3))
def test_squashed_density_integrates_to_one_and_has_its_mean(z):
    low, high = LOW_Z[z], HIGH_Z[z]
    mean, std = (0.3, -0.5, 0.8)[z], (0.6, 0.9, 0.4)[z]
    action_N = np.linspace(low, high, 20_001)[1:-1].astype(np.float32)
    column = jnp.asarray(action_N)[:, None]
    log_p = tanh_gaussian_log_prob(jnp.full_like(column, mean), jnp.full_like(column, np.log(std)), column, low, high)
    p_N = np.exp(np.float64(log_p))
    np.testing.assert_allclose(integrate.trapezoid(p_N, action_N), 1.0, rtol=1e-3)
    got = integrate.trapezoid(p_N * action_N, action_N)

    def moment(u):
        return stats.norm(mean, std).pdf(u) * (low + (high - low) * (np.tanh(u) + 1) / 2)

    np.testing.assert_allclose(got, integrate.quad(moment, -8, 8)[0], rtol=1e-3)


def test_squashed_samples_have_the_density_they_come_with():
    shape = (20_000, 3)
    # So narrow that no action is rounded to near a bound, where it no longer says what it was made from.
    mean, log_std = np.array([0.3, -0.5, 0.8]), np.log([0.6, 0.5, 0.4])
    wide = [jnp.broadcast_to(x, shape) for x in float32(mean, log_std)]
    bounds = float32(LOW_Z, HIGH_Z)
    action, log_prob = tanh_gaussian_sample_and_log_prob(jax.random.key(2), *wide, *bounds)
    assert action.shape == shape
    assert log_prob.shape == shape[:1]
    np.testing.assert_allclose(log_prob, tanh_gaussian_log_prob(*wide, action, *bounds), rtol=1e-4, atol=1e-4)
    # The density in float64, from the definition by the change of variables.
    unit = 2 * (np.float64(action) - LOW_Z) / (HIGH_Z - LOW_Z) - 1
    density = stats.norm(mean, np.exp(log_std)).pdf(np.arctanh(unit)) / (1 - unit**2) * 2 / (HIGH_Z - LOW_Z)
    np.testing.assert_allclose(log_prob, np.log(density).sum(-1), rtol=1e-4, atol=1e-4)
    for z in range(3):
        cdf = stats.norm(mean[z], np.exp(log_std[z])).cdf
        assert stats.kstest(np.arctanh(unit[:, z]), cdf).pvalue > 0.01
    # Its mean is minus the entropy, by quadrature, dimension by dimension.
    entropy = 0.0
    for z in range(3):
        p = stats.norm(mean[z], np.exp(log_std[z]))

        def information(u, p=p, z=z):
            log_slope = np.log((HIGH_Z[z] - LOW_Z[z]) / 2 / np.cosh(u) ** 2)
            return p.pdf(u) * (log_slope - p.logpdf(u))

        entropy += integrate.quad(information, p.ppf(1e-12), p.isf(1e-12))[0]
    np.testing.assert_allclose(-log_prob.mean(), entropy, atol=4 * float(log_prob.std()) / 20_000**0.5)


@pytest.mark.parametrize("u", [-20.0, -9.0, -0.3, 0.0, 2.0, 9.0, 20.0])
def test_squash_at_extremes(u):
    def log_det(u):
        return squash(u[None], -0.1, 0.3)[1]

    value, slope = jax.value_and_grad(log_det)(jnp.float32(u))
    # log sech^2 in float64, which has the room for it.
    np.testing.assert_allclose(value, np.log(0.2) - 2 * np.log(np.cosh(u)), rtol=1e-5)
    np.testing.assert_allclose(slope, -2 * np.tanh(u), rtol=1e-5, atol=1e-6)
    action = squash(jnp.float32(u)[None], -0.1, 0.3)[0]
    np.testing.assert_allclose(action, [0.1 + 0.2 * np.tanh(u)], rtol=1e-5)
    assert jnp.float32(-0.1) <= action[0] <= jnp.float32(0.3)


@pytest.mark.parametrize("mean", [-20.0, 0.0, 20.0])
@pytest.mark.parametrize("log_std", [-20.0, -5.0, 2.0])
def test_samples_at_extremes_are_finite_with_their_gradients(mean, log_std):
    args = (jnp.full((2, 3), mean), jnp.full((2, 3), log_std))

    def both(mean, log_std):
        action, log_prob = tanh_gaussian_sample_and_log_prob(jax.random.key(5), mean, log_std, -2.0, 2.0)
        return action.sum() + log_prob.sum()

    action, log_prob = tanh_gaussian_sample_and_log_prob(jax.random.key(5), *args, -2.0, 2.0)
    assert jnp.isfinite(log_prob).all()
    assert jnp.abs(action).max() <= 2
    gradients = jax.grad(both, argnums=(0, 1))(*args)
    assert all(jnp.isfinite(x).all() for x in gradients)
    # In float64, with the same noise: u = mean + std noise.
    noise = np.float64(jax.random.normal(jax.random.key(5), (2, 3)))
    u = np.float64(args[0]) + np.exp(log_std) * noise
    log_slope = np.log(2) + 2 * (np.log(2) - np.abs(u) - np.log1p(np.exp(-2 * np.abs(u))))
    expected = stats.norm.logpdf(noise) - log_std - log_slope
    np.testing.assert_allclose(log_prob, expected.sum(-1), rtol=1e-5)
    slope = 2 * np.tanh(u) + 2 / np.cosh(u) ** 2
    np.testing.assert_allclose(gradients[0], slope, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gradients[1], slope * np.exp(log_std) * noise - 1, rtol=1e-4, atol=1e-4)


def test_actions_on_and_near_the_bounds_are_finite():
    action = jnp.array([-2.0, 2.0, jnp.nextafter(jnp.float32(2), jnp.float32(0)), 0.0])[:, None]
    mean, log_std = jnp.zeros_like(action), jnp.full_like(action, -1.0)

    def total(mean, log_std):
        return tanh_gaussian_log_prob(mean, log_std, action, -2.0, 2.0).sum()

    value, gradients = jax.value_and_grad(total, argnums=(0, 1))(mean, log_std)
    assert jnp.isfinite(value)
    assert all(jnp.isfinite(x).all() for x in gradients)
    # Pulled towards the action: its side is kept.
    assert gradients[0][0] < 0 < gradients[0][1]

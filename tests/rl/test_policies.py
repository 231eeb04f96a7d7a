"""Policies against SciPy, and the scaling of actions to a box."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnax.environments import spaces
from scipy import integrate, stats

from rl.policies import Categorical, Gaussian, SquashedGaussian, bounds, to_box

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_a_categorical_policy_is_its_probabilities():
    policy = Categorical(jnp.log(jnp.array([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]])) + 4.0)
    np.testing.assert_allclose(policy.log_prob(jnp.array([2, 0])), np.log([0.3, 0.6]), rtol=1e-5)
    wanted = [stats.entropy(p) for p in ([0.2, 0.5, 0.3], [0.6, 0.1, 0.3])]
    np.testing.assert_allclose(policy.entropy(), wanted, rtol=1e-5)
    np.testing.assert_array_equal(policy.mode(), [1, 0])
    draws = jax.vmap(policy.sample)(jax.random.split(jax.random.key(0), 4000))
    share = (draws[:, 0, None] == jnp.arange(3)[None]).mean(0)
    np.testing.assert_allclose(share, [0.2, 0.5, 0.3], atol=0.03)


def test_an_action_that_is_ruled_out_has_no_part_in_the_entropy():
    logits = jnp.array([0.3, -jnp.inf, 0.3])
    entropy, grad = jax.value_and_grad(lambda logits: Categorical(logits).entropy())(logits)
    assert entropy == pytest.approx(np.log(2), rel=1e-6)
    np.testing.assert_allclose(grad, np.zeros(3), atol=1e-6)


def test_a_gaussian_policy_is_a_product_of_normals():
    mean, log_std = jnp.array([[0.3, -1.0]]), jnp.array([[-0.5, 0.2]])
    policy, x = Gaussian(mean, log_std), jnp.array([[0.1, 0.4]])
    normals = stats.norm(np.asarray(mean), np.exp(np.asarray(log_std)))
    np.testing.assert_allclose(policy.log_prob(x), normals.logpdf(np.asarray(x)).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(policy.entropy(), normals.entropy().sum(-1), rtol=1e-5)
    np.testing.assert_array_equal(policy.mode(), mean)
    draws = jax.vmap(policy.sample)(jax.random.split(jax.random.key(0), 4000))[:, 0]
    np.testing.assert_allclose(draws.std(0), np.exp([-0.5, 0.2]), rtol=0.05)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.7), (0.3, 0.05), (-1.2, 0.4), (2.0, 1.0)])
def test_a_squashed_gaussian_policy_has_the_density_of_its_draws(mean, std):
    """Density and entropy by SciPy's quadrature over the Gaussian; the share of draws below some actions."""
    policy = SquashedGaussian(jnp.full((1, 2), mean), jnp.full((1, 2), jnp.log(std)))
    normal = stats.norm(mean, std)
    action = np.tanh(mean + std * np.array([[-1.5, 0.5]]))
    log_p = normal.logpdf(np.arctanh(action)) - np.log1p(-(action**2))
    np.testing.assert_allclose(policy.log_prob(jnp.float32(action)), log_p.sum(-1), rtol=1e-3)

    def surprise(u):
        log_slope = 2 * (np.log(2) - u - np.logaddexp(0, -2 * u))
        return normal.pdf(u) * (log_slope - normal.logpdf(u))

    entropy = integrate.quad(surprise, mean - 12 * std, mean + 12 * std, limit=200)[0]
    np.testing.assert_allclose(policy.entropy(), [2 * entropy], atol=2e-3)
    draws = np.asarray(jax.vmap(policy.sample)(jax.random.split(jax.random.key(0), 4000))).ravel()
    assert abs(draws).max() <= 1
    for below in (-1.0, 0.0, 1.0):
        share = (draws < np.tanh(mean + std * below)).mean()
        assert share == pytest.approx(stats.norm.cdf(below), abs=0.03)
    np.testing.assert_allclose(policy.mode(), np.full((1, 2), np.tanh(mean)), rtol=1e-5)


def test_a_squashed_action_on_its_bound_has_finite_densities_and_gradients():
    def log_prob(mean, log_std):
        return SquashedGaussian(mean, log_std).log_prob(jnp.array([[1.0, -1.0]])).sum()

    mean, log_std = jnp.zeros((1, 2)), jnp.full((1, 2), -0.4)
    value, grads = jax.value_and_grad(log_prob, (0, 1))(mean, log_std)
    assert np.isfinite(value)
    assert all(np.isfinite(grad).all() for grad in grads)


def test_actions_between_minus_one_and_one_fill_the_box():
    box = bounds(spaces.Box(jnp.array([-2.0, 0.0]), jnp.array([2.0, 10.0]), (2,)))
    action = jnp.array([[-1.0, 1.0], [0.0, 0.5], [7.0, -7.0]])
    np.testing.assert_allclose(to_box(box, action), [[-2.0, 10.0], [0.0, 7.5], [2.0, 0.0]])


def test_actions_that_are_not_of_the_box_are_refused():
    box = bounds(spaces.Box(-1.0, 1.0, (2,)))
    for action, found in ((jnp.zeros((5, 2), jnp.int32), "int32"), (jnp.zeros((5, 3)), r"\(5, 3\)")):
        with pytest.raises(ValueError, match=f"to_box: actions are .*{found}"):
            to_box(box, action)


def test_a_box_without_bounds_is_refused():
    with pytest.raises(ValueError, match="expected finite bounds"):
        bounds(spaces.Box(-jnp.inf, jnp.inf, (3,)))

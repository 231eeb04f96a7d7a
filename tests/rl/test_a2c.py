"""A2C and REINFORCE: their one gradient step by hand, and whole episodes that are longer or shorter than a rollout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl import a2c
from rl.a2c import A2CConfig, A2CHyper
from rl.collect import collect
from rl.networks import feed_forward
from rl.policies import Categorical
from rl.vector import Envs

pytestmark = pytest.mark.usefixtures("quick_compile")

E, T = 3, 7


class Discrete:
    """Three actions."""

    n = 3


class Walk:
    """Tiny episodes as an environment that algorithms take."""

    def __init__(self, tiny, **params):
        self.tiny, self.default_params = tiny, tiny.params(**params)
        self.reset_env, self.step_env, self.is_truncated = tiny.reset_env, tiny.step_env, tiny.is_truncated

    def action_space(self, params):
        return Discrete()


def linear(key):
    return {"policy": 0.3 * jax.random.normal(key, (5, 3)), "value": jnp.array([0.5, -0.3, 0.2, 0.7, -0.4])}


NETWORK = feed_forward(linear, lambda params, obs: (Categorical(obs @ params["policy"]), obs @ params["value"]))
HYPER = A2CHyper(learning_rate=0.1, discount=0.9, lambda_=0.8, entropy=0.03, value=0.7)


def first_update(config, env):
    """State before, after, metrics, and the rollout that the update saw, as NumPy; REINFORCE's begins anew."""
    algorithm = a2c.make(config, env, NETWORK)
    before = jax.jit(algorithm.init)(jax.random.key(3), HYPER, env.default_params)
    after, metrics = jax.jit(algorithm.update)(before)
    k_collect, k_start = jax.random.split(jax.random.fold_in(before.key, before.update))
    envs: Envs = before.envs
    if not config.baseline:
        obs, state = jax.vmap(env.reset_env, in_axes=(0, None))(jax.random.split(k_start, E), env.default_params)
        envs = envs._replace(obs=obs, state=state)
    rollout, _, _ = jax.jit(
        lambda key, envs: collect(key, NETWORK, before.params, envs, (), env, env.default_params, config.steps)
    )(k_collect, envs)
    return before, after, metrics, jax.tree.map(np.asarray, rollout)


def softmax(x):
    p = np.exp(x - x.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def policy_gradient(obs, action, policy, weight):
    """Of the sum of -weight log pi - entropy coefficient x entropy, over steps whose weight is given."""
    p = softmax(obs @ policy)
    entropy = -(p * np.log(p)).sum(-1, keepdims=True)
    by_logits = -weight[..., None] * (np.eye(3)[action] - p) + HYPER.entropy * p * (np.log(p) + entropy)
    return obs[..., :, None] * by_logits[..., None, :]


def adam_step(gradients, max_norm):
    """Parameters' change by a first step of Adam behind the clip."""
    norm = np.sqrt(sum((g**2).sum() for g in gradients))
    clipped = [g * min(1, max_norm / norm) for g in gradients]
    return norm, [-HYPER.learning_rate * g / (np.abs(g) + 1e-5) for g in clipped]


def check_step(before, after, metrics, gradients, max_norm):
    norm, (policy, value) = adam_step(gradients, max_norm)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
    np.testing.assert_allclose(after.params["policy"] - before.params["policy"], policy, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(after.params["value"] - before.params["value"], value, rtol=1e-3, atol=1e-6)


def test_a_step_of_a2c_is_that_of_its_definition(tiny):
    env = Walk(tiny, longest=5, max_steps=3, step_reward=0.4)
    config = A2CConfig(environments=E, steps=T, optimiser="adam", max_grad_norm=1e-4)
    before, after, metrics, rollout = first_update(config, env)
    outcome = rollout.outcome
    assert outcome.terminated_E.any()
    assert outcome.truncated_E.any()
    policy, value = np.float64(before.params["policy"]), np.float64(before.params["value"])
    obs, after_obs = np.float64(rollout.obs_TE), np.float64(outcome.final_obs)
    v, next_v = obs @ value, after_obs @ value
    advantage = np.zeros((T, E))
    for e in range(E):
        later = 0.0
        for t in reversed(range(T)):
            error = outcome.reward_E[t, e] + 0.9 * next_v[t, e] * (not outcome.terminated_E[t, e]) - v[t, e]
            ended = outcome.terminated_E[t, e] or outcome.truncated_E[t, e]
            later = error + 0.9 * 0.8 * later * (not ended)
            advantage[t, e] = later
    gradients = (
        policy_gradient(obs, rollout.action_TE, policy, advantage).mean((0, 1)),
        (-HYPER.value * advantage[..., None] * obs).mean((0, 1)),
    )
    check_step(before, after, metrics, gradients, config.max_grad_norm)


@pytest.mark.parametrize("longest", [4, 20], ids=["shorter", "longer"])
def test_reinforce_learns_from_the_first_episode_of_each_environment(tiny, longest):
    """Whatever comes after it has no influence; where the rollout cuts it, it counts as far as it got."""
    env = Walk(tiny, longest=longest, step_reward=0.4)
    config = A2CConfig(environments=E, steps=T, baseline=False, optimiser="adam", max_grad_norm=1e-4)
    before, after, metrics, rollout = first_update(config, env)
    policy = np.float64(before.params["policy"])
    done, reward = rollout.outcome.done_E, np.float64(rollout.outcome.reward_E)
    total, lengths = np.zeros((5, 3)), []
    for e in range(E):
        length = int(done[:, e].argmax()) + 1 if done[:, e].any() else T
        lengths.append(length)
        for t in range(length):
            weight = np.array(sum(0.9 ** (k - t) * reward[k, e] for k in range(t, length)))
            total += policy_gradient(np.float64(rollout.obs_TE[t, e]), rollout.action_TE[t, e], policy, weight)
    assert min(lengths) < T if longest == 4 else max(lengths) == T
    check_step(before, after, metrics, (total / (T * E), np.zeros(5)), config.max_grad_norm)
    np.testing.assert_array_equal(after.params["value"], before.params["value"])


@pytest.mark.parametrize("baseline", [True, False])
def test_reinforce_starts_anew_in_every_update_and_a2c_goes_on(tiny, baseline):
    env = Walk(tiny, longest=1000, max_steps=2000)
    algorithm = a2c.make(A2CConfig(environments=E, steps=T, baseline=baseline), env, NETWORK)
    state = jax.jit(algorithm.init)(jax.random.key(0), HYPER, env.default_params)
    update = jax.jit(algorithm.update)
    state, _ = update(update(state)[0])
    np.testing.assert_array_equal(state.envs.length_E, [2 * T if baseline else T] * E)


def test_rmsprop_is_as_defined(tiny):
    """Its first step: g / sqrt(0.01 g^2 + epsilon)."""
    env = Walk(tiny, longest=5)
    config = A2CConfig(environments=E, steps=T, max_grad_norm=1e9)
    adam = A2CConfig(environments=E, steps=T, max_grad_norm=1e-4, optimiser="adam")
    before, after, metrics, _ = first_update(config, env)
    _, scaled, _, _ = first_update(adam, env)
    # Of Adam's step, -rate g' / (|g'| + 1e-5), the gradient g' = 1e-4 g / |g|.
    change = np.float64(scaled.params["policy"] - before.params["policy"]) / -0.1
    gradient = 1e-5 * change / (1 - np.abs(change)) * float(metrics["grad_norm"]) / 1e-4
    expected = -0.1 * gradient / np.sqrt(0.01 * gradient**2 + 1e-5)
    np.testing.assert_allclose(after.params["policy"] - before.params["policy"], expected, rtol=5e-3, atol=1e-5)


def test_a_bad_config_is_refused():
    with pytest.raises(ValueError, match="A2CConfig: steps is 0"):
        A2CConfig(steps=0)
    with pytest.raises(ValueError, match="A2CConfig: max_grad_norm is -1, expected a number above 0"):
        A2CConfig(max_grad_norm=-1)
    with pytest.raises(ValueError, match="optimiser is 'sgd', expected 'rmsprop' or 'adam'"):
        A2CConfig(optimiser="sgd")  # pyright: ignore[reportArgumentType]

"""PPO against hand-worked cases; that it learns is seen in test_algorithms."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnax.environments import spaces

from rl import algorithm, ppo
from rl.collect import collect
from rl.networks import MLP, Memory, Network, actor_critic
from rl.policies import Categorical
from rl.ppo import PPOConfig, PPOHyper
from seqmod.config import BackboneConfig

pytestmark = pytest.mark.usefixtures("quick_compile")
CONFIG = PPOConfig(environments=4, steps=5, updates=3, epochs=1, minibatches=1, anneal=False)
MEMORY = Memory(BackboneConfig(inputs=1, mixers=("rglru",), width=8, mlp=12, attention_heads=2), MLP((6,), "relu"))


@pytest.fixture
def env(tiny):
    """With gymnax's description of its spaces."""

    class WithSpaces(type(tiny)):
        @property
        def default_params(self):
            return self.params(longest=4, max_steps=3, step_reward=0.5)

        def action_space(self, params):
            return spaces.Discrete(3)

        def observation_space(self, params):
            return spaces.Box(0.0, 1.0, (5,))

    return WithSpaces()


def table() -> Network:
    """A policy and a value that ignore the observation: three logits and a number."""

    def step(params, obs, memory):
        shape = obs.shape[:-1]
        logits = jnp.broadcast_to(params["logits"].reshape((1,) * len(shape) + (3,)), (*shape, 3))
        return (Categorical(logits), jnp.full(shape, params["value"])), memory

    def init(key):
        return {"logits": jnp.array([0.1, -0.2, 0.3]), "value": jnp.array(0.25)}

    return Network(init, lambda batch: (), step)


def test_the_first_gradient_is_the_policy_gradient_worked_by_hand(env):
    """At the old parameters the clipped objective's gradient is the mean of advantage times score; Adam's first step
    is the sign of the gradient times the learning rate."""
    config = replace(CONFIG, normalise_advantage=False, max_grad_norm=1e9)
    hyper = PPOHyper(learning_rate=1e-3, discount=0.5, lambda_=0.0, entropy=0.0, value=0.7)
    made = ppo.make(config, env, table())
    before = made.init(jax.random.key(0), hyper, env.default_params)
    after, metrics = jax.jit(made.update)(before)

    k_collect, _ = jax.random.split(jax.random.fold_in(jax.random.clone(before.key), 0))
    rollout, _, _ = collect(k_collect, table(), before.params, before.envs, (), env, env.default_params, config.steps)
    reward, terminated = np.asarray(rollout.outcome.reward_E), np.asarray(rollout.outcome.terminated_E)
    target = reward + 0.5 * 0.25 * ~terminated  # lambda 0: one step, then the value, 0.25 everywhere
    advantage, action = target - 0.25, np.asarray(rollout.action_TE)
    p = np.exp([0.1, -0.2, 0.3]) / np.exp([0.1, -0.2, 0.3]).sum()
    score = np.eye(3)[action] - p
    grad_logits = -(advantage[..., None] * score).mean((0, 1))
    grad_value = 0.7 * (0.25 - target).mean()
    wanted = np.sqrt((grad_logits**2).sum() + grad_value**2)
    assert metrics["grad_norm"] == pytest.approx(wanted, rel=1e-5)
    step = np.asarray(after.params["logits"] - before.params["logits"])
    np.testing.assert_allclose(step, -1e-3 * grad_logits / (np.abs(grad_logits) + 1e-5), rtol=1e-3)
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-7)
    assert metrics["value_loss"] == pytest.approx(0.5 * ((0.25 - target) ** 2).mean(), rel=1e-5)
    assert metrics["entropy"] == pytest.approx(-(p * np.log(p)).sum(), rel=1e-5)


def test_equal_advantages_teach_nothing(env):
    """Normalised, a rounding error would become an advantage."""
    made = ppo.make(CONFIG, env, table())
    hyper = PPOHyper(discount=0.0, entropy=0.0, value=0.0)
    state = made.init(jax.random.key(0), hyper, env.params(max_steps=3, step_reward=0.0, final_reward=0.0))
    _, metrics = jax.jit(made.update)(state._replace(params=state.params | {"value": jnp.array(0.1)}))
    assert metrics["grad_norm"] == 0


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("torso", [MLP((7,)), MEMORY], ids=["mlp", "memory"])
def test_minibatches_hold_each_step_once(env, torso, shards):
    """With a learning rate of 0 the ratio stays 1, so the mean over minibatches is that of one batch of everything."""
    hyper = PPOHyper(learning_rate=0.0)
    network = actor_critic((5,), spaces.Discrete(3), torso)

    def metrics(**changes):
        made = ppo.make(replace(CONFIG, normalise_advantage=False, **changes), env, network)
        return jax.jit(made.update)(made.init(jax.random.key(0), hyper, env.default_params))[1]

    whole, parts = metrics(), metrics(epochs=2, minibatches=2, shards=shards)
    for name in ("loss", "policy_loss", "value_loss", "entropy"):
        assert parts[name] == pytest.approx(float(whole[name]), rel=1e-4, abs=1e-6)
    assert abs(parts["kl"]) < 1e-6


def test_the_learning_rate_falls_to_nothing(env):
    network = actor_critic((5,), spaces.Discrete(3), MLP((7,)))
    made = ppo.make(replace(CONFIG, anneal=True), env, network)
    state = made.init(jax.random.key(0), PPOHyper(), env.default_params)
    end = state._replace(update=jnp.array(CONFIG.updates, jnp.int32))
    after, _ = jax.jit(made.update)(end)
    jax.tree.map(np.testing.assert_array_equal, after.params, end.params)


def test_observations_are_normalised_by_what_came_before(env):
    network = actor_critic((5,), spaces.Discrete(3), MLP((7,)))
    made = ppo.make(replace(CONFIG, normalise_observations=True), env, network)
    state = made.init(jax.random.key(0), PPOHyper(), env.default_params)
    for _ in range(2):
        state, _ = jax.jit(made.update)(state)
    assert state.observations.samples == pytest.approx(2 * 20, rel=1e-4)
    obs_BF = jax.random.normal(jax.random.key(1), (6, 5))
    seen = (obs_BF - state.observations.mean[None]) / jnp.sqrt(state.observations.variance[None] + 1e-8)
    (policy, _), _ = network.step(state.params, jnp.clip(seen, -10, 10), ())
    np.testing.assert_array_equal(made.act(state, None, obs_BF, ())[0], policy.mode())


def test_evaluation_plays_whole_episodes(env):
    network = actor_critic((5,), spaces.Discrete(3), MEMORY)
    made = ppo.make(CONFIG, env, network)
    state = made.init(jax.random.key(0), PPOHyper(), env.default_params)
    episodes = algorithm.evaluate(
        made, state, jax.random.key(1), env, env.default_params, episodes=7, horizon=3, keep=lambda s: s.context
    )
    context_TB, action_TB = episodes.recorded
    assert action_TB.shape == (3, 7)
    right = np.asarray((action_TB == (context_TB + 1) % 3) & episodes.valid_TB)
    success = np.asarray(right.sum(0) == episodes.length_B) & np.asarray(episodes.final_state.length <= 3)
    np.testing.assert_allclose(episodes.return_B, 0.5 * right.sum(0) + success)
    assert int(episodes.length_B.max()) <= 3
    for wrong in ({"episodes": 0, "horizon": 3}, {"episodes": 7, "horizon": 0}):
        with pytest.raises(ValueError, match=r"evaluate: (episodes|horizon) is 0, expected at least 1"):
            algorithm.evaluate(made, state, jax.random.key(1), env, env.default_params, **wrong)


def test_wrong_settings_are_named(env):
    for name in ("environments", "steps", "updates", "epochs", "minibatches", "shards"):
        with pytest.raises(ValueError, match=f"PPOConfig: {name} is 0, expected at least 1"):
            PPOConfig(**{name: 0})
    with pytest.raises(ValueError, match="3 environments x 5 steps are not divisible by minibatches 4"):
        PPOConfig(environments=3, steps=5, minibatches=4)
    with pytest.raises(ValueError, match="3 environments are not divisible by shards 2"):
        PPOConfig(environments=3, steps=4, minibatches=1, shards=2)
    with pytest.raises(ValueError, match="PPOConfig: max_grad_norm is 0, expected a number above 0"):
        PPOConfig(max_grad_norm=0)
    network = actor_critic((5,), spaces.Discrete(3), MEMORY)
    with pytest.raises(ValueError, match="4 environments are not divisible by minibatches 5"):
        ppo.make(replace(CONFIG, minibatches=5), env, network)

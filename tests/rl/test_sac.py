"""SAC: its losses as defined, scaled actions, when it learns, in-place updates, and Pendulum."""

from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl import networks, sac
from rl.algorithm import check_finite, evaluate
from rl.envs import probe
from rl.envs.make import make
from rl.networks import MLP
from rl.sac import SACConfig, SACHyper

ONE = SACConfig(environments=1, steps=1, updates=1, capacity=1, learning_starts=1, gradient_steps=1, batch=20_011)
LOG_STD = -1.5
"""What an actor of zeros gives: the middle of [-5, 2]."""


def _linear(env):
    params = env.default_params
    return networks.squashed_actor_critics(env.observation_space(params).shape, env.action_space(params), MLP(()))


def _critics(kernel_2F, bias_2):
    """Two values, linear in (observation, action)."""
    return [{"kernel": jnp.array(kernel_2F)[..., None], "bias": jnp.array(bias_2)[:, None]}]


@pytest.mark.slow
def test_it_learns_pendulum():
    env, env_params = make("Pendulum-v1")
    network = networks.squashed_actor_critics((3,), env.action_space(env_params), MLP((64, 64), "relu"))
    config = SACConfig(environments=4, updates=80, capacity=32_768, gradient_steps=1, batch=128)
    hyper = SACHyper(learning_rate=3e-3, discount=0.95)
    algorithm, train = sac.make(config, env, network), sac.make_train(config, env, network)

    def run(key):
        k_train, k_evaluate = jax.random.split(key)
        state, metrics = train(k_train, hyper)
        return evaluate(algorithm, state, k_evaluate, env, env_params, episodes=32, horizon=200).return_B, metrics

    # `vmap` transposes keys, which the checker takes for their use.
    with jax.debug_key_reuse(False):
        return_SB, metrics = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 3))
    check_finite(metrics, axis=-1)
    assert config.updates * algorithm.steps_per_update < 21_000
    # Random actions get about -1200.
    assert return_SB.mean(1).min() > -250, return_SB.mean(1)


@pytest.mark.parametrize(
    ("env", "horizon", "next_obs", "terminated"),
    [
        (probe.discounted_value(continuous=True).env, 3, 1.0, False),
        # The next episode's first observation is 0; that of the one cut off here is 1.
        (probe.discounted_value(continuous=True).env, 1, 1.0, False),
        (probe.policy(continuous=True).env, 2, 0.0, True),
    ],
    ids=["running", "truncated", "terminated"],
)
def test_losses_are_those_of_the_definition(env, horizon, next_obs, terminated):
    hyper = SACHyper(learning_rate=0.01, discount=0.9, tau=0.3, target_entropy=-2.0, temperature=0.5)
    algorithm = sac.make(ONE, env, _linear(env))
    state = algorithm.init(jax.random.key(2), hyper, env.default_params.replace(max_steps_in_episode=horizon))
    # The actor's mean is so large that its actions are 1, whatever the noise.
    actor = [{"kernel": jnp.zeros((1, 2)), "bias": jnp.array([20.0, 0.0])}]
    critics = _critics([[0.3, 2.0], [-0.6, 1.0]], [0.1, 0.9])
    target = _critics([[0.5, 1.0], [1.0, 1.5]], [0.2, -0.7])
    state = state._replace(params=state.params._replace(actor=actor, critics=critics), target=target)
    new, metrics = jax.jit(algorithm.update)(state)
    data = jax.tree.map(lambda x: np.float64(np.asarray(x)[0]), new.replay.data)
    assert (data.terminated, data.obs[0], data.next_obs[0]) == (terminated, 0.0, next_obs)

    # The density of actions, by their noise n: E n = 0, E n^2 = 1, and tanh has slope 4 exp(-2u) far out.
    entropy = 0.5 + LOG_STD + 0.5 * np.log(2 * np.pi) + np.log(4) - 2 * 20.0
    np.testing.assert_allclose(metrics["entropy"], entropy, rtol=1e-3)
    # Here it is the goals' own noise that matters, whose variance is that of n^2 / 2 - 2 std n.
    variance = (0.9 * 0.5) ** 2 * (0.5 + 4 * np.exp(2 * LOG_STD)) * (not terminated)
    next_value = min(0.5 * next_obs + 1.0 + 0.2, next_obs + 1.5 - 0.7) + 0.5 * entropy
    goal = data.reward + 0.9 * (not terminated) * next_value
    action = data.action[0]
    q_2 = np.array([2.0 * action + 0.1, action + 0.9])
    np.testing.assert_allclose(metrics["q"], q_2.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["critic_loss"], 0.5 * (np.square(q_2 - goal) + variance).sum(), rtol=2e-3)
    seen = float(metrics["entropy"])
    np.testing.assert_allclose(metrics["actor_loss"], -0.5 * seen - min(2.0 + 0.1, 1.0 + 0.9), rtol=1e-4)
    np.testing.assert_allclose(metrics["temperature"], 0.5, rtol=1e-6)
    np.testing.assert_allclose(metrics["temperature_loss"], np.log(0.5) * (seen + 2.0), rtol=1e-4)
    # Too little entropy, so the temperature rises; Adam's first step is the learning rate.
    np.testing.assert_allclose(new.params.log_temperature - np.log(0.5), 0.01, rtol=1e-4)
    for index in (0, 1):
        moved = new.params.critics[0]["bias"][index, 0] - critics[0]["bias"][index, 0]
        np.testing.assert_allclose(moved, 0.01 * np.sign(goal - q_2[index]), rtol=1e-3)
    jax.tree.map(
        lambda t, p, o: np.testing.assert_allclose(t, 0.3 * np.asarray(p) + 0.7 * np.asarray(o), rtol=1e-5),
        new.target,
        new.params.critics,
        target,
    )


def test_the_actor_climbs_the_smaller_value():
    env = probe.policy(continuous=True).env
    algorithm = sac.make(ONE, env, _linear(env))
    hyper = SACHyper(learning_rate=0.01, temperature=1e-6)
    state = algorithm.init(jax.random.key(0), hyper, env.default_params)
    actor = [{"kernel": jnp.zeros((1, 2)), "bias": jnp.zeros(2)}]
    for critics, sign in (
        (_critics([[0.0, 1.0], [0.0, -3.0]], [0.0, 9.0]), 1.0),
        (_critics([[0.0, 1.0], [0.0, -3.0]], [9.0, 0.0]), -1.0),
    ):
        params = state.params._replace(actor=actor, critics=critics)
        new, _ = jax.jit(algorithm.update)(state._replace(params=params))
        np.testing.assert_allclose(new.params.actor[0]["bias"][0], 0.01 * sign, rtol=1e-3)


def test_actions_are_scaled_to_the_box_and_random_before_learning():
    env = probe.policy(continuous=True).env
    config = SACConfig(environments=101, steps=5, updates=2, capacity=1010, learning_starts=505, batch=2)
    algorithm = sac.make(config, env, _linear(env))
    state = algorithm.init(jax.random.key(0), SACHyper(learning_rate=0.0), env.default_params)
    bias = jnp.array([0.7, -2.0])
    state = state._replace(params=state.params._replace(actor=[{"kernel": jnp.zeros((1, 2)), "bias": bias}]))
    update = jax.jit(algorithm.update)
    state, _ = update(update(state)[0])
    data = jax.tree.map(np.asarray, state.replay.data)
    np.testing.assert_allclose(data.reward, -np.square(2 * data.action[:, 0] - 0.5), rtol=1e-4, atol=1e-5)
    warm, own = data.action[:505, 0], data.action[505:, 0]
    # Uniform in [-1, 1]: against its quantiles.
    np.testing.assert_allclose(np.sort(warm), np.linspace(-1, 1, 505), atol=0.12)
    std = np.exp(-5 + 3.5 * (np.tanh(-2.0) + 1))
    before_tanh = np.arctanh(np.float64(own))
    np.testing.assert_allclose(before_tanh.mean(), 0.7, atol=4 * std / np.sqrt(505))
    np.testing.assert_allclose(before_tanh.std(), std, rtol=0.15)
    greedy, _ = algorithm.act(state, None, jnp.zeros((3, 1)), ())
    np.testing.assert_allclose(greedy, np.full((3, 1), 2 * np.tanh(0.7)), rtol=1e-6)
    drawn, _ = algorithm.act(state, jax.random.key(1), jnp.zeros((1009, 1)), ())
    np.testing.assert_allclose(np.arctanh(np.float64(drawn) / 2).std(), std, rtol=0.1)


def test_learning_waits_for_the_buffer():
    env = probe.observed_value(continuous=True).env
    config = SACConfig(environments=3, steps=5, updates=2, capacity=33, learning_starts=19, gradient_steps=2, batch=7)
    algorithm = sac.make(config, env, _linear(env))
    state = algorithm.init(jax.random.key(0), SACHyper(), env.default_params)
    update = jax.jit(algorithm.update)
    first, metrics = update(state)
    jax.tree.map(np.testing.assert_array_equal, first.params, state.params)
    assert (int(first.learned), float(metrics["loss"])) == (0, 0.0)
    # The 7th step is the first after which there are 19.
    second, metrics = update(first)
    assert int(second.learned) == 2 * 4
    assert float(metrics["critic_loss"]) > 0


@pytest.mark.parametrize("seeds", [None, 3])
def test_a_donated_update_writes_the_buffer_in_place(seeds):
    env = probe.policy(continuous=True).env
    config = SACConfig(environments=2, steps=3, capacity=2**16, batch=5, gradient_steps=2)
    network = networks.squashed_actor_critics((1,), env.action_space(env.default_params), MLP((7,)))
    algorithm = sac.make(config, env, network)
    init = partial(algorithm.init, hyper=SACHyper(), env_params=env.default_params)
    update = algorithm.update
    keys = jax.random.key(0)
    if seeds:
        init, update, keys = jax.jit(jax.vmap(init)), jax.vmap(update), jax.random.split(keys, seeds)
    # `vmap` transposes keys, which the checker takes for their use.
    with jax.debug_key_reuse(False):
        compiled = jax.jit(update, donate_argnums=0).lower(jax.eval_shape(init, keys)).compile()
        # Nothing is donated twice.
        state, _ = compiled(init(keys))
        jax.block_until_ready(compiled(state))
    size = (seeds or 1) * config.capacity * 4 * 4
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes > size
    assert memory.temp_size_in_bytes < size / 10


def test_a_narrow_buffer_that_holds_the_observations_changes_nothing():
    """Observations are -1 or 1."""
    env = probe.observed_value(continuous=True).env
    config = SACConfig(environments=7, steps=5, updates=2, capacity=70, learning_starts=14, batch=11, gradient_steps=1)
    found = {}
    for dtype in (None, "bfloat16"):
        algorithm = sac.make(replace(config, replay_dtype=dtype), env, _linear(env))
        state = algorithm.init(jax.random.key(0), SACHyper(), env.default_params)
        found[dtype], _ = jax.jit(algorithm.update)(state)
    assert found["bfloat16"].replay.data.obs.dtype == jnp.bfloat16
    chex.assert_trees_all_equal(found["bfloat16"].params, found[None].params)
    assert int(found["bfloat16"].learned) > 0


def test_errors_name_what_is_wrong():
    env = probe.policy(continuous=True).env
    discrete = probe.policy(continuous=False).env
    with pytest.raises(ValueError, match="sac: action space is Discrete, expected a Box"):
        sac.make(SACConfig(), discrete, _linear(env))
    with pytest.raises(ValueError, match="squashed_actor_critics: action space is Discrete, expected a Box"):
        _linear(discrete)
    network = _linear(env)
    with pytest.raises(ValueError, match="sac: a network has a memory"):
        sac.make(SACConfig(), env, network._replace(actor=network.actor._replace(recurrent=True)))
    for field, value, expected in [
        ("gradient_steps", 0, "gradient_steps is 0, expected at least 1"),
        ("capacity", 15, "capacity is 15, expected a multiple of 8 environments"),
        ("learning_starts", 200_000, "learning_starts is 200000, expected at most the capacity 131072"),
        ("replay_dtype", "half16", "SACConfig: replay_dtype is 'half16', expected the name of a type"),
    ]:
        with pytest.raises(ValueError, match=expected):
            SACConfig(**{field: value})

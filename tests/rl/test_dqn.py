"""DQN: a gradient step as defined, exploration, when it learns, in-place updates, and CartPole."""

from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl import dqn, networks
from rl.algorithm import check_finite, evaluate
from rl.dqn import DQNConfig, DQNHyper
from rl.envs import probe
from rl.envs.make import make
from rl.networks import MLP

ONE = DQNConfig(environments=1, steps=1, updates=1, capacity=1, learning_starts=1, batch=3, target_period=2)


def _linear(env, **options):
    """One matrix: values whose gradients are known by hand."""
    params = env.default_params
    return networks.q_network(env.observation_space(params).shape, env.action_space(params), MLP(()), **options)


def _dense(kernel, bias):
    return {"torso": [], "action": {"kernel": jnp.array([kernel]), "bias": jnp.array(bias)}}


@pytest.mark.slow
def test_it_learns_cartpole():
    """With the settings of rejax's gymnax/cartpole.yaml, squared error included. Policies go on changing, for the worse
    too: some one in five seeds ends with a bad one, so it is the median that counts. Random actions get 22."""
    env, env_params = make("CartPole-v1")
    network = networks.q_network((4,), env.action_space(env_params), MLP((64, 64), "silu"), dueling=True)
    config = DQNConfig(
        environments=10,
        steps=10,
        updates=1000,
        capacity=50_000,
        learning_starts=5_000,
        gradient_steps=5,
        batch=100,
        target_period=5,
    )
    hyper = DQNHyper(learning_rate=1e-3, tau=0.02, exploration=0.5, huber=1e6)
    train = partial(dqn.make_train(config, env, network), hyper=hyper)
    judge = partial(evaluate, dqn.make(config, env, network), env=env, env_params=env_params, episodes=16, horizon=500)

    @jax.jit
    @jax.vmap
    def run(key):
        k_train, k_judge = jax.random.split(key)
        state, metrics = train(k_train)
        return judge(state, k_judge).return_B.mean(), metrics

    # `vmap` transposes keys, which the checker takes for their use.
    with jax.debug_key_reuse(False):
        return_S, metrics = run(jax.random.split(jax.random.key(0), 8))
    check_finite(metrics, axis=-1)
    assert np.median(return_S) > 300, return_S


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(
    ("env", "horizon", "next_obs", "terminated"),
    [
        (probe.discounted_value(continuous=False).env, 3, 1.0, False),
        # The next episode's first observation is 0; that of the one cut off here is 1.
        (probe.discounted_value(continuous=False).env, 1, 1.0, False),
        (probe.policy(continuous=False).env, 2, 0.0, True),
    ],
    ids=["running", "truncated", "terminated"],
)
def test_a_gradient_step_is_that_of_the_definition(double, env, horizon, next_obs, terminated):
    config = DQNConfig(**{**vars(ONE), "double": double, "max_grad_norm": 1e9})
    hyper = DQNHyper(learning_rate=0.01, discount=0.9, tau=0.3, epsilon_start=0.0, epsilon_end=0.0)
    algorithm = dqn.make(config, env, _linear(env))
    state = algorithm.init(jax.random.key(2), hyper, env.default_params.replace(max_steps_in_episode=horizon))
    # In the next observation 1, the network prefers action 1 and the target network action 0.
    params, target = _dense([0.1, 2.0], [0.7, 0.5]), _dense([1.5, -0.25], [0.2, 0.4])
    state = state._replace(params=params, target=target)
    new, metrics = jax.jit(algorithm.update)(state)

    # One transition is all that the buffer holds, so every sample is that; observation 0, greedy action 0.
    data = jax.tree.map(lambda x: np.asarray(x)[0], new.replay.data)
    assert (data.action, data.terminated, data.obs[0], data.next_obs[0]) == (0, terminated, 0.0, next_obs)
    next_q_A, next_target_A = (
        np.float64(p["action"]["kernel"][0]) * next_obs + np.float64(p["action"]["bias"]) for p in (params, target)
    )
    best = (next_q_A if double else next_target_A).argmax()
    error = 0.7 - (float(data.reward) + 0.9 * (not terminated) * next_target_A[best])
    huber = 0.5 * error**2 if abs(error) < 1 else abs(error) - 0.5
    np.testing.assert_allclose(metrics["loss"], huber, rtol=1e-5)
    np.testing.assert_allclose(metrics["td_error"], abs(error), rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], min(abs(error), 1), rtol=1e-5)
    # Adam's first step is the learning rate against the gradient's sign; other values are constants.
    moved = jax.tree.map(lambda a, b: np.asarray(a - b), new.params, params)["action"]
    np.testing.assert_allclose(moved["bias"], [-0.01 * np.sign(error), 0.0], rtol=1e-4)
    np.testing.assert_array_equal(moved["kernel"], np.zeros((1, 2)))

    # The target network moves at every second gradient step.
    jax.tree.map(np.testing.assert_array_equal, new.target, target)
    last, _ = jax.jit(algorithm.update)(new)
    assert int(last.learned) == 2
    jax.tree.map(
        lambda t, p, o: np.testing.assert_allclose(t, 0.3 * np.asarray(p) + 0.7 * np.asarray(o), rtol=1e-6),
        last.target,
        last.params,
        target,
    )


def test_errors_within_huber_count_squared():
    env = probe.policy(continuous=False).env
    algorithm = dqn.make(ONE, env, _linear(env))
    hyper = DQNHyper(epsilon_start=0.0, epsilon_end=0.0, huber=5.0)
    state = algorithm.init(jax.random.key(0), hyper, env.default_params)
    _, metrics = jax.jit(algorithm.update)(state._replace(params=_dense([0.0, 0.0], [3.0, 0.0])))
    np.testing.assert_allclose(metrics["loss"], 0.5 * 4.0**2, rtol=1e-6)


def test_actions_are_random_by_epsilon_which_falls_linearly():
    env = probe.policy(continuous=False).env
    config = DQNConfig(environments=101, steps=5, updates=8, capacity=505, learning_starts=505)
    algorithm = dqn.make(config, env, _linear(env))
    hyper = DQNHyper(learning_rate=0.0, epsilon_start=0.8, epsilon_end=0.2, exploration=0.5)
    state = algorithm.init(jax.random.key(0), hyper, env.default_params)
    state = state._replace(params=_dense([0.0, 0.0], [0.0, 1.0]))
    update = jax.jit(algorithm.update)
    seen, shares = [], []
    for _ in range(8):
        state, metrics = update(state)
        seen.append(float(metrics["epsilon"]))
        shares.append(float((np.asarray(state.replay.data.action) == 0).mean()))
    # That of an update's last step, which is one of 5; it has fallen after half of 40.
    step = 5 * np.arange(8) + 4
    expected = 0.8 - 0.6 * np.minimum(step / 20, 1)
    np.testing.assert_allclose(seen, expected, rtol=1e-5)
    # Half of the random actions are those that are not greedy; the mean over an update's steps.
    steps = 5 * np.arange(8)[:, None] + np.arange(5)
    np.testing.assert_allclose(shares, 0.5 * (0.8 - 0.6 * np.minimum(steps / 20, 1)).mean(1), atol=0.07)
    action_B, _ = algorithm.act(state, None, jnp.zeros((1009, 1)), ())
    assert bool((action_B == 1).all())
    action_B, _ = algorithm.act(state, jax.random.key(1), jnp.zeros((1009, 1)), ())
    np.testing.assert_allclose((np.asarray(action_B) == 0).mean(), 0.1, atol=0.03)


def test_learning_waits_for_the_buffer():
    env = probe.observed_value(continuous=False).env
    config = DQNConfig(environments=3, steps=5, updates=2, capacity=33, learning_starts=19, gradient_steps=2, batch=7)
    algorithm = dqn.make(config, env, _linear(env))
    state = algorithm.init(jax.random.key(0), DQNHyper(), env.default_params)
    update = jax.jit(algorithm.update)
    first, metrics = update(state)
    jax.tree.map(np.testing.assert_array_equal, first.params, state.params)
    assert (int(first.learned), float(metrics["loss"])) == (0, 0.0)
    # The 7th step is the first after which there are 19.
    second, metrics = update(first)
    assert int(second.learned) == 2 * 4
    assert float(metrics["loss"]) > 0
    assert int(second.replay.size) == 30


@pytest.mark.parametrize("seeds", [None, 3])
def test_a_donated_update_writes_the_buffer_in_place(seeds):
    env = probe.policy(continuous=False).env
    config = DQNConfig(environments=2, steps=3, capacity=2**16, batch=5, gradient_steps=2)
    algorithm = dqn.make(config, env, networks.q_network((1,), env.action_space(env.default_params), MLP((7,))))
    init = partial(algorithm.init, hyper=DQNHyper(), env_params=env.default_params)
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


def test_dueling_values_have_the_value_as_their_mean():
    env = probe.policy(continuous=False).env
    network = networks.q_network((5,), env.action_space(env.default_params), MLP((7,)), dueling=True)
    params = network.init(jax.random.key(0))
    obs_BF = jax.random.normal(jax.random.key(1), (11, 5))
    q_BA, _ = network.step(params, obs_BF, ())
    layer = jax.tree.map(np.float64, params["torso"][0])
    features = np.tanh(np.float64(obs_BF) @ layer["kernel"] + layer["bias"])
    value, advantage = (
        features @ np.float64(params[name]["kernel"]) + np.float64(params[name]["bias"]) for name in ("value", "action")
    )
    np.testing.assert_allclose(q_BA.mean(-1), value[:, 0], atol=1e-5)
    np.testing.assert_allclose(q_BA[:, 1] - q_BA[:, 0], advantage[:, 1] - advantage[:, 0], atol=1e-5)


def test_normalised_observations_are_stored_as_they_are():
    env = probe.observed_value(continuous=False).env
    config = DQNConfig(environments=7, steps=3, updates=2, capacity=70, learning_starts=70, normalise_observations=True)
    algorithm = dqn.make(config, env, _linear(env))
    state, _ = jax.jit(algorithm.update)(algorithm.init(jax.random.key(0), DQNHyper(), env.default_params))
    obs = np.float64(state.replay.data.next_obs[: int(state.replay.size)])
    np.testing.assert_array_equal(np.abs(obs), 1.0)
    np.testing.assert_allclose(state.observations.mean, obs.mean(0), atol=1e-4)
    action_B, _ = algorithm.act(
        state._replace(params=_dense([1.0, 0.0], [0.0, 0.0])), None, state.observations.mean[None] + 0.01, ()
    )
    assert action_B.tolist() == [0]


def test_a_narrow_buffer_that_holds_the_observations_changes_nothing():
    """Observations are -1 or 1."""
    env = probe.observed_value(continuous=False).env
    config = DQNConfig(environments=7, steps=5, updates=2, capacity=70, learning_starts=14, batch=11)
    found = {}
    for dtype in (None, "int8"):
        algorithm = dqn.make(replace(config, replay_dtype=dtype), env, _linear(env))
        state = algorithm.init(jax.random.key(0), DQNHyper(), env.default_params)
        found[dtype], _ = jax.jit(algorithm.update)(state)
    narrow = found["int8"].replay.data
    assert (narrow.obs.dtype, narrow.next_obs.dtype, narrow.reward.dtype) == (jnp.int8, jnp.int8, jnp.float32)
    chex.assert_trees_all_equal(found["int8"].params, found[None].params)
    assert int(found["int8"].learned) > 0


def test_errors_name_what_is_wrong():
    env = probe.policy(continuous=False).env
    box = probe.policy(continuous=True).env
    with pytest.raises(ValueError, match="dqn: action space is Box, expected a Discrete"):
        dqn.make(DQNConfig(), box, _linear(env))
    with pytest.raises(ValueError, match="q_network: action space is Box, expected a Discrete"):
        _linear(box)
    with pytest.raises(ValueError, match="dqn: the network has a memory"):
        dqn.make(DQNConfig(), env, _linear(env)._replace(recurrent=True))
    for field, value, expected in [
        ("steps", 0, "steps is 0, expected at least 1"),
        ("capacity", 15, "capacity is 15, expected a multiple of 8 environments"),
        ("learning_starts", 20_000, "learning_starts is 20000, expected at most the capacity 16384"),
        ("max_grad_norm", 0, "max_grad_norm is 0, expected a number above 0"),
        ("replay_dtype", "byte8", "DQNConfig: replay_dtype is 'byte8', expected the name of a type"),
    ]:
        with pytest.raises(ValueError, match=expected):
            DQNConfig(**{field: value})

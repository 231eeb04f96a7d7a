"""Behaviour cloning finds the most likely policy: frequencies, means and deviations that can be counted in the data."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl import bc, offline
from rl.algorithm import evaluate
from rl.networks import MLP, Memory, actor_critic, dense, feed_forward, init_dense
from rl.offline import Trajectories
from rl.policies import Categorical
from seqmod.config import BackboneConfig

N, L, F = 41, 7, 3
DISCRETE = SimpleNamespace(n=3)
BOX = SimpleNamespace(shape=(2,), low=np.array([-3.0, 1.0]), high=np.array([1.0, 2.0]))


def spaces(action_space) -> SimpleNamespace:
    """As much of an environment as cloning needs."""
    return SimpleNamespace(default_params=None, action_space=lambda params: action_space)


def dataset(action_NL, obs_NL=None, reward_NL=None, seed: int = 0) -> Trajectories:
    """Episodes of 1 to L steps; observations are one-hot, by default at random."""
    rng = np.random.default_rng(seed)
    state_NL = rng.integers(0, F, (N, L)) if obs_NL is None else obs_NL
    return Trajectories(
        obs_NL=jnp.asarray(np.eye(F)[state_NL], jnp.float32),
        action_NL=jnp.asarray(action_NL),
        reward_NL=jnp.zeros((N, L)) if reward_NL is None else jnp.asarray(reward_NL, jnp.float32),
        mask_NL=jnp.asarray(np.arange(L)[None] < rng.integers(1, L + 1, N)[:, None]),
        terminated_N=jnp.ones(N, bool),
    )


def policy_only():
    """A table of logits."""
    return feed_forward(lambda key: init_dense(key, F, DISCRETE.n), lambda params, obs: Categorical(dense(params, obs)))


@pytest.mark.parametrize("network", [actor_critic((F,), DISCRETE, MLP((16,))), policy_only()], ids=["critic", "only"])
def test_probabilities_are_frequencies(network):
    rng = np.random.default_rng(1)
    data = dataset(rng.choice(3, (N, L), p=[0.6, 0.3, 0.1]))
    config = bc.BCConfig(updates=4, gradient_steps=150, batch=256, normalise_observations=False)
    state, metrics = jax.jit(bc.make_train(config, spaces(DISCRETE), network))(
        jax.random.key(0), data, bc.BCHyper(learning_rate=3e-3)
    )
    outputs = network.step(state.params, jnp.eye(F), ())[0]
    policy = outputs if isinstance(outputs, Categorical) else outputs[0]
    mask_NL, action_NL = np.asarray(data.mask_NL), np.asarray(data.action_NL)
    state_NL = np.asarray(data.obs_NL).argmax(-1)
    frequency_FA = np.array([np.bincount(action_NL[mask_NL & (state_NL == s)], minlength=3) for s in range(F)])
    count_F = frequency_FA.sum(1, keepdims=True)
    frequency_FA = frequency_FA / count_F
    np.testing.assert_allclose(jax.nn.softmax(policy.logits), frequency_FA, atol=0.05)
    # The loss is the entropy of the data, in nats.
    entropy = -(count_F * frequency_FA * np.log(frequency_FA)).sum() / count_F.sum()
    np.testing.assert_allclose(metrics["loss"][-1], entropy, atol=0.03)
    assert metrics["bad_observations"].sum() == 0


def test_a_gaussian_has_the_moments_of_the_actions():
    rng = np.random.default_rng(2)
    # In the middle of the box, and narrow enough to stay in it.
    action_NL2 = np.array([-1.5, 1.6]) + np.array([0.3, 0.05]) * rng.standard_normal((N, L, 2))
    data = dataset(action_NL2.astype(np.float32))
    network = actor_critic((F,), BOX, MLP(()))
    config = bc.BCConfig(updates=6, gradient_steps=150, batch=512)
    env = spaces(BOX)
    state, _ = jax.jit(bc.make_train(config, env, network))(jax.random.key(0), data, bc.BCHyper(learning_rate=5e-3))
    algorithm = bc.make(config, env, network)
    rows = action_NL2[np.asarray(data.mask_NL)]
    expected_F2 = np.array(
        [action_NL2[np.asarray(data.mask_NL & (data.obs_NL.argmax(-1) == s))].mean(0) for s in range(F)]
    )
    greedy_F2, _ = algorithm.act(state, None, jnp.eye(F), ())
    np.testing.assert_allclose(greedy_F2, expected_F2, atol=0.04)
    many, _ = algorithm.act(state, jax.random.key(1), jnp.repeat(jnp.eye(F), 700, axis=0), ())
    residual = rows - expected_F2[np.asarray(data.obs_NL.argmax(-1))[np.asarray(data.mask_NL)]]
    np.testing.assert_allclose((many - jnp.repeat(greedy_F2, 700, axis=0)).std(0), residual.std(0), rtol=0.1)


@pytest.mark.parametrize("context", [None, 4])
def test_a_memory_clones_what_depends_on_the_past(context):
    rng = np.random.default_rng(3)
    state_NL = rng.integers(0, F, (N, L))
    # The action is the observation before: a network without memory cannot know it.
    action_NL = np.concatenate([np.zeros((N, 1), int), state_NL[:, :-1]], axis=1)
    data = dataset(action_NL, state_NL)
    memory = Memory(BackboneConfig(inputs=1, mixers=("rglru",), width=16, mlp=16), MLP((16,), "relu"))
    config = bc.BCConfig(updates=1, gradient_steps=300, batch=32, context=context)
    network = actor_critic((F,), DISCRETE, memory)
    env = spaces(DISCRETE)
    state, _ = jax.jit(bc.make_train(config, env, network))(jax.random.key(0), data, bc.BCHyper(learning_rate=1e-2))
    algorithm = bc.make(config, env, network)
    carried, act = algorithm.init_memory(N), jax.jit(algorithm.act, static_argnums=1)
    right = []
    for t in range(L):
        action_N, carried = act(state, None, data.obs_NL[:, t], carried)
        right.append(np.asarray(action_N == data.action_NL[:, t])[np.asarray(data.mask_NL[:, t])])
    # Windows from the middle of an episode cannot know their first action, nor that of an episode.
    assert np.concatenate(right[context is not None :]).mean() > 0.95


def test_the_best_episodes_alone():
    good_N = np.arange(N) % 4 == 0
    action_NL = np.where(good_N[:, None], 2, 0) * np.ones((1, L), int)
    data = dataset(action_NL, reward_NL=np.where(good_N[:, None], 1.0, -1.0) * np.ones((1, L)))
    for top, action in ((1.0, 0), (0.2, 2)):
        config = bc.BCConfig(updates=1, gradient_steps=200, batch=64, top=top)
        network = policy_only()
        train = jax.jit(bc.make_train(config, spaces(DISCRETE), network))
        state, metrics = train(jax.random.key(0), data, bc.BCHyper(learning_rate=3e-2))
        action_F, _ = bc.make(config, spaces(DISCRETE), network).act(state, None, jnp.eye(F), ())
        np.testing.assert_array_equal(action_F, action)
        assert metrics["loss"].shape == (1,)


def test_updates_go_on_where_they_stopped_and_sweep():
    data = dataset(np.random.default_rng(4).integers(0, 3, (N, L)))
    network, env = policy_only(), spaces(DISCRETE)
    algorithm = bc.make(bc.BCConfig(updates=2, gradient_steps=3, batch=5), env, network)
    update = jax.jit(algorithm.update)
    state = jax.jit(algorithm.init)(jax.random.key(0), bc.BCHyper(), data)
    first, _ = update(state)
    second, _ = update(first)
    whole, _ = jax.jit(bc.make_train(bc.BCConfig(updates=2, gradient_steps=3, batch=5), env, network))(
        jax.random.key(0), data
    )
    jax.tree.map(np.testing.assert_array_equal, second.params, whole.params)
    rates = bc.BCHyper(learning_rate=jnp.array([1e-3, 0.0]), weight_decay=jnp.zeros(2))
    train = bc.make_train(bc.BCConfig(updates=2, gradient_steps=3, batch=5), env, network)
    swept, _ = jax.jit(jax.vmap(train, (None, None, 0)))(jax.random.key(0), data, rates)
    for one, many, start in zip(*(jax.tree.leaves(x.params) for x in (whole, swept, state)), strict=True):
        np.testing.assert_allclose(many[0], one, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(many[1], start)


def test_errors_say_what_is_wrong():
    for options, match in (
        ({"batch": 0}, "batch is 0, expected at least 1"),
        ({"context": 0}, "context is 0, expected at least 1, or None"),
        ({"top": 1.5}, "top is 1.5, expected a fraction"),
        ({"max_grad_norm": 0}, "max_grad_norm is 0, expected a number above 0"),
    ):
        with pytest.raises(ValueError, match=match):
            bc.BCConfig(**options)
    data = dataset(np.zeros((N, L), int))
    algorithm = bc.make(bc.BCConfig(), spaces(DISCRETE), policy_only())
    with pytest.raises(ValueError, match="episode 5 of 41 has no steps"):
        algorithm.init(jax.random.key(0), bc.BCHyper(), data._replace(mask_NL=data.mask_NL.at[5].set(False)))


@pytest.mark.slow
def test_cartpole_from_a_mixture():
    """Data: 20 episodes of a good scripted policy, 60 with half of its actions at random, 300 at random."""
    from rl.envs.make import make

    env, params = make("CartPole-v1", max_steps=200)

    def good(key, obs_BF, memory):
        x, v, angle, turn = jnp.moveaxis(obs_BF, -1, 0)
        return (angle + 0.3 * turn + 0.02 * x + 0.05 * v > 0).astype(jnp.int32), memory

    parts = [
        jax.jit(
            lambda key, epsilon=epsilon, count=count: offline.collect_trajectories(
                key, good, env, params, episodes=count, horizon=200, epsilon=epsilon
            )
        )(jax.random.key(seed))
        for seed, (count, epsilon) in enumerate(((20, 0.0), (60, 0.5), (300, 1.0)))
    ]
    data = offline.concatenate(*parts)
    assert float(parts[0].return_N.mean()) == 200
    network = actor_critic((4,), env.action_space(params), MLP((32,)))
    returns = {}
    for top in (1.0, 0.2):
        config = bc.BCConfig(updates=1, gradient_steps=600, batch=128, top=top)
        state, _ = jax.jit(bc.make_train(config, env, network))(jax.random.key(0), data, bc.BCHyper(learning_rate=3e-3))
        algorithm = bc.make(config, env, network)
        episodes = jax.jit(
            lambda state, key, algorithm=algorithm: evaluate(
                algorithm, state, key, env, params, episodes=64, horizon=200, greedy=False
            )
        )(state, jax.random.key(1))
        returns[top] = float(episodes.return_B.mean())
    # The mixture is imitated as it is; its best fifth is good.
    assert returns[1.0] < 110
    assert returns[0.2] > 190


def test_a_memory_learns_from_one_batch_of_episodes_at_a_time():
    """Compiled memory beyond the state does not grow with the gradient steps of an update."""
    network = actor_critic((F,), DISCRETE, Memory(BackboneConfig(inputs=1, mixers=("rglru",), width=8, mlp=8), MLP(())))
    data = Trajectories(
        obs_NL=jnp.zeros((5, 211, F)),
        action_NL=jnp.zeros((5, 211), jnp.int32),
        reward_NL=jnp.zeros((5, 211)),
        mask_NL=jnp.ones((5, 211), bool),
        terminated_N=jnp.ones(5, bool),
    )
    taken = []
    for gradient_steps in (2, 20):
        config = bc.BCConfig(gradient_steps=gradient_steps, batch=3)
        algorithm = bc.make(config, spaces(DISCRETE), network)
        state = jax.eval_shape(algorithm.init, jax.random.key(0), bc.BCHyper(), data)
        taken.append(jax.jit(algorithm.update).lower(state).compile().memory_analysis().temp_size_in_bytes)
    # Beside an observation, a step has an index, a place in its episode, and a mask.
    assert taken[1] - taken[0] <= 18 * 3 * 211 * (4 + 4 + 1) + 4096

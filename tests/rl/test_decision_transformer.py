"""The step form against the parallel form, and conditioning: what is asked for is what is got."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl import bc, offline
from rl import decision_transformer as dt
from rl.algorithm import evaluate
from rl.networks import MLP, actor_critic
from rl.offline import RewardObserved, Seen, Trajectories
from seqmod import backbone
from seqmod.config import BackboneConfig
from seqmod.mixers.attention import AttentionConfig

B, T, F, A = 2, 11, 5, 3
MIXERS = ("attention", "rglru", "mamba")
BOX = SimpleNamespace(shape=(A,), low=np.array([-3.0, 1.0, -1.0]), high=np.array([1.0, 2.0, 5.0]))


def small(mixer: Any, layers: int = 2, width: int = 8) -> BackboneConfig:
    return BackboneConfig(inputs=1, mixers=(mixer,) * layers, width=width, mlp=13, attention_heads=2)


class Noise:
    """Observations and rewards at random; an episode ends after T steps."""

    default_params = None

    def __init__(self, space: Any):
        self.space = space

    def reset_env(self, key, params):
        return jax.random.normal(key, (F,)), jnp.zeros((), jnp.int32)

    def step_env(self, key, state, action, params):
        k_obs, k_reward = jax.random.split(key)
        return jax.random.normal(k_obs, (F,)), state + 1, jax.random.normal(k_reward), state + 1 >= T, {}

    def is_truncated(self, state, params):
        return jnp.zeros((), bool)

    def action_space(self, params):
        return self.space

    def observation_space(self, params):
        return SimpleNamespace(shape=(F,))


def random_trajectory(seed: int = 0):
    """Returns to go, observations, embedded actions, times."""
    rng = np.random.default_rng(seed)
    arrays = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((B, T), (B, T, F), (B, T, A))]
    return (*arrays, jnp.broadcast_to(jnp.arange(T)[None], (B, T)))


@pytest.mark.parametrize("horizon", [0, 7])
@pytest.mark.parametrize("context", [4, T])
@pytest.mark.parametrize("mixer", MIXERS)
def test_step_by_step_is_in_parallel(random_params, mixer, context, horizon):
    """The horizon is shorter than the episode: later steps have the last embedding. A short context is a window of
    attention, and none of a recurrence."""
    config = dt.DTConfig(context=context, horizon=horizon)
    model = dt.model_config(config, Noise(SimpleNamespace(n=A)), small(mixer))
    params = random_params(backbone.init, model)
    left_BT, obs_BTF, action_BTA, time_BT = random_trajectory()
    windowed = model
    if mixer == "attention":
        whole = model.block(0).mixer_config
        assert isinstance(whole, AttentionConfig)
        windowed = replace(model, mixers=(replace(whole, window=3 * context - 1),) * 2)
    expected_BTA = jax.jit(lambda *x: dt.action_outputs(params, config, windowed, *x))(
        left_BT, obs_BTF, action_BTA, time_BT
    )

    @jax.jit
    def steps(left_BT, obs_BTF, action_BTA):
        def one(cache, x):
            left_B, obs_BF, action_BA, time = x
            y_BA, cache = dt.predict(params, config, model, left_B, obs_BF, time, cache)
            return dt.remember(params, config, model, action_BA, time, cache), y_BA

        start = backbone.init_state(model, B, 3 * context - 1)
        xs = *(jnp.moveaxis(x, 1, 0) for x in (left_BT, obs_BTF, action_BTA)), jnp.arange(T)
        return jnp.moveaxis(jax.lax.scan(one, start, xs)[1], 0, 1)

    np.testing.assert_allclose(steps(left_BT, obs_BTF, action_BTA), expected_BTA, rtol=2e-4, atol=2e-5)
    if mixer == "attention" and context < T:
        unbounded_BTA = dt.action_outputs(params, config, model, left_BT, obs_BTF, action_BTA, time_BT)
        np.testing.assert_allclose(unbounded_BTA[:, :context], expected_BTA[:, :context], rtol=2e-4, atol=2e-5)
        assert np.abs(unbounded_BTA - expected_BTA)[:, context:].max() > 1e-3


@pytest.mark.parametrize("mixer", MIXERS)
def test_an_action_depends_on_what_came_before_it(random_params, mixer):
    """On returns and observations up to its step and earlier actions, by gradient: so padding after it is harmless."""
    config = dt.DTConfig(context=T, horizon=T)
    model = dt.model_config(config, Noise(SimpleNamespace(n=A)), small(mixer))
    params = random_params(backbone.init, model)
    *inputs, time_BT = random_trajectory()
    t = 6

    def output(left_BT, obs_BTF, action_BTA):
        return jnp.square(dt.action_outputs(params, config, model, left_BT, obs_BTF, action_BTA, time_BT)[0, t]).sum()

    for gradient, last in zip(jax.jit(jax.grad(output, (0, 1, 2)))(*inputs), (t, t, t - 1), strict=True):
        size_T = np.abs(np.asarray(gradient[0])).reshape(T, -1).max(1)
        np.testing.assert_array_equal(size_T > 0, np.arange(T) <= last)
        assert not np.asarray(gradient[1]).any()


@pytest.mark.parametrize("mixer", ["attention", "rglru"])
@pytest.mark.parametrize("space", [SimpleNamespace(n=A), BOX], ids=["discrete", "continuous"])
def test_a_policy_in_use_is_the_parallel_form_of_its_episode(mixer, space):
    """What is left of the target, normalised observations, scaled actions: all as in learning."""
    env = Noise(space)
    config = dt.DTConfig(context=T, horizon=T, updates=1, gradient_steps=2, batch=3)
    algorithm = dt.make(config, env, small(mixer))
    rng = np.random.default_rng(0)
    action_NL = rng.integers(0, A, (7, T)) if hasattr(space, "n") else rng.uniform(space.low, space.high, (7, T, A))
    data = Trajectories(
        obs_NL=jnp.asarray(3 * rng.standard_normal((7, T, F)) + 1, jnp.float32),
        action_NL=jnp.asarray(action_NL, jnp.int32 if hasattr(space, "n") else jnp.float32),
        reward_NL=jnp.asarray(rng.standard_normal((7, T)), jnp.float32),
        mask_NL=jnp.ones((7, T), bool),
        terminated_N=jnp.ones(7, bool),
    )
    state, _ = jax.jit(algorithm.update)(jax.jit(algorithm.init)(jax.random.key(0), dt.DTHyper(0.03), data))
    assert float(state.target) == pytest.approx(float(np.asarray(data.reward_NL).sum(1).max()), rel=1e-5)
    # Larger heads than fresh ones: actions differ.
    state = dt.ask(state._replace(params=jax.tree.map(lambda x: 2 * x, state.params)), 2.5)
    # Collected as observations with rewards.
    used = jax.jit(
        lambda state, key: offline.collect_trajectories(
            key,
            lambda key, seen, memory: algorithm.act(state, key, seen, memory),
            RewardObserved(env),
            None,
            episodes=B,
            horizon=T,
            memory=algorithm.init_memory(B),
            greedy=True,
        )
    )(state, jax.random.key(1))
    reward_BT, rows = np.asarray(used.reward_NL, np.float64), np.asarray(data.obs_NL, np.float64).reshape(-1, F)
    earned_BT = np.concatenate([np.zeros((B, 1)), reward_BT.cumsum(1)[:, :-1]], axis=1)
    left_BT = (2.5 - earned_BT) / np.abs(np.asarray(data.reward_NL).sum(1)).max()
    obs_BTF = (np.asarray(used.obs_NL.obs) - rows.mean(0)) / rows.std(0)
    action_BT = np.asarray(used.action_NL)
    low, high = (None, None) if hasattr(space, "n") else (space.low, space.high)
    embedded_BTA = np.eye(A)[action_BT] if low is None else 2 * (action_BT - low) / (high - low) - 1
    y_BTA = dt.action_outputs(
        state.params,
        config,
        dt.model_config(config, env, small(mixer)),
        *(jnp.asarray(x, jnp.float32) for x in (left_BT, obs_BTF, embedded_BTA)),
        jnp.broadcast_to(jnp.arange(T)[None], (B, T)),
    )
    if low is None:
        assert len(np.unique(action_BT)) > 1
        chosen_BT = np.take_along_axis(np.asarray(y_BTA), action_BT[..., None], -1)[..., 0]
        np.testing.assert_allclose(chosen_BT, y_BTA.max(-1), atol=1e-4)
    else:
        np.testing.assert_allclose(embedded_BTA, np.clip(y_BTA, -1, 1), atol=1e-4)


class Bandit:
    """One step; the reward is the action, or its double less one if it is discrete."""

    default_params = None

    def __init__(self, space: Any):
        self.space = space

    def reset_env(self, key, params):
        return jnp.ones(1), jnp.zeros(())

    def step_env(self, key, state, action, params):
        reward = 2.0 * action - 1 if hasattr(self.space, "n") else action[0]
        return jnp.ones(1), state, reward, jnp.ones((), bool), {}

    def is_truncated(self, state, params):
        return jnp.zeros((), bool)

    def action_space(self, params):
        return self.space

    def observation_space(self, params):
        return SimpleNamespace(shape=(1,))


@pytest.mark.parametrize(
    ("space", "targets"),
    [
        (SimpleNamespace(n=2), (-1.0, 1.0)),
        (SimpleNamespace(shape=(1,), low=np.array([-2.0]), high=np.array([4.0])), (-1.0, 0.0, 3.0)),
    ],
    ids=["discrete", "continuous"],
)
def test_a_bandit_gives_what_is_asked_for(space, targets):
    env = Bandit(space)
    rng = np.random.default_rng(0)
    action_N = rng.integers(0, 2, (101, 1)) if hasattr(space, "n") else rng.uniform(-2, 4, (101, 1, 1))
    reward_N1 = 2.0 * action_N - 1 if hasattr(space, "n") else action_N[..., 0]
    data = Trajectories(
        obs_NL=jnp.ones((101, 1, 1)),
        action_NL=jnp.asarray(action_N, jnp.int32 if hasattr(space, "n") else jnp.float32),
        reward_NL=jnp.asarray(reward_N1, jnp.float32),
        mask_NL=jnp.ones((101, 1), bool),
        terminated_N=jnp.ones(101, bool),
    )
    config = dt.DTConfig(updates=1, gradient_steps=300, batch=64, context=1, horizon=0, warmup=10)
    model = small("attention", layers=1)
    state, metrics = jax.jit(dt.make_train(config, env, model))(jax.random.key(0), data, dt.DTHyper(1e-2))
    algorithm = dt.make(config, env, model)
    assert metrics["loss"].shape == (1,)
    for target in targets:
        asked = dt.ask(state, target)
        episodes = evaluate(algorithm, asked, jax.random.key(1), RewardObserved(env), None, episodes=3, horizon=2)
        np.testing.assert_allclose(episodes.return_B, target, atol=0.15)


def test_updates_go_on_where_they_stopped():
    env, model = Bandit(SimpleNamespace(n=2)), small("rglru", layers=1)
    data = Trajectories(
        jnp.ones((3, 1, 1)),
        jnp.array([[0], [1], [1]]),
        jnp.array([[-1.0], [1.0], [1.0]]),
        jnp.ones((3, 1), bool),
        jnp.ones(3, bool),
    )
    config = dt.DTConfig(updates=2, gradient_steps=3, batch=5, context=2, horizon=3)
    algorithm = dt.make(config, env, model)
    update = jax.jit(algorithm.update)
    state, _ = update(jax.jit(algorithm.init)(jax.random.key(0), dt.DTHyper(), data))
    state, _ = update(state)
    whole, _ = jax.jit(dt.make_train(config, env, model))(jax.random.key(0), data)
    jax.tree.map(np.testing.assert_array_equal, state.params, whole.params)


def test_errors_say_what_is_wrong():
    env = Noise(SimpleNamespace(n=A))
    for options, match in (
        ({"context": 0}, "context is 0"),
        ({"horizon": -1}, "horizon is -1, expected 0 or more"),
        ({"max_grad_norm": -1}, "max_grad_norm is -1, expected a number above 0"),
    ):
        with pytest.raises(ValueError, match=match):
            dt.DTConfig(**options)
    with pytest.raises(ValueError, match="positions of the model are 'learned', expected 'none'"):
        dt.make(dt.DTConfig(), env, replace(small("attention"), positions="learned"))
    with pytest.raises(ValueError, match="not causal"):
        dt.make(dt.DTConfig(), env, replace(small("attention"), causal=False))
    algorithm = dt.make(dt.DTConfig(), env, small("attention"))
    with pytest.raises(TypeError, match="expected Seen, which has the reward"):
        algorithm.act(None, None, jnp.zeros((B, F)), algorithm.init_memory(B))
    assert isinstance(RewardObserved(env).reset_env(jax.random.key(0), None)[0], Seen)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["attention", "rglru"])
def test_cartpole_returns_follow_the_target(mixer):
    """Data: 20 episodes of a good scripted policy, 60 with half of its actions at random, 300 at random. Actions are
    drawn, for a greedy clone of this mixture is good by itself."""
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
    config = dt.DTConfig(updates=1, gradient_steps=1000, batch=32, context=5, horizon=0)
    model = BackboneConfig(inputs=1, mixers=(mixer,) * 2, width=32, mlp=64, attention_heads=2)
    state, _ = jax.jit(dt.make_train(config, env, model))(jax.random.key(0), data, dt.DTHyper(2e-3))
    algorithm = dt.make(config, env, model)
    target_G = jnp.array([10.0, 40.0, 100.0, 200.0])

    @jax.jit
    def returns(state, key):
        def one(target):
            asked = dt.ask(state, target)
            return evaluate(
                algorithm, asked, key, RewardObserved(env), params, episodes=32, horizon=200, greedy=False
            ).return_B.mean()

        return jax.vmap(one)(target_G)

    return_G = np.asarray(returns(state, jax.random.key(1)))

    network = actor_critic((4,), env.action_space(params), MLP((32,)))
    cloning = bc.BCConfig(updates=1, gradient_steps=600, batch=128)
    cloned, _ = jax.jit(bc.make_train(cloning, env, network))(jax.random.key(0), data, bc.BCHyper(3e-3))
    clone = bc.make(cloning, env, network)
    cloned_return = float(
        jax.jit(lambda state, key: evaluate(clone, state, key, env, params, episodes=64, horizon=200, greedy=False))(
            cloned, jax.random.key(1)
        ).return_B.mean()
    )
    assert return_G[-1] > cloned_return + 40
    assert return_G[0] < 40
    assert (np.diff(return_G) > 0).all()
    assert np.corrcoef(target_G, return_G)[0, 1] > 0.95


NODES, LIMIT = 13, 10


class Start(NamedTuple):
    """A node to start from, or -1 for any."""

    start: Any = -1


class Place(NamedTuple):
    node: jax.Array
    time: jax.Array


class Graph:
    """A random graph; an action is the node to go to, which must be a neighbour. Each step costs 1 until node 0."""

    default_params = Start()

    def __init__(self, seed: int, probability: float):
        edges = np.triu(np.random.default_rng(seed).random((NODES, NODES)) < probability, 1)
        self.edges = edges | edges.T
        # Bellman and Ford's shortest paths.
        self.distance = np.where(np.arange(NODES) == 0, 0, NODES)
        for _ in range(NODES):
            for a, b in np.argwhere(self.edges):
                self.distance[a] = min(self.distance[a], self.distance[b] + 1)

    def reset_env(self, key, params):
        node = jnp.where(params.start < 0, jax.random.randint(key, (), 1, NODES), params.start)
        return jax.nn.one_hot(node, NODES), Place(node, jnp.zeros((), jnp.int32))

    def step_env(self, key, state, action, params):
        node = jnp.where(jnp.asarray(self.edges)[state.node, action], action, state.node).astype(jnp.int32)
        return jax.nn.one_hot(node, NODES), Place(node, state.time + 1), -1.0, node == 0, {}

    def is_truncated(self, state, params):
        return state.time >= LIMIT

    def action_space(self, params):
        return SimpleNamespace(n=NODES)

    def observation_space(self, params):
        return SimpleNamespace(shape=(NODES,))


@pytest.mark.slow
def test_random_walks_become_shortest_paths():
    """Figure 2 of Chen et al., arXiv 2106.01345. Of the walks, none that took a shortest path is kept, so that the data
    have one from no start: it has to be put together from the ends of walks."""
    graph = Graph(14, 0.17)
    assert 3 < graph.distance.max() < NODES

    def walk(key, obs_BF, memory):
        return jax.random.categorical(key, jnp.where(jnp.asarray(graph.edges)[obs_BF.argmax(-1)], 0.0, -1e9)), memory

    data = jax.jit(lambda key: offline.collect_trajectories(key, walk, graph, Start(), episodes=4000, horizon=LIMIT))(
        jax.random.key(0)
    )
    start_N, length_N = np.asarray(data.obs_NL[:, 0].argmax(-1)), np.asarray(data.length_N)
    kept_N = ~(np.asarray(data.terminated_N) & (length_N == graph.distance[start_N]))
    data = jax.tree.map(lambda x: x[kept_N], data)
    best_S = np.array([length_N[kept_N & (start_N == node)].min() for node in range(1, NODES)])

    config = dt.DTConfig(updates=1, gradient_steps=1000, batch=128, context=3, horizon=0)
    model = BackboneConfig(inputs=1, mixers=("attention",) * 2, width=32, mlp=64, attention_heads=2)
    state, _ = jax.jit(dt.make_train(config, graph, model))(jax.random.key(0), data, dt.DTHyper(2e-3))
    algorithm = dt.make(config, graph, model)
    shortest_S = graph.distance[1:]

    @jax.jit
    def lengths(state, key):
        def one(start, target):
            asked = dt.ask(state, target)
            return evaluate(
                algorithm, asked, key, RewardObserved(graph), Start(start), episodes=1, horizon=LIMIT
            ).length_B[0]

        return jax.vmap(one)(jnp.arange(1, NODES), -jnp.asarray(shortest_S, jnp.float32))

    length_S = np.asarray(lengths(state, jax.random.key(1)))
    assert (best_S > shortest_S).all()
    assert length_S.mean() < best_S.mean() < length_N.mean()
    assert (length_S == shortest_S).mean() >= 0.75

"""Every algorithm: what it learns in the probe environments, and what holds for a run whatever it learns.

An algorithm learns all probes at once: which one is a parameter of the environment, so it is mapped over like a seed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl import a2c, bc, decision_transformer, dqn, group, ppo, sac
from rl.algorithm import check_finite
from rl.envs.probe import PROBES, Probe, ProbeEnv
from rl.networks import MLP, Memory, actor_critic, q_network, squashed_actor_critics
from rl.offline import Seen, Trajectories, collect_trajectories
from seqmod import BackboneConfig

pytestmark = pytest.mark.usefixtures("quick_compile")

SEEDS = 2
STEPS = 5
"""Of the longest probe."""

UNCHECKED_KEYS = partial(jax.debug_key_reuse, False)
"""JAX's check takes keys that a scan runs over, itself mapped, for used twice; unmapped runs are checked."""


class Choice(NamedTuple):
    """Which environment, by index."""

    index: Any


@dataclass(frozen=True)
class Chosen:
    """One of several probe environments with the same spaces, chosen by the parameters."""

    envs: tuple[ProbeEnv, ...]

    @property
    def default_params(self):
        return Choice(0)

    def reset_env(self, key, params):
        # They draw the same state: a key must not go into branches that may all be computed.
        _, state = self.envs[0].reset_env(key, self.envs[0].default_params)
        features = [lambda time, cue, env=env: jnp.float32(env.feature(time, cue)) for env in self.envs]
        return jax.lax.switch(params.index, features, state.time, state.cue)[None], state

    def step_env(self, key, state, action, params):
        def branch(env):
            return lambda state, action: env.step_env(None, state, action, env.default_params)[:4]

        return *jax.lax.switch(params.index, [branch(env) for env in self.envs], state, action), {}

    def is_truncated(self, state, params):
        limits = jnp.array([env.default_params.max_steps_in_episode for env in self.envs])
        return state.time >= limits[params.index]

    def action_space(self, params):
        return self.envs[0].action_space(self.envs[0].default_params)

    def observation_space(self, params):
        return self.envs[0].observation_space(self.envs[0].default_params)


def broken(continuous: bool) -> ProbeEnv:
    """The second of three observations is not a number."""
    return ProbeEnv(lambda time, cue: jnp.where(time == 1, jnp.nan, 0.0), lambda *_: 1.0, continuous, length=2)


def probes(continuous: bool) -> list[Probe]:
    return [probe for probe in PROBES if probe.env.continuous == continuous]


def environment(continuous: bool) -> Chosen:
    """All probes of a kind, in order, and then the broken one."""
    return Chosen((*(probe.env for probe in probes(continuous)), broken(continuous)))


def with_mlp(space):
    return actor_critic((1,), space, MLP((16,)))


def squashed(space):
    return actor_critic((1,), space, MLP((16,)), squashed=True)


def with_memory(space):
    backbone = BackboneConfig(inputs=1, mixers=("rglru",), width=16, mlp=16)
    return actor_critic((1,), space, Memory(backbone, MLP((16,), "relu")))


def with_q(space):
    return q_network((1,), space, MLP((16,)))


def with_critics(space):
    return squashed_actor_critics((1,), space, MLP((16, 16), "relu"))


def value(network, params, obs_NF, memory):
    return network.step(params, obs_NF, memory)[0][1]


def best_q(network, params, obs_NF, memory):
    return network.step(params, obs_NF, memory)[0].max(-1)


def q_of_mean(network, params, obs_NF, memory):
    (mean, _), _ = network.actor.step(params.actor, obs_NF, memory)
    return network.critics.step(params.critics, (obs_NF, jnp.tanh(mean)), ())[0].min(0)


@dataclass(frozen=True)
class Row:
    """An algorithm: what it learns the probes with, and a small config for what does not depend on learning. `value`
    gives the values that it has learned, if any, of (network, params, obs_NF, memory)."""

    name: str
    module: Any
    continuous: bool
    network: Callable[[Any], Any]
    config: Any
    hyper: Any
    tiny: Any
    value: Callable[..., jax.Array] | None = value

    def build(self):
        env = environment(self.continuous)
        return env, self.network(env.action_space(env.default_params))


PPO = ppo.PPOConfig(environments=8, steps=8, updates=120, minibatches=2)
LONGER = replace(PPO, environments=16, updates=160)
PPO_HYPER = ppo.PPOHyper(learning_rate=1e-2, discount=0.9, entropy=0.0)
PPO_TINY = ppo.PPOConfig(environments=6, steps=5, updates=3, epochs=2, minibatches=2)
A2C = a2c.A2CConfig(environments=16, steps=5, updates=600, optimiser="adam")
A2C_HYPER = a2c.A2CHyper(learning_rate=1e-2, discount=0.9, entropy=0.0)
A2C_TINY = a2c.A2CConfig(environments=6, steps=5, updates=3)
REINFORCE = replace(A2C, baseline=False, environments=32)
GROUP = group.GroupConfig(groups=4, episodes=8, horizon=STEPS, updates=200, epochs=2, minibatches=2)
GROUP_HYPER = group.GroupHyper(learning_rate=1e-2)
GROUP_TINY = group.GroupConfig(groups=2, episodes=3, horizon=4, updates=3, epochs=2, minibatches=2)
DQN = dqn.DQNConfig(environments=8, steps=16, updates=60, capacity=512, learning_starts=64, batch=32, target_period=1)
DQN_HYPER = dqn.DQNHyper(learning_rate=1e-2, discount=0.9, tau=0.1)
DQN_TINY = dqn.DQNConfig(environments=3, steps=5, updates=3, capacity=24, learning_starts=9, batch=7)
SAC = sac.SACConfig(
    environments=8, steps=16, updates=200, capacity=4096, learning_starts=256, gradient_steps=2, batch=128
)
SAC_HYPER = sac.SACHyper(learning_rate=5e-3, discount=0.9, tau=0.1, temperature=0.1)
SAC_TINY = sac.SACConfig(environments=3, steps=5, updates=3, capacity=24, learning_starts=9, gradient_steps=2, batch=7)

MEMORY = Row("ppo-memory", ppo, False, with_memory, PPO, PPO_HYPER, PPO_TINY)
ROWS = (
    Row("ppo", ppo, False, with_mlp, PPO, PPO_HYPER, PPO_TINY),
    Row("ppo-continuous", ppo, True, with_mlp, PPO, PPO_HYPER, PPO_TINY),
    # All of a network moves its spread, which at 1e-2 vanishes before the mean is right.
    Row("ppo-squashed", ppo, True, squashed, LONGER, PPO_HYPER._replace(learning_rate=3e-3), PPO_TINY),
    MEMORY,
    Row("ppo-memory-continuous", ppo, True, with_memory, LONGER, PPO_HYPER, PPO_TINY),
    Row("a2c", a2c, False, with_mlp, A2C, A2C_HYPER, A2C_TINY),
    Row("a2c-continuous", a2c, True, with_mlp, A2C, A2C_HYPER, A2C_TINY),
    Row("a2c-memory", a2c, False, with_memory, replace(A2C, updates=300), A2C_HYPER, A2C_TINY),
    Row("reinforce", a2c, False, with_mlp, REINFORCE, A2C_HYPER, replace(A2C_TINY, baseline=False), None),
    Row("group", group, False, with_mlp, GROUP, GROUP_HYPER, GROUP_TINY, None),
    Row("group-continuous", group, True, with_mlp, GROUP, GROUP_HYPER, GROUP_TINY, None),
    Row("group-memory", group, False, with_memory, replace(GROUP, level="sequence"), GROUP_HYPER, GROUP_TINY, None),
    Row("dqn", dqn, False, with_q, DQN, DQN_HYPER, DQN_TINY, best_q),
    Row("sac", sac, True, with_critics, SAC, SAC_HYPER, SAC_TINY, q_of_mean),
)


class Learned(NamedTuple):
    """Of probe P and seed S: values and greedy actions at the probe's observations, and mean returns of U updates."""

    value_PSNT: np.ndarray | None
    action_PSNT: np.ndarray
    return_PSU: np.ndarray


def padded(obs_NTF: np.ndarray) -> np.ndarray:
    """One shape for all probes: what is added comes after what counts."""
    return np.pad(obs_NTF, ((0, 2 - obs_NTF.shape[0]), (0, STEPS - obs_NTF.shape[1]), (0, 0)), mode="edge")


def studied(row: Row) -> list[Probe]:
    """All, as what is not learned is of interest too; but with a memory only the one that needs it."""
    everything = probes(row.continuous)
    return [probe for probe in everything if not probe.markov] if row.network is with_memory else everything


@cache
def learn(row: Row) -> Learned:
    env, network = row.build()
    algorithm = row.module.make(row.config, env, network)
    train = row.module.make_train(row.config, env, network)

    def one(key, index, obs_NTF):
        state, metrics = train(key, row.hyper, Choice(index))

        def look(memory, obs_NF):
            value = () if row.value is None else row.value(network, state.params, obs_NF, memory)
            action, memory = algorithm.act(state, None, obs_NF, memory)
            return memory, (value, action)

        _, seen = jax.lax.scan(look, algorithm.init_memory(len(obs_NTF)), jnp.swapaxes(obs_NTF, 0, 1))
        return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), seen), metrics["episode_return"]

    obs_PNTF = np.stack([padded(probe.observation_NTF) for probe in studied(row)])
    index_P = np.array([probes(row.continuous).index(probe) for probe in studied(row)])
    over_seeds = jax.vmap(one, in_axes=(0, None, None))
    # Runs long enough that optimised code is worth its compilation.
    optimised = {"xla_backend_optimization_level": 1}
    over_probes = jax.jit(jax.vmap(over_seeds, in_axes=(None, 0, 0)), compiler_options=optimised)
    keys = jax.random.split(jax.random.key(0), SEEDS)
    with UNCHECKED_KEYS():
        (value, action), returns = jax.device_get(over_probes(keys, index_P, obs_PNTF))
    return Learned(None if row.value is None else value, action, returns)


EXPECTED = [(row, probe) for row in ROWS for probe in studied(row) if probe.markov or row.network is with_memory]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "probe"), [pytest.param(row, probe, id=f"{row.name}-{probe.name}") for row, probe in EXPECTED]
)
def test_values_and_actions_are_learned(row, probe):
    learned, index = learn(row), studied(row).index(probe)
    N, T = probe.matters_NT.shape
    if learned.value_PSNT is not None:
        expected = np.broadcast_to(probe.values(row.hyper.discount), (SEEDS, N, T))
        np.testing.assert_allclose(learned.value_PSNT[index][:, :N, :T], expected, rtol=0, atol=0.1)
    for action_NT in learned.action_PSNT[index][:, :N, :T]:
        chosen, best = action_NT[probe.matters_NT], probe.action_NT[probe.matters_NT]
        np.testing.assert_allclose(chosen, best, rtol=0, atol=0.1 if row.continuous else 0)


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in ROWS if row.network is not with_memory], ids=lambda row: row.name)
def test_without_memory_the_memory_probe_stays_at_chance(row):
    """Half of the two cues' rewards; or a squared distance of 1 from both cues, at the least."""
    learned, index = learn(row), [probe.markov for probe in studied(row)].index(False)
    for return_U in learned.return_PSU[index]:
        late = return_U[len(return_U) // 2 :].mean()
        assert late < -0.9 if row.continuous else 0.4 < late < 0.6


# Offline algorithms


@dataclass(frozen=True)
class Offline:
    """An algorithm that learns the best actions from those of a uniform policy, and what it learns them with: of the
    probe that needs a `memory`, or of the others."""

    name: str
    module: Any
    continuous: bool
    network: Callable[[Any], Any]
    config: Any
    hyper: Any
    memory: bool = False


def with_model(space):
    return BackboneConfig(inputs=1, mixers=("rglru",), width=16, mlp=64)


BC = bc.BCConfig(updates=1, gradient_steps=300, batch=128, top=0.4)
BC_CONTINUOUS = replace(BC, top=0.1)
BC_HYPER = bc.BCHyper(learning_rate=3e-3)
DT = decision_transformer.DTConfig(updates=1, gradient_steps=300, batch=128, context=1, horizon=0, warmup=10)
DT_CONTINUOUS = replace(DT, gradient_steps=1000)
DT_MEMORY = replace(DT, gradient_steps=400, context=4, horizon=4)
DT_HYPER = decision_transformer.DTHyper(learning_rate=5e-3)

OFFLINE = (
    Offline("bc", bc, False, with_mlp, BC, BC_HYPER),
    Offline("bc-continuous", bc, True, with_mlp, BC_CONTINUOUS, BC_HYPER),
    Offline("bc-memory", bc, False, with_memory, BC, BC_HYPER, memory=True),
    Offline("bc-memory-continuous", bc, True, with_memory, BC_CONTINUOUS, BC_HYPER, memory=True),
    Offline("dt", decision_transformer, False, with_model, DT, DT_HYPER),
    Offline("dt-continuous", decision_transformer, True, with_model, DT_CONTINUOUS, DT_HYPER),
    Offline("dt-memory", decision_transformer, False, with_model, DT_MEMORY, DT_HYPER, memory=True),
)


def decided(row: Offline) -> list[Probe]:
    """Those that have a best action."""
    return [probe for probe in probes(row.continuous) if probe.matters_NT.any() and probe.markov != row.memory]


@cache
def by_chance(continuous: bool) -> Trajectories:
    """Of a uniform policy in each of the probes, leaves (P, N, ...)."""
    env = environment(continuous)

    def act(key, obs_B, memory):
        return jnp.zeros(
            (len(obs_B), 1) if continuous else len(obs_B), jnp.float32 if continuous else jnp.int32
        ), memory

    def some(key, index):
        # Fewer than are cut down in collecting: that would be one more program to compile.
        return collect_trajectories(key, act, env, Choice(index), episodes=61, horizon=STEPS, epsilon=1.0)

    keys, index_P = jax.random.split(jax.random.key(0), 32), np.arange(len(probes(continuous)))
    with UNCHECKED_KEYS():
        data = jax.jit(jax.vmap(jax.vmap(some, (0, None)), (None, 0)))(keys, index_P)
    return jax.tree.map(lambda x: x.reshape(len(index_P), -1, *x.shape[3:]), data)


@cache
def learn_offline(row: Offline) -> tuple[np.ndarray, np.ndarray | None]:
    """Of probe P and seed S: greedy actions (P, S, N, T, ...) at the probe's observations, and those of a Decision
    Transformer that is asked for the worst return."""
    env = environment(row.continuous)
    network = row.network(env.action_space(env.default_params))
    algorithm = row.module.make(row.config, env, network)
    train = row.module.make_train(row.config, env, network)

    def actions(state, obs_NTF):
        def look(memory, obs_NF):
            # No reward comes before the action that matters.
            seen = Seen(obs_NF, jnp.zeros(len(obs_NF))) if row.module is decision_transformer else obs_NF
            action, memory = algorithm.act(state, None, seen, memory)
            return memory, action

        _, action_TN = jax.lax.scan(look, algorithm.init_memory(len(obs_NTF)), jnp.swapaxes(obs_NTF, 0, 1))
        return jnp.swapaxes(action_TN, 0, 1)

    def one(key, data, obs_NTF):
        state, _ = train(key, data, row.hyper)
        if row.module is bc:
            return actions(state, obs_NTF), None
        worst = decision_transformer.ask(state, data.return_N.min())
        return actions(state, obs_NTF), actions(worst, obs_NTF)

    obs_PNTF = np.stack([padded(probe.observation_NTF) for probe in decided(row)])
    index_P = np.array([probes(row.continuous).index(probe) for probe in decided(row)])
    data = jax.tree.map(lambda x: x[index_P], by_chance(row.continuous))
    over_seeds = jax.vmap(one, in_axes=(0, None, None))
    over_probes = jax.jit(jax.vmap(over_seeds, in_axes=(None, 0, 0)))
    with UNCHECKED_KEYS():
        return jax.device_get(over_probes(jax.random.split(jax.random.key(1), SEEDS), data, obs_PNTF))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "probe"),
    [pytest.param(row, probe, id=f"{row.name}-{probe.name}") for row in OFFLINE for probe in decided(row)],
)
def test_the_best_actions_are_learned_from_those_of_chance(row, probe):
    """By cloning the best episodes, or by asking for the best return; asked for the worst, a Decision Transformer takes
    the other of two actions. With continuous ones it learns the mean of those with about the same return: less closely,
    in a range of 4."""
    index = decided(row).index(probe)
    best_PSNT, worst_PSNT = learn_offline(row)
    N, T = probe.matters_NT.shape
    best = probe.action_NT[probe.matters_NT]
    close = (0.1 if row.module is bc else 0.2) if row.continuous else 0
    for action_NT in best_PSNT[index][:, :N, :T]:
        np.testing.assert_allclose(action_NT[probe.matters_NT], best, rtol=0, atol=close)
    if worst_PSNT is not None and not row.continuous:
        for action_NT in worst_PSNT[index][:, :N, :T]:
            np.testing.assert_array_equal(action_NT[probe.matters_NT], 1 - best)


# What holds for every run

TINY = [row for row in ROWS if row.name in ("ppo", "a2c", "reinforce", "group", "dqn", "sac")]
EACH = pytest.mark.parametrize("row", TINY, ids=lambda row: row.name)
UPDATES = 3
TASK = [probe.name.split("-")[0] for probe in probes(False)].index("policy_and_value")
BROKEN = len(probes(False))


@cache
def step_by_step(row: Row) -> Callable[..., tuple[Any, Any]]:
    """A run as a function that calls the update in a Python loop: (key, hyper, index) to (state, metrics)."""
    algorithm = row.module.make(row.tiny, *row.build())
    init, update = jax.jit(algorithm.init), jax.jit(algorithm.update)

    def run(key, hyper, index):
        state, metrics = init(key, hyper, Choice(jnp.int32(index))), []
        for _ in range(UPDATES):
            state, metric = update(state)
            metrics.append(metric)
        return state, jax.tree.map(lambda *x: jnp.stack(x), *metrics)

    return run


def numbers(run: Any) -> Any:
    """Arrays of a run, with keys as their numbers."""

    def plain(x):
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    return jax.device_get(jax.tree.map(plain, run))


def faster(hyper: Any) -> Any:
    return hyper._replace(learning_rate=3 * hyper.learning_rate)


@EACH
def test_the_same_key_gives_the_same_run_and_another_another(row):
    run = step_by_step(row)
    one, same, other = (numbers(run(jax.random.key(seed), row.hyper, TASK)) for seed in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    a, b = (np.concatenate([x.ravel() for x in jax.tree.leaves(run[0].params)]) for run in (one, other))
    assert (a != b).mean() > 0.5


@EACH
def test_a_run_mapped_over_seeds_and_hyperparameters_is_each_of_them_update_by_update(row):
    run, train = step_by_step(row), row.module.make_train(row.tiny, *row.build())
    hypers = [row.hyper, faster(row.hyper)]
    singles = [numbers(run(jax.random.key(seed), hyper, TASK)) for seed, hyper in enumerate(hypers)]
    with UNCHECKED_KEYS():
        both = jax.jit(jax.vmap(lambda key, hyper: train(key, hyper, Choice(jnp.int32(TASK)))))
        keys = jnp.stack([jax.random.key(0), jax.random.key(1)])
        mapped = numbers(both(keys, jax.tree.map(lambda *x: jnp.array(x), *hypers)))
    for seed, single in enumerate(singles):
        jax.tree.map(
            lambda a, b, seed=seed: np.testing.assert_allclose(a[seed], b, rtol=1e-3, atol=1e-5), mapped, single
        )
    slow = numbers(run(jax.random.key(1), row.hyper, TASK))[0].params
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (slow, singles[1][0].params)), strict=True))


@EACH
def test_observations_that_are_not_finite_are_counted_and_refused(row):
    run = step_by_step(row)
    _, good = run(jax.random.key(0), row.hyper, TASK)
    assert not good["bad_observations"].any()
    check_finite(good)
    _, bad = run(jax.random.key(0), row.hyper, BROKEN)
    assert bad["bad_observations"][0] > 0
    with pytest.raises(FloatingPointError, match="observations are not finite in update 0"):
        check_finite(bad)


@EACH
def test_observations_are_normalised_by_those_that_were_acted_on(row):
    """Not by the last one of an episode, which no action follows."""
    env = ProbeEnv(lambda time, cue: jnp.where(time == 0, cue, 9.0), lambda *_: 1.0, row.continuous)
    config = replace(row.tiny, normalise_observations=True)
    algorithm = row.module.make(config, env, row.network(env.action_space(env.default_params)))
    state = algorithm.init(jax.random.key(0), row.hyper, env.default_params)
    seen = jax.jit(algorithm.update)(state)[0].observations
    assert abs(seen.mean) < 1
    # Of observations that are -1 or 1; the start has the weight of 1e-4 samples.
    np.testing.assert_allclose(seen.variance, 1 - np.square(seen.mean), rtol=1e-3)


def test_reinforce_counts_the_episodes_that_it_learns_from():
    """The first of each environment: those that end in time after it are the short ones."""
    row = next(row for row in TINY if row.name == "reinforce")
    env = ProbeEnv(lambda time, cue: cue, lambda *_: 1.0, False, length=2)
    algorithm = row.module.make(row.tiny, env, row.network(env.action_space(env.default_params)))
    state = algorithm.init(jax.random.key(0), row.hyper, env.default_params)
    assert row.tiny.steps > 2 * env.length
    assert jax.jit(algorithm.update)(state)[1]["episodes"] == row.tiny.environments


@pytest.mark.parametrize("row", [row for row in TINY if row.module is not sac], ids=lambda row: row.name)
def test_a_learning_rate_that_has_fallen_to_nothing_stays_there(row):
    """Updates beyond those of the config change nothing; the learning rate must not become negative."""
    algorithm = row.module.make(replace(row.tiny, anneal=True), *row.build())
    update = jax.jit(algorithm.update)
    state = algorithm.init(jax.random.key(0), row.hyper, Choice(jnp.int32(TASK)))
    for _ in range(UPDATES):
        state, _ = update(state)
    after, metrics = update(state._replace(update=state.update + 2))
    assert metrics["grad_norm"] > 0
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)


@EACH
def test_rollouts_of_length_zero_are_refused(row):
    name = "horizon" if row.module is group else "steps"
    with pytest.raises(ValueError, match=f"{name} is 0, expected at least 1"):
        replace(row.tiny, **{name: 0})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: ppo.PPOConfig(environments=5, steps=7, minibatches=3), "minibatches 3"),
        (lambda: group.GroupConfig(groups=3, episodes=5, minibatches=2), "minibatches 2"),
        (lambda: ppo.make(ppo.PPOConfig(environments=5, steps=6, minibatches=3), *MEMORY.build()), "minibatches 3"),
    ],
    ids=["ppo", "group", "ppo-memory"],
)
def test_minibatches_that_do_not_divide_are_refused(config, message):
    with pytest.raises(ValueError, match=f"not divisible by {message}"):
        config()


class Words:
    """A space of no known kind."""


@EACH
def test_actions_of_the_wrong_kind_are_refused(row, monkeypatch):
    env, network = row.build()
    monkeypatch.setattr(Chosen, "action_space", lambda self, params: Words())
    with pytest.raises(ValueError, match="action space is Words, expected a"):
        row.module.make(row.tiny, env, network)


@pytest.mark.parametrize("row", [row for row in TINY if row.name in ("dqn", "sac")], ids=lambda row: row.name)
def test_dqn_and_sac_refuse_each_others_actions(row):
    expected = "Discrete" if row.module is dqn else "Box"
    with pytest.raises(ValueError, match=f"expected a {expected}"):
        row.module.make(row.tiny, environment(not row.continuous), row.build()[1])

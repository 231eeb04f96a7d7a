"""Probe environments: every step as described, and their answers against dynamic programming by hand and by search."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.envs.probe import BOUND, PROBES, ProbeEnv, memory, truncation

pytestmark = pytest.mark.usefixtures("quick_compile")

NAMES = [probe.name for probe in PROBES]
each_probe = pytest.mark.parametrize("probe", PROBES, ids=NAMES)
LENGTH = {"discounted_value": 2, "truncation": 5, "memory": 4}


def play(probe, actions, seed):
    """One episode by `step_env`: the cue, observations (T + 1,), rewards, terminated and truncated (T,)."""
    env, params = probe.env, probe.env.default_params
    k_reset, k_step = jax.random.split(jax.random.key(seed))
    obs_F, state = env.reset_env(k_reset, params)
    assert obs_F.shape == (1,)
    assert obs_F.dtype == jnp.float32
    cue, seen, rewards, flags = float(state.cue), [float(obs_F[0])], [], []
    for time, action in enumerate(actions):
        key = jax.random.fold_in(k_step, time)
        obs_F, state, reward, terminated, info = env.step_env(key, state, jnp.asarray(action), params)
        assert reward.dtype == jnp.float32
        assert info["discount"] == 1 - terminated
        seen.append(float(obs_F[0]))
        rewards.append(float(reward))
        flags.append((bool(terminated), bool(env.is_truncated(state, params))))
    return cue, seen, rewards, flags


def described(name, cue, actions):
    """Observations and rewards of an episode, written again from the description."""
    name, continuous = name.split("-")[0], name.endswith("continuous")

    def similarity(action, target, index):
        return -((min(max(action, -2), 2) - target) ** 2) if continuous else float(action == index)

    index = 0 if cue < 0 else 1
    if name == "constant_value":
        return [0, 0], [1]
    if name == "observed_value":
        return [cue, cue], [cue]
    if name == "discounted_value":
        return [0, 1, 1], [0, 1]
    if name == "policy":
        return [0, 0], [similarity(actions[0], 0.5, 1) if continuous else (-1, 1)[actions[0]]]
    if name == "policy_and_value":
        return [cue, cue], [similarity(actions[0], cue, index)]
    if name == "truncation":
        return [0] * 6, [1] * 5
    return [cue, 0, 0, 0, 0], [0, 0, 0, similarity(actions[3], cue, index)]


@each_probe
def test_every_episode_is_as_described(probe):
    name, continuous = probe.name.split("-")[0], probe.env.continuous
    length = LENGTH.get(name, 1)
    choices = (-3.0, -1.0, 0.25, 1.0) if continuous else (0, 1)
    cues, rng = set(), np.random.default_rng(0)
    for seed in range(12):
        actions = [choices[i] for i in rng.integers(len(choices), size=length)]
        cue, seen, rewards, flags = play(probe, [np.array([a]) if continuous else a for a in actions], seed)
        expected_seen, expected_rewards = described(probe.name, cue, actions)
        np.testing.assert_array_equal(seen, expected_seen)
        np.testing.assert_allclose(rewards, expected_rewards, rtol=1e-6)
        last = (False, True) if name == "truncation" else (True, False)
        assert flags == [(False, False)] * (length - 1) + [last]
        cues.add(cue)
    assert cues == {-1.0, 1.0}


def test_cues_are_even():
    env = PROBES[2].env
    keys = jax.random.split(jax.random.key(0), 4000)
    obs_EF, _ = jax.vmap(env.reset_env, in_axes=(0, None))(keys, env.default_params)
    assert abs(float(obs_EF.mean())) < 0.05


@each_probe
def test_the_answers_are_the_best(probe):
    """Values by the best actions, and no other actions do better: discrete ones all tried, continuous ones a grid."""
    discount, env = 0.9, probe.env
    episodes, steps = probe.observation_NTF.shape[:2]
    values_NT = probe.values(discount)
    assert values_NT.shape == probe.matters_NT.shape == probe.action_NT.shape[:2] == (episodes, steps)
    choices = np.linspace(-BOUND, BOUND, 17)[:, None] if env.continuous else np.arange(2)
    seen = {}
    for seed in range(12):
        obs = play(probe, [probe.action_NT[0, t] for t in range(steps)], seed)[1][:steps]
        episode = [i for i in range(episodes) if np.array_equal(probe.observation_NTF[i, :, 0], obs)]
        assert len(episode) == 1
        seen[episode[0]] = seed
    assert set(seen) == set(range(episodes))
    for n, seed in seen.items():
        # An endless task goes on as it was: the value of what follows the last step is that of the last step.
        after = values_NT[n, -1] if env.endless else 0.0

        def returns(actions, seed=seed, after=after):
            out = [after]
            for reward in reversed(play(probe, actions, seed)[2]):
                out.insert(0, reward + discount * out[0])
            return np.array(out[:-1])

        best = list(probe.action_NT[n])
        np.testing.assert_allclose(returns(best), values_NT[n], rtol=1e-5, atol=1e-6)
        for t, choice in product(range(steps), choices):
            change = [*best[:t], choice, *best[t + 1 :]]
            different = not np.array_equal(choice, best[t])
            loss = values_NT[n, 0] - returns(change)[0]
            if different and probe.matters_NT[n, t]:
                assert loss > 1e-2
            else:
                np.testing.assert_allclose(loss, 0.0, atol=1e-5)


@each_probe
def test_spaces_hold_what_happens(probe):
    env, params = probe.env, probe.env.default_params
    space, obs_space = env.action_space(params), env.observation_space(params)
    for action in probe.action_NT.reshape(-1, *space.shape):
        assert space.contains(action)
        assert action.dtype == space.dtype
    for obs_F in probe.observation_NTF.reshape(-1, 1):
        assert obs_space.contains(obs_F)
    assert env.num_actions == (1 if env.continuous else 2)
    # A best action on a bound could be found by an unscaled or an exploding policy.
    if env.continuous:
        assert np.abs(probe.action_NT).max() < BOUND


@each_probe
def test_through_the_interface_of_gymnax(probe):
    """Auto-reset, under jit, vmap and scan: rewards of the best policy per episode, and flags that never coincide."""
    env, params = probe.env, probe.env.default_params
    steps = 3 * probe.observation_NTF.shape[1]

    @jax.jit
    def run(key):
        obs_EF, state = jax.vmap(env.reset, in_axes=(0, None))(jax.random.split(key, 7), params)

        def step(carry, key):
            obs_EF, state = carry
            action_E = jnp.zeros((7, 1)) if env.continuous else jnp.zeros(7, jnp.int32)
            keys = jax.random.split(key, 7)
            obs_EF, state, reward_E, terminated_E, truncated_E, info = jax.vmap(env.step, in_axes=(0, 0, 0, None))(
                keys, state, action_E, params
            )
            return (obs_EF, state), (reward_E, terminated_E, truncated_E, info["final_observation"], state.time)

        keys = jax.random.split(jax.random.fold_in(key, 1), steps)
        return jax.lax.scan(step, (obs_EF, state), keys)[1]

    reward_TE, terminated_TE, truncated_TE, final_TEF, time_TE = run(jax.random.key(3))
    ended = (np.arange(steps) + 1) % (steps // 3) == 0
    expected = np.broadcast_to(ended[:, None], (steps, 7))
    np.testing.assert_array_equal(truncated_TE if env.endless else terminated_TE, expected)
    assert not (terminated_TE if env.endless else truncated_TE).any()
    np.testing.assert_array_equal(
        time_TE, np.broadcast_to(((np.arange(steps) + 1) % (steps // 3))[:, None], (steps, 7))
    )
    assert np.isfinite(reward_TE).all()
    assert final_TEF.shape == (steps, 7, 1)


def test_all_are_there_in_both_variants():
    assert len(PROBES) == 14
    assert len(set(NAMES)) == 14
    assert {name.split("-")[1] for name in NAMES} == {"discrete", "continuous"}
    assert [probe.name for probe in PROBES if not probe.markov] == ["memory-discrete", "memory-continuous"]


def test_sizes_are_arguments():
    assert memory(continuous=False, blanks=7).observation_NTF.shape == (2, 8, 1)
    assert memory(continuous=False, blanks=0).markov
    np.testing.assert_allclose(memory(continuous=False, blanks=2).values(0.5), [[0.25, 0.5, 1]] * 2)
    longer = truncation(continuous=False, steps=9)
    assert longer.env.default_params.max_steps_in_episode == 9
    np.testing.assert_allclose(longer.values(0.75), np.full((1, 9), 4))
    with pytest.raises(ValueError, match="ProbeEnv: length is 0"):
        ProbeEnv(lambda time, cue: 0, lambda time, cue, action: 0, False, length=0)


def test_without_memory_half_is_the_best():
    """Policies that see only the blank, enumerated over both cues: the mean reward is 1/2 or at most -1."""
    for probe in (memory(continuous=False), memory(continuous=True)):
        seeds = {play(probe, [probe.action_NT[0, 0]] * 4, seed)[0]: seed for seed in range(12)}
        choices = np.linspace(-BOUND, BOUND, 9)[:, None] if probe.env.continuous else np.arange(2)
        means = [np.mean([sum(play(probe, [a] * 4, seed)[2]) for seed in seeds.values()]) for a in choices]
        assert len(seeds) == 2
        np.testing.assert_allclose(max(means), -1 if probe.env.continuous else 0.5, atol=1e-6)

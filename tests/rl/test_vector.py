"""Environments stepped together: gymnax's own step, step for step; statistics, resets and parameters."""

from dataclasses import dataclass

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl import vector

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.mark.parametrize("name", ["CartPole-v1", "FourRooms-misc", "Catch-bsuite"])
def test_a_step_is_that_of_gymnax_resets_included(name):
    env, params = gymnax.make(name)
    steps, count = 61, 5
    keys_E = jax.random.split(jax.random.key(0), count)
    keys_TE = jax.random.split(jax.random.key(1), (steps, count))
    action_TE = jax.random.randint(jax.random.key(2), (steps, count), 0, env.num_actions)

    def ours(envs, x):
        envs, outcome = vector.step(*x[:1], envs, x[1], env, params)
        return envs, (envs.obs, outcome)

    @jax.jit
    def gymnaxes(state, keys_E, action_E):
        step = jax.vmap(env.step, in_axes=(0, 0, 0, None))
        obs, state, reward, terminated, truncated, info = step(keys_E, state, action_E, params)
        return state, (obs, reward, terminated, truncated, info["final_observation"])

    envs = vector.reset(keys_E, env, params)
    obs_E, state = jax.vmap(env.reset, in_axes=(0, None))(jax.random.clone(keys_E), params)
    assert (envs.obs == obs_E).all()
    _, (obs_TE, outcome) = jax.jit(lambda: jax.lax.scan(ours, envs, (keys_TE, action_TE)))()
    again_TE = jax.random.clone(keys_TE)
    for t in range(steps):  # a loop: gymnax's states change their type in a scan
        state, wanted = gymnaxes(state, again_TE[t], action_TE[t])
        got = (obs_TE[t], outcome.reward_E[t], outcome.terminated_E[t], outcome.truncated_E[t], outcome.final_obs[t])
        for a, b in zip(got, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # compiled apart: to rounding
    assert outcome.done_E.any() or name == "FourRooms-misc"


def play(tiny, params, actions_TE, resets=None, seed=3):
    """Outcomes (T, E) and what was there before and after each step."""
    steps, count = actions_TE.shape
    envs = vector.reset(jax.random.split(jax.random.key(seed), count), tiny, params)
    keys_TE = jax.random.split(jax.random.key(seed + 1), (steps, count))

    def one(envs, x):
        after, outcome = vector.step(x[0], envs, x[1], tiny, params, resets=resets)
        return after, (envs, after, outcome)

    return jax.jit(lambda: jax.lax.scan(one, envs, (keys_TE, actions_TE))[1])()


def test_statistics_are_those_of_each_episode_by_itself(tiny):
    params = tiny.params(longest=7, max_steps=4, step_reward=0.5)
    actions_TE = jax.random.randint(jax.random.key(0), (37, 5), 0, 3)
    before, _, outcome = play(tiny, params, actions_TE)
    for e in range(5):
        total, length = 0.0, 0
        for t in range(37):
            assert before.first_E[t, e] == (length == 0)
            total, length = total + float(outcome.reward_E[t, e]), length + 1
            assert outcome.return_E[t, e] == pytest.approx(total)
            assert outcome.length_E[t, e] == length
            if outcome.done_E[t, e]:
                assert length == 4 or outcome.terminated_E[t, e]
                total, length = 0.0, 0
    # An episode of just 4 steps reaches both ends at once, and has terminated.
    assert not (outcome.terminated_E & outcome.truncated_E).any()
    assert outcome.terminated_E.any()
    assert outcome.truncated_E.any()
    metrics = vector.episode_metrics(outcome)
    done = np.asarray(outcome.done_E)
    assert metrics["episodes"] == done.sum()
    assert metrics["episode_return"] == pytest.approx(np.asarray(outcome.return_E)[done].mean(), rel=1e-6)
    assert metrics["episode_length"] == pytest.approx(np.asarray(outcome.length_E)[done].mean(), rel=1e-6)


def test_without_a_finished_episode_there_is_no_mean(tiny):
    outcome = play(tiny, tiny.params(longest=1, max_steps=9), jnp.zeros((1, 2), jnp.int32))[2]
    none = outcome._replace(terminated_E=jnp.zeros((1, 2), bool))
    assert np.isnan(vector.episode_metrics(none)["episode_return"])
    assert vector.episode_metrics(none)["episodes"] == 0


def test_the_final_observation_is_the_ended_episodes_own(tiny):
    params = tiny.params(longest=3)
    before, after, outcome = play(tiny, params, jnp.zeros((23, 5), jnp.int32))
    own = jax.vmap(jax.vmap(tiny.observe))(before.state._replace(time=before.state.time + 1))
    np.testing.assert_array_equal(outcome.final_obs, own)
    fresh = jax.vmap(jax.vmap(tiny.observe))(after.state)
    np.testing.assert_array_equal(after.obs, fresh)
    assert (np.asarray(after.obs) != np.asarray(outcome.final_obs)).any()


def test_few_fresh_starts_are_shared_only_where_too_many_end_at_once():
    class Numbered:
        """Its state is the key it was started with; it ends when told to."""

        def reset_env(self, key, params):
            start = jax.random.key_data(key)[0].astype(jnp.uint32)
            return start.astype(jnp.float32), start

        def step_env(self, key, state, action, params):
            return state.astype(jnp.float32), state, 0.0, action == 1, {}

        def is_truncated(self, state, params):
            return jnp.zeros((), bool)

    env, count = Numbered(), 7
    envs = vector.reset(jax.random.split(jax.random.key(0), count), env, None)
    for ending, distinct in (([1, 5], 2), ([0, 2, 3], 3), ([0, 1, 2, 4, 6], 3)):
        action_E = jnp.zeros(count, jnp.int32).at[jnp.array(ending)].set(1)
        after, outcome = vector.step(jax.random.split(jax.random.key(1), count), envs, action_E, env, None, resets=3)
        changed = np.flatnonzero(np.asarray(after.state != envs.state))
        np.testing.assert_array_equal(changed, ending)
        assert len(set(np.asarray(after.state)[ending].tolist())) == distinct
        np.testing.assert_array_equal(np.flatnonzero(np.asarray(outcome.done_E)), ending)


def test_each_environment_may_have_parameters_of_its_own(tiny):
    params = tiny.params(longest=jnp.ones(3, jnp.int32) * 9, max_steps=jnp.array([1, 2, 5]), step_reward=jnp.zeros(3))
    params = params._replace(final_reward=jnp.zeros(3))
    envs = vector.reset(jax.random.split(jax.random.key(0), 3), tiny, params, params_axis=0)
    envs = envs._replace(state=envs.state._replace(length=jnp.full(3, 9)))
    _, outcome = vector.step(
        jax.random.split(jax.random.key(1), 3), envs, jnp.zeros(3, jnp.int32), tiny, params, params_axis=0
    )
    np.testing.assert_array_equal(outcome.truncated_E, [True, False, False])


@pytest.mark.parametrize(("count", "found"), [(2, r"\.longest has shape \(3,\)"), (3, r"\.max_steps has shape \(\)")])
def test_parameters_that_are_not_one_for_each_environment_are_named(tiny, count, found):
    params = tiny.params(longest=jnp.ones(3, jnp.int32), max_steps=7)
    with pytest.raises(ValueError, match=rf"{found}, expected \({count}, \.\.\.\)"):
        vector.reset(jax.random.split(jax.random.key(0), count), tiny, params, params_axis=0)


def test_floats_are_not_cut_down_to_the_integers_of_a_reset(tiny):
    @dataclass(frozen=True)
    class Growing(type(tiny)):
        """Its length is an integer at first and grows by a half at a step."""

        def step_env(self, key, state, action, params):
            obs, state, *rest = super().step_env(key, state, action, params)
            return obs, state._replace(length=state.length + 0.5), *rest

    def step(env, dtype):
        envs = vector.reset(jax.random.split(jax.random.key(0), 3), env, tiny.params())
        envs = envs._replace(obs=envs.obs.astype(dtype))
        return vector.step(jax.random.split(jax.random.key(1), 3), envs, jnp.zeros(3, jnp.int32), env, tiny.params())

    message = r"{} of step_env is float32, but int32 of reset_env"
    with pytest.raises(TypeError, match=message.format(r"state\.length")):
        jax.eval_shape(lambda: step(Growing(), jnp.float32))
    with pytest.raises(TypeError, match=message.format("obs")):
        jax.eval_shape(lambda: step(tiny, jnp.int32))
    after, outcome = jax.eval_shape(lambda: step(tiny, jnp.bfloat16))
    assert after.obs.dtype == outcome.final_obs.dtype == jnp.bfloat16


def test_wrong_numbers_of_resets_are_named(tiny):
    envs = vector.reset(jax.random.split(jax.random.key(0), 3), tiny, tiny.params())
    action_E = jnp.zeros(3, jnp.int32)

    def step(**options):
        keys_E = jax.random.split(jax.random.key(1), 3)
        return vector.step(keys_E, envs, action_E, tiny, tiny.params(), **options)

    for resets in (0, 4):
        with pytest.raises(ValueError, match=rf"resets is {resets}, expected 1\.\.3"):
            step(resets=resets)
    with pytest.raises(ValueError, match="cannot share"):
        step(resets=2, params_axis=0)

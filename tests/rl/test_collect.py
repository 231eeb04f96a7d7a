"""Rollouts of an actor-critic: what is recorded is what happened, with and without a memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnax.environments import spaces

from rl import vector
from rl.collect import collect, if_any
from rl.networks import MLP, Memory, actor_critic, reset_memory, unroll
from seqmod.config import BackboneConfig

pytestmark = pytest.mark.usefixtures("quick_compile")
STEPS, COUNT = 13, 5
MODEL = BackboneConfig(inputs=1, mixers=("rglru",), width=8, mlp=12, attention_heads=2)


@pytest.mark.parametrize("torso", [MLP((7,)), Memory(MODEL, MLP((6,), "relu"))], ids=["mlp", "memory"])
def test_a_rollout_records_what_the_network_saw_and_said(tiny, random_params, torso):
    network = actor_critic((5,), spaces.Discrete(3), torso)
    params = random_params(network.init)
    env_params = tiny.params(longest=7, max_steps=4, step_reward=0.5)
    envs = vector.reset(jax.random.split(jax.random.key(0), COUNT), tiny, env_params)

    @jax.jit
    def both(key, envs, memory):
        k_one, k_two = jax.random.split(key)
        first, envs, memory = collect(k_one, network, params, envs, memory, tiny, env_params, STEPS)
        second, envs, memory = collect(k_two, network, params, envs, memory, tiny, env_params, STEPS)
        return first, second, envs, memory

    first, second, envs, memory = both(jax.random.key(1), envs, network.init_memory(COUNT))
    for rollout in (first, second):  # the second goes on with episodes and memories of the first
        (policy, value_TE), last = unroll(network, params, rollout.obs_TE, rollout.first_TE, rollout.memory)
        np.testing.assert_allclose(rollout.value_TE, value_TE, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(rollout.log_prob_TE, policy.log_prob(rollout.action_TE), rtol=1e-4, atol=1e-5)
    outcome = second.outcome
    assert outcome.truncated_E.any()
    assert outcome.terminated_E.any()
    # Step by step, what each step led to, before any reset.
    memory_now = second.memory
    for t in range(STEPS):
        memory_now = reset_memory(network, memory_now, second.first_TE[t])
        _, memory_now = network.step(params, second.obs_TE[t], memory_now)
        (_, wanted), _ = network.step(params, outcome.final_obs[t], memory_now)
        alive = ~np.asarray(outcome.terminated_E[t])
        np.testing.assert_allclose(second.next_value_TE[t][alive], wanted[alive], rtol=1e-4, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), last, memory)
    np.testing.assert_array_equal(second.first_TE[1:], outcome.done_E[:-1])
    np.testing.assert_array_equal(envs.first_E, outcome.done_E[-1])


@pytest.mark.parametrize("torso", [MLP((7,)), Memory(MODEL, MLP((6,), "relu"))], ids=["mlp", "memory"])
def test_large_environments_give_the_same_rollout_step_by_step(tiny, random_params, torso, monkeypatch):
    network = actor_critic((5,), spaces.Discrete(3), torso)
    params = random_params(network.init)
    env_params = tiny.params(longest=7, max_steps=4, step_reward=0.5)

    def rollout():
        envs = vector.reset(jax.random.split(jax.random.key(0), COUNT), tiny, env_params)
        memory = network.init_memory(COUNT)
        run = jax.jit(lambda key: collect(key, network, params, envs, memory, tiny, env_params, STEPS, resets=2))
        return run(jax.random.key(1))

    at_once, envs, memory = rollout()
    monkeypatch.setattr("rl.collect.SMALL", 0)
    in_turn, envs_after, memory_after = rollout()
    assert at_once.outcome.final_obs.shape == (STEPS, COUNT, 5)
    assert in_turn.outcome.final_obs is None
    one = (at_once._replace(outcome=at_once.outcome._replace(final_obs=None)), envs, memory)
    both = zip(jax.tree.leaves(one), jax.tree.leaves((in_turn, envs_after, memory_after)), strict=True)
    for a, b in both:
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_observations_and_actions_are_translated(tiny, random_params):
    network = actor_critic((5,), spaces.Discrete(3), MLP((7,)))
    params, env_params = random_params(network.init), tiny.params()
    envs = vector.reset(jax.random.split(jax.random.key(0), COUNT), tiny, env_params)
    rollout, _, _ = collect(
        jax.random.key(1),
        network,
        params,
        envs,
        (),
        tiny,
        env_params,
        3,
        to_env=lambda action: (action + 1) % 3,
        see=lambda obs: obs * 2.0,
    )
    np.testing.assert_array_equal(rollout.obs_TE[0], envs.obs * 2.0)
    right = (rollout.action_TE[0] + 1) % 3 == (envs.state.context + 1) % 3
    np.testing.assert_array_equal(rollout.outcome.reward_E[0] > 0, right)


def test_a_computation_is_left_out_unless_some_flag_is_set():
    calls = []

    def compute():
        jax.debug.callback(lambda: calls.append(1))
        return jnp.ones(2)

    run = jax.jit(jax.vmap(lambda flags: if_any(flags, compute, jnp.zeros(2))))
    np.testing.assert_array_equal(run(jnp.zeros((3, 4), bool)), np.zeros((3, 2)))
    jax.effects_barrier()
    assert not calls
    flags = jnp.zeros((3, 4), bool).at[1, 2].set(True)
    np.testing.assert_array_equal(run(flags), [[0, 0], [1, 1], [0, 0]])
    jax.effects_barrier()
    assert calls

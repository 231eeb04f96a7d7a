"""The batched loop against episodes replayed one by one."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.rollout import Episodes, Step, rollout

pytestmark = pytest.mark.usefixtures("quick_compile")

B, T = 11, 7


class Memory(NamedTuple):
    """`calls` so far, shared by all; the actions of each episode as the digits of `code_B` in base three."""

    calls: jax.Array
    code_B: jax.Array


def policy(key: jax.Array, step: Step, memory: Memory):
    """Random actions."""
    action_B = jax.random.randint(key, step.running_B.shape, 0, 3)
    code_B = jnp.where(step.running_B, 3 * memory.code_B + action_B, memory.code_B)
    record = {"obs": step.obs_BF, "action": action_B, "calls": memory.calls + jnp.ones_like(action_B)}
    return action_B, Memory(memory.calls + 1, code_B), record


@partial(jax.jit, static_argnums=(0, 3))
def run(env, params, key, smallest=32) -> tuple[Episodes, jax.Array]:
    memory = Memory(jnp.zeros((), jnp.int32), jnp.zeros(B, jnp.int32))
    return rollout(key, env, params, policy, memory, B, T, keep=lambda memory: memory.code_B, smallest=smallest)


def replay(env, params, key, action_TB) -> list[dict]:
    """Each episode by itself, from the same resets with the same actions, in plain Python."""
    reset, step, episodes = jax.jit(env.reset_env), jax.jit(env.step_env), []
    for b, reset_key in enumerate(jax.random.split(jax.random.split(key)[0], B)):
        obs, state = reset(reset_key, params)
        episode = {"obs": [], "return": 0.0, "code": 0}
        for time in range(T):
            episode["obs"].append(obs)
            episode["code"] = 3 * episode["code"] + int(action_TB[time, b])
            obs, state, reward, terminated, _ = step(jax.random.key(0), state, action_TB[time, b], params)
            episode["return"] += float(reward)
            if terminated or state.time >= params.max_steps:
                break
        episodes.append({**episode, "state": state})
    return episodes


@pytest.mark.parametrize("smallest", [32, 2], ids=["whole", "shrinking"])
@pytest.mark.parametrize(
    "limits",
    [{"longest": 5}, {"longest": 9, "max_steps": 3}, {"longest": 19}],
    ids=["terminated", "truncated", "horizon"],
)
def test_episodes_are_those_of_a_plain_loop(tiny, limits, smallest):
    params = tiny.params(step_reward=0.5, final_reward=2.0, **limits)
    episodes, code_B = run(tiny, params, jax.random.key(3), smallest)
    expected = replay(tiny, params, jax.random.key(3), np.asarray(episodes.recorded["action"]))
    lengths = [len(episode["obs"]) for episode in expected]
    np.testing.assert_array_equal(episodes.length_B, lengths)
    np.testing.assert_array_equal(episodes.valid_TB, np.arange(T)[:, None] < np.array(lengths)[None])
    np.testing.assert_allclose(episodes.return_B, [episode["return"] for episode in expected])
    np.testing.assert_array_equal(code_B, [episode["code"] for episode in expected])
    for b, episode in enumerate(expected):
        np.testing.assert_array_equal(episodes.recorded["obs"][: lengths[b], b], episode["obs"])
        np.testing.assert_array_equal(episodes.recorded["calls"][: lengths[b], b], np.arange(1, lengths[b] + 1))
        for got, value in zip(episodes.final_state, episode["state"], strict=True):
            np.testing.assert_array_equal(got[b], value)
    # It stops with the longest episode, whose records are followed by nothing.
    assert len(set(lengths)) > 1
    assert not np.asarray(episodes.recorded["calls"])[max(lengths) :].any()


def test_a_shrinking_loop_asks_for_fewer_episodes_as_they_end(tiny):
    params = tiny.params(longest=5)
    whole, _ = run(tiny, params, jax.random.key(3))
    shrinking, _ = run(tiny, params, jax.random.key(3), 2)
    np.testing.assert_array_equal(whole.length_B, shrinking.length_B)
    running_T = np.asarray(whole.valid_TB).sum(1)
    asked_T = (np.asarray(shrinking.recorded["calls"]) > 0).sum(1)
    size = 11
    for running, asked in zip(running_T, asked_T, strict=True):
        while size > 2 and running <= size // 2:
            size //= 2
        assert asked == (size if running else 0)
    assert asked_T.min(initial=11, where=running_T > 0) == 2


def test_steps_have_keys_of_their_own(tiny):
    params = tiny.params(longest=19)
    action_TB, again, other = (
        np.asarray(run(tiny, params, jax.random.key(seed))[0].recorded["action"]) for seed in (3, 3, 4)
    )
    assert len({tuple(row) for row in action_TB}) == T
    np.testing.assert_array_equal(again, action_TB)
    assert (other != action_TB).any()


def test_vmap_over_keys_is_a_loop_over_keys(tiny):
    params = tiny.params(longest=5)
    many = jax.vmap(lambda seed: run(tiny, params, jax.random.key(seed)))(jnp.arange(3))
    for seed in range(3):
        one = run(tiny, params, jax.random.key(seed))
        for got, expected in ((many[0].valid_TB, one[0].valid_TB), (many[0].final_state, one[0].final_state)):
            jax.tree.map(lambda x, y, seed=seed: np.testing.assert_array_equal(x[seed], y), got, expected)
        np.testing.assert_array_equal(many[1][seed], one[1])
        np.testing.assert_array_equal(many[0].return_B[seed], one[0].return_B)

"""Environments by name, and the wrappers around them, against steps taken by hand."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnax.environments import spaces
from gymnax.environments.classic_control.cartpole import CartPole
from gymnax.environments.misc.rooms import FourRooms

from rl.envs.brax_env import BraxEnv, brax_environments
from rl.envs.gridworld_pinpad import GridworldPinpad
from rl.envs.make import ActionRepeat, FlattenObservation, RememberLast, Strict, make, names, unwrapped

pytestmark = pytest.mark.usefixtures("quick_compile")


@dataclass(frozen=True)
class Counter:
    """Counts its steps in `state`, rewards each with its number and terminates at `end`. Observes by `space`."""

    space: Any
    end: int = 100

    @property
    def default_params(self):
        return 1000

    def observe(self, count):
        if isinstance(self.space, spaces.Tuple):
            return count % 3, {"b": jnp.stack([count, -count]), "a": count % 2}
        return count

    def reset_env(self, key, params):
        return self.observe(0), 0

    def step_env(self, key, state, action, params):
        after = state + 1
        return self.observe(after), after, after, after >= self.end, {"key": jax.random.uniform(key), "action": action}

    def is_truncated(self, state, params):
        return state >= params

    def action_space(self, params):
        return spaces.Discrete(5)

    def observation_space(self, params):
        return self.space


COUNT = spaces.Box(0, 100, (), jnp.float32)
PARTS = spaces.Tuple(
    [spaces.Discrete(3), spaces.Dict({"b": spaces.Box(-7, jnp.array([5, 9]), (2,)), "a": spaces.Discrete(2)})]
)


def test_parts_become_one_vector_in_the_order_of_the_space():
    env = FlattenObservation(Strict(Counter(PARTS)))
    obs_F, state = env.reset_env(jax.random.key(0), 10)
    assert obs_F.tolist() == [1, 0, 0, 0, 0, 1, 0]
    for expected in ([0, 1, 0, 1, -1, 0, 1], [0, 0, 1, 2, -2, 1, 0]):
        obs_F, state, *_ = env.step_env(jax.random.key(0), state, 0, 10)
        assert obs_F.tolist() == expected
    assert obs_F.dtype == jnp.float32
    space = env.observation_space(10)
    assert space.low.tolist() == [0, 0, 0, -7, -7, 0, 0]
    assert space.high.tolist() == [1, 1, 1, 5, 9, 1, 1]
    assert space.shape == (7,)


def test_a_changed_type_is_named():
    @dataclass(frozen=True)
    class Drifting(Counter):
        def step_env(self, key, state, action, params):
            obs, after, *rest = super().step_env(key, state, action, params)
            return obs, after + 0.5, *rest

    with pytest.raises(TypeError, match="state became float32, expected int32"):
        Strict(Drifting(COUNT)).step_env(jax.random.key(0), 0, 0, 10)


def test_repeated_actions():
    env = ActionRepeat(Strict(Counter(COUNT, end=8)), 3)
    key = jax.random.key(3)
    _, state = env.reset_env(key, 5)
    step = jax.jit(env.step_env)
    obs, state, reward, terminated, info = step(key, state, 4, 5)
    assert (obs, state, reward, terminated) == (3, 3, 1 + 2 + 3, False)
    assert info["action"] == 4
    assert not env.is_truncated(state, 5)
    # Truncation after 5 stops the repetition, without termination.
    obs, after, reward, terminated, _ = step(key, state, 4, 5)
    assert (obs, after, reward, terminated) == (5, 5, 4 + 5, False)
    assert env.is_truncated(after, 5)
    # With more time, termination after 8 does.
    _, state, *_ = step(key, state, 4, 50)
    obs, state, reward, terminated, _ = step(key, state, 4, 50)
    assert (obs, state, reward, terminated) == (8, 8, 7 + 8, True)


def test_repeated_steps_draw_different_numbers_and_one_step_moves_even_at_the_limit():
    many, one = (ActionRepeat(Strict(Counter(COUNT)), times) for times in (2, 1))
    key = jax.random.key(3)
    with jax.debug_key_reuse(False):
        last = many.step_env(key, jnp.array(0), 4, 50)[-1]["key"]
        first = one.step_env(key, jnp.array(0), 4, 50)[-1]["key"]
        assert first != last
        assert one.step_env(key, jnp.array(50), 4, 50)[1] == 51
    np.testing.assert_array_equal(first, jax.random.uniform(jax.random.fold_in(jax.random.key(3), 0)))


def test_repetition_of_batches_equals_that_of_each():
    env = ActionRepeat(Strict(Counter(COUNT, end=8)), 3)
    keys_E = jax.random.split(jax.random.key(0), 5)
    state_E = jnp.array([0, 3, 5, 6, 7])
    obs_E, after_E, reward_E, terminated_E, _ = jax.vmap(env.step_env, in_axes=(0, 0, None, None))(
        keys_E, state_E, 1, 100
    )
    assert obs_E.tolist() == after_E.tolist() == [3, 6, 8, 8, 8]
    assert reward_E.tolist() == [6, 15, 21, 15, 8]
    assert terminated_E.tolist() == [False, False, True, True, True]


def test_the_last_action_and_reward_are_seen():
    env = RememberLast(FlattenObservation(Strict(Counter(COUNT))))
    obs_F, state = env.reset_env(jax.random.key(0), 2)
    assert obs_F.tolist() == [0, 0, 0, 0, 0, 0, 0]
    obs_F, after, reward, _, info = env.step_env(jax.random.key(0), state, 3, 2)
    assert obs_F.tolist() == [1, 0, 0, 0, 1, 0, 1]
    assert (reward, info["action"]) == (1, 3)
    assert not env.is_truncated(after, 2)
    obs_F, after, *_ = env.step_env(jax.random.key(1), after, 0, 2)
    assert obs_F.tolist() == [2, 1, 0, 0, 0, 0, 2]
    assert env.is_truncated(after, 2)
    assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, state)
    space = env.observation_space(2)
    assert space.shape == obs_F.shape
    assert space.low[:-1].tolist() == [0, 0, 0, 0, 0, 0]
    assert space.high[:-1].tolist() == [100, 1, 1, 1, 1, 1]
    assert space.contains(obs_F)
    assert unwrapped(env, after) == (Counter(COUNT), after.state)


def test_continuous_actions_are_remembered_as_they_are():
    env, params = make("Pendulum-v1")
    env = RememberLast(env)
    k_reset, k_step = jax.random.split(jax.random.key(1))
    _, state = jax.jit(env.reset_env)(k_reset, params)
    obs_F, _, reward, *_ = jax.jit(env.step_env)(k_step, state, jnp.array([-1.5]), params)
    assert obs_F.shape == env.observation_space(params).shape == (5,)
    assert obs_F[3:].tolist() == [-1.5, reward]


def test_the_visual_agent_stands_where_it_is():
    env, params = make("FourRooms-misc", use_visual_obs=True)
    raw = FourRooms(use_visual_obs=True)
    key = jax.random.key(0)
    obs_HWC, state = jax.jit(env.reset_env)(key, params)
    step = jax.jit(env.step_env)
    for row, column in np.argwhere(np.asarray(raw.env_map))[::7]:
        at = replace(state, pos=jnp.array([row, column]))
        # Upwards is a wall or a floor; the map decides, and nothing slips.
        obs_HWC, after, *_ = step(jax.random.key(0), at, 0, replace(params, fail_prob=0.0))
        expected = (row - 1, column) if raw.env_map[row - 1, column] else (row, column)
        assert np.argwhere(np.asarray(obs_HWC[..., 1])).tolist() == [list(expected)]
        assert tuple(after.pos.tolist()) == expected
        assert obs_HWC[*expected, 0] == 0
    np.testing.assert_array_equal(obs_HWC[..., 0], ~np.asarray(raw.env_map))
    assert obs_HWC.shape == env.observation_space(params).shape


def test_images_stay_images_unless_asked():
    for flatten, shape in ((False, (10, 10, 4)), (True, (400,))):
        env, params = make("Breakout-MinAtar", flatten=flatten)
        assert env.observation_space(params).shape == shape
        assert jax.eval_shape(env.reset_env, jax.random.key(0), params)[0].shape == shape


@pytest.mark.parametrize("name", ["CartPole-v1", "BernoulliBandit-misc", "GridworldPinpad"])
def test_time_limits(name):
    env, params = make(name, max_steps=3)
    _, usual = make(name)
    assert usual.max_steps_in_episode != 3
    _, state = jax.jit(env.reset_env)(jax.random.key(0), params)
    step = jax.jit(env.step_env)
    for limit in (False, False, True):
        _, state, _, _, _ = step(jax.random.key(0), state, 0, params)
        assert bool(env.is_truncated(state, params)) == limit


def test_options_reach_the_environment():
    env, params = make("GridworldPinpad", size=5, colours=3, walls=2)
    assert env == GridworldPinpad(5, 3, 2)
    assert params.max_steps_in_episode == 100
    env, params = make("FrozenLake-misc", map_name="8x8")
    assert env.observation_space(params).shape == (64,)
    assert isinstance(unwrapped(make("CartPole-v1")[0], None)[0], CartPole)


@pytest.mark.parametrize("name", ["inverted_pendulum", "brax/inverted_pendulum"])
def test_brax_goes_by_both_names(name):
    env, params = make(name, max_steps=7, backend="positional", action_repeat=2)
    assert env == BraxEnv("inverted_pendulum", "positional", action_repeat=2)
    assert params == replace(env.default_params, max_steps_in_episode=7)


def test_names_are_what_can_be_made():
    assert len(names()) == len(set(names())) >= 25 + len(brax_environments()) + 1
    for name in names():
        if not name.startswith("brax/"):
            env, params = make(name)
            assert env.action_space(params).shape is not None
    assert "MNISTBandit-bsuite" not in names()


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("Cartpole-v1", {}, "did you mean 'CartPole-v1'"),
        ("breakout", {}, "Breakout-MinAtar"),
        ("brax/and", {}, "'ant'"),
        ("qqq", {}, r"names\(\) lists"),
        ("MNISTBandit-bsuite", {}, "downloads"),
        ("swimmer", {}, "Swimmer-misc"),
        ("brax/swimmer", {}, "fluid"),
        ("CartPole-v1", {"max_steps": 0}, "max_steps is 0"),
    ],
)
def test_what_cannot_be_made_says_why(name, options, words):
    with pytest.raises(ValueError, match=words):
        make(name, **options)


def test_wrappers_refuse_what_they_cannot_hold():
    env, _ = make("Breakout-MinAtar")
    with pytest.raises(ValueError, match=r"\(10, 10, 4\).*expected vectors"):
        RememberLast(env)
    with pytest.raises(ValueError, match="times is 0"):
        ActionRepeat(env, 0)
    with pytest.raises(TypeError, match="expected a gymnax Box"):
        FlattenObservation(Counter(space=None)).reset_env(jax.random.key(0), 1)

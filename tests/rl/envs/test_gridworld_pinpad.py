"""gridworld-pinpad against a second implementation, step for step, by itself and through gymnax's interface."""

from dataclasses import replace
from functools import partial
from itertools import product

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from scipy.stats import chisquare

from rl.envs import (
    PAPER_POST_TRAINING,
    PAPER_PRETRAINING,
    GridworldPinpad,
    action_probabilities,
    colour_distances,
    parse_task,
    subgoal_transitions,
    task_length,
    tasks_without,
)

pytestmark = pytest.mark.usefixtures("quick_compile")

CASES = {  # environment, tasks, horizon, episodes
    "paper": (GridworldPinpad(7, 8, 4, "absolute"), PAPER_PRETRAINING, 43, 500),
    "paper-relative": (GridworldPinpad(7, 8, 4, "relative"), PAPER_PRETRAINING, 43, 500),
    "repeats": (GridworldPinpad(5, 4, 3, "relative"), [(3, 1, 3), (0, 0), (2,)], 13, 700),
    "crowded": (GridworldPinpad(3, 2, 5, "absolute"), [(0,), (1, 0)], 11, 700),
    "no-walls": (GridworldPinpad(2, 1, 0, "absolute"), [(0, 0, 0)], 5, 300),
}


def reset_many(env, params, key, episodes):
    return jax.vmap(env.reset_env, in_axes=(0, None))(jax.random.split(key, episodes), params)


def play(env, params, key, episodes, steps):
    """Episodes of a clumsy expert without auto-reset. They go on after their end; what happens then means nothing."""
    k_reset, k_steps = jax.random.split(key)
    obs_EF, state = reset_many(env, params, k_reset, episodes)
    distances = jax.vmap(partial(colour_distances, env))(state.objects_J)

    def step(state, key):
        p_EA = jax.vmap(partial(action_probabilities, env), in_axes=(0, 0, None))(state, distances, 0.1)
        action_E = jax.random.categorical(key, jnp.log(0.8 * p_EA + 0.2 / 4))
        obs_EF, state, *rest = jax.vmap(env.step_env, in_axes=(None, 0, 0, None))(key, state, action_E, params)
        return state, (obs_EF, state, action_E, *rest, env.is_truncated(state, params))

    _, trace = jax.lax.scan(step, state, jax.random.split(k_steps, steps))
    return (obs_EF, state), trace


@pytest.mark.parametrize("case", CASES)
def test_every_step_is_as_defined(case, oracle):
    env, tasks, horizon, episodes = CASES[case]
    params = env.make_params(tasks, horizon)
    run = jax.jit(partial(play, env), static_argnums=(2, 3))
    (obs_EF, start), trace = jax.tree.map(np.asarray, run(params, jax.random.key(0), episodes, horizon))
    obs_TEF, state, action_TE, reward_TE, terminated_TE, info, truncated_TE = trace
    assert reward_TE.dtype == obs_TEF.dtype == np.float32
    assert terminated_TE.dtype == truncated_TE.dtype == bool
    endings = set()
    for e in range(episodes):
        world = oracle(env, start.objects_J[e], start.task_K[e], horizon, start.agent[e])
        np.testing.assert_array_equal(obs_EF[e], world.observe())
        for t in range(horizon):
            before = world.agent
            reward, terminated, truncated = world.step(action_TE[t, e])
            np.testing.assert_array_equal(obs_TEF[t, e], world.observe())
            assert (reward_TE[t, e], terminated_TE[t, e], truncated_TE[t, e]) == (reward, terminated, truncated)
            assert (state.progress[t, e], state.time[t, e]) == (world.progress, t + 1)
            moved_onto = world.agent in world.colours and world.agent != before
            assert info["visited"][t, e] == (world.colours.index(world.agent) if moved_onto else -1)
            assert info["success"][t, e] == reward
            assert info["discount"][t, e] == 1 - terminated
            if terminated or truncated:
                endings.add("success" if reward else "wrong" if terminated else "late")
                break
    # One colour can't be the wrong one before the task is over.
    assert endings >= ({"success", "late"} if env.colours == 1 else {"success", "late", "wrong"})


@pytest.mark.parametrize("case", ["paper", "repeats"])
def test_every_step_through_gymnax_is_as_defined(case, oracle):
    env, tasks, horizon, _ = CASES[case]
    horizon, envs, steps = 7, 101, 67
    params = env.make_params(tasks, horizon)

    def run(key):
        k_reset, k_act, k_steps = jax.random.split(key, 3)
        start = jax.vmap(env.reset, in_axes=(0, None))(jax.random.split(k_reset, envs), params)
        action_TE = jax.random.randint(k_act, (steps, envs), 0, env.num_actions)

        def step(state, inputs):
            key, action_E = inputs
            keys = jax.random.split(key, envs)
            obs_EF, state, *rest = jax.vmap(env.step, in_axes=(0, 0, 0, None))(keys, state, action_E, params)
            return state, (obs_EF, state, action_E, *rest)

        return start, jax.lax.scan(step, start[1], (jax.random.split(k_steps, steps), action_TE))[1]

    (obs_EF, start), trace = jax.tree.map(np.asarray, jax.jit(run)(jax.random.key(1)))
    obs_TEF, state, action_TE, reward_TE, terminated_TE, truncated_TE, info = trace
    table = {tuple(task) for task in np.asarray(params.tasks_NK)}
    over = 0
    for e in range(envs):
        world = oracle(env, start.objects_J[e], start.task_K[e], horizon, start.agent[e])
        np.testing.assert_array_equal(obs_EF[e], world.observe())
        for t in range(steps):
            reward, terminated, truncated = world.step(action_TE[t, e])
            assert (reward_TE[t, e], terminated_TE[t, e], truncated_TE[t, e]) == (reward, terminated, truncated)
            assert (info["terminated"][t, e], info["truncated"][t, e]) == (terminated, truncated)
            np.testing.assert_array_equal(info["final_observation"][t, e], world.observe())
            if terminated or truncated:
                over += 1
                last, world = world, oracle(env, state.objects_J[t, e], state.task_K[t, e], horizon, state.agent[t, e])
                assert tuple(state.task_K[t, e]) in table
                assert last.colours + last.walls != world.colours + world.walls
            np.testing.assert_array_equal(obs_TEF[t, e], world.observe())
            assert (state.progress[t, e], state.time[t, e]) == (world.progress, world.time)
    assert over > 1000


@st.composite
def settings_of_any_size(draw):
    size = draw(st.integers(2, 5))
    colours = draw(st.integers(1, min(size**2 - 1, 6)))
    walls = draw(st.integers(0, size**2 - 1 - colours))
    env = GridworldPinpad(size, colours, walls, draw(st.sampled_from(["absolute", "relative"])))
    tasks = draw(st.lists(st.lists(st.integers(0, colours - 1), min_size=1, max_size=3), min_size=1, max_size=3))
    return env, tasks, draw(st.integers(0, 2**31 - 1))


# Every example compiles a program of its own.
@settings(max_examples=6)
@given(settings_of_any_size())
def test_any_size_is_as_defined(oracle, setting):
    env, tasks, seed = setting
    episodes, steps = 17, 7
    params = env.make_params(tasks, steps)

    @jax.jit
    def run(key):
        k_reset, k_act = jax.random.split(key)
        action_TE = jax.random.randint(k_act, (steps, episodes), 0, 4)
        start = reset_many(env, params, k_reset, episodes)

        def step(state, action_E):
            unused = jax.random.key(0)
            obs, state, *rest = jax.vmap(env.step_env, in_axes=(None, 0, 0, None))(unused, state, action_E, params)
            return state, (obs, action_E, *rest[:2], state.progress)

        return start, jax.lax.scan(step, start[1], action_TE)[1]

    (obs_EF, start), trace = jax.tree.map(np.asarray, run(jax.random.key(seed)))
    for e in range(episodes):
        cells = [*start.objects_J[e], start.agent[e]]
        assert len(set(cells)) == len(cells) == env.colours + env.walls + 1
        world = oracle(env, start.objects_J[e], start.task_K[e], steps, start.agent[e])
        assert world.task in tasks
        np.testing.assert_array_equal(obs_EF[e], world.observe())
        for obs_EF_t, action_E, reward_E, terminated_E, progress_E in zip(*trace, strict=True):
            reward, terminated, _ = world.step(action_E[e])
            assert (reward_E[e], terminated_E[e], progress_E[e]) == (reward, terminated, world.progress)
            np.testing.assert_array_equal(obs_EF_t[e], world.observe())
            if terminated:
                break


def test_resets_are_uniform():
    env = GridworldPinpad(4, 3, 2)
    tasks = [(0,), (1, 2), (2, 1, 0)]
    _, state = jax.jit(partial(reset_many, env, env.make_params(tasks)), static_argnums=1)(jax.random.key(2), 16_001)
    cells = np.column_stack([state.objects_J, state.agent])
    ordered = np.sort(cells, axis=1)
    assert (ordered[:, 1:] > ordered[:, :-1]).all()
    assert ordered.min() == 0
    assert ordered.max() == 15
    for column in cells.T:
        assert chisquare(np.bincount(column, minlength=16)).pvalue > 1e-3
    lengths = np.asarray(jax.vmap(task_length)(state.task_K))
    assert chisquare(np.bincount(lengths, minlength=4)[1:]).pvalue > 1e-3
    # Where one object is says nothing about the others but that they are elsewhere.
    pairs = np.bincount(16 * cells[:, 0] + cells[:, -1], minlength=256).reshape(16, 16)
    assert chisquare(pairs[~np.eye(16, dtype=bool)]).pvalue > 1e-3


def test_papers_setting():
    env = GridworldPinpad()
    params = env.make_params(PAPER_PRETRAINING)
    obs_F, _ = env.reset(jax.random.key(3), params)
    assert obs_F.shape == (env.observation_size,) == (637,)
    assert params.max_steps_in_episode == 100
    assert len(set(PAPER_PRETRAINING)) == 16
    subgoals = {(0, 1), (2, 3), (4, 5), (6, 7)}
    for task in PAPER_PRETRAINING:
        assert {task[0:2], task[2:4], task[4:6]} <= subgoals
    assert PAPER_POST_TRAINING == (0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3)
    seen = set().union(*map(subgoal_transitions, PAPER_PRETRAINING))
    assert subgoal_transitions(PAPER_POST_TRAINING) - seen == {(1, 2), (3, 4), (5, 6), (7, 0)}


@pytest.mark.parametrize("coding", ["absolute", "relative"])
def test_observations_decode(coding):
    env = GridworldPinpad(5, 3, 2, coding)
    obs_EF, state = reset_many(env, env.default_params, jax.random.key(4), 53)
    agent_E, objects_EJ = jax.vmap(env.decode)(obs_EF)
    np.testing.assert_array_equal(agent_E, state.agent)
    np.testing.assert_array_equal(objects_EJ, state.objects_J)
    assert agent_E.dtype == objects_EJ.dtype == jnp.int32
    assert obs_EF.shape[1] == env.observation_size
    edges = np.cumsum((0, *env.factors))
    np.testing.assert_array_equal(np.add.reduceat(obs_EF, edges[:-1], axis=1), 1)


@pytest.mark.parametrize("coding", ["absolute", "relative"])
def test_turned_observations_are_those_of_the_turned_picture(coding):
    env = GridworldPinpad(5, 3, 2, coding)
    params = env.make_params([(0, 1)], 9)
    obs_EF, state = reset_many(env, params, jax.random.key(3), 40)
    turn = jax.jit(jax.vmap(env.turn, in_axes=(0, None)))
    for symmetry in range(8):
        turned_EF = np.asarray(turn(obs_EF, symmetry))
        for episode in range(40):
            cells = [*np.asarray(state.objects_J[episode]), int(state.agent[episode])]
            picture = np.full(25, -1)
            picture[cells] = np.arange(len(cells))
            picture = picture.reshape(5, 5)
            picture = picture.T if symmetry & 4 else picture
            picture = np.flipud(picture) if symmetry & 2 else picture
            picture = np.fliplr(picture) if symmetry & 1 else picture
            at = np.argsort(picture.reshape(-1))[-len(cells) :]
            expected = env.encode(jnp.asarray(at[-1]), jnp.asarray(at[:-1]))
            np.testing.assert_array_equal(turned_EF[episode], expected)
    assert len({turn(obs_EF[:1], symmetry).tobytes() for symmetry in range(8)}) == 8


def test_spaces_and_defaults():
    env = GridworldPinpad(3, 2, 1)
    key_reset, key_step = jax.random.split(jax.random.key(5))
    obs_F, state = env.reset(key_reset)
    assert list(state.task_K) == [0, 1]
    assert env.observation_space(env.default_params).contains(obs_F)
    assert env.observation_space(env.default_params).shape == obs_F.shape
    assert env.action_space(env.default_params).n == env.num_actions == 4
    after_F, after, *_ = env.step(key_step, state, 0)
    assert after_F.shape == obs_F.shape
    assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, state)


def test_equal_environments_share_one_program():
    assert GridworldPinpad(3, 2, 1) == GridworldPinpad(3, 2, 1)
    traced = []

    def count(env, key):
        traced.append(env)
        return env.reset_env(key, env.default_params)

    compiled = jax.jit(count, static_argnums=0)
    for seed in range(2):
        compiled(GridworldPinpad(3, 2, 1), jax.random.key(seed))
    compiled(GridworldPinpad(3, 2, 1, "relative"), jax.random.key(0))
    assert len(traced) == 2


def test_tasks_and_horizons_can_be_mapped_over():
    env = GridworldPinpad(3, 3, 0)
    params = jax.tree.map(
        lambda *leaves: jnp.stack(list(map(jnp.asarray, leaves))),
        env.make_params([(0, 1)], 1),
        env.make_params([(2, 0)], 2),
    )
    k_reset, k_step = jax.random.split(jax.random.key(6))
    _, state = jax.vmap(env.reset)(jax.random.split(k_reset, 2), params)
    assert state.task_K.tolist() == [[0, 1], [2, 0]]
    # Off the grid from a corner: nothing but the horizon ends the episode.
    state = replace(state, agent=jnp.zeros_like(state.agent))
    *_, terminated_P, truncated_P, _ = jax.vmap(env.step)(
        jax.random.split(k_step, 2), state, jnp.zeros(2, jnp.int32), params
    )
    assert terminated_P.tolist() == [False, False]
    assert truncated_P.tolist() == [True, False]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"size": 1}, "size is 1"),
        ({"colours": 0}, "colours is 0"),
        ({"walls": -1}, "walls -1"),
        ({"size": 3, "colours": 5, "walls": 4}, "need 10 cells"),
        ({"coding": "polar"}, "polar"),
    ],
)
def test_impossible_settings_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        GridworldPinpad(**arguments)


@pytest.mark.parametrize(
    ("tasks", "horizon", "words"),
    [
        ([], 10, "at least one"),
        ([(0,), ()], 10, "none of them empty"),
        ([(0, 3)], 10, "colour 3"),
        ([(-1,)], 10, "colour -1"),
        ([(0,)], 0, "horizon is 0"),
    ],
)
def test_impossible_tasks_are_refused(tasks, horizon, words):
    with pytest.raises(ValueError, match=words):
        GridworldPinpad(3, 3, 1).make_params(tasks, horizon)


def test_tasks_are_padded():
    params = GridworldPinpad(3, 3, 1).make_params([(2, 0, 2), (1,)], 17)
    assert params.tasks_NK.tolist() == [[2, 0, 2], [1, -1, -1]]
    assert jax.vmap(task_length)(params.tasks_NK).tolist() == [3, 1]


def test_tasks_without_withheld_transitions():
    withheld = {(0, 1), (2, 0)}
    every = product(range(4), repeat=3)
    wanted = [t for t in every if t[0] != t[1] != t[2] and not {t[:2], t[1:]} & withheld]
    assert sorted(tasks_without(4, 3, withheld)) == wanted
    assert tasks_without(2, 1, withheld) == [(0,), (1,)]
    with pytest.raises(ValueError, match="length is 0"):
        tasks_without(4, 0, withheld)


def test_tasks_are_parsed():
    assert parse_task("0145") == (0, 1, 4, 5)
    for text in ("", "01a", "-1"):
        with pytest.raises(ValueError, match="digits only"):
            parse_task(text)

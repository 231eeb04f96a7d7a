"""The expert and its demonstrations against breadth-first search over a second implementation of the environment."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from rl.envs import (
    PAPER_PRETRAINING,
    UNREACHABLE,
    EnvState,
    GridworldPinpad,
    action_probabilities,
    colour_distances,
    demonstrations,
    parse_task,
    steps_to_finish,
)

# Crowded enough that colours get cut off from each other; the tasks ask for colours twice, even twice in a row.
TIGHT = GridworldPinpad(4, 3, 4, "relative")
TIGHT_TASKS = [(1, 1, 2), (0, 2, 0), (2,), (0, 0, 0)]
PAPER = GridworldPinpad()
LAYOUTS = {"tight": (TIGHT, TIGHT_TASKS, 211), "paper": (PAPER, PAPER_PRETRAINING, 53)}


@pytest.fixture(scope="module", params=LAYOUTS)
def worlds(request, oracle):
    """An environment, many layouts of it, their distances, and their second implementation."""
    env, tasks, count = LAYOUTS[request.param]
    params = env.make_params(tasks)

    @jax.jit
    def draw(key):
        _, state = jax.vmap(env.reset_env, in_axes=(0, None))(jax.random.split(key, count), params)
        return state, jax.vmap(partial(colour_distances, env))(state.objects_J)

    state, distance_BON = draw(jax.random.key(0))
    host = jax.tree.map(np.asarray, state)
    second = [
        oracle(env, *row, 100, agent) for *row, agent in zip(host.objects_J, host.task_K, host.agent, strict=True)
    ]
    return env, state, distance_BON, second


def everywhere(function, env, state, distance_BON, *rest):
    """A function of (env, state, distances, ...) at each (layout, progress, cell)."""
    cells, progress = jnp.arange(env.size**2), jnp.arange(state.task_K.shape[1])

    def at(state, distance_ON, progress, cell):
        return function(env, replace(state, progress=progress, agent=cell), distance_ON, *rest)

    over_cells = jax.vmap(at, in_axes=(None, None, None, 0))
    over_both = jax.vmap(over_cells, in_axes=(None, None, 0, None))
    return np.asarray(jax.jit(jax.vmap(over_both, in_axes=(0, 0, None, None)))(state, distance_BON, progress, cells))


def test_distances_are_those_of_breadth_first_search(worlds):
    env, _, distance_BON, second = worlds
    cut_off = 0
    for distance_ON, world in zip(np.asarray(distance_BON), second, strict=True):
        for colour in range(env.colours):
            wanted = world.distances(colour).ravel()
            reachable = wanted < UNREACHABLE // 2
            np.testing.assert_array_equal(distance_ON[colour][reachable], wanted[reachable])
            assert (distance_ON[colour][~reachable] == UNREACHABLE).all()
            cut_off += (~reachable).sum()
    assert cut_off > 10


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_distribution_is_uniform_over_optimal_actions_and_noise(worlds, epsilon):
    env, state, distance_BON, second = worlds
    p_BKNA = everywhere(action_probabilities, env, state, distance_BON, epsilon)
    np.testing.assert_allclose(p_BKNA.sum(-1), 1, rtol=1e-6)
    kinds = set()
    for p_KNA, world in zip(p_BKNA, second, strict=True):
        costs = world.costs()
        for cell in world.standing_places():
            for progress in range(len(world.task)):
                if (cell, progress) not in costs and leg_is_open(world, cell, progress):
                    continue  # The expert walks to its next colour though one after it is out of reach.
                safe = world.safe_actions(cell, progress)
                best = world.best_actions(costs, cell, progress) if (cell, progress) in costs else safe
                wanted = np.zeros(4)
                wanted[best or range(4)] += (1 - epsilon) / len(best or range(4))
                wanted[safe or best or range(4)] += epsilon / len(safe or best or range(4))
                at = cell[0] * env.size + cell[1]
                np.testing.assert_allclose(p_KNA[progress, at], wanted, atol=1e-6)
                kinds.add((len(best), (cell, progress) in costs))
    assert kinds >= {(1, True), (2, True)}


def leg_is_open(world, cell, progress):
    """Whether the colour pursued can be visited from a cell, whatever comes after it."""
    goal = world.colours[world.task[progress]]
    away = world.distances(world.task[progress])
    around = [world.go(cell, action) for action in range(4)]
    blocked = [place in world.colours and place != goal for place in around]
    return any(
        away[place] < UNREACHABLE // 2 for place, no in zip(around, blocked, strict=True) if not no and place != cell
    )


def test_steps_to_finish_is_the_shortest_way_through_the_whole_task(worlds):
    env, state, distance_BON, second = worlds
    steps_BKN = everywhere(steps_to_finish, env, state, distance_BON)
    impossible = 0
    for steps_KN, world in zip(steps_BKN, second, strict=True):
        costs = world.costs()
        for row, column in world.standing_places():
            for progress in range(len(world.task)):
                found = steps_KN[progress, row * env.size + column]
                wanted = costs.get(((row, column), progress))
                impossible += wanted is None
                assert found >= UNREACHABLE if wanted is None else found == wanted
    assert impossible > 10


def replay(oracle, env, demos, episode, task, horizon):
    """The second implementation after every step of one episode until it ends: (world, reward, ended, action)."""
    agent, objects = env.decode(demos.obs_BLF[episode, 0])
    world = oracle(env, np.asarray(objects), task, horizon, agent)
    for step, action in enumerate(demos.action_BL[episode]):
        np.testing.assert_array_equal(demos.obs_BLF[episode, step], world.observe())
        assert demos.progress_BL[episode, step] == world.progress
        assert demos.target_BL[episode, step] == task[world.progress]
        before = world.agent, world.progress
        reward, terminated, truncated = world.step(action)
        np.testing.assert_array_equal(demos.next_obs_BLF[episode, step], world.observe())
        yield world, before, int(action), reward, terminated, truncated
        if terminated or truncated:
            return


def make(env, tasks, horizon, batch, length, epsilon, seed=1):
    run = jax.jit(partial(demonstrations, env=env, batch=batch, length=length))
    demos = run(jax.random.key(seed), params=env.make_params(tasks, horizon), epsilon=epsilon)
    return jax.tree.map(np.asarray, demos)


# The same shapes again and again: each new one is seconds of compilation.
@pytest.mark.parametrize(("env", "task", "horizon"), [(TIGHT, (1, 1), 11), (PAPER, parse_task("014523"), 31)])
def test_without_noise_episodes_are_the_shortest(env, task, horizon, oracle):
    batch = 97
    demos = make(env, [task], horizon, batch, horizon, 0.0)
    kept = 0
    for episode in range(batch):
        agent, objects = env.decode(demos.obs_BLF[episode, 0])
        costs = oracle(env, np.asarray(objects), task, horizon, agent).costs()
        shortest = costs.get((divmod(int(agent), env.size), 0), 10**6)
        valid_L = demos.valid_BL[episode]
        if shortest > horizon:
            assert not valid_L.any()
            continue
        kept += 1
        assert valid_L.tolist() == [step < shortest for step in range(horizon)]
        *_, (*_, reward, terminated, _) = steps = list(replay(oracle, env, demos, episode, task, horizon))
        assert (len(steps), reward, terminated) == (shortest, 1.0, True)
        for world, before, action, *_ in steps:
            assert action in world.best_actions(costs, *before)
    assert 0.1 < kept / batch < 1


def test_actions_are_drawn_uniformly():
    # Nothing in the way: every action towards the one colour is optimal, and every other one is safe.
    env, batch, length = GridworldPinpad(5, 1, 0), 601, 7
    toward, noise = {}, np.zeros(4)
    for epsilon in (0.0, 1.0):
        demos = make(env, [(0,)], 100, batch, length, epsilon)
        decode = jax.jit(jax.vmap(env.decode))
        agent_S, goal_S1 = map(np.asarray, decode(demos.obs_BLF[demos.valid_BL]))
        goal_S = goal_S1[:, 0]
        offsets = goal_S // 5 - agent_S // 5, goal_S % 5 - agent_S % 5
        for down, right, action in zip(*offsets, demos.action_BL[demos.valid_BL], strict=True):
            if epsilon == 0.0 and down and right:
                toward.setdefault((int(down > 0), 2 + int(right > 0)), []).append(int(action))
            if epsilon == 1.0 and abs(down) + abs(right) > 1:
                noise[action] += 1
    assert len(toward) == 4
    for pair, actions in toward.items():
        counts = np.bincount(actions, minlength=4)
        assert counts.sum() == counts[list(pair)].sum() > 100
        assert chisquare(counts[list(pair)]).pvalue > 1e-3
    assert chisquare(noise).pvalue > 1e-3


@pytest.mark.parametrize("epsilon", [0.5, 1.0])
def test_noise_ends_no_episode_and_only_successes_are_kept(epsilon, oracle):
    env, task, horizon, batch = TIGHT, (0, 2), 11, 97
    demos = make(env, [task], horizon, batch, horizon, epsilon)
    endings = {"success": 0, "failure": 0}
    for episode in range(batch):
        steps = list(replay(oracle, env, demos, episode, task, horizon))
        *_, (world, before, action, reward, terminated, _) = steps
        if terminated and world.safe_actions(*before):
            assert reward
            assert epsilon < 1
            assert action in world.best_actions(world.costs(), *before)
        endings["success" if reward else "failure"] += 1
        assert demos.valid_BL[episode].tolist() == [bool(reward) and step < len(steps) for step in range(horizon)]
    assert endings["failure"] > 5
    assert (endings["success"] > 5) == (epsilon < 1)


@pytest.mark.parametrize("epsilon", [0.0, 0.2])
def test_shorter_windows_are_prefixes(epsilon):
    batch, length, horizon, tasks = 97, 7, 31, [parse_task("230167")]
    short = make(PAPER, tasks, horizon, batch, length, epsilon)
    whole = make(PAPER, tasks, horizon, batch, horizon, epsilon)
    for name, array in short._asdict().items():
        if name != "valid_BL":
            np.testing.assert_array_equal(array, getattr(whole, name)[:, :length], err_msg=name)
    # A window is kept where the episode may still succeed; without noise, it will.
    possible = ~whole.valid_BL[:, :length] | short.valid_BL
    assert possible.all()
    if epsilon == 0.0:
        np.testing.assert_array_equal(short.valid_BL, whole.valid_BL[:, :length])
    assert 0.1 < whole.valid_BL[:, 0].mean() < 1
    assert whole.valid_BL[:, length].any()


def test_observations_follow_each_other_and_tasks_are_those_asked_for():
    horizon = 43
    demos = make(PAPER, PAPER_PRETRAINING, horizon, 61, horizon, 0.1)
    np.testing.assert_array_equal(demos.obs_BLF[:, 1:], demos.next_obs_BLF[:, :-1])
    seen = set()
    for target_L, progress_L, valid_L in zip(demos.target_BL, demos.progress_BL, demos.valid_BL, strict=True):
        if valid_L.any():
            assert (np.diff(progress_L[valid_L]) >= 0).all()
            changes = np.flatnonzero(np.diff(progress_L[valid_L], prepend=-1))
            seen.add(tuple(map(int, target_L[valid_L][changes])))
    assert seen <= set(PAPER_PRETRAINING)
    assert len(seen) > 8


def test_a_colour_asked_for_twice_is_left_and_entered_again():
    # Colour 0 in the corner of a 2 x 2 grid: bumping into the edge doesn't count as a visit.
    env = GridworldPinpad(2, 1, 0)
    state = EnvState(jnp.array(1), jnp.array(0), jnp.array([0]), jnp.array([0, 0]), jnp.array(1))

    @jax.jit
    def ask(state):
        distance_ON = colour_distances(env, state.objects_J)
        return action_probabilities(env, state, distance_ON, 0.0), steps_to_finish(env, state, distance_ON)

    p_A, steps = ask(state)
    assert p_A.tolist() == [0.0, 0.5, 0.0, 0.5]
    assert steps == 2


@pytest.mark.parametrize(("batch", "length"), [(0, 3), (3, 0)])
def test_empty_demonstrations_are_refused(batch, length):
    with pytest.raises(ValueError, match=f"batch is {batch} and length {length}"):
        demonstrations(jax.random.key(0), TIGHT, TIGHT.default_params, batch, length)

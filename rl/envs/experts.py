"""The exact shortest-path expert of gridworld-pinpad and demonstrations made by it on device (paper C.1.1).

The expert walks a shortest path to the next colour of its task; other colours and walls are obstacles; it is uniform
over all optimal actions. With probability eps it takes a random action that does not end the episode instead. A path to
the next colour always ends on that colour's cell, so shortest paths one by one are a shortest path for the whole task.
Distances come from dynamic programming (value iteration to its fixed point), one field per colour.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rl.envs.gridworld_pinpad import EnvParams, EnvState, GridworldPinpad, task_length

UNREACHABLE = 1 << 20


class Demonstrations(NamedTuple):
    """Expert episodes. `obs_BLF` at each step, `next_obs_BLF`, `action_BL`, `target_BL` the colour being pursued
    (labels for analysis only), `progress_BL` colours visited so far, `valid_BL` steps that belong to a kept episode."""

    obs_BLF: jax.Array
    next_obs_BLF: jax.Array
    action_BL: jax.Array
    target_BL: jax.Array
    progress_BL: jax.Array
    valid_BL: jax.Array


def colour_distances(env: GridworldPinpad, objects_J: jax.Array) -> jax.Array:
    """Steps (O, G^2) from every cell to every colour, other colours and walls being obstacles.

    A cell that is an obstacle itself has the distance of an agent standing on it. UNREACHABLE where there is no path.
    """
    size = env.size
    walls_GG = jnp.zeros(size**2, bool).at[objects_J[env.colours :]].set(True).reshape(size, size)
    colours_GG = jnp.zeros(size**2, bool).at[objects_J[: env.colours]].set(True).reshape(size, size)

    def field(goal: jax.Array) -> jax.Array:
        goal_GG = (jnp.arange(size**2) == goal).reshape(size, size)
        obstacle_GG = walls_GG | (colours_GG & ~goal_GG)
        start_GG = jnp.where(goal_GG, 0, UNREACHABLE)

        def relax(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            distance_GG, _ = carry
            enter_PP = jnp.pad(jnp.where(obstacle_GG, UNREACHABLE, distance_GG), 1, constant_values=UNREACHABLE)
            sides = (enter_PP[:-2, 1:-1], enter_PP[2:, 1:-1], enter_PP[1:-1, :-2], enter_PP[1:-1, 2:])
            through_GG = jnp.stack(sides).min(0) + 1
            shorter_GG = jnp.minimum(distance_GG, through_GG)
            return shorter_GG, (shorter_GG != distance_GG).any()

        distance_GG, _ = jax.lax.while_loop(lambda carry: carry[1], relax, (start_GG, jnp.array(True)))
        return distance_GG.reshape(-1)

    return jax.vmap(field)(objects_J[: env.colours])


def action_probabilities(
    env: GridworldPinpad, state: EnvState, distance_ON: jax.Array, epsilon: float | jax.Array
) -> jax.Array:
    """The expert's distribution (4,) over actions in a state, given `colour_distances` of its layout."""
    target = _target(state)
    landing_A, colour_A = _landings(env, state.agent, state.objects_J)
    last = state.progress + 1 == task_length(state.task_K)
    safe_A = (colour_A < 0) | ((colour_A == target) & ~last)
    cost_A = _costs(landing_A, colour_A, state.agent, target, distance_ON)
    optimal_A = (cost_A == cost_A.min()) & (cost_A < UNREACHABLE)

    def uniform(chosen_A: jax.Array) -> jax.Array:
        return chosen_A / jnp.maximum(chosen_A.sum(), 1)

    best_A = jnp.where(optimal_A.any(), uniform(optimal_A), uniform(safe_A))
    noisy_A = jnp.where(safe_A.any(), uniform(safe_A), best_A)
    mixed_A = (1 - epsilon) * best_A + epsilon * noisy_A
    # An agent walled in by wrong colours has no safe and no optimal action; it must still do something.
    return jnp.where(mixed_A.sum() > 0, mixed_A, 0.25)


def steps_to_finish(env: GridworldPinpad, state: EnvState, distance_ON: jax.Array) -> jax.Array:
    """Fewest steps that finish the task from a state, given `colour_distances`; UNREACHABLE or more where none do."""
    K = state.task_K.shape[0]
    index_K = jnp.arange(K)
    # Every leg but the current one starts on the colour before it.
    start_K = jnp.where(index_K == state.progress, state.agent, state.objects_J[jnp.roll(state.task_K, 1)])

    def leg(start: jax.Array, target: jax.Array) -> jax.Array:
        return 1 + _costs(*_landings(env, start, state.objects_J), start, target, distance_ON).min()

    ahead_K = (index_K >= state.progress) & (state.task_K >= 0)
    return jnp.where(ahead_K, jax.vmap(leg)(start_K, state.task_K), 0).sum()


def demonstrations(
    key: jax.Array, env: GridworldPinpad, params: EnvParams, batch: int, length: int, epsilon: float | jax.Array = 0.0
) -> Demonstrations:
    """`batch` expert episodes in fresh layouts, the first `length` steps of each.

    Only successful episodes are kept (`valid_BL` is false throughout for the others): an episode still under way after
    `length` steps is kept while a shortest path for the rest of its task ends within the horizon, which with eps = 0 is
    the same. Raises ValueError where batch or length is not positive.
    """
    if batch < 1 or length < 1:
        raise ValueError(f"demonstrations: batch is {batch} and length {length}, expected at least 1")

    def episode(key: jax.Array):
        k_reset, k_steps = jax.random.split(key)
        _, state = env.reset_env(k_reset, params)
        distance_ON = colour_distances(env, state.objects_J)

        def step(carry, index):
            state, running = carry
            k_action, k_env = jax.random.split(jax.random.fold_in(k_steps, index))
            probability_A = action_probabilities(env, state, distance_ON, epsilon)
            action = jax.random.categorical(k_action, jnp.log(probability_A))
            _, after, reward, terminated, _ = env.step_env(k_env, state, action, params)
            after = jax.tree.map(lambda new, old: jnp.where(running, new, old), after, state)
            ends = terminated | env.is_truncated(after, params)
            out = (state.agent, after.agent, action, _target(state), state.progress, running, running & (reward > 0))
            return (after, running & ~ends), out

        (state, running), trace = jax.lax.scan(step, (state, jnp.array(True)), jnp.arange(length))
        *steps, running_L, success_L = trace
        in_time = state.time + steps_to_finish(env, state, distance_ON) <= params.max_steps_in_episode
        keep = success_L.any() | (running & in_time)
        return state.objects_J, steps, running_L & keep

    objects_BJ, (agent_BL, after_BL, action_BL, target_BL, progress_BL), valid_BL = jax.vmap(episode)(
        jax.random.split(key, batch)
    )
    path_BT = jnp.concatenate([agent_BL, after_BL[:, -1:]], axis=1)
    obs_BTF = jax.vmap(jax.vmap(env.encode, in_axes=(0, None)))(path_BT, objects_BJ)
    return Demonstrations(
        obs_BLF=obs_BTF[:, :-1],
        next_obs_BLF=obs_BTF[:, 1:],
        action_BL=action_BL,
        target_BL=target_BL,
        progress_BL=progress_BL,
        valid_BL=valid_BL,
    )


def _target(state: EnvState) -> jax.Array:
    """The colour being pursued; once the task is finished, whatever its last entry is."""
    return state.task_K[jnp.minimum(state.progress, state.task_K.shape[0] - 1)]


def _landings(env: GridworldPinpad, agent: jax.Array, objects_J: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cell (4,) after each action from a cell, and the colour (4,) that the move visits, -1 for none."""
    landing_A = env.landing_cells(agent, objects_J)
    colour_A = jax.vmap(env.colour_at, in_axes=(0, None))(landing_A, objects_J)
    return landing_A, jnp.where(landing_A != agent, colour_A, -1)


def _costs(
    landing_A: jax.Array, colour_A: jax.Array, agent: jax.Array, target: jax.Array, distance_ON: jax.Array
) -> jax.Array:
    """Steps (4,) from each landing cell to the target; UNREACHABLE for visits to other colours and for not moving,
    which is never of use but would cost nothing to an agent that stands on the colour it must visit again."""
    useless_A = (landing_A == agent) | ((colour_A >= 0) & (colour_A != target))
    return jnp.where(useless_A, UNREACHABLE, distance_ON[target, landing_A])

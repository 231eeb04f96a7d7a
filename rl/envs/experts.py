"""The exact shortest-path expert of gridworld-pinpad and demonstrations made by it on device (paper C.1.1).

The expert walks a shortest path to the next colour of its task; other colours and walls are obstacles; it is uniform
over all optimal actions. With probability eps it takes a random action that does not end the episode instead.
Distances come from dynamic programming (value iteration to its fixed point), one field per colour.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rl.envs.gridworld_pinpad import EnvParams, EnvState, GridworldPinpad

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
    landing_A = env.landing_cells(state.agent, state.objects_J)
    colour_A = jax.vmap(env.colour_at, in_axes=(0, None))(landing_A, state.objects_J)
    target = state.task_K[jnp.minimum(state.progress, state.task_K.shape[0] - 1)]
    visits_A = (landing_A != state.agent) & (colour_A >= 0)
    wrong_A = visits_A & (colour_A != target)
    last = state.progress + 1 == (state.task_K >= 0).sum()
    ends_A = wrong_A | (visits_A & (colour_A == target) & last)
    cost_A = jnp.where(wrong_A, UNREACHABLE, distance_ON[target][landing_A])
    optimal_A = (cost_A == cost_A.min()) & (cost_A < UNREACHABLE)
    safe_A = ~ends_A

    def uniform(chosen_A: jax.Array) -> jax.Array:
        return chosen_A / jnp.maximum(chosen_A.sum(), 1)

    best_A = jnp.where(optimal_A.any(), uniform(optimal_A), uniform(safe_A))
    noisy_A = jnp.where(safe_A.any(), uniform(safe_A), best_A)
    mixed_A = (1 - epsilon) * best_A + epsilon * noisy_A
    # An agent walled in by wrong colours has no safe and no optimal action; it must still do something.
    return jnp.where(mixed_A.sum() > 0, mixed_A, 0.25)


def demonstrations(
    key: jax.Array, env: GridworldPinpad, params: EnvParams, batch: int, length: int, epsilon: float | jax.Array = 0.0
) -> Demonstrations:
    """`batch` expert episodes in fresh layouts, the first `length` steps of each.

    Only successful episodes are kept (`valid_BL` is false throughout for the others): an episode still under way after
    `length` steps is kept while its current colour can be reached and the horizon is longer than `length`.
    """

    def episode(key: jax.Array):
        k_reset, k_steps = jax.random.split(key)
        _, state = env.reset_env(k_reset, params)
        distance_ON = colour_distances(env, state.objects_J)

        def step(carry, key):
            state, running, solvable = carry
            probability_A = action_probabilities(env, state, distance_ON, epsilon)
            action = jax.random.categorical(key, jnp.log(probability_A))
            target = state.task_K[jnp.minimum(state.progress, state.task_K.shape[0] - 1)]
            solvable = solvable & (~running | (distance_ON[target, state.agent] < UNREACHABLE))
            _, after, reward, terminated, _ = env.step_env(key, state, action, params)
            after = jax.tree.map(lambda new, old: jnp.where(running, new, old), after, state)
            ends = terminated | (after.time >= params.max_steps_in_episode)
            out = (state.agent, after.agent, action, target, state.progress, running, running & (reward > 0))
            return (after, running & ~ends, solvable), out

        start = (state, jnp.array(True), jnp.array(True))
        (_, running, solvable), trace = jax.lax.scan(step, start, jax.random.split(k_steps, length))
        *steps, running_L, success_L = trace
        keep = success_L.any() | (running & solvable)
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

"""gridworld-pinpad: visit coloured cells in a hidden order (Kobayashi et al., arXiv 2512.20605, App. A).

A G x G grid holds O uniquely coloured cells and W walls at random distinct cells, and an agent. A task is a list of
colours to visit in order; it is never observed. Four actions move the agent; a move into a wall or off the grid does
nothing. A colour counts as visited when the agent moves onto its cell from another cell. The episode terminates on
success (reward 1) and on a coloured cell that is not the next one (reward 0), and is truncated at the horizon.

Observation codings, both one-hot throughout, so that an observation is a tuple of categorical factors (`factors`):

- ``absolute`` (the paper's): for every wall, every colour and the agent, one-hot of its cell: G^2 (W + O + 1) features.
- ``relative`` (what the paper gives its ant, here on the grid): for every colour and wall, one-hot row offset and
  one-hot column offset from the agent, 2G - 1 values each, then the agent's row and column, G values each, then what
  lies on the cell in each of the four directions: nothing, a wall or the edge, or one of the colours (O + 2 values).

Decisions where the paper is silent: cells are numbered row by row; actions are up, down, left, right; the agent starts
on an empty cell; stepping onto the colour visited last counts as a wrong colour unless the task asks for it again; an
episode that terminates on its last step before the horizon is truncated too. A step from a state that has ended already
means nothing: reset first.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from gymnax.environments import environment, spaces

Coding = Literal["absolute", "relative"]
ACTION_NAMES = ("up", "down", "left", "right")
_MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))


@struct.dataclass
class EnvState(environment.EnvState):
    """`time` steps so far; `agent` cell; `objects_J` cells of the O colours, then of the W walls; `task_K` colours
    padded with -1; `progress` colours visited so far. All int32."""

    time: jax.Array  # pyright: ignore[reportIncompatibleVariableOverride]  # gymnax says int but traces it too
    agent: jax.Array
    objects_J: jax.Array
    task_K: jax.Array
    progress: jax.Array


@struct.dataclass
class EnvParams(environment.EnvParams):
    """Traced: `tasks_NK` colours padded with -1, a row drawn uniformly at reset; `max_steps_in_episode` the horizon."""

    tasks_NK: jax.Array = struct.field(default_factory=lambda: jnp.zeros((1, 1), jnp.int32))
    max_steps_in_episode: int | jax.Array = 100  # pyright: ignore[reportIncompatibleVariableOverride]  # traced


@dataclass(frozen=True)
class GridworldPinpad(environment.Environment[EnvState, EnvParams]):
    """The environment for one set of shapes. Raises ValueError where the objects do not fit the grid."""

    size: int = 7
    colours: int = 8
    walls: int = 4
    coding: Coding = "absolute"

    def __post_init__(self) -> None:
        if self.size < 2:
            raise ValueError(f"GridworldPinpad: size is {self.size}, expected at least 2")
        if self.colours < 1 or self.walls < 0:
            raise ValueError(
                f"GridworldPinpad: colours is {self.colours} and walls {self.walls}, expected >= 1 and >= 0"
            )
        cells, needed = self.size**2, self.colours + self.walls + 1
        if needed > cells:
            raise ValueError(
                f"GridworldPinpad: {self.colours} colours, {self.walls} walls and the agent need {needed} cells, "
                f"but a grid of size {self.size} has {cells}"
            )
        if self.coding not in ("absolute", "relative"):
            raise ValueError(f"GridworldPinpad: coding is {self.coding!r}, expected 'absolute' or 'relative'")

    @property
    def default_params(self) -> EnvParams:
        """A single task that visits the colours in order."""
        return self.make_params([tuple(range(self.colours))])

    def make_params(self, tasks: Sequence[Sequence[int]], horizon: int = 100) -> EnvParams:
        """Parameters for a list of tasks (colours in order). Raises ValueError for an impossible task."""
        if not tasks or any(len(task) == 0 for task in tasks):
            raise ValueError(f"GridworldPinpad: tasks is {tasks}, expected at least one, none of them empty")
        if horizon < 1:
            raise ValueError(f"GridworldPinpad: horizon is {horizon}, expected at least 1")
        for task in tasks:
            for colour in task:
                if not 0 <= colour < self.colours:
                    raise ValueError(
                        f"GridworldPinpad: task {task} names colour {colour}, expected 0..{self.colours - 1}"
                    )
        longest = max(len(task) for task in tasks)
        table = [list(task) + [-1] * (longest - len(task)) for task in tasks]
        return EnvParams(tasks_NK=jnp.array(table, jnp.int32), max_steps_in_episode=horizon)

    @property
    def num_actions(self) -> int:
        """Four directions."""
        return 4

    @property
    def factors(self) -> tuple[int, ...]:
        """Sizes of the categorical factors whose one-hot codes make up an observation."""
        if self.coding == "absolute":
            return (self.size**2,) * (self.walls + self.colours + 1)
        offsets = (2 * self.size - 1,) * (2 * (self.colours + self.walls))
        return (*offsets, *(self.size,) * 2, *(self.colours + 2,) * self.num_actions)

    @property
    def observation_size(self) -> int:
        """Number of features F of an observation."""
        return sum(self.factors)

    def action_space(self, params: EnvParams) -> spaces.Discrete:
        """Four discrete actions."""
        return spaces.Discrete(self.num_actions)

    def observation_space(self, params: EnvParams) -> spaces.Box:
        """F features in [0, 1]."""
        return spaces.Box(0.0, 1.0, (self.observation_size,), jnp.float32)

    def reset_env(self, key: jax.Array, params: EnvParams) -> tuple[jax.Array, EnvState]:
        """Draw a layout and a task. Returns (obs_F, state)."""
        k_cells, k_task = jax.random.split(key)
        cells = jax.random.permutation(k_cells, self.size**2)[: self.colours + self.walls + 1].astype(jnp.int32)
        task_K = params.tasks_NK[jax.random.randint(k_task, (), 0, params.tasks_NK.shape[0])]
        zero = jnp.zeros((), jnp.int32)
        state = EnvState(time=zero, agent=cells[-1], objects_J=cells[:-1], task_K=task_K, progress=zero)
        return self.encode(state.agent, state.objects_J), state

    def step_env(
        self, key: jax.Array, state: EnvState, action: Any, params: EnvParams
    ) -> tuple[jax.Array, EnvState, jax.Array, jax.Array, dict[str, jax.Array]]:
        """One move. Returns (obs_F, state, reward, terminated, info); deterministic, `key` is unused."""
        landing = self.landing_cells(state.agent, state.objects_J)[action]
        colour = self.colour_at(landing, state.objects_J)
        visited = (landing != state.agent) & (colour >= 0)
        correct = visited & (colour == state.task_K[state.progress])
        progress = state.progress + correct.astype(jnp.int32)
        success = correct & (progress == task_length(state.task_K))
        terminated = (visited & ~correct) | success
        state = replace(state, time=state.time + 1, agent=landing, progress=progress)
        info = {"success": success, "visited": jnp.where(visited, colour, -1), "discount": 1.0 - terminated}
        return self.encode(landing, state.objects_J), state, success.astype(jnp.float32), terminated, info

    def encode(self, agent: jax.Array, objects_J: jax.Array) -> jax.Array:
        """Observation (F,) of an agent cell and object cells; broadcast over leading axes with `jax.vmap`."""
        if self.coding == "absolute":
            walls, colours = objects_J[self.colours :], objects_J[: self.colours]
            cells = jnp.concatenate([walls, colours, agent[None]])
            return jax.nn.one_hot(cells, self.size**2, dtype=jnp.float32).reshape(-1)
        row, column = agent // self.size, agent % self.size
        offsets = jnp.stack([objects_J // self.size - row, objects_J % self.size - column], axis=-1)
        relative = jax.nn.one_hot(offsets + self.size - 1, 2 * self.size - 1, dtype=jnp.float32)
        own = jax.nn.one_hot(jnp.stack([row, column]), self.size, dtype=jnp.float32)
        landing_A = self.landing_cells(agent, objects_J)
        colour_A = jax.vmap(self.colour_at, in_axes=(0, None))(landing_A, objects_J)
        content_A = jnp.where(landing_A == agent, 1, jnp.where(colour_A >= 0, colour_A + 2, 0))
        around = jax.nn.one_hot(content_A, self.colours + 2, dtype=jnp.float32)
        return jnp.concatenate([relative.reshape(-1), own.reshape(-1), around.reshape(-1)])

    def decode(self, obs_F: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Agent cell and object cells of an observation: the inverse of `encode`."""
        if self.coding == "absolute":
            cells = obs_F.reshape(-1, self.size**2).argmax(-1).astype(jnp.int32)
            return cells[-1], jnp.concatenate([cells[self.walls : -1], cells[: self.walls]])
        offsets_end = 2 * (self.colours + self.walls) * (2 * self.size - 1)
        relative, own = obs_F[:offsets_end], obs_F[offsets_end : offsets_end + 2 * self.size]
        own = own.reshape(2, self.size).argmax(-1).astype(jnp.int32)
        offsets = relative.reshape(-1, 2, 2 * self.size - 1).argmax(-1).astype(jnp.int32) - (self.size - 1)
        at = own[None] + offsets
        return own[0] * self.size + own[1], at[:, 0] * self.size + at[:, 1]

    def turn(self, obs_F: jax.Array, symmetry: jax.Array) -> jax.Array:
        """The observation as it would be in the turned or mirrored world: `symmetry` 0..7, 0 the identity."""
        agent, objects_J = self.decode(obs_F)

        def turned(cell: jax.Array) -> jax.Array:
            row, column = cell // self.size, cell % self.size
            row, column = jnp.where(symmetry & 4, column, row), jnp.where(symmetry & 4, row, column)
            row = jnp.where(symmetry & 2, self.size - 1 - row, row)
            column = jnp.where(symmetry & 1, self.size - 1 - column, column)
            return row * self.size + column

        return self.encode(turned(agent), turned(objects_J))

    def landing_cells(self, agent: jax.Array, objects_J: jax.Array) -> jax.Array:
        """Cell (4,) the agent would stand on after each action."""
        moves = jnp.array(_MOVES, jnp.int32)
        row, column = agent // self.size + moves[:, 0], agent % self.size + moves[:, 1]
        inside = (row >= 0) & (row < self.size) & (column >= 0) & (column < self.size)
        target = row * self.size + column
        blocked = (target[:, None] == objects_J[None, self.colours :]).any(-1)
        return jnp.where(inside & ~blocked, target, agent)

    def colour_at(self, cell: jax.Array, objects_J: jax.Array) -> jax.Array:
        """Colour of a cell, -1 where it has none."""
        match = objects_J[: self.colours] == cell
        return jnp.where(match.any(), jnp.argmax(match), -1).astype(jnp.int32)


def task_length(task_K: jax.Array) -> jax.Array:
    """Number of colours in a task padded with -1."""
    return (task_K >= 0).sum()


def subgoal_transitions(task: Sequence[int]) -> set[tuple[int, int]]:
    """Pairs of colours that follow each other in a task."""
    return set(pairwise(task))


def tasks_without(colours: int, length: int, withheld: Collection[tuple[int, int]]) -> list[tuple[int, ...]]:
    """All tasks of a length, no colour twice in a row, that contain none of the withheld transitions."""
    if length < 1:
        raise ValueError(f"tasks_without: length is {length}, expected at least 1")
    tasks: list[tuple[int, ...]] = [(colour,) for colour in range(colours)]
    for _ in range(length - 1):
        tasks = [
            (*task, colour)
            for task in tasks
            for colour in range(colours)
            if colour != task[-1] and (task[-1], colour) not in withheld
        ]
    return tasks


def parse_task(text: str) -> tuple[int, ...]:
    """Colours of a task written as digits, as in the paper's tables: '0145' -> (0, 1, 4, 5)."""
    if not text.isdecimal():
        raise ValueError(f"parse_task: task is {text!r}, expected digits only")
    return tuple(int(digit) for digit in text)


_TABLE_A1 = """
014501 014523 016723 230145 236723 236745 450145 450167
452367 672301 672367 674501 016745 230167 452301 674523
"""
PAPER_PRETRAINING = tuple(map(parse_task, _TABLE_A1.split()))
"""Table A1: the sixteen pretraining tasks of the paper's grid world."""

PAPER_POST_TRAINING = parse_task("012345670123")
"""The paper's post-training task: four subgoal transitions that no pretraining task has, and twice the length."""

"""gridworld-pinpad written a second time, from its definition, for the tests of the environment and of its expert."""

from collections import deque

import numpy as np
import pytest

STEPS = ((-1, 0), (1, 0), (0, -1), (0, 1))
FAR = 10**6


class Oracle:
    """One layout and task in plain Python; cells are (row, column)."""

    def __init__(self, env, objects, task, horizon, agent):
        cells = [divmod(int(cell), env.size) for cell in objects]
        self.size, self.coding, self.horizon = env.size, env.coding, int(horizon)
        self.colours, self.walls = cells[: env.colours], cells[env.colours :]
        self.task = [int(colour) for colour in task if colour >= 0]
        self.agent, self.time, self.progress = divmod(int(agent), env.size), 0, 0

    def go(self, cell, action):
        """Where a move leads."""
        to = cell[0] + STEPS[action][0], cell[1] + STEPS[action][1]
        return to if self.inside(to) and to not in self.walls else cell

    def inside(self, cell):
        """Whether a cell is on the grid."""
        return all(0 <= number < self.size for number in cell)

    def rules(self, cell, progress, action):
        """(cell, progress, ended) after a move."""
        to = self.go(cell, action)
        if to == cell or to not in self.colours:
            return to, progress, False
        if self.colours.index(to) != self.task[progress]:
            return to, progress, True
        return to, progress + 1, progress + 1 == len(self.task)

    def step(self, action):
        """(reward, terminated, truncated)."""
        self.agent, self.progress, ended = self.rules(self.agent, self.progress, int(action))
        self.time += 1
        return float(self.progress == len(self.task)), ended, self.time >= self.horizon

    def observe(self):
        """The observation in the environment's coding."""
        if self.coding == "absolute":
            cells = [*self.walls, *self.colours, self.agent]
            table = np.zeros((len(cells), self.size, self.size), np.float32)
            for index, (row, column) in enumerate(cells):
                table[index, row, column] = 1
            return table.ravel()
        ones, at = [], 0
        for cell in [*self.colours, *self.walls]:
            for axis in (0, 1):
                ones.append(at + cell[axis] - self.agent[axis] + self.size - 1)
                at += 2 * self.size - 1
        ones += [at + self.agent[0], at + self.size + self.agent[1]]
        at += 2 * self.size
        for step in ((-1, 0), (1, 0), (0, -1), (0, 1)):
            cell = (self.agent[0] + step[0], self.agent[1] + step[1])
            inside = 0 <= cell[0] < self.size and 0 <= cell[1] < self.size
            if not inside or cell in [tuple(wall) for wall in self.walls]:
                content = 1
            elif cell in [tuple(colour) for colour in self.colours]:
                content = 2 + [tuple(colour) for colour in self.colours].index(cell)
            else:
                content = 0
            ones.append(at + content)
            at += 2 + len(self.colours)
        features = np.zeros(at, np.float32)
        features[ones] = 1
        return features

    def standing_places(self):
        """Cells the agent can be on."""
        grid = [(row, column) for row in range(self.size) for column in range(self.size)]
        return [cell for cell in grid if cell not in self.walls]

    def distances(self, colour):
        """Steps (G, G) from every cell to a colour if every other colour is in the way; FAR where there is no path."""
        goal = self.colours[colour]
        away, queue = np.full((self.size, self.size), FAR), deque([goal])
        away[goal] = 0
        while queue:
            cell = queue.popleft()
            # Walking back from an obstacle would be walking through it.
            if cell in self.walls or (cell in self.colours and cell != goal):
                continue
            for row, column in STEPS:
                to = cell[0] + row, cell[1] + column
                if self.inside(to) and away[to] == FAR:
                    away[to] = away[cell] + 1
                    queue.append(to)
        return away

    def costs(self):
        """Fewest steps to success from every (cell, progress) that can still succeed, by breadth-first search over the
        whole task."""
        before, away = {}, {}
        for cell in self.standing_places():
            for progress in range(len(self.task)):
                for action in range(4):
                    to, then, ended = self.rules(cell, progress, action)
                    if not ended or then == len(self.task):
                        before.setdefault((to, then), []).append((cell, progress))
        queue = deque(key for key in before if key[1] == len(self.task))
        away.update(dict.fromkeys(queue, 0))
        while queue:
            key = queue.popleft()
            for previous in before.get(key, ()):
                if previous not in away:
                    away[previous] = away[key] + 1
                    queue.append(previous)
        return away

    def best_actions(self, costs, cell, progress):
        """Every action that lies on a shortest way to success."""
        best = []
        for action in range(4):
            to, then, ended = self.rules(cell, progress, action)
            failed = ended and then < len(self.task)
            if not failed and costs.get((to, then), FAR) == costs[cell, progress] - 1:
                best.append(action)
        return best

    def safe_actions(self, cell, progress):
        """Every action that does not end the episode."""
        return [action for action in range(4) if not self.rules(cell, progress, action)[2]]


@pytest.fixture(scope="session")
def oracle():
    """The class `Oracle`; test modules can't import from each other."""
    return Oracle

"""A policy that walks through a Memory Maze, so that places are left and seen again.

It sees the layout and its own pose, as the scripted policy of the published Memory Maze data does
(Pasukonis, Lillicrap, Hafner 2022, https://arxiv.org/abs/2210.13383). A model that learns from its episodes sees only
frames and actions.
"""

import collections
from collections.abc import Mapping
from typing import Any

import numpy as np

from config import ConfigError

FORWARD, LEFT, RIGHT, FORWARD_LEFT, FORWARD_RIGHT = range(1, 6)
"""The actions of Memory Maze, after 0, which does nothing."""

NOISE = 0.1
"""The probability of a random action."""

PATIENCE = 20
"""The number of actions after which the walker gives up a cell that it can't reach."""

Cell = tuple[int, int]
"""Row and column of a maze."""


class Walker:
    """A walker: it draws a free cell, takes a shortest path there, and draws the next one.

    Positions and directions are (x, y) in cells, as Memory Maze gives them: a position is in cell (floor(y), floor(x)).
    """

    def __init__(self, seed: int):
        self.random = np.random.default_rng(seed)
        self.path: list[Cell] = []
        """The cells that are left to visit, the next one last."""
        self.tried = 0
        """The number of actions towards the next cell."""

    def __call__(self, observed: Mapping[str, Any]) -> np.ndarray:
        """Return an action for the observations `maze_layout` [H, W], `agent_pos` [2] and `agent_dir` [2].

        Raises:
            ConfigError: an observation is missing.
        """
        try:
            free, position, direction = (observed[name] for name in ("maze_layout", "agent_pos", "agent_dir"))
        except KeyError as error:
            raise ConfigError(f"policy: walk needs the observation {error}; name a memory_maze as --env") from None
        column, row = np.floor(position).astype(int).tolist()
        here = row, column
        if self.path and self.path[-1] == here:
            self.path.pop()
            self.tried = 0
        if not self.path or self.tried == PATIENCE:
            cells = np.argwhere(free)
            row, column = cells[self.random.integers(len(cells))].tolist()
            self.path, self.tried = shortest_path(free, here, (row, column)), 0
        self.tried += 1
        if self.random.random() < NOISE or not self.path:
            return np.asarray(self.random.integers(6))
        row, column = self.path[-1]
        x, y = (column + 0.5, row + 0.5) - position
        dx, dy = direction
        angle = np.degrees(np.arctan2(dx * y - dy * x, dx * x + dy * y))  # positive to the left
        if abs(angle) < 10:
            return np.asarray(FORWARD)
        if abs(angle) < 40:
            return np.asarray(FORWARD_LEFT if angle > 0 else FORWARD_RIGHT)
        return np.asarray(LEFT if angle > 0 else RIGHT)


def shortest_path(free: np.ndarray, start: Cell, goal: Cell) -> list[Cell]:
    """Return the cells of a shortest path without its start, the goal first; [] if there is none.

    Args:
        free: whether each cell is free, [H, W].
        start: a cell.
        goal: a cell.
    """
    H, W = free.shape
    after: dict[Cell, Cell] = {goal: goal}  # the next cell on the way to the goal
    queue = collections.deque([goal])
    while queue and start not in after:
        row, column = queue.popleft()
        for cell in (row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1):
            if 0 <= cell[0] < H and 0 <= cell[1] < W and free[cell] and cell not in after:
                after[cell] = row, column
                queue.append(cell)
    path: list[Cell] = []
    cell = start
    while cell in after and cell != goal:
        cell = after[cell]
        path.append(cell)
    return path[::-1]

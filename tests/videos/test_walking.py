"""The policy `walk`, in a world of cells that moves as Memory Maze does."""

import numpy as np
import pytest

import record
from config import ConfigError
from videos.environments import Dot
from videos.walking import shortest_path

# Two rooms, joined by a corridor; the last row is closed off.
FREE = np.array(
    [
        [1, 1, 1, 0, 1, 1, 1],
        [1, 1, 1, 0, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0, 1],
    ],
    np.uint8,
)


def walk(seed, steps):
    """Return the cells that the policy visits, [steps, 2]. A step turns by 18 degrees or moves by 0.2 cells."""
    policy = record.make_policy("walk", Dot.space, seed)
    position, angle, cells = np.array([0.5, 0.5]), 0.0, []
    for _ in range(steps):
        direction = np.array([np.cos(angle), np.sin(angle)])
        action = policy({"maze_layout": FREE, "agent_pos": position, "agent_dir": direction})
        angle += np.radians(18) * ((action in (2, 4)) - int(action in (3, 5)))
        if action in (1, 4, 5):
            new = position + 0.2 * direction
            column, row = np.floor(new).astype(int)
            if 0 <= row < 5 and 0 <= column < 7 and FREE[row, column]:
                position = new
        cells.append(np.floor(position[::-1]).astype(int))
    return np.array(cells)


def test_walk_sees_both_rooms_again_and_again():
    cells = walk(0, 2000)
    assert len(np.unique(cells, axis=0)) > 15  # of the 19 cells that can be reached
    right = (cells[:, 1] > 3).astype(int)
    assert (np.diff(right) != 0).sum() > 6
    np.testing.assert_array_equal(cells, walk(0, 2000))
    assert (cells != walk(1, 2000)).any()


def test_shortest_paths_avoid_walls():
    path = shortest_path(FREE, (0, 0), (0, 4))
    assert path[0] == (0, 4) and len(path) == 8 and all(FREE[cell] for cell in path)
    steps = np.diff([(0, 0), *path[::-1]], axis=0)
    assert (np.abs(steps).sum(1) == 1).all()
    assert shortest_path(FREE, (0, 0), (4, 0)) == [] and shortest_path(FREE, (1, 1), (1, 1)) == []


def test_walk_needs_a_maze():
    with pytest.raises(
        ConfigError, match="policy: walk needs the observation 'maze_layout'; name a memory_maze as --env"
    ):
        record.record_episode(record.Recording("dot", "walk", 0, 5), "train", 0)

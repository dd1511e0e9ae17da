"""A common interface to environments of several packages, for recording episodes with record.py.

A package is only imported when one of its environments is made.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import io
import logging
import os
import sys
from typing import Any, NamedTuple, Protocol

import numpy as np

from config import ConfigError
from videos.dot_world import DotWorld

MAZES = ("memory_maze_9x9", "memory_maze_11x11", "memory_maze_13x13", "memory_maze_15x15")

NAMES = f"dot, crafter, {', '.join(MAZES)}, or an id of Gymnasium such as CartPole-v1 or module:Name-v0"


SIMULATORS = (
    "ale_py",
    "crafter",
    "dm_control",
    "gymnasium",
    "labmaze",
    "memory_maze",
    "mujoco",
    "opensimplex",
    "pygame",
)
"""Modules whose versions determine what environments do and show."""


class ActionSpace(NamedTuple):
    """The actions that an environment takes: whole numbers from 0, or floats."""

    shape: tuple[int, ...]
    """The shape of an action; () if it is a single number."""
    choices: np.ndarray | None = None
    """The number of choices for each entry, in an action's shape; None for floats."""
    low: Any = 0.0
    high: Any = 0.0
    """The bounds of floats, in an action's shape."""

    @property
    def size(self) -> int:
        """The number of entries of an action as a vector."""
        return int(np.prod(self.shape) if self.choices is None else self.choices.sum())

    def draw(self, random: np.random.Generator) -> np.ndarray:
        """Draw an action uniformly.

        Raises:
            ConfigError: the floats have no bounds.
        """
        if self.choices is not None:
            return np.asarray(random.integers(self.choices))
        if not np.isfinite([self.low, self.high]).all():
            raise ConfigError("policy: can't draw from actions without bounds; name a module:function")
        return np.asarray(random.uniform(self.low, self.high))

    def vector(self, action: np.ndarray) -> np.ndarray:
        """Return an action as float32 [A]: whole numbers one-hot, one after another; floats as they are.

        Raises:
            ConfigError: the action isn't in this space.
        """
        if action.shape == self.shape:
            if self.choices is None and action.dtype.kind in "iuf" and np.isfinite(action).all():
                return action.astype(np.float32).reshape(-1)
            if (
                self.choices is not None
                and action.dtype.kind in "iu"
                and ((action >= 0) & (action < self.choices)).all()
            ):
                pairs = zip(self.choices.flat, action.flat, strict=True)
                return np.concatenate([np.eye(n, dtype=np.float32)[i] for n, i in pairs])
        wanted = "finite floats" if self.choices is None else f"whole numbers from 0, below {self.choices.tolist()}"
        raise ConfigError(f"policy: an action has to be {wanted}, of shape {list(self.shape)}, got {action.tolist()}")


class Step(NamedTuple):
    """What an environment returns after an action or a reset."""

    frame: Any
    """uint8 [H, W, 3], [H, W, 1] or [H, W]."""
    others: dict[str, Any]
    """Other observations, by name."""
    reward: float = 0.0
    last: bool = False
    terminal: bool = False
    """Whether the episode ends for a reason within the world, not because of a time limit."""


class Environment(Protocol):
    """An environment for one episode."""

    space: ActionSpace
    limited: bool
    """Whether the environment ends an episode by itself."""

    def reset(self) -> Step: ...

    def step(self, action: np.ndarray) -> Step: ...

    def close(self) -> None: ...


class Dot:
    """The environment of `videos.dot_world`."""

    space = ActionSpace((2,), low=np.full(2, -1.0), high=np.full(2, 1.0))
    limited = False

    def __init__(self, seed: int):
        self.seed, self.world = seed, DotWorld()

    def reset(self) -> Step:
        return Step(self.world.reset(self.seed), {})

    def step(self, action: np.ndarray) -> Step:
        return Step(self.world.step(action), {})

    def close(self) -> None:
        pass


class Gymnasium:
    """A Gymnasium environment, given by its id."""

    def __init__(self, name: str, seed: int):
        gymnasium = import_package("gymnasium")
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # so that pygame opens no window
        self.seed, self.env = seed, gymnasium.make(name, render_mode="rgb_array", disable_env_checker=True)
        modes = self.env.metadata.get("render_modes", [])
        if "rgb_array" not in modes:
            raise ConfigError(f"env: {name} can't render rgb_array, but {modes}; name another")
        self.limited = self.env.spec.max_episode_steps is not None
        space, spaces = self.env.action_space, gymnasium.spaces
        if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
            choices = np.asarray(space.n if isinstance(space, spaces.Discrete) else space.nvec)
            self.space = ActionSpace(choices.shape, choices)
        elif isinstance(space, spaces.Box) and space.dtype.kind == "f":
            self.space = ActionSpace(space.shape, low=space.low, high=space.high)
        else:
            raise ConfigError(
                f"env: {name} takes actions in {space}; name one with Discrete, MultiDiscrete or Box of floats"
            )

    def reset(self) -> Step:
        observation, _ = self.env.reset(seed=self.seed)
        return Step(self.env.render(), self._others(observation))

    def step(self, action: np.ndarray) -> Step:
        space = self.env.action_space
        action = action.astype(space.dtype)
        if self.space.choices is not None:
            action = action + space.start
        observation, reward, terminal, truncated, _ = self.env.step(action)
        return Step(self.env.render(), self._others(observation), reward, terminal or truncated, terminal)

    def _others(self, observation: Any) -> dict[str, Any]:
        if isinstance(observation, dict):
            return observation
        picture = isinstance(observation, np.ndarray) and observation.dtype == np.uint8 and observation.ndim == 3
        return {} if picture else {"observation": observation}

    def close(self) -> None:
        self.env.close()


class Crafter:
    """The environment of the package crafter."""

    limited = True

    def __init__(self, seed: int):
        crafter = import_package("crafter")
        # Crafter removes random animals from sets. Their order depends on memory addresses, unless hashes are equal.
        crafter.objects.Object.__hash__ = lambda self: 0
        self.env = crafter.Env(seed=seed)
        choices = np.asarray(self.env.action_space.n)
        self.space = ActionSpace(choices.shape, choices)

    def reset(self) -> Step:
        return Step(self.env.reset(), {})

    def step(self, action: np.ndarray) -> Step:
        frame, reward, last, info = self.env.step(int(action))
        return Step(frame, {}, reward, last, info["discount"] == 0)

    def close(self) -> None:
        pass


class MemoryMaze:
    """Memory Maze with the observations of its ExtraObs ids: the layout, the positions of the agent and the targets."""

    limited = True

    def __init__(self, name: str, seed: int):
        if sys.platform == "linux":
            os.environ.setdefault("MUJOCO_GL", "egl")  # needs no screen
        make = getattr(import_package("memory_maze", ", with Python 3.11 or 3.12").tasks, name)
        logging.getLogger("absl").setLevel(logging.ERROR)  # dm_control prints a harmless warning at each start
        self.env = make(seed=seed, global_observables=True)
        choices = np.asarray(self.env.action_spec().num_values)
        self.space = ActionSpace(choices.shape, choices)

    def reset(self) -> Step:
        return self._step(self.env.reset())

    def step(self, action: np.ndarray) -> Step:
        return self._step(self.env.step(int(action)))

    def _step(self, step: Any) -> Step:
        others = dict(step.observation)
        return Step(others.pop("image"), others, step.reward or 0.0, step.last(), step.last() and not step.discount)

    def close(self) -> None:
        self.env.close()


def make(name: str, seed: int) -> Environment:
    """Make an environment by its name. Its episode follows from the seed and the actions.

    Raises:
        ConfigError: no environment has that name, it needs a package that is missing, or it can't be recorded.
    """
    try:
        if name == "dot":
            return Dot(seed)
        if name == "crafter":
            return Crafter(seed)
        return MemoryMaze(name, seed) if name in MAZES else Gymnasium(name, seed)
    except ConfigError:
        raise
    except Exception as error:  # packages raise errors of many types
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(f"env: {name} can't be made ({what}); name {NAMES}") from None


def import_package(module: str, remedy: str = "") -> Any:
    """Import a package of requirements-record.txt.

    Raises:
        ConfigError: the package, or one that it needs, is missing.
    """
    try:
        # Memory Maze and Crafter import the old gym, which prints four lines saying that nobody maintains it.
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(f"env: {error}; pip install -r requirements-record.txt{remedy}") from None


@functools.cache  # it looks through all installed packages
def versions(name: str) -> dict[str, str]:
    """Return the versions of the packages that an environment depends on, once it has run in this process."""
    modules = {*SIMULATORS, name.partition(":")[0]} & set(sys.modules)
    packages = importlib.metadata.packages_distributions() if modules else {}
    found = sorted({package for module in modules for package in packages.get(module, [])})
    return {package: importlib.metadata.version(package) for package in found}

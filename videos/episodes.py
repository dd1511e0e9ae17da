"""Episodes: frames with the actions that led to them, in .npz files as world models' replay buffers keep them.

A file holds `image`, uint8 [T, H, W, 1 or 3], and `action`, [T, A] or whole numbers [T]. `is_first`, bool [T], is true
at the first frame of each episode. Other arrays are read by analyses only.
"""

import re
import zipfile
import zlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from config import ConfigError
from system.files import load_arrays
from videos.decoded import Clip, Folder, Video, image_shape, listed


class ActionFormat(NamedTuple):
    """The format of a file's actions, which the file doesn't say: configuration keys of these names."""

    action_leads: bool
    num_actions: int | None


class Episodes(Folder):
    """The episodes below a folder, in the order of their files' paths. The files are only read to decode them."""

    SUFFIXES = (".npz",)

    def __init__(self, folder: Path, actions: ActionFormat, keys: str, belongs: Callable[[Path], bool]):
        """Find the files. `folder`, `keys` and `belongs` are those of `Folder`."""
        super().__init__(folder, keys, belongs)
        self.action_format = actions

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: Any) -> Any:
        return self.videos[index]

    @cached_property
    def videos(self) -> list[Video]:
        """The episodes with their actions. Files that can't be read are included: decoding reports them.

        Raises:
            ConfigError: actions are missing or no numbers, or differ in size or number.
        """
        found: list[Video] = []
        others: set[str] = set()
        sizes: dict[int, Path] = {}
        for path in self.paths:
            name = str(path.relative_to(self.folder))
            try:
                file = read(path, self.action_format)
            except OSError:
                found.append(Video(name, path))
                continue
            others |= set(file.others)
            sizes.setdefault(0 if file.actions is None else file.actions.shape[1], path)
            if len(sizes) > 1:
                (other, where), (own, _) = sizes.items()
                raise ConfigError(
                    f"datadir: {path} has {own} entries per action, {where} has {other}; keep only files with equally "
                    f"many in {self.folder}"
                )
            for first, stop in zip(file.firsts, [*file.firsts[1:], file.frames], strict=True):
                actions = None if file.actions is None else file.actions[first:stop]
                episode = name if len(file.firsts) == 1 else f"{name}[{first}:{stop}]"
                found.append(Video(episode, Clip(path, first, stop), actions))
        if others:
            print(f"Unused arrays of the episodes in {self.folder}: {listed(sorted(others))}")
        return found


def arrays(folder: Path, episode: str, frames: slice, names: Sequence[str]) -> list[np.ndarray]:
    """Return other arrays of an episode at some of its frames, [T, ...] each.

    Args:
        folder: the folder of the files.
        episode: its name in `Episodes.videos`.
        frames: the frames, counted within the episode.
        names: the arrays' names in the file.

    Raises:
        ConfigError: the file is missing or damaged, or has no such array with an entry for each frame.
    """
    within = re.fullmatch(r"(.*)\[(\d+):(\d+)\]", episode)
    path, first = (folder / within[1], int(within[2])) if within else (folder / episode, 0)
    try:
        file = load_arrays(path, names, "record the episodes again")
    except OSError as error:
        raise ConfigError(f"datadir: {path} can't be read ({error.strerror}); put it back") from error
    found = [file[name][first + frames.start : first + frames.stop] for name in names]
    for name, array in zip(names, found, strict=True):
        if len(array) != frames.stop - frames.start:
            raise ConfigError(f"datadir: {path} has {len(file[name])} entries of {name}, too few; mend or remove it")
    return found


class File(NamedTuple):
    """The contents of an episode file, except its frames."""

    frames: int
    firsts: list[int]  # the first frame of each episode
    actions: np.ndarray | None  # float32 [T, A]: each led to its frame; zeros at the first frame of an episode
    others: list[str]  # names of arrays that aren't used


def read(path: Path, action_format: ActionFormat) -> File:
    """Read an episode file, except its frames.

    Raises:
        ConfigError: an array is missing, or isn't as it must be.
        OSError: the file is damaged.
    """
    try:
        with path.open("rb") as opened, np.load(opened) as file:  # opened here: NumPy doesn't close a damaged file
            keys, small = file.files, {key: file[key] for key in ("action", "is_first") if key in file.files}
        frames = image_shape(path)[0] if "image" in keys else 0
    except (ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise OSError from error
    if not frames:
        raise ConfigError(f"datadir: {path} has no image; an episode needs image, uint8 [T, H, W, 1 or 3], and action")
    is_first = np.asarray(small.get("is_first", np.arange(frames) == 0), bool).reshape(-1)
    if len(is_first) != frames:
        raise ConfigError(
            f"datadir: {path} has {len(is_first)} entries of is_first for {frames} frames; mend or remove it"
        )
    firsts = sorted({0, *np.flatnonzero(is_first).tolist()})
    actions = led_to_frames(small["action"], is_first, action_format, path) if "action" in small else None
    return File(frames, firsts, actions, [key for key in keys if key not in ("image", "action", "is_first")])


def led_to_frames(actions: np.ndarray, is_first: np.ndarray, action_format: ActionFormat, path: Path) -> np.ndarray:
    """Return a file's actions, float32 [T, A], each of which led to its frame. They are zeros where `is_first`.

    Raises:
        ConfigError: the actions' number, type or values are wrong.
    """
    leads, T, count = action_format.action_leads, len(is_first), len(actions) if actions.ndim else 0
    if count != T and (leads or count != T - 1):
        hint = ", or set --action_leads false if each is taken at its frame" if count == T - 1 else ""
        raise ConfigError(f"datadir: {path} has {count} actions for {T} frames; mend or remove it{hint}")
    if not np.issubdtype(actions.dtype, np.number) and actions.dtype != bool:
        raise ConfigError(f"datadir: {path} has actions of type {actions.dtype}; they must be numbers")
    if actions.ndim == 1 and np.issubdtype(actions.dtype, np.integer):
        dummies = is_first if leads else np.zeros(count, bool)
        actions = one_hot(actions, dummies, action_format.num_actions, path)
    elif action_format.num_actions is not None:
        raise ConfigError(
            f"num_actions: {path} has actions {actions.dtype} {list(actions.shape)}, which aren't whole numbers [T]; "
            "leave it out"
        )
    actions = actions.reshape(count, -1).astype(np.float32)
    if not leads:
        before = np.zeros((1, actions.shape[1]), np.float32)
        actions = np.concatenate([before, actions[: T - 1]])
    actions[is_first] = 0
    bad = np.flatnonzero(~np.isfinite(actions).all(1))
    if len(bad):
        raise ConfigError(f"datadir: {path} has actions that aren't finite, frame {bad[0]} first; mend or remove it")
    return actions


def one_hot(numbers: np.ndarray, dummies: np.ndarray, count: int | None, path: Path) -> np.ndarray:
    """Return action numbers [T] as one-hot vectors [T, count], with zeros where `dummies`, bool [T], is true.

    Raises:
        ConfigError: `count` is missing, or smaller than the actions need.
    """
    used = numbers[~dummies]
    low, high = (int(used.min()), int(used.max())) if len(used) else (0, 0)
    if count is None:
        raise ConfigError(f"num_actions: {path} has actions that are numbers, up to {high}; set the number of actions")
    if low < 0 or high >= count:
        raise ConfigError(
            f"num_actions: {path} has an action {low if low < 0 else high}; they count from 0 to {count - 1}"
        )
    return (numbers[:, None] == np.arange(count)) & ~dummies[:, None]

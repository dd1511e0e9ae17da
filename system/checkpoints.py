"""Checkpoints that are what was saved, or are said not to be: Orbax, plus a checksum.

Several processes make each call together, on a file system that they share; the first one writes.
"""

import json
import logging
import sys
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from config import ConfigError
from system.files import require_utf8


class DamagedCheckpoint(ConfigError):
    """A checkpoint that isn't what was saved."""


class Checkpoints:
    """The checkpoints in a directory: the newest two, and forever one of each `keep_every` steps (None: all)."""

    def __init__(self, directory: Path, keep_every: int | None = None):
        """Open the directory, or make it.

        Raises:
            ConfigError: its path isn't UTF-8.
        """
        require_utf8("logdir", directory.absolute())
        from orbax.checkpoint import v1 as ocp  # slow to import

        for name in "absl", "asyncio":  # what fails is told here, in one line
            logging.getLogger(name).setLevel(logging.CRITICAL)
        policies = ocp.training.preservation_policies
        keep = [policies.LatestN(2), policies.EveryNSteps(keep_every)] if keep_every else [policies.PreserveAll()]
        self.directory = directory.absolute()
        try:
            self.orbax = ocp.training.Checkpointer(
                self.directory,
                preservation_policy=policies.AnyPreservationPolicy(keep),
                cleanup_tmp_directories=keep_every is not None,
            )
        except (TypeError, ValueError) as error:  # of metadata that are JSON, but not Orbax's
            reason = " ".join(str(error).split())
            raise DamagedCheckpoint(
                f"checkpoint: one in {self.directory} is damaged ({reason}); remove the one whose _CHECKPOINT_METADATA "
                "isn't like the others'"
            ) from error

    def __enter__(self) -> "Checkpoints":
        self.earlier_hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
        return self

    def __exit__(self, *_: Any) -> None:
        """Wait until all is written."""
        try:
            self.orbax.close()
        except Exception as error:
            tell(error)
        finally:
            sys.unraisablehook = self.earlier_hook

    def _unraisable(self, unraisable: Any) -> None:
        """Leave out what Orbax's threads say after a failed write, a trace for each array; `tell` tells of it."""
        if str(unraisable.exc_value) != "Event loop is closed":
            self.earlier_hook(unraisable)

    @property
    def steps(self) -> list[int]:
        return [info.step for info in self.orbax.checkpoints]

    def save(self, step: int, state: Any, **notes: Any) -> None:
        """Save a pytree of arrays, and notes that JSON can hold. Return once it is copied; a thread writes it.

        If a save fails (disk full, say), that is told in a line, here or at the next call; earlier checkpoints stay.
        """
        host = jax.tree.map(lambda x: np.array(x), state)  # a copy: the devices' memory is donated to the next step
        metadata = {"checksum": checksum(host, notes), "notes": notes}
        for _ in range(2):  # the failure of the save before comes up in the first try
            try:
                self.orbax.save_async(step, host, force=True, overwrite=True, custom_metadata=metadata)
                return
            except Exception as error:
                tell(error)

    def load(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Return what was saved at `step`: a pytree of numpy arrays of the shapes and dtypes of `like`, and the notes.

        Raises:
            DamagedCheckpoint: it isn't there whole, is of other shapes, or fails its checksum.
            ConfigError: it may not be read.
        """
        path = self.directory / str(step)
        try:
            state = self.orbax.load(step, jax.tree.map(lambda x: np.empty(x.shape, x.dtype), like))
            metadata = self.orbax.metadata(step).custom_metadata
            # Orbax doesn't compare shapes.
            assert [x.shape for x in jax.tree.leaves(state)] == [x.shape for x in jax.tree.leaves(like)]
            expected, notes = metadata["checksum"], metadata["notes"]
        except PermissionError as error:  # falling back would replace it
            raise ConfigError(f"checkpoint: {path} can't be read ({error.strerror}); permit it") from error
        except Exception as error:  # whatever Orbax meets in a damaged file; its texts mislead
            raise DamagedCheckpoint(
                f"checkpoint: {path} is damaged or of another model ({type(error).__name__}); choose another"
            ) from error
        if checksum(state, notes) != expected:
            raise DamagedCheckpoint(f"checkpoint: {path} is damaged (its checksum isn't the saved one); choose another")
        return state, notes

    def notes(self, step: int) -> dict[str, Any]:
        """Return the notes of what was saved at `step`, without its arrays, and so without the checksum's test.

        Raises:
            DamagedCheckpoint: they can't be read.
        """
        try:
            return self.orbax.metadata(step).custom_metadata["notes"]
        except Exception as error:  # whatever Orbax meets in a damaged file
            path = self.directory / str(step)
            raise DamagedCheckpoint(
                f"checkpoint: {path} is damaged ({type(error).__name__}); choose another"
            ) from error

    def load_newest(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """Return step, state and notes of the newest intact checkpoint, if any. Say which newer ones are damaged."""
        for step in reversed(self.steps):
            try:
                return step, *self.load(step, like)
            except DamagedCheckpoint as error:
                print(f"{error.args[0].rsplit(';', 1)[0]}; falling back to the one before")
        return None


def tell(error: Exception) -> None:
    print(f"Warning: a checkpoint couldn't be saved ({' '.join(str(error).split())[:200]}); earlier ones stay")


def checksum(tree: Any, notes: dict[str, Any]) -> int:
    """Return a checksum of the bytes of all leaves, their places in the tree, and the notes."""
    crc = zlib.crc32(json.dumps(notes, sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        crc = zlib.crc32(
            np.ascontiguousarray(leaf).view(np.uint8).data, zlib.crc32(jax.tree_util.keystr(path).encode(), crc)
        )
    return crc

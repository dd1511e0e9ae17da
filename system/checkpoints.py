"""Checkpoints by Orbax, with a checksum that detects damage.

Several processes make each call together, on a file system that they share. The first one writes.
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
from system.interrupts import uninterrupted


class DamagedCheckpoint(ConfigError):
    """The error of a checkpoint that differs from what was saved."""


class Checkpoints:
    """The checkpoints in a directory.

    The newest two are kept, and one every `keep_every` steps forever. With None, all are kept.
    """

    # Orbax 0.12.8 may turn an exception that a signal raises in it into another one, lose it, or wait forever.
    @uninterrupted()
    def __init__(self, directory: Path, keep_every: int | None = None):
        """Open the directory, or make it.

        Raises:
            ConfigError: its path isn't UTF-8.
            DamagedCheckpoint: the metadata of a checkpoint are damaged.
        """
        require_utf8("logdir", directory.absolute())
        from orbax.checkpoint import v1 as ocp  # slow to import

        for name in "absl", "asyncio":  # failures are reported in one line by this module
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
        except (TypeError, ValueError) as error:  # metadata that are JSON, but not Orbax's
            reason = " ".join(str(error).split())
            raise DamagedCheckpoint(
                f"checkpoint: one in {self.directory} is damaged ({reason}); remove the one whose _CHECKPOINT_METADATA "
                "differs from the others"
            ) from error

    def __enter__(self) -> "Checkpoints":
        self.earlier_hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
        return self

    def __exit__(self, *_: Any) -> None:
        """Wait until all checkpoints are written."""
        try:
            self.orbax.close()
        except Exception as error:
            warn(error)
        finally:
            sys.unraisablehook = self.earlier_hook

    def _unraisable(self, unraisable: Any) -> None:
        """Suppress the traces that Orbax's threads print after a failed write; `warn` reports the failure."""
        if str(unraisable.exc_value) != "Event loop is closed":
            self.earlier_hook(unraisable)

    @property
    def steps(self) -> list[int]:
        """The steps of the checkpoints, in order."""
        return [info.step for info in self.orbax.checkpoints]

    def save(self, step: int, state: Any, **notes: Any) -> None:
        """Save a pytree of arrays, with notes that JSON can hold.

        Return once the arrays are copied; a thread writes them. If that fails, for example because the disk is full,
        this call or the next one prints a warning. Earlier checkpoints are kept.
        """
        host = jax.tree.map(lambda x: np.array(x), state)  # a copy, because the next step reuses the devices' memory
        metadata = {"checksum": checksum(host, notes), "notes": notes}
        for _ in range(2):  # the first try raises the failure of the save before
            try:
                self.orbax.save_async(step, host, force=True, overwrite=True, custom_metadata=metadata)
                return
            except Exception as error:
                warn(error)

    @uninterrupted()
    def load(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Return the state and the notes that were saved at `step`.

        The state is a pytree of numpy arrays with the shapes and dtypes of `like`.

        Raises:
            DamagedCheckpoint: it is incomplete, has other shapes, or fails its checksum.
            ConfigError: the user may not read it.
        """
        path = self.directory / str(step)
        try:
            state = self.orbax.load(step, jax.tree.map(lambda x: np.empty(x.shape, x.dtype), like))
            metadata = self.orbax.metadata(step).custom_metadata
            # Orbax itself doesn't compare shapes.
            assert [x.shape for x in jax.tree.leaves(state)] == [x.shape for x in jax.tree.leaves(like)]
            expected, notes = metadata["checksum"], metadata["notes"]
        except PermissionError as error:  # not damaged: falling back to an older one would overwrite it
            raise ConfigError(f"checkpoint: {path} can't be read ({error.strerror}); permit it") from error
        except Exception as error:  # Orbax raises all kinds for a damaged file, with misleading texts
            raise DamagedCheckpoint(
                f"checkpoint: {path} is damaged or of another model ({type(error).__name__}); choose another"
            ) from error
        if checksum(state, notes) != expected:
            raise DamagedCheckpoint(f"checkpoint: {path} is damaged (its checksum isn't the saved one); choose another")
        return state, notes

    @uninterrupted()
    def notes(self, step: int) -> dict[str, Any]:
        """Return the notes that were saved at `step`, without a check of the arrays and the checksum.

        Raises:
            DamagedCheckpoint: they can't be read.
        """
        try:
            return self.orbax.metadata(step).custom_metadata["notes"]
        except Exception as error:  # Orbax raises all kinds for a damaged file
            path = self.directory / str(step)
            raise DamagedCheckpoint(
                f"checkpoint: {path} is damaged ({type(error).__name__}); choose another"
            ) from error

    def load_newest(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """Return step, state and notes of the newest intact checkpoint. Print which newer ones are damaged.

        Returns:
            None if there is no checkpoint.

        Raises:
            DamagedCheckpoint: none is intact. A training from the first step would replace what may be restored.
            ConfigError: as `load`.
        """
        steps = self.steps
        for step in reversed(steps):
            try:
                return step, *self.load(step, like)
            except DamagedCheckpoint as error:
                reason = error.args[0].rsplit(";", 1)[0]
                if step == steps[0]:
                    raise DamagedCheckpoint(
                        f"{reason}, and there is no older one; restore one, or choose another --name or --logdir"
                    ) from error
                print(f"{reason}; falling back to the one before")
        return None


def warn(error: Exception) -> None:
    """Print a warning about a checkpoint that couldn't be saved."""
    print(f"Warning: a checkpoint couldn't be saved ({' '.join(str(error).split())[:200]}); earlier ones are kept")


def checksum(tree: Any, notes: dict[str, Any]) -> int:
    """Return a checksum of the bytes and paths of all leaves, and of the notes."""
    crc = zlib.crc32(json.dumps(notes, sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        crc = zlib.crc32(
            np.ascontiguousarray(leaf).view(np.uint8).data, zlib.crc32(jax.tree_util.keystr(path).encode(), crc)
        )
    return crc

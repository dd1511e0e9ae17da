"""Output of results: directories, formats of figures and videos, one-line errors if writing fails."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import filelock

import config as configuration
from config import Config, ConfigError, Flag
from system.files import dated_directory, replace_file
from training.loading import Checkpoint

FIGURES, VIDEOS = ("png", "pdf"), ("gif", "mp4")
FORMAT = Flag("FORMATS", "formats of figures (png, pdf) and videos (gif, mp4): a list, e.g. pdf,mp4 (default: png,gif)")
"""The flag `--format`."""


class Formats(NamedTuple):
    """The formats in which figures and videos are written."""

    figures: tuple[str, ...] = ("png",)
    videos: tuple[str, ...] = ("gif",)


def formats(text: str | None) -> Formats:
    """Return the formats in the value of `--format`; a kind that it doesn't name keeps its default.

    Raises:
        ConfigError: a format is unknown.
    """
    names = re.split(r"[,\s]+", text.strip().lower()) if text is not None else []
    if unknown := [name for name in names if name not in FIGURES + VIDEOS]:
        raise ConfigError(f"format: must be a list of {', '.join(FIGURES + VIDEOS)}, got {unknown[0]!r}")
    figures, videos = (tuple(name for name in kind if name in names) for kind in (FIGURES, VIDEOS))
    return Formats(figures or Formats().figures, videos or Formats().videos)


@contextlib.contextmanager
def writing(directory: Path | None, remedy: str = "name another directory with --out") -> Iterator[None]:
    """Raise ConfigError, with the remedy, if results can't be written in the block: disk full, no permission, ...

    Without a directory, this applies only to errors without a file name; `exit_codes` reports the others.
    """
    try:
        yield
    except FileNotFoundError:
        raise  # it is about reading
    except OSError as error:
        if directory is None and error.filename is not None:
            raise
        where = directory or "the directory of the results"
        raise ConfigError(
            f"out: {where} can't be written ({error.strerror or error}); make room there, or {remedy}"
        ) from error


def open_directory(
    locks: contextlib.ExitStack, config: Config, checkpoint: Checkpoint, out: Path | None, network: str = ""
) -> Path:
    """Return the directory of the same evaluation if it was interrupted, or else a new one, and lock it.

    Directories with results, and those that another process has locked, are never returned.

    Args:
        locks: keeps the lock until its end.
        config, checkpoint: what is evaluated.
        out: the directory; None: one in the run's directory.
        network: the SHA-256 of LPIPS's network, if LPIPS is measured for each example.

    Raises:
        ConfigError: `out` is in use or isn't empty, or nothing can be written there.
    """
    with writing(out or checkpoint.run):
        if out is None:
            for directory in sorted(checkpoint.run.glob("eval_*")):
                # Check again with the lock, since another process may have written there.
                found = unfinished(directory, config, checkpoint, network) and lock(locks, directory)
                if found and unfinished(directory, config, checkpoint, network):
                    print(f"Resuming {directory}")
                    return directory
            directory = dated_directory(checkpoint.run, "eval")
            lock(locks, directory)
        else:
            directory = out
            occupied = ConfigError(f"out: {out} isn't empty; name a new directory")
            if out.exists() and any(out.iterdir()) and not (out / "lock").exists():
                raise occupied
            out.mkdir(parents=True, exist_ok=True)
            if not lock(locks, out):
                raise ConfigError(f"out: another process writes to {out}; wait for it, or name a new directory")
            if unfinished(out, config, checkpoint, network):
                print(f"Resuming {out}")
                return out
            if any(path.name != "lock" for path in out.iterdir()):
                raise occupied
        replace_file(directory / "checkpoint", describe_checkpoint(checkpoint, network).encode())
        replace_file(directory / "evaluation.yml", config.to_yaml().encode())
        return directory


def describe_checkpoint(checkpoint: Checkpoint, network: str) -> str:
    """Return a checkpoint's path, and in a second line the SHA-256 of LPIPS's network, if there is one."""
    path = checkpoint.run.resolve() / "checkpoints" / str(checkpoint.step)
    return f"{path}\nlpips {network}" if network else str(path)


def lock(locks: contextlib.ExitStack, directory: Path) -> bool:
    """Lock a directory until `locks` ends; return False if another process has locked it.

    The system releases the locks of processes that have died.
    """
    try:
        locks.enter_context(filelock.FileLock(directory / "lock", timeout=0))
    except filelock.Timeout:
        return False
    return True


def unfinished(directory: Path, config: Config, checkpoint: Checkpoint, network: str) -> bool:
    """Return whether a directory holds the same evaluation, and was interrupted."""
    if (directory / "metrics.json").exists():
        return False
    try:
        same = configuration.load(directory / "evaluation.yml") == config
        return same and (directory / "checkpoint").read_bytes() == describe_checkpoint(checkpoint, network).encode()
    except (ConfigError, OSError):  # not an evaluation, or interrupted at its start
        return False

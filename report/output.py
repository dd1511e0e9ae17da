"""Where results go: directories, formats of figures and videos, failures to write in one line."""

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
"""`--format`"""


class Formats(NamedTuple):
    """The formats in which figures and videos are written."""

    figures: tuple[str, ...] = ("png",)
    videos: tuple[str, ...] = ("gif",)


def formats(text: str | None) -> Formats:
    """Read the value of `--format`; a kind that it doesn't mention keeps its default.

    Raises:
        ConfigError: an unknown format.
    """
    names = re.split(r"[,\s]+", text.strip().lower()) if text is not None else []
    if unknown := [name for name in names if name not in FIGURES + VIDEOS]:
        raise ConfigError(f"format: must be a list of {', '.join(FIGURES + VIDEOS)}, got {unknown[0]!r}")
    figures, videos = (tuple(name for name in kind if name in names) for kind in (FIGURES, VIDEOS))
    return Formats(figures or Formats().figures, videos or Formats().videos)


@contextlib.contextmanager
def writing(directory: Path | None, remedy: str = "name another directory with --out") -> Iterator[None]:
    """Raise a ConfigError that names the remedy if results can't be written: disk full, no permission, ...

    Without a directory, only for errors that name no file: `exit_codes` tells of the others.
    """
    try:
        yield
    except FileNotFoundError:
        raise  # of something to be read
    except OSError as error:
        if directory is None and error.filename is not None:
            raise
        where = directory or "the directory of the results"
        raise ConfigError(
            f"out: {where} can't be written ({error.strerror or error}); make room there, or {remedy}"
        ) from error


def open_directory(
    held: contextlib.ExitStack, config: Config, checkpoint: Checkpoint, out: Path | None, network: str = ""
) -> Path:
    """Return the directory of the same evaluation, if it was interrupted, or a new one; `held` holds its lock.

    Never one with results, or one that another process holds.

    Args:
        held: holds the lock until it ends.
        config, checkpoint, network: what is evaluated; a network (its SHA-256) measures each example, if any does.
        out: the directory; None: a new one below the run's.

    Raises:
        ConfigError: `out` is in use or isn't empty, or nothing can be written there.
    """
    with writing(out or checkpoint.run):
        if out is None:
            for directory in sorted(checkpoint.run.glob("eval_*")):
                # Looked at again once nobody else can write there.
                found = unfinished(directory, config, checkpoint, network) and lock(held, directory)
                if found and unfinished(directory, config, checkpoint, network):
                    print(f"Resuming {directory}")
                    return directory
            directory = dated_directory(checkpoint.run, "eval")
            lock(held, directory)
        else:
            directory = out
            occupied = ConfigError(f"out: {out} isn't empty; name a new directory")
            if out.exists() and any(out.iterdir()) and not (out / "lock").exists():
                raise occupied
            out.mkdir(parents=True, exist_ok=True)
            if not lock(held, out):
                raise ConfigError(f"out: another process evaluates into {out}; wait for it, or name a new directory")
            if unfinished(out, config, checkpoint, network):
                print(f"Resuming {out}")
                return out
            if any(path.name != "lock" for path in out.iterdir()):
                raise occupied
        replace_file(directory / "checkpoint", evaluated(checkpoint, network).encode())
        replace_file(directory / "evaluation.yml", config.to_yaml().encode())
        return directory


def evaluated(checkpoint: Checkpoint, network: str) -> str:
    """Return a checkpoint's place, and in a second line the network that measures each example, if there is one."""
    place = checkpoint.run.resolve() / "checkpoints" / str(checkpoint.step)
    return f"{place}\nlpips {network}" if network else str(place)


def lock(held: contextlib.ExitStack, directory: Path) -> bool:
    """Take a directory's lock until `held` ends, unless another process has it; the system takes it from the dead."""
    try:
        held.enter_context(filelock.FileLock(directory / "lock", timeout=0))
    except filelock.Timeout:
        return False
    return True


def unfinished(directory: Path, config: Config, checkpoint: Checkpoint, network: str) -> bool:
    """Return whether a directory holds the same evaluation, interrupted."""
    if (directory / "metrics.json").exists():
        return False
    try:
        same = configuration.load(directory / "evaluation.yml") == config
        return same and (directory / "checkpoint").read_bytes() == evaluated(checkpoint, network).encode()
    except (ConfigError, OSError):  # not an evaluation, or interrupted before it was one
        return False

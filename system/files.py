"""Files that are there whole or not at all, and new directories for results."""

import contextlib
import datetime
import os
import threading
from pathlib import Path

from config import ConfigError


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file atomically: at any time the old or the new one is there, whole."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        aside.write_bytes(content)
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise


def dated_directory(parent: Path, kind: str) -> Path:
    """Make `<parent>/<kind>_<time>`, which no other process has."""
    name = f"{kind}_{datetime.datetime.now():%Y_%m_%d_%H_%M_%S}"
    for suffix in ("", *(f"_{i}" for i in range(2, 100))):
        directory = parent / (name + suffix)
        with contextlib.suppress(FileExistsError):
            directory.mkdir()
            return directory
    raise ConfigError(f"{parent / name} and its successors exist; wait a second")

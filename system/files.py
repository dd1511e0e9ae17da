"""Files that are there whole or not at all, and new directories for results."""

import contextlib
import datetime
import errno
import io
import os
import secrets
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from config import ConfigError


def require_utf8(key: str, value: str | Path) -> None:
    """Raise a ConfigError unless a name or a path is UTF-8, as TensorStore, ArrayRecord and Matplotlib need it."""
    try:
        str(value).encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{key}: {str(value)!r} isn't UTF-8, as it has to be; rename it, or choose another") from None


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file atomically: at any time the old or the new one is there, whole. Leave it if it has that content.

    Raises:
        OSError: the file can't be written; the old one stays.
    """
    with contextlib.suppress(OSError):
        if path.read_bytes() == content:
            return
    aside = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        aside.write_bytes(content)
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise


def replace_link(path: Path, target: Path) -> None:
    """Make a symbolic link, or replace one atomically; `target` is relative to its directory.

    Raises:
        OSError, NotImplementedError: there is something else, or the file system has no links.
    """
    if path.exists() and not path.is_symlink():
        raise FileExistsError(errno.EEXIST, "something else has that name", str(path))
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    aside.symlink_to(target)
    try:
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise


def replace_arrays(path: Path, *arrays: Any, **named: Any) -> None:
    """Replace an NPZ as `numpy.savez` writes it, atomically; raise OSError as `replace_file`."""
    buffer = io.BytesIO()
    np.savez(buffer, *arrays, **named)
    replace_file(path, buffer.getvalue())


def load_arrays(path: Path, names: Sequence[str] = (), remedy: str = "make it again") -> dict[str, np.ndarray]:
    """Return the arrays in an NPZ, all of them or those of some names.

    Raises:
        OSError: it isn't there, or can't be read.
        ConfigError: it is damaged.
    """
    try:
        with path.open("rb") as opened, np.load(opened) as file:  # opened here: NumPy leaves a damaged one open
            return {name: np.asarray(file[name]) for name in names or file.files}
    except OSError:
        raise
    except Exception as error:  # whatever NumPy and zipfile meet in a damaged file
        raise ConfigError(f"{path} is damaged ({type(error).__name__}); {remedy}") from error


def dated_directory(parent: Path, kind: str) -> Path:
    """Make `<parent>/<kind>_<time>`, which no other process has."""
    name = f"{kind}_{datetime.datetime.now():%Y_%m_%d_%H_%M_%S}"
    for suffix in ("", *(f"_{i}" for i in range(2, 100))):
        directory = parent / (name + suffix)
        with contextlib.suppress(FileExistsError):
            directory.mkdir()
            return directory
    raise ConfigError(f"{parent / name} and its successors exist; wait a second")

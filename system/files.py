"""Files that are replaced atomically, and new directories for results."""

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
    """Raise ConfigError unless a name or a path is UTF-8, which TensorStore, ArrayRecord and Matplotlib need."""
    try:
        str(value).encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{key}: {str(value)!r} isn't UTF-8; rename it, or choose another") from None


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file atomically: it is always either the old or the new one. A file with that content isn't touched.

    Raises:
        OSError: the file can't be written; the old one is kept.
    """
    with contextlib.suppress(OSError):
        if path.read_bytes() == content:
            return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def replace_link(path: Path, target: Path) -> None:
    """Make a symbolic link, or replace one atomically. `target` is relative to its directory.

    Raises:
        OSError, NotImplementedError: the path exists and is no link, or the file system has no links.
    """
    if path.exists() and not path.is_symlink():
        raise FileExistsError(errno.EEXIST, "something else has that name", str(path))
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    temporary.symlink_to(target)
    try:
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def replace_arrays(path: Path, *arrays: Any, **named: Any) -> None:
    """Replace an NPZ atomically. Arguments as of `numpy.savez`, errors as of `replace_file`."""
    buffer = io.BytesIO()
    np.savez(buffer, *arrays, **named)
    replace_file(path, buffer.getvalue())


def load_arrays(path: Path, names: Sequence[str] = (), remedy: str = "make it again") -> dict[str, np.ndarray]:
    """Return the arrays of an NPZ: those of some names, or by default all of them.

    Raises:
        OSError: the file is missing or can't be read.
        ConfigError: it is damaged, or has no array of such a name.
    """
    try:
        with path.open("rb") as opened, np.load(opened) as file:  # NumPy itself would leave a damaged file open
            for name in names:
                if name not in file.files:
                    raise ConfigError(f"{path} has no array {name}; {remedy}")
            return {name: np.asarray(file[name]) for name in names or file.files}
    except (OSError, ConfigError):
        raise
    except Exception as error:  # NumPy and zipfile raise all kinds for a damaged file
        raise ConfigError(f"{path} is damaged ({type(error).__name__}); {remedy}") from error


def dated_directory(parent: Path, kind: str) -> Path:
    """Make a new directory `<parent>/<kind>_<time>`, and return it."""
    name = f"{kind}_{datetime.datetime.now():%Y_%m_%d_%H_%M_%S}"
    for suffix in ("", *(f"_{i}" for i in range(2, 100))):
        directory = parent / (name + suffix)
        with contextlib.suppress(FileExistsError):
            directory.mkdir()
            return directory
    raise ConfigError(f"{parent / name} to {name}_99 exist; try again in a second")

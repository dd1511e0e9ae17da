"""Parameters in a single file that other programs can read, too: safetensors, with what is needed to use them."""

import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from config import ConfigError
from system.checkpoints import DamagedCheckpoint, checksum

SUFFIX = ".safetensors"
KEY = "clockwork_vae"
"""Of all that the file's metadata hold, as JSON. (Of several keys, the library writes the order at random.)"""
FORMAT = 1


def is_named_by(path: Path) -> bool:
    """Return whether a path names such a file, which may be missing, and no run's directory."""
    return path.suffix == SUFFIX and not path.is_dir()


def named(tree: Any) -> dict[str, Any]:
    """Return a pytree's leaves by their paths, as params/cell_0/gru/input_kernel."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def to_bytes(params: Any, step: int, config: Mapping[str, Any], stages: Sequence[int] | None) -> bytes:
    """Return the content of a file with parameters, the step that they are of, the keys of their configuration and
    the steps of the trainings before (None: unknown)."""
    import safetensors.numpy

    notes = {
        "format": FORMAT,
        "step": step,
        "config": dict(config),
        "stages": stages,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy", "safetensors")}
        | {"python": platform.python_version()},
    }
    notes["checksum"] = checksum(params, notes)
    # The library writes an array's memory as it is: of a transposed one, it would be another array.
    arrays = {name: np.ascontiguousarray(x) for name, x in named(params).items()}
    return safetensors.numpy.save(arrays, {KEY: json.dumps(notes)})


def read_notes(path: Path) -> dict[str, Any]:
    """Return what a file holds besides arrays: `step`, `config`, `stages` and others.

    Raises:
        DamagedCheckpoint: it isn't whole, or not one of ours.
        ConfigError: it can't be read, or is of a later format.
    """
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror or error
        raise ConfigError(f"checkpoint: {path} can't be read ({reason}); name another file") from error
    except safetensors.SafetensorError as error:
        raise DamagedCheckpoint(
            f"checkpoint: {path} is damaged, or isn't in the format safetensors ({error}); get it again"
        ) from error
    if KEY not in metadata:
        raise DamagedCheckpoint(
            f"checkpoint: {path} isn't one of this program's (its metadata hold no {KEY}); name a file that "
            "analysis.py export wrote"
        )
    try:
        notes = json.loads(metadata[KEY])
        later = notes["format"] > FORMAT
        int(notes["step"]), notes["checksum"], notes["config"]
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedCheckpoint(f"checkpoint: {path} is damaged (its metadata are incomplete); get it again") from error
    if later:
        raise ConfigError(f"checkpoint: {path} is of a later version of this program; use that one")
    return notes


def load(path: Path, like: Any) -> Any:
    """Return the parameters in a file as numpy arrays of the shapes and dtypes of `like`; raise as `read_notes`.

    Raises:
        DamagedCheckpoint: they are others, or aren't those that were saved.
    """
    import safetensors.numpy

    notes, expected = read_notes(path), named(like)
    try:
        found = safetensors.numpy.load_file(path)
    except Exception as error:  # whatever it meets in a damaged file, or one of types that NumPy hasn't
        raise DamagedCheckpoint(f"checkpoint: {path} is damaged ({type(error).__name__}); get it again") from error
    for name in {**expected, **found}:
        here, there = (f"{x[name].dtype} {x[name].shape}" if name in x else None for x in (found, expected))
        if here != there:
            raise DamagedCheckpoint(
                f"checkpoint: {path} isn't of the model in its own metadata ({name} is {here} in place of {there}); "
                "get it again"
            )
    params = jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in expected])
    if checksum(params, {key: value for key, value in notes.items() if key != "checksum"}) != notes["checksum"]:
        raise DamagedCheckpoint(f"checkpoint: {path} is damaged (its checksum isn't the saved one); get it again")
    return params

"""Parameters in a single safetensors file, which other programs can read, with the metadata to use them."""

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
"""The only key of the file's metadata; its value is JSON. (The library would write several keys in a random order.)"""
FORMAT = 1


def is_weights_file(path: Path) -> bool:
    """Return whether a path names such a file, existing or not, rather than a directory."""
    return path.suffix == SUFFIX and not path.is_dir()


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """Return the leaves of a pytree by their paths, such as params/cell_0/gru/input_kernel."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def to_bytes(params: Any, step: int, config: Mapping[str, Any], stages: Sequence[int] | None) -> bytes:
    """Return the content of a file with parameters.

    Args:
        params: the parameters.
        step: the step that they were saved at.
        config: the keys of their configuration.
        stages: the steps of the trainings before; None if they are unknown.
    """
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
    # The library writes the memory of an array as it is, which would be wrong for a transposed one.
    arrays = {name: np.ascontiguousarray(x) for name, x in leaves_by_path(params).items()}
    return safetensors.numpy.save(arrays, {KEY: json.dumps(notes)})


def read_notes(path: Path) -> dict[str, Any]:
    """Return the metadata of a file: `step`, `config`, `stages` and others.

    Raises:
        DamagedCheckpoint: the file is incomplete, or another program wrote it.
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
            f"checkpoint: {path} is damaged, or isn't in the safetensors format ({error}); get it again"
        ) from error
    if KEY not in metadata:
        raise DamagedCheckpoint(
            f"checkpoint: {path} wasn't written by this program (its metadata lack {KEY}); name a file that "
            "analysis.py export wrote"
        )
    try:
        notes = json.loads(metadata[KEY])
        later = notes["format"] > FORMAT
        int(notes["step"]), notes["checksum"], notes["config"]
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedCheckpoint(f"checkpoint: {path} is damaged (its metadata are incomplete); get it again") from error
    if later:
        raise ConfigError(f"checkpoint: {path} is of a later version of this program; use that version")
    return notes


def load(path: Path, like: Any) -> Any:
    """Return the parameters in a file as numpy arrays with the shapes and dtypes of `like`.

    Raises:
        DamagedCheckpoint: they have other names, shapes or dtypes, or fail their checksum; or as `read_notes`.
        ConfigError: as `read_notes`.
    """
    import safetensors.numpy

    notes, expected = read_notes(path), leaves_by_path(like)
    try:
        found = safetensors.numpy.load_file(path)
    except Exception as error:  # the library raises all kinds for a damaged file, or for types that NumPy lacks
        raise DamagedCheckpoint(f"checkpoint: {path} is damaged ({type(error).__name__}); get it again") from error
    for name in {**expected, **found}:
        actual, wanted = (f"{x[name].dtype} {x[name].shape}" if name in x else None for x in (found, expected))
        if actual != wanted:
            raise DamagedCheckpoint(
                f"checkpoint: {path} doesn't fit the model in its own metadata ({name} is {actual} instead of "
                f"{wanted}); get it again"
            )
    params = jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in expected])
    if checksum(params, {key: value for key, value in notes.items() if key != "checksum"}) != notes["checksum"]:
        raise DamagedCheckpoint(f"checkpoint: {path} is damaged (its checksum isn't the saved one); get it again")
    return params

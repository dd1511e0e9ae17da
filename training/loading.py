"""Find a run or a checkpoint by the name that a user gives, and load it."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import config as configuration
from config import LATEST, Config, ConfigError
from sequences.interface import Model
from system import weights
from system.checkpoints import Checkpoints
from system.devices import Devices
from training.models import make_model
from training.step import TrainState, make_state


class Checkpoint(NamedTuple):
    """The path and step of a checkpoint."""

    run: Path  # a run's directory, or a .safetensors file
    step: int

    @property
    def is_file(self) -> bool:
        """Whether the checkpoint is a .safetensors file, without a run's directory."""
        return weights.is_weights_file(self.run)


def resolve_name(name: str | Path) -> Path:
    """Return the path of a run, or of something in a run's directory, for a name that a user gives.

    The name is an existing path, here or in `logs`. `latest` is replaced by the run that it links to. The beginning of
    a run's name is enough, with or without the dataset, if it fits only one run. If the path differs from the name,
    it is printed. A name that fits nothing is returned unchanged.

    Raises:
        ConfigError: the name fits several runs.
    """
    candidates = dict.fromkeys([Path(name), Path(Config.logdir) / name])
    existing = [path for path in candidates if path.exists()][:1]
    matches = list(dict.fromkeys(existing or [match for path in candidates for match in complete_path(path)]))
    if len(matches) > 1:
        raise ConfigError(
            f"logdir: {name} fits the names of {len(matches)} runs; name one of {', '.join(map(str, matches))}"
        )
    path = resolve_latest(matches[0]) if matches else Path(name)
    if path != Path(name):
        print(f"{name} is {path}")
    return path


def complete_path(path: Path) -> list[Path]:
    """Return all existing paths that `path` becomes if its first missing part is completed to a run's name."""
    missing = [parent for parent in (path, *path.parents) if not parent.exists()][-1]
    beginning = missing.name
    runs = list_runs(missing.parent)
    matches = [run for run in runs if run.name == beginning] or [
        run
        for run in runs
        if any(n.startswith(beginning) for n in (run.name, run.name.removeprefix(f"{run.parent.name}_")))
    ]
    return [found for run in matches if (found := run / path.relative_to(missing)).exists()]


def resolve_latest(path: Path) -> Path:
    """Return a path with the link `latest`, if the path contains it, replaced by the link's target."""
    resolved = Path()
    for part in path.parts:
        resolved /= part
        if part == LATEST and resolved.is_symlink():
            resolved = resolved.parent / resolved.readlink()
    return resolved


def list_runs(logdir: Path) -> list[Path]:
    """Return the run directories in a directory and in its subdirectories, one level deep, each once."""
    found = (path.parent for depth in (1, 2) for path in logdir.glob("*/" * depth + "config.yml"))
    return sorted(path for path in found if path.name != LATEST)


def find_run(logdir: Path) -> Path:
    """Return `logdir` if it is a run's directory, else the only run below it.

    Raises:
        ConfigError: there is no run, or more than one.
    """
    if not logdir.is_dir():
        for link in (logdir, *logdir.parents):
            if link.name == LATEST and link.is_symlink() and not link.exists():
                raise ConfigError(f"logdir: {link} links to {os.readlink(link)}, which doesn't exist; name another run")
        raise ConfigError(
            f"logdir: {logdir} is not a directory; name a run directory, the beginning of its name, one of its "
            f"checkpoints, a --logdir of train.py, or a {weights.SUFFIX} file"
        )
    found = [logdir] if (logdir / "config.yml").exists() else list_runs(logdir)
    if not found:
        raise ConfigError(f"logdir: {logdir} holds no run (no config.yml); name a run directory that train.py printed")
    if len(found) > 1:
        raise ConfigError(f"logdir: {logdir} holds {len(found)} runs; name one of {', '.join(map(str, found))}")
    return found[0]


def saved_keys(path: Path) -> dict[str, Any]:
    """Return the keys and values in a run's config.yml, or in a .safetensors file.

    Raises:
        ConfigError: the file can't be read, or it lacks keys, for example because it is empty or truncated.
    """
    if weights.is_weights_file(path):
        return configuration.typed(weights.read_notes(path)["config"], str(path))
    remedy = (
        "restore the file, or write it again with the run's keys and seed (an eval_*/evaluation.yml next to it has "
        "them; a checkpoint doesn't)"
    )
    if path.is_file() and not path.read_bytes().strip(b"\0 \r\n\t"):
        raise ConfigError(f"{path} is damaged (it is empty); {remedy}")
    try:
        saved = configuration.read_yaml(path)
    except ConfigError as error:
        raise ConfigError(f"{error}; {remedy}") from error
    missing = [key for key in vars(Config()) if key not in saved]
    if lost := [key for key in missing if key not in configuration.marked("later")]:
        raise ConfigError(
            f"{path} is damaged (it lacks {len(lost)} of the keys that were saved, {lost[0]} first); {remedy}"
        )
    return saved


def saved_config(path: Path) -> Config:
    """Return the configuration in a run's config.yml or in a .safetensors file. Raises as `saved_keys`."""
    return Config(**saved_keys(path))


def load_config(run: Path, flags: Mapping[str, str]) -> Config:
    """Return a run's configuration, in which flags override the saved values.

    Raises:
        ConfigError: a flag would change the parameters' shapes; or as `saved_keys`, `config.typed` and `Config`.
    """
    path = config_file(run)
    saved, overrides = saved_keys(path), configuration.typed(flags, "command line")
    for key, value in overrides.items():
        trained = saved.get(key, getattr(Config, key))
        if key in configuration.marked("shapes") and value != trained:
            raise ConfigError(f"{key}: the parameters of {run} were trained with {trained}, got {value}; leave it out")
    c = Config(**saved | overrides)
    newer = [key for key in vars(c) if key not in saved and key not in flags and key in configuration.read_by(c.model)]
    if newer:
        values = ", ".join(f"{key} = {getattr(c, key)}" for key in newer)
        print(f"{path} is older than some keys; their defaults are used: {values}")
    return c


def config_file(run: Path) -> Path:
    """Return the file that holds the configuration of `Checkpoint.run`."""
    return run if weights.is_weights_file(run) else run / "config.yml"


def find_checkpoint(logdir: Path) -> Checkpoint:
    """Return the checkpoint for `logdir`: a checkpoint, a run (its newest) or a directory with one run (its newest).

    Raises:
        ConfigError: there is no checkpoint, or more than one run; or as `weights.read_notes`.
    """
    if weights.is_weights_file(logdir):
        return Checkpoint(logdir, weights.read_notes(logdir)["step"])
    if logdir.name.isdigit() and logdir.parent.name == "checkpoints" and logdir.parent.is_dir():
        if not logdir.is_dir():
            steps = list_steps(logdir.parent)
            raise ConfigError(f"logdir: {logdir.parent} has no step {logdir.name}; name one of {steps}")
        return Checkpoint(logdir.parent.parent, int(logdir.name))
    path = find_run(logdir)
    steps = list_steps(path / "checkpoints")
    if not steps:
        raise ConfigError(f"logdir: {path} holds no checkpoint yet; train longer, or lower --save_model_every")
    return Checkpoint(path, steps[-1])


def list_steps(checkpoints: Path) -> list[int]:
    """Return the steps of the checkpoints in a directory, in ascending order."""
    return sorted(int(path.name) for path in checkpoints.glob("*") if path.name.isdigit())


def read_notes(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what a checkpoint holds except its arrays.

    Raises:
        DamagedCheckpoint: the checkpoint can't be read.
        ConfigError: as `weights.read_notes`.
    """
    if checkpoint.is_file:
        return weights.read_notes(checkpoint.run)
    with Checkpoints(checkpoint.run / "checkpoints") as checkpoints:
        return checkpoints.notes(checkpoint.step)


def earlier_stages(config: Config, notes: Mapping[str, Any]) -> list[int] | None:
    """Return how many steps each earlier stage of a training had, the oldest first.

    Earlier stages are the trainings whose parameters it started from, one after the other. Checkpoints hold them as the
    note `stages`. Checkpoints of earlier versions have no such note; then `init_from` says where the training started.

    Args:
        config: of the training.
        notes: of its checkpoint. Before the first checkpoint: empty `metrics`, which only a training has.

    Returns:
        The steps, [] if the training started from random parameters, None if they aren't recorded.
    """
    if "stages" in notes:
        return notes["stages"]
    if config.init_from is None:  # as in any exported model; these have no metrics
        return [] if "metrics" in notes else None
    try:
        source = find_checkpoint(Path(config.init_from))
        before = stages_before(source)
    except ConfigError:
        return None
    return None if before is None else [*before, source.step]


def stages_before(checkpoint: Checkpoint) -> list[int] | None:
    """Return `earlier_stages` of a checkpoint's training. Raises as `saved_config` and `read_notes`.

    With several processes, all of them must call it.
    """
    return earlier_stages(saved_config(config_file(checkpoint.run)), read_notes(checkpoint))


def describe_steps(step: int, stages: Sequence[int] | None) -> str:
    """Return in words how long a checkpoint was trained: its step and those of the earlier stages."""
    if stages is None:
        return f"step {step:,} (earlier stages aren't recorded)"
    if not stages:
        return f"step {step:,}"
    return f"{sum(stages) + step:,} steps in {len(stages) + 1} stages, {step:,} of them in the last"


class Loaded(NamedTuple):
    """A trained model, its parameters and its configuration."""

    model: Model
    params: Any
    config: Config


def load(logdir: Path | str) -> Loaded:
    """Load a trained model. `logdir` names a run or a checkpoint, as in `resolve_name` and `find_checkpoint`.

    Raises:
        ConfigError: as `resolve_name`, `find_checkpoint` and `saved_config`.
        DamagedCheckpoint: as `load_state`.
    """
    checkpoint = find_checkpoint(resolve_name(logdir))
    config = saved_config(config_file(checkpoint.run))
    model = make_model(config)
    return Loaded(model, load_params(model, checkpoint), config)


def load_state(model: Model, checkpoint: Checkpoint) -> TrainState:
    """Return the state in a checkpoint, as numpy arrays. From a .safetensors file, the optimizer's state is zeros.

    Raises:
        DamagedCheckpoint: the checkpoint isn't intact, or is another model's.
    """
    empty = make_state(model, draw=False)
    if checkpoint.is_file:
        step: Any = np.int32(checkpoint.step)
        return dataclasses.replace(empty, step=step, params=weights.load(checkpoint.run, empty.params))
    with Checkpoints(checkpoint.run / "checkpoints") as checkpoints:
        state, _ = checkpoints.load(checkpoint.step, empty)
    return state


def load_params(model: Model, checkpoint: Checkpoint) -> Any:
    """Return the parameters in a checkpoint, on all devices of this process. Raises as `load_state`."""
    return Devices().replicate(load_state(model, checkpoint).params)


def initial_state(model: Model) -> TrainState:
    """Return the state before the first step. Its parameters are random, or those of the checkpoint `init_from`.

    Raises:
        ConfigError: there is no such checkpoint, it is named by `latest`, or its parameters have other shapes.
    """
    source = model.config.init_from
    if source is None:
        return make_state(model)
    if (run := resolve_latest(Path(source))) != Path(source):
        raise ConfigError(f"init_from: {source} will link to the new run; name {run}")
    try:
        checkpoint = find_checkpoint(Path(source))
        params = load_state(make_model(load_config(checkpoint.run, {})), checkpoint).params
    except ConfigError as error:
        raise ConfigError(f"init_from: {error}") from error
    state = make_state(model)
    source_shapes, own_shapes = shapes(params), shapes(state.params)
    for name in {**own_shapes, **source_shapes}:
        if source_shapes.get(name) != own_shapes.get(name):
            raise ConfigError(
                f"init_from: {source} has parameters of other shapes, {name} first ({source_shapes.get(name)} there, "
                f"{own_shapes.get(name)} here); set the model's keys as in {config_file(checkpoint.run)}"
            )
    return dataclasses.replace(state, params=params)


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Return the shape of each leaf of a pytree, by its path."""
    return {name: leaf.shape for name, leaf in weights.leaves_by_path(tree).items()}

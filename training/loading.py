"""Find a run or a checkpoint by the name that a user gives, and load what it holds."""

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
    """Where a checkpoint lies."""

    run: Path  # holds config.yml; or a .safetensors file
    step: int

    @property
    def alone(self) -> bool:
        """Whether it is a file by itself, without a run's directory."""
        return weights.is_named_by(self.run)


def named(name: str | Path) -> Path:
    """Return the path that a user's name for a run, or for something in its directory, stands for.

    That is the path itself, if it exists, here or in `logs`. `latest` is replaced by the run that it leads to now. Of a
    run's name a beginning is enough that no other run's name has; the dataset that it begins with may be left out.

    Raises:
        ConfigError: several runs' names begin like this.
    """
    places = dict.fromkeys([Path(name), Path(Config.logdir) / name])
    there = [place for place in places if place.exists()][:1] or [path for place in places for path in completed(place)]
    there = list(dict.fromkeys(there))
    if len(there) > 1:
        raise ConfigError(
            f"logdir: the names of {len(there)} runs begin like {name}; name one of {', '.join(map(str, there))}"
        )
    found = without_link(there[0]) if there else Path(name)
    if found != Path(name):
        print(f"{name} is {found}")
    return found


def completed(path: Path) -> list[Path]:
    """Return the paths that there are if the first part of `path` that doesn't exist begins a run's name."""
    missing = [place for place in (path, *path.parents) if not place.exists()][-1]
    beginning = missing.name
    there = below(missing.parent)
    found = [run for run in there if run.name == beginning] or [
        run
        for run in there
        if any(n.startswith(beginning) for n in (run.name, run.name.removeprefix(f"{run.parent.name}_")))
    ]
    return [place for run in found if (place := run / path.relative_to(missing)).exists()]


def without_link(path: Path) -> Path:
    """Return a path with the link `latest`, if it is in it, replaced by where it leads."""
    found = Path()
    for part in path.parts:
        found /= part
        if part == LATEST and found.is_symlink():
            found = found.parent / found.readlink()
    return found


def below(logdir: Path) -> list[Path]:
    """Return the run directories in a directory and in the directories in it, each once."""
    found = (path.parent for depth in (1, 2) for path in logdir.glob("*/" * depth + "config.yml"))
    return sorted(path for path in found if path.name != LATEST)


def find(logdir: Path) -> Path:
    """Return the run directory that `logdir` is, or the only one below it.

    Raises:
        ConfigError: there is none, or more than one.
    """
    if not logdir.is_dir():
        for link in (logdir, *logdir.parents):
            if link.name == LATEST and link.is_symlink() and not link.exists():
                raise ConfigError(f"logdir: {link} leads to {os.readlink(link)}, which isn't there; name another run")
        raise ConfigError(
            f"logdir: {logdir} is not a directory; name a run directory, the beginning of its name, one of its "
            f"checkpoints, a --logdir of train.py, or a {weights.SUFFIX} file"
        )
    found = [logdir] if (logdir / "config.yml").exists() else below(logdir)
    if not found:
        raise ConfigError(f"logdir: {logdir} holds no run (no config.yml); name a run directory that train.py printed")
    if len(found) > 1:
        raise ConfigError(f"logdir: {logdir} holds {len(found)} runs; name one of {', '.join(map(str, found))}")
    return found[0]


def saved_keys(path: Path) -> dict[str, Any]:
    """Return the keys in a run's config.yml, or in a .safetensors file.

    Raises:
        ConfigError: it can't be read, or lacks keys, as an empty or a truncated one does.
    """
    if weights.is_named_by(path):
        return configuration.typed(weights.read_notes(path)["config"], str(path))
    remedy = (
        "restore the file, or write it again with the run's keys and seed (an eval_*/evaluation.yml beside it has "
        "them; a checkpoint holds parameters and steps, and no keys)"
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
    """Return the configuration in a run's config.yml; raise ConfigError as `saved_keys` does."""
    return Config(**saved_keys(path))


def load_config(run: Path, flags: Mapping[str, str]) -> Config:
    """Return a run's configuration, with flags in place of its values.

    Raises:
        ConfigError: a flag would change the parameters' shapes; or as `saved_keys`, `config.typed` and `Config`.
    """
    path = config_file(run)
    saved, given = saved_keys(path), configuration.typed(flags, "command line")
    for key, value in given.items():
        there = saved.get(key, getattr(Config, key))
        if key in configuration.marked("shapes") and value != there:
            raise ConfigError(f"{key}: the parameters of {run} were trained with {there}, got {value}; leave it out")
    c = Config(**saved | given)
    newer = [key for key in vars(c) if key not in saved and key not in flags and key in configuration.read_by(c.model)]
    if newer:
        values = ", ".join(f"{key} = {getattr(c, key)}" for key in newer)
        print(f"{path} is older than some keys, whose defaults are used: {values}")
    return c


def config_file(run: Path) -> Path:
    """Return the file that holds the configuration of what `Checkpoint.run` names."""
    return run if weights.is_named_by(run) else run / "config.yml"


def find_checkpoint(logdir: Path) -> Checkpoint:
    """Return the checkpoint that `logdir` names: one itself, a run's newest, or that of the only run below it.

    Raises:
        ConfigError: there is none, or more than one run; or as `weights.read_notes`.
    """
    if weights.is_named_by(logdir):
        return Checkpoint(logdir, weights.read_notes(logdir)["step"])
    if logdir.name.isdigit() and logdir.parent.name == "checkpoints" and logdir.parent.is_dir():
        if not logdir.is_dir():
            there = steps_in(logdir.parent)
            raise ConfigError(f"logdir: {logdir.parent} has no step {logdir.name}; name one of {there}")
        return Checkpoint(logdir.parent.parent, int(logdir.name))
    path = find(logdir)
    steps = steps_in(path / "checkpoints")
    if not steps:
        raise ConfigError(f"logdir: {path} holds no checkpoint yet; train longer, or lower --save_model_every")
    return Checkpoint(path, steps[-1])


def steps_in(checkpoints: Path) -> list[int]:
    """Return the steps of the checkpoints in a directory, in order."""
    return sorted(int(path.name) for path in checkpoints.glob("*") if path.name.isdigit())


def read_notes(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what a checkpoint holds besides arrays.

    Raises:
        DamagedCheckpoint: it can't be read.
        ConfigError: as `weights.read_notes`.
    """
    if checkpoint.alone:
        return weights.read_notes(checkpoint.run)
    with Checkpoints(checkpoint.run / "checkpoints") as checkpoints:
        return checkpoints.notes(checkpoint.step)


def earlier_stages(config: Config, notes: Mapping[str, Any]) -> list[int] | None:
    """Return the steps of the trainings that a training started from, one after the other; the oldest first.

    Checkpoints hold them as their note `stages`. Earlier versions kept no such note: then `init_from` tells.

    Args:
        config: of the training.
        notes: of its checkpoint; before the first one, with empty `metrics`, which only a training leaves.

    Returns:
        [] if the training started from random parameters; None if that isn't recorded.
    """
    if "stages" in notes:
        return notes["stages"]
    if config.init_from is None:  # in an exported model, whatever it started from
        return [] if "metrics" in notes else None
    try:
        source = find_checkpoint(Path(config.init_from))
        before = stages_before(source)
    except ConfigError:
        return None
    return None if before is None else [*before, source.step]


def stages_before(checkpoint: Checkpoint) -> list[int] | None:
    """Return the `earlier_stages` of a checkpoint's training; raise as `saved_config` and `read_notes`.

    Several processes call it together.
    """
    return earlier_stages(saved_config(config_file(checkpoint.run)), read_notes(checkpoint))


def steps_of_all_stages(step: int, stages: Sequence[int] | None) -> str:
    """Return in words how long a checkpoint at `step`, after `stages`, was trained."""
    if stages is None:
        return f"step {step:,} (whether trainings came before isn't recorded)"
    if not stages:
        return f"step {step:,}"
    return f"{sum(stages) + step:,} steps in {len(stages) + 1} stages, {step:,} of them in the last"


class Loaded(NamedTuple):
    """A trained model."""

    model: Model
    params: Any
    config: Config


def load(logdir: Path | str) -> Loaded:
    """Load a trained model; `logdir` is as for `named` and `find_checkpoint`.

    Raises:
        ConfigError: as `named`, `find_checkpoint` and `saved_config`.
        DamagedCheckpoint: as `load_state`.
    """
    checkpoint = find_checkpoint(named(logdir))
    config = saved_config(config_file(checkpoint.run))
    model = make_model(config)
    return Loaded(model, load_params(model, checkpoint), config)


def load_state(model: Model, checkpoint: Checkpoint) -> TrainState:
    """Return what a checkpoint holds, as numpy arrays; of a file, Adam's averages are zeros.

    Raises:
        DamagedCheckpoint: the checkpoint isn't intact, or is another model's.
    """
    empty = make_state(model, draw=False)
    if checkpoint.alone:
        step: Any = np.int32(checkpoint.step)
        return dataclasses.replace(empty, step=step, params=weights.load(checkpoint.run, empty.params))
    with Checkpoints(checkpoint.run / "checkpoints") as checkpoints:
        state, _ = checkpoints.load(checkpoint.step, empty)
    return state


def load_params(model: Model, checkpoint: Checkpoint) -> Any:
    """Return the parameters in a checkpoint, on all devices of this process. Raises as `load_state`."""
    return Devices().replicate(load_state(model, checkpoint).params)


def initial_state(model: Model) -> TrainState:
    """Return the state before the first step, with the parameters of the checkpoint that `init_from` names, if any.

    Raises:
        ConfigError: there is no such checkpoint, `latest` leads to it, or its parameters have other shapes.
    """
    source = model.config.init_from
    if source is None:
        return make_state(model)
    if (run := without_link(Path(source))) != Path(source):
        raise ConfigError(f"init_from: {source} will lead to the new run; name {run}")
    try:
        checkpoint = find_checkpoint(Path(source))
        params = load_state(make_model(load_config(checkpoint.run, {})), checkpoint).params
    except ConfigError as error:
        raise ConfigError(f"init_from: {error}") from error
    state = make_state(model)
    there, here = shapes(params), shapes(state.params)
    for name in {**here, **there}:
        if there.get(name) != here.get(name):
            raise ConfigError(
                f"init_from: {source} has parameters of other shapes, {name} first ({there.get(name)} there, "
                f"{here.get(name)} here); set the model's keys as in {config_file(checkpoint.run)}"
            )
    return dataclasses.replace(state, params=params)


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a pytree's leaves by their paths."""
    return {name: leaf.shape for name, leaf in weights.named(tree).items()}

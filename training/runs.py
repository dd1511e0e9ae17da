"""A run: what a training leaves behind, and how it is opened, found and loaded.

<logdir>/<dataset>/<run name>/
    config.yml           the whole configuration; train.py --config with it is the same run
    lock                 held by the process that trains
    wandb_id             the wandb run that a resumed training continues
    metrics.jsonl        one line per log
    videos/*.gif         open-loop predictions
    events.out.tfevents.*, videos/events.out.tfevents.*  the two for TensorBoard, if asked for
    checkpoints/<step>   the newest two, and one each save_named_model_every steps forever
    nonfinite/           what helps to find out why a loss wasn't finite
    eval_<time>/         an evaluation
<logdir>/latest          leads to the run that was started or resumed last

A .safetensors file (see system/weights.py) stands for a run with one checkpoint wherever one is named to be read.
"""

import contextlib
import dataclasses
import json
import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock

from config import LATEST, Config, ConfigError
from sequences.interface import Model
from system import logs
from system.checkpoints import Checkpoints
from system.devices import Devices
from system.files import replace_file, replace_link
from training.loading import earlier_stages, initial_state, saved_config, saved_keys
from training.step import NEVER, TrainState, make_state

# ---------------------------------------------------------------------------------------------- training


def directory(config: Config) -> Path:
    """Return the directory of a configuration's run.

    A random seed isn't part of a run's name. A configuration with just that seed, as in the run's config.yml, means
    that run.
    """
    parent = Path(config.logdir) / config.dataset
    named, unnamed = parent / config.run_name, parent / dataclasses.replace(config, seed=None).run_name
    if not named.exists() and (unnamed / "config.yml").exists():
        return unnamed if saved_keys(unnamed / "config.yml").get("seed") == config.seed else named
    return named


class Run:
    """An open run of a training, which no other process trains."""

    def __init__(self, config: Config, path: Path, checkpoints: Checkpoints, devices: Devices):
        self.config, self.path, self.checkpoints, self.devices = config, path, checkpoints, devices
        self.log: logs.Log | None = None
        """Of process 0; opened by `restore`."""
        self.logged = 0
        """The last step that was logged."""
        self.stages: list[int] | None = []
        """As `earlier_stages` returns them; set by `restore`."""

    def restore(self, model: Model) -> tuple[int, TrainState, dict[str, float]]:
        """Load the newest intact checkpoint, or make the state before the first step; open the log there.

        Returns:
            The step, the state on the devices, and the step's metrics.

        Raises:
            ConfigError: a new training can't start from what `init_from` names, or the directory can't be written.
        """
        newest = self.checkpoints.load_newest(make_state(model, draw=False)) if self.checkpoints.steps else None
        step, state, notes = newest or (0, self.devices.from_first(initial_state(model)), {"metrics": {}})
        self.stages = earlier_stages(self.config, notes)

        def open_log() -> str:
            with writable(self.path):
                replace_file(self.path / "config.yml", self.config.to_yaml().encode())
                wandb_run = logs.start_wandb(self.config, self.path)
                self.log = logs.Log(self.path, step, wandb_run, self.config.tensorboard)
            self.link()
            return str(self.log.last)

        self.logged = int(self.devices.first_decides(open_log))
        return step, self.devices.replicate(state), notes.get("metrics", {})

    @property
    def latest(self) -> Path:
        """The link to this run, if it is the latest one of its log directory."""
        return Path(self.config.logdir) / LATEST

    def link(self) -> None:
        """Let `<logdir>/latest` lead to this run; warn if it can't."""
        try:
            replace_link(self.latest, self.path.relative_to(self.config.logdir))
        except (OSError, NotImplementedError) as error:
            reason = getattr(error, "strerror", None) or error
            print(f"Warning: {self.latest} can't be made a link ({reason}); training continues")

    @property
    def short_path(self) -> Path:
        """The path to name to somebody who reads it now: a later run may be the latest one when a file is read."""
        leads_here = os.path.realpath(self.latest) == os.path.realpath(self.path)
        return self.latest if leads_here and sys.stdout.isatty() else self.path

    def save(self, step: int, state: TrainState, metrics: Mapping[str, Any]) -> None:
        """Save a checkpoint, the metrics of its step and the stages before, unless the loss isn't finite any more."""
        if int(state.first_bad) == NEVER:
            values = {name: float(x) for name, x in metrics.items()}
            self.checkpoints.save(step, state, metrics=values, stages=self.stages)

    def report(self, step: int, **metrics: Mapping[str, Any]) -> None:
        """Log the metrics of a step, by split."""
        self.logged = step
        if self.log:
            values = {f"{split}/{name}": float(x) for split in metrics for name, x in metrics[split].items()}
            self.log.metrics(step, values)

    def close(self) -> None:
        if self.log:
            self.log.close()

    def video(self, split: str, step: int) -> Path:
        """Return the path of a video of open-loop predictions."""
        return self.path / "videos" / f"{split}_{step:07}.gif"


@contextlib.contextmanager
def opened(config: Config, devices: Devices) -> Iterator[Run]:
    """Open a run for training: a new one, or one to resume, whose random seed then applies.

    Of several processes, the first makes and locks the directory for all.

    Raises:
        ConfigError: another process trains it, the run there differs in what can't change, or the directory can't be
            made or written.
    """
    with writable(Path(config.logdir)):
        path = directory(config)  # by the name without a random seed
    with contextlib.ExitStack() as resources:

        def settle() -> str:
            resources.enter_context(locked(path))
            return resumable(config, path / "config.yml").to_json()

        settled = Config(**json.loads(devices.first_decides(settle)))
        with writable(path / "checkpoints"):
            (path / "checkpoints").mkdir(exist_ok=True)
            checkpoints = resources.enter_context(Checkpoints(path / "checkpoints", settled.save_named_model_every))
        run = Run(settled, path, checkpoints, devices)
        resources.callback(run.close)
        yield run


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a run's directory, which is made if needed. The system takes it back from a process that dies.

    Raises:
        ConfigError: another process holds it, or the directory can't be made or written.
    """
    lock = filelock.FileLock(path / "lock", timeout=0)
    with writable(path):
        path.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except filelock.Timeout as error:
            raise ConfigError(
                f"{path} is being trained by another process; wait for it, or choose another --logdir"
            ) from error
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def writable(path: Path) -> Iterator[None]:
    """Raise a ConfigError if a run's directory can't be made or written."""
    try:
        yield
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ConfigError(
            f"logdir: {path} can't be made or written ({reason}); make room or permit it there, or choose another "
            "--logdir"
        ) from error


def resumable(config: Config, saved: Path) -> Config:
    """Return the configuration with a seed: its own, that of the run that it resumes, or a random one.

    Raises:
        ConfigError: the saved run differs in what can't change, or as `saved_keys`.
    """
    config = dataclasses.replace(config, rebuild_frames=False)  # done once, not at each resume or evaluation
    if not saved.exists() and not any((saved.parent / "checkpoints").glob("[0-9]*")):
        return config if config.seed is not None else dataclasses.replace(config, seed=secrets.randbelow(2**31))
    earlier = saved_config(saved)
    if config.seed is None:
        config = dataclasses.replace(config, seed=earlier.seed)
    differing = [
        f"{key} ({getattr(earlier, key)!r} there, {getattr(config, key)!r} now)"
        for key in vars(config)
        if key not in config.free and getattr(earlier, key) != getattr(config, key)
    ]
    if differing:
        raise ConfigError(
            f"{saved.parent} holds a run with another {', '.join(differing)}; "
            "set it as there, or choose another --name or --logdir"
        )
    return config

"""A run: the directory of a training, and how it is opened, resumed and written.

<logdir>/<dataset>/<run name>/
    config.yml           the whole configuration; train.py --config with this file resumes the run
    lock                 held by the process that trains
    wandb_id             the wandb run that a resumed training continues
    metrics.jsonl        one line for each logged step
    videos/*.gif         open-loop predictions
    events.out.tfevents.*, videos/events.out.tfevents.*  both for TensorBoard, if requested
    checkpoints/<step>   the newest two, and one every save_named_model_every steps, kept forever
    nonfinite/           files that help to find out why a loss wasn't finite
    eval_<time>/         an evaluation
<logdir>/latest          links to the run that was started or resumed last

training/loading.py finds and loads runs. It also takes a .safetensors file (system/weights.py), as a run with one
checkpoint.
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


def directory(config: Config) -> Path:
    """Return the directory of a configuration's run.

    The name of a run with a random seed doesn't contain the seed. But the run's config.yml does, and a configuration
    with this seed means the same run.
    """
    parent = Path(config.logdir) / config.dataset
    path, without_seed = parent / config.run_name, parent / dataclasses.replace(config, seed=None).run_name
    if not path.exists() and (without_seed / "config.yml").exists():
        return without_seed if saved_keys(without_seed / "config.yml").get("seed") == config.seed else path
    return path


class Run:
    """An open run, which only this process trains."""

    def __init__(self, config: Config, path: Path, checkpoints: Checkpoints, devices: Devices):
        self.config, self.path, self.checkpoints, self.devices = config, path, checkpoints, devices
        self.log: logs.Log | None = None
        """Of process 0; opened by `restore`."""
        self.logged = 0
        """The step that was logged last."""
        self.stages: list[int] | None = []
        """As `earlier_stages` returns them; set by `restore`."""

    def restore(self, model: Model) -> tuple[int, TrainState, dict[str, float]]:
        """Load the newest intact checkpoint, or make the state before the first step. Open the log at its step.

        Returns:
            The step, the state on the devices, and the step's metrics.

        Raises:
            ConfigError: a new training can't start from `init_from`, or the directory can't be written.
        """
        newest = self.checkpoints.load_newest(make_state(model, draw=False)) if self.checkpoints.steps else None
        step, state, notes = newest or (0, self.devices.broadcast(initial_state(model)), {"metrics": {}})
        self.stages = earlier_stages(self.config, notes)

        def open_log() -> str:
            with writable(self.path):
                replace_file(self.path / "config.yml", self.config.to_yaml().encode())
                wandb_run = logs.try_start_wandb(self.config, self.path)
                self.log = logs.Log(self.path, step, wandb_run, self.config.tensorboard)
            self.link_latest()
            return str(self.log.last)

        self.logged = int(self.devices.first_decides(open_log))
        return step, self.devices.replicate(state), notes.get("metrics", {})

    @property
    def latest(self) -> Path:
        """The link to the latest run of this run's log directory."""
        return Path(self.config.logdir) / LATEST

    def link_latest(self) -> None:
        """Make `<logdir>/latest` a link to this run. If that fails, print a warning."""
        try:
            replace_link(self.latest, self.path.relative_to(self.config.logdir))
        except (OSError, NotImplementedError) as error:
            reason = getattr(error, "strerror", None) or error
            print(f"Warning: {self.latest} can't be made a link ({reason}); training continues")

    @property
    def short_path(self) -> Path:
        """The path to print: `latest` on a terminal, if it links to this run. In a file, `latest` may become wrong."""
        links_here = os.path.realpath(self.latest) == os.path.realpath(self.path)
        return self.latest if links_here and sys.stdout.isatty() else self.path

    def save(self, step: int, state: TrainState, metrics: Mapping[str, Any]) -> None:
        """Save a checkpoint with its step's metrics and the earlier stages, if loss and gradient were always finite."""
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
        """Return the path for a video of open-loop predictions."""
        return self.path / "videos" / f"{split}_{step:07}.gif"


@contextlib.contextmanager
def opened(config: Config, devices: Devices) -> Iterator[Run]:
    """Open a run for training: a new one, or one to resume, with its random seed.

    With several processes, the first one makes and locks the directory for all of them.

    Raises:
        ConfigError: another process trains the run, the saved run differs in a key that can't change, or the directory
            can't be made or written.
    """
    with writable(Path(config.logdir)):
        path = directory(config)  # its name is without a random seed
    with contextlib.ExitStack() as resources:

        def lock_and_resolve() -> str:
            resources.enter_context(locked(path))
            return resolve_config(config, path / "config.yml").to_json()

        resolved = Config(**json.loads(devices.first_decides(lock_and_resolve)))
        with writable(path / "checkpoints"):
            (path / "checkpoints").mkdir(exist_ok=True)
            checkpoints = resources.enter_context(Checkpoints(path / "checkpoints", resolved.save_named_model_every))
        run = Run(resolved, path, checkpoints, devices)
        resources.callback(run.close)
        yield run


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a run's directory, which is made if needed. The system releases it when the process dies.

    Raises:
        ConfigError: another process holds the lock, or the directory can't be made or written.
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
    """Turn errors from making or writing a run's directory into ConfigErrors."""
    try:
        yield
    except (OSError, NotImplementedError) as error:  # NotImplementedError: a file system without locks
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ConfigError(
            f"logdir: {path} can't be made or written ({reason}); make room or permit it there, or choose another "
            "--logdir"
        ) from error


def resolve_config(config: Config, saved: Path) -> Config:
    """Return the configuration with a seed: its own, that of the saved run that it resumes, or a random one.

    Raises:
        ConfigError: the saved run differs in a key that can't change; or as `saved_keys`.
    """
    config = dataclasses.replace(config, rebuild_frames=False)  # once is enough, not at each resume and evaluation
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

"""The logs of a training: metrics.jsonl, TensorBoard, wandb, a progress bar. If one fails, training continues."""

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax import Array
from tqdm import tqdm

from config import Config, ConfigError
from system.files import replace_file
from system.tensorboard import Events


class Log:
    """The log of a run: a line of `metrics.jsonl` per step, and TensorBoard and wandb if they are asked for.

    `last` is the last step in the log when it was opened, 0 if there was none.
    """

    def __init__(self, directory: Path, step: int, wandb_run: Any | None = None, tensorboard: bool = False):
        """Open the log of a run at `step`. Lines of later steps are dropped, since these steps are repeated."""
        self.path = directory / "metrics.jsonl"
        self.wandb_run = wandb_run
        self.unwritten: list[str] = []
        lines = read_lines(self.path)
        kept = [line for line in lines if step_of(line) in range(step + 1)]
        if kept != lines:
            replace_file(self.path, "".join(kept).encode())
        self.last = step_of(kept[-1]) if kept else 0
        self.last_sent = max(map(step_of, lines), default=0)
        """The last step that was sent to wandb, which would count a repeated step as a later one."""
        self.events = Events(directory) if tensorboard else None
        if self.events:
            for values in map(json.loads, kept):
                self.events.metrics(values.pop("step"), values)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Log the metrics of a step."""
        self.unwritten.append(json.dumps({"step": step, **values}) + "\n")
        size = None
        try:
            with self.path.open("ab") as file:
                size = file.tell()
                file.write("".join(self.unwritten).encode())
            self.unwritten.clear()
        except OSError as error:  # for example a full disk: the next call writes these lines, too
            if size is not None:
                os.truncate(self.path, size)
            print(f"Warning: {self.path} can't be written ({error.strerror}); training continues")
        if self.events:
            self.events.metrics(step, values)
        self._to_wandb(lambda: dict(values), step)

    def gif(self, step: int, name: str, path: Path) -> None:
        """Log a video of a step."""

        def video() -> dict[str, Any]:
            import wandb

            return {name: wandb.Video(str(path), format="gif")}

        if self.events:
            self.events.gif(step, name, path)
        self._to_wandb(video, step)

    def close(self) -> None:
        if self.events:
            self.events.close()

    def _to_wandb(self, values: Callable[[], dict[str, Any]], step: int) -> None:
        if self.wandb_run is None or step <= self.last_sent:
            return
        try:
            self.wandb_run.log(values(), step=step)
        except Exception as error:
            warn_of_wandb(error, "training continues without it")
            self.wandb_run = None


def read_lines(path: Path) -> list[str]:
    """Return the lines of a log, [] if there is no file. Bytes that aren't text, as after a power cut, are replaced."""
    return path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []


def step_of(line: str) -> int:
    """Return the step of a line of `metrics.jsonl`, -1 if the line is damaged."""
    try:
        return int(json.loads(line)["step"]) if line.endswith("\n") else -1
    except (ValueError, KeyError, TypeError):
        return -1


# ---------------------------------------------------------------------------------------------- wandb


def with_sweep(config: Config) -> Config:
    """Return the configuration with the values of a sweep, if wandb's agent started this program.

    This starts the wandb run of the agent, since it holds the values. Other wandb runs are started once the run's
    directory is locked.

    Raises:
        ConfigError: wandb can't start, a key or value of the sweep can't work, or all of its runs would have one name.
    """
    if config.wandb == "disabled" or "WANDB_SWEEP_ID" not in os.environ:
        return config
    if config.name is not None:
        raise ConfigError(f"name: the runs of a sweep can't share one, got {config.name!r}; leave it out")
    try:
        run = start_wandb(config)
    except Exception as error:  # without the sweep's values, another configuration would be trained
        reason = " ".join(str(error).split())
        raise ConfigError(f"wandb: the sweep's values can't be read ({reason}); start the agent again") from error
    return config if run is None else config.updated(dict(run.config), "wandb")


def start_wandb(config: Config, directory: Path | None = None) -> Any | None:
    """Start a wandb run, or resume that of a run directory, where its id is saved.

    The mode `auto` is that of WANDB_MODE, if set. Otherwise it is online with an API key, and offline without: nobody
    is asked for a key. Exceptions of wandb are passed on.

    Returns:
        The run, or None if wandb is disabled.
    """
    mode: Any = config.wandb if config.wandb != "auto" else os.environ.get("WANDB_MODE", "auto")
    if mode == "disabled":
        return None
    import wandb  # slow to import

    run = wandb.run
    if run is None:
        if mode == "auto":
            mode = online_or_offline()
        saved_id = None if directory is None or "WANDB_RUN_ID" in os.environ else directory / "wandb_id"
        Path(config.logdir).mkdir(parents=True, exist_ok=True)
        run = wandb.init(
            project="cwvae",
            mode=mode,
            dir=config.logdir,
            config=dataclasses.asdict(config),
            id=saved_id.read_text() if saved_id and saved_id.exists() else None,
            resume="allow",
            settings=wandb.Settings(silent=True),
        )
    if directory is not None:
        run.name = config.run_name
        replace_file(directory / "wandb_id", run.id.encode())
    return run


def try_start_wandb(config: Config, directory: Path) -> Any | None:
    """Start the wandb run of a training as `start_wandb`. If wandb fails, print a warning and return None."""
    try:
        return start_wandb(config, directory)
    except Exception as error:
        warn_of_wandb(error, "training continues without it")
        return None


def warn_of_wandb(error: Exception, consequence: str) -> None:
    """Print a warning about an exception of wandb, which can be of any type."""
    print(f"Warning: wandb failed ({' '.join(str(error).split())}); {consequence}")


def online_or_offline() -> str:
    """Return wandb's mode: online if an API key is configured, else offline, with a printed line."""
    import wandb

    try:
        if wandb.login(prompt=False):
            return "online"
        reason = "no API key is configured"
    except wandb.Error as error:
        reason = " ".join(str(error).split())
    print(f"wandb: offline, since {reason}; `wandb login` before a run, or `wandb sync` after it, uploads it")
    return "offline"


@contextlib.contextmanager
def wandb_session() -> Iterator[None]:
    """End the wandb run that was started inside, if any: as finished, or after an exception as failed."""
    try:
        yield
    except BaseException:
        finish_wandb(1)
        raise
    finish_wandb(0)


def finish_wandb(exit_code: int) -> None:
    """End the current wandb run, if any. If wandb fails, print a warning."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        try:
            wandb.run.finish(exit_code=exit_code)
        except Exception as error:
            warn_of_wandb(error, "its run may be incomplete")


# ---------------------------------------------------------------------------------------------- progress


class OverallProgress:
    """The progress of several trainings, as text: "3 of 12 done, 40 min left"."""

    def __init__(self, work: Sequence[float]):
        """Begin the first training. `work` is how long each training takes, in any unit."""
        self.work, self.finished, self.done, self.seconds = work, 0, 0.0, 0.0
        self.start = time.monotonic()

    def update(self, share: float) -> None:
        """Count a training as finished, and begin the next one. This start of the program did a `share` of it."""
        now = time.monotonic()
        if share > 0:
            self.done += share * self.work[self.finished]
            self.seconds += now - self.start
        self.start = now
        self.finished += 1

    def __str__(self) -> str:
        left = sum(self.work[self.finished :])
        text = f"{self.finished} of {len(self.work)} done"
        if not left or not self.done:
            return text
        minutes = left * self.seconds / self.done / 60
        return f"{text}, {f'{minutes / 60:.1f} h' if minutes > 90 else f'{max(1, round(minutes))} min'} left"


SLOW_STEP = 30.0
"""If a step takes more seconds, the time of all steps is printed."""


class Progress:
    """A progress bar that counts finished steps, and keeps the loop from running ahead of the devices.

    At most two steps are in progress. Thus the bar shows the true progress, a checkpoint soon follows a signal, and few
    batches are in memory.
    """

    def __init__(self, step: int, steps: int, frames_per_step: int, shown: bool = True):
        self.steps, self.frames_per_step = steps, frames_per_step
        self.bar = tqdm(
            desc="compiling",
            total=steps,
            initial=step,
            disable=not shown,
            unit="step",
            smoothing=0.1,
            mininterval=0.5 if sys.stderr.isatty() else 30,
            dynamic_ncols=True,
        )
        self.losses: deque[Any] = deque()
        self.start: float | None = None
        """The time when the first step had been compiled."""
        self.is_first = True

    def update(self, loss: Array) -> None:
        """Take the future loss of a step that was started, and wait until the step before is finished."""
        if self.start is None:
            self.start = time.monotonic()
            self.bar.set_description("first step")
        self.losses.append(loss)
        while len(self.losses) > 1 or (self.losses and self.losses[0].is_ready()):
            self._finish(self.losses.popleft())

    def _finish(self, loss: Array) -> None:
        loss.block_until_ready()
        if self.is_first and self.start is not None:
            self._finish_first(time.monotonic() - self.start)
        elif self.bar.update():
            rate = self.bar.format_dict["rate"] or 0
            self.bar.set_postfix_str(
                f"loss {float(loss):.4g}, {rate * self.frames_per_step:.0f} frames/s", refresh=False
            )

    def _finish_first(self, seconds: float) -> None:
        """Count the first step, but not its time, which includes compilation."""
        self.is_first = False
        if self.bar.disable:
            return
        self.bar.n += 1
        self.bar.initial = self.bar.last_print_n = self.bar.n
        self.bar.set_description("", refresh=False)
        self.bar.unpause()
        self.bar.refresh()
        left = self.steps - self.bar.n
        if seconds > SLOW_STEP and left:
            self.bar.write(
                f"A step takes {seconds:.0f} s, so the {left:,} steps left take {left * seconds / 86400:.1f} days; "
                "lower --batch_size, --seq_len or --max_steps, or use an accelerator"
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, error: Any, *_: Any) -> None:
        if error is None:
            for loss in self.losses:
                self._finish(loss)
        self.bar.close()

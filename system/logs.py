"""What a training tells: metrics.jsonl, TensorBoard, wandb, a progress bar. None of their failures stops it."""

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax import Array
from tqdm import tqdm

from config import Config, ConfigError
from system.files import replace_file
from system.tensorboard import Events


class Log:
    """The metrics of a run: one line of `metrics.jsonl` per log, and what is asked for of TensorBoard and wandb.

    `last` is the last step that had been logged when it was opened, 0 if none had.
    """

    def __init__(self, directory: Path, step: int, wandb_run: Any | None = None, tensorboard: bool = False):
        """Open the log of a run that stands at `step`; drop lines of later steps, which will come again."""
        self.path = directory / "metrics.jsonl"
        self.wandb_run = wandb_run
        self.unwritten: list[str] = []
        lines = read_lines(self.path)
        kept = [line for line in lines if step_of(line) in range(step + 1)]
        if kept != lines:
            replace_file(self.path, "".join(kept).encode())
        self.last = step_of(kept[-1]) if kept else 0
        self.sent = max(map(step_of, lines), default=0)
        """The last step that wandb has been told, since it would take a step that comes again for a later one."""
        self.events = Events(directory) if tensorboard else None
        if self.events:
            for values in map(json.loads, kept):
                self.events.metrics(values.pop("step"), values)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self.unwritten.append(json.dumps({"step": step, **values}) + "\n")
        size = None
        try:
            with self.path.open("ab") as file:
                size = file.tell()
                file.write("".join(self.unwritten).encode())
            self.unwritten.clear()
        except OSError as error:  # disk full, say: these lines go with the next ones
            if size is not None:
                os.truncate(self.path, size)
            print(f"Warning: {self.path} can't be written ({error.strerror}); training continues")
        if self.events:
            self.events.metrics(step, values)
        self._to_wandb(dict(values), step)

    def gif(self, step: int, name: str, path: Path) -> None:
        if self.events:
            self.events.gif(step, name, path)
        if self.wandb_run is not None:
            import wandb

            self._to_wandb({name: wandb.Video(str(path), format="gif")}, step)

    def close(self) -> None:
        if self.events:
            self.events.close()

    def _to_wandb(self, values: dict[str, Any], step: int) -> None:
        if self.wandb_run is None or step <= self.sent:
            return
        try:
            self.wandb_run.log(values, step=step)
        except Exception as error:  # whatever happens there
            print(f"Warning: wandb failed ({' '.join(str(error).split())}); training continues without it")
            self.wandb_run = None


def read_lines(path: Path) -> list[str]:
    """Return a file's lines; bytes that aren't text, as after a power cut, belong to none that is whole."""
    return path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []


def step_of(line: str) -> int:
    """Return the step of a line of `metrics.jsonl`, -1 if it isn't whole."""
    try:
        return int(json.loads(line)["step"]) if line.endswith("\n") else -1
    except (ValueError, KeyError, TypeError):
        return -1


# ---------------------------------------------------------------------------------------------- wandb


def with_sweep(config: Config) -> Config:
    """Return the configuration with a sweep's values in place of its own, if wandb's agent started this program.

    The agent's run is started for it. Other runs are started by `start_wandb`, once their directory is locked.

    Raises:
        ConfigError: a sweep's key or value can't work, or all of its runs would have one name.
    """
    if config.wandb == "disabled" or "WANDB_SWEEP_ID" not in os.environ:
        return config
    if config.name is not None:
        raise ConfigError(f"name: the runs of a sweep can't share one, got {config.name!r}; leave it out")
    run = start_wandb(config)
    return config if run is None else config.updated(dict(run.config), "wandb")


def start_wandb(config: Config, directory: Path | None = None) -> Any | None:
    """Start a wandb run, or resume that of a run directory; name it, and remember it there.

    Without a login, `auto` runs offline and says so: nobody is asked for a key. WANDB_MODE, if set, decides for `auto`.

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


def online_or_offline() -> str:
    """Return wandb's mode by whether an API key is configured; say so if none is."""
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
    """End the wandb run that was started inside, if any, as finished, or after an exception as failed."""
    try:
        yield
    except BaseException:
        finish_wandb(1)
        raise
    finish_wandb(0)


def finish_wandb(exit_code: int) -> None:
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.run.finish(exit_code=exit_code)


# ---------------------------------------------------------------------------------------------- progress


class Overall:
    """How far several trainings are: "3 of 12 done, 40 min left"."""

    def __init__(self, work: Sequence[float]):
        """Begin the first; `work` is how long each takes, as a multiple of anything."""
        self.work, self.finished, self.done, self.seconds = work, 0, 0.0, 0.0
        self.begun = time.monotonic()

    def update(self, share: float) -> None:
        """Count one as finished, of which this start did only a `share`, and begin the next."""
        now = time.monotonic()
        if share > 0:
            self.done += share * self.work[self.finished]
            self.seconds += now - self.begun
        self.begun = now
        self.finished += 1

    def __str__(self) -> str:
        left = sum(self.work[self.finished :])
        text = f"{self.finished} of {len(self.work)} done"
        if not left or not self.done:
            return text
        minutes = left * self.seconds / self.done / 60
        return f"{text}, {f'{minutes / 60:.1f} h' if minutes > 90 else f'{max(1, round(minutes))} min'} left"


SLOW = 30.0
"""Seconds of a step from which on it is said how long all of them take."""


class Progress:
    """A progress bar that counts finished steps, and keeps the loop from running ahead of the devices.

    At most two steps are in flight: so the bar shows where the training stands, a signal is followed by a checkpoint
    soon, and no more batches are held than these need.
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
        self.begun: float | None = None
        """When the first step was compiled."""
        self.first = True

    def update(self, loss: Array) -> None:
        """Count a step that was begun, by the loss that it will have; wait until the one before is finished."""
        if self.begun is None:
            self.begun = time.monotonic()
            self.bar.set_description("first step")
        self.losses.append(loss)
        while len(self.losses) > 1 or (self.losses and self.losses[0].is_ready()):
            self._finish(self.losses.popleft())

    def _finish(self, loss: Array) -> None:
        loss.block_until_ready()
        if self.first and self.begun is not None:
            self._finish_first(time.monotonic() - self.begun)
        elif self.bar.update():
            rate = self.bar.format_dict["rate"] or 0
            self.bar.set_postfix_str(
                f"loss {float(loss):.4g}, {rate * self.frames_per_step:.0f} frames/s", refresh=False
            )

    def _finish_first(self, seconds: float) -> None:
        """Count the first step without its time, in which things were compiled."""
        self.first = False
        if self.bar.disable:
            return
        self.bar.n += 1
        self.bar.initial = self.bar.last_print_n = self.bar.n
        self.bar.set_description("", refresh=False)
        self.bar.unpause()
        self.bar.refresh()
        left = self.steps - self.bar.n
        if seconds > SLOW and left:
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

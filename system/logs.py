"""A run's log: metrics.jsonl, and wandb where it runs."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from config import Config
from system.files import replace_file


class Log:
    """Metrics to `metrics.jsonl`, one line per log, and to wandb where it runs. Neither's failure stops training."""

    def __init__(self, directory: Path, step: int, wandb_run: Any | None):
        """Opens the log of a run that stands at `step`; drops lines of later steps, which will come again."""
        self.path = directory / "metrics.jsonl"
        self.wandb_run = wandb_run
        self.unwritten: list[str] = []
        if self.path.exists():
            lines = [line for line in self.path.read_text().splitlines(keepends=True) if before(line, step)]
            replace_file(self.path, "".join(lines).encode())

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self.unwritten.append(json.dumps({"step": step, **values}) + "\n")
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a") as file:
                file.write("".join(self.unwritten))
            self.unwritten.clear()
        except OSError as error:  # disk full: these lines go with the next ones
            os.truncate(self.path, size)
            print(f"Warning: {self.path} couldn't be written ({error.strerror}); training goes on")
        self._to_wandb(dict(values), step)

    def gif(self, step: int, name: str, path: Path) -> None:
        if self.wandb_run is not None:
            import wandb

            self._to_wandb({name: wandb.Video(str(path), format="gif")}, step)

    def _to_wandb(self, values: dict[str, Any], step: int) -> None:
        if self.wandb_run is None:
            return
        try:
            self.wandb_run.log(values, step=step)
        except Exception as error:  # whatever happens there
            print(f"Warning: wandb failed ({' '.join(str(error).split())}); training goes on without it")
            self.wandb_run = None


def before(line: str, step: int) -> bool:
    """Whether a line of `metrics.jsonl` is whole and of no later step."""
    try:
        return line.endswith("\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False


def finish(wandb_run: Any | None) -> Callable[..., None]:
    """For an ExitStack: ends the wandb run as finished, or after an exception as failed."""

    def exit(error: Any, *_: Any) -> None:
        if wandb_run is not None:
            wandb_run.finish(exit_code=0 if error is None else 1)

    return exit


def start_wandb(config: Config, directory: Callable[[Config], Path]) -> tuple[Config, Any | None]:
    """Starts a wandb run, or continues the one of the run directory; a sweep's values replace the configuration's.

    Without a login, `auto` runs offline and says so: nobody is asked for a key. WANDB_MODE, if set, decides for `auto`.

    Args:
        config: the configuration so far.
        directory: the run directory of a configuration.

    Returns:
        The configuration with the sweep's values, and the run, or None where wandb is disabled.

    Raises:
        ConfigError: a sweep's key or value can't work.
    """
    mode: Any = config.wandb if config.wandb != "auto" else os.environ.get("WANDB_MODE", "auto")
    if mode == "disabled":
        return config, None
    import wandb  # slow to import

    if mode == "auto":
        try:
            mode = "online" if wandb.login(prompt=False) else "offline"
            reason = "no API key is configured"
        except wandb.Error as error:
            mode, reason = "offline", " ".join(str(error).split())
        if mode == "offline":
            print(f"wandb: offline, since {reason}; `wandb login` before a run, or `wandb sync` after it, uploads it")
    saved_id = directory(config) / "wandb_id"
    Path(config.logdir).mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project="cwvae",
        mode=mode,
        dir=config.logdir,
        config=dataclasses.asdict(config),
        id=saved_id.read_text() if saved_id.exists() and "WANDB_RUN_ID" not in os.environ else None,
        resume="allow",
        settings=wandb.Settings(silent=True),
    )
    config = config.updated(dict(run.config), "wandb")
    run.name = config.run_name
    directory(config).mkdir(parents=True, exist_ok=True)
    (directory(config) / "wandb_id").write_text(run.id)
    return config, run

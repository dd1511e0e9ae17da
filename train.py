"""Train a Clockwork VAE: python train.py --config configs/minerl.yml [--key value ...]

Train all points of a grid in turn: python train.py --grid configs/sweeps/levels.yml [--key value ...]
"""

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

import config as configuration
import cwvae
import data
import tools
from config import Config, ConfigError, Flag
from sequences import rollout
from sequences.interface import Model
from sequences.noise import key_for, sequence_keys
from system.devices import Devices, connect, use_compilation_cache
from system.files import replace_file
from system.interrupts import Interrupted, Interrupts, exit_codes
from system.logs import OverallProgress, Progress, wandb_session, with_sweep
from system.tensorboard import require_tensorboard
from training import loading, runs
from training.models import make_model
from training.runs import Run
from training.step import NEVER, TrainState, make_train_step
from training.sweeps import grid


def train(config: Config) -> TrainState:
    """Train, or resume the same training, until `num_epochs` or `max_steps`.

    Returns:
        The last state, on the devices.

    Raises:
        ConfigError: the configuration can't work; nothing was overwritten.
        NonFinite: a loss or its gradient wasn't finite; see `<run>/nonfinite`.
        Interrupted: by Ctrl-C or a scheduler's signal; the last finished step is saved.
    """
    with Interrupts() as interrupts, wandb_session():
        config = connect(config)
        devices = Devices()
        config = Config(**json.loads(devices.first_decides(lambda: with_sweep(config).to_json())))
        check_videos(config)
        require_tensorboard(config)
        train_set, test_set = data.windows(config, "train"), data.windows(config, "test")
        config = data.with_action_size(config, train_set)
        with runs.opened(config, devices) as run, interrupts.deferred_at_exit():
            c, model = run.config, make_model(run.config)
            steps = data.training_steps(c, train_set)
            metrics: dict[str, Any]
            step, state, metrics = run.restore(model)
            devices.say(f"Run directory: {run.path}" + (f", resumed at step {step}" if step else ""))
            train_step = make_train_step(model)
            source, to_frames = data.for_devices(train_set)
            batches = devices.spread(
                data.training_batches(c, source, step, devices.rows(c.batch_size), devices.own_rows(c.batch_size))
            )
            due = partial(is_due, steps=steps)
            interrupts.waiting_for = "at most two steps in progress, and a checkpoint"
            with Progress(step, steps, c.batch_size * c.seq_len, devices.process == 0) as progress:
                try:
                    while True:
                        # Existing logs and videos show what is missing, so that a resumed training adds it.
                        if due(step, c.save_scalars_every) and run.logged < step:
                            validation = validate(model, state.params, test_set, devices)
                            with interrupts.deferred():
                                run.report(step, train=metrics, validation=validation)
                        if due(step, c.save_gifs_every) and c.save_gifs:
                            save_videos(model, state.params, run, step, train=train_set, validation=test_set)
                        if step >= steps:
                            break
                        with interrupts.deferred():
                            state, metrics = train_step(state, to_frames(next(batches)))
                            step += 1
                        progress.update(metrics["loss"])
                        if due(step, c.save_scalars_every, c.save_model_every, c.save_named_model_every):
                            check_finite(run, state, metrics, train_set)
                        if due(step, c.save_model_every, c.save_named_model_every):
                            with interrupts.deferred():
                                run.save(step, state, metrics)
                        devices.check_preemption(step)
                except Interrupted:
                    run.save(step, state, metrics)
                    raise
        if devices.process == 0 and not (run.path / "checkpoints" / str(step)).exists():
            raise ConfigError(
                f"logdir: the last checkpoint of {run.path} couldn't be saved; make room there, and call the same "
                "command again to resume"
            )
        devices.say(f"Trained for {step} steps. Run directory: {run.path}")
        in_cwd = Path(sys.executable).is_relative_to(Path.cwd())
        python = os.path.relpath(sys.executable) if in_cwd else "python"  # `make train` doesn't activate .venv
        devices.say(f"Evaluate it with: {python} eval.py --logdir {run.short_path}")
    return state


def is_due(step: int, *every: int, steps: int) -> bool:
    """Return whether `step` is the last one, or a multiple of a number in `every`."""
    return step > 0 and (step == steps or any(step % interval == 0 for interval in every))


def check_videos(config: Config) -> None:
    """Raise ConfigError if videos are saved, but training sequences have no frames after the context."""
    if config.save_gifs and config.open_loop_ctx >= config.seq_len:
        raise ConfigError(
            f"open_loop_ctx: must be less than seq_len = {config.seq_len} for videos of training sequences, "
            f"got {config.open_loop_ctx}; lower it, or set --save_gifs false"
        )


# ---------------------------------------------------------------------------------------------- metrics and videos


def validate(model: Model, params: Any, test: data.Windows, devices: Devices) -> dict[str, float]:
    """Return the training metrics on the first `num_val_batches` test batches.

    The noise is the same each time. Each process computes its own rows of a batch, in chunks of time.
    """
    c = model.config
    key, totals = key_for("validation", c), []
    rows, own = devices.rows(c.batch_size), devices.own_rows(c.batch_size)
    batches = data.eval_batches(test, c.batch_size, c.num_val_batches * c.batch_size, rows, own)
    for number, batch in enumerate(batches):
        keys = sequence_keys(key, number * c.batch_size + own.start, own.stop - own.start)
        terms = rollout.elbo(model, params, batch.video, keys, place=devices.put, actions=batch.actions)
        terms, weight = devices.gather((terms, batch.weight))
        _, metrics = cwvae.objective(c, terms, weight, batch.video.shape[1])
        totals.append((weight.sum(), jax.device_get(metrics)))
    weights = [weight for weight, _ in totals]
    return {name: float(np.average([m[name] for _, m in totals], weights=weights)) for name in totals[0][1]}


def save_videos(model: Model, params: Any, run: Run, step: int, **windows: data.Windows) -> None:
    """Write open-loop predictions of up to 4 windows of each split, if missing. Only process 0 writes."""
    for split, source in windows.items():
        path = run.video(split, step)
        if run.log is None or path.exists():
            continue
        video = open_loop_video(model, params, data.stacked(source, range(min(4, len(source)))))
        try:
            path.parent.mkdir(exist_ok=True)
            tools.save_gif(video, path)
        except OSError as error:
            print(f"Warning: {path} can't be written ({error.strerror}); training continues")
            continue
        run.log.gif(step, f"{split}/open_loop", path)


def open_loop_video(model: Model, params: Any, windows: data.Window) -> np.ndarray:
    """Return truth, prediction and error of windows [B, T, ...] as one video, see `tools.triptych`."""
    c, (video, actions) = model.config, windows
    T, context = video.shape[1], c.open_loop_ctx
    keys = sequence_keys(key_for("videos", c), 0, len(video))
    result = rollout.open_loop(model, params, video[:, :context], keys, T - context, c.use_obs, actions=actions)
    return tools.triptych(video, tools.joined([result.reconstruction, *result.prediction]), context)


# ---------------------------------------------------------------------------------------------- non-finite losses


class NonFinite(Exception):
    """The error of a loss or a gradient that isn't finite."""


def check_finite(run: Run, state: TrainState, metrics: dict[str, Any], train_set: data.Windows) -> None:
    """Raise NonFinite if the loss or gradient of any step so far wasn't finite.

    Details that help to find the reason are written to `<run>/nonfinite`.
    """
    bad = int(state.first_bad)
    if bad == NEVER:
        return
    resume = ["python", "train.py", "--config", str(run.path / "config.yml")]
    details = {
        "first_bad_step": bad,
        "seed": run.config.seed,
        "windows_of_its_batch": data.training_indices(run.config, train_set, bad - 1),
        "detected_at_step": int(state.step),
        "metrics_at_detection": {name: str(float(value)) for name, value in metrics.items()},
        "replay": f"{shlex.join(resume)} --max_steps {bad} --save_scalars_every 1",
    }
    path = run.path / "nonfinite" / f"step_{bad}.json"
    try:
        path.parent.mkdir(exist_ok=True)
        replace_file(path, (json.dumps(details, indent=2) + "\n").encode())
        where = f"see {path.parent}"
    except OSError as error:
        where = f"{path} can't be written ({error.strerror or error})"
    steps = run.checkpoints.steps
    newest = f"the last good checkpoint is at step {steps[-1]}" if steps else "there is no checkpoint yet"
    raise NonFinite(f"the loss or its gradient isn't finite from step {bad} on; {where}; {newest}")


# ---------------------------------------------------------------------------------------------- the program


def train_all(configs: Iterable[Config], work: Sequence[int], independent: bool = False) -> None:
    """Train one configuration after the other, and print the time left after each.

    If a loss isn't finite, exit with code 1.

    Args:
        configs: the configurations.
        work: how long each training takes, in any unit.
        independent: if a loss isn't finite, train the other configurations before the exit.
    """
    overall, failed = OverallProgress(work), False
    use_compilation_cache()
    for config in configs:
        before = 0
        with contextlib.suppress(ConfigError):  # there is no checkpoint yet
            before = loading.find_checkpoint(runs.directory(config)).step
        try:
            step = int(train(config).step)
        except NonFinite as error:
            print(f"error: {error}", file=sys.stderr)
            failed = True
            if not independent:
                break
            step = before
        overall.update(1 - before / step if step else 0)
        if len(work) > 1 and jax.process_index() == 0:
            print(overall, flush=True)
    if failed:
        sys.exit(1)


def configurations(argv: Sequence[str]) -> list[Config]:
    """Return the configuration of a command line, or all configurations of its `--grid`.

    Raises:
        ConfigError: as `config.parse` and `sweeps.grid`, for any point of the grid.
    """
    special, flags = configuration.parse_flags(
        argv,
        "train.py",
        "Train a Clockwork VAE.",
        examples=(
            "python train.py --config configs/debug.yml",
            "python train.py --config configs/minerl.yml --datadir DATASETS --logdir LOGS",
            "python train.py --config logs/digits/NAME/config.yml    # resumes that run",
            "python train.py --grid configs/sweeps/levels.yml",
        ),
        config=Flag("FILE", "YAML file, e.g. configs/minerl.yml"),
        grid=Flag(
            "FILE",
            "file of a wandb sweep, e.g. configs/sweeps/levels.yml: train each point of its grid in turn, without "
            "wandb's agent",
        ),
    )
    if "grid" not in special:
        return [configuration.program_config("train.py", special.get("config"), flags)]
    configs = grid(special["grid"], special.get("config"), flags)
    for c in configs:
        check_videos(c)
    return configs


def main() -> None:
    with exit_codes():
        configs = configurations(sys.argv[1:])
        train_all(configs, work=[1] * len(configs), independent=True)


if __name__ == "__main__":
    main()

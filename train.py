"""Trains a Clockwork VAE: python train.py --config configs/minerl.yml [--key value ...]"""

import contextlib
import dataclasses
import json
import os
import secrets
import shlex
import sys
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import filelock
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.experimental import multihost_utils
from tqdm import tqdm

import config as configuration
import cwvae
import data
import tools
import tools
from system.checkpoints import Checkpoints
from config import FRAME_SIZE, Config, ConfigError
from cwvae import CWVAE
from system.devices import Devices, connect
from system.interrupts import Interrupted, Interrupts, exit_codes

FREE_ON_RESUME = {
    *("datadir", "rebuild_frames", "logdir", "wandb", "coordinator_address", "num_processes", "process_id"),
    *("num_epochs", "max_steps", "eval_seq_len", "open_loop_ctx", "use_obs", "num_val_batches", "save_gifs"),
    *("save_scalars_every", "save_gifs_every", "save_model_every", "save_named_model_every"),
    *("num_examples", "num_samples", "no_save_grid"),
}
"""Keys that may change when a run is resumed: neither the model nor the order of its data depends on them."""

NEVER = np.int32(2**31 - 1)


@flax.struct.dataclass
class TrainState:
    """What a checkpoint holds. Noise and data order follow from seed and step, so nothing of them is kept."""

    step: Array  # int32 []
    first_bad: Array  # int32 []: the first step whose loss or gradient wasn't finite, or NEVER
    params: Any
    opt_state: optax.OptState


class NonFinite(Exception):
    """The loss or its gradient is no finite number."""


# ---------------------------------------------------------------------------------------------- the step


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Adam with eps 1e-4, behind clipping by the global norm."""
    clip = optax.clip_by_global_norm(config.clip_grad_norm_by) if config.clip_grad_norm_by else optax.identity()
    return optax.chain(clip, optax.adam(config.lr, eps=1e-4))


@partial(jax.jit, static_argnums=0)
def make_state(model: CWVAE) -> TrainState:
    """The state before the first step."""
    c = model.config
    block = c.tmp_abs_factor ** (c.levels - 1)  # parameters don't depend on the length
    video = jnp.zeros((1, block, FRAME_SIZE, FRAME_SIZE, c.channels))
    noise = cwvae.draw_noise(c, jax.random.split(jax.random.key(0), 1), block)
    params = model.init(seeds(c)["params"], video, noise)
    return TrainState(jnp.int32(0), jnp.int32(NEVER), params, make_optimizer(c).init(params))


def seeds(config: Config) -> dict[str, Array]:
    """PRNG keys for the purposes of a training."""
    purposes = "params", "train", "validation", "videos"
    keys = jax.random.split(jax.random.key(config.seed or 0), len(purposes))
    return dict(zip(purposes, keys, strict=True))


def sequence_keys(key: Array, first: Array | int, count: int) -> Array:
    """Keys of the sequences from number `first` on: their noise is the same however a batch is spread over devices."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(first + jnp.arange(count))


def make_train_step(model: CWVAE) -> Callable[[TrainState, data.Batch], tuple[TrainState, dict[str, Array]]]:
    """Adam's step on Equation 5 over all devices: batches are [devices, B / devices, ...], the state is whole on each.

    The state's memory is donated: the state that was passed in can't be used again.
    """
    c = model.config
    optimizer = make_optimizer(c)
    key = seeds(c)["train"]

    def step(state: TrainState, batch: data.Batch) -> tuple[TrainState, dict[str, Array]]:
        b, T = batch.video.shape[:2]
        first = jax.lax.axis_index("data") * b
        noise = cwvae.draw_noise(c, sequence_keys(jax.random.fold_in(key, state.step), first, b), T)

        def loss(params: Any) -> tuple[Array, dict[str, Array]]:
            terms: Any = model.apply(params, batch.video, noise)
            return cwvae.objective(c, terms, batch.weight, T, axis="data")

        gradients, metrics = jax.grad(loss, has_aux=True)(state.params)
        gradients, metrics = jax.lax.psum((gradients, metrics), "data")
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics |= {"grad_norm": optax.tree.norm(gradients), "learning_rate": jnp.float32(c.lr)}
        # Read when something is logged or saved: no step waits for it. A loss that is NaN can have finite gradients.
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        first_bad = jnp.where(finite, state.first_bad, jnp.minimum(state.first_bad, state.step + 1))
        return TrainState(state.step + 1, first_bad, params, opt_state), metrics

    return jax.pmap(step, axis_name="data", in_axes=(None, 0), out_axes=None, donate_argnums=0)


# ---------------------------------------------------------------------------------------------- validation, videos


def validate(model: CWVAE, params: Any, test: data.Windows, devices: Devices) -> dict[str, float]:
    """The training metrics on the first `num_val_batches` test batches, with the same noise each time.

    Each process computes its own rows of a batch, in chunks of time.
    """
    c = model.config
    key, totals = seeds(c)["validation"], []
    rows, own = devices.rows(c.batch_size), devices.own(c.batch_size)
    batches = data.eval_batches(test, c.batch_size, c.num_val_batches * c.batch_size, rows, own)
    for number, batch in enumerate(batches):
        keys = sequence_keys(key, number * c.batch_size + own.start, own.stop - own.start)
        terms = cwvae.long_elbo(model, params, batch.video, keys, place=devices.put)
        terms, weight = devices.gather((terms, batch.weight))
        _, metrics = cwvae.objective(c, terms, weight, batch.video.shape[1])
        totals.append((weight.sum(), jax.device_get(metrics)))
    weights = [weight for weight, _ in totals]
    return {name: float(np.average([m[name] for _, m in totals], weights=weights)) for name in totals[0][1]}


def open_loop_video(model: CWVAE, params: Any, video: np.ndarray) -> np.ndarray:
    """Truth, prediction and error of videos uint8 [B, T, H, W, C], side by side, uint8 [T, H', W', 3]."""
    c = model.config
    context = c.open_loop_ctx
    keys = sequence_keys(seeds(c)["videos"], 0, len(video))
    parts = cwvae.open_loop(model, params, video[:, :context], keys, video.shape[1] - context, c.use_obs)
    shown = [np.asarray(tools.to_uint8(frames)) for name, frames in parts if name != "prior_onestep"]
    return tools.comparison(video, np.concatenate(shown, axis=1), context)


# ---------------------------------------------------------------------------------------------- the run


def run_directory(config: Config) -> Path:
    return Path(config.logdir) / config.dataset / config.run_name


def open_run(config: Config) -> Config:
    """Makes the run's directory with its `config.yml`, or finds the one to resume, whose random seed then applies.

    Raises:
        ConfigError: the run there differs in what can't change.
    """
    directory = run_directory(config)
    saved = directory / "config.yml"
    if saved.exists():
        earlier = configuration.load(saved)
        if config.seed is None:
            config = dataclasses.replace(config, seed=earlier.seed)
        differing = [
            f"{field.name} ({getattr(earlier, field.name)!r} there, {getattr(config, field.name)!r} now)"
            for field in dataclasses.fields(Config)
            if field.name not in FREE_ON_RESUME and getattr(earlier, field.name) != getattr(config, field.name)
        ]
        if differing:
            raise ConfigError(
                f"{directory} holds a run with another {', '.join(differing)}; "
                "set it as there, or choose another --logdir"
            )
    elif config.seed is None:
        config = dataclasses.replace(config, seed=secrets.randbelow(2**31))
    config = dataclasses.replace(config, rebuild_frames=False)  # done once, not at each resume or evaluation
    config.save(saved)
    return config


@contextlib.contextmanager
def sole_training(directory: Path) -> Any:
    """Holds the run directory's lock, which the system takes back from a process that dies.

    Raises:
        ConfigError: another process trains there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(directory / "lock", timeout=0):
            yield
    except filelock.Timeout as error:
        raise ConfigError(
            f"{directory} is being trained by another process; wait for it, or choose another --logdir"
        ) from error


def train(config: Config) -> TrainState:
    """Trains, or goes on where the same training stopped, until `num_epochs` or `max_steps`.

    Returns:
        The last state, on the devices.

    Raises:
        ConfigError: what is asked for can't work; nothing was overwritten.
        NonFinite: the loss isn't finite any more; see `<run>/nonfinite`.
        Interrupted: by SIGTERM or Ctrl-C, after saving the last finished step.
    """
    with Interrupts() as interrupts, contextlib.ExitStack() as resources:
        config = connect(config)
        devices = Devices()
        first = devices.process == 0
        wandb_run: list[Any] = [None]

        def with_sweep() -> str:
            merged, wandb_run[0] = logs.start_wandb(config, run_directory)
            return merged.to_json()

        def with_run() -> str:
            resources.enter_context(sole_training(run_directory(c)))
            return open_run(c).to_json()

        c = Config(**json.loads(devices.first_decides(with_sweep)))
        resources.push(logs.finish(wandb_run[0]))
        if c.save_gifs and c.open_loop_ctx >= c.seq_len:
            raise ConfigError(
                f"open_loop_ctx: must be less than seq_len = {c.seq_len} for videos of training sequences, "
                f"got {c.open_loop_ctx}; lower it, or set --save_gifs false"
            )
        train_windows, test_windows = data.windows(c, "train"), data.windows(c, "test")
        directory = run_directory(c)  # before a random seed is part of the configuration: it's no part of the name
        c = Config(**json.loads(devices.first_decides(with_run)))
        model = CWVAE(c)
        steps = data.training_steps(c, train_windows)
        checkpoints = resources.enter_context(Checkpoints(directory / "checkpoints", c.save_named_model_every))
        step, state, unreported = restore(model, checkpoints, devices)
        log = logs.Log(directory, step if unreported is None else step - 1, wandb_run[0]) if first else None
        if first:
            print(f"Run directory: {directory}" + (f", resumed at step {step}" if step else ""))

        def report(metrics: dict[str, float]) -> None:
            values = {"train": metrics, "validation": validate(model, state.params, test_windows, devices)}
            with interrupts.deferred():
                nonlocal unreported
                if log:
                    log.metrics(step, {f"{split}/{name}": x for split in values for name, x in values[split].items()})
                unreported = None

        def save(**notes: Any) -> None:
            with interrupts.deferred():
                checkpoints.save(step, state, **notes)

        train_step = make_train_step(model)
        batches = data.training_batches(c, train_windows, step, devices.rows(c.batch_size), devices.own(c.batch_size))
        progress = resources.enter_context(Progress(step, steps, c.batch_size * c.seq_len, first))
        resources.callback(interrupts.hold)  # unwound first: what is being closed is closed whole
        try:
            if unreported:
                report(unreported)
            for batch in devices.spread(batches):
                with interrupts.deferred():
                    state, metrics = train_step(state, batch)
                    step += 1
                    due = {name: step % every == 0 or step == steps for name, every in intervals(c).items()}
                    due["model"] |= due["named"]
                    if due["scalars"]:
                        unreported = {name: float(value) for name, value in metrics.items()}
                progress.update(metrics["loss"])
                if due["scalars"] or due["model"]:
                    check_finite(state, c, directory, train_windows, unreported)
                if unreported:
                    report(unreported)
                if due["gifs"] and c.save_gifs and first:
                    save_videos(model, state.params, train_windows, test_windows, directory, step, log)
                if due["model"]:
                    save()
                if devices.processes > 1 and multihost_utils.reached_preemption_sync_point(step):
                    raise Interrupted(15)
        except Interrupted:
            if int(state.first_bad) == NEVER:
                save(unreported=unreported)
            raise
    if first:
        print(f"Trained for {step} steps. Run directory: {directory}")
        print(f"Evaluate it with: python eval.py --logdir {directory}")
    return state


def intervals(config: Config) -> dict[str, int]:
    """What is done every so many steps."""
    c = config
    return {
        "scalars": c.save_scalars_every,
        "gifs": c.save_gifs_every,
        "model": c.save_model_every,
        "named": c.save_named_model_every,
    }


def restore(
    model: CWVAE, checkpoints: Checkpoints, devices: Devices
) -> tuple[int, TrainState, dict[str, float] | None]:
    """Step, state and metrics that weren't logged yet, of the newest intact checkpoint or of the beginning."""
    if newest := checkpoints.load_newest(jax.eval_shape(partial(make_state, model))):
        step, host, notes = newest
        return step, devices.replicate(host), notes.get("unreported")
    return 0, devices.replicate(make_state(model)), None


def check_finite(
    state: TrainState, config: Config, directory: Path, train_windows: data.Windows, metrics: dict[str, float] | None
) -> None:
    """If any step so far was bad, writes what helps to find the reason to `<run>/nonfinite`, and raises NonFinite."""
    bad = int(state.first_bad)
    if bad == NEVER:
        return
    found = {
        "first_bad_step": bad,
        "seed": config.seed,
        "windows_of_its_batch": data.training_indices(config, train_windows, bad - 1),
        "detected_at_step": int(state.step),
        "metrics_at_detection": {name: str(value) for name, value in (metrics or {}).items()},
        "replay": f"{shlex.join(['python', *sys.argv])} --max_steps {bad} --save_scalars_every 1",
    }
    (directory / "nonfinite").mkdir(exist_ok=True)
    (directory / "nonfinite" / f"step_{bad}.json").write_text(json.dumps(found, indent=2) + "\n")
    raise NonFinite(
        f"loss or gradient isn't finite since step {bad}; see {directory / 'nonfinite'}; the last good checkpoint stays"
    )


def save_videos(
    model: CWVAE,
    params: Any,
    train_windows: data.Windows,
    test_windows: data.Windows,
    directory: Path,
    step: int,
    log: logs.Log | None,
) -> None:
    """Open-loop predictions of a few training and test videos, as `<run>/videos/{train,validation}_<step>.gif`."""
    for name, windows in ("train", train_windows), ("validation", test_windows):
        videos = np.stack([windows[i] for i in range(min(4, len(windows)))])
        shown = open_loop_video(model, params, videos)
        path = directory / "videos" / f"{name}_{step:07}.gif"
        try:
            path.parent.mkdir(exist_ok=True)
            tools.save_gif(shown, path)
        except OSError as error:
            print(f"Warning: {path} couldn't be written ({error.strerror}); training goes on")
            continue
        if log:
            log.gif(step, f"{name}/open_loop", path)


class Progress:
    """A progress bar that counts the steps that the devices have finished, and never waits for one."""

    def __init__(self, step: int, steps: int, frames_per_step: int, shown: bool = True):
        self.frames_per_step = frames_per_step
        self.bar = tqdm(
            total=steps,
            initial=step,
            disable=not shown,
            unit="step",
            smoothing=0.1,
            mininterval=0.5 if sys.stderr.isatty() else 30,
            dynamic_ncols=True,
        )
        self.losses: deque[Any] = deque()

    def update(self, loss: Array) -> None:
        self.losses.append(loss)
        while self.losses and self.losses[0].is_ready():
            self._show(self.losses.popleft())

    def _show(self, loss: Array) -> None:
        if self.bar.update():
            rate = self.bar.format_dict["rate"] or 0
            self.bar.set_postfix_str(
                f"loss {float(loss):.4g}, {rate * self.frames_per_step:.0f} frames/s", refresh=False
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, error: Any, *_: Any) -> None:
        if error is None:
            for loss in self.losses:
                self._show(loss)
        self.bar.close()


def use_compilation_cache() -> None:
    """Keeps compiled programs for the next start, unless JAX is told otherwise (JAX_COMPILATION_CACHE_DIR)."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "cwvae" / "jax"))


def main() -> None:
    with exit_codes():
        use_compilation_cache()
        try:
            train(configuration.parse(sys.argv[1:]))
        except NonFinite as error:
            sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

"""Trains a Clockwork VAE: python train.py --config configs/minerl.yml [--key value ...]"""

import dataclasses
import os
import secrets
import sys
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

import config as configuration
import cwvae
import data
import pictures
import tools
from config import Config, ConfigError
from cwvae import CWVAE

FREE_ON_RESUME = {
    "rebuild_frames",
    "datadir",
    "logdir",
    "num_epochs",
    "max_steps",
    "num_val_batches",
    "eval_seq_len",
    "open_loop_ctx",
    "use_obs",
    "wandb",
} | {field.name for field in dataclasses.fields(Config) if field.name.startswith(("save_", "num_", "no_save"))}
"""Keys that may change when a run is resumed: neither the model nor the order of its data depends on them."""


@flax.struct.dataclass
class TrainState:
    """What a checkpoint holds. Noise and data order follow from seed and step, so nothing of them is kept."""

    step: Array  # int32 []
    params: Any
    opt_state: optax.OptState


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
    video = jnp.zeros((1, block, cwvae.FRAME_SIZE, cwvae.FRAME_SIZE, c.channels))
    noise = cwvae.draw_noise(c, jax.random.split(jax.random.key(0), 1), block)
    params = model.init(seeds(c)["params"], video, noise)
    return TrainState(jnp.zeros((), jnp.int32), params, make_optimizer(c).init(params))


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
        return TrainState(state.step + 1, params, opt_state), metrics

    return jax.pmap(step, axis_name="data", in_axes=(None, 0), out_axes=None, donate_argnums=0)


class Devices:
    """Where states and batches go. The mesh bears pmap's own axis name, or each second call would compile again."""

    def __init__(self) -> None:
        mesh = Mesh(np.array(jax.local_devices()), ("data",))
        self.count = mesh.size
        self.everywhere = NamedSharding(mesh, PartitionSpec())
        self.split = NamedSharding(mesh, PartitionSpec("data"))

    def rows(self, batch_size: int) -> int:
        """`batch_size` rounded up to what the devices divide."""
        return -(-batch_size // self.count) * self.count

    def replicate(self, tree: Any) -> Any:
        """A copy on each device, made from host memory: with arrays on a device it would share, and donate, theirs."""
        return jax.device_put(jax.tree.map(np.array, tree), self.everywhere)

    def spread(self, batches: Iterator[data.Batch], stacked: bool) -> Iterator[data.Batch]:
        """Batches on the devices, sent one ahead: [B, ...], or where `stacked`, [devices, B / devices, ...]."""
        sent: deque[data.Batch] = deque()
        for batch in batches:
            if stacked:
                batch = jax.tree.map(lambda x: x.reshape(self.count, -1, *x.shape[1:]), batch)
            sent.append(jax.device_put(batch, self.split))
            if len(sent) > 1:
                yield sent.popleft()
        yield from sent


# ---------------------------------------------------------------------------------------------- validation, videos


def validate(model: CWVAE, params: Any, test: data.Windows, devices: Devices) -> dict[str, float]:
    """The training metrics on the first `num_val_batches` test batches, with the same noise each time."""
    c = model.config
    key, totals = seeds(c)["validation"], []
    batches = data.test_batches(test, c.batch_size, c.num_val_batches * c.batch_size, devices.rows(c.batch_size))
    for number, batch in enumerate(devices.spread(batches, stacked=False)):
        rows, frames = batch.video.shape[:2]
        terms = cwvae.long_elbo(model, params, batch.video, sequence_keys(key, number * c.batch_size, rows))
        _, metrics = cwvae.objective(c, terms, batch.weight, frames)
        totals.append((float(batch.weight.sum()), jax.device_get(metrics)))
    weights = [weight for weight, _ in totals]
    return {name: float(np.average([m[name] for _, m in totals], weights=weights)) for name in totals[0][1]}


def open_loop_video(model: CWVAE, params: Any, video: np.ndarray) -> np.ndarray:
    """Truth, prediction and error of videos uint8 [B, T, H, W, C], side by side, uint8 [T, H', W', 3]."""
    c = model.config
    context = c.open_loop_ctx
    keys = sequence_keys(seeds(c)["videos"], 0, len(video))
    parts = cwvae.open_loop(model, params, video[:, :context], keys, video.shape[1] - context, c.use_obs)
    shown = [np.asarray(tools.to_uint8(frames)) for name, frames in parts if name != "prior_onestep"]
    return pictures.comparison(video, np.concatenate(shown, axis=1), context)


# ---------------------------------------------------------------------------------------------- the run


def run_directory(config: Config) -> Path:
    return Path(config.logdir) / config.dataset / config.run_name


def open_run(config: Config) -> tuple[Config, Path]:
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
    directory.mkdir(parents=True, exist_ok=True)
    config.save(saved)
    return config, directory


def train(config: Config) -> TrainState:
    """Trains, or goes on where the same training stopped, until `num_epochs` or `max_steps`.

    Returns:
        The last state, on the devices.

    Raises:
        ConfigError: what is asked for can't work; nothing was overwritten.
    """
    c, wandb_run = tools.start_wandb(config, run_directory)
    if c.save_gifs and c.open_loop_ctx >= c.seq_len:
        raise ConfigError(
            f"open_loop_ctx: must be less than seq_len = {c.seq_len} for videos of training sequences, "
            f"got {c.open_loop_ctx}; lower it, or set --save_gifs false"
        )
    train_windows, test_windows = data.windows(c, "train"), data.windows(c, "test")
    c, directory = open_run(c)
    devices = Devices()
    model = CWVAE(c)
    train_step = make_train_step(model)
    steps = data.training_steps(c, train_windows)
    with tools.open_checkpoints(directory / "checkpoints", c.save_named_model_every) as checkpoints:
        newest = tools.load_newest_checkpoint(checkpoints, jax.eval_shape(partial(make_state, model)))
        step, state = newest or (0, make_state(model))
        state = devices.replicate(state)
        print(f"Run directory: {directory}" + (f", resumed at step {step}" if step else ""))
        batches = data.training_batches(c, train_windows, step, devices.rows(c.batch_size))
        with tools.Log(directory, step, wandb_run) as log, Progress(step, steps, c.batch_size * c.seq_len) as progress:
            for batch in devices.spread(batches, stacked=True):
                state, metrics = train_step(state, batch)
                step += 1
                progress.update(metrics["loss"])
                last = step == steps
                if step % c.save_scalars_every == 0 or last:
                    values = {
                        "train": jax.device_get(metrics),
                        "validation": validate(model, state.params, test_windows, devices),
                    }
                    log.metrics(
                        step, {f"{split}/{name}": float(x) for split in values for name, x in values[split].items()}
                    )
                if c.save_gifs and (step % c.save_gifs_every == 0 or last):
                    save_videos(model, state.params, train_windows, test_windows, directory, step, log)
                if step % c.save_model_every == 0 or step % c.save_named_model_every == 0 or last:
                    tools.save_checkpoint(checkpoints, step, state)
    print(
        f"Trained for {step} steps. Run directory: {directory}\nEvaluate it with: python eval.py --logdir {directory}"
    )
    return state


def save_videos(
    model: CWVAE,
    params: Any,
    train_windows: data.Windows,
    test_windows: data.Windows,
    directory: Path,
    step: int,
    log: tools.Log,
) -> None:
    """Open-loop predictions of a few training and test videos, as `<run>/videos/{train,validation}_<step>.gif`."""
    (directory / "videos").mkdir(exist_ok=True)
    for name, windows in ("train", train_windows), ("validation", test_windows):
        videos = np.stack([windows[i] for i in range(min(4, len(windows)))])
        path = directory / "videos" / f"{name}_{step:07}.gif"
        pictures.save_gif(open_loop_video(model, params, videos), path)
        log.gif(step, f"{name}/open_loop", path)


class Progress:
    """A progress bar that counts the steps that the devices have finished, and never waits for one."""

    def __init__(self, step: int, steps: int, frames_per_step: int):
        self.frames_per_step = frames_per_step
        self.bar = tqdm(
            total=steps,
            initial=step,
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
    try:
        use_compilation_cache()
        train(configuration.parse(sys.argv[1:]))
    except ConfigError as error:
        sys.exit(configuration.refuse(error))


if __name__ == "__main__":
    main()

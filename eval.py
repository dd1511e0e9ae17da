"""Evaluates open-loop predictions of a trained Clockwork VAE: python eval.py --logdir <run> [--key value ...]"""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import io
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

import config as configuration
import cwvae
import data
import pictures
import tools
import train
from checkpoints import Checkpoints
from config import Config, ConfigError
from cwvae import CWVAE
from devices import Devices, connect
from interrupts import Interrupted, Interrupts


class Checkpoint(NamedTuple):
    """Where a checkpoint lies."""

    run: Path  # holds config.yml
    step: int


# ---------------------------------------------------------------------------------------------- what to evaluate


def find_checkpoint(logdir: Path) -> Checkpoint:
    """The checkpoint that `logdir` names: one itself, a run's newest, or that of the only run below a root directory.

    Raises:
        ConfigError: there is none, or more than one run.
    """
    if not logdir.is_dir():
        raise ConfigError(
            f"logdir: {logdir} is no directory; name a run directory, one of its checkpoints, or a --logdir of train.py"
        )
    if logdir.name.isdigit() and logdir.parent.name == "checkpoints":
        return Checkpoint(logdir.parent.parent, int(logdir.name))
    own = logdir / "config.yml"
    runs = [logdir] if own.exists() else sorted(p.parent for i in (1, 2) for p in logdir.glob("*/" * i + "config.yml"))
    if not runs:
        raise ConfigError(f"logdir: {logdir} holds no run (no config.yml); name a run directory that train.py printed")
    if len(runs) > 1:
        raise ConfigError(f"logdir: {logdir} holds {len(runs)} runs; name one of {', '.join(map(str, runs))}")
    steps = [int(path.name) for path in (runs[0] / "checkpoints").glob("*") if path.name.isdigit()]
    if not steps:
        raise ConfigError(f"logdir: {runs[0]} holds no checkpoint yet; train longer, or lower --save_model_every")
    return Checkpoint(runs[0], max(steps))


def parse(argv: list[str]) -> tuple[Config, Checkpoint]:
    """The run's own configuration, with the command line's keys in place of its values.

    Raises:
        ConfigError: as `find_checkpoint` and `config.parse_flags` do.
    """
    special, flags = configuration.parse_flags(
        argv,
        "eval.py",
        "Evaluate a Clockwork VAE.",
        logdir="run directory, one of its checkpoints, or a root directory of one run",
    )
    if "logdir" not in special:
        raise ConfigError("command line: --logdir is missing; name a run directory that train.py printed")
    checkpoint = find_checkpoint(Path(special["logdir"]))
    values = configuration.read_yaml(checkpoint.run / "config.yml")
    return Config(**values | configuration.typed(flags, "command line")), checkpoint


def load_params(model: CWVAE, checkpoint: Checkpoint) -> Any:
    """The parameters in a checkpoint, on all devices of this process.

    Raises:
        DamagedCheckpoint: the checkpoint isn't intact, or is another model's.
    """
    with Checkpoints(checkpoint.run / "checkpoints") as checkpoints:
        state, _ = checkpoints.load(checkpoint.step, jax.eval_shape(partial(train.make_state, model)))
    return Devices().replicate(state.params)


# ---------------------------------------------------------------------------------------------- predictions


class Prediction(NamedTuple):
    """One sample for each sequence of a batch, without the context."""

    frames: np.ndarray  # uint8 [B, T, H, W, C]
    metrics: dict[str, dict[str, np.ndarray]]  # protocol -> "ssim", "psnr" -> [B, T]


@partial(jax.jit, static_argnums=2)
def measure(truth: Array, prediction: Array, protocol: str) -> dict[str, Array]:
    return tools.frame_metrics(cwvae.floats(truth), prediction, protocol)


def predict(
    model: CWVAE, params: Any, video: np.ndarray, keys: Array, place: Callable[[Any], Any] = jnp.asarray
) -> Prediction:
    """Predicts the frames of video uint8 [B, T, H, W, C] after its context, and compares them with it."""
    c = model.config
    start = c.open_loop_ctx
    frames, metrics = [], []
    parts = cwvae.open_loop(model, params, video[:, :start], keys, video.shape[1] - start, c.use_obs, place=place)
    for name, chunk in parts:
        if name == "prior_multistep":
            truth = place(video[:, start : start + chunk.shape[1]])
            start += chunk.shape[1]
            frames.append(np.asarray(tools.to_uint8(chunk)))
            metrics.append({protocol: measure(truth, chunk, protocol) for protocol in tools.PROTOCOLS})
    joined = jax.tree.map(lambda *chunks: np.concatenate(chunks, axis=1), *jax.device_get(metrics))
    return Prediction(np.concatenate(frames, axis=1), joined)


class Samples:
    """The predictions of a batch that are kept: the first two, and the best of each metric by its average over time."""

    def __init__(self) -> None:
        self.frames: dict[str, np.ndarray] = {}
        self.metrics: dict[tuple[str, str], np.ndarray] = {}

    def add(self, number: int, prediction: Prediction) -> None:
        if number < 2:
            self.frames[f"random_sample_{number + 1}"] = prediction.frames
        for protocol, by_name in prediction.metrics.items():
            for name, values in by_name.items():
                kept = self.metrics.setdefault((protocol, name), values.copy())
                better = values.mean(-1) > kept.mean(-1)
                kept[better] = values[better]
                if protocol == "paper":
                    best = self.frames.setdefault(f"best_{name}_sample", prediction.frames.copy())
                    best[better] = prediction.frames[better]


def example_keys(config: Config, first: int, count: int, sample: int) -> Array:
    """PRNG keys that depend on the seed, the example's number and the sample's number alone."""
    keys = train.sequence_keys(jax.random.fold_in(jax.random.key(config.seed or 0), 1), first, count)
    return jax.vmap(lambda key: jax.random.fold_in(key, sample))(keys)


# ---------------------------------------------------------------------------------------------- the evaluation


def evaluate(config: Config, checkpoint: Checkpoint) -> dict[str, Any]:
    """Predicts `num_samples` times for each of `num_examples` test sequences; all results go below the run directory.

    Per sequence, the sample with the best average over time enters the curves, as in the earlier codes. An evaluation
    that was interrupted is continued. Of several processes, each takes its share of each batch.

    Returns:
        What `metrics.json` holds.

    Raises:
        ConfigError: what is asked for can't work.
    """
    c = config
    connect(c)
    devices = Devices()
    model = CWVAE(c)
    test = data.windows(c, "test")
    params = load_params(model, checkpoint)
    directory = Path(devices.first_decides(lambda: str(results_directory(c, checkpoint))))
    count = min(c.num_examples, len(test))
    if count < c.num_examples:
        print(f"num_examples: the test set has {count} sequences; evaluating these")
    batch_size = min(c.batch_size, count)
    own = devices.own(batch_size)
    done = 0
    while done < count and all(is_done(directory, i) for i in range(done, min(done + batch_size, count))):
        done += batch_size
    batches = data.eval_batches(test, batch_size, count, devices.rows(batch_size), own, first=done // batch_size)
    with tqdm(
        total=-(-count // batch_size) * c.num_samples,
        initial=done // batch_size * c.num_samples,
        unit="batch",
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 30,
        disable=devices.process > 0,
    ) as bar:
        for number, batch in enumerate(batches, done // batch_size):
            first = number * batch_size + own.start
            samples = Samples()
            for sample in range(c.num_samples):
                keys = example_keys(c, first, len(batch.video), sample)
                samples.add(sample, predict(model, params, batch.video, keys, devices.put))
                bar.update()
            for row in np.flatnonzero(batch.weight):
                save_example(c, directory, first + int(row), batch.video[row], samples, int(row))
    devices.wait()
    results: dict[str, Any] = {}
    if devices.process == 0:
        results = summarise(c, checkpoint, directory, count)
        print_table(results)
        print(f"Results: {directory}")
    return results


def results_directory(config: Config, checkpoint: Checkpoint) -> Path:
    """The directory of the same evaluation, if it wasn't finished, or a new one: never one with results."""
    for directory in sorted(checkpoint.run.glob("eval_*")):
        if (directory / "evaluation.yml").exists() and not (directory / "metrics.json").exists():
            same = configuration.load(directory / "evaluation.yml") == config
            if same and (directory / "checkpoint").read_text() == str(checkpoint.step):
                print(f"Continuing {directory}")
                return directory
    name = f"eval_{datetime.datetime.now():%Y_%m_%d_%H_%M_%S}"
    for suffix in ("", *(f"_{i}" for i in range(2, 100))):
        directory = checkpoint.run / (name + suffix)
        with contextlib.suppress(FileExistsError):
            directory.mkdir()
            (directory / "checkpoint").write_text(str(checkpoint.step))
            config.save(directory / "evaluation.yml")
            return directory
    raise ConfigError(f"{checkpoint.run / name} and its successors exist; wait a second")


def is_done(directory: Path, number: int) -> bool:
    return metrics_file(directory, number).exists()


def metrics_file(directory: Path, number: int) -> Path:
    """One example's metrics, [T] each: what is written last of it."""
    return directory / f"sample{number}" / "metrics.npz"


def save_example(c: Config, directory: Path, number: int, video: np.ndarray, samples: Samples, row: int) -> None:
    """Writes one example's truth, predictions and metrics."""
    context = c.open_loop_ctx
    truth, predictions = directory / f"sample{number}_gt", directory / f"sample{number}"
    named = {truth / "gt_ctx": video[:context], truth / "gt_pred": video[context:]}
    for name, frames in samples.frames.items():
        if c.num_samples > 1 or name == "random_sample_1":
            named[predictions / name] = frames[row]
    for path, frames in named.items():
        path.parent.mkdir(exist_ok=True)
        np.savez(path.with_suffix(".npz"), frames)
        if not c.no_save_grid:
            pictures.save_grid(frames, path.with_suffix(".png"))
    if c.save_gifs:
        first = samples.frames["random_sample_1"][row]
        compared = pictures.comparison(video[None, context:], first[None], 0)
        pictures.save_gif(compared, predictions / "random_sample_1.gif")
    buffer = io.BytesIO()
    np.savez(buffer, **{f"{protocol}_{name}": values[row] for (protocol, name), values in samples.metrics.items()})
    tools.replace_file(metrics_file(directory, number), buffer.getvalue())


def summarise(config: Config, checkpoint: Checkpoint, directory: Path, count: int) -> dict[str, Any]:
    """Writes curves over the predicted frames, their plots, and `metrics.json`, from the examples' metrics."""
    examples = []
    for number in range(count):
        with np.load(metrics_file(directory, number)) as file:
            examples.append(dict(file))
    averages: dict[str, dict[str, float]] = {}
    for protocol in tools.PROTOCOLS:
        averages[protocol] = {}
        for name in ("ssim", "psnr"):
            curves = [example[f"{protocol}_{name}"] for example in examples]
            mean, stddev = np.mean(curves, axis=0), np.std(curves, axis=0)
            # The paper's protocol has the earlier codes' file names.
            stem = name if protocol == "paper" else f"{name}_{protocol}"
            np.savez(directory / f"{stem}_mean.npz", mean)
            np.savez(directory / f"{stem}_stddev.npz", stddev)
            unit = " (dB)" if name == "psnr" else ""
            label = f"{name.upper()}{unit}, {protocol} protocol"
            pictures.plot_range(mean, stddev, directory / f"{stem}_range.png", label)
            averages[protocol][name] = float(mean.mean())
    results = {
        "averages": averages,
        "num_examples": count,
        "predicted_frames": len(mean),
        "checkpoint_step": checkpoint.step,
        "config": dataclasses.asdict(config),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
        | {"python": sys.version.split()[0], "device": jax.devices()[0].device_kind},
    }
    tools.replace_file(directory / "metrics.json", (json.dumps(results, indent=2) + "\n").encode())
    return results


def print_table(results: dict[str, Any]) -> None:
    examples, frames, samples = results["num_examples"], results["predicted_frames"], results["config"]["num_samples"]
    best = f", best of {samples} samples" if samples > 1 else ""
    print(
        f"\nAverages over {examples} sequences and {frames} predicted frames{best}, step {results['checkpoint_step']}:"
    )
    print(f"{'protocol':<10} {'SSIM':>7} {'PSNR':>9}")
    for protocol, values in results["averages"].items():
        print(f"{protocol:<10} {values['ssim']:7.4f} {values['psnr']:6.2f} dB")
    print()


def main() -> None:
    try:
        train.use_compilation_cache()
        with Interrupts():
            evaluate(*parse(sys.argv[1:]))
    except ConfigError as error:
        sys.exit(configuration.refuse(error))
    except Interrupted as interrupt:
        print(f"Interrupted by {interrupt}; the same command goes on from here", file=sys.stderr)
        sys.exit(interrupt.exit_code)


if __name__ == "__main__":
    main()

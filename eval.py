"""Evaluates open-loop predictions of a trained Clockwork VAE: python eval.py --logdir <run> [--key value ...]"""

import dataclasses
import importlib.metadata
import io
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
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
import rollout
import runs
import tools
from config import Config, ConfigError
from cwvae import CWVAE
from noise import example_keys
from report import plots, statistics, tables
from report.page import page
from system.devices import Devices, connect, use_compilation_cache
from system.files import dated_directory, replace_file
from system.interrupts import Interrupts, exit_codes

# ---------------------------------------------------------------------------------------------- what to evaluate


def parse(argv: list[str]) -> tuple[Config, runs.Checkpoint]:
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
    checkpoint = runs.find_checkpoint(Path(special["logdir"]))
    return configuration.merged(checkpoint.run / "config.yml", flags), checkpoint


# ---------------------------------------------------------------------------------------------- predictions


@partial(jax.jit, static_argnums=2)
def measure(truth: Array, prediction: Array, protocol: str) -> dict[str, Array]:
    return tools.frame_metrics(cwvae.floats(truth), cwvae.floats(prediction), protocol)


Metrics = dict[str, dict[str, np.ndarray]]
"""protocol -> "ssim", "psnr" -> [B, T]"""


class Prediction(NamedTuple):
    """One sample for each sequence of a batch, without the context."""

    frames: np.ndarray  # uint8 [B, T, H, W, C]
    metrics: Metrics


def compare(truth: np.ndarray, chunks: Iterable[Any], place: Callable[[Any], Any]) -> Metrics:
    """Metrics of frames that come in chunks of time, [B, <= T, H, W, C] each, against truth uint8 [B, T, H, W, C]."""
    start, metrics = 0, []
    for chunk in chunks:
        part = place(truth[:, start : start + chunk.shape[1]])
        metrics.append({protocol: measure(part, chunk, protocol) for protocol in tools.PROTOCOLS})
        start += chunk.shape[1]
    return jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *jax.device_get(metrics))


def predict(
    model: CWVAE, params: Any, video: np.ndarray, keys: Array, place: Callable[[Any], Any] = jnp.asarray
) -> Prediction:
    """Predicts the frames of video uint8 [B, T, H, W, C] after its context, and compares them with it."""
    frames = []

    def chunks() -> Iterator[Array]:
        for chunk in rollout.predict(model, params, video, keys, place):
            frames.append(np.asarray(tools.to_uint8(chunk)))
            yield chunk

    metrics = compare(video[:, model.config.open_loop_ctx :], chunks(), place)
    return Prediction(np.concatenate(frames, axis=1), metrics)


def references(
    model: CWVAE,
    params: Any,
    video: np.ndarray,
    keys: Array,
    first: int,
    pool: np.ndarray | None,
    place: Callable[[Any], Any] = jnp.asarray,
) -> dict[str, Metrics]:
    """Return metrics of what stands in for the frames after the context, see `statistics.REFERENCES`.

    Args:
        model, params: what reconstructs.
        video: uint8 [B, T, H, W, C].
        keys: of the predictions, so that the context's states are the same.
        first: the first sequence's number, which with the row decides which random frames it gets.
        pool: of `random_frames`.
        place: puts frames on the devices.
    """
    context, chunk = model.config.open_loop_ctx, rollout.chunk_size(model.config)
    future = video[:, context:]
    B, T = future.shape[:2]
    parts = [slice(start, start + chunk) for start in range(0, T, chunk)]
    reconstruction = compare(video, rollout.reconstruct(model, params, video, keys, place), place)
    last = np.broadcast_to(video[:, context - 1 : context], future.shape)
    found = {
        "posterior": jax.tree.map(lambda values: values[:, context:], reconstruction),
        "copy": compare(future, (place(last[:, part]) for part in parts), place),
    }
    if pool is not None:
        drawn = np.stack([np.random.default_rng([1, first + row]).integers(len(pool), size=T) for row in range(B)])
        found["random"] = compare(future, (place(pool[drawn[:, part]]) for part in parts), place)
    return found


def random_frames(config: Config, count: int = 1000) -> np.ndarray | None:
    """Frames of the training set at random, uint8 [count, H, W, C], the same ones for each model of a dataset.

    None, with one line that says so, where there is no training set (as on a machine that only evaluates).
    """
    try:
        windows = data.windows(config, "train")
    except ConfigError as error:
        print(f"Without the line of random training frames, since there are none: {error}")
        return None
    random = np.random.default_rng(0)
    chosen = (windows[int(random.integers(len(windows)))] for _ in range(count))
    return np.stack([window[random.integers(len(window))] for window in chosen])


class Samples:
    """What is kept of a batch's predictions, sample after sample.

    frames: the first two samples, and of each metric, in the paper's protocol, the best by its average over time.
    metrics, [B, T] each: "<protocol>_<metric>" of the best sample by this metric, as in the earlier codes;
    "<protocol>_<metric>_mean" over the samples; "<protocol>_<metric>_<reference>" of each reference.
    """

    def __init__(self, references: Mapping[str, Metrics]) -> None:
        self.frames: dict[str, np.ndarray] = {}
        self.metrics = {
            f"{protocol}_{name}_{reference}": values
            for reference, metrics in references.items()
            for protocol, by_name in metrics.items()
            for name, values in by_name.items()
        }

    def add(self, number: int, prediction: Prediction) -> None:
        if number < 2:
            self.frames[f"random_sample_{number + 1}"] = prediction.frames
        for protocol, by_name in prediction.metrics.items():
            for name, values in by_name.items():
                key = f"{protocol}_{name}"
                kept = self.metrics.setdefault(key, values.copy())
                better = values.mean(-1) > kept.mean(-1)
                kept[better] = values[better]
                mean = self.metrics.setdefault(f"{key}_mean", np.zeros_like(values))
                mean += (values - mean) / (number + 1)
                if protocol == "paper":
                    best = self.frames.setdefault(f"best_{name}_sample", prediction.frames.copy())
                    best[better] = prediction.frames[better]


# ---------------------------------------------------------------------------------------------- the evaluation


def evaluate(config: Config, checkpoint: runs.Checkpoint) -> dict[str, Any]:
    """Predicts `num_samples` times for each of `num_examples` test sequences; all results go below the run directory.

    Of several samples, the best of each sequence by its average over time (as in the earlier codes) and their mean are
    reported. An evaluation that was interrupted is continued. Of several processes, each takes its share of each batch.

    Returns:
        What `metrics.json` holds.

    Raises:
        ConfigError: what is asked for can't work.
    """
    c = connect(config)
    devices = Devices()
    model = CWVAE(c)
    test = data.windows(c, "test")
    params = runs.load_params(model, checkpoint)
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
    pool = random_frames(c) if done < count else None
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
            keys = example_keys(c, first, len(batch.video), 0)
            samples = Samples(references(model, params, batch.video, keys, first, pool, devices.put))
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


def results_directory(config: Config, checkpoint: runs.Checkpoint) -> Path:
    """The directory of the same evaluation, if it wasn't finished, or a new one: never one with results."""
    for directory in sorted(checkpoint.run.glob("eval_*")):
        if (directory / "evaluation.yml").exists() and not (directory / "metrics.json").exists():
            same = configuration.load(directory / "evaluation.yml") == config
            if same and (directory / "checkpoint").read_text() == str(checkpoint.step):
                print(f"Continuing {directory}")
                return directory
    directory = dated_directory(checkpoint.run, "eval")
    (directory / "checkpoint").write_text(str(checkpoint.step))
    config.save(directory / "evaluation.yml")
    return directory


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
            tools.save_grid(frames, path.with_suffix(".png"))
    if c.save_gifs:
        for name in gif_names(c):
            compared = tools.triptych(video[None, context:], samples.frames[name][None, row], 0)
            tools.save_gif(compared, predictions / f"{name}.gif")
    buffer = io.BytesIO()
    np.savez(buffer, **{key: values[row] for key, values in samples.metrics.items()})
    replace_file(metrics_file(directory, number), buffer.getvalue())


def gif_names(config: Config) -> list[str]:
    """The predictions of an example that are animated."""
    return ["random_sample_1"] + ["best_ssim_sample"] * (config.num_samples > 1)


def line_names(config: Config) -> dict[str, str]:
    """Names of the lines in plots and tables -> what ends their keys in an example's metrics."""
    N = config.num_samples
    own = {"prediction": ""} if N == 1 else {f"best of {N}": "", f"mean of {N}": "_mean"}
    return own | {name: f"_{key}" for key, name in statistics.REFERENCES.items()}


def summarise(config: Config, checkpoint: runs.Checkpoint, directory: Path, count: int) -> dict[str, Any]:
    """Writes curves over the predicted frames, their plots, tables and page, from the examples' metrics."""
    examples = []
    for number in range(count):
        with np.load(metrics_file(directory, number)) as file:
            examples.append(dict(file))
    averages: dict[str, dict[str, float]] = {}
    lines: dict[str, Any] = {}
    shown = []
    for protocol in tools.PROTOCOLS:
        averages[protocol], lines[protocol] = {}, {}
        for metric in statistics.METRICS:
            key = f"{protocol}_{metric}"
            curves = {
                name: np.stack([example[key + suffix] for example in examples])
                for name, suffix in line_names(config).items()
                if all(key + suffix in example for example in examples)
            }
            own = next(iter(curves.values()))
            averages[protocol][metric] = float(own.mean())
            lines[protocol][metric] = {name: statistics.summary(values) for name, values in curves.items()}
            # The paper's protocol has the earlier codes' file names.
            stem = metric if protocol == "paper" else f"{metric}_{protocol}"
            mean, stddev = own.mean(0), own.std(0)
            np.savez(directory / f"{stem}_mean.npz", mean)
            np.savez(directory / f"{stem}_stddev.npz", stddev)
            label = f"{statistics.METRICS[metric]}, {protocol} protocol"
            drawn = plots.drawn(lines[protocol][metric])
            plots.plot_lines(drawn, directory / f"{metric}_{protocol}.png", label)
            first = next(iter(drawn))
            drawn = {first: plots.Line(mean, mean - stddev, mean + stddev)} | {
                name: line for name, line in drawn.items() if line.reference
            }
            plots.plot_lines(drawn, directory / f"{stem}_range.png", label, "mean and standard deviation")
            shown.append(f"{metric}_{protocol}.png")
    results = {
        "averages": averages,
        "num_examples": count,
        "predicted_frames": own.shape[1],
        "checkpoint_step": checkpoint.step,
        "protocols": tools.PROTOCOLS,
        "lines": lines,
        "config": dataclasses.asdict(config),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
        | {"python": sys.version.split()[0], "device": jax.devices()[0].device_kind},
    }
    order = np.argsort([-example["paper_ssim"].mean() for example in examples], kind="stable")
    chosen = {"best": int(order[0]), "median": int(order[count // 2]), "worst": int(order[-1])}
    gifs = {
        f"{rank}: example {number}, {name.replace('_', ' ')}": f"sample{number}/{name}.gif"
        for rank, number in chosen.items()
        for name in gif_names(config)
        if config.save_gifs
    }
    tables.write(directory / "metrics.csv", tables.to_csv(tables.CSV_HEADER, tables.csv_rows(lines)))
    tables.write(directory / "index.html", page(results, shown, gifs))
    tables.write(directory / "metrics.json", tables.to_json(results))  # last: with it, the evaluation is finished
    return results


def print_table(results: dict[str, Any]) -> None:
    print(
        f"\nAverages over {results['num_examples']} sequences and {results['predicted_frames']} predicted frames, "
        f"step {results['checkpoint_step']}, with 95 % confidence intervals:\n"
    )
    for protocol in results["protocols"]:
        print(f"{protocol:<10} {'SSIM':>25} {'PSNR (dB)':>25}")
        for line in results["lines"][protocol]["ssim"]:
            ssim, psnr = (results["lines"][protocol][metric][line]["average"] for metric in statistics.METRICS)
            print(f"  {line:<24} {tables.with_interval(ssim, 4):>25} {tables.with_interval(psnr, 2):>24}")
        print()


def main() -> None:
    with exit_codes(), Interrupts():
        use_compilation_cache()
        evaluate(*parse(sys.argv[1:]))


if __name__ == "__main__":
    main()

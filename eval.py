"""Evaluate open-loop predictions of a trained Clockwork VAE: python eval.py --logdir <run> [--key value ...]"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

import config as configuration
import data
import tools
from config import Config, ConfigError, Flag
from fast.backend import on_cpu
from metrics import perceptual, similarity
from report.output import FORMAT, VIDEOS, Formats, formats, open_directory, writing
from report.results import is_done, log_to_wandb, print_table, save_example, summarise
from report.statistics import goodness
from sequences import rollout
from sequences.interface import Model
from sequences.noise import example_keys
from system.checkpoints import DamagedCheckpoint
from system.devices import Devices, connect, use_compilation_cache
from system.interrupts import Interrupts, exit_codes
from training import loading
from training.models import make_model

# ---------------------------------------------------------------------------------------------- what to evaluate


class Output(NamedTuple):
    """Where the results are written, and which ones besides those that the configuration asks for."""

    directory: Path | None = None  # None: a new directory in the run's
    formats: Formats = Formats()
    all_videos: bool = False
    lpips: Path | None = None  # the network's file
    fvd: Path | None = None  # the network's file


def parse(argv: list[str]) -> tuple[Config, loading.Checkpoint, Output]:
    """Return the run's configuration with the keys of the command line, the checkpoint and the output.

    Raises:
        ConfigError: as `loading.resolve_name`, `loading.find_checkpoint`, `config.parse_flags` and
            `loading.load_config`.
    """
    special, flags = configuration.parse_flags(
        argv,
        "eval.py --logdir RUN",
        "Evaluate open-loop predictions of a trained Clockwork VAE.",
        overrides_run=True,
        examples=(
            "python eval.py --logdir pretrained",
            "python eval.py --logdir logs/latest",
            "python eval.py --logdir pretrained --num_examples 8 --eval_seq_len 200 --out results",
        ),
        logdir=Flag(
            "RUN",
            "run directory, logs/latest, or the beginning of a run's name if no other run's name has it; or a "
            "checkpoint of a run, a directory with one run, or a .safetensors file",
        ),
        out=Flag(
            "DIR",
            "directory for the results (default: a new one in the run's directory): new, or that of an interrupted "
            "evaluation, which is resumed",
        ),
        format=FORMAT,
        videos=Flag("{shown,all}", "write the videos of the examples that the page shows, or of all (default: shown)"),
        lpips=perceptual.LPIPS_FLAG,
        fvd=perceptual.FVD_FLAG,
    )
    if "logdir" not in special:
        raise ConfigError("command line: --logdir is missing; name a run directory that train.py printed")
    videos = special.get("videos", "shown")
    configuration.choose("videos", videos, ["shown", "all"])
    out, lpips, fvd = (Path(special[key]) if key in special else None for key in ("out", "lpips", "fvd"))
    checkpoint = loading.find_checkpoint(loading.resolve_name(special["logdir"]))
    if out is None and checkpoint.is_file:
        raise ConfigError(
            f"out: {checkpoint.run} is a file without a run directory; name a directory for the results with --out"
        )
    output = Output(out, formats(special.get("format")), videos == "all", lpips, fvd)
    config = loading.load_config(checkpoint.run, flags)
    if "save_gifs" not in flags:  # a run's own value is about its training
        config = dataclasses.replace(config, save_gifs=True)
    for key, kinds in ("format", VIDEOS), ("videos", ["all"]):
        if not config.save_gifs and any(kind in special.get(key, "").lower() for kind in kinds):
            raise ConfigError(
                f"save_gifs: false writes no videos, but --{key} {special[key]} asks for some; leave out one of the two"
            )
    return config, checkpoint, output


# ---------------------------------------------------------------------------------------------- predictions


Metrics = dict[str, dict[str, np.ndarray]]
"""protocol -> "ssim" or "psnr" -> [B, T]; with a network of LPIPS, also "perceptual" -> "lpips" -> [B, T]"""


class Prediction(NamedTuple):
    """One sample for each sequence of a batch."""

    context: np.ndarray  # uint8 [B, T, H, W, C], reconstructed
    frames: np.ndarray  # uint8 [B, T, H, W, C], predicted after the context
    metrics: Metrics


@jax.jit
def frame_metrics(truth: Array, predictions: dict[str, Array]) -> dict[str, dict[str, dict[str, Array]]]:
    """Return the metrics of named predictions in all protocols: name -> protocol -> metric -> [B, T].

    One compiled program computes all of them, since they share most of the work. A CPU computes one frame at a time,
    because that much fits into its cache.
    """
    T = truth.shape[1]

    def metrics_at(time: Array) -> dict[str, dict[str, dict[str, Array]]]:
        frame = truth[:, time]
        return {
            name: {
                protocol: similarity.frame_metrics(frame, frames[:, jnp.minimum(time, frames.shape[1] - 1)], protocol)
                for protocol in similarity.PROTOCOLS
            }
            for name, frames in predictions.items()
        }

    metrics = jax.lax.map(metrics_at, jnp.arange(T), batch_size=1 if on_cpu() else T)
    return jax.tree.map(lambda values: values.swapaxes(0, 1), metrics)


def chunked_metrics(
    truth: np.ndarray, chunks: Iterable[dict[str, Any]], place: Callable[[Any], Any] = jnp.asarray
) -> dict[str, Metrics]:
    """Return the metrics of named predictions that come in chunks of time.

    Args:
        truth: uint8 [B, T, H, W, C].
        chunks: frames [B, <= T, H, W, C] by name. A single frame is compared with all frames of its chunk.
        place: copies frames to the devices.
    """
    start, metrics = 0, []
    for chunk in chunks:
        stop = start + max(frames.shape[1] for frames in chunk.values())
        metrics.append(frame_metrics(place(truth[:, start:stop]), chunk))
        start = stop
    return jax.tree.map(lambda *values: np.concatenate(values, axis=1), *jax.device_get(metrics))


def predict(
    model: Model,
    params: Any,
    video: np.ndarray,
    keys: Array,
    place: Callable[[Any], Any] = jnp.asarray,
    actions: np.ndarray | None = None,
) -> Prediction:
    """Predict the frames after the context of a video, and compare them with the true ones.

    Args:
        model, params: the trained model.
        video: uint8 [B, T, H, W, C].
        keys: one PRNG key per sequence [B].
        place: copies frames to the devices.
        actions: [B, T, A], those of all frames, if the model takes any.
    """
    open_loop, frames = rollout.predict(model, params, video, keys, place, actions), []

    def chunks() -> Iterator[dict[str, Array]]:
        for chunk in open_loop.prediction:
            frames.append(tools.to_uint8(chunk))
            yield {"prediction": chunk}

    metrics = chunked_metrics(video[:, model.config.open_loop_ctx :], chunks(), place)
    context = tools.joined([open_loop.reconstruction])
    return Prediction(context, np.concatenate(jax.device_get(frames), axis=1), metrics["prediction"])


def reference_metrics(
    model: Model,
    params: Any,
    video: np.ndarray,
    keys: Array,
    first: int,
    pool: np.ndarray | None,
    place: Callable[[Any], Any],
    actions: np.ndarray | None,
) -> dict[str, Metrics]:
    """Return the metrics of the references that predictions are compared with, see `statistics.REFERENCES`.

    Args:
        model, params: the model that reconstructs, and that predicts under shuffled actions.
        video: uint8 [B, T, H, W, C].
        keys: those of the predictions, so that the states of the context are the same.
        first: number of the first sequence. A sequence's number is the seed of its random frames.
        pool: the frames of `random_frames`.
        place: copies frames to the devices.
        actions: [B, T, A], if the model takes any.
    """
    context = model.config.open_loop_ctx
    future, last = video[:, context:], place(video[:, context - 1 : context])
    if pool is not None:
        generators = (np.random.default_rng([1, first + row]) for row in range(len(future)))
        indices = np.stack([generator.integers(len(pool), size=future.shape[1]) for generator in generators])

    def chunks() -> Iterator[dict[str, Array]]:
        start = 0
        for chunk in rollout.reconstruct(model, params, video, keys, place, actions):
            stop = start + chunk.shape[1]
            random = {} if pool is None else {"random": place(pool[indices[:, start:stop]])}
            yield {"posterior": chunk, "copy": last} | random
            start = stop

    metrics = chunked_metrics(future, chunks(), place)
    if actions is not None:
        shuffled = shuffle_future_actions(actions, context, first)
        metrics["shuffled"] = predict(model, params, video, keys, place, shuffled).metrics
    return metrics


def shuffle_future_actions(actions: np.ndarray, context: int, first: int) -> np.ndarray:
    """Return actions [B, T, A] with those after the context in a random order.

    The number of a sequence, `first` + row, is the seed of its order.
    """
    generators = (np.random.default_rng([2, first + row]) for row in range(len(actions)))
    futures = [generator.permutation(row[context:]) for generator, row in zip(generators, actions, strict=True)]
    return np.concatenate([actions[:, :context], np.stack(futures)], axis=1)


def random_frames(config: Config) -> np.ndarray | None:
    """Return random frames of the training set, uint8 [1000, H, W, C]. They are the same for all models.

    Print a line and return None if there is no training set, as on a machine that only evaluates.
    """
    try:
        windows = data.windows(config, "train")
    except ConfigError as error:
        print(f"The line of random training frames is left out, since there is no training set: {error}")
        return None
    random = np.random.default_rng(0)
    chosen = (windows[int(random.integers(len(windows)))] for _ in range(1000))
    return np.stack([window[random.integers(len(window))] for window in chosen])


class Samples:
    """The frames and metrics that are kept of a batch's samples.

    frames: the context that the first sample reconstructs, and the first sample. Of several samples, also the second
        and, for each metric, the best by the metric's average over time in the paper's protocol.
    metrics: [B, T] each. "<protocol>_<metric>" is that of the best sample by this metric, as in the earlier codes.
        "<protocol>_<metric>_<reference>" is that of a reference. Of several samples, "<protocol>_<metric>_mean" is the
        mean over them.
    """

    def __init__(self, count: int, references: Mapping[str, Metrics]) -> None:
        self.count = count
        self.frames: dict[str, np.ndarray] = {}
        self.metrics = {
            f"{protocol}_{name}_{reference}": values
            for reference, metrics in references.items()
            for protocol, by_name in metrics.items()
            for name, values in by_name.items()
        }

    def add(self, number: int, prediction: Prediction) -> None:
        """Add sample `number`, counted from 0."""
        if number == 0:
            self.frames["context"] = prediction.context
        if number < 2:
            self.frames[f"random_sample_{number + 1}"] = prediction.frames
        for protocol, by_name in prediction.metrics.items():
            for name, values in by_name.items():
                key = f"{protocol}_{name}"
                if self.count == 1:
                    self.metrics[key] = values
                    continue
                best_values = self.metrics.setdefault(key, values.copy())
                better = goodness(name, values.mean(-1)) > goodness(name, best_values.mean(-1))
                best_values[better] = values[better]
                mean = self.metrics.setdefault(f"{key}_mean", np.zeros_like(values))
                mean += (values - mean) / (number + 1)
                if protocol == "paper":
                    best_frames = self.frames.setdefault(f"best_{name}_sample", prediction.frames.copy())
                    best_frames[better] = prediction.frames[better]

    def row(self, row: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Return the frames and metrics of one sequence of the batch."""
        return jax.tree.map(lambda values: values[row], (self.frames, self.metrics))


# ---------------------------------------------------------------------------------------------- the evaluation


def evaluate(config: Config, checkpoint: loading.Checkpoint, output: Output | None = None) -> dict[str, Any]:
    """Predict `num_examples` test sequences `num_samples` times each, and write the results.

    Of several samples, two results are reported: the best sample of each sequence by its average over time, as in the
    earlier codes, and the mean over the samples. An interrupted evaluation is resumed. Several processes share each
    batch.

    Returns:
        The content of `metrics.json`.

    Raises:
        ConfigError: the evaluation can't work as configured.
    """
    output = output or Output()
    c = connect(config)
    devices = Devices()
    model = make_model(c)
    test = data.windows(c, "test")
    params, stages = loading.load_params(model, checkpoint), loading.stages_before(checkpoint)
    length = len(test[0])
    if c.open_loop_ctx >= length:
        raise ConfigError(
            f"open_loop_ctx: must be less than {length}, the frames of a test video, got {c.open_loop_ctx}; lower it"
        )
    count = min(c.num_examples, len(test))
    if count < c.num_examples:
        devices.say(f"num_examples: the test set has only {count} sequences; evaluating all of them")
    results: dict[str, Any] = {}
    networks = perceptual.load(output.lpips, output.fvd, length - c.open_loop_ctx, count)
    network = networks.lpips.sha256 if networks.lpips else ""
    with contextlib.ExitStack() as resources:
        path = devices.first_decides(lambda: str(open_directory(resources, c, checkpoint, output.directory, network)))
        directory = Path(path)
        predict_all(c, model, params, test, count, directory, devices, networks.lpips)
        if devices.process == 0:
            scores = perceptual.summarise(networks, directory, count)
            with writing(directory):
                results = summarise(c, checkpoint, stages, directory, count, output.formats, output.all_videos, scores)
            log_to_wandb(c, checkpoint.run, directory, results)
            print_table(results)
            print(f"Results: {directory}")
    return results


def predict_all(
    config: Config,
    model: Model,
    params: Any,
    test: data.Windows,
    count: int,
    directory: Path,
    devices: Devices,
    lpips: perceptual.Network | None,
) -> None:
    """Write the predictions and metrics of the first `count` test sequences.

    Batches at the beginning that are complete are skipped. LPIPS is one of the metrics if its network is given. A
    thread writes a batch while the devices compute the next one.
    """
    c = config
    batch_size = min(c.batch_size, count)
    own = devices.own_rows(batch_size)
    done = 0
    while done < count and all(is_done(directory, i) for i in range(done, min(done + batch_size, count))):
        done += batch_size
    batches = data.eval_batches(test, batch_size, count, devices.rows(batch_size), own, first=done // batch_size)
    pool = random_frames(c) if done < count else None

    def write(first: int, batch: data.Batch, samples: Samples) -> None:
        with writing(directory):
            for row in np.flatnonzero(batch.weight).tolist():
                save_example(c, directory, first + row, batch.video[row], *samples.row(row))

    written: Future[None] | None = None
    with (
        ThreadPoolExecutor(1) as writer,
        tqdm(
            total=-(-count // batch_size) * c.num_samples,
            initial=done // batch_size * c.num_samples,
            unit="batch",
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 30,
            disable=devices.process > 0,
        ) as bar,
    ):
        for number, batch in enumerate(batches, done // batch_size):
            first = number * batch_size + own.start
            keys = example_keys(c, first, len(batch.video), 0)
            references = reference_metrics(model, params, batch.video, keys, first, pool, devices.put, batch.actions)
            samples = Samples(c.num_samples, references)
            for sample in range(c.num_samples):
                keys = example_keys(c, first, len(batch.video), sample)
                prediction = predict(model, params, batch.video, keys, devices.put, batch.actions)
                if lpips:
                    distances = perceptual.lpips(lpips, batch.video[:, c.open_loop_ctx :], prediction.frames)
                    prediction.metrics["perceptual"] = {"lpips": distances}
                samples.add(sample, prediction)
                bar.update()
            if written:
                written.result()
            written = writer.submit(write, first, batch, samples)
        if written:
            written.result()
    devices.wait()


def main() -> None:
    with exit_codes(), Interrupts():
        use_compilation_cache()
        config, checkpoint, output = parse(sys.argv[1:])
        while True:
            try:
                evaluate(config, checkpoint, output)
                return
            except DamagedCheckpoint:
                # A training that runs at the same time may have replaced the newest checkpoint: then use the new one.
                newest = parse(sys.argv[1:])[1]
                # A checkpoint that the user named can't be replaced, and `latest` may have become another run.
                if newest == checkpoint or newest.run != checkpoint.run:
                    raise
                checkpoint = newest


if __name__ == "__main__":
    main()

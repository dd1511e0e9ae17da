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
    """What is written besides the configuration's say, and where."""

    directory: Path | None = None  # None: a new one below the run's
    formats: Formats = Formats()
    all_videos: bool = False
    lpips: Path | None = None  # the file of its network
    fvd: Path | None = None


def parse(argv: list[str]) -> tuple[Config, loading.Checkpoint, Output]:
    """Return the run's own configuration with the command line's keys in place of its values, and what to do with it.

    Raises:
        ConfigError: as `loading.named`, `loading.find_checkpoint`, `config.parse_flags` and `loading.load_config` do.
    """
    special, flags = configuration.parse_flags(
        argv,
        "eval.py --logdir RUN",
        "Evaluate open-loop predictions of a trained Clockwork VAE.",
        of_run=True,
        examples=(
            "python eval.py --logdir pretrained",
            "python eval.py --logdir logs/latest",
            "python eval.py --logdir pretrained --num_examples 8 --eval_seq_len 200 --out results",
        ),
        logdir=Flag(
            "RUN",
            "run directory, logs/latest, or a beginning of a run's name that no other's has; one of its checkpoints; a "
            "directory of one run; a .safetensors file",
        ),
        out=Flag(
            "DIR",
            "new directory for the results (default: one below the run's); an interrupted evaluation there is resumed",
        ),
        format=FORMAT,
        videos=Flag(
            "{shown,all}", "whose videos are written: the examples' that the page shows, or all (default: shown)"
        ),
        lpips=perceptual.LPIPS_FLAG,
        fvd=perceptual.FVD_FLAG,
    )
    if "logdir" not in special:
        raise ConfigError("command line: --logdir is missing; name a run directory that train.py printed")
    videos = special.get("videos", "shown")
    configuration.choose("videos", videos, ["shown", "all"])
    out, lpips, fvd = (Path(special[key]) if key in special else None for key in ("out", "lpips", "fvd"))
    checkpoint = loading.find_checkpoint(loading.named(special["logdir"]))
    if out is None and checkpoint.alone:
        raise ConfigError(f"out: {checkpoint.run} has no run's directory; name a new one for the results with --out")
    output = Output(out, formats(special.get("format")), videos == "all", lpips, fvd)
    config = loading.load_config(checkpoint.run, flags)
    if "save_gifs" not in flags:  # whatever the training saved
        config = dataclasses.replace(config, save_gifs=True)
    for key, kinds in ("format", VIDEOS), ("videos", ["all"]):
        if not config.save_gifs and any(kind in special.get(key, "").lower() for kind in kinds):
            raise ConfigError(
                f"save_gifs: false writes no videos, but --{key} {special[key]} asks for some; leave out one of the two"
            )
    return config, checkpoint, output


# ---------------------------------------------------------------------------------------------- predictions


Metrics = dict[str, dict[str, np.ndarray]]
"""protocol -> "ssim", "psnr" -> [B, T]; if its network is given, also "perceptual" -> "lpips" -> [B, T]"""


class Prediction(NamedTuple):
    """One sample for each sequence of a batch."""

    context: np.ndarray  # uint8 [B, T, H, W, C], as the model reconstructs it
    frames: np.ndarray  # uint8 [B, T, H, W, C], what it predicts after that
    metrics: Metrics


@jax.jit
def frame_metrics(truth: Array, predictions: dict[str, Array]) -> dict[str, dict[str, dict[str, Array]]]:
    """Return the metrics of named predictions in all protocols, which share most of the work.

    On a CPU, one time after the other: so little at once stays in its cache.
    """
    T = truth.shape[1]

    def at(time: Array) -> dict[str, dict[str, dict[str, Array]]]:
        now = truth[:, time]
        return {
            name: {
                protocol: similarity.frame_metrics(now, frames[:, jnp.minimum(time, frames.shape[1] - 1)], protocol)
                for protocol in similarity.PROTOCOLS
            }
            for name, frames in predictions.items()
        }

    metrics = jax.lax.map(at, jnp.arange(T), batch_size=1 if on_cpu() else T)
    return jax.tree.map(lambda values: values.swapaxes(0, 1), metrics)


def measure(
    truth: np.ndarray, chunks: Iterable[dict[str, Any]], place: Callable[[Any], Any] = jnp.asarray
) -> dict[str, Metrics]:
    """Return the metrics of named frames that come in chunks of time.

    Args:
        truth: uint8 [B, T, H, W, C].
        chunks: of frames [B, <= T, H, W, C]; a single frame in place of several stands for all of them.
        place: puts frames on the devices.
    """
    start, metrics = 0, []
    for chunk in chunks:
        stop = start + max(frames.shape[1] for frames in chunk.values())
        metrics.append(frame_metrics(place(truth[:, start:stop]), chunk))
        start = stop
    return jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *jax.device_get(metrics))


def predict(
    model: Model,
    params: Any,
    video: np.ndarray,
    keys: Array,
    place: Callable[[Any], Any] = jnp.asarray,
    actions: np.ndarray | None = None,
) -> Prediction:
    """Predict the frames of video uint8 [B, T, H, W, C] after its context, and compare them with it.

    A model that takes actions is given those of all frames, [B, T, A].
    """
    seen, frames = rollout.predict(model, params, video, keys, place, actions), []

    def chunks() -> Iterator[dict[str, Array]]:
        for chunk in seen.prediction:
            frames.append(tools.to_uint8(chunk))
            yield {"prediction": chunk}

    metrics = measure(video[:, model.config.open_loop_ctx :], chunks(), place)
    context = tools.joined([seen.reconstruction])
    return Prediction(context, np.concatenate(jax.device_get(frames), axis=1), metrics["prediction"])


def references(
    model: Model,
    params: Any,
    video: np.ndarray,
    keys: Array,
    first: int,
    pool: np.ndarray | None,
    place: Callable[[Any], Any] = jnp.asarray,
    actions: np.ndarray | None = None,
) -> dict[str, Metrics]:
    """Return the metrics of what stands in for the frames after the context, see `statistics.REFERENCES`.

    Args:
        model, params: what reconstructs, and predicts under shuffled actions.
        video: uint8 [B, T, H, W, C].
        keys: of the predictions, so that the context's states are the same.
        first: the first sequence's number, which with the row decides which random frames it gets.
        pool: of `random_frames`.
        place: puts frames on the devices.
        actions: [B, T, A], if the model takes any.
    """
    context = model.config.open_loop_ctx
    future, last = video[:, context:], place(video[:, context - 1 : context])
    if pool is not None:
        randoms = (np.random.default_rng([1, first + row]) for row in range(len(future)))
        numbers = np.stack([random.integers(len(pool), size=future.shape[1]) for random in randoms])

    def chunks() -> Iterator[dict[str, Array]]:
        start = 0
        for chunk in rollout.reconstruct(model, params, video, keys, place, actions):
            stop = start + chunk.shape[1]
            random = {} if pool is None else {"random": place(pool[numbers[:, start:stop]])}
            yield {"posterior": chunk, "copy": last} | random
            start = stop

    found = measure(future, chunks(), place)
    if actions is not None:
        others = shuffled(actions, context, first)
        found["shuffled"] = predict(model, params, video, keys, place, others).metrics
    return found


def shuffled(actions: np.ndarray, context: int, first: int) -> np.ndarray:
    """Return actions [B, T, A] with those after the context in a random order, which sequence number `first` + row
    determines."""
    randoms = (np.random.default_rng([2, first + row]) for row in range(len(actions)))
    futures = [random.permutation(own[context:]) for random, own in zip(randoms, actions, strict=True)]
    return np.concatenate([actions[:, :context], np.stack(futures)], axis=1)


def random_frames(config: Config, count: int = 1000) -> np.ndarray | None:
    """Return random frames of the training set, uint8 [count, H, W, C], the same ones for each model of a dataset.

    None, with one line that says so, if there is no training set (as on a machine that only evaluates).
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

    frames: the context as the first sample reconstructs it; the first sample; of several, also the second and, by each
    metric's average over time in the paper's protocol, the best.
    metrics, [B, T] each: "<protocol>_<metric>" of the best sample by this metric, as in the earlier codes;
    "<protocol>_<metric>_<reference>" of each reference; of several samples, "<protocol>_<metric>_mean" over them.
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
                kept = self.metrics.setdefault(key, values.copy())
                better = goodness(name, values.mean(-1)) > goodness(name, kept.mean(-1))
                kept[better] = values[better]
                mean = self.metrics.setdefault(f"{key}_mean", np.zeros_like(values))
                mean += (values - mean) / (number + 1)
                if protocol == "paper":
                    best = self.frames.setdefault(f"best_{name}_sample", prediction.frames.copy())
                    best[better] = prediction.frames[better]

    def row(self, row: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Return one sequence's frames and metrics."""
        return jax.tree.map(lambda values: values[row], (self.frames, self.metrics))


# ---------------------------------------------------------------------------------------------- the evaluation


def evaluate(config: Config, checkpoint: loading.Checkpoint, output: Output | None = None) -> dict[str, Any]:
    """Predict `num_samples` times for each of `num_examples` test sequences, and write what comes out.

    Of several samples, the best of each sequence by its average over time (as in the earlier codes) and their mean are
    reported. An evaluation that was interrupted is resumed. Of several processes, each takes its share of each batch.

    Returns:
        What `metrics.json` holds.

    Raises:
        ConfigError: what is asked for can't work.
    """
    output = output or Output()
    c = connect(config)
    devices = Devices()
    model = make_model(c)
    test = data.windows(c, "test")
    params, stages = loading.load_params(model, checkpoint), loading.stages_before(checkpoint)
    length = len(test[0])
    if c.open_loop_ctx >= length:
        raise ConfigError(f"open_loop_ctx: must be less than {length}, a test video's frames, got {c.open_loop_ctx}")
    count = min(c.num_examples, len(test))
    if count < c.num_examples:
        devices.say(f"num_examples: the test set has {count} sequences; evaluating these")
    results: dict[str, Any] = {}
    networks = perceptual.load(output.lpips, output.fvd, length - c.open_loop_ctx, count)
    network = networks.lpips.sha256 if networks.lpips else ""
    with contextlib.ExitStack() as held:
        opened = devices.first_decides(lambda: str(open_directory(held, c, checkpoint, output.directory, network)))
        directory = Path(opened)
        predict_all(c, model, params, test, count, directory, devices, networks.lpips)
        if devices.process == 0:
            found = perceptual.measured(networks, directory, count)
            with writing(directory):
                results = summarise(c, checkpoint, stages, directory, count, output.formats, output.all_videos, found)
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
    lpips: perceptual.Network | None = None,
) -> None:
    """Write predictions and metrics of the first `count` test sequences, except those that are there already.

    LPIPS is among the metrics if its network is given. A thread writes a batch while the devices compute the next one.
    """
    c = config
    batch_size = min(c.batch_size, count)
    own = devices.own(batch_size)
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
            compared = references(model, params, batch.video, keys, first, pool, devices.put, batch.actions)
            samples = Samples(c.num_samples, compared)
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
                # A training beside this may have removed the newest checkpoint of before. A named one is gone then.
                newest = parse(sys.argv[1:])[1]
                if newest == checkpoint or newest.run != checkpoint.run:  # `latest` may lead to another one now
                    raise
                checkpoint = newest


if __name__ == "__main__":
    main()

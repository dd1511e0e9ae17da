"""Evaluates open-loop predictions of a trained Clockwork VAE: python eval.py --logdir <run> [--key value ...]"""

import dataclasses
import datetime
import importlib.metadata
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from tqdm import tqdm

import config as configuration
import cwvae
import data
import pictures
import tools
import train
from config import Config, ConfigError
from cwvae import CWVAE


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
    runs = [
        path.parent
        for pattern in ("config.yml", "*/config.yml", "*/*/config.yml")
        for path in sorted(logdir.glob(pattern))
    ]
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
    """The parameters in a checkpoint, on the default device.

    Raises:
        DamagedCheckpoint: the checkpoint isn't intact, or is another model's.
    """
    directory = checkpoint.run / "checkpoints"
    with tools.open_checkpoints(directory) as checkpoints:
        state = tools.load_checkpoint(checkpoints, checkpoint.step, jax.eval_shape(partial(train.make_state, model)))
    return jax.device_put(state.params)


# ---------------------------------------------------------------------------------------------- predictions


class Prediction(NamedTuple):
    """One sample for each sequence of a batch, without the context."""

    frames: np.ndarray  # uint8 [B, T, H, W, C]
    metrics: dict[str, dict[str, np.ndarray]]  # protocol -> "ssim", "psnr" -> [B, T]


@partial(jax.jit, static_argnums=2)
def measure(truth: Array, prediction: Array, protocol: str) -> dict[str, Array]:
    return tools.frame_metrics(cwvae.floats(truth), prediction, protocol)


def predict(model: CWVAE, params: Any, video: np.ndarray, keys: Array) -> Prediction:
    """Predicts the frames of video uint8 [B, T, H, W, C] after its context, and compares them with it."""
    c = model.config
    start = c.open_loop_ctx
    frames, metrics = [], []
    for name, chunk in cwvae.open_loop(model, params, video[:, :start], keys, video.shape[1] - start, c.use_obs):
        if name == "prior_multistep":
            truth = video[:, start : start + chunk.shape[1]]
            start += chunk.shape[1]
            frames.append(np.asarray(tools.to_uint8(chunk)))
            metrics.append({protocol: measure(truth, chunk, protocol) for protocol in tools.PROTOCOLS})
    joined = jax.tree.map(lambda *chunks: np.concatenate(chunks, axis=1), *jax.device_get(metrics))
    return Prediction(np.concatenate(frames, axis=1), joined)


def example_keys(config: Config, first: int, count: int, sample: int) -> Array:
    """PRNG keys that depend on the seed, the example's number and the sample's number alone."""
    keys = train.sequence_keys(jax.random.fold_in(jax.random.key(config.seed or 0), 1), first, count)
    return jax.vmap(lambda key: jax.random.fold_in(key, sample))(keys)


# ---------------------------------------------------------------------------------------------- the evaluation


def evaluate(config: Config, checkpoint: Checkpoint) -> dict[str, Any]:
    """Predicts `num_samples` times for each of `num_examples` test sequences; all results go below the run directory.

    Per sequence, the sample with the best average over time enters the curves, as in the earlier codes.

    Returns:
        What `metrics.json` holds.

    Raises:
        ConfigError: what is asked for can't work.
    """
    c = config
    model = CWVAE(c)
    test = data.windows(c, "test")
    params = load_params(model, checkpoint)
    directory = new_directory(checkpoint.run)
    count = min(c.num_examples, len(test))
    if count < c.num_examples:
        print(f"num_examples: the test set has {count} sequences; evaluating these")
    batch_size = min(c.batch_size, count)
    best: dict[str, dict[str, list[np.ndarray]]] = {protocol: {"ssim": [], "psnr": []} for protocol in tools.PROTOCOLS}
    with tqdm(
        total=count * c.num_samples,
        unit="prediction",
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 30,
    ) as bar:
        for number, batch in enumerate(data.test_batches(test, batch_size, count, batch_size)):
            first, size = number * batch_size, int(batch.weight.sum())
            samples = []
            for sample in range(c.num_samples):
                keys = example_keys(c, first, batch_size, sample)
                samples.append(predict(model, params, batch.video, keys))
                bar.update(size)
            for row in range(size):
                chosen = save_example(
                    c, directory, first + row, batch.video[row], [at(sample, row) for sample in samples]
                )
                for protocol, metrics in chosen.items():
                    for name, values in metrics.items():
                        best[protocol][name].append(values)
    results = summarise(c, checkpoint, directory, best)
    print_table(results)
    print(f"Results: {directory}")
    return results


def at(prediction: Prediction, row: int) -> Prediction:
    return jax.tree.map(lambda x: x[row], prediction)


def new_directory(run: Path) -> Path:
    """Makes a directory named by the time, beside earlier evaluations: never one that exists."""
    name = f"eval_{datetime.datetime.now():%Y_%m_%d_%H_%M_%S}"
    for suffix in ("", *(f"_{i}" for i in range(2, 100))):
        try:
            (run / (name + suffix)).mkdir()
            return run / (name + suffix)
        except FileExistsError:
            continue
    raise ConfigError(f"{run / name} and its successors exist; wait a second")


def save_example(
    config: Config, directory: Path, number: int, video: np.ndarray, samples: list[Prediction]
) -> dict[str, dict[str, np.ndarray]]:
    """Writes one example's truth and predictions; returns the metrics of its best samples, [T] each."""
    context = config.open_loop_ctx

    def best_sample(protocol: str, name: str) -> Prediction:
        return max(samples, key=lambda sample: sample.metrics[protocol][name].mean())

    truth = directory / f"sample{number}_gt"
    predictions = directory / f"sample{number}"
    videos = {
        truth / "gt_ctx": video[:context],
        truth / "gt_pred": video[context:],
        predictions / "random_sample_1": samples[0].frames,
    }
    if len(samples) > 1:
        videos |= {
            predictions / "random_sample_2": samples[1].frames,
            predictions / "best_ssim_sample": best_sample("paper", "ssim").frames,
            predictions / "best_psnr_sample": best_sample("paper", "psnr").frames,
        }
    for path, frames in videos.items():
        path.parent.mkdir(exist_ok=True)
        np.savez(path.with_suffix(".npz"), frames)
        if not config.no_save_grid:
            pictures.save_grid(frames, path.with_suffix(".png"))
    if config.save_gifs:
        compared = pictures.comparison(video[None, context:], samples[0].frames[None], 0)
        pictures.save_gif(compared, predictions / "random_sample_1.gif")
    return {
        protocol: {name: best_sample(protocol, name).metrics[protocol][name] for name in ("ssim", "psnr")}
        for protocol in tools.PROTOCOLS
    }


def summarise(
    config: Config, checkpoint: Checkpoint, directory: Path, metrics: dict[str, dict[str, list[np.ndarray]]]
) -> dict[str, Any]:
    """Writes curves over the predicted frames, their plots, and `metrics.json`."""
    averages: dict[str, dict[str, float]] = {}
    for protocol, by_name in metrics.items():
        averages[protocol] = {}
        for name, examples in by_name.items():
            mean, stddev = np.mean(examples, axis=0), np.std(examples, axis=0)
            # The paper's protocol has the earlier codes' file names.
            stem = name if protocol == "paper" else f"{name}_{protocol}"
            np.savez(directory / f"{stem}_mean.npz", mean)
            np.savez(directory / f"{stem}_stddev.npz", stddev)
            unit = " (dB)" if name == "psnr" else ""
            pictures.plot_range(
                mean, stddev, directory / f"{stem}_range.png", f"{name.upper()}{unit}, {protocol} protocol"
            )
            averages[protocol][name] = float(mean.mean())
    examples = metrics["paper"]["ssim"]
    results = {
        "averages": averages,
        "num_examples": len(examples),
        "predicted_frames": len(examples[0]),
        "checkpoint_step": checkpoint.step,
        "config": dataclasses.asdict(config),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
        | {"python": sys.version.split()[0], "device": jax.devices()[0].device_kind},
    }
    (directory / "metrics.json").write_text(json.dumps(results, indent=2) + "\n")
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
        evaluate(*parse(sys.argv[1:]))
    except ConfigError as error:
        sys.exit(configuration.refuse(error))


if __name__ == "__main__":
    main()

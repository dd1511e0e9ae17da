"""The paper's analyses, each a command: python analysis.py <command> [NAME=]RUN ... [--out DIR] [--key value ...]

Of trained models, with the keys of the configuration as in eval.py:
    levels   information per level: KL and entropies (Table 1, Figure 8); exports the latents
    blind    open-loop predictions where some levels don't see the context (Figure 7)
    digits   which digits are in the predicted frames, read by a classifier (Figure 5b)
    rooms    which rooms the predicted videos visit, read from their colours (Figure 5a)
    export   writes a small copy of a run, to share
Of what train.py and eval.py wrote:
    compare  quality over distance of several models on one dataset (Figure 1)
    ranks    average ranks over several comparisons (Figure 5c)
    curves   losses over the steps of several trainings
"""

import dataclasses
import itertools
import operator
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from tqdm import tqdm

import comparisons
import config as configuration
import cwvae
import data
import eval as evaluation
import pictures
import readouts
import report
import tools
import train
from checkpoints import Checkpoints
from config import Config, ConfigError
from cwvae import CWVAE
from devices import Devices
from interrupts import Interrupts, exit_codes


class Run(NamedTuple):
    """A trained model under the name that it has in tables and plots."""

    name: str
    config: Config
    checkpoint: evaluation.Checkpoint


# ---------------------------------------------------------------------------------------------- command line


def parse_runs(command: str, arguments: Sequence[str], **special: str) -> tuple[list[Run], dict[str, str]]:
    """The runs that a command line names, with its keys in place of their configurations', and its special flags.

    Raises:
        ConfigError: as `eval.parse` does.
    """
    description = f"{COMMANDS[command][1]}. RUN is as eval.py's --logdir."
    named, given, values = comparisons.parse_named(
        arguments, f"analysis.py {command} [NAME=]RUN ...", description, True, **special
    )
    checkpoints = [evaluation.find_checkpoint(path) for _, path in named]
    configs = [configuration.merged(found.run / "config.yml", values) for found in checkpoints]
    names = comparisons.with_names([name for name, _ in named], configs)
    return [Run(*run) for run in zip(names, configs, checkpoints, strict=True)], given


def single(command: str, runs: Sequence[Run]) -> Run:
    if len(runs) > 1:
        raise ConfigError(f"command line: {command} takes a single run")
    return runs[0]


def whole(given: Mapping[str, str], key: str, default: int, at_least: int = 1) -> int:
    """A special flag that is a whole number."""
    try:
        value = int(given.get(key, default))
    except ValueError:
        value = at_least - 1
    if value < at_least:
        raise ConfigError(f"{key}: must be a whole number of at least {at_least}, got {given[key]!r}")
    return value


def directory_for(command: str, runs: Sequence[Run], given: Mapping[str, str]) -> Path:
    return comparisons.new_directory(command, given.get("out"), runs[0].checkpoint.run if len(runs) == 1 else None)


# ---------------------------------------------------------------------------------------------- models at work


class Worker:
    """A run's model with its parameters on this process's devices, and its test sequences."""

    def __init__(self, run: Run):
        self.config = run.config
        self.name = run.name
        self.model = CWVAE(run.config)
        self.test = data.windows(run.config, "test")
        self.devices = Devices()
        self.params = evaluation.load_params(self.model, run.checkpoint)
        self.count = min(run.config.num_examples, len(self.test))

    def batches(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """Number of the first sequence, how many there are, and the frames uint8 [rows, T, H, W, C], of which the
        rows behind that number are padding."""
        size = min(self.config.batch_size, self.count)
        batches = data.eval_batches(self.test, size, self.count, self.devices.rows(size))
        with tqdm(total=self.count, desc=self.name, unit="sequence", dynamic_ncols=True) as bar:
            for number, batch in enumerate(batches):
                valid = int(batch.weight.sum())
                yield number * size, valid, batch.video
                bar.update(valid)

    def keys(self, first: int, rows: int, sample: int = 0) -> Array:
        """Those of eval.py, so that samples are the same."""
        return evaluation.example_keys(self.config, first, rows, sample)

    def predictions(self, video: np.ndarray, first: int, sample: int) -> np.ndarray:
        """The frames after the context as eval.py predicts them, uint8 [B, T, H, W, C]."""
        keys = self.keys(first, len(video), sample)
        chunks = evaluation.predicted(self.model, self.params, video, keys, self.devices.put)
        return joined(chunks)

    def reconstructions(self, video: np.ndarray, first: int) -> np.ndarray:
        """The same frames as the posterior reconstructs them, which sees them: what predictions are bounded by."""
        keys = self.keys(first, len(video))
        chunks = evaluation.reconstructed(self.model, self.params, video, keys, self.devices.put)
        return joined(chunks)[:, self.config.open_loop_ctx :]


def joined(chunks: Iterable[Array]) -> np.ndarray:
    """Frames that come in chunks of time, as uint8 [B, T, H, W, C]."""
    return np.concatenate([np.asarray(tools.to_uint8(chunk)) for chunk in chunks], axis=1)


# ---------------------------------------------------------------------------------------------- levels


def levels(arguments: Sequence[str]) -> None:
    """Writes KL and entropies per level as JSON, CSV, Markdown and plot, and each run's latents as NPZ."""
    runs, given = parse_runs(
        "levels", arguments, frames="frames of each test sequence that are read (default: seq_len, as in Table 1)"
    )
    frames = [whole(given, "frames", run.config.seq_len) for run in runs]
    for run, T in zip(runs, frames, strict=True):
        if 0 < run.config.eval_seq_len < T:
            raise ConfigError(
                f"frames: test sequences of {run.name} have eval_seq_len = {run.config.eval_seq_len} frames, fewer "
                f"than {T}; lower --frames or raise --eval_seq_len"
            )
    workers = [Worker(run) for run in runs]
    directory = directory_for("levels", runs, given)
    results = {}
    for i, (run, worker, T) in enumerate(zip(runs, workers, frames, strict=True)):
        latents = directory / ("latents" if len(runs) == 1 else f"latents_{i}")
        found = {"latents": latents.name, "run": str(run.checkpoint.run), "checkpoint_step": run.checkpoint.step}
        results[run.name] = found | information(worker, T, latents)
    write_levels(results, directory)


TERMS = {"kl": "KL", "entropy_prior": "prior entropy", "entropy_posterior": "posterior entropy"}


@jax.jit
def level_terms(rollouts: tuple[cwvae.LevelRollout, ...]) -> list[dict[str, Array]]:
    """Each level's TERMS, summed over the ticks of a chunk, [B]."""
    return [
        {
            "kl": cwvae.kl_divergence(rollout.posterior, rollout.prior).sum(1),
            "entropy_prior": cwvae.entropy(rollout.prior).sum(1),
            "entropy_posterior": cwvae.entropy(rollout.posterior).sum(1),
        }
        for rollout in rollouts
    ]


def information(worker: Worker, frames: int, latents: Path) -> dict[str, Any]:
    """KL and entropies of each level in nats, over the first `frames` frames of the test sequences.

    Levels that `use_obs` blinds follow their prior. Each batch's latents go to `latents/level_<l>_<first example>.npz`:
    example [B], stoch, prior_mean, prior_stddev, posterior_mean, posterior_stddev [B, T_l, S], deter [B, T_l, D].
    """
    c = worker.config
    latents.mkdir()
    totals: list[list[dict[str, np.ndarray]]] = []
    for first, valid, video in worker.batches():
        terms, parts = [], []
        keys = worker.keys(first, len(video))
        chunks = cwvae.posterior(
            worker.model, worker.params, video[:, :frames], keys, c.use_obs, place=worker.devices.put
        )
        for rollouts in chunks:
            terms.append(level_terms(rollouts))
            parts.append(jax.tree.map(lambda x: np.asarray(x, np.float32), rollouts))
        total = jax.tree.map(lambda *x: np.sum(x, axis=0), *jax.device_get(terms))
        totals.append(jax.tree.map(operator.itemgetter(slice(valid)), total))
        for level, rollout in enumerate(jax.tree.map(lambda *x: np.concatenate(x, axis=1), *parts)):
            rollout = jax.tree.map(operator.itemgetter(slice(valid)), rollout)
            np.savez(
                latents / f"level_{level}_{first:06}.npz",
                example=np.arange(first, first + valid),
                stoch=rollout.stoch,
                deter=rollout.deter,
                prior_mean=rollout.prior.mean,
                prior_stddev=rollout.prior.stddev,
                posterior_mean=rollout.posterior.mean,
                posterior_stddev=rollout.posterior.stddev,
            )
    by_level = jax.tree.map(lambda *x: np.concatenate(x), *totals)  # [N] each
    found = []
    for T, terms_of_level in zip(cwvae.ticks(c, frames), by_level, strict=True):
        per_sequence = {key: report.plain(report.estimate(values)) for key, values in terms_of_level.items()}
        per_tick = {key: report.plain(report.estimate(values / T)) for key, values in terms_of_level.items()}
        found.append({"ticks": T, "per_sequence": per_sequence, "per_tick": per_tick})
    return {"frames": frames, "num_examples": worker.count, "dataset": c.dataset, "levels": found}


def write_levels(results: Mapping[str, Any], directory: Path) -> None:
    """The figures of `information` for each model: levels.json, levels.csv, levels.md, kl.png."""
    depth = max(len(result["levels"]) for result in results.values())
    table_1, details, rows = [], [], []
    for name, result in results.items():
        by_level = result["levels"]
        kl = [report.with_interval(level["per_sequence"]["kl"], 2) for level in by_level]
        table_1.append([name, result["frames"], *kl, *["-"] * (depth - len(kl))])
        for number, level in enumerate(by_level):
            per_tick = [report.with_interval(level["per_tick"][term], 3) for term in TERMS]
            details.append([name, number, level["ticks"], *per_tick])
            for unit, term in itertools.product(("per_sequence", "per_tick"), TERMS):
                rows.append([name, result["frames"], number, level["ticks"], term, unit, *level[unit][term].values()])
    header = ["model", "frames", *(f"level {level}" for level in range(depth))]
    markdown = (
        "KL(posterior, prior) in nats per sequence (Table 1), average over the sequences and 95 % interval:\n\n"
        + report.to_markdown(header, table_1)
        + "\nIn nats per tick:\n\n"
        + report.to_markdown(["model", "level", "ticks", *TERMS.values()], details)
    )
    bars = {
        f"level {level}": {
            name: tuple(result["levels"][level]["per_sequence"]["kl"].values())
            for name, result in results.items()
            if level < len(result["levels"])
        }
        for level in range(depth)
    }
    pictures.plot_bars(bars, directory / "kl.png", "KL, nats per sequence")
    csv_header = ["model", "frames", "level", "ticks", "term", "unit", "value", "low", "high"]
    report.write(directory / "levels.csv", report.to_csv(csv_header, rows))
    report.write(directory / "levels.md", markdown)
    report.write(directory / "levels.json", report.to_json(results))
    print(f"\n{markdown}\nResults: {directory}")


# ---------------------------------------------------------------------------------------------- blind levels


def blind(arguments: Sequence[str]) -> None:
    """Draws open-loop predictions of one sequence with each subset of levels blind: blind.png, blind.gif, blind.npz."""
    runs, given = parse_runs(
        "blind",
        arguments,
        example="number of the test sequence (default: 0)",
        blind_ctx="context frames where the top level is blind (default: 8, as in the paper; else open_loop_ctx)",
    )
    run = single("blind", runs)
    number, blind_context = whole(given, "example", 0, at_least=0), whole(given, "blind_ctx", 8)
    worker = Worker(run)
    if number >= len(worker.test):
        raise ConfigError(f"example: there are {len(worker.test)} test sequences; name one from 0, got {number}")
    video = worker.test[number]
    if blind_context >= len(video):
        raise ConfigError(f"blind_ctx: must be less than the sequence's {len(video)} frames, got {blind_context}")
    directory = directory_for("blind", runs, given)
    rows, context = {"truth": video}, {}
    for use_obs in itertools.product("TF", repeat=run.config.levels):
        hidden = [str(level) for level, letter in enumerate(use_obs) if letter == "F"]
        name = f"blind {' '.join(hidden)}" if hidden else "sees all"
        context[name] = run.config.open_loop_ctx if use_obs[-1] == "T" else blind_context
        rows[name] = predict_blind(worker, number, video, context[name], "".join(use_obs))
    times = np.unique(np.linspace(0, len(video) - 1, 16).astype(int))
    pictures.save_rows(rows, directory / "blind.png", times, context)
    pictures.save_gif(pictures.side_by_side(rows, context), directory / "blind.gif")
    arrays: Any = {name.replace(" ", "_"): frames for name, frames in rows.items()}
    np.savez(directory / "blind.npz", **arrays)
    print(f"Results: {directory}")


def predict_blind(worker: Worker, number: int, video: np.ndarray, context: int, use_obs: str) -> np.ndarray:
    """Reconstruction and prediction of a test sequence uint8 [T, H, W, C], with the same noise for each `use_obs`."""
    noise = cwvae.draw_noise(worker.config, worker.keys(number, 1), len(video))
    predict = jax.jit(
        lambda params, seen, noise: worker.model.apply(
            params, seen, len(video) - context, noise, use_obs, method="predict_by_level"
        )
    )
    return np.asarray(tools.to_uint8(predict(worker.params, video[None, :context], noise)))[0]


# ---------------------------------------------------------------------------------------------- readouts


def digits(arguments: Sequence[str]) -> None:
    """Accuracy of the digits' identities in predicted frames over time (Figure 5b): digits.png, .json, .csv.

    Each frame counts by itself: right if the classifier finds the truth's digits in it, in any order. Frames where
    digits hide each other can't all be read: the same figure for the true frames is the ceiling.
    """
    runs, given = parse_runs("digits", arguments)
    train_set, test_set = (digit_windows(run.config, split) for run, split in ((runs[0], "train"), (runs[0], "test")))
    for run in runs[1:]:
        same_readout(runs[0], run, ("dataset", "num_digits", "digit_speed", "eval_seq_len", "open_loop_ctx"))
    workers = [Worker(run) for run in runs]
    print(f"Training a classifier of {runs[0].config.num_digits} digits")
    read = readouts.train_digit_reader(train_set)
    clean, total = readouts.clean_accuracy(read, test_set)
    print(f"It reads {100 * clean:.2f} % of {total} true test frames without overlap")
    if clean < readouts.NEEDED_ACCURACY:
        raise ConfigError(
            f"digits: the classifier reads {100 * clean:.2f} % of true frames; below "
            f"{100 * readouts.NEEDED_ACCURACY:.0f} % nothing is drawn, since errors would be its own"
        )
    directory = directory_for("digits", runs, given)
    results: dict[str, Any] = {}
    truth: list[np.ndarray] = []
    for run, worker in zip(runs, workers, strict=True):
        rights, upper = [], []
        for first, valid, video in worker.batches():
            labels = np.stack([test_set.digits_in(first + row) for row in range(valid)])
            if run is runs[0]:
                truth.append(readouts.right_digits(read, video[:valid, run.config.open_loop_ctx :], labels))
            samples = (
                readouts.right_digits(read, worker.predictions(video, first, sample)[:valid], labels)
                for sample in range(run.config.num_samples)
            )
            rights.append(np.mean(list(samples), axis=0))
            upper.append(readouts.right_digits(read, worker.reconstructions(video, first)[:valid], labels))
        results[run.name] = report.summary(np.concatenate(rights))
        results[f"{run.name}, {POSTERIOR}"] = report.summary(np.concatenate(upper))
    lines = accuracy_lines(runs, results)
    results["true frames"] = report.summary(np.concatenate(truth))
    chance = readouts.chance(train_set)
    lines["true frames"] = pictures.Line(np.array(results["true frames"]["curve"]["value"]), reference=True)
    lines["chance"] = pictures.Line(np.full(len(lines["true frames"].values), chance), reference=True)
    pictures.plot_lines(lines, directory / "digits.png", "accuracy of the digits' identities")
    more = {"classifier_accuracy_on_clean_frames": clean, "clean_frames": total, "chance": chance}
    write_readout("digits", results, directory, more)


POSTERIOR = report.REFERENCES["posterior"]


def accuracy_line(summary: Mapping[str, Any]) -> pictures.Line:
    curve = {key: np.array(values) for key, values in summary["curve"].items()}
    return pictures.Line(curve["value"], curve["low"], curve["high"])


def accuracy_lines(runs: Sequence[Run], results: Mapping[str, Any]) -> dict[str, pictures.Line]:
    """Each run's line, and dotted beside it the one of its posterior reconstruction."""
    lines = {run.name: accuracy_line(results[run.name]) for run in runs}
    for run in runs:
        name = f"{run.name}, {POSTERIOR}"
        lines[name] = pictures.Line(np.array(results[name]["curve"]["value"]), beside=run.name)
    return lines


def digit_windows(config: Config, split: str) -> data.MovingDigits:
    """Windows that know their digits.

    Raises:
        ConfigError: the dataset has no labels.
    """
    if config.dataset not in ("digits", "mnist"):
        raise ConfigError(
            f"dataset: {config.dataset} doesn't say which digits its videos show; a model of mmnist can be analysed on "
            "MNIST's moving digits with --dataset mnist --datadir DIRECTORY of MNIST's idx files"
        )
    windows = data.windows(config, split)
    assert isinstance(windows, data.MovingDigits)
    return windows


def same_readout(a: Run, b: Run, keys: Sequence[str]) -> None:
    """Raises ConfigError unless two runs are read on the same test sequences."""
    for key in keys:
        x, y = getattr(a.config, key), getattr(b.config, key)
        if x != y:
            raise ConfigError(f"{key}: {a.name} has {x}, {b.name} {y}; set the same --{key} for all runs")


def rooms(arguments: Sequence[str]) -> None:
    """Whether predicted videos visit the same rooms as the true ones, by their colours (Figure 5a): rooms.png, .json,
    .csv. See `readouts.visits` for what a room is."""
    runs, given = parse_runs("rooms", arguments)
    for run in runs:
        same_readout(runs[0], run, ("dataset", "eval_seq_len", "open_loop_ctx"))
        if run.config.channels != 3:
            raise ConfigError(f"dataset: {run.config.dataset} has no colours; rooms are read from those of mazes")
    workers = [Worker(run) for run in runs]
    directory = directory_for("rooms", runs, given)
    found: dict[str, list[readouts.Rooms]] = {}
    copies: list[readouts.Rooms] = []
    for run, worker in zip(runs, workers, strict=True):
        context = run.config.open_loop_ctx
        own, upper = found.setdefault(run.name, []), found.setdefault(f"{run.name}, {POSTERIOR}", [])
        for first, valid, video in worker.batches():
            samples = [worker.predictions(video, first, sample) for sample in range(run.config.num_samples)]
            reconstruction = worker.reconstructions(video, first)
            for row in range(valid):
                own.append(readouts.compare_rooms(video[row], [frames[row] for frames in samples], context))
                upper.append(readouts.compare_rooms(video[row], [reconstruction[row]], context))
                if run is runs[0]:
                    last = np.broadcast_to(video[row, context - 1], video[row, context:].shape)
                    copies.append(readouts.compare_rooms(video[row], [last], context))
    found[report.REFERENCES["copy"]] = copies
    curves = {name: report.summary(np.stack([read.agreement for read in reads])) for name, reads in found.items()}
    shares = {name: readouts.category_accuracy(reads) for name, reads in found.items()}
    groups = {
        f"{category} ({copied['sequences']})": {
            name: (share[category]["value"], share[category]["low"], share[category]["high"])
            for name, share in shares.items()
        }
        for category, copied in shares[report.REFERENCES["copy"]].items()
    }
    pictures.plot_bars(groups, directory / "rooms.png", "accuracy of the sequence of rooms")
    lines = accuracy_lines(runs, curves)
    lines[report.REFERENCES["copy"]] = pictures.Line(
        np.array(curves[report.REFERENCES["copy"]]["curve"]["value"]), reference=True
    )
    pictures.plot_lines(lines, directory / "rooms_over_time.png", "share of frames in the true room")
    write_readout("rooms", curves, directory, {"sequences": shares})


def write_readout(kind: str, results: Mapping[str, Any], directory: Path, more: Mapping[str, Any]) -> None:
    """`report.summary`s by name as `<kind>.json` and `<kind>.csv`, printed."""
    lines = {"accuracy": {kind: results}}
    report.write(directory / f"{kind}.csv", report.to_csv(report.CSV_HEADER, report.csv_rows(lines)))
    report.write(directory / f"{kind}.json", report.to_json({**more, "lines": results}))
    print()
    for name, summary in results.items():
        first = "".join(f", first {d}: {value['value']:.3f}" for d, value in summary["first"].items())
        print(f"{name}: {report.with_interval(summary['average'], 3)}{first}")
    print(f"Results: {directory}")


# ---------------------------------------------------------------------------------------------- models to share


def export(arguments: Sequence[str]) -> None:
    """Writes a run of the configuration and one checkpoint, for evaluation: a fifth of the size.

    Parameters are rounded to half precision's digits and Adam's state is zero, which Orbax's compression makes use of.
    """
    runs, given = parse_runs("export", arguments)
    run = single("export", runs)
    state = evaluation.load_state(CWVAE(run.config), run.checkpoint)
    with np.errstate(over="ignore"):  # refused below
        params = jax.tree.map(lambda x: np.asarray(x, np.float16).astype(x.dtype), state.params)
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(params)):
        raise ConfigError(f"{run.checkpoint.run} has parameters beyond half precision's range; share the run itself")
    directory = directory_for("export", runs, given)
    default = Config()
    dataclasses.replace(run.config, datadir=default.datadir, logdir=default.logdir).save(directory / "config.yml")
    with Checkpoints(directory / "checkpoints") as checkpoints:
        checkpoints.save(
            run.checkpoint.step,
            dataclasses.replace(state, params=params, opt_state=jax.tree.map(np.zeros_like, state.opt_state)),
        )
    with Checkpoints(directory / "checkpoints") as checkpoints:
        if not checkpoints.steps:
            raise ConfigError(f"{directory} couldn't be written; make room, or choose another --out")
    print(f"Evaluate it with: python eval.py --logdir {directory}")


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "levels": (levels, "KL and entropies per level, and the latents (Table 1, Figure 8)"),
    "blind": (blind, "Open-loop predictions with levels that don't see the context (Figure 7)"),
    "digits": (digits, "Which digits predicted frames show (Figure 5b)"),
    "rooms": (rooms, "Which rooms predicted videos visit (Figure 5a)"),
    "export": (export, "A small copy of a run, to share"),
    "compare": (comparisons.compare, "Quality over distance of several evaluations (Figure 1)"),
    "ranks": (comparisons.ranks, "Average ranks over several comparisons (Figure 5c)"),
    "curves": (comparisons.curves, "Losses over the steps of several trainings"),
}


def main() -> None:
    with exit_codes(), Interrupts():
        train.use_compilation_cache()
        command, *arguments = sys.argv[1:] or ["--help"]
        if command in ("-h", "--help"):
            print(__doc__)
            print("python analysis.py <command> --help lists a command's flags.")
            return
        configuration.choose("command", command, list(COMMANDS))
        COMMANDS[command][0](arguments)


if __name__ == "__main__":
    main()

"""The results of an evaluation: frames and metrics of each example; then curves, tables, plots, videos and a page."""

import dataclasses
import datetime
import importlib.metadata
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import tools
from config import Config, ConfigError
from metrics import similarity
from report import plots, statistics, tables
from report.output import FIGURES, VIDEOS, Formats
from report.page import Example, Row, evaluation_page
from system import logs
from system.files import load_arrays, replace_arrays
from training import loading, runs

# ---------------------------------------------------------------------------------------------- examples


def metrics_file(directory: Path, number: int) -> Path:
    """Return the path of an example's metrics, which are written last."""
    return directory / f"sample{number}" / "metrics.npz"


def is_done(directory: Path, number: int) -> bool:
    """Return whether all files of an example are written."""
    return metrics_file(directory, number).exists()


def save_example(
    config: Config,
    directory: Path,
    number: int,
    video: np.ndarray,
    predictions: Mapping[str, np.ndarray],
    metrics: Mapping[str, np.ndarray],
) -> None:
    """Write the frames and metrics of an example.

    Args:
        config: of the evaluation.
        directory: the directory of the evaluation.
        number: the number of the example.
        video: the truth with its context, uint8 [T, H, W, C].
        predictions: the reconstructed "context" and the predictions by name, uint8 [., H, W, C].
        metrics: the metrics of each predicted frame by name, [T - open_loop_ctx].
    """
    context = config.open_loop_ctx
    for name, frames in {"gt_ctx": video[:context], "gt_pred": video[context:], **predictions}.items():
        path = frames_file(directory, number, name)
        path.parent.mkdir(exist_ok=True)
        tools.save_frames(frames, path)
        if not config.no_save_grid:
            tools.save_grid(frames, path.with_suffix(".png"))
    save_metrics(directory, number, metrics)


def frames_file(directory: Path, number: int, name: str) -> Path:
    """Return the path of an example's frames: `gt_ctx`, `gt_pred`, `context` (reconstructed) or a prediction."""
    return directory / (f"sample{number}_gt" if name.startswith("gt_") else f"sample{number}") / f"{name}.npz"


def load_frames(directory: Path, number: int, name: str) -> np.ndarray:
    """Return an example's frames, uint8 [T, H, W, C]; names are as for `frames_file`."""
    return load_arrays(frames_file(directory, number, name), ["arr_0"], remedy(directory, number))["arr_0"]


def remedy(directory: Path, number: int) -> str:
    """Return what the user should do about a damaged file of an example."""
    return f"delete {metrics_file(directory, number).parent}, and evaluate again"


def video_names(config: Config) -> dict[str, str]:
    """Return the predictions that are shown as videos: label on the page -> name for `frames_file`."""
    if config.num_samples == 1:
        return {"prediction": "random_sample_1"}
    return {"first sample": "random_sample_1", "best sample": "best_ssim_sample"}


def with_context(directory: Path, number: int, name: str) -> np.ndarray:
    """Return `gt_pred` with its context, or a prediction with the reconstructed context, uint8 [T, H, W, C]."""
    context = "gt_ctx" if name == "gt_pred" else "context"
    return np.concatenate([load_frames(directory, number, kind) for kind in (context, name)])


def example_video(config: Config, directory: Path, number: int, name: str) -> np.ndarray:
    """Return a video of an example's truth, prediction and absolute error; see `tools.triptych`."""
    truth, prediction = (with_context(directory, number, kind)[None] for kind in ("gt_pred", name))
    return tools.triptych(truth, prediction, config.open_loop_ctx)


# ---------------------------------------------------------------------------------------------- all examples


def line_names(config: Config) -> dict[str, str]:
    """Return the lines of plots and tables: name -> suffix of the keys of an example's metrics."""
    N = config.num_samples
    own = {"prediction": ""} if N == 1 else {f"best of {N}": "", f"mean of {N}": "_mean"}
    return own | {name: f"_{key}" for key, name in statistics.REFERENCES.items()}


def load_metrics(directory: Path, number: int) -> dict[str, np.ndarray]:
    """Return an example's metrics of each predicted frame, [T] each."""
    return load_arrays(metrics_file(directory, number), remedy=remedy(directory, number))


def save_metrics(directory: Path, number: int, metrics: Mapping[str, np.ndarray]) -> None:
    """Write an example's metrics of each predicted frame, [T] each."""
    replace_arrays(metrics_file(directory, number), **metrics)


def summarise(
    config: Config,
    checkpoint: loading.Checkpoint,
    stages: Sequence[int] | None,
    directory: Path,
    count: int,
    formats: Formats,
    all_videos: bool,
    perceptual: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write tables, plots, videos and the page of an evaluation, from the files of its examples.

    Args:
        config, checkpoint: what was evaluated.
        stages: the steps of earlier trainings, as `loading.stages_before` returns them.
        directory: the directory of the evaluation.
        count: the number of examples.
        formats: the formats of figures and videos.
        all_videos: whether videos of all examples are written.
        perceptual: what `metrics.perceptual.summarise` returns.

    Returns:
        The content of `metrics.json`.
    """
    figures = figure_formats(formats)
    examples = [load_metrics(directory, number) for number in range(count)]
    shown = {name: suffix for name, suffix in line_names(config).items() if f"paper_ssim{suffix}" in examples[0]}
    lines: dict[str, Any] = {}
    averages: dict[str, dict[str, float]] = {}
    for protocol in similarity.PROTOCOLS:
        averages[protocol], lines[protocol] = {}, {}
        for metric, label in statistics.METRICS.items():
            key = f"{protocol}_{metric}"
            curves = {name: np.stack([e[key + suffix] for e in examples]) for name, suffix in shown.items()}
            averages[protocol][metric] = float(next(iter(curves.values())).mean())
            lines[protocol][metric] = {name: statistics.summary(values) for name, values in curves.items()}
            draw_curves(curves, lines[protocol][metric], directory, metric, protocol, label, figures)
    means = example_averages(examples)
    results = {
        "averages": averages,
        "num_examples": count,
        "predicted_frames": len(examples[0]["paper_ssim"]),
        "checkpoint_step": checkpoint.step,
        "provenance": provenance(checkpoint, stages),
        "protocols": similarity.PROTOCOLS,
        "lines": lines,
        "videos": {},
        "examples": [],
        "config": dataclasses.asdict(config),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
        | {"python": sys.version.split()[0], "device": jax.devices()[0].device_kind},
    }
    if config.save_gifs:
        results |= draw_videos(config, directory, means, formats, all_videos)
    add_perceptual(config, directory, results, perceptual or {}, examples, figures)
    write_results(directory, results, means)
    return results


def provenance(checkpoint: loading.Checkpoint, stages: Sequence[int] | None) -> dict[str, Any]:
    """Return where results come from: run, earlier stages, date of the evaluation, and commit of this code."""
    return {
        "run": checkpoint.run.resolve().name,
        "stages": stages,
        "date": f"{datetime.date.today()}",
        "commit": commit(),
    }


def commit() -> str:
    """Return the commit of this code, with `-dirty` after it if files have been changed."""
    source = Path(__file__).parent.parent
    if not (source / ".git").exists():  # git would search the parent directories
        return "unknown, since the code isn't in a git repository"
    command = ["git", "-C", str(source), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown, since git failed ({' '.join(str(error).split())})"


def figure_formats(formats: Formats) -> tuple[str, ...]:
    """Return the formats of an evaluation's figures, which include PNG for the page."""
    return tuple({"png": None} | dict.fromkeys(formats.figures))


def add_perceptual(
    config: Config,
    directory: Path,
    results: dict[str, Any],
    perceptual: Mapping[str, Any],
    examples: Sequence[Mapping[str, np.ndarray]],
    formats: Sequence[str],
) -> None:
    """Add LPIPS and FVD to the content of `metrics.json`, and write the plots of LPIPS.

    Args:
        config: of the evaluation.
        directory: the directory of the evaluation.
        results: the content of `metrics.json`, which is changed in place.
        perceptual: what `metrics.perceptual.summarise` returns.
        examples: the metrics of each example.
        formats: the formats of figures.
    """
    if not perceptual:
        return
    results["perceptual"] = results.get("perceptual", {}) | perceptual
    averages = results["averages"].setdefault("perceptual", {})
    if "lpips" in perceptual:
        names = {name: f"perceptual_lpips{suffix}" for name, suffix in line_names(config).items()}
        curves = {name: np.stack([e[key] for e in examples]) for name, key in names.items() if key in examples[0]}
        averages["lpips"] = float(next(iter(curves.values())).mean())
        lines = {name: statistics.summary(values) for name, values in curves.items()}
        results["lines"]["perceptual"] = {"lpips": lines}
        draw_curves(curves, lines, directory, "lpips", "perceptual", "LPIPS", formats)
    if "fvd" in perceptual:
        averages["fvd"] = perceptual["fvd"]["frames"][str(results["predicted_frames"])]


def write_results(directory: Path, results: Mapping[str, Any], means: Sequence[Mapping[str, float]]) -> None:
    """Write tables, page and `metrics.json`.

    Args:
        directory: the directory of the evaluation.
        results: the content of `metrics.json`.
        means: of `example_averages`.
    """
    figures = [f"{metric}_{protocol}.png" for protocol, metrics in results["lines"].items() for metric in metrics]
    rows = [*tables.csv_rows(results["lines"]), *tables.fvd_rows(results)]
    tables.write(directory / "examples.csv", examples_csv(means))
    tables.write(directory / "metrics.csv", tables.to_csv(tables.CSV_HEADER, rows))
    listed = [
        Row(
            mean,
            [
                str(path.relative_to(directory))
                for kind in ("_gt", "")
                for path in result_files(directory / f"sample{i}{kind}")
            ],
        )
        for i, mean in enumerate(means)
    ]
    own = {path.name for path in result_files(directory)} - {*figures, "index.html"} | {"metrics.json"}
    tables.write(directory / "index.html", evaluation_page(results, figures, sorted(own), listed))
    tables.write(directory / "metrics.json", tables.to_json(results))  # last: it marks the evaluation as finished


def result_files(directory: Path) -> list[Path]:
    """Return the files of results in a directory, without those in its subdirectories."""
    kinds = {".npz", ".csv", ".json", ".yml", ".md", ".html", *(f".{kind}" for kind in (*FIGURES, *VIDEOS))}
    return sorted(path for path in directory.iterdir() if path.suffix in kinds and not path.name.startswith("."))


def example_averages(examples: Sequence[Mapping[str, np.ndarray]]) -> list[dict[str, float]]:
    """Return each example's metrics, averaged over the predicted frames."""
    return [{key: float(values.mean()) for key, values in example.items()} for example in examples]


def draw_curves(
    curves: Mapping[str, np.ndarray],
    lines: Mapping[str, Any],
    directory: Path,
    metric: str,
    protocol: str,
    label: str,
    formats: Sequence[str],
) -> None:
    """Write plots of a metric over the predicted frames, and its mean and standard deviation as NPZ.

    Args:
        curves: name of a line -> [N, T].
        lines: name of a line -> `statistics.summary`.
        directory: the directory of the evaluation.
        metric, protocol: for the names of the files.
        label: the label of the y-axis.
        formats: the formats of figures.
    """
    stem = metric if protocol == "paper" else f"{metric}_{protocol}"  # the paper's protocol: as in the earlier codes
    label = f"{label}, {protocol} protocol" if protocol in similarity.PROTOCOLS else label
    own, values = next(iter(curves.items()))
    mean, stddev = values.mean(0), values.std(0)
    replace_arrays(directory / f"{stem}_mean.npz", mean)
    replace_arrays(directory / f"{stem}_stddev.npz", stddev)
    drawn = plots.metric_lines(lines)
    plots.plot_lines(drawn, directory / f"{metric}_{protocol}.png", label, formats=formats)
    spread = {name: line for name, line in drawn.items() if line.reference}
    spread = {own: plots.Line(mean, mean - stddev, mean + stddev)} | spread
    plots.plot_lines(spread, directory / f"{stem}_range.png", label, "standard deviation", formats=formats)


def examples_csv(means: Sequence[Mapping[str, float]]) -> str:
    """Return a CSV table with a row per example: each metric, averaged over the predicted frames."""
    keys = list(means[0])
    rows = ([number, *(f"{mean[key]:.6g}" for key in keys)] for number, mean in enumerate(means))
    return tables.to_csv(["example", *keys], rows)


FIRST_EXAMPLES = 4
"""The number of first examples that a page shows."""


def draw_videos(
    config: Config, directory: Path, means: Sequence[Mapping[str, float]], formats: Formats, all_videos: bool
) -> dict[str, Any]:
    """Write sheets of the examples that the page shows, and videos of these or of all examples.

    The page shows the best, the median and the worst example (by SSIM in the paper's protocol), and the first ones.

    Returns:
        "examples": the entries of a `page.Example` for each; "videos": caption -> path, for the best, the median and
        the worst example.
    """
    order = sorted(range(len(means)), key=lambda number: -means[number]["paper_ssim"])
    chosen = {"best": order[0], "median": order[len(order) // 2], "worst": order[-1]}
    shown = list(dict.fromkeys([*chosen.values(), *range(min(FIRST_EXAMPLES, len(means)))]))
    for number in range(len(means)) if all_videos else shown:
        for name in video_names(config).values():
            path = directory / f"sample{number}" / f"{name}.gif"
            tools.save_video(example_video(config, directory, number, name), path, formats.videos)
    captions = {number: f"Example {number}" for number in shown}
    for number in set(chosen.values()):
        captions[number] += f": {', '.join(rank for rank, of in chosen.items() if of == number)}"
    videos = {
        f"{rank}: example {number}, {name.replace('_', ' ')}": f"sample{number}/{name}.{formats.videos[0]}"
        for rank, number in chosen.items()
        for name in video_names(config).values()
    }
    examples = [draw_example(config, directory, number, captions[number], formats.videos) for number in shown]
    return {"videos": videos, "examples": [example._asdict() for example in examples]}


def draw_example(config: Config, directory: Path, number: int, caption: str, videos: Sequence[str]) -> Example:
    """Write the sheets of an example's truth and predictions; return the example for the page."""
    sheets, names = {}, video_names(config)
    for label, name in {"truth": "gt_pred", **names}.items():
        path = frames_file(directory, number, name).with_name(f"{name}_sheet.png")
        tools.save_grid(with_context(directory, number, name), path)
        sheets[label] = str(path.relative_to(directory))
    return Example(caption, sheets, [f"sample{number}/{name}.{kind}" for name in names.values() for kind in videos])


def print_table(results: Mapping[str, Any]) -> None:
    """Print a table of averages over all predicted frames, for each protocol."""
    count = results["num_examples"]
    print(
        f"\nAverages over {count} sequence{'s' * (count > 1)} and {results['predicted_frames']} predicted frames, "
        f"step {results['checkpoint_step']}{', with 95 % confidence intervals' * (count > 1)}:\n"
    )
    for protocol in results["protocols"]:
        by_metric = results["lines"][protocol]
        print(f"{protocol:<26}", *(f"{statistics.NAMES[metric]:>25}" for metric in by_metric))
        for line in next(iter(by_metric.values())):
            averages = (
                tables.with_interval(lines[line]["average"], statistics.DIGITS[metric])
                for metric, lines in by_metric.items()
            )
            print(f"  {line:<24}", *(f"{average:>25}" for average in averages))
        print()
    print_perceptual(results)


def print_perceptual(results: Mapping[str, Any]) -> None:
    """Print LPIPS and FVD, if they were measured."""
    for line, figures in results["lines"].get("perceptual", {}).get("lpips", {}).items():
        print(f"LPIPS, {line}: {tables.with_interval(figures['average'], statistics.DIGITS['lpips'])}")
    if fvd := results.get("perceptual", {}).get("fvd"):
        for frames, value in fvd["frames"].items():
            print(f"FVD, {frames} frames, {fvd['clips']} clips: {value:.{statistics.DIGITS['fvd']}f}")
    if "perceptual" in results:
        print()


def log_to_wandb(config: Config, run: Path, directory: Path, results: Mapping[str, Any]) -> None:
    """Add averages and videos to the run's wandb run, if there is one and wandb isn't disabled.

    Nothing is added while the run is being trained, since two processes can't write to one wandb run. Failures are
    printed, not raised.
    """
    if config.wandb == "disabled" or not (run / "wandb_id").exists():
        return
    try:
        with runs.locked(run), logs.wandb_session():
            wandb_run = logs.start_wandb(config, run)
            if wandb_run is None:
                return
            import wandb

            averages = {
                f"evaluation/{protocol}_{metric}": value
                for protocol, metrics in results["averages"].items()
                for metric, value in metrics.items()
            }
            videos = {
                f"evaluation/{name}": wandb.Video(str(directory / path)) for name, path in results["videos"].items()
            }
            trained = max(map(logs.step_of, logs.read_lines(run / "metrics.jsonl")), default=0)
            # wandb drops metrics of a step before its last one.
            step = max(wandb_run.step, trained + 1)
            wandb_run.log({**averages, "evaluation/checkpoint_step": results["checkpoint_step"], **videos}, step=step)
    except ConfigError as error:
        print(f"wandb: the evaluation isn't logged, since {error}")
    except Exception as error:  # wandb raises many kinds
        logs.warn_of_wandb(error, "the evaluation isn't logged there")

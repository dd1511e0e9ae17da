"""What an evaluation leaves: each example's frames and metrics; then curves, tables, plots, videos and a page."""

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
    """Return the path of one example's metrics, [T] each: what is written last of it."""
    return directory / f"sample{number}" / "metrics.npz"


def is_done(directory: Path, number: int) -> bool:
    return metrics_file(directory, number).exists()


def save_example(
    config: Config,
    directory: Path,
    number: int,
    video: np.ndarray,
    predictions: Mapping[str, np.ndarray],
    metrics: Mapping[str, np.ndarray],
) -> None:
    """Write one example's truth uint8 [T, H, W, C], its predictions (and reconstructed context), and metrics [T]."""
    context = config.open_loop_ctx
    for name, frames in {"gt_ctx": video[:context], "gt_pred": video[context:], **predictions}.items():
        path = frames_file(directory, number, name)
        path.parent.mkdir(exist_ok=True)
        tools.save_frames(frames, path)
        if not config.no_save_grid:
            tools.save_grid(frames, path.with_suffix(".png"))
    save_metrics(directory, number, metrics)


def frames_file(directory: Path, number: int, name: str) -> Path:
    """Return the path of an example's `gt_ctx`, `gt_pred`, reconstructed `context` or one of its predictions."""
    return directory / (f"sample{number}_gt" if name.startswith("gt_") else f"sample{number}") / f"{name}.npz"


def load_frames(directory: Path, number: int, name: str) -> np.ndarray:
    """Return an example's frames of one of the names that `frames_file` takes, uint8 [T, H, W, C]."""
    return load_arrays(frames_file(directory, number, name), ["arr_0"], remedy(directory, number))["arr_0"]


def remedy(directory: Path, number: int) -> str:
    """Return what to do about a damaged file of an example."""
    return f"delete {metrics_file(directory, number).parent}, and evaluate again"


def video_names(config: Config) -> dict[str, str]:
    """Return what the page calls an example's predictions that are shown as videos -> their names."""
    if config.num_samples == 1:
        return {"prediction": "random_sample_1"}
    return {"first sample": "random_sample_1", "best sample": "best_ssim_sample"}


def with_context(directory: Path, number: int, name: str) -> np.ndarray:
    """Return `gt_pred` after its context, or a prediction after the reconstructed one, uint8 [T, H, W, C]."""
    context = "gt_ctx" if name == "gt_pred" else "context"
    return np.concatenate([load_frames(directory, number, part) for part in (context, name)])


def example_video(config: Config, directory: Path, number: int, name: str) -> np.ndarray:
    """Return an example's truth, prediction and absolute error, see `tools.triptych`."""
    truth, prediction = (with_context(directory, number, part)[None] for part in ("gt_pred", name))
    return tools.triptych(truth, prediction, config.open_loop_ctx)


# ---------------------------------------------------------------------------------------------- all examples


def line_names(config: Config) -> dict[str, str]:
    """Return the names of the lines in plots and tables -> what ends their keys in an example's metrics."""
    N = config.num_samples
    own = {"prediction": ""} if N == 1 else {f"best of {N}": "", f"mean of {N}": "_mean"}
    return own | {name: f"_{key}" for key, name in statistics.REFERENCES.items()}


def load_metrics(directory: Path, number: int) -> dict[str, np.ndarray]:
    """Return one example's metrics, [T] each."""
    return load_arrays(metrics_file(directory, number), remedy=remedy(directory, number))


def save_metrics(directory: Path, number: int, metrics: Mapping[str, np.ndarray]) -> None:
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
    """Write what is told of all examples, from their files. Returns what `metrics.json` holds.

    Args:
        config, checkpoint: what was evaluated.
        stages: before the checkpoint's training, as `loading.stages_before` returns them.
        directory: where to.
        count: how many examples there are.
        formats: of figures and videos.
        all_videos: whether each example has videos.
        perceptual: what `perceptual.measured` returns.
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
    means = averages_of(examples)
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
    """Return which run a checkpoint is of, the stages before, and when and by which commit it is evaluated."""
    return {
        "run": checkpoint.run.resolve().name,
        "stages": stages,
        "date": f"{datetime.date.today()}",
        "commit": commit(),
    }


def commit(source: Path = Path(__file__).parent.parent) -> str:
    """Return the commit of these programs, with `-dirty` behind it if files differ from it."""
    if not (source / ".git").exists():  # git would look for one above
        return "unknown, since the programs aren't in a git repository"
    command = ["git", "-C", str(source), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown, since git failed ({' '.join(str(error).split())})"


def figure_formats(formats: Formats) -> tuple[str, ...]:
    """Return the formats of an evaluation's figures: also PNG, which the page shows."""
    return tuple({"png": None} | dict.fromkeys(formats.figures))


def add_perceptual(
    config: Config,
    directory: Path,
    results: dict[str, Any],
    perceptual: Mapping[str, Any],
    examples: Sequence[Mapping[str, np.ndarray]],
    formats: Sequence[str],
) -> None:
    """Add what `perceptual.measured` returns to what `metrics.json` holds: LPIPS with the examples' curves."""
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
    """Write the tables and the page of what `metrics.json` holds, and that file itself."""
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
    tables.write(directory / "metrics.json", tables.to_json(results))  # last: with it, the evaluation is finished


def result_files(directory: Path) -> list[Path]:
    """Return the files of results in a directory, without those in directories below it."""
    kinds = {".npz", ".csv", ".json", ".yml", ".md", ".html", *(f".{kind}" for kind in (*FIGURES, *VIDEOS))}
    return sorted(path for path in directory.iterdir() if path.suffix in kinds and not path.name.startswith("."))


def averages_of(examples: Sequence[Mapping[str, np.ndarray]]) -> list[dict[str, float]]:
    """Return the examples' metrics, averaged over the predicted frames."""
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
    """Write one metric's curves [N, T] over the predicted frames: plots, and the arrays of the earlier codes."""
    stem = metric if protocol == "paper" else f"{metric}_{protocol}"  # named as in the earlier codes
    label = f"{label}, {protocol} protocol" if protocol in similarity.PROTOCOLS else label
    own, values = next(iter(curves.items()))
    mean, stddev = values.mean(0), values.std(0)
    replace_arrays(directory / f"{stem}_mean.npz", mean)
    replace_arrays(directory / f"{stem}_stddev.npz", stddev)
    drawn = plots.drawn(lines)
    plots.plot_lines(drawn, directory / f"{metric}_{protocol}.png", label, formats=formats)
    spread = {name: line for name, line in drawn.items() if line.reference}
    spread = {own: plots.Line(mean, mean - stddev, mean + stddev)} | spread
    plots.plot_lines(spread, directory / f"{stem}_range.png", label, "standard deviation", formats=formats)


def examples_csv(means: Sequence[Mapping[str, float]]) -> str:
    """Return a table with one row per example: each metric, averaged over the predicted frames."""
    keys = list(means[0])
    rows = ([number, *(f"{mean[key]:.6g}" for key in keys)] for number, mean in enumerate(means))
    return tables.to_csv(["example", *keys], rows)


FIRST = 4
"""How many of the first examples a page shows."""


def draw_videos(
    config: Config, directory: Path, means: Sequence[Mapping[str, float]], formats: Formats, all_videos: bool
) -> dict[str, Any]:
    """Write the examples that the page shows: the best, the median, the worst and the first ones; and videos of them,
    or of all.

    Returns:
        "examples": captions and sheets, as `page.Example` has them; "videos": captions and paths of the first three.
    """
    order = sorted(range(len(means)), key=lambda number: -means[number]["paper_ssim"])
    chosen = {"best": order[0], "median": order[len(order) // 2], "worst": order[-1]}
    shown = list(dict.fromkeys([*chosen.values(), *range(min(FIRST, len(means)))]))
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
    """Write the sheets of an example's truth and predictions; return what the page shows, with videos in formats."""
    sheets, names = {}, video_names(config)
    for label, name in {"truth": "gt_pred", **names}.items():
        path = frames_file(directory, number, name).with_name(f"{name}_sheet.png")
        tools.save_grid(with_context(directory, number, name), path)
        sheets[label] = str(path.relative_to(directory))
    return Example(caption, sheets, [f"sample{number}/{name}.{kind}" for name in names.values() for kind in videos])


def print_table(results: Mapping[str, Any]) -> None:
    """Print the averages over all predicted frames."""
    count = results["num_examples"]
    print(
        f"\nAverages over {count} sequence{'s' * (count > 1)} and {results['predicted_frames']} predicted frames, "
        f"step {results['checkpoint_step']}{', with 95 % confidence intervals' * (count > 1)}:\n"
    )
    for protocol in results["protocols"]:
        print(f"{protocol:<10} {'SSIM':>25} {'PSNR (dB)':>25}")
        for line in results["lines"][protocol]["ssim"]:
            ssim, psnr = (results["lines"][protocol][metric][line]["average"] for metric in statistics.METRICS)
            print(f"  {line:<24} {tables.with_interval(ssim, 4):>25} {tables.with_interval(psnr, 2):>24}")
        print()
    print_perceptual(results)


def print_perceptual(results: Mapping[str, Any]) -> None:
    """Print LPIPS and FVD, as far as they were measured."""
    for line, figures in results["lines"].get("perceptual", {}).get("lpips", {}).items():
        print(f"LPIPS, {line}: {tables.with_interval(figures['average'], statistics.DIGITS['lpips'])}")
    if fvd := results.get("perceptual", {}).get("fvd"):
        for frames, value in fvd["frames"].items():
            print(f"FVD, {frames} frames, {fvd['clips']} clips: {value:.{statistics.DIGITS['fvd']}f}")
    if "perceptual" in results:
        print()


def log_to_wandb(config: Config, run: Path, directory: Path, results: Mapping[str, Any]) -> None:
    """Add averages and videos to the run's wandb run, if it has one and wandb isn't disabled.

    Not while the run is being trained, since two processes can't write one wandb run. No failure there is one here.
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
            # wandb drops what is logged for an earlier step than its last.
            step = max(wandb_run.step, trained + 1)
            wandb_run.log({**averages, "evaluation/checkpoint_step": results["checkpoint_step"], **videos}, step=step)
    except ConfigError as error:
        print(f"wandb: the evaluation isn't logged, since {error}")
    except Exception as error:  # whatever happens there
        print(f"Warning: wandb failed ({' '.join(str(error).split())}); the evaluation isn't logged there")

"""LPIPS and FVD of finished evaluations, from their saved frames."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import config as configuration
from analyses.arguments import parse_directories
from analyses.compare import EVALUATION_KEYS, find_results, read_json
from config import Config, ConfigError
from metrics import perceptual as perceptual_metrics
from report.output import FORMAT, formats, lock, writing
from report.results import (
    add_perceptual,
    example_averages,
    figure_formats,
    frames_file,
    load_frames,
    load_metrics,
    metrics_file,
    print_perceptual,
    save_metrics,
    write_results,
)


def perceptual(arguments: Sequence[str]) -> None:
    """Add LPIPS and FVD to finished evaluations, with the same results as `eval.py --lpips FILE --fvd FILE`.

    In their directories, writes metrics.json, metrics.csv, examples.csv, index.html and lpips_perceptual.png.
    """
    directories, given, _ = parse_directories(
        arguments,
        "analysis.py perceptual RUN ... --lpips FILE --fvd FILE",
        "LPIPS and FVD of finished evaluations, from their saved frames. RUN may be one of its evaluations.",
        keys=False,
        examples=["python analysis.py perceptual RUN RUN --lpips vgg16.pt --fvd i3d_torchscript.pt"],
        lpips=perceptual_metrics.LPIPS_FLAG,
        fvd=perceptual_metrics.FVD_FLAG,
        format=FORMAT,
    )
    lpips, fvd = (Path(given[key]) if key in given else None for key in ("lpips", "fvd"))
    if lpips is None and fvd is None:
        raise ConfigError("command line: name the file of a network with --lpips or --fvd, or with both")
    figures = figure_formats(formats(given.get("format")))
    for path in [find_results(Path(directory)) for directory in directories]:
        with contextlib.ExitStack() as locks, writing(path.parent, "copy the evaluation"):
            if not lock(locks, path.parent):
                raise ConfigError(f"{path.parent} is in use by another process; wait for it")
            add_metrics(path, lpips, fvd, figures)


def add_metrics(path: Path, lpips: Path | None, fvd: Path | None, figures: Sequence[str]) -> None:
    """Add the metrics of the given networks to the evaluation whose `metrics.json` is at `path`."""
    results = read_json(path, (*EVALUATION_KEYS, "averages", "checkpoint_step", "videos", "versions"))
    directory, count = path.parent, results["num_examples"]
    results["config"] = configuration.typed(results["config"], str(path))
    config = Config(**results["config"])
    if lpips and config.num_samples > 1:
        raise ConfigError(
            f"lpips: needs all {config.num_samples} samples, and {directory} has only some of them; evaluate again "
            "with eval.py --lpips FILE"
        )
    needed = [frames_file(directory, i, name) for i in range(count) for name in ("gt_pred", "random_sample_1")]
    needed += [metrics_file(directory, i) for i in range(count)]
    if missing := [file for file in needed if not file.exists()]:
        raise ConfigError(f"{missing[0]}: is missing; evaluate again with eval.py and these flags")
    networks = perceptual_metrics.load(lpips, fvd, results["predicted_frames"], count)
    examples = [load_metrics(directory, number) for number in range(count)]
    if networks.lpips:
        for number in perceptual_metrics.progress(range(count), "LPIPS"):
            truth, prediction = (load_frames(directory, number, name) for name in ("gt_pred", "random_sample_1"))
            distances = perceptual_metrics.lpips(networks.lpips, truth, prediction)
            examples[number] = dict(sorted((examples[number] | {"perceptual_lpips": distances}).items()))
    found = perceptual_metrics.summarise(networks, directory, count)
    if networks.lpips:
        for number, example in enumerate(examples):
            save_metrics(directory, number, example)
    add_perceptual(config, directory, results, found, examples, figures)
    write_results(directory, results, example_averages(examples))
    print_perceptual(results)
    print(f"Results: {directory}")

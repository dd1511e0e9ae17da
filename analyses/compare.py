"""Several evaluations side by side (Figure 1), and ranks over several such comparisons (Figure 5c)."""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

import config as configuration
import runs
import tools
from analyses.arguments import new_directory, parse_named, whole, with_names
from config import Config, ConfigError
from report import plots, statistics, tables
from report.output import FORMAT, formats, writing
from report.results import load_frames

SAME = ("dataset", "open_loop_ctx", "eval_seq_len", "num_samples", "num_digits", "digit_speed")
"""Configuration keys that evaluations must share to be compared."""


def compare(arguments: Sequence[str]) -> None:
    """Draw the quality over distance of several evaluations, and write their table with ranks.

    `<metric>_<protocol>.png`, comparison.md, comparison.csv, comparison.json, `example_<i>.gif`.
    """
    named, given, _ = parse_named(
        arguments,
        "analysis.py compare [NAME=]RUN ... --out DIR",
        "Quality over distance of several evaluations (Figure 1). RUN may be one of its evaluations.",
        keys=False,
        format=FORMAT,
        example="number of the example whose predictions are shown in a video (default: 0)",
    )
    figures, videos = formats(given.get("format"))
    example = whole(given, "example", 0, at_least=0)
    paths = [find_results(path) for _, path in named]
    found = [read_json(path, "lines") for path in paths]
    values = [configuration.typed(results["config"], str(path)) for results, path in zip(found, paths, strict=True)]
    configs = [Config(**config) for config in values]
    names = with_names([name for name, _ in named], configs)
    models = dict(zip(names, found, strict=True))
    check_comparable(models)
    shown = predictions({name: path.parent for name, path in zip(names, paths, strict=True)}, example)
    directory = new_directory("compare", given.get("out"))
    with writing(directory):
        write_comparison(dict(zip(names, paths, strict=True)), models, configs[0], directory, figures)
        if shown:
            rows, context = shown
            tools.save_video(tools.side_by_side(rows, context), directory / f"example_{example}.gif", videos)
    print(f"Results: {directory}")


def write_comparison(
    paths: Mapping[str, Path], models: Mapping[str, Any], c: Config, directory: Path, figures: Sequence[str]
) -> None:
    """Write plots, tables and ranks of named evaluations, and print the table."""
    for path in paths.values():
        print(f"Comparing {path}")
    lines = compared_lines(models)
    first = next(iter(models.values()))
    own = list(dict.fromkeys(line for results in models.values() for line in results["lines"]["paper"]["ssim"]))
    own = [line for line in own if line not in statistics.REFERENCES.values()]
    for protocol, metric in itertools.product(first["protocols"], statistics.METRICS):
        for line in own:
            stem = f"{metric}_{protocol}" + (f"_{line.replace(' ', '_')}" if len(own) > 1 else "")
            label = f"{statistics.METRICS[metric]}, {protocol} protocol" + (f", {line}" if len(own) > 1 else "")
            drawn = comparison_plot(models, protocol, metric, line)
            plots.plot_lines(drawn, directory / f"{stem}.png", label, formats=figures)
    places = {protocol: rank(models, protocol, own[0]) for protocol in first["protocols"]}
    markdown = f"{c.dataset}: {first['num_examples']} sequences, {c.open_loop_ctx} context frames\n"
    for protocol, description in first["protocols"].items():
        header, rows = tables.table(lines, protocol)
        suffix = "" if len(own) == 1 else f", {own[0]}"
        average = {name + suffix: f"{places[protocol][name]['average']:.2f}" for name in models}
        rows = [[row[0], average.get(row[0], "-"), *row[1:]] for row in rows]
        markdown += f"\nProtocol `{protocol}`: {description}.\n\n"
        markdown += tables.to_markdown([header[0], "average rank", *header[1:]], rows)
    tables.write(directory / "comparison.md", markdown)
    tables.write(directory / "comparison.csv", tables.to_csv(tables.CSV_HEADER, tables.csv_rows(lines)))
    summary = {
        "dataset": first["config"]["dataset"],
        "protocols": first["protocols"],
        "evaluations": {name: str(path) for name, path in paths.items()},
        "ranks": places,
    }
    tables.write(directory / "comparison.json", tables.to_json(summary))
    print(f"\n{markdown}")


def predictions(directories: Mapping[str, Path], example: int) -> tuple[dict[str, np.ndarray], dict[str, int]] | None:
    """Return the truth and each model's first prediction of an example, after its context, and their context frames.

    None, with one line that says so, if an evaluation's frames aren't there.

    Raises:
        ConfigError: the models predicted different videos.
    """
    rows: dict[str, np.ndarray] = {}
    context = {}
    for name, directory in directories.items():
        try:
            parts = [load_frames(directory, example, part) for part in ("gt_ctx", "gt_pred", "random_sample_1")]
        except OSError:
            print(f"Without a video, since {directory} has no frames of example {example}")
            return None
        truth = np.concatenate(parts[:2])
        if not np.array_equal(rows.setdefault("truth", truth), truth):
            raise ConfigError(f"example: {example} of {directory} is another video; evaluate on the same data")
        rows[name], context[name] = np.concatenate([parts[0], parts[2]]), len(parts[0])
    return rows, context


def find_results(path: Path) -> Path:
    """Return the `metrics.json` of an evaluation, or of a run's newest finished one.

    Raises:
        ConfigError: there is none.
    """
    if (path / "metrics.json").exists():
        return path / "metrics.json"
    run = runs.find(path)
    found = sorted(run.glob("eval_*/metrics.json"))
    if not found:
        raise ConfigError(f"{run} holds no finished evaluation; evaluate it with: python eval.py --logdir {run}")
    return found[-1]


def read_json(path: Path, key: str) -> Any:
    """Return what a JSON file holds; raise ConfigError if it can't be read or lacks a key."""
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: can't be read ({error}); evaluate again") from None
    if key not in results:
        raise ConfigError(f"{path}: holds no {key}, from an earlier version; evaluate again")
    return results


def check_comparable(models: Mapping[str, Any]) -> None:
    """Raise ConfigError if evaluations differ in what they measure, or on what."""
    (name, first), *others = models.items()
    for other, results in others:
        if results["protocols"] != first["protocols"]:
            raise ConfigError(f"protocols: {name} and {other} were measured by different ones; evaluate again")
        for key in (*SAME, "num_examples"):
            x, y = (r["num_examples"] if key == "num_examples" else r["config"][key] for r in (first, results))
            if x != y:
                raise ConfigError(f"{key}: {name} has {x}, {other} {y}; evaluate both with the same --{key}")


def compared_lines(models: Mapping[str, Any]) -> dict[str, Any]:
    """Return all models' lines as one table's: those that don't depend on the model once, the others with its name."""
    shared = [statistics.REFERENCES["copy"], statistics.REFERENCES["random"]]
    single = {statistics.REFERENCES["posterior"]: ", posterior reconstruction", "prediction": ""}
    joined: dict[str, Any] = {}
    for protocol, metrics in next(iter(models.values()))["lines"].items():
        joined[protocol] = {metric: {} for metric in metrics}
        for metric in metrics:
            for name, results in models.items():
                for line, figures in results["lines"][protocol][metric].items():
                    if line not in shared:
                        joined[protocol][metric][name + single.get(line, f", {line}")] = figures
            for line, results in itertools.product(shared, models.values()):
                if line in results["lines"][protocol][metric]:
                    joined[protocol][metric].setdefault(line, results["lines"][protocol][metric][line])
    return joined


def comparison_plot(models: Mapping[str, Any], protocol: str, metric: str, line: str) -> dict[str, plots.Line]:
    """Return one line of each model, dotted beside it its posterior reconstruction, and the references."""
    drawn, beside, shared = {}, {}, {}
    for name, results in models.items():
        found = plots.drawn(results["lines"][protocol][metric])
        drawn[name] = found[line]
        upper = found[statistics.REFERENCES["posterior"]]
        beside[f"{name}, posterior reconstruction"] = plots.Line(upper.values, beside=name)
        for key in "copy", "random":
            if statistics.REFERENCES[key] in found:
                shared[statistics.REFERENCES[key]] = found[statistics.REFERENCES[key]]
    return drawn | beside | shared


def rank(models: Mapping[str, Any], protocol: str, line: str) -> dict[str, dict[str, float]]:
    """Return each model's rank by each metric's average over all frames, 1 for the best; ties share their mean rank."""
    found: dict[str, dict[str, float]] = {name: {} for name in models}
    for metric in statistics.METRICS:
        scores = [-results["lines"][protocol][metric][line]["average"]["value"] for results in models.values()]
        for name, place in zip(models, scipy.stats.rankdata(scores), strict=True):
            found[name][metric] = float(place)
    return {name: places | {"average": float(np.mean(list(places.values())))} for name, places in found.items()}


def ranks(arguments: Sequence[str]) -> None:
    """Average ranks over the datasets and metrics of several comparisons.

    `ranks_<protocol>.png`, ranks.md, ranks.csv.
    """
    named, given, _ = parse_named(
        arguments,
        "analysis.py ranks DIR ... --out DIR",
        "Average ranks over several comparisons (Figure 5c). DIR is a directory that compare wrote.",
        keys=False,
        format=FORMAT,
    )
    figures = formats(given.get("format")).figures
    paths = [path / "comparison.json" for _, path in named]
    found = [read_json(path, "ranks") for path in paths]
    first = found[0]
    models = list(next(iter(first["ranks"].values())))
    for path, comparison in zip(paths, found, strict=True):
        if comparison["protocols"] != first["protocols"]:
            raise ConfigError(f"protocols: {path} and {paths[0]} were measured by different ones; evaluate again")
        theirs = list(next(iter(comparison["ranks"].values())))
        if set(theirs) != set(models):
            raise ConfigError(
                f"{path}: compares {', '.join(theirs)}, and {paths[0]} {', '.join(models)}; "
                "compare the same models, named alike (NAME=RUN)"
            )
    datasets = [comparison["dataset"] for comparison in found]
    if len(set(datasets)) < len(datasets):
        raise ConfigError(f"dataset: {', '.join(datasets)} have one twice; name one comparison per dataset")
    directory = new_directory("ranks", given.get("out"))
    columns = [(dataset, metric) for dataset in datasets for metric in statistics.METRICS]
    markdown, rows = "", []
    for protocol in first["protocols"]:
        places = {
            name: [comparison["ranks"][protocol][name][metric] for comparison in found for metric in statistics.METRICS]
            for name in models
        }
        averages = {name: float(np.mean(values)) for name, values in places.items()}
        order = sorted(models, key=lambda name: averages[name])
        table = [[name, f"{averages[name]:.2f}", *(f"{place:g}" for place in places[name])] for name in order]
        header = ["model", "average rank", *(f"{dataset}, {statistics.METRICS[metric]}" for dataset, metric in columns)]
        markdown += f"Protocol `{protocol}`: {first['protocols'][protocol]}.\n\n{tables.to_markdown(header, table)}\n"
        rows += [
            [protocol, *column, name, place]
            for name in order
            for column, place in zip([*columns, ("all", "all")], [*places[name], averages[name]], strict=True)
        ]
        bars = {f"{protocol} protocol": {name: (averages[name],) * 3 for name in order}}
        with writing(directory):
            plots.plot_bars(bars, directory / f"ranks_{protocol}.png", "average rank (1 is best)", figures)
    with writing(directory):
        tables.write(directory / "ranks.md", markdown)
        tables.write(directory / "ranks.csv", tables.to_csv(["protocol", "dataset", "metric", "model", "rank"], rows))
    print(f"\n{markdown}Results: {directory}")

"""Comparisons of several evaluations (Figure 1), and average ranks over several comparisons (Figure 5c)."""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

import config as configuration
import tools
from analyses.arguments import model_names, new_directory, parse_named
from config import Config, ConfigError, Flag, whole_number
from report import page, plots, statistics, tables
from report.output import FORMAT, formats, writing
from report.results import FIRST_EXAMPLES, figure_formats, result_files, with_context
from training import loading

SHARED_KEYS = ("dataset", "open_loop_ctx", "eval_seq_len", "num_samples", "num_digits", "digit_speed")
"""Configuration keys whose values must be the same in all evaluations that are compared."""


def compare(arguments: Sequence[str]) -> None:
    """Compare several evaluations: plots of quality over distance, tables with ranks, and videos.

    Writes index.html, `<metric>_<protocol>.png`, comparison.md, comparison.csv, comparison.json, `example_<i>.gif`.
    """
    named, given, _ = parse_named(
        arguments,
        "analysis.py compare [NAME=]RUN ... --out DIR",
        "Quality over distance of several evaluations (Figure 1). RUN may be one of its evaluations.",
        keys=False,
        examples=["python analysis.py compare ours=RUN 'one level'=RUN --out DIR"],
        format=FORMAT,
        example=Flag("INT", "number of the example that the video shows (default: 0)"),
    )
    asked = formats(given.get("format"))
    example = whole_number(given, "example", 0, at_least=0)
    paths = [find_results(path) for _, path in named]
    found = [read_json(path) for path in paths]
    values = [configuration.typed(results["config"], str(path)) for results, path in zip(found, paths, strict=True)]
    configs = [Config(**config) for config in values]
    names = model_names([name for name, _ in named], configs)
    models = with_common_metrics(dict(zip(names, found, strict=True)))
    check_comparable(models)
    directories = {name: path.parent for name, path in zip(names, paths, strict=True)}
    numbers = [example, *(i for i in range(min(FIRST_EXAMPLES, models[names[0]]["num_examples"])) if i != example)]
    shown = {number: rows for number in numbers if (rows := predictions(directories, number))}
    directory = new_directory("compare", given.get("out"))
    with writing(directory):
        if example in shown:
            context = dict.fromkeys(names, configs[0].open_loop_ctx)
            video = tools.side_by_side(shown[example], context)
            tools.save_video(video, directory / f"example_{example}.gif", asked.videos)
        examples = [write_sheets(directory, number, rows) for number, rows in shown.items()]
        write_comparison(
            dict(zip(names, paths, strict=True)), models, configs[0], directory, figure_formats(asked), examples
        )
    print(f"Results: {directory}")


def write_sheets(directory: Path, number: int, rows: Mapping[str, np.ndarray]) -> page.Example:
    """Write a sheet of all frames of each named video, uint8 [T, H, W, C]; return the page's example."""
    paths = {name: directory / f"example_{number}_{i}_sheet.png" for i, name in enumerate(rows)}
    for name, video in rows.items():
        tools.save_grid(video, paths[name])
    return page.Example(f"Example {number}", {name: path.name for name, path in paths.items()})


def write_comparison(
    paths: Mapping[str, Path],
    models: Mapping[str, Any],
    c: Config,
    directory: Path,
    figures: Sequence[str],
    examples: Sequence[page.Example],
) -> None:
    """Write plots, tables, ranks and the page of named evaluations; print the tables."""
    for path in paths.values():
        print(f"Comparing {path}")
    lines = compared_lines(models)
    first = next(iter(models.values()))
    all_lines = dict.fromkeys(line for results in models.values() for line in results["lines"]["paper"]["ssim"])
    own = [line for line in all_lines if line not in statistics.REFERENCES.values()]
    pictures = []
    for protocol, metric in ((protocol, metric) for protocol, metrics in lines.items() for metric in metrics):
        for line in own:
            stem = f"{metric}_{protocol}" + (f"_{line.replace(' ', '_')}" if len(own) > 1 else "")
            label = statistics.NAMES[metric] + (f", {protocol} protocol" if protocol in first["protocols"] else "")
            label += f", {line}" if len(own) > 1 else ""
            drawn = comparison_plot(models, protocol, metric, line)
            pictures.append(f"{stem}.png")
            plots.plot_lines(drawn, directory / f"{stem}.png", label, formats=figures)
    all_scores = {protocol: scores(models, protocol, own[0]) for protocol in first["protocols"]}
    all_ranks = {protocol: rank(by_model) for protocol, by_model in all_scores.items()}
    markdown = f"{c.dataset}: {first['num_examples']} sequences, {c.open_loop_ctx} context frames\n"
    for protocol, description in first["protocols"].items():
        header, rows = tables.table(lines, protocol)
        suffix = "" if len(own) == 1 else f", {own[0]}"
        average = {name + suffix: f"{all_ranks[protocol][name]['average']:.2f}" for name in models}
        rows = [[row[0], average.get(row[0], "-"), *row[1:]] for row in rows]
        markdown += f"\nProtocol `{protocol}`: {description}.\n\n"
        markdown += tables.to_markdown([header[0], "average rank", *header[1:]], rows)
    if metrics := first["perceptual"]:
        names = " and ".join(statistics.NAMES[metric] for metric in metrics)
        markdown += f"\n{names}, which the average ranks include. {statistics.PERCEPTUAL_NOTE}\n"
    if "lpips" in metrics:
        markdown += "\n" + tables.to_markdown(*tables.table(lines, "perceptual", ["lpips"]))
    if "fvd" in metrics:
        markdown += "\n" + tables.to_markdown(*tables.fvd_table(models))
    cells = [*tables.csv_rows(lines)]
    for name, results in models.items():
        cells += [[*row[:2], name, *row[3:]] for row in tables.fvd_rows(results)]
    tables.write(directory / "comparison.md", markdown)
    tables.write(directory / "comparison.csv", tables.to_csv(tables.CSV_HEADER, cells))
    summary = {
        "dataset": first["config"]["dataset"],
        "num_examples": first["num_examples"],
        "protocols": first["protocols"],
        "evaluations": {name: str(path) for name, path in paths.items()},
        "scores": all_scores,
        "ranks": all_ranks,
    }
    tables.write(directory / "comparison.json", tables.to_json(summary))
    shown = {*pictures, *(sheet for example in examples for sheet in example.sheets.values())}
    linked = [file.name for file in result_files(directory) if file.name not in shown]
    text = page.comparison_page(models, lines, all_ranks, examples, pictures, linked)
    tables.write(directory / "index.html", text)
    print(f"\n{markdown}")


def predictions(directories: Mapping[str, Path], example: int) -> dict[str, np.ndarray] | None:
    """Return the truth of an example and each model's first sample, both with the context.

    Returns:
        "truth" and the models' names -> uint8 [T, H, W, C]. None, with a printed line, if an evaluation has no frames
        of the example.

    Raises:
        ConfigError: the models predicted different videos.
    """
    rows: dict[str, np.ndarray] = {}
    for name, directory in directories.items():
        try:
            truth, prediction = (with_context(directory, example, kind) for kind in ("gt_pred", "random_sample_1"))
        except OSError:
            print(f"Videos of example {example} are left out, since {directory} has no frames of it")
            return None
        if not np.array_equal(rows.setdefault("truth", truth), truth):
            raise ConfigError(f"example: {example} of {directory} is another video; evaluate on the same data")
        rows[name] = prediction
    return rows


def find_results(path: Path) -> Path:
    """Return the path of `metrics.json` in an evaluation, or in a run's newest finished evaluation.

    Raises:
        ConfigError: there is no finished evaluation.
    """
    path = loading.resolve_name(path)
    if (path / "metrics.json").exists():
        return path / "metrics.json"
    run = loading.find_run(path)
    found = sorted(run.glob("eval_*/metrics.json"))
    if not found:
        raise ConfigError(f"{run} holds no finished evaluation; evaluate it with: python eval.py --logdir {run}")
    return found[-1]


EVALUATION_KEYS = ("lines", "protocols", "num_examples", "predicted_frames", "config")
"""Entries of `metrics.json` that comparisons need."""


def read_json(path: Path, keys: Sequence[str] = EVALUATION_KEYS, remedy: str = "evaluate again") -> Any:
    """Return the content of a JSON file; raise ConfigError, with the remedy, if it can't be read or lacks a key."""
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: can't be read ({error}); {remedy}") from None
    if lacking := [key for key in keys if not isinstance(results, dict) or key not in results]:
        raise ConfigError(f"{path}: has no {lacking[0]} (damaged, or from an earlier version); {remedy}")
    return results


def check_comparable(models: Mapping[str, Any]) -> None:
    """Raise ConfigError if evaluations differ in their protocols, in SHARED_KEYS or in the number of examples."""
    (name, first), *others = models.items()
    for other, results in others:
        if results["protocols"] != first["protocols"]:
            raise ConfigError(f"protocols: {name} and {other} were evaluated in different ones; evaluate both again")
        for key in (*SHARED_KEYS, "num_examples"):
            x, y = (r["num_examples"] if key == "num_examples" else r["config"][key] for r in (first, results))
            if x != y:
                raise ConfigError(f"{key}: {name} has {x}, {other} has {y}; evaluate both with the same --{key}")


def with_common_metrics(models: Mapping[str, Any]) -> dict[str, Any]:
    """Return the models' results without LPIPS or FVD if a model lacks it; print what is left out.

    Raises:
        ConfigError: the models' LPIPS or FVD were measured with different networks.
    """
    common = []
    for metric, name in statistics.PERCEPTUAL.items():
        without = [model for model, results in models.items() if metric not in results.get("perceptual", {})]
        if not without:
            common.append(metric)
        elif len(without) < len(models):
            print(
                f"{name} is left out, since {', '.join(without)} has none; "
                f"measure it with: python analysis.py perceptual RUN --{metric} FILE"
            )
    for metric in common:
        networks = {model: results["perceptual"][metric] for model, results in models.items()}
        (a, first), *others = networks.items()
        for b, other in others:
            if other["sha256"] != first["sha256"]:
                raise ConfigError(
                    f"{metric}: {a} was measured with {first['file']}, {b} with {other['file']}, another network; "
                    "measure both with the same file"
                )
    kept = {}
    for model, results in models.items():
        lines = {k: v for k, v in results["lines"].items() if k != "perceptual" or "lpips" in common}
        kept[model] = results | {"lines": lines}
        kept[model]["perceptual"] = {metric: results["perceptual"][metric] for metric in common}
    return kept


def compared_lines(models: Mapping[str, Any]) -> dict[str, Any]:
    """Return the lines of all models together: protocol -> metric -> name of a line -> `summary`.

    Lines that depend on the model have its name. References that don't depend on it are there once.
    """
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
    """Return one line of each model, its dotted posterior reconstruction, and the references."""
    drawn, reconstructions, shared = {}, {}, {}
    for name, results in models.items():
        found = plots.metric_lines(results["lines"][protocol][metric])
        drawn[name] = found[line]
        if upper := found.get(statistics.REFERENCES["posterior"]):
            reconstructions[f"{name}, posterior reconstruction"] = plots.Line(upper.values, companion_of=name)
        for key in "copy", "random":
            if statistics.REFERENCES[key] in found:
                shared[statistics.REFERENCES[key]] = found[statistics.REFERENCES[key]]
    return drawn | reconstructions | shared


def scores(models: Mapping[str, Any], protocol: str, line: str) -> dict[str, dict[str, float]]:
    """Return each model's average metrics over all predicted frames: name -> metric -> score.

    SSIM and PSNR are those of one line in one protocol. LPIPS and FVD are included if all models have them.
    """
    found: dict[str, dict[str, float]] = {}
    for name, results in models.items():
        lines = results["lines"][protocol] | results["lines"].get("perceptual", {})
        found[name] = {metric: figures[line]["average"]["value"] for metric, figures in lines.items()}
        if fvd := results["perceptual"].get("fvd"):
            found[name]["fvd"] = fvd["frames"][str(results["predicted_frames"])]
    return found


def rank(scores: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return each model's rank by each metric, and the "average" over metrics: name -> metric -> rank.

    1 is the best. Ties share their mean rank.
    """
    found: dict[str, dict[str, float]] = {name: {} for name in scores}
    for metric in next(iter(scores.values())):
        values = [-statistics.goodness(metric, by_metric[metric]) for by_metric in scores.values()]
        for name, value in zip(scores, scipy.stats.rankdata(values), strict=True):
            found[name][metric] = float(value)
    return {name: ranks | {"average": float(np.mean(list(ranks.values())))} for name, ranks in found.items()}


def ranks(arguments: Sequence[str]) -> None:
    """Average the models' ranks over the datasets and metrics of several comparisons (Figure 5c, Table E.1).

    Writes `ranks_<protocol>.png`, ranks.md, ranks.csv.
    """
    named, given, _ = parse_named(
        arguments,
        "analysis.py ranks DIR ... --out DIR",
        "Average ranks over several comparisons (Figure 5c, Table E.1). DIR is a directory that compare wrote.",
        keys=False,
        examples=["python analysis.py ranks comparison_minerl comparison_mazes --out DIR"],
        format=FORMAT,
    )
    figures = formats(given.get("format")).figures
    paths = [path / "comparison.json" for _, path in named]
    found = [
        read_json(path, ("scores", "ranks", "protocols", "dataset", "num_examples"), "compare again") for path in paths
    ]
    first = found[0]
    models = list(next(iter(first["ranks"].values())))
    for path, comparison in zip(paths, found, strict=True):
        if comparison["protocols"] != first["protocols"]:
            raise ConfigError(f"protocols: {path} and {paths[0]} have different ones; evaluate and compare again")
        names = list(next(iter(comparison["ranks"].values())))
        if set(names) != set(models):
            raise ConfigError(
                f"{path}: compares {', '.join(names)}, and {paths[0]} compares {', '.join(models)}; "
                "compare the same models under the same names (NAME=RUN)"
            )
    datasets = [comparison["dataset"] for comparison in found]
    if len(set(datasets)) < len(datasets):
        raise ConfigError(f"dataset: two of {', '.join(datasets)} are the same; name one comparison per dataset")
    directory = new_directory("ranks", given.get("out"))
    columns = [(comparison, metric) for comparison in found for metric in comparison["scores"]["paper"][models[0]]]
    markdown, rows = "", []
    for protocol in first["protocols"]:
        rank_rows, score_rows = (
            {name: [comparison[kind][protocol][name][metric] for comparison, metric in columns] for name in models}
            for kind in ("ranks", "scores")
        )
        averages = {name: float(np.mean(values)) for name, values in rank_rows.items()}
        order = sorted(models, key=lambda name: averages[name])
        table = [[name, f"{averages[name]:.2f}", *(f"{value:g}" for value in rank_rows[name])] for name in order]
        labels = [f"{comparison['dataset']}, {statistics.NAMES[metric]}" for comparison, metric in columns]
        markdown += f"Protocol `{protocol}`: {first['protocols'][protocol]}.\n\n"
        markdown += tables.to_markdown(["model", "average rank", *labels], table) + "\n"
        markdown += score_table(found, protocol, order) + "\n"
        for name in order:
            rows += [
                [protocol, comparison["dataset"], metric, name, score, value]
                for (comparison, metric), score, value in zip(columns, score_rows[name], rank_rows[name], strict=True)
            ]
            rows.append([protocol, "all", "all", name, "", averages[name]])
        bars = {f"{protocol} protocol": {name: (averages[name],) * 3 for name in order}}
        with writing(directory):
            plots.plot_bars(bars, directory / f"ranks_{protocol}.png", "average rank (1 is best)", figures)
    header = ["protocol", "dataset", "metric", "model", "score", "rank"]
    with writing(directory):
        tables.write(directory / "ranks.md", markdown)
        tables.write(directory / "ranks.csv", tables.to_csv(header, rows))
    print(f"\n{markdown}Results: {directory}")


def score_table(comparisons: Sequence[Mapping[str, Any]], protocol: str, models: Sequence[str]) -> str:
    """Return the scores on each dataset as a Markdown table (Table E.1); arrows tell whether higher is better."""
    metrics = [m for m in statistics.NAMES if any(m in c["scores"][protocol][models[0]] for c in comparisons)]
    arrows = [f"{statistics.NAMES[m]} {'↓' if m in statistics.LOWER_IS_BETTER else '↑'}" for m in metrics]
    rows = []
    for comparison in comparisons:
        for name in models:
            scores = comparison["scores"][protocol][name]
            cells = [f"{scores[m]:.{statistics.DIGITS[m]}f}" if m in scores else "-" for m in metrics]
            rows.append([f"{comparison['dataset']} ({comparison['num_examples']} sequences)", name, *cells])
    return tables.to_markdown(["dataset", "model", *arrows], rows)

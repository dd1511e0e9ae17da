"""Several models side by side, from what train.py and eval.py wrote: a comparison, ranks over several, losses."""

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

import config as configuration
import eval as evaluation
import pictures
import report
import tools
import train
from config import Config, ConfigError

# ---------------------------------------------------------------------------------------------- command line


OUT = "new directory for the results; for a single run by default below its directory"


def parse_named(
    arguments: Sequence[str], program: str, description: str, keys: bool = True, **special: str
) -> tuple[list[tuple[str, Path]], dict[str, str], dict[str, str]]:
    """The `[NAME=]DIRECTORY`s that a command line begins with, the name empty where there is none; then its flags.

    Returns:
        The directories by name, and what `config.parse_flags` returns, with `--out` among the special flags.

    Raises:
        ConfigError: no directory is named; or as `config.parse_flags`.
    """
    directories = list(itertools.takewhile(lambda argument: not argument.startswith("-"), arguments))
    flags = arguments[len(directories) :]
    given, values = configuration.parse_flags(flags, program, description, keys, out=OUT, **special)
    if not directories:
        raise ConfigError(f"command line: no directory is named; call {program}")
    named = []
    for directory in directories:
        name, equals, path = directory.partition("=")
        named.append((name, Path(path)) if equals and not Path(directory).exists() else ("", Path(directory)))
    return named, given, values


def with_names(names: Sequence[str], configs: Sequence[Config]) -> list[str]:
    """The given names; where one is missing, the values of the keys in which the models differ.

    Raises:
        ConfigError: two have the same name.
    """
    ignored = train.FREE_ON_RESUME | {"seed"}
    keys = [key for key in vars(configs[0]) if key not in ignored and len({getattr(c, key) for c in configs}) > 1]
    found = []
    for name, c in zip(names, configs, strict=True):
        own = [f"{key} {'-'.join(map(str, v)) if isinstance(v := getattr(c, key), tuple) else v}" for key in keys]
        found.append(name or ", ".join(own) or c.dataset)
    if twice := [name for i, name in enumerate(found) if name in found[:i]]:
        raise ConfigError(f"two models have the same name, {twice[0]!r}; name them: NAME=DIRECTORY")
    return found


def new_directory(command: str, out: str | None, run: Path | None = None) -> Path:
    """Makes the directory of the results: `out`, or `<run>/<command>_<time>`.

    Raises:
        ConfigError: there are results already, or neither is given.
    """
    if out is None:
        if run is None:
            raise ConfigError("out: name a new directory for the results of several runs with --out")
        return evaluation.new_directory(run, command)
    directory = Path(out)
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise ConfigError(f"out: {directory} isn't empty; name a new directory")
    directory.mkdir(parents=True, exist_ok=True)
    return directory


# ---------------------------------------------------------------------------------------------- compare


SAME = ("dataset", "open_loop_ctx", "eval_seq_len", "num_samples", "num_digits", "digit_speed")
"""Configuration keys that evaluations must share to be compared."""


def find_results(path: Path) -> Path:
    """The `metrics.json` of an evaluation, or of a run's newest finished one.

    Raises:
        ConfigError: there is none.
    """
    if (path / "metrics.json").exists():
        return path / "metrics.json"
    run = evaluation.find_run(path)
    found = sorted(run.glob("eval_*/metrics.json"))
    if not found:
        raise ConfigError(f"{run} holds no finished evaluation; evaluate it with: python eval.py --logdir {run}")
    return found[-1]


def read_json(path: Path, key: str) -> Any:
    """Raises ConfigError where the file can't be read or lacks a key."""
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: can't be read ({error}); evaluate again") from None
    if key not in results:
        raise ConfigError(f"{path}: holds no {key}, from an earlier version; evaluate again")
    return results


def compare(arguments: Sequence[str]) -> None:
    """Draws the quality over distance of several evaluations, and writes their table with ranks.

    `<metric>_<protocol>.png`, comparison.md, comparison.csv, comparison.json.
    """
    named, given, _ = parse_named(
        arguments,
        "analysis.py compare [NAME=]RUN ... --out DIR",
        "Quality over distance of several evaluations (Figure 1). RUN may be one of its evaluations.",
        keys=False,
    )
    paths = [find_results(path) for _, path in named]
    found = [read_json(path, "lines") for path in paths]
    values = [configuration.typed(results["config"], str(path)) for results, path in zip(found, paths, strict=True)]
    configs = [Config(**config) for config in values]
    names = with_names([name for name, _ in named], configs)
    models = dict(zip(names, found, strict=True))
    check_comparable(models)
    directory = new_directory("compare", given.get("out"))
    for path in paths:
        print(f"Comparing {path}")
    lines = compared_lines(models)
    first = found[0]
    own = list(dict.fromkeys(line for results in found for line in results["lines"]["paper"]["ssim"]))
    own = [line for line in own if line not in report.REFERENCES.values()]
    for protocol, metric in itertools.product(first["protocols"], report.METRICS):
        for line in own:
            stem = f"{metric}_{protocol}" + (f"_{line.replace(' ', '_')}" if len(own) > 1 else "")
            label = f"{report.METRICS[metric]}, {protocol} protocol" + (f", {line}" if len(own) > 1 else "")
            pictures.plot_lines(comparison_plot(models, protocol, metric, line), directory / f"{stem}.png", label)
    places = {protocol: rank(models, protocol, own[0]) for protocol in first["protocols"]}
    c = configs[0]
    markdown = f"{c.dataset}: {first['num_examples']} sequences, {c.open_loop_ctx} context frames\n"
    for protocol, description in first["protocols"].items():
        header, rows = report.table(lines, protocol)
        suffix = "" if len(own) == 1 else f", {own[0]}"
        average = {name + suffix: f"{places[protocol][name]['average']:.2f}" for name in names}
        rows = [[row[0], average.get(row[0], "-"), *row[1:]] for row in rows]
        markdown += f"\nProtocol `{protocol}`: {description}.\n\n"
        markdown += report.to_markdown([header[0], "average rank", *header[1:]], rows)
    report.write(directory / "comparison.md", markdown)
    report.write(directory / "comparison.csv", report.to_csv(report.CSV_HEADER, report.csv_rows(lines)))
    summary = {
        "dataset": first["config"]["dataset"],
        "protocols": first["protocols"],
        "evaluations": dict(zip(names, map(str, paths), strict=True)),
        "ranks": places,
    }
    report.write(directory / "comparison.json", report.to_json(summary))
    print(f"\n{markdown}\nResults: {directory}")


def check_comparable(models: Mapping[str, Any]) -> None:
    """Raises ConfigError where evaluations differ in what they measure, or on what."""
    (name, first), *others = models.items()
    for other, results in others:
        if results["protocols"] != first["protocols"]:
            raise ConfigError(f"protocols: {name} and {other} were measured by different ones; evaluate again")
        for key in (*SAME, "num_examples"):
            x, y = (r["num_examples"] if key == "num_examples" else r["config"][key] for r in (first, results))
            if x != y:
                raise ConfigError(f"{key}: {name} has {x}, {other} {y}; evaluate both with the same --{key}")


def compared_lines(models: Mapping[str, Any]) -> dict[str, Any]:
    """All models' lines as one table's: those that don't depend on the model once, the others with its name."""
    shared = [report.REFERENCES["copy"], report.REFERENCES["random"]]
    single = {report.REFERENCES["posterior"]: ", posterior reconstruction", "prediction": ""}
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


def comparison_plot(models: Mapping[str, Any], protocol: str, metric: str, line: str) -> dict[str, pictures.Line]:
    """One line of each model, its posterior reconstruction dotted beside it, and the references that all share."""
    drawn, beside, shared = {}, {}, {}
    for name, results in models.items():
        found = report.drawn(results["lines"][protocol][metric])
        drawn[name] = found[line]
        upper = found[report.REFERENCES["posterior"]]
        beside[f"{name}, posterior"] = pictures.Line(upper.values, beside=name)
        for key in "copy", "random":
            if report.REFERENCES[key] in found:
                shared[report.REFERENCES[key]] = found[report.REFERENCES[key]]
    return drawn | beside | shared


def rank(models: Mapping[str, Any], protocol: str, line: str) -> dict[str, dict[str, float]]:
    """Each model's rank by each metric's average over all frames, 1 for the best; ties share their mean rank."""
    found: dict[str, dict[str, float]] = {name: {} for name in models}
    for metric in report.METRICS:
        scores = [-results["lines"][protocol][metric][line]["average"]["value"] for results in models.values()]
        for name, place in zip(models, scipy.stats.rankdata(scores), strict=True):
            found[name][metric] = float(place)
    return {name: places | {"average": float(np.mean(list(places.values())))} for name, places in found.items()}


def ranks(arguments: Sequence[str]) -> None:
    """Averages ranks over the datasets and metrics of several comparisons.

    `ranks_<protocol>.png`, ranks.md, ranks.csv.
    """
    named, given, _ = parse_named(
        arguments,
        "analysis.py ranks DIR ... --out DIR",
        "Average ranks over several comparisons (Figure 5c). DIR is a directory that compare wrote.",
        keys=False,
    )
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
    columns = [(dataset, metric) for dataset in datasets for metric in report.METRICS]
    markdown, rows = "", []
    for protocol in first["protocols"]:
        places = {
            name: [comparison["ranks"][protocol][name][metric] for comparison in found for metric in report.METRICS]
            for name in models
        }
        averages = {name: float(np.mean(values)) for name, values in places.items()}
        order = sorted(models, key=lambda name: averages[name])
        table = [[name, f"{averages[name]:.2f}", *(f"{place:g}" for place in places[name])] for name in order]
        header = ["model", "average rank", *(f"{dataset}, {report.METRICS[metric]}" for dataset, metric in columns)]
        markdown += f"Protocol `{protocol}`: {first['protocols'][protocol]}.\n\n{report.to_markdown(header, table)}\n"
        rows += [
            [protocol, *column, name, place]
            for name in order
            for column, place in zip([*columns, ("all", "all")], [*places[name], averages[name]], strict=True)
        ]
        bars = {f"{protocol} protocol": {name: (averages[name],) * 3 for name in order}}
        pictures.plot_bars(bars, directory / f"ranks_{protocol}.png", "average rank (1 is best)")
    report.write(directory / "ranks.md", markdown)
    report.write(directory / "ranks.csv", report.to_csv(["protocol", "dataset", "metric", "model", "rank"], rows))
    print(f"\n{markdown}Results: {directory}")


# ---------------------------------------------------------------------------------------------- curves


def curves(arguments: Sequence[str]) -> None:
    """Draws the losses of several trainings over their steps.

    loss.png, curves.md (validation loss at steps that all have logged, and its terms at the last one), curves.csv (all
    that is in their logs).
    """
    named, given, _ = parse_named(
        arguments,
        "analysis.py curves [NAME=]RUN ... --out DIR",
        "Losses over the steps of several trainings, from their metrics.jsonl.",
        keys=False,
    )
    runs = [evaluation.find_run(path) for _, path in named]
    names = with_names([name for name, _ in named], [configuration.load(run / "config.yml") for run in runs])
    logs = {name: read_log(run) for name, run in zip(names, runs, strict=True)}
    directory = new_directory("curves", given.get("out"))
    drawn = {
        name: pictures.Line(over_steps(log, "validation/loss"), x=over_steps(log, "step")) for name, log in logs.items()
    }
    for name, log in logs.items():
        drawn[f"{name}, training"] = pictures.Line(over_steps(log, "train/loss"), x=drawn[name].x, beside=name)
    pictures.plot_lines(drawn, directory / "loss.png", "loss, nats per frame", xlabel="step")
    common = sorted(set.intersection(*({line["step"] for line in log} for log in logs.values())))
    shown = [common[i] for i in np.unique(np.linspace(0, len(common) - 1, 8).astype(int))] if common else []
    rows, cells = [], []
    for name, log in logs.items():
        losses = {line["step"]: line["validation/loss"] for line in log}
        last = log[-1]
        terms = [f"{last[f'validation/{term}']:.1f}" for term in ("nll_term", "kl_term")]
        rows.append([name, *(f"{losses[step]:.0f}" for step in shown), last["step"], *terms])
        cells += [[name, line["step"], key, value] for line in log for key, value in line.items() if key != "step"]
    header = ["validation loss, nats per frame", *(f"step {step}" for step in shown), "last step", "nll", "kl"]
    markdown = report.to_markdown(header, rows)
    report.write(directory / "curves.md", markdown)
    report.write(directory / "curves.csv", report.to_csv(["model", "step", "metric", "value"], cells))
    print(f"\n{markdown}\nResults: {directory}")


def read_log(run: Path) -> list[dict[str, float]]:
    """The lines of a run's `metrics.jsonl`.

    Raises:
        ConfigError: it holds none yet.
    """
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    log = [json.loads(line) for line in lines if tools.before(line, sys.maxsize)]
    if not log:
        raise ConfigError(f"{run} has logged nothing yet; train longer, or lower --save_scalars_every")
    return log


def over_steps(log: Sequence[Mapping[str, float]], key: str) -> np.ndarray:
    return np.array([line[key] for line in log])

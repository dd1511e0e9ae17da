"""Accuracy over predicted frames: what digits, rooms and seeds share."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analyses.arguments import TrainedModel
from report import plots, statistics, tables

POSTERIOR = statistics.REFERENCES["posterior"]


def accuracy_line(summary: Mapping[str, Any]) -> plots.Line:
    """Return the curve of a `statistics.summary`, with its interval, as a line of a plot."""
    curve = {key: np.array(values) for key, values in summary["curve"].items()}
    return plots.Line(curve["value"], curve["low"], curve["high"])


def accuracy_lines(models: Sequence[TrainedModel], results: Mapping[str, Any]) -> dict[str, plots.Line]:
    """Return the line of each model, and the dotted line of its posterior reconstruction."""
    lines = {run.name: accuracy_line(results[run.name]) for run in models}
    for run in models:
        name = f"{run.name}, {POSTERIOR}"
        lines[name] = plots.Line(np.array(results[name]["curve"]["value"]), companion_of=run.name)
    return lines


def write_accuracy(kind: str, results: Mapping[str, Any], directory: Path, more: Mapping[str, Any]) -> None:
    """Write accuracies to `<kind>.json` and `<kind>.csv`, and print their averages.

    Args:
        kind: the name of the files, and of the metric in the CSV file.
        results: name of a line -> `statistics.summary`.
        directory: the directory of the results.
        more: more entries of the JSON file.
    """
    lines = {"accuracy": {kind: results}}
    tables.write(directory / f"{kind}.csv", tables.to_csv(tables.CSV_HEADER, tables.csv_rows(lines)))
    tables.write(directory / f"{kind}.json", tables.to_json({**more, "lines": results}))
    print()
    for name, summary in results.items():
        print(f"{name}: {format_averages(summary)}")
    print(f"Results: {directory}")


def format_averages(summary: Mapping[str, Any]) -> str:
    """Return as text the average over all frames with its interval, and the averages over the first frames."""
    first = "".join(f", first {d}: {value['value']:.3f}" for d, value in summary["first"].items())
    return tables.with_interval(summary["average"], 3) + first

"""Accuracy of what is read from frames, over time: what digits and rooms share."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analyses.arguments import TrainedModel
from report import plots, statistics, tables

POSTERIOR = statistics.REFERENCES["posterior"]


def accuracy_line(summary: Mapping[str, Any]) -> plots.Line:
    curve = {key: np.array(values) for key, values in summary["curve"].items()}
    return plots.Line(curve["value"], curve["low"], curve["high"])


def accuracy_lines(models: Sequence[TrainedModel], results: Mapping[str, Any]) -> dict[str, plots.Line]:
    """Return each model's line, and dotted beside it that of its posterior reconstruction."""
    lines = {run.name: accuracy_line(results[run.name]) for run in models}
    for run in models:
        name = f"{run.name}, {POSTERIOR}"
        lines[name] = plots.Line(np.array(results[name]["curve"]["value"]), beside=run.name)
    return lines


def write_readout(kind: str, results: Mapping[str, Any], directory: Path, more: Mapping[str, Any]) -> None:
    """Write `statistics.summary`s by name as `<kind>.json` and `<kind>.csv`, and print them."""
    lines = {"accuracy": {kind: results}}
    tables.write(directory / f"{kind}.csv", tables.to_csv(tables.CSV_HEADER, tables.csv_rows(lines)))
    tables.write(directory / f"{kind}.json", tables.to_json({**more, "lines": results}))
    print()
    for name, summary in results.items():
        print(f"{name}: {averages(summary)}")
    print(f"Results: {directory}")


def averages(summary: Mapping[str, Any]) -> str:
    """Return the average over all frames with its interval, and those over the first ones."""
    first = "".join(f", first {d}: {value['value']:.3f}" for d, value in summary["first"].items())
    return tables.with_interval(summary["average"], 3) + first

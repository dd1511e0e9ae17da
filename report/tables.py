"""Tables of averages as JSON, CSV and Markdown."""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from report.statistics import DIGITS, FEW_CLIPS, NAMES
from system.files import replace_file

Lines = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""protocol -> metric -> name of a line -> `statistics.summary`"""


def to_json(results: Any) -> str:
    """Return indented JSON with each list of numbers on one line."""
    text = json.dumps(results, indent=2)
    return re.sub(r"\[\n[^\[\]{}\"]*\]", lambda match: " ".join(match[0].split()), text) + "\n"


def to_csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a CSV table."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return buffer.getvalue()


def to_markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table, its first column aligned to the left and the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


CSV_HEADER = ("protocol", "metric", "line", "frames", "value", "low", "high")


def csv_rows(lines: Lines) -> Iterator[Sequence[Any]]:
    """Yield a row per value. `frames` is a single predicted frame, such as `7`, or a range that is averaged, `1-50`."""
    for protocol, metrics in lines.items():
        for metric, by_line in metrics.items():
            for line, figures in by_line.items():
                start = protocol, metric, line
                curve = figures["curve"]
                for d, value in figures["first"].items():
                    yield *start, f"1-{d}", *value.values()
                if str(len(curve["value"])) not in figures["first"]:
                    yield *start, f"1-{len(curve['value'])}", *figures["average"].values()
                for t, values in enumerate(zip(*curve.values(), strict=True), 1):
                    yield *start, t, *values


def fvd_rows(results: Mapping[str, Any]) -> Iterator[Sequence[Any]]:
    """Yield a row per FVD of an evaluation, if it was measured."""
    for frames, value in results.get("perceptual", {}).get("fvd", {"frames": {}})["frames"].items():
        yield "perceptual", "fvd", "first sample", f"1-{frames}", value, "", ""


def table(lines: Lines, protocol: str, metrics: Sequence[str] = ()) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of a table of averages in one protocol, with a row per line.

    Averages are over all predicted frames, with intervals, and over the first ones.
    """
    header, rows = ["prediction / reference"], []
    metrics = metrics or list(lines[protocol])
    for metric in metrics:
        name = NAMES[metric]
        any_line = next(iter(lines[protocol][metric].values()))
        frames = len(any_line["curve"]["value"])
        header += [f"{name}, {protocol}, {frames} frames", *(f"first {d}" for d in any_line["first"])]
    for line in lines[protocol][metrics[0]]:
        row = [line]
        for metric in metrics:
            figures, digits = lines[protocol][metric][line], DIGITS[metric]
            row += [with_interval(figures["average"], digits)]
            row += [f"{value['value']:.{digits}f}" for value in figures["first"].values()]
        rows.append(row)
    return header, rows


def fvd_table(models: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of a table of FVD and number of clips, for named contents of `metrics.json`."""
    any_fvd = next(iter(models.values()))["perceptual"]["fvd"]
    header = ["prediction / reference", *(f"FVD, {frames} frames" for frames in any_fvd["frames"]), "clips"]
    rows = []
    for name, results in models.items():
        fvd = results["perceptual"]["fvd"]
        few = f" (fewer than {FEW_CLIPS})" if fvd["clips"] < FEW_CLIPS else ""
        values = (f"{value:.{DIGITS['fvd']}f}" for value in fvd["frames"].values())
        rows.append([name, *values, f"{fvd['clips']}{few}"])
    return header, rows


def with_interval(estimate: Mapping[str, float], digits: int) -> str:
    """Return a value as text, with its interval unless that has no extent, as for a single sequence."""
    value, low, high = (f"{estimate[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})" if estimate["low"] < estimate["high"] else value


def write(path: Any, text: str) -> None:
    """Write a text file atomically."""
    replace_file(path, text.encode())

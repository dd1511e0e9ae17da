"""Curves of single examples -> averages with confidence intervals -> tables and a page to look at in a browser."""

import csv
import html
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

import pictures
import tools

DISTANCES = (10, 50, 100, 200, 400, 1000)
"""Averages over the first so many predicted frames are reported, as far as there are so many."""

REFERENCES = {
    "posterior": "posterior reconstruction",
    "copy": "last context frame",
    "random": "random training frame",
}
"""What predictions are compared with. posterior: the model's reconstruction of the very frames that are to be
predicted, from a posterior that sees them: its upper bound. copy: the last context frame, for ever. random: another
training frame at each step, the quality of a prediction that has lost the video (the paper's Figure 1)."""

METRICS = {"ssim": "SSIM", "psnr": "PSNR (dB)"}


# ---------------------------------------------------------------------------------------------- statistics


def estimate(values: np.ndarray, resamples: int = 1000) -> dict[str, np.ndarray]:
    """Averages over examples [N, ...] with 95 % confidence intervals: percentiles of a bootstrap over the examples.

    The same resamples, from a fixed seed, are used at each call. A single example has an interval without extent.

    Returns:
        "value", "low" and "high", [...] each.
    """
    N = len(values)
    draws = np.random.default_rng(0).multinomial(N, np.full(N, 1 / N), size=resamples) / N  # [resamples, N]
    means = np.tensordot(draws, values, axes=1)
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return {"value": values.mean(0), "low": low, "high": high}


def summary(curves: np.ndarray) -> dict[str, Any]:
    """What is reported of one line, from the examples' curves over predicted frames [N, T].

    Returns:
        "average": over all frames; "first": over the first d frames, by d of DISTANCES; "curve": at each frame (what
        the paper's Figure 1 shows). Each with "value", "low" and "high", ready for JSON.
    """
    T = curves.shape[1]
    distances = [d for d in DISTANCES if d <= T]
    until = curves.cumsum(1) / np.arange(1, T + 1)
    return {
        "average": plain(estimate(until[:, -1])),
        "first": {str(d): plain(estimate(until[:, d - 1])) for d in distances},
        "curve": plain(estimate(curves)),
    }


def drawn(lines: Mapping[str, Mapping[str, Any]]) -> dict[str, pictures.Line]:
    """One metric's lines as `pictures.plot_lines` takes them: with confidence intervals, which references leave to the
    tables."""
    found = {}
    for name, figures in lines.items():
        value, low, high = (np.array(figures["curve"][key]) for key in ("value", "low", "high"))
        reference = name in REFERENCES.values()
        found[name] = pictures.Line(value, reference=True) if reference else pictures.Line(value, low, high)
    return found


def plain(tree: Any) -> Any:
    """Arrays as lists and numbers of six digits."""
    if isinstance(tree, Mapping):
        return {key: plain(value) for key, value in tree.items()}
    if isinstance(tree, np.ndarray) and tree.ndim:
        return [plain(value) for value in tree]
    return float(f"{tree:.6g}")


# ---------------------------------------------------------------------------------------------- tables

Lines = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""protocol -> metric -> name of a line -> `summary`"""


def to_json(results: Any) -> str:
    """Indented JSON with each list of numbers on one line."""
    text = json.dumps(results, indent=2)
    return re.sub(r"\[\n[^\[\]{}\"]*\]", lambda match: " ".join(match[0].split()), text) + "\n"


def to_csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return buffer.getvalue()


def to_markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table, its first column to the left."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


CSV_HEADER = ("protocol", "metric", "line", "frames", "value", "low", "high")


def csv_rows(lines: Lines) -> Iterable[Sequence[Any]]:
    """One row per value. `frames` says over which predicted frames it is: `7` alone, or on average over `1-50`."""
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


def table(lines: Lines, protocol: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the averages in one protocol: a row per line; over all frames, with intervals, and at the
    distances."""
    header, rows = ["line"], []
    for metric, name in METRICS.items():
        any_line = next(iter(lines[protocol][metric].values()))
        frames = len(any_line["curve"]["value"])
        header += [f"{name}, {protocol}, {frames} frames", *(f"first {d}" for d in any_line["first"])]
    for line in lines[protocol]["ssim"]:
        row = [line]
        for metric in METRICS:
            figures, digits = lines[protocol][metric][line], 4 if metric == "ssim" else 2
            row += [with_interval(figures["average"], digits)]
            row += [f"{value['value']:.{digits}f}" for value in figures["first"].values()]
        rows.append(row)
    return header, rows


def with_interval(estimate: Mapping[str, float], digits: int) -> str:
    value, low, high = (f"{estimate[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


# ---------------------------------------------------------------------------------------------- the page

STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 18%, transparent); }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.5rem; margin-bottom: .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
p, figcaption { color: color-mix(in srgb, currentColor 70%, transparent); max-width: 60rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr.own td { font-weight: 600; }
.by2, .by3 { display: grid; gap: 1.25rem; }
@media (min-width: 48rem) {
  .by2 { grid-template-columns: repeat(2, 1fr); }
  .by3 { grid-template-columns: repeat(3, 1fr); }
}
figure { margin: 0; }
figure img { width: 100%; border-radius: 4px; background: #fff; }
img.frames { image-rendering: pixelated; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .9rem; }
dd { margin: 0; overflow-wrap: anywhere; }
"""


def page(results: Mapping[str, Any], plots: Sequence[str], gifs: Mapping[str, str]) -> str:
    """An HTML page that needs nothing but the files beside it.

    Args:
        results: what `metrics.json` holds.
        plots: paths of pictures, relative to the page.
        gifs: captions -> paths.
    """
    config = results["config"]
    name = f"{config['dataset']}, step {results['checkpoint_step']}"
    parts = [
        f"<h1>Open-loop predictions: {html.escape(name)}</h1>",
        f"<p>{results['num_examples']} test sequences; {results['predicted_frames']} frames predicted from "
        f"{config['open_loop_ctx']} context frames; {config['num_samples']} sample{'s' * (config['num_samples'] > 1)} "
        "of each. In brackets: 95 % confidence, from a bootstrap over the sequences.</p>",
    ]
    for protocol, description in results["protocols"].items():
        header, rows = table(results["lines"], protocol)
        parts += [f"<h2>Protocol <code>{protocol}</code></h2>", f"<p>{html.escape(description)}</p>"]
        parts.append(html_table(header, rows, set(REFERENCES.values())))
    parts += ["<h2>Quality over distance</h2>", '<div class="by2">']
    parts += [f'<figure><img src="{html.escape(path)}" alt="{html.escape(path)}"></figure>' for path in plots]
    parts.append("</div>")
    if gifs:
        parts.append("<h2>Examples</h2><p>Truth | prediction | absolute error, chosen by SSIM (paper protocol).</p>")
        parts.append(f'<div class="by{3 if config["num_samples"] == 1 else 2}">')
        parts += [
            f'<figure><img class="frames" src="{html.escape(path)}" alt=""><figcaption>{html.escape(caption)}'
            "</figcaption></figure>"
            for caption, path in gifs.items()
        ]
        parts.append("</div>")
    parts.append("<h2>Configuration</h2><details><summary>All keys and versions</summary><dl>")
    parts += [
        f"<dt>{html.escape(key)}</dt><dd>{html.escape(str(value))}</dd>"
        for key, value in {**config, **results["versions"]}.items()
    ]
    parts.append("</dl></details>")
    head = f'<meta charset="utf-8"><title>{html.escape(name)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(parts) + "\n</body></html>\n"


def html_table(header: Sequence[str], rows: Iterable[Sequence[str]], references: set[str]) -> str:
    """A table whose rows stand out unless their first cell is one of `references`."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = ""
    for row in rows:
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        body += f"<tr>{cells}</tr>" if row[0] in references else f'<tr class="own">{cells}</tr>'
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def write(path: Any, text: str) -> None:
    """Writes a file of results whole, or not at all."""
    tools.replace_file(path, text.encode())

"""HTML pages of an evaluation or a comparison: videos in sync, curves, tables, links to files.

A page needs only the files next to it, and no network. Its videos are sheets of frames (PNG) that a script draws, since
a browser can't seek to any frame of a GIF or an MP4 immediately.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from config import FRAME_SIZE
from metrics.similarity import PROTOCOLS
from report.statistics import METRICS, NAMES, PERCEPTUAL_NOTE, REFERENCES
from report.tables import fvd_table, table
from tools import FRAMES_PER_SECOND, GREEN, RED
from training.loading import describe_steps

SPEEDS = {"¼": 0.25, "½": 0.5, "1": 1, "2": 2, "4": 4}


class Example(NamedTuple):
    """A test sequence whose videos are shown."""

    caption: str
    sheets: Mapping[str, str]
    """Name -> path of a sheet of all frames, written by `tools.save_grid`: the truth, then predictions."""
    videos: Sequence[str] = ()
    """Paths of video files that the page links."""


class Row(NamedTuple):
    """A row of the table of test sequences: averages over time, and paths of files."""

    averages: Mapping[str, float]
    files: Sequence[str]


def evaluation_page(results: Mapping[str, Any], plots: Sequence[str], files: Sequence[str], rows: Sequence[Row]) -> str:
    """Return the page of an evaluation. Paths are relative to it.

    Args:
        results: the content of `metrics.json`.
        plots: paths of pictures.
        files: paths of other files that are linked.
        rows: a row for each example.
    """
    c, count, samples = results["config"], results["num_examples"], results["config"]["num_samples"]
    facts = provenance(results)
    title = f"{c['model']} on {c['dataset']}"
    parts = [
        f"<h1>{escape(title)}: open-loop predictions</h1>",
        definition_list(facts),
        f"<p>{count} test sequence{'s' * (count > 1)}; {results['predicted_frames']} frames predicted from "
        f"{c['open_loop_ctx']} context frames; {samples} sample{'s' * (samples > 1)} of each sequence.</p>",
        *player(
            [Example(**example) for example in results.get("examples", [])],
            c["open_loop_ctx"],
            results["predicted_frames"],
            "The best, the median and the worst example (by SSIM, paper protocol), and the first ones.",
        ),
        *curves(plots),
        *tables(results["lines"], results["protocols"], count, samples),
        *perceptual_tables(results["lines"], {"first sample of each": results}),
        *links(files, rows),
        "<h2>Configuration</h2><details><summary>All keys and versions</summary>",
        definition_list({**c, **results["versions"]}),
        "</details>",
    ]
    named = [facts["run"], facts["checkpoint"], facts["evaluated"], f"commit {facts['commit']}"]
    return document(", ".join([title, *named]), parts)


def comparison_page(
    models: Mapping[str, Mapping[str, Any]],
    lines: Mapping[str, Any],
    ranks: Mapping[str, Mapping[str, Mapping[str, float]]],
    examples: Sequence[Example],
    plots: Sequence[str],
    files: Sequence[str],
) -> str:
    """Return the page of a comparison. Paths are relative to it.

    Args:
        models: name -> content of `metrics.json`.
        lines: the lines of all models, in the form of a single evaluation's.
        ranks: protocol -> name -> metric or "average" -> rank.
        examples: examples with one prediction of each model.
        plots, files: as in `evaluation_page`.
    """
    first = next(iter(models.values()))
    c, count = first["config"], first["num_examples"]
    title = f"{len(models)} models on {c['dataset']}"
    facts = {name: provenance(results) for name, results in models.items()}
    values = {
        name: fact
        | {key: str(value) for key, value in {**models[name]["config"], **models[name].get("versions", {})}.items()}
        for name, fact in facts.items()
    }
    all_keys = dict.fromkeys(itertools.chain(*values.values()))
    keys = [key for key in all_keys if len({own.get(key) for own in values.values()}) > 1]
    parts = [
        f"<h1>{escape(title)}: open-loop predictions</h1>",
        definition_list({name: ", ".join(fact.values()) for name, fact in facts.items()}),
        f"<p>{count} test sequence{'s' * (count > 1)}; {first['predicted_frames']} frames predicted from "
        f"{c['open_loop_ctx']} context frames.</p>",
        *player(
            examples,
            c["open_loop_ctx"],
            first["predicted_frames"],
            "The same test sequences for each model; each model's first sample.",
        ),
        *curves(plots),
        "<h2>Ranks</h2><p>By averages over all predicted frames; 1 is the best.</p>",
        html_table(
            ["average rank", *(f"{protocol} protocol" for protocol in ranks)],
            [[name, *(f"{by_model[name]['average']:.2f}" for by_model in ranks.values())] for name in models],
        ),
        *tables(lines, first["protocols"], count, c["num_samples"]),
        *perceptual_tables(lines, models),
        "<h2>Differences</h2><p>Keys and versions in which the evaluations differ.</p>",
        html_table(["key", *models], [[key, *(own.get(key, "-") for own in values.values())] for key in keys]),
        *links(files),
    ]
    return document(f"{title}: {', '.join(models)}", parts)


def provenance(results: Mapping[str, Any]) -> dict[str, str]:
    """Return where an evaluation comes from; earlier versions recorded less of it."""
    recorded = results.get("provenance", {})
    return {
        "model": results["config"]["model"],
        "run": recorded.get("run", "not recorded"),
        "checkpoint": describe_steps(results["checkpoint_step"], recorded.get("stages")),
        "evaluated": recorded.get("date", "not recorded"),
        "commit": recorded.get("commit", "not recorded"),
    }


# ---------------------------------------------------------------------------------------------- parts of a page


def player(examples: Sequence[Example], context: int, predicted: int, note: str) -> Iterable[str]:
    """Yield the videos of each example under one control: the truth, and each prediction with its error."""
    if not examples:
        return
    frames = context + predicted
    share = f"{100 * context / frames:.2f}%"
    speeds = "".join(
        f'<option value="{value}"{" selected" * (value == 1)}>{name}x</option>' for name, value in SPEEDS.items()
    )
    yield f"<h2>Examples</h2><p>{escape(note)} Context frames, which the model sees and reconstructs, have a green "
    yield "border; predicted frames have a red border. Errors are absolute.</p>"
    yield (
        f'<div class="player" data-frames="{frames}" data-context="{context}" data-rate="{FRAMES_PER_SECOND}" '
        f'style="--context: rgb{GREEN}; --predicted: rgb{RED}">'
    )
    yield (
        '<nav aria-label="All videos"><button type="button">Play</button>'
        '<button type="button" aria-label="One frame back" title="One frame back">-1</button>'
        '<button type="button" aria-label="One frame forward" title="One frame forward">+1</button>'
        '<button type="button">First predicted frame</button>'
        f'<select aria-label="Speed" title="Speed">{speeds}</select>'
        f'<div class="time"><input type="range" min="1" max="{frames}" value="1" aria-label="Frame">'
        f'<div class="phases" style="background: linear-gradient(to right, var(--context) {share}, '
        f'var(--predicted) {share})"></div></div><output></output></nav>'
    )
    yield "<noscript><p>The videos need JavaScript; their files are linked below.</p></noscript>"
    most = max(len(example.sheets) for example in examples)
    yield f'<div class="examples{" wide" * (most > 2)}">'
    for example in examples:
        (truth, truth_sheet), *others = example.sheets.items()
        linked = "".join(f' <a href="{escape(path)}">{escape(path.rsplit(".")[-1])}</a>' for path in example.videos)
        yield f'<figure><figcaption>{escape(example.caption)}{linked}</figcaption><div class="panels">'
        yield panel(truth, truth_sheet)
        for name, sheet in others:
            yield panel(name, sheet, model=True)
            yield panel("error" if len(others) == 1 else f"error of {name}", truth_sheet, minus=sheet)
        yield "</div></figure>"
    yield "</div></div>"
    yield f"<script>\n{read_asset('page.js')}</script>"


def panel(name: str, sheet: str, minus: str = "", model: bool = False) -> str:
    """Return a video of a sheet's frames, or of their absolute difference from those of the sheet `minus`."""
    other = f' data-minus="{escape(minus)}"' if minus else ""
    return (
        f'<div><canvas width="{FRAME_SIZE}" height="{FRAME_SIZE}"{" class=model" * model} role="img" '
        f'aria-label="{escape(name)}" data-sheet="{escape(sheet)}"{other}></canvas><span>{escape(name)}</span></div>'
    )


def curves(plots: Sequence[str]) -> Iterable[str]:
    """Yield the plots, each with a link to its file."""
    yield '<h2>Quality over distance</h2><div class="plots">'
    for path in map(escape, plots):
        yield f'<figure><a href="{path}"><img src="{path}" alt="{path}"></a></figure>'
    yield "</div>"


def tables(lines: Mapping[str, Any], protocols: Mapping[str, str], count: int, samples: int) -> Iterable[str]:
    """Yield the tables of averages in each protocol."""
    yield "<h2>Averages</h2><p>Over all predicted frames, and over the first ones."
    if count > 1:
        yield "In brackets: 95 % confidence intervals, from a bootstrap over the sequences."
    if samples > 1:
        yield (
            f"The best of {samples} is each sequence's best sample over all predicted frames. Over the first frames, "
            f"other samples may be better, so it can be below the mean of {samples}."
        )
    yield "</p>"
    for protocol, description in protocols.items():
        yield f"<h3>Protocol <code>{protocol}</code></h3><p>{escape(description)}.</p>"
        for metric in lines[protocol]:
            yield html_table(*table(lines, protocol, [metric]))


def perceptual_tables(lines: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    """Yield the tables of LPIPS and FVD, if all models have them."""
    metrics = next(iter(models.values())).get("perceptual", {})
    if not metrics:
        return
    yield f"<h3>{' and '.join(NAMES[metric] for metric in metrics)}</h3><p>{escape(PERCEPTUAL_NOTE)}</p>"
    if "lpips" in metrics:
        yield html_table(*table(lines, "perceptual", ["lpips"]))
    if "fvd" in metrics:
        yield html_table(*fvd_table(models))


def links(files: Sequence[str], rows: Sequence[Row] = ()) -> Iterable[str]:
    """Yield links to files, and a table of the examples with links to their files."""
    yield f"<h2>Files</h2><p>{', '.join(map(link, files))}</p>"
    if not rows:
        return
    keys = (f"{protocol}_{metric}" for protocol in PROTOCOLS for metric in METRICS)
    shown = [key for key in keys if key in rows[0].averages]
    header = ["example", *(f"{NAMES[key.split('_')[1]]}, {key.split('_')[0]}" for key in shown), "files"]
    cells = (
        [str(number), *(f"{row.averages[key]:.4g}" for key in shown), Raw(" ".join(map(link, row.files)))]
        for number, row in enumerate(rows)
    )
    yield f"<details><summary>{len(rows)} example{'s' * (len(rows) > 1)}</summary>{html_table(header, cells)}</details>"


class Raw(str):
    """HTML that must not be escaped."""


def link(path: str) -> str:
    """Return a link to a file, with its name as text."""
    return f'<a href="{escape(path)}">{escape(path.rsplit("/")[-1])}</a>'


def html_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in a box that scrolls. If it has references, the other rows are bold."""
    rows = list(rows)
    references = [row[0].endswith(tuple(REFERENCES.values())) for row in rows]
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = ""
    for row, reference in zip(rows, references, strict=True):
        cells = "".join(f"<td>{cell if isinstance(cell, Raw) else escape(cell)}</td>" for cell in row)
        own = ' class="own"' if any(references) and not reference else ""
        body += f"<tr{own}>{cells}</tr>"
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(header[-1])}">{table}</div>'


def definition_list(facts: Mapping[str, Any]) -> str:
    """Return facts as a list of names and values."""
    return f"<dl>{''.join(f'<dt>{escape(key)}</dt><dd>{escape(str(value))}</dd>' for key, value in facts.items())}</dl>"


def document(title: str, parts: Iterable[str]) -> str:
    """Return a page from its title and the parts of its body."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>\n{read_asset('page.css')}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(parts) + "\n</body></html>\n"


def read_asset(name: str) -> str:
    """Return the content of a script or style sheet in this directory."""
    return Path(__file__).with_name(name).read_text()

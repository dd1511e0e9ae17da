"""An evaluation as a page to look at in a browser."""

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from report.statistics import METRICS, PERCEPTION, REFERENCES
from report.tables import fvd_table, table

STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 18%, transparent); }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.5rem; margin-bottom: .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
p, figcaption { color: color-mix(in srgb, currentColor 70%, transparent); max-width: 60rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin-bottom: 1rem; font-variant-numeric: tabular-nums; }
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
figure video { width: 100%; }
.frames { image-rendering: pixelated; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .9rem; }
dd { margin: 0; overflow-wrap: anywhere; }
"""


def page(results: Mapping[str, Any], plots: Sequence[str]) -> str:
    """Return an HTML page that needs nothing but the files beside it.

    Args:
        results: what `metrics.json` holds.
        plots: paths of pictures, relative to the page.
    """
    config, count = results["config"], results["num_examples"]
    name = f"{config['dataset']}, step {results['checkpoint_step']}"
    parts = [
        f"<h1>Open-loop predictions: {html.escape(name)}</h1>",
        f"<p>{count} test sequence{'s' * (count > 1)}; {results['predicted_frames']} frames predicted from "
        f"{config['open_loop_ctx']} context frames; {config['num_samples']} sample{'s' * (config['num_samples'] > 1)} "
        f"of each.{' In brackets: 95 % confidence, from a bootstrap over the sequences.' * (count > 1)}</p>",
    ]
    for protocol, description in results["protocols"].items():
        parts += [f"<h2>Protocol <code>{protocol}</code></h2>", f"<p>{html.escape(description)}</p>"]
        for metric in METRICS:
            parts.append(html_table(*table(results["lines"], protocol, [metric]), set(REFERENCES.values())))
    if perceptual := results.get("perceptual"):
        parts += ["<h2>LPIPS and FVD</h2>", f"<p>{html.escape(PERCEPTION)}</p>"]
        if "lpips" in perceptual:
            parts.append(html_table(*table(results["lines"], "perceptual", ["lpips"]), set()))
        if "fvd" in perceptual:
            parts.append(html_table(*fvd_table({"first sample of each": results}), set()))
    parts += ["<h2>Quality over distance</h2>", '<div class="by2">']
    parts += [f'<figure><img src="{html.escape(path)}" alt="{html.escape(path)}"></figure>' for path in plots]
    parts.append("</div>")
    if results["videos"]:
        parts.append(
            "<h2>Examples</h2><p>Chosen by SSIM (paper protocol). Green: context, which the model is given. Red: "
            "predicted. The error is absolute.</p>"
        )
        parts.append(f'<div class="by{3 if config["num_samples"] == 1 else 2}">')
        parts += [
            f"<figure>{moving(path)}<figcaption>{html.escape(caption)}</figcaption></figure>"
            for caption, path in results["videos"].items()
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


def moving(path: str) -> str:
    """Return the element that shows a GIF or an MP4."""
    if path.endswith(".mp4"):
        return f'<video class="frames" src="{html.escape(path)}" autoplay muted loop controls></video>'
    return f'<img class="frames" src="{html.escape(path)}" alt="">'


def html_table(header: Sequence[str], rows: Iterable[Sequence[str]], references: set[str]) -> str:
    """Return a table whose rows stand out unless their first cell is one of `references`."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = ""
    for row in rows:
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        body += f"<tr>{cells}</tr>" if row[0] in references else f'<tr class="own">{cells}</tr>'
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'

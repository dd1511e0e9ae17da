"""Plots: lines over predicted frames or steps, bars, and rows of frames.

Figures are for papers: at most as wide as a column or a page, with text of 8 points.
"""

import contextlib
import io
import itertools
import os
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from report.statistics import REFERENCES
from system.files import replace_file
from tools import GREEN, RED, rgb

COLUMN, PAGE = 3.25, 6.75
"""Widths in inches of a paper's column, and of its page with two columns."""

STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": "medium",  # the size of all other text
    "legend.frameon": False,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.alpha": 0.4,
    "grid.linewidth": 0.5,
    "savefig.dpi": 300,
    "savefig.bbox": None,  # figures keep their width
    # TrueType fonts: conferences refuse matplotlib's default, Type 3.
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
}
"""Matplotlib's settings for all figures."""

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Colours of models: those of Okabe and Ito without yellow and black. Colour-blind readers can tell them apart."""

DASHES = tuple((0, dashes) for dashes in ((), (6, 1.5), (6, 1.5, 1, 1.5), (3, 1), (9, 1.5, 3, 1.5), (6, 1, 1, 1, 1, 1)))
"""Line styles of models, which tell them apart without colours. Dots are for companions, see `Line`."""

DARK, MEDIUM, LIGHT = "#000000", "#4d4d4d", "#7f7f7f"
REFERENCE_STYLES: dict[str, dict[str, Any]] = {
    REFERENCES["posterior"]: {"color": DARK, "linestyle": (0, (4, 1.5))},
    REFERENCES["copy"]: {"color": LIGHT, "linestyle": (0, ())},
    REFERENCES["random"]: {"color": MEDIUM, "linestyle": (0, (4, 1.5, 1, 1.5))},
    REFERENCES["shuffled"]: {"color": LIGHT, "linestyle": (0, (8, 2))},
}
"""Styles of known references, in grey, so that no reference has a model's colour."""
OTHER_REFERENCES: tuple[dict[str, Any], ...] = (
    {"color": DARK, "linestyle": (0, ())},
    {"color": LIGHT, "linestyle": (0, (1, 1.5))},
)
"""Styles of other references, in turn."""


class Line(NamedTuple):
    """A curve, with an optional band around it."""

    values: np.ndarray  # [T]
    low: np.ndarray | None = None  # [T], the lower edge of the band
    high: np.ndarray | None = None  # [T], the upper edge of the band
    reference: bool = False  # not a model's line: drawn in grey
    companion_of: str = ""  # name of the line whose colour it shares; drawn dotted, and named "<that name>, <label>"
    thin_label: str = ""  # common label of several companions, which are drawn thin instead of dotted
    x: np.ndarray | None = None  # [T]; None: 1, 2, ..., the predicted frames


def plot_lines(
    lines: Mapping[str, Line],
    path: Path,
    ylabel: str,
    band: str = "95 % interval",
    xlabel: str = "predicted frame",
    formats: Sequence[str] = ("png",),
) -> None:
    """Write a plot of named lines. Long lines and their bands are drawn as running means.

    Args:
        lines: the lines by name. The y-axis covers the models' lines. A triangle at its edge marks where a reference
            leaves it.
        path: the path of the figure.
        ylabel: the label of the y-axis.
        band: the label of the bands.
        xlabel: the label of the x-axis.
        formats: see `save_figure`.
    """
    length = max(len(line.values) for line in lines.values())
    window = max(1, length // 40) // 2 * 2 + 1
    lines = {name: smoothed(line, window) for name, line in lines.items()}
    styles = styles_of(lines)
    with new_figure(path, formats, figsize=(COLUMN, 2.3)) as figure:
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch

        axes = figure.subplots()
        entries: dict[str, Any] = {}
        bands = False
        for name, line in lines.items():
            x, style = np.arange(1, len(line.values) + 1) if line.x is None else line.x, styles[name]
            (curve,) = axes.plot(x, line.values, marker="." if len(x) == 1 else None, **style)
            if not line.companion_of:
                entries[name] = curve
            if line.low is not None and line.high is not None:
                axes.fill_between(x, line.low, line.high, alpha=0.18, color=style["color"], linewidth=0, zorder=0)
                bands |= bool((line.high > line.low).any())
        for name, line in lines.items():
            if line.companion_of:
                label = line.thin_label or name.removeprefix(f"{line.companion_of}, ")
                entries[label] = Line2D([], [], **styles[name] | {"color": MEDIUM})
        if bands:
            entries[band] = Patch(color=MEDIUM, alpha=0.25, linewidth=0)
        low, high = axis_limits(lines)
        if high > low:
            axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
            cuts = [mark_cuts(axes, line, styles[name]["color"]) for name, line in lines.items()]
            if any(cuts):
                entries["leaves the axis"] = Line2D([], [], color=MEDIUM, marker="^", markersize=4, linestyle="")
        axes.set_xlabel(xlabel)
        axes.set_ylabel(textwrap.fill(ylabel, 36))
        axes.grid(axis="y")
        add_legend(figure, entries, f"running means of {window} values" if window > 1 else "")


def smoothed(line: Line, window: int) -> Line:
    """Return the running means of a line and of its band.

    The new band is the mean of intervals, not the interval of the running mean.
    """
    values, low, high = (x if x is None else running_mean(x, window) for x in (line.values, line.low, line.high))
    assert values is not None
    return line._replace(values=values, low=low, high=high)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Return the means over `window` values around each value, [T]; near the ends, over fewer. `window` is odd."""
    index = np.arange(len(values))
    reach = np.minimum(np.minimum(index, index[::-1]), window // 2)
    sums = np.concatenate([[0], np.cumsum(values)])
    return (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)


def styles_of(lines: Mapping[str, Line]) -> dict[str, dict[str, Any]]:
    """Return colour, line style and width of each line. All models and references look different."""
    others, numbers = itertools.cycle(OTHER_REFERENCES), itertools.count()
    styles: dict[str, dict[str, Any]] = {}
    for name, line in lines.items():
        if line.reference:
            styles[name] = {"linewidth": 1.0} | (REFERENCE_STYLES.get(name) or next(others))
        elif line.companion_of:
            dotted = {"linewidth": 1.0, "linestyle": (0, (1, 1.2))}
            shape = {"linewidth": 0.6, "alpha": 0.7} if line.thin_label else dotted
            styles[name] = {"color": styles[line.companion_of]["color"]} | shape
        else:
            lap, index = divmod(next(numbers), len(COLORS))
            styles[name] = {"linewidth": 1.4, "color": COLORS[index], "linestyle": DASHES[(index + lap) % len(DASHES)]}
    return styles


def axis_limits(lines: Mapping[str, Line]) -> tuple[float, float]:
    """Return the limits of the y-axis: it covers the models' lines and bands, and the references' medians.

    It covers all of a reference if this at most doubles its length. Some references are far off for a few frames, such
    as the last context frame when the video returns to it, and would leave little room for the models.
    """
    medians = [np.median(line.values, keepdims=True) for line in lines.values() if line.reference]
    models = [x for line in lines.values() if not line.reference for x in (line.values, line.low, line.high)]
    shown = finite(np.concatenate([x for x in medians + models if x is not None]))
    if not len(shown):
        return 0.0, 0.0
    low, high = shown.min(), shown.max()
    most = 2 * (high - low)
    for line in lines.values():
        if line.reference and len(values := finite(line.values)):
            wider = min(low, values.min()), max(high, values.max())
            if wider[1] - wider[0] <= most:
                low, high = wider
    return float(low), float(high)


def finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]


def mark_cuts(axes: Any, line: Line, color: str) -> bool:
    """Mark each section of a line beyond the axes by a triangle at their edge; return whether there is one."""
    low, high = axes.get_ylim()
    cut = False
    x = np.arange(1, len(line.values) + 1) if line.x is None else line.x
    for beyond, edge, marker in (line.values > high, high, "^"), (line.values < low, low, "v"):
        starts, stops = np.flatnonzero(np.diff(beyond, prepend=False, append=False)).reshape(-1, 2).T
        for middle in x[(starts + stops - 1) // 2]:
            axes.plot(middle, edge, marker, color=color, markersize=4, clip_on=False)
            cut = True
    return cut


def add_legend(figure: Any, entries: Mapping[str, Any], title: str) -> None:
    """Add a legend below the axes, in as many columns as fit, and make the figure higher by its height.

    Args:
        figure: a figure of constrained layout.
        entries: the artists by label.
        title: the title of the legend; "" for none.
    """
    names = [textwrap.fill(name, 42) for name in entries]
    for columns in 3, 2, 1:
        legend = figure.legend(
            entries.values(),
            names,
            loc="outside lower center",
            ncols=columns,
            title=title or None,
            handlelength=2.6,
            columnspacing=1.2,
            borderaxespad=0.2,
        )
        if legend.get_window_extent().width <= figure.bbox.width:
            break
        if columns > 1:
            legend.remove()
    figure.set_figheight(figure.get_figheight() + legend.get_window_extent().height / figure.dpi)


def metric_lines(lines: Mapping[str, Mapping[str, Any]]) -> dict[str, Line]:
    """Return the `statistics.summary`s of one metric by name as lines of a plot; references have no bands."""
    found = {}
    for name, figures in lines.items():
        value, low, high = (np.array(figures["curve"][key]) for key in ("value", "low", "high"))
        found[name] = Line(value, reference=True) if name in REFERENCES.values() else Line(value, low, high)
    return found


def plot_bars(
    groups: Mapping[str, Mapping[str, tuple[float, float, float]]],
    path: Path,
    ylabel: str,
    formats: Sequence[str] = ("png",),
) -> None:
    """Write a bar plot: group -> name of a bar -> value, low, high. Each group has its own panel.

    A name has the same colour in all groups. A group has error bars if one of its intervals has any extent.
    """
    names = list(dict.fromkeys(itertools.chain(*groups.values())))
    with new_figure(path, formats, figsize=(COLUMN if len(groups) == 1 else PAGE, 2.6)) as figure:
        panels = figure.subplots(1, len(groups), squeeze=False)
        for axes, (title, bars) in zip(panels[0], groups.items(), strict=True):
            values, low, high = np.array(list(bars.values())).T
            errors = np.maximum([values - low, high - values], 0)
            style: Any = {"yerr": errors, "capsize": 3, "error_kw": {"elinewidth": 0.8}} if errors.any() else {}
            colors = [COLORS[names.index(name) % len(COLORS)] for name in bars]
            axes.bar(range(len(bars)), values, color=colors, **style)
            axes.set_xticks(range(len(bars)), list(bars), rotation=30, ha="right", rotation_mode="anchor")
            axes.set_xlim(-0.6, max(map(len, groups.values())) - 0.4)  # bars of one width in all panels
            axes.set_title(title)
            axes.grid(axis="y")
        panels[0, 0].set_ylabel(textwrap.fill(ylabel, 36))


def save_rows(
    rows: Mapping[str, np.ndarray],
    path: Path,
    times: np.ndarray,
    context: Mapping[str, int],
    formats: Sequence[str] = ("png",),
    boundaries: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write a figure with a row for each named video, uint8 [T, H, W, C], at most as wide as a page.

    Args:
        rows: the videos by name.
        path: the path of the figure.
        times: the numbers of the frames that are shown.
        context: the context frames of each row, which have a green border; predicted frames have a red one. Rows that
            aren't named here (the truth) have a grey border.
        formats: see `save_figure`.
        boundaries: probabilities [T] of rows that a segment begins. They are written below the frames. If one is at
            least 1/2, there is a bar at the left of its frame.
    """
    label_width = 0.2 + 0.065 * max(map(len, rows))  # inches
    side = min(0.8, (PAGE - label_width) / len(times))
    height = 0.3 + side * len(rows) + 0.15 * len(boundaries or ())
    with new_figure(path, formats, figsize=(label_width + side * len(times), height), layout="compressed") as figure:
        figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.04, hspace=0.04)
        panels = figure.subplots(len(rows), len(times), squeeze=False)
        for y, (name, video) in enumerate(rows.items()):
            for x, time in enumerate(times):
                axes = panels[y, x]
                axes.imshow(rgb(video[time]), interpolation="nearest")
                axes.set(xticks=[], yticks=[])
                border = GREEN if time < context.get(name, 0) else RED
                color = np.array(border) / 255 if name in context else "0.8"
                axes.spines[:].set(visible=True, color=color, linewidth=1.2)
                if y == 0:
                    axes.set_title(str(time + 1), pad=2)
                if boundaries and name in boundaries:
                    axes.set_xlabel(short_probability(boundaries[name][time]), labelpad=2)
                    if boundaries[name][time] >= 0.5:
                        axes.axvline(-0.5, color=COLORS[0], linewidth=5)
            panels[y, 0].set_ylabel(name, rotation=0, ha="right", va="center")


def short_probability(probability: float) -> str:
    """Return a probability with two digits, such as `.07`, which fits below a frame."""
    return "1" if probability >= 0.995 else f"{probability:.2f}".removeprefix("0")


def save_figure(figure: Any, path: Path, formats: Sequence[str]) -> None:
    """Write a figure in each of the formats, which replace the suffix of the path."""
    for suffix in formats:
        buffer = io.BytesIO()
        figure.savefig(buffer, format=suffix)
        replace_file(path.with_suffix(f".{suffix}"), buffer.getvalue())


@contextlib.contextmanager
def new_figure(path: Path, formats: Sequence[str], **options: Any) -> Iterator[Any]:
    """Yield a matplotlib figure in STYLE that isn't shown on a screen, and write it at the end of the block.

    Matplotlib is imported here, since that takes long and only evaluations plot. It can't be imported if MPLBACKEND
    names a notebook's backend that isn't installed, so this variable is removed during the import.
    """
    backend = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
    import matplotlib
    from matplotlib.figure import Figure

    if backend is not None:
        os.environ["MPLBACKEND"] = backend
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = backend  # for other plots of this process; files need no backend
    with matplotlib.rc_context(STYLE):
        figure = Figure(**{"layout": "constrained"} | options)
        yield figure
        save_figure(figure, path, formats)

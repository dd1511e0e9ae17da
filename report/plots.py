"""Plots: lines over predicted frames or steps, bars, rows of frames. Of the width of a paper's column."""

import contextlib
import io
import itertools
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from report.statistics import REFERENCES
from system.files import replace_file
from tools import GREEN, RED, rgb

REFERENCE_STYLES: dict[str, dict[str, Any]] = {
    REFERENCES["posterior"]: {"color": "#1b7f4d", "linestyle": (0, (5, 2))},
    REFERENCES["copy"]: {"color": "#9a6a00", "linestyle": (0, (1, 1.5))},
    REFERENCES["random"]: {"color": "#7a4fa3", "linestyle": (0, (5, 1.5, 1, 1.5))},
    REFERENCES["shuffled"]: {"color": "#5b6770", "linestyle": (0, (3, 1))},
}
COLORS = ("#1f5fbf", "#d1352b", "#e88a00", "#0fa3b1", "#c2419a", "#6b6b6b", "#4c8c1a", "#7d4b32")


class Line(NamedTuple):
    """A curve, [T] each, with a band around it: over predicted frames from 1 on, or over `x`.

    A reference has a style of its own; a line `beside` another one is dotted, or thin, in that one's colour.
    """

    values: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    reference: bool = False
    beside: str = ""
    thin: bool = False
    x: np.ndarray | None = None


def plot_lines(
    lines: Mapping[str, Line],
    path: Path,
    ylabel: str,
    title: str = "",
    xlabel: str = "predicted frame",
    formats: Sequence[str] = ("png",),
) -> None:
    """Write a plot of named lines. Long ones are drawn as running means, faintly with what they are means of.

    Names stand at the lines' ends; those of lines beside others in a note. The models' lines decide what part of the
    axis is seen: of references, which may leave it, at least the median.
    """
    figure = new_figure(figsize=(3.3, 2.3))
    axes = figure.subplots()
    length = max(len(line.values) for line in lines.values())
    window = max(1, length // 40) // 2 * 2 + 1
    colors, other_styles = itertools.cycle(COLORS), itertools.cycle(REFERENCE_STYLES.values())
    color_of: dict[str, str] = {}
    ends, seen = [], []
    for name, line in lines.items():
        x = np.arange(1, len(line.values) + 1) if line.x is None else line.x
        if line.reference:
            style = {"linewidth": 1.1} | (REFERENCE_STYLES.get(name) or next(other_styles))
        elif line.beside:
            style = {"color": color_of[line.beside]}
            style |= {"linewidth": 0.6, "alpha": 0.7} if line.thin else {"linewidth": 1.1, "linestyle": ":"}
        else:
            style = {"linewidth": 1.5, "color": next(colors)}
        color = color_of[name] = style["color"]
        smooth = running_mean(line.values, window)
        axes.plot(x, smooth, marker="." if len(x) == 1 else None, **style)
        if window > 1 and not line.beside:
            axes.plot(x, line.values, color=color, alpha=0.25, linewidth=0.4, zorder=1)
        if line.low is not None and line.high is not None:
            axes.fill_between(x, line.low, line.high, alpha=0.15, color=color, linewidth=0, zorder=0)
        seen += [np.array([np.median(line.values)])] if line.reference else [line.values, smooth]
        if not line.beside:
            ends.append((name, color, float(smooth[-1])))
    shown = np.concatenate(seen)
    shown = shown[np.isfinite(shown)]
    if len(shown) and np.ptp(shown):
        margin = 0.06 * np.ptp(shown)
        axes.set_ylim(shown.min() - margin, shown.max() + margin)
    dotted = {name: line.beside for name, line in lines.items() if line.beside and not line.thin}
    notes = dict.fromkeys(name.removeprefix(f"{beside}, ") for name, beside in dotted.items())
    below = [f"bold: mean of {window}"] * (window > 1) + [f"dotted: {note}" for note in notes]
    axes.set_xlabel(xlabel + (f"  ({'; '.join(below)})" if below else ""), fontsize=7)
    axes.set_ylabel(ylabel, fontsize=7)
    axes.set_title(title, fontsize=8)
    tidy(axes)
    label_ends(axes, ends)
    save_figure(figure, path, formats)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Return the mean over `window` values, an odd number, around each one; towards the ends, over fewer."""
    place = np.arange(len(values))
    reach = np.minimum(np.minimum(place, place[::-1]), window // 2)
    sums = np.concatenate([[0], np.cumsum(values)])
    return (sums[place + reach + 1] - sums[place - reach]) / (2 * reach + 1)


def label_ends(axes: Any, ends: Sequence[tuple[str, str, float]]) -> None:
    """Write names (name, colour, height) to the right of the axes at their heights, moved apart where they overlap.

    They stay beside the axes, as far as so many find place there.
    """
    low, high = axes.get_ylim()
    gap = 0.075 * (high - low)
    ends = sorted(ends, key=lambda end: end[2])
    heights = [end[2] for end in ends]
    for _ in range(100):
        heights = [min(max(height, low), high) for height in heights]
        for i in range(len(heights) - 1):
            if (overlap := gap - (heights[i + 1] - heights[i])) > 0:
                heights[i] -= overlap / 2
                heights[i + 1] += overlap / 2
    for (name, color, _), height in zip(ends, heights, strict=True):
        axes.annotate(
            name,
            (1.02, (height - low) / (high - low)),
            xycoords="axes fraction",
            color=color,
            fontsize=7,
            va="center",
            annotation_clip=False,
        )


def drawn(lines: Mapping[str, Mapping[str, Any]]) -> dict[str, Line]:
    """Return one metric's lines as `plot_lines` takes them: with confidence intervals, which references leave to the
    tables."""
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
    """Write bars: group -> name of a bar -> value, low, high. Each group has a panel of its own.

    Error bars are left out where no interval of a group has any extent.
    """
    figure = new_figure(figsize=(1 + 2.4 * len(groups), 2.8), layout="tight")
    panels = figure.subplots(1, len(groups), squeeze=False)
    for axes, (title, bars) in zip(panels[0], groups.items(), strict=True):
        values, low, high = np.array(list(bars.values())).T
        errors = np.maximum([values - low, high - values], 0)
        style: Any = {"yerr": errors, "capsize": 3} if errors.any() else {}
        axes.bar(range(len(bars)), values, color=[COLORS[i % len(COLORS)] for i in range(len(bars))], **style)
        axes.set_xticks(range(len(bars)), list(bars), rotation=30, ha="right", fontsize=8)
        axes.set_title(title, fontsize=9)
        tidy(axes)
    panels[0, 0].set_ylabel(ylabel, fontsize=8)
    save_figure(figure, path, formats)


def save_rows(
    rows: Mapping[str, np.ndarray],
    path: Path,
    times: np.ndarray,
    context: Mapping[str, int],
    formats: Sequence[str] = ("png",),
    boundaries: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write named videos uint8 [T, H, W, C] as rows of their frames at `times`.

    Frames of a row's context are framed green, predicted ones red; a row without context (the truth) not at all.
    `boundaries` are probabilities [T] that a segment begins: they stand below the frames, and where they are at least
    1/2, a bar stands at the left.
    """
    figure = new_figure(figsize=(0.8 * len(times) + 1.4, 0.85 * len(rows) + 0.3))
    panels = figure.subplots(len(rows), len(times), squeeze=False)
    for y, (name, video) in enumerate(rows.items()):
        for x, time in enumerate(times):
            axes = panels[y, x]
            axes.imshow(rgb(video[time]), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            color = "0.8" if name not in context else GREEN if time < context[name] else RED
            axes.spines[:].set(color=np.array(color) / 255 if name in context else color, linewidth=1.5)
            if y == 0:
                axes.set_title(str(time + 1), fontsize=8)
            if boundaries and name in boundaries:
                axes.set_xlabel(f"{boundaries[name][time]:.2f}", fontsize=6, labelpad=2)
                if boundaries[name][time] >= 0.5:
                    axes.axvline(-0.5, color=COLORS[0], linewidth=6)
        panels[y, 0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    save_figure(figure, path, formats)


def save_figure(figure: Any, path: Path, formats: Sequence[str]) -> None:
    """Write a figure in each of the formats, which take the place of the path's suffix."""
    for suffix in formats:
        buffer = io.BytesIO()
        figure.savefig(buffer, format=suffix, dpi=250, bbox_inches="tight")
        replace_file(path.with_suffix(f".{suffix}"), buffer.getvalue())


def new_figure(**how: Any) -> Any:
    """Return a matplotlib figure that no screen shows. Slow to import, and only evaluation plots.

    MPLBACKEND may name a notebook's backend that isn't installed here, with which matplotlib can't be imported.
    """
    backend = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
    import matplotlib
    from matplotlib.figure import Figure

    if backend is not None:
        os.environ["MPLBACKEND"] = backend
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = backend  # for others in this process; files need none
    return Figure(**how)


def tidy(axes: Any) -> None:
    axes.grid(axis="y", alpha=0.4, linewidth=0.5)
    axes.tick_params(labelsize=7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)

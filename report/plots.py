"""Plots: lines over predicted frames or steps, bars, rows of frames."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from report import plots
from report.statistics import REFERENCES
from tools import GREEN, RED, rgb


class Line(NamedTuple):
    """A curve, [T] each, with a band around it: over predicted frames from 1 on, or over `x`.

    A reference is drawn dashed and grey; a line `beside` another one dotted, in that one's colour.
    """

    values: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    reference: bool = False
    beside: str = ""
    x: np.ndarray | None = None


def plot_lines(
    lines: Mapping[str, Line], path: Path, ylabel: str, title: str = "", xlabel: str = "predicted frame"
) -> None:
    """Writes a plot of named lines."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6.5, 4))
    dashes = itertools.cycle(["--", ":", "-."])
    colors: dict[str, Any] = {}
    for name, line in lines.items():
        x = np.arange(1, len(line.values) + 1) if line.x is None else line.x
        style: dict[str, Any] = {"color": "0.35", "linestyle": next(dashes), "linewidth": 1.2} if line.reference else {}
        if line.beside:
            style = {"color": colors[line.beside], "linestyle": ":", "linewidth": 1}
        (drawn,) = axes.plot(x, line.values, label=name, marker="." if len(x) == 1 else None, **style)
        colors[name] = drawn.get_color()
        if line.low is not None and line.high is not None:
            axes.fill_between(x, line.low, line.high, alpha=0.2, color=drawn.get_color(), linewidth=0)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    tidy(axes)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.15), ncols=3)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def drawn(lines: Mapping[str, Mapping[str, Any]]) -> dict[str, plots.Line]:
    """One metric's lines as `plots.plot_lines` takes them: with confidence intervals, which references leave to the
    tables."""
    found = {}
    for name, figures in lines.items():
        value, low, high = (np.array(figures["curve"][key]) for key in ("value", "low", "high"))
        reference = name in REFERENCES.values()
        found[name] = plots.Line(value, reference=True) if reference else plots.Line(value, low, high)
    return found


def plot_bars(groups: Mapping[str, Mapping[str, tuple[float, float, float]]], path: Path, ylabel: str) -> None:
    """Writes bars with error bars: group -> name of a bar -> value, low, high. Each group has a panel of its own."""
    plt = pyplot()
    figure, panels = plt.subplots(1, len(groups), figsize=(1 + 2.4 * len(groups), 3.2), squeeze=False, layout="tight")
    for axes, (title, bars) in zip(panels[0], groups.items(), strict=True):
        values, low, high = np.array(list(bars.values())).T
        errors = np.maximum([values - low, high - values], 0)
        axes.bar(range(len(bars)), values, yerr=errors, capsize=3, color=[f"C{i % 10}" for i in range(len(bars))])
        axes.set_xticks(range(len(bars)), list(bars), rotation=30, ha="right", fontsize=8)
        axes.set_title(title, fontsize=10)
        tidy(axes)
    panels[0, 0].set_ylabel(ylabel)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def save_rows(rows: Mapping[str, np.ndarray], path: Path, times: np.ndarray, context: Mapping[str, int]) -> None:
    """Writes named videos uint8 [T, H, W, C] as rows of their frames at `times`.

    Frames of a row's context are framed green, predicted ones red; a row without context (the truth) not at all.
    """
    plt = pyplot()
    figure, panels = plt.subplots(
        len(rows), len(times), figsize=(0.8 * len(times) + 1.4, 0.85 * len(rows) + 0.3), squeeze=False
    )
    for y, (name, video) in enumerate(rows.items()):
        for x, time in enumerate(times):
            axes = panels[y, x]
            axes.imshow(rgb(video[time]), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            color = "0.8" if name not in context else GREEN if time < context[name] else RED
            axes.spines[:].set(color=np.array(color) / 255 if name in context else color, linewidth=1.5)
            if y == 0:
                axes.set_title(str(time + 1), fontsize=8)
        panels[y, 0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def pyplot() -> Any:
    """Matplotlib's pyplot, without a screen. Slow to import, and only evaluation plots."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def tidy(axes: Any) -> None:
    axes.grid(axis="y", alpha=0.4)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)

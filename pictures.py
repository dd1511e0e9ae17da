"""Videos as pictures one can look at: grids, side-by-side comparisons, GIFs, and plots over time."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GREEN, RED = (0, 160, 80), (200, 40, 40)
"""Around frames that the model sees and reconstructs; around those that it predicts on its own."""


def save_grid(video: np.ndarray, path: Path, strip: int = 50) -> None:
    """Writes uint8 [T, H, W, C] as a PNG: rows of `strip` frames, 1 pixel apart; the last row may be shorter."""
    T, H, W, C = video.shape
    columns, rows = min(T, strip), -(-T // strip)
    grid = np.zeros((rows * columns, H + 1, W + 1, C), np.uint8)
    grid[:T, :H, :W] = video
    grid = (
        grid.reshape(rows, columns, H + 1, W + 1, C)
        .transpose(0, 2, 1, 3, 4)
        .reshape(rows * (H + 1), columns * (W + 1), C)
    )
    Image.fromarray(rgb(grid)[:-1, :-1]).save(path)


def rgb(image: np.ndarray) -> np.ndarray:
    """[..., C] as [..., 3]: colour as it is, else the first channel as grey."""
    return image if image.shape[-1] == 3 else np.repeat(image[..., :1], 3, axis=-1)


def comparison(truth: np.ndarray, prediction: np.ndarray, context: int) -> np.ndarray:
    """Truth | prediction | absolute error side by side, one row per example, uint8 [B, T, H, W, C] -> [T, H', W', 3].

    The frame around the prediction is green while the model sees the context and reconstructs it, then red.
    """
    B, T, H, W, _ = truth.shape
    error = np.abs(truth.astype(np.int16) - prediction).astype(np.uint8)
    border = 2
    picture = np.zeros((T, B, H + 2 * border, 3, W + 2 * border, 3), np.uint8)
    picture[:context, :, :, 1] = GREEN
    picture[context:, :, :, 1] = RED
    for column, video in enumerate((truth, prediction, error)):
        picture[:, :, border:-border, column, border:-border] = rgb(video).swapaxes(0, 1)
    return picture.reshape(T, B * (H + 2 * border), 3 * (W + 2 * border), 3)


def save_gif(video: np.ndarray, path: Path | str, frames_per_second: int = 15, scale: int = 2) -> None:
    """Writes uint8 [T, H, W, 3] as a GIF that repeats for ever, `scale` times enlarged.

    All frames share a palette, of 32 of them: 4 times as fast as one for each, and half the size.
    """
    sample = video[:: -(-len(video) // 32)]
    palette = Image.fromarray(sample.reshape(-1, *sample.shape[2:])).quantize(256)
    frames = [
        Image.fromarray(frame)
        .quantize(palette=palette, dither=Image.Dither.NONE)
        .resize((frame.shape[1] * scale, frame.shape[0] * scale), Image.Resampling.NEAREST)
        for frame in video
    ]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000 // frames_per_second, loop=0)


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


def side_by_side(rows: Mapping[str, np.ndarray], context: Mapping[str, int]) -> np.ndarray:
    """Named videos uint8 [T, H, W, C] beside each other under their names, framed as in `save_rows`: [T, H', W', 3]."""
    border, top = 2, 14
    panels = []
    for name, video in rows.items():
        T, H, W, _ = video.shape
        panel = np.zeros((T, top + H + 2 * border, W + 2 * border, 3), np.uint8)
        if name in context:
            panel[: context[name], top:] = GREEN
            panel[context[name] :, top:] = RED
        panel[:, top + border : -border, border:-border] = rgb(video)
        caption = Image.new("RGB", (W + 2 * border, top))
        ImageDraw.Draw(caption).text((border, 1), name, font=ImageFont.load_default(9))
        panel[:, :top] = np.asarray(caption)
        panels.append(panel)
    return np.concatenate(panels, axis=2)

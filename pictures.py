"""Videos as pictures one can look at: grids, side-by-side comparisons, GIFs, and plots over time."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image


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
    picture[:context, :, :, 1] = (0, 160, 80)
    picture[context:, :, :, 1] = (200, 40, 40)
    for column, video in enumerate((truth, prediction, error)):
        picture[:, :, border:-border, column, border:-border] = rgb(video).swapaxes(0, 1)
    return picture.reshape(T, B * (H + 2 * border), 3 * (W + 2 * border), 3)


def save_gif(video: np.ndarray, path: Path, frames_per_second: int = 15, scale: int = 2) -> None:
    """Writes uint8 [T, H, W, 3] as a GIF that repeats for ever, `scale` times enlarged."""
    frames = [
        Image.fromarray(frame).resize((frame.shape[1] * scale, frame.shape[0] * scale), Image.Resampling.NEAREST)
        for frame in video
    ]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000 // frames_per_second, loop=0)


class Line(NamedTuple):
    """A curve over predicted frames, [T] each, with a band around it; a reference is drawn dashed and grey."""

    values: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    reference: bool = False


def plot_lines(lines: Mapping[str, Line], path: Path, ylabel: str, title: str = "") -> None:
    """Writes a plot of named lines over predicted frames."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6.5, 4))
    dashes = itertools.cycle(["--", ":", "-."])
    for name, line in lines.items():
        frames = np.arange(1, len(line.values) + 1)
        style: dict[str, Any] = {"color": "0.35", "linestyle": next(dashes), "linewidth": 1.2} if line.reference else {}
        (drawn,) = axes.plot(frames, line.values, label=name, marker="." if len(frames) == 1 else None, **style)
        if line.low is not None and line.high is not None:
            axes.fill_between(frames, line.low, line.high, alpha=0.2, color=drawn.get_color(), linewidth=0)
    axes.set(xlabel="predicted frame", ylabel=ylabel, title=title)
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
    axes.spines[["top", "right"]].set_visible(False)

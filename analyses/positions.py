"""Measure how far the digit in predicted frames is from its true position, over time."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import scipy.ndimage

from analyses.accuracy import accuracy_lines, averages
from analyses.arguments import TrainedModel
from report import plots, statistics, tables
from videos.digits import MovingDigits

NEAR = 4
"""Pixels. A digit is in position if its centre is at most so far from the true one."""


NOISE = 16
"""Of 255. What isn't brighter is no ink; the haze that decoders leave on black isn't."""


DIGIT = 28
"""Pixels along each side of the window that a digit lies in, with its margins."""


def centers(frames: np.ndarray, at_once: int = 500) -> np.ndarray:
    """Return the centre of the ink of the digit in each frame, uint8 [..., H, W, 1] -> (y, x) in pixels [..., 2].

    It is the centroid within a window of a digit's size. The window begins where a blurred frame is brightest, and
    moves to its centroid three times: so ink elsewhere doesn't count, and of two halves that lie apart, the greater
    does. NaN if there is no ink.
    """
    *shape, H, W, _ = frames.shape
    axes = np.arange(H), np.arange(W)

    def of_frames(frames: np.ndarray) -> np.ndarray:
        ink = np.maximum(frames.astype(np.float32) - NOISE, 0)
        blurred = scipy.ndimage.gaussian_filter(ink, (0, DIGIT / 6, DIGIT / 6), mode="constant")
        center = np.stack(np.unravel_index(blurred.reshape(len(ink), -1).argmax(1), (H, W)), -1).astype(float)
        for _ in range(3):
            rows, columns = (np.abs(axes[i] - center[:, i, None]) <= DIGIT / 2 for i in range(2))
            down = np.einsum("nhw,nw->nh", ink, columns) * rows
            across = np.einsum("nhw,nh->nw", ink, rows) * columns
            with np.errstate(invalid="ignore"):
                center = np.stack([down @ axes[0], across @ axes[1]], -1) / down.sum(1, keepdims=True)
        return center

    flat = frames.reshape(-1, H, W)
    return np.concatenate([of_frames(flat[i : i + at_once]) for i in range(0, len(flat), at_once)]).reshape(*shape, 2)


def compare_positions(truth: np.ndarray, frames: np.ndarray, by_chance: Mapping[str, float]) -> dict[str, np.ndarray]:
    """Compare the digit's position in frames uint8 [B, T or 1, H, W, 1] with its true `centers` [B, T, 2].

    Frames that show nothing aren't near the truth, and are as far from it as a guess is on average.

    Returns:
        "distance": in pixels; "share": 1 if that is at most NEAR, else 0; "empty": 1 if nothing is shown. [B, T] each.
    """
    distance = np.linalg.norm(centers(frames) - truth, axis=-1)
    empty = np.isnan(distance)
    return {
        "distance": np.where(empty, by_chance["distance"], distance),
        "share": (distance <= NEAR).astype(float),
        "empty": empty.astype(float),
    }


def chance(train: MovingDigits, test: MovingDigits) -> dict[str, float]:
    """Return the mean "distance" of random training and test frames' digits, and the "share" of pairs that are near."""
    a, b = (
        centers(np.concatenate([windows[i][:: -(-windows.frames // 10)] for i in range(100)]))
        for windows in (train, test)
    )
    distance = np.linalg.norm(a[:, None] - b, axis=-1)
    return {"distance": float(distance.mean()), "share": float((distance <= NEAR).mean())}


def until(shares: Sequence[float]) -> int:
    """Return how many predicted frames go by before the share is one half or less."""
    return int(np.argmin([share > 0.5 for share in shares] + [False]))


def write_positions(
    models: Sequence[TrainedModel],
    found: Mapping[str, Mapping[str, np.ndarray]],
    by_chance: Mapping[str, float],
    directory: Path,
) -> None:
    """Print what `compare_positions` found, by line, and write it to position.json, .csv and position_*.png."""
    lines = {
        key: {name: statistics.summary(values[key]) for name, values in found.items()} for key in ("distance", "share")
    }
    copy = statistics.REFERENCES["copy"]
    ylabels = {"distance": "distance from the true position, pixels", "share": f"share within {NEAR} pixels"}
    for key, results in lines.items():
        drawn = accuracy_lines(models, results)
        drawn[copy] = plots.Line(np.array(results[copy]["curve"]["value"]), reference=True)
        drawn["chance"] = plots.Line(np.full(len(drawn[copy].values), by_chance[key]), reference=True)
        plots.plot_lines(drawn, directory / f"position_{key}.png", ylabels[key])
    over_half = {name: until(summary["curve"]["value"]) for name, summary in lines["share"].items()}
    empty = {name: float(values["empty"].mean()) for name, values in found.items()}
    tables.write(directory / "position.csv", tables.to_csv(tables.CSV_HEADER, tables.csv_rows({"position": lines})))
    more = {"near_pixels": NEAR, "chance": by_chance, "over_half_until": over_half, "empty": empty}
    tables.write(directory / "position.json", tables.to_json({**more, "lines": lines}))
    print(f"\nShare of frames with the digit within {NEAR} pixels of the truth; by chance {by_chance['share']:.3f}:")
    for name, summary in lines["share"].items():
        distance = tables.with_interval(lines["distance"][name]["average"], 1)
        nothing = f"; {100 * empty[name]:.2g} % of frames show nothing" * (empty[name] > 0)
        print(
            f"{name}: {averages(summary)}; over one half until frame {over_half[name]}; "
            f"mean distance {distance} pixels{nothing}"
        )
    print(f"Mean distance by chance: {by_chance['distance']:.1f} pixels")

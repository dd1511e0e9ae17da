"""Distance of the digit in predicted frames from its true position, over time (Figure 6)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import scipy.ndimage

from analyses.accuracy import accuracy_lines, format_averages
from analyses.arguments import TrainedModel
from report import plots, statistics, tables
from videos.digits import SIZE, MovingDigits

NEAR = 4
"""The distance in pixels up to which a digit is near its true position."""


NOISE = 16
"""The grey level, of 255, up to which a pixel has no ink: decoders leave some haze on black."""


def centers(frames: np.ndarray) -> np.ndarray:
    """Return the centre of the digit in each frame, uint8 [..., H, W, 1] -> (y, x) in pixels [..., 2].

    The centre is the centroid of the ink within a window of a digit's size. At first, the centre of the window is the
    brightest pixel of the blurred frame. Three times, the window moves to its centroid. Ink outside the window doesn't
    count; of two separate parts of a digit, the greater one counts. The centre is NaN if there is no ink.
    """
    *shape, H, W, _ = frames.shape
    axes = np.arange(H), np.arange(W)

    def of_batch(frames: np.ndarray) -> np.ndarray:
        ink = np.maximum(frames.astype(np.float32) - NOISE, 0)
        blurred = scipy.ndimage.gaussian_filter(ink, (0, SIZE / 6, SIZE / 6), mode="constant")
        center = np.stack(np.unravel_index(blurred.reshape(len(ink), -1).argmax(1), (H, W)), -1).astype(float)
        for _ in range(3):
            rows, columns = (np.abs(axes[i] - center[:, i, None]) <= SIZE / 2 for i in range(2))
            down = np.einsum("nhw,nw->nh", ink, columns) * rows
            across = np.einsum("nhw,nh->nw", ink, rows) * columns
            with np.errstate(invalid="ignore"):
                center = np.stack([down @ axes[0], across @ axes[1]], -1) / down.sum(1, keepdims=True)
        return center

    flat = frames.reshape(-1, H, W)
    found = [of_batch(flat[i : i + 500]) for i in range(0, len(flat), 500)]
    return np.concatenate(found).reshape(*shape, 2)


def compare_positions(truth: np.ndarray, frames: np.ndarray, by_chance: Mapping[str, float]) -> dict[str, np.ndarray]:
    """Compare the digit's position in frames uint8 [B, T or 1, H, W, 1] with its true `centers` [B, T, 2].

    An empty frame counts as not near, and has the mean distance of a guess.

    Returns:
        [B, T] each: "distance" in pixels; "share", 1 if the distance is at most NEAR, else 0; "empty", 1 if the frame
        has no ink, else 0.
    """
    distance = np.linalg.norm(centers(frames) - truth, axis=-1)
    empty = np.isnan(distance)
    return {
        "distance": np.where(empty, by_chance["distance"], distance),
        "share": (distance <= NEAR).astype(float),
        "empty": empty.astype(float),
    }


def chance(train: MovingDigits, test: MovingDigits) -> dict[str, float]:
    """Return the mean "distance" between digits of random training and test frames, and the "share" of near pairs."""
    a, b = (
        centers(np.concatenate([windows[i][:: -(-windows.frames // 10)] for i in range(100)]))
        for windows in (train, test)
    )
    distance = np.linalg.norm(a[:, None] - b, axis=-1)
    return {"distance": float(distance.mean()), "share": float((distance <= NEAR).mean())}


def frames_above_half(shares: Sequence[float]) -> int:
    """Return the number of predicted frames before the share is first one half or less."""
    return int(np.argmin([share > 0.5 for share in shares] + [False]))


def write_positions(
    models: Sequence[TrainedModel],
    found: Mapping[str, Mapping[str, np.ndarray]],
    by_chance: Mapping[str, float],
    directory: Path,
) -> None:
    """Write and print the results of `compare_positions`: position.json, position.csv, position_*.png.

    Args:
        models: the models that are compared.
        found: name of a line -> what `compare_positions` returns.
        by_chance: of `chance`.
        directory: the directory of the results.
    """
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
    over_half = {name: frames_above_half(summary["curve"]["value"]) for name, summary in lines["share"].items()}
    empty = {name: float(values["empty"].mean()) for name, values in found.items()}
    tables.write(directory / "position.csv", tables.to_csv(tables.CSV_HEADER, tables.csv_rows({"position": lines})))
    more = {"near_pixels": NEAR, "chance": by_chance, "over_half_until": over_half, "empty": empty}
    tables.write(directory / "position.json", tables.to_json({**more, "lines": lines}))
    print(f"\nShare of frames with the digit within {NEAR} pixels of the truth; by chance {by_chance['share']:.3f}:")
    for name, summary in lines["share"].items():
        distance = tables.with_interval(lines["distance"][name]["average"], 1)
        nothing = f"; {100 * empty[name]:.2g} % of frames show nothing" * (empty[name] > 0)
        print(
            f"{name}: {format_averages(summary)}; over one half until frame {over_half[name]}; "
            f"mean distance {distance} pixels{nothing}"
        )
    print(f"Mean distance by chance: {by_chance['distance']:.1f} pixels")

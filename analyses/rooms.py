"""Accuracy of the rooms in predicted videos, told apart by their colours (Figure 5a)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.ndimage

from analyses.accuracy import POSTERIOR, accuracy_lines, write_accuracy
from analyses.arguments import parse_models, require_same_keys, results_directory
from analyses.worker import Worker
from config import ConfigError
from report import plots, statistics


def rooms(arguments: Sequence[str]) -> None:
    """Write how often predicted videos visit the same rooms as the true ones (Figure 5a).

    Writes rooms.png, rooms_over_time.png, rooms.json, rooms.csv. `assign_rooms` defines a room.
    """
    models, given = parse_models("rooms", __doc__, arguments, ["python analysis.py rooms k6=RUN k2=RUN --out DIR"])
    for run in models:
        require_same_keys(models[0], run, ("dataset", "eval_seq_len", "open_loop_ctx"))
        if run.config.channels != 3:
            raise ConfigError(
                f"dataset: {run.config.dataset} has no colours, by which rooms are told apart; use a run of mazes"
            )
    workers = [Worker(run) for run in models]
    directory = results_directory("rooms", models, given)
    found: dict[str, list[RoomComparison]] = {}
    copies: list[RoomComparison] = []
    for run, worker in zip(models, workers, strict=True):
        context = run.config.open_loop_ctx
        own, upper = found.setdefault(run.name, []), found.setdefault(f"{run.name}, {POSTERIOR}", [])
        for first, valid, batch in worker.batches():
            video = batch.video
            samples = [worker.predictions(batch, first, sample) for sample in range(run.config.num_samples)]
            reconstruction = worker.reconstructions(batch, first)
            for row in range(valid):
                own.append(compare_rooms(video[row], [frames[row] for frames in samples], context))
                upper.append(compare_rooms(video[row], [reconstruction[row]], context))
                if run is models[0]:
                    last = np.broadcast_to(video[row, context - 1], video[row, context:].shape)
                    copies.append(compare_rooms(video[row], [last], context))
    found[statistics.REFERENCES["copy"]] = copies
    curves = {name: statistics.summary(np.stack([x.agreement for x in videos])) for name, videos in found.items()}
    shares = {name: category_accuracy(videos) for name, videos in found.items()}
    groups = {
        f"{category} ({copied['sequences']})": {
            name: (share[category]["value"], share[category]["low"], share[category]["high"])
            for name, share in shares.items()
        }
        for category, copied in shares[statistics.REFERENCES["copy"]].items()
    }
    plots.plot_bars(groups, directory / "rooms.png", "accuracy of the sequence of rooms")
    lines = accuracy_lines(models, curves)
    lines[statistics.REFERENCES["copy"]] = plots.Line(
        np.array(curves[statistics.REFERENCES["copy"]]["curve"]["value"]), reference=True
    )
    plots.plot_lines(lines, directory / "rooms_over_time.png", "share of frames in the true room")
    write_accuracy("rooms", curves, directory, {"sequences": shares})


SAME_ROOM = 0.6
"""Frames show the same room if their colour histograms overlap at least so much (the sum of the bins' minima)."""


MIN_STAY = 5
"""The fewest frames in a row that count as a visit. Doorways, where two rooms are visible, take fewer."""


BINS = 8
"""Colour bins per channel. They are smoothed by one bin, so that textures matter more than blur and shade."""


CATEGORIES = ("same room", "to the hallway", "to another room")
"""The paper's kinds of sequences (Section 3.4): the agent stays in its room, enters the hallway, or another room."""


def histograms(video: np.ndarray) -> np.ndarray:
    """Return the colour histogram of each frame of uint8 [T, H, W, 3], smoothed: [T, BINS**3], with sum 1."""
    T = len(video)
    bins = (video.reshape(T, -1, 3).astype(int) * BINS // 256) @ [BINS**2, BINS, 1]
    counted = np.stack([np.bincount(frame, minlength=BINS**3) for frame in bins]).reshape(T, BINS, BINS, BINS)
    smooth = scipy.ndimage.gaussian_filter(counted.astype(float), (0, 1, 1, 1), mode="nearest").reshape(T, -1)
    return smooth / smooth.sum(1, keepdims=True)


def assign_rooms(colors: np.ndarray, known_rooms: Sequence[np.ndarray] = ()) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the room of each frame. The colours of walls and floor tell the rooms and the hallway apart.

    A frame belongs to the room whose histogram overlaps most with its own, if the overlap is at least SAME_ROOM. If
    MIN_STAY frames in a row belong to no room but are alike, they are a new room, with their mean histogram. Other
    frames get the room of the frames before them. At the beginning they get the room of the frames after them.

    Args:
        colors: of `histograms`, [T, bins].
        known_rooms: histograms of rooms that were found earlier.

    Returns:
        The number of each frame's room, [T], from 0, and the histograms of all rooms.
    """
    found = list(known_rooms)
    shown = np.full(len(colors), -1)

    def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.minimum(a, b).sum(-1)

    for t, frame in enumerate(colors):
        if found:
            overlaps = overlap(np.array(found), frame)
            if overlaps.max() >= SAME_ROOM:
                shown[t] = np.argmax(overlaps)
                continue
        recent = colors[max(0, t - MIN_STAY + 1) : t + 1]
        if len(recent) == MIN_STAY and (shown[t - MIN_STAY + 1 : t] == -1).all():
            mean = recent.mean(0)
            if (overlap(recent, mean) >= SAME_ROOM).all():
                shown[t - MIN_STAY + 1 : t + 1] = len(found)
                found.append(mean)
    return merge_short_stays(shown), found


def merge_short_stays(shown: np.ndarray) -> np.ndarray:
    """Replace stays of fewer than MIN_STAY frames, and frames without a room (-1), by the room before them."""
    starts = np.flatnonzero(np.diff(shown, prepend=shown[0] - 1))
    lengths = np.diff(starts, append=len(shown))
    result, current = shown.copy(), -1
    for start, length in zip(starts, lengths, strict=True):
        if shown[start] >= 0 and length >= MIN_STAY:
            current = shown[start]
        result[start : start + length] = current
    first = np.flatnonzero(result >= 0)
    result[: first[0] if len(first) else None] = result[first[0]] if len(first) else 0
    return result


def category(shown: np.ndarray) -> int:
    """Return the number of the category in CATEGORIES to which a sequence of rooms belongs."""
    return min(int((np.diff(shown) != 0).sum()), len(CATEGORIES) - 1)


class RoomComparison(NamedTuple):
    """A comparison of the rooms in predictions with those in the true video."""

    agreement: np.ndarray  # [T], the share of predictions that show the true room, for each predicted frame
    truth: int  # the category of the true video
    right: float  # the share of predictions that have this category


def compare_rooms(video: np.ndarray, predictions: Sequence[np.ndarray], context: int) -> RoomComparison:
    """Compare the rooms of a true video uint8 [T, H, W, 3] with those of its context followed by each prediction."""
    colors = histograms(video)
    truth, known_rooms = assign_rooms(colors)
    agreements, rights = [], []
    for prediction in predictions:
        shown, _ = assign_rooms(np.concatenate([colors[:context], histograms(prediction)]), known_rooms)
        agreements.append(truth[context:] == shown[context:])
        rights.append(category(truth) == category(shown))
    return RoomComparison(np.mean(agreements, axis=0), category(truth), float(np.mean(rights)))


def category_accuracy(comparisons: Sequence[RoomComparison]) -> dict[str, dict[str, float]]:
    """Return how often predictions have the category of the true video.

    Returns:
        For each of CATEGORIES that occurs: the share, its confidence interval, and the number of "sequences".
    """
    found = {}
    for number, name in enumerate(CATEGORIES):
        right = np.array([x.right for x in comparisons if x.truth == number])
        if len(right):
            found[name] = statistics.plain(statistics.estimate(right)) | {"sequences": len(right)}
    return found

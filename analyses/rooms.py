"""Which rooms predicted videos visit, read from their colours (Figure 5a)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.ndimage

from analyses.accuracy import POSTERIOR, accuracy_lines, write_readout
from analyses.arguments import directory_for, parse_models, same_readout
from analyses.worker import Worker
from config import ConfigError
from report import plots, statistics


def rooms(arguments: Sequence[str]) -> None:
    """Write how often predicted videos visit the same rooms as the true ones (Figure 5a): rooms.png, .json, .csv.

    See `visits` for what a room is.
    """
    models, given = parse_models("rooms", __doc__, arguments, ["python analysis.py rooms k6=RUN k2=RUN --out DIR"])
    for run in models:
        same_readout(models[0], run, ("dataset", "eval_seq_len", "open_loop_ctx"))
        if run.config.channels != 3:
            raise ConfigError(f"dataset: {run.config.dataset} has no colours; rooms are read from those of mazes")
    workers = [Worker(run) for run in models]
    directory = directory_for("rooms", models, given)
    found: dict[str, list[Rooms]] = {}
    copies: list[Rooms] = []
    for run, worker in zip(models, workers, strict=True):
        context = run.config.open_loop_ctx
        own, upper = found.setdefault(run.name, []), found.setdefault(f"{run.name}, {POSTERIOR}", [])
        for first, valid, batch in worker.batches():
            video = batch.video
            samples = [worker.predictions(batch, first, sample) for sample in range(run.config.num_samples)]
            reconstruction = worker.reconstructions(batch, first)
            for row in range(valid):
                own.append(read_rooms(video[row], [frames[row] for frames in samples], context))
                upper.append(read_rooms(video[row], [reconstruction[row]], context))
                if run is models[0]:
                    last = np.broadcast_to(video[row, context - 1], video[row, context:].shape)
                    copies.append(read_rooms(video[row], [last], context))
    found[statistics.REFERENCES["copy"]] = copies
    curves = {name: statistics.summary(np.stack([read.agreement for read in reads])) for name, reads in found.items()}
    shares = {name: category_accuracy(reads) for name, reads in found.items()}
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
    write_readout("rooms", curves, directory, {"sequences": shares})


SAME_ROOM = 0.6
"""Frames show the same room if their colour histograms share at least so much (the sum of the bins' minima)."""


STAY = 5
"""Fewer frames than this in a row are no visit: doorways, where two rooms are seen at once, are left out."""


BINS = 8
"""Colour bins per channel. They are smoothed by one bin, so that blur and shade matter less than another texture."""


CATEGORIES = ("same room", "to the hallway", "to another room")
"""The paper's sequences (Section 3.4): the agent stays in its room; enters the hallway; goes through it into a room."""


def histograms(video: np.ndarray) -> np.ndarray:
    """Return the colour histogram of each frame of uint8 [T, H, W, 3], smoothed: [T, BINS**3], with sum 1."""
    T = len(video)
    bins = (video.reshape(T, -1, 3).astype(int) * BINS // 256) @ [BINS**2, BINS, 1]
    counted = np.stack([np.bincount(frame, minlength=BINS**3) for frame in bins]).reshape(T, BINS, BINS, BINS)
    smooth = scipy.ndimage.gaussian_filter(counted.astype(float), (0, 1, 1, 1), mode="nearest").reshape(T, -1)
    return smooth / smooth.sum(1, keepdims=True)


def visits(colors: np.ndarray, known: Sequence[np.ndarray] = ()) -> tuple[np.ndarray, list[np.ndarray]]:
    """Find which room each frame shows, by the colours of walls, floor and hallway, which differ from room to room.

    A frame belongs to the room whose histogram it shares most with, if that is at least SAME_ROOM; STAY frames in a
    row that belong to no room, but to each other, found a new one, with their mean histogram. Other frames show the
    room before them (the first ones: the one after).

    Args:
        colors: of `histograms`, [T, bins].
        known: histograms of rooms found before.

    Returns:
        The frames' rooms, [T] from 0, and the rooms' histograms.
    """
    found = list(known)
    shown = np.full(len(colors), -1)

    def shared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.minimum(a, b).sum(-1)

    for t, frame in enumerate(colors):
        if found:
            overlaps = shared(np.array(found), frame)
            if overlaps.max() >= SAME_ROOM:
                shown[t] = np.argmax(overlaps)
                continue
        recent = colors[max(0, t - STAY + 1) : t + 1]
        if len(recent) == STAY and (shown[t - STAY + 1 : t] == -1).all():
            mean = recent.mean(0)
            if (shared(recent, mean) >= SAME_ROOM).all():
                shown[t - STAY + 1 : t + 1] = len(found)
                found.append(mean)
    return settled(shown), found


def settled(shown: np.ndarray) -> np.ndarray:
    """Make stretches of fewer than STAY frames, and of frames without a room (-1), part of the stretch before."""
    starts = np.flatnonzero(np.diff(shown, prepend=shown[0] - 1))
    lengths = np.diff(starts, append=len(shown))
    result, current = shown.copy(), -1
    for start, length in zip(starts, lengths, strict=True):
        if shown[start] >= 0 and length >= STAY:
            current = shown[start]
        result[start : start + length] = current
    first = np.flatnonzero(result >= 0)
    result[: first[0] if len(first) else None] = result[first[0]] if len(first) else 0
    return result


def category(shown: np.ndarray) -> int:
    """Return which of CATEGORIES a sequence of rooms is: one stay, two, or more."""
    return min(int((np.diff(shown) != 0).sum()), len(CATEGORIES) - 1)


class Rooms(NamedTuple):
    """The rooms of a sequence's predictions beside the truth's."""

    agreement: np.ndarray  # [T] of the predicted frames: the share of predictions that are in the true room
    truth: int  # category
    right: float  # the share of predictions of this category


def read_rooms(video: np.ndarray, predictions: Sequence[np.ndarray], context: int) -> Rooms:
    """Read the rooms of a true video uint8 [T, H, W, 3], and of its context continued by each prediction."""
    colors = histograms(video)
    truth, known = visits(colors)
    agreements, rights = [], []
    for prediction in predictions:
        shown, _ = visits(np.concatenate([colors[:context], histograms(prediction)]), known)
        agreements.append(truth[context:] == shown[context:])
        rights.append(category(truth) == category(shown))
    return Rooms(np.mean(agreements, axis=0), category(truth), float(np.mean(rights)))


def category_accuracy(reads: Sequence[Rooms]) -> dict[str, dict[str, float]]:
    """Return how often predictions have their truth's category.

    Returns:
        For each of CATEGORIES that occurs, the share with its confidence interval, and the number of "sequences".
    """
    found = {}
    for number, name in enumerate(CATEGORIES):
        right = np.array([read.right for read in reads if read.truth == number])
        if len(right):
            found[name] = statistics.plain(statistics.estimate(right)) | {"sequences": len(right)}
    return found

"""What is in a frame: the digits, by a classifier trained on the spot; the rooms of a maze, by their colours."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.ndimage
from flax import linen as nn
from jax import Array

import report
from config import FRAME_SIZE
from cwvae import floats
from data import MovingDigits, compose

# ---------------------------------------------------------------------------------------------- digits

NEEDED_ACCURACY = 0.97
"""Of true frames without overlap. A classifier below would blame the model for its own errors."""

Reader = Callable[[np.ndarray], np.ndarray]
"""Frames uint8 [N, 64, 64, 1] -> how often each digit is seen in each, int [N, 10]."""


class DigitClassifier(nn.Module):
    """How often each of the ten digits is in a frame of `digits` digits.

    Convolutions of 3x3 see a digit wherever it is; the strongest and the average response over all places then give a
    score a_c(m) to each digit c being there m times. A set of digits with counts m_0 ... m_9 has the logit
    sum_c a_c(m_c); the softmax is over all sets of `digits` digits, so that only these can be answered.
    """

    digits: int

    @nn.compact
    def __call__(self, frames: Array) -> Array:
        """uint8 [N, 64, 64, 1] -> log-probability of each of `digit_sets`, [N, sets]."""
        N = len(frames)
        x = floats(frames).reshape(N, 32, 2, 32, 2, 1).mean((2, 4))
        for outputs, stride in (16, 1), (48, 2), (64, 2), (96, 1):  # 32 -> 32 -> 16 -> 8 -> 8
            x = nn.relu(nn.Dense(outputs)(neighbourhoods(x, stride)))
        x = nn.relu(nn.Dense(128)(x)).reshape(N, -1, 128)
        x = nn.relu(nn.Dense(128)(jnp.concatenate([x.max(1), x.mean(1)], -1)))
        scores = nn.Dense(10 * (self.digits + 1))(x).reshape(N, 10, self.digits + 1)
        # [sets, 10, digits + 1], 1 where a set has the digit so many times.
        sets = jax.nn.one_hot(digit_sets(self.digits), self.digits + 1)
        return jax.nn.log_softmax(jnp.einsum("ncm,scm->ns", scores, sets))


def neighbourhoods(x: Array, stride: int) -> Array:
    """The 3x3 pixels around each place, as channels: a Dense layer on them is a convolution, and on CPUs a fast one.

    [N, H, W, C] -> [N, H / stride, W / stride, 9 C]
    """
    _, H, W, _ = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return jnp.concatenate([x[:, a : a + H : stride, b : b + W : stride] for a in range(3) for b in range(3)], -1)


def digit_sets(digits: int) -> np.ndarray:
    """All ways to have `digits` digits in any order, as how often each of the ten occurs, int [sets, 10]."""
    chosen = itertools.combinations_with_replacement(range(10), digits)
    return np.array([np.bincount(combination, minlength=10) for combination in chosen])


def counts(labels: np.ndarray) -> np.ndarray:
    """Digits [..., n] from 0 to 9 -> how often each of the ten occurs, [..., 10]."""
    return (labels[..., None] == np.arange(10)).sum(-2)


def draw_frames(
    glyphs: np.ndarray, labels: np.ndarray, digits: int, count: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Frames with digits anywhere: uint8 [count, 64, 64, 1], and which they are, [count, digits]."""
    chosen = random.integers(len(glyphs), size=(digits, count))
    corners = random.integers(FRAME_SIZE - glyphs.shape[-1] + 1, size=(digits, count, 2))
    return compose(glyphs[chosen], corners)[..., None], labels[chosen.T]


def distorted(glyphs: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Glyphs [N, h, w], each turned (by 7 degrees), stretched (by 8 % each way) and sheared (by 10 %) at random.

    The numbers are standard deviations. What the classifier has to learn is in no other handwriting otherwise.
    """
    N, center = len(glyphs), (np.array(glyphs.shape[1:]) - 1) / 2
    angles, shears = random.normal(0, 0.12, N), random.normal(0, 0.1, N)
    stretches = np.exp(random.normal(0, 0.08, (N, 2)))
    result = np.empty_like(glyphs)
    for i in range(N):
        cos, sin = np.cos(angles[i]), np.sin(angles[i])
        matrix = np.array([[cos, -sin], [sin, cos]]) @ np.diag(stretches[i]) @ np.array([[1, 0], [shears[i], 1]])
        moved = scipy.ndimage.affine_transform(
            glyphs[i].astype(np.float32), matrix, offset=center - matrix @ center, order=1
        )
        result[i] = moved.clip(0, 255)
    return result


def train_digit_reader(
    train: MovingDigits, steps: int = 5000, batch_size: int = 64, copies: int = 15, seed: int = 0
) -> Reader:
    """Trains a `DigitClassifier` on frames of the training digits with Adam, the rate falling to zero as a cosine.

    Each digit comes as it is and in `copies` distorted forms: there are only 1,498 of scikit-learn's.
    """
    model = DigitClassifier(train.digits)
    random = np.random.default_rng(seed)
    glyphs = np.concatenate([train.glyphs, *(distorted(train.glyphs, random) for _ in range(copies))])
    all_labels = np.tile(train.labels, copies + 1)
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, steps))
    params = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, FRAME_SIZE, FRAME_SIZE, 1)))
    opt_state = optimizer.init(params)
    sets = digit_sets(train.digits)

    @jax.jit
    def step(params: Any, opt_state: Any, frames: Array, target: Array) -> tuple[Any, Any, Array]:
        def loss(params: Any) -> Array:
            log_probability: Any = model.apply(params, frames)
            return -jnp.take_along_axis(log_probability, target[:, None], 1).mean()

        value, gradients = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    for _ in range(steps):
        frames, labels = draw_frames(glyphs, all_labels, train.digits, batch_size, random)
        target = (counts(labels)[:, None] == sets).all(-1).argmax(-1)
        params, opt_state, _ = step(params, opt_state, frames, target)

    likeliest = jax.jit(lambda frames: jnp.asarray(model.apply(params, frames)).argmax(-1))

    def read(frames: np.ndarray, at_once: int = 500) -> np.ndarray:
        parts = [frames[start : start + at_once] for start in range(0, len(frames), at_once)]
        padded = [np.pad(part, [(0, at_once - len(part)), (0, 0), (0, 0), (0, 0)]) for part in parts]
        found = [sets[np.asarray(likeliest(part))] for part in padded]
        return np.concatenate(found)[: len(frames)]

    return read


def clean_accuracy(read: Reader, test: MovingDigits, count: int = 2000) -> tuple[float, int]:
    """The share of true test frames read right, and of how many: those of `count`, from all times, in which no pixel
    belongs to two digits. Where digits hide each other, even a perfect reader must guess."""
    frames, labels = [], []
    for index in range(min(count // 10, len(test))):
        times = np.linspace(0, test.frames - 1, min(10, test.frames)).astype(int)
        times = times[~test.overlaps(index)[times]]
        frames.append(test[index][times])
        labels.append(np.repeat(test.digits_in(index)[None], len(times), axis=0))
    joined = np.concatenate(frames)
    right = (read(joined) == counts(np.concatenate(labels))).all(-1)
    return float(right.mean()), len(joined)


def right_digits(read: Reader, videos: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Where videos uint8 [B, T, H, W, C] show the digits [B, digits], in any order: 1, else 0, [B, T]."""
    B, T = videos.shape[:2]
    found = read(videos.reshape(B * T, *videos.shape[2:])).reshape(B, T, 10)
    return (found == counts(labels)[:, None]).all(-1).astype(float)


def chance(windows: MovingDigits) -> float:
    """The probability that digits drawn anew are the same ones: what a model that has forgotten them reaches."""
    shares = np.bincount(windows.labels, minlength=10) / len(windows.labels)
    drawn = np.array(list(itertools.product(range(10), repeat=windows.digits)))
    probability = shares[drawn].prod(-1)
    of_set = (counts(drawn)[:, None] == digit_sets(windows.digits)).all(-1)
    return float(((probability[:, None] * of_set).sum(0) ** 2).sum())


# ---------------------------------------------------------------------------------------------- rooms

SAME_ROOM = 0.6
"""Frames show the same room if their colour histograms share at least so much (the sum of the bins' minima)."""

STAY = 5
"""Fewer frames than this in a row are no visit: doorways, where two rooms are seen at once, are left out."""

BINS = 8
"""Colour bins per channel. They are smoothed by one bin, so that blur and shade matter less than another texture."""

CATEGORIES = ("same room", "to the hallway", "to another room")
"""The paper's sequences (Section 3.4): the agent stays in its room; enters the hallway; goes through it into a room."""


def histograms(video: np.ndarray) -> np.ndarray:
    """Colour histogram of each frame of uint8 [T, H, W, 3], smoothed: [T, BINS**3], with sum 1."""
    T = len(video)
    bins = (video.reshape(T, -1, 3).astype(int) * BINS // 256) @ [BINS**2, BINS, 1]
    counted = np.stack([np.bincount(frame, minlength=BINS**3) for frame in bins]).reshape(T, BINS, BINS, BINS)
    smooth = scipy.ndimage.gaussian_filter(counted.astype(float), (0, 1, 1, 1), mode="nearest").reshape(T, -1)
    return smooth / smooth.sum(1, keepdims=True)


def visits(colors: np.ndarray, known: Sequence[np.ndarray] = ()) -> tuple[np.ndarray, list[np.ndarray]]:
    """Which room each frame shows, by the colours of walls, floor and hallway, which differ from room to room.

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
    """Stretches of fewer than STAY frames, and of frames without a room (-1), become part of the stretch before."""
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
    """Which of CATEGORIES a sequence of rooms is: one stay, two, or more."""
    return min(int((np.diff(shown) != 0).sum()), len(CATEGORIES) - 1)


class Rooms(NamedTuple):
    """The rooms of a sequence's predictions beside the truth's."""

    agreement: np.ndarray  # [T] of the predicted frames: the share of predictions that are in the true room
    truth: int  # category
    right: float  # the share of predictions of this category


def compare_rooms(video: np.ndarray, predictions: Sequence[np.ndarray], context: int) -> Rooms:
    """Reads the rooms of a true video uint8 [T, H, W, 3], and of its context continued by each prediction."""
    colors = histograms(video)
    truth, known = visits(colors)
    agreements, rights = [], []
    for prediction in predictions:
        shown, _ = visits(np.concatenate([colors[:context], histograms(prediction)]), known)
        agreements.append(truth[context:] == shown[context:])
        rights.append(category(truth) == category(shown))
    return Rooms(np.mean(agreements, axis=0), category(truth), float(np.mean(rights)))


def category_accuracy(reads: Sequence[Rooms]) -> dict[str, dict[str, float]]:
    """How often predictions have their truth's category.

    Returns:
        For each of CATEGORIES that occurs, the share with its confidence interval, and the number of "sequences".
    """
    found = {}
    for number, name in enumerate(CATEGORIES):
        right = np.array([read.right for read in reads if read.truth == number])
        if len(right):
            found[name] = report.plain(report.estimate(right)) | {"sequences": len(right)}
    return found

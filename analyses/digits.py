"""Accuracy of the digits in predicted frames, by a classifier that is trained first (Figure 5b)."""

import functools
import io
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.ndimage
from flax import linen as nn
from jax import Array

import data
from analyses import positions
from analyses.accuracy import POSTERIOR, accuracy_lines, write_accuracy
from analyses.arguments import parse_models, require_same_keys, results_directory
from analyses.worker import Worker
from config import FRAME_SIZE, Config, ConfigError
from cwvae import floats
from report import plots, statistics
from system.files import replace_file
from videos.digits import MovingDigits, compose


def digits(arguments: Sequence[str]) -> None:
    """Write the accuracy of the digits in predicted frames over time (Figure 5b).

    A frame is right if the classifier finds the true digits in it, in any order. Digits may hide each other, so the
    accuracy on the true frames is an upper bound. Writes digits.png, .json and .csv, and digits.npz for `seeds`.

    For videos of a single digit, also writes the distance of the digit from its true position:
    position_distance.png, position_share.png, position.json, .csv.
    """
    models, given = parse_models("digits", __doc__, arguments, ["python analysis.py digits k6=RUN k2=RUN --out DIR"])
    train_set, test_set = (
        digit_windows(run.config, split) for run, split in ((models[0], "train"), (models[0], "test"))
    )
    for run in models[1:]:
        require_same_keys(models[0], run, ("dataset", "num_digits", "digit_speed", "eval_seq_len", "open_loop_ctx"))
    workers = [Worker(run) for run in models]
    directory = results_directory("digits", models, given)
    print(f"Training a classifier of frames with {models[0].config.num_digits} digits")
    classify = train_classifier(train_set)
    clean, total = clean_accuracy(classify, test_set)
    print(f"Its accuracy is {100 * clean:.2f} % on {total} true test frames without overlap")
    if clean < NEEDED_ACCURACY:
        directory.rmdir()
        raise ConfigError(
            f"digits: the classifier's accuracy on true frames is {100 * clean:.2f} %, and at least "
            f"{100 * NEEDED_ACCURACY:.0f} % are needed, since its errors would count as the model's"
        )
    position_by_chance = positions.chance(train_set, test_set) if train_set.digits == 1 else None
    found: dict[str, list[dict[str, np.ndarray]]] = {}
    for run, worker in zip(models, workers, strict=True):
        context = run.config.open_loop_ctx
        for first, valid, batch in worker.batches():
            truth = batch.video[:valid, context:]
            labels = np.stack([test_set.digits_in(first + row) for row in range(valid)])
            shown: dict[str, Iterable[np.ndarray]] = {
                run.name: (worker.predictions(batch, first, i)[:valid] for i in range(run.config.num_samples)),
                f"{run.name}, {POSTERIOR}": [worker.reconstructions(batch, first)[:valid]],
            }
            if run is models[-1]:
                shown |= {TRUTH: [truth], COPY: [batch.video[:valid, context - 1 : context]]}
            score = functools.partial(score_frames, classify, labels, positions.centers(truth), position_by_chance)
            for name, samples in shown.items():
                mean = jax.tree.map(lambda *values: np.mean(values, axis=0), *map(score, samples))
                found.setdefault(name, []).append(mean)
    joined = {name: jax.tree.map(lambda *values: np.concatenate(values), *batches) for name, batches in found.items()}
    results = {name: statistics.summary(values["right"]) for name, values in joined.items() if name != COPY}
    write_curves({run.name: joined[run.name]["right"] for run in models}, directory / "digits.npz")
    lines = accuracy_lines(models, results)
    by_chance = chance(train_set)
    lines[TRUTH] = plots.Line(np.array(results[TRUTH]["curve"]["value"]), reference=True)
    lines["chance"] = plots.Line(np.full(len(lines[TRUTH].values), by_chance), reference=True)
    plots.plot_lines(lines, directory / "digits.png", "accuracy of the digits' identities")
    if position_by_chance:
        without_truth = {name: values for name, values in joined.items() if name != TRUTH}
        positions.write_positions(models, without_truth, position_by_chance, directory)
    else:
        print("\nPositions are left out: with several digits, a position doesn't tell which digit it belongs to")
    more = {"classifier_accuracy_on_clean_frames": clean, "clean_frames": total, "chance": by_chance}
    write_accuracy("digits", results, directory, more)


def write_curves(curves: Mapping[str, np.ndarray], path: Path) -> None:
    """Write the share of samples in which each predicted frame is right: name of a model -> [N, T]."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, names=list(curves), right=np.array(list(curves.values()), np.float32))
    replace_file(path, buffer.getvalue())


TRUTH, COPY = "true frames", statistics.REFERENCES["copy"]


def digit_windows(config: Config, split: str) -> MovingDigits:
    """Return the windows of a split, with the labels of their digits.

    Raises:
        ConfigError: the dataset has no labels.
    """
    if config.dataset not in ("digits", "mnist"):
        raise ConfigError(
            f"dataset: {config.dataset} has no labels of digits; for a model of mmnist, add --dataset mnist and "
            "--datadir DIR with MNIST's idx files"
        )
    windows = data.windows(config, split)
    assert isinstance(windows, MovingDigits)
    return windows


NEEDED_ACCURACY = 0.97
"""The accuracy on true frames without overlap that a classifier needs, so that few errors are its own."""


Classifier = Callable[[np.ndarray], np.ndarray]
"""Frames uint8 [N, 64, 64, 1] -> how often each digit is in each frame, int [N, 10]."""


class DigitClassifier(nn.Module):
    """A classifier of the set of digits in a frame of `digits` digits.

    Convolutions of 3x3 see a digit at any position. Their maximum and mean over all positions give a score a_c(m) to
    each digit c that occurs m times. A set of digits with counts m_0 ... m_9 has the logit sum_c a_c(m_c). The softmax
    is over all sets of `digits` digits.
    """

    digits: int

    @nn.compact
    def __call__(self, frames: Array) -> Array:
        """Return the log-probability of each of `digit_sets`, uint8 [N, 64, 64, 1] -> [N, sets]."""
        N = len(frames)
        x = floats(frames).reshape(N, 32, 2, 32, 2, 1).mean((2, 4))
        for outputs, stride in (16, 1), (48, 2), (64, 2), (96, 1):  # 32 -> 32 -> 16 -> 8 -> 8
            x = nn.relu(nn.Dense(outputs)(neighbourhoods(x, stride)))
        x = nn.relu(nn.Dense(128)(x)).reshape(N, -1, 128)
        x = nn.relu(nn.Dense(128)(jnp.concatenate([x.max(1), x.mean(1)], -1)))
        scores = nn.Dense(10 * (self.digits + 1))(x).reshape(N, 10, self.digits + 1)
        # [sets, 10, digits + 1]: 1 if a set has the digit so many times, else 0.
        sets = jax.nn.one_hot(digit_sets(self.digits), self.digits + 1)
        return jax.nn.log_softmax(jnp.einsum("ncm,scm->ns", scores, sets))


def neighbourhoods(x: Array, stride: int) -> Array:
    """Return the 3x3 neighbourhood of each pixel as channels, [N, H, W, C] -> [N, H / stride, W / stride, 9 C].

    A Dense layer on them is a convolution, and fast on CPUs.
    """
    _, H, W, _ = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return jnp.concatenate([x[:, a : a + H : stride, b : b + W : stride] for a in range(3) for b in range(3)], -1)


def digit_sets(digits: int) -> np.ndarray:
    """Return all sets of `digits` digits, as counts of each of the ten digits, int [sets, 10]."""
    chosen = itertools.combinations_with_replacement(range(10), digits)
    return np.array([np.bincount(combination, minlength=10) for combination in chosen])


def counts(labels: np.ndarray) -> np.ndarray:
    """Return how often each of the ten digits occurs, [..., n] with values from 0 to 9 -> [..., 10]."""
    return (labels[..., None] == np.arange(10)).sum(-2)


def draw_frames(
    glyphs: np.ndarray, labels: np.ndarray, digits: int, count: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return frames with digits at random positions, uint8 [count, 64, 64, 1], and their labels, [count, digits]."""
    chosen = random.integers(len(glyphs), size=(digits, count))
    corners = random.integers(FRAME_SIZE - glyphs.shape[-1] + 1, size=(digits, count, 2))
    return compose(glyphs[chosen], corners)[..., None], labels[chosen.T]


def distorted(glyphs: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return the glyphs [N, h, w], each rotated, stretched and sheared at random.

    The standard deviations are 7 degrees, 8 % in each direction, and 10 %. Distortions imitate the handwriting of more
    people.
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


def partly_blurred(frames: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return frames uint8 [N, H, W, 1], the first quarter blurred by a Gaussian of up to two pixels.

    Decoders blur digits of which they are unsure. A classifier of only sharp frames would count blur as a wrong digit.
    """
    blurred, sigma = len(frames) // 4, random.uniform(0, 2)
    result = frames.copy()
    result[:blurred] = scipy.ndimage.gaussian_filter(
        frames[:blurred].astype(np.float32), (0, sigma, sigma, 0), mode="constant"
    )
    return result


def train_classifier(train: MovingDigits, steps: int = 5000, batch_size: int = 64, copies: int = 15) -> Classifier:
    """Train a `DigitClassifier` on frames of the training digits, with Adam and a cosine decay of the rate to zero.

    Each digit occurs unchanged and in `copies` distorted forms, since scikit-learn has only 1,498 training digits.
    """
    model = DigitClassifier(train.digits)
    random = np.random.default_rng(0)
    glyphs = np.concatenate([train.glyphs, *(distorted(train.glyphs, random) for _ in range(copies))])
    all_labels = np.tile(train.labels, copies + 1)
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, steps))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, FRAME_SIZE, FRAME_SIZE, 1)))
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
        params, opt_state, _ = step(params, opt_state, partly_blurred(frames, random), target)

    likeliest = jax.jit(lambda frames: jnp.asarray(model.apply(params, frames)).argmax(-1))

    def classify(frames: np.ndarray) -> np.ndarray:
        batch_size = 500
        batches = [frames[start : start + batch_size] for start in range(0, len(frames), batch_size)]
        # All batches have one size, so that the classifier is compiled once.
        padded = [np.pad(batch, [(0, batch_size - len(batch)), (0, 0), (0, 0), (0, 0)]) for batch in batches]
        found = [sets[np.asarray(likeliest(batch))] for batch in padded]
        return np.concatenate(found)[: len(frames)]

    return classify


def clean_accuracy(classify: Classifier, test: MovingDigits, count: int = 2000) -> tuple[float, int]:
    """Return the accuracy on true test frames without overlap, and the number of these frames.

    `count` frames from all times are considered. Frames in which a pixel belongs to two digits are left out: if digits
    hide each other, even a perfect classifier must guess.
    """
    frames, labels = [], []
    for index in range(min(count // 10, len(test))):
        times = np.linspace(0, test.frames - 1, min(10, test.frames)).astype(int)
        times = times[~test.overlaps(index)[times]]
        frames.append(test[index][times])
        labels.append(np.repeat(test.digits_in(index)[None], len(times), axis=0))
    joined = np.concatenate(frames)
    right = (classify(joined) == counts(np.concatenate(labels))).all(-1)
    return float(right.mean()), len(joined)


def right_digits(classify: Classifier, videos: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return whether frames uint8 [B, T, H, W, C] show the digits [B, digits] in any order, as 1.0 or 0.0, [B, T]."""
    B, T = videos.shape[:2]
    found = classify(videos.reshape(B * T, *videos.shape[2:])).reshape(B, T, 10)
    return (found == counts(labels)[:, None]).all(-1).astype(float)


def score_frames(
    classify: Classifier,
    labels: np.ndarray,
    centers: np.ndarray,
    position_by_chance: Mapping[str, float] | None,
    frames: np.ndarray,
) -> dict[str, np.ndarray]:
    """Return "right" (of `right_digits`), and for a single digit also what `positions.compare_positions` returns.

    Args:
        classify: returns the digits of frames.
        labels: the true digits, [B, digits].
        centers: the true centres of a digit, [B, T, 2].
        position_by_chance: of `positions.chance`; None: positions aren't compared.
        frames: uint8 [B, T or 1, H, W, C].
    """
    right = {"right": right_digits(classify, frames, labels)}
    return right | (positions.compare_positions(centers, frames, position_by_chance) if position_by_chance else {})


def chance(windows: MovingDigits) -> float:
    """Return the accuracy of a model that has forgotten the digits: the chance of drawing the same digits again."""
    shares = np.bincount(windows.labels, minlength=10) / len(windows.labels)
    drawn = np.array(list(itertools.product(range(10), repeat=windows.digits)))
    probability = shares[drawn].prod(-1)
    in_set = (counts(drawn)[:, None] == digit_sets(windows.digits)).all(-1)
    return float(((probability[:, None] * in_set).sum(0) ** 2).sum())

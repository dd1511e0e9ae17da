"""Readers of digits and rooms, on frames made for them."""

import functools
import itertools
import json

import jax
import numpy as np
import pytest
import scipy.ndimage
from helpers import walk

import analysis
import videos.digits
from analyses import digits as reading
from analyses import positions
from analyses import rooms as visiting
from videos.digits import MovingDigits, compose, labels_of_scikit_learn, of_scikit_learn

# ---------------------------------------------------------------------------------------------- digits


def easy_glyphs(split):
    """Ten patterns that nobody confuses, three of each."""
    y, x = np.mgrid[:20, :20] - 9.5
    radius, edge = np.hypot(x, y), np.maximum(abs(x), abs(y))
    patterns = [
        *(y // 4 % 2 == 0, x // 4 % 2 == 0, radius < 5, (radius > 6) & (radius < 10), abs(x - y) < 3, abs(x + y) < 3),
        *((abs(x) < 2) | (abs(y) < 2), edge < 10, edge > 7, (abs(x - y) < 2) | (abs(x + y) < 2)),
    ]
    return np.pad(np.array(patterns * 3).astype(np.uint8) * 250, ((0, 0), (4, 4), (4, 4)))


def easy_labels(split):
    return np.arange(30) % 10


def moving(split, frames=20, digits=2):
    return MovingDigits(easy_glyphs, easy_labels, split, frames, digits)


@functools.cache
def easy_reader():
    """A classifier of the easy glyphs, trained as the command does, but shortly."""
    jax.config.update("jax_disable_most_optimizations", False)  # most of its time isn't compilation
    try:
        return reading.train_digit_reader(moving("train"), steps=500, batch_size=24, copies=0)
    finally:
        jax.config.update("jax_disable_most_optimizations", True)


def test_labels_belong_to_their_glyphs():
    """A nearest neighbour among the training digits knows the test digits: images and labels are in the same order."""
    train, test = (of_scikit_learn(split).reshape(-1, 784).astype(float) for split in ("train", "test"))
    distance = (test**2).sum(1)[:, None] - 2 * test @ train.T + (train**2).sum(1)
    nearest = labels_of_scikit_learn("train")[distance.argmin(1)]
    assert (nearest == labels_of_scikit_learn("test")).mean() > 0.95


def test_digits_in_a_video():
    """Recomposed from the labels' glyphs alone, the brighter pixel showing."""
    windows = moving("test", frames=6, digits=3)
    for index in range(3):
        glyphs, corners = windows.motion(index)
        want = np.zeros((6, 64, 64), np.uint8)
        layers = np.zeros((3, 6, 64, 64), bool)
        for i, t in itertools.product(range(3), range(6)):
            y, x = corners[i, t]
            want[t, y : y + 28, x : x + 28] = np.maximum(want[t, y : y + 28, x : x + 28], windows.glyphs[glyphs[i]])
            layers[i, t, y : y + 28, x : x + 28] = windows.glyphs[glyphs[i]] > 0
        np.testing.assert_array_equal(windows[index][..., 0], want)
        np.testing.assert_array_equal(windows.digits_in(index), glyphs % 10)
        np.testing.assert_array_equal(windows.overlaps(index), (layers.sum(0) > 1).any((1, 2)))


def test_sets_and_counts():
    sets = reading.digit_sets(2)
    assert sets.shape == (55, 10) and (sets.sum(1) == 2).all() and len(np.unique(sets, axis=0)) == 55
    assert reading.counts(np.array([[3, 3], [9, 0]])).tolist() == [[0, 0, 0, 2, 0, 0, 0, 0, 0, 0], [1] + [0] * 8 + [1]]


def test_chance_by_drawing():
    windows, random = moving("train"), np.random.default_rng(0)
    pairs = np.sort(random.choice(windows.labels, (2, 200_000, 2)))
    assert reading.chance(windows) == pytest.approx((pairs[0] == pairs[1]).all(-1).mean(), abs=0.001)
    assert reading.chance(windows) == pytest.approx(10 * 0.01**2 + 45 * 0.02**2)


def test_classifier_answers_with_sets_only():
    """Its probabilities are normalised, and of the form that two sets which differ in one digit's count compare by it."""
    model = reading.DigitClassifier(2)
    frames = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 1), dtype=np.uint8)
    params = model.init(jax.random.key(0), frames)
    got = np.asarray(jax.jit(model.apply)(params, frames))
    assert got.shape == (3, 55)
    np.testing.assert_allclose(np.exp(got).sum(1), 1, rtol=1e-5)
    at = {tuple(np.repeat(np.arange(10), s).tolist()): got[:, i] for i, s in enumerate(reading.digit_sets(2))}
    # Sums of counts' scores: exchanging one digit costs the same whatever the other one is.
    np.testing.assert_allclose(at[1, 4] - at[2, 4], at[1, 7] - at[2, 7], atol=1e-5)
    assert np.abs((at[1, 1] - at[1, 2]) - (at[1, 2] - at[2, 2])).min() > 1e-5  # but counts needn't be additive


@pytest.mark.parametrize("stride", [1, 2])
def test_neighbourhoods_make_a_convolution(stride):
    random = np.random.default_rng(0)
    x, kernel = random.normal(size=(2, 8, 8, 3)).astype(np.float32), random.normal(size=(3, 3, 3, 5)).astype(np.float32)
    want = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), [(1, 1), (1, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(reading.neighbourhoods(x, stride) @ kernel.reshape(27, 5), want, atol=1e-4)


def test_distorted_glyphs_are_still_in_position():
    glyphs = of_scikit_learn("test")
    moved = reading.distorted(glyphs, np.random.default_rng(0))
    assert moved.shape == glyphs.shape and moved.dtype == np.uint8
    correlations = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(glyphs, moved, strict=True)]
    assert 0.6 < np.mean(correlations) < 0.98 and np.isclose(moved.sum(), glyphs.sum(), rtol=0.1)


def test_drawn_frames_hold_their_digits():
    """Each frame, cut to its ink, is the glyph that its label names."""
    frames, labels = reading.draw_frames(easy_glyphs(""), easy_labels(""), 1, 200, np.random.default_rng(0))
    assert frames.shape == (200, 64, 64, 1) and labels.shape == (200, 1)
    for frame, label in zip(frames[..., 0], labels[:, 0], strict=True):
        y, x = (np.flatnonzero(frame.any(axis)) for axis in (1, 0))
        glyph = easy_glyphs("")[label][4:24, 4:24]
        rows, columns = (np.flatnonzero(glyph.any(axis)) for axis in (1, 0))
        inner = frame[y[0] : y[-1] + 1, x[0] : x[-1] + 1]
        np.testing.assert_array_equal(inner, glyph[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    corners = np.array([np.argwhere(f).min(0)[:2] for f in frames])
    assert corners.min() < 8 and corners.max() > 36  # anywhere


def test_a_quarter_of_training_frames_is_blurred():
    """By up to two pixels: so far, a step's edge is at 84 % of its height. The others stay as they are."""
    frames = np.zeros((8, 64, 64, 1), np.uint8)
    frames[:, 20:44, 20:44] = 200
    before, sigmas = frames.copy(), []
    for seed in range(20):
        seen = reading.partly_blurred(frames, np.random.default_rng(seed))
        np.testing.assert_array_equal(seen[2:], frames[2:])
        profile = seen[:2, 32, :32, 0].astype(float)
        np.testing.assert_array_equal(profile[0], profile[1])
        sigmas.append(np.interp(0.84 * 200, profile[0], np.arange(32)) - 19.5)
    assert 0.3 < min(sigmas) < 0.8 and 1.7 < max(sigmas) < 2.1
    np.testing.assert_array_equal(frames, before)


def test_reader_learns_and_is_measured_on_clean_frames():
    train, test = moving("train"), moving("test")
    read = easy_reader()
    accuracy, count = reading.clean_accuracy(read, test, 300)
    clean = sum(int((~test.overlaps(i)[np.linspace(0, 19, 10).astype(int)]).sum()) for i in range(30))
    assert count == clean and 0.3 * 300 < count < 300
    assert accuracy > 0.97
    blurred = scipy.ndimage.gaussian_filter(test[0].astype(np.float32), (0, 2, 2, 0), mode="constant").astype(np.uint8)
    seen = ~test.overlaps(0)
    assert reading.right_digits(read, blurred[None], test.digits_in(0)[None])[0, seen].mean() > 0.95
    poor, _ = reading.clean_accuracy(reading.train_digit_reader(train, steps=1), test, 300)
    assert poor < 0.5
    labels = np.stack([test.digits_in(i) for i in range(2)])
    right = reading.right_digits(read, np.stack([test[0], test[1]]), labels)
    assert right.shape == (2, 20) and right.mean() > 0.5
    assert reading.right_digits(read, np.stack([test[0], test[1]]), (labels + 1) % 10).mean() < 0.3


def test_the_command(run, monkeypatch, tmp_path, capsys):
    """On easy glyphs, with the real classifier: the truth is read, and an untrained model's frames aren't."""
    reader, directory = easy_reader(), tmp_path / "digits"
    monkeypatch.setattr(videos.digits, "of_scikit_learn", easy_glyphs)
    monkeypatch.setattr(videos.digits, "labels_of_scikit_learn", easy_labels)
    monkeypatch.setattr(reading, "train_digit_reader", lambda train: reader)
    analysis.COMMANDS["digits"]([f"a={run}", f"b={run / 'checkpoints' / '2'}", f"--out={directory}", "--num_samples=2"])
    printed = capsys.readouterr().out
    results = json.loads((directory / "digits.json").read_text())
    assert results["classifier_accuracy_on_clean_frames"] >= 0.97 and results["chance"] == pytest.approx(0.019)
    assert f"It reads {100 * results['classifier_accuracy_on_clean_frames']:.2f} % of" in printed
    posterior = "posterior reconstruction"
    assert list(results["lines"]) == ["a", f"a, {posterior}", "b", f"b, {posterior}", "true frames"]
    assert results["lines"]["true frames"]["average"]["value"] > 0.6 > 0.3 > results["lines"]["a"]["average"]["value"]
    assert len(results["lines"]["a"]["curve"]["value"]) == 8 and (directory / "digits.png").exists()
    with np.load(directory / "digits.npz") as curves:
        assert curves["names"].tolist() == ["a", "b"] and curves["right"].shape == (2, 3, 8)
        assert curves["right"][0].mean() == pytest.approx(results["lines"]["a"]["average"]["value"], abs=1e-6)
    assert "Positions are left out: of several digits" in printed and not list(directory.glob("position*"))


def test_right_digits_in_any_order():
    found = np.array([[0, 1, 0, 0, 0, 0, 0, 0, 0, 1], [0, 2, 0, 0, 0, 0, 0, 0, 0, 0]])
    right = reading.right_digits(lambda frames: found, np.zeros((1, 2, 64, 64, 1), np.uint8), np.array([[9, 1]]))
    assert right.tolist() == [[1, 0]]


# ---------------------------------------------------------------------------------------------- positions


def placed_digits(count=200, seed=0):
    """Frames with a digit each at known positions, float [count, 64, 64], and the centroids of their ink, [count, 2]."""
    random = np.random.default_rng(seed)
    glyphs = random.choice(of_scikit_learn("test"), count)
    corners = random.integers(37, size=(count, 2))
    corners[:4] = [[0, 0], [0, 36], [36, 0], [36, 36]]
    centroids = [scipy.ndimage.center_of_mass(glyph.astype(float)) for glyph in glyphs]
    return compose(glyphs[None], corners[None]).astype(float), corners + np.array(centroids)


def as_frames(images):
    return images.clip(0, 255).astype(np.uint8)[..., None]


def errors(images, true):
    return np.linalg.norm(positions.centers(as_frames(images)) - true, axis=-1)


def test_centers_of_true_frames():
    assert errors(*placed_digits()).max() < 0.1


def test_centers_of_blurred_faint_and_noisy_digits():
    """A plain centroid of these frames is off by ten pixels."""
    images, true = placed_digits()
    noise = np.random.default_rng(1).normal(10, 4, images.shape)
    found = errors(0.5 * scipy.ndimage.gaussian_filter(images, (0, 3, 3)) + noise, true)
    assert found.mean() < 0.5 and found.max() < 2


def test_centers_are_of_the_greater_part():
    """A ghost of two fifths of the ink, out of the digit's window, is nothing to the position; a centroid lies between."""
    images, true = placed_digits()
    ghosts, where = placed_digits(seed=1)
    apart = np.abs(true - where).max(1) > 28
    found = errors(np.maximum(images, 0.4 * ghosts)[apart], true[apart])
    assert apart.sum() > 10 and found.max() < 1


def test_distances_from_known_positions():
    """Shifts by known pixels, another glyph at the same position, and nothing at all."""
    glyphs = np.stack([easy_glyphs("")[i] for i in (7, 7, 7, 7, 7, 2, 7)])[None]
    corners = np.array([[20, 20], [23, 20], [20, 16], [20, 25], [17, 24], [20, 20], [20, 20]])[None]
    truth, frames = (as_frames(compose(glyphs[:, :n], at))[None] for n, at in ((1, corners * 0 + 20), (7, corners)))
    frames[0, 6] = positions.NOISE
    read = positions.compare_positions(positions.centers(truth), frames, {"distance": 19.0, "share": 0.03})
    np.testing.assert_allclose(read["distance"], [[0, 3, 4, 5, 5, 0, 19]], atol=1e-4)
    assert read["share"].tolist() == [[1, 1, 1, 0, 0, 1, 0]] and read["empty"].tolist() == [[0] * 6 + [1]]


def test_chance_of_a_position():
    """Against two points anywhere in a square: their mean distance, and the probability that they are near."""
    side = 64 - 28
    got = positions.chance(moving("train", digits=1), moving("test", digits=1))
    near = positions.NEAR / side
    assert got["distance"] == pytest.approx(0.5214 * side, rel=0.05)
    assert got["share"] == pytest.approx(np.pi * near**2 - 8 / 3 * near**3 + near**4 / 2, rel=0.15)


@pytest.mark.parametrize("shares, frames", [([0.9, 0.6, 0.5, 0.7], 2), ([1, 1], 2), ([0.2, 0.9], 0)])
def test_until_when_positions_are_known(shares, frames):
    assert positions.until(shares) == frames


# ---------------------------------------------------------------------------------------------- rooms


def test_rooms_are_found_where_they_are():
    shown, found = visiting.visits(visiting.histograms(walk(["a", "hall", "b", "hall"])))
    assert len(found) == 3 and shown.tolist() == [0] * 20 + [1] * 20 + [2] * 20 + [1] * 20
    np.testing.assert_allclose(visiting.histograms(walk(["a"])).sum(1), 1)


@pytest.mark.parametrize(
    "rooms, category",
    [(["a"] * 4, 0), (["a", "a", "hall", "hall"], 1), (["a", "hall", "b", "b"], 2), (["a", "hall", "a"], 2)],
)
def test_categories(rooms, category):
    shown, _ = visiting.visits(visiting.histograms(walk(rooms)))
    assert visiting.category(shown) == category


def test_agreement_with_the_truth():
    truth = walk(["a", "a", "hall", "b"])
    same, stays = walk(["a", "hall", "b"], seed=1), walk(["a", "a", "a"], seed=2)
    blurred = scipy.ndimage.gaussian_filter(same, (0, 3, 3, 0))
    assert visiting.read_rooms(truth, [same], 20).agreement.tolist() == [1] * 60
    assert visiting.read_rooms(truth, [blurred], 20)[1:] == (2, 1.0)
    read = visiting.read_rooms(truth, [stays], 20)
    assert read.agreement.tolist() == [1] * 20 + [0] * 40 and (read.truth, read.right) == (2, 0)
    both = visiting.read_rooms(truth, [same, stays], 20)
    assert both.agreement.tolist() == [1] * 20 + [0.5] * 40 and both.right == 0.5


def test_unknown_textures_are_no_known_room():
    truth = walk(["a", "a", "hall"])
    other = 255 - walk(["a", "hall"], seed=1)
    assert not visiting.read_rooms(truth, [other], 20).agreement.any()


def test_doorways_and_flicker_are_no_visits():
    video = walk(["a", "b"])
    video[5:8] = walk(["hall"])[:3]
    shown, _ = visiting.visits(visiting.histograms(video))
    assert shown.tolist() == [0] * 20 + [1] * 20
    shown, found = visiting.visits(visiting.histograms(video[:3]))
    assert shown.tolist() == [0] * 3 and not found  # too short to know a room


def test_accuracy_by_category():
    read = visiting.Rooms
    got = visiting.category_accuracy([read(np.ones(1), 0, 1.0), read(np.ones(1), 2, 0.0), read(np.ones(1), 2, 0.5)])
    assert list(got) == ["same room", "to another room"]
    assert got["same room"] == {"value": 1, "low": 1, "high": 1, "sequences": 1}
    assert got["to another room"]["value"] == 0.25 and got["to another room"]["sequences"] == 2

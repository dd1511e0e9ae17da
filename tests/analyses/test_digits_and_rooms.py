"""The classifier of digits, positions and rooms, on frames made for them."""

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
from analyses import digits as digit_analysis
from analyses import positions
from analyses import rooms as room_analysis
from config import ConfigError
from videos.digits import MovingDigits, compose, scikit_learn_digits, scikit_learn_labels

# ---------------------------------------------------------------------------------------------- digits


def easy_glyphs(split):
    """Return ten patterns that are easy to tell apart, three of each."""
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
def easy_classifier():
    """Return a classifier of the easy glyphs, trained as the command does, but for fewer steps."""
    jax.config.update("jax_disable_most_optimizations", False)  # most of its time isn't compilation
    try:
        return digit_analysis.train_classifier(moving("train"), steps=500, batch_size=24, copies=0)
    finally:
        jax.config.update("jax_disable_most_optimizations", True)


def test_labels_belong_to_their_glyphs():
    """The nearest training digit has the label of a test digit: images and labels have the same order."""
    train, test = (scikit_learn_digits(split).reshape(-1, 784).astype(float) for split in ("train", "test"))
    distance = (test**2).sum(1)[:, None] - 2 * test @ train.T + (train**2).sum(1)
    nearest = scikit_learn_labels("train")[distance.argmin(1)]
    assert (nearest == scikit_learn_labels("test")).mean() > 0.95


def test_videos_show_the_digits_that_are_reported():
    """Videos are composed again from the reported glyphs and corners, with the brighter pixel on top."""
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


def test_digit_sets_and_counts_agree_with_examples():
    sets = digit_analysis.digit_sets(2)
    assert sets.shape == (55, 10) and (sets.sum(1) == 2).all() and len(np.unique(sets, axis=0)) == 55
    assert digit_analysis.counts(np.array([[3, 3], [9, 0]])).tolist() == [
        [0, 0, 0, 2, 0, 0, 0, 0, 0, 0],
        [1] + [0] * 8 + [1],
    ]


def test_chance_equals_the_frequency_of_equal_pairs():
    windows, random = moving("train"), np.random.default_rng(0)
    pairs = np.sort(random.choice(windows.labels, (2, 200_000, 2)))
    assert digit_analysis.chance(windows) == pytest.approx((pairs[0] == pairs[1]).all(-1).mean(), abs=0.001)
    assert digit_analysis.chance(windows) == pytest.approx(10 * 0.01**2 + 45 * 0.02**2)


def test_the_classifier_returns_probabilities_of_digit_sets():
    """They are normalised. A set's score is a sum of scores of each digit's count."""
    model = digit_analysis.DigitClassifier(2)
    frames = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 1), dtype=np.uint8)
    params = model.init(jax.random.key(0), frames)
    got = np.asarray(jax.jit(model.apply)(params, frames))
    assert got.shape == (3, 55)
    np.testing.assert_allclose(np.exp(got).sum(1), 1, rtol=1e-5)
    at = {tuple(np.repeat(np.arange(10), s).tolist()): got[:, i] for i, s in enumerate(digit_analysis.digit_sets(2))}
    # Exchanging one digit has the same effect for any other digit.
    np.testing.assert_allclose(at[1, 4] - at[2, 4], at[1, 7] - at[2, 7], atol=1e-5)
    assert np.abs((at[1, 1] - at[1, 2]) - (at[1, 2] - at[2, 2])).min() > 1e-5  # but counts needn't be additive


@pytest.mark.parametrize("stride", [1, 2])
def test_neighbourhoods_make_a_convolution(stride):
    random = np.random.default_rng(0)
    x, kernel = random.normal(size=(2, 8, 8, 3)).astype(np.float32), random.normal(size=(3, 3, 3, 5)).astype(np.float32)
    want = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), [(1, 1), (1, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(digit_analysis.neighbourhoods(x, stride) @ kernel.reshape(27, 5), want, atol=1e-4)


def test_distorted_glyphs_resemble_the_originals():
    glyphs = scikit_learn_digits("test")
    moved = digit_analysis.distorted(glyphs, np.random.default_rng(0))
    assert moved.shape == glyphs.shape and moved.dtype == np.uint8
    correlations = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(glyphs, moved, strict=True)]
    assert 0.6 < np.mean(correlations) < 0.98 and np.isclose(moved.sum(), glyphs.sum(), rtol=0.1)


def test_drawn_frames_show_their_digits():
    """Each frame, cropped to its ink, equals the glyph of its label."""
    frames, labels = digit_analysis.draw_frames(easy_glyphs(""), easy_labels(""), 1, 200, np.random.default_rng(0))
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
    """By up to two pixels, measured where a blurred edge has 84 % of its height. The others don't change."""
    frames = np.zeros((8, 64, 64, 1), np.uint8)
    frames[:, 20:44, 20:44] = 200
    before, sigmas = frames.copy(), []
    for seed in range(20):
        seen = digit_analysis.partly_blurred(frames, np.random.default_rng(seed))
        np.testing.assert_array_equal(seen[2:], frames[2:])
        profile = seen[:2, 32, :32, 0].astype(float)
        np.testing.assert_array_equal(profile[0], profile[1])
        sigmas.append(np.interp(0.84 * 200, profile[0], np.arange(32)) - 19.5)
    assert 0.3 < min(sigmas) < 0.8 and 1.7 < max(sigmas) < 2.1
    np.testing.assert_array_equal(frames, before)


def test_classifier_learns_and_is_tested_on_clean_frames():
    train, test = moving("train"), moving("test")
    classify = easy_classifier()
    accuracy, count = digit_analysis.clean_accuracy(classify, test, 300)
    clean = sum(int((~test.overlaps(i)[np.linspace(0, 19, 10).astype(int)]).sum()) for i in range(30))
    assert count == clean and 0.3 * 300 < count < 300
    assert accuracy > 0.97
    blurred = scipy.ndimage.gaussian_filter(test[0].astype(np.float32), (0, 2, 2, 0), mode="constant").astype(np.uint8)
    seen = ~test.overlaps(0)
    assert digit_analysis.right_digits(classify, blurred[None], test.digits_in(0)[None])[0, seen].mean() > 0.95
    poor, _ = digit_analysis.clean_accuracy(digit_analysis.train_classifier(train, steps=1), test, 300)
    assert poor < 0.5
    labels = np.stack([test.digits_in(i) for i in range(2)])
    right = digit_analysis.right_digits(classify, np.stack([test[0], test[1]]), labels)
    assert right.shape == (2, 20) and right.mean() > 0.5
    assert digit_analysis.right_digits(classify, np.stack([test[0], test[1]]), (labels + 1) % 10).mean() < 0.3


def test_digits_scores_true_frames_high_and_an_untrained_model_low(run, monkeypatch, tmp_path, capsys):
    """On easy glyphs, with the real classifier: the truth is classified right, and an untrained model's frames aren't."""
    classifier, directory = easy_classifier(), tmp_path / "digits"
    monkeypatch.setattr(videos.digits, "scikit_learn_digits", easy_glyphs)
    monkeypatch.setattr(videos.digits, "scikit_learn_labels", easy_labels)
    monkeypatch.setattr(digit_analysis, "train_classifier", lambda train: classifier)
    analysis.COMMANDS["digits"]([f"a={run}", f"b={run / 'checkpoints' / '2'}", f"--out={directory}", "--num_samples=2"])
    printed = capsys.readouterr().out
    results = json.loads((directory / "digits.json").read_text())
    assert results["classifier_accuracy_on_clean_frames"] >= 0.97 and results["chance"] == pytest.approx(0.019)
    assert f"Its accuracy is {100 * results['classifier_accuracy_on_clean_frames']:.2f} % on" in printed
    posterior = "posterior reconstruction"
    assert list(results["lines"]) == ["a", f"a, {posterior}", "b", f"b, {posterior}", "true frames"]
    assert results["lines"]["true frames"]["average"]["value"] > 0.6 > 0.3 > results["lines"]["a"]["average"]["value"]
    assert len(results["lines"]["a"]["curve"]["value"]) == 8 and (directory / "digits.png").exists()
    with np.load(directory / "digits.npz") as curves:
        assert curves["names"].tolist() == ["a", "b"] and curves["right"].shape == (2, 3, 8)
        assert curves["right"][0].mean() == pytest.approx(results["lines"]["a"]["average"]["value"], abs=1e-6)
    assert "Positions are left out: with several digits" in printed and not list(directory.glob("position*"))


def test_digits_refuses_an_occupied_directory_before_it_trains_a_classifier(run, monkeypatch):
    monkeypatch.setattr(digit_analysis, "train_classifier", lambda windows: pytest.fail("trained"))
    with pytest.raises(ConfigError, match="isn't empty; name a new directory"):
        analysis.COMMANDS["digits"]([str(run), f"--out={run}"])


def test_digits_are_right_in_any_order():
    found = np.array([[0, 1, 0, 0, 0, 0, 0, 0, 0, 1], [0, 2, 0, 0, 0, 0, 0, 0, 0, 0]])
    right = digit_analysis.right_digits(lambda frames: found, np.zeros((1, 2, 64, 64, 1), np.uint8), np.array([[9, 1]]))
    assert right.tolist() == [[1, 0]]


# ---------------------------------------------------------------------------------------------- positions


def placed_digits(seed=0):
    """Return frames with a digit each, float [200, 64, 64], and the centroids of their ink, [200, 2]."""
    random, count = np.random.default_rng(seed), 200
    glyphs = random.choice(scikit_learn_digits("test"), count)
    corners = random.integers(37, size=(count, 2))
    corners[:4] = [[0, 0], [0, 36], [36, 0], [36, 36]]
    centroids = [scipy.ndimage.center_of_mass(glyph.astype(float)) for glyph in glyphs]
    return compose(glyphs[None], corners[None]).astype(float), corners + np.array(centroids)


def as_frames(images):
    return images.clip(0, 255).astype(np.uint8)[..., None]


def errors(images, true):
    return np.linalg.norm(positions.centers(as_frames(images)) - true, axis=-1)


def test_centers_of_true_frames_are_accurate():
    assert errors(*placed_digits()).max() < 0.1


def test_centers_of_blurred_faint_and_noisy_digits_are_close():
    """The plain centroid of these frames is wrong by ten pixels."""
    images, true = placed_digits()
    noise = np.random.default_rng(1).normal(10, 4, images.shape)
    found = errors(0.5 * scipy.ndimage.gaussian_filter(images, (0, 3, 3)) + noise, true)
    assert found.mean() < 0.5 and found.max() < 2


def test_centers_ignore_a_fainter_ghost():
    """A ghost with two fifths of the ink, outside the digit's window, doesn't change the position. A centroid is between."""
    images, true = placed_digits()
    ghosts, where = placed_digits(seed=1)
    apart = np.abs(true - where).max(1) > 28
    found = errors(np.maximum(images, 0.4 * ghosts)[apart], true[apart])
    assert apart.sum() > 10 and found.max() < 1


def test_distances_equal_known_shifts():
    """The digit is shifted by known pixels, replaced by another glyph, or missing."""
    glyphs = np.stack([easy_glyphs("")[i] for i in (7, 7, 7, 7, 7, 2, 7)])[None]
    corners = np.array([[20, 20], [23, 20], [20, 16], [20, 25], [17, 24], [20, 20], [20, 20]])[None]
    truth, frames = (as_frames(compose(glyphs[:, :n], at))[None] for n, at in ((1, corners * 0 + 20), (7, corners)))
    frames[0, 6] = positions.NOISE
    found = positions.compare_positions(positions.centers(truth), frames, {"distance": 19.0, "share": 0.03})
    np.testing.assert_allclose(found["distance"], [[0, 3, 4, 5, 5, 0, 19]], atol=1e-4)
    assert found["share"].tolist() == [[1, 1, 1, 0, 0, 1, 0]] and found["empty"].tolist() == [[0] * 6 + [1]]


def test_the_chance_of_a_position_equals_that_of_random_points():
    """Two random points in a square have a known mean distance, and a known probability of being near."""
    side = 64 - 28
    got = positions.chance(moving("train", digits=1), moving("test", digits=1))
    near = positions.NEAR / side
    assert got["distance"] == pytest.approx(0.5214 * side, rel=0.05)
    assert got["share"] == pytest.approx(np.pi * near**2 - 8 / 3 * near**3 + near**4 / 2, rel=0.15)


@pytest.mark.parametrize("shares, frames", [([0.9, 0.6, 0.5, 0.7], 2), ([1, 1], 2), ([0.2, 0.9], 0)])
def test_frames_count_until_at_most_half_are_right(shares, frames):
    assert positions.frames_above_half(shares) == frames


# ---------------------------------------------------------------------------------------------- rooms


def test_each_visited_room_is_found():
    shown, found = room_analysis.assign_rooms(room_analysis.histograms(walk(["a", "hall", "b", "hall"])))
    assert len(found) == 3 and shown.tolist() == [0] * 20 + [1] * 20 + [2] * 20 + [1] * 20
    np.testing.assert_allclose(room_analysis.histograms(walk(["a"])).sum(1), 1)


@pytest.mark.parametrize(
    "rooms, category",
    [(["a"] * 4, 0), (["a", "a", "hall", "hall"], 1), (["a", "hall", "b", "b"], 2), (["a", "hall", "a"], 2)],
)
def test_a_sequence_is_categorised_by_its_rooms(rooms, category):
    shown, _ = room_analysis.assign_rooms(room_analysis.histograms(walk(rooms)))
    assert room_analysis.category(shown) == category


def test_agreement_is_the_share_of_samples_in_the_true_room():
    truth = walk(["a", "a", "hall", "b"])
    same, stays = walk(["a", "hall", "b"], seed=1), walk(["a", "a", "a"], seed=2)
    blurred = scipy.ndimage.gaussian_filter(same, (0, 3, 3, 0))
    assert room_analysis.compare_rooms(truth, [same], 20).agreement.tolist() == [1] * 60
    assert room_analysis.compare_rooms(truth, [blurred], 20)[1:] == (2, 1.0)
    compared = room_analysis.compare_rooms(truth, [stays], 20)
    assert compared.agreement.tolist() == [1] * 20 + [0] * 40 and (compared.truth, compared.right) == (2, 0)
    both = room_analysis.compare_rooms(truth, [same, stays], 20)
    assert both.agreement.tolist() == [1] * 20 + [0.5] * 40 and both.right == 0.5


def test_unknown_textures_are_no_known_room():
    truth = walk(["a", "a", "hall"])
    other = 255 - walk(["a", "hall"], seed=1)
    assert not room_analysis.compare_rooms(truth, [other], 20).agreement.any()


def test_doorways_and_flicker_are_no_visits():
    video = walk(["a", "b"])
    video[5:8] = walk(["hall"])[:3]
    shown, _ = room_analysis.assign_rooms(room_analysis.histograms(video))
    assert shown.tolist() == [0] * 20 + [1] * 20
    shown, found = room_analysis.assign_rooms(room_analysis.histograms(video[:3]))
    assert shown.tolist() == [0] * 3 and not found  # too short to know a room


def test_accuracy_is_averaged_by_category():
    comparison = room_analysis.RoomComparison
    got = room_analysis.category_accuracy([comparison(np.ones(1), *x) for x in ((0, 1.0), (2, 0.0), (2, 0.5))])
    assert list(got) == ["same room", "to another room"]
    assert got["same room"] == {"value": 1, "low": 1, "high": 1, "sequences": 1}
    assert got["to another room"]["value"] == 0.25 and got["to another room"]["sequences"] == 2

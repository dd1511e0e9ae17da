"""The order of training windows, and the rules of the embedded dataset."""

import dataclasses
from collections import Counter

import numpy as np
import pytest

import data
from videos.digits import MovingDigits, draw, scikit_learn_digits, scikit_learn_labels


class Numbers:
    """A dataset whose window i is filled with i."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return np.full((2, 1, 1, 1), index, np.uint8)


def epoch_order(config, count):
    order = data.training_order(config, Numbers(count))
    return [int(order[i]) for i in range(len(order))]


def training(config, count, start=0, rows=4):
    return [
        (b.video[:, 0, 0, 0, 0].tolist(), b.weight.tolist())
        for b in data.training_batches(config, Numbers(count), start, rows)
    ]


def test_each_epoch_has_every_window_once_in_a_new_order(tiny):
    c = dataclasses.replace(tiny, num_epochs=3)
    order = epoch_order(c, 10)
    epochs = [order[i : i + 10] for i in (0, 10, 20)]
    for epoch in epochs:
        assert Counter(epoch) == Counter(range(10))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epoch_order(c, 10) == order
    assert epoch_order(dataclasses.replace(c, seed=1), 10) != order


def test_training_can_start_at_any_batch_and_pads_the_last(tiny):
    c = dataclasses.replace(tiny, batch_size=4, num_epochs=3, max_steps=None)
    batches = training(c, 5, rows=6)
    order = epoch_order(c, 5)
    assert len(batches) == data.training_steps(c, Numbers(5)) == 4
    for step, (video, weight) in enumerate(batches):
        want = order[4 * step : 4 * step + 4]
        assert video[: len(want)] == want == data.training_indices(c, Numbers(5), step)
        assert weight == [1] * len(want) + [0] * (6 - len(want))
    assert weight == [1, 1, 1, 0, 0, 0]
    for start in range(5):
        assert training(c, 5, start, rows=6) == batches[start:]


def test_max_steps_limits_the_number_of_batches(tiny):
    c = dataclasses.replace(tiny, max_steps=3)
    assert len(training(c, 50)) == 3
    assert data.training_steps(dataclasses.replace(c, max_steps=10**6, num_epochs=1), Numbers(50)) == 25


def test_evaluation_batches_keep_the_order():
    batches = list(data.eval_batches(Numbers(9), batch_size=3, count=7, rows=4))
    assert [b.video[:, 0, 0, 0, 0].tolist() for b in batches] == [[0, 1, 2, 0], [3, 4, 5, 0], [6, 0, 0, 0]]
    assert [b.weight.tolist() for b in batches] == [[1, 1, 1, 0], [1, 1, 1, 0], [1, 0, 0, 0]]
    assert sum(b.weight.sum() for b in data.eval_batches(Numbers(2), 3, 7, 3)) == 2


# ---------------------------------------------------------------------------------------------- digits


def test_digit_videos_have_the_configured_lengths(tiny):
    train, test = data.windows(tiny, "train"), data.windows(tiny, "test")
    assert train[0].shape == (8, 64, 64, 1) and test[0].shape == (12, 64, 64, 1) and train[0].dtype == np.uint8
    assert len(train) == 20_000 and len(test) == 1_000
    assert len(data.windows(dataclasses.replace(tiny, eval_seq_len=0), "test")[0]) == 1000


def digits(split, frames, digits=2):
    return MovingDigits(scikit_learn_digits, scikit_learn_labels, split, frames, digits)


def test_digit_videos_follow_from_split_and_index():
    videos = digits("train", 8)
    np.testing.assert_array_equal(videos[3], digits("train", 8)[3])
    assert not np.array_equal(videos[3], videos[4])
    assert not np.array_equal(videos[3], digits("test", 8)[3])
    np.testing.assert_array_equal(videos[3], digits("train", 20)[3][:8])


@pytest.mark.parametrize("count, frames", [(1, 5), (3, 9)])
def test_digits_drawn_on_devices_equal_those_of_the_host(count, frames):
    videos = digits("test", frames, count)
    sprites = videos.sprites()
    assert len(sprites) == len(videos) and sprites[0].nbytes < videos[0].nbytes / 5 * count
    drawn = draw(sprites[None, 10:14])
    assert drawn.dtype == np.uint8
    np.testing.assert_array_equal(drawn[0], [videos[i] for i in range(10, 14)])


def test_train_and_test_share_no_digit():
    train, test = scikit_learn_digits("train"), scikit_learn_digits("test")
    assert len(train) + len(test) == 1797 and len(test) > 250
    assert not {g.tobytes() for g in train} & {g.tobytes() for g in test}


def test_digits_move_at_a_constant_speed_and_stay_inside():
    """The centre of a digit's ink moves by 2 to 6 pixels per frame between reflections. The digit is never cut."""
    speeds = []
    for i in range(20):
        video = digits("train", 200, digits=1)[i][..., 0].astype(float)
        ink = video.sum((1, 2))
        assert np.all(ink == ink[0])
        centre = np.stack([(video.sum(axis) * np.arange(64)).sum(1) / ink for axis in (1, 2)], 1)
        step = np.linalg.norm(np.diff(centre, axis=0), axis=1)
        speeds.append(np.median(step))
        assert np.all(step < 6 + 2) and abs(np.median(step) - np.percentile(step, 60)) < 1.5
        covered = video.max(0) > 0
        assert covered[8:-8].any() and covered.shape == (64, 64)
    assert 2 - 0.5 < min(speeds) < 3 and 5 < max(speeds) < 6 + 0.5

"""Pictures and videos, read back after writing."""

import math

import av
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageFont

import tools


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("length", "columns"), [(1, 1), (9, 9), (10, 10), (11, 10), (36, 10), (100, 10), (101, 20)])
def test_grids_keep_every_frame_in_rows_of_tens(tmp_path, length, columns, channels):
    video = np.random.default_rng(0).integers(1, 256, (length, 6, 4, channels), dtype=np.uint8)
    tools.save_grid(video, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        grid = np.asarray(image)
    rows = -(-length // columns)
    assert grid.shape == (rows * 7 - 1, columns * 5 - 1, 3)
    for t in range(length):
        y, x = t // columns * 7, t % columns * 5
        np.testing.assert_array_equal(grid[y : y + 6, x : x + 4], tools.rgb(video[t]))
    assert (grid[6::7] == tools.GREY).all() and (grid[:, 4::5] == tools.GREY).all()


def test_triptych_shows_truth_prediction_and_error():
    """Names and frames around them are in the tests of `side_by_side`."""
    random = np.random.default_rng(0)
    truth, prediction = random.integers(0, 256, (2, 2, 5, 64, 64, 1), dtype=np.uint8)
    picture = tools.triptych(truth, prediction, context=2)
    assert picture.shape == (5, 2 * 64 + 2 + 4 + 2 * 14, 3 * 68, 3)
    error = np.abs(truth.astype(int) - prediction)
    for column, video in enumerate((truth, prediction, error)):
        for row in range(2):
            y, x = 16 + 66 * row, 2 + 68 * column
            np.testing.assert_array_equal(picture[:, y : y + 64, x : x + 64, 1], video[row, ..., 0])
    assert (picture[:, 80:82, 2:66] == tools.GREY).all()


def test_frames_say_whether_the_model_sees_them():
    """A colour around each frame and a word below it say so. The truth has the frame's number."""
    video = np.zeros((5, 64, 64, 1), np.uint8)
    font = ImageFont.load_default(9)
    picture = tools.side_by_side({"truth": video, "model": video}, {"model": 2})
    assert picture.shape == (5, 68 + 2 * 14, 2 * 68, 3)
    for t in range(5):
        own, word = (tools.GREEN, "reconstructed") if t < 2 else (tools.RED, "predicted")
        for x, color, above, below in (0, tools.GREY, "truth", f"{t + 1} / 5"), (68, own, "model", word):
            panel = picture[t, :, x : x + 68]
            np.testing.assert_array_equal(panel[:14], tools.text_image(above, 68, 14, font))
            np.testing.assert_array_equal(panel[-14:], tools.text_image(below, 68, 14, font))
            frame = panel[14:-14]
            assert all((edge == color).all() for edge in (frame[:2], frame[-2:], frame[:, :2], frame[:, -2:]))
            assert not frame[2:-2, 2:-2].any()


def test_words_fit_next_to_small_frames():
    small = np.zeros((1000, 8, 8, 1), np.uint8)
    picture = tools.side_by_side({"a": small, "b": small}, {"b": 36})
    font = ImageFont.load_default(9)
    widths = [4 + math.ceil(font.getlength(line)) for line in ("1000 / 1000", "reconstructed")]
    assert sum(widths) - 3 <= picture.shape[2] <= sum(widths) + 3 and (picture[999, 14:16, :12] == tools.GREY).all()


def test_a_gif_holds_every_frame(tmp_path):
    video = np.zeros((7, 8, 8, 3), np.uint8)
    for t in range(7):
        video[t, t] = 255
    tools.save_gif(video, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 7
        for t in range(7):
            image.seek(t)
            np.testing.assert_array_equal(np.asarray(image.convert("RGB"))[::2, ::2], video[t])


def test_a_gif_of_all_greys_is_close_to_the_video(tmp_path):
    """Also the colour that says whether the model sees the frame is close."""
    random = np.random.default_rng(0)
    truth, prediction = random.integers(256, size=(2, 1, 50, 32, 32, 1), dtype=np.uint8)
    video = tools.triptych(truth, prediction, 25)
    tools.save_gif(video, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as image:
        for t in range(50):
            image.seek(t)
            error = np.asarray(image.convert("RGB"))[::2, ::2].astype(int) - video[t]
            assert abs(error).max() <= 8 and abs(error[14, 100]).max() <= 2


def test_an_mp4_holds_every_frame(tmp_path):
    video = np.zeros((7, 16, 16, 3), np.uint8) + np.arange(0, 210, 30, dtype=np.uint8)[:, None, None, None]
    tools.save_video(video, tmp_path / "a.gif", ("gif", "mp4"))
    assert (tmp_path / "a.gif").exists()
    with av.open(str(tmp_path / "a.mp4")) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    assert len(frames) == 7 and all(frame.shape == (32, 32, 3) for frame in frames)
    np.testing.assert_allclose([frame.mean() for frame in frames], np.arange(0, 210, 30), atol=4)


def test_gifs_and_mp4s_have_the_same_frame_rate(tmp_path):
    video = np.zeros((7, 16, 16, 3), np.uint8) + np.arange(0, 210, 30, dtype=np.uint8)[:, None, None, None]
    tools.save_video(video, tmp_path / "a", ("gif", "mp4"))
    for suffix in "gif", "mp4":
        with av.open(str(tmp_path / f"a.{suffix}")) as file:
            times = [float(frame.time) for frame in file.decode(video=0)]
        np.testing.assert_allclose(times, np.arange(7) / 20)


def test_videos_side_by_side_have_room_for_long_names():
    black = np.zeros((3, 64, 64, 1), np.uint8)
    picture = tools.side_by_side(
        {"truth": black, "a model": black + 50, "a model of a long name": black}, {"a model": 2}
    )
    T, H, W, _ = picture.shape
    assert (T, H) == (3, 14 + 68 + 14) and W > 3 * 68
    assert all(picture[0, :14, x : x + 68].any() for x in (0, 68, 136, W - 20))  # names, also the end of the long one


def test_saved_frames_are_compressed(tmp_path):
    frames = np.zeros((50, 64, 64, 1), np.uint8)
    frames[:, 20:40, 20:40] = np.random.default_rng(0).integers(256, size=(50, 20, 20, 1))
    tools.save_frames(frames, tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as file:
        np.testing.assert_array_equal(file["arr_0"], frames)
    assert (tmp_path / "a.npz").stat().st_size < frames.nbytes / 4


def test_to_uint8_truncates():
    assert tools.to_uint8(jnp.array([-1.0, 0.0, 0.999, 1.0, 2.0])).tolist() == [0, 0, 254, 255, 255]

"""Metrics against scikit-image; pictures, logs and checkpoints by reading back what was written."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import pictures
import tools


def frames(kind, channels, seed=0):
    random = np.random.default_rng(seed)
    truth = random.uniform(size=(3, 64, 64, channels)).astype(np.float32)
    prediction = {
        "random": random.uniform(-0.2, 1.2, truth.shape),
        "noisy": truth + random.normal(size=truth.shape) * 0.05,
        "constant": np.full(truth.shape, 0.3),
        "shifted": np.roll(truth, 1, axis=2),
        "black": np.zeros(truth.shape),
    }[kind]
    if kind == "black":
        truth = np.ones_like(truth)
    return truth, prediction.astype(np.float32)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["random", "noisy", "constant", "shifted", "black"])
def test_metrics_equal_scikit_image(kind, channels):
    truth, prediction = frames(kind, channels)
    paper = tools.frame_metrics(truth, prediction, "paper")
    standard = tools.frame_metrics(truth, prediction, "standard")
    clipped = prediction.clip(0, 1)
    for i in range(3):
        per_channel = [(truth[i, ..., c], prediction[i, ..., c], clipped[i, ..., c]) for c in range(channels)]
        want = np.mean([structural_similarity(t, p, data_range=2) for t, p, _ in per_channel])
        assert float(paper["ssim"][i]) == pytest.approx(want, abs=1e-5)
        want = np.mean([structural_similarity(t, p, data_range=1) for t, _, p in per_channel])
        assert float(standard["ssim"][i]) == pytest.approx(want, abs=1e-5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            want = np.mean([peak_signal_noise_ratio(t, p, data_range=1) for t, p, _ in per_channel])
            assert float(paper["psnr"][i]) == pytest.approx(want, abs=1e-4)
            assert float(standard["psnr"][i]) == pytest.approx(
                peak_signal_noise_ratio(truth[i], clipped[i], data_range=1), abs=1e-4
            )


def test_metrics_of_equal_frames_are_finite():
    truth, _ = frames("random", 1)
    for protocol in tools.PROTOCOLS:
        metrics = tools.frame_metrics(truth, truth, protocol)
        np.testing.assert_allclose(metrics["ssim"], 1, atol=1e-6)
        np.testing.assert_allclose(metrics["psnr"], 100)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("length", [1, 49, 50, 51, 100, 101])
def test_grids_keep_every_frame(tmp_path, length, channels):
    video = np.random.default_rng(0).integers(1, 256, (length, 6, 4, channels), dtype=np.uint8)
    pictures.save_grid(video, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        grid = np.asarray(image)
    rows = -(-length // 50)
    assert grid.shape == (rows * 7 - 1, min(length, 50) * 5 - 1, 3)
    for t in range(length):
        y, x = t // 50 * 7, t % 50 * 5
        np.testing.assert_array_equal(grid[y : y + 6, x : x + 4], pictures.rgb(video[t]))
    assert not grid[6::7].any() and not grid[:, 4::5].any()


def test_comparison_shows_truth_prediction_and_error():
    random = np.random.default_rng(0)
    truth, prediction = random.integers(0, 256, (2, 2, 5, 8, 8, 1), dtype=np.uint8)
    picture = pictures.comparison(truth, prediction, context=2)
    assert picture.shape == (5, 2 * 12, 3 * 12, 3)
    np.testing.assert_array_equal(picture[3, 14:22, 2:10, 0], truth[1, 3, ..., 0])
    np.testing.assert_array_equal(picture[3, 14:22, 14:22, 1], prediction[1, 3, ..., 0])
    np.testing.assert_array_equal(picture[3, 14:22, 26:34, 2], np.abs(truth.astype(int) - prediction)[1, 3, ..., 0])
    assert picture[1, 0, 12].tolist() != picture[2, 0, 12].tolist() == picture[4, 0, 12].tolist()


def test_gif_holds_every_frame(tmp_path):
    video = np.zeros((7, 8, 8, 3), np.uint8)
    for t in range(7):
        video[t, t] = 255
    pictures.save_gif(video, tmp_path / "a.gif", scale=2)
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 7
        for t in range(7):
            image.seek(t)
            np.testing.assert_array_equal(np.asarray(image.convert("RGB"))[::2, ::2], video[t])


def test_to_uint8_truncates():
    assert tools.to_uint8(jnp.array([-1.0, 0.0, 0.999, 1.0, 2.0])).tolist() == [0, 0, 254, 255, 255]


# ---------------------------------------------------------------------------------------------- logs


def test_log_drops_what_a_resumed_run_will_write_again(tmp_path):
    with tools.Log(tmp_path, 0, None) as log:
        for step in 1, 2, 3:
            log.metrics(step, {"loss": 1.0 / step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')  # interrupted while writing
    with tools.Log(tmp_path, 2, None) as log:
        log.metrics(3, {"loss": 7.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": 7.0}]


# ---------------------------------------------------------------------------------------------- checkpoints

STATE = {"params": {"a": np.arange(1000.0, dtype=np.float32), "b": np.ones((3, 2), np.float32)}, "step": np.int32(1)}


def save(directory, steps, keep_every=3):
    with tools.open_checkpoints(directory, keep_every) as checkpoints:
        for step in steps:
            tools.save_checkpoint(checkpoints, step, jax.tree.map(lambda x: x + np.asarray(step, x.dtype), STATE))


def test_checkpoints_roll_and_some_stay(tmp_path):
    save(tmp_path, range(1, 9))
    assert sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()) == [3, 6, 7, 8]
    with tools.open_checkpoints(tmp_path, 3) as checkpoints:
        step, state = tools.load_newest_checkpoint(checkpoints, STATE)
        assert step == 8
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(STATE), strict=True):
            np.testing.assert_array_equal(a, b + 8)
            assert isinstance(a, np.ndarray)


def largest_file(directory):
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damaged_checkpoints_are_not_used(tmp_path, capsys, damage):
    save(tmp_path, [1, 2], keep_every=1)
    file = largest_file(tmp_path / "2")
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.unlink()
    with tools.open_checkpoints(tmp_path, 1) as checkpoints:
        with pytest.raises(tools.DamagedCheckpoint, match="2 is damaged"):
            tools.load_checkpoint(checkpoints, 2, STATE)
        step, state = tools.load_newest_checkpoint(checkpoints, STATE)
        assert step == 1 and state["step"] == 2
        printed = capsys.readouterr().out
        assert printed.count("\n") == 1 and "2 is damaged" in printed
        # The damaged step is saved anew when training gets there again.
        tools.save_checkpoint(checkpoints, 2, STATE)
    with tools.open_checkpoints(tmp_path, 1) as checkpoints:
        assert tools.load_newest_checkpoint(checkpoints, STATE)[0] == 2


def test_checkpoints_of_other_shapes_are_refused(tmp_path):
    save(tmp_path, [1])
    other = STATE | {"params": {"a": np.zeros(7, np.float32), "b": np.zeros((3, 2), np.float32)}}
    with tools.open_checkpoints(tmp_path) as checkpoints, pytest.raises(tools.DamagedCheckpoint, match="another model"):
        tools.load_checkpoint(checkpoints, 1, other)


def test_no_checkpoint(tmp_path):
    with tools.open_checkpoints(tmp_path / "none", 1) as checkpoints:
        assert tools.load_newest_checkpoint(checkpoints, STATE) is None

"""TensorBoard's event files, read back with TensorBoard's own reader."""

import dataclasses
import importlib.util
import io
import shutil

import numpy as np
import pytest
from conftest import log_of
from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

import train
from config import ConfigError
from system import logs
from training import runs


def scalars(directory):
    """Return each value with its step and name, in the order of the files, and the number of files."""
    paths = sorted(directory.glob("events.out.tfevents.*"))
    found = []
    for path in paths:
        for event in EventFileLoader(str(path)).Load():
            found += [(event.step, value.tag, value.tensor.float_val[0]) for value in event.summary.value]
    return found, len(paths)


def logged(directory):
    """Return the values of metrics.jsonl in the same form, as float32."""
    lines = log_of(directory)
    return [(line["step"], name, np.float32(x)) for line in lines for name, x in line.items() if name != "step"]


def test_tensorboard_has_all_values_and_videos_once(tiny):
    """Also after resuming, if there are fewer checkpoints than logged steps."""
    c = dataclasses.replace(
        tiny, tensorboard=True, save_gifs=True, save_scalars_every=1, save_gifs_every=2, save_model_every=2
    )
    run = runs.directory(c)
    train.train(dataclasses.replace(c, max_steps=2))
    train.train(dataclasses.replace(c, max_steps=3, tensorboard=False))
    shutil.rmtree(run / "checkpoints" / "3")  # killed before it was there
    train.train(c)
    assert scalars(run) == (logged(run), 1)
    assert [line["step"] for line in log_of(run)] == [1, 2, 3, 4]
    videos = []
    for path in sorted((run / "videos").glob("events.out.tfevents.*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                width, height, gif = value.tensor.string_val
                split = value.tag.removesuffix("/open_loop")
                assert gif == (run / "videos" / f"{split}_{event.step:07}.gif").read_bytes()
                assert Image.open(io.BytesIO(gif)).size == (int(width), int(height))
                videos.append((event.step, split))
    assert videos == [(step, split) for step in (2, 4) for split in ("train", "validation")]


def test_tensorboard_has_values_of_a_resumed_run_once(tmp_path):
    log = logs.Log(tmp_path, 0, tensorboard=True)
    for step in 1, 2, 3:
        log.metrics(step, {"loss": 1 / 3 / step})
    assert scalars(tmp_path) == (logged(tmp_path), 1)  # at any time, not only after the end
    log.close()
    again = logs.Log(tmp_path, 1, tensorboard=True)
    assert [step for step, *_ in scalars(tmp_path)[0]] == [1]
    again.metrics(2, {"loss": 7.0})
    again.close()
    assert scalars(tmp_path) == ([(1, "loss", np.float32(1 / 3)), (2, "loss", 7)], 1)


def test_event_files_that_cannot_be_written_do_not_stop_training(tmp_path, monkeypatch, capsys):
    log = logs.Log(tmp_path, 0, tensorboard=True)

    def full():
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(log.events.metrics_writer, "flush", full)
        log.metrics(1, {"loss": 1.0})
    assert "event files can't be written (No space left on device); training continues" in capsys.readouterr().out
    log.close()
    assert log_of(tmp_path) == [{"step": 1, "loss": 1.0}]


def test_a_missing_tensorboardx_is_named(tiny, monkeypatch):
    """In one line, before anything is written."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"tensorboard: needs tensorboardX, .* call pip install tensorboardX, or leave"
    ):
        train.train(dataclasses.replace(tiny, tensorboard=True))
    assert not runs.directory(tiny).exists()

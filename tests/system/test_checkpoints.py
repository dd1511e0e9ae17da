"""Checkpoints, read back after writing, and damaged."""

import gc
import os
import signal
import sys
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import full_disk

from config import ConfigError
from system.checkpoints import Checkpoints, DamagedCheckpoint
from system.interrupts import Interrupted, Interrupts

STATE = {"params": {"a": np.arange(1000.0, dtype=np.float32), "b": np.ones((3, 2), np.float32)}, "step": np.int32(1)}


def save(directory, steps, keep_every=3):
    with Checkpoints(directory, keep_every) as checkpoints:
        for step in steps:
            checkpoints.save(step, jax.tree.map(lambda x: x + np.asarray(step, x.dtype), STATE))


def test_new_checkpoints_replace_old_ones_except_some(tmp_path):
    save(tmp_path, range(1, 9))
    assert sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()) == [3, 6, 7, 8]
    with Checkpoints(tmp_path, 3) as checkpoints:
        step, state, _ = checkpoints.load_newest(STATE)
        assert step == 8
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(STATE), strict=True):
            np.testing.assert_array_equal(a, b + 8)
            assert isinstance(a, np.ndarray)


def largest_file(directory):
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_a_damaged_file_prints_one_line(tmp_path, capsys, caplog):
    """There isn't a line for each array when its task is garbage-collected."""
    save(tmp_path, [1, 2])
    for file in [path for path in (tmp_path / "2").rglob("*") if path.is_file()]:
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        with Checkpoints(tmp_path) as checkpoints:
            assert checkpoints.load_newest(STATE)[0] in (1, 2)
        gc.collect()
        assert capsys.readouterr().out.count("\n") <= 1 and not caplog.records
        file.write_bytes(content)


def test_a_checkpoint_without_permission_is_not_damaged(tmp_path, monkeypatch):
    """Otherwise training would resume from the one before, and replace it."""
    save(tmp_path, [1, 2])
    with Checkpoints(tmp_path) as checkpoints:

        def load(step, like):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(checkpoints.orbax, "load", load)
        with pytest.raises(ConfigError, match=r"2 can't be read \(Permission denied\); permit it"):
            checkpoints.load_newest(STATE)


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
    with Checkpoints(tmp_path, 1) as checkpoints:
        with pytest.raises(DamagedCheckpoint, match="2 is damaged"):
            checkpoints.load(2, STATE)
        step, state, _ = checkpoints.load_newest(STATE)
        assert step == 1 and state["step"] == 2
        printed = capsys.readouterr().out
        assert printed.count("\n") == 1 and "2 is damaged" in printed
        # When training reaches the damaged step again, it is saved again.
        checkpoints.save(2, STATE)
    with Checkpoints(tmp_path, 1) as checkpoints:
        assert checkpoints.load_newest(STATE)[0] == 2


def test_a_directory_with_only_damaged_checkpoints_has_no_newest(tmp_path, capsys):
    save(tmp_path, [1, 2])
    for step in "1", "2":
        largest_file(tmp_path / step).write_bytes(b"")
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(DamagedCheckpoint, match=r"1 is damaged .* no older one"):
        checkpoints.load_newest(STATE)
    assert "2 is damaged" in capsys.readouterr().out


def test_checkpoints_of_other_shapes_are_refused(tmp_path):
    save(tmp_path, [1])
    other = STATE | {"params": {"a": np.zeros(7, np.float32), "b": np.zeros((3, 2), np.float32)}}
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(DamagedCheckpoint, match="another model"):
        checkpoints.load(1, other)


def test_damaged_metadata_are_named(tmp_path):
    save(tmp_path, [1])
    (tmp_path / "1" / "_CHECKPOINT_METADATA").write_text("[1]")
    with pytest.raises(
        DamagedCheckpoint, match=r"checkpoint: one in .* is damaged \(.*got list\); remove the one whose"
    ):
        Checkpoints(tmp_path)


def test_failed_writes_print_no_traces_of_threads(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    closed, other = (SimpleNamespace(exc_value=RuntimeError(text)) for text in ("Event loop is closed", "other"))
    with Checkpoints(tmp_path):
        sys.unraisablehook(closed)
        sys.unraisablehook(other)
    assert told == [other] and sys.unraisablehook == told.append


def test_a_directory_without_checkpoints_has_no_newest(tmp_path):
    with Checkpoints(tmp_path / "none", 1) as checkpoints:
        assert checkpoints.load_newest(STATE) is None


def test_notes_are_saved_and_checked(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, STATE, unreported={"loss": 0.125})
        checkpoints.save(4, STATE)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.load(3, STATE)[1] == {"unreported": {"loss": 0.125}} and checkpoints.load(4, STATE)[1] == {}
    (file,) = [p for p in (tmp_path / "3").rglob("*") if p.is_file() and b"0.125" in p.read_bytes()]
    file.write_bytes(file.read_bytes().replace(b"0.125", b"0.124"))
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(DamagedCheckpoint, match="checksum"):
        checkpoints.load(3, STATE)


def test_a_full_disk_loses_only_the_checkpoints_meanwhile(tmp_path, capsys):
    """Earlier checkpoints stay. Later ones are saved as soon as there is space."""
    large = STATE | {"more": np.random.default_rng(0).normal(size=300_000).astype(np.float32)}
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(1, large)
        time.sleep(2)  # for the thread that writes
        with full_disk():
            for step in 2, 3:
                checkpoints.save(step, large)
                time.sleep(2)  # for the thread that writes
        assert checkpoints.steps == [1]
        checkpoints.save(4, large)
    assert capsys.readouterr().out.count("Warning: a checkpoint couldn't be saved") == 2
    with Checkpoints(tmp_path, 1) as checkpoints:
        assert checkpoints.load_newest(large)[0] == 4
    assert not [p for p in tmp_path.iterdir() if "tmp" in p.name]


@pytest.mark.parametrize("method", ["load", "metadata"])
def test_a_signal_is_raised_after_a_checkpoint_is_read(tmp_path, monkeypatch, method):
    """In Orbax, it could become the error of a damaged checkpoint, or get lost."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, STATE)
    finished = []
    with Checkpoints(tmp_path) as checkpoints:
        read = getattr(checkpoints.orbax, method)

        def read_with_signal(*arguments):
            os.kill(os.getpid(), signal.SIGTERM)
            found = read(*arguments)
            finished.append(method)
            return found

        monkeypatch.setattr(checkpoints.orbax, method, read_with_signal)
        with pytest.raises(Interrupted), Interrupts():
            checkpoints.load_newest(STATE) if method == "load" else checkpoints.notes(3)
    assert finished == [method] and Interrupts.entered is None

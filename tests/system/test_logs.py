"""Logs, read back after writing."""

import dataclasses
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import tqdm.std
from conftest import log_of

from config import ConfigError
from cwvae import CWVAE
from system import logs
from system.devices import Devices
from training import runs


def test_a_log_drops_lines_that_a_resumed_run_will_write_again(tmp_path):
    log = logs.Log(tmp_path, 0, None)
    for step in 1, 2, 3:
        log.metrics(step, {"loss": 1.0 / step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')  # interrupted while writing
    logs.Log(tmp_path, 2, None).metrics(3, {"loss": 7.0})
    assert log_of(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": 7.0}]


def test_wandb_gets_each_step_once(tmp_path):
    told = []
    run = SimpleNamespace(log=lambda values, step: told.append(step))
    first = logs.Log(tmp_path, 0, run)
    for step in 1, 2, 3:
        first.metrics(step, {"loss": 1.0})
    again = logs.Log(tmp_path, 1, run)  # killed, and resumed at an earlier checkpoint
    for step in 2, 3, 4:
        again.metrics(step, {"loss": 1.0})
    assert told == [1, 2, 3, 4]
    assert [line["step"] for line in log_of(tmp_path)] == [1, 2, 3, 4]


def test_a_damaged_log_keeps_its_complete_lines(tmp_path):
    """Other lines have bytes that aren't text, as after a power cut."""
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 0.5}\n\xff\x00\xfe\n[1]\n{"step": 2, "l\xff')
    assert logs.Log(tmp_path, 2, None).last == 1
    assert log_of(tmp_path) == [{"step": 1, "loss": 0.5}]


def test_lines_that_cannot_be_written_are_written_later(tmp_path, monkeypatch, capsys):
    log = logs.Log(tmp_path, 0, None)
    log.metrics(1, {"loss": 1.0})
    whole = type(tmp_path).open

    class Full:
        """A file that takes some bytes before the disk is full."""

        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def tell(self):
            return self.file.tell()

        def write(self, text):
            self.file.write(text[:5])
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "open", lambda self, *mode: Full(whole(self, *mode)))
        log.metrics(2, {"loss": 2.0})
    assert "No space left on device" in capsys.readouterr().out
    log.metrics(3, {"loss": 3.0})
    assert [line["step"] for line in log_of(tmp_path)] == [1, 2, 3]


def test_a_failing_wandb_is_called_only_once(tmp_path, capsys):
    class Failing:
        calls = 0

        def log(self, *_, **__):
            self.calls += 1
            raise ConnectionError("gone")

    run = Failing()
    log = logs.Log(tmp_path, 0, run)
    for step in 1, 2, 3:
        log.metrics(step, {"loss": 1.0})
    assert run.calls == 1 and capsys.readouterr().out.count("wandb failed (gone); training continues without it") == 1
    assert len(log.path.read_text().splitlines()) == 3


def failing_wandb():
    """Return a module like wandb whose `init` fails, as without a network."""
    return SimpleNamespace(run=None, init=Mock(side_effect=ConnectionError("no\nnetwork")), Settings=dict)


def test_training_continues_if_wandb_cannot_start(tiny, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", wandb := failing_wandb())
    with logs.wandb_session(), runs.opened(dataclasses.replace(tiny, wandb="online"), Devices()) as run:
        run.restore(CWVAE(run.config))
        run.report(1, train={"loss": 1.0})
    assert wandb.init.call_count == 1
    assert capsys.readouterr().out.count("Warning: wandb failed (no network); training continues without it") == 1
    assert log_of(run.path) == [{"step": 1, "train/loss": 1.0}]


def test_a_sweep_is_not_trained_without_its_values(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", failing_wandb())
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    with pytest.raises(ConfigError, match=r"^wandb: the sweep's values can't be read \(no network\); start the agent"):
        logs.with_sweep(dataclasses.replace(tiny, wandb="online"))


def test_wandb_may_fail_with_a_video_and_at_the_end(tmp_path, monkeypatch, capsys):
    """Its failure doesn't hide another exception, such as Ctrl-C."""
    finish = Mock(side_effect=ConnectionError("gone"))
    run = SimpleNamespace(log=Mock(), finish=finish)
    wandb = SimpleNamespace(run=run, Video=Mock(side_effect=ValueError("no video")))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(KeyboardInterrupt), logs.wandb_session():
        logs.Log(tmp_path, 0, run).gif(1, "train/open_loop", tmp_path / "a.gif")
        raise KeyboardInterrupt
    assert capsys.readouterr().out.splitlines() == [
        "Warning: wandb failed (no video); training continues without it",
        "Warning: wandb failed (gone); its run may be incomplete",
    ]
    finish.assert_called_once_with(exit_code=1)


def test_a_log_that_cannot_be_opened_does_not_stop_training(tmp_path, monkeypatch, capsys):
    log = logs.Log(tmp_path, 0, None)

    def refused(*_):
        raise OSError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "open", refused)
        log.metrics(1, {"loss": 1.0})
    assert "can't be written (Permission denied); training continues" in capsys.readouterr().out
    log.metrics(2, {"loss": 2.0})
    assert [line["step"] for line in log_of(tmp_path)] == [1, 2]


def test_progress_of_several_trainings_is_by_their_work(monkeypatch):
    """The time left doesn't count the work of earlier starts."""
    clock = [0.0]
    monkeypatch.setattr(logs, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    overall, lines = logs.OverallProgress([1, 4, 40, 30]), []
    for seconds, share in (5, 0), (300, 0.5), (300, 1), (7, 1):  # the first was done, the second half done
        clock[0] += seconds
        overall.update(share)
        lines.append(str(overall))
    assert lines == ["1 of 4 done", "2 of 4 done, 2.9 h left", "3 of 4 done, 7 min left", "4 of 4 done"]


def test_the_bar_leaves_out_compilation_and_warns_of_slow_steps(capsys, monkeypatch):
    """Compilation takes 1,000 s, each step 100 s."""
    clock = [0.0]
    monkeypatch.setattr(tqdm.std, "time", lambda: clock[0])
    monkeypatch.setattr(logs, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    class Loss(float):
        def is_ready(self):
            return False

        def block_until_ready(self):
            clock[0] += 100

    with logs.Progress(0, 865, 50) as progress:
        assert progress.bar.desc.startswith("compiling")
        clock[0] += 1000
        progress.update(Loss(1))
        assert progress.bar.desc.startswith("first step")
        for i in range(3):
            progress.update(Loss(i))
        assert progress.bar.n == 3 and progress.bar.format_dict["rate"] == pytest.approx(1 / 100)
        assert "0 frames/s" in str(progress.bar) and "compiling" not in str(progress.bar)
    out = capsys.readouterr().out
    assert (
        "A step takes 100 s, so the 864 steps left take 1.0 days; lower --batch_size, --seq_len or --max_steps" in out
    )
    with logs.Progress(0, 3, 50, shown=False) as progress:
        for i in range(3):
            progress.update(Loss(i))
    assert not capsys.readouterr().out

"""Logs by reading back what was written."""

from types import SimpleNamespace

import pytest
import tqdm.std
from conftest import log_of

from system import logs


def test_log_drops_what_a_resumed_run_will_write_again(tmp_path):
    log = logs.Log(tmp_path, 0, None)
    for step in 1, 2, 3:
        log.metrics(step, {"loss": 1.0 / step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')  # interrupted while writing
    logs.Log(tmp_path, 2, None).metrics(3, {"loss": 7.0})
    assert log_of(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": 7.0}]


def test_wandb_is_told_each_step_once(tmp_path):
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


def test_a_damaged_log_keeps_its_whole_lines(tmp_path):
    """Bytes that aren't text, as after a power cut."""
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 0.5}\n\xff\x00\xfe\n[1]\n{"step": 2, "l\xff')
    assert logs.Log(tmp_path, 2, None).last == 1
    assert log_of(tmp_path) == [{"step": 1, "loss": 0.5}]


def test_a_log_that_cannot_be_written_comes_later(tmp_path, monkeypatch, capsys):
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


def test_wandb_that_fails_is_left_alone(tmp_path, capsys):
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


def test_a_log_that_cannot_be_opened_stops_nothing(tmp_path, monkeypatch, capsys):
    log = logs.Log(tmp_path, 0, None)

    def refused(*_):
        raise OSError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "open", refused)
        log.metrics(1, {"loss": 1.0})
    assert "can't be written (Permission denied); training continues" in capsys.readouterr().out
    log.metrics(2, {"loss": 2.0})
    assert [line["step"] for line in log_of(tmp_path)] == [1, 2]


def test_how_far_several_trainings_are(monkeypatch):
    """By their work, and without the time of what earlier starts did."""
    clock = [0.0]
    monkeypatch.setattr(logs, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    overall, lines = logs.Overall([1, 4, 40, 30]), []
    for seconds, share in (5, 0), (300, 0.5), (300, 1), (7, 1):  # the first was done, the second half done
        clock[0] += seconds
        overall.update(share)
        lines.append(str(overall))
    assert lines == ["1 of 4 done", "2 of 4 done, 2.9 h left", "3 of 4 done, 7 min left", "4 of 4 done"]


def test_the_bar_leaves_out_compilation_and_tells_of_slow_steps(capsys, monkeypatch):
    """Compiling takes 1,000 s, each step 100 s."""
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

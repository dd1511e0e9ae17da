"""Interruptions of all kinds: training loses nothing, and ends with the same result as without them."""

import dataclasses
import functools
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, flags, log_of
from helpers import assert_same

import config as configuration
import cwvae
import train
from cwvae import CWVAE
from system.checkpoints import Checkpoints
from system.devices import Devices
from system.interrupts import Interrupted, Interrupts
from system.logs import Progress
from training import runs
from training.step import make_state, make_train_step


def start(logdir, **keys):
    steps = dict(max_steps=60, save_scalars_every=3, save_model_every=5, save_named_model_every=20)
    keys = dict(levels=1) | steps | keys  # the smallest model starts soonest
    return subprocess.Popen(
        [sys.executable, ROOT / "train.py", f"--logdir={logdir}", *flags(**keys)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_of(logdir):
    (path,) = logdir.glob("digits/*/config.yml")
    return path.parent


def outcome(logdir):
    """Return the last step and state, and the log."""
    run = run_of(logdir)
    c = configuration.load(run / "config.yml")
    with Checkpoints(run / "checkpoints") as checkpoints:
        step, state, _ = checkpoints.load_newest(make_state(CWVAE(c), draw=False))
    return step, state, (run / "metrics.jsonl").read_text()


def assert_same_outcome(a, b):
    assert a[0] == b[0] and a[2] == b[2]
    assert_same(a[1], b[1])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    logdir = tmp_path_factory.mktemp("whole")
    output, _ = (process := start(logdir)).communicate()
    assert process.returncode == 0, output
    return outcome(logdir)


def newest(run):
    return max((int(p.name) for p in (run / "checkpoints").glob("*") if p.name.isdigit()), default=0)


FAULTS = int(os.environ.get("FAULTS", "3"))
"""The number of faults to try; few by default."""


def damage(file, chance):
    """Truncate a file, or flip one of its bits."""
    content = bytearray(file.read_bytes())
    position = chance.randrange(len(content))
    if chance.random() < 0.5:
        content = content[:position]
    else:
        content[position] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def lines_logged(logdir):
    return sum(log.read_text().count("\n") for log in logdir.glob("digits/*/metrics.jsonl"))


@pytest.mark.slow
def test_random_faults_do_not_change_the_result(tmp_path, capsys):
    """Signals come at random times: while starting, training, validating or saving. Between them, checkpoints are damaged."""
    keys = dict(max_steps=100 * FAULTS, save_scalars_every=10, save_model_every=7, save_named_model_every=50)
    whole = start(tmp_path / "whole", **keys)
    output, _ = whole.communicate()
    assert whole.returncode == 0, output

    chance = random.Random(0)
    codes = {"SIGKILL": -signal.SIGKILL, "SIGTERM": 143, "SIGINT": 130}
    survived = dict.fromkeys([*codes, "damaged checkpoint"], 0)
    logdir = tmp_path / "faults"
    for _ in range(FAULTS):
        before, more = lines_logged(logdir), chance.choice([0, 1, 4])
        process = start(logdir, **keys)
        while more and lines_logged(logdir) < before + more and process.poll() is None:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.2 if more else 2))  # without more lines, most likely while it starts
        name = chance.choice(list(codes))
        process.send_signal(getattr(signal, name))
        output, _ = process.communicate(timeout=60)
        if process.returncode == 0:  # it was faster
            break
        # Before train.py handles signals, Python does.
        assert process.returncode in (codes[name], -getattr(signal, name), 1 if name == "SIGINT" else None), output
        survived[name] += 1
        saved = sorted(
            (p for p in logdir.glob("digits/*/checkpoints/*") if p.name.isdigit()), key=lambda p: int(p.name)
        )
        if len(saved) > 1 and chance.random() < 0.5:
            damage(chance.choice([p for p in saved[-1].rglob("*") if p.is_file() and p.stat().st_size]), chance)
            survived["damaged checkpoint"] += 1
    output, _ = (process := start(logdir, **keys)).communicate()
    assert process.returncode == 0, output
    assert_same_outcome(outcome(logdir), outcome(tmp_path / "whole"))
    assert sum(survived.values()) > FAULTS // 2
    with capsys.disabled():
        print(f"\nfaults survived: {survived}")


def test_a_signal_saves_the_last_finished_step(tmp_path, uninterrupted):
    process = start(tmp_path, save_model_every=1000)
    while not list(tmp_path.glob("digits/*/metrics.jsonl")):
        time.sleep(0.05)
        assert process.poll() is None, process.communicate()
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert time.monotonic() - begin < 30
    assert process.returncode == 143, output
    waiting = output.index("SIGTERM: waiting for at most two steps in progress, and a checkpoint")
    assert waiting < output.index("Interrupted by SIGTERM; call the same command again to resume")
    assert newest(run_of(tmp_path)) >= 3  # no interval asked for it
    process = start(tmp_path)
    process.communicate()
    assert_same_outcome(outcome(tmp_path), uninterrupted)


@pytest.fixture
def no_nohup():
    """Make sure that SIGHUP isn't ignored; restore its handler afterwards."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("no_nohup")
@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGUSR1", 138), ("SIGUSR2", 140), ("SIGHUP", 129)])
def test_a_signal_is_followed_by_at_most_two_steps(tiny, monkeypatch, capfd, name, code):
    """Steps take a quarter of a second, and much less to dispatch."""
    finished, signalled = [], []
    make_train_step = train.make_train_step

    def slow(step):
        time.sleep(0.25)
        finished.append(int(step))
        return step

    def make_slow(model):
        take_step = make_train_step(model)
        delay = jax.jit(lambda step: jax.pure_callback(slow, jax.ShapeDtypeStruct((), jnp.int32), step))

        def take_slow_step(state, batch):
            state, metrics = take_step(state, batch)
            step = delay(state.step)
            if len(finished) >= 5 and not signalled:
                signalled.append(len(finished))
                os.kill(os.getpid(), getattr(signal, name))
            return state.replace(step=step), metrics | {"loss": metrics["loss"] + 0 * step}

        return take_slow_step

    monkeypatch.setattr(train, "make_train_step", make_slow)
    with pytest.raises(Interrupted) as caught:
        train.train(dataclasses.replace(tiny, max_steps=100, save_model_every=1000))
    assert caught.value.exit_code == code and str(caught.value) == name
    assert f"{name}: waiting for at most two steps in progress, and a checkpoint" in capfd.readouterr().err
    assert len(finished) == newest(runs.directory(tiny)) <= signalled[0] + 2


def test_the_loop_is_at_most_two_steps_ahead():
    """The loss of a step is only ready once the loop waits for it."""
    begun, finished = [], []

    class Loss(float):
        def is_ready(self):
            return False

        def block_until_ready(self):
            finished.append(self)

    with Progress(0, 9, 1) as progress:
        for i in range(9):
            begun.append(Loss(i))
            assert len(begun) - len(finished) <= 2
            progress.update(begun[-1])
        assert progress.bar.n == 8
    assert finished == begun and progress.bar.n == 9


@pytest.mark.usefixtures("no_nohup")
@pytest.mark.parametrize("start_with", [signal.SIG_DFL, signal.SIG_IGN])
def test_nohup_is_respected(start_with):
    signal.signal(signal.SIGHUP, start_with)
    with Interrupts():
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert ignored == (start_with == signal.SIG_IGN) and signal.getsignal(signal.SIGHUP) == start_with


def test_signals_wait_for_the_end_of_a_deferring_block():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted) as caught, Interrupts() as interrupts:
        done = False
        with interrupts.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            done = True
        raise AssertionError("not reached")
    assert done and caught.value.exit_code == 143
    with pytest.raises(Interrupted) as caught, Interrupts():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert caught.value.exit_code == 130 and signal.getsignal(signal.SIGINT) == before
    with Interrupts() as interrupts:
        with interrupts.deferred_at_exit():
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
    assert interrupts.received == signal.SIGTERM


def test_a_thread_that_never_ends_does_not_hold_an_interrupted_program():
    """Such a thread remains if a signal comes while grain's pool starts it."""
    program = """
import os, signal, threading
from system.interrupts import Interrupts, exit_codes
with exit_codes(), Interrupts():
    threading.Thread(target=threading.Event().wait).start()
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=30)
    assert done.returncode == 143 and "Interrupted by SIGTERM" in done.stderr


def test_interrupted_validation_is_logged_on_resume(tiny, monkeypatch):
    """The step is done, its line isn't written. The checkpoint keeps its metrics, and resuming writes the line first."""
    c = dataclasses.replace(tiny, save_scalars_every=2)
    train.train(c)
    want = (runs.directory(c) / "metrics.jsonl").read_text()
    again = dataclasses.replace(c, logdir=c.logdir + "2")

    def interrupted(*_):
        raise Interrupted(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(train, "validate", interrupted)
        with pytest.raises(Interrupted):
            train.train(again)
    assert not (runs.directory(again) / "metrics.jsonl").exists()
    train.train(again)
    assert (runs.directory(again) / "metrics.jsonl").read_text() == want


def test_a_second_training_in_a_directory_is_refused(tmp_path):
    first = start(tmp_path, max_steps=100_000, num_epochs=1000)
    while not list(tmp_path.glob("digits/*/metrics.jsonl")):
        time.sleep(0.05)
        assert first.poll() is None, first.communicate()
    second = start(tmp_path, max_steps=100_000, num_epochs=1000)
    output, _ = second.communicate()
    assert second.returncode == 2 and "is being trained by another process" in output
    first.kill()
    first.communicate()
    third = start(tmp_path, max_steps=5)
    output, _ = third.communicate()
    assert third.returncode == 0, output


def test_non_finite_steps_stop_the_training(tiny, monkeypatch, capsys):
    c = dataclasses.replace(tiny, save_model_every=2, save_scalars_every=3, max_steps=9)
    objective, spoil = cwvae.objective, np.float32(0)

    def spoiled(config, terms, weight, frames, axis=None):
        """Return the objective; in training, add `spoil` to the loss: 0 or NaN."""
        loss, metrics = objective(config, terms, weight, frames, axis)
        if axis is None:
            return loss, metrics
        scalar, exact = jax.ShapeDtypeStruct((), jnp.float32), jax.lax.stop_gradient(metrics["loss"])
        return loss, metrics | {"loss": jax.pure_callback(lambda x: x + spoil, scalar, exact)}

    monkeypatch.setattr(cwvae, "objective", spoiled)
    monkeypatch.setattr(train, "make_train_step", functools.cache(make_train_step))
    train.train(dataclasses.replace(c, max_steps=4))
    spoil = np.float32(np.nan)
    with pytest.raises(
        train.NonFinite, match=r"isn't finite from step 5 on; see .*nonfinite; the last good checkpoint is at step 4"
    ):
        train.train(c)
    run = runs.directory(c)
    found = json.loads((run / "nonfinite" / "step_5.json").read_text())
    assert found["first_bad_step"] == 5 and found["seed"] == 0 and len(found["windows_of_its_batch"]) == 2
    assert found["detected_at_step"] == 6 and "--max_steps 5 --save_scalars_every 1" in found["replay"]
    assert shlex.split(found["replay"])[:4] == ["python", "train.py", "--config", str(run / "config.yml")]
    assert found["metrics_at_detection"]["loss"] == "nan"
    assert newest(run) == 4
    assert [line["step"] for line in log_of(run)] == [3, 4]
    # The replay runs from the last good checkpoint to the bad step.
    with pytest.raises(train.NonFinite, match="from step 5 on"):
        train.train(dataclasses.replace(c, max_steps=5, save_scalars_every=1))
    # Without the cause, training continues.
    spoil = np.float32(0)
    assert int(train.train(c).step) == 9


def test_a_state_after_a_bad_step_is_not_saved(tiny):
    with runs.opened(tiny, Devices()) as opened:
        _, state, _ = opened.restore(CWVAE(tiny))
        opened.save(1, state, {})
        opened.save(2, state.replace(first_bad=jnp.int32(2)), {})
    assert newest(runs.directory(tiny)) == 1

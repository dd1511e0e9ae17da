"""One device, many devices and many processes give the same numbers and files."""

import dataclasses
import itertools
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from conftest import ROOT, TINY, flags, log_of
from jax._src import xla_bridge

import config as configuration
import eval as evaluation
import train
from config import Config
from system import devices
from system.checkpoints import Checkpoints
from training.models import make_model
from training.step import make_state


def start(count, *arguments):
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}
    return subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


# No number of devices in these tests divides batches of 5.
TRAINING = TINY | dict(levels=1, batch_size=5, save_scalars_every=1, kl_grad_post_perc=0.8, free_nats=0.5)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Return the log directory of a training and an evaluation on one device."""
    logdir = tmp_path_factory.mktemp("one")
    train.train(Config(**TRAINING | dict(logdir=str(logdir), max_steps=7)))
    evaluation.evaluate(*evaluation.parse(["--logdir", str(logdir)]))
    return logdir


def finished(*processes):
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return outputs


def cluster(count):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [[f"--coordinator_address={address}", f"--num_processes={count}", f"--process_id={i}"] for i in range(count)]


def results(logdir):
    (path,) = logdir.glob("digits/*/metrics.jsonl")
    run = path.parent
    c = configuration.load(run / "config.yml")
    with Checkpoints(run / "checkpoints") as checkpoints:
        step, state, _ = checkpoints.load_newest(make_state(make_model(c), draw=False))
    return log_of(run), step, state


def assert_close(a, b):
    """Compare the metrics of each step, including validation, and the last parameters."""
    (lines, step, state), (other_lines, other_step, other_state) = a, b
    assert step == other_step and [x["step"] for x in lines] == [x["step"] for x in other_lines]
    for line, other in zip(lines, other_lines, strict=True):
        assert line.keys() == other.keys()
        for name, value in line.items():
            assert other[name] == pytest.approx(value, rel=2e-4, abs=1e-4), (line["step"], name)
    for x, y in zip(jax.tree.leaves(state.params), jax.tree.leaves(other_state.params), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-4)


def assert_same_evaluations(logdir):
    """Compare the two evaluations of the run, of three sequences each."""
    found = sorted(logdir.glob("digits/*/eval_*/metrics.json"))
    assert len(found) == 2
    first, second = (json.loads(path.read_text())["averages"] for path in found)
    flat, other = ([float(x) for x in jax.tree.leaves(tree) if isinstance(x, float)] for tree in (first, second))
    assert len(flat) > 3 and flat == pytest.approx(other, rel=1e-3)
    for i in range(3):
        a, b = (np.load(path.parent / f"sample{i}" / "random_sample_1.npz")["arr_0"].astype(int) for path in found)
        assert np.abs(a - b).max() <= 1


@pytest.mark.slow
def test_results_are_the_same_on_one_and_eight_devices(one, tmp_path):
    """Eight devices draw the digits, and hold the same parameters, to the bit. One device can resume their training."""
    program = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}]
import jax, numpy as np
import data, train
data.on_cpu = lambda: False
from config import Config
state = train.train(Config(**{TRAINING | dict(logdir=str(tmp_path / "eight"), max_steps=5)!r}))
assert jax.device_count() == 8
for leaf in jax.tree.leaves(state):
    copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
    assert len(copies) == 8
    for copy in copies[1:]:
        np.testing.assert_array_equal(copies[0], copy)
"""
    finished(start(8, "-c", program))
    train.train(Config(**TRAINING | dict(logdir=str(tmp_path / "eight"), max_steps=7)))
    assert_close(results(one), results(tmp_path / "eight"))
    copy = shutil.copytree(one, tmp_path / "one")
    finished(start(8, ROOT / "eval.py", f"--logdir={copy}"))
    assert_same_evaluations(copy)


@pytest.mark.slow
def test_results_are_the_same_in_two_processes(one, tmp_path):
    """A signal to one process stops both after the same step. They resume, and evaluate together."""

    def processes(**keys):
        arguments = flags(**TRAINING | dict(logdir=tmp_path / "two") | keys)
        return [start(2, ROOT / "train.py", *arguments, *which) for which in cluster(2)]

    warned = processes(max_steps=100_000, num_epochs=1000)
    try:
        while not list(tmp_path.glob("two/digits/*/metrics.jsonl")):
            time.sleep(0.05)
            assert all(process.poll() is None for process in warned)
        warned[1].send_signal(signal.SIGUSR1)
        outputs = [process.communicate(timeout=120)[0] for process in warned]
    finally:
        for process in warned:
            process.kill()
            process.wait()
    assert [process.returncode for process in warned] == [143, 143], outputs
    lines, step, _ = results(tmp_path / "two")
    assert step > 0 and lines[-1]["step"] in (step - 1, step)
    finished(*processes(max_steps=step + 2))
    train.train(Config(**TRAINING | dict(logdir=str(tmp_path / "alone"), max_steps=step + 2)))
    assert_close(results(tmp_path / "alone"), results(tmp_path / "two"))
    copy = shutil.copytree(one, tmp_path / "one")
    finished(*(start(2, ROOT / "eval.py", f"--logdir={copy}", *which) for which in cluster(2)))
    assert_same_evaluations(copy)


def test_incomplete_cluster_keys_are_refused(tiny):
    with pytest.raises(configuration.ConfigError, match="set all three, or none"):
        train.train(dataclasses.replace(tiny, coordinator_address="127.0.0.1:1"))


def test_wrong_cluster_keys_are_refused(tiny):
    keys = dict(coordinator_address="127.0.0.1:1", num_processes=2, process_id=1)
    for wrong, message in (
        (dict(coordinator_address="127.0.0.1"), "coordinator_address: must be host:port, got '127.0.0.1'"),
        (dict(process_id=2), "process_id: must be less than num_processes = 2, got 2"),
    ):
        with pytest.raises(configuration.ConfigError, match=message):
            devices.connect(dataclasses.replace(tiny, **keys | wrong))


@pytest.mark.parametrize(
    "environment, message",
    [
        (
            {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
            r"OMPI_COMM_WORLD_SIZE=4 without OMPI_MCA_orte_hnp_uri\)",
        ),
        (
            {"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0"},
            r"SLURM_STEP_NUM_TASKS=2 without SLURM_STEP_NODELIST, SLURM_NTASKS, SLURM_LOCALID\)",
        ),
        ({"SLURM_STEP_NUM_TASKS": "2(x2)"}, r"SLURM_STEP_NUM_TASKS=2\(x2\) without"),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}, r"TPU_WORKER_HOSTNAMES=a,b\)"),
    ],
)
def test_a_launcher_that_lacks_variables_is_named(tiny, monkeypatch, environment, message):
    """JAX detects it. Here, JAX believes that no backend exists yet, which it would complain about instead."""
    monkeypatch.setattr(xla_bridge, "backends_are_initialized", lambda: False)
    for name in {*devices.LAUNCHERS, *itertools.chain(*devices.LAUNCHERS.values())}:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(configuration.ConfigError, match=message) as error:
        devices.connect(tiny)
    assert "set coordinator_address, num_processes and process_id, or unset" in str(error.value)
    assert "\n" not in str(error.value) and "called before" not in str(error.value)


def test_open_mpi_is_recognised_within_slurm(monkeypatch):
    """SLURM only counts the daemons that Open MPI starts on each machine."""
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    assert devices.launcher_variable() == "OMPI_COMM_WORLD_SIZE"


def test_cluster_keys_work_within_open_mpi(tmp_path):
    """From Open MPI 5 on, JAX alone would need mpi4py. A second training in the same program stays connected."""
    announced = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    program = f"""
import os, sys; sys.path[:0] = [{str(ROOT)!r}]
os.environ |= {announced!r}
import jax
from config import Config
from system.devices import connect
for training in 1, 2:
    c = connect(Config(coordinator_address={cluster(1)[0][0].split("=")[1]!r}, num_processes=1, process_id=0))
    assert jax.distributed.is_initialized() and c.num_processes is None
"""
    finished(start(1, "-c", program))


def test_without_a_home_compiled_programs_are_not_kept(tmp_path, monkeypatch, capsys):
    """HOME is missing and the user has no name, as in containers; or HOME can't be written."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    kept = []
    monkeypatch.setattr(jax.config, "update", lambda name, value: kept.append((name, value)))
    monkeypatch.delenv("HOME")
    with monkeypatch.context() as patch:
        patch.setattr(pwd, "getpwuid", {}.__getitem__)
        devices.use_compilation_cache()
    assert "Compiled programs aren't kept (Could not determine home directory.)" in capsys.readouterr().out
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    devices.use_compilation_cache()
    assert "Compiled programs aren't kept (Not a directory)" in capsys.readouterr().out and not kept
    monkeypatch.setenv("HOME", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "TemporaryFile", Mock(side_effect=OSError(30, "Read-only file system")))
        devices.use_compilation_cache()
    assert "Compiled programs aren't kept (Read-only file system)" in capsys.readouterr().out and not kept
    with monkeypatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "file"))
        devices.use_compilation_cache()
    assert "Compiled programs aren't kept (File exists)" in capsys.readouterr().out and not kept
    warnings.warn("Error writing persistent compilation cache entry for 'jit_f': OSError", stacklevel=1)  # JAX's
    devices.use_compilation_cache()
    assert kept == [("jax_compilation_cache_dir", str(tmp_path / ".cache" / "cwvae" / "jax"))]


def test_an_error_of_the_first_process_is_raised_by_all(monkeypatch):
    several = devices.Devices()
    several.processes = 2
    monkeypatch.setattr(several, "broadcast", lambda tree: tree)
    for error in configuration.ConfigError("there is denied"), PermissionError(13, "is denied", "there"):
        with pytest.raises(configuration.ConfigError, match="is denied"):
            several.first_decides(Mock(side_effect=error))

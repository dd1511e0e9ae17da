"""One device, many devices, many processes: the same numbers, the same files."""

import dataclasses
import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import COMPILED, ROOT, flags

import config as configuration
import train
import train_step
from models import make_model
from system.checkpoints import Checkpoints


def start(program, logdir, devices, *arguments, **environment):
    variables = os.environ | COMPILED | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    variables["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    return subprocess.Popen(
        [sys.executable, ROOT / program, f"--logdir={logdir}", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=variables | environment,
    )


def training(**keys):
    # Batches of 5: no number of devices here divides them.
    return flags(**dict(batch_size=5, max_steps=5, save_scalars_every=1, kl_grad_post_perc=0.8, free_nats=0.5) | keys)


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
        step, state, _ = checkpoints.load_newest(jax.eval_shape(lambda: train_step.make_state(make_model(c))))
    return [json.loads(line) for line in path.read_text().splitlines()], step, state


def assert_close(a, b):
    """Metrics of each step, validation among them, and the last parameters."""
    (lines, step, state), (other_lines, other_step, other_state) = a, b
    assert step == other_step and [x["step"] for x in lines] == [x["step"] for x in other_lines]
    for line, other in zip(lines, other_lines, strict=True):
        assert line.keys() == other.keys()
        for name, value in line.items():
            assert other[name] == pytest.approx(value, rel=2e-4, abs=1e-4), (line["step"], name)
    for x, y in zip(jax.tree.leaves(state.params), jax.tree.leaves(other_state.params), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-4)


def assert_same_evaluations(logdir):
    """All evaluations of the run, of three sequences each."""
    found = sorted(logdir.glob("digits/*/eval_*/metrics.json"))
    assert len(found) == 2
    first, second = (json.loads(path.read_text())["averages"] for path in found)
    flat, other = ([float(x) for x in jax.tree.leaves(tree) if isinstance(x, float)] for tree in (first, second))
    assert len(flat) > 3 and flat == pytest.approx(other, rel=1e-3)
    for i in range(3):
        a, b = (np.load(path.parent / f"sample{i}" / "random_sample_1.npz")["arr_0"].astype(int) for path in found)
        assert np.abs(a - b).max() <= 1


@pytest.mark.slow
def test_the_same_on_one_and_eight_devices(tmp_path):
    """Eight devices, then going on with one; and evaluation."""
    finished(start("train.py", tmp_path / "one", 1, *training(max_steps=7)))
    finished(start("train.py", tmp_path / "eight", 8, *training()))
    finished(start("train.py", tmp_path / "eight", 1, *training(max_steps=7)))
    assert_close(results(tmp_path / "one"), results(tmp_path / "eight"))
    finished(start("eval.py", tmp_path / "one", 1))
    finished(start("eval.py", tmp_path / "one", 8))
    assert_same_evaluations(tmp_path / "one")


@pytest.mark.slow
def test_the_same_in_two_processes(tmp_path):
    """Two processes; one device, then going on with two processes; and evaluation."""
    finished(*(start("train.py", tmp_path / "two", 2, *training(max_steps=7), *keys) for keys in cluster(2)))
    finished(start("train.py", tmp_path / "one", 1, *training()))
    finished(*(start("train.py", tmp_path / "one", 2, *training(max_steps=7), *keys) for keys in cluster(2)))
    assert_close(results(tmp_path / "one"), results(tmp_path / "two"))
    finished(start("eval.py", tmp_path / "one", 1))
    finished(*(start("eval.py", tmp_path / "one", 2, *keys) for keys in cluster(2)))
    assert_same_evaluations(tmp_path / "one")


@pytest.mark.slow
def test_replicas_are_equal(tmp_path):
    """After some steps on eight devices, each holds the same parameters, to the bit."""
    program = """
import sys; sys.path[:0] = [{root!r}, {tests!r}]
import jax, numpy as np, dataclasses
from conftest import TINY
import train
from config import Config
state = train.train(Config(**TINY | dict(logdir={logdir!r}, batch_size=5)))
assert jax.device_count() == 8
for leaf in jax.tree.leaves(state):
    copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
    assert len(copies) == 8
    for copy in copies[1:]:
        np.testing.assert_array_equal(copies[0], copy)
print("equal")
"""
    program = program.format(root=str(ROOT), tests=str(ROOT / "tests"), logdir=str(tmp_path))
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "equal" in done.stdout, done.stderr


def test_some_of_the_cluster_keys_are_refused(tiny):
    with pytest.raises(configuration.ConfigError, match="set all three, or none"):
        train.train(dataclasses.replace(tiny, coordinator_address="127.0.0.1:1"))

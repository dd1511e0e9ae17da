"""What the benchmarks say about sizes; not what they say about time."""

import json
import subprocess
import sys

import jax
import pytest
from conftest import ROOT, TINY

import config as configuration
from benchmarks import __main__ as bench
from benchmarks import measuring
from config import Config


@pytest.mark.parametrize(
    "name, millions, flop",
    [
        ("mmnist", {"encoder": 13.7, "tower": 6.1, "decoder": 22.1, "cells": 0.75}, 1.28e12),
        ("minerl", {"encoder": 14.7, "tower": 6.1, "decoder": 24.9, "cells": 9.2}, 1.65e12),
    ],
)
def test_arithmetic_of_the_published_configurations(name, millions, flop):
    c = configuration.load(ROOT / "configs" / f"{name}.yml")
    assert {part: x / 1e6 for part, x in measuring.multiply_adds(c).items()} == pytest.approx(millions, rel=0.01)
    assert measuring.training_flop(c) == pytest.approx(flop, rel=0.01)


@pytest.fixture
def all_optimizations():
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.slow
@pytest.mark.usefixtures("all_optimizations")
def test_memory_at_published_sizes():
    """Megabytes of the training step's program, on a CPU; validation and evaluation, in chunks, take less."""
    step, *others = (row["value"] for row in bench.bench_memory(configuration.load(ROOT / "configs" / "minerl.yml")))
    assert 100 < step < 4800 and max(others) < step


@pytest.mark.slow
@pytest.mark.parametrize("name", ["step", "rollout", "metrics"])
def test_benchmarks_run(name):
    rows = bench.BENCHMARKS[name](Config(**TINY))
    assert len(rows) >= 3 and all(row["value"] > 0 for row in rows)


def test_kernels_of_a_program_are_counted():
    program = """HloModule step, entry_computation_layout={(f32[4]{0})->f32[4]{0}}

%body.1 (state: (s32[], f32[4])) -> (s32[], f32[4]) {
  %state = (s32[], f32[4]{0}) parameter(0)
  %x = f32[4]{0} get-tuple-element(%state), index=1
  %start = ((f32[4]{0}, s32[]), f32[4]{0}, u32[]) fusion-start(%x), kind=kLoop, calls=%fused.1
  %product = (f32[4]{0}, u8[0]{0}) custom-call(%x, %x), custom_call_target="__cublas$gemm"
  %done = f32[4]{0} fusion-done(%start)
  ROOT %next = (s32[], f32[4]{0}) tuple(%x, %done)
}

ENTRY %main.2 (x: f32[4]) -> f32[4] {
  %x.1 = f32[4]{0} parameter(0)
  %copy = f32[4]{0} copy(%x.1)
  %loop = (s32[], f32[4]{0}) while(%copy), condition=%until, body=%body.1, backend_config={"known_trip_count":{"n":"7"}}
  ROOT %fusion = f32[4]{0} fusion(%loop), kind=kLoop, calls=%fused.2
}
"""
    assert bench.kernels(program) == (2, [(7, 2)])


def test_the_command(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "metrics", "--batch_size=1", f"--json={tmp_path / 'out.json'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert "frame_metrics" in done.stdout
    assert len(json.loads((tmp_path / "out.json").read_text())["rows"]) == 3
    done = subprocess.run([sys.executable, "-m", "benchmarks", "stp"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "did you mean 'step'?" in done.stderr

"""The benchmarks: sizes, commands and files, but not the times that they measure."""

import json
import subprocess
import sys

import jax
import pytest
from conftest import ROOT, TINY

import config as configuration
import eval as evaluation
from benchmarks import __main__ as bench
from benchmarks import accelerator, measuring
from config import Config, ConfigError


@pytest.mark.parametrize(
    "name, millions, flop",
    [
        ("mmnist", {"encoder": 13.7, "tower": 6.1, "decoder": 22.1, "cells": 0.75}, 1.28e12),
        ("minerl", {"encoder": 14.7, "tower": 6.1, "decoder": 24.9, "cells": 9.2}, 1.65e12),
    ],
)
def test_published_configurations_have_the_expected_arithmetic(name, millions, flop):
    c = configuration.load(ROOT / "configs" / f"{name}.yml")
    assert {part: x / 1e6 for part, x in measuring.multiply_adds(c).items()} == pytest.approx(millions, rel=0.01)
    assert measuring.training_flop(c) == pytest.approx(flop, rel=0.01)


def test_results_are_printed_before_a_failing_write(tmp_path, monkeypatch, capsys):
    """The error is one line."""
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "results.json"
    monkeypatch.setitem(bench.BENCHMARKS, "step", lambda config: [bench.row("what", "s", 1.0)])
    monkeypatch.setattr(sys, "argv", ["benchmarks", "step", f"--json={path}"])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    printed = capsys.readouterr()
    assert ended.value.code == 2 and "what " in printed.out
    assert printed.err.startswith(f"error: {path} can't be read or written (Not a directory)")


@pytest.mark.slow
def test_memory_at_published_sizes_is_within_limits():
    """A training step takes 100 to 4,800 MB on a CPU. Validation and evaluation, in chunks, take less.

    Optimizations, most of which tests leave out, don't change these numbers.
    """
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


def test_the_benchmark_command_writes_rows_and_suggests_names(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "metrics", "--batch_size=1", f"--json={tmp_path / 'out.json'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert "frame_metrics" in done.stdout
    assert len(json.loads((tmp_path / "out.json").read_text())["rows"]) == 3
    done = subprocess.run([sys.executable, "-m", "benchmarks", "stp"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "did you mean 'step'?" in done.stderr


# ---------------------------------------------------------------------------------------------- an accelerator's minutes


@pytest.mark.slow
def test_a_rehearsal_measures_all_items(tmp_path):
    """All items measure something on a CPU. The trained run can be joined and evaluated."""
    command = [sys.executable, "-m", "benchmarks", "accelerator", f"--out={tmp_path / 'out'}", "--rehearse"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    log = (tmp_path / "out" / "log.txt").read_text()
    for name in accelerator.ITEMS:
        rows = [x for x in accelerator.read_rows(tmp_path / "out") if x["item"] == name]
        ended = rows[-1]
        assert ended["what"] == "ended" and ended["how"] == "whole", (name, ended, log)
        assert len(rows) > 2 and f"## {name}\n\nwhole" in done.stdout
    assert len(list((tmp_path / "out").iterdir())) <= 8
    join = ["join", str(tmp_path / "out"), "--out", str(tmp_path / "run")]
    subprocess.run([sys.executable, "-m", "benchmarks", *join], check=True, cwd=ROOT)
    config, checkpoint, output = evaluation.parse(["--logdir", str(tmp_path / "run"), "--num_examples=2"])
    assert checkpoint.step > 0 and evaluation.evaluate(config, checkpoint, output)


def test_items_that_fail_or_are_cut_off_do_not_stop_the_others(tmp_path, monkeypatch, capsys):
    programs = {
        "fails": "raise SystemExit(3)",
        "hangs": "import subprocess; subprocess.run(['sleep', '600'])",
        "works": "print('here')",
    }
    items = {name: accelerator.Item(None, 5 if name == "hangs" else 15) for name in programs}
    monkeypatch.setattr(accelerator, "ITEMS", items)
    monkeypatch.setattr(accelerator, "command", lambda name, _: [sys.executable, "-c", programs[name]])

    def ends(out, limit):
        out.mkdir()
        accelerator.bench_accelerator(out, limit, rehearse=False)
        return {x["item"]: x["how"] for x in accelerator.read_rows(out)}

    out = tmp_path / "enough"
    assert ends(out, 30) == {"fails": "failed with exit code 3", "hangs": "cut off", "works": "whole"}
    assert "## hangs\n\ncut off" in capsys.readouterr().out and "here" in (out / "log.txt").read_text()
    assert ends(tmp_path / "little", 1) == dict.fromkeys(programs, "not begun, since no time was left")


def test_a_program_that_cannot_be_compiled_is_left_out(capsys, tiny):
    def broken():
        stepper = measuring.Bench(tiny).textbook_stepper()
        return measuring.Stepper(
            jax.jit(lambda state, batch: jax.ffi.ffi_call("nothing", state[0])()), stepper.state, 0
        )

    def untraced():
        raise ValueError("not here")

    programs = {
        name: accelerator.Program(tiny, stepper)
        for name, stepper in dict(broken=broken, untraced=untraced, whole=measuring.Bench(tiny).stepper).items()
    }
    rows = list(accelerator.time_steps(accelerator.Setting(None, 300, True, False), programs))
    assert [(x["what"], "preliminary" in x) for x in rows] == [("whole", True), ("whole", False)]
    printed = capsys.readouterr().out
    assert "broken: " in printed and "untraced: ValueError: not here" in printed


@pytest.mark.parametrize("limit", [15, 140])
def test_each_item_has_time_to_compile_and_to_measure(monkeypatch, limit):
    given = []
    monkeypatch.setattr(accelerator, "compiled", lambda programs, limit: given.append(limit) or iter(()))
    assert not list(accelerator.time_steps(accelerator.Setting(None, limit, False, False), {}))
    assert limit / 2 < given[0] < limit - 3


def test_a_run_in_pieces_is_joined_or_refused(tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    for folder in run, out:
        folder.mkdir()
    content = bytes(range(256)) * 100
    (run / "config.yml").write_bytes(content)
    row = accelerator.split(run, out, size=10_000)
    pieces = sorted(out.glob("run.tar.*"))
    assert row["value"] == len(pieces) > 2 and all(piece.stat().st_size <= 10_000 for piece in pieces)
    with pytest.raises(ConfigError, match=r"results\.jsonl can't be read"):
        accelerator.join(out, tmp_path / "nowhere")
    (out / "results.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"results\.jsonl has no trained run"):
        accelerator.join(out, tmp_path / "nowhere")
    accelerator.write_row(out, "training", row)
    accelerator.join(out, tmp_path / "joined")
    assert (tmp_path / "joined" / "config.yml").read_bytes() == content
    damaged = pieces[1].read_bytes()
    pieces[1].write_bytes(damaged[:-1] + bytes([damaged[-1] ^ 1]))
    with pytest.raises(ConfigError, match="differ from what was written"):
        accelerator.join(out, tmp_path / "damaged")
    pieces[1].unlink()
    with pytest.raises(ConfigError, match=r"run\.tar\.1 is missing"):
        accelerator.join(out, tmp_path / "missing")
    assert not (tmp_path / "damaged").exists() and not (tmp_path / "missing").exists()


def test_a_profiles_time_is_divided_among_parts_and_kernels():
    """Two streams overlap by 5 of 40 ns. From 30 to 35 ns, neither has a kernel."""
    program = """
  %fusion.1 = f32[4]{0} fusion(%x), kind=kLoop, metadata={op_name="jit(step)/cell_0/while/body/add" source_line=1}
  ROOT %dot.2 = f32[4]{0} dot(%x, %y), metadata={op_name="jit(step)/jvp(CWVAE.elbo)/encoder/level_1_dense_0/dot"}
"""
    names = accelerator.traced_names(program)
    assert names["fusion.1"].endswith("add") and names["dot.2"].endswith("dot")
    events = [("a", 0, 20, "fusion.1"), ("b", 15, 15, "dot.2"), ("a", 35, 5, "fusion.1"), ("c", 36, 1, "")]
    rows = list(accelerator.profile_rows([accelerator.Event(*event) for event in events], names))
    found = {x["what"]: x["value"] * 1e6 for x in rows}
    assert found == pytest.approx(
        {
            "from the first kernel to the end of the last": 40,
            "of it without any kernel": 5,
            "part: ticks, one after the other": 25,
            "part: Dense layers between levels": 15,
            "part: unknown": 1,
            "kernel: a": 25,
            "kernel: b": 15,
            "kernel: c": 1,
        }
    )
    with pytest.raises(ConfigError, match="no kernels"):
        list(accelerator.profile_rows([], names))

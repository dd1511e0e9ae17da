"""results.sh with a replacement of Python that only records its calls: each call is valid, and none is repeated."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import analysis
import config as configuration
from analyses.arguments import parse_named
from analyses.compare import SHARED_KEYS
from training import stages

RECORDER = """#!{python}
import json, pathlib, sys
with open({notes!r}, "a") as file:
    print(json.dumps(sys.argv[1:]), file=file)
if sys.argv[1:] == {failing!r}:
    sys.exit(3)
if sys.argv[1] == "eval.py":
    run = pathlib.Path(sys.argv[3], "dataset", "run")
    (run / f"eval_{{len(list(run.glob('*')))}}").mkdir(parents=True)
if "--out" in sys.argv:
    pathlib.Path(sys.argv[sys.argv.index("--out") + 1]).mkdir(parents=True)
"""


def results(tmp_path, config, *keys, failing=None, **environment):
    """Return the exit code of results.sh, and its calls."""
    tmp_path.mkdir(exist_ok=True)
    python, notes = tmp_path / "python", tmp_path / "notes"
    python.write_text(RECORDER.format(python=sys.executable, notes=str(notes), failing=failing))
    python.chmod(0o755)
    notes.write_text("")
    script = ["bash", ROOT / "results.sh", config, tmp_path / "results", *keys]
    done = subprocess.run(
        script, env=os.environ | environment | {"PYTHON": str(python)}, capture_output=True, text=True
    )
    return done.returncode, [json.loads(line) for line in notes.read_text().splitlines()]


@pytest.mark.parametrize("config", ["small", "digits", "mmnist", "minerl"])
def test_each_call_of_results_sh_is_valid(tmp_path, config):
    code, calls = results(tmp_path, f"configs/{config}.yml", "--seed", "3")
    assert code == 0
    models, others, evaluations = {}, {}, {}
    for program, *arguments in calls:
        if program == "train.py":
            c = configuration.parse(arguments)
            assert c.seed == 3 and c.open_loop_ctx < c.seq_len
            (models if c.model == "cwvae" else others)[Path(c.logdir)] = c
        elif program == "eval.py":
            special, flags = configuration.parse_flags(arguments, program, "", logdir=configuration.Flag("RUN", ""))
            logdir = Path(special["logdir"])
            c = configuration.Config(**vars((models | others)[logdir]) | configuration.typed(flags, program))
            evaluations[logdir / f"context{c.open_loop_ctx}"] = c
        else:
            command, *arguments = arguments
            assert program == "analysis.py" and command in analysis.COMMANDS
            named, given, _ = parse_named(arguments, program, "")
            runs = [evaluations[path] if command == "compare" else (models | others)[path] for _, path in named]
            assert given["out"] and len(runs) == len({c.run_name for c in runs})
            assert command != "curves" or len(runs) == len(models | others)
            if command == "compare":
                assert len({tuple(getattr(c, key) for key in SHARED_KEYS) for c in runs}) == 1
    generated = config in ("small", "digits")
    assert len(models) == (10 if generated else 8)
    assert [c.model for c in others.values()] == ["svg", "vta"]
    assert {c.dataset for c in others.values()} == {c.dataset for c in models.values()}
    assert {model.tmp_abs_factor for model in models.values()} == {1, 2, 4, 6, 8}
    assert {model.levels for model in models.values()} == {1, 2, 3, 4}
    assert [call[1] for call in calls if call[0] == "analysis.py"] == [
        *("compare", "compare", "blind", "levels"),
        *(["digits", "levels"] if generated else []),
        "curves",
    ]
    assert len({dataclasses.astuple(c) for c in models.values()}) == len(models)


def test_the_same_call_resumes_results_sh(tmp_path):
    """It repeats the call that failed and continues. Finished calls aren't repeated."""
    _, calls = results(tmp_path / "whole", "configs/small.yml")
    failing = json.loads(json.dumps(calls[8]).replace(str(tmp_path / "whole"), str(tmp_path)))
    code, first = results(tmp_path, "configs/small.yml", failing=failing)
    assert code == 3 and len(first) == 9 and first[-1] == failing
    code, second = results(tmp_path, "configs/small.yml")
    assert code == 0 and second[0] == failing and len(second) == len(calls) - 8
    assert results(tmp_path, "configs/small.yml") == (0, [])


def test_the_time_left_is_estimated_and_another_call_is_refused(tmp_path):
    """The estimate uses the mean time of each kind. A call with other keys does nothing."""
    _, calls = results(tmp_path, "configs/small.yml")
    times = tmp_path / "results" / "times.txt"
    assert len(times.read_text().splitlines()) == len(calls)
    for name in "slow", "fast":
        (tmp_path / "results" / name / "trained").unlink()
    shutil.rmtree(tmp_path / "results" / "figures" / "speed")
    times.write_text("cwvae, training: 3600 s\nrssm, training: 2400 s\nblind, figure: 60 s\n")
    script, environment = ["bash", ROOT / "results.sh", "configs/small.yml", tmp_path / "results"], dict(os.environ)
    other = subprocess.run([*script, "--seed", "1"], capture_output=True, text=True, env=environment)
    assert other.returncode == 2 and other.stderr.count("\n") == 1
    assert "holds results of another call, TRAIN=train.py configs/small.yml" in other.stderr
    environment["PYTHON"] = str(tmp_path / "python")
    done = subprocess.run(script, capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines()[:-1] == ["1 of 3 done, 34 min left", "2 of 3 done, 1 min left", "3 of 3 done"]


def test_train_replaces_only_the_training_program(tmp_path):
    _, calls = results(tmp_path, "configs/long.yml")
    _, staged = results(tmp_path / "staged", "configs/long.yml", TRAIN="-m training.stages")
    text = json.dumps(staged).replace(str(tmp_path / "staged"), str(tmp_path))
    assert text == json.dumps(calls).replace('"train.py"', '"-m", "training.stages"') != json.dumps(calls)
    for call in staged:
        if call[:2] == ["-m", "training.stages"]:
            assert len(list(stages.configurations(call[2:]))) == 4


def test_a_missing_argument_of_results_sh_is_refused():
    done = subprocess.run(["bash", ROOT / "results.sh", "configs/small.yml"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: call bash results.sh CONFIG DIRECTORY")

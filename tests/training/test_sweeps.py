"""The shipped sweeps: wandb accepts them, each point is valid, and they run as wandb's agent runs them.

Grids also run without wandb's agent.
"""

import itertools
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, TINY, flags, log_of

import config as configuration
import train
from config import Config, ConfigError

SWEEPS = sorted(path.stem for path in (ROOT / "configs" / "sweeps").glob("*.yml"))

BOUNDS = {"lr": (1e-4, 1e-3), "dec_stddev": (0.1, 1.0)}
"""The paper's tuning ranges."""


def read(name):
    return yaml.safe_load((ROOT / "configs" / "sweeps" / f"{name}.yml").read_text())


def points(sweep):
    """Return all combinations of values; a range gives its ends."""
    choices = []
    for parameter in sweep["parameters"].values():
        ends = [parameter.get("min"), parameter.get("max")]
        choices.append(parameter.get("values") or ([parameter["value"]] if "value" in parameter else ends))
    return [dict(zip(sweep["parameters"], values, strict=True)) for values in itertools.product(*choices)]


def violations(sweep):
    """Return what wandb's check of sweep configurations reports; nothing if it accepts the sweep."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pydantic, within wandb
        from wandb import wandb_controller

        return wandb_controller._WandbController._validate(None, sweep)


def test_sweeps_vary_what_the_paper_varies():
    values = {name: {key: p.get("values") for key, p in read(name)["parameters"].items()} for name in SWEEPS}
    assert values["k"]["tmp_abs_factor"] == [1, 2, 4, 6, 8]
    assert values["levels"]["levels"] == [1, 2, 3] and values["levels_k4"]["levels"] == [1, 2, 3, 4]
    assert len(values["speed"]["digit_speed"]) == 3
    for name in "baselines", "svg", "vta":
        parameters = read(name)["parameters"]
        for key, (low, high) in BOUNDS.items():
            assert (parameters[key]["min"], parameters[key]["max"]) == (low, high)


@pytest.mark.parametrize("name", SWEEPS)
def test_wandb_accepts_each_sweep(name):
    sweep = read(name)
    assert violations(sweep) == ""
    assert "is not one of" in violations(sweep | {"method": "gird"})  # the check can fail


@pytest.mark.parametrize("name", SWEEPS)
def test_each_point_of_a_sweep_is_a_valid_configuration(name):
    sweep = read(name)
    base = configuration.read_yaml(ROOT / sweep["command"][-1])
    for point in points(sweep):
        c = Config(**base).updated(point, "wandb")
        assert c.save_gifs is False or c.open_loop_ctx < c.seq_len, point


def test_a_sweep_runs_as_an_agent_starts_it(tmp_path):
    """The last point, with tiny layers, for one step. The environment names a file with the sweep's values."""
    sweep = read("k")
    point = points(sweep)[-1]
    small = {key: value for key, value in TINY.items() if key not in ("levels", "tmp_abs_factor", "open_loop_ctx")}
    small |= dict(max_steps=1, batch_size=1, wandb="offline", seq_len=4, logdir=str(tmp_path / "logs"))
    small |= dict(eval_seq_len=point["open_loop_ctx"] + 4)
    (tmp_path / "sweep.yml").write_text(
        yaml.safe_dump({"wandb_version": 1, **{k: {"value": v} for k, v in point.items()}})
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    environment |= dict(WANDB_SWEEP_ID="abc", WANDB_RUN_ID="run1", WANDB_SWEEP_PARAM_PATH=str(tmp_path / "sweep.yml"))
    program = {"${interpreter}": sys.executable, "${program}": str(ROOT / sweep["program"])}
    command = [program.get(part, part) for part in sweep["command"] if part != "${env}"]
    command = [str(ROOT / part) if part.startswith("configs/") else part for part in command]
    arguments = [f"--{key}={list(value) if isinstance(value, tuple) else value}" for key, value in small.items()]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    (path,) = Path(tmp_path).glob("logs/digits/*/config.yml")
    c = configuration.load(path)
    for key, value in point.items():
        assert getattr(c, key) == (tuple(value) if isinstance(value, list) else value)


def main(monkeypatch, *arguments):
    """Run train.py, and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    try:
        train.main()
    except SystemExit as ended:
        return ended.code
    return 0


def arguments(tmp_path, sweep, **keys):
    """Write a sweep to a file; return flags that train each of its points as a tiny model."""
    path = tmp_path / "sweep.yml"
    path.write_text(yaml.safe_dump(sweep))
    keys = {"logdir": tmp_path / "logs", "datadir": tmp_path / "datasets", "save_scalars_every": 1} | keys
    swept = [f"--{key}=" for key in sweep["parameters"]]
    return ["--grid", str(path), *(flag for flag in flags(**keys) if not flag.startswith(tuple(swept)))]


SPEED = dict(method="grid", program="train.py", parameters={"digit_speed": {"values": [[1, 3], [2, 6], [4, 12]]}})
"""Points that share compiled functions."""


def test_a_grid_trains_and_resumes_without_wandb(tmp_path, monkeypatch, capsys):
    """Points are trained one after the other. The same command resumes, and doesn't train finished points again."""
    given = arguments(tmp_path, SPEED, max_steps=2)
    stopped = train.train

    def interrupted(config):
        if config.digit_speed == (2, 6):
            raise KeyboardInterrupt
        return stopped(config)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "train", interrupted)
        main(monkeypatch, *given)
    assert re.findall(".* done.*", capsys.readouterr().out) == ["1 of 3 done, 1 min left"]
    (first,) = tmp_path.glob("logs/digits/*")
    before = (first / "checkpoints" / "2").stat().st_mtime_ns, (first / "metrics.jsonl").stat().st_mtime_ns
    assert main(monkeypatch, *given) == 0
    assert re.findall(".* done.*", capsys.readouterr().out) == [
        *("1 of 3 done", "2 of 3 done, 1 min left", "3 of 3 done"),
    ]
    assert before == ((first / "checkpoints" / "2").stat().st_mtime_ns, (first / "metrics.jsonl").stat().st_mtime_ns)
    paths = sorted(tmp_path.glob("logs/digits/*"))
    assert {configuration.load(path / "config.yml").digit_speed for path in paths} == {(1, 3), (2, 6), (4, 12)}
    assert all([line["step"] for line in log_of(path)] == [1, 2] for path in paths)


def test_a_grid_continues_after_a_loss_that_is_not_finite(tmp_path, monkeypatch, capsys):
    trained = []

    def failing(config):
        trained.append(config.digit_speed)
        raise train.NonFinite("the loss or its gradient isn't finite from step 1 on")

    monkeypatch.setattr(train, "train", failing)
    assert main(monkeypatch, *arguments(tmp_path, SPEED)) == 1
    assert trained == [(1, 3), (2, 6), (4, 12)]
    assert capsys.readouterr().err.count("error: the loss or its gradient isn't finite from step 1 on") == 3


@pytest.mark.parametrize("name", SWEEPS)
def test_grids_have_the_points_of_wandb(name, monkeypatch):
    """A shipped file that is no grid is refused, with the command that runs it."""
    monkeypatch.chdir(ROOT)
    sweep, path = read(name), f"configs/sweeps/{name}.yml"
    if sweep["method"] == "grid":
        base = configuration.load(sweep["command"][-1])
        assert train.configurations(["--grid", path]) == [base.updated(point, name) for point in points(sweep)]
    else:
        with pytest.raises(ConfigError, match=f"grid: {path} has the method random, not grid; call wandb sweep {path}"):
            train.configurations(["--grid", path])


def test_flags_override_the_configuration_of_a_grid(monkeypatch):
    """Flags take precedence over the sweep's command."""
    monkeypatch.chdir(ROOT)
    given = ["--grid=configs/sweeps/levels.yml", "--config=configs/small.yml", "--seed=3"]
    small = configuration.load("configs/small.yml")
    assert train.configurations(given) == [small.updated({"levels": n, "seed": 3}, "") for n in (1, 2, 3)]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(program="eval.py"), "is for eval.py, not train.py"),
        (dict(early_terminate={"type": "hyperband"}), "has early_terminate, which only wandb supports"),
        (dict(parameters=[]), "lacks parameters"),
        (
            dict(parameters={"lr": {"min": 1e-4, "max": 1e-3}}),
            "needs either a value or a list of values of lr, got {.*; or call wandb sweep .*yml",
        ),
        (dict(parameters={"levles": {"values": [1]}}), "unknown key 'levles'; did you mean 'levels'?"),
        (dict(parameters={"levels": {"values": [1, 0]}}), "levels: must be at least 1, got 0"),
        (dict(parameters={"num_val_batches": {"values": [1, 2]}}), "are the same run, .*vary keys that are part of"),
        (dict(parameters={"seed": {"values": [0, 1]}}), "seed: .*sweep.yml varies it, got 7; leave --seed out"),
        (dict(parameters={}), "varies nothing; add parameters like"),
        (dict(parameters={"lr": {"values": []}}), "needs either a value or a list of values of lr"),
        (dict(command=3), "has the command 3; make it a list, or leave it out"),
    ],
)
def test_wrong_grids_are_refused(tmp_path, monkeypatch, capsys, changes, message):
    """In one line, before the first training."""
    monkeypatch.setattr(train, "train", None)
    path = tmp_path / "sweep.yml"
    path.write_text(yaml.safe_dump(SPEED | changes))
    assert main(monkeypatch, "--grid", str(path), "--dataset=digits", "--seed=7", f"--logdir={tmp_path}/logs") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and re.search(message, err) and not (tmp_path / "logs").exists()


def test_a_file_that_is_no_sweep_is_refused(tmp_path, monkeypatch, capsys):
    for content, reason in (None, "No such file or directory"), ("{", "not YAML"), ("levels: 3", "lacks parameters"):
        path = tmp_path / "sweep.yml"
        if content:
            path.write_text(content)
        assert main(monkeypatch, "--grid", str(path)) == 2
        assert reason in capsys.readouterr().err

"""The shipped wandb sweeps: accepted by wandb's own check, valid at each point, and run as wandb's agent runs them."""

import itertools
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, tiny_keys

import config as configuration
from config import Config

SWEEPS = sorted(path.stem for path in (ROOT / "configs" / "sweeps").glob("*.yml"))

BOUNDS = {"lr": (1e-4, 1e-3), "dec_stddev": (0.1, 1.0)}
"""The paper's tuning ranges."""


def read(name):
    return yaml.safe_load((ROOT / "configs" / "sweeps" / f"{name}.yml").read_text())


def points(sweep):
    """All combinations of values; of a range its ends."""
    choices = []
    for parameter in sweep["parameters"].values():
        ends = [parameter.get("min"), parameter.get("max")]
        choices.append(parameter.get("values") or ([parameter["value"]] if "value" in parameter else ends))
    return [dict(zip(sweep["parameters"], values, strict=True)) for values in itertools.product(*choices)]


def violations(sweep):
    """What wandb's own check of sweep configurations says, nothing where it accepts one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pydantic, within wandb
        from wandb import wandb_controller

        return wandb_controller._WandbController._validate(None, sweep)


def test_all_that_the_paper_varies():
    values = {name: {key: p.get("values") for key, p in read(name)["parameters"].items()} for name in SWEEPS}
    assert values["k"]["tmp_abs_factor"] == [1, 2, 4, 6, 8]
    assert values["levels"]["levels"] == [1, 2, 3] and values["levels_k4"]["levels"] == [1, 2, 3, 4]
    assert len(values["speed"]["digit_speed"]) == 3
    for name in "baselines", "svg", "vta":
        parameters = read(name)["parameters"]
        for key, (low, high) in BOUNDS.items():
            assert (parameters[key]["min"], parameters[key]["max"]) == (low, high)


@pytest.mark.parametrize("name", SWEEPS)
def test_wandb_accepts_it(name):
    sweep = read(name)
    assert violations(sweep) == ""
    assert "is not one of" in violations(sweep | {"method": "gird"})  # the check checks


@pytest.mark.parametrize("name", SWEEPS)
def test_each_point_is_a_valid_configuration(name):
    sweep = read(name)
    base = configuration.read_yaml(ROOT / sweep["command"][-1])
    for point in points(sweep):
        c = Config(**base).updated(point, "wandb")
        assert c.save_gifs is False or c.open_loop_ctx < c.seq_len, point


@pytest.mark.parametrize("name", ["k", "svg"])
def test_it_runs_as_an_agent_starts_it(name, tmp_path):
    """Its last point for one step, with layers of a few units: the sweep's values in a file that the environment names."""
    sweep = read(name)
    point = points(sweep)[-1]
    model = configuration.read_yaml(ROOT / sweep["command"][-1]).get("model", "cwvae")
    small = tiny_keys(model) | dict(
        max_steps=1, batch_size=1, wandb="offline", seq_len=4, logdir=str(tmp_path / "logs")
    )
    if "open_loop_ctx" in point:
        small |= dict(eval_seq_len=point["open_loop_ctx"] + 4)
    small = {key: value for key, value in small.items() if key not in ("levels", "tmp_abs_factor", "open_loop_ctx")}
    if "open_loop_ctx" not in point:
        small |= dict(eval_seq_len=40, open_loop_ctx=36, save_gifs=False)
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
    (path,) = Path(tmp_path).glob("logs/*/*/config.yml")
    c = configuration.load(path)
    for key, value in point.items():
        assert getattr(c, key) == (tuple(value) if isinstance(value, list) else value)

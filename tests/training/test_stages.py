"""Training in stages: each starts from the run of the one before."""

import re
import shutil
import sys

import numpy as np
import pytest
from conftest import flags
from helpers import assert_same, parameters

import train
from analyses import export
from config import Config, ConfigError
from system.checkpoints import Checkpoints
from training import loading, runs, stages


def arguments(tmp_path, **keys):
    """Return a tiny configuration's flags, without those that stages set."""
    given = flags(**{"logdir": tmp_path / "logs", "datadir": tmp_path / "datasets"} | keys)
    return [flag for flag in given if not flag.startswith(("--seq_len", "--batch_size", "--max_steps"))]


def test_stages_start_from_each_other_and_resume(tmp_path, monkeypatch, capsys):
    first = stages.Stage(seq_len=4, batch_size=4, max_steps=2, lr=0.5, top_beta=0.03)
    monkeypatch.setattr(stages, "STAGES", (first, stages.Stage(seq_len=8, batch_size=2, max_steps=3, lr=1.0)))
    configs, states = [], []
    for c in stages.configurations(arguments(tmp_path)):
        configs.append(c)
        states.append(parameters(train.train(c)))
    a, b = configs
    assert [(c.seq_len, c.batch_size, c.max_steps, c.lr) for c in configs] == [(4, 4, 2, 5e-4), (8, 2, 3, 1e-3)]
    assert a.init_from is None and b.init_from == str(runs.directory(a))
    assert loading.find_run(tmp_path / "logs") == runs.directory(b)  # what eval.py --logdir logs takes
    assert loading.stages_before(loading.find_checkpoint(runs.directory(a))) == []
    own = runs.directory(b)
    exported = [tmp_path / "b.safetensors", tmp_path / "copy"]
    for path in exported:
        export.export([str(own), f"--out={path}"])
    for path in own, *exported:
        assert loading.stages_before(loading.find_checkpoint(path)) == [2]
    again = [parameters(train.train(c)) for c in stages.configurations(arguments(tmp_path))]
    assert_same(again, states)
    monkeypatch.setattr(sys, "argv", ["training/stages.py", *arguments(tmp_path)])
    capsys.readouterr()
    stages.main()
    assert re.findall(".* done.*", capsys.readouterr().out) == ["1 of 2 done", "2 of 2 done"]


def test_another_scale_for_the_same_run_is_refused(tmp_path, monkeypatch, capsys):
    """It is refused before any training, also if the run has no scale."""
    first = stages.Stage(seq_len=4, batch_size=4, max_steps=20, lr=0.5, top_beta=0.03)
    monkeypatch.setattr(stages, "STAGES", (first, stages.Stage(seq_len=8, batch_size=2, max_steps=3, lr=1.0)))

    def run(*scale):
        monkeypatch.setattr(sys, "argv", ["training/stages.py", *arguments(tmp_path), *scale])
        stages.main()
        return capsys.readouterr().out

    out = run("--scale=0.1")
    assert "Trained for 2 steps" in out and "Trained for 1 steps" in out
    assert re.findall(".* done.*", out) == ["1 of 2 done, 1 min left", "2 of 2 done"]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for scale in [], ["--scale", "0.2"]:
        with pytest.raises(SystemExit) as ended:
            run(*scale)
        assert ended.value.code == 2
        err = capsys.readouterr().err
        assert re.match("error: scale: .* is for 2 steps, got a scale for (20|4); set the same --scale, or", err)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    run("--scale=0.1")
    shutil.rmtree(tmp_path / "logs")
    c = next(stages.configurations(arguments(tmp_path)))
    path = runs.directory(c)
    path.mkdir(parents=True)
    (path / "config.yml").write_text(c.to_yaml())
    with pytest.raises(ConfigError, match="is for 20 steps, got a scale for 2"):
        next(stages.configurations([*arguments(tmp_path), "--scale=0.1"]))


@pytest.mark.parametrize("scale", ["0", "-1", "many", "nan", "inf"])
def test_a_scale_must_be_above_0(tmp_path, scale):
    with pytest.raises(ConfigError, match=f"scale: must be a number above 0, got '{scale}'"):
        next(stages.configurations([*arguments(tmp_path), f"--scale={scale}"]))


def test_earlier_stages_are_found_without_notes(tmp_path):
    """In checkpoints of earlier versions, `init_from` names them, unless its run is gone or an export has removed it."""
    alone, gone = Config(), Config(init_from=str(tmp_path / "gone"))
    assert loading.earlier_stages(alone, {"metrics": {}}) == []
    assert loading.earlier_stages(alone, {}) is None and loading.earlier_stages(gone, {"metrics": {}}) is None
    assert (
        loading.earlier_stages(alone, {"stages": [4, 2]}) == [4, 2]
        and loading.earlier_stages(gone, {"stages": None}) is None
    )
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.yml").write_text(Config(seed=0).to_yaml())
    with Checkpoints(tmp_path / "a" / "checkpoints") as checkpoints:
        checkpoints.save(7, {"x": np.zeros(2)}, metrics={})
    assert loading.earlier_stages(Config(init_from=str(tmp_path / "a")), {"metrics": {}}) == [7]
    assert loading.describe_steps(400, [16000, 600]) == "17,000 steps in 3 stages, 400 of them in the last"
    assert loading.describe_steps(400, []) == "step 400"
    assert loading.describe_steps(400, None) == "step 400 (earlier stages aren't recorded)"


def test_each_stage_has_its_own_configuration(tmp_path):
    configs = []
    for c in stages.configurations(arguments(tmp_path)):
        run = runs.directory(c)
        run.mkdir(parents=True)
        (run / "config.yml").write_text(c.to_yaml())
        configs.append(c)
    assert [c.init_from for c in configs] == [None, *(str(runs.directory(c)) for c in configs[:-1])]
    assert [c.lr for c in configs] == [1e-3, 1e-3, 5e-4, 1e-4]
    assert [c.max_steps for c in configs] == [4000, 4000, 2400, 1200]
    assert {c.seq_len * c.batch_size for c in configs} == {432}
    assert loading.find_run(tmp_path / "logs") == runs.directory(configs[-1])  # what eval.py --logdir logs takes


def test_only_the_first_stage_weights_the_top_level(tmp_path):
    for levels, first in (1, None), (2, (1, 0.03)), (3, (1, 1, 0.03)):
        betas = [c.beta for c in stages.configurations(arguments(tmp_path, levels=levels))]
        assert betas == [first, None, None, None]
    c, *_ = stages.configurations(["--model=svg", "--dataset=digits"])
    assert (c.beta, c.seq_len * c.batch_size) == (None, 432)


@pytest.mark.parametrize("flag", ["--seq_len=8", "--beta=2", "--max_steps=7", "--init_from=here"])
def test_keys_that_stages_set_are_refused(tmp_path, flag):
    with pytest.raises(ConfigError, match=f"{flag[2:].split('=')[0]}: each stage has its own, got"):
        next(stages.configurations([*arguments(tmp_path), flag]))

"""The trained model that comes with the repository, and README's example of its use."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import config as configuration
import eval as evaluation

PRETRAINED = ROOT / "pretrained"


@pytest.mark.slow
def test_example(tmp_path):
    """As it stands there, in a directory of its own."""
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "pretrained").symlink_to(PRETRAINED)
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{program}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "imagined.gif") as gif:
        assert getattr(gif, "n_frames", 1) > 900  # equal ones are merged
        gif.seek(500)
        assert np.asarray(gif.convert("L")).max() > 128  # still a digit


@pytest.mark.slow
def test_pretrained_model_predicts(tmp_path):
    """The next frame far better than the last one repeated."""
    run = shutil.copytree(PRETRAINED, tmp_path / "run", ignore=shutil.ignore_patterns("eval_*"))
    flags = ["--logdir", str(run), "--num_examples", "8", "--eval_seq_len", "46", "--no_save_grid"]
    evaluation.evaluate(*evaluation.parse(flags))
    (path,) = run.glob("eval_*/metrics.json")
    psnr = json.loads(path.read_text())["lines"]["standard"]["psnr"]
    first = {name: line["curve"]["value"][0] for name, line in psnr.items()}
    assert first["prediction"] > first["last context frame"] + 2


def test_pretrained_model_is_small_and_names_no_machine():
    assert sum(path.stat().st_size for path in (PRETRAINED / "checkpoints").rglob("*") if path.is_file()) < 5e6
    c, default = configuration.load(PRETRAINED / "config.yml"), configuration.Config()
    assert (c.logdir, c.datadir) == (default.logdir, default.datadir)

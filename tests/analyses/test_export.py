"""Exported models: files are read back as they were written, and programs run without this repository."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from conftest import ROOT, TINY, full_disk
from safetensors import safe_open

import analysis
import config as configuration
import eval as evaluation
from analyses import curves
from analyses.arguments import TrainedModel
from analyses.card import card
from analyses.export import check_programs
from config import Config, ConfigError
from cwvae import CWVAE
from sequences import rollout
from sequences.noise import draw
from system import weights
from system.devices import Devices
from training import loading, runs
from training.models import make_model


def export(run, out, *flags):
    analysis.COMMANDS["export"]([str(run), f"--out={out}", *flags])
    return Path(out)


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory) -> Path:
    """Return a .safetensors file of the trained run. Tests don't write to it."""
    return export(trained, tmp_path_factory.mktemp("exported") / "new" / "tiny.safetensors")


def leaves(params):
    return [np.asarray(x) for x in jax.tree.leaves(params)]


# ---------------------------------------------------------------------------------------------- parameters


def test_exported_parameters_are_the_same_to_the_bit(trained, exported, tmp_path):
    original = loading.find_checkpoint(trained)
    found = loading.find_checkpoint(exported)
    c = loading.load_config(found.run, {"batch_size": "3"})
    assert (found.step, c.batch_size, c.logdir, c.datadir) == (4, 3, "logs", "datasets")
    assert c == dataclasses.replace(
        configuration.load(trained / "config.yml"), batch_size=3, logdir="logs", datadir="datasets"
    )
    with pytest.raises(ConfigError, match=r"levels: the parameters of .* were trained with 2, got 3"):
        loading.load_config(found.run, {"levels": "3"})
    model = make_model(c)
    a, b = loading.load_state(model, original), loading.load_state(model, found)
    assert int(a.step) == int(b.step) == 4
    starting = loading.initial_state(make_model(dataclasses.replace(c, init_from=str(exported))))
    assert int(starting.step) == 0
    for params in b.params, loading.load_params(model, found), starting.params:
        assert jax.tree.structure(params) == jax.tree.structure(a.params)
        for x, y in zip(leaves(a.params), leaves(params), strict=True):
            assert x.dtype == y.dtype and np.array_equal(x, y)
    again = export(exported, tmp_path / "again.safetensors")
    assert again.read_bytes() == exported.read_bytes() == export(trained, tmp_path / "b.safetensors").read_bytes()


def test_other_programs_can_read_exported_parameters(trained, exported):
    """They only need the library safetensors."""
    arrays = safetensors.numpy.load_file(exported)
    state = loading.load_state(make_model(configuration.load(trained / "config.yml")), loading.find_checkpoint(trained))
    kernel = arrays["params/cell_0/gru/input_kernel"]
    assert np.array_equal(kernel, state.params["params"]["cell_0"]["gru"]["input_kernel"])
    assert len(arrays) == len(leaves(state.params)) and {x.dtype for x in arrays.values()} == {np.dtype("float32")}
    with safe_open(exported, framework="numpy") as file:
        notes = json.loads(file.metadata()["clockwork_vae"])
    assert notes["format"] == 1 and notes["step"] == 4 and notes["config"]["cell_deter_size"] == 5
    assert notes["versions"]["jax"] == jax.__version__


def test_transposed_parameters_are_exported_correctly(tmp_path):
    """The library alone would write the memory in its own order."""
    params = {"params": {"a": np.arange(6, dtype=np.float32).reshape(2, 3).T}}
    path = tmp_path / "a.safetensors"
    path.write_bytes(weights.to_bytes(params, 1, {}, None))
    assert np.array_equal(weights.load(path, params)["params"]["a"], params["params"]["a"])


def test_a_file_and_its_run_have_the_same_evaluation(trained, exported, tmp_path):
    flags = ["--num_examples=1", "--no_save_grid", f"--datadir={tmp_path}"]
    results = [
        evaluation.evaluate(*evaluation.parse([f"--logdir={path}", f"--out={tmp_path / path.name}", *flags]))
        for path in (trained, exported)
    ]
    assert results[0]["lines"] == results[1]["lines"] and results[1]["checkpoint_step"] == 4
    with pytest.raises(
        ConfigError, match=r"^out: .*tiny.safetensors is a file without a run directory; name a directory .* --out$"
    ):
        evaluation.parse([f"--logdir={exported}"])
    with pytest.raises(ConfigError, match=r"^out: name a new directory for the results of several runs, or of a file"):
        analysis.COMMANDS["blind"]([str(exported)])


def test_curves_leave_out_the_steps_of_a_file(exported, run, capsys):
    keys = configuration.load(run / "config.yml")
    (run / "config.yml").write_text(dataclasses.replace(keys, init_from=str(exported)).to_yaml())
    assert [checkpoint.run for checkpoint in curves.lineage(run)] == [run]
    assert "whose steps are left out (a file has no log)" in capsys.readouterr().out


def rewritten(content, change):
    """Return a file's content with changed metadata or arrays."""
    size = int.from_bytes(content[:8], "little")
    notes = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["clockwork_vae"])
    arrays = safetensors.numpy.load(content)
    change(notes, arrays)
    return safetensors.numpy.save(arrays, {"clockwork_vae": json.dumps(notes)})


BIAS = "params/decoder/dense/bias"


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda x: x[:-4], "is damaged, or isn't in the safetensors format"),
        (lambda x: x[:100], "is damaged, or isn't in the safetensors format"),
        (lambda x: b"", "is damaged, or isn't in the safetensors format"),
        (lambda x: b"no tensors, but text", "is damaged, or isn't in the safetensors format"),
        (lambda x: x[:-2] + bytes([x[-2] ^ 1]) + x[-1:], "is damaged .its checksum isn't the saved one"),
        (lambda x: rewritten(x, lambda notes, _: notes.update(step=5)), "is damaged .its checksum"),
        (lambda x: rewritten(x, lambda notes, _: notes.pop("step")), "is damaged .its metadata are incomplete"),
        (lambda x: rewritten(x, lambda notes, _: notes.update(format=2)), "is of a later version of this program"),
        (lambda x: rewritten(x, lambda notes, _: notes["config"].update(lvels=2)), "unknown key 'lvels'; did you mean"),
        (
            lambda x: rewritten(x, lambda _, arrays: arrays.update({BIAS: np.zeros(3, np.float32)})),
            rf"doesn't fit the model in its own metadata \({BIAS} is float32 \(3,\) instead of float32 \(1024,\)\)",
        ),
        (
            lambda x: rewritten(x, lambda _, arrays: arrays.pop(BIAS)),
            rf"doesn't fit the model in its own metadata \({BIAS} is None instead of float32 \(1024,\)\)",
        ),
        (
            lambda x: safetensors.numpy.save(safetensors.numpy.load(x), {"format": "pt"}),
            "wasn't written by this program .its metadata lack clockwork_vae.; name a file that analysis.py export",
        ),
        (lambda x: safetensors.numpy.save({"a": np.zeros(3)}), "wasn't written by this program"),
    ],
)
def test_a_wrong_parameter_file_is_refused_in_one_line(exported, tmp_path, damage, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(damage(exported.read_bytes()))
    with pytest.raises(ConfigError, match=message) as error:
        found = loading.find_checkpoint(path)
        loading.load_state(make_model(loading.load_config(path, {})), found)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    with pytest.raises(ConfigError, match=f"^init_from: .*{message}"):
        loading.initial_state(make_model(Config(**TINY, init_from=str(path))))


def test_missing_files_and_files_of_another_model_are_refused(exported, tmp_path):
    with pytest.raises(ConfigError, match=r"none.safetensors can't be read \(no such file\); name another file"):
        loading.find_checkpoint(tmp_path / "none.safetensors")
    with pytest.raises(ConfigError, match=rf"other shapes, .*; set the model's keys as in {exported}$"):
        loading.initial_state(CWVAE(Config(**TINY | {"cell_deter_size": 6}, init_from=str(exported))))
    (tmp_path / "text.txt").touch()
    with pytest.raises(ConfigError, match=r"text.txt is not a directory; name .*, or a .safetensors file"):
        loading.find_checkpoint(tmp_path / "text.txt")


# ---------------------------------------------------------------------------------------------- what is written


def test_an_export_overwrites_nothing(trained, tmp_path):
    for name in "model.safetensors", "model.md", "model.zip":
        (tmp_path / name).write_text("mine")
        other = tmp_path / ("model.zip" if name == "model.zip" else "model.safetensors")
        with pytest.raises(ConfigError, match=f"^out: .*{name} exists; name a new file"):
            export(trained, other)
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    with full_disk(), pytest.raises(ConfigError, match=r"^out: .*model.safetensors can't be written .*make room there"):
        export(trained, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--format=onnx"], "format: must be one of run, safetensors, stablehlo, got 'onnx'"),
        (["--format=safetensors"], "out: safetensors is a file that ends in .safetensors, got none; name a new one"),
        (
            ["--format=stablehlo", "--out=a.safetensors"],
            "out: stablehlo is a file that ends in .zip, got a.safetensors",
        ),
    ],
)
def test_wrong_export_formats_are_refused(trained, flags, message):
    with pytest.raises(ConfigError, match=message):
        analysis.COMMANDS["export"]([str(trained), *flags])


def test_models_that_have_no_program_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match="format: stablehlo is for cwvae, got svg"):
        check_programs(Config(model="svg"))
    with pytest.raises(ConfigError, match=r"needs an even tmp_abs_factor with cell_reset_state, .*, got 3"):
        check_programs(Config(cell_reset_state=True, tmp_abs_factor=3))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="format: stablehlo needs the package flatbuffers"):
        check_programs(Config())


def test_the_card_describes_the_model_and_its_newest_evaluation(run, tmp_path):
    """It is the newest one of this checkpoint that can be read."""
    c = configuration.load(run / "config.yml")
    params = loading.load_state(make_model(c), loading.find_checkpoint(run)).params
    model, path = TrainedModel("", c, loading.Checkpoint(run, 4)), tmp_path / "tiny.safetensors"
    bare = card(model, params, path)
    assert bare.startswith("# tiny\n") and "scikit-learn's handwritten digits, 2 in a video (BSD)" in bare
    assert (
        "levels 2, tmp_abs_factor 2," in bare
        and "- checkpoint: step 4\n- last stage: batches of 2 sequences of 8 frames" in bare
    )
    assert f"- parameters: {sum(x.size for x in leaves(params)):,}\n" in bare and "seed: 0" in bare and "MIT" in bare
    assert 'load_file("tiny.safetensors")' in bare and "Scores" not in bare
    evaluated = dataclasses.asdict(c)
    for number, (step, ssim) in enumerate([(4, 0.25), (4, 0.5), (2, 0.75)]):
        results = {"checkpoint_step": step, "num_examples": 3, "predicted_frames": 8, "config": evaluated}
        (run / f"eval_{number}").mkdir()
        text = json.dumps(results | {"averages": {"paper": {"ssim": ssim, "psnr": 12.345}}})
        (run / f"eval_{number}" / "metrics.json").write_text(text)
    (run / "eval_3").mkdir()
    (run / "eval_3" / "metrics.json").write_text('{"checkpoint_step":')
    scored = card(model, params, path)
    assert (
        "Averages over 3 test sequences of `digits` and the 8 frames that follow 4 context frames, one sample" in scored
    )
    assert "| paper | SSIM | 0.5000 |\n| paper | PSNR (dB) | 12.35 |" in scored and "0.75" not in scored
    published = card(model._replace(config=Config(dataset="mmnist")), params, path)
    assert "[Moving MNIST" in published and "(https://archive.org/details/moving_mnist) (CC BY-SA 3.0)" in published
    assert "seed" not in published


# ---------------------------------------------------------------------------------------------- programs


def frames_by_own_code(model, params, video, seeds, actions):
    """Return the frames that follow a video, computed by our own code for all blocks at once."""
    c = model.config

    def inputs(seeds, actions):
        blocks = [draw(c, jax.random.wrap_key_data(seeds[:, i]), c.block) for i in range(seeds.shape[1])]
        levels = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *blocks)
        return (levels[0]._replace(actions=actions), *levels[1:])

    observing, imagining = (inputs(*x) for x in zip(seeds, actions, strict=True))
    _, state = rollout.apply(model, "observe", params, video, observing)
    return rollout.imagine_frames(model, params, imagining, state)[0]


@pytest.mark.parametrize("action_size", [None, 2])
def test_exported_programs_need_only_jax(tiny, trained, tmp_path, action_size):
    """The card's example runs in a process that can't import our code. It predicts the same frames as our code."""
    run = trained
    if action_size:
        c = dataclasses.replace(tiny, dataset="episodes", action_size=action_size)
        with runs.opened(c, Devices()) as opened:
            opened.save(1, opened.restore(CWVAE(c))[1], {})
        run = runs.directory(c)
    path = export(run, tmp_path / "new" / "tiny.zip", "--format=stablehlo")
    assert str(ROOT).encode() not in path.read_bytes()
    (code,) = re.findall(r"```python\n(.*?)```", path.with_suffix(".md").read_text(), re.DOTALL)

    random = np.random.default_rng(0)
    video = random.integers(256, size=(3, 6, 64, 64, 1), dtype=np.uint8)
    actions, following = (
        random.normal(size=(3, frames, action_size)).astype(np.float32) if action_size else None for frames in (6, 4)
    )
    given = {"video": video} | ({"actions": actions, "following": following} if action_size else {})
    np.savez(tmp_path / "given.npz", **given)
    script = (
        "import importlib.util, numpy as np\n"
        "assert not any(map(importlib.util.find_spec, ['cwvae', 'fast', 'analyses']))\n"
        f"globals().update(np.load({str(tmp_path / 'given.npz')!r}))\n{code}\n"
        f"np.save({str(tmp_path / 'frames.npy')!r}, frames)\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", script],
        cwd=path.parent,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    frames = np.load(tmp_path / "frames.npy")
    checkpoint = loading.find_checkpoint(run)
    model = CWVAE(loading.load_config(run, {}))
    seeds = [
        jax.random.bits(key, (3, n, 2)) for key, n in zip(jax.random.split(jax.random.key(0)), (3, 2), strict=True)
    ]
    params = loading.load_params(model, checkpoint)
    expected = frames_by_own_code(model, params, video, seeds, (actions, following))
    assert frames.shape == (3, 4, 64, 64, 1)
    np.testing.assert_allclose(frames, expected, atol=1e-5)
    assert np.ptp(frames) > 1e-3

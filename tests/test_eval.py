"""Evaluation as a user runs it: its files, their contents, which checkpoint it takes."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

import config as configuration
import data
import eval as evaluation
import train
from config import ConfigError
from cwvae import CWVAE
from interrupts import Interrupted


@pytest.fixture
def run(tiny):
    c = dataclasses.replace(tiny, save_model_every=2, save_named_model_every=2)
    train.train(c)
    return train.run_directory(c)


def arrays(directory):
    return {
        str(p.relative_to(directory)): np.load(p)["arr_0"] for p in directory.rglob("*.npz") if p.name != "metrics.npz"
    }


def evaluate(run, *flags):
    before = set(run.glob("eval_*"))
    config, checkpoint = evaluation.parse(["--logdir", str(run), *flags])
    results = evaluation.evaluate(config, checkpoint)
    (directory,) = set(run.glob("eval_*")) - before
    return directory, results


def test_files_and_their_contents(run, capsys):
    directory, results = evaluate(run, "--num_samples=2", "--save_gifs")
    printed = capsys.readouterr().out
    assert f"paper      {results['averages']['paper']['ssim']:7.4f}" in printed and str(directory) in printed
    got = arrays(directory)
    samples = ["random_sample_1", "random_sample_2", "best_ssim_sample", "best_psnr_sample"]
    names = {f"sample{i}_gt/{name}.npz" for i in range(3) for name in ("gt_ctx", "gt_pred")}
    names |= {f"sample{i}/{name}.npz" for i in range(3) for name in samples}
    curves = {
        f"{metric}{protocol}_{kind}.npz"
        for metric in ("ssim", "psnr")
        for protocol in ("", "_standard")
        for kind in ("mean", "stddev")
    }
    assert set(got) == names | curves
    pictures = {p.relative_to(directory).with_suffix(".npz").as_posix() for p in directory.glob("*/*.png")}
    assert pictures == names
    assert {p.name for p in directory.glob("*.png")} == {
        f"{m}{p}_range.png" for m in ("ssim", "psnr") for p in ("", "_standard")
    }
    config = configuration.load(run / "config.yml")
    test = data.windows(config, "test")
    for i in range(3):
        np.testing.assert_array_equal(got[f"sample{i}_gt/gt_ctx.npz"], test[i][:4])
        np.testing.assert_array_equal(got[f"sample{i}_gt/gt_pred.npz"], test[i][4:])
        for name in samples:
            frames = got[f"sample{i}/{name}.npz"]
            assert frames.shape == (8, 64, 64, 1) and frames.dtype == np.uint8
        with Image.open(directory / f"sample{i}" / "random_sample_1.gif") as gif:
            assert gif.n_frames == 8 and gif.size == (2 * 3 * 68, 2 * 68)
    assert not np.array_equal(got["sample0/random_sample_1.npz"], got["sample0/random_sample_2.npz"])
    for name in curves:
        assert got[name].shape == (8,)
    saved = json.loads((directory / "metrics.json").read_text())
    assert saved == results | {"config": saved["config"]}
    assert saved["checkpoint_step"] == 4 and saved["num_examples"] == 3 and saved["predicted_frames"] == 8
    assert saved["config"]["num_samples"] == 2 and saved["versions"]["jax"]
    for protocol, suffix in ("paper", ""), ("standard", "_standard"):
        for metric in "ssim", "psnr":
            assert saved["averages"][protocol][metric] == pytest.approx(
                got[f"{metric}{suffix}_mean.npz"].mean(), rel=1e-5
            )


def test_curves_are_those_of_scikit_image(run):
    """Recomputed from the saved frames, which are rounded to 8 bits."""
    from skimage.metrics import peak_signal_noise_ratio

    directory, _ = evaluate(run)
    got = arrays(directory)
    psnr = []
    for i in range(3):
        truth, frames = (
            got[name].astype(np.float32) / 255
            for name in (f"sample{i}_gt/gt_pred.npz", f"sample{i}/random_sample_1.npz")
        )
        pairs = [(t[..., 0], p[..., 0]) for t, p in zip(truth, frames, strict=True)]
        psnr.append([peak_signal_noise_ratio(t, p, data_range=1) for t, p in pairs])
    np.testing.assert_allclose(got["psnr_standard_mean.npz"], np.mean(psnr, 0), atol=0.1)
    np.testing.assert_allclose(got["psnr_standard_stddev.npz"], np.std(psnr, 0), atol=0.1)


def test_best_samples_by_average_over_time(tiny, tmp_path):
    """Of a batch of two rows, the second of which has the samples the other way round."""
    c = dataclasses.replace(tiny, num_samples=3)
    ssim, psnr = np.array([[0.1, 0.9], [0.4, 0.4], [0.6, 0.5]]), np.array([[20.0, 20], [10, 31], [15, 15]])
    samples = evaluation.Samples()
    for i in range(3):
        frames = np.full((2, 2, 64, 64, 1), i, np.uint8)
        metrics = {"ssim": np.stack([ssim[i], ssim[2 - i]]), "psnr": np.stack([psnr[i], psnr[2 - i]])}
        samples.add(
            i, evaluation.Prediction(frames, {"paper": metrics, "standard": {k: -v for k, v in metrics.items()}})
        )
    for row in range(2):
        evaluation.save_example(c, tmp_path, 7 + row, np.zeros((6, 64, 64, 1), np.uint8), samples, row)
    got = arrays(tmp_path)
    assert got["sample7/best_ssim_sample.npz"].max() == 2 and got["sample7/best_psnr_sample.npz"].max() == 1
    assert got["sample8/best_ssim_sample.npz"].max() == 0 and got["sample8/best_psnr_sample.npz"].max() == 1
    assert got["sample7/random_sample_1.npz"].max() == 0 and got["sample7/random_sample_2.npz"].max() == 1
    with np.load(tmp_path / "sample7" / "metrics.npz") as file:
        assert file["paper_ssim"].tolist() == [0.6, 0.5] and file["paper_psnr"].tolist() == [10, 31]
        assert file["standard_ssim"].tolist() == [-0.4, -0.4] and file["standard_psnr"].tolist() == [-15, -15]


def test_an_interrupted_evaluation_is_continued(run, monkeypatch, capsys):
    """In the same directory, without predicting again what is there, with the same results."""
    flags = ["--batch_size=1", "--num_samples=2"]
    whole, _ = evaluate(run, *flags)
    calls, predict = [], evaluation.predict

    def until_third(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise Interrupted(15)
        return predict(*arguments)

    monkeypatch.setattr(evaluation, "predict", until_third)
    with pytest.raises(Interrupted):
        evaluate(run, *flags)
    (unfinished,) = (d for d in run.glob("eval_*") if not (d / "metrics.json").exists())
    results = evaluation.evaluate(*evaluation.parse(["--logdir", str(run), *flags]))
    assert len(calls) == 4 + 4  # two of three examples again, two samples each
    assert f"Continuing {unfinished}" in capsys.readouterr().out
    a, b = arrays(whole), arrays(unfinished)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])
    assert results["averages"] == json.loads((whole / "metrics.json").read_text())["averages"]
    # With other options, or another checkpoint, it isn't.
    (unfinished / "metrics.json").unlink()
    other, _ = evaluate(run, *flags, "--use_obs=TTF")
    assert other != unfinished


def test_repeatable_for_any_batch_size(run):
    a, b, c = (arrays(evaluate(run, *flags)[0]) for flags in ([], [], ["--batch_size=3"]))
    for name, value in a.items():
        np.testing.assert_array_equal(value, b[name])
        np.testing.assert_allclose(value.astype(float), c[name], atol=1.01 if value.dtype == np.uint8 else 1e-3)


def test_options(run):
    directory, results = evaluate(
        run, "--no_save_grid", "--num_examples=1", "--eval_seq_len=9", "--open_loop_ctx=8", "--use_obs=TFF"
    )
    assert not list(directory.glob("*/*.png")) and results["predicted_frames"] == 1 and results["num_examples"] == 1


def test_which_checkpoint(run, tmp_path):
    find = evaluation.find_checkpoint
    assert find(run) == (run, 4)
    assert find(run / "checkpoints" / "2") == (run, 2)
    assert find(run.parent) == (run, 4)
    assert find(run.parent.parent) == (run, 4)
    other = run.parent / "other"
    other.mkdir()
    (other / "config.yml").touch()
    with pytest.raises(ConfigError, match=f"holds 2 runs; name one of .*{other}"):
        find(run.parent.parent)
    with pytest.raises(ConfigError, match="holds no checkpoint yet"):
        find(other)
    with pytest.raises(ConfigError, match="is no directory"):
        find(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="holds no run"):
        find(run / "checkpoints")
    with pytest.raises(ConfigError, match="--logdir is missing"):
        evaluation.parse([])
    assert evaluation.parse([f"--logdir={run / 'checkpoints' / '2'}"])[1].step == 2


def test_the_named_checkpoint_is_used(run):
    model = CWVAE(configuration.load(run / "config.yml"))
    a, b = (evaluation.load_params(model, evaluation.Checkpoint(run, step)) for step in (2, 4))
    assert not np.array_equal(a["params"]["decoder"]["dense"]["kernel"], b["params"]["decoder"]["dense"]["kernel"])


def test_another_model_or_a_damaged_checkpoint_is_refused(run):
    config, checkpoint = evaluation.parse(["--logdir", str(run), "--cell_deter_size=6"])
    with pytest.raises(ConfigError, match="another model"):
        evaluation.evaluate(config, checkpoint)
    file = max((run / "checkpoints" / "4").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    with pytest.raises(ConfigError, match="4 is damaged"):
        evaluation.evaluate(*evaluation.parse(["--logdir", str(run)]))
    assert not list(run.glob("eval_*"))


def test_evaluations_never_overwrite(run):
    config, checkpoint = evaluation.parse(["--logdir", str(run)])
    names = set()
    for _ in range(3):
        directory = evaluation.results_directory(config, checkpoint)
        (directory / "metrics.json").touch()
        names.add(directory)
    assert len(names) == 3

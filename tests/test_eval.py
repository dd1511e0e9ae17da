"""Evaluation as a user runs it: its files, their contents, which checkpoint it takes."""

import csv
import dataclasses
import itertools
import json
import re

import numpy as np
import pytest
from PIL import Image

import config as configuration
import data
import eval as evaluation
import noise
import runs
import tools
from config import ConfigError
from cwvae import CWVAE
from report import statistics
from system.interrupts import Interrupted


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
    assert (
        f"best of 2                {results['averages']['paper']['ssim']:.4f} (" in printed
        and str(directory) in printed
    )
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
        *(f"{m}{p}_range.png" for m in ("ssim", "psnr") for p in ("", "_standard")),
        *(f"{m}_{p}.png" for m in ("ssim", "psnr") for p in ("paper", "standard")),
    }
    config = configuration.load(run / "config.yml")
    test = data.windows(config, "test")
    for i in range(3):
        np.testing.assert_array_equal(got[f"sample{i}_gt/gt_ctx.npz"], test[i][:4])
        np.testing.assert_array_equal(got[f"sample{i}_gt/gt_pred.npz"], test[i][4:])
        for name in samples:
            frames = got[f"sample{i}/{name}.npz"]
            assert frames.shape == (8, 64, 64, 1) and frames.dtype == np.uint8
        for name in "random_sample_1", "best_ssim_sample":
            with Image.open(directory / f"sample{i}" / f"{name}.gif") as gif:
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
    copy = {protocol: {"ssim": np.full((2, 2), 0.3)} for protocol in ("paper", "standard")}
    samples = evaluation.Samples({"copy": copy})
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
        np.testing.assert_allclose(file["paper_ssim_mean"], [1.1 / 3, 1.8 / 3])
        np.testing.assert_allclose(file["standard_psnr_mean"], [-45 / 3, -66 / 3])
        assert file["paper_ssim_copy"].tolist() == [0.3, 0.3]


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
    assert results["lines"] == json.loads((whole / "metrics.json").read_text())["lines"]
    for name in "metrics.json", "metrics.csv", "index.html", "sample2/metrics.npz":
        assert (whole / name).read_bytes() == (unfinished / name).read_bytes()
    # With other options, or another checkpoint, it isn't.
    (unfinished / "metrics.json").unlink()
    other, _ = evaluate(run, *flags, "--use_obs=TTF")
    assert other != unfinished


def test_repeatable_for_any_batch_size(run):
    (a, _), (b, _), (c, results) = (evaluate(run, *flags) for flags in ([], [], ["--batch_size=3"]))
    assert (a / "metrics.csv").read_bytes() == (b / "metrics.csv").read_bytes()
    lines = json.loads((a / "metrics.json").read_text())["lines"]
    for protocol, metric, line in itertools.product(tools.PROTOCOLS, statistics.METRICS, lines["paper"]["ssim"]):
        x, y = (found[protocol][metric][line]["curve"]["value"] for found in (lines, results["lines"]))
        np.testing.assert_allclose(x, y, atol=1e-3)
    a, b, c = arrays(a), arrays(b), arrays(c)
    for name, value in a.items():
        np.testing.assert_array_equal(value, b[name])
        np.testing.assert_allclose(value.astype(float), c[name], atol=1.01 if value.dtype == np.uint8 else 1e-3)


def test_references_by_hand(run):
    """Posterior, copy and random frames against numpy's mean squared error on frames put together here."""
    _, results = evaluate(run)
    config = configuration.load(run / "config.yml")
    model = CWVAE(config)
    params = runs.load_params(model, runs.find_checkpoint(run))
    test, pool = data.windows(config, "test"), evaluation.random_frames(config)
    train_frames = np.concatenate([data.windows(config, "train")[i] for i in range(3)])
    assert pool.shape == (1000, 64, 64, 1) and len(train_frames) == 3 * 8
    curves = {name: [] for name in statistics.REFERENCES.values()}
    for i in range(3):
        truth = test[i] / np.float32(255)
        noise = noise.draw(config, noise.example_keys(config, i, 1, 0), 12)
        rollouts, _ = model.apply(params, truth[None], noise, method="observe")
        stand_ins = {
            "posterior reconstruction": np.asarray(model.apply(params, rollouts, method="decode"))[0, 4:],
            "last context frame": np.repeat(truth[3:4], 8, axis=0),
            "random training frame": pool[np.random.default_rng([1, i]).integers(1000, size=8)] / np.float32(255),
        }
        for name, frames in stand_ins.items():
            curves[name].append(-10 * np.log10(((frames - truth[4:]) ** 2).mean((1, 2, 3))))
    lines = results["lines"]["paper"]["psnr"]
    assert list(lines) == ["prediction", *statistics.REFERENCES.values()]
    for name in stand_ins:
        np.testing.assert_allclose(lines[name]["curve"]["value"], np.mean(curves[name], 0), rtol=1e-4)


def test_random_frames_are_the_training_sets(tiny, monkeypatch):
    """Of training windows whose frames bear their numbers: from many windows and from all times."""
    windows = np.zeros((20, 8, 64, 64, 1), np.uint8)
    windows[:] = np.arange(160).reshape(20, 8, 1, 1, 1)
    monkeypatch.setattr(data, "windows", lambda config, split: {"train": windows}[split])
    pool = evaluation.random_frames(tiny)
    assert pool.shape == (1000, 64, 64, 1) and (pool == pool[:, :1, :1]).all()
    counts = np.bincount(pool[:, 0, 0, 0], minlength=160)
    assert len(counts) == 160 and (counts == 0).sum() < 5 and counts.max() < 20  # 6.25 expected


def test_without_training_data_there_is_no_random_line(run, tmp_path, monkeypatch, capsys):
    windows = data.windows

    def only_test(config, split):
        if split == "train":
            raise ConfigError("datadir: train is missing")
        return windows(config, split)

    monkeypatch.setattr(data, "windows", only_test)
    _, results = evaluate(run, "--num_examples=1")
    assert "Without the line of random training frames, since there are none: datadir" in capsys.readouterr().out
    assert list(results["lines"]["paper"]["ssim"]) == ["prediction", "posterior reconstruction", "last context frame"]


def test_page_and_tables(run):
    """What the page shows is there, and nothing of it is elsewhere; the tables hold the JSON's figures."""
    directory, results = evaluate(run, "--num_samples=2", "--save_gifs")
    page = (directory / "index.html").read_text()
    shown = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len([path for path in shown if path.endswith(".gif")]) == 3 * 2
    assert len([path for path in shown if path.endswith(".png")]) == 4
    assert all((directory / path).is_file() for path in shown) and "http" not in page and "url(" not in page
    ssim = [np.load(directory / f"sample{i}" / "metrics.npz")["paper_ssim"].mean() for i in range(3)]
    best, median, worst = np.argsort(ssim)[::-1]
    for rank, number in ("best", best), ("median", median), ("worst", worst):
        assert f"{rank}: example {number}, best ssim sample" in page
    with (directory / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 5 * (8 + 1)
    for row in rows:
        figures = results["lines"][row["protocol"]][row["metric"]][row["line"]]
        whole = row["frames"] == "1-8"
        want = figures["average"] if whole else {k: v[int(row["frames"]) - 1] for k, v in figures["curve"].items()}
        assert {key: float(row[key]) for key in want} == want
        if whole and row["protocol"] == "paper" and row["metric"] == "ssim":
            assert f"{want['value']:.4f} ({want['low']:.4f} to {want['high']:.4f})" in page
    best, mean = (results["lines"]["paper"]["ssim"][name]["average"]["value"] for name in ("best of 2", "mean of 2"))
    assert best > mean and best == pytest.approx(np.mean(ssim), rel=1e-5)
    samples = [[np.load(directory / f"sample{i}/random_sample_{n}.npz")["arr_0"] for n in (1, 2)] for i in range(3)]
    truth = [np.load(directory / f"sample{i}_gt/gt_pred.npz")["arr_0"] for i in range(3)]
    psnr = [
        [-10 * np.log10((((t - x.astype(float)) / 255) ** 2).mean((1, 2, 3))).mean() for x in pair]
        for t, pair in zip(truth, samples, strict=True)
    ]
    lines = results["lines"]["standard"]["psnr"]
    assert lines["mean of 2"]["average"]["value"] == pytest.approx(np.mean(psnr), abs=0.1)
    assert lines["best of 2"]["average"]["value"] == pytest.approx(np.max(psnr, axis=1).mean(), abs=0.1)


def test_options(run):
    directory, results = evaluate(
        run, "--no_save_grid", "--num_examples=1", "--eval_seq_len=9", "--open_loop_ctx=8", "--use_obs=TFF"
    )
    assert not list(directory.glob("*/*.png")) and results["predicted_frames"] == 1 and results["num_examples"] == 1


def test_which_checkpoint(run, tmp_path):
    find = runs.find_checkpoint
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
    a, b = (runs.load_params(model, runs.Checkpoint(run, step)) for step in (2, 4))
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

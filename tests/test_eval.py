"""Evaluation as a user runs it: its files, their contents, and the checkpoint that it uses."""

import contextlib
import csv
import dataclasses
import errno
import itertools
import json
import re
import shutil
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT, full_disk
from helpers import evaluate
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import config as configuration
import data
import eval as evaluation
import tools
from config import ConfigError
from cwvae import CWVAE
from metrics import similarity
from report import output, statistics
from report.results import save_example
from sequences import noise, rollout
from system import logs
from system.devices import Devices
from system.interrupts import Interrupted
from training import loading, runs


def arrays(directory):
    return {
        str(p.relative_to(directory)): np.load(p)["arr_0"] for p in directory.rglob("*.npz") if p.name != "metrics.npz"
    }


@pytest.mark.parametrize("backend, rows", [("cpu", 1), ("gpu", 2)])
def test_metrics_of_several_predictions_equal_those_of_each(monkeypatch, backend, rows):
    """The forms for CPUs and accelerators equal the metrics of single frames. A single predicted frame counts for all."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    random = np.random.default_rng(0)
    truth = random.integers(0, 256, (rows, 3, 8, 8, 1), dtype=np.uint8)
    predictions = {"float": random.normal(size=truth.shape).astype(np.float32), "still": 255 - truth[:, 1:2]}
    got = evaluation.frame_metrics(truth, predictions)
    for name, protocol in itertools.product(predictions, similarity.PROTOCOLS):
        want = similarity.frame_metrics(truth, np.broadcast_to(predictions[name], truth.shape), protocol)
        for metric in "ssim", "psnr":
            assert got[name][protocol][metric].shape == (rows, 3)
            np.testing.assert_allclose(got[name][protocol][metric], want[metric], rtol=1e-5, atol=1e-6)


def test_an_evaluation_writes_frames_curves_and_metrics(run, capsys):
    directory, results = evaluate(run, "--num_samples=2")
    printed = capsys.readouterr().out
    assert (
        f"best of 2                {results['averages']['paper']['ssim']:.4f} (" in printed
        and str(directory) in printed
    )
    got = arrays(directory)
    samples = ["random_sample_1", "random_sample_2", "best_ssim_sample", "best_psnr_sample"]
    names = {f"sample{i}_gt/{name}.npz" for i in range(3) for name in ("gt_ctx", "gt_pred")}
    names |= {f"sample{i}/{name}.npz" for i in range(3) for name in ("context", *samples)}
    curves = {
        f"{metric}{protocol}_{kind}.npz"
        for metric in ("ssim", "psnr")
        for protocol in ("", "_standard")
        for kind in ("mean", "stddev")
    }
    assert set(got) == names | curves
    pictures = {p.relative_to(directory).with_suffix(".npz").as_posix() for p in directory.glob("*/*.png")}
    assert pictures == names | {
        f"sample{i}{name}_sheet.npz"
        for i in range(3)
        for name in ("_gt/gt_pred", "/random_sample_1", "/best_ssim_sample")
    }
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
            shown = np.concatenate([got[f"sample{i}/context.npz"], got[f"sample{i}/{name}.npz"]])
            with Image.open(directory / f"sample{i}" / f"{name}.gif") as gif:
                assert gif.n_frames == 12 and gif.size == (2 * 3 * 68, 2 * (68 + 2 * 14))
                for t in range(12):
                    gif.seek(t)
                    error = np.asarray(gif.convert("RGB"))[32:160:2, 140:268:2, 0].astype(int) - shown[t, ..., 0]
                    assert abs(error).max() <= 8
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


def test_standard_curves_equal_scikit_image(run):
    """Scikit-image computes them from the saved frames."""
    directory, _ = evaluate(run)
    got = arrays(directory)
    curves = {"psnr": [], "ssim": []}
    for i in range(3):
        truth, frames = (got[name] for name in (f"sample{i}_gt/gt_pred.npz", f"sample{i}/random_sample_1.npz"))
        pairs = [(t[..., 0], p[..., 0]) for t, p in zip(truth, frames, strict=True)]
        curves["psnr"].append([peak_signal_noise_ratio(*pair) for pair in pairs])
        curves["ssim"].append([structural_similarity(*pair) for pair in pairs])
    for metric, values in curves.items():
        np.testing.assert_allclose(got[f"{metric}_standard_mean.npz"], np.mean(values, 0), rtol=1e-4)
        np.testing.assert_allclose(got[f"{metric}_standard_stddev.npz"], np.std(values, 0), rtol=1e-3, atol=1e-5)


def test_the_best_samples_have_the_best_average_over_time(tiny, tmp_path):
    """The batch has two rows. The second one has the samples in reverse order."""
    c = dataclasses.replace(tiny, num_samples=3)
    ssim, psnr = np.array([[0.1, 0.9], [0.4, 0.4], [0.6, 0.5]]), np.array([[20.0, 20], [10, 31], [15, 15]])
    copy = {protocol: {"ssim": np.full((2, 2), 0.3)} for protocol in ("paper", "standard")}
    samples = evaluation.Samples(3, {"copy": copy})
    for i in range(3):
        frames = np.full((2, 2, 64, 64, 1), i, np.uint8)
        metrics = {"ssim": np.stack([ssim[i], ssim[2 - i]]), "psnr": np.stack([psnr[i], psnr[2 - i]])}
        both = {"paper": metrics, "standard": {k: -v for k, v in metrics.items()}}
        samples.add(i, evaluation.Prediction(np.zeros((2, 4, 64, 64, 1), np.uint8), frames, both))
    for row in range(2):
        save_example(c, tmp_path, 7 + row, np.zeros((6, 64, 64, 1), np.uint8), *samples.row(row))
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


def test_an_interrupted_evaluation_is_resumed(run, monkeypatch, capsys):
    """In the same directory, with the same results. Finished examples aren't predicted again."""
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
    assert f"Resuming {unfinished}" in capsys.readouterr().out
    a, b = arrays(whole), arrays(unfinished)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])
    assert results["lines"] == json.loads((whole / "metrics.json").read_text())["lines"]
    for name in "metrics.json", "metrics.csv", "index.html", "sample2/metrics.npz":
        assert (whole / name).read_bytes() == (unfinished / name).read_bytes()
    # An evaluation with other options gets another directory.
    (unfinished / "metrics.json").unlink()
    other, _ = evaluate(run, *flags, "--use_obs=TF")
    assert other != unfinished


def test_an_evaluation_is_repeatable_for_any_batch_size(run):
    (a, _), (b, _), (c, results) = (evaluate(run, *flags) for flags in ([], [], ["--batch_size=3"]))
    assert (a / "metrics.csv").read_bytes() == (b / "metrics.csv").read_bytes()
    lines = json.loads((a / "metrics.json").read_text())["lines"]
    for protocol, metric, line in itertools.product(similarity.PROTOCOLS, statistics.METRICS, lines["paper"]["ssim"]):
        x, y = (found[protocol][metric][line]["curve"]["value"] for found in (lines, results["lines"]))
        np.testing.assert_allclose(x, y, atol=1e-3)
    a, b, c = arrays(a), arrays(b), arrays(c)
    for name, value in a.items():
        np.testing.assert_array_equal(value, b[name])
        np.testing.assert_allclose(value.astype(float), c[name], atol=1.01 if value.dtype == np.uint8 else 1e-3)


def test_references_equal_a_computation_by_hand(tiny):
    """PSNR of posterior, copied and random frames, by NumPy's mean squared error. The model has three levels."""
    config = dataclasses.replace(tiny, levels=3)
    with runs.opened(config, Devices()) as opened:
        _, state, _ = opened.restore(CWVAE(config))
        opened.save(1, state, {})
    run = runs.directory(config)
    _, results = evaluate(run)
    model = CWVAE(config)
    params = loading.load_params(model, loading.find_checkpoint(run))
    test, pool = data.windows(config, "test"), evaluation.random_frames(config)
    train_frames = np.concatenate([data.windows(config, "train")[i] for i in range(3)])
    assert pool.shape == (1000, 64, 64, 1) and len(train_frames) == 3 * 8
    curves = {name: [] for key, name in statistics.REFERENCES.items() if key != "shuffled"}
    for i in range(3):
        truth = test[i] / np.float32(255)
        inputs = noise.draw(config, noise.example_keys(config, i, 1, 0), 12)
        rollouts, _ = model.apply(params, truth[None], inputs, method="observe")
        stand_ins = {
            "posterior reconstruction": np.asarray(model.apply(params, rollouts, method="decode"))[0, 4:],
            "last context frame": np.repeat(truth[3:4], 8, axis=0),
            "random training frame": pool[np.random.default_rng([1, i]).integers(1000, size=8)] / np.float32(255),
        }
        for name, frames in stand_ins.items():
            curves[name].append(-10 * np.log10(((frames - truth[4:]) ** 2).mean((1, 2, 3))))
    lines = results["lines"]["paper"]["psnr"]
    assert list(lines) == ["prediction", *curves]
    for name in stand_ins:
        np.testing.assert_allclose(lines[name]["curve"]["value"], np.mean(curves[name], 0), rtol=1e-4)


def test_random_frames_are_drawn_from_all_training_frames(tiny, monkeypatch):
    """Each training frame shows its number. Nearly all frames of all windows occur."""
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
    assert (
        "The line of random training frames is left out, since there is no training set: datadir"
        in capsys.readouterr().out
    )
    assert list(results["lines"]["paper"]["ssim"]) == ["prediction", "posterior reconstruction", "last context frame"]


def test_page_and_tables_show_the_metrics_of_the_json(run):
    """All files on the page exist next to it, and nothing is loaded from elsewhere. The tables hold the JSON's values."""
    directory, results = evaluate(run, "--num_samples=2")
    page = (directory / "index.html").read_text()
    shown = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len({path for path in shown if path.endswith(".gif")}) == 3 * 2
    assert len([path for path in shown if path.endswith("_paper.png")]) == 2 * 2
    shown += re.findall(r'data-(?:sheet|minus)="([^"]*)"', page)
    assert len({path for path in shown if path.endswith("_sheet.png")}) == 3 * 3
    assert all((directory / path).is_file() for path in shown) and "http" not in page and "url(" not in page
    with Image.open(directory / "sample2" / "best_ssim_sample_sheet.png") as sheet:
        assert sheet.size == (10 * 65 - 1, 2 * 65 - 1)  # 12 frames, from the context on
    ssim = [np.load(directory / f"sample{i}" / "metrics.npz")["paper_ssim"].mean() for i in range(3)]
    best, median, worst = np.argsort(ssim)[::-1]
    for rank, number in ("best", best), ("median", median), ("worst", worst):
        assert re.search(rf"Example {number}: [\w, ]*{rank}", page)
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


def test_evaluation_flags_set_lengths_and_blind_levels(run):
    flags = ["--no_save_grid", "--num_examples=1", "--eval_seq_len=9", "--open_loop_ctx=8", "--use_obs=TF"]
    directory, results = evaluate(run, *flags, "--save_gifs=false")
    assert not [path for path in directory.glob("*/*") if path.suffix != ".npz"] and results["examples"] == []
    assert results["predicted_frames"] == 1 and results["num_examples"] == 1
    config, checkpoint, _ = evaluation.parse(["--logdir", str(run), *flags])
    model, context = CWVAE(config), data.windows(config, "test")[0][None, :8]
    params = loading.load_params(model, checkpoint)
    blind, seeing = (
        rollout.open_loop(model, params, context, noise.example_keys(config, 0, 1, 0), 1, use_obs).reconstruction
        for use_obs in ("TF", None)
    )
    shown = np.load(directory / "sample0" / "context.npz")["arr_0"].astype(int)
    assert np.abs(shown - np.asarray(tools.to_uint8(blind))[0]).max() <= 1
    assert not np.array_equal(blind, seeing)


def test_the_newest_or_the_named_checkpoint_is_found(run, tmp_path):
    find = loading.find_checkpoint
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
    with pytest.raises(ConfigError, match="is not a directory"):
        find(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="holds no run"):
        find(run / "checkpoints")
    with pytest.raises(ConfigError, match="--logdir is missing"):
        evaluation.parse([])
    assert evaluation.parse([f"--logdir={run / 'checkpoints' / '2'}"])[1].step == 2


def test_checkpoints_of_other_steps_have_other_parameters(run):
    model = CWVAE(configuration.load(run / "config.yml"))
    a, b = (loading.load_params(model, loading.Checkpoint(run, step)) for step in (2, 4))
    assert not np.array_equal(a["params"]["decoder"]["dense"]["kernel"], b["params"]["decoder"]["dense"]["kernel"])


def test_another_model_or_a_damaged_checkpoint_is_refused(run):
    for flag, message in (
        ("--levels=3", "levels: the parameters of .* were trained with 2, got 3; leave it out"),
        ("--model=svg", "model: the parameters of .* were trained with cwvae, got svg; leave it out"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluation.parse(["--logdir", str(run), flag])
    assert evaluation.parse(["--logdir", str(run), "--levels=2"])[0].levels == 2
    file = max((run / "checkpoints" / "4").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    with pytest.raises(ConfigError, match="4 is damaged"):
        evaluation.evaluate(*evaluation.parse(["--logdir", str(run)]))
    assert not list(run.glob("eval_*"))


def test_evaluations_never_overwrite_each_other(run):
    config, checkpoint, _ = evaluation.parse(["--logdir", str(run)])
    names = set()
    for _ in range(3):
        with contextlib.ExitStack() as held:
            directory = output.open_directory(held, config, checkpoint, None)
        (directory / "metrics.json").touch()
        names.add(directory)
    assert len(names) == 3


def test_a_truncated_configuration_is_refused(run, monkeypatch, capsys):
    """At any line: missing keys would silently have their defaults."""
    path = run / "config.yml"
    lines = path.read_text().splitlines(keepends=True)
    for kept in range(len(lines)):
        path.write_text("".join(lines[:kept]))
        with pytest.raises(
            ConfigError,
            match=r"config.yml(: digit_speed| is damaged \((it is empty|it lacks \d+ of the keys that were saved, \w+ first)\))",
        ):
            evaluation.parse(["--logdir", str(run)])
    path.write_text("".join(line for line in lines if not line.startswith("clip_grad")))
    with pytest.raises(ConfigError, match="it lacks 1 of the keys that were saved, clip_grad_norm_by first"):
        evaluation.parse(["--logdir", str(run)])
    assert list(vars(configuration.Config()))[-1] not in configuration.marked("later")
    monkeypatch.setattr(configuration, "marked", {"later": configuration.marked("later") | {"clip_grad_norm_by"}}.get)
    assert evaluation.parse(["--logdir", str(run)])[0].clip_grad_norm_by == 10000
    printed = capsys.readouterr().out
    assert printed.endswith(f"{path} is older than some keys; their defaults are used: clip_grad_norm_by = 10000.0\n")
    path.write_text("".join(line for line in lines if not line.startswith(("model:", "svg_", "vta_"))))
    evaluation.parse(["--logdir", str(run)])
    assert capsys.readouterr().out == f"{path} is older than some keys; their defaults are used: model = cwvae\n"
    assert evaluation.parse(["--logdir", str(ROOT / "pretrained")])[0].filters == 8


# ---------------------------------------------------------------------------------------------- where results go


def test_out_names_the_directory_of_the_results(run, tmp_path, monkeypatch, capsys):
    """The directory must be new, or hold the same interrupted evaluation. Nothing else is touched."""
    out = tmp_path / "a" / "b"
    call = ["--logdir", str(run), "--no_save_grid", "--num_examples=1", f"--out={out}"]
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "summarise", lambda *_: (_ for _ in ()).throw(Interrupted(15)))
        with pytest.raises(Interrupted):
            evaluation.evaluate(*evaluation.parse(call))
    with pytest.raises(ConfigError, match=r"out: .*b isn't empty; name a new directory"):
        evaluation.evaluate(*evaluation.parse([*call, "--use_obs=TF"]))
    capsys.readouterr()
    evaluation.evaluate(*evaluation.parse(call))
    assert f"Resuming {out}" in capsys.readouterr().out and (out / "index.html").exists()
    with pytest.raises(ConfigError, match=r"out: .*b isn't empty; name a new directory"):
        evaluation.evaluate(*evaluation.parse(call))
    assert not list(run.glob("eval_*"))


def test_an_evaluation_that_cannot_write_is_refused(run, monkeypatch):
    def refuse(path, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    with monkeypatch.context() as patch, pytest.raises(ConfigError) as error:
        patch.setattr(type(run), "mkdir", refuse)
        evaluation.evaluate(*evaluation.parse(["--logdir", str(run)]))
    assert str(error.value) == (
        f"out: {run} can't be written (Read-only file system); make room there, or name another directory with --out"
    )


def test_an_evaluation_resumes_after_a_full_disk(run):
    """The error is one line. The same call resumes in the same directory."""
    flags = ["--logdir", str(run), "--batch_size=1"]
    with full_disk(), pytest.raises(ConfigError, match=r"eval_.* can't be written .*make room there, or name another"):
        evaluation.evaluate(*evaluation.parse(flags))
    (directory,) = run.glob("eval_*")
    evaluation.evaluate(*evaluation.parse(flags))
    assert list(run.glob("eval_*")) == [directory] and (directory / "metrics.json").exists()


def test_damaged_metrics_of_an_interrupted_evaluation_are_named(run):
    call = ["--logdir", str(run), "--no_save_grid", "--num_examples=1"]
    evaluation.evaluate(*evaluation.parse(call))
    (directory,) = run.glob("eval_*")
    (directory / "metrics.json").unlink()
    file = directory / "sample0" / "metrics.npz"
    for content in b"", file.read_bytes()[:100]:
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=rf"{file} is damaged .*; delete {file.parent}, and evaluate again"):
            evaluation.evaluate(*evaluation.parse(call))
    shutil.rmtree(file.parent)
    evaluation.evaluate(*evaluation.parse(call))
    assert list(run.glob("eval_*")) == [directory] and (directory / "metrics.json").exists()


def test_two_evaluations_at_once_use_different_directories(run, tmp_path):
    """The second one makes another directory, or is refused if --out names the first one's."""
    config, checkpoint, _ = evaluation.parse(["--logdir", str(run)])
    with contextlib.ExitStack() as held:
        first = output.open_directory(held, config, checkpoint, None)
        with contextlib.ExitStack() as other:
            second = output.open_directory(other, config, checkpoint, None)
        assert second != first
        with contextlib.ExitStack() as other:  # the second one has died: its directory is resumed
            assert output.open_directory(other, config, checkpoint, None) == second
        output.open_directory(held, config, checkpoint, tmp_path / "out")
        (second / "checkpoint").write_bytes(b"\xff")  # not text: not this evaluation
        with contextlib.ExitStack() as other:
            assert output.open_directory(other, config, checkpoint, None) not in (first, second)
        with contextlib.ExitStack() as other, pytest.raises(ConfigError, match="out: another process writes to"):
            output.open_directory(other, config, checkpoint, tmp_path / "out")
    with contextlib.ExitStack() as other:
        assert output.open_directory(other, config, checkpoint, None) == first


def test_a_checkpoint_may_be_removed_by_a_training_meanwhile(run, monkeypatch, capsys):
    """It is removed between finding and loading. Then the newest is searched again; a named checkpoint is an error."""
    older, newest = (run / "checkpoints" / step for step in "24")
    load_params = loading.load_params

    kept = shutil.copytree(run, run.parent / "kept")
    aside = newest.rename(run.parent / "aside")
    flags = ["eval.py", "--num_examples=1", "--no_save_grid"]

    def training_goes_on(model, checkpoint):
        if checkpoint.step == 2:
            aside.rename(newest)
            shutil.rmtree(older)
        return load_params(model, checkpoint)

    monkeypatch.setattr(loading, "load_params", training_goes_on)
    monkeypatch.setattr(evaluation, "use_compilation_cache", lambda: None)
    monkeypatch.setattr(sys, "argv", [*flags, f"--logdir={run}"])
    evaluation.main()
    assert "frames, step 4" in capsys.readouterr().out
    run, older, newest = kept, kept / "checkpoints" / "2", kept / "checkpoints" / "8"
    aside = (kept / "checkpoints" / "4").rename(kept.parent / "aside")
    monkeypatch.setattr(sys, "argv", [*flags, f"--logdir={older}"])
    with pytest.raises(SystemExit) as exit:
        evaluation.main()
    assert (
        exit.value.code == 2
        and f"logdir: {older.parent} has no step {older.name}; name one of" in capsys.readouterr().err
    )


# ---------------------------------------------------------------------------------------------- what is shown


def test_videos_are_written_for_the_examples_on_the_page(run, tmp_path):
    """Also if the training saved none."""
    assert not configuration.load(run / "config.yml").save_gifs
    flags = ["--no_save_grid", "--num_examples=5", "--format=pdf,mp4"]
    directory, found = evaluate(run, *flags)
    videos = {str(path.relative_to(directory)) for path in directory.glob("*/*.mp4")}
    assert videos == {path for example in found["examples"] for path in example["videos"]}
    assert len(videos) in (4, 5) and videos >= set(found["videos"].values()) and not list(directory.glob("*/*.gif"))
    assert all(f'<a href="{path}">mp4</a>' in (directory / "index.html").read_text() for path in videos)
    assert {path.suffix for path in directory.glob("*paper*")} == {".png", ".pdf"}
    directory, _ = evaluate(run, *flags[:-1], "--videos=all")
    assert len(list(directory.glob("*/random_sample_1.gif"))) == 5
    for flag, message in (
        ("--videos=some", "videos: must be one of shown, all, got 'some'"),
        ("--format=jpg", "format: must be a list of png, pdf, gif, mp4, got 'jpg'"),
        ("--videos=all", "save_gifs: false writes no videos, but --videos all asks for some; leave out one of the two"),
        (
            "--format=pdf,mp4",
            "save_gifs: false writes no videos, but --format pdf,mp4 asks for some; leave out one of the two",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluation.parse(["--logdir", str(run), "--save_gifs=false", flag])


def test_examples_csv_has_one_row_per_example(run):
    directory, found = evaluate(run, "--num_samples=2", "--no_save_grid")
    with (directory / "examples.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["example"] for row in rows] == ["0", "1", "2"]
    for line, key in (
        ("best of 2", "paper_ssim"),
        ("mean of 2", "paper_ssim_mean"),
        ("last context frame", "paper_ssim_copy"),
    ):
        average = found["lines"]["paper"]["ssim"][line]["average"]["value"]
        assert np.mean([float(row[key]) for row in rows]) == pytest.approx(average, rel=1e-5)


def test_an_evaluation_of_one_sequence_has_no_intervals(run, capsys):
    directory, _ = evaluate(run, "--num_examples=1", "--no_save_grid")
    printed, page = capsys.readouterr().out, (directory / "index.html").read_text()
    assert "Averages over 1 sequence and 8 predicted frames, step 4:" in printed and " to " not in printed
    assert "1 test sequence;" in page and "95 %" not in page and " to " not in page.split("</script>")[1]


def test_frames_of_one_sample_are_not_copied():
    frames = np.zeros((2, 3, 64, 64, 1), np.uint8)
    metrics = {protocol: {name: np.zeros((2, 3)) for name in ("ssim", "psnr")} for protocol in similarity.PROTOCOLS}
    samples = evaluation.Samples(1, {})
    samples.add(0, evaluation.Prediction(context := frames[:, :1], frames, metrics))
    assert samples.frames.keys() == {"context", "random_sample_1"}
    assert samples.frames["random_sample_1"] is frames and samples.frames["context"] is context
    assert set(samples.metrics) == {
        f"{protocol}_{name}" for protocol in similarity.PROTOCOLS for name in ("ssim", "psnr")
    }


def test_an_evaluation_is_logged_to_the_wandb_of_its_run(run, monkeypatch, capsys):
    """After the last step of the training, unless it still runs. If wandb fails, the evaluation doesn't."""
    logged = []

    class WandbRun:
        step = 0

        def log(self, values, step):
            logged.append((step, values))

    flags = ["--num_examples=1", "--no_save_grid"]
    monkeypatch.setattr(logs, "start_wandb", lambda config, directory: WandbRun())
    evaluate(run, *flags, "--wandb=offline")
    (run / "wandb_id").write_text("abc")
    evaluate(run, *flags)
    assert not logged  # without a run there, or disabled
    _, found = evaluate(run, *flags, "--wandb=offline")
    ((step, values),) = logged
    assert step == 5 and values["evaluation/checkpoint_step"] == 4
    assert values["evaluation/paper_ssim"] == found["averages"]["paper"]["ssim"]
    assert sum("best: example 0" in name for name in values) == 1
    with runs.locked(run):
        evaluate(run, *flags, "--wandb=offline")
    assert len(logged) == 1 and "wandb: the evaluation isn't logged, since" in capsys.readouterr().out
    monkeypatch.setattr(logs, "start_wandb", lambda *_: 1 / 0)
    evaluate(run, *flags, "--wandb=offline")
    assert "Warning: wandb failed (division by zero); the evaluation isn't logged there" in capsys.readouterr().out

"""LPIPS and FVD: the Fréchet distance, the metrics of networks' outputs, and networks from TorchScript files.

Networks are plain functions here. Tests with TorchScript files need PyTorch, which tests/requirements.txt leaves out for
its size: pip install -r requirements-perceptual.txt.
"""

import contextlib
import csv
import json
import re
import sys

import numpy as np
import pytest
import scipy.linalg
from helpers import evaluate, write_evaluation

import eval as evaluation
import tools
from analyses import compare
from analyses.perceptual import perceptual as add
from config import ConfigError
from metrics import perceptual, similarity
from metrics.perceptual import Network, frechet_distance, gaussian_distance
from report import output, results, statistics

# ---------------------------------------------------------------------------------------------- Fréchet distance


def test_the_distance_of_gaussians_equals_its_closed_form():
    """For commuting covariances: |m - n|^2 + the sum of (sqrt(a_i) - sqrt(b_i))^2 over their eigenvalues."""
    random = np.random.default_rng(0)
    basis = scipy.linalg.qr(random.normal(size=(30, 30)))[0]
    a, b = random.gamma(1.0, size=(2, 30))
    a[:10] = b[5:15] = 0  # neither can be inverted
    m, n = random.normal(size=(2, 30))
    got = gaussian_distance(m, (basis * a) @ basis.T, n, (basis * b) @ basis.T)
    assert got == pytest.approx(((m - n) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-6)
    assert gaussian_distance(m, np.diag(a), m, np.diag(a)) == pytest.approx(0, abs=1e-6)
    assert gaussian_distance(np.zeros(1), np.array([[4.0]]), np.ones(1), np.array([[9.0]])) == pytest.approx(1 + 1)


def test_the_distance_equals_the_one_with_a_matrix_root():
    random = np.random.default_rng(0)
    x, y = random.normal(size=(2, 50, 20)) @ random.normal(size=(20, 20))
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    want = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * np.real(scipy.linalg.sqrtm(a @ b)))
    assert frechet_distance(x, y) == pytest.approx(want, rel=1e-8)


def test_the_distance_is_correct_for_fewer_clips_than_features():
    """The trace of the root is the nuclear norm of the product of the centred features."""
    x, y = np.random.default_rng(0).normal(size=(2, 7, 400)).astype(np.float32)
    a, b = (features.astype(float) - features.astype(float).mean(0) for features in (x, y))
    shift = ((x.mean(0, dtype=float) - y.mean(0, dtype=float)) ** 2).sum()
    root = scipy.linalg.svdvals(a @ b.T).sum() / 6
    want = shift + (a**2).sum() / 6 + (b**2).sum() / 6 - 2 * root
    assert frechet_distance(x, y) == pytest.approx(want, rel=1e-6)
    assert frechet_distance(x, x + np.float32(0.5)) == pytest.approx(400 * 0.25, rel=1e-4)


# ---------------------------------------------------------------------------------------------- plain networks


def distances(truth, prediction):
    assert truth.dtype == prediction.dtype == np.uint8 and truth.shape == prediction.shape and len(truth) <= 64
    return np.abs(truth.astype(float) - prediction).mean((1, 2, 3)) / 255


def features(clips):
    """Return the means of 400 blocks of pixels over time."""
    assert clips.dtype == np.uint8
    N, T, H, W, C = clips.shape
    return clips[:, :, :60, :60].reshape(N, T, 20, 3, 20, 3, C).mean((1, 3, 5, 6)).reshape(N, 400)


@pytest.fixture
def networks(monkeypatch):
    """Replace the files' networks by plain functions, and make PyTorch unavailable. Return the flags."""
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(perceptual, "load_lpips", lambda path: Network(path.name, f"lpips {path}", distances))
    monkeypatch.setattr(perceptual, "load_fvd", lambda path: Network(path.name, f"fvd {path}", features))
    return ["--lpips=vgg16.pt", "--fvd=i3d_torchscript.pt"]


def test_lpips_in_batches_equals_lpips_of_each_frame():
    truth, prediction = np.random.default_rng(0).integers(256, size=(2, 3, 50, 8, 8, 3), dtype=np.uint8)
    got = perceptual.lpips(Network("", "", distances), truth, prediction)
    np.testing.assert_allclose(got, np.abs(truth.astype(float) - prediction).mean((2, 3, 4)) / 255, rtol=1e-6)
    assert got.shape == (3, 50)


def test_fvd_equals_a_computation_by_hand(tmp_path):
    """Of the first 16 frames and of all 18, between the truth and the first sample."""
    random = np.random.default_rng(0)
    clips = random.integers(256, size=(2, 5, 18, 64, 64, 1), dtype=np.uint8)
    for i in range(5):
        for name, frames in ("gt_pred", clips[0, i]), ("random_sample_1", clips[1, i]), ("random_sample_2", 0):
            path = tmp_path / (f"sample{i}_gt" if name == "gt_pred" else f"sample{i}") / f"{name}.npz"
            path.parent.mkdir(exist_ok=True)
            tools.save_frames(np.asarray(frames), path)
    got = perceptual.compute_fvd(Network("", "", features), tmp_path, 5)
    assert got["clips"] == 5 and list(got["frames"]) == ["16", "18"]
    for length in 16, 18:
        want = frechet_distance(features(clips[0, :, :length]), features(clips[1, :, :length]))
        assert got["frames"][str(length)] == pytest.approx(want, rel=1e-5)
    assert got["frames"]["16"] > got["frames"]["18"] > 1


def evaluate_21_frames(run, *flags):
    return evaluate(run, "--no_save_grid", "--eval_seq_len=21", *flags)


def test_lpips_and_fvd_are_the_same_during_an_evaluation_and_after(run, networks, capsys):
    """The values and files are the same. Without both flags, nothing mentions them."""
    during, found = evaluate_21_frames(run, *networks)
    printed = capsys.readouterr().out
    assert "Warning: FVD of 3 clips. With fewer than 256 clips it is much too high" in printed
    assert "LPIPS, prediction: 0." in printed and "FVD, 16 frames, 3 clips: " in printed
    after, without = evaluate_21_frames(run)
    assert "perceptual" not in json.dumps(without) and "LPIPS" not in (after / "index.html").read_text()
    assert "LPIPS" not in capsys.readouterr().out
    add([str(after), *networks])
    assert "FVD, 17 frames, 3 clips: " in capsys.readouterr().out
    names = {path.name for path in during.iterdir()}
    assert names == {path.name for path in after.iterdir()} and "lpips_perceptual.png" in names
    for name in "metrics.csv", "examples.csv", "index.html", "lpips_perceptual_mean.npz", "sample2/metrics.npz":
        assert (during / name).read_bytes() == (after / name).read_bytes(), name
    saved = json.loads((after / "metrics.json").read_text())
    assert saved == json.loads((during / "metrics.json").read_text())
    truth, sample = (
        np.stack([results.load_frames(after, i, name) for i in range(3)]) for name in ("gt_pred", "random_sample_1")
    )
    want = np.abs(truth.astype(float) - sample).mean((2, 3, 4)) / 255
    line = saved["lines"]["perceptual"]["lpips"]["prediction"]
    np.testing.assert_allclose(line["curve"]["value"], want.mean(0), rtol=1e-5)
    assert line["average"]["low"] < saved["averages"]["perceptual"]["lpips"] < line["average"]["high"]
    fvd = saved["perceptual"]["fvd"]
    assert fvd["file"] == "i3d_torchscript.pt" and fvd["clips"] == 3 and list(fvd["frames"]) == ["16", "17"]
    assert fvd["frames"]["17"] == pytest.approx(frechet_distance(features(truth), features(sample)), rel=1e-5)
    assert saved["averages"]["perceptual"]["fvd"] == found["averages"]["perceptual"]["fvd"] == fvd["frames"]["17"]
    page = (after / "index.html").read_text()
    assert "FVD, 17 frames" in page and "3 (fewer than 256)" in page and 'src="lpips_perceptual.png"' in page
    with (after / "metrics.csv").open() as file:
        rows = {(row["metric"], row["frames"]): row["value"] for row in csv.DictReader(file)}
    assert float(rows["fvd", "1-16"]) == fvd["frames"]["16"]
    assert float(rows["lpips", "1-17"]) == line["average"]["value"]
    add([str(after), "--fvd=other.pt"])  # LPIPS stays
    again = json.loads((after / "metrics.json").read_text())
    assert again["lines"] == saved["lines"] and again["perceptual"]["fvd"]["file"] == "other.pt"


def test_the_best_lpips_is_the_lowest(run, networks):
    directory, found = evaluate_21_frames(run, *networks, "--num_samples=2", "--num_examples=2")
    truth = np.stack([results.load_frames(directory, i, "gt_pred") for i in range(2)])
    samples = [np.stack([results.load_frames(directory, i, f"random_sample_{n}") for i in range(2)]) for n in (1, 2)]
    each = np.stack([np.abs(truth.astype(float) - frames).mean((1, 2, 3, 4)) / 255 for frames in samples])
    lines = found["lines"]["perceptual"]["lpips"]
    assert list(lines) == ["best of 2", "mean of 2"]
    assert lines["best of 2"]["average"]["value"] == pytest.approx(each.min(0).mean(), rel=1e-4)
    assert lines["mean of 2"]["average"]["value"] == pytest.approx(each.mean(), rel=1e-4)
    with pytest.raises(ConfigError, match=r"lpips: needs all 2 samples, and .* has only some of them"):
        add([str(directory), "--lpips=vgg16.pt"])
    add([str(directory), "--fvd=i3d_torchscript.pt"])


def test_an_evaluation_with_another_network_is_not_resumed(run, networks):
    """An interrupted evaluation has already written the LPIPS of some examples."""
    config, checkpoint, _ = evaluation.parse(["--logdir", str(run)])
    found = []
    for network in "", "a", "b", "", "b":
        with contextlib.ExitStack() as held:
            found.append(output.open_directory(held, config, checkpoint, None, network))
    assert len(set(found)) == 3 and found[3] == found[0] and found[4] == found[2]


def test_fvd_of_too_few_frames_or_sequences_is_refused(run, networks):
    for more in ["--eval_seq_len=19"], ["--num_examples=1"]:
        with pytest.raises(
            ConfigError, match=r"fvd: needs at least 16 predicted frames of at least 2 sequences, got 1"
        ):
            evaluate_21_frames(run, *networks, *more)
    assert not list(run.glob("eval_*"))


@pytest.mark.parametrize(
    "length, message", [(19, "got 15 of 3"), (4, "open_loop_ctx: must be less than 4, the frames of a test")]
)
def test_frames_of_whole_videos_are_counted_for_fvd(run, networks, monkeypatch, length, message):
    monkeypatch.setattr(evaluation.data, "windows", lambda config, split: np.zeros((3, length, 64, 64, 1), np.uint8))
    with pytest.raises(ConfigError, match=message):
        evaluate_21_frames(run, *networks, "--eval_seq_len=0", "--open_loop_ctx=4")
    assert not list(run.glob("eval_*"))


def test_wrong_arguments_of_perceptual_are_refused(tmp_path, networks):
    directory, whole = write_evaluation(tmp_path / "a", 0), write_evaluation(tmp_path / "b", 0)
    for number in 0, 2, 3:
        for name in "sample1_gt", "sample1":
            (whole / name.replace("1", str(number))).symlink_to(whole / name)
    results.save_metrics(whole, 1, {})
    for arguments, message in (
        ([], "no directory is named; call analysis.py perceptual RUN"),
        ([str(directory)], "name the file of a network with --lpips or --fvd"),
        ([str(directory), "--out=x"], "unknown argument '--out=x'"),
        ([str(directory), networks[0]], "gt_pred.npz: is missing; evaluate again with eval.py"),
        ([str(whole), networks[1]], "fvd: needs at least 16 predicted frames of at least 2 sequences, got 12 of 4"),
        ([str(tmp_path), networks[0]], "holds no run"),
    ):
        with pytest.raises(ConfigError, match=message):
            add(arguments)
    with contextlib.ExitStack() as held:
        output.lock(held, directory)
        with pytest.raises(ConfigError, match="a is in use by another process; wait for it"):
            add([str(directory), networks[0]])


def test_a_missing_pytorch_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    for load, key in (perceptual.load_lpips, "lpips"), (perceptual.load_fvd, "fvd"):
        with pytest.raises(ConfigError, match=rf"^{key}: PyTorch can't be imported \(.*\); pip install -r req[^\n]*$"):
            load("a.pt")


# ---------------------------------------------------------------------------------------------- comparisons


def with_perceptual(directory, lpips=None, fvd=None, sha256="x"):
    """Write planted LPIPS and FVD into an evaluation."""
    path = directory / "metrics.json"
    found = json.loads(path.read_text())
    found["perceptual"] = {}
    if lpips is not None:
        lines = {"prediction": statistics.summary(np.full((4, 12), lpips))}
        found["lines"]["perceptual"] = {"lpips": lines}
        found["perceptual"]["lpips"] = {"file": "vgg16.pt", "sha256": sha256}
    if fvd is not None:
        found["perceptual"]["fvd"] = {"file": "i3d", "sha256": "y", "clips": 4, "frames": {"12": fvd}}
    path.write_text(json.dumps(found))


def test_ranks_include_lpips_and_fvd(tmp_path):
    """Lower LPIPS and FVD are better. A dataset without them counts only by SSIM and PSNR."""
    out = []
    for dataset in "digits", "mmnist":
        paths = [write_evaluation(tmp_path / dataset / n, i, dataset=dataset) for i, n in enumerate("ab")]
        if dataset == "digits":
            with_perceptual(paths[0], lpips=0.25, fvd=300.0)
            with_perceptual(paths[1], lpips=0.5, fvd=200.0)
        out.append(tmp_path / dataset / "out")
        compare.compare([*(f"{path.name}={path}" for path in paths), f"--out={out[-1]}"])
    found = json.loads((out[0] / "comparison.json").read_text())
    for protocol in similarity.PROTOCOLS:
        scores, ranks = found["scores"][protocol], found["ranks"][protocol]
        assert scores["a"]["lpips"] == 0.25 and scores["b"]["fvd"] == 200
        assert (ranks["a"]["lpips"], ranks["b"]["lpips"], ranks["a"]["fvd"], ranks["b"]["fvd"]) == (1, 2, 2, 1)
        for name in "ab":
            places = [ranks[name][metric] for metric in ("ssim", "psnr", "lpips", "fvd")]
            assert ranks[name]["average"] == np.mean(places)
            better = scores[name]["ssim"] > scores["ab".replace(name, "")]["ssim"]
            assert ranks[name]["ssim"] == 2 - better
    markdown = (out[0] / "comparison.md").read_text()
    assert "| b | 0.5000 | 0.5000 |" in markdown and "| b | 200.0 | 4 (fewer than 256) |" in markdown
    assert "LPIPS" not in (out[1] / "comparison.md").read_text() and (out[0] / "lpips_perceptual.png").exists()
    with (out[0] / "comparison.csv").open() as file:
        rows = {(row["metric"], row["line"], row["frames"]): row["value"] for row in csv.DictReader(file)}
    assert rows["fvd", "a", "1-12"] == "300.0" and rows["lpips", "b", "7"] == "0.5"
    compare.ranks([*map(str, out), f"--out={tmp_path / 'ranks'}"])
    with (tmp_path / "ranks" / "ranks.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["protocol"] == "paper"]
    assert len(rows) == 2 * (4 + 2 + 1)
    for name in "ab":
        own = [row for row in rows if row["model"] == name]
        assert float(own[-1]["rank"]) == pytest.approx(np.mean([float(row["rank"]) for row in own[:-1]]))
        (fvd,) = [row for row in own if row["metric"] == "fvd"]
        assert (fvd["dataset"], fvd["score"], fvd["rank"]) == {
            "a": ("digits", "300.0", "2.0"),
            "b": ("digits", "200.0", "1.0"),
        }[name]
    tables = (tmp_path / "ranks" / "ranks.md").read_text()
    assert "| dataset | model | SSIM ↑ | PSNR (dB) ↑ | LPIPS ↓ | FVD ↓ |" in tables
    assert re.search(r"\| digits \(4 sequences\) \| a \| 0\.\d{4} \| 0\.\d\d \| 0\.2500 \| 300\.0 \|", tables)
    assert re.search(r"\| mmnist \(4 sequences\) \| b \| 0\.\d{4} \| 0\.\d\d \| - \| - \|", tables)


def test_metrics_that_only_some_models_have_are_left_out(tmp_path, capsys):
    paths = [write_evaluation(tmp_path / name, i, frames=False) for i, name in enumerate("ab")]
    call = [f"{path.name}={path}" for path in paths]
    with_perceptual(paths[0], lpips=0.25, fvd=300.0)
    with_perceptual(paths[1], fvd=200.0)
    compare.compare([*call, f"--out={tmp_path / 'some'}"])
    assert (
        "LPIPS is left out, since b has none; measure it with: python analysis.py perceptual" in capsys.readouterr().out
    )
    found = json.loads((tmp_path / "some" / "comparison.json").read_text())
    assert list(found["scores"]["paper"]["a"]) == ["ssim", "psnr", "fvd"]
    with_perceptual(paths[1], lpips=0.5, sha256="z")
    with pytest.raises(ConfigError, match=r"lpips: a was measured with vgg16.pt, b with vgg16.pt, another network"):
        compare.compare([*call, f"--out={tmp_path / 'other'}"])
    comparison = tmp_path / "some" / "comparison.json"
    comparison.write_text(json.dumps({key: value for key, value in found.items() if key != "scores"}))
    with pytest.raises(ConfigError, match=r"has no scores .*; compare again"):
        compare.ranks([str(tmp_path / "some"), f"--out={tmp_path / 'ranks'}"])


# ---------------------------------------------------------------------------------------------- TorchScript files


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Write tiny networks with the usual signatures, which return an image's corner pixel or a clip's first 400 values."""
    torch = pytest.importorskip("torch", reason="needs requirements-perceptual.txt", exc_type=ImportError)
    folder = tmp_path_factory.mktemp("networks")

    class LPIPS(torch.nn.Module):
        def forward(self, image, resize_images: bool = True, return_lpips: bool = False):
            assert not resize_images and return_lpips and image.ndim == 4 and image.shape[1] == 3
            return image[:, :, 0, 1] * torch.tensor([1.0, 2.0, 4.0], device=image.device)

    class I3D(torch.nn.Module):
        def forward(self, clip, rescale: bool = False, resize: bool = False, return_features: bool = False):
            assert rescale and resize and return_features and clip.shape[1] == 3 and clip.shape[2] >= 16
            return clip.flatten(1)[:, :400] / 127.5 - 1

    class Few(I3D):
        def forward(self, clip, rescale: bool = False, resize: bool = False, return_features: bool = False):
            return clip.flatten(1)[:, :10]

    class NotFinite(I3D):
        def forward(self, clip, rescale: bool = False, resize: bool = False, return_features: bool = False):
            return torch.log(clip.flatten(1)[:, :400] - 1)

    class Single(torch.nn.Module):
        def forward(self, image, resize_images: bool = True, return_lpips: bool = False):
            return image.mean()

    for network in LPIPS, I3D, Few, NotFinite, Single:
        torch.jit.script(network()).save(str(folder / f"{network.__name__}.pt"))
    torch.save({"weight": torch.zeros(2)}, folder / "weights.pt")
    (folder / "text.pt").write_text("no network")
    (folder / "half.pt").write_bytes((folder / "I3D.pt").read_bytes()[:1000])
    return folder


def test_the_lpips_network_of_a_file_is_called_correctly(files):
    """It gets channels first, in order, from 0 to 255, and grey frames as three equal channels."""
    network = perceptual.load(files / "LPIPS.pt", None, 1, 1).lpips
    truth, prediction = np.random.default_rng(0).integers(256, size=(2, 70, 8, 8, 3), dtype=np.uint8)
    difference = truth[:, 0, 1].astype(float) - prediction[:, 0, 1]
    want = (difference**2 * [1, 4, 16]).sum(-1)
    np.testing.assert_allclose(perceptual.lpips(network, truth, prediction), want, rtol=1e-5)
    got = perceptual.lpips(network, truth[..., :1], prediction[..., :1])
    np.testing.assert_allclose(got, 21 * difference[:, 0] ** 2, rtol=1e-5)
    assert network.file == "LPIPS.pt" and len(network.sha256) == 64


def test_the_features_network_of_a_file_is_called_correctly(files):
    """The network gets channels first, then time."""
    network = perceptual.load(None, files / "I3D.pt", 16, 2).fvd
    clips = np.random.default_rng(0).integers(256, size=(2, 20, 8, 8, 3), dtype=np.uint8)
    want = clips[..., 0].reshape(2, -1)[:, :400] / 127.5 - 1
    got = network.apply(clips)
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert got.dtype == np.float64


@pytest.mark.parametrize(
    "key, name, message",
    [
        ("lpips", "nowhere.pt", r"nowhere.pt can't be read \(No such file or directory\); name a TorchScript file"),
        ("lpips", "", r"can't be read \(Is a directory\)"),
        ("lpips", "text.pt", r"text.pt isn't a TorchScript file \(.+\)"),
        ("fvd", "weights.pt", r"weights.pt isn't a TorchScript file \(.+\)"),
        ("fvd", "half.pt", r"half.pt isn't a TorchScript file \(.+\)"),
        ("lpips", "I3D.pt", r"can't be called with \(resize_images=False, return_lpips=True\): Unknown keyword"),
        ("fvd", "LPIPS.pt", r"can't be called with \(rescale=True, resize=True, return_features=True\): "),
        ("fvd", "Few.pt", r"returns 10 features of a clip, not 400; name the I3D network's file"),
        ("fvd", "NotFinite.pt", r"returns values that aren't finite"),
        ("lpips", "Single.pt", r"must return a vector for each of 1 inputs, got Tensor"),
    ],
)
def test_a_wrong_network_file_is_refused(files, key, name, message):
    paths = {"lpips": None, "fvd": None, key: files / name}
    with pytest.raises(ConfigError, match=message) as error:
        perceptual.load(**paths, frames=16, clips=2)
    assert str(error.value).startswith(f"{key}: ") and "\n" not in str(error.value)


def test_a_networks_own_error_is_one_line(files):
    network = perceptual.load(None, files / "I3D.pt", 16, 2).fvd
    with pytest.raises(ConfigError, match=r"^fvd: .*I3D.pt can't be called with [^\n]*AssertionError[^\n]*$"):
        network.apply(np.zeros((1, 8, 8, 8, 3), np.uint8))


def test_an_evaluation_can_use_files_of_networks(files, run):
    directory, found = evaluate_21_frames(
        run, f"--lpips={files / 'LPIPS.pt'}", f"--fvd={files / 'I3D.pt'}", "--num_examples=2"
    )
    truth, sample = (
        np.stack([results.load_frames(directory, i, name) for i in range(2)]) for name in ("gt_pred", "random_sample_1")
    )
    want = 21 * ((truth[:, :, 0, 1, 0].astype(float) - sample[:, :, 0, 1, 0]) ** 2).mean()
    assert found["averages"]["perceptual"]["lpips"] == pytest.approx(want, rel=1e-5, abs=1e-9)
    a, b = (clips.reshape(2, -1)[:, :400] / 127.5 - 1 for clips in (truth, sample))
    assert found["averages"]["perceptual"]["fvd"] == pytest.approx(frechet_distance(a, b), rel=1e-4, abs=1e-6)

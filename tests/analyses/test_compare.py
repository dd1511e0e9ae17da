"""Comparisons, ranks, losses over steps and averages over seeds, from planted files."""

import json

import numpy as np
import pytest
from helpers import write_evaluation
from PIL import Image

import config as configuration
from analyses import compare, curves, digits, seeds
from config import ConfigError
from report import plots


def test_a_comparison_shows_models_side_by_side_in_a_video(tmp_path, capsys):
    """The truth and both predictions, after the models' reconstructions of the context."""
    paths = [f"{name}={write_evaluation(tmp_path / name, i)}" for i, name in enumerate("ab")]
    compare.compare([*paths, f"--out={tmp_path / 'out'}", "--example=1"])
    with Image.open(tmp_path / "out" / "example_1.gif") as gif:
        assert gif.n_frames == 48 and gif.size == (2 * 3 * 68, 2 * (68 + 2 * 14))
        for t, shown in (35, [0, 50, 51]), (36, [0, 100, 101]):
            gif.seek(t)
            frame = np.asarray(gif.convert("RGB")).astype(int)
            np.testing.assert_allclose([frame[100, 2 * (34 + 68 * i), 0] for i in range(3)], shown, atol=3)
    compare.compare([*paths, f"--out={tmp_path / 'none'}", "--format=pdf"])  # example 0 has no frames
    assert "Videos of example 0 are left out, since" in capsys.readouterr().out
    assert not list((tmp_path / "none").glob("example_0*"))
    assert {path.suffix for path in (tmp_path / "none").iterdir()} == {".pdf", ".png", ".md", ".csv", ".json", ".html"}


def test_predictions_of_different_videos_are_refused(tmp_path):
    paths = [f"{name}={write_evaluation(tmp_path / name, 0, truth=i)}" for i, name in enumerate("ab")]
    with pytest.raises(ConfigError, match=r"example: 1 of .*b is another video; evaluate on the same data"):
        compare.compare([*paths, f"--out={tmp_path / 'out'}", "--example=1"])
    assert not (tmp_path / "out").exists()


def test_results_without_a_configuration_are_refused(tmp_path):
    path = write_evaluation(tmp_path / "a", 0)
    results = json.loads((path / "metrics.json").read_text())
    (path / "metrics.json").write_text(json.dumps(results | {"config": 5}))
    with pytest.raises(ConfigError, match=r"metrics\.json: must hold `key: value` lines, got int"):
        compare.compare([str(path), f"--out={tmp_path / 'out'}"])


@pytest.mark.parametrize("content", ["null", "[1]", "5", '{"lines": {}}'])
def test_damaged_results_are_named(tmp_path, content):
    path = write_evaluation(tmp_path / "a", 0)
    (path / "metrics.json").write_text(content)
    with pytest.raises(ConfigError, match=r"metrics.json: has no (lines|protocols) .*; evaluate again"):
        compare.compare([str(path), f"--out={tmp_path / 'out'}"])
    (path / "comparison.json").write_text(content.replace("lines", "scores"))
    with pytest.raises(ConfigError, match=r"comparison.json: has no (scores|ranks) .*; compare again"):
        compare.ranks([str(path), f"--out={tmp_path / 'out'}"])


def test_damaged_frames_are_named(tmp_path):
    path = write_evaluation(tmp_path / "a", 0)
    file = path / "sample1" / "random_sample_1.npz"
    whole = file.read_bytes()
    for content in b"", whole[: len(whole) // 2]:
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=rf"{file} is damaged .*; delete {file.parent}, and evaluate again"):
            compare.compare([str(path), f"--out={tmp_path / 'out'}", "--example=1"])


def test_ranks_without_intervals_have_no_error_bars(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path, formats: figures.append(figure))
    plots.plot_bars({"a": {"x": (1.0, 1.0, 1.0)}, "b": {"x": (1.0, 0.5, 1.5)}}, tmp_path / "a.png", "rank")
    without, with_errors = figures[0].axes
    assert len(without.containers) == 1 and len(with_errors.containers) == 2


def test_losses_of_stages_are_one_curve(tmp_path, capsys):
    """Steps continue from the checkpoint that a run started from. Lines after that checkpoint belong to no later run."""
    for name, source, steps in ("a", None, (2, 4, 6)), ("b", "a/checkpoints/4", (1, 3)), ("c", "b", (2,)):
        run = tmp_path / name
        (run / "checkpoints" / "3").mkdir(parents=True)
        (run / "config.yml").write_text(
            configuration.Config(seed=0, init_from=source and str(tmp_path / source)).to_yaml()
        )
        (run / "metrics.jsonl").write_text("".join(json.dumps({"step": step, "name": name}) + "\n" for step in steps))
    (tmp_path / "a" / "checkpoints" / "4").mkdir()
    expected = [(2, "a"), (4, "a"), (5, "b"), (7, "b"), (9, "c")]
    assert [(line["step"], line["name"]) for line in curves.read_log(tmp_path / "c")] == expected
    (tmp_path / "a").rename(tmp_path / "elsewhere")
    assert [line["step"] for line in curves.read_log(tmp_path / "c")] == [1, 3, 5]
    (tmp_path / "c" / "config.yml").write_text("")
    with pytest.raises(ConfigError, match=r"c/config.yml is damaged \(it is empty\)"):
        curves.curves([f"c={tmp_path / 'c'}", f"--out={tmp_path / 'out'}"])
    with pytest.raises(ConfigError, match=r"b: step 1 of its metrics.jsonl has no number as train/loss; remove"):
        curves.curves([f"b={tmp_path / 'b'}", f"--out={tmp_path / 'out'}"])
    assert "whose steps are left out" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- several seeds


def write_digits(directory, **curves):
    """Write the file of `digits` that `seeds` reads: shares of right frames."""
    directory.mkdir()
    digits.write_curves({name: np.array(values) for name, values in curves.items()}, directory / "digits.npz")
    return str(directory)


def test_models_are_averaged_over_seeds(tmp_path, capsys):
    """A model that is only in one directory is left out."""
    random = np.random.default_rng(0)
    values = random.uniform(size=(5, 4, 12))
    found = [
        write_digits(tmp_path / "0", a=values[0], b=values[1], c=values[0]),
        write_digits(tmp_path / "1", a=values[2], b=values[3]),
        write_digits(tmp_path / "2", a=values[4]),
    ]
    seeds.seeds([*found, f"--out={tmp_path / 'out'}"])
    results = json.loads((tmp_path / "out" / "identities.json").read_text())
    assert list(results["lines"]) == ["a", "b"]
    assert results["seeds"]["a"] == pytest.approx(values[[0, 2, 4]].mean((1, 2)), abs=1e-5)
    average = results["lines"]["a"]["average"]
    assert average["value"] == pytest.approx(values[[0, 2, 4]].mean(), abs=1e-5)
    assert average["low"] < average["value"] < average["high"]
    difference = results["differences"]["a - b"]
    assert difference["value"] == pytest.approx(values[[0, 2, 4]].mean() - values[[1, 3]].mean(), abs=1e-5)
    assert difference["low"] < difference["value"] < difference["high"]
    printed = capsys.readouterr().out
    assert "Left out, since only one directory has them: c\n" in printed
    assert f"\na: {', '.join(f'{value:.3f}' for value in results['seeds']['a'])}\n" in printed
    assert f"\na - b: {difference['value']:.3f} (" in printed
    assert (tmp_path / "out" / "identities.png").exists() and (tmp_path / "out" / "identities.csv").exists()


def test_seeds_that_cannot_be_compared_are_refused(tmp_path):
    short = write_digits(tmp_path / "short", a=np.ones((4, 11)))
    long = write_digits(tmp_path / "long", a=np.ones((4, 12)))
    other = write_digits(tmp_path / "other", b=np.ones((4, 12)))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "digits.npz").touch()
    for directories, message in (
        ([short, long], r"differ in videos and frames, \[\(4, 11\), \(4, 12\)\]"),
        ([long, other], "no model is in two of the directories"),
        ([long, long], "a directory is named twice"),
        ([long, str(tmp_path / "empty")], r"digits\.npz can't be read; name a directory that analysis.py digits wrote"),
        ([long, str(tmp_path)], r"digits\.npz can't be read; name a directory that analysis.py digits wrote"),
    ):
        with pytest.raises(ConfigError, match=message):
            seeds.seeds([*directories, f"--out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()

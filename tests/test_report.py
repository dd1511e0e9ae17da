"""Statistics against numpy and scipy; tables and text by reading them back."""

import csv
import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
from conftest import ROOT

from report import plots, statistics, tables
from report.page import page


def test_intervals_are_those_of_scipy():
    values = np.random.default_rng(1).gamma(2.0, size=(40, 3))
    got = statistics.estimate(values, resamples=20_000)
    want = scipy.stats.bootstrap((values,), np.mean, axis=0, n_resamples=20_000, method="percentile", rng=2)
    np.testing.assert_allclose(got["value"], values.mean(0))
    np.testing.assert_allclose(got["low"], want.confidence_interval.low, rtol=0.02)
    np.testing.assert_allclose(got["high"], want.confidence_interval.high, rtol=0.02)


def test_intervals_cover_the_mean_as_often_as_they_say():
    """300 experiments of 50 examples each, at once: 95 % of the intervals hold the true mean."""
    values = np.random.default_rng(0).normal(3, 2, (50, 300))
    got = statistics.estimate(values)
    assert 0.9 < ((got["low"] <= 3) & (got["high"] >= 3)).mean() < 0.98


def test_one_example_has_no_spread():
    got = statistics.estimate(np.array([[1.5, 2.5]]))
    assert all(got[key].tolist() == [1.5, 2.5] for key in ("value", "low", "high"))


def test_intervals_over_seeds_and_examples():
    """Where all seeds are alike, those over the examples; where all examples are, those over the seeds. Where seeds and
    examples add up, so do the variances; of the difference from a model that errs on the same examples, the seeds'."""
    random = np.random.default_rng(2)
    seeds, examples = random.normal(size=(9, 1, 1)), random.normal(size=(1, 40, 1))
    ones = np.ones((9, 40, 1))

    def width(found):
        assert found["low"] < found["value"] < found["high"]
        return float((found["high"] - found["low"])[0])

    alone = [width(statistics.estimate(x, resamples=20_000)) for x in (seeds[:, 0], examples[0])]
    of_seeds, of_examples, of_both, of_difference = (
        width(statistics.estimate_over_seeds(values, minus, resamples=20_000))
        for values, minus in (
            *((seeds * ones, None), (examples * ones, None), (seeds + examples, None)),
            (seeds + examples, examples[:, :] * ones[:2] + 1),
        )
    )
    assert of_seeds == pytest.approx(alone[0], rel=0.03) and of_examples == pytest.approx(alone[1], rel=0.03)
    assert of_both == pytest.approx(np.hypot(*alone), rel=0.04)
    assert of_difference == pytest.approx(alone[0], rel=0.03)
    difference = statistics.estimate_over_seeds(seeds + examples, examples * ones[:2] + 1)["value"]
    np.testing.assert_allclose(difference, seeds.mean() - 1)
    whole = statistics.summary((seeds + examples) * np.ones(12), statistics.estimate_over_seeds)
    assert whole["average"]["value"] == pytest.approx(float((seeds + examples).mean()), rel=1e-4)


def test_summary_by_hand():
    curves = np.random.default_rng(0).uniform(size=(5, 120))
    got = statistics.summary(curves)
    assert list(got["first"]) == ["10", "50", "100"]
    for d in 10, 50, 100:
        assert got["first"][str(d)]["value"] == pytest.approx(curves[:, :d].mean(), rel=1e-5)
    assert got["average"]["value"] == pytest.approx(curves.mean(), rel=1e-5)
    np.testing.assert_allclose(got["curve"]["value"], curves.mean(0), rtol=1e-5)
    assert got["average"]["low"] < got["average"]["value"] < got["average"]["high"]
    assert list(statistics.summary(curves[:, :9])["first"]) == []


def lines(frames):
    random = np.random.default_rng(0)
    names = "prediction", "last context frame"
    return {
        protocol: {
            metric: {name: statistics.summary(random.uniform(size=(4, frames))) for name in names}
            for metric in statistics.METRICS
        }
        for protocol in ("paper", "standard")
    }


@pytest.mark.parametrize("frames", [12, 50])
def test_csv_holds_every_figure_once(frames):
    made = lines(frames)
    rows = list(csv.DictReader(io.StringIO(tables.to_csv(tables.CSV_HEADER, tables.csv_rows(made)))))
    found = {(r["protocol"], r["metric"], r["line"], r["frames"]): float(r["value"]) for r in rows}
    spans = {12: ["1-10", "1-12"], 50: ["1-10", "1-50"]}[frames]
    assert len(found) == len(rows) == 2 * 2 * 2 * (frames + 2)
    for span in spans:
        assert ("standard", "psnr", "prediction", span) in found
    assert found["paper", "ssim", "prediction", "7"] == made["paper"]["ssim"]["prediction"]["curve"]["value"][6]


def test_table_names_its_protocol():
    header, rows = tables.table(lines(12), "standard")
    assert header == ["line", "SSIM, standard, 12 frames", "first 10", "PSNR (dB), standard, 12 frames", "first 10"]
    assert [row[0] for row in rows] == ["prediction", "last context frame"] and all(len(row) == 5 for row in rows)
    markdown = tables.to_markdown(header, rows).splitlines()
    assert len(markdown) == 4 and all(line.count("|") == 6 for line in markdown)


def test_json_is_whole_and_has_lists_on_one_line():
    results = {"a": [1.5, 2, -3e-7], "text": "[1,\n  2]", "nested": {"b": [[1, 2], [3, 4]], "empty": []}}
    text = tables.to_json(results)
    assert json.loads(text) == results and '"a": [ 1.5, 2, -3e-07 ]' in text


def test_page_escapes_what_it_shows():
    results = {
        "config": {"dataset": "videos", "datadir": "<script>", "open_loop_ctx": 4, "num_samples": 1},
        "checkpoint_step": 1,
        "num_examples": 1,
        "predicted_frames": 12,
        "protocols": {"paper": "a < b", "standard": ""},
        "lines": lines(12),
        "versions": {},
        "videos": {},
    }
    shown = page(results, [])
    assert "<script>" not in shown and "&lt;script&gt;" in shown and "a &lt; b" in shown and "1 sample of each" in shown


def test_intervals_without_extent_are_left_out():
    assert tables.with_interval({"value": 1, "low": 0.5, "high": 1.5}, 2) == "1.00 (0.50 to 1.50)"
    assert tables.with_interval({"value": 1, "low": 1, "high": 1}, 2) == "1.00"


def test_tables_of_one_metric_are_narrow():
    """On the page, each metric has a table of its own: at most eight columns, which a window has room for."""
    made = lines(1000)
    header, rows = tables.table(made, "paper", ["psnr"])
    assert header == ["line", "PSNR (dB), paper, 1000 frames", *(f"first {d}" for d in statistics.DISTANCES)]
    both, _ = tables.table(made, "paper")
    assert len(both) == 2 * len(header) - 1 and all(len(row) == len(header) for row in rows)


def test_running_mean_by_hand():
    values = np.array([1.0, 5, 0, 6, 3, 9])
    np.testing.assert_allclose(plots.running_mean(values, 5), [1, 2, 3, 23 / 5, 6, 9])
    np.testing.assert_allclose(plots.running_mean(values, 1), values)


def test_plots_of_long_curves(tmp_path, monkeypatch):
    """Smooth in front of what is smoothed, within the model's limits; lines that differ in colour and style, labelled."""
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path, formats: figures.append(figure))
    noise = np.random.default_rng(0).normal(size=(3, 964))
    spiky = 13 + 0.1 * noise[0]
    spiky[500] = 100
    plots.plot_lines(
        {
            "model": plots.Line(15 + noise[1], 14 + noise[1], 16 + noise[1]),
            "last context frame": plots.Line(spiky, reference=True),
            "random training frame": plots.Line(13 + 0.1 * noise[2], reference=True),
            "model, posterior": plots.Line(np.full(964, 20.0), beside="model"),
        },
        tmp_path / "a.png",
        "PSNR",
    )
    (axes,) = figures[0].axes
    low, high = axes.get_ylim()
    assert 10 < low < 13 and 20 < high < 22
    smooth = [line for line in axes.lines if line.get_linewidth() > 1]
    assert len(smooth) == 4 and len(axes.lines) == 7
    assert np.std(smooth[0].get_ydata()) < 0.4
    assert len({(line.get_color(), line.get_linestyle(), tuple(line._dash_pattern[1] or ())) for line in smooth}) == 4
    assert len({line.get_color() for line in smooth}) == 3
    assert [text.get_text() for text in axes.texts] == ["random training frame", "last context frame", "model"]
    heights = [text.xy[1] for text in axes.texts]
    assert min(np.diff(heights)) > 0.07
    assert axes.get_xlabel() == "predicted frame  (bold: mean of 25; dotted: posterior)"


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_labels_stay_beside_the_axes(tmp_path, monkeypatch, value):
    """Of seven lines that end at the bottom or at the top."""
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path, formats: figures.append(figure))
    lines = {f"{i}": plots.Line(np.linspace(0.5 + i / 100, value, 50)) for i in range(7)}
    plots.plot_lines(lines, tmp_path / "a.png", "y")
    heights = [text.xy[1] for text in figures[0].axes[0].texts]
    assert min(heights) > -0.01 and max(heights) < 1.01 and min(np.diff(heights)) > 0.07


def test_figures_in_each_format(tmp_path):
    plots.plot_lines({"a": plots.Line(np.arange(5.0))}, tmp_path / "a.png", "y", formats=("png", "pdf"))
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF") and (tmp_path / "a.png").exists()


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "module://gone", "nonsense", "TkAgg"])
def test_figures_whatever_backend_a_notebook_has_set(tmp_path, backend):
    program = f"""
import os, sys; sys.path[:0] = [{str(ROOT)!r}]
from pathlib import Path
import numpy as np
from report import plots
plots.plot_lines({{"a": plots.Line(np.arange(5.0))}}, Path("lines.png"), "y", formats=("png", "pdf"))
assert os.environ["MPLBACKEND"] == {backend!r}
"""
    environment = os.environ | {"MPLBACKEND": backend, "DISPLAY": ""}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True)
    assert {path.name for path in tmp_path.iterdir()} == {"lines.png", "lines.pdf"}

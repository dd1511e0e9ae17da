"""Statistics against NumPy and SciPy; tables, pages and figures, read back after writing."""

import csv
import html
import io
import itertools
import json
import os
import re
import subprocess
import sys
import zlib

import matplotlib.colors
import numpy as np
import pytest
import scipy.stats
import skimage.color
from conftest import ROOT
from PIL import Image

import tools
from report import plots, statistics, tables
from report.page import Row, evaluation_page


def test_intervals_equal_those_of_scipy():
    values = np.random.default_rng(1).gamma(2.0, size=(40, 3))
    got = statistics.estimate(values, resamples=20_000)
    want = scipy.stats.bootstrap((values,), np.mean, axis=0, n_resamples=20_000, method="percentile", rng=2)
    np.testing.assert_allclose(got["value"], values.mean(0))
    np.testing.assert_allclose(got["low"], want.confidence_interval.low, rtol=0.02)
    np.testing.assert_allclose(got["high"], want.confidence_interval.high, rtol=0.02)


def test_95_percent_of_the_intervals_cover_the_mean():
    """300 experiments with 50 examples each."""
    values = np.random.default_rng(0).normal(3, 2, (50, 300))
    got = statistics.estimate(values)
    assert 0.9 < ((got["low"] <= 3) & (got["high"] >= 3)).mean() < 0.98


def test_one_example_has_no_interval():
    got = statistics.estimate(np.array([[1.5, 2.5]]))
    assert all(got[key].tolist() == [1.5, 2.5] for key in ("value", "low", "high"))


def test_intervals_cover_seeds_and_examples():
    """Equal seeds give the interval over examples, equal examples the one over seeds. Otherwise the variances add up.

    The difference from a model with the same errors on examples has only the variance of the seeds.
    """
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


def test_a_summary_equals_averages_by_hand():
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
    assert header == [
        "prediction / reference",
        "SSIM, standard, 12 frames",
        "first 10",
        "PSNR (dB), standard, 12 frames",
        "first 10",
    ]
    assert [row[0] for row in rows] == ["prediction", "last context frame"] and all(len(row) == 5 for row in rows)
    markdown = tables.to_markdown(header, rows).splitlines()
    assert len(markdown) == 4 and all(line.count("|") == 6 for line in markdown)


def test_json_is_whole_and_has_lists_on_one_line():
    results = {"a": [1.5, 2, -3e-7], "text": "[1,\n  2]", "nested": {"b": [[1, 2], [3, 4]], "empty": []}}
    text = tables.to_json(results)
    assert json.loads(text) == results and '"a": [ 1.5, 2, -3e-07 ]' in text


def test_the_page_escapes_all_text():
    results = {
        "config": {"model": "cwvae", "dataset": "videos", "datadir": "<script>x", "open_loop_ctx": 4, "num_samples": 1},
        "checkpoint_step": 1,
        "num_examples": 1,
        "predicted_frames": 12,
        "protocols": {"paper": "a < b", "standard": ""},
        "lines": lines(12),
        "versions": {},
        "examples": [{"caption": "<best>", "sheets": {"truth": '"a"', "<model>": "b"}}],
        "provenance": {"run": "<run>", "stages": [3], "date": "today", "commit": "abc"},
    }
    shown = evaluation_page(results, ["<plot>"], ["<file>"], [Row({"paper_ssim": 0.5}, ["<npz>"])])
    for text in "<script>x", "<best>", "<model>", "<run>", "<plot>", "<file>", "<npz>", "a < b":
        assert text not in shown and html.escape(text) in shown
    assert 'data-sheet="&quot;a&quot;"' in shown and "1 sample of each" in shown
    title = re.search("<title>(.*)</title>", shown)[1]
    assert title == "cwvae on videos, &lt;run&gt;, 4 steps in 2 stages, 1 of them in the last, today, commit abc"


def test_the_page_of_earlier_results_can_be_written():
    """analysis.py perceptual writes such a page again. The results lack provenance and examples."""
    config = {"model": "cwvae", "dataset": "videos", "open_loop_ctx": 4, "num_samples": 2}
    results = {"config": config, "checkpoint_step": 4000, "num_examples": 2, "predicted_frames": 12, "protocols": {}}
    shown = evaluation_page(results | {"lines": lines(12), "versions": {}, "videos": {}}, [], [], [])
    assert "step 4,000 (earlier stages aren" in shown and "<dd>not recorded</dd>" in shown
    assert "<script>" not in shown and "so it can be below the mean of 2" in shown


def test_intervals_without_extent_are_left_out():
    assert tables.with_interval({"value": 1, "low": 0.5, "high": 1.5}, 2) == "1.00 (0.50 to 1.50)"
    assert tables.with_interval({"value": 1, "low": 1, "high": 1}, 2) == "1.00"


def test_tables_of_one_metric_are_narrow():
    """On the page, each metric has its own table of at most eight columns, which fit into a window."""
    made = lines(1000)
    header, rows = tables.table(made, "paper", ["psnr"])
    assert header == [
        "prediction / reference",
        "PSNR (dB), paper, 1000 frames",
        *(f"first {d}" for d in statistics.DISTANCES),
    ]
    both, _ = tables.table(made, "paper")
    assert len(both) == 2 * len(header) - 1 and all(len(row) == len(header) for row in rows)


def test_running_means_equal_means_by_hand():
    values = np.array([1.0, 5, 0, 6, 3, 9])
    np.testing.assert_allclose(plots.running_mean(values, 5), [1, 2, 3, 23 / 5, 6, 9])
    np.testing.assert_allclose(plots.running_mean(values, 1), values)


@pytest.fixture
def figures(monkeypatch):
    """Return a list that collects the figures instead of saving them."""
    found = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, *_: found.append(figure))
    return found


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_long_curves_and_their_bands_are_smooth(tmp_path, figures):
    noise = np.random.default_rng(0).normal(size=(3, 964))
    made = {
        "model": plots.Line(15 + noise[0], 14 + noise[1], 16 + noise[2]),
        "model, posterior": plots.Line(np.full(964, 20.0), companion_of="model"),
        "last context frame": plots.Line(13 + 0.1 * noise[2], reference=True),
    }
    plots.plot_lines(made, tmp_path / "a.png", "PSNR")
    (axes,) = figures[0].axes
    (band,) = axes.collections
    corners = band.get_paths()[0].vertices
    for edge, values in (14, noise[1]), (16, noise[2]):
        own = corners[abs(corners[:, 1] - edge) < 0.9]
        shown = dict(zip(own[:, 0], own[:, 1], strict=False))
        assert [shown[x] for x in (100, 500)] == pytest.approx(
            [edge + values[x - 13 : x + 12].mean() for x in (100, 500)]
        )
    curve = axes.lines[0].get_ydata()
    assert curve[99] == pytest.approx(15 + noise[0, 87:112].mean()) and np.std(curve) < 0.4
    assert legend(figures[0]) == ["model", "last context frame", "posterior", "95 % interval"]
    assert figures[0].legends[0].get_title().get_text() == "running means of 25 values"
    assert (axes.get_xlabel(), axes.get_ylabel(), len(axes.texts)) == ("predicted frame", "PSNR", 0)


def test_a_reference_is_within_the_axis_or_marked_as_cut(tmp_path, figures):
    model, far, near = np.linspace(15, 14, 50), np.full(50, 13.0), np.full(50, 13.0)
    far[[0, 1, 2, 30]] = 40
    near[5:15] = 17
    made = {
        "model": plots.Line(model),
        "far": plots.Line(far, reference=True),
        "near": plots.Line(near, reference=True),
    }
    plots.plot_lines(made, tmp_path / "a.png", "PSNR")
    plots.plot_lines(made | {"far": plots.Line(26 - far, reference=True)}, tmp_path / "a.png", "PSNR")
    for figure, marker, edge in zip(figures, "^v", (1, 0), strict=True):
        (axes,) = figure.axes
        low, high = axes.get_ylim()
        assert low < 13 and 17 < high < 20
        marked = [line for line in axes.lines if line.get_marker() in ("^", "v")]
        assert [(line.get_marker(), *line.get_xdata(), *line.get_ydata()) for line in marked] == [
            (marker, x, (low, high)[edge]) for x in (2, 31)
        ]
        assert all(line.get_color() == axes.lines[1].get_color() and not line.get_clip_on() for line in marked)
        assert legend(figure) == ["model", "far", "near", "leaves the axis"]


def test_bands_and_companions_of_models_are_within_the_axis(tmp_path, figures):
    ones = np.ones(12)
    made = {"model": plots.Line(ones, 0 * ones, 2 * ones), "model, p": plots.Line(9 * ones, companion_of="model")}
    made |= {f"model, {i}": plots.Line(i * ones, companion_of="model", thin_label="single seed") for i in range(2)}
    plots.plot_lines(made, tmp_path / "a.png", "y", "standard deviation")
    low, high = figures[0].axes[0].get_ylim()
    assert low < 0 and high > 9 and legend(figures[0]) == ["model", "p", "single seed", "standard deviation"]


def test_lines_differ_with_and_without_colour(tmp_path):
    """Eight models, one of which has companions, and all references that a figure may have."""
    line, reference = plots.Line(np.ones(3)), plots.Line(np.ones(3), reference=True)
    models = [f"m{i}" for i in range(8)]
    names = [*statistics.REFERENCES.values(), "true frames", "chance"]
    companions = {
        "m1, p": line._replace(companion_of="m1"),
        "m1, 0": line._replace(companion_of="m1", thin_label="single seed"),
    }
    styles = plots.styles_of(dict.fromkeys(models, line) | companions | dict.fromkeys(names, reference))
    assert len({styles[name]["color"] for name in models[:6]}) == 6
    assert not {styles[name]["color"] for name in models} & {styles[name]["color"] for name in names}
    assert len({tuple(sorted(style.items())) for style in styles.values()}) == len(styles)
    assert len({styles[name]["linestyle"] for name in models[:6]}) == 6
    assert {styles[name]["color"] for name in companions} == {styles["m1"]["color"]}
    assert styles["m1, 0"]["linewidth"] < styles["m1, p"]["linewidth"] < styles["m1"]["linewidth"]
    dotted = [name for name in styles if styles[name].get("linestyle", (0, ()))[1][:1] == (1,)]
    assert dotted == ["m1, p", "chance"]


def seen_by_deuteranopes(color):
    """Return a colour, sRGB in [0, 1], as readers without green cones see it, in CIELAB (Machado et al. 2009)."""
    color = np.asarray(color, float)
    linear = np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)
    seen = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]] @ linear
    seen = np.clip(seen, 0, 1)
    return skimage.color.rgb2lab(np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055))


def test_colours_differ_for_colour_blind_readers():
    """A difference of 10 (CIEDE2000) is easy to see. In most palettes, green and red differ by 5 to 10."""
    frames = [np.array(color) / 255 for color in (tools.GREEN, tools.RED)]
    lines = [matplotlib.colors.to_rgb(color) for color in plots.COLORS]
    for colors, least in (frames, 20), (lines, 10):
        for a, b in itertools.combinations(map(seen_by_deuteranopes, colors), 2):
            assert skimage.color.deltaE_ciede2000(a, b) > least


def test_figures_have_a_columns_width_and_text_of_8_points(tmp_path):
    """For names of any length, with fonts that conferences accept."""
    names = ["a", "b" * 30, "levels=3, tmp_abs_factor=6, free_nats=1.0, use_obs=TTT"]
    plots.plot_lines(
        dict.fromkeys(names, plots.Line(np.arange(5.0))), tmp_path / "lines.png", "y", formats=("png", "pdf")
    )
    plots.plot_bars({"ranks": dict.fromkeys("abc", (1.0, 0.5, 1.5))}, tmp_path / "bars.pdf", "y", ("pdf",))
    video = np.zeros((40, 8, 8, 1), np.uint8)
    plots.save_rows({"truth": video, "x": video}, tmp_path / "rows.pdf", np.arange(24), {"x": 3}, ("pdf",))
    for name, width in ("lines", 3.25), ("bars", 3.25), ("rows", 6.75):
        pdf = (tmp_path / f"{name}.pdf").read_bytes()
        assert pdf.startswith(b"%PDF") and b"/FontFile2" in pdf and b"/Type3" not in pdf
        assert float(re.search(rb"/MediaBox \[ ?0 0 ([\d.]+)", pdf)[1]) == pytest.approx(72 * width, abs=1)
        sizes = [zlib.decompress(part) for part in re.findall(rb"stream\r?\n(x.*?)endstream", pdf, re.DOTALL)]
        assert set(re.findall(rb"/F1 ([\d.]+) Tf", b"".join(sizes))) == {b"8"}
    with Image.open(tmp_path / "lines.png") as image:
        assert image.width == 975


def test_plotting_keeps_the_settings_of_matplotlib(tmp_path):
    before = dict(matplotlib.rcParams)
    plots.plot_lines({"a": plots.Line(np.arange(5.0))}, tmp_path / "a.png", "y")
    assert dict(matplotlib.rcParams) == before


def test_bars_of_one_name_have_one_colour(tmp_path, figures):
    bar = (1.0, 1.0, 1.0)
    plots.plot_bars({"level 0": {"a": bar, "b": bar}, "level 1": {"b": bar}}, tmp_path / "a.png", "y")
    (_, b), (alone,) = (axes.patches for axes in figures[0].axes)
    assert alone.get_facecolor() == b.get_facecolor() and alone.get_width() == b.get_width()


def test_probabilities_below_frames_are_short():
    assert [plots.short_probability(p) for p in (0.0, 0.071, 0.5, 0.994, 0.996)] == [".00", ".07", ".50", ".99", "1"]


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "module://gone", "nonsense", "TkAgg"])
def test_figures_are_drawn_with_any_backend(tmp_path, backend):
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

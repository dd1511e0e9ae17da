"""Statistics against numpy and scipy; tables and text by reading them back."""

import csv
import io
import json

import numpy as np
import pytest
import scipy.stats

from report import statistics, tables
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
    }
    page = page.page(results, [], {})
    assert "<script>" not in page and "&lt;script&gt;" in page and "a &lt; b" in page and "1 sample of each" in page

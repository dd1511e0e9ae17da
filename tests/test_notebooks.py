"""The notebooks, run as they are."""

import json

import matplotlib.pyplot as plt
import numpy as np
from conftest import ROOT


def test_the_notebook_runs_and_shows_what_its_text_says(monkeypatch):
    cells = json.loads((ROOT / "notebooks" / "predict.ipynb").read_text())["cells"]
    plt.switch_backend("agg")
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(len(plt.gcf().axes)))
    monkeypatch.chdir(ROOT / "notebooks")
    names = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    plt.close("all")
    assert shown == [2, 2, 4, 4]

    def error(frames, count):
        return np.abs(frames[:, :count].astype(float) - names["future"][:, :count]).mean()

    sees_all, top_blind, only_top_sees = names["predictions"].values()
    assert error(sees_all, 12) < 0.8 * error(top_blind, 12)
    assert error(top_blind, 12) < 0.6 * error(only_top_sees, 12)

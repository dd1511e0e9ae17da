"""Losses over the steps of several trainings, from their logs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

import config as configuration
import runs
from analyses.arguments import new_directory, parse_named, with_names
from config import ConfigError
from report import plots, tables
from system import logs


def curves(arguments: Sequence[str]) -> None:
    """Draws the losses of several trainings over their steps.

    loss.png, curves.md (validation loss at steps that all have logged, and its terms at the last one), curves.csv (all
    that is in their logs).
    """
    named, given, _ = parse_named(
        arguments,
        "analysis.py curves [NAME=]RUN ... --out DIR",
        "Losses over the steps of several trainings, from their metrics.jsonl.",
        keys=False,
    )
    runs = [runs.find(path) for _, path in named]
    names = with_names([name for name, _ in named], [configuration.load(run / "config.yml") for run in runs])
    logs = {name: read_log(run) for name, run in zip(names, runs, strict=True)}
    directory = new_directory("curves", given.get("out"))
    drawn = {
        name: plots.Line(over_steps(log, "validation/loss"), x=over_steps(log, "step")) for name, log in logs.items()
    }
    for name, log in logs.items():
        drawn[f"{name}, training"] = plots.Line(over_steps(log, "train/loss"), x=drawn[name].x, beside=name)
    plots.plot_lines(drawn, directory / "loss.png", "loss, nats per frame", xlabel="step")
    common = sorted(set.intersection(*({line["step"] for line in log} for log in logs.values())))
    shown = [common[i] for i in np.unique(np.linspace(0, len(common) - 1, 8).astype(int))] if common else []
    rows, cells = [], []
    for name, log in logs.items():
        losses = {line["step"]: line["validation/loss"] for line in log}
        last = log[-1]
        terms = [f"{last[f'validation/{term}']:.1f}" for term in ("nll_term", "kl_term")]
        rows.append([name, *(f"{losses[step]:.0f}" for step in shown), last["step"], *terms])
        cells += [[name, line["step"], key, value] for line in log for key, value in line.items() if key != "step"]
    header = ["validation loss, nats per frame", *(f"step {step}" for step in shown), "last step", "nll", "kl"]
    markdown = tables.to_markdown(header, rows)
    tables.write(directory / "curves.md", markdown)
    tables.write(directory / "curves.csv", tables.to_csv(["model", "step", "metric", "value"], cells))
    print(f"\n{markdown}\nResults: {directory}")


def read_log(run: Path) -> list[dict[str, float]]:
    """The lines of a run's `metrics.jsonl`.

    Raises:
        ConfigError: it holds none yet.
    """
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    log = [json.loads(line) for line in lines if logs.step_of(line) >= 0]
    if not log:
        raise ConfigError(f"{run} has logged nothing yet; train longer, or lower --save_scalars_every")
    return log


def over_steps(log: Sequence[Mapping[str, float]], key: str) -> np.ndarray:
    return np.array([line[key] for line in log])

"""Loss curves of several trainings, from their logs."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from analyses.arguments import model_names, new_directory, parse_named
from config import ConfigError
from report import plots, tables
from report.output import FORMAT, formats, writing
from system import logs
from training import loading

LOSSES = ("train/loss", "validation/loss", "validation/nll_term", "validation/kl_term")
"""Entries that each line of a log must have."""


def curves(arguments: Sequence[str]) -> None:
    """Draw the losses of several trainings over their steps.

    Writes loss.png; curves.md with the validation loss at steps that all trainings logged, and its terms at the last
    step; curves.csv with all logged metrics.
    """
    named, given, _ = parse_named(
        arguments,
        "analysis.py curves [NAME=]RUN ... --out DIR",
        "Losses over the steps of several trainings, from their metrics.jsonl.",
        keys=False,
        examples=["python analysis.py curves k6=RUN k2=RUN --out DIR"],
        format=FORMAT,
    )
    figures = formats(given.get("format")).figures
    paths = [loading.find_run(loading.resolve_name(path)) for _, path in named]
    names = model_names([name for name, _ in named], [loading.saved_config(path / "config.yml") for path in paths])
    found = {name: read_log(path) for name, path in zip(names, paths, strict=True)}
    for name, log in found.items():
        for line in log:
            if lacking := [loss for loss in LOSSES if not isinstance(line.get(loss), float)]:
                raise ConfigError(
                    f"{name}: step {line['step']} of its metrics.jsonl has no number as {lacking[0]}; remove that line"
                )
    directory = new_directory("curves", given.get("out"))
    drawn = {
        name: plots.Line(over_steps(log, "validation/loss"), x=over_steps(log, "step")) for name, log in found.items()
    }
    for name, log in found.items():
        drawn[f"{name}, training"] = plots.Line(over_steps(log, "train/loss"), x=drawn[name].x, companion_of=name)
    common = sorted(set.intersection(*({line["step"] for line in log} for log in found.values())))
    shown = [common[i] for i in np.unique(np.linspace(0, len(common) - 1, 8).astype(int))] if common else []
    rows, cells = [], []
    for name, log in found.items():
        losses = {line["step"]: line["validation/loss"] for line in log}
        last = log[-1]
        terms = [f"{last[f'validation/{term}']:.1f}" for term in ("nll_term", "kl_term")]
        rows.append([name, *(f"{losses[step]:.0f}" for step in shown), last["step"], *terms])
        cells += [[name, line["step"], key, value] for line in log for key, value in line.items() if key != "step"]
    header = ["validation loss, nats per frame", *(f"step {step}" for step in shown), "last step", "nll", "kl"]
    markdown = tables.to_markdown(header, rows)
    with writing(directory):
        plots.plot_lines(drawn, directory / "loss.png", "loss, nats per frame", xlabel="step", formats=figures)
        tables.write(directory / "curves.md", markdown)
        tables.write(directory / "curves.csv", tables.to_csv(["model", "step", "metric", "value"], cells))
    print(f"\n{markdown}\nResults: {directory}")


def read_log(run: Path) -> list[dict[str, float]]:
    """Return the lines of `metrics.jsonl` of a run, after those of the runs from which it continues (`init_from`).

    The steps of a run are counted from the checkpoint from which it started, so stages make one curve.

    Raises:
        ConfigError: one of the logs has no line yet.
    """
    log, start = [], 0
    for path, steps in lineage(run):
        lines = [json.loads(line) for line in logs.read_lines(path / "metrics.jsonl") if logs.step_of(line) >= 0]
        if not lines:
            raise ConfigError(f"{path} has logged nothing yet; train longer, or lower --save_scalars_every")
        log += [{**line, "step": start + line["step"]} for line in lines if line["step"] <= steps]
        start += steps
    return log


def lineage(run: Path) -> list[loading.Checkpoint]:
    """Return the checkpoints from which a run continues, the oldest first, then the run itself.

    The last entry's step is `sys.maxsize`: all lines of the run's log count.
    """
    found = [loading.Checkpoint(run, sys.maxsize)]
    while (source := loading.saved_config(found[0].run / "config.yml").init_from) is not None:
        try:
            start = loading.find_checkpoint(Path(source))
            if start.is_file:
                raise ConfigError("a file has no log")
            found.insert(0, start)
        except ConfigError as error:
            print(f"{found[0].run} starts from {source}, whose steps are left out ({error})")
            break
    return found


def over_steps(log: Sequence[Mapping[str, float]], key: str) -> np.ndarray:
    """Return the values of a key in all lines of a log."""
    return np.array([line[key] for line in log])

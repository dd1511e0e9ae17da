"""Frames at which segments of a test sequence begin, in the posterior of VTA and in an open-loop prediction."""

from collections.abc import Sequence
from typing import Any

import numpy as np

import tools
from analyses.arguments import EXAMPLE, parse_models, results_directory, single_run
from analyses.worker import Worker
from config import ConfigError, whole_number
from report import plots
from sequences import rollout
from system.files import replace_arrays


def boundaries(arguments: Sequence[str]) -> None:
    """Draw frames of one test sequence, and mark where segments begin: boundaries.png, boundaries.npz."""
    models, given = parse_models(
        "boundaries",
        __doc__,
        arguments,
        ["python analysis.py boundaries RUN --example 3"],
        example=EXAMPLE,
    )
    run = single_run("boundaries", models)
    if run.config.model != "vta":
        raise ConfigError(f"model: boundaries needs a run of vta, got one of {run.config.model}")
    number = whole_number(given, "example", 0, at_least=0)
    worker = Worker(run)
    video, context = worker.sequence(number).video, run.config.open_loop_ctx
    directory = results_directory("boundaries", models, given)
    rows, probabilities = {"truth": video}, {}
    for name, seen in ("posterior", len(video)), ("prediction", context):
        rows[name], probabilities[name] = observe_and_imagine(worker, number, video[:seen], len(video) - seen)
    times = np.arange(max(0, context - 4), min(len(video), context + 20))
    seen_frames = {"posterior": len(video), "prediction": context}
    plots.save_rows(rows, directory / "boundaries.png", times, seen_frames, boundaries=probabilities)
    arrays: Any = rows | {f"{name}_boundary": x for name, x in probabilities.items()}
    replace_arrays(directory / "boundaries.npz", **arrays)
    print(f"Results: {directory}")


def observe_and_imagine(worker: Worker, number: int, video: np.ndarray, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Reconstruct a test sequence uint8 [T, H, W, C], and predict `frames` more frames with the noise of eval.py.

    Returns:
        All frames, uint8 [T + frames, H, W, C], and for each the probability that a segment begins there.
    """
    model, params, c = worker.model, worker.params, worker.config
    T, keys = len(video), worker.keys(number, 1)
    inputs = model.draw(keys, T + frames, context=T)
    found, state = [], None
    for start, stop in rollout.chunks(c, T, None if frames == 0 else T):
        chunk = model.time_slice(inputs, start, stop)
        observed, state = rollout.apply(model, "observe", params, video[None, start:stop], chunk, state)
        found.append(observed)
    for start, stop in rollout.chunks(c, frames, None):
        chunk = model.time_slice(inputs, T + start, T + stop)
        imagined, state = rollout.apply(model, "imagine", params, chunk, state)
        found.append(imagined)
    decoded = [tools.to_uint8(rollout.apply(model, "decode", params, rollouts)) for rollouts in found]
    probabilities = [rollouts[1].boundary for rollouts in found]
    return np.concatenate(decoded, axis=1)[0], np.concatenate(probabilities, axis=1)[0]

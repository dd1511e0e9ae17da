"""Information per level: KL divergence and entropies (Table 1, Figure 8), and the latents."""

import itertools
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array

from analyses.arguments import parse_models, results_directory
from analyses.worker import Worker
from config import ConfigError, Flag, whole_number
from cwvae import LevelRollout, entropy, kl_divergence, per_level
from report import plots, statistics, tables
from sequences import rollout
from system.files import replace_arrays


def levels(arguments: Sequence[str]) -> None:
    """Write KL and entropies of each level, and the latents of each run.

    Writes levels.json, levels.csv, levels.md, kl.png, and NPZ files in latents/ (several runs: in `latents_<i>/`).
    """
    models, given = parse_models(
        "levels",
        __doc__,
        arguments,
        ["python analysis.py levels 'two levels'=RUN 'three levels'=RUN --out DIR"],
        frames=Flag("INT", "frames of each test sequence that are observed (default: seq_len, as in Table 1)"),
    )
    frames = [whole_number(given, "frames", run.config.seq_len) for run in models]
    for run, T in zip(models, frames, strict=True):
        if 0 < run.config.eval_seq_len < T:
            raise ConfigError(
                f"frames: test sequences of {run.name} have eval_seq_len = {run.config.eval_seq_len} frames, fewer "
                f"than {T}; lower --frames or raise --eval_seq_len"
            )
    workers = [Worker(run) for run in models]
    directory = results_directory("levels", models, given)
    results = {}
    for i, (run, worker, T) in enumerate(zip(models, workers, frames, strict=True)):
        latents = directory / ("latents" if len(models) == 1 else f"latents_{i}")
        found = {"latents": latents.name, "run": str(run.checkpoint.run), "checkpoint_step": run.checkpoint.step}
        results[run.name] = found | information(worker, T, latents)
    write_levels(results, directory)


TERMS = {"kl": "KL", "entropy_prior": "prior entropy", "entropy_posterior": "posterior entropy"}
"""The terms of each level, and their names in tables."""


@jax.jit
def level_terms(rollouts: tuple[LevelRollout, ...]) -> dict[str, Array]:
    """Return each of TERMS, summed over the ticks of a chunk, [L, B]."""
    return {
        "kl": per_level(rollouts, kl_divergence),
        "entropy_prior": per_level(rollouts, lambda q, p: entropy(p)),
        "entropy_posterior": per_level(rollouts, lambda q, p: entropy(q)),
    }


def information(worker: Worker, frames: int, latents: Path) -> dict[str, Any]:
    """Return KL and entropies of each level in nats, over the first `frames` frames of the test sequences.

    Levels that don't see the frames (`use_obs`) follow their prior. The latents of each batch are written to
    `latents/level_<l>_<first example>.npz`: example [B], deter [B, T_l, D]; stoch, prior_mean, prior_stddev,
    posterior_mean and posterior_stddev [B, T_l, S].
    """
    c = worker.config
    latents.mkdir()
    totals: list[dict[str, np.ndarray]] = []
    ticks: list[int] = []
    for first, valid, batch in worker.batches():
        terms, chunks = [], []
        keys = worker.keys(first, len(batch.video))
        video, actions = (x if x is None else x[:, :frames] for x in (batch.video, batch.actions))
        for chunk in rollout.observe(
            worker.model, worker.params, video, keys, c.use_obs, place=worker.devices.put, actions=actions
        ):
            terms.append(level_terms(chunk))
            chunks.append(jax.tree.map(lambda x: np.asarray(x, np.float32), chunk))
        totals.append(jax.tree.map(lambda *x, valid=valid: np.sum(x, axis=0)[:, :valid], *jax.device_get(terms)))
        rollouts = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *chunks)
        ticks = [x.stoch.shape[1] for x in rollouts]
        for level, padded in enumerate(rollouts):
            found = jax.tree.map(operator.itemgetter(slice(valid)), padded)
            replace_arrays(
                latents / f"level_{level}_{first:06}.npz",
                example=np.arange(first, first + valid),
                stoch=found.stoch,
                deter=found.deter,
                **{f"prior_{name}": x for name, x in found.prior._asdict().items()},
                **{f"posterior_{name}": x for name, x in found.posterior._asdict().items()},
            )
    by_term = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *totals)  # [L, N] each
    by_level = []
    for level, T in enumerate(ticks):
        per_sequence = {key: statistics.plain(statistics.estimate(x[level])) for key, x in by_term.items()}
        per_tick = {key: statistics.plain(statistics.estimate(x[level] / T)) for key, x in by_term.items()}
        by_level.append({"ticks": T, "per_sequence": per_sequence, "per_tick": per_tick})
    return {"frames": frames, "num_examples": worker.count, "dataset": c.dataset, "levels": by_level}


def write_levels(results: Mapping[str, Any], directory: Path) -> None:
    """Write and print what `information` returned for each model: levels.json, levels.csv, levels.md, kl.png."""
    depth = max(len(result["levels"]) for result in results.values())
    table_1, details, rows = [], [], []
    for name, result in results.items():
        by_level = result["levels"]
        kl = [tables.with_interval(level["per_sequence"]["kl"], 2) for level in by_level]
        table_1.append([name, result["frames"], *kl, *["-"] * (depth - len(kl))])
        for number, level in enumerate(by_level):
            per_tick = [tables.with_interval(level["per_tick"][term], 3) for term in TERMS]
            details.append([name, number, level["ticks"], *per_tick])
            for unit, term in itertools.product(("per_sequence", "per_tick"), TERMS):
                rows.append([name, result["frames"], number, level["ticks"], term, unit, *level[unit][term].values()])
    header = ["model", "frames", *(f"level {level}" for level in range(depth))]
    markdown = (
        "KL(posterior, prior) in nats per sequence (Table 1), average over the sequences and 95 % interval:\n\n"
        + tables.to_markdown(header, table_1)
        + "\nIn nats per tick:\n\n"
        + tables.to_markdown(["model", "level", "ticks", *TERMS.values()], details)
    )
    bars = {
        f"level {level}": {
            name: tuple(result["levels"][level]["per_sequence"]["kl"].values())
            for name, result in results.items()
            if level < len(result["levels"])
        }
        for level in range(depth)
    }
    plots.plot_bars(bars, directory / "kl.png", "KL, nats per sequence")
    csv_header = ["model", "frames", "level", "ticks", "term", "unit", "value", "low", "high"]
    tables.write(directory / "levels.csv", tables.to_csv(csv_header, rows))
    tables.write(directory / "levels.md", markdown)
    tables.write(directory / "levels.json", tables.to_json(results))
    print(f"\n{markdown}\nResults: {directory}")

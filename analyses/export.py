"""A trained model to be taken elsewhere: a small copy of its run, a file of its parameters, programs for JAX alone."""

import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

import config as configuration
from analyses.arguments import TrainedModel, directory_for, parse_models, single
from analyses.card import card
from analyses.programs import Programs, archive
from config import Config, ConfigError, Flag
from cwvae import CWVAE
from report.output import writing
from system import weights
from system.checkpoints import Checkpoints
from system.files import replace_file
from training import loading
from training.models import make_model
from training.step import TrainState

SUFFIXES = {"safetensors": weights.SUFFIX, "stablehlo": ".zip"}
"""Of the formats that are single files."""


def export(arguments: Sequence[str]) -> None:
    """Write a trained model to be used elsewhere, without Adam's state.

    run: a run of the configuration and one checkpoint, for evaluation: a sixth of the size. Parameters are rounded to
    seven binary digits, which Orbax's compression makes use of.
    safetensors: one file with parameters and configuration, for training and evaluation.
    stablehlo: a zip of what observes, imagines and decodes, for programs that have JAX alone.
    """
    models, given = parse_models(
        "export",
        "Write a trained model to be used elsewhere.",
        arguments,
        ["python analysis.py export RUN --out model.safetensors", "python analysis.py export RUN --out programs.zip"],
        format=Flag(
            "{run,safetensors,stablehlo}",
            "what is written (default: by the suffix of --out, .safetensors or .zip; else run)",
        ),
    )
    run = single("export", models)
    suffix = Path(given.get("out", "")).suffix
    kind = given.get("format") or next((kind for kind, ending in SUFFIXES.items() if ending == suffix), "run")
    configuration.choose("format", kind, ["run", *SUFFIXES])
    if kind == "run":
        state = loading.load_state(make_model(run.config), run.checkpoint)
        directory = directory_for("export", models, given)
        smaller = dataclasses.replace(state, params=jax.tree.map(rounded, state.params))
        write(directory, run.config, smaller, loading.stages_before(run.checkpoint))
        print(f"Evaluate it with: python eval.py --logdir {directory}")
        return
    if suffix != SUFFIXES[kind]:
        raise ConfigError(
            f"out: {kind} is a file that ends in {SUFFIXES[kind]}, got {given.get('out', 'none')}; name a new one"
        )
    write_file(kind, run, Path(given["out"]))


def write_file(kind: str, run: TrainedModel, path: Path) -> None:
    """Write a model in one of the formats that are single files, and its card beside it.

    Raises:
        ConfigError: the model can't be written in this format, one of the files exists, or can't be written.
    """
    beside = path.with_suffix(".md")
    for file in path, beside:
        if file.exists():
            raise ConfigError(f"out: {file} exists; name a new file")
    if kind == "stablehlo":
        check_programs(run.config)
    model = make_model(run.config)
    state = loading.load_state(model, run.checkpoint)
    text = card(run, state.params, path)
    if kind == "safetensors":
        keys = dataclasses.asdict(portable(run.config))
        content = weights.to_bytes(state.params, int(state.step), keys, loading.stages_before(run.checkpoint))
    else:
        assert isinstance(model, CWVAE)
        programs = Programs(model, state.params).exported()
        content = archive({"README.md": text.encode()} | {f"{name}.stablehlo": x for name, x in programs.items()})
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content)
        replace_file(beside, text.encode())
    print(f"Wrote {path}; {beside} says what it is and how to use it")


def check_programs(config: Config) -> None:
    """Raise ConfigError unless programs can be made of a model."""
    if config.model != "cwvae":
        raise ConfigError(f"format: stablehlo is for cwvae, got {config.model}; name another --format")
    if config.cell_reset_state and config.tmp_abs_factor % 2:
        raise ConfigError(
            "format: stablehlo can't reset states by a pattern that changes from block to block, as with "
            f"cell_reset_state and an odd tmp_abs_factor, got {config.tmp_abs_factor}; name another --format"
        )
    if importlib.util.find_spec("flatbuffers") is None:
        raise ConfigError(
            "format: stablehlo needs the package flatbuffers, which isn't installed; pip install flatbuffers"
        )


def portable(config: Config) -> Config:
    """Return a configuration without paths of this machine."""
    default = Config()
    return dataclasses.replace(config, datadir=default.datadir, logdir=default.logdir, init_from=None)


def write(directory: Path, config: Config, state: TrainState, stages: Sequence[int] | None) -> None:
    """Write a run for evaluation, with the configuration but for its paths, and a checkpoint without Adam's state.

    `stages` are the steps of the trainings before, None if that isn't known.

    Raises:
        ConfigError: it can't be written.
    """
    replace_file(directory / "config.yml", portable(config).to_yaml().encode())
    with Checkpoints(directory / "checkpoints") as checkpoints:
        checkpoints.save(
            int(state.step),
            dataclasses.replace(state, opt_state=jax.tree.map(np.zeros_like, state.opt_state)),
            stages=stages,
        )
    with Checkpoints(directory / "checkpoints") as checkpoints:
        if not checkpoints.steps:
            raise ConfigError(f"{directory} couldn't be written; make room, or choose another --out")


def rounded(x: np.ndarray) -> np.ndarray:
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.round(mantissa * 2**7), exponent - 7)

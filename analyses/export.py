"""Export of a trained model: a small copy of its run, a file of its parameters, or programs that need only JAX."""

import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

import config as configuration
from analyses.arguments import TrainedModel, parse_models, results_directory, single_run
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
"""The suffixes of the formats that are single files."""


def export(arguments: Sequence[str]) -> None:
    """Write a trained model for use elsewhere, without Adam's averages, in one of three formats.

    run: a directory with the configuration and one checkpoint, for evaluation. Parameters are rounded to seven binary
    digits, so that Orbax compresses the checkpoint to a sixth of the original size.
    safetensors: one file with parameters and configuration, for training and evaluation.
    stablehlo: a zip of programs that observe, imagine and decode, and need only JAX.
    """
    models, given = parse_models(
        "export",
        "Write a trained model for use elsewhere.",
        arguments,
        ["python analysis.py export RUN --out model.safetensors", "python analysis.py export RUN --out programs.zip"],
        format=Flag(
            "{run,safetensors,stablehlo}",
            "what is written (default: by the suffix of --out, .safetensors or .zip; otherwise run)",
        ),
    )
    run = single_run("export", models)
    suffix = Path(given.get("out", "")).suffix
    kind = given.get("format") or next((kind for kind, ending in SUFFIXES.items() if ending == suffix), "run")
    configuration.choose("format", kind, ["run", *SUFFIXES])
    if kind == "run":
        state = loading.load_state(make_model(run.config), run.checkpoint)
        directory = results_directory("export", models, given)
        smaller = dataclasses.replace(state, params=jax.tree.map(rounded_to_7_bits, state.params))
        write_run(directory, run.config, smaller, loading.stages_before(run.checkpoint))
        print(f"Evaluate it with: python eval.py --logdir {directory}")
        return
    if suffix != SUFFIXES[kind]:
        raise ConfigError(
            f"out: {kind} is a file that ends in {SUFFIXES[kind]}, got {given.get('out', 'none')}; name a new one"
        )
    write_file(kind, run, Path(given["out"]))


def write_file(kind: str, run: TrainedModel, path: Path) -> None:
    """Write a model in one of the formats that are single files, and its card next to it.

    Raises:
        ConfigError: the format isn't for this model, one of the two files exists, or it can't be written.
    """
    card_path = path.with_suffix(".md")
    for file in path, card_path:
        if file.exists():
            raise ConfigError(f"out: {file} exists; name a new file")
    if kind == "stablehlo":
        check_programs(run.config)
    model = make_model(run.config)
    state = loading.load_state(model, run.checkpoint)
    text = card(run, state.params, path)
    if kind == "safetensors":
        keys = dataclasses.asdict(without_paths(run.config))
        content = weights.to_bytes(state.params, int(state.step), keys, loading.stages_before(run.checkpoint))
    else:
        assert isinstance(model, CWVAE)
        programs = Programs(model, state.params).exported()
        content = archive({"README.md": text.encode()} | {f"{name}.stablehlo": x for name, x in programs.items()})
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content)
        replace_file(card_path, text.encode())
    print(f"Wrote {path}; {card_path} tells what it holds and how to use it")


def check_programs(config: Config) -> None:
    """Raise ConfigError if a model can't be exported as programs."""
    if config.model != "cwvae":
        raise ConfigError(f"format: stablehlo is for cwvae, got {config.model}; name another --format")
    if config.cell_reset_state and config.tmp_abs_factor % 2:
        raise ConfigError(
            "format: stablehlo needs an even tmp_abs_factor with cell_reset_state, so that resets are the same in all "
            f"blocks, got {config.tmp_abs_factor}; name another --format"
        )
    if importlib.util.find_spec("flatbuffers") is None:
        raise ConfigError(
            "format: stablehlo needs the package flatbuffers, which isn't installed; pip install flatbuffers"
        )


def without_paths(config: Config) -> Config:
    """Return a configuration without this machine's paths."""
    default = Config()
    return dataclasses.replace(config, datadir=default.datadir, logdir=default.logdir, init_from=None)


def write_run(directory: Path, config: Config, state: TrainState, stages: Sequence[int] | None) -> None:
    """Write a run for evaluation: the configuration without paths, and a checkpoint with zeros as Adam's averages.

    Args:
        directory: the run's directory.
        config: the run's configuration.
        state: what the checkpoint holds.
        stages: the steps of earlier trainings, as `loading.stages_before` returns them.

    Raises:
        ConfigError: the run can't be written.
    """
    replace_file(directory / "config.yml", without_paths(config).to_yaml().encode())
    with Checkpoints(directory / "checkpoints") as checkpoints:
        checkpoints.save(
            int(state.step),
            dataclasses.replace(state, opt_state=jax.tree.map(np.zeros_like, state.opt_state)),
            stages=stages,
        )
    with Checkpoints(directory / "checkpoints") as checkpoints:
        if not checkpoints.steps:
            raise ConfigError(f"{directory} couldn't be written; make room, or choose another --out")


def rounded_to_7_bits(x: np.ndarray) -> np.ndarray:
    """Return the array with significands rounded to seven binary digits, one fewer than bfloat16 has."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.round(mantissa * 2**7), exponent - 7)

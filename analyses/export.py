"""A small copy of a run, to share."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

import runs
from analyses.arguments import directory_for, parse_models, single
from config import Config, ConfigError
from models import make_model
from system.checkpoints import Checkpoints
from system.files import replace_file
from train_step import TrainState


def export(arguments: Sequence[str]) -> None:
    """Write a run of the configuration and one checkpoint, for evaluation: a sixth of the size.

    Parameters are rounded to seven binary digits and Adam's state is zero, which Orbax's compression makes use of.
    """
    models, given = parse_models("export", __doc__, arguments)
    run = single("export", models)
    state = runs.load_state(make_model(run.config), run.checkpoint)
    directory = directory_for("export", models, given)
    write(directory, run.config, dataclasses.replace(state, params=jax.tree.map(rounded, state.params)))
    print(f"Evaluate it with: python eval.py --logdir {directory}")


def write(directory: Path, config: Config, state: TrainState) -> None:
    """Write a run for evaluation, with the configuration but for its paths, and a checkpoint without Adam's state.

    Raises:
        ConfigError: it can't be written.
    """
    default = Config()
    config = dataclasses.replace(config, datadir=default.datadir, logdir=default.logdir, init_from=None)
    replace_file(directory / "config.yml", config.to_yaml().encode())
    with Checkpoints(directory / "checkpoints") as checkpoints:
        checkpoints.save(
            int(state.step), dataclasses.replace(state, opt_state=jax.tree.map(np.zeros_like, state.opt_state))
        )
    with Checkpoints(directory / "checkpoints") as checkpoints:
        if not checkpoints.steps:
            raise ConfigError(f"{directory} couldn't be written; make room, or choose another --out")


def rounded(x: np.ndarray) -> np.ndarray:
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.round(mantissa * 2**7), exponent - 7)

"""The command lines of analyses: the trained models, and the directory of the results."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import config as configuration
from config import Config, ConfigError, Flag
from report.output import writing
from system.files import dated_directory, require_utf8
from training import loading

OUT = Flag("DIR", "new directory for the results (default for a single run: RUN/<command>_<time>)")
EXAMPLE = Flag("INT", "number of the test sequence (default: 0)")
"""The flags `--out` and `--example`."""


class TrainedModel(NamedTuple):
    """A trained model and its name in tables and plots."""

    name: str
    config: Config
    checkpoint: loading.Checkpoint


def parse_directories(
    arguments: Sequence[str], program: str, description: str, keys: bool, examples: Sequence[str], **special: Flag
) -> tuple[list[str], dict[str, str], dict[str, str]]:
    """Parse a command line that begins with directories and continues with flags.

    Returns:
        The directories, and the two dictionaries of `config.parse_flags`.

    Raises:
        ConfigError: no directory is named; or as `config.parse_flags`.
    """
    directories = list(itertools.takewhile(lambda argument: not argument.startswith("-"), arguments))
    given, values = configuration.parse_flags(
        arguments[len(directories) :], program, description, keys, True, examples, **special
    )
    if not directories:
        raise ConfigError(f"command line: no directory is named; call {program}")
    return directories, given, values


def parse_named(
    arguments: Sequence[str],
    program: str,
    description: str,
    keys: bool = True,
    examples: Sequence[str] = (),
    **special: Flag,
) -> tuple[list[tuple[str, Path]], dict[str, str], dict[str, str]]:
    """Parse a command line that begins with `[NAME=]DIRECTORY` arguments and continues with flags.

    Returns:
        Each directory with its name ("" without one), and the two dictionaries of `config.parse_flags`. `--out` is
        among the special flags.

    Raises:
        ConfigError: a name isn't UTF-8; or as `parse_directories`.
    """
    directories, given, values = parse_directories(arguments, program, description, keys, examples, out=OUT, **special)
    named = []
    for directory in directories:
        name, equals, path = directory.partition("=")
        require_utf8("command line", name)
        named.append((name, Path(path)) if equals and not Path(directory).exists() else ("", Path(directory)))
    return named, given, values


def parse_models(
    command: str, description: str | None, arguments: Sequence[str], examples: Sequence[str], **special: Flag
) -> tuple[list[TrainedModel], dict[str, str]]:
    """Return the models that a command line names, and its special flags.

    Configuration keys of the command line replace those of the runs.

    Raises:
        ConfigError: as `eval.parse` does.
    """
    program, description = f"analysis.py {command} [NAME=]RUN ...", f"{description} RUN is as eval.py's --logdir."
    named, given, values = parse_named(arguments, program, description, True, examples, **special)
    checkpoints = [loading.find_checkpoint(loading.resolve_name(path)) for _, path in named]
    configs = [loading.load_config(found.run, values) for found in checkpoints]
    names = model_names([name for name, _ in named], configs)
    return [TrainedModel(*run) for run in zip(names, configs, checkpoints, strict=True)], given


def model_names(names: Sequence[str], configs: Sequence[Config]) -> list[str]:
    """Return a name for each model.

    An empty name is replaced by the values of the keys in which the models differ, or else by the dataset.

    Raises:
        ConfigError: two models have the same name.
    """
    ignored = configuration.marked("free") | {"seed"}
    keys = [key for key in vars(configs[0]) if key not in ignored and len({getattr(c, key) for c in configs}) > 1]
    found = []
    for name, c in zip(names, configs, strict=True):
        own = [f"{key} {'-'.join(map(str, v)) if isinstance(v := getattr(c, key), tuple) else v}" for key in keys]
        found.append(name or ", ".join(own) or c.dataset)
    if twice := [name for i, name in enumerate(found) if name in found[:i]]:
        raise ConfigError(f"two models have the same name, {twice[0]!r}; name them: NAME=DIRECTORY")
    return found


def new_directory(command: str, out: str | None, run: Path | None = None) -> Path:
    """Create the directory of the results, and return its path: `out`, or `<run>/<command>_<time>`.

    Raises:
        ConfigError: `out` isn't empty, neither `out` nor `run` is given, or the directory can't be created.
    """
    if out is None:
        if run is None:
            raise ConfigError("out: name a new directory for the results of several runs, or of a file, with --out")
        with writing(run):
            return dated_directory(run, command)
    directory = Path(out)
    with writing(directory):
        if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
            raise ConfigError(f"out: {directory} isn't empty; name a new directory")
        directory.mkdir(parents=True, exist_ok=True)
    return directory


def single_run(command: str, models: Sequence[TrainedModel]) -> TrainedModel:
    """Return the only model; raise ConfigError if there are several."""
    if len(models) > 1:
        raise ConfigError(f"command line: {command} takes a single run")
    return models[0]


def results_directory(command: str, models: Sequence[TrainedModel], given: Mapping[str, str]) -> Path:
    """Create the directory of an analysis of models; see `new_directory`."""
    in_run = len(models) == 1 and not models[0].checkpoint.is_file
    return new_directory(command, given.get("out"), models[0].checkpoint.run if in_run else None)


def require_same_keys(a: TrainedModel, b: TrainedModel, keys: Sequence[str]) -> None:
    """Raise ConfigError if two models differ in one of the keys, which decide the test sequences."""
    for key in keys:
        x, y = getattr(a.config, key), getattr(b.config, key)
        if x != y:
            raise ConfigError(f"{key}: {a.name} has {x}, {b.name} has {y}; set the same --{key} for all runs")

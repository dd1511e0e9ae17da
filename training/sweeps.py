"""wandb's sweep files, read without wandb. They must be grids."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

import config as configuration
from config import Config, ConfigError, Flag
from training import runs

USED_KEYS = {"program", "command", "method", "parameters"}

IGNORED_KEYS = {"name", "description", "project", "entity", "metric"}
"""Keys that a file may also have. They have no effect on a grid."""


def grid(path: str, config: str | None, flags: Mapping[str, str]) -> list[Config]:
    """Return the configuration of each point of a grid.

    Flags override the flags of the sweep's command; the values of the point override both.

    Args:
        path: of the sweep's file.
        config: YAML file that replaces the one in the sweep's command.
        flags: configuration keys of the command line.

    Raises:
        ConfigError: the file can't be read or isn't a grid, a flag is a key that the grid varies, a point's values are
            invalid, or two points are the same run.
    """
    sweep = read_grid(path)
    special, defaults = configuration.parse_flags(
        [str(part) for part in sweep.get("command", []) if not str(part).startswith("${")],
        path,
        "",
        config=Flag("", ""),
    )
    choices = {key: parameter_values(path, key, parameter) for key, parameter in sweep["parameters"].items()}
    if "name" in flags:
        raise ConfigError(f"name: the runs of a grid can't share one, got {flags['name']}; leave --name out")
    for key in choices:
        if key in flags:
            raise ConfigError(f"{key}: {path} varies it, got {flags[key]}; leave --{key} out")
    points = [dict(zip(choices, point, strict=True)) for point in itertools.product(*choices.values())]
    configs: dict[Path, Config] = {}
    for point in points:
        typed = configuration.typed(point, path)
        c = configuration.program_config("train.py", config or special.get("config"), {**defaults, **flags, **typed})
        directory = runs.directory(c)
        if directory in configs:
            raise ConfigError(
                f"grid: two points of {path} are the same run, {directory}; vary keys that are part of a run's name"
            )
        configs[directory] = c
    return list(configs.values())


def read_grid(path: str) -> dict[str, Any]:
    """Return the content of a sweep's file. Raise ConfigError if it can't be read or isn't a grid of train.py."""
    try:
        sweep = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or "not YAML"
        raise ConfigError(
            f"grid: {path} can't be read ({reason}); name a file like configs/sweeps/levels.yml"
        ) from None
    if not isinstance(sweep, dict) or not isinstance(sweep.get("parameters"), dict):
        raise ConfigError(f"grid: {path} lacks parameters; name a file like configs/sweeps/levels.yml")
    if sweep.get("method") != "grid":
        raise ConfigError(f"grid: {path} has the method {sweep.get('method')}, not grid; call wandb sweep {path}")
    if sweep.get("program", "train.py") != "train.py":
        raise ConfigError(f"grid: {path} is for {sweep['program']}, not train.py; call wandb sweep {path}")
    if not isinstance(sweep.get("command", []), list):
        raise ConfigError(f"grid: {path} has the command {sweep['command']}; make it a list, or leave it out")
    if not sweep["parameters"]:
        raise ConfigError(f"grid: {path} varies nothing; add parameters like those of configs/sweeps/levels.yml")
    for key in sweep:
        if key not in USED_KEYS | IGNORED_KEYS:
            raise ConfigError(f"grid: {path} has {key}, which only wandb supports; call wandb sweep {path}")
    return sweep


def parameter_values(path: str, key: str, parameter: Any) -> list[Any]:
    """Return the values of a sweep's parameter. Raise ConfigError unless they are listed."""
    match parameter:
        case {"value": only, **others} if not others:
            return [only]
        case {"values": [_, *_] as several, **others} if not others:
            return several
    raise ConfigError(
        f"grid: {path} needs either a value or a list of values of {key}, got {parameter}; or call wandb sweep {path}"
    )

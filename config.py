"""The configuration: defaults < YAML file < command line < wandb sweep, with one check for all sources.

`Config` declares the keys of all programs. The help text of a field is also its line in `--help`. This module imports
no other module of the repository.
"""

import argparse
import contextlib
import dataclasses
import difflib
import inspect
import json
import math
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

MODELS = ("cwvae", "svg", "vta")

CWVAE = ("cwvae",)

CHANNELS = {
    "minerl": (3,),
    "mazes": (3,),
    "mmnist": (1,),
    "kth": (1,),
    "digits": (1,),
    "mnist": (1,),
    "videos": (1, 3),
    "episodes": (1, 3),
}
"""The datasets, with the numbers of colour channels that each can have."""

LATEST = "latest"
"""The name of the link in a log directory to the run that was started or resumed last."""

FRAME_SIZE = 64
"""Height and width of a frame, which the unpadded convolutions of encoder and decoder require."""


class ConfigError(ValueError):
    """An error that the user can correct: one line with the key, the value and the remedy."""


def option(
    default: Any,
    help: str,
    at_least: float | None = None,
    above: float | None = None,
    free: bool = False,
    named: bool = False,
    later: bool = False,
    shapes: bool = False,
    models: tuple[str, ...] = (),
    choices: Sequence[str] = (),
    metavar: str | None = None,
    group: str | None = None,
) -> Any:
    """Declare a key with all of its properties.

    Args:
        default: the value if the key isn't set.
        help: the text in `--help` and in the documentation.
        at_least, above: the lower bound of a number, inclusive or exclusive.
        free: the key may change when a run is resumed, since neither the model nor the order of its data depends on it.
        later: the key was added after the first runs, whose saved configurations lack it. The last key can't be such a
            key, because its presence shows that a saved configuration isn't truncated.
        named: the key distinguishes trainings, but isn't in the run names of the earlier codes. Its value is part of a
            run name unless it is the default.
        shapes: the shapes of the parameters depend on the key.
        models: the models that read the key. Other models require its default. Empty: all models.
        choices: the allowed values of a text. Empty: any.
        metavar: the placeholder of the value in `--help`. By default, it shows the type or the choices.
        group: the heading of this key and the next ones, in `--help` and in the documentation.
    """
    declared = dict(
        help=help,
        at_least=at_least,
        above=above,
        free=free,
        named=named,
        later=later,
        shapes=shapes,
        models=models,
        choices=tuple(choices),
        metavar=metavar,
        group=group,
    )
    return dataclasses.field(default=default, metadata=declared)


@dataclasses.dataclass(frozen=True)
class Config:
    """The configuration of a run. It is frozen. `load`, `parse` and the constructor check its values.

    Raises:
        ConfigError: a value or a combination of values can't work.
    """

    model: str = option(
        "cwvae",
        "cwvae, or a baseline: svg, vta",
        later=True,
        shapes=True,
        choices=MODELS,
        group="MODEL",
    )
    levels: int = option(3, "number of levels; level 0 ticks at every frame", at_least=1, models=CWVAE, shapes=True)
    tmp_abs_factor: int = option(
        6, "temporal abstraction factor k: level l ticks every k^l frames", at_least=1, models=CWVAE
    )
    dec_stddev: float = option(1.0, "standard deviation of the Normal observation model", above=0)
    enc_dense_layers: int = option(
        3, "Dense layers of the encoder per level above 0", at_least=0, models=CWVAE, shapes=True
    )
    enc_dense_embed_size: int = option(
        1000, "width of the encoder's Dense layers", at_least=1, models=CWVAE, shapes=True
    )
    cell_type: str = option("RSSMCell", "recurrent cell; only RSSMCell exists", models=CWVAE, choices=["RSSMCell"])
    cell_stoch_size: int = option(20, "size of a level's stochastic state", at_least=1, shapes=True)
    cell_deter_size: int = option(
        200, "size of a level's deterministic state", at_least=1, models=("cwvae", "vta"), shapes=True
    )
    cell_embed_size: int = option(200, "width of the cell's Dense layers", at_least=1, models=CWVAE, shapes=True)
    cell_min_stddev: float = option(
        0.0001, "added to the standard deviation of prior and posterior", at_least=0, named=True, models=CWVAE
    )
    cell_mean_only: bool = option(False, "use the mean instead of a sample", named=True, models=CWVAE)
    cell_reset_state: bool = option(
        False, "reset the stochastic state below the top level, as VTA does", named=True, models=CWVAE
    )
    channels_mult: int = option(1, "factor of the convolution channels", at_least=1, models=CWVAE, shapes=True)
    action_size: int | None = option(
        None,
        "length of the action vectors that level 0 sees; null: as in the data; 0: no actions",
        at_least=0,
        later=True,
        shapes=True,
        models=CWVAE,
    )
    filters: int = option(
        32,
        "channels of the first convolution; deeper ones have 2, 4, 8 times as many (vta: the same)",
        at_least=1,
        named=True,
        shapes=True,
    )

    dtype: str = option(
        "float32",
        "arithmetic of the layers only: float32 or bfloat16",
        named=True,
        models=CWVAE,
        choices=["float32", "bfloat16"],
    )

    svg_network: str = option(
        "dcgan",
        "encoder and decoder: dcgan or vgg",
        named=True,
        later=True,
        models=("svg",),
        shapes=True,
        choices=["dcgan", "vgg"],
        group="SVG",
    )
    svg_features: int = option(
        128, "size of a frame's features", at_least=1, named=True, later=True, models=("svg",), shapes=True
    )
    svg_rnn_size: int = option(
        256, "size of the LSTM states", at_least=1, named=True, later=True, models=("svg",), shapes=True
    )

    vta_init_size: int = option(
        5,
        "frames at each end of a training sequence that are not modelled",
        at_least=1,
        named=True,
        later=True,
        models=("vta",),
        group="VTA",
    )
    vta_max_segments: int | None = option(
        None,
        "segments that the prior allows in a training sequence; null: seq_len / 4",
        at_least=1,
        named=True,
        later=True,
        models=("vta",),
    )
    vta_max_length: int = option(
        8,
        "frames that the prior allows in a segment, in training",
        at_least=1,
        named=True,
        later=True,
        models=("vta",),
    )
    vta_detector_layers: int = option(
        3,
        "convolutions over time that find boundaries, not counting the last",
        at_least=0,
        named=True,
        later=True,
        models=("vta",),
        shapes=True,
    )

    dataset: str = option(
        "mmnist",
        "minerl, mazes, mmnist, kth; digits (no download); mnist (its idx files in datadir); videos (files in "
        "datadir/train and datadir/test); episodes (npz files there, with actions)",
        choices=tuple(CHANNELS),
        group="DATASET",
    )
    datadir: str = option("datasets", "directory of the datasets", free=True, metavar="DIR")
    rebuild_frames: bool = option(
        False, "decode videos again; prepare published datasets again if their zips changed", free=True
    )
    fit: str = option(
        "crop",
        "crop, pad or stretch frames that are not square (videos, episodes)",
        named=True,
        later=True,
        choices=["crop", "pad", "stretch"],
    )
    split: float | None = option(
        None,
        "training share of the files, chosen by name, if datadir has no train and test (videos, episodes)",
        above=0,
        named=True,
        later=True,
    )
    partial_videos: bool = option(False, "also use truncated videos (videos)", named=True, later=True)
    fps: float | None = option(
        None,
        "frames to take per second, by their times; null: every frame (videos)",
        above=0,
        named=True,
        later=True,
    )
    action_leads: bool = option(
        True,
        "true: action[t] led to image[t], and the first is a dummy; false: it is taken at image[t] (episodes)",
        named=True,
        later=True,
    )
    num_actions: int | None = option(
        None,
        "number of discrete actions, if stored as whole numbers from 0 (episodes)",
        at_least=1,
        named=True,
        later=True,
    )
    seq_len: int = option(100, "frames of a training sequence", at_least=1)
    eval_seq_len: int = option(
        1000, "frames of a validation or evaluation sequence; 0: the whole video", at_least=0, free=True
    )
    channels: int = option(1, "colour channels of a frame", at_least=1, shapes=True)
    random_start: bool = option(False, "start training windows at random frames (not in the paper)", named=True)
    num_digits: int = option(2, "digits in a video (digits, mnist)", at_least=1, named=True)
    digit_speed: tuple[float, ...] = option(
        (2.0, 6.0),
        "lowest and highest speed of the digits, in pixels per frame",
        at_least=0,
        named=True,
        metavar="'[SLOW, FAST]'",
    )

    init_from: str | None = option(
        None,
        "run, checkpoint or .safetensors file with the first parameters; null: random ones",
        later=True,
        metavar="RUN",
        group="TRAINING",
    )
    lr: float = option(3e-4, "learning rate", above=0)
    batch_size: int = option(50, "sequences in a batch, over all devices", at_least=1)
    num_epochs: int = option(300, "passes over the training sequences", at_least=1, free=True)
    max_steps: int | None = option(None, "maximum number of steps; null: num_epochs decides", at_least=1, free=True)
    clip_grad_norm_by: float | None = option(
        10000.0, "maximum global norm of the gradient; 0 or null: none", at_least=0, named=True
    )
    kl_grad_post_perc: float | None = option(
        None, "KL balancing: share of the KL that trains the posterior", at_least=0, named=True, models=CWVAE
    )
    free_nats: float | None = option(
        None, "free nats: KL per level and sequence that costs nothing", at_least=0, named=True, models=CWVAE
    )
    beta: float | tuple[float, ...] | None = option(
        None, "weight of the KL: one number, or one per level", at_least=0, named=True, models=CWVAE
    )
    seed: int | None = option(
        None, "the same seed repeats a run; null: random, saved with the run", at_least=0, named=True
    )

    coordinator_address: str | None = option(
        None,
        "host:port of process 0, for launchers that are not recognised",
        free=True,
        metavar="HOST:PORT",
    )
    num_processes: int | None = option(None, "number of processes", at_least=1, free=True)
    process_id: int | None = option(None, "number of this process, from 0", at_least=0, free=True)

    logdir: str = option(
        "logs",
        "directory of the runs; a run is in <logdir>/<dataset>/<run name>",
        free=True,
        metavar="DIR",
        group="SUMMARIES",
    )
    name: str | None = option(
        None,
        "run name; null: built from the configuration",
        later=True,
        free=True,
        metavar="NAME",
    )
    open_loop_ctx: int = option(
        36,
        "context frames of a prediction, a multiple of k**(levels-1); for svg, also in training",
        at_least=1,
        free=True,
    )
    num_val_batches: int = option(1, "batches in a validation", at_least=1, free=True)
    save_gifs: bool = option(True, "save videos of open-loop predictions", free=True)
    save_scalars_every: int = option(1000, "steps between logs of metrics", at_least=1, free=True)
    save_gifs_every: int = option(1000, "steps between videos", at_least=1, free=True)
    save_model_every: int = option(1000, "steps between checkpoints (the newest two are kept)", at_least=1, free=True)
    save_named_model_every: int = option(5000, "steps between checkpoints that are kept forever", at_least=1, free=True)
    wandb: str = option(
        "auto",
        "auto (online with an API key, else offline), online, offline or disabled",
        free=True,
        choices=["auto", "online", "offline", "disabled"],
    )
    tensorboard: bool = option(False, "also write TensorBoard event files (needs tensorboardX)", free=True, later=True)

    num_examples: int = option(100, "test sequences to evaluate", at_least=1, free=True, group="EVALUATION")
    num_samples: int = option(1, "predictions per sequence", at_least=1, free=True)
    use_obs: str | None = option(
        None,
        "levels that see the context, from level 0 up, e.g. TTF: all but the top",
        free=True,
        models=CWVAE,
        metavar="TF...",
    )
    no_save_grid: bool = option(False, "don't write predictions as PNG grids", free=True)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = coerce(field, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        if self.use_obs is not None:  # the TensorFlow code accepts lower case, too
            object.__setattr__(self, "use_obs", self.use_obs.upper())
        self._check()

    def _check(self) -> None:
        """Check each value's range or choices, then the combinations."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            numbers = value if isinstance(value, tuple) else (value,)
            for bound, holds in ("at_least", float.__ge__), ("above", float.__gt__):
                limit = field.metadata[bound]
                if limit is not None and not all(n is None or holds(float(n), float(limit)) for n in numbers):
                    raise ConfigError(f"{field.name}: must be {bound.replace('_', ' ')} {limit}, got {value!r}")
            if field.metadata["choices"]:
                choose(field.name, value, field.metadata["choices"])
        for field in dataclasses.fields(self):
            models, value = field.metadata["models"], getattr(self, field.name)
            if field.name not in read_by(self.model) and value != field.default:
                raise ConfigError(
                    f"{field.name}: {self.model} doesn't read it (it is for {' and '.join(models)}), got {value!r}; "
                    "leave it out"
                )
        if self.name is not None and (self.name == LATEST or not re.fullmatch(r"\w[\w.+-]*", self.name)):
            raise ConfigError(
                f"name: may have letters, digits and _ . + - only, must begin with a letter, a digit or _, and "
                f"can't be {LATEST}; got {self.name!r}"
            )
        if self.seed is not None and self.seed >= 2**32:  # JAX's keys are the same for seeds 2**32 apart
            raise ConfigError(f"seed: must be at most {2**32 - 1}, got {self.seed}")
        if self.levels > 30:
            raise ConfigError(f"levels: must be at most 30, got {self.levels}; the paper has 1 to 4")
        if self.split is not None and self.split >= 1:
            raise ConfigError(f"split: must be below 1, so that some videos are left for testing, got {self.split}")
        if self.channels not in CHANNELS[self.dataset]:
            allowed = " or ".join(map(str, CHANNELS[self.dataset]))
            raise ConfigError(f"channels: {self.dataset} has {allowed}, got {self.channels}; set --channels {allowed}")
        if self.dataset == "episodes" and self.model != "cwvae":
            raise ConfigError(
                f"dataset: {self.model} takes no actions, got episodes; set --model cwvae, or --dataset videos"
            )
        if len(self.digit_speed) != 2 or self.digit_speed[0] > self.digit_speed[1]:
            raise ConfigError(f"digit_speed: needs the slowest and the fastest speed, got {list(self.digit_speed)}")
        if self.kl_grad_post_perc is not None and self.kl_grad_post_perc > 1:
            raise ConfigError(f"kl_grad_post_perc: must be a share between 0 and 1, got {self.kl_grad_post_perc}")
        if isinstance(self.beta, tuple) and len(self.beta) != self.levels:
            raise ConfigError(
                f"beta: needs one number, or one for each of the {self.levels} levels, got {list(self.beta)}"
            )
        if self.use_obs is not None and not re.fullmatch(f"[TF]{{{self.levels}}}", self.use_obs):
            raise ConfigError(f"use_obs: needs one T or F for each of the {self.levels} levels, got {self.use_obs!r}")
        if self.model == "vta" and self.seq_len <= 2 * self.vta_init_size:
            raise ConfigError(
                f"seq_len: must be more than twice vta_init_size = {self.vta_init_size}, so that frames are left to "
                f"model, got {self.seq_len}"
            )
        block = self.block
        nearest_context = max(1, round(self.open_loop_ctx / block)) * block
        if self.open_loop_ctx % block:
            raise ConfigError(
                f"open_loop_ctx: must be a multiple of tmp_abs_factor**(levels-1) = {block}, "
                f"the frames of one tick of the top level, got {self.open_loop_ctx}; the nearest is {nearest_context}"
            )
        if self.eval_seq_len and self.open_loop_ctx >= self.eval_seq_len:
            raise ConfigError(
                f"open_loop_ctx: must be less than eval_seq_len = {self.eval_seq_len}, "
                f"so that frames are left to predict, got {self.open_loop_ctx}"
            )

    @property
    def block(self) -> int:
        """The number of frames of one tick of the top level. Chunks of a long video are multiples of it."""
        return self.tmp_abs_factor ** (self.levels - 1) if self.model == "cwvae" else 1

    @property
    def free(self) -> set[str]:
        """The keys that may change when the run is resumed."""
        return marked("free") - ({"open_loop_ctx"} if self.model == "svg" else set())

    @property
    def run_name(self) -> str:
        """The name of the run's directory: `name`, or else a name built from the configuration.

        The latter is the earlier codes' name, followed by the keys declared as `named` that aren't at their defaults.
        """
        c = self
        if c.name is not None:
            return c.name
        if c.model == "cwvae":
            model = (
                f"cwvae_{c.cell_type.lower()}_{c.levels}l_f{c.tmp_abs_factor}_decsd{c.dec_stddev}"
                f"_enchl{c.enc_dense_layers}_ences{c.enc_dense_embed_size}_edchnlmult{c.channels_mult}"
                f"_ss{c.cell_stoch_size}_ds{c.cell_deter_size}_es{c.cell_embed_size}"
            )
        else:
            deter = f"_ds{c.cell_deter_size}" if c.model == "vta" else ""
            model = f"{c.model}_decsd{c.dec_stddev}_ss{c.cell_stoch_size}{deter}"
        name = f"{c.dataset}_{model}_seq{c.seq_len}_lr{c.lr}_bs{c.batch_size}"
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.metadata["named"] and value != field.default:
                text = "-".join(map(str, value)) if isinstance(value, tuple) else value
                name += f"_{field.name.replace('_', '')}{text}"
        return name

    def updated(self, values: Mapping[str, Any], source: str) -> "Config":
        """Return this configuration with some values replaced.

        Raises:
            ConfigError: a key is unknown, or a value can't work; the message begins with the `source`.
        """
        return dataclasses.replace(self, **typed(values, source))

    def to_json(self) -> str:
        """Return all keys as JSON: `Config(**json.loads(text))` is the same Config."""
        return json.dumps(dataclasses.asdict(self))

    def to_yaml(self) -> str:
        """Return all keys as YAML: `load` reads the same Config from a file with this text."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        return yaml.safe_dump(values, sort_keys=False)


def marked(mark: str) -> set[str]:
    """Return the keys that are declared with a mark: "free", "named", "later" or "shapes"."""
    return {field.name for field in dataclasses.fields(Config) if field.metadata[mark]}


def read_by(model: str) -> set[str]:
    """Return the keys that a model reads."""
    fields = dataclasses.fields(Config)
    return {field.name for field in fields if not field.metadata["models"] or model in field.metadata["models"]}


def choose(key: str, value: str, choices: Sequence[str]) -> None:
    """Raise ConfigError unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigError(f"{key}: must be one of {', '.join(choices)}, got {value!r}{suggestion(value, choices)}")


def suggestion(word: str, choices: Sequence[str]) -> str:
    """Return '; did you mean ...?' with the most similar choice, or an empty text if none is similar."""
    matches = difflib.get_close_matches(word, choices, n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def coerce(field: dataclasses.Field, value: Any) -> Any:
    """Return `value` as the field's type.

    Text is parsed as YAML, and then as a number if YAML takes it for text, as it does 1e-4.

    Raises:
        ConfigError: `value` can't be converted.
    """
    kinds = typing.get_args(field.type) if isinstance(field.type, types.UnionType) else (field.type,)
    if isinstance(value, str) and value.strip().lower() in ("null", "none", "~", "") and type(None) in kinds:
        value = None
    if isinstance(value, str) and str not in kinds:
        with contextlib.suppress(yaml.YAMLError):
            value = yaml.safe_load(value)
    for kind in kinds:
        converted = convert(kind, value)
        if converted is not FAILED:
            return converted
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    wanted = " or ".join(names.get(kind, "a list of numbers") for kind in kinds)
    raise ConfigError(f"{field.name}: needs {wanted}, got {'null' if value is None else repr(value)}")


FAILED = object()


def convert(kind: Any, value: Any) -> Any:
    """Return `value` as `kind`, one of the fields' types, or FAILED if it can't be converted."""
    if kind is types.NoneType:
        return None if value is None else FAILED
    if kind is bool:
        return value if isinstance(value, bool) else FAILED
    if kind is str:
        return str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else FAILED
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple) or not value:
            return FAILED
        numbers = tuple(convert(float, item) for item in value)
        return FAILED if FAILED in numbers else numbers
    try:  # int and float
        number = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError, OverflowError):
        return FAILED
    if not math.isfinite(number):
        return FAILED
    if kind is float:
        return number
    return int(value if isinstance(value, int) else number) if number.is_integer() else FAILED


def typed(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return `values` with each value as its field's type.

    Raises:
        ConfigError: a key is unknown, or a value is of another type; the message begins with the `source`.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{source}: must hold `key: value` lines, got {type(values).__name__}")
    fields = {field.name: field for field in dataclasses.fields(Config)}
    for key in values:
        if key not in fields:
            raise ConfigError(f"{source}: unknown key {key!r}{suggestion(str(key), list(fields))}")
    try:
        return {key: coerce(fields[key], value) for key, value in values.items()}
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the values in a YAML file.

    Raises:
        ConfigError: the file can't be read, isn't a YAML mapping, or has an unknown key or a value of another type.
    """
    try:
        values = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: can't be read ({getattr(error, 'strerror', None) or 'not text'}); name a YAML file"
        ) from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    return typed({} if values is None else values, str(path))


def load(path: str | Path) -> Config:
    """Return the configuration in a YAML file, with defaults for missing keys.

    Raises:
        ConfigError: as `read_yaml` and `Config`.
    """
    return merged(path, {})


class Flag(NamedTuple):
    """A flag of a program that isn't a configuration key."""

    metavar: str
    """The placeholder of its value in `--help`."""
    help: str


def parse_flags(
    argv: Sequence[str],
    program: str,
    description: str,
    keys: bool = True,
    overrides_run: bool = False,
    examples: Sequence[str] = (),
    **special: Flag,
) -> tuple[dict[str, str], dict[str, str]]:
    """Parse a command line: `--key value`, `--key=value`, and for booleans also `--key`.

    Dashes in keys are the same as underscores.

    Args:
        argv: the arguments, without the program's name.
        program: the program's name and required flags, for `--help`.
        description: the description, for `--help`.
        keys: whether the program takes configuration keys.
        overrides_run: whether these keys replace values of a run. Then `--help` shows no defaults.
        examples: command lines, for `--help`.
        **special: the program's flags that aren't configuration keys. A key of the same name is hidden.

    Returns:
        The special flags and the configuration keys that were given, both as text.

    Raises:
        ConfigError: a flag is unknown, or its value is missing or empty.
    """
    parser = ArgumentParser(
        usage=f"python {program.removeprefix('python ')} [--flag value ...]",
        description=inspect.cleandoc(description),
        epilog="\n  ".join(["examples:", *examples]) if examples else None,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for key, flag in special.items():
        parser.add_argument(f"--{key}", help=flag.help, metavar=flag.metavar)
    fields = [field for field in dataclasses.fields(Config) if keys and field.name not in special]
    if keys:
        order = "The run's values, unless set here" if overrides_run else "Defaults < YAML < these < wandb"
        parser.add_argument_group("keys of the configuration", f"{order}; docs/configuration.md says more.")
        for name, members in sorted(groups().items(), key=lambda item: overrides_run and item[0] != "EVALUATION"):
            group = parser.add_argument_group(name)
            for field in members:
                if field in fields:
                    optional: Any = {"nargs": "?", "const": "true"} if field.type is bool else {}
                    default = "" if overrides_run else f" (default: {default_text(field)})"
                    help = field.metadata["help"] + default
                    group.add_argument(f"--{field.name}", help=help, metavar=metavar(field), **optional)
    argv = [re.sub(r"^--[^=]+", lambda m: "--" + m[0][2:].replace("-", "_"), arg) for arg in argv]
    given, rest = parser.parse_known_args(argv)
    if rest:
        flags = ["--" + key for key in [*special, *(field.name for field in fields)]]
        name = rest[0].split("=")[0]
        raise ConfigError(f"command line: unknown argument {rest[0]!r}{suggestion(name, flags)}")
    values = vars(given)
    if empty := [key for key, value in values.items() if not value]:  # for example, an unset variable of the shell
        raise ConfigError(f"{empty[0]}: the value is empty; give one, or leave --{empty[0]} out")
    return {k: v for k, v in values.items() if k in special}, {k: v for k, v in values.items() if k not in special}


def groups() -> dict[str, list[dataclasses.Field]]:
    """Return the fields of the keys, by the headings under which they are declared."""
    fields: dict[str, list[dataclasses.Field]] = {}
    name = ""
    for field in dataclasses.fields(Config):
        name = field.metadata["group"] or name
        fields.setdefault(name, []).append(field)
    return fields


def default_text(field: dataclasses.Field) -> str:
    """Return the default of a key as YAML."""
    return field.default if isinstance(field.default, str) else json.dumps(field.default)


def metavar(field: dataclasses.Field) -> str:
    """Return the placeholder of a key's value in `--help`: its choices or its types."""
    if field.metadata["metavar"]:
        return str(field.metadata["metavar"])
    if field.metadata["choices"]:
        return "{" + ",".join(field.metadata["choices"]) + "}"
    names = {int: "INT", float: "NUMBER", bool: "{true,false}", str: "TEXT"}
    kinds = typing.get_args(field.type) if isinstance(field.type, types.UnionType) else (field.type,)
    return "|".join(names.get(kind, "LIST") for kind in kinds if kind is not types.NoneType)


def whole_number(given: Mapping[str, str], key: str, default: int, at_least: int = 1) -> int:
    """Return the value of a special flag that is a whole number.

    Raises:
        ConfigError: it isn't one, or is too small.
    """
    try:
        value = int(given.get(key, default))
    except ValueError:
        value = at_least - 1
    if value < at_least:
        raise ConfigError(f"{key}: must be a whole number of at least {at_least}, got {given[key]!r}")
    return value


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser that raises its errors as ConfigErrors, without the usage, which would fill the screen."""

    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(f"command line: {message}")


def merged(path: str | Path | None, flags: Mapping[str, str]) -> Config:
    """Return the merged configuration: defaults < YAML file, if any < flags.

    Raises:
        ConfigError: the file is for another model than the flags name; or as `read_yaml`, `typed` and `Config`.
    """
    if path is not None and not Path(path).exists():
        folder = Path(__file__).with_name("configs")
        names = sorted(file.relative_to(folder).with_suffix("").as_posix() for file in folder.glob("**/*.yml"))
        names = [name for name in names if not name.startswith("sweeps/")]
        (closest,) = difflib.get_close_matches(Path(path).stem, names, n=1) or ["NAME"]
        example = os.path.relpath(folder / f"{closest}.yml")
        raise ConfigError(f"{path}: no such file; name a YAML file such as {example}; there are {', '.join(names)}")
    values, given = read_yaml(path) if path is not None else {}, typed(flags, "command line")
    model, asked = values.get("model", Config.model), given.get("model")
    foreign = [key for key in values if asked in MODELS and key not in read_by(asked)]
    if path is not None and asked is not None and asked != model and foreign:
        root = Path(path).parent if model == Config.model else Path(path).parent.parent
        counterpart = (root if asked == Config.model else root / asked) / Path(path).name
        remedy = f"name {counterpart}" if counterpart.exists() else f"name a configuration of {asked}"
        raise ConfigError(
            f"model: {path} is for {model} (it sets {foreign[0]}), got {asked}; {remedy}, or leave --model out"
        )
    return Config(**values | given)


def parse(
    argv: Sequence[str],
    program: str = "train.py",
    description: str = "Train a Clockwork VAE.",
    examples: Sequence[str] = (),
) -> Config:
    """Return the configuration of a command line: defaults < `--config` file < flags.

    Raises:
        ConfigError: as `parse_flags` and `program_config`.
    """
    config = Flag("FILE", "YAML file, e.g. configs/minerl.yml")
    special, flags = parse_flags(argv, program, description, examples=examples, config=config)
    return program_config(program, special.get("config"), flags)


def program_config(program: str, path: str | None, flags: Mapping[str, str]) -> Config:
    """Return the merged configuration of a program, as `merged`, if the dataset is named.

    A file, a flag or a wandb sweep can name it. The default isn't used unnamed, because it is a large download.

    Raises:
        ConfigError: the dataset isn't named; or as `merged`.
    """
    config = merged(path, flags)
    if path is None and "dataset" not in flags and "WANDB_SWEEP_ID" not in os.environ:
        raise ConfigError(
            f"dataset: none is named, and the default, {Config.dataset}, is a large download (8.2 GB decoded); "
            f"call {program} --config configs/{Config.dataset}.yml for it, or {program} --config configs/debug.yml for "
            "digits that need no download"
        )
    return config

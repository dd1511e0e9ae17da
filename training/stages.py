"""Train in stages, each from the parameters of the stage before: python -m training.stages --config configs/long.yml

The arguments are those of train.py, and training resumes in the same way. The run of the last stage is where train.py
would put it; those of the earlier stages are in `<logdir>/stages/<number>`. With `--scale 0.01`, each stage has a
hundredth of its steps, for a quick try. docs/notebook/results.md says what the stages are for.
"""

import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import config as configuration
import train
from config import Config, ConfigError, Flag
from system.interrupts import exit_codes
from training import loading, runs


class Stage(NamedTuple):
    """The keys that a stage sets. Each stage has 432 frames per step."""

    seq_len: int
    batch_size: int
    max_steps: int
    lr: float
    """A factor of the configuration's `lr`."""
    top_beta: float = 1.0
    """The weight of the top level's KL, in a cwvae with several levels."""


STAGES = (
    Stage(seq_len=36, batch_size=12, max_steps=4000, lr=1.0, top_beta=0.03),
    Stage(seq_len=108, batch_size=4, max_steps=4000, lr=1.0),
    Stage(seq_len=216, batch_size=2, max_steps=2400, lr=0.5),
    Stage(seq_len=216, batch_size=2, max_steps=1200, lr=0.1),
)


def configurations(argv: Sequence[str]) -> Iterator[Config]:
    """Yield the configuration of each stage. Each one needs the run of the stage before.

    Raises:
        ConfigError: a flag is a key that stages set, or a stage was trained at another scale; or as `config.parse`.
    """
    special, flags = configuration.parse_flags(
        argv,
        "python -m training.stages",
        "Train in stages, each from the parameters of the one before.",
        examples=["python -m training.stages --config configs/long.yml --logdir logs/long"],
        config=Flag("FILE", "YAML file, e.g. configs/long.yml"),
        scale=Flag("NUMBER", "factor of each stage's steps, e.g. 0.01 to try it (default: 1)"),
    )
    scale = parse_scale(special.get("scale", "1"))
    for key in "seq_len", "batch_size", "num_epochs", "max_steps", "beta", "init_from":
        if key in flags:
            raise ConfigError(f"{key}: each stage has its own, got {flags[key]}; leave it out, or call train.py")
    base = configuration.program_config("python -m training.stages", special.get("config"), flags)
    source = None
    for number, stage in enumerate(STAGES, 1):
        beta = None
        if stage.top_beta != 1 and base.model == "cwvae" and base.levels > 1:
            beta = (1.0,) * (base.levels - 1) + (stage.top_beta,)
        c = dataclasses.replace(
            base,
            logdir=base.logdir if number == len(STAGES) else f"{base.logdir}/stages/{number}",
            seq_len=stage.seq_len,
            batch_size=stage.batch_size,
            max_steps=max(1, round(stage.max_steps * scale)),
            lr=base.lr * stage.lr,
            beta=beta,
            init_from=source,
        )
        require_same_scale(c)
        yield c
        source = str(runs.directory(c))


def parse_scale(text: str) -> float:
    """Return the scale as a number. Raise ConfigError unless it is finite and above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise ConfigError(f"scale: must be a number above 0, got {text!r}")
    return value


def require_same_scale(config: Config) -> None:
    """Raise ConfigError if the stage's run has another number of steps: the next stage starts from its last step."""
    run = runs.directory(config)
    if not (run / "config.yml").exists():
        return
    steps = loading.saved_keys(run / "config.yml")["max_steps"]
    if steps != config.max_steps:
        raise ConfigError(
            f"scale: {run} is for {steps} steps, got a scale for {config.max_steps}; set the same --scale, or choose "
            "another --logdir"
        )


def main() -> None:
    with exit_codes():
        train.train_all(configurations(sys.argv[1:]), work=[stage.max_steps for stage in STAGES])


if __name__ == "__main__":
    main()

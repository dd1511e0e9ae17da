"""The import path, fixtures and a tiny configuration, for all tests."""

import contextlib
import dataclasses
import functools
import gc
import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
# Compiling takes most of the time of tiny models. So compiled programs aren't optimised, and all tests share them.
os.environ |= {
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
}
OPTIMIZED = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
"""The environment of programs that are run as users run them."""

import jax  # noqa: E402
import pytest  # noqa: E402

import analyses.export  # noqa: E402
import analyses.worker  # noqa: E402
import config as configuration  # noqa: E402
import eval  # noqa: E402
import train  # noqa: E402
from config import Config  # noqa: E402
from sequences.interface import Model  # noqa: E402
from training import models, runs  # noqa: E402
from training.step import make_train_step  # noqa: E402

# JAX keeps many objects. Without higher thresholds, tracing makes Python search them for garbage again and again.
gc.set_threshold(100_000, 50, 50)

TINY = dict(
    dataset="digits",
    levels=2,
    tmp_abs_factor=2,
    enc_dense_layers=2,
    enc_dense_embed_size=6,
    cell_stoch_size=3,
    cell_deter_size=5,
    cell_embed_size=4,
    filters=1,
    seq_len=8,
    eval_seq_len=12,
    open_loop_ctx=4,
    batch_size=2,
    num_examples=3,
    lr=1e-3,
    max_steps=4,
    seed=0,
    save_gifs=False,
    wandb="disabled",
)


def tiny_keys(model: str) -> dict:
    """Return the keys of TINY that a model reads."""
    return {key: value for key, value in TINY.items() if key in configuration.read_by(model)}


def flags(**keys) -> list[str]:
    """Return a tiny configuration as a program's flags."""
    return [f"--{key}={'null' if value is None else value}" for key, value in (TINY | keys).items()]


def log_of(run: Path) -> list[dict]:
    """Return the lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@contextlib.contextmanager
def full_disk(size=20_000):
    """Limit files to `size` bytes within the block: longer writes fail in the system, as on a full disk."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture(autouse=True, scope="session")
def compile_once():
    """Share compiled functions between configurations that differ only in keys that don't change them.

    All get the dataset `videos`, which takes any number of channels.
    """

    def model(config: Config) -> Model:
        keys = [
            *("logdir", "name", "datadir", "wandb", "tensorboard"),
            *("num_epochs", "max_steps", "save_model_every", "save_scalars_every"),
            *("save_named_model_every", "save_gifs", "num_examples", "num_samples", "no_save_grid"),
            *("num_digits", "digit_speed", "random_start", "rebuild_frames"),
        ]
        default = Config()
        shared = {key: getattr(default, key) for key in keys} | {"dataset": "videos"}
        return models.make_model(dataclasses.replace(config, **shared))

    with pytest.MonkeyPatch.context() as patch:
        for program in train, eval, analyses.worker, analyses.export:
            patch.setattr(program, "make_model", model)
        patch.setattr(train, "make_train_step", functools.cache(make_train_step))
        yield


@pytest.fixture(autouse=True)
def room_for_compiled_programs():
    """Forget compiled programs before their memory mappings run out.

    Linux allows a process 65,530 mappings, and XLA crashes if none is left.
    """
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > 45_000:
        jax.clear_caches()


@pytest.fixture
def tiny(tmp_path) -> Config:
    """Return a configuration that compiles and trains in seconds."""
    return Config(**TINY, logdir=str(tmp_path / "logs"), datadir=str(tmp_path / "datasets"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """Return the run directory of a tiny training, with checkpoints at steps 2 and 4. Tests that write to it use `run`."""
    folder = tmp_path_factory.mktemp("trained")
    c = Config(**TINY, logdir=str(folder / "logs"), datadir=str(folder / "datasets"))
    c = dataclasses.replace(c, save_model_every=2, save_named_model_every=2)
    train.train(c)
    return runs.directory(c)


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """Return a copy of the trained run, in its own log directory."""
    return Path(shutil.copytree(trained, tmp_path / "logs" / trained.parent.name / trained.name))

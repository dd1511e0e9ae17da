"""What the tests share: the import path, a tiny configuration."""

import dataclasses
import functools
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import eval  # noqa: E402
import train  # noqa: E402
from config import Config  # noqa: E402
from cwvae import CWVAE  # noqa: E402

TINY = dict(
    dataset="digits",
    levels=3,
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


@pytest.fixture(autouse=True, scope="session")
def compile_once():
    """Trainings that differ only in what the model and its training step don't depend on share what was compiled."""

    def model(config: Config) -> CWVAE:
        keys = "logdir", "datadir", "wandb", "num_epochs", "max_steps", "save_model_every", "save_scalars_every"
        default = Config()
        return CWVAE(dataclasses.replace(config, **{key: getattr(default, key) for key in keys}))

    with pytest.MonkeyPatch.context() as patch:
        for program in train, eval:
            patch.setattr(program, "CWVAE", model)
        patch.setattr(train, "make_train_step", functools.cache(train.make_train_step))
        yield


@pytest.fixture
def tiny(tmp_path) -> Config:
    """A configuration that compiles and trains in seconds."""
    return Config(**TINY, logdir=str(tmp_path / "logs"), datadir=str(tmp_path / "datasets"))

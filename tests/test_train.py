"""Training as a user runs it, on a tiny model: repeatable to the bit, resumable, logged, and effective."""

import dataclasses
import errno
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import filelock
import jax
import numpy as np
import pytest
import yaml
from conftest import ROOT, TINY, flags, full_disk, log_of
from helpers import assert_same, parameters

import config as configuration
import data
import eval
import tools
import train
from config import Config, ConfigError
from cwvae import CWVAE
from sequences import rollout
from sequences.noise import key_for, sequence_keys
from system import files
from system.checkpoints import Checkpoints
from system.devices import Devices
from training import loading, runs
from training.step import make_optimizer, make_state, make_train_step
from videos.digits import MovingDigits


def test_a_training_writes_checkpoints_videos_and_logs(tiny, capsys):
    c = dataclasses.replace(
        tiny,
        max_steps=5,
        save_gifs=True,
        save_scalars_every=2,
        save_gifs_every=2,
        save_model_every=2,
        save_named_model_every=3,
    )
    state = train.train(c)
    run = runs.directory(c)
    assert int(state.step) == 5
    assert configuration.load(run / "config.yml") == c
    assert {p.name for p in (run / "checkpoints").iterdir() if p.name.isdigit()} == {"3", "4", "5"}
    assert {p.name for p in (run / "videos").iterdir()} == {
        f"{name}_000000{i}.gif" for name in ("train", "validation") for i in (2, 4, 5)
    }
    logged = log_of(run)
    assert [line["step"] for line in logged] == [2, 4, 5]
    names = ["loss", "nll_term", "kl_term"] + [
        f"avg_{kind}__level_{i}"
        for i in range(2)
        for kind in ("kl_prior_posterior", "entropy_prior", "entropy_posterior")
    ]
    want = {f"{split}/{name}" for split in ("train", "validation") for name in names} | {
        "train/grad_norm",
        "train/learning_rate",
        "step",
    }
    assert set(logged[0]) == want and all(np.isfinite(list(logged[0].values())))
    line = logged[0]
    for split in "train", "validation":
        assert line[f"{split}/loss"] == pytest.approx(line[f"{split}/nll_term"] + line[f"{split}/kl_term"], rel=1e-5)
        levels = sum(line[f"{split}/avg_kl_prior_posterior__level_{i}"] for i in range(2))
        assert line[f"{split}/kl_term"] == pytest.approx(levels, rel=1e-4)
    assert f"python eval.py --logdir {run}" in capsys.readouterr().out


def test_training_is_repeatable_and_resumes_exactly(tiny, tmp_path):
    """To the bit: parameters, optimizer state and metrics."""
    often = dataclasses.replace(tiny, save_model_every=2, save_scalars_every=1)
    whole = parameters(train.train(often))
    elsewhere = dataclasses.replace(often, logdir=str(tmp_path / "again"))
    assert_same(whole, parameters(train.train(elsewhere)))
    interrupted = dataclasses.replace(often, logdir=str(tmp_path / "interrupted"))
    train.train(dataclasses.replace(interrupted, max_steps=2))
    assert len(log_of(runs.directory(interrupted))) == 2
    assert_same(whole, parameters(train.train(interrupted)))
    assert log_of(runs.directory(interrupted)) == log_of(runs.directory(often))
    # A complete run isn't trained again.
    assert_same(whole, parameters(train.train(interrupted)))
    assert log_of(runs.directory(interrupted)) == log_of(runs.directory(often))
    other = parameters(train.train(dataclasses.replace(often, seed=1)))
    assert not np.array_equal(jax.tree.leaves(other.params)[0], jax.tree.leaves(whole.params)[0])


def test_digits_drawn_on_devices_train_the_same_model(tiny, tmp_path, monkeypatch):
    """To the bit, with a partial last batch."""
    few = dataclasses.replace(tiny, batch_size=3, num_epochs=1, max_steps=2)
    monkeypatch.setattr(MovingDigits, "VIDEOS", {"train": 4, "test": 4})
    host = parameters(train.train(few))
    monkeypatch.setattr(data, "on_cpu", lambda: False)
    monkeypatch.setattr(MovingDigits, "__getitem__", without(MovingDigits.__getitem__, "train"))
    assert_same(host, parameters(train.train(dataclasses.replace(few, logdir=str(tmp_path / "devices")))))


def without(getitem, split):
    """Return a `__getitem__` that fails for a split, so that the host can't draw its videos."""

    def get(videos, index):
        assert videos.split != split
        return getitem(videos, index)

    return get


def test_random_seed_is_saved_and_used_on_resume(tiny):
    c = dataclasses.replace(tiny, seed=None, max_steps=1)
    train.train(c)
    seed = configuration.load(runs.directory(c) / "config.yml").seed
    assert seed is not None
    train.train(dataclasses.replace(c, max_steps=2))
    assert configuration.load(runs.directory(c) / "config.yml").seed == seed
    # Everything is in one directory, whose name doesn't have the random seed.
    assert list(Path(c.logdir).glob("digits/*")) == [runs.directory(c)]
    assert (runs.directory(c) / "metrics.jsonl").exists() and (runs.directory(c) / "checkpoints" / "2").exists()


def test_a_runs_own_configuration_names_that_run(tiny):
    """Also if the seed is random, and therefore not part of the name."""
    for seed in None, 7:
        c = dataclasses.replace(tiny, seed=seed)
        with runs.opened(c, Devices()) as run:
            run.restore(CWVAE(run.config))
        saved = configuration.load(run.path / "config.yml")
        assert saved.seed is not None and runs.directory(saved) == run.path
        assert runs.directory(dataclasses.replace(saved, seed=saved.seed + 1)) != run.path
        with runs.opened(saved, Devices()) as again:
            assert (again.path, again.config) == (run.path, run.config)


def test_init_from_copies_only_the_parameters(tiny, tmp_path):
    """The second stage starts from the first one's parameters only. Resuming it doesn't need the first stage."""
    first = train.train(dataclasses.replace(tiny, max_steps=2))
    source = runs.directory(tiny)
    c = dataclasses.replace(tiny, digit_speed=(1, 3), init_from=str(source), save_model_every=1)
    state = loading.initial_state(CWVAE(c))
    assert_same(parameters(state).params, parameters(first).params)
    assert state.step == 0 and not any(np.any(x) for x in jax.tree.leaves(state.opt_state))

    whole = parameters(train.train(c))
    assert configuration.load(runs.directory(c) / "config.yml").init_from == str(source)
    parts = dataclasses.replace(c, logdir=str(tmp_path / "parts"))
    train.train(dataclasses.replace(parts, max_steps=2))
    source.rename(tmp_path / "gone")
    assert_same(whole, parameters(train.train(parts)))


def test_a_wrong_init_from_is_refused(tiny, tmp_path):
    """In one line, before anything is written that would prevent a right start later."""
    with runs.opened(tiny, Devices()) as run:
        _, state, _ = run.restore(CWVAE(tiny))
        run.save(1, state, {})
    source = runs.directory(tiny)
    other = dataclasses.replace(tiny, logdir=str(tmp_path / "other"))
    for keys, message in (
        (dict(init_from=str(tmp_path / "nowhere")), "init_from: logdir: .*nowhere is not a directory"),
        (
            dict(init_from=str(source / "checkpoints" / "7")),
            "init_from: logdir: .*checkpoints has no step 7; name one of",
        ),
        (dict(init_from=str(source), cell_deter_size=6), r"init_from: .* params/cell_0/\S+ first \(.*config.yml"),
        (dict(init_from=str(source), levels=1), r"init_from: .* params/cell_1/\S+ first \(\(.*\) there, None here\)"),
    ):
        c = dataclasses.replace(other, **keys)
        with pytest.raises(ConfigError, match=message):
            train.train(c)
        assert not (runs.directory(c) / "config.yml").exists()
    right = dataclasses.replace(other, init_from=str(source))
    with runs.opened(right, Devices()) as run:
        assert run.restore(CWVAE(right))[0] == 0


def files_of(run):
    """Return the content of each file of a run, except its lock."""
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "lock"}


def test_resuming_with_other_keys_is_refused(tiny):
    train.train(dataclasses.replace(tiny, max_steps=1))
    run = runs.directory(tiny)
    values = yaml.safe_load((run / "config.yml").read_text())
    (run / "config.yml").write_text(yaml.safe_dump(values | {"lr": 0.5, "cell_min_stddev": 0.1}))
    before = files_of(run)
    with pytest.raises(
        ConfigError, match=r"another cell_min_stddev \(0.1 there, 0.0001 now\), lr \(0.5 there, 0.001 now\)"
    ):
        train.train(tiny)
    assert before == files_of(run)


def test_videos_of_trainings_need_a_context_shorter_than_seq_len(tiny):
    with pytest.raises(ConfigError, match="open_loop_ctx: must be less than seq_len = 8"):
        train.train(dataclasses.replace(tiny, open_loop_ctx=8, save_gifs=True))


def test_padding_does_not_change_a_training_step(tiny):
    """A batch of 2, padded to 4 rows with noise, gives the same loss and parameters."""
    model, devices = CWVAE(tiny), Devices()
    take_step = make_train_step(model)
    windows = data.windows(tiny, "train")
    video = np.stack([windows[i] for i in range(2)])
    padding = np.random.default_rng(0).integers(0, 256, video.shape, dtype=np.uint8)
    results = []
    for rows, weight in (video, [1, 1]), (np.concatenate([video, padding]), [1, 1, 0, 0]):
        state = devices.replicate(make_state(model))
        results.append(take_step(state, data.Batch(rows[None], np.array(weight, np.float32)[None])))
    for a, b in zip(jax.tree.leaves(results[0]), jax.tree.leaves(results[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_one_compiled_step_serves_all_seeds(tiny):
    batch = data.Batch(np.zeros((1, 2, 8, 64, 64, 1), np.uint8), np.ones((1, 2), np.float32))
    programs = set()
    for seed in 1, 2:
        model = CWVAE(dataclasses.replace(tiny, seed=seed))
        step = make_train_step(model)
        programs.add(step.func.lower(*step.args, make_state(model), batch).as_text())
    assert len(programs) == 1


def test_the_optimizer_clips_gradients_and_is_adam(tiny):
    """The first step of Adam is lr * g / (|g| + eps), where g is clipped by the global norm."""
    import jax.numpy as jnp

    g = {"a": jnp.array([3e-3, -4e-3])}
    for clip, scale in (10000, 1.0), (0, 1.0), (None, 1.0), (1e-3, 0.2):
        optimizer = make_optimizer(CWVAE(dataclasses.replace(tiny, clip_grad_norm_by=clip, lr=0.1)))
        updates, _ = optimizer.update(g, optimizer.init(g))
        clipped = g["a"] * scale
        np.testing.assert_allclose(updates["a"], -0.1 * clipped / (abs(clipped) + 1e-4), rtol=1e-4)


def test_validation_does_not_depend_on_batch_size(tiny):
    model = CWVAE(tiny)
    params = make_state(model).params
    windows = data.windows(tiny, "test")
    test = [windows[i] for i in range(6)]
    results = []
    for batch_size, batches in (2, 3), (6, 1), (4, 2):
        c = dataclasses.replace(tiny, batch_size=batch_size, num_val_batches=batches)
        results.append(train.validate(CWVAE(c), params, test, Devices()))
    for other in results[1:]:
        for name, value in results[0].items():
            assert other[name] == pytest.approx(value, rel=1e-4), name


def test_open_loop_videos_predict_only_from_the_context(tiny):
    model = CWVAE(tiny)
    params = make_state(model).params
    test = data.windows(tiny, "test")
    video = np.stack([test[0], test[1]])
    changed = video.copy()
    changed[:, tiny.open_loop_ctx :] = 255 - changed[:, tiny.open_loop_ctx :]
    a, b = (train.open_loop_video(model, params, data.Window(v, None)) for v in (video, changed))
    assert a.shape == (12, 14 + 2 + 64 + 2 + 64 + 2 + 14, 3 * 68, 3)
    np.testing.assert_array_equal(a[:, :, 68 : 2 * 68], b[:, :, 68 : 2 * 68])
    np.testing.assert_array_equal(a[5, 16:80, 2:66, 0], video[0, 5, ..., 0])
    context, keys = video[:, : tiny.open_loop_ctx], sequence_keys(key_for("videos", tiny), 0, 2)
    seen = rollout.open_loop(model, params, context, keys, 12 - tiny.open_loop_ctx)
    frames = np.asarray(tools.to_uint8(seen.reconstruction))
    np.testing.assert_array_equal(a[0, 16:80, 70:134, 0], frames[0, 0, ..., 0])


@pytest.mark.slow
def test_a_small_model_learns_to_reconstruct(tmp_path):
    """After 60 steps, it explains frames much better than the mean frame does."""
    c = configuration.load(ROOT / "configs" / "debug.yml")
    c = dataclasses.replace(
        c,
        max_steps=60,
        batch_size=4,
        seed=0,
        wandb="disabled",
        logdir=str(tmp_path),
        save_gifs=False,
        save_scalars_every=60,
    )
    train.train(c)
    (line,) = log_of(runs.directory(c))
    windows = data.windows(c, "test")
    frames = np.concatenate([windows[i] for i in range(50)]) / 255
    of_mean_frame = 0.5 * ((frames - frames.mean(0)) ** 2).sum((1, 2, 3)).mean() / c.dec_stddev**2
    constant = 64 * 64 * (np.log(c.dec_stddev) + 0.5 * np.log(2 * np.pi))
    assert line["validation/loss"] - constant < 0.8 * of_mean_frame
    assert line["validation/nll_term"] - constant > 0


# ---------------------------------------------------------------------------------------------- wandb


def run_program(program, arguments, home, **environment):
    variables = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"HOME": str(home)} | environment
    return subprocess.run(
        [sys.executable, ROOT / program, *arguments], capture_output=True, text=True, cwd=home, env=variables
    )


def test_without_a_login_wandb_is_offline_and_training_continues(tmp_path):
    done = run_program("train.py", flags(wandb="auto", max_steps=2, save_gifs=True), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wandb: offline, since no API key is configured") == 1
    (run,) = tmp_path.glob("logs/digits/*")
    assert len(log_of(run)) == 1
    assert list(tmp_path.glob("logs/wandb/offline-run-*/*.wandb"))
    saved = (run / "wandb_id").read_text()
    done = run_program("train.py", flags(wandb="auto", max_steps=3, save_gifs=True), tmp_path)
    assert done.returncode == 0 and (run / "wandb_id").read_text() == saved
    # One call uploads both directories, which have the same id, in the order of their times.
    both = [f"{path.parent.name}/{path.name}" for path in tmp_path.glob("logs/wandb/offline-run-*/*.wandb")]
    assert len(both) == 2 and all(path.endswith(f"-{saved}/run-{saved}.wandb") for path in both)
    wandb = [sys.executable, "-m", "wandb", "sync", "--dry-run"]
    listed = subprocess.run(
        wandb, capture_output=True, text=True, cwd=tmp_path / "logs", env=os.environ | {"HOME": str(tmp_path)}
    )
    assert "2 run(s)" in listed.stderr, listed


def test_a_refused_training_leaves_the_wandb_of_the_running_one_alone(tmp_path):
    arguments = flags(wandb="offline", max_steps=1)
    (run,) = (runs.directory(Config(**TINY | dict(wandb="offline", logdir=str(tmp_path / "logs")))),)
    with runs.locked(run):
        (run / "wandb_id").write_text("live")
        done = run_program("train.py", arguments, tmp_path)
        assert done.returncode == 2 and "is being trained by another process" in done.stderr
    assert not list(tmp_path.glob("logs/wandb/*")) and (run / "wandb_id").read_text() == "live"
    done = run_program("train.py", arguments, tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("logs/wandb/offline-run-*-live")) and (run / "wandb_id").read_text() == "live"


def test_a_sweep_overrides_flags_which_override_yaml(tmp_path):
    """Like wandb's agent, the environment names a file with the sweep's values."""
    (tmp_path / "sweep.yml").write_text("wandb_version: 1\nnum_digits: {value: 3}\ndigit_speed: {value: [1, 5.5]}\n")
    (tmp_path / "base.yml").write_text("num_digits: 1\ncell_embed_size: 4\nenc_dense_layers: 1\n")
    environment = dict(WANDB_SWEEP_ID="abc", WANDB_RUN_ID="run1", WANDB_SWEEP_PARAM_PATH=str(tmp_path / "sweep.yml"))
    keys = {
        key: value
        for key, value in (TINY | dict(num_digits=2, wandb="offline", max_steps=1)).items()
        if key != "cell_embed_size"
    }
    arguments = [
        "--config=base.yml",
        *(f"--{key}={value}" for key, value in keys.items() if key != "enc_dense_layers"),
        "--enc_dense_layers=2",
    ]
    done = run_program("train.py", arguments, tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("logs/digits/*/config.yml")
    c = configuration.load(path)
    assert (c.num_digits, c.digit_speed, c.enc_dense_layers, c.cell_embed_size) == (3, (1.0, 5.5), 2, 4)
    assert path.parent.name == c.run_name
    (tmp_path / "sweep.yml").write_text("wandb_version: 1\nlevels: {value: 0}\n")
    done = run_program("train.py", arguments, tmp_path, **environment | {"WANDB_RUN_ID": "run2"})
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == "error: levels: must be at least 1, got 0"


def test_a_missing_dataset_is_refused_in_one_line(tmp_path):
    """Offline, without a zip put by hand: within seconds, and with the URL and the folder for the zip."""
    for name in "minerl", "mazes", "mmnist":
        begin = time.monotonic()
        done = run_program(
            "train.py", [f"--config={ROOT}/configs/{name}.yml", "--wandb=disabled"], tmp_path, **NO_NETWORK
        )
        assert time.monotonic() - begin < 30
        assert done.returncode == 2, done.stderr
        last = done.stderr.splitlines()[-1]
        assert last.startswith(f"error: dataset: {name} can't be downloaded from https://archive.org/download/"), (
            done.stderr
        )
        assert "datasets/downloads/manual" in last
        assert not (tmp_path / "logs").exists()


NO_NETWORK = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "no_proxy": ""}


def test_a_damaged_newest_checkpoint_loses_only_its_steps(tiny, capsys):
    c = dataclasses.replace(tiny, save_model_every=2)
    whole = parameters(train.train(c))
    for file in (runs.directory(c) / "checkpoints" / "4" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    again = parameters(train.train(c))
    assert "resumed at step 2" in capsys.readouterr().out
    assert_same(whole, again)
    with Checkpoints(runs.directory(c) / "checkpoints") as checkpoints:
        assert_same(whole, checkpoints.load(4, whole)[0])


def test_a_run_with_only_damaged_checkpoints_is_left_alone(run):
    """Training it again from the first step would cut its log, and replace checkpoints that may be restored."""
    for file in (run / "checkpoints").glob("*/state/**/*"):
        if file.is_file():
            file.write_bytes(b"")
    before = files_of(run)
    with pytest.raises(ConfigError, match=r"2 is damaged .* restore one, or choose another --name or --logdir"):
        train.train(dataclasses.replace(configuration.load(run / "config.yml"), logdir=str(run.parent.parent)))
    assert files_of(run) == before


def test_a_failed_write_leaves_the_configuration(run, tiny):
    """An unchanged configuration isn't written again, and a failed write leaves the old one."""
    saved, log = (run / "config.yml").read_bytes(), (run / "metrics.jsonl").read_bytes()
    inode = (run / "config.yml").stat().st_ino
    c = dataclasses.replace(tiny, logdir=str(run.parent.parent), save_model_every=2, save_named_model_every=2)
    c = dataclasses.replace(c, datadir=configuration.load(run / "config.yml").datadir, num_epochs=100_000)
    with full_disk(0), pytest.raises(ConfigError, match=r"^logdir: .* can't be made or written \(File too large\)"):
        train.train(c)
    assert (run / "config.yml").read_bytes() == saved and (run / "metrics.jsonl").read_bytes() == log
    assert (run / "config.yml").stat().st_ino == inode
    files.replace_file(run / "config.yml", saved)
    assert (run / "config.yml").stat().st_ino == inode
    assert not list(run.glob(".config.yml.*"))


@pytest.mark.parametrize("damage, reason", [("empty", "it is empty"), ("zeros", "it is empty"), ("cut", "it lacks")])
def test_a_damaged_configuration_is_named(run, tiny, damage, reason):
    path = run / "config.yml"
    cut = b"".join(path.read_bytes().splitlines(keepends=True)[:5])
    path.write_bytes({"empty": b"", "zeros": bytes(len(cut)), "cut": cut}[damage])
    message = rf"{re.escape(str(path))} is damaged \({reason}"
    with pytest.raises(ConfigError, match=message):
        train.train(dataclasses.replace(tiny, logdir=str(run.parent.parent)))
    with pytest.raises(ConfigError, match=message):
        eval.parse(["--logdir", str(run)])


def test_a_logdir_that_cannot_be_written_is_refused(tiny, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    for logdir in tmp_path / "file", tmp_path / "file" / "logs", Path("/proc/logs"):
        with pytest.raises(
            ConfigError, match=rf"^logdir: {logdir}.* can't be made or written .*choose another --logdir"
        ):
            train.train(dataclasses.replace(tiny, logdir=str(logdir)))

    read_only, no_locks = OSError(errno.EROFS, os.strerror(errno.EROFS)), NotImplementedError("no locks here")
    for target, name, error, message in (
        (runs, "directory", read_only, "Read-only file system"),
        (filelock.FileLock, "acquire", read_only, "Read-only file system"),
        (filelock.FileLock, "acquire", no_locks, "no locks here"),
        (runs, "Checkpoints", read_only, "Read-only file system"),
    ):
        with monkeypatch.context() as patch, pytest.raises(ConfigError, match=rf"made or written \({message}\)"):
            patch.setattr(target, name, Mock(side_effect=error))
            train.train(tiny)


def test_checkpoints_of_a_lost_configuration_are_kept(run, tiny):
    """Without it, nothing tells whether they belong to this training."""
    (run / "config.yml").unlink()
    with pytest.raises(
        ConfigError, match=r"config.yml: can't be read \(No such file or directory\);.* restore the file"
    ):
        train.train(dataclasses.replace(tiny, logdir=str(run.parent.parent)))
    assert not (run / "config.yml").exists() and (run / "checkpoints" / "4").exists()


def test_a_training_without_its_last_checkpoint_fails(tiny, monkeypatch):
    """A training whose last checkpoint can't be saved ends with an error."""
    run = runs.directory(tiny)
    run.mkdir(parents=True)
    (run / "checkpoints").touch()
    with pytest.raises(ConfigError, match=r"^logdir: .*checkpoints can't be made or written \(File exists\)"):
        train.train(tiny)
    (run / "checkpoints").unlink()
    message = r"the last checkpoint of .* couldn't be saved"
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match=message):
        patch.setattr(Checkpoints, "save", lambda *_, **__: None)
        train.train(dataclasses.replace(tiny, max_steps=2))
    assert int(train.train(tiny).step) == 4


def test_non_finite_steps_before_the_first_checkpoint_are_reported(tiny):
    path = runs.directory(tiny)
    path.mkdir(parents=True)
    run = SimpleNamespace(path=path, config=tiny, checkpoints=SimpleNamespace(steps=[]))
    state = SimpleNamespace(first_bad=1, step=2)
    with pytest.raises(train.NonFinite, match=r"from step 1 on; see .*nonfinite; there is no checkpoint yet"):
        train.check_finite(run, state, {}, range(4))
    with full_disk(0), pytest.raises(train.NonFinite, match=r"json can't be written \(File too large\)"):
        train.check_finite(run, SimpleNamespace(first_bad=2, step=2), {}, range(4))

"""How runs are named and found."""

import dataclasses
import errno
import os
import sys
import threading
from pathlib import Path
from unittest.mock import Mock

import pytest

import config as configuration
import eval
from analyses.compare import find_results
from config import Config, ConfigError
from system import logs
from system.checkpoints import DamagedCheckpoint
from system.devices import Devices
from system.files import replace_link
from training import loading, runs
from training.models import make_model


def begin(c: Config) -> runs.Run:
    """Open a run as training does, and close it."""
    with runs.opened(c, Devices()) as run:
        run.restore(make_model(run.config))
    return run


def make(*paths: Path) -> None:
    """Make directories that look like runs."""
    for path in paths:
        path.mkdir(parents=True)
        (path / "config.yml").write_text(Config().to_yaml())


# ---------------------------------------------------------------------------------------------- names


def test_a_named_run_is_resumed_by_its_name(tiny):
    """Also without a seed, and from its own configuration. Nothing else depends on the name."""
    c = dataclasses.replace(tiny, name="first", seed=None)
    run = begin(c)
    assert run.path == Path(c.logdir) / "digits" / "first"
    saved = configuration.load(run.path / "config.yml")
    assert saved == dataclasses.replace(c, seed=saved.seed) and saved.seed is not None
    for again in c, saved:
        assert begin(again).config == saved
    with pytest.raises(ConfigError, match=r"lr \(0.001 there, 0.1 now\); set it as there, or choose another --name"):
        begin(dataclasses.replace(c, lr=0.1))
    unnamed = begin(dataclasses.replace(tiny, name=None))
    assert unnamed.path.name == tiny.run_name != "first"


def test_a_run_can_be_renamed(tiny):
    run = begin(tiny)
    new = run.path.rename(run.path.with_name("new"))
    assert begin(dataclasses.replace(tiny, name="new")).path == new
    assert configuration.load(new / "config.yml").name == "new"


def test_runs_of_a_sweep_cannot_share_a_name(tiny, monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    with pytest.raises(ConfigError, match="name: the runs of a sweep can't share one, got 'x'; leave it out"):
        logs.with_sweep(dataclasses.replace(tiny, name="x", wandb="offline"))


# ---------------------------------------------------------------------------------------------- the latest run


def test_latest_links_the_run_that_was_opened_last(tiny, capsys):
    logdir = Path(tiny.logdir)
    first = begin(tiny)
    assert (logdir / "latest").readlink() == first.path.relative_to(logdir)
    assert loading.find_run(logdir) == first.path  # there is one run, not two
    second = begin(dataclasses.replace(tiny, name="second"))
    assert (logdir / "latest").resolve() == second.path.resolve()
    begin(tiny)
    assert (logdir / "latest").resolve() == first.path.resolve()
    assert "Warning" not in capsys.readouterr().out
    assert {path.name for path in logdir.iterdir()} == {"digits", "latest"}
    logdir.rename(logdir.with_name("moved"))
    assert (
        loading.resolve_name(logdir.with_name("moved") / "latest")
        == logdir.with_name("moved") / "digits" / first.path.name
    )


def test_latest_is_not_searched_for_runs(tmp_path):
    """Also if there is another log directory below, or if copying has turned `latest` into a directory."""
    make(tmp_path / "digits" / "a", tmp_path / "long" / "digits" / "b", tmp_path / "latest")
    replace_link(tmp_path / "long" / "latest", Path("digits/b"))
    assert loading.find_run(tmp_path) == tmp_path / "digits" / "a"
    assert loading.find_run(tmp_path / "long") == tmp_path / "long" / "digits" / "b"


@pytest.mark.parametrize("there", ["file", "directory"])
def test_other_files_named_latest_are_left_alone(tiny, capsys, there):
    latest = Path(tiny.logdir) / "latest"
    if there == "file":
        latest.parent.mkdir()
        latest.write_text("mine")
    else:
        latest.mkdir(parents=True)
    assert begin(tiny).logged == 0
    assert (
        capsys.readouterr().out
        == f"Warning: {latest} can't be made a link (something else has that name); training continues\n"
    )
    assert latest.read_text() == "mine" if there == "file" else latest.is_dir()


@pytest.mark.parametrize(
    "error, reason",
    [
        (OSError(errno.EPERM, "Operation not permitted"), "Operation not permitted"),
        (NotImplementedError("no links"), "no links"),
    ],
)
def test_training_continues_without_links(tiny, monkeypatch, capsys, error, reason):
    monkeypatch.setattr(os, "symlink", Mock(side_effect=error))
    run = begin(tiny)
    assert f"latest can't be made a link ({reason}); training continues\n" in capsys.readouterr().out
    assert loading.find_run(Path(tiny.logdir)) == run.path and run.short_path == run.path


def test_a_link_is_replaced_atomically(tmp_path):
    """While many trainings start, it always exists, and leads to one of them."""
    targets = [tmp_path / name for name in "abc"]
    make(*targets)
    link = tmp_path / "latest"
    replace_link(link, Path("a"))
    threads = [
        threading.Thread(target=lambda t=target: [replace_link(link, Path(t.name)) for _ in range(100)])
        for target in targets
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert (link / "config.yml").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "latest"]


def test_the_short_path_is_only_for_terminals(tiny, monkeypatch):
    run = begin(tiny)
    assert run.short_path == run.path  # in a file, when there may be a newer run
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert run.short_path == Path(tiny.logdir) / "latest"
    begin(dataclasses.replace(tiny, name="second"))
    assert run.short_path == run.path


# ---------------------------------------------------------------------------------------------- beginnings


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Make a current directory with some runs in logs, and one copied run."""
    monkeypatch.chdir(tmp_path)
    names = ["digits_cwvae_3l", "digits_cwvae_3l_seed1", "digits_svg", "long", "longer"]
    make(*(Path("logs/digits") / name for name in names), Path("logs/kth/kth_cwvae"), Path("copied"))
    Path("logs/digits/digits_svg/checkpoints/400").mkdir(parents=True)
    replace_link(Path("logs/latest"), Path("digits/long"))
    return tmp_path


@pytest.mark.parametrize(
    "name, path",
    [
        ("logs/digits/longe", "logs/digits/longer"),
        ("logs/digits/long", "logs/digits/long"),  # an exact name, though another name begins with it
        ("long", "logs/digits/long"),
        ("longe", "logs/digits/longer"),
        ("logs/longe", "logs/digits/longer"),
        ("digits/longe", "logs/digits/longer"),
        ("svg", "logs/digits/digits_svg"),  # without the dataset
        ("digits_s", "logs/digits/digits_svg"),
        ("s/checkpoints/400", "logs/digits/digits_svg/checkpoints/400"),
        ("kth", "logs/kth"),  # a directory of one run
        ("digits_cwvae_3l", "logs/digits/digits_cwvae_3l"),
        ("cop", "copied"),
        ("latest", "logs/digits/long"),
        ("logs/latest", "logs/digits/long"),
        ("logs/latest/config.yml", "logs/digits/long/config.yml"),
        ("copied", "copied"),
        ("nothing", "nothing"),
        ("copied/checkpoints/4", "copied/checkpoints/4"),
        ("model.safetensors", "model.safetensors"),
    ],
)
def test_the_beginning_of_a_name_is_enough(here, capsys, name, path):
    assert loading.resolve_name(name) == Path(path)
    assert capsys.readouterr().out == ("" if name == path else f"{name} is {path}\n")
    absolute = here / name
    if name.startswith("logs/"):
        assert loading.resolve_name(absolute) == here / path


def test_an_ambiguous_beginning_is_refused_with_the_candidates(here):
    with pytest.raises(ConfigError) as error:
        loading.resolve_name("cwvae")
    assert str(error.value) == (
        "logdir: cwvae fits the names of 3 runs; name one of logs/digits/digits_cwvae_3l, "
        "logs/digits/digits_cwvae_3l_seed1, logs/kth/kth_cwvae"
    )
    with pytest.raises(ConfigError, match="logs/digits/lon fits the names of 2 runs; name one of"):
        eval.parse(["--logdir", "logs/digits/lon"])


def test_programs_take_beginnings_and_latest(run, monkeypatch):
    monkeypatch.chdir(run.parent.parent.parent)
    replace_link(Path("logs/latest"), run.relative_to(Path("logs").resolve()))
    (run / "eval_1").mkdir()
    (run / "eval_1" / "metrics.json").touch()
    relative = run.relative_to(Path.cwd())
    for name in "logs/latest", "cwvae", "logs/digits/d":
        assert eval.parse(["--logdir", name])[1] == (relative, 4)
        assert loading.load(name).config.name is None
        assert find_results(Path(name)) == relative / "eval_1" / "metrics.json"
    assert eval.parse(["--logdir", "latest/checkpoints/2"])[1] == (relative, 2)


def test_an_evaluation_stays_with_its_run(run, monkeypatch):
    """If `latest` leads to another run meanwhile, and the checkpoint is lost, the other run isn't evaluated instead."""
    other = run.parent / "other"
    make(other)
    (other / "checkpoints" / "7").mkdir(parents=True)
    link = run.parent.parent / "latest"
    replace_link(link, run.relative_to(link.parent))
    evaluated = []

    def evaluate(config, checkpoint, output):
        evaluated.append(checkpoint.run)
        replace_link(link, other.relative_to(link.parent))
        raise DamagedCheckpoint("gone")

    monkeypatch.setattr(eval, "evaluate", evaluate)
    monkeypatch.setattr(sys, "argv", ["eval.py", "--logdir", str(link)])
    with pytest.raises(SystemExit, match="2"):
        eval.main()
    assert evaluated == [run]


def test_training_cannot_start_from_latest(run, tiny):
    link = run.parent.parent / "latest"
    replace_link(link, run.relative_to(link.parent))
    c = dataclasses.replace(tiny, name="new", logdir=str(run.parent.parent), init_from=str(link))
    with pytest.raises(ConfigError, match=f"init_from: {link} will link to the new run; name {run}"):
        begin(c)
    assert link.resolve() == run.resolve()


def test_missing_runs_and_steps_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints = tmp_path / "logs" / "digits" / "first" / "checkpoints"
    (checkpoints / "20").mkdir(parents=True)
    (checkpoints.parent / "config.yml").write_text("")
    (tmp_path / "logs" / "latest").symlink_to("digits/gone")
    with pytest.raises(ConfigError, match=r"logs/latest links to digits/gone, which doesn't exist; name another run"):
        loading.find_checkpoint(loading.resolve_name("logs/latest"))
    with pytest.raises(ConfigError, match=r"first/checkpoints has no step 15; name one of \[20\]"):
        loading.find_checkpoint(Path("logs/digits/first/checkpoints/15"))

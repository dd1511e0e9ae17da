"""Each analysis as a user runs it: on a tiny model, and on models and figures with planted behaviour."""

import csv
import dataclasses
import functools
import json
import shutil
import sys
from pathlib import Path
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import full_disk
from helpers import walk, write_evaluation
from PIL import Image

import analysis
import config as configuration
import data
import eval as evaluation
from analyses import digits
from analyses.arguments import new_directory
from analyses.blind import observe_and_imagine
from analyses.compare import find_results
from analyses.worker import Worker
from config import ConfigError
from cwvae import CWVAE
from report import tables
from sequences import rollout
from sequences.noise import draw, example_keys, time_slice
from system.devices import Devices
from training import loading, runs
from training.step import make_state


def call(command, *arguments):
    """Run a command; return the directory that it wrote, in the first run or at --out."""
    analysis.COMMANDS[command](list(map(str, arguments)))
    out = [argument[6:] for argument in map(str, arguments) if argument.startswith("--out=")]
    return Path(out[0]) if out else max(arguments[0].glob(f"{command}_*"), key=lambda path: path.stat().st_mtime_ns)


def latents(directory, level):
    parts = [dict(np.load(path)) for path in sorted((directory / "latents").glob(f"level_{level}_*.npz"))]
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


# ---------------------------------------------------------------------------------------------- levels


def test_information_per_level_equals_the_objective_and_the_latents(tiny):
    """KL and entropies equal the model's own terms, and KL by hand from the exported latents.

    The model has three levels and isn't trained. Its top level ticks every k**2 frames.
    """
    c = dataclasses.replace(tiny, levels=3)
    model, test = CWVAE(c), data.windows(c, "test")
    with runs.opened(c, Devices()) as opened:
        _, state, _ = opened.restore(model)
        opened.save(1, state, {})
    directory = call("levels", runs.directory(c))
    (results,) = json.loads((directory / "levels.json").read_text()).values()
    params = loading.load_params(model, loading.find_checkpoint(runs.directory(c)))
    video = np.stack([test[i][:8] for i in range(3)])
    terms = rollout.elbo(model, params, video, example_keys(c, 0, 3, 0), chunk=4)
    assert results["frames"] == 8 and [level["ticks"] for level in results["levels"]] == [8, 4, 2]
    for number, level in enumerate(results["levels"]):
        for term in "kl", "entropy_prior", "entropy_posterior":
            want = float(getattr(terms, term)[number].mean())
            assert level["per_sequence"][term]["value"] == pytest.approx(want, rel=1e-3, abs=1e-4)
            assert level["per_tick"][term]["value"] == pytest.approx(want / level["ticks"], rel=1e-3, abs=1e-4)
        found = latents(directory, number)
        assert found["example"].tolist() == [0, 1, 2] and found["deter"].shape == (3, level["ticks"], 5)
        q, s, p, r = (found[f"{kind}_{x}"].astype(float) for kind in ("posterior", "prior") for x in ("mean", "stddev"))
        assert q.shape == found["stoch"].shape == (3, level["ticks"], 3)
        kl = (np.log(r / s) + (s**2 + (q - p) ** 2) / (2 * r**2) - 0.5).sum((1, 2)).mean()
        assert level["per_sequence"]["kl"]["value"] == pytest.approx(kl, rel=1e-3, abs=1e-4)
    with (directory / "levels.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 3 * 2 and rows[0]["model"] == "digits" and rows[0]["term"] == "kl"
    assert (
        f"| digits | 8 | {tables.with_interval(results['levels'][0]['per_sequence']['kl'], 2)} |"
        in (directory / "levels.md").read_text()
    )
    assert (directory / "kl.png").stat().st_size > 1000


def test_an_analysis_that_cannot_write_says_so_in_one_line(run, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    monkeypatch.setattr(sys, "argv", ["analysis.py", "levels", str(run), "--num_examples=1"])
    with pytest.raises(SystemExit) as ended:
        analysis.main()
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (
        "error: out: the directory of the results can't be written (No space left on device); make room there, or name "
        "another directory with --out"
    )


def test_a_directory_that_cannot_be_made_is_refused_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for out in tmp_path / "file" / "out", tmp_path / ("a" * 300):
        with pytest.raises(ConfigError, match=rf"^out: {out} can't be written .*; make room there, or name another"):
            new_directory("levels", str(out))
    monkeypatch.setattr(Path, "mkdir", Mock(side_effect=OSError(30, "Read-only file system", "there")))
    with pytest.raises(ConfigError, match=rf"^out: {tmp_path} can't be written \(Read-only file system\)"):
        new_directory("levels", None, tmp_path)


def test_levels_do_not_depend_on_batches_and_take_several_runs(run, tmp_path):
    whole, parts = call("levels", run), call("levels", run, "--batch_size=3")
    for level in range(2):
        a, b = latents(whole, level), latents(parts, level)
        for key in a:
            np.testing.assert_allclose(a[key], b[key], atol=1e-4)
    out = tmp_path / "table"
    call(
        "levels",
        f"first={run / 'checkpoints' / '2'}",
        f"second={run}",
        f"--out={out}",
        "--num_examples=1",
        "--frames=4",
    )
    results = json.loads((out / "levels.json").read_text())
    assert list(results) == ["first", "second"] and {r["frames"] for r in results.values()} == {4}
    assert results["first"]["levels"] != results["second"]["levels"]
    assert len(list((out / "latents_1").glob("*.npz"))) == 2


def test_a_blind_level_has_no_kl_and_does_not_see_the_frames(run, monkeypatch):
    """With the same noise and other frames, only the blind level's states stay the same."""
    seen = call("levels", run, "--use_obs=TF")
    windows = data.windows
    monkeypatch.setattr(data, "windows", lambda *a: [255 - windows(*a)[i] for i in range(3)])
    other = call("levels", run, "--use_obs=TF")
    results = json.loads((seen / "levels.json").read_text())["digits"]["levels"]
    assert results[1]["per_sequence"]["kl"]["value"] == 0 and results[0]["per_sequence"]["kl"]["value"] > 0
    for level in range(2):
        a, b = latents(seen, level), latents(other, level)
        assert np.array_equal(a["stoch"], b["stoch"]) == np.array_equal(a["deter"], b["deter"]) == (level == 1)
        assert np.array_equal(a["posterior_mean"], a["prior_mean"]) == (level == 1)


def test_a_posterior_equal_to_the_prior_has_no_kl(run, monkeypatch):
    """Planted: the posterior's layers ignore the features and compute what the prior's layers compute."""
    load = loading.load_params

    def planted(model, checkpoint):
        tree = jax.tree.map(np.array, load(model, checkpoint))
        D, E = model.config.cell_deter_size, model.config.cell_embed_size
        for level in range(model.config.levels):
            cell = tree["params"][f"cell_{level}"]
            cell["posterior_in"]["kernel"][:] = 0
            cell["posterior_in"]["kernel"][:D] = cell["prior_hidden"]["kernel"]
            cell["posterior_in"]["bias"] = cell["prior_hidden"]["bias"]
            cell["posterior_hidden"] = {"kernel": np.eye(E, dtype=np.float32), "bias": np.zeros(E, np.float32)}
            cell["posterior_stats"] = cell["prior_stats"]
        return jax.tree.map(jnp.asarray, tree)

    monkeypatch.setattr(loading, "load_params", planted)
    directory = call("levels", run)
    for level in json.loads((directory / "levels.json").read_text())["digits"]["levels"]:
        assert level["per_sequence"]["kl"]["value"] == pytest.approx(0, abs=1e-4)
        assert level["per_tick"]["entropy_prior"] == level["per_tick"]["entropy_posterior"]


# ---------------------------------------------------------------------------------------------- blind levels


@pytest.mark.parametrize("use_obs", ["TT", "TFT", "TF"])
def test_observe_and_imagine_equals_the_open_loop(tiny, use_obs):
    """The context consists of whole ticks of the top level, which open_loop needs."""
    c = dataclasses.replace(tiny, levels=len(use_obs))
    model = CWVAE(c)
    params = make_state(model).params
    video, keys = data.windows(c, "test")[0][None], jax.random.split(jax.random.key(0), 1)
    found = rollout.open_loop(model, params, video[:, :4], keys, 8, use_obs)
    want = np.concatenate([found.reconstruction, *found.prediction], axis=1)
    inputs = draw(c, keys, 12, context=4)
    got = observe_and_imagine(model, params, video[:, :4], inputs, use_obs)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_blind_draws_predictions_with_blind_levels(run):
    directory = call("blind", run, "--blind_ctx=5", "--example=1")
    frames = dict(np.load(directory / "blind.npz"))
    names = ["sees_all", *("blind_" + x for x in ("0", "1", "0_1"))]
    assert set(frames) == {"truth", *names} and all(x.shape == (12, 64, 64, 1) for x in frames.values())
    evaluation.evaluate(*evaluation.parse(["--logdir", str(run), "--no_save_grid"]))
    (sample,) = run.glob("eval_*/sample1/random_sample_1.npz")
    difference = frames["sees_all"][4:].astype(int) - np.load(sample)["arr_0"]
    assert np.abs(difference).max() <= 1
    with Image.open(directory / "blind.gif") as gif:
        assert gif.n_frames == 12 and gif.size == (2 * 5 * 68, 2 * (68 + 28))
    with Image.open(directory / "blind.png") as picture:
        assert picture.size[0] > 1000


def test_only_levels_that_see_the_context_depend_on_it(tiny):
    """If all levels are blind, other context frames give the same prediction, to the bit."""
    c = dataclasses.replace(tiny, cell_embed_size=16, enc_dense_embed_size=16)  # some units of each layer are active
    model, video = CWVAE(c), data.windows(c, "test")[0][None, :5]
    inputs = draw(c, jax.random.split(jax.random.key(0), 1), 12, context=5)
    params = jax.jit(model.init)(jax.random.key(0), video[:, :4], time_slice(c, inputs, 0, 4))
    for use_obs, same in ("FF", True), ("FT", False), ("TF", False):
        a, b = (observe_and_imagine(model, params, frames, inputs, use_obs) for frames in (video, 255 - video))
        assert a.shape == (1, 12, 64, 64, 1) and np.array_equal(a, b) == same


# ---------------------------------------------------------------------------------------------- digits, rooms


def test_a_poor_classifier_is_refused(run, monkeypatch):
    monkeypatch.setattr(
        digits, "train_classifier", functools.partial(digits.train_classifier, steps=1, batch_size=2, copies=0)
    )
    with pytest.raises(ConfigError, match=r"accuracy on true frames is .* %, and at least 97 % are needed"):
        call("digits", run)
    assert not list(run.glob("digits_*"))


def test_perfect_predictions_score_like_true_frames(run, monkeypatch):
    """Planted: predictions are the truth."""
    monkeypatch.setattr(digits, "train_classifier", lambda train: lambda frames: fake_counts(frames))
    monkeypatch.setattr(digits, "clean_accuracy", lambda classify, test: (0.98, 10))
    monkeypatch.setattr(Worker, "predictions", lambda self, batch, first, sample: batch.video[:, 4:])
    results = json.loads((call("digits", run) / "digits.json").read_text())
    assert results["lines"]["digits"] == results["lines"]["true frames"]


def test_positions_of_planted_predictions_are_measured(run, monkeypatch, capsys):
    """Planted: one sample shows the truth in the first 5 of 8 frames, the other in the first 7; then they show nothing."""

    def predictions(self, batch, first, sample):
        frames = batch.video[:, 4:].copy()
        frames[:, (5, 7)[sample] :] = 0
        return frames

    monkeypatch.setattr(digits, "train_classifier", lambda train: lambda frames: np.zeros((len(frames), 10)))
    monkeypatch.setattr(digits, "clean_accuracy", lambda classify, test: (0.98, 10))
    monkeypatch.setattr(Worker, "predictions", predictions)
    monkeypatch.setattr(Worker, "reconstructions", lambda self, batch, first: batch.video[:, 4:])
    directory = call("digits", run, "--num_digits=1", "--num_samples=2")
    results = json.loads((directory / "position.json").read_text())
    own, chance, copy = "digits", results["chance"], "last context frame"
    lines = results["lines"]
    assert list(lines["share"]) == list(lines["distance"]) == [own, f"{own}, posterior reconstruction", copy]
    assert lines["share"][own]["curve"]["value"] == [1] * 5 + [0.5] * 2 + [0]
    assert lines["share"][f"{own}, posterior reconstruction"]["average"]["value"] == 1
    want = [0] * 5 + [chance["distance"] / 2] * 2 + [chance["distance"]]
    np.testing.assert_allclose(lines["distance"][own]["curve"]["value"], want, rtol=1e-4)
    assert results["over_half_until"][own] == 5 and results["empty"][own] == 4 / 16
    moved = np.array(lines["distance"][copy]["curve"]["value"])
    assert 2 <= moved[0] <= 6 < moved[2]  # digits move by 2 to 6 pixels per frame
    printed = capsys.readouterr().out
    assert (
        f"\n{own}: 0.750; over one half until frame 5; mean distance {chance['distance'] / 4:.1f} pixels; 25 %"
        in printed
    )
    assert (directory / "position_distance.png").exists() and (directory / "position_share.png").exists()
    with (directory / "position.csv").open() as file:
        rows = {(row["metric"], row["line"], row["frames"]): float(row["value"]) for row in csv.DictReader(file)}
    assert rows["share", own, "1-8"] == 0.75 and rows["share", own, "8"] == 0


def fake_counts(frames):
    """Return digit counts that depend on the frames."""
    sets = digits.digit_sets(2)
    return sets[frames.astype(int).sum((1, 2, 3)) % len(sets)]


def test_datasets_without_labels_are_refused(run):
    config = configuration.load(run / "config.yml")
    with pytest.raises(ConfigError, match=r"mmnist has no labels of digits; .* add --dataset mnist and --datadir"):
        digits.digit_windows(dataclasses.replace(config, dataset="mmnist"), "test")


def test_rooms_of_planted_predictions_are_recognised(run, monkeypatch, tmp_path):
    """An untrained colour model on videos of rooms; then a planted model that predicts the truth."""
    config = configuration.load(run / "config.yml")
    config = dataclasses.replace(config, dataset="mazes", channels=3, eval_seq_len=80, open_loop_ctx=20, num_examples=2)
    (run / "config.yml").write_text(config.to_yaml())
    videos = [walk(["a", "a", "hall", "b"]), walk(["a", "a", "hall", "hall"], seed=1)]
    model = CWVAE(config)
    inputs = draw(config, jax.random.split(jax.random.key(0), 1), 4)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4, 64, 64, 3)), inputs)
    monkeypatch.setattr(loading, "load_params", lambda *_: params)
    monkeypatch.setattr(data, "windows", lambda *_: videos)
    directory = call("rooms", run)
    results = json.loads((directory / "rooms.json").read_text())
    assert (directory / "rooms.png").exists() and (directory / "rooms_over_time.png").exists()
    copy = results["lines"]["last context frame"]
    np.testing.assert_allclose(copy["curve"]["value"], [1] * 20 + [0] * 40)
    assert results["lines"]["mazes"]["average"]["value"] < 0.6
    assert results["sequences"]["last context frame"]["to the hallway"]["value"] == 0
    monkeypatch.setattr(Worker, "predictions", lambda self, batch, first, sample: batch.video[:, 20:])
    results = json.loads(
        (call("rooms", f"oracle={run}", f"--out={tmp_path / 'rooms'}").joinpath("rooms.json")).read_text()
    )
    assert results["lines"]["oracle"]["average"]["value"] == 1
    assert {c: s["value"] for c, s in results["sequences"]["oracle"].items()} == {
        "to the hallway": 1,
        "to another room": 1,
    }


# ---------------------------------------------------------------------------------------------- comparisons


write_scores = functools.partial(write_evaluation, frames=False)


def test_compare_ranks_models_and_writes_tables(tmp_path, capsys):
    paths = [
        write_scores(tmp_path / str(k), k, quality=q, tmp_abs_factor=k, open_loop_ctx=36)
        for k, q in ((2, 0.3), (6, 0.5), (3, 0.4))
    ]
    out = tmp_path / "out"
    call("compare", *paths, f"--out={out}")
    assert {p.name for p in out.iterdir()} == {
        *(f"{metric}_{protocol}.png" for metric in ("ssim", "psnr") for protocol in ("paper", "standard")),
        "index.html",
        *(f"comparison.{suffix}" for suffix in ("md", "csv", "json")),
    }
    summary = json.loads((out / "comparison.json").read_text())
    names = ["tmp_abs_factor 2", "tmp_abs_factor 6", "tmp_abs_factor 3"]
    for protocol in "paper", "standard":
        assert summary["ranks"][protocol] == {
            name: {"ssim": r, "psnr": r, "average": r} for name, r in zip(names, (3, 1, 2), strict=True)
        }
    table = [line.split(" | ") for line in (out / "comparison.md").read_text().splitlines() if line.startswith("| tmp")]
    assert [row[1] for row in table] == ["3.00", "-", "1.00", "-", "2.00", "-"] * 2
    assert table[0][0] == "| tmp_abs_factor 2" and table[1][0] == "| tmp_abs_factor 2, posterior reconstruction"
    with (out / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * (3 * 2 + 2) * (12 + 2)
    with pytest.raises(ConfigError, match="isn't empty; name a new directory"):
        call("compare", *paths, f"--out={out}")
    with pytest.raises(
        ConfigError, match="name a new directory for the results of several runs, or of a file, with --out"
    ):
        call("compare", *paths)


@pytest.mark.parametrize(
    "keys, message",
    [
        (dict(dataset="mmnist"), "dataset: a has digits, b has mmnist; evaluate both with the same --dataset"),
        (dict(open_loop_ctx=72), "open_loop_ctx: a has 36, b has 72; evaluate both with the same --open_loop_ctx"),
        (dict(num_samples=5), "num_samples: a has 1, b has 5; evaluate both with the same --num_samples"),
        (dict(digit_speed=[1, 3]), "digit_speed: a has .*, b has .*; evaluate both"),
    ],
)
def test_evaluations_with_other_settings_are_not_compared(tmp_path, keys, message):
    a, b = (
        write_scores(tmp_path / "a", 0, eval_seq_len=1000),
        write_scores(tmp_path / "b", 1, **{"eval_seq_len": 1000, **keys}),
    )
    with pytest.raises(ConfigError, match=message) as error:
        call("compare", f"a={a}", f"b={b}", f"--out={tmp_path / 'out'}")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_evaluations_with_other_protocols_are_not_compared(tmp_path):
    paths = [write_scores(tmp_path / name, 0) for name in "ab"]
    file = paths[1] / "metrics.json"
    file.write_text(file.read_text().replace("data range 2", "data range 255"))
    with pytest.raises(ConfigError, match="protocols: a and b were evaluated in different ones"):
        call("compare", f"a={paths[0]}", f"b={paths[1]}", f"--out={tmp_path / 'out'}")
    with pytest.raises(ConfigError, match="two models have the same name, 'digits'; name them"):
        call("compare", paths[0], paths[0], f"--out={tmp_path / 'out'}")
    file.write_text('{"averages": {}}')
    with pytest.raises(ConfigError, match=r"has no lines \(damaged, or from an earlier version\); evaluate again"):
        call("compare", f"a={paths[0]}", f"b={paths[1]}", f"--out={tmp_path / 'out'}")


def test_compare_reads_a_runs_newest_evaluation(run, tmp_path):
    with pytest.raises(ConfigError, match=r"holds no finished evaluation; evaluate it with: python eval.py --logdir"):
        call("compare", run, f"--out={tmp_path / 'out'}")
    for flags in ["--num_samples=2"], ["--num_samples=2", "--num_examples=2"]:
        evaluation.evaluate(*evaluation.parse(["--logdir", str(run), "--no_save_grid", *flags]))
    newest = max(run.glob("eval_*"))
    assert find_results(run) == newest / "metrics.json"
    out = call("compare", f"model={run}", f"again={newest}", f"--out={tmp_path / 'out'}")
    assert (out / "ssim_paper_best_of_2.png").exists() and (out / "psnr_standard_mean_of_2.png").exists()
    ranks = json.loads((out / "comparison.json").read_text())["ranks"]["paper"]
    assert ranks["model"] == ranks["again"] == {"ssim": 1.5, "psnr": 1.5, "average": 1.5}
    assert "| model, best of 2 | 1.50 |" in (out / "comparison.md").read_text()


def test_ranks_are_averaged_over_datasets(tmp_path):
    """By both metrics, A is first on one dataset and second on the other; B the reverse; C is always last."""
    out = []
    for dataset, order in ("digits", "ABC"), ("mmnist", "BAC"):
        paths = [
            write_scores(tmp_path / dataset / name, i, quality=1 - i / 4, dataset=dataset)
            for i, name in enumerate(order)
        ]
        out.append(call("compare", *(f"{path.name}={path}" for path in paths), f"--out={tmp_path / dataset / 'out'}"))
    directory = call("ranks", *out, f"--out={tmp_path / 'ranks'}")
    with (directory / "ranks.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["protocol"] == "paper"]
    assert {row["model"]: float(row["rank"]) for row in rows if row["dataset"] == "all"} == {"A": 1.5, "B": 1.5, "C": 3}
    assert len(rows) == 3 * (2 * 2 + 1) and (directory / "ranks_standard.png").exists()
    with pytest.raises(ConfigError, match="dataset: two of digits, digits are the same"):
        call("ranks", out[0], out[0], f"--out={tmp_path / 'x'}")
    single = call("compare", f"A={tmp_path / 'mmnist' / 'A'}", f"--out={tmp_path / 'single'}")
    with pytest.raises(ConfigError, match=r"compares A, and .* compares A, B, C; compare the same models"):
        call("ranks", out[0], single, f"--out={tmp_path / 'x'}")


def test_curves_have_the_steps_that_all_runs_logged(run, tmp_path):
    """Planted losses in one log; the other lacks a line and ends within the last one. The table has the common steps."""
    (line,) = (run / "metrics.jsonl").read_text().splitlines()
    losses = {4: 4.4, 8: 3.5, 12: 2.6, 16: 2.6}
    logged = [json.loads(line) | {"step": step, "validation/loss": loss} for step, loss in losses.items()]
    lines = [json.dumps(line) + "\n" for line in logged]
    short = Path(shutil.copytree(run, tmp_path / "short"))
    (run / "metrics.jsonl").write_text("".join(lines))
    (short / "metrics.jsonl").write_text(lines[0] + lines[2] + lines[3][:40])
    out = call("curves", f"whole={run}", f"short={short}", f"--out={tmp_path / 'out'}", "--format=png,pdf")
    assert {path.name for path in out.iterdir()} == {"loss.png", "loss.pdf", "curves.md", "curves.csv"}
    with (out / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = {(row["model"], int(row["step"]), row["metric"]): float(row["value"]) for row in rows}
    expected = {
        (name, line["step"], key): value
        for name, kept in (("whole", logged), ("short", [logged[0], logged[2]]))
        for line in kept
        for key, value in line.items()
        if key != "step"
    }
    assert len(rows) == len(expected) == 6 * (len(logged[0]) - 1)
    assert found == expected
    table = [line.strip("| ").split(" | ") for line in (out / "curves.md").read_text().splitlines()]
    assert table[0] == ["validation loss, nats per frame", "step 4", "step 12", "last step", "nll", "kl"]
    assert [row[:4] for row in table[2:]] == [["whole", "4", "3", "16"], ["short", "4", "3", "12"]]
    (short / "metrics.jsonl").unlink()
    with pytest.raises(ConfigError, match="has logged nothing yet; train longer"):
        call("curves", short, f"--out={tmp_path / 'again'}")


# ---------------------------------------------------------------------------------------------- models to share


def test_an_exported_run_is_small_and_has_rounded_parameters(run, tmp_path):
    """The exported run names no path of this machine. Its parameters differ from the run's only in their last digits."""
    out = call("export", run, "--seed=7", f"--init_from={run}", f"--out={tmp_path / 'out'}")
    c = configuration.load(out / "config.yml")
    assert (c.logdir, c.datadir, c.init_from, c.seed) == ("logs", "datasets", None, 7)
    model, (original, exported) = CWVAE(c), map(loading.find_checkpoint, (run, out))
    assert exported.step == original.step
    a, b = loading.load_params(model, original), loading.load_params(model, exported)
    assert any((x != y).any() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2**-7), a, b)
    size = [sum(p.stat().st_size for p in (r / "checkpoints").rglob("*") if p.is_file()) for r in (run, out)]
    assert size[1] < 0.4 * size[0]
    evaluation.evaluate(*evaluation.parse(["--logdir", str(out), "--no_save_grid", "--num_examples=1"]))
    with pytest.raises(ConfigError, match="export takes a single run"):
        call("export", f"a={run}", f"b={run}")


def test_export_to_a_full_disk_fails(run, tmp_path):
    with full_disk(), pytest.raises(ConfigError, match="couldn't be written; make room, or choose another --out"):
        call("export", run, f"--out={tmp_path / 'out'}")


# ---------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["level"],
            f"command: must be one of {', '.join(analysis.COMMANDS)}, got 'level'; did you mean 'levels'?",
        ),
        (["levels"], "command line: no directory is named; call analysis.py levels [NAME=]RUN ..."),
        (["levels", "nowhere"], "logdir: nowhere is not a directory"),
        (["compare"], "command line: no directory is named"),
        (["compare", "run", "--levels=3"], "command line: unknown argument '--levels=3'"),
        (["digits", "--frmaes=3"], "command line: unknown argument '--frmaes=3'"),
    ],
)
def test_wrong_analysis_arguments_are_refused_in_one_line(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["analysis.py", *arguments])
    with pytest.raises(SystemExit) as exit:
        analysis.main()
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.startswith(f"error: {message}") and error.count("\n") == 1


def test_wrong_analysis_flags_are_refused(run):
    for flags, message in (
        (["--frames=0"], "frames: must be a whole number of at least 1, got '0'"),
        (["--frames=x"], "frames: must be a whole number of at least 1, got 'x'"),
        (["--frames=13"], "frames: test sequences of digits have eval_seq_len = 12 frames, fewer than 13"),
        (["--open_loop_ctx=5"], "open_loop_ctx: must be a multiple of"),
    ):
        with pytest.raises(ConfigError, match=message):
            call("levels", run, *flags)
    with pytest.raises(ConfigError, match="example: there are 1000 test sequences; name one from 0, got 1000"):
        call("blind", run, "--example=1000")
    with pytest.raises(ConfigError, match="blind_ctx: must be less than the sequence's 12 frames, got 12"):
        call("blind", run, "--blind_ctx=12")
    assert not list(run.glob("levels_*")) and not list(run.glob("blind_*"))


def test_a_damaged_checkpoint_is_refused_before_anything_is_written(run):
    for file in (run / "checkpoints" / "4" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    for command in "levels", "blind", "digits":
        with pytest.raises(ConfigError, match="4 is damaged"):
            call(command, run)
        assert not list(run.glob(f"{command}_*"))


def test_analysis_py_without_arguments_prints_its_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["analysis.py"])
    analysis.main()
    assert "rooms" in capsys.readouterr().out

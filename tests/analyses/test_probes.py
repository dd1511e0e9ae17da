"""Probes of states: planted knowledge is read, and nothing else."""

import dataclasses
import json

import numpy as np
import pytest

import analysis
import data
from analyses import probes
from analyses.arguments import TrainedModel
from analyses.probes import QUANTITIES, Labels
from analyses.worker import Worker
from config import ConfigError
from cwvae import CWVAE
from sequences import rollout
from system.devices import Devices
from training import loading, runs

N, T, CELLS = 60, 20, 9


def write_episodes(folder, count=3, frames=24):
    """Write episodes with the arrays of Memory Maze: a 3x3 maze and two objects."""
    random = np.random.default_rng(0)
    for split in "train", "test":
        (folder / split).mkdir(parents=True)
        for number in range(count):
            angle = random.uniform(0, 6, frames)
            arrays = {
                "image": random.integers(256, size=(frames, 64, 64, 3), dtype=np.uint8),
                "action": np.eye(6, dtype=np.float32)[random.integers(6, size=frames)],
                "maze_layout": np.repeat(random.integers(2, size=(1, 3, 3), dtype=np.uint8), frames, 0),
                "agent_pos": random.uniform(0, 3, (frames, 2)),
                "agent_dir": np.stack([np.cos(angle), np.sin(angle)], 1),
                "targets_vec": random.uniform(-3, 3, (frames, 2, 2)),
            }
            np.savez(folder / split / f"{number}.npz", **arrays)


def planted(seed, known):
    """Return labels, and the states of two levels: noise, and what the quantities in `known` follow from."""
    random = np.random.default_rng(seed)
    walls = np.repeat(random.integers(2, size=(N, 1, CELLS)), T, 1).astype(np.float32)
    objects, place = (random.uniform(-3, 3, (N, T, n)).astype(np.float32) for n in (4, 2))
    labels = Labels(random.uniform(-1, 1, (N, T, 4)).astype(np.float32), walls, objects, place)
    mixed = [
        getattr(labels, name) @ np.random.default_rng(1).normal(size=(getattr(labels, name).shape[-1],) * 2)
        for name in known
    ]
    noise = random.normal(size=(N, T, 5))
    return labels, [noise, np.concatenate([*mixed, noise], -1)]


def test_probes_read_what_states_hold_on_other_episodes(monkeypatch):
    monkeypatch.setattr(probes, "ROUNDS", 5)
    learnt, states = planted(0, ("walls", "objects"))
    tested, others = planted(1, ("walls", "objects"))
    score = {
        (name, level): probes.train_probe(name, states[level : level + 1], learnt)(others[level : level + 1], tested)
        for name in QUANTITIES
        for level in (0, 1)
    }
    assert all(values.shape == (N, T) for values in score.values())
    assert score["walls", 1].mean() > 0.9 and abs(score["walls", 0].mean() - 0.5) < 0.06
    by_chance = {name: getattr(tested, name).var() * 2 for name in ("objects", "place")}  # two coordinates
    assert score["objects", 1].mean() < 0.2 * by_chance["objects"]
    for name, level in (("objects", 0), ("place", 0), ("place", 1)):  # held-out episodes keep it from guessing
        assert score[name, level].mean() == pytest.approx(by_chance[name], rel=0.1)


def test_without_states_a_probe_of_walls_knows_the_pose(monkeypatch):
    monkeypatch.setattr(probes, "ROUNDS", 3)
    learnt, _ = planted(0, ())
    walls = (learnt.pose[..., :1] > 0) * np.ones(CELLS, np.float32)
    known = learnt._replace(walls=walls, place=np.repeat(learnt.pose[..., :1], 2, -1))
    assert probes.train_probe("walls", [], known)([], known).mean() > 0.95
    error = probes.train_probe("place", [], known)([], known).mean()
    assert error == pytest.approx(2 * known.place.var(), rel=0.05)


def test_a_probe_that_learns_nothing_says_what_is_frequent(monkeypatch):
    monkeypatch.setattr(probes, "ROUNDS", 1)
    labels, (noise, _) = planted(0, ())
    often = np.random.default_rng(0).uniform(size=(N, 1, CELLS)) < np.linspace(0.1, 0.9, CELLS)
    few = Labels(*(x[:3] for x in labels._replace(walls=np.repeat(often, T, 1).astype(np.float32))))
    score = probes.train_probe("walls", [noise[:3]], few)([noise[:3]], few)
    guess = few.walls.mean((0, 1)) > 0.5
    assert score.mean() == pytest.approx((few.walls == guess).mean(), abs=0.01)


@pytest.fixture
def maze(tmp_path, tiny):
    """A configuration of tiny episodes."""
    write_episodes(tmp_path / "maze")
    keys = dict(dataset="episodes", datadir=str(tmp_path / "maze"), channels=3, eval_seq_len=10, open_loop_ctx=4)
    return dataclasses.replace(tiny, **keys, action_size=6)


def test_labels_are_those_of_the_frames_and_place_is_in_the_first_direction(maze):
    windows = data.windows(maze, "test")
    assert len(windows) == 6  # two of each episode
    worker = type("Worker", (), {"config": maze})
    labels = probes.read_labels(worker, "test", windows, 6)
    with np.load(f"{maze.datadir}/test/1.npz") as file:
        layout, position, direction, objects = (
            file[name][10:20] for name in ("maze_layout", "agent_pos", "agent_dir", "targets_vec")
        )
    np.testing.assert_array_equal(labels.walls[3], layout.reshape(10, 9))
    np.testing.assert_allclose(labels.objects[3], objects.reshape(10, 4), rtol=1e-6)
    np.testing.assert_allclose(labels.pose[3], np.concatenate([position / 3 - 0.5, direction], 1), rtol=1e-5)
    (x, y), step = direction[0], position[4] - position[0]
    ahead, left = labels.place[3, 4]
    np.testing.assert_allclose(ahead * np.array([x, y]) + left * np.array([-y, x]), step, rtol=1e-5)


@pytest.fixture
def run(maze):
    """A run of an untrained model with two levels."""
    model = CWVAE(maze)
    with runs.opened(maze, Devices()) as opened:
        _, state, _ = opened.restore(model)
        opened.save(1, state, {})
    return runs.directory(maze)


def test_states_are_the_models_at_each_frame(maze, run):
    worker = Worker(TrainedModel("maze", maze, loading.find_checkpoint(run)))
    seen, predicted = probes.read_states(worker), probes.read_states(worker, seen=4)
    batch = data.stacked(worker.test, range(worker.count))
    model, params, keys = worker.model, worker.params, worker.keys(0, worker.count)
    inputs = model.draw(keys, 10, context=4, actions=batch.actions)
    (whole,) = rollout.observe(model, params, batch.video, keys, actions=batch.actions, chunk=10)
    first, state = rollout.apply(model, "observe", params, batch.video[:, :4], model.time_slice(inputs, 0, 4))
    then, _ = rollout.apply(model, "imagine", params, model.time_slice(inputs, 4, 10), state)
    for level in range(2):
        both = np.concatenate([first[level].output, then[level].output], 1)
        for states, ticks in (seen, whole[level].output), (predicted, both):
            assert states[level].shape == (3, 10, 8)
            for t in range(10):
                np.testing.assert_allclose(states[level][:, t], ticks[:, t // 2**level], rtol=1e-5, atol=1e-6)


def test_probes_are_written_for_each_level_and_without_states(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(probes, "ROUNDS", 2)
    analysis.COMMANDS["probes"]([f"maze={run}", f"--out={tmp_path / 'out'}"])
    results = json.loads((tmp_path / "out" / "probes.json").read_text())
    assert list(results) == ["walls", "objects", "place"]
    for lines in results.values():
        assert list(lines) == ["maze, all levels", "maze, level 0", "maze, level 1", "no states"]
        for kinds in lines.values():
            # Six predicted frames are too few for a distance.
            assert list(kinds["predicted"]["points"]) == ["context"] and len(kinds["seen"]["curve"]["value"]) == 6
            assert kinds["predicted"]["points"] == kinds["seen"]["points"]  # in the context, the model sees
    assert 0 <= results["walls"]["no states"]["predicted"]["average"]["value"] <= 1
    assert all((tmp_path / "out" / f"{name}.png").stat().st_size > 1000 for name in results)
    table = (tmp_path / "out" / "probes.md").read_text()
    assert table in capsys.readouterr().out and "| walls: states of | context | all predicted | posterior |" in table
    assert (tmp_path / "out" / "probes.csv").read_text().count("\n") == 1 + 3 * 4 * 2


def test_data_without_labels_is_refused(maze, run, trained, tmp_path):
    file = f"{maze.datadir}/train/0.npz"
    with np.load(file) as arrays:
        others = {key: arrays[key] for key in arrays.files if key != "targets_vec"}
    np.savez(file, **others)
    with pytest.raises(ConfigError, match=r"train/0.npz has no array targets_vec; record the episodes again"):
        analysis.COMMANDS["probes"]([str(run), "--rebuild_frames=true", f"--out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="dataset: probes needs episodes of a memory_maze, got digits"):
        analysis.COMMANDS["probes"]([str(trained), f"--out={tmp_path / 'out'}"])

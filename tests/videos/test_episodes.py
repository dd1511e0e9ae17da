"""Episodes: frames with the actions that led to them, from files to predictions."""

import dataclasses
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from conftest import TINY, flags, log_of
from helpers import assert_same, parameters

import config as configuration
import data
import eval as evaluation
import train
from config import Config, ConfigError
from cwvae import CWVAE
from sequences import noise, rollout
from training import loading, runs
from videos import decoded

T = 23


def numbered(T=T, first=0):
    """Return frames that show their numbers, and actions with the number of the frame that they led to."""
    number = np.arange(first, first + T)
    image = np.broadcast_to(number.astype(np.uint8)[:, None, None, None], (T, 64, 64, 1))
    return {"image": image, "action": np.stack([number, -number], 1).astype(np.float32)}


def write(folder, name="a.npz", **arrays):
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)
    return path


@pytest.fixture
def episodes(tiny, tmp_path):
    """Return a configuration with two episodes to train on and one to test, whose actions are their frames' numbers."""
    folder = tmp_path / "episodes"
    for i in range(2):
        write(folder / "train", f"{i}.npz", **numbered(first=100 * i), reward=np.zeros(T), discount=np.ones(T))
    write(folder / "test", **numbered(first=50))
    return dataclasses.replace(tiny, dataset="episodes", datadir=str(folder), batch_size=2, num_epochs=9)


def check_numbers(window, lag=0):
    """Check that each action, except an episode's first, has the number of the frame `lag` frames before."""
    number = window.video[:, 0, 0, 0].astype(int)
    assert window.actions.dtype == np.float32 and window.actions.shape == (len(number), 2)
    inner = number % 50 > 0  # an episode's first action is a dummy
    np.testing.assert_array_equal(window.actions[inner, 0], number[inner] - lag)
    np.testing.assert_array_equal(window.actions[:, 1], -window.actions[:, 0])


@pytest.mark.parametrize("lag", [0, 1])
def test_windows_hold_the_actions_that_led_to_their_frames(episodes, lag, capsys):
    c = dataclasses.replace(episodes, action_leads=not lag)
    train_set = data.windows(c, "train")
    assert "Unused arrays of the episodes" in (said := capsys.readouterr().out) and "discount, reward" in said
    assert len(train_set) == 4 and train_set.action_size == 2
    for index in range(4):
        check_numbers(data.window(train_set, index), lag)
    np.testing.assert_array_equal(data.window(train_set, 0).actions[0], 0)
    np.testing.assert_array_equal(data.window(train_set, 2).actions[0], 0)
    assert data.window(train_set, 1).actions[0, 0] == 8 - lag  # in the middle of an episode

    seen = 0
    for batch in data.training_batches(c, train_set, 0, 3):
        assert batch.video.shape == (3, 8, 64, 64, 1) and batch.actions.shape == (3, 8, 2)
        assert not batch.video[2].any() and not batch.actions[2].any() and not batch.weight[2]
        for row in range(2):
            check_numbers(data.Window(batch.video[row], batch.actions[row]), lag)
            seen += 1
    assert seen == 2 * c.max_steps


def test_random_starts_cut_frames_and_actions_together(episodes):
    c = dataclasses.replace(episodes, random_start=True)
    train_set = data.windows(c, "train")
    order = data.training_sequences(c, train_set)
    firsts = set()
    for i in range(len(order)):
        check_numbers(order[i])
        firsts.add(int(order[i].video[0, 0, 0, 0]))
    assert len(firsts) > 6


def test_a_file_can_hold_several_episodes(episodes):
    path = Path(episodes.datadir) / "train" / "0.npz"
    is_first = np.isin(np.arange(T), [3, 12])
    write(path.parent, "0.npz", **numbered(), is_first=is_first)
    for leads in True, False:
        file = data.windows(dataclasses.replace(episodes, action_leads=leads, rebuild_frames=True), "train").file
        assert file.names == ["0.npz[0:3]", "0.npz[3:12]", "0.npz[12:23]", "1.npz"]
        assert file.lengths.tolist() == [3, 9, 11, 23]
        np.testing.assert_array_equal(file.frames[:23, 0, 0, 0], np.arange(23))
        led = np.arange(23) - (not leads)
        # Frame 0 isn't the first one of its episode, so its action counts; but its number is 0.
        led[[3, 12]] = 0
        led[0] = 0
        np.testing.assert_array_equal(file.actions[:23, 0], led)


def test_other_arrays_are_those_of_a_windows_frames(episodes):
    is_first = np.arange(T) == 14
    path = write(episodes.datadir, "train/0.npz", **numbered(), is_first=is_first, place=np.arange(T) * 2)
    c = dataclasses.replace(episodes, seq_len=7, rebuild_frames=True)
    train = data.windows(c, "train")  # 0-6, 7-13 and, in the second episode, 14-20; then those of the other file
    for index, first in enumerate((0, 7, 14)):
        (place,) = data.other_arrays(c, "train", train, index, ["place"])
        np.testing.assert_array_equal(place, 2 * train[index][:, 0, 0, 0])
        assert place[0] == 2 * first
    with pytest.raises(ConfigError, match=r"0.npz has no array pose; record the episodes again"):
        data.other_arrays(c, "train", train, 0, ["place", "pose"])
    write(episodes.datadir, "train/1.npz", **numbered(), place=np.arange(5))
    with pytest.raises(ConfigError, match=r"datadir: .*1.npz has 5 entries of place, too few; mend or remove it"):
        data.other_arrays(c, "train", train, 3, ["place"])
    path.unlink()
    with pytest.raises(ConfigError, match=r"datadir: .*0.npz can't be read \(No such file or directory\); put it back"):
        data.other_arrays(c, "train", train, 0, ["place"])


def test_the_first_action_counts_if_a_file_begins_within_an_episode(episodes):
    write(Path(episodes.datadir) / "train", "0.npz", **numbered(first=7), is_first=np.zeros(T, bool))
    assert data.windows(episodes, "train").file.actions[0].tolist() == [7, -7]


@pytest.mark.parametrize(
    "actions, keys, expected",
    [
        (np.arange(T) % 3, dict(num_actions=4), np.eye(4)[np.arange(T) % 3] * (np.arange(T) > 0)[:, None]),
        (np.r_[-1, np.ones(T - 1, int)], dict(num_actions=2), np.eye(2)[np.ones(T, int)] * (np.arange(T) > 0)[:, None]),
        (np.arange(T) % 3, dict(num_actions=3, action_leads=False), np.r_[np.zeros((1, 3)), np.eye(3)[np.arange(T - 1) % 3]]),
        (np.arange(T - 1.0), dict(action_leads=False), np.r_[0, np.arange(T - 1)][:, None]),
        (np.eye(T, 4, dtype=bool), {}, np.eye(T, 4) * (np.arange(T) > 0)[:, None]),
        (np.arange(T, dtype=np.float64), {}, np.arange(T)[:, None]),
    ],
    ids=["numbers", "a number as a dummy", "numbers taken at frames", "one less, taken at frames", "one-hot", "[T]"],
)  # fmt: skip
def test_each_kind_of_action_becomes_vectors(episodes, actions, keys, expected):
    write(Path(episodes.datadir) / "test", image=numbered()["image"], action=actions)
    file = data.windows(dataclasses.replace(episodes, **keys), "test").file
    np.testing.assert_array_equal(file.actions, expected)


def without(key):
    return {name: x for name, x in numbered().items() if name != key}


NAN = np.where(np.arange(T) == 5, np.nan, 0.0)


@pytest.mark.parametrize(
    "arrays, keys, message",
    [
        (without("image"), {}, "datadir: PATH has no image; an episode needs image, uint8 [T, H, W, 1 or 3], and action"),
        (numbered() | {"action": NAN}, {}, "datadir: PATH has actions that aren't finite, frame 5 first; mend or remove it"),
        (numbered() | {"action": np.zeros((9, 2))}, {}, "datadir: PATH has 9 actions for 23 frames; mend or remove it"),
        (numbered() | {"action": np.zeros(22)}, {}, "datadir: PATH has 22 actions for 23 frames; mend or remove it, or set --action_leads false if each is taken at its frame"),
        (numbered() | {"action": np.float32(0)}, {}, "datadir: PATH has 0 actions for 23 frames; mend or remove it"),
        (numbered() | {"action": np.array(["up"] * T)}, {}, "datadir: PATH has actions of type <U2; they must be numbers"),
        (numbered() | {"action": np.arange(T) % 5}, {}, "num_actions: PATH has actions that are numbers, up to 4; set the number of actions"),
        (numbered() | {"action": np.arange(T) % 5}, dict(num_actions=3), "num_actions: PATH has an action 4; they count from 0 to 2"),
        (numbered(), dict(num_actions=3), "num_actions: PATH has actions float32 [23, 2], which aren't whole numbers [T]; leave it out"),
        (numbered() | {"is_first": np.zeros(4)}, {}, "datadir: PATH has 4 entries of is_first for 23 frames; mend or remove it"),
    ],
)  # fmt: skip
def test_a_wrong_episode_file_is_refused_in_one_line(episodes, arrays, keys, message):
    path = write(Path(episodes.datadir) / "test", **arrays)
    with pytest.raises(ConfigError) as error:
        data.windows(dataclasses.replace(episodes, **keys), "test")
    assert str(error.value) == message.replace("PATH", str(path))


def test_episode_files_with_different_action_sizes_are_refused(episodes):
    folder = Path(episodes.datadir) / "train"
    write(folder, "2.npz", **numbered() | {"action": np.zeros((T, 3))})
    with pytest.raises(
        ConfigError, match=re.escape(f"{folder / '2.npz'} has 3 entries per action, {folder / '0.npz'} has 2")
    ):
        data.windows(episodes, "train")
    write(folder, "2.npz", **without("action"))
    with pytest.raises(
        ConfigError, match=re.escape(f"{folder / '2.npz'} has 0 entries per action, {folder / '0.npz'} has 2")
    ):
        data.windows(episodes, "train")  # fmt: skip


def test_damaged_episode_files_are_skipped_and_named(episodes, capsys):
    folder = Path(episodes.datadir) / "train"
    content = (folder / "0.npz").read_bytes()
    (folder / "cut.npz").write_bytes(content[: len(content) // 2])
    (folder / "empty.npz").write_bytes(b"")
    (folder / "notes.txt").write_text("not an episode")
    write(folder, "floats.npz", **numbered() | {"image": np.zeros((T, 64, 64, 1))})
    file = data.windows(episodes, "train").file
    assert file.names == ["0.npz", "1.npz"] and set(file.skipped) == {"cut.npz", "empty.npz", "floats.npz"}
    assert len(file.actions) == len(file.frames) == 2 * T
    said = capsys.readouterr().out
    assert "Ignored in" in said and "since they aren't episodes: notes.txt" in said and "Skipped 3 unreadable" in said


def test_frames_are_scaled_and_actions_stay_with_them(episodes):
    image = np.zeros((T, 48, 96, 3), np.uint8)
    image[:, :, 48:] = 255
    write(Path(episodes.datadir) / "test", image=image, action=numbered()["action"])
    for fit, middle in ("crop", 32), ("stretch", 32):
        window = data.window(data.windows(dataclasses.replace(episodes, fit=fit, rebuild_frames=True), "test"), 0)
        assert window.video.shape == (12, 64, 64, 1)
        assert not window.video[:, :, : middle - 2].any() and (window.video[:, :, middle + 2 :] == 255).all()


def test_changed_keys_and_damaged_actions_are_noticed(episodes):
    data.windows(episodes, "train")
    with pytest.raises(ConfigError, match="the keys that choose them, have changed"):
        data.windows(dataclasses.replace(episodes, action_leads=False), "train")
    data.windows(dataclasses.replace(episodes, action_leads=False, rebuild_frames=True), "train")
    actions = decoded.actions_path(Path(episodes.datadir) / "frames" / "episodes-train-1")
    actions.write_bytes(actions.read_bytes()[:-4])
    with pytest.raises(ConfigError, match="is damaged; run again with --rebuild_frames"):
        data.windows(dataclasses.replace(episodes, action_leads=False), "train")


def test_episodes_are_split_by_names(episodes, tmp_path):
    folder = tmp_path / "together"
    for i in range(8):
        write(folder, f"{i}.npz", **numbered(first=100 * (i % 2)))
    c = dataclasses.replace(episodes, datadir=str(folder), split=0.6)
    names = [set(data.windows(c, split).file.names) for split in ("train", "test")]
    assert names[0] | names[1] == {f"{i}.npz" for i in range(8)} and not names[0] & names[1]


def test_data_py_describes_actions(episodes, capsys):
    write(
        Path(episodes.datadir) / "test",
        image=numbered()["image"],
        action=np.c_[np.ones(T), np.r_[0, np.full(T - 1, 180)]],
    )
    data.inspect_dataset(episodes)
    said = capsys.readouterr().out
    assert re.search(r"train +actions of 2 entries, from 0 to 122, -122 to 0", said)
    assert re.search(r"test +Warning: actions aren't scaled; divide them in the files", said)
    assert (Path(episodes.datadir) / "episodes.gif").exists()


# ---------------------------------------------------------------------------------------------- training


def test_without_episodes_there_are_no_actions(tiny, episodes):
    assert data.window(data.windows(tiny, "train"), 0).actions is None
    with pytest.raises(ConfigError, match="action_size: digits has no actions, got 2; leave it out"):
        data.windows(dataclasses.replace(tiny, action_size=2), "train")
    for model in "svg", "vta":
        with pytest.raises(ConfigError, match=f"dataset: {model} takes no actions, got episodes"):
            Config(model=model, dataset="episodes")
    with pytest.raises(ConfigError, match="have actions of 2 entries, got 3; choose other episodes"):
        data.windows(dataclasses.replace(episodes, action_size=3), "train")
    for split in "train", "test":
        write(Path(episodes.datadir) / split, "0.npz", image=numbered()["image"])
        for other in (Path(episodes.datadir) / split).glob("[1a].npz"):
            other.unlink()
    c = dataclasses.replace(episodes, rebuild_frames=True)
    with pytest.raises(ConfigError, match="have no actions; set --action_size 0 to train on frames only"):
        data.windows(c, "train")
    assert data.window(data.windows(dataclasses.replace(c, action_size=0), "train"), 0).actions is None


def test_a_model_with_actions_is_trained_resumed_and_evaluated(episodes, tmp_path, capsys):
    c = dataclasses.replace(
        episodes, num_examples=1, save_model_every=2, save_scalars_every=2, save_gifs=True, save_gifs_every=4
    )
    write(Path(c.datadir) / "test", "b.npz", **numbered(first=70))
    whole = parameters(train.train(c))
    run = runs.directory(c)
    assert yaml.safe_load((run / "config.yml").read_text())["action_size"] == 2
    assert (run / "videos" / "validation_0000004.gif").exists()

    again = dataclasses.replace(c, logdir=str(tmp_path / "again"))
    train.train(dataclasses.replace(again, max_steps=2))
    assert_same(whole, parameters(train.train(again)))
    assert log_of(run) == log_of(runs.directory(again))

    # The trained model depends on the actions, in each chunk of time.
    saved = loading.load_config(run, {})
    model, params = CWVAE(saved), loading.load_params(CWVAE(saved), loading.find_checkpoint(run))
    test = data.stacked(data.windows(saved, "test"), range(2))
    keys = noise.example_keys(saved, 0, 2, 0)
    one, several = (rollout.elbo(model, params, test.video, keys, n, actions=test.actions) for n in (12, 4))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), one, several)
    other = rollout.elbo(model, params, test.video, keys, actions=test.actions[::-1])
    assert not np.allclose(one.kl, other.kl, rtol=1e-3)

    results = evaluation.evaluate(*evaluation.parse(["--logdir", str(run), "--num_examples", "2"]))
    shown = results["lines"]["paper"]["psnr"]
    assert "shuffled actions" in shown
    for line, actions in (
        ("prediction", test.actions),
        ("shuffled actions", evaluation.shuffle_future_actions(test.actions, 4, 0)),
    ):
        frames = np.concatenate(list(rollout.predict(model, params, test.video, keys, actions=actions).prediction), 1)
        metrics = evaluation.chunked_metrics(test.video[:, 4:], [{"x": frames}])["x"]["paper"]["psnr"]
        np.testing.assert_allclose(shown[line]["curve"]["value"], metrics.mean(0), rtol=1e-5)
    capsys.readouterr()


def test_shuffled_actions_are_the_future_in_another_order():
    actions = np.arange(3 * 40 * 2.0).reshape(3, 40, 2)
    others = evaluation.shuffle_future_actions(actions, 10, first=5)
    np.testing.assert_array_equal(others[:, :10], actions[:, :10])
    np.testing.assert_array_equal(np.sort(others[:, 10:], axis=1), actions[:, 10:])
    assert not (others[:, 10:] == actions[:, 10:]).all(2).mean() > 0.2
    np.testing.assert_array_equal(evaluation.shuffle_future_actions(actions[1:], 10, first=6), others[1:])


def test_an_evaluation_needs_the_action_size_of_the_model(episodes, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yml").write_text(dataclasses.replace(episodes, action_size=3).to_yaml())
    config = loading.load_config(run, {})
    with pytest.raises(ConfigError, match="have actions of 2 entries, got 3; choose other episodes"):
        data.windows(config, "test")
    with pytest.raises(
        ConfigError, match=r"action_size: the parameters of .* were trained with 3, got 2; leave it out"
    ):
        loading.load_config(run, {"action_size": "2"})
    assert configuration.parse(flags(dataset="episodes", action_size=3, num_actions=3)).action_size == 3


def brightness(folder, count, seed):
    """Write episodes in which each action sets the brightness of its frame."""
    random = np.random.default_rng(seed)
    for i in range(count):
        level = random.integers(0, 2, (40, 1))
        image = np.broadcast_to((200 * level).astype(np.uint8)[:, :, None, None], (40, 64, 64, 1))
        write(folder, f"{i}.npz", image=image, action=level.astype(np.float32))


@pytest.mark.slow
def test_actions_are_only_learned_if_they_led_to_their_frames(tmp_path):
    brightness(tmp_path / "train", 20, 0)
    brightness(tmp_path / "test", 4, 1)
    shape = dict(levels=1, cell_stoch_size=2, cell_deter_size=32, cell_embed_size=32, seq_len=4, eval_seq_len=4)
    training = dict(max_steps=200, batch_size=8, lr=1e-2, dec_stddev=0.3, save_scalars_every=200)
    files = dict(dataset="episodes", datadir=str(tmp_path), rebuild_frames=True)
    keys = TINY | shape | training | files | dict(open_loop_ctx=1)
    errors = {}
    for leads in True, False:
        c = Config(**keys, action_leads=leads, logdir=str(tmp_path / f"{leads}"))
        params = train.train(c).params
        test_set = data.windows(c, "test")
        c, test = data.with_action_size(c, test_set), data.stacked(test_set, range(40))
        key = noise.example_keys(c, 0, 40, 0)
        for name, actions in ("true", test.actions), ("others", 1 - test.actions):
            frames = np.concatenate(
                list(rollout.predict(CWVAE(c), params, test.video, key, actions=actions).prediction), 1
            )
            errors[leads, name] = float(((frames - test.video[:, 1:] / 255) ** 2).mean())
    # Half of the frames have a brightness of 200 / 255, the others 0. Without knowing which, the error is at least 0.15.
    assert errors[True, "true"] < 0.05 and errors[True, "others"] > 0.4, errors
    assert errors[False, "true"] > 0.15, errors

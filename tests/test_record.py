"""Recording episodes: the contents of the files, for any number of processes."""

import dataclasses
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT

import data
import record
from config import ConfigError
from record import Recording
from videos import environments
from videos.dot_world import DotWorld
from videos.environments import ActionSpace

GYMNASIUM = '''
"""What record.py needs of Gymnasium, with an environment of a counter."""
import types
import numpy as np

class Space:
    def __init__(self, dtype, **keys):
        self.dtype, self.__dict__ = np.dtype(dtype), {"dtype": np.dtype(dtype), **keys}

class Discrete(Space): pass
class MultiDiscrete(Space): pass
class Box(Space): pass
class Text(Space): pass
spaces = types.SimpleNamespace(Discrete=Discrete, MultiDiscrete=MultiDiscrete, Box=Box)
SPACES = {
    "Discrete": Discrete("int64", n=3, start=5),
    "Multi": MultiDiscrete("int64", nvec=np.array([2, 3]), start=np.zeros(2, int)),
    "Box": Box("float32", shape=(2, 2), low=np.full((2, 2), -3.0), high=np.full((2, 2), 3.0)),
    "Unbounded": Box("float32", shape=(1,), low=np.full(1, -np.inf), high=np.full(1, np.inf)),
    "Text": Text("str"),
}

class Counter:
    def __init__(self, name):
        kind, _, rest = name.partition("-")
        self.action_space, self.spec = SPACES[kind], types.SimpleNamespace(max_episode_steps=None if "endless" in rest else 9)
        self.metadata = {"render_modes": ["human"] if "blind" in rest else ["rgb_array"]}
    def reset(self, seed):
        self.count, self.seen = 0, []
        return self.observe(), {}
    def observe(self):
        return {"reward": np.float64(self.count), "place": np.arange(2.0) * self.count}
    def step(self, action):
        self.count += 1
        assert np.asarray(action).dtype == self.action_space.dtype
        if isinstance(self.action_space, Discrete): assert 5 <= action < 8
        return self.observe(), 0.5 * self.count, self.count == 6, False, {}
    def render(self):
        return np.full((128, 96, 3), 10 * self.count, np.uint8)
    def close(self): pass

def make(name, render_mode, disable_env_checker):
    if name.partition("-")[0] not in SPACES: raise ValueError(f"no {name}")
    return Counter(name)
'''


@pytest.fixture
def gymnasium(tmp_path, monkeypatch):
    """Install a small replacement of the package."""
    (tmp_path / "gymnasium.py").write_text(GYMNASIUM)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "gymnasium", raising=False)
    yield
    sys.modules.pop("gymnasium", None)


def command(folder, *more):
    keys = dict(env="dot", episodes=6, test_episodes=2, steps=60, policy="sticky", seed=7, datadir=folder)
    return [sys.executable, str(ROOT / "record.py"), *(f"--{key}={value}" for key, value in keys.items()), *more]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("*/*.npz")}


def test_episodes_do_not_depend_on_processes_and_interrupts(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    subprocess.run(command(one, "--processes=1"), check=True)
    process = subprocess.Popen(command(two, "--processes=2"), stderr=subprocess.PIPE, text=True)
    while not contents(two):
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode in (143, 0), said  # 0: it was faster
    assert "Traceback" not in said
    for path in two.glob("*/*"):
        assert set(np.load(path).files) >= set(record.KEYS)  # complete
    kept = {path: path.stat().st_mtime_ns for path in two.glob("*/*.npz")}
    subprocess.run(command(two, "--processes=2"), check=True)
    assert contents(one) == contents(two) and len(contents(one)) == 8
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    done = subprocess.run(command(two, "--steps=61"), capture_output=True, text=True)
    assert done.returncode == 2 and "set --steps to that" in done.stderr and len(done.stderr.splitlines()) == 1


def test_recorded_episodes_are_the_training_data(tmp_path, tiny):
    recording, amount, folder = record.parse(
        ["--env=dot", "--episodes=3", "--steps=20", f"--datadir={tmp_path / 'dots'}", "--processes=1"]
    )
    record.record(recording, amount, folder)
    c = dataclasses.replace(tiny, dataset="episodes", datadir=str(folder))
    train = data.windows(c, "train")
    assert train.file.lengths.tolist() == [20, 20, 20] and len(data.windows(c, "test")) == 1
    with np.load(folder / "train" / "episode_000001.npz") as file:
        np.testing.assert_array_equal(train.file.frames[20:40], file["image"])
        np.testing.assert_array_equal(train.file.actions[20:40], file["action"])


def test_recorded_actions_led_to_their_frames():
    episode = record.record_episode(Recording("dot", "random", 3, 30), "train", 4)
    assert episode["image"].shape == (30, 64, 64, 1) and episode["action"].shape == (30, 2)
    seed = np.random.SeedSequence([3, 0, 4]).generate_state(1)[0] >> 1
    world = DotWorld()
    np.testing.assert_array_equal(episode["image"][0], world.reset(int(seed)))
    for action, image in zip(episode["action"][1:], episode["image"][1:], strict=True):
        np.testing.assert_array_equal(world.step(action), image)
    assert not episode["action"][0].any() and not episode["is_terminal"].any() and not episode["reward"].any()
    assert np.flatnonzero(episode["is_first"]).tolist() == [0] and np.flatnonzero(episode["is_last"]).tolist() == [29]


def test_an_episode_follows_from_seed_split_number_and_policy():
    def image(seed, split, number, policy="random"):
        return record.record_episode(Recording("dot", policy, seed, 5), split, number)["image"].tobytes()

    kinds = [(0, "train", 0), (0, "train", 1), (0, "test", 0), (1, "train", 0), (0, "train", 0, "sticky")]
    assert len({image(*kind) for kind in kinds}) == 5 and image(*kinds[1]) == image(*kinds[1])


def test_the_sticky_policy_repeats_actions():
    actions = record.record_episode(Recording("dot", "sticky", 0, 1000), "train", 0)["action"][1:]
    repeated = (actions[1:] == actions[:-1]).all(1).mean()
    assert abs(repeated - record.STICKY) < 0.04


@pytest.mark.usefixtures("gymnasium")
@pytest.mark.parametrize("kind, size", [("Discrete", 3), ("Multi", 5), ("Box", 4)])
def test_gymnasium_environments_are_recorded(kind, size):
    episode = record.record_episode(Recording(f"{kind}-v0"), "train", 0)
    assert episode["image"].shape == (7, 64, 64, 3) and episode["image"][:, 0, 0, 0].tolist() == [
        0,
        10,
        20,
        30,
        40,
        50,
        60,
    ]
    assert episode["action"].shape == (7, size) and episode["action"].dtype == np.float32
    if kind == "Box":
        assert (np.abs(episode["action"]) <= 3).all() and np.abs(episode["action"]).max() > 1
    else:
        groups = np.split(episode["action"][1:], [2] if kind == "Multi" else [], axis=1)
        assert all((group.sum(1) == 1).all() and set(np.unique(group)) == {0, 1} for group in groups)
    np.testing.assert_allclose(episode["reward"], 0.5 * np.arange(7))
    assert episode["is_terminal"].tolist() == [False] * 6 + [True]
    np.testing.assert_array_equal(episode["obs_reward"], np.arange(7))
    np.testing.assert_array_equal(episode["place"], np.outer(np.arange(7), [0, 1]))


@pytest.mark.usefixtures("gymnasium")
@pytest.mark.parametrize(
    "env, message",
    [
        ("Discrete-endless", "steps: Discrete-endless has no time limit; set --steps, the frames of an episode"),
        ("Discrete-blind", r"env: Discrete-blind can't render rgb_array, but \['human'\]; name another"),
        ("Text-v0", "env: Text-v0 takes actions in .*; name one with Discrete, MultiDiscrete or Box of floats"),
        ("Unbounded-v0", "policy: can't draw from actions without bounds; name a module:function"),
        ("Nothing-v0", r"env: Nothing-v0 can't be made \(ValueError: no Nothing-v0\); name dot, crafter"),
        ("crafter", "env: No module named 'crafter'; pip install -r requirements-record.txt"),
    ],
)
def test_environments_that_cannot_be_recorded_are_refused(env, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "crafter", None)
    message = message.replace("No module named 'crafter'", "import of crafter halted; None in sys.modules")
    with pytest.raises(ConfigError, match=message):
        record.record_episode(Recording(env), "train", 0)


def test_a_users_policy_is_called_and_checked(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n"
        "def make(space, seed):\n"
        "    assert space.shape == (2,) and space.low.tolist() == [-1, -1]\n"
        "    return lambda observed: np.array([1, -1]) * (observed['image'].shape == (64, 64, 1))\n"
        "def wrong(space, seed):\n"
        "    return lambda observed: np.array([1, 2, 3])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert (
        record.record_episode(Recording("dot", "mine:make", 0, 5), "train", 0)["action"][1:].tolist() == [[1, -1]] * 4
    )
    with pytest.raises(
        ConfigError, match=r"policy: an action has to be finite floats, of shape \[2\], got \[1, 2, 3\]"
    ):
        record.record_episode(Recording("dot", "mine:wrong", 0, 5), "train", 0)
    with pytest.raises(
        ConfigError, match=r"policy: .* name random, sticky, walk, or a module:function that can be imported"
    ):
        record.record_episode(Recording("dot", "mine:missing", 0, 5), "train", 0)


def test_actions_become_vectors():
    space = ActionSpace((2,), np.array([2, 3]))
    assert space.size == 5 and space.vector(np.array([1, 0])).tolist() == [0, 1, 1, 0, 0]
    with pytest.raises(ConfigError, match=r"whole numbers from 0, below \[2, 3\], of shape \[2\], got \[1, 3\]"):
        space.vector(np.array([1, 3]))
    assert environments.Dot.space.vector(np.array([0.5, 2])).tolist() == [0.5, 2]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--env=dot"], "command line: --episodes is missing; python record.py --help lists the flags"),
        (["--env=dot", "--episodes=0", "--datadir=x"], "episodes: must be a whole number of at least 1, got '0'"),
        (["--env=dot", "--episodes=2", "--datadir=x", "--steps=1"], "steps: must be a whole number of at least 2, got '1'"),
        (["--env=dot", "--episodes=2", "--datadir=x", "--policy=run"], "policy: must be random, sticky, walk or module:function, got 'run'"),
    ],
)  # fmt: skip
def test_wrong_recording_flags_are_refused(arguments, message):
    with pytest.raises(ConfigError) as error:
        record.parse(arguments)
    assert str(error.value) == message

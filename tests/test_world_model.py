"""Step by step, a model believes and imagines what it does of whole sequences."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, TINY
from test_cwvae import make

import noise
import world_model
from analyses.blind import observe_and_imagine
from config import Config, ConfigError
from models import make_model
from noise import Inputs
from world_model import WorldModel


def whole_noise(c, keys, frames):
    """The noise of `frames` frames, put together from that of each tick of the top level."""
    blocks = [
        noise.draw(c, jax.vmap(lambda key, i=i: jax.random.fold_in(key, i))(keys), c.block)
        for i in range(-(-frames // c.block))
    ]
    sizes = noise.ticks(c, frames)
    return [jnp.concatenate([block[level].noise for block in blocks], 1)[:, :T] for level, T in enumerate(sizes)]


CASES = [
    dict(levels=3, tmp_abs_factor=2, action_size=2),
    dict(levels=2, tmp_abs_factor=3, enc_dense_layers=0, cell_mean_only=True),
    dict(levels=1, tmp_abs_factor=4, action_size=1),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(f"{k}{v}" for k, v in case.items()))
def test_equals_whole_sequences(case):
    """After the frames of two ticks of the top level and one more, and for some frames from there on."""
    block, B, H = case["tmp_abs_factor"] ** (case["levels"] - 1), 2, 3
    T = 2 * block + 1 + H
    c, compiled, params, video, _ = make(T=T, B=B, **case)
    model = compiled.module
    actions = np.random.default_rng(1).normal(size=(B, T, c.action_size)).astype(np.float32) if c.action_size else None
    world = WorldModel(model, params)
    belief = world.start(B, seed=3)
    whole = whole_noise(c, belief.keys, T)
    observed, imagined = world_model.observe._cache_size(), world_model.imagine._cache_size()
    for n in range(1, T - H + 1):
        belief = world.observe(belief, video[:, n - 1], None if actions is None else actions[:, n - 1])
        if n not in (1, block - 1, block, block + 1, 2 * block):  # what is compared is compiled for each number
            continue
        future = world.imagine(belief, None if actions is None else actions[:, n : n + H], H)
        frames = jnp.concatenate([world.decode(belief.levels[0])[:, None], world.decode(future)], 1)
        inputs = tuple(
            Inputs(x[:, :ticks], None, None if actions is None or level else jnp.asarray(actions)[:, : n + H])
            for level, (x, ticks) in enumerate(zip(whole, noise.ticks(c, n + H), strict=True))
        )
        want = observe_and_imagine(model, params, video[:, :n], inputs, "T" * c.levels)
        np.testing.assert_allclose(frames, want[:, n - 1 :], atol=1e-5)
        if n % block == 0:
            inputs = [
                Inputs(
                    x.noise[:, : -(-n // c.tmp_abs_factor**level)],
                    None,
                    x.actions if x.actions is None else x.actions[:, :n],
                )
                for level, x in enumerate(inputs)
            ]
            _, state = compiled.apply(params, video[:, :n], inputs, method="observe")
            for a, b in zip(jax.tree.leaves(belief.levels), jax.tree.leaves(state.levels), strict=True):
                np.testing.assert_allclose(a, b, atol=1e-5)
    assert int(belief.frame) == T - H
    assert world_model.observe._cache_size() == observed + 1 and world_model.imagine._cache_size() == imagined + 1


def test_many_futures_of_one_belief():
    c, compiled, params, video, _ = make(T=5, B=1, levels=2, tmp_abs_factor=2, action_size=1)
    world = WorldModel(compiled.module, params)
    belief = world.start()
    for t in range(3):
        belief = world.observe(belief, (255 * video[:, t]).astype(np.uint8), np.zeros((1, 1)))
    actions = np.repeat(np.random.default_rng(0).normal(size=(3, 4, 1)), 2, axis=0)
    states = world.imagine(belief, actions)
    assert states.stoch.shape == (6, 4, c.cell_stoch_size) and world.decode(states).shape == (6, 4, 64, 64, 1)
    again = world.imagine(belief, actions)
    np.testing.assert_array_equal(states.stoch, again.stoch)
    # Each future has noise of its own, and its first state follows from the same one.
    assert len({row.tobytes() for row in np.asarray(states.stoch[:, 0])}) == 6
    np.testing.assert_allclose(states.deter[0, 0], states.deter[1, 0], atol=1e-6)
    assert np.abs(np.asarray(states.deter[0, 0] - states.deter[2, 0])).max() > 1e-4


@pytest.mark.slow
def test_example(tmp_path):
    """The commands and the program of the page, as they stand there, in a directory of their own; trained for a step."""
    page = (ROOT / "docs" / "world_model.md").read_text()
    recording, training = re.findall(r"^python (.*)$", page, re.MULTILINE)
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    small = dict(TINY, max_steps=1, dataset="episodes")
    shrunk = [f"--{key}={value}" for key, value in small.items()]
    for command in (
        [str(ROOT / "record.py"), *recording.replace("200", "3").split()[1:]],
        [str(ROOT / "train.py"), *training.split()[1:], *shrunk],
        ["-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{program}"],
    ):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    distances = re.findall(r"^step \d+: (\d+\.\d) pixels from the goal$", done.stdout, re.MULTILINE)
    assert len(distances) == 16 and distances[0] != distances[-1]


def test_what_it_refuses():
    c, compiled, params, video, _ = make(T=4, levels=2, tmp_abs_factor=2, action_size=2)
    world = WorldModel(compiled.module, params)
    with pytest.raises(ValueError, match=r"actions: this model takes 2 entries, got None"):
        world.observe(world.start(2), video[:, 0])
    with pytest.raises(ValueError, match=r"actions: this model takes 2 entries, got \(5, 4, 3\)"):
        world.imagine(world.start(), np.zeros((5, 4, 3)))
    with pytest.raises(ConfigError, match="cell_reset_state: step by step states aren't reset"):
        WorldModel(make(T=4, levels=2, tmp_abs_factor=2, cell_reset_state=True)[1].module, params)
    with pytest.raises(ConfigError, match="model: step by step only cwvae can be used, got svg"):
        WorldModel(make_model(Config(model="svg", dataset="digits")), None)

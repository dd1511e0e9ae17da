"""Observing and imagining step by step gives the same as on whole sequences."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from conftest import ROOT, TINY
from helpers import make

import config as configuration
from analyses.blind import observe_and_imagine
from config import Config, ConfigError
from sequences import noise, world_model
from sequences.noise import Inputs
from sequences.world_model import WorldModel
from training import loading
from training.models import make_model


def whole_noise(c, keys, frames):
    """Return the noise of `frames` frames, concatenated from the noise of each tick of the top level."""
    blocks = [noise.draw(c, noise.fold_in(keys, i), c.block) for i in range(-(-frames // c.block))]
    sizes = noise.ticks(c, frames)
    return [jnp.concatenate([block[level].noise for block in blocks], 1)[:, :T] for level, T in enumerate(sizes)]


CASES = [
    dict(levels=3, tmp_abs_factor=2, action_size=2),
    dict(levels=2, tmp_abs_factor=3, enc_dense_layers=0, cell_mean_only=True),
    dict(levels=2, tmp_abs_factor=1),
    dict(levels=1, tmp_abs_factor=4, action_size=1),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(f"{k}{v}" for k, v in case.items()))
def test_a_world_model_equals_the_textbook_form(case):
    """After each number of frames up to two ticks of the top level plus one, it imagines a few more frames."""
    k, L, B, H = case["tmp_abs_factor"], case["levels"], 2, 3
    N = 2 * k ** (L - 1) + 1
    c, compiled, params, video, _ = make(T=N + H, B=B, **case)
    actions = np.random.default_rng(1).normal(size=(B, N + H, 2))[..., : c.action_size] if c.action_size else None
    world = WorldModel(compiled.module, params)
    belief = world.start(B, seed=3)
    whole = whole_noise(c, belief.keys, N + H)
    features = oracle.encode(c, params["params"]["encoder"], video)
    before = world_model.observe._cache_size(), world_model.imagine._cache_size()
    for n in range(N + 1):
        if n:
            belief = world.observe(belief, video[:, n - 1], None if actions is None else actions[:, n - 1])
        future = world.imagine(belief, None if actions is None else actions[:, n : n + H], H)
        # The ticks that have ended follow their posterior.
        seen = [[x if (t + 1) * k**level <= n else None for t, x in enumerate(features[level])] for level in range(L)]
        ticks = oracle.unroll(c, params["params"], n + H, whole, seen, actions)
        for level in range(L if n else 0):
            np.testing.assert_allclose(
                belief.levels[level].output, stacked(ticks[level])[:, (n - 1) // k**level], atol=1e-5
            )
        np.testing.assert_allclose(future.output, stacked(ticks[0])[:, n:], atol=1e-5)
    assert int(belief.frame) == N
    compilations = world_model.observe._cache_size(), world_model.imagine._cache_size()
    assert compilations == (before[0] + 1, before[1] + 1)


def stacked(ticks):
    """Return the outputs of a level's ticks, [B, T_l, S + D]."""
    return jnp.stack([jnp.concatenate([stoch, deter], -1) for _, _, stoch, deter in ticks], 1)


def test_a_world_model_equals_the_model_on_whole_sequences():
    """It equals `CWVAE.observe`, then `CWVAE.imagine` and, within a tick, `observe_and_imagine`."""
    c, compiled, params, video, _ = make(T=7, B=2, levels=2, tmp_abs_factor=2, action_size=1)
    actions = np.random.default_rng(0).normal(size=(2, 7, 1)).astype(np.float32)
    world = WorldModel(compiled.module, params)
    belief = world.start(2)
    whole = [Inputs(x, None, None) for x in whole_noise(c, belief.keys, 8)]
    whole[0] = whole[0]._replace(actions=jnp.asarray(actions))
    inputs = lambda start, stop: noise.time_slice(c, whole, start, stop)  # noqa: E731
    for t in range(4):
        belief = world.observe(belief, video[:, t], actions[:, t])
    _, state = compiled.apply(params, video[:, :4], inputs(0, 4), method="observe")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), belief.levels, state.levels)
    rollouts, _ = compiled.apply(params, inputs(4, 7), state, method="imagine")
    future = world.imagine(belief, actions[:, 4:])
    np.testing.assert_allclose(future.output, rollouts[0].output, atol=1e-5)
    want = compiled.apply(params, rollouts, method="decode")
    np.testing.assert_allclose(world.decode(future), want, atol=1e-5)

    belief = world.observe(belief, video[:, 4], actions[:, 4])
    want = observe_and_imagine(compiled.module, params, video[:, :5], inputs(0, 7), "TT")
    np.testing.assert_allclose(world.decode(world.imagine(belief, actions[:, 5:])), want[:, 5:], atol=1e-5)


def test_many_futures_can_be_imagined_at_once():
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
    # Each future has its own noise. All first states follow from the same state.
    assert len({row.tobytes() for row in np.asarray(states.stoch[:, 0])}) == 6
    np.testing.assert_allclose(states.deter[0, 0], states.deter[1, 0], atol=1e-6)
    assert np.abs(np.asarray(states.deter[0, 0] - states.deter[2, 0])).max() > 1e-4


def test_loading_a_run_prints_nothing(capsys):
    """Also if the run is older than some keys that don't change the model. A checkpoint can be named, too."""
    model, params, c = loading.load(str(ROOT / "pretrained"))
    assert model.config == c == configuration.load(ROOT / "pretrained" / "config.yml")
    (checkpoint,) = (ROOT / "pretrained" / "checkpoints").glob("[0-9]*")
    jax.tree.map(np.testing.assert_array_equal, params, loading.load(checkpoint).params)
    assert not capsys.readouterr().out


@pytest.mark.slow
def test_the_example_of_the_world_model_runs(tmp_path):
    """The page's commands and program run in an empty directory, with training for a single step."""
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


def test_a_world_model_refuses_wrong_shapes_and_models():
    c, compiled, params, video, _ = make(T=4, levels=2, tmp_abs_factor=2, action_size=2)
    world = WorldModel(compiled.module, params)
    one, two, frame, action = world.start(), world.start(2), video[:, 0], np.zeros((2, 2))
    for call, message in (
        (lambda: world.observe(two, frame), "actions: must be [2, 2], got None"),
        (lambda: world.observe(two, frame, action[0]), "actions: must be [2, 2], got (2,)"),
        (lambda: world.observe(two, frame, action[:1]), "actions: must be [2, 2], got (1, 2)"),
        (lambda: world.observe(two, frame[0], action), "frame: must be [2, 64, 64, 1], got (64, 64, 1)"),
        (lambda: world.observe(two, frame[:1], action), "frame: must be [2, 64, 64, 1], got (1, 64, 64, 1)"),
        (lambda: world.imagine(one, np.zeros((5, 4, 3))), "actions: must be [B, T, 2], got (5, 4, 3)"),
        (lambda: world.imagine(two, np.zeros((5, 4, 2))), "actions: must be [2, T, 2], got (5, 4, 2)"),
        (lambda: world.imagine(one, np.zeros((5, 0, 2))), "frames: must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()
    without = WorldModel(make_model(Config(model="cwvae", dataset="digits", action_size=0)), None)
    for actions, message in (
        (np.zeros((1, 4, 2)), "actions: this model takes none"),
        (None, "frames: must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            without.imagine(without.start(), actions)
    with pytest.raises(ConfigError, match="cell_reset_state: can't be used step by step"):
        WorldModel(make(T=4, levels=2, tmp_abs_factor=2, cell_reset_state=True)[1].module, params)
    with pytest.raises(ConfigError, match="model: only cwvae can be used step by step, got svg"):
        WorldModel(make_model(Config(model="svg", dataset="digits")), None)

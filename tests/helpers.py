"""Models, videos and results that several test modules need."""

import dataclasses
import math

import jax
import numpy as np
from conftest import TINY

import config as configuration
import eval as evaluation
import tools
from config import Config
from cwvae import CWVAE
from metrics import similarity
from report import statistics, tables
from sequences.noise import Inputs, draw

TINY_MODEL = {key: TINY[key] for key in TINY if key.startswith(("cell", "enc", "filters", "dataset"))}


def make(T, B=2, dtype=np.float32, **keys):
    """Return a configuration, its model, random parameters (also of biases), a video and inputs."""
    c = Config(**{**TINY_MODEL, "open_loop_ctx": keys.get("tmp_abs_factor", 6) ** (keys.get("levels", 3) - 1), **keys})
    model, action_size = CWVAE(c), c.action_size
    random = np.random.default_rng(0)
    video = random.uniform(size=(B, T, 64, 64, c.channels)).astype(dtype)
    drawn = draw(c, jax.random.split(jax.random.key(0), B), T)
    actions = random.normal(size=(B, T, action_size)).astype(dtype) if action_size else None
    inputs = [
        Inputs(random.normal(size=x.noise.shape).astype(dtype), x.keep, actions if level == 0 else None)
        for level, x in enumerate(drawn)
    ]
    shapes = jax.eval_shape(model.init, jax.random.key(0), video, inputs)
    params = jax.tree.map(
        lambda x: (random.normal(size=x.shape) / math.sqrt(max(1, math.prod(x.shape[:-1])))).astype(dtype), shapes
    )
    return c, Compiled(model), params, video, inputs


class Compiled:
    """A model whose methods are compiled as a whole. Running them op by op takes longer."""

    def __init__(self, model):
        self.module, self.config = model, model.config
        self.init = model.init
        self.compiled = {}

    def apply(self, params, *arguments, method="__call__", **keys):
        static = tuple((k, v) for k, v in keys.items() if isinstance(v, str))
        keys = {k: v for k, v in keys.items() if not isinstance(v, str)}
        name = (method, static)
        if name not in self.compiled:
            self.compiled[name] = jax.jit(lambda p, a, k: self.module.apply(p, *a, **k, **dict(static), method=method))
        return self.compiled[name](params, arguments, keys)


def parameters(state):
    """Return a state's arrays on the host."""
    return jax.tree.map(np.asarray, state)


def assert_same(a, b):
    """Check that two trees of arrays are equal to the bit."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


ROOMS = {
    "a": ((200, 60, 40), (40, 40, 60)),
    "hall": ((60, 60, 200), (120, 120, 120)),
    "b": ((60, 190, 80), (200, 180, 90)),
}


def walk(rooms, frames=20, seed=0):
    """Return a video of walls and floors in the rooms' colours. The horizon and the light vary from frame to frame."""
    random = np.random.default_rng(seed)
    video = np.zeros((len(rooms) * frames, 64, 64, 3))
    for t in range(len(video)):
        wall, floor = ROOMS[rooms[t // frames]]
        horizon = random.integers(28, 36)
        video[t, :horizon], video[t, horizon:] = wall, floor
        video[t] *= random.uniform(0.95, 1.05)
    return (video + random.normal(0, 6, video.shape)).clip(0, 255).astype(np.uint8)


def evaluate(run, *flags):
    """Evaluate a run as eval.py does; return the directory of the evaluation and its results."""
    before = set(run.glob("eval_*"))
    results = evaluation.evaluate(*evaluation.parse(["--logdir", str(run), *flags]))
    (directory,) = set(run.glob("eval_*")) - before
    return directory, results


def write_evaluation(directory, seed, frames=True, truth=0, quality=None, **keys):
    """Write an evaluation with planted curves and frames.

    Curves are random in [0, 1], or close to `quality`. The true frames have the grey level `truth`.
    """
    random = np.random.default_rng(seed)
    low, high = (0, 1) if quality is None else (quality, quality + 0.01)
    names = ["prediction", *(statistics.REFERENCES[key] for key in ("posterior", "copy", "random"))]
    lines = {
        protocol: {
            metric: {name: statistics.summary(random.uniform(low, high, (4, 12))) for name in names}
            for metric in statistics.METRICS
        }
        for protocol in similarity.PROTOCOLS
    }
    found = {
        "num_examples": 4,
        "predicted_frames": 12,
        "checkpoint_step": 1,
        "protocols": similarity.PROTOCOLS,
        "averages": {},
        "lines": lines,
        "videos": {},
        "versions": {},
        "config": dataclasses.asdict(configuration.Config(dataset="digits", eval_seq_len=48)) | keys,
    }
    directory.mkdir(parents=True)
    (directory / "metrics.json").write_text(tables.to_json(found))
    if frames:
        for name, value, length in (
            ("sample1_gt/gt_ctx", truth, 36),
            ("sample1_gt/gt_pred", truth, 12),
            ("sample1/context", 50 + seed, 36),
            ("sample1/random_sample_1", 100 + seed, 12),
        ):
            (directory / name).parent.mkdir(exist_ok=True)
            tools.save_frames(np.full((length, 64, 64, 1), value, np.uint8), directory / f"{name}.npz")
    return directory

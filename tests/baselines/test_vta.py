"""VTA against a plain form, which loops over frames as in the paper's equations; properties of VTA."""

import dataclasses
import json
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from conftest import ROOT, log_of, tiny_keys
from helpers import assert_same
from PIL import Image

import analysis
import config as configuration
import data
import eval
import train
from baselines import vta
from baselines.vta import VTA
from config import Config, ConfigError
from sequences import rollout
from sequences.interface import Training
from training import loading, runs
from training.models import make_model
from training.step import make_state

TINY = tiny_keys("vta") | dict(
    model="vta", num_digits=1, filters=4, vta_init_size=2, num_examples=2, clip_grad_norm_by=10
)


def made(T=9, B=2, dtype=np.float64, **keys):
    """Return a model, random variables (also running averages), a video and noise."""
    model = VTA(Config(**TINY | keys))
    random = np.random.default_rng(0)
    video = random.uniform(size=(B, T, 64, 64, model.config.channels)).astype(dtype)
    inputs = jax.tree.map(
        lambda x: np.asarray(x, dtype), jax.jit(partial(model.draw, frames=T))(jax.random.split(jax.random.key(0), B))
    )
    shapes = jax.eval_shape(model.init, jax.random.key(0), video, inputs)
    variables = jax.tree.map(
        lambda x: (random.normal(size=x.shape) / math.sqrt(max(1, math.prod(x.shape[:-1])))).astype(dtype), shapes
    )
    variables["batch_stats"] = jax.tree.map(lambda x: 0.5 + np.abs(x), variables["batch_stats"])
    variables["schedule"] = {"temperature": dtype(0.7)}
    return model, variables, video, inputs


# ---------------------------------------------------------------------------------------------- the plain form


gru, dense, kl = jax.jit(oracle.gru), jax.jit(oracle.dense), oracle.kl
"""Compiled once, because they are called in each frame."""


class Plain:
    """Layers with one model's variables. `new` has the running averages after a training step."""

    def __init__(self, variables, training):
        self.variables, self.training, self.new = variables, training, {}

    def of(self, path, collection="params"):
        found = self.variables[collection]
        for name in path.split("/"):
            found = found[name]
        return found

    def norm(self, path, x):
        axes = tuple(range(x.ndim - 1))
        p, averages = self.of(f"{path}/norm"), self.of(f"{path}/norm", "batch_stats")
        mean, var = averages["mean"], averages["var"]
        if self.training:
            mean, var = x.mean(axes), x.var(axes)
            n = x.size / x.shape[-1]
            self.new[path] = 0.9 * averages["mean"] + 0.1 * mean, 0.9 * averages["var"] + 0.1 * var * n / (n - 1)
        return (x - mean) / jnp.sqrt(var + 1e-5) * p["scale"] + p["bias"]

    def dense(self, path, *x):
        return dense(self.of(path), jnp.concatenate(x, -1))

    def gru(self, path, x, state):
        return gru(self.of(path), x, state)

    def gaussian(self, path, *x):
        return self.dense(f"{path}/mean", *x), 1 / (1 + jnp.exp(-self.dense(f"{path}/stddev", *x)))

    def encode(self, frames):
        """Encode frames [N, 64, 64, C] to features [N, F]."""
        x = frames
        for i, (stride, padding) in enumerate([(2, 1)] * 4 + [(1, 0)]):
            x = jax.lax.conv_general_dilated(
                x,
                self.of(f"encoder/conv_{i}")["kernel"],
                (stride, stride),
                [(padding, padding)] * 2,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            x = elu(self.norm(f"encoder/conv_{i}", x))
        return x[:, 0, 0]

    def decode(self, features):
        """Decode features [N, D] to frames [N, 64, 64, C]."""
        x = features[:, None, None]
        for i in range(5):
            p = self.of(f"decoder/conv_{i}")
            x = oracle.conv_transpose({"kernel": p["kernel"], "bias": p.get("bias", 0)}, x)
            x = x if i == 0 else x[:, 1:-1, 1:-1]
            x = elu(self.norm(f"decoder/conv_{i}", x)) if i < 4 else jnp.tanh(x)
        return x

    def detect(self, c, e):
        """Return the boundary logits [B, T, 2] of features [B, T, F]."""
        T = e.shape[1]
        for name in [*(f"conv_{i}" for i in range(c.vta_detector_layers)), "logits"]:
            p = self.of(f"detector/{name}")
            rows = []
            for t in range(T):
                taps = [e[:, t + a - 1] @ p["kernel"][a] for a in range(3) if 0 <= t + a - 1 < T]
                rows.append(sum(taps) + p.get("bias", 0))
            e = jnp.stack(rows, 1)
            e = e if name == "logits" else elu(self.norm(f"detector/{name}", e))
        return e


def elu(x):
    return jnp.where(x > 0, x, jnp.expm1(jnp.minimum(x, 0)))


def log_density(logits, log_sample, temperature):
    a = logits - temperature * log_sample
    return a.sum(-1) - 2 * jnp.log(jnp.exp(a).sum(-1))


def plain(c, variables, video, inputs, step=None):
    """Return all terms, states and frames of a video. `step` is the training step, or None in evaluation."""
    training = step is not None
    p = Plain(variables, training)
    (B, T), I, D, S = video.shape[:2], c.vta_init_size, c.cell_deter_size, c.cell_stoch_size  # noqa: E741
    x = 2 * video - 1
    e = p.encode(x.reshape(B * T, *x.shape[2:])).reshape(B, T, -1)

    logits = p.detect(c, e)
    temperature = (1.0 - 0.1) * 0.999 ** (step / 100) + 0.1 if training else variables["schedule"]["temperature"]
    log_sample = (logits + inputs.gumbel if training else logits) / temperature
    log_sample = log_sample - jnp.log(jnp.exp(log_sample).sum(-1, keepdims=True))
    boundaries = []
    for t in range(T):
        probability = jnp.exp(log_sample[:, t])
        hard = jnp.eye(2)[jnp.argmax(probability, -1)]
        boundary = jax.lax.stop_gradient(hard - probability) + probability
        if t <= I or t >= T - I:
            boundary = jnp.tile(jnp.array([1.0, 0.0]), (B, 1))
        boundaries.append((boundary[:, :1], boundary[:, 1:]))

    forward, backward, encoding = [], [], []
    f = b = o = jnp.zeros((B, D))
    for t in range(T):
        _, copy = boundaries[t]
        f = p.gru("abstract_forward", e[:, t], f)
        o = p.gru("observation_forward", e[:, t], copy * o)
        forward.append(f)
        encoding.append(o)
    for t in reversed(range(T)):
        _, copy = boundaries[t]
        b = p.gru("abstract_backward", e[:, t], b)
        backward.insert(0, b)
        b = copy * b

    abstract_belief = observation_belief = jnp.zeros((B, D))
    abstract_state = observation_state = jnp.zeros((B, S))
    number = length = jnp.zeros((B, 1))
    m = math.log(0.999 / 0.001)
    rows = []
    for t in range(I, T - I):
        read, copy = boundaries[t]
        if t == I:
            abstract_belief = forward[t - 1]
        else:
            updated = p.gru("transition/abstract_update", abstract_state, abstract_belief)
            abstract_belief = read * updated + copy * abstract_belief
        prior = p.gaussian("transition/abstract_prior", abstract_belief)
        posterior = p.gaussian("abstract_posterior", forward[t - 1], backward[t])
        abstract_state = read * (posterior[0] + posterior[1] * inputs.abstract[:, t]) + copy * abstract_state
        feature = p.dense("transition/abstract_feature", abstract_belief, abstract_state)
        abstract = prior, posterior, abstract_state, abstract_belief

        updated = p.gru(
            "transition/observation_update", jnp.concatenate([observation_state, feature], -1), observation_belief
        )
        observation_belief = read * feature + copy * updated
        prior = p.gaussian("transition/observation_prior", observation_belief)
        posterior = p.gaussian("transition/observation_posterior", encoding[t], feature)
        observation_state = posterior[0] + posterior[1] * inputs.observation[:, t]
        feature = p.dense("transition/feature", observation_belief, observation_state)
        observation = prior, posterior, observation_state, observation_belief

        prior_logits = p.dense("transition/boundary", feature)
        if training:
            length = read * 1 + copy * (length + 1)
            number = number + read
            most = c.vta_max_segments or c.seq_len // 4
            prior_logits = jnp.where(number > most - 0.5, jnp.array([-m, m]), prior_logits)
            prior_logits = jnp.where(length > c.vta_max_length - 0.5, jnp.array([m, -m]), prior_logits)
        boundary = log_density(logits[:, t + 1], log_sample[:, t + 1], temperature)
        boundary -= log_density(prior_logits, log_sample[:, t + 1], temperature)
        rows.append((read[:, 0], abstract, observation, feature, boundary))

    frames = p.decode(jnp.stack([feature for *_, feature, _ in rows], 1).reshape(-1, D))
    frames = frames.reshape(B, T - 2 * I, *video.shape[2:])
    error = (frames - x[:, I : T - I]) ** 2 / (2 * c.dec_stddev**2) + math.log(c.dec_stddev * math.sqrt(2 * math.pi))
    levels = [
        [jnp.stack([x for row in rows for x in jax.tree.leaves(row[i])[n : n + 1]], 1) for n in range(6)]
        for i in (2, 1)
    ]

    def entropy(gaussian):
        return (0.5 * jnp.log(2 * jnp.pi * jnp.e * gaussian[1] ** 2)).sum(-1)

    return {
        "nll": error.sum((1, 2, 3, 4)),
        "kl": jnp.stack(
            [
                sum(kl(o[1], o[0]) for _, _, o, *_ in rows),
                sum(jax.lax.stop_gradient(r) * kl(a[1], a[0]) for r, a, *_ in rows),
            ]
        ),
        "entropy_prior": jnp.stack(
            [
                sum(entropy(o[0]) for _, _, o, *_ in rows),
                sum(jax.lax.stop_gradient(r) * entropy(a[0]) for r, a, *_ in rows),
            ]
        ),
        "entropy_posterior": jnp.stack(
            [
                sum(entropy(o[1]) for _, _, o, *_ in rows),
                sum(jax.lax.stop_gradient(r) * entropy(a[1]) for r, a, *_ in rows),
            ]
        ),
        "boundary": sum(boundary for *_, boundary in rows),
        "levels": levels,
        "read": jnp.stack([read for read, *_ in rows], 1),
        "frames": (frames + 1) / 2,
        "averages": p.new,
    }


NAMES = "nll", "kl", "entropy_prior", "entropy_posterior", "boundary"


@pytest.mark.parametrize(
    "case",
    [
        dict(step=0, vta_max_segments=3, vta_max_length=2),
        dict(
            step=70_000,
            T=7,
            batch=1,
            backend="gpu",  # selects the forms for this backend; the CPU computes them
            channels=3,
            dataset="mazes",
            vta_init_size=1,
            vta_detector_layers=1,
            dec_stddev=0.3,
        ),
    ],
    ids=lambda case: f"step{case['step']}",
)
def test_vta_training_equals_the_plain_form(case, monkeypatch):
    """Terms, their gradients and the running averages, in double precision."""
    case = dict(case)
    backend, step = case.pop("backend", "cpu"), case.pop("step")
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    with jax.enable_x64(True):
        model, variables, video, inputs = made(B=case.pop("batch", 2), **case)
        c = model.config
        rest = {name: x for name, x in variables.items() if name != "params"}

        def fast(params, video):
            training = Training(jnp.asarray(step), jnp.ones(len(video)), None)
            (terms, _), new = model.apply(
                {"params": params, **rest}, video, inputs, training=training, mutable=list(rest)
            )
            return [getattr(terms, name, terms.other["boundary"]) for name in NAMES], new

        def slow(params, video):
            found = plain(c, {"params": params, **rest}, video, inputs, step)
            return [found[name] for name in NAMES], found

        def probe(form, params, video):
            outputs, other = form(params, video)
            random = np.random.default_rng(1)
            return sum((x * random.normal(size=x.shape)).sum() for x in outputs), (outputs, other)

        differentiate = partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
        (_, (got, new)), got_gradients = jax.jit(differentiate(partial(probe, fast)))(variables["params"], video)
        (_, (want, found)), want_gradients = differentiate(partial(probe, slow))(variables["params"], video)
        begun = float(found["read"].sum())  # besides the first frame, some are copied and, in the first case, some read
        assert len(video) + (step == 0) <= begun < found["read"].size
        assert_equal(got, want)
        assert_equal(got_gradients, want_gradients)
        assert float(new["schedule"]["temperature"]) == pytest.approx(0.9 * 0.999 ** (step / 100) + 0.1)
        assert len(found["averages"]) == 5 + 4 + c.vta_detector_layers
        for path, (mean, var) in found["averages"].items():
            averages = new["batch_stats"]
            for name in [*path.split("/"), "norm"]:
                averages = averages[name]
            assert_equal((averages["mean"], averages["var"]), (mean, var))


def test_vta_evaluation_equals_the_plain_form():
    """Terms, states and frames, in double precision."""
    with jax.enable_x64(True):
        model, variables, video, inputs = made()
        c = model.config
        observe = jax.jit(lambda variables: model.apply(variables, video, inputs, method="observe")[0])
        # Before training, detected boundaries are all alike. This bias makes half of them true.
        probability = observe(variables)[1].boundary[:, c.vta_init_size + 1 : -c.vta_init_size]
        bias = variables["params"]["detector"]["logits"]["bias"]
        variables["params"]["detector"]["logits"]["bias"] = bias - np.array(
            [np.median(np.log(probability / (1 - probability))), 0]
        )
        observed = observe(variables)
        frames = jax.jit(lambda variables: model.apply(variables, observed, method="decode"))(variables)
        terms, _ = jax.jit(lambda variables: model.apply(variables, video, inputs))(variables)
        want = plain(c, variables, video, inputs)
        read = np.asarray(want["read"])
        assert len(video) < read.sum() < read.size
        assert_equal([getattr(terms, name, terms.other["boundary"]) for name in NAMES], [want[name] for name in NAMES])
        modelled = slice(c.vta_init_size, -c.vta_init_size)
        assert_equal(frames[:, modelled], want["frames"])
        np.testing.assert_array_equal(observed[1].boundary[:, modelled] >= 0.5, read)
        for level, states in zip(observed, want["levels"], strict=True):
            if level is observed[1]:  # if nothing is read, the posterior is the prior
                states[2:4] = (np.where(read[..., None], q, p) for p, q in zip(states[:2], states[2:4], strict=True))
            assert_equal([x[:, modelled] for x in (*level.prior, *level.posterior, level.stoch, level.deter)], states)


def assert_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        difference = float(np.abs(a - b).max() / (1 + np.abs(b).max()))
        assert difference < 1e-9, (jax.tree_util.keystr(path), difference)


def test_boundaries_learn_from_their_own_kl_and_not_from_the_number_of_segments(monkeypatch):
    """With a KL of one nat per segment, the KL of level 1 is their number. Its gradient of the detector is zero."""
    model, variables, video, inputs = made(dtype=np.float32)
    rest = {name: x for name, x in variables.items() if name != "params"}
    monkeypatch.setattr(vta, "kl_divergence", lambda posterior, prior: jnp.ones_like(posterior.mean[..., 0]))

    def terms(params):
        training = Training(jnp.int32(0), jnp.ones(len(video)), None)
        (terms, _), _ = model.apply({"params": params, **rest}, video, inputs, training=training, mutable=list(rest))
        return terms.kl[1].sum(), terms.other["boundary"].sum()

    (segments, _), pullback = jax.vjp(jax.jit(terms), variables["params"])
    assert segments == round(float(segments)) > 0
    of_segments, of_boundaries = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(pullback(gradient)[0]["detector"]["logits"])])
        for gradient in ((jnp.float32(1), jnp.float32(0)), (jnp.float32(0), jnp.float32(1)))
    )
    assert not of_segments.any()
    assert np.abs(of_boundaries).max() > 1e-3


# ---------------------------------------------------------------------------------------------- sizes, layers


@pytest.mark.parametrize("name, channels", [("mmnist", 1), ("minerl", 3)])
def test_vta_has_the_parameter_counts_of_the_published_sizes(name, channels):
    c = configuration.load(ROOT / "configs" / "vta" / f"{name}.yml")
    F, D, S = c.filters, c.cell_deter_size, c.cell_stoch_size
    assert (F, D, S, c.channels, c.seq_len) == (128, 128, 8, channels, 100)
    shapes = make_state(VTA(c)).params["params"]

    def gru(inputs):
        return 3 * D * (inputs + D) + 4 * D

    stats = 2 * (D * S + S)
    want = {
        "encoder": 16 * (channels * F + 4 * F * F) + 5 * 2 * F,
        "detector": 3 * (3 * F * F + 2 * F) + 3 * F * 2 + 2,
        "decoder": 16 * (D * F + 3 * F * F + F * channels) + 4 * 2 * F + channels,
        **{name: gru(F) for name in ("abstract_forward", "abstract_backward", "observation_forward")},
        "abstract_posterior": 2 * (2 * D * S + S),
        "transition": gru(S) + gru(S + D) + 2 * stats + 2 * (2 * D * S + S) + 2 * ((D + S) * D + D) + 2 * D + 2,
    }
    assert {module: sum(x.size for x in jax.tree.leaves(tree)) for module, tree in shapes.items()} == want


def test_the_prior_limits_the_number_and_length_of_segments():
    """Of segments with 3, 1, 2 and 4 frames, the last is too long, and no fifth one may follow."""
    read = jnp.array([1, 0, 0, 1, 1, 0, 1, 0, 0, 0])[None, :, None]
    logits = vta.limit_segments(jnp.zeros((1, 10, 2)), read, max_segments=4, max_length=3)[0]
    m = math.log(999)
    expected = [0, 0, m, 0, 0, 0, -m, -m, m, m]  # length 3; then four segments; then both, and length wins
    np.testing.assert_allclose(logits, [[x, -x] for x in expected], rtol=1e-6)


def test_straight_through_rounds_and_passes_the_gradient():
    """Of two equal classes it chooses the first. Its gradient is that of the relaxed sample."""
    log_sample = jnp.log(jnp.array([[0.6, 0.4], [0.2, 0.8], [0.5, 0.5]]))
    value, pullback = jax.vjp(vta.straight_through, log_sample)
    assert value.tolist() == [[1, 0], [0, 1], [1, 0]]
    np.testing.assert_allclose(pullback(jnp.ones((3, 2)))[0], jnp.exp(log_sample), rtol=1e-6)


def test_log_density_is_of_the_concrete_distribution():
    """The density of the difference of a sample's two logarithms integrates to one."""
    temperature, logits = 0.6, jnp.array([0.3, -0.8])
    x, step = np.linspace(-60, 60, 10_001, retstep=True)
    log_sample = jax.nn.log_softmax(jnp.stack([jnp.asarray(x), jnp.zeros(len(x))], -1))
    density = temperature * jnp.exp(vta.log_density(logits, log_sample, jnp.float32(temperature)))
    assert float(density.sum() * step) == pytest.approx(1, abs=1e-3)


# ---------------------------------------------------------------------------------------------- chunks, predictions


def test_vta_does_not_depend_on_later_chunks_and_frames(monkeypatch):
    """Predictions don't depend on later frames, to the bit, or on chunks; states don't depend on later chunks."""
    model, variables, video, _ = made(T=12, dtype=np.float32)
    keys = jax.random.split(jax.random.key(0), 2)
    changed = video.copy()
    changed[:, 4:] = 0
    a, b, c = (
        np.concatenate(list(rollout.predict(model, variables, v, keys).prediction), 1)
        for v in (video, changed, 0 * video)
    )
    assert a.shape == (2, 8, 64, 64, 1)
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)
    in_chunks = rollout.open_loop(model, variables, video[:, :4], keys, 8, chunk=3)
    np.testing.assert_allclose(np.concatenate(list(in_chunks.prediction), 1), a, atol=1e-5)

    changed = video.copy()
    changed[:, 8:] = 0
    (x, y), (z, w) = (list(rollout.observe(model, variables, v, keys)) for v in (video, changed))
    for p, q in zip(jax.tree.leaves(x), jax.tree.leaves(z), strict=True):
        assert p.shape[:2] == (2, 8)
        np.testing.assert_array_equal(p, q)
    assert not np.array_equal(y[0].stoch, w[0].stoch) and np.all(y[1].boundary[:, 0] == 1)


def test_imagined_segments_continue_from_the_context():
    """The first frame begins a segment from the context's encoding. Within a segment, the abstract state is copied."""
    model, variables, video, inputs = made(T=12, dtype=np.float32)
    observed, state = rollout.apply(model, "observe", variables, video[:, :4], model.time_slice(inputs, 0, 4))
    (frames, segments), _ = rollout.apply(model, "imagine", variables, model.time_slice(inputs, 4, 12), state)
    np.testing.assert_array_equal(segments.deter[:, 0], state.forward)
    begins = np.asarray(segments.boundary) >= 0.5
    assert begins[:, 0].all() and not begins.all()
    for row, t in np.argwhere(~begins):
        for x in segments.stoch, segments.deter:
            np.testing.assert_array_equal(x[row, t], x[row, t - 1])
    assert not np.array_equal(frames.stoch[:, 1:], frames.stoch[:, :-1])


def test_the_elbo_of_vta_in_chunks_leaves_out_the_edges():
    """A later chunk has terms for all but its last frames. A chunk that is too short adds nothing."""
    model, variables, video, inputs = made(T=10, dtype=np.float32)
    keys = jax.random.split(jax.random.key(0), 2)
    inputs = model.draw(keys, 10)
    first, state = rollout.apply(model, "elbo", variables, video[:, :8], model.time_slice(inputs, 0, 8))
    total = rollout.elbo(model, variables, video, keys)
    np.testing.assert_allclose(total.nll, first.nll, rtol=1e-6)
    second, _ = rollout.apply(model, "elbo", variables, video[:, 2:], model.time_slice(inputs, 2, 10), state)
    (observed, _), _ = rollout.apply(model, "observe", variables, video[:, 2:], model.time_slice(inputs, 2, 10), state)
    (frames,) = (rollout.apply(model, "decode", variables, (observed, None)),)
    error = 2 * (np.asarray(frames) - video[:, 2:])[:, :6]
    constant = error[0].size * 0.5 * math.log(2 * math.pi)
    np.testing.assert_allclose(second.nll, 0.5 * (error**2).sum((1, 2, 3, 4)) + constant, rtol=1e-5)


def test_wrong_keys_of_vta_are_refused():
    with pytest.raises(ConfigError, match=r"seq_len: must be more than twice vta_init_size = 5, .* got 10"):
        Config(model="vta", seq_len=10)
    with pytest.raises(ConfigError, match=r"vta_max_length: cwvae doesn't read it \(it is for vta\), got 9"):
        Config(vta_max_length=9)
    with pytest.raises(ConfigError, match=r"beta: vta doesn't read it \(it is for cwvae\), got 2.0"):
        Config(model="vta", beta=2.0)


# ---------------------------------------------------------------------------------------------- programs


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the configuration of a tiny run with checkpoints at steps 2 and 4."""
    c = Config(**TINY | dict(logdir=str(tmp_path_factory.mktemp("vta")), save_model_every=2, save_gifs=True))
    train.train(c)
    return c


def test_vta_resumes_exactly(trained, tmp_path):
    c = dataclasses.replace(trained, logdir=str(tmp_path), save_gifs=False)
    train.train(dataclasses.replace(c, max_steps=2))
    state = train.train(c)
    whole = loading.load_state(make_model(c), loading.find_checkpoint(runs.directory(trained)))
    assert whole.params["schedule"]["temperature"] == pytest.approx(0.9 * 0.999**0.03 + 0.1)
    assert_same(state, whole)


def test_all_programs_run_with_vta(trained):
    """Training with validation, evaluation, `levels`, and `boundaries`."""
    run = runs.directory(trained)
    last = log_of(run)[-1]
    for split in "train", "validation":
        kl = [last[f"{split}/avg_kl_{name}"] for name in (*(f"prior_posterior__level_{i}" for i in (0, 1)), "boundary")]
        assert last[f"{split}/kl_term"] == pytest.approx(sum(kl), rel=1e-5)
    assert list(run.glob("videos/*.gif"))
    eval.evaluate(*eval.parse(["--logdir", str(run), "--no_save_grid"]))
    (sample,) = run.glob("eval_*/sample1/random_sample_1.npz")
    predicted = np.load(sample)["arr_0"]

    analysis.COMMANDS["boundaries"]([str(run), "--example=1"])
    (directory,) = run.glob("boundaries_*")
    found = dict(np.load(directory / "boundaries.npz"))
    assert np.abs(found["prediction"][4:].astype(int) - predicted).max() <= 1
    np.testing.assert_array_equal(found["truth"], data.windows(trained, "test")[1])
    assert found["prediction_boundary"].shape == found["posterior_boundary"].shape == (12,)
    assert found["prediction_boundary"][4] == 1 and np.all(found["posterior_boundary"][:3] == 1)
    with Image.open(directory / "boundaries.png") as picture:
        assert picture.size[0] > 1000
    analysis.COMMANDS["levels"]([str(run)])
    (table,) = run.glob("levels_*/levels.json")
    (by_run,) = json.loads(table.read_text()).values()
    assert len(by_run["levels"]) == 2


def test_boundaries_are_refused_for_other_models(tmp_path):
    c = Config(dataset="digits", logdir=str(tmp_path))
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    (tmp_path / "config.yml").write_text(c.to_yaml())
    with pytest.raises(ConfigError, match="model: boundaries needs a run of vta, got one of cwvae"):
        analysis.COMMANDS["boundaries"]([str(tmp_path)])


def test_vta_is_the_same_on_two_devices_with_padding():
    """Terms and running averages of two sequences, together or on a device each that also has padding."""
    with jax.enable_x64(True):
        model, variables, video, inputs = made()
        rest = {name: x for name, x in variables.items() if name != "params"}

        def call(video, inputs, weight, axis=None):
            training = Training(jnp.int32(0), weight, axis)
            (terms, _), new = model.apply(variables, video, inputs, training=training, mutable=list(rest))
            return [terms.nll, terms.kl[0], terms.kl[1], terms.other["boundary"]], new

        want, averages = jax.jit(call)(video, inputs, jnp.ones(2))
        split = lambda x: np.stack([x, 3 + x[::-1]], 1)  # noqa: E731
        weight = jnp.array([[1.0, 0.0]] * 2)
        found = jax.jit(jax.vmap(lambda *of: call(*of, "data"), axis_name="data"))(
            split(video), jax.tree.map(split, inputs), weight
        )
    with jax.enable_x64(True):
        first = [x[:, 0] for x in found[0]]
    assert_equal(first, want)
    for device in range(2):
        assert_equal(jax.tree.map(lambda x, device=device: x[device], found[1]), averages)


@pytest.mark.slow
def test_vta_shows_digits_after_a_short_training(tmp_path):
    """The loss falls, and reconstructions correlate with the digits, though they are still blurred."""
    keys = dict(cell_deter_size=32, cell_stoch_size=8, filters=16, batch_size=4, lr=3e-3, dec_stddev=0.3)
    c = Config(**TINY | keys | dict(max_steps=120, save_scalars_every=30, logdir=str(tmp_path)))
    state = train.train(c)
    losses = [line["validation/loss"] for line in log_of(runs.directory(c))]
    assert losses[-1] < losses[0] - 100, losses
    model, video = make_model(c), np.stack([data.windows(c, "test")[i] for i in range(4)])[:, :8]
    keys = jax.random.split(jax.random.key(0), 4)
    params = jax.device_get(state.params)
    (states,) = rollout.observe(model, params, video, keys)
    frames = rollout.apply(model, "decode", params, states)
    correlation = np.corrcoef(np.asarray(frames)[:, 2:6].ravel(), video[:, 2:6].ravel())[0, 1]
    assert correlation > 0.3, correlation

"""SVG-LP against a plain form: one frame at a time, as in the paper's equations, with steps in PyTorch's order."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import log_of, tiny_keys
from helpers import assert_same
from oracle import dense, leaky_relu

import data
import eval
import train
from config import Config
from sequences import rollout
from sequences.interface import Training
from system.devices import Devices
from training import runs
from training.models import make_model
from training.step import make_state

TINY = tiny_keys("svg") | dict(
    model="svg",
    num_digits=1,
    svg_features=3,
    svg_rnn_size=4,
    cell_stoch_size=2,
    dec_stddev=0.45,
    seq_len=5,
    eval_seq_len=7,
    open_loop_ctx=2,
    num_examples=2,
)


def made(network, T=4, **keys):
    """Return a model, random variables, a video and noise, in float64."""
    model = make_model(Config(**TINY | dict(svg_network=network) | keys))
    random = np.random.default_rng(0)
    video = random.uniform(size=(2, T, 64, 64, 1))
    noise = random.normal(size=(2, T, 2))
    shapes = jax.eval_shape(model.init, jax.random.key(0), video[:, :2], noise[:, :2])
    variables = jax.tree.map(lambda x: 0.3 * random.normal(size=x.shape), shapes)
    variables["batch_stats"] = jax.tree.map(lambda x: 0.5 + np.abs(x), variables["batch_stats"])
    return model, variables, video, noise


# ---------------------------------------------------------------------------------------------- the plain form


class Plain:
    """Layers with one model's variables. They take the frames of all sequences at once."""

    def __init__(self, network, variables, batch_statistics):
        self.network, self.batch_statistics = network, batch_statistics
        self.params, self.averages = variables["params"], variables["batch_stats"]

    def norm(self, x, module, name):
        p, averages = self.params[module][name]["normalise"], self.averages[module][name]["normalise"]
        if self.batch_statistics:
            mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        else:
            mean, var = averages["mean"], averages["var"]
        return p["scale"] * (x - mean) / jnp.sqrt(var + 1e-5) + p["bias"]

    def conv(self, x, module, name, stride, padding, norm=True):
        p = self.params[module][name]
        x = jnp.pad(x, ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0)))
        size = p["kernel"].shape[0]
        outputs = (x.shape[1] - size) // stride + 1
        last = stride * (outputs - 1) + 1
        taps = [(a, b) for a in range(size) for b in range(size)]
        y = sum(x[:, a : a + last : stride, b : b + last : stride] @ p["kernel"][a, b] for a, b in taps) + p["bias"]
        return self.norm(y, module, name) if norm else y

    def conv_transpose(self, x, module, name, padding, norm=True):
        """Add each pixel's value times the kernel at twice its position; cut `padding` off the edges."""
        p = self.params[module][name]
        (N, H, _, _), size = x.shape, 4
        y = jnp.zeros((N, 2 * (H - 1) + size, 2 * (H - 1) + size, p["kernel"].shape[-1]))
        for a in range(size):
            for b in range(size):
                y = y.at[:, a : a + 2 * H - 1 : 2, b : b + 2 * H - 1 : 2].add(x @ p["kernel"][a, b])
        y = y[:, padding : y.shape[1] - padding, padding : y.shape[2] - padding] + p["bias"]
        return self.norm(y, module, name) if norm else y

    def encode(self, x):
        """Encode frames [N, 64, 64, C] to features [N, G] and maps."""
        maps = []
        if self.network == "dcgan":
            for i in range(4):
                x = leaky_relu(self.conv(x, "encoder", f"Block_{i}", 2, 1))
                maps.append(x)
            return jnp.tanh(self.conv(x, "encoder", "Block_4", 1, 0))[:, 0, 0], maps
        blocks = iter(range(10))
        for count in 2, 2, 3, 3:
            for _ in range(count):
                x = leaky_relu(self.conv(x, "encoder", f"Block_{next(blocks)}", 1, 1))
            maps.append(x)
            x = jnp.maximum(
                jnp.maximum(x[:, ::2, ::2], x[:, 1::2, ::2]), jnp.maximum(x[:, ::2, 1::2], x[:, 1::2, 1::2])
            )
        return jnp.tanh(self.conv(x, "encoder", "Block_10", 1, 0))[:, 0, 0], maps

    def decode(self, g, maps):
        """Decode features [N, G] and each frame's skips to frames [N, 64, 64, C]."""
        x = leaky_relu(self.conv_transpose(g[:, None, None], "decoder", "first", 0))
        if self.network == "dcgan":
            for i in range(3):
                x = leaky_relu(self.conv_transpose(jnp.concatenate([x, maps[3 - i]], -1), "decoder", f"blocks_{i}", 1))
            return jax.nn.sigmoid(
                self.conv_transpose(jnp.concatenate([x, maps[0]], -1), "decoder", "blocks_3", 1, norm=False)
            )
        for i, count in enumerate((3, 3, 2)):
            x = jnp.concatenate([jnp.kron(x, jnp.ones((1, 2, 2, 1))), maps[3 - i]], -1)
            for j in range(count):
                x = leaky_relu(self.conv(x, "decoder", f"stages_{i}_{j}", 1, 1))
        x = jnp.concatenate([jnp.kron(x, jnp.ones((1, 2, 2, 1))), maps[0]], -1)
        x = leaky_relu(self.conv(x, "decoder", "stages_3_0", 1, 1))
        return jax.nn.sigmoid(self.conv(x, "decoder", "stages_3_1", 1, 1, norm=False))

    def lstm(self, module, name, x, state):
        p, (h, c) = self.params[module][name], state
        gates = x @ p["input_kernel"] + p["input_bias"] + h @ p["state_kernel"] + p["state_bias"]
        i, f, g, o = (gates[:, k * h.shape[1] : (k + 1) * h.shape[1]] for k in range(4))
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return jax.nn.sigmoid(o) * jnp.tanh(c), c

    def distribution(self, module, features, state):
        p = self.params[module]
        state = self.lstm(module, "lstm", dense(p["embed"], features), state)
        return dense(p["mean"], state[0]), dense(p["log_variance"], state[0]), state

    def predictor(self, features, z, states):
        p, x, after = self.params["predictor"], jnp.concatenate([features, z], -1), []
        x = dense(p["embed"], x)
        for i, state in enumerate(states):
            state = self.lstm("predictor", f"lstm_{i}", x, state)
            x = state[0]
            after.append(state)
        return jnp.tanh(dense(p["output"], x)), after


def plain(network, config, variables, video, noise, context, given, batch_statistics=False):
    """Observe the first `given` frames of a video [B, T, ...], and imagine frames up to the end of the noise.

    Skips are those of the frame before. From frame `context` on, they don't change.

    Returns:
        nll [B], KL [B] and frames [B, T, 64, 64, C].
    """
    c, model = config, Plain(network, variables, batch_statistics)
    B, T = noise.shape[:2]
    zeros = jnp.zeros((B, c.svg_rnn_size))
    posterior_state = prior_state = (zeros, zeros)
    states = [(zeros, zeros)] * 2
    known = video[:, :given]
    features, maps = model.encode(known.reshape(-1, *video.shape[2:]))
    encoded = [
        (f, m) for f, m in zip(by_time(features, B), zip(*(by_time(m, B) for m in maps), strict=True), strict=True)
    ]
    kl, gs, skips, frames = 0.0, [], [], [video[:, 0]]
    for t in range(1, T):
        before = encoded[t - 1][0]
        if t < context:
            source = encoded[t - 1][1]
        mean_p, log_p, prior_state = model.distribution("prior", before, prior_state)
        mean, log = mean_p, log_p
        if t < given:
            mean, log, posterior_state = model.distribution("posterior", encoded[t][0], posterior_state)
            ratio = jnp.exp(log - log_p)
            kl += (0.5 * (ratio + (mean - mean_p) ** 2 / jnp.exp(log_p) - 1 - jnp.log(ratio))).sum(-1)
        g, states = model.predictor(before, mean + jnp.exp(log / 2) * noise[:, t], states)
        gs.append(g)
        skips.append(source)
        if t >= given:
            frames.append(model.decode(g, source))
            encoded.append(model.encode(frames[-1]))
    # All given frames are decoded together, since they share batch statistics.
    together = [jnp.stack(x, 1).reshape(-1, *x[0].shape[1:]) for x in zip(*skips[: given - 1], strict=True)]
    decoded = model.decode(jnp.stack(gs[: given - 1], 1).reshape(-1, c.svg_features), together)
    seen = decoded.reshape(B, given - 1, *decoded.shape[1:])
    error = ((video[:, 1:given] - seen) / c.dec_stddev) ** 2
    nll = 0.5 * error.sum((1, 2, 3, 4)) + error[0].size * np.log(c.dec_stddev * np.sqrt(2 * np.pi))
    return nll, kl, jnp.concatenate([jnp.stack(frames[:1], 1), seen, *[x[:, None] for x in frames[1:]]], 1)


def by_time(x, B):
    return list(x.reshape(B, -1, *x.shape[1:]).swapaxes(0, 1))


# ---------------------------------------------------------------------------------------------- equality


@pytest.mark.parametrize("network, in_training", [("dcgan", True), ("vgg", False)])
def test_svg_equals_the_plain_form(network, in_training):
    """Values, and gradients of variables and video. The context ends within the sequence."""
    with jax.enable_x64(True):
        model, variables, video, noise = made(network, T=5, open_loop_ctx=3)
        training = Training(jnp.int32(0), jnp.ones(2), None) if in_training else None

        def fast(params, video):
            given = {**variables, "params": params}
            (terms, _), _ = model.apply(given, video, noise, training=training, mutable=["batch_stats"])
            (rollouts, _), _ = model.apply(
                given, video, noise, training=training, mutable=["batch_stats"], method="observe"
            )
            return terms.nll, terms.kl[0], model.decode(rollouts)

        def slow(params, video):
            given = {**variables, "params": params}
            return plain(network, model.config, given, video, noise, 3, video.shape[1], in_training)

        def total(form, params, video):
            outputs = form(params, video)
            random = np.random.default_rng(1)
            return sum((x * random.normal(size=x.shape)).sum() for x in outputs), outputs

        found = [
            jax.jit(jax.value_and_grad(lambda *of, form=form: total(form, *of), (0, 1), has_aux=True))(
                variables["params"], video
            )
            for form in (fast, slow)
        ]
    got, want = ((outputs, gradients) for (_, outputs), gradients in found)
    for path, difference in jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda x, y: float(np.abs(x - y).max() / (1 + np.abs(y).max())), got, want)
    ):
        assert difference < 1e-9, (jax.tree_util.keystr(path), difference)


def test_svg_open_loop_equals_the_plain_form_for_any_chunk():
    """Predicted frames are fed back. The video after the context isn't used."""
    with jax.enable_x64(True):
        model, variables, video, _ = made("dcgan", T=7, open_loop_ctx=3)
        keys = jax.random.split(jax.random.key(0), 2)
        want = jax.jit(lambda: plain("dcgan", model.config, variables, video, model.draw(keys, 7), 3, 3)[2])()
        for chunk in None, 2:
            found = rollout.open_loop(model, variables, video[:, :3], keys, 4, chunk=chunk)
            np.testing.assert_allclose(found.reconstruction, want[:, :3], atol=1e-12)
            np.testing.assert_allclose(np.concatenate(list(found.prediction), 1), want[:, 3:], atol=1e-12)
        # The same noise, in chunks that begin within the context, at its end and after it.
        (whole,) = rollout.observe(model, variables, video, keys, chunk=7)
        chunks = list(rollout.observe(model, variables, video, keys, chunk=2))
    for a, b in zip(
        jax.tree.leaves(whole), jax.tree.leaves(jax.tree.map(lambda *x: np.concatenate(x, 1), *chunks)), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-12)


# ---------------------------------------------------------------------------------------------- batch statistics


def test_batch_statistics_cover_all_devices_without_padding():
    """Two devices with a sequence each give the same as one device with both and a padding row."""
    with jax.enable_x64(True):
        model, variables, video, noise = made("dcgan", T=3)

        def call(video, noise, weight, axis=None):
            training = Training(jnp.int32(0), weight, axis)
            (terms, _), changed = model.apply(variables, video, noise, training=training, mutable=["batch_stats"])
            return terms.nll, terms.kl[0], changed

        nll, kl, averages = jax.jit(call)(video, noise, jnp.ones(2))
        pad = lambda x: np.concatenate([x, 100 + x[:1]])  # noqa: E731
        padded = jax.jit(call)(pad(video), pad(noise), jnp.array([1.0, 1.0, 0.0]))
        split = jax.jit(jax.vmap(lambda *of: call(*of, "data"), axis_name="data"))(
            video[:, None], noise[:, None], jnp.ones((2, 1))
        )
    for got in padded, jax.tree.map(lambda x: x[:, 0], split[:2]):
        np.testing.assert_allclose(got[0][:2], nll, rtol=1e-10)
        np.testing.assert_allclose(got[1][:2], kl, rtol=1e-10)
    for got in padded[2], jax.tree.map(lambda x: x[1], split[2]):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(averages), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10)
    # As in PyTorch, averages move by a tenth to the mean and the sample variance of the step.
    x = np.pad(video, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))
    p = variables["params"]["encoder"]["Block_0"]
    y = sum(x[:, :, a : a + 63 : 2, b : b + 63 : 2] @ p["kernel"][a, b] for a in range(4) for b in range(4)) + p["bias"]
    before, after = (tree["batch_stats"]["encoder"]["Block_0"]["normalise"] for tree in (variables, averages))
    np.testing.assert_allclose(after["mean"], 0.9 * before["mean"] + 0.1 * y.mean(), rtol=1e-10)
    np.testing.assert_allclose(after["var"], 0.9 * before["var"] + 0.1 * y.var(ddof=1), rtol=1e-10)


# ---------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    "network, encoder, decoder",
    [("dcgan", 3_805_376, 6_558_529), ("vgg", 8_688_448, 11_821_505)],
)
def test_svg_has_the_parameter_counts_of_the_authors_code(network, encoder, decoder):
    """For grey frames and 10 latents."""
    model = make_model(Config(model="svg", svg_network=network, filters=64, cell_stoch_size=10))
    params = make_state(model).params["params"]
    counts = {name: sum(x.size for x in jax.tree.leaves(of)) for name, of in params.items()}
    distribution = 128 * 256 + 256 + 4 * 256 * (2 * 256 + 2) + 2 * (256 * 10 + 10)
    predictor = 138 * 256 + 256 + 2 * 4 * 256 * (2 * 256 + 2) + 256 * 128 + 128
    assert counts == dict(
        encoder=encoder, decoder=decoder, posterior=distribution, prior=distribution, predictor=predictor
    )


# ---------------------------------------------------------------------------------------------- programs


def test_svg_resumes_exactly_and_can_be_evaluated(tmp_path):
    """Parameters and running averages are equal to the bit. Predictions don't depend on frames after the context."""
    c = Config(**TINY, logdir=str(tmp_path / "whole"), save_model_every=2, save_scalars_every=2)
    whole = jax.device_get(train.train(c))
    c = dataclasses.replace(c, logdir=str(tmp_path / "parts"))
    train.train(dataclasses.replace(c, max_steps=2))
    parts = jax.device_get(train.train(c))
    assert whole.step == 4 and whole.params.keys() == {"params", "batch_stats"}
    assert_same(whole, parts)
    assert {"train/loss", "validation/avg_kl_prior_posterior__level_0"} <= log_of(runs.directory(c))[-1].keys()

    eval.evaluate(*eval.parse(["--logdir", str(tmp_path / "parts"), "--no_save_grid"]))
    model, params = make_model(c), Devices().replicate(parts.params)
    test = data.windows(c, "test")
    video = np.stack([test[0], test[1]])
    changed = video.copy()
    changed[:, c.open_loop_ctx :] = 255 - changed[:, c.open_loop_ctx :]
    a, b = (train.open_loop_video(model, params, data.Window(v, None)) for v in (video, changed))
    np.testing.assert_array_equal(a[:, :, 68 : 2 * 68], b[:, :, 68 : 2 * 68])


def test_svg_cannot_resume_with_another_context(tmp_path):
    """Because training, too, takes skips from the last context frame."""
    c = Config(**TINY, logdir=str(tmp_path), save_gifs_every=1)
    runs.directory(c).mkdir(parents=True)
    (runs.directory(c) / "config.yml").write_text(c.to_yaml())
    with pytest.raises(ValueError, match=r"another open_loop_ctx \(2 there, 3 now\)"):
        train.train(dataclasses.replace(c, open_loop_ctx=3))

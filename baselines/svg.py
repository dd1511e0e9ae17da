"""SVG-LP (Denton, Fergus 2018, https://arxiv.org/abs/1802.07687), in Flax.

The model predicts each frame x_t from the features h_{t-1} of the frame before and a latent z_t with a learned prior:

    h_t = encoder(x_t)
    z_t ~ q(z_t | x_1..t) = N(LSTM(h_t))        posterior, of true frames
    z_t ~ p(z_t | x_1..t-1) = N(LSTM(h_{t-1}))  prior, of predicted frames
    g_t = LSTM([h_{t-1}, z_t])
    x_t ~ N(decoder(g_t, skips), dec_stddev)

In an open loop, predicted frames replace the true ones after the context of `open_loop_ctx` frames. The skips are
feature maps of the encoder: in the context, those of frame t - 1. After the context, they stay those that the last
context frame used; this also holds in training. The first frame of a video has no frame before it: it is given, and the
bound has no term for it.

Differences from the authors' code (https://github.com/edenton/svg):

- Its loss is a mean squared error plus 1e-4 times the KL. Up to a factor, this is the bound for a Normal decoder with
  2 dec_stddev^2 = 1e-4 H W C: `dec_stddev` 0.4525 for grey frames, 0.784 for colour. Here, the loss is the bound.
- Its batch statistics are of one time step on one GPU. Here, they are of all frames of a batch on all devices, and the
  running averages change once per step.
- The states of the LSTMs are zeros at the beginning of each video. They are kept between the chunks of a long video.

B sequences, T frames, G = svg_features, S = cell_stoch_size, D = svg_rnn_size.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import Array

from baselines.layers import BatchNorm, convolve
from config import Config
from cwvae import Gaussian, entropy, floats, kl_divergence, negative_log_likelihood
from fast.initial import normal, uniform, zeros
from fast.layers import Dense, linear
from sequences.interface import Model, Terms, Training
from sequences.noise import padded_slice

small_normal = normal(0.02)

Maps = tuple[Array, ...]
"""The encoder's feature maps, from the largest to the smallest, [B, T, H, W, C] each."""

# ---------------------------------------------------------------------------------------------- recurrent layers


class LSTMState(NamedTuple):
    """The state of an LSTM layer."""

    hidden: Array  # [B, D]
    cell: Array  # [B, D]


class LSTM(nn.Module):
    """An LSTM layer in PyTorch's form: two biases, and gates in the order input, forget, candidate, output."""

    inputs: int
    size: int

    @nn.compact
    def __call__(self, x: Array, state: LSTMState) -> tuple[Array, LSTMState]:
        """Return the hidden states [B, T, D] for x [B, T, inputs], and the state after the last tick."""
        D = self.size
        initializer = uniform(1 / D**0.5)  # as in PyTorch

        def parameter(name: str, *shape: int) -> Array:
            return self.param(name, initializer, shape)

        kernel, bias = parameter("input_kernel", self.inputs, 4 * D), parameter("input_bias", 4 * D)
        state_kernel, state_bias = parameter("state_kernel", D, 4 * D), parameter("state_bias", 4 * D)

        def tick(state: LSTMState, gates: Array) -> tuple[LSTMState, Array]:
            gates = linear(state.hidden, state_kernel, state_bias) + gates
            input_gate, forget_gate, candidate, output_gate = jnp.split(gates, 4, -1)
            cell = nn.sigmoid(forget_gate) * state.cell + nn.sigmoid(input_gate) * jnp.tanh(candidate)
            hidden = nn.sigmoid(output_gate) * jnp.tanh(cell)
            return LSTMState(hidden, cell), hidden

        state, hidden = jax.lax.scan(tick, state, linear(x, kernel, bias).swapaxes(0, 1))
        return hidden.swapaxes(0, 1), state


class GaussianLSTM(nn.Module):
    """A Gaussian over z_t: the posterior given the features up to frame t, or the prior given those up to t - 1."""

    config: Config

    @nn.compact
    def __call__(self, features: Array, state: LSTMState) -> tuple[Gaussian, LSTMState]:
        """Return the distributions [B, T, S] for features [B, T, G], and the new state."""
        G, D, S = (getattr(self.config, key) for key in ("svg_features", "svg_rnn_size", "cell_stoch_size"))
        x = Dense(G, D, kernel_init=small_normal, name="embed")(features)
        x, state = LSTM(D, D, name="lstm")(x, state)
        mean = Dense(D, S, kernel_init=small_normal, name="mean")(x)
        log_variance = Dense(D, S, kernel_init=small_normal, name="log_variance")(x)
        return Gaussian(mean, jnp.exp(0.5 * log_variance)), state


class Predictor(nn.Module):
    """g_t = LSTM([h_{t-1}, z_t]), two layers."""

    config: Config

    @nn.compact
    def __call__(
        self, features: Array, stoch: Array, states: Sequence[LSTMState]
    ) -> tuple[Array, tuple[LSTMState, ...]]:
        """Return g_t [B, T, G] and the new states, for features of frames t - 1 [B, T, G] and stoch z_t [B, T, S]."""
        G, D, S = (getattr(self.config, key) for key in ("svg_features", "svg_rnn_size", "cell_stoch_size"))
        x = Dense(G + S, D, kernel_init=small_normal, name="embed")(features, stoch)
        new_states = []
        for i, state in enumerate(states):
            x, state = LSTM(D, D, name=f"lstm_{i}")(x, state)
            new_states.append(state)
        return jnp.tanh(Dense(D, G, kernel_init=small_normal, name="output")(x)), tuple(new_states)


# ---------------------------------------------------------------------------------------------- encoder, decoder

STAGES = (1, 2, 4, 8)
"""Channels of each stage in multiples of `filters`, from the largest feature maps to the smallest."""


class Block(nn.Module):
    """A convolution, batch normalisation, and leaky ReLU or another activation."""

    inputs: int
    outputs: int
    kind: str
    """See `convolve`."""
    skip_channels: int = 0
    """How many of the inputs, the last ones, come from a skip; see `convolve_skip`."""
    activation: Callable[[Array], Array] = partial(nn.leaky_relu, negative_slope=0.2)
    norm: bool = True

    def setup(self) -> None:
        size = 3 if self.kind == "same" else 4
        self.kernel = self.param("kernel", small_normal, (size, size, self.inputs, self.outputs))
        self.bias = self.param("bias", zeros, (self.outputs,))
        self.normalise = BatchNorm(self.outputs) if self.norm else None

    def __call__(self, x: Array, training: Training | None, skip: Array | None = None) -> Array:
        """Return the output [B, T, H', W', outputs].

        Args:
            x: [B, T, H, W, inputs - skip_channels].
            training: see `BatchNorm`.
            skip: of `convolve_skip`, [B, T or 1, H', W', outputs].
        """
        x = convolve(self.kind, x, self.kernel[:, :, : self.inputs - self.skip_channels]) + self.bias
        x = x if skip is None else x + skip
        return self.activation(x if self.normalise is None else self.normalise(x, training))

    def convolve_skip(self, x: Array) -> Array:
        """Return what a skip [B, T, H, W, skip_channels] adds to the convolution, [B, T, H', W', outputs].

        It is separate, so that a skip that many frames share is convolved once.
        """
        return convolve(self.kind, x, self.kernel[:, :, self.inputs - self.skip_channels :])


class DCGANEncoder(nn.Module):
    """The encoder for digits: five convolutions."""

    config: Config

    @nn.compact
    def __call__(self, video: Array, training: Training | None) -> tuple[Array, Maps]:
        """Return features [B, T, G] and feature maps of 32, 16, 8 and 4 pixels for a video [B, T, 64, 64, C]."""
        c, x = self.config, video
        maps = []
        for stage in STAGES:
            x = Block(x.shape[-1], c.filters * stage, "down")(x, training)
            maps.append(x)
        x = Block(x.shape[-1], c.svg_features, "to_one", activation=jnp.tanh)(x, training)
        return x[:, :, 0, 0], tuple(maps)


class DCGANDecoder(nn.Module):
    """The decoder for digits: five transposed convolutions, the last four with a skip."""

    config: Config

    def setup(self) -> None:
        c, (*wider, deepest) = self.config, [self.config.filters * stage for stage in STAGES]
        self.first = Block(c.svg_features, deepest, "from_one")
        blocks, inputs = [], deepest
        for outputs in reversed(wider):
            blocks.append(Block(2 * inputs, outputs, "up", skip_channels=inputs))
            inputs = outputs
        last = Block(2 * inputs, c.channels, "up", skip_channels=inputs, activation=nn.sigmoid, norm=False)
        self.blocks = [*blocks, last]

    def convolve_skips(self, maps: Maps) -> Maps:
        """Return what the feature maps add to the decoder's convolutions, from the smallest to the largest."""
        return tuple(block.convolve_skip(x) for block, x in zip(self.blocks, reversed(maps), strict=True))

    def __call__(self, features: Array, skips: Maps, training: Training | None) -> Array:
        """Return frames [B, T, 64, 64, C] for features [B, T, G] and skips of `convolve_skips`, [B, T or 1, ...]."""
        x = self.first(features[:, :, None, None], training)
        for block, skip in zip(self.blocks, skips, strict=True):
            x = block(x, training, skip)
        return x


class VGGEncoder(nn.Module):
    """The encoder for natural videos: stages of 2, 2, 3 and 3 convolutions, with max pooling after each."""

    config: Config

    @nn.compact
    def __call__(self, video: Array, training: Training | None) -> tuple[Array, Maps]:
        """Return features [B, T, G] and feature maps of 64, 32, 16 and 8 pixels for a video [B, T, 64, 64, C]."""
        c, x = self.config, video
        maps = []
        for stage, count in zip(STAGES, (2, 2, 3, 3), strict=True):
            for _ in range(count):
                x = Block(x.shape[-1], c.filters * stage, "same")(x, training)
            maps.append(x)
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = Block(x.shape[-1], c.svg_features, "to_one", activation=jnp.tanh)(x, training)
        return x[:, :, 0, 0], tuple(maps)


class VGGDecoder(nn.Module):
    """The decoder for natural videos: stages of 3, 3, 2 and 2 convolutions, with each pixel repeated before each."""

    config: Config

    def setup(self) -> None:
        c, widths = self.config, [self.config.filters * stage for stage in STAGES]
        self.first = Block(c.svg_features, widths[-1], "from_one")
        stages = []
        for level, count in (3, 3), (2, 3), (1, 2):
            width, outputs = widths[level], widths[level - 1]
            head = Block(2 * width, width, "same", skip_channels=width)
            stages.append(
                [head, *(Block(width, width, "same") for _ in range(count - 2)), Block(width, outputs, "same")]
            )
        head = Block(2 * widths[0], widths[0], "same", skip_channels=widths[0])
        last = Block(widths[0], c.channels, "same", activation=nn.sigmoid, norm=False)
        self.stages = [*stages, [head, last]]

    def convolve_skips(self, maps: Maps) -> Maps:
        """Return what the feature maps add to the decoder's convolutions, from the smallest to the largest."""
        return tuple(stage[0].convolve_skip(x) for stage, x in zip(self.stages, reversed(maps), strict=True))

    def __call__(self, features: Array, skips: Maps, training: Training | None) -> Array:
        """Return frames [B, T, 64, 64, C] for features [B, T, G] and skips of `convolve_skips`, [B, T or 1, ...]."""
        x = self.first(features[:, :, None, None], training)
        for (head, *rest), skip in zip(self.stages, skips, strict=True):
            x = head(x.repeat(2, axis=2).repeat(2, axis=3), training, skip)
            for block in rest:
                x = block(x, training)
        return x


# ---------------------------------------------------------------------------------------------- the model


@flax.struct.dataclass
class State:
    """The state of the model between two calls of `observe` and `imagine`."""

    posterior: LSTMState
    prior: LSTMState
    predictor: tuple[LSTMState, ...]
    features: Array  # [B, G], of the last frame
    maps: Maps  # [B, 1, H, W, C], the skips of the next frame
    skip_frames: int = flax.struct.field(pytree_node=False, default=0)
    """How many frames so far have feature maps that serve as skips, at most max(open_loop_ctx - 1, 1)."""


class Rollout(NamedTuple):
    """As `cwvae.LevelRollout`, with a latent for each predicted frame, so none for a video's first frame."""

    prior: Gaussian  # [B, T, S]
    posterior: Gaussian  # [B, T, S]; in imagined frames it equals the prior
    stoch: Array  # [B, T, S]
    deter: Array  # [B, T, G], g_t
    frames: Array  # [B, T, H, W, C], including the given first frame of a video


class SVG(Model):
    """SVG-LP."""

    def setup(self) -> None:
        c = self.config
        encoder, decoder = {"dcgan": (DCGANEncoder, DCGANDecoder), "vgg": (VGGEncoder, VGGDecoder)}[c.svg_network]
        self.encoder, self.decoder = encoder(c), decoder(c)
        self.posterior, self.prior, self.predictor = GaussianLSTM(c), GaussianLSTM(c), Predictor(c)

    @property
    def min_frames(self) -> int:
        """Two: the first frame, which is given, and a predicted one."""
        return 2

    def draw(self, keys: Array, frames: int, context: int = 0, actions: Array | None = None) -> Array:
        """Return standard normal noise [B, T, S], from one key per sequence [B]."""
        return jax.vmap(lambda key: jax.random.normal(key, (frames, self.config.cell_stoch_size)))(keys)

    def time_slice(self, inputs: Array, start: int, stop: int) -> Array:
        """Return the noise of frames `start` to `stop` (exclusive), with zeros after its end."""
        return padded_slice(inputs, start, stop - start, 1)

    def optimizer(self) -> optax.GradientTransformation:
        """Return Adam with PyTorch's defaults."""
        return optax.adam(self.config.lr)

    def observe(
        self,
        video: Array,
        inputs: Array,
        state: State | None = None,
        use_obs: str | None = None,
        training: Training | None = None,
    ) -> tuple[tuple[Rollout], State]:
        """Predict each frame from the frames before it and a latent of its posterior, which sees the frame itself.

        Args:
            video: [B, T, H, W, C], uint8 or floats in [0, 1].
            inputs: noise [B, T, S].
            state: that an earlier call returned; None: at the beginning of a video, whose first frame is then given.
            use_obs: must be None; there are no levels to choose from.
            training: of a training step; see `BatchNorm`.
        """
        assert use_obs is None, use_obs
        T = video.shape[1]
        first = int(state is None)
        video = floats(video)
        features, maps = self.encoder(video, training)
        state = self.initial_state(features, maps) if state is None else state
        previous = jnp.concatenate([state.features[:, None], features[:, :-1]], 1)[:, first:]

        prior, prior_state = self.prior(previous, state.prior)
        posterior, posterior_state = self.posterior(features[:, first:], state.posterior)
        stoch = posterior.mean + posterior.stddev * inputs[:, first:]
        deter, predictor_states = self.predictor(previous, stoch, state.predictor)

        # The skips of frame t are the maps of frame t - 1, and after the context those of the last context frame.
        new_skips = min(max(self.config.open_loop_ctx - 1, 1) - state.skip_frames, T)
        maps = tuple(jnp.concatenate([old, new[:, :new_skips]], 1) for old, new in zip(state.maps, maps, strict=True))
        skips = self.decoder.convolve_skips(tuple(x[:, first:T] for x in maps))
        repeats = T - first - skips[0].shape[1]
        skips = tuple(jnp.concatenate([x, jnp.repeat(x[:, -1:], repeats, 1)], 1) for x in skips)
        frames = self.decoder(deter, skips, training)

        frames = jnp.concatenate([video[:, :first], frames], 1)
        last = State(
            posterior_state,
            prior_state,
            predictor_states,
            features[:, -1],
            tuple(x[:, -1:] for x in maps),
            state.skip_frames + new_skips,
        )
        return (Rollout(prior, posterior, stoch, deter, frames),), last

    def imagine(self, inputs: Array, state: State) -> tuple[tuple[Rollout], State]:
        """Predict as many frames as there is noise for, [B, T, S], with latents from the prior.

        Each predicted frame is encoded to predict the next one.
        """
        skips = self.decoder.convolve_skips(state.maps)

        def tick(self: SVG, carry: tuple, noise: Array) -> tuple[tuple, Rollout]:
            features, prior_state, predictor_states = carry
            prior, prior_state = self.prior(features, prior_state)
            stoch = prior.mean + prior.stddev * noise
            deter, predictor_states = self.predictor(features, stoch, predictor_states)
            frames = self.decoder(deter, skips, None)
            features, _ = self.encoder(frames, None)
            return (features, prior_state, predictor_states), Rollout(prior, prior, stoch, deter, frames)

        scan = nn.scan(tick, variable_broadcast=("params", "batch_stats"), split_rngs={})
        carry = state.features[:, None], state.prior, state.predictor
        carry, rollout = scan(self, carry, inputs.swapaxes(0, 1)[:, :, None])
        features, prior, predictor = carry
        state = dataclasses.replace(state, features=features[:, 0], prior=prior, predictor=predictor)
        return (jax.tree.map(lambda x: x[:, :, 0].swapaxes(0, 1), rollout),), state

    def initial_state(self, features: Array, maps: Maps) -> State:
        """Return the state before a video's first frame: zeros, with the shapes of its features and feature maps."""
        zeros = jnp.zeros((len(features), self.config.svg_rnn_size), features.dtype)
        lstm = LSTMState(zeros, zeros)
        zero_maps = tuple(jnp.zeros_like(x[:, :1]) for x in maps)
        return State(lstm, lstm, (lstm, lstm), jnp.zeros_like(features[:, 0]), zero_maps)

    def decode(self, rollouts: Sequence[Rollout]) -> Array:
        """Return the frames [B, T, H, W, C], in [0, 1]."""
        return rollouts[0].frames

    def elbo(
        self, video: Array, inputs: Array, state: State | None = None, training: Training | None = None
    ) -> tuple[Terms, State]:
        """Return the terms of the evidence lower bound, and the state after the last frame.

        A video's first frame has no terms. Arguments are as in `observe`.
        """
        first = int(state is None)
        rollouts, state = self.observe(video, inputs, state, training=training)
        (rollout,) = rollouts
        nll = negative_log_likelihood(floats(video)[:, first:], rollout.frames[:, first:], self.config.dec_stddev)
        kl = kl_divergence(rollout.posterior, rollout.prior).sum(1)[None]
        entropies = (entropy(rollout.prior).sum(1)[None], entropy(rollout.posterior).sum(1)[None])
        return Terms(nll, kl, kl, kl, *entropies), state

"""VTA, variational temporal abstraction (Kim, Ahn, Bengio 2019, https://arxiv.org/abs/1910.00775), in Flax.

The model has two levels. The upper one ticks only when the model decides that a new segment begins:

    x_t    video        frames, uint8 or floats in [0, 1]; in [-1, 1] within the model    [B, T, H, W, C]
    m_t    read         1 if a segment begins with the frame (read), else 0 (copy)        [B, T, 1]
    e_t    features     of a frame                                                        [B, T, F]
    c, z   abstract     deter and stoch of a segment, level 1                             [B, T, D], [B, T, S]
    h, s   observation  deter and stoch of a frame, level 0                               [B, T, D], [B, T, S]

F = filters, the width of all convolutions; D = cell_deter_size; S = cell_stoch_size. While a segment continues, c and z
are copied:

    c_t = m_t GRU(z_{t-1}, c_{t-1}) + (1 - m_t) c_{t-1}           z_t = m_t sample + (1 - m_t) z_{t-1}
    a_t = Dense([c_t, z_t])                                       the abstract feature
    h_t = m_t a_t + (1 - m_t) GRU([s_{t-1}, a_t], h_{t-1})        s_t = sample
    o_t = Dense([h_t, s_t])                                       the observation feature
    x_t ~ N(decoder(o_t), dec_stddev)                             m_{t+1} ~ p = softmax(Dense(o_t))

The posteriors of z and s see encodings of the frames. The posterior of m is a stack of convolutions over time.

The first `vta_init_size` frames of a sequence are only encoded: their forward encoding is the first c. The last
`vta_init_size` frames are only looked ahead at. All other frames are modelled: such a frame t has terms in the bound,
for x_t, z_t, s_t and m_{t+1}. The bound is still divided by the number of all frames. `observe` returns states of all
frames; it treats each of the first frames as if it were the first modelled one.

A long video is computed in chunks of time. Backward encodings and boundaries look ahead to the end of their chunk, as
in training, whose sequences are as long as a chunk. The last `vta_init_size` frames of each chunk are not modelled. A
chunk that continues a video begins a segment with its first frame and models this frame. The result is still a lower
bound: on the density of the modelled frames, given the other ones.

Choices that the authors' code (https://github.com/taesupkim/vta) leaves open, and differences from it:

- Frames have 64x64 pixels instead of 32x32, so encoder and decoder have one more convolution. The authors add noise to
  frames of 5 bits; here, frames are used as they are. In both codes, the density is that of frames in [-1, 1], and
  `dec_stddev` refers to it.
- Convolutions before a batch normalisation have no bias. Weights are initialised as in the Clockwork VAE.
- The largest number of segments is a quarter of the frames, as there (5 of 20).
- Batch statistics are over all devices; those of the decoder are of the modelled frames.
- AMSGrad is Optax's, which takes the maximum after the bias correction; PyTorch takes it before.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import Array

from baselines.layers import BatchNorm, convolve
from config import Config
from cwvae import (
    GRU,
    Gaussian,
    LevelRollout,
    LevelState,
    entropy,
    floats,
    kl_divergence,
    negative_log_likelihood,
)
from fast.initial import lecun_normal, ones, zeros
from fast.layers import Dense
from fast.scan import unroll
from sequences.interface import Model, Terms, Training
from sequences.noise import padded_slice

# ---------------------------------------------------------------------------------------------- layers


class FrameConvolution(nn.Module):
    """A convolution with kernel size 4, for each frame: of stride 2 with padding 1, or between 4x4 pixels and one.

    Batch normalisation and ELU follow; in the last one, tanh.
    """

    inputs: int
    outputs: int
    transposed: bool = False
    last: bool = False

    @nn.compact
    def __call__(self, x: Array, training: Training | None) -> Array:
        """Return [B, T, H / 2, W / 2, outputs] for x [B, T, H, W, inputs]; transposed, [B, T, 2 H, 2 W, outputs].

        4x4 pixels become one; transposed, one becomes 4x4.
        """
        H = x.shape[2]
        kernel = self.param("kernel", lecun_normal, (4, 4, self.inputs, self.outputs))
        kind = ("from_one" if H == 1 else "up") if self.transposed else ("to_one" if H == 4 else "down")
        x = convolve(kind, x, kernel)
        if self.last:
            return jnp.tanh(x + self.param("bias", zeros, (self.outputs,)))
        return nn.elu(BatchNorm(self.outputs, scale_stddev=0.0, name="norm")(x, training))


class Encoder(nn.Module):
    """Five convolutions: 64 -> 32 -> 16 -> 8 -> 4 -> 1."""

    config: Config

    @nn.compact
    def __call__(self, video: Array, training: Training | None) -> Array:
        """Return features [B, T, F] for frames [B, T, 64, 64, C] in [-1, 1]."""
        x, F = video, self.config.filters
        for i in range(5):
            x = FrameConvolution(x.shape[-1], F, name=f"conv_{i}")(x, training)
        return x[:, :, 0, 0]


class Decoder(nn.Module):
    """Five transposed convolutions: 1 -> 4 -> 8 -> 16 -> 32 -> 64."""

    config: Config

    @nn.compact
    def __call__(self, feature: Array, training: Training | None) -> Array:
        """Return the means of frames [B, T, 64, 64, C], in [-1, 1], for observation features [B, T, D]."""
        c, x = self.config, feature[:, :, None, None]
        for i in range(5):
            last = i == 4
            layer = FrameConvolution(x.shape[-1], c.channels if last else c.filters, True, last, name=f"conv_{i}")
            x = layer(x, training)
        return x


class TimeConvolution(nn.Module):
    """A convolution over time with kernel size 3 and padding 1.

    Batch normalisation and ELU follow; in the last one, nothing.
    """

    inputs: int
    outputs: int
    last: bool = False

    @nn.compact
    def __call__(self, x: Array, training: Training | None) -> Array:
        """Return the output [B, T, outputs] for x [B, T, inputs]."""
        T = x.shape[1]
        kernel = self.param("kernel", lecun_normal, (3, self.inputs, self.outputs))
        x = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))
        x = jnp.concatenate([x[:, i : i + T] for i in range(3)], -1) @ kernel.reshape(-1, self.outputs)
        if self.last:
            return x + self.param("bias", zeros, (self.outputs,))
        return nn.elu(BatchNorm(self.outputs, scale_stddev=0.0, name="norm")(x, training))


class BoundaryDetector(nn.Module):
    """The posterior of the boundaries."""

    config: Config

    @nn.compact
    def __call__(self, features: Array, training: Training | None) -> Array:
        """Return the logits of read and copy [B, T, 2] for features [B, T, F]."""
        x, F = features, self.config.filters
        for i in range(self.config.vta_detector_layers):
            x = TimeConvolution(F, F, name=f"conv_{i}")(x, training)
        return TimeConvolution(F, 2, last=True, name="logits")(x, training)


class Stats(nn.Module):
    """A Gaussian: mean = Dense(x), stddev = sigmoid(Dense(x))."""

    inputs: int
    outputs: int

    def setup(self) -> None:
        self.mean, self.stddev = Dense(self.inputs, self.outputs), Dense(self.inputs, self.outputs)

    def __call__(self, x: Array) -> Gaussian:
        return Gaussian(self.mean(x), nn.sigmoid(self.stddev(x)))


class FrameGRU(GRU):
    """A GRU over the features of frames. Its state is an encoding of the frames so far, or of those to come."""

    def tick(self, state: Array, features: Array, keep: Array) -> tuple[Array, tuple]:
        """Return the state after a frame [B, D] for its features [B, F]. `keep` [B, 1] multiplies the state before."""
        return self(features, keep * state), ()


# ---------------------------------------------------------------------------------------------- transition


class TransitionState(NamedTuple):
    """The state of both levels after a frame."""

    abstract: LevelState  # [B, S], [B, D]
    observation: LevelState  # [B, S], [B, D]
    boundary: Array  # [B, 1], probability that a segment begins with the next frame; 1 after observed frames


class Observed(NamedTuple):
    """What the posteriors infer from the frames: about one frame, [B, ...], or all, [B, T, ...]."""

    read: Array  # [..., 1], with a straight-through gradient in training
    boundary: Array  # [..., 1], probability that a segment begins with the frame
    abstract: Gaussian  # [..., S], the abstract posterior; read frames take a sample of it
    encoding: Array  # [..., D], of the segment's frames so far


class Distributions(NamedTuple):
    """The distributions of one frame, [B, ...], or all, [B, T, ...]."""

    abstract_prior: Gaussian  # [..., S]
    abstract_posterior: Gaussian  # [..., S]; the prior in imagined frames
    observation_prior: Gaussian  # [..., S]
    observation_posterior: Gaussian  # [..., S]; the prior in imagined frames
    boundary: Array  # [..., 1], probability that a segment begins with the frame
    next_logits: Array  # [..., 2], prior logits of read and copy in the next frame


class Transition(nn.Module):
    """The transition of both levels from frame to frame."""

    config: Config

    def setup(self) -> None:
        S, D = self.config.cell_stoch_size, self.config.cell_deter_size
        self.abstract_update = GRU(S, D)
        self.abstract_prior = Stats(D, S)
        self.abstract_feature = Dense(D + S, D)
        self.observation_update = GRU(S + D, D)
        self.observation_prior = Stats(D, S)
        self.observation_posterior = Stats(D + D, S)
        self.feature = Dense(D + S, D)
        self.boundary = Dense(D, 2)

    def tick(
        self,
        state: TransitionState,
        first: Array,
        encoding_before: Array,
        noise: tuple[Array, Array],
        observed: Observed | None,
    ) -> tuple[TransitionState, Distributions]:
        """Return the state after a frame, and the frame's distributions.

        Args:
            state: before the frame.
            first: [B, 1], 1 if c starts with this frame, from the encoding of the frames before.
            encoding_before: this encoding, [B, D].
            noise: for z and for s, [B, S] each.
            observed: what is inferred from the frame; None: the frame is imagined.
        """
        abstract, observation, boundary = state
        read = (boundary >= 0.5).astype(boundary.dtype) if observed is None else observed.read
        copy = 1 - read

        updated = self.abstract_update(abstract.stoch, abstract.deter)
        deter = jnp.where(first > 0, encoding_before, read * updated + copy * abstract.deter)
        abstract_prior = self.abstract_prior(deter)
        abstract_posterior = abstract_prior if observed is None else observed.abstract
        stoch = read * sample(abstract_posterior, noise[0]) + copy * abstract.stoch
        feature = self.abstract_feature(jnp.concatenate([deter, stoch], -1))
        abstract = LevelState(stoch, deter)

        updated = self.observation_update(jnp.concatenate([observation.stoch, feature], -1), observation.deter)
        deter = read * feature + copy * updated
        prior = posterior = self.observation_prior(deter)
        if observed is not None:
            posterior = self.observation_posterior(jnp.concatenate([observed.encoding, feature], -1))
        observation = LevelState(sample(posterior, noise[1]), deter)

        logits = self.boundary(self.observation_feature(observation))
        next_boundary = jnp.ones_like(boundary) if observed is not None else nn.softmax(logits)[..., :1]
        boundary = boundary if observed is None else observed.boundary
        distributions = Distributions(abstract_prior, abstract_posterior, prior, posterior, boundary, logits)
        return TransitionState(abstract, observation, next_boundary), distributions

    def observation_feature(self, observation: LevelState) -> Array:
        """Return the observation feature, which is decoded, [..., D]."""
        return self.feature(jnp.concatenate([observation.deter, observation.stoch], -1))


def sample(distribution: Gaussian, noise: Array) -> Array:
    return distribution.mean + distribution.stddev * noise


# ---------------------------------------------------------------------------------------------- boundaries


def boundary_temperature(step: Array) -> Array:
    """Return the temperature of the boundaries' relaxed distribution in a training step. It falls from 1 to 0.1."""
    return (1.0 - 0.1) * 0.999 ** (step / 100) + 0.1


def straight_through(log_sample: Array) -> Array:
    """Return a relaxed sample [..., 2] rounded to one-hot. The gradient is that of the relaxed sample."""
    relaxed = jnp.exp(log_sample)
    hard = jax.nn.one_hot(jnp.argmax(log_sample, -1), 2, dtype=relaxed.dtype)
    return hard + (relaxed - jax.lax.stop_gradient(relaxed))


def log_density(logits: Array, log_sample: Array, temperature: Array) -> Array:
    """Return the log density [...] of the concrete distribution of logits [..., 2] at a sample, up to a constant."""
    x = logits - temperature * log_sample
    return x.sum(-1) - 2 * nn.logsumexp(x, -1)


def limit_segments(logits: Array, read: Array, max_segments: int, max_length: int) -> Array:
    """Return prior logits that allow at most `max_segments` segments, each of at most `max_length` frames.

    If the two limits conflict, `max_length` applies.

    Args:
        logits: of a boundary at the frame after each frame, [B, T, 2].
        read: [B, T, 1], 1 for a frame that begins a segment. The first frame does.
    """
    m = math.log(0.999 / 0.001)
    begins = jax.lax.stop_gradient(read) > 0.5
    time = jnp.arange(read.shape[1])[:, None]
    length = time + 1 - jax.lax.cummax(jnp.where(begins, time, 0), axis=1)
    logits = jnp.where(begins.cumsum(1) >= max_segments, jnp.array([-m, m], logits.dtype), logits)
    return jnp.where(length >= max_length, jnp.array([m, -m], logits.dtype), logits)


# ---------------------------------------------------------------------------------------------- the model


class Inputs(NamedTuple):
    """The noise of each frame."""

    abstract: Array  # [B, T, S], standard normal
    observation: Array  # [B, T, S], standard normal
    gumbel: Array  # [B, T, 2], standard Gumbel; used only in training


class State(NamedTuple):
    """The state of the model between two calls of `observe` and `imagine`."""

    transition: TransitionState
    forward: Array  # [B, D], encoding of all observed frames; imagined frames don't change it
    first: Array  # [B, 1], 1 if the next imagined frame is the first one


class AbstractRollout(NamedTuple):
    """As `cwvae.LevelRollout`, over frames. In frames that don't begin a segment, the posterior equals the prior."""

    prior: Gaussian  # [B, T, S]
    posterior: Gaussian  # [B, T, S]
    stoch: Array  # [B, T, S]
    deter: Array  # [B, T, D]
    boundary: Array  # [B, T], probability that a segment begins with the frame; it does if this is at least 1/2


class Inference(NamedTuple):
    """The states and boundaries that the posteriors infer, [B, T, ...]."""

    states: TransitionState
    distributions: Distributions
    read: Array  # [B, T, 1]
    logits: Array  # [B, T, 2], of the boundaries' posterior
    log_sample: Array  # [B, T, 2], of the boundaries
    temperature: Array  # []


class VTA(Model):
    """Variational temporal abstraction."""

    def setup(self) -> None:
        c = self.config
        F, S, D = c.filters, c.cell_stoch_size, c.cell_deter_size
        self.encoder, self.decoder, self.detector = Encoder(c), Decoder(c), BoundaryDetector(c)
        self.abstract_forward, self.abstract_backward, self.observation_forward = (FrameGRU(F, D) for _ in range(3))
        self.abstract_posterior = Stats(D + D, S)
        self.transition = Transition(c)
        self.last_temperature = self.variable("schedule", "temperature", ones, None, ())

    @property
    def min_frames(self) -> int:
        """The number of frames with one modelled frame, and those before and after it."""
        return 2 * self.config.vta_init_size + 1

    def draw(self, keys: Array, frames: int, context: int = 0, actions: Array | None = None) -> Inputs:
        """Return the noise of `frames` frames, from one PRNG key per sequence [B]."""
        S = self.config.cell_stoch_size

        def draw_sequence(key: Array) -> Inputs:
            state_key, boundary_key = jax.random.split(key)
            abstract, observation = jnp.split(jax.random.normal(state_key, (frames, 2 * S)), 2, -1)
            return Inputs(abstract, observation, jax.random.gumbel(boundary_key, (frames, 2)))

        return jax.vmap(draw_sequence)(keys)

    def time_slice(self, inputs: Inputs, start: int, stop: int) -> Inputs:
        """Return the noise of frames `start` to `stop` (exclusive), with zeros after its end."""
        return Inputs(*(padded_slice(x, start, stop - start, 1) for x in inputs))

    def optimizer(self) -> optax.GradientTransformation:
        """Return AMSGrad with PyTorch's defaults."""
        return optax.amsgrad(self.config.lr)

    def observe(
        self, video: Array, inputs: Inputs, state: State | None = None, use_obs: str | None = None
    ) -> tuple[tuple[LevelRollout, AbstractRollout], State]:
        """Infer the states from frames. Each state may depend on all frames of this call.

        Args:
            video: [B, T, H, W, C], uint8 or floats in [0, 1].
            inputs: of `draw` for T frames.
            state: that an earlier call returned; None: at the beginning of a video.
            use_obs: must be None; all levels see the frames.
        """
        assert use_obs is None, use_obs
        inference, state = self.infer(video, inputs, state, None)
        return make_rollouts(inference.states, inference.distributions), state

    def imagine(self, inputs: Inputs, state: State) -> tuple[tuple[LevelRollout, AbstractRollout], State]:
        """Predict the states of as many frames as `inputs` are for, with the priors only; otherwise as `observe`.

        The first frame begins a segment, whose c is the encoding of all observed frames. A later frame begins one if
        its prior probability is at least 1/2, without limits on number and length.
        """
        T = inputs.abstract.shape[1]
        first = jnp.pad(state.first[:, None], ((0, 0), (0, T - 1), (0, 0)))
        encoding = jnp.broadcast_to(state.forward[:, None], (*first.shape[:2], state.forward.shape[-1]))
        tick_inputs = first, encoding, (inputs.abstract, inputs.observation), None
        states, distributions = unroll(self.transition, state.transition, tick_inputs)
        state = State(last_state(states), state.forward, jnp.zeros_like(state.first))
        return make_rollouts(states, distributions), state

    def decode(self, rollouts: tuple[LevelRollout, AbstractRollout]) -> Array:
        """Return the means of the frames [B, T, H, W, C], in [0, 1]."""
        observation = LevelState(rollouts[0].stoch, rollouts[0].deter)
        return (self.decoder(self.transition.observation_feature(observation), None) + 1) / 2

    def elbo(
        self, video: Array, inputs: Inputs, state: State | None = None, training: Training | None = None
    ) -> tuple[Terms, State]:
        """Return the terms of the evidence lower bound, and the state after the last frame.

        In training, boundaries have Gumbel noise, and their prior is overruled if segments are too many or too long.
        Arguments are otherwise as in `observe`.

        Returns:
            Terms of level 0 (the observations) and of level 1 (the segments), which counts frames that begin a segment.
            In `other`: boundary, the KL of the boundaries' relaxed distributions, estimated from the sample.
        """
        c, (B, T) = self.config, video.shape[:2]
        start = c.vta_init_size if state is None else 0
        stop = T - c.vta_init_size
        inference, state = self.infer(video, inputs, state, training)
        if stop <= start:
            zero = jnp.zeros((2, B))
            return Terms(zero[0], zero, zero, zero, zero, zero, {"boundary": zero[0]}), state

        modelled, states = jax.tree.map(lambda x: x[:, start:stop], (inference.distributions, inference.states))
        read = inference.read[:, start:stop]
        mean = self.decoder(self.transition.observation_feature(states.observation), training)
        nll = negative_log_likelihood(2 * floats(video)[:, start:stop] - 1, mean, c.dec_stddev)

        def per_level(observation: Array, abstract: Array) -> Array:
            """Return the sums over time, [2, B]; those of the abstract level are over frames that begin a segment.

            The boundaries get no gradient from this: fewer segments would be an easy way to a smaller KL.
            """
            begins = jax.lax.stop_gradient(read[..., 0])
            return jnp.stack([observation.sum(1), (begins * abstract).sum(1)])

        kl = per_level(
            kl_divergence(modelled.observation_posterior, modelled.observation_prior),
            kl_divergence(modelled.abstract_posterior, modelled.abstract_prior),
        )
        prior = per_level(entropy(modelled.observation_prior), entropy(modelled.abstract_prior))
        posterior = per_level(entropy(modelled.observation_posterior), entropy(modelled.abstract_posterior))

        logits = modelled.next_logits
        if training is not None:
            logits = limit_segments(logits, read, c.vta_max_segments or max(1, c.seq_len // 4), c.vta_max_length)
        posterior_logits, log_sample = (x[:, start + 1 : stop + 1] for x in (inference.logits, inference.log_sample))
        log_q, log_p = (log_density(x, log_sample, inference.temperature) for x in (posterior_logits, logits))
        return Terms(nll, kl, kl, kl, prior, posterior, {"boundary": (log_q - log_p).sum(1)}), state

    def infer(
        self, video: Array, inputs: Inputs, state: State | None, training: Training | None
    ) -> tuple[Inference, State]:
        """Infer boundaries and states; arguments as in `elbo`."""
        c, (B, T) = self.config, video.shape[:2]
        features = self.encoder(2 * floats(video) - 1, training)
        if training is not None:
            self.last_temperature.value = boundary_temperature(training.step).astype(features.dtype)
        temperature = self.last_temperature.value

        # The boundaries.
        logits = self.detector(features, training)
        noisy = logits if training is None else logits + inputs.gumbel
        log_sample = nn.log_softmax(noisy / temperature)
        time = jnp.arange(T)[:, None]
        start = c.vta_init_size if state is None else 0
        always_read = (time <= start) | (time >= T - c.vta_init_size)
        read = jnp.where(always_read, 1, straight_through(log_sample)[..., :1])
        copy = 1 - read

        # The encodings that the posteriors of the states see.
        zeros = jnp.zeros((B, c.cell_deter_size), features.dtype)
        initial_forward = zeros if state is None else state.forward
        forward, _ = unroll(self.abstract_forward, initial_forward, (features, jnp.ones_like(copy)))
        next_copy = jnp.concatenate([copy[:, 1:], jnp.zeros_like(copy[:, :1])], 1)
        backward, _ = unroll(self.abstract_backward, zeros, (features[:, ::-1], next_copy[:, ::-1]))
        encoding, _ = unroll(self.observation_forward, zeros, (features, copy))
        encoding_before = jnp.concatenate([initial_forward[:, None], forward[:, :-1]], 1)
        observed = Observed(
            read,
            jnp.where(always_read, 1, nn.softmax(logits)[..., :1]),
            self.abstract_posterior(jnp.concatenate([encoding_before, backward[:, ::-1]], -1)),
            encoding,
        )

        first = jnp.broadcast_to((time <= start) & (state is None), read.shape).astype(read.dtype)
        transition_state = self.initial_state(B, features.dtype) if state is None else state.transition
        noise = inputs.abstract, inputs.observation
        states, distributions = unroll(self.transition, transition_state, (first, encoding_before, noise, observed))
        state = State(last_state(states), forward[:, -1], jnp.ones((B, 1), features.dtype))
        return Inference(states, distributions, read, logits, log_sample, temperature), state

    def initial_state(self, batch: int, dtype: jnp.dtype) -> TransitionState:
        """Return the state before the first frame: zeros at both levels, and a segment begins."""
        S, D = self.config.cell_stoch_size, self.config.cell_deter_size
        zeros = LevelState(jnp.zeros((batch, S), dtype), jnp.zeros((batch, D), dtype))
        return TransitionState(zeros, zeros, jnp.ones((batch, 1), dtype))


def last_state(states: TransitionState) -> TransitionState:
    return jax.tree.map(lambda x: x[:, -1], states)


def make_rollouts(states: TransitionState, distributions: Distributions) -> tuple[LevelRollout, AbstractRollout]:
    """Return the rollouts of the observation level and of the abstract level."""
    d = distributions
    observation = LevelRollout(d.observation_prior, d.observation_posterior, *states.observation)
    posterior = jax.tree.map(lambda q, p: jnp.where(d.boundary >= 0.5, q, p), d.abstract_posterior, d.abstract_prior)
    return observation, AbstractRollout(d.abstract_prior, posterior, *states.abstract, d.boundary[..., 0])

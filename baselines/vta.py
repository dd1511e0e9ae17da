"""VTA, variational temporal abstraction (Kim, Ahn, Bengio 2019, https://arxiv.org/abs/1910.00775), in Flax.

Two levels, as in CW-VAE, but the upper one ticks where the model decides that a new segment begins:

    x_t    video       frames, uint8 or floats in [0, 1]; inside in [-1, 1]      [B, T, H, W, C]
    m_t    read        1 where a segment begins ("read"), 0 where it goes on ("copy")   [B, T, 1]
    e_t    features    of a frame                                                [B, T, F]
    c, z   abstract    belief (deter) and state (stoch) of a segment, level 1    [B, T, D], [B, T, S]
    h, s   observation belief (deter) and state (stoch) of a frame, level 0      [B, T, D], [B, T, S]

F = `filters`, the width of all convolutions, D = `cell_deter_size`, S = `cell_stoch_size`. Where a segment goes on, the
abstract belief and state are copied:

    c_t = m_t GRU(z_{t-1}, c_{t-1}) + (1 - m_t) c_{t-1}           z_t = m_t sample + (1 - m_t) z_{t-1}
    a_t = Dense([c_t, z_t])                                       the abstract feature
    h_t = m_t a_t + (1 - m_t) GRU([s_{t-1}, a_t], h_{t-1})        s_t = sample
    o_t = Dense([h_t, s_t])                                       decoded; Dense(o_t): the prior logits of m_{t+1}

The posteriors of z and s see encodings of the frames, that of m convolutions over time.

The first `vta_init_size` frames of a sequence are only encoded; the first c is the forward encoding of these. The last
`vta_init_size` are there to be looked ahead at. Neither has terms in the bound, which is still divided by the number of
all frames; the boundary's terms are of the frames after those that are modelled. The rollouts of `observe` have all
frames: each of the first is treated as if a sequence began with it.

A long video comes in chunks of time. Backward encodings and boundaries look ahead to the end of their chunk, as in
training, whose sequences are as long. The last frames of each chunk are treated as said, and in chunks that continue a
video, the first frame begins a segment, and no frames are only encoded. So all that the posterior has seen is paid for,
and what comes out is still a lower bound, of the frames that have terms.

Where the authors' code (https://github.com/taesupkim/vta) leaves a choice, or is departed from:

- Its frames are of 32x32 pixels: encoder and decoder have a convolution more here. It adds noise to frames of 5 bits;
  here they are as they are. The density, and `dec_stddev` with it, is that of frames in [-1, 1], as there.
- Convolutions that batch normalisation follows have no bias. Weights are initialised as the Clockwork VAE's are.
- The largest number of segments is a quarter of the frames, as there (5 of 20).
- Statistics of a batch are over all devices; the decoder's are of the frames that have terms.
- AMSGrad is Optax's, which bounds the average after its bias correction; PyTorch's does so before.
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
from sequences.noise import cut

# ---------------------------------------------------------------------------------------------- layers


class FrameConvolution(nn.Module):
    """A convolution with a kernel of 4: of stride 2 with padding 1, or between 4x4 pixels and one.

    Batch normalisation and ELU follow, or tanh in the last one.
    """

    inputs: int
    outputs: int
    transposed: bool = False
    last: bool = False

    @nn.compact
    def __call__(self, x: Array, training: Training | None) -> Array:
        """[B, T, H, W, inputs] -> [B, T, H / 2, W / 2, outputs], or transposed [B, T, 2 H, 2 W, outputs]; 4 <-> 1."""
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
        """[B, T, 64, 64, C] in [-1, 1] -> [B, T, F]"""
        x, F = video, self.config.filters
        for i in range(5):
            x = FrameConvolution(x.shape[-1], F, name=f"conv_{i}")(x, training)
        return x[:, :, 0, 0]


class Decoder(nn.Module):
    """Five transposed convolutions: 1 -> 4 -> 8 -> 16 -> 32 -> 64."""

    config: Config

    @nn.compact
    def __call__(self, feature: Array, training: Training | None) -> Array:
        """[B, T, D] -> [B, T, 64, 64, C] in [-1, 1]"""
        c, x = self.config, feature[:, :, None, None]
        for i in range(5):
            last = i == 4
            layer = FrameConvolution(x.shape[-1], c.channels if last else c.filters, True, last, name=f"conv_{i}")
            x = layer(x, training)
        return x


class TimeConvolution(nn.Module):
    """A convolution over time, kernel 3, padding 1. Batch normalisation and ELU follow, but for the last."""

    inputs: int
    outputs: int
    last: bool = False

    @nn.compact
    def __call__(self, x: Array, training: Training | None) -> Array:
        """[B, T, inputs] -> [B, T, outputs]"""
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
        """[B, T, F] -> logits of read and copy, [B, T, 2]"""
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


class Encoding(GRU):
    """An encoding of the frames so far, or of those to come: a GRU over their features."""

    def tick(self, state: Array, features: Array, keep: Array) -> tuple[Array, tuple]:
        """[B, D], [B, F], [B, 1] -> the state after the tick, [B, D]. `keep` 0 forgets the state before."""
        return self(features, keep * state), ()


# ---------------------------------------------------------------------------------------------- transition


class Ticking(NamedTuple):
    """What the transition carries from frame to frame."""

    abstract: LevelState  # [B, S], [B, D]
    observation: LevelState  # [B, S], [B, D]
    boundary: Array  # [B, 1], probability that a segment begins with the next frame; 1 after observed ones


class Sight(NamedTuple):
    """What the posterior tells the transition about a frame, [B, ...], or about all, [B, T, ...]."""

    read: Array  # [..., 1], in training with a straight-through gradient
    boundary: Array  # [..., 1], probability of a segment's begin
    abstract: Gaussian  # [..., S], the abstract posterior, of which read frames take a sample
    encoding: Array  # [..., D], of the segment's frames so far


class Ticked(NamedTuple):
    """What the transition says of a frame, [B, ...], or of all, [B, T, ...]."""

    abstract_prior: Gaussian  # [..., S]
    abstract_posterior: Gaussian  # [..., S]; the prior in imagined frames
    observation_prior: Gaussian  # [..., S]
    observation_posterior: Gaussian  # [..., S]; the prior in imagined frames
    boundary: Array  # [..., 1], probability of a segment's begin
    next_logits: Array  # [..., 2], prior logits of read and copy in the next frame


class Transition(nn.Module):
    """Both levels' beliefs and states, from frame to frame."""

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
        self, state: Ticking, first: Array, before: Array, noise: tuple[Array, Array], sight: Sight | None
    ) -> tuple[Ticking, Ticked]:
        """Return the state after a frame, and what is said of it.

        Args:
            state: before the frame.
            first: [B, 1], 1 if the abstract belief begins here, with the encoding of the frames before.
            before: this encoding, [B, D].
            noise: of the abstract and of the observation state, [B, S] each.
            sight: of a frame that is observed; None: the frame is imagined.
        """
        abstract, observation, boundary = state
        read = (boundary >= 0.5).astype(boundary.dtype) if sight is None else sight.read
        copy = 1 - read

        updated = self.abstract_update(abstract.stoch, abstract.deter)
        belief = jnp.where(first > 0, before, read * updated + copy * abstract.deter)
        abstract_prior = self.abstract_prior(belief)
        abstract_posterior = abstract_prior if sight is None else sight.abstract
        stoch = read * sample(abstract_posterior, noise[0]) + copy * abstract.stoch
        feature = self.abstract_feature(jnp.concatenate([belief, stoch], -1))
        abstract = LevelState(stoch, belief)

        updated = self.observation_update(jnp.concatenate([observation.stoch, feature], -1), observation.deter)
        belief = read * feature + copy * updated
        prior = posterior = self.observation_prior(belief)
        if sight is not None:
            posterior = self.observation_posterior(jnp.concatenate([sight.encoding, feature], -1))
        observation = LevelState(sample(posterior, noise[1]), belief)

        logits = self.boundary(self.observation_feature(observation))
        after = jnp.ones_like(boundary) if sight is not None else nn.softmax(logits)[..., :1]
        seen = boundary if sight is None else sight.boundary
        ticked = Ticked(abstract_prior, abstract_posterior, prior, posterior, seen, logits)
        return Ticking(abstract, observation, after), ticked

    def observation_feature(self, observation: LevelState) -> Array:
        """Return what is decoded, [..., D]."""
        return self.feature(jnp.concatenate([observation.deter, observation.stoch], -1))


def sample(belief: Gaussian, noise: Array) -> Array:
    return belief.mean + belief.stddev * noise


# ---------------------------------------------------------------------------------------------- boundaries


def temperature(step: Array) -> Array:
    """Return the temperature of the boundaries' distribution in a training step: from 1 to 0.1."""
    return (1.0 - 0.1) * 0.999 ** (step / 100) + 0.1


def straight_through(log_sample: Array) -> Array:
    """Return a relaxed sample [..., 2] rounded to one class; the gradient is that of the sample itself."""
    relaxed = jnp.exp(log_sample)
    hard = jax.nn.one_hot(jnp.argmax(log_sample, -1), 2, dtype=relaxed.dtype)
    return hard + (relaxed - jax.lax.stop_gradient(relaxed))


def log_density(logits: Array, log_sample: Array, temperature: Array) -> Array:
    """Return the concrete distribution's log density at a sample, but for a constant: [..., 2], [..., 2] -> [...]."""
    x = logits - temperature * log_sample
    return x.sum(-1) - 2 * nn.logsumexp(x, -1)


def limited(logits: Array, read: Array, max_segments: int, max_length: int) -> Array:
    """Overrule the prior of each next frame: no segment more than `max_segments`, none longer than `max_length`.

    Args:
        logits: [B, T, 2].
        read: [B, T, 1] of the frames before, of which the first is a segment's.
    """
    m = math.log(0.999 / 0.001)
    begins = jax.lax.stop_gradient(read) > 0.5
    time = jnp.arange(read.shape[1])[:, None]
    length = time + 1 - jax.lax.cummax(jnp.where(begins, time, 0), axis=1)
    logits = jnp.where(begins.cumsum(1) >= max_segments, jnp.array([-m, m], logits.dtype), logits)
    return jnp.where(length >= max_length, jnp.array([m, -m], logits.dtype), logits)


# ---------------------------------------------------------------------------------------------- the model


class Inputs(NamedTuple):
    """Noise of each frame."""

    abstract: Array  # [B, T, S], standard normal
    observation: Array  # [B, T, S], standard normal
    gumbel: Array  # [B, T, 2], standard Gumbel; used in training only


class State(NamedTuple):
    """Where a video stands between two calls of `observe` and `imagine`.

    Encodings hold what was observed. Of imagined frames they know nothing.
    """

    ticking: Ticking
    forward: Array  # [B, D], encoding of all frames that were observed
    first: Array  # [B, 1], 1 if the next imagined frame is the first


class AbstractRollout(NamedTuple):
    """As cwvae.LevelRollout, over frames. In frames that don't begin a segment, the posterior is the prior."""

    prior: Gaussian  # [B, T, S]
    posterior: Gaussian  # [B, T, S]
    stoch: Array  # [B, T, S]
    deter: Array  # [B, T, D]
    boundary: Array  # [B, T], probability that a segment begins with the frame; it does where this is at least 1/2


class Followed(NamedTuple):
    """What following the posterior gives, [B, T, ...]."""

    states: Ticking
    ticked: Ticked
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
        self.abstract_forward, self.abstract_backward, self.observation_forward = (Encoding(F, D) for _ in range(3))
        self.abstract_posterior = Stats(D + D, S)
        self.transition = Transition(c)
        self.last_temperature = self.variable("schedule", "temperature", ones, None, ())

    @property
    def min_frames(self) -> int:
        """One frame that is modelled, with those before and after."""
        return 2 * self.config.vta_init_size + 1

    def draw(self, keys: Array, frames: int, context: int = 0, actions: Array | None = None) -> Inputs:
        """Draw the noise of so many frames, from one PRNG key per sequence [B]."""
        S = self.config.cell_stoch_size

        def of_sequence(key: Array) -> Inputs:
            of_states, of_boundaries = jax.random.split(key)
            abstract, observation = jnp.split(jax.random.normal(of_states, (frames, 2 * S)), 2, -1)
            return Inputs(abstract, observation, jax.random.gumbel(of_boundaries, (frames, 2)))

        return jax.vmap(of_sequence)(keys)

    def time_slice(self, inputs: Inputs, start: int, stop: int) -> Inputs:
        """Return the noise of frames `start` to `stop`; zeros behind its end."""
        return Inputs(*(cut(x, start, stop - start, 1) for x in inputs))

    def optimizer(self) -> optax.GradientTransformation:
        """Return AMSGrad with PyTorch's defaults."""
        return optax.amsgrad(self.config.lr)

    def observe(
        self, video: Array, inputs: Inputs, state: State | None = None, use_obs: str | None = None
    ) -> tuple[tuple[LevelRollout, AbstractRollout], State]:
        """Infer the states behind frames; each may depend on all frames of this call.

        Args:
            video: [B, T, H, W, C], uint8 or floats in [0, 1].
            inputs: of `draw` for T frames.
            state: where an earlier call ended; None: the beginning of a sequence.
            use_obs: None; all levels see the frames.
        """
        assert use_obs is None, use_obs
        followed, state = self.follow(video, inputs, state, None)
        return rollouts(followed.states, followed.ticked), state

    def imagine(self, inputs: Inputs, state: State) -> tuple[tuple[LevelRollout, AbstractRollout], State]:
        """Predict as many frames as `inputs` are for with the priors alone; otherwise as `observe`.

        The first begins a segment whose belief is the encoding of all frames that were observed. From there on, one
        begins where the prior finds it more probable than not, without limits.
        """
        T = inputs.abstract.shape[1]
        first = jnp.pad(state.first[:, None], ((0, 0), (0, T - 1), (0, 0)))
        before = jnp.broadcast_to(state.forward[:, None], (*first.shape[:2], state.forward.shape[-1]))
        given = first, before, (inputs.abstract, inputs.observation), None
        states, ticked = unroll(self.transition, state.ticking, given)
        after = State(last_of(states), state.forward, jnp.zeros_like(state.first))
        return rollouts(states, ticked), after

    def decode(self, rollouts: tuple[LevelRollout, AbstractRollout]) -> Array:
        """Return the frames' means [B, T, H, W, C], in [0, 1]."""
        observation = LevelState(rollouts[0].stoch, rollouts[0].deter)
        return (self.decoder(self.transition.observation_feature(observation), None) + 1) / 2

    def elbo(
        self, video: Array, inputs: Inputs, state: State | None = None, training: Training | None = None
    ) -> tuple[Terms, State]:
        """Return the terms of the evidence lower bound, and the state.

        In training there is Gumbel noise in the boundaries, whose prior is overruled where segments are too many or too
        long. Arguments are otherwise as in `observe`.

        Returns:
            Level 0 are the observations, level 1 the segments, with terms where one begins; and boundary, the KL of
            the boundaries' relaxed distributions, estimated from the sample.
        """
        c, (B, T) = self.config, video.shape[:2]
        start = c.vta_init_size if state is None else 0
        stop = T - c.vta_init_size
        followed, state = self.follow(video, inputs, state, training)
        if stop <= start:
            zero = jnp.zeros((2, B))
            return Terms(zero[0], zero, zero, zero, zero, zero, {"boundary": zero[0]}), state

        modelled, states = jax.tree.map(lambda x: x[:, start:stop], (followed.ticked, followed.states))
        read = followed.read[:, start:stop]
        mean = self.decoder(self.transition.observation_feature(states.observation), training)
        nll = negative_log_likelihood(2 * floats(video)[:, start:stop] - 1, mean, c.dec_stddev)

        def per_level(observation: Array, abstract: Array) -> Array:
            """Return the sums over time, [2, B]; of the abstract level in frames that begin a segment.

            Where segments begin gets no gradient from this: fewer of them would be an easy way to a smaller KL.
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
            logits = limited(logits, read, c.vta_max_segments or max(1, c.seq_len // 4), c.vta_max_length)
        following, log_sample = (x[:, start + 1 : stop + 1] for x in (followed.logits, followed.log_sample))
        log_q, log_p = (log_density(x, log_sample, followed.temperature) for x in (following, logits))
        return Terms(nll, kl, kl, kl, prior, posterior, {"boundary": (log_q - log_p).sum(1)}), state

    def follow(
        self, video: Array, inputs: Inputs, state: State | None, training: Training | None
    ) -> tuple[Followed, State]:
        """Infer boundaries and states, as in `observe`."""
        c, (B, T) = self.config, video.shape[:2]
        features = self.encoder(2 * floats(video) - 1, training)
        if training is not None:
            self.last_temperature.value = temperature(training.step).astype(features.dtype)
        heat = self.last_temperature.value

        # Where segments begin.
        logits = self.detector(features, training)
        noisy = logits if training is None else logits + inputs.gumbel
        log_sample = nn.log_softmax(noisy / heat)
        time = jnp.arange(T)[:, None]
        start = c.vta_init_size if state is None else 0
        given = (time <= start) | (time >= T - c.vta_init_size)
        read = jnp.where(given, 1, straight_through(log_sample)[..., :1])
        copy = 1 - read

        # What the posteriors of the states see.
        zeros = jnp.zeros((B, c.cell_deter_size), features.dtype)
        forward_before = zeros if state is None else state.forward
        forward, _ = unroll(self.abstract_forward, forward_before, (features, jnp.ones_like(copy)))
        later = jnp.concatenate([copy[:, 1:], jnp.zeros_like(copy[:, :1])], 1)
        backward, _ = unroll(self.abstract_backward, zeros, (features[:, ::-1], later[:, ::-1]))
        encoding, _ = unroll(self.observation_forward, zeros, (features, copy))
        before = jnp.concatenate([forward_before[:, None], forward[:, :-1]], 1)
        sight = Sight(
            read,
            jnp.where(given, 1, nn.softmax(logits)[..., :1]),
            self.abstract_posterior(jnp.concatenate([before, backward[:, ::-1]], -1)),
            encoding,
        )

        first = jnp.broadcast_to((time <= start) & (state is None), read.shape).astype(read.dtype)
        ticking = self.initial(B, features.dtype) if state is None else state.ticking
        noise = inputs.abstract, inputs.observation
        states, ticked = unroll(self.transition, ticking, (first, before, noise, sight))
        after = State(last_of(states), forward[:, -1], jnp.ones((B, 1), features.dtype))
        return Followed(states, ticked, read, logits, log_sample, heat), after

    def initial(self, batch: int, dtype: jnp.dtype) -> Ticking:
        """Return zeros at both levels; a segment begins."""
        S, D = self.config.cell_stoch_size, self.config.cell_deter_size
        zeros = LevelState(jnp.zeros((batch, S), dtype), jnp.zeros((batch, D), dtype))
        return Ticking(zeros, zeros, jnp.ones((batch, 1), dtype))


def last_of(states: Ticking) -> Ticking:
    return jax.tree.map(lambda x: x[:, -1], states)


def rollouts(states: Ticking, ticked: Ticked) -> tuple[LevelRollout, AbstractRollout]:
    """Return the observation's and the abstract level's rollout."""
    observation = LevelRollout(ticked.observation_prior, ticked.observation_posterior, *states.observation)
    prior = ticked.abstract_prior
    posterior = jax.tree.map(lambda q, p: jnp.where(ticked.boundary >= 0.5, q, p), ticked.abstract_posterior, prior)
    return observation, AbstractRollout(prior, posterior, *states.abstract, ticked.boundary[..., 0])

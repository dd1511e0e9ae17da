"""The Clockwork VAE (Saxena, Ba, Hafner 2021, https://arxiv.org/abs/2102.09532) in Flax.

The file follows the paper from top to bottom: one level (transition, prior, posterior), encoder, decoder, hierarchy,
objective. The paper's symbols and their names here:

    x_t    video      frames, uint8 or floats in [0, 1]               [B, T, H, W, C]
    e_t^l  features   what the encoder computes from a tick's frames  [B, T_l, F]
    z_t^l  stoch      stochastic state                                [B, T_l, S]
    h_t^l  deter      deterministic state                             [B, T_l, D]
    s_t^l  output     [stoch, deter]                                  [B, T_l, S + D]
    q      posterior  distribution of stoch, given deter and features: a diagonal Gaussian
    p      prior      distribution of stoch, given deter: a diagonal Gaussian

B sequences, T frames, L levels, k = tmp_abs_factor. Levels count from 0: the paper's level 1 is our level 0. Level l
ticks every k**l frames and has T_l = ceil(T / k**l) ticks (Equation 1). The output of a level is the context of the
level below; the decoder turns that of level 0 into frames.

`fast` makes the model fast without changing what it computes. `sequences.noise` draws the noise.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from config import Config
from fast.convolutions import frame_by_frame
from fast.layers import GRU, Convolution, Dense, linear
from fast.scan import unroll
from sequences.interface import Model, Terms, Training
from sequences.noise import Inputs, ticks

# ---------------------------------------------------------------------------------------------- one level


class Gaussian(NamedTuple):
    """A diagonal Gaussian."""

    mean: Array
    stddev: Array


class LevelState(NamedTuple):
    """The state of one level after a tick."""

    stoch: Array  # [B, S]
    deter: Array  # [B, D]

    @property
    def output(self) -> Array:
        return jnp.concatenate([self.stoch, self.deter], -1)


class LevelRollout(NamedTuple):
    """One level over T_l ticks. In ticks without features, the posterior equals the prior."""

    prior: Gaussian  # [B, T_l, S]
    posterior: Gaussian  # [B, T_l, S]
    stoch: Array  # [B, T_l, S], samples of the posterior
    deter: Array  # [B, T_l, D]

    @property
    def output(self) -> Array:
        return LevelState(self.stoch, self.deter).output


class RSSMCell(nn.Module):
    """One level: transition, prior and posterior (Equation 4).

    h_t = GRU(relu(Dense([z_{t-1}, context_t])), h_{t-1})
    z_t ~ q(z_t | h_t, e_t) in ticks with features, z_t ~ p(z_t | h_t) in ticks without
    """

    config: Config
    context_size: int
    feature_size: int

    def setup(self) -> None:
        c = self.config
        self.transition = Dense(c.cell_stoch_size + self.context_size, c.cell_embed_size, matmul_dtype(c))
        self.gru = GRU(c.cell_embed_size, c.cell_deter_size, matmul_dtype(c))
        self.prior = Prior(c)
        self.posterior = Posterior(c, self.feature_size)
        for distribution in self.prior, self.posterior:
            nn.share_scope(self, distribution)  # puts their parameters next to the transition's

    def tick(
        self, state: LevelState, context: Array, features: Array | None, noise: Array, keep: Array | None
    ) -> tuple[LevelState, Gaussian]:
        """Return the state after one tick, and the distribution that its stoch is a sample of, [B, ...] each.

        Without features, that is the prior. `keep` multiplies the previous stoch; see `Inputs`.
        """
        stoch, deter = state
        if keep is not None:
            stoch = stoch * keep
        deter = self.gru(nn.relu(self.transition(stoch, context)), deter)
        distribution = self.prior(deter) if features is None else self.posterior(deter, features)
        mean, stddev = distribution
        stoch = mean if self.config.cell_mean_only else mean + stddev * noise
        return LevelState(stoch, deter), distribution

    def __call__(
        self, state: LevelState, context: Array, features: Array | None, inputs: Inputs
    ) -> tuple[LevelRollout, LevelState]:
        """Unroll the level over T_l ticks: follow the posterior while there are features, then the prior.

        Args:
            state: before the first tick.
            context: [B, T_l, context_size].
            features: of the first ticks, [B, up to T_l, F]; None: no tick has features.
            inputs: noise [B, T_l, S] and `keep`.

        Returns:
            The rollout, and the state after the last tick.
        """
        T, seen = inputs.noise.shape[1], 0 if features is None else features.shape[1]
        rollouts = []
        for span, observed in (slice(seen), features), (slice(seen, T), None):
            if len(range(T)[span]):
                keep = None if inputs.keep is None else inputs.keep[None, span, None]
                states, sampled = unroll(self, state, (context[:, span], observed, inputs.noise[:, span], keep))
                prior = sampled if observed is None else self.prior(states.deter)
                rollouts.append(LevelRollout(prior, sampled, *states))
                state = jax.tree.map(lambda x: x[:, -1], states)
        return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *rollouts), state


class Prior(nn.Module):
    """p(z_t | h_t). The past and the level above enter through h_t."""

    config: Config

    @nn.compact
    def __call__(self, deter: Array) -> Gaussian:
        """Return the distribution [..., S] for deter [..., D]."""
        c = self.config
        D, E = c.cell_deter_size, c.cell_embed_size
        hidden = nn.relu(Dense(D, E, matmul_dtype(c), name="prior_hidden")(deter))
        return Stats(c, name="prior_stats")(hidden)


class Posterior(nn.Module):
    """q(z_t | h_t, e_t)."""

    config: Config
    feature_size: int

    @nn.compact
    def __call__(self, deter: Array, features: Array) -> Gaussian:
        """Return the distribution [..., S] for deter [..., D] and features [..., F]."""
        c = self.config
        D, E = c.cell_deter_size, c.cell_embed_size
        hidden = nn.relu(Dense(D + self.feature_size, E, matmul_dtype(c), name="posterior_in")(deter, features))
        hidden = nn.relu(Dense(E, E, matmul_dtype(c), name="posterior_hidden")(hidden))
        return Stats(c, name="posterior_stats")(hidden)


class Stats(nn.Module):
    """The last layer of prior and posterior: mean = Dense(h), stddev = softplus(Dense(h + 0.54)) + cell_min_stddev.

    Both earlier codes have the 0.54 in this position. It was probably meant to follow the Dense layer: softplus(0.54)
    is about 1, so the initial stddev would be about 1. Here it shifts the bias by 0.54 times the kernel's column sums.
    It is kept, so that initial distributions equal those of the earlier codes.
    """

    config: Config

    def setup(self) -> None:
        E, S = self.config.cell_embed_size, self.config.cell_stoch_size
        self.mean, self.stddev = Dense(E, S), Dense(E, S)

    def __call__(self, h: Array) -> Gaussian:
        """Return the distribution [..., S] for h [..., E]."""
        # One matmul computes both.
        kernel = jnp.concatenate([self.mean.kernel, self.stddev.kernel], 1)
        bias = jnp.concatenate([self.mean.bias, self.stddev.bias + 0.54 * self.stddev.kernel.sum(0)])
        mean, stddev = jnp.split(linear(h, kernel, bias, dtype=matmul_dtype(self.config)), 2, -1)
        return Gaussian(mean, nn.softplus(stddev) + self.config.cell_min_stddev)


def matmul_dtype(config: Config) -> Any:
    """Return the dtype in which layers multiply; None: the dtype of their inputs."""
    return jnp.bfloat16 if config.dtype == "bfloat16" else None


# ---------------------------------------------------------------------------------------------- encoder, decoder


class Encoder(nn.Module):
    """e_t^l = e(x_t ... x_{t + k**l - 1}) (Equation 4).

    Four convolutions compute the features of each frame; these are level 0's. The Dense layers of each higher level
    continue from the level below, frame by frame. Their outputs are summed over the frames of a tick.
    """

    config: Config

    @property
    def feature_size(self) -> int:
        return 2 * 2 * 8 * self.config.filters * self.config.channels_mult

    @nn.compact
    def __call__(self, video: Array) -> tuple[Array, ...]:
        """Return each level's features [B, T_l, F] for floats [B, T, H, W, C]. A last tick may sum fewer frames."""
        c = self.config
        B, T, *frame_shape = video.shape
        x = video.astype(matmul_dtype(c) or video.dtype).reshape(B * T, *frame_shape)
        x = self._convolutions(x).reshape(B, T, self.feature_size)
        features = [x]
        for level in range(1, c.levels):
            sizes = [self.feature_size, *[c.enc_dense_embed_size] * (c.enc_dense_layers - 1), self.feature_size]
            layers = [Dense(sizes[i], sizes[i + 1], name=f"level_{level}_dense_{i}") for i in range(c.enc_dense_layers)]
            for layer in layers[:-1]:
                x = nn.relu(layer(x))
            summed = sum_blocks(x, c.tmp_abs_factor**level)
            if layers:
                # The last layer is linear: applied to the sum, it multiplies less. Its bias counts once per frame.
                frames = sum_blocks(jnp.ones((1, T, 1)), c.tmp_abs_factor**level)
                summed = linear(summed, layers[-1].kernel, frames * layers[-1].bias)
                if level < c.levels - 1:
                    x = layers[-1](x)
            features.append(summed)
        return tuple(x.astype(video.dtype) for x in features)

    def _convolutions(self, x: Array) -> Array:
        """Return the last feature map [N, 2, 2, 8 filters] of frames [N, H, W, C]."""
        c = self.config
        base, channels = c.filters * c.channels_mult, c.channels
        layers = []
        x = x[:, :62, :62]  # of 64 pixels, the layers use the first 62
        for i, multiple in enumerate((1, 2, 4, 8)):  # 62 -> 30 -> 14 -> 6 -> 2
            layers.append(Convolution(channels, multiple * base, 4, name=f"conv_{i}").layer(x.dtype, x.shape[0]))
            channels = multiple * base
        return frame_by_frame(partial(apply_leaky, layers), x, base)


def sum_blocks(x: Array, size: int) -> Array:
    """Return the sums of x [B, T, F] over blocks of `size` in time, [B, ceil(T / size), F]."""
    B, T, F = x.shape
    x = jnp.pad(x, ((0, 0), (0, -T % size), (0, 0)))
    return x.reshape(B, -1, size, F).sum(2)


class Decoder(nn.Module):
    """The mean of p(x_t | s_t^0) (Equation 4): a Dense layer and four transposed convolutions for each frame."""

    config: Config

    @nn.compact
    def __call__(self, output: Array) -> Array:
        """Return the means [B, T, H, W, C] for level 0's output [B, T, S + D]. A tanh keeps them in [-1, 1]."""
        c = self.config
        B, T, F = output.shape
        base, channels = c.filters * c.channels_mult, 1024 * c.channels_mult
        x = output.astype(matmul_dtype(c) or output.dtype).reshape(B * T, F)
        # Most of the weights are in the first two layers: all frames go through them at once.
        x = Dense(F, channels, name="dense")(x).reshape(-1, 1, 1, channels)
        x = apply_leaky([Convolution(channels, 4 * base, 5, transposed=True, name="conv_0")], x)
        x = self._convolutions(x)
        return x.reshape(B, T, *x.shape[1:]).astype(output.dtype)

    def _convolutions(self, x: Array) -> Array:
        """Return the means [N, H, W, C] for the first feature map [N, 5, 5, 4 filters]."""
        c = self.config
        base, channels = c.filters * c.channels_mult, x.shape[-1]
        layers = []
        for i, (size, outputs) in enumerate(((5, 2 * base), (6, base), (6, c.channels)), 1):  # 5 -> 13 -> 30 -> 64
            convolution = Convolution(channels, outputs, size, transposed=True, name=f"conv_{i}")
            layers.append(convolution.layer(x.dtype, x.shape[0]))
            channels = outputs
        *hidden, last = layers
        return frame_by_frame(lambda x: jnp.tanh(last(apply_leaky(hidden, x))), x, base)


def apply_leaky(layers: Sequence[Callable[[Array], Array]], x: Array) -> Array:
    """Apply the layers to x, each followed by a leaky ReLU."""
    for layer in layers:
        x = nn.leaky_relu(layer(x), 0.2)
    return x


def floats(video: Array) -> Array:
    """Return frames as floats in [0, 1]: uint8 divided by 255, floats unchanged."""
    return video / jnp.float32(255) if video.dtype == jnp.uint8 else video


# ---------------------------------------------------------------------------------------------- hierarchy


@flax.struct.dataclass
class State:
    """The state of the hierarchy between two calls of `observe` and `imagine`."""

    levels: tuple[LevelState, ...]
    ticks_finished: bool = flax.struct.field(pytree_node=False, default=True)
    """Whether all levels have finished their ticks. Only then can more frames follow."""


class CWVAE(Model):
    """The Clockwork VAE: an encoder, a sequence of states for each level, a decoder (Figure 3, Equations 3 and 4).

    With `config.action_size` > 0, the context of level 0 includes the inputs' actions [B, T, action_size]. Action t is
    the one that led to frame t.
    """

    def setup(self) -> None:
        c = self.config
        self.encoder = Encoder(c)
        self.decoder = Decoder(c)
        output_size = c.cell_stoch_size + c.cell_deter_size
        context_sizes = [output_size + (c.action_size or 0), *[output_size] * (c.levels - 1)]
        self.cells = [
            RSSMCell(c, size, self.encoder.feature_size, name=f"cell_{level}")
            for level, size in enumerate(context_sizes)
        ]

    def observe(
        self, video: Array, inputs: Sequence[Inputs], state: State | None = None, use_obs: str | None = None
    ) -> tuple[tuple[LevelRollout, ...], State]:
        """Infer the states from frames (filtering).

        A state depends on its own level's features and, through its context, on those of all levels above. Thus it
        depends on all frames up to the end of the top level's current tick, but not on the states of the levels below.

        Args:
            video: [B, T, H, W, C], uint8 or floats in [0, 1]. More frames can follow if T is a multiple of k**(L-1).
            inputs: of `draw` for T frames.
            state: that an earlier call returned; None: at the beginning of a video.
            use_obs: a letter per level, level 0 first. T: the level follows its posterior; F: it is blind and follows
                its prior. None: all T.

        Returns:
            Each level's rollout, and the state after the last frame.

        Raises:
            ValueError: `state` is in the middle of a tick, or the actions don't fit the model.
        """
        return self.unroll(inputs, state, self.visible_features(video, use_obs))

    def imagine(self, inputs: Sequence[Inputs], state: State | None = None) -> tuple[tuple[LevelRollout, ...], State]:
        """Predict the states of as many frames as `inputs` are for, with the prior only; otherwise as `observe`."""
        return self.unroll(inputs, state, [None] * self.config.levels)

    def visible_features(self, video: Array, use_obs: str | None) -> list[Array | None]:
        """Return each level's features [B, T_l, F]; None for a blind level."""
        letters = use_obs or "T" * self.config.levels
        return [x if letter == "T" else None for x, letter in zip(self.encoder(floats(video)), letters, strict=True)]

    def unroll(
        self, inputs: Sequence[Inputs], state: State | None, features: Sequence[Array | None]
    ) -> tuple[tuple[LevelRollout, ...], State]:
        """Unroll the levels from the top down. A level's output is the context of the k ticks below it."""
        c, (B, T, _) = self.config, inputs[0].noise.shape
        state = self.initial_state(B) if state is None else state
        if not state.ticks_finished:
            raise ValueError(f"state: is within a tick; continue only after a multiple of {c.block} frames")
        context = jnp.zeros((B, T, c.cell_stoch_size + c.cell_deter_size))
        rollouts: list[LevelRollout] = []
        states: list[LevelState] = []
        for level, T_l in reversed(list(enumerate(ticks(c, T)))):
            assert inputs[level].noise.shape == (B, T_l, c.cell_stoch_size), (level, inputs[level].noise.shape, T_l)
            context = context[:, :T_l]
            if level == 0:
                context = self.with_actions(context, inputs[0].actions)
            rollout, last = self.cells[level](state.levels[level], context, features[level], inputs[level])
            context = jnp.repeat(rollout.output, c.tmp_abs_factor, axis=1)
            rollouts.insert(0, rollout)
            states.insert(0, last)
        return tuple(rollouts), State(tuple(states), T % c.block == 0)

    def with_actions(self, context: Array, actions: Array | None) -> Array:
        """Return the context of level 0 [B, T, S + D] with the actions [B, T, A] appended, if the model takes any.

        Raises:
            ValueError: the model takes no actions or other ones, or they are missing.
        """
        size, shape = self.config.action_size or 0, None if actions is None else actions.shape
        if size != (shape[-1] if shape else 0):
            raise ValueError(f"actions: this model takes {f'[B, T, {size}]' if size else 'none'}, got {shape}")
        return context if actions is None else jnp.concatenate([context, actions], -1)

    def initial_state(self, batch: int) -> State:
        """Return the state before the first frame: zeros at every level."""
        c = self.config
        zeros = LevelState(jnp.zeros((batch, c.cell_stoch_size)), jnp.zeros((batch, c.cell_deter_size)))
        return State((zeros,) * c.levels)

    def decode(self, rollouts: Sequence[LevelRollout]) -> Array:
        """Return the means of the frames [B, T, H, W, C], not clipped to [0, 1]."""
        return self.decoder(rollouts[0].output)

    def elbo(
        self, video: Array, inputs: Sequence[Inputs], state: State | None = None, training: Training | None = None
    ) -> tuple[Terms, State]:
        """Return the terms of the evidence lower bound (Equation 5), and the state after the last frame.

        Arguments are as in `observe`. `training` has no effect: the model is the same in training and evaluation.
        """
        video = floats(video)
        rollouts, state = self.observe(video, inputs, state)
        nll = negative_log_likelihood(video, self.decode(rollouts), self.config.dec_stddev)
        stop = jax.lax.stop_gradient
        terms = Terms(
            nll=nll,
            kl=per_level(rollouts, kl_divergence),
            kl_prior=per_level(rollouts, lambda q, p: kl_divergence(stop(q), p)),
            kl_posterior=per_level(rollouts, lambda q, p: kl_divergence(q, stop(p))),
            entropy_prior=per_level(rollouts, lambda q, p: entropy(p)),
            entropy_posterior=per_level(rollouts, lambda q, p: entropy(q)),
        )
        return terms, state


# ---------------------------------------------------------------------------------------------- objective


def negative_log_likelihood(video: Array, mean: Array, stddev: float) -> Array:
    """Return -ln N(video; mean, stddev**2) in nats, summed over all axes but the first, [B]."""
    constant = math.prod(video.shape[1:]) * (math.log(stddev) + 0.5 * math.log(2 * math.pi))
    return 0.5 * (((video - mean) / stddev) ** 2).sum((1, 2, 3, 4)) + constant


def kl_divergence(q: Gaussian, p: Gaussian) -> Array:
    """Return KL[q || p] = ln(s_p / s_q) + (s_q**2 + (m_q - m_p)**2) / (2 s_p**2) - 1/2, summed over the last axis."""
    ratio = q.stddev / p.stddev
    return (0.5 * (ratio**2 + ((q.mean - p.mean) / p.stddev) ** 2 - 1) - jnp.log(ratio)).sum(-1)


def entropy(p: Gaussian) -> Array:
    """Return the entropy of p in nats, ln(s) + ln(2 pi e) / 2, summed over the last axis."""
    return (jnp.log(p.stddev) + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


def per_level(rollouts: Sequence[LevelRollout], term: Callable[[Gaussian, Gaussian], Array]) -> Array:
    """Return each level's term(posterior, prior), summed over its ticks, [L, B]."""
    return jnp.stack([term(rollout.posterior, rollout.prior).sum(1) for rollout in rollouts])


def objective(
    config: Config, terms: Terms, weight: Array, frames: int, axis: str | None = None
) -> tuple[Array, dict[str, Array]]:
    """Return the training loss (the negative of Equation 5) and metrics, both per frame and averaged over the batch.

        loss = (-sum_t ln p(x_t | s_t^0) + sum_l sum_t KL[q_t^l || p_t^l]) / T

    Args:
        config: of the model; see `weighted_kl` for the options of the KL.
        terms: of `Model.elbo`.
        weight: [B], 1 for a sequence that counts, 0 for padding.
        frames: T.
        axis: name of the mapped axis over whose devices the batch is spread, if any. Loss and metrics are then this
            device's shares: their sums over the devices, and those of the gradients, are the whole batch's.
    """
    psum = partial(jax.lax.psum, axis_name=axis) if axis else lambda x: x
    weight = weight / psum(weight.sum())
    mean = jax.tree.map(lambda x: (x * weight).sum(-1), terms)  # [] or [L]

    nll = mean.nll
    kl = weighted_kl(config, mean, psum).sum() + sum(mean.other.values())
    loss = (nll + kl) / frames

    metrics = {"loss": loss, "nll_term": nll / frames, "kl_term": kl / frames}
    metrics |= {f"avg_kl_{name}": value / frames for name, value in mean.other.items()}
    for level in range(len(mean.kl)):
        metrics |= {
            f"avg_kl_prior_posterior__level_{level}": mean.kl[level] / frames,
            f"avg_entropy_prior__level_{level}": mean.entropy_prior[level] / frames,
            f"avg_entropy_posterior__level_{level}": mean.entropy_posterior[level] / frames,
        }
    return loss, metrics


def weighted_kl(config: Config, mean: Terms, psum: Callable[[Array], Array]) -> Array:
    """Return each level's KL in the loss, [L]. The official code's options apply in this order:

    kl_grad_post_perc a:  kl_l <- (1 - a) KL[stop(q) || p] + max(1, a KL[q || stop(p)])
    free_nats f:          kl_l <- max(0, kl_l - f)
    beta b:               kl_l <- b_l kl_l
    """
    c, devices = config, psum(jnp.ones(()))

    def at_least(floor: float, share: Array) -> Array:
        """Return this device's share of max(floor, the sum of all shares)."""
        return jnp.where(psum(jax.lax.stop_gradient(share)) > floor, share, floor / devices)

    kl = mean.kl
    if c.kl_grad_post_perc is not None:
        balance = c.kl_grad_post_perc
        kl = (1 - balance) * mean.kl_prior + at_least(1.0, balance * mean.kl_posterior)
    if c.free_nats is not None:
        kl = at_least(c.free_nats, kl) - c.free_nats / devices
    return kl if c.beta is None else jnp.asarray(c.beta) * kl

"""The Clockwork VAE (Saxena, Ba, Hafner 2021, https://arxiv.org/abs/2102.09532) in Flax.

Read from top to bottom, as in the paper: the cell of one level with its prior and posterior, encoder, decoder, the
hierarchy, the objective. Symbols of the paper and names here:

    x_t    video     frames, uint8 or floats in [0, 1]    [B, T, H, W, C]
    e_t^l  features  of the frames of one tick            [B, T_l, F]
    z_t^l  stoch     stochastic state                     [B, T_l, S]
    h_t^l  deter     deterministic state                  [B, T_l, D]
    s_t^l  output    [stoch, deter]: the context of the level below; at the lowest level decoded to frames
    q, p   posterior and prior over stoch, diagonal Gaussians

B sequences, T frames, L levels, k = tmp_abs_factor. Levels count from 0 here (the paper's level 1 is our level 0), so
that level l ticks every k**l frames and has T_l = ceil(T / k**l) ticks (Equation 1).

What makes it fast without changing what it computes is in `fast`; noise is drawn in `sequences.noise`.
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
    """What one level carries from tick to tick."""

    stoch: Array  # [B, S]
    deter: Array  # [B, D]

    @property
    def output(self) -> Array:
        return jnp.concatenate([self.stoch, self.deter], -1)


class LevelRollout(NamedTuple):
    """One level over T_l ticks. In ticks that saw no features, the posterior is the prior."""

    prior: Gaussian  # [B, T_l, S]
    posterior: Gaussian  # [B, T_l, S]
    stoch: Array  # [B, T_l, S], sampled from the posterior
    deter: Array  # [B, T_l, D]

    @property
    def output(self) -> Array:
        return LevelState(self.stoch, self.deter).output


class RSSMCell(nn.Module):
    """One level: its transition, prior and posterior (Equation 4).

    h_t = GRU(relu(Dense([z_{t-1}, context_t])), h_{t-1})
    z_t ~ q(z_t | h_t, features_t), or p(z_t | h_t) if the level doesn't see the frames
    """

    config: Config
    context_size: int
    feature_size: int

    def setup(self) -> None:
        c = self.config
        self.transition = Dense(c.cell_stoch_size + self.context_size, c.cell_embed_size, multiply_in(c))
        self.gru = GRU(c.cell_embed_size, c.cell_deter_size, multiply_in(c))
        self.prior = Prior(c)
        self.posterior = Posterior(c, self.feature_size)
        for distribution in self.prior, self.posterior:
            nn.share_scope(self, distribution)  # so that their parameters are next to the transition's

    def tick(
        self, state: LevelState, context: Array, features: Array | None, noise: Array, keep: Array | None
    ) -> tuple[LevelState, Gaussian]:
        """Return the state after one tick, and the distribution of its stoch, [B, ...] each."""
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
        """Unroll the level: follow the posterior for as many ticks as there are features, and then the prior.

        Args:
            state: before the first tick.
            context: [B, T_l, context_size].
            features: [B, <= T_l, F], or None.
            inputs: noise [B, T_l, S].

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
    """p(z_t | h_t), where h_t knows the past and the level above."""

    config: Config

    @nn.compact
    def __call__(self, deter: Array) -> Gaussian:
        """[..., D] -> [..., S]"""
        c = self.config
        D, E = c.cell_deter_size, c.cell_embed_size
        hidden = nn.relu(Dense(D, E, multiply_in(c), name="prior_hidden")(deter))
        return Stats(c, name="prior_stats")(hidden)


class Posterior(nn.Module):
    """q(z_t | h_t, e_t)."""

    config: Config
    feature_size: int

    @nn.compact
    def __call__(self, deter: Array, features: Array) -> Gaussian:
        """[..., D], [..., F] -> [..., S]"""
        c = self.config
        D, E = c.cell_deter_size, c.cell_embed_size
        hidden = nn.relu(Dense(D + self.feature_size, E, multiply_in(c), name="posterior_in")(deter, features))
        hidden = nn.relu(Dense(E, E, multiply_in(c), name="posterior_hidden")(hidden))
        return Stats(c, name="posterior_stats")(hidden)


class Stats(nn.Module):
    """The last layer of prior and posterior: mean = Dense(h), stddev = softplus(Dense(h + 0.54)) + min_stddev.

    The 0.54 is inherited from both earlier codes. The stddev's bias starts at zero, and softplus(0.54) is about 1,
    which suggests that the shift was meant to go behind the Dense layer, for an initial stddev of 1. Where it stands,
    it shifts the stddev's bias by 0.54 times the kernel's column sums. Kept, for equal initial distributions.
    """

    config: Config

    def setup(self) -> None:
        E, S = self.config.cell_embed_size, self.config.cell_stoch_size
        self.mean, self.stddev = Dense(E, S), Dense(E, S)

    def __call__(self, h: Array) -> Gaussian:
        """[..., E] -> [..., S]"""
        # Both in one matmul.
        kernel = jnp.concatenate([self.mean.kernel, self.stddev.kernel], 1)
        bias = jnp.concatenate([self.mean.bias, self.stddev.bias + 0.54 * self.stddev.kernel.sum(0)])
        mean, stddev = jnp.split(linear(h, kernel, bias, dtype=multiply_in(self.config)), 2, -1)
        return Gaussian(mean, nn.softplus(stddev) + self.config.cell_min_stddev)


def multiply_in(config: Config) -> Any:
    """Return the type that layers multiply in, None for that of their inputs."""
    return jnp.bfloat16 if config.dtype == "bfloat16" else None


# ---------------------------------------------------------------------------------------------- encoder, decoder


class Encoder(nn.Module):
    """e_t^l = e(x_t ... x_{t + k**l - 1}) (Equation 4): four convolutions per frame, then Dense layers per level.

    Each level above 0 continues from the per-frame output of the level below; its features are then summed over the
    frames of a tick.
    """

    config: Config

    @property
    def feature_size(self) -> int:
        return 2 * 2 * 8 * self.config.filters * self.config.channels_mult

    @nn.compact
    def __call__(self, video: Array) -> tuple[Array, ...]:
        """[B, T, H, W, C] floats -> features of each level, [B, T_l, F]. A last tick may have fewer frames to sum."""
        c = self.config
        B, T, *frame_shape = video.shape
        x = video.astype(multiply_in(c) or video.dtype).reshape(B * T, *frame_shape)
        x = self._convolutions(x).reshape(B, T, self.feature_size)
        features = [x]
        for level in range(1, c.levels):
            sizes = [self.feature_size, *[c.enc_dense_embed_size] * (c.enc_dense_layers - 1), self.feature_size]
            layers = [Dense(sizes[i], sizes[i + 1], name=f"level_{level}_dense_{i}") for i in range(c.enc_dense_layers)]
            for layer in layers[:-1]:
                x = nn.relu(layer(x))
            summed = sum_blocks(x, c.tmp_abs_factor**level)
            if layers:
                # The last layer is linear, so it comes after the sum; its bias counts once per frame.
                frames = sum_blocks(jnp.ones((1, T, 1)), c.tmp_abs_factor**level)
                summed = linear(summed, layers[-1].kernel, frames * layers[-1].bias)
                if level < c.levels - 1:
                    x = layers[-1](x)
            features.append(summed)
        return tuple(x.astype(video.dtype) for x in features)

    def _convolutions(self, x: Array) -> Array:
        """[N, H, W, C] -> [N, 2, 2, 8 filters]"""
        c = self.config
        base, channels = c.filters * c.channels_mult, c.channels
        layers = []
        x = x[:, :62, :62]  # what the layers read of 64
        for i, multiple in enumerate((1, 2, 4, 8)):  # 62 -> 30 -> 14 -> 6 -> 2
            layers.append(Convolution(channels, multiple * base, 4, name=f"conv_{i}").layer(x.dtype, x.shape[0]))
            channels = multiple * base
        return frame_by_frame(partial(leaky, layers), x, base)


def sum_blocks(x: Array, size: int) -> Array:
    """Sum over blocks of `size` along time: [B, T, F] -> [B, ceil(T / size), F]."""
    B, T, F = x.shape
    x = jnp.pad(x, ((0, 0), (0, -T % size), (0, 0)))
    return x.reshape(B, -1, size, F).sum(2)


class Decoder(nn.Module):
    """The mean of p(x_t | s_t^0): a Dense layer and four transposed convolutions per frame."""

    config: Config

    @nn.compact
    def __call__(self, output: Array) -> Array:
        """[B, T, S + D] -> [B, T, H, W, C]; not clipped: tanh, hence within [-1, 1]."""
        c = self.config
        B, T, F = output.shape
        base, channels = c.filters * c.channels_mult, 1024 * c.channels_mult
        x = output.astype(multiply_in(c) or output.dtype).reshape(B * T, F)
        # The first two layers have most of the weights: all frames go through them at once.
        x = Dense(F, channels, name="dense")(x).reshape(-1, 1, 1, channels)
        x = leaky([Convolution(channels, 4 * base, 5, transposed=True, name="conv_0")], x)
        x = self._frames(x)
        return x.reshape(B, T, *x.shape[1:]).astype(output.dtype)

    def _frames(self, x: Array) -> Array:
        """[N, 5, 5, 4 filters] -> [N, H, W, C]"""
        c = self.config
        base, channels = c.filters * c.channels_mult, x.shape[-1]
        layers = []
        for i, (size, outputs) in enumerate(((5, 2 * base), (6, base), (6, c.channels)), 1):  # 5 -> 13 -> 30 -> 64
            convolution = Convolution(channels, outputs, size, transposed=True, name=f"conv_{i}")
            layers.append(convolution.layer(x.dtype, x.shape[0]))
            channels = outputs
        *hidden, last = layers
        return frame_by_frame(lambda x: jnp.tanh(last(leaky(hidden, x))), x, base)


def leaky(layers: Sequence[Callable[[Array], Array]], x: Array) -> Array:
    """Apply layers to x, each with a leaky ReLU behind it."""
    for layer in layers:
        x = nn.leaky_relu(layer(x), 0.2)
    return x


def floats(video: Array) -> Array:
    """Return frames as floats in [0, 1]: uint8 is divided by 255, floats are left alone."""
    return video / jnp.float32(255) if video.dtype == jnp.uint8 else video


# ---------------------------------------------------------------------------------------------- hierarchy


@flax.struct.dataclass
class State:
    """Where a hierarchy stands between two calls of `observe` and `imagine`."""

    levels: tuple[LevelState, ...]
    between_ticks: bool = flax.struct.field(pytree_node=False, default=True)
    """Whether all levels have finished their ticks; if not, no further frames can follow."""


class CWVAE(Model):
    """The Clockwork VAE: an encoder, a chain of states per level, a decoder (Figure 3, Equations 3 and 4).

    With `config.action_size` > 0, the inputs' actions [B, T, action_size] are part of the context of level 0: each
    action is the one that led to its frame.
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
        """Filter frames: infer the states from frames up to the end of each tick.

        Args:
            video: [B, T, H, W, C], uint8 or floats in [0, 1]. More frames can follow if T is a multiple of k**(L-1).
            inputs: of `noise.draw` for T frames.
            state: where an earlier call ended; None: the beginning of a sequence.
            use_obs: per level, T: follow the posterior, or F: the level is blind and follows its prior. None: all T.

        Returns:
            Each level's rollout and the state at the end.

        Raises:
            ValueError: `state` was left in the middle of a tick.
        """
        return self.unroll(inputs, state, self.seen(video, use_obs))

    def imagine(self, inputs: Sequence[Inputs], state: State | None = None) -> tuple[tuple[LevelRollout, ...], State]:
        """Predict as many frames as `inputs` are for with the prior alone; otherwise as `observe`."""
        return self.unroll(inputs, state, [None] * self.config.levels)

    def seen(self, video: Array, use_obs: str | None) -> list[Array | None]:
        """Return each level's features [B, T_l, F], None for blind levels."""
        letters = use_obs or "T" * self.config.levels
        return [x if letter == "T" else None for x, letter in zip(self.encoder(floats(video)), letters, strict=True)]

    def unroll(
        self, inputs: Sequence[Inputs], state: State | None, features: Sequence[Array | None]
    ) -> tuple[tuple[LevelRollout, ...], State]:
        """Unroll the levels from the top down; each level's output is the context of the k ticks below."""
        c, (B, T, _) = self.config, inputs[0].noise.shape
        state = self.initial_state(B) if state is None else state
        if not state.between_ticks:
            raise ValueError(
                f"state: was left within a tick; only after a multiple of {c.block} frames can more frames follow"
            )
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
        """Append actions [B, T, A], if the model takes any, to the context of level 0 [B, T, S + D].

        Raises:
            ValueError: it takes others, or none.
        """
        size, shape = self.config.action_size or 0, None if actions is None else actions.shape
        if size != (shape[-1] if shape else 0):
            raise ValueError(f"actions: this model takes {f'[B, T, {size}]' if size else 'none'}, got {shape}")
        return context if actions is None else jnp.concatenate([context, actions], -1)

    def initial_state(self, batch: int) -> State:
        """Return zeros at every level."""
        c = self.config
        zeros = LevelState(jnp.zeros((batch, c.cell_stoch_size)), jnp.zeros((batch, c.cell_deter_size)))
        return State((zeros,) * c.levels)

    def decode(self, rollouts: Sequence[LevelRollout]) -> Array:
        """Return the frames' means [B, T, H, W, C] (not clipped to [0, 1])."""
        return self.decoder(rollouts[0].output)

    def elbo(
        self, video: Array, inputs: Sequence[Inputs], state: State | None = None, training: Training | None = None
    ) -> tuple[Terms, State]:
        """Return the terms of the evidence lower bound (Equation 5), and the state.

        Arguments are as in `observe`; nothing here is different in training.
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
    """Return -ln Normal(video; mean, stddev) in nats, summed over all but the first axis."""
    constant = math.prod(video.shape[1:]) * (math.log(stddev) + 0.5 * math.log(2 * math.pi))
    return 0.5 * (((video - mean) / stddev) ** 2).sum((1, 2, 3, 4)) + constant


def kl_divergence(q: Gaussian, p: Gaussian) -> Array:
    """Return KL[q || p] = ln(s_p / s_q) + (s_q**2 + (m_q - m_p)**2) / (2 s_p**2) - 1/2, summed over the last axis."""
    ratio = q.stddev / p.stddev
    return (0.5 * (ratio**2 + ((q.mean - p.mean) / p.stddev) ** 2 - 1) - jnp.log(ratio)).sum(-1)


def entropy(p: Gaussian) -> Array:
    """Return the entropy in nats, summed over the last axis: sum ln(s) + ln(2 pi e) / 2."""
    return (jnp.log(p.stddev) + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


def per_level(rollouts: Sequence[LevelRollout], term: Callable[[Gaussian, Gaussian], Array]) -> Array:
    """Return term(posterior, prior) of each level, summed over time, [L, B]."""
    return jnp.stack([term(rollout.posterior, rollout.prior).sum(1) for rollout in rollouts])


def objective(
    config: Config, terms: Terms, weight: Array, frames: int, axis: str | None = None
) -> tuple[Array, dict[str, Array]]:
    """Return the training loss, the negative of Equation 5 per frame, averaged over the batch, and metrics.

        loss = -sum_t ln p(x_t | s_t) + sum_l sum_t KL[q_t^l || p_t^l]

    Args:
        config: for the official code's options, see `weighted_kl`.
        terms: of `CWVAE.elbo`.
        weight: [B], 1 for a sequence that counts and 0 for padding.
        frames: T, which everything is divided by.
        axis: name of the mapped axis over whose devices the batch is spread, if any. What is returned is then this
            device's share: the loss is the sum over the devices, and so for gradients and metrics.
    """
    total = partial(jax.lax.psum, axis_name=axis) if axis else lambda x: x
    weight = weight / total(weight.sum())
    mean = jax.tree.map(lambda x: (x * weight).sum(-1), terms)  # [] or [L]

    nll = mean.nll
    kl = weighted_kl(config, mean, total).sum() + sum(mean.other.values())
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


def weighted_kl(config: Config, mean: Terms, total: Callable[[Array], Array]) -> Array:
    """Return each level's KL as the loss counts it, [L]. The official code's options, in this order:

    kl_grad_post_perc p:  kl_l <- (1 - p) KL[stop(q) || p] + max(1, p KL[q || stop(p)])
    free_nats f:          kl_l <- max(0, kl_l - f)
    beta:                 kl_l <- beta_l kl_l
    """
    c, devices = config, total(jnp.ones(()))

    def at_least(floor: float, share: Array) -> Array:
        """Return this device's share of max(floor, the sum of all shares)."""
        return jnp.where(total(jax.lax.stop_gradient(share)) > floor, share, floor / devices)

    kl = mean.kl
    if c.kl_grad_post_perc is not None:
        p = c.kl_grad_post_perc
        kl = (1 - p) * mean.kl_prior + at_least(1.0, p * mean.kl_posterior)
    if c.free_nats is not None:
        kl = at_least(c.free_nats, kl) - c.free_nats / devices
    return kl if c.beta is None else jnp.asarray(c.beta) * kl

"""The Clockwork VAE (Saxena, Ba, Hafner 2021, https://arxiv.org/abs/2102.09532) in Flax.

Read from top to bottom: encoder, decoder, the cell of one level with its prior and posterior, the hierarchy, the
objective, open-loop prediction. Symbols of the paper and names here:

    x_t    video     frames, uint8 or floats in [0, 1]    [B, T, H, W, C]
    e_t^l  features  of the frames of one tick            [B, T_l, F]
    z_t^l  stoch     stochastic state                     [B, T_l, S]
    h_t^l  deter     deterministic state                  [B, T_l, D]
    s_t^l  output    [stoch, deter]: conditions the level below, and at the lowest level is decoded
    q, p   posterior and prior over stoch, diagonal Gaussians

B sequences, T frames, L levels, k = tmp_abs_factor. Levels count from 0 here (the paper's level 1 is our level 0), so
that level l ticks every k**l frames and has T_l = ceil(T / k**l) ticks (Equation 1).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from config import Config
from fast.convolutions import conv, conv_transpose, frame_by_frame

UNROLL = 5
"""Ticks per iteration of a loop on accelerators, where what ticks share is then done once for all of them."""

lecun_normal = nn.initializers.lecun_normal()


# ---------------------------------------------------------------------------------------------- layers


def precision(config: Config, x: Array) -> Any:
    """The type that layers multiply in, where their input is x."""
    return jnp.bfloat16 if config.dtype == "bfloat16" else x.dtype


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def dot(x: Array, kernel: Array, dtype: Any) -> Array:
    """x @ kernel and its gradients, multiplied in `dtype`, added up and returned in the precision of x and kernel."""
    return jnp.matmul(x.astype(dtype), kernel.astype(dtype), preferred_element_type=x.dtype)


def dot_backward(dtype: Any, operands: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = operands
    outer = "...i,...o->io"
    return dot(gradient, kernel.T, dtype), jnp.einsum(
        outer, x.astype(dtype), gradient.astype(dtype), preferred_element_type=kernel.dtype
    )


dot.defvjp(lambda x, kernel, dtype: (dot(x, kernel, dtype), (x, kernel)), dot_backward)


class Affine(nn.Module):
    """x @ kernel + bias, with kernel [inputs, outputs] (Flax's Dense, but usable in parts).

    `split` gives the kernel's parts for a layer on concatenated inputs, so that the part that doesn't recur is
    multiplied once for all ticks: concat([a, b]) @ kernel = a @ kernel[:n] + b @ kernel[n:].
    """

    inputs: int
    outputs: int

    def setup(self) -> None:
        self.kernel = self.param("kernel", lecun_normal, (self.inputs, self.outputs))
        self.bias = self.param("bias", nn.initializers.zeros, (self.outputs,))

    def __call__(self, x: Array) -> Array:
        return (x @ self.kernel.astype(x.dtype) + self.bias).astype(x.dtype)  # the bias's gradient is a long sum

    def split(self, n: int) -> tuple[Array, Array]:
        return self.kernel[:n], self.kernel[n:]


class Convolution(nn.Module):
    """A convolution of stride 2 without padding, kernel [size, size, C_in, C_out]: [N, H, W, C_in] -> [N, H', W',
    C_out].

    Plain: H' = (H - size) // 2 + 1. Transposed: H' = 2 (H - 1) + size, and out[2 i + a] sums x[i] kernel[a], as in
    Keras and PyTorch.
    """

    inputs: int
    outputs: int
    size: int
    transposed: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", lecun_normal, (self.size, self.size, self.inputs, self.outputs))
        bias = self.param("bias", nn.initializers.zeros, (self.outputs,))
        y = (conv_transpose if self.transposed else conv)(x, kernel.astype(x.dtype)) + bias
        return checkpoint_name(y.astype(x.dtype), "convolved")


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
        x = frame_by_frame(Encoder._convolutions, self, video.astype(precision(c, video)).reshape(B * T, *frame_shape))
        x = x.reshape(B, T, self.feature_size)
        features = [x]
        for level in range(1, c.levels):
            ticks = c.tmp_abs_factor**level
            for i in range(c.enc_dense_layers - 1):
                inputs = self.feature_size if i == 0 else c.enc_dense_embed_size
                x = nn.relu(Affine(inputs, c.enc_dense_embed_size, name=f"level_{level}_dense_{i}")(x))
            if c.enc_dense_layers == 0:
                features.append(sum_blocks(x, ticks))
                continue
            last = Affine(x.shape[-1], self.feature_size, name=f"level_{level}_dense_{c.enc_dense_layers - 1}")
            # The last layer is linear, so it comes after the sum; its bias counts once per frame.
            frames = sum_blocks(jnp.ones((1, T, 1)), ticks)
            features.append(dot(sum_blocks(x, ticks), last.kernel, x.dtype) + frames * last.bias)
            if level < c.levels - 1:
                x = last(x)
        return tuple(x.astype(video.dtype) for x in features)

    def _convolutions(self, x: Array) -> Array:
        """[N, H, W, C] -> [N, 2, 2, 8 filters]"""
        channels = self.config.channels
        for i, multiple in enumerate((1, 2, 4, 8)):  # 64 -> 31 -> 14 -> 6 -> 2
            outputs = self.config.filters * self.config.channels_mult * multiple
            x = nn.leaky_relu(Convolution(channels, outputs, 4, name=f"conv_{i}")(x), 0.2)
            channels = outputs
        return x


def sum_blocks(x: Array, size: int) -> Array:
    """Sums over blocks of `size` along time: [B, T, F] -> [B, ceil(T / size), F]."""
    B, T, F = x.shape
    x = jnp.pad(x, ((0, 0), (0, -T % size), (0, 0)))
    return x.reshape(B, -1, size, F).sum(2)


class Decoder(nn.Module):
    """The mean of p(x_t | s_t^0): a Dense layer and four transposed convolutions per frame."""

    config: Config

    @nn.compact
    def __call__(self, output: Array) -> Array:
        """[B, T, S + D] -> [B, T, H, W, C]; not clipped: tanh, hence within [-1, 1]."""
        B, T, F = output.shape
        x = frame_by_frame(Decoder._frames, self, output.astype(precision(self.config, output)).reshape(B * T, F))
        return x.reshape(B, T, *x.shape[1:]).astype(output.dtype)

    def _frames(self, x: Array) -> Array:
        """[N, S + D] -> [N, H, W, C]"""
        c = self.config
        base = c.filters * c.channels_mult
        channels = 1024 * c.channels_mult
        x = Affine(x.shape[-1], channels, name="dense")(x).reshape(-1, 1, 1, channels)
        layers = (5, 4 * base), (5, 2 * base), (6, base), (6, c.channels)  # 1 -> 5 -> 13 -> 30 -> 64
        for i, (size, outputs) in enumerate(layers):
            x = Convolution(channels, outputs, size, transposed=True, name=f"conv_{i}")(x)
            x = nn.leaky_relu(x, 0.2) if i < 3 else jnp.tanh(x)
            channels = outputs
        return x


# ---------------------------------------------------------------------------------------------- one level


class Gaussian(NamedTuple):
    """A diagonal Gaussian."""

    mean: Array
    stddev: Array


def kl_divergence(q: Gaussian, p: Gaussian) -> Array:
    """KL[q || p] in nats: ln(s_p / s_q) + (s_q**2 + (m_q - m_p)**2) / (2 s_p**2) - 1/2, summed over the last axis."""
    ratio = q.stddev / p.stddev
    return (0.5 * (ratio**2 + ((q.mean - p.mean) / p.stddev) ** 2 - 1) - jnp.log(ratio)).sum(-1)


def entropy(p: Gaussian) -> Array:
    """Entropy in nats, summed over the last axis: sum ln(s) + ln(2 pi e) / 2."""
    return (jnp.log(p.stddev) + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


class LevelState(NamedTuple):
    """What one level carries from tick to tick."""

    stoch: Array  # [B, S]
    deter: Array  # [B, D]


class LevelRollout(NamedTuple):
    """One level over T_l ticks. Where the level didn't see the frames, the posterior is the prior."""

    prior: Gaussian  # [B, T_l, S]
    posterior: Gaussian  # [B, T_l, S]
    stoch: Array  # [B, T_l, S], sampled from the posterior
    deter: Array  # [B, T_l, D]

    @property
    def output(self) -> Array:
        return jnp.concatenate([self.stoch, self.deter], -1)


class GRU(nn.Module):
    """Parameters of a GRU whose reset gate acts after the recurrent matmul; its three gates share one matmul.

    The gates come in the order reset, update, candidate. The same function, initial distribution and number of
    parameters as Flax's GRUCell.
    """

    inputs: int
    size: int

    def setup(self) -> None:
        def orthogonal_gates(key: Array, shape: tuple[int, int]) -> Array:
            orthogonal = nn.initializers.orthogonal()
            return jnp.concatenate([orthogonal(k, (self.size, self.size)) for k in jax.random.split(key, 3)], 1)

        self.input_kernel = self.param("input_kernel", lecun_normal, (self.inputs, 3 * self.size))
        self.input_bias = self.param("input_bias", nn.initializers.zeros, (3 * self.size,))
        self.state_kernel = self.param("state_kernel", orthogonal_gates, (self.size, 3 * self.size))
        self.candidate_bias = self.param("candidate_bias", nn.initializers.zeros, (self.size,))

    def weights(self) -> dict[str, tuple[Array, Array]]:
        state_bias = jnp.concatenate([jnp.zeros(2 * self.size), self.candidate_bias])
        return {"gru_input": (self.input_kernel, self.input_bias), "gru_state": (self.state_kernel, state_bias)}


class Stats(nn.Module):
    """The last layer of prior and posterior: mean = Dense(h), stddev = softplus(Dense(h + 0.54)) + min_stddev.

    The 0.54 is inherited from both earlier codes. The stddev's bias starts at zero, and softplus(0.54) is about 1,
    which suggests that the shift was meant to go behind the Dense layer, for an initial stddev of 1. Where it stands,
    it shifts the stddev's bias by 0.54 times the kernel's column sums. Kept, for equal initial distributions.
    """

    inputs: int
    outputs: int

    def setup(self) -> None:
        self.mean = Affine(self.inputs, self.outputs)
        self.stddev = Affine(self.inputs, self.outputs)

    def weights(self) -> tuple[Array, Array]:
        stddev_bias = self.stddev.bias + 0.54 * self.stddev.kernel.sum(0)
        kernel = jnp.concatenate([self.mean.kernel, self.stddev.kernel], 1)
        return kernel, jnp.concatenate([self.mean.bias, stddev_bias])


class RSSMCell(nn.Module):
    """One level's prior p(s_t | s_{t-1}, s_t^{l+1}) and posterior q(s_t | s_{t-1}, s_t^{l+1}, e_t) (Equation 4).

        h_t   = GRU(relu(Dense([z_{t-1}, context_t])), h_{t-1})
        p_t   = Stats(relu(Dense(h_t)))
        q_t   = Stats(relu(Dense(relu(Dense([h_t, features_t])))))

    Both share all weights up to h_t. Only z and h recur: what context and features contribute is computed before the
    scan over the ticks and, where the posterior is followed, the prior after it; inside remain the recurrent halves
    of the Dense layers.
    """

    config: Config
    context_size: int
    feature_size: int

    def setup(self) -> None:
        c = self.config
        S, D, E = c.cell_stoch_size, c.cell_deter_size, c.cell_embed_size
        self.transition = Affine(S + self.context_size, E)
        self.gru = GRU(E, D)
        self.prior_hidden = Affine(D, E)
        self.prior_stats = Stats(E, S)
        self.posterior_in = Affine(D + self.feature_size, E)
        self.posterior_hidden = Affine(E, E)
        self.posterior_stats = Stats(E, S)

    def __call__(
        self, state: LevelState, context: Array | None, features: Array | None, noise: Array, reset: Array
    ) -> tuple[LevelRollout, LevelState]:
        """Unrolls the level.

        Args:
            state: before the first tick.
            context: [B, T_l, context_size], or None for zeros (the top level).
            features: [B, T_l, F]: follow the posterior; None: follow the prior.
            noise: [B, T_l, S], standard normal.
            reset: [T_l], multiplies the previous stoch.

        Returns:
            The rollout, and the state after the last tick.
        """
        c = self.config
        S, D, E = c.cell_stoch_size, c.cell_deter_size, c.cell_embed_size
        B, T, _ = noise.shape
        dtype = precision(c, noise)
        no_bias = jnp.zeros(E)

        from_stoch, from_context = self.transition.split(S)
        context = jnp.zeros((B, T, E)) if context is None else dot(context, from_context, dtype)
        inputs = {"context": context + self.transition.bias, "noise": noise}
        weights = {"transition": (from_stoch, no_bias), **self.gru.weights()}
        prior_weights = {
            "prior_hidden": (self.prior_hidden.kernel, self.prior_hidden.bias),
            "prior_stats": self.prior_stats.weights(),
        }
        if features is None:
            weights |= prior_weights
        else:
            from_deter, from_features = self.posterior_in.split(D)
            inputs["features"] = dot(features, from_features, dtype) + self.posterior_in.bias
            weights |= {
                "posterior_in": (from_deter, no_bias),
                "posterior_hidden": (self.posterior_hidden.kernel, self.posterior_hidden.bias),
                "posterior_stats": self.posterior_stats.weights(),
            }
        inputs = {name: jnp.swapaxes(x, 0, 1) for name, x in inputs.items()}  # time first
        inputs["reset"] = reset[:, None, None]
        states, posterior = scan(partial(self._tick, c, features is None), weights, state, inputs, dtype)
        last = jax.tree.map(lambda x: x[-1], states)
        states, posterior = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (states, posterior))
        prior = posterior
        if features is not None:

            def dense(name: str, x: Array) -> Array:
                kernel, bias = prior_weights[name]
                return dot(x, kernel, dtype) + bias

            prior = self._prior(c, dense, states.deter)
        return LevelRollout(prior, posterior, *states), last

    @staticmethod
    def _tick(
        config: Config, blind: bool, dense: Callable[[str, Array], Array], state: LevelState, inputs: dict[str, Array]
    ) -> tuple[LevelState, Gaussian]:
        hidden = nn.relu(dense("transition", state.stoch * inputs["reset"]) + inputs["context"])
        deter = gru(dense("gru_input", hidden), dense("gru_state", state.deter), state.deter)
        if blind:
            belief = RSSMCell._prior(config, dense, deter)
        else:
            hidden = nn.relu(dense("posterior_in", deter) + inputs["features"])
            hidden = nn.relu(dense("posterior_hidden", hidden))
            belief = gaussian(dense("posterior_stats", hidden), config.cell_min_stddev)
        stoch = belief.mean if config.cell_mean_only else belief.mean + belief.stddev * inputs["noise"]
        return LevelState(stoch, deter), belief

    @staticmethod
    def _prior(config: Config, dense: Callable[[str, Array], Array], deter: Array) -> Gaussian:
        hidden = nn.relu(dense("prior_hidden", deter))
        return gaussian(dense("prior_stats", hidden), config.cell_min_stddev)


def gru(from_input: Array, from_state: Array, state: Array) -> Array:
    """The new state, from the gates' (reset, update, candidate) input and state halves, [B, 3 D] each."""
    input_gates, input_candidate = jnp.split(from_input, [2 * state.shape[-1]], -1)
    state_gates, state_candidate = jnp.split(from_state, [2 * state.shape[-1]], -1)
    reset, update = jnp.split(nn.sigmoid(input_gates + state_gates), 2, -1)
    return (1 - update) * jnp.tanh(input_candidate + reset * state_candidate) + update * state


def gaussian(stats: Array, min_stddev: float) -> Gaussian:
    """[..., 2 S] outputs of a `Stats` layer as a Gaussian."""
    mean, stddev = jnp.split(stats, 2, -1)
    return Gaussian(mean, nn.softplus(stddev) + min_stddev)


def scan(
    tick: Callable[..., tuple[Any, Any]], weights: dict[str, tuple[Array, Array]], state: Any, inputs: Any, dtype: Any
) -> tuple[Any, Any]:
    """Unrolls tick(dense, state, inputs) -> (state, outputs) over time, where dense(name, x) is x @ kernel + bias of
    `weights[name]`. Returns the states and outputs of all ticks.

    The same as `lax.scan`, with fewer operations per tick: on an accelerator each takes microseconds, however small.
    The scan computes nothing but states; from these, one call of `tick` for all ticks gives the outputs. Likewise the
    backward scan only hands the gradient from state to state, with the dense layers' outputs known, and then one
    differentiated call of `tick` for all ticks gives the gradients of weights and inputs.
    """
    unrolled = 1 if jax.default_backend() == "cpu" else UNROLL

    def in_matmul_precision(weights: dict) -> dict:
        return {name: (kernel.astype(dtype), bias) for name, (kernel, bias) in weights.items()}

    def call(weights: dict, before: Any, inputs: Any) -> tuple[Any, dict[str, Array]]:
        """What `tick` returns, for one tick or all, and the outputs of its dense layers."""
        computed = {}

        def dense(name: str, x: Array) -> Array:
            kernel, bias = weights[name]
            computed[name] = dot(x, kernel, dtype) + bias
            return computed[name]

        return tick(dense, before, inputs), computed

    def unroll(weights: dict, state: Any, inputs: Any) -> tuple[Any, Any]:
        """The states before and after each tick."""
        weights = in_matmul_precision(weights)

        def body(state: Any, inputs: Any) -> tuple[Any, Any]:
            (state, _), _ = call(weights, state, inputs)
            return state, state

        _, after = jax.lax.scan(body, state, inputs, unroll=unrolled)
        return jax.tree.map(lambda first, x: jnp.concatenate([first[None], x[:-1]]), state, after), after

    @jax.custom_vjp
    def run(weights: dict, state: Any, inputs: Any) -> tuple[Any, Any]:
        before, after = unroll(weights, state, inputs)
        (_, outputs), _ = call(weights, before, inputs)
        return after, outputs

    def forward(weights: dict, state: Any, inputs: Any) -> tuple:
        before, after = unroll(weights, state, inputs)
        (_, outputs), pullback, computed = jax.vjp(call, weights, before, inputs, has_aux=True)
        return (after, outputs), (pullback, weights, (before, inputs, computed))

    def backward(residuals: tuple, gradient: Any) -> tuple:
        pullback, weights, ticks = residuals
        weights = in_matmul_precision(weights)

        def body(later: Any, slices: tuple) -> tuple[Any, Any]:
            (before, inputs, computed), (after, outputs) = slices
            after = jax.tree.map(jnp.add, after, later)

            def dense(name: str, x: Array) -> Array:
                return known_dense(x, weights[name][0], computed[name], dtype)

            _, to_state = jax.vjp(lambda before: tick(dense, before, inputs), before)
            return *to_state((after, outputs)), after

        end = jax.tree.map(lambda x: jnp.zeros_like(x[0]), gradient[0])
        state, after = jax.lax.scan(body, end, (ticks, gradient), reverse=True, unroll=unrolled)
        weights, _, inputs = pullback((after, gradient[1]))
        return weights, state, inputs

    run.defvjp(forward, backward)
    return run(weights, state, inputs)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def known_dense(x: Array, kernel: Array, value: Array, dtype: Any) -> Array:
    """`value`, computed before as dot(x, kernel, dtype) + bias. A gradient goes to x alone."""
    return value


known_dense.defvjp(
    lambda x, kernel, value, dtype: (value, kernel),
    lambda dtype, kernel, gradient: (dot(gradient, kernel.T, dtype), None, None),
)


# ---------------------------------------------------------------------------------------------- hierarchy


@flax.struct.dataclass
class State:
    """Where a hierarchy stands between two calls of `observe` and `imagine`."""

    levels: tuple[LevelState, ...]
    between_ticks: bool = flax.struct.field(pytree_node=False, default=True)
    """Whether all levels have finished their ticks: else, no further frames can follow."""


def ticks(config: Config, frames: int) -> list[int]:
    """T_l = ceil(frames / k**l) of each level."""
    return [-(-frames // config.tmp_abs_factor**level) for level in range(config.levels)]


def draw_noise(config: Config, keys: Array, frames: int) -> tuple[Array, ...]:
    """Standard normal noise for all ticks of each level, [B, T_l, S], from one PRNG key per sequence [B]."""
    sizes = ticks(config, frames)
    draw = jax.vmap(lambda key: jax.random.normal(key, (sum(sizes), config.cell_stoch_size)))
    starts = [sum(sizes[: level + 1]) for level in range(config.levels - 1)]
    return tuple(jnp.split(draw(keys), starts, axis=1))


def reset_masks(config: Config, frames: int) -> tuple[Array, ...]:
    """[T_l] factors of the previous stoch at each level: ones, except below the top with `cell_reset_state`.

    As in the official code: 0, 1, 0, 1, ... over the ticks of level L-2; each level further down repeats the whole
    sequence of the level above k times, cut to its length.
    """
    masks = [jnp.ones(T) for T in ticks(config, frames)]
    if config.cell_reset_state and config.levels > 1:
        mask = jnp.arange(len(masks[-2])) % 2.0
        for level in range(config.levels - 2, -1, -1):
            masks[level] = mask[: len(masks[level])]
            mask = jnp.tile(masks[level], config.tmp_abs_factor)
    return tuple(masks)


class CWVAE(nn.Module):
    """The Clockwork VAE: an encoder, a chain of states per level, a decoder (Figure 3, Equations 3 and 4).

    With `action_size` > 0, `actions` [B, T, action_size] are concatenated to the context of level 0.
    """

    config: Config
    action_size: int = 0

    def setup(self) -> None:
        c = self.config
        self.encoder = Encoder(c)
        self.decoder = Decoder(c)
        output_size = c.cell_stoch_size + c.cell_deter_size
        self.cells = [
            RSSMCell(
                c,
                output_size + (self.action_size if level == 0 else 0),
                self.encoder.feature_size,
                name=f"cell_{level}",
            )
            for level in range(c.levels)
        ]

    def __call__(self, video: Array, noise: Sequence[Array], actions: Array | None = None) -> dict[str, Array]:
        """The terms of the objective, see `elbo`: what initialisation runs through."""
        return self.elbo(video, noise, actions)

    def observe(
        self,
        video: Array,
        noise: Sequence[Array],
        state: State | None = None,
        actions: Array | None = None,
        use_obs: str | None = None,
        reset: Sequence[Array] | None = None,
    ) -> tuple[tuple[LevelRollout, ...], State]:
        """Filters frames: infers the states from frames up to the end of each tick.

        Args:
            video: [B, T, H, W, C], uint8 or floats in [0, 1]. More frames can follow if T is a multiple of k**(L-1).
            noise: of `draw_noise` for T frames.
            state: where an earlier call ended; None: the beginning of a sequence.
            actions: [B, T, action_size].
            use_obs: per level, T: follow the posterior, or F: the level is blind and follows its prior. None: all T.
            reset: of `reset_masks`, where the frames are a part of a longer sequence; None: they are a whole sequence.

        Returns:
            Each level's rollout and the state at the end.

        Raises:
            ValueError: `state` was left in the middle of a tick.
        """
        features = self.encoder(floats(video))
        seen = [
            x if letter == "T" else None
            for x, letter in zip(features, use_obs or "T" * self.config.levels, strict=True)
        ]
        return self._unroll(video.shape[1], seen, noise, state, actions, reset)

    def imagine(
        self,
        frames: int,
        noise: Sequence[Array],
        state: State | None = None,
        actions: Array | None = None,
        reset: Sequence[Array] | None = None,
    ) -> tuple[tuple[LevelRollout, ...], State]:
        """Predicts `frames` frames ahead with the prior alone; otherwise as `observe`."""
        return self._unroll(frames, [None] * self.config.levels, noise, state, actions, reset)

    def decode(self, rollouts: Sequence[LevelRollout]) -> Array:
        """The frames' means [B, T, H, W, C] (not clipped to [0, 1])."""
        return self.decoder(rollouts[0].output)

    def decode_prior(self, rollouts: Sequence[LevelRollout], noise: Sequence[Array]) -> Array:
        """Frames predicted by level 0's prior one step ahead of the frames that `observe` saw, [B, T, H, W, C]."""
        prior, deter = rollouts[0].prior, rollouts[0].deter
        stoch = prior.mean if self.config.cell_mean_only else prior.mean + prior.stddev * noise[0]
        return self.decoder(jnp.concatenate([stoch, deter], -1))

    def predict_by_level(self, context: Array, frames: int, noise: Sequence[Array], use_obs: str) -> Array:
        """Open-loop prediction, one level after the other, from any number of context frames (Section 3.6).

        A level that sees the context follows its posterior in the ticks that end within the context, and its prior from
        there on; a blind one follows its prior all the time. From a multiple of k**(L-1) frames this is `open_loop`.
        All frames are computed at once: for a few sequences.

        Args:
            context: [B, T, H, W, C].
            frames: to predict after the context.
            noise: of `draw_noise` for T + frames frames.
            use_obs: see `observe`.

        Returns:
            The context's reconstruction and the prediction, [B, T + frames, H, W, C], not clipped.
        """
        c = self.config
        B, T = context.shape[:2]
        features, reset = self.encoder(floats(context)), reset_masks(c, T + frames)
        above: Array | None = None
        for level in range(c.levels - 1, -1, -1):
            seen = T // c.tmp_abs_factor**level if use_obs[level] == "T" else 0
            state, outputs = self.initial_state(B).levels[level], []
            for span, sight in (slice(seen), features[level][:, :seen]), (slice(seen, None), None):
                if noise[level][:, span].shape[1]:
                    given = None if above is None else above[:, span]
                    rollout, state = self.cells[level](state, given, sight, noise[level][:, span], reset[level][span])
                    outputs.append(rollout.output)
            output = jnp.concatenate(outputs, axis=1)
            above = jnp.repeat(output, c.tmp_abs_factor, axis=1)[:, : noise[level - 1].shape[1]]
        return self.decoder(output)

    def _unroll(
        self,
        frames: int,
        features: Sequence[Array | None],
        noise: Sequence[Array],
        state: State | None,
        actions: Array | None,
        reset: Sequence[Array] | None,
    ) -> tuple[tuple[LevelRollout, ...], State]:
        """Unrolls the levels from the top down; each level's output is the context of the k ticks below."""
        c = self.config
        if state is None:
            state = self.initial_state(noise[0].shape[0])
        if not state.between_ticks:
            block = c.tmp_abs_factor ** (c.levels - 1)
            raise ValueError(
                f"state: was left within a tick; only after a multiple of {block} frames can more frames follow"
            )
        reset = reset_masks(c, frames) if reset is None else reset
        rollouts: list[LevelRollout] = []
        states: list[LevelState] = []
        context = None
        for level in range(c.levels - 1, -1, -1):
            T = ticks(c, frames)[level]
            assert noise[level].shape[1] == T, (level, noise[level].shape, T)
            if level == 0 and self.action_size:
                if actions is None:
                    raise ValueError(f"actions: this model needs [B, T, {self.action_size}], got None")
                if context is None:
                    context = jnp.zeros((noise[0].shape[0], T, c.cell_stoch_size + c.cell_deter_size))
                context = jnp.concatenate([context[:, :T], actions], -1)
            context = None if context is None else context[:, :T]
            rollout, last = self.cells[level](state.levels[level], context, features[level], noise[level], reset[level])
            context = jnp.repeat(rollout.output, c.tmp_abs_factor, axis=1)
            rollouts.insert(0, rollout)
            states.insert(0, last)
        return tuple(rollouts), State(tuple(states), frames % c.tmp_abs_factor ** (c.levels - 1) == 0)

    def initial_state(self, batch: int) -> State:
        """Zeros at every level."""
        c = self.config
        zeros = LevelState(jnp.zeros((batch, c.cell_stoch_size)), jnp.zeros((batch, c.cell_deter_size)))
        return State((zeros,) * c.levels)

    def elbo(
        self,
        video: Array,
        noise: Sequence[Array],
        actions: Array | None = None,
        state: State | None = None,
        reset: Sequence[Array] | None = None,
    ) -> dict[str, Any]:
        """The terms of the evidence lower bound (Equation 5) in nats, summed over time, not over levels and sequences.

        Arguments are as in `observe`.

        Returns:
            nll [B]: -sum_t ln Normal(x_t; decode(s_t^0), dec_stddev), summed over pixels.
            kl [L, B]: sum_t KL[q_t^l || p_t^l].
            kl_prior, kl_posterior [L, B]: the same values; gradients reach only the prior, only the posterior.
            entropy_prior, entropy_posterior [L, B].
            state: at the end.
        """
        c = self.config
        video = floats(video)
        rollouts, state = self.observe(video, noise, state, actions, reset=reset)
        error = (video - self.decode(rollouts)) / c.dec_stddev
        pixels = math.prod(video.shape[1:])
        nll = 0.5 * (error**2).sum((1, 2, 3, 4)) + pixels * (math.log(c.dec_stddev) + 0.5 * math.log(2 * math.pi))

        def per_level(term: Callable[[Gaussian, Gaussian], Array]) -> Array:
            return jnp.stack([term(rollout.posterior, rollout.prior).sum(1) for rollout in rollouts])

        stop = jax.lax.stop_gradient
        return {
            "nll": nll,
            "kl": per_level(kl_divergence),
            "kl_prior": per_level(lambda q, p: kl_divergence(stop(q), p)),
            "kl_posterior": per_level(lambda q, p: kl_divergence(q, stop(p))),
            "entropy_prior": per_level(lambda q, p: entropy(p)),
            "entropy_posterior": per_level(lambda q, p: entropy(q)),
            "state": state,
        }


def floats(video: Array) -> Array:
    """Frames as floats in [0, 1]: uint8 is divided by 255, floats are left alone."""
    return video / jnp.float32(255) if video.dtype == jnp.uint8 else video


# ---------------------------------------------------------------------------------------------- objective


def objective(
    config: Config, terms: dict[str, Array], weight: Array, frames: int, axis: str | None = None
) -> tuple[Array, dict]:
    """The training loss, nll + sum_l kl_l, per frame and averaged over the batch; with the official code's options:

        kl_grad_post_perc p:  kl_l <- (1 - p) KL[stop(q) || p] + max(1, p KL[q || stop(p)])
        free_nats f:          kl_l <- max(0, kl_l - f)
        beta:                 kl_l <- beta_l kl_l

    Args:
        config: for these options.
        terms: of `CWVAE.elbo`.
        weight: [B], 1 for a sequence that counts and 0 for padding.
        frames: T, which everything is divided by.
        axis: name of the mapped axis over whose devices the batch is spread, if any.

    Returns:
        This device's share of the loss (the loss is the sum over the devices, and so for gradients), and likewise of
        the metrics.
    """
    c = config
    total = partial(jax.lax.psum, axis_name=axis) if axis else lambda x: x
    weight = weight / total(weight.sum())
    devices = total(jnp.ones(()))

    def clamped(share: Array, floor: float) -> Array:
        """This device's share of max(floor, the sum of all shares)."""
        return jnp.where(total(jax.lax.stop_gradient(share)) > floor, share, floor / devices)

    mean = {name: (x * weight).sum(-1) for name, x in terms.items() if name != "state"}  # [] or [L]
    kl = mean["kl"]
    if c.kl_grad_post_perc is not None:
        p = c.kl_grad_post_perc
        kl = (1 - p) * mean["kl_prior"] + clamped(p * mean["kl_posterior"], 1.0)
    if c.free_nats is not None:
        kl = clamped(kl, c.free_nats) - c.free_nats / devices
    if c.beta is not None:
        kl = jnp.asarray(c.beta) * kl

    loss = (mean["nll"] + kl.sum()) / frames
    metrics = {"loss": loss, "nll_term": mean["nll"] / frames, "kl_term": kl.sum() / frames}
    for level in range(c.levels):
        metrics |= {
            f"avg_kl_prior_posterior__level_{level}": mean["kl"][level] / frames,
            f"avg_entropy_prior__level_{level}": mean["entropy_prior"][level] / frames,
            f"avg_entropy_posterior__level_{level}": mean["entropy_posterior"][level] / frames,
        }
    return loss, metrics


# ---------------------------------------------------------------------------------------------- long sequences
# In chunks of time, so that memory doesn't grow with the length. Noise is drawn for the whole sequence at once, so that
# results don't depend on the chunks.


def chunk_size(config: Config) -> int:
    """Frames of a chunk: a training sequence's, up to whole ticks of the top level."""
    block = config.tmp_abs_factor ** (config.levels - 1)
    return -(-config.seq_len // block) * block


def part(config: Config, levels: Sequence[Array], start: int, stop: int, axis: int) -> tuple[Array, ...]:
    """Each level's ticks from frame `start` (a multiple of k**(L-1)) to frame `stop`; zeros behind an array's end."""
    parts = []
    for level, x in enumerate(levels):
        first, last = start // config.tmp_abs_factor**level, -(-stop // config.tmp_abs_factor**level)
        x = jax.lax.slice_in_dim(x, first, min(last, x.shape[axis]), axis=axis)
        padding = [(0, last - first - x.shape[axis] if i == axis else 0) for i in range(x.ndim)]
        parts.append(jnp.pad(x, padding))
    return tuple(parts)


def long_elbo(
    model: CWVAE,
    params: Any,
    video: Any,
    keys: Array,
    chunk: int | None = None,
    place: Callable[[Any], Any] = jnp.asarray,
) -> dict[str, Array]:
    """`CWVAE.elbo`'s terms of video [B, T, H, W, C] on the host, with noise from one PRNG key per sequence [B].

    `place` puts a chunk of the video on the devices.
    """
    c = model.config
    T, chunk = video.shape[1], chunk or chunk_size(c)
    noise, reset = draw_noise(c, keys, T), reset_masks(c, T)
    state, total = None, None
    for start in range(0, T, chunk):
        stop = min(start + chunk, T)
        terms = _elbo(
            model,
            params,
            place(video[:, start:stop]),
            part(c, noise, start, stop, 1),
            state,
            part(c, reset, start, stop, 0),
        )
        state = terms.pop("state")
        total = terms if total is None else jax.tree.map(jnp.add, total, terms)
    assert total is not None
    return total


def posterior(
    model: CWVAE,
    params: Any,
    video: Any,
    keys: Array,
    use_obs: str | None = None,
    chunk: int | None = None,
    place: Callable[[Any], Any] = jnp.asarray,
) -> Iterator[tuple[LevelRollout, ...]]:
    """Infers the states behind all frames of a video; arguments as in `open_loop`, which draws the same noise.

    Yields:
        Each level's rollout over the ticks of a chunk.
    """
    c = model.config
    T, chunk = video.shape[1], chunk or chunk_size(c)
    noise, reset = draw_noise(c, keys, T), reset_masks(c, T)
    state = None
    for start in range(0, T, chunk):
        stop = min(start + chunk, T)
        parts = part(c, noise, start, stop, 1), state, part(c, reset, start, stop, 0)
        rollouts, state = _infer(model, params, place(video[:, start:stop]), *parts, use_obs)
        yield rollouts


def open_loop(
    model: CWVAE,
    params: Any,
    video: Any,
    keys: Array,
    frames: int,
    use_obs: str | None = None,
    chunk: int | None = None,
    place: Callable[[Any], Any] = jnp.asarray,
) -> Iterator[tuple[str, Array]]:
    """Predicts from context frames: filters them, then follows the prior at all levels (the paper's section 3).

    Args:
        model: the model.
        params: its parameters.
        video: the context, [B, T, H, W, C]; T a multiple of k**(L-1). Nothing else of a video enters here.
        keys: one PRNG key per sequence [B].
        frames: to predict after the context.
        use_obs: the levels that see the context, see `CWVAE.observe`.
        chunk: frames predicted at a time, a multiple of k**(L-1).
        place: puts the context on the devices.

    Yields:
        ("posterior_recon", [B, T, H, W, C]): the context's reconstruction,
        ("prior_onestep", [B, T, H, W, C]): the context's frames, each predicted from those before it by level 0's
        prior, ("prior_multistep", [B, <= chunk, H, W, C]) until all `frames` are predicted. Means, not clipped to [0,
        1].

    Raises:
        ValueError: the context isn't a multiple of k**(L-1) frames.
    """
    c = model.config
    context, chunk = video.shape[1], chunk or chunk_size(c)
    noise, reset = draw_noise(c, keys, context + frames), reset_masks(c, frames)
    recon, onestep, state = _observe(model, params, place(video), part(c, noise, 0, context, 1), use_obs)
    yield "posterior_recon", recon
    yield "prior_onestep", onestep
    for start in range(0, frames, chunk):
        stop = start + chunk
        future = part(c, noise, context + start, context + stop, 1)
        prediction, state = _imagine(model, params, chunk, future, state, part(c, reset, start, stop, 0))
        yield "prior_multistep", prediction[:, : frames - start]


@partial(jax.jit, static_argnums=0)
def _elbo(model: Any, params: Any, video: Array, noise: Any, state: State | None, reset: Any) -> dict[str, Any]:
    return model.apply(params, video, noise, state=state, reset=reset, method="elbo")


@partial(jax.jit, static_argnums=(0, 6))
def _infer(
    model: Any, params: Any, video: Array, noise: Any, state: State | None, reset: Any, use_obs: str | None
) -> tuple[tuple[LevelRollout, ...], State]:
    return model.apply(params, video, noise, state, use_obs=use_obs, reset=reset, method="observe")


@partial(jax.jit, static_argnums=0)
def decode(model: Any, params: Any, rollouts: Sequence[LevelRollout]) -> Array:
    """`CWVAE.decode`, compiled."""
    return model.apply(params, rollouts, method="decode")


@partial(jax.jit, static_argnums=(0, 4))
def _observe(model: Any, params: Any, video: Array, noise: Any, use_obs: str | None) -> tuple[Array, Array, State]:
    rollouts, state = model.apply(params, video, noise, use_obs=use_obs, method="observe")
    onestep = model.apply(params, rollouts, noise, method="decode_prior")
    return model.apply(params, rollouts, method="decode"), onestep, state


@partial(jax.jit, static_argnums=(0, 2))
def _imagine(model: Any, params: Any, frames: int, noise: Any, state: State, reset: Any) -> tuple[Array, State]:
    rollouts, state = model.apply(params, frames, noise, state=state, reset=reset, method="imagine")
    return model.apply(params, rollouts, method="decode"), state

"""The interface between models and the programs that train, evaluate or analyse them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import optax
from flax import linen as nn
from jax import Array

from config import Config
from sequences import noise


class Terms(NamedTuple):
    """The terms of the evidence lower bound (Equation 5) in nats, for each level and sequence, summed over time."""

    nll: Array  # [B], -sum_t ln p(x_t | s_t^0)
    kl: Array  # [L, B], sum_t KL[q_t^l || p_t^l]
    kl_prior: Array  # [L, B], the values of kl; gradients reach only the prior
    kl_posterior: Array  # [L, B], the values of kl; gradients reach only the posterior
    entropy_prior: Array  # [L, B]
    entropy_posterior: Array  # [L, B]
    other: Mapping[str, Array] = {}  # KLs that belong to no level, by name, [B] each


class Training(NamedTuple):
    """What a training step passes to the model."""

    step: Array  # [], number of steps before this one
    weight: Array  # [B], 1 for a sequence that counts, 0 for padding
    axis: str  # name of the mapped axis over whose devices the batch is spread


class Model(nn.Module):
    """A model of videos.

    The methods that are implemented here suit a hierarchy of levels like the Clockwork VAE's.

    A long video is computed in chunks of time, each a multiple of `config.block` frames. A call continues from the
    `state` that the call before returned; None is the beginning of a video. Rollouts have one entry per level, with
    prior, posterior, stoch and deter [B, T_l, ...], as in `cwvae.LevelRollout`. Variables other than `params`, such as
    running averages, change only in training.
    """

    config: Config

    @property
    def min_frames(self) -> int:
        """The number of frames that `init` needs: those of one tick of the top level."""
        return self.config.block

    def draw(self, keys: Array, frames: int, context: int = 0, actions: Array | None = None) -> Any:
        """Return all inputs of T frames except the video: noise, and actions if the model takes any.

        Args:
            keys: one PRNG key per sequence [B].
            frames: T.
            context: number of frames, at the beginning, that are observed; the others are imagined.
            actions: [B, T, A], for a model with actions.
        """
        return noise.draw(self.config, keys, frames, context, actions)

    def time_slice(self, inputs: Any, start: int, stop: int) -> Any:
        """Return the inputs of frames `start` to `stop` (exclusive). Inputs that end earlier are padded with zeros."""
        return noise.time_slice(self.config, inputs, start, stop)

    def optimizer(self) -> optax.GradientTransformation:
        """Return the optimizer, which is applied to clipped gradients: Adam with eps 1e-4, as in the official code."""
        return optax.adam(self.config.lr, eps=1e-4)

    def elbo(self, video: Array, inputs: Any, state: Any = None, training: Training | None = None) -> tuple[Terms, Any]:
        """Return the terms of the evidence lower bound for a video [B, T, H, W, C], and the state after it."""
        raise NotImplementedError

    def observe(self, video: Array, inputs: Any, state: Any = None, use_obs: str | None = None) -> tuple[Any, Any]:
        """Infer the states from frames. Return rollouts, and the state after the last frame."""
        raise NotImplementedError

    def imagine(self, inputs: Any, state: Any) -> tuple[Any, Any]:
        """Predict the states of as many frames as the inputs are for. Return rollouts, and the last state."""
        raise NotImplementedError

    def decode(self, rollouts: Any) -> Array:
        """Return the means of the frames [B, T, H, W, C]."""
        raise NotImplementedError

    def __call__(self, *arguments: Any, **keywords: Any) -> tuple[Terms, Any]:
        """Call `elbo`."""
        return self.elbo(*arguments, **keywords)

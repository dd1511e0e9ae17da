"""The interface between models and everything that trains, evaluates or analyses them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import optax
from flax import linen as nn
from jax import Array

from config import Config
from sequences import noise


class Terms(NamedTuple):
    """Terms of the evidence lower bound in nats, summed over time, not over levels and sequences."""

    nll: Array  # [B], -sum_t ln p(x_t | s_t^0)
    kl: Array  # [L, B], sum_t KL[q_t^l || p_t^l]
    kl_prior: Array  # the same values; gradients reach only the prior
    kl_posterior: Array  # the same values; gradients reach only the posterior
    entropy_prior: Array  # [L, B]
    entropy_posterior: Array  # [L, B]
    other: Mapping[str, Array] = {}  # further KLs that belong to no level, by name, [B] each


class Training(NamedTuple):
    """What a training step tells the model that it trains."""

    step: Array  # []
    weight: Array  # [B], 0 for sequences that are padding
    axis: str  # the mapped axis over whose devices the batch is spread


class Model(nn.Module):
    """A model of videos. What isn't abstract suits a hierarchy like the Clockwork VAE's.

    Long videos are computed in chunks of time, each a multiple of `config.block` frames: a call continues from the
    `state` that the call before returned (None: at the beginning of a video). Rollouts are a sequence with an entry
    per level, each with prior, posterior, stoch and deter [B, T_l, ...] as in `cwvae.LevelRollout`. Variables other
    than `params` change in training only.
    """

    config: Config

    @property
    def min_frames(self) -> int:
        """The number of frames that `init` needs: a tick of the top level."""
        return self.config.block

    def draw(self, keys: Array, frames: int, context: int = 0, actions: Array | None = None) -> Any:
        """Return the inputs of `frames` frames besides the video: noise and actions.

        Args:
            keys: one PRNG key per sequence [B].
            frames: T.
            context: the number of frames that are observed; the others are imagined.
            actions: [B, T, A], for a model with actions.
        """
        return noise.draw(self.config, keys, frames, context, actions)

    def time_slice(self, inputs: Any, start: int, stop: int) -> Any:
        """Return the inputs of frames `start` to `stop`, with zeros after the end."""
        return noise.time_slice(self.config, inputs, start, stop)

    def optimizer(self) -> optax.GradientTransformation:
        """Return the optimizer, applied after clipping: Adam with eps 1e-4, as in the official code."""
        return optax.adam(self.config.lr, eps=1e-4)

    def elbo(self, video: Array, inputs: Any, state: Any = None, training: Training | None = None) -> tuple[Terms, Any]:
        """Return the terms of the evidence lower bound for video [B, T, H, W, C], and the state."""
        raise NotImplementedError

    def observe(self, video: Array, inputs: Any, state: Any = None, use_obs: str | None = None) -> tuple[Any, Any]:
        """Infer states from frames; return rollouts and the state."""
        raise NotImplementedError

    def imagine(self, inputs: Any, state: Any) -> tuple[Any, Any]:
        """Predict as many frames as the inputs are for; return rollouts and the state."""
        raise NotImplementedError

    def decode(self, rollouts: Any) -> Array:
        """Return the frames' means [B, T, H, W, C]."""
        raise NotImplementedError

    def __call__(self, *arguments: Any, **keywords: Any) -> tuple[Terms, Any]:
        """As `elbo`."""
        return self.elbo(*arguments, **keywords)

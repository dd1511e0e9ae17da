"""The models that can be trained, and the face by which the programs know them."""

from collections.abc import Callable
from typing import Any, Protocol

import optax
from jax import Array

from baselines.svg import SVG
from baselines.vta import VTA
from config import Config
from cwvae import CWVAE, Terms, Training


class Model(Protocol):
    """A Flax module made of a configuration.

    Long videos are computed in chunks of time, each a multiple of `config.block` frames: a call continues where
    `state` was left (None: at the beginning of a video). Rollouts have a part for each level, with prior, posterior,
    stoch and deter [B, T_l, ...] as `cwvae.LevelRollout`. Variables besides `params` change in training only.
    """

    @property
    def config(self) -> Config: ...

    @property
    def shortest(self) -> int:
        """The frames that `init` needs."""

    def draw(self, keys: Array, frames: int, context: int = 0, actions: Any = None) -> Any:
        """Return the noise of so many frames, from one PRNG key per sequence [B], and their actions [B, T, A], if any;
        the first `context` frames are observed."""

    def part(self, inputs: Any, start: int, stop: int) -> Any:
        """Return what belongs to the frames from `start` to `stop`, with zeros behind the end."""

    def optimizer(self) -> optax.GradientTransformation:
        """Return what trains the model, behind clipping."""
        ...

    def elbo(self, video: Array, inputs: Any, state: Any = None, training: Training | None = None) -> tuple[Terms, Any]:
        """Return the terms of the evidence lower bound for video [B, T, H, W, C], and the state."""
        ...

    def observe(self, video: Array, inputs: Any, state: Any = None, use_obs: str | None = None) -> tuple[Any, Any]:
        """Infer states from frames; return rollouts and the state."""
        ...

    def imagine(self, inputs: Any, state: Any) -> tuple[Any, Any]:
        """Predict as many frames as the inputs are for; return rollouts and the state."""
        ...

    def decode(self, rollouts: Any) -> Array:
        """Return the frames' means [B, T, H, W, C]."""
        ...

    @property
    def init(self) -> Any:
        """Flax's, for `elbo`."""

    @property
    def apply(self) -> Any:
        """Flax's, for `elbo` unless a method is named."""


def make_model(config: Config) -> Model:
    """Return the model that `config.model` names."""
    models: dict[str, Callable[[Config], Model]] = {"cwvae": CWVAE, "svg": SVG, "vta": VTA}
    return models[config.model](config)

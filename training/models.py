"""The models that can be trained."""

from collections.abc import Callable

from baselines.svg import SVG
from baselines.vta import VTA
from config import Config
from cwvae import CWVAE
from sequences.interface import Model


def make_model(config: Config) -> Model:
    """Return the model of a configuration."""
    models: dict[str, Callable[[Config], Model]] = {"cwvae": CWVAE, "svg": SVG, "vta": VTA}
    return models[config.model](config)

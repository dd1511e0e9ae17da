"""The one switch between the forms that are fast on CPUs and those that are fast on accelerators."""

import jax


def on_cpu() -> bool:
    """Return whether the model runs on a CPU."""
    return jax.default_backend() == "cpu"

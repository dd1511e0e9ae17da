"""The one switch between the forms that are fast on CPUs and those that are fast on accelerators."""

import jax


def on_cpu() -> bool:
    return jax.default_backend() == "cpu"

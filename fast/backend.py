"""Which of the fast forms count here."""

import jax


def on_cpu() -> bool:
    """Whether the model runs on a CPU, where other forms are fast than on accelerators."""
    return jax.default_backend() == "cpu"

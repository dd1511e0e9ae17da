"""The switch between the forms that are fast on CPUs and those that are fast on accelerators."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax

exporting: ContextVar[bool] = ContextVar("exporting", default=False)


def on_cpu() -> bool:
    """Return whether the model runs on CPUs only."""
    return jax.default_backend() == "cpu" and not exporting.get()


@contextmanager
def any_backend() -> Iterator[None]:
    """Trace the code inside for all backends: in the accelerators' forms, since the CPU's need the number of frames."""
    token = exporting.set(True)
    try:
        yield
    finally:
        exporting.reset(token)

"""Initial parameters, drawn by NumPy: XLA would compile a program for each, which took longer than all else at a start.

The initialisers are Flax's in form and distribution. Wherever Flax calls them, they draw from the key that it hands
them. `init` calls them all without computing anything else of the model.
"""

import math
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import jax
import numpy as np
from jax import Array
from threadpoolctl import threadpool_limits

Shape = tuple[int, ...]
Initializer = Callable[[Any, Shape], Any]
Draw = Callable[[np.random.Generator, Shape], np.ndarray]

undrawn: ContextVar[dict[int, tuple[np.ndarray, Draw]] | None] = ContextVar("undrawn", default=None)
"""Within `init`, the arrays that initialisers returned, by id, and what will fill them."""


def init(model: Any, key: Array, *arguments: Any, draw: bool = True) -> dict[str, Any]:
    """Return the variables of `model.init` for arguments of these shapes, as NumPy arrays.

    The model is only traced. What its initialisers left open is drawn then, in the order of the tree, unless only the
    shapes are wanted: without `draw` it is zeros.
    """
    variables: dict[str, Any] = {}
    draws: dict[int, tuple[np.ndarray, Draw]] = {}
    token = undrawn.set(draws)
    try:
        jax.eval_shape(lambda *arguments: variables.update(model.init(key, *arguments)), *arguments)
    finally:
        undrawn.reset(token)
    if not draw:
        return variables
    random = generator(jax.random.key_data(key))
    for array in jax.tree.leaves(variables):
        if id(array) in draws:
            _, values = draws[id(array)]
            array[...] = values(random, array.shape)
    return variables


def drawn(draw: Draw) -> Initializer:
    """Return an initialiser of the values draw(generator, shape)."""

    def initializer(key: Array, shape: Shape) -> Any:
        dtype = jax.dtypes.canonicalize_dtype(float)
        if (draws := undrawn.get()) is not None:
            array = np.zeros(shape, dtype)
            draws[id(array)] = array, draw
            return array
        result = jax.ShapeDtypeStruct(shape, dtype)
        return jax.pure_callback(
            lambda key: draw(generator(key), shape).astype(dtype), result, jax.random.key_data(key)
        )

    return initializer


def generator(key_data: Any) -> np.random.Generator:
    """Return NumPy's generator of what a key holds."""
    return np.random.default_rng(np.asarray(key_data))


def constant(value: float) -> Initializer:
    """Return the initialiser of a constant."""
    return lambda key, shape: np.full(shape, value, jax.dtypes.canonicalize_dtype(float))


zeros, ones = constant(0.0), constant(1.0)


def normal(stddev: float, mean: float = 0.0) -> Initializer:
    """Return the initialiser of a normal distribution."""
    return drawn(lambda random, shape: mean + stddev * random.standard_normal(shape, np.float32))


def uniform(bound: float) -> Initializer:
    """Return the initialiser of a uniform distribution between -bound and bound."""
    return drawn(lambda random, shape: random.uniform(-bound, bound, shape))


@drawn
def lecun_normal(random: np.random.Generator, shape: Shape) -> np.ndarray:
    """Draw from a normal distribution, cut at two standard deviations, whose variance is one over a kernel's inputs."""
    x = random.standard_normal(shape, np.float32)
    while (beyond := np.abs(x) > 2).any():
        x[beyond] = random.standard_normal(beyond.sum(), np.float32)
    stddev = 0.87962566103423978  # of the cut distribution
    return x / (stddev * math.sqrt(math.prod(shape[:-1])))


@drawn
def orthogonal(random: np.random.Generator, shape: Shape) -> np.ndarray:
    """Draw [D, n D], n orthogonal matrices side by side, uniformly."""
    D, columns = shape
    # A single thread, so that results don't depend on their number. On busy cores it is faster, too.
    with threadpool_limits(1, "blas"):
        q, r = np.linalg.qr(random.standard_normal((columns // D, D, D)))
    q = q * np.sign(np.diagonal(r, axis1=1, axis2=2))[:, None]
    return q.transpose(1, 0, 2).reshape(shape)

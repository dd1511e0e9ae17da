"""Initial parameters, drawn by NumPy. With XLA, compiling the initialisers took longer than the rest of a start.

The initialisers have the signature and distributions of Flax's. When Flax calls one, it draws from the key that Flax
passes. `init` calls all initialisers of a model and computes nothing else of it.
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

pending_draws: ContextVar[dict[int, tuple[np.ndarray, Draw]] | None] = ContextVar("pending_draws", default=None)
"""Within `init`: the arrays that initialisers returned, by id, each with the function that fills it."""


def init(model: Any, key: Array, *arguments: Any, draw: bool = True) -> dict[str, Any]:
    """Return the variables of `model.init` for arguments of these shapes, as NumPy arrays.

    The model is only traced, and random initialisers return arrays of zeros. Then these are filled, in the order of the
    tree. With draw=False they stay zeros, for callers that only need the shapes.
    """
    variables: dict[str, Any] = {}
    draws: dict[int, tuple[np.ndarray, Draw]] = {}
    token = pending_draws.set(draws)
    try:
        jax.eval_shape(lambda *arguments: variables.update(model.init(key, *arguments)), *arguments)
    finally:
        pending_draws.reset(token)
    if not draw:
        return variables
    random = generator(jax.random.key_data(key))
    for array in jax.tree.leaves(variables):
        if id(array) in draws:
            _, values = draws[id(array)]
            array[...] = values(random, array.shape)
    return variables


def initializer(draw: Draw) -> Initializer:
    """Return an initialiser whose values are draw(generator, shape)."""

    def initialize(key: Array, shape: Shape) -> Any:
        dtype = jax.dtypes.canonicalize_dtype(float)
        if (draws := pending_draws.get()) is not None:
            array = np.zeros(shape, dtype)
            draws[id(array)] = array, draw
            return array
        result = jax.ShapeDtypeStruct(shape, dtype)
        return jax.pure_callback(
            lambda key: draw(generator(key), shape).astype(dtype), result, jax.random.key_data(key)
        )

    return initialize


def generator(key_data: Any) -> np.random.Generator:
    """Return a NumPy generator seeded with a PRNG key's data."""
    return np.random.default_rng(np.asarray(key_data))


def constant(value: float) -> Initializer:
    """Return an initialiser to a constant."""
    return lambda key, shape: np.full(shape, value, jax.dtypes.canonicalize_dtype(float))


zeros, ones = constant(0.0), constant(1.0)


def normal(stddev: float, mean: float = 0.0) -> Initializer:
    """Return an initialiser from a normal distribution."""
    return initializer(lambda random, shape: mean + stddev * random.standard_normal(shape, np.float32))


def uniform(bound: float) -> Initializer:
    """Return an initialiser from the uniform distribution between -bound and bound."""
    return initializer(lambda random, shape: random.uniform(-bound, bound, shape))


@initializer
def lecun_normal(random: np.random.Generator, shape: Shape) -> np.ndarray:
    """Draw from a normal distribution, truncated at two standard deviations, with variance 1 / (number of inputs)."""
    x = random.standard_normal(shape, np.float32)
    while (beyond := np.abs(x) > 2).any():
        x[beyond] = random.standard_normal(beyond.sum(), np.float32)
    stddev = 0.87962566103423978  # of the truncated distribution
    return x / (stddev * math.sqrt(math.prod(shape[:-1])))


@initializer
def orthogonal(random: np.random.Generator, shape: Shape) -> np.ndarray:
    """Draw n orthogonal matrices side by side, [D, n D], uniformly."""
    D, columns = shape
    # With one thread, results don't depend on the number of threads. On busy cores it is also faster.
    with threadpool_limits(1, "blas"):
        q, r = np.linalg.qr(random.standard_normal((columns // D, D, D)))
    q = q * np.sign(np.diagonal(r, axis1=1, axis2=2))[:, None]
    return q.transpose(1, 0, 2).reshape(shape)

"""Convolutions of stride 1 with fewer multiplications, by the Toom-Cook algorithm.

In one dimension, a tile of t values of y times a kernel of t taps is a product of polynomials. It has n = 2 t - 1
coefficients, which follow from its values at n points. Each value takes one multiplication: n in all, instead of t**2.

    spread            x = C [(A y) * (G kernel)]       A and G evaluate polynomials, C interpolates
    convolve          y = A^T [(C^T x) * (G kernel)]   the derivative of <x, spread(y, kernel)> with respect to y
    kernel_gradient   (C^T x) * (A y)                  the derivative of the same with respect to G kernel

In two dimensions, this is done for rows and then for columns: 9 multiplications instead of 16 with 2 taps, 25 instead
of 81 with 3. At each point, one matmul computes the products of all tiles and channels. Larger tiles would need points
that cost precision.

Winograd 1980, "Arithmetic complexity of computations"; Lavin and Gray 2016, https://arxiv.org/abs/1509.09308.
"""

from collections.abc import Sequence
from functools import cache, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Points = list[list[Array]]
"""An array for each point of the rows and of the columns: of tiles [N, rows, columns, channels] or a kernel [I, O]."""


@cache
def matrices(taps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return A [n, taps], G [n, taps] and C [n, n] for the points infinity and the first n - 1 of 0, 1, -1, 2."""
    n = 2 * taps - 1

    def evaluate(count: int) -> np.ndarray:
        infinity = np.eye(count)[-1:]  # the value there is the highest coefficient
        return np.concatenate([np.vander([0, 1, -1, 2][: n - 1], count, increasing=True), infinity])

    C = np.linalg.inv(evaluate(n))
    scale = np.array([1 / np.abs(column[np.abs(column) > 1e-9]).min() for column in C.T])  # makes A and C whole numbers
    return evaluate(taps), evaluate(taps) / scale[:, None], np.round(C * scale)


def evaluate_kernel(kernel: Array) -> Points:
    """Return the values of a kernel [taps, taps, I, O] at all n x n points, [I, O] each."""
    G = matrices(kernel.shape[0])[1]
    return [combine(G, unstack(row)) for row in combine(G, unstack(kernel))]


@jax.custom_vjp
def convolve(x: Array, kernel: Points) -> Array:
    """Return the sums over a, b of x[i + a, j + b] @ kernel[a, b]: [N, H, W, I] -> [N, H - taps + 1, ., O]."""
    taps = len(kernel) // 2 + 1
    extents = [extent - taps + 1 for extent in x.shape[1:3]]
    products = multiply(tiles_of_x(x, taps), kernel)
    y = add_tiles(products, matrices(taps)[0].T, taps)
    return y[:, : extents[0], : extents[1]]


@jax.custom_vjp
def spread(y: Array, kernel: Points) -> Array:
    """Return x with x[i + a, j + b] += y[i, j] @ kernel[a, b].T: [N, H, W, O] -> [N, H + taps - 1, ., I]."""
    taps = len(kernel) // 2 + 1
    extents = [extent + taps - 1 for extent in y.shape[1:3]]
    products = multiply(tiles_of_y(y, taps), [[k.T for k in row] for row in kernel])
    x = add_tiles(products, matrices(taps)[2], taps)
    return x[:, : extents[0], : extents[1]]


def kernel_gradient(x: Array, y: Array) -> Points:
    """Return the gradient of the kernel's values at all points."""
    taps = x.shape[1] - y.shape[1] + 1
    pairs = zip(tiles_of_x(x, taps), tiles_of_y(y, taps), strict=True)
    return [[flat(a).T @ flat(b) for a, b in zip(*rows, strict=True)] for rows in pairs]


def convolve_backward(operands: tuple[Array, Points], gradient: Array) -> tuple[Array, Points]:
    x, kernel = operands
    # Both need the same tiles of the gradient; XLA computes them once.
    return spread(gradient, kernel), kernel_gradient(x, gradient)


def spread_backward(operands: tuple[Array, Points], gradient: Array) -> tuple[Array, Points]:
    y, kernel = operands
    return convolve(gradient, kernel), kernel_gradient(gradient, y)


convolve.defvjp(lambda x, kernel: (convolve(x, kernel), (x, kernel)), convolve_backward)
spread.defvjp(lambda y, kernel: (spread(y, kernel), (y, kernel)), spread_backward)


# ---------------------------------------------------------------------------------------------- tiles


def tiles_of_x(x: Array, taps: int) -> Points:
    return cut_tiles(x, matrices(taps)[2].T, taps, [-(-(extent - taps + 1) // taps) for extent in x.shape[1:3]])


def tiles_of_y(y: Array, taps: int) -> Points:
    return cut_tiles(y, matrices(taps)[0], taps, [-(-extent // taps) for extent in y.shape[1:3]])


def cut_tiles(x: Array, matrix: np.ndarray, step: int, counts: Sequence[int]) -> Points:
    """Return matrix @ tile @ matrix.T for all tiles of x. A tile begins every `step` pixels."""
    length = matrix.shape[1]
    padding = [(0, max(0, step * (count - 1) + length - n)) for count, n in zip(counts, x.shape[1:3], strict=True)]
    x = jax.lax.optimization_barrier(jnp.pad(x, ((0, 0), *padding, (0, 0))))  # padded once, not once for each point

    def along(axis: int, x: Array) -> list[Array]:
        last = step * (counts[axis - 1] - 1) + 1
        return combine(matrix, [jax.lax.slice_in_dim(x, a, a + last, step, axis) for a in range(length)])

    return [along(2, row) for row in along(1, x)]


def add_tiles(tiles: Points, matrix: np.ndarray, step: int) -> Array:
    """Return the image that all matrix @ tile @ matrix.T add up to. A tile begins every `step` pixels."""

    def along(axis: int, parts: list[Array]) -> Array:
        parts = combine(matrix, parts)
        blocks = -(-len(parts) // step)
        parts += [jnp.zeros_like(parts[0])] * (blocks * step - len(parts))
        x: Any = 0
        for block in range(blocks):
            side_by_side = jnp.stack(parts[block * step : (block + 1) * step], axis + 1)
            pixels = side_by_side.reshape(*parts[0].shape[:axis], -1, *parts[0].shape[axis + 1 :])
            padding = [(0, 0)] * 4
            padding[axis] = (block * step, (blocks - 1 - block) * step)
            x += jnp.pad(pixels, padding)
        return x

    return along(1, [along(2, row) for row in tiles])


def multiply(tiles: Points, kernel: Points) -> Points:
    def product(tile: Array, kernel: Array) -> Array:
        return (flat(tile) @ kernel).reshape(*tile.shape[:-1], -1)

    return [[product(*pair) for pair in zip(*rows, strict=True)] for rows in zip(tiles, kernel, strict=True)]


def combine(matrix: np.ndarray, parts: Sequence[Array]) -> list[Array]:
    """Return the product of the matrix and the vector of the parts."""

    def scaled(factor: float, part: Array) -> Array:
        return part if factor == 1 else part * jnp.asarray(factor, part.dtype)

    rows = [[scaled(*pair) for pair in zip(row, parts, strict=True) if pair[0]] for row in matrix]
    return [reduce(jnp.add, terms) for terms in rows]


def unstack(x: Array) -> list[Array]:
    """Return x[0], x[1], ... Their gradients are concatenated; indexing would pad each with zeros and add them up."""
    return [part[0] for part in jax.lax.split(x, [1] * len(x))]


def flat(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])

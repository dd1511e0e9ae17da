"""Convolutions of stride 2 without padding in the forms that are fastest on the backend, and frames in chunks.

A large image x [N, H, W, C] and a small one y [N, H', W', O] belong to a kernel [size, size, C, O]. What `conv` and
`conv_transpose` and their gradients compute are three sums, for all pixels (i, j) of y and all (a, b) of the kernel:

    gather    y[i, j] = sum over a, b of x[2 i + a, 2 j + b] @ kernel[a, b]
    scatter   x[2 i + a, 2 j + b] += y[i, j] @ kernel[a, b].T
    weights   kernel[a, b] = sum over i, j of x[2 i + a, 2 j + b].T @ y[i, j]

On accelerators XLA finds them by itself. On CPUs its gather is fast, but its scatter is slow, and what it derives
from these two for the gradients is tens of times slower in places. So there each sum has a form of its own.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fast.backend import on_cpu

CHUNK = 800
"""Frames times channels (of the largest layer's output) that go through the convolutions together on a CPU."""

FEW = 4
"""Up to so many channels of the large image, `weights` takes patches of it."""

LAYOUT = ("NHWC", "HWIO", "NHWC")


# ---------------------------------------------------------------------------------------------- layers


def conv(x: Array, kernel: Array) -> Array:
    """[N, H, W, C] with kernel [size, size, C, O] -> [N, (H - size) // 2 + 1, ., O]."""
    return gather_with_gradients(x, kernel) if on_cpu() else gather(x, kernel)


def conv_transpose(x: Array, kernel: Array) -> Array:
    """[N, H, W, C] with kernel [size, size, C, O] -> [N, 2 (H - 1) + size, ., O]. On one pixel, a Dense layer."""
    N, H, W, C = x.shape
    size, outputs = kernel.shape[0], kernel.shape[-1]
    if H == W == 1:
        return (x.reshape(N, C) @ kernel.transpose(2, 0, 1, 3).reshape(C, -1)).reshape(N, size, size, outputs)
    return scatter_with_gradients(x, kernel) if on_cpu() else dilated(x, kernel)


@jax.custom_vjp
def gather_with_gradients(x: Array, kernel: Array) -> Array:
    return gather(x, kernel)


def gather_gradients(operands: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = operands
    dx = scatter(gradient, kernel.swapaxes(2, 3))
    unread = [(0, n - m) for n, m in zip(x.shape, dx.shape, strict=True)]  # a last row and column, if the extent is odd
    return jnp.pad(dx, unread), weights(x, gradient, kernel.shape[0])


gather_with_gradients.defvjp(lambda x, kernel: (gather(x, kernel), (x, kernel)), gather_gradients)


@jax.custom_vjp
def scatter_with_gradients(x: Array, kernel: Array) -> Array:
    return scatter(x, kernel)


def scatter_gradients(operands: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = operands
    return gather(gradient, kernel.swapaxes(2, 3)), weights(gradient, x, kernel.shape[0]).swapaxes(2, 3)


scatter_with_gradients.defvjp(lambda x, kernel: (scatter(x, kernel), (x, kernel)), scatter_gradients)


# ---------------------------------------------------------------------------------------------- the three sums


def gather(x: Array, kernel: Array) -> Array:
    """Gather by XLA's convolution of stride 2."""
    return jax.lax.conv_general_dilated(x, kernel, (2, 2), "VALID", dimension_numbers=LAYOUT)


def dilated(x: Array, kernel: Array) -> Array:
    """Scatter by XLA's convolution of an image with zeros between its pixels, the kernel the other way round."""
    padding = [(kernel.shape[0] - 1,) * 2] * 2
    return jax.lax.conv_general_dilated(
        x, kernel[::-1, ::-1], (1, 1), padding, lhs_dilation=(2, 2), dimension_numbers=LAYOUT
    )


def scatter(x: Array, kernel: Array) -> Array:
    """Scatter [N, H, W, C] with kernel [size, size, C, O] on a CPU.

    For an even size, a convolution of stride 1 makes 2x2 pixels of the output at each place (sub-pixels): no zero
    is multiplied. An odd size would need a kernel padded with zeros, which costs as much.
    """
    N, H, W, C = x.shape
    size, outputs = kernel.shape[0], kernel.shape[-1]
    if size % 2:
        return dilated(x, kernel)
    taps = size // 2
    kernel = kernel.reshape(taps, 2, taps, 2, C, outputs)[::-1, :, ::-1]
    kernel = kernel.transpose(0, 2, 4, 1, 3, 5).reshape(taps, taps, C, 4 * outputs)
    y = jax.lax.conv_general_dilated(x, kernel, (1, 1), [(taps - 1,) * 2] * 2, dimension_numbers=LAYOUT)
    H, W = y.shape[1:3]
    return y.reshape(N, H, W, 2, 2, outputs).transpose(0, 1, 3, 2, 4, 5).reshape(N, 2 * H, 2 * W, outputs)


def weights(x: Array, y: Array, size: int) -> Array:
    """Return the kernel's gradient [size, size, C, O] from x [N, H, W, C] and y [N, H', W', O] on a CPU.

    In matmuls over all pixels. With patches of x it is one, but they are size**2 / 4 times as large as x, and copying
    them takes longer than multiplying. So pairs of x's pixels become channels (stride 2 is then stride 1, with half as
    many taps each way), the taps of a row are shifts of the smaller y, side by side, and each row of taps is a matmul
    of its own. Patches remain if x has few channels, and for odd sizes, which have no pairs.
    """
    N, H, W, O = y.shape  # noqa: E741
    C, taps = x.shape[-1], size // 2
    if size % 2:
        patches = [x[:, a : a + 2 * H - 1 : 2, b : b + 2 * W - 1 : 2] for a in range(size) for b in range(size)]
        kernel = y.reshape(-1, O).T @ jnp.concatenate(patches, axis=-1).reshape(-1, size * size * C)
        return kernel.T.reshape(size, size, C, O)
    rows, columns = H + taps - 1, W + taps - 1
    x = x[:, : 2 * rows, : 2 * columns].reshape(N, rows, 2, columns, 2, C)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(N, rows, columns, 4 * C)
    if C <= FEW:
        patches = [x[:, a : a + H, b : b + W] for a in range(taps) for b in range(taps)]
        kernel = y.reshape(-1, O).T @ jnp.concatenate(patches, axis=-1).reshape(-1, size * size * C)
        return kernel.reshape(O, taps, taps, 2, 2, C).transpose(1, 3, 2, 4, 5, 0).reshape(size, size, C, O)
    shifts = [jnp.pad(y, ((0, 0), (0, 0), (b, taps - 1 - b), (0, 0))) for b in range(taps)]
    y = jnp.concatenate(shifts, axis=-1).reshape(-1, taps * O)
    kernel = jnp.stack([y.T @ x[:, a : a + H].reshape(-1, 4 * C) for a in range(taps)])
    return kernel.reshape(taps, taps, O, 2, 2, C).transpose(0, 3, 1, 4, 5, 2).reshape(size, size, C, O)


# ---------------------------------------------------------------------------------------------- frames


def frame_by_frame(function: Callable[[Any, Array], Array], module: nn.Module, x: Array, channels: int) -> Array:
    """Return function(module, x) for frames x [N, ...], none of which matters to another.

    On CPUs in chunks that fit into the caches: the fewer `channels` the largest layer has, the more frames. For the
    gradient only the layers' outputs are kept.
    """
    N = x.shape[0]
    count = -(-N * channels // CHUNK)
    if not on_cpu() or count == 1 or module.is_initializing():
        return function(module, x)
    size = -(-N // count)
    x = jnp.pad(x, [(0, count * size - N)] + [(0, 0)] * (x.ndim - 1)).reshape(count, size, *x.shape[1:])
    keep = jax.checkpoint_policies.save_only_these_names("convolved")
    body = nn.remat(lambda module, carry, x: (carry, function(module, x)), prevent_cse=False, policy=keep)
    _, y = nn.scan(body, variable_broadcast="params", split_rngs={"params": False})(module, (), x)
    return y.reshape(count * size, *y.shape[2:])[:N]

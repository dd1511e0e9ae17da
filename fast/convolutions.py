"""Convolutions of stride 2 without padding in the forms that are fastest on the backend, and frames in chunks.

A large image x [N, H, W, C] and a small one y [N, H', W', O] belong to a kernel [size, size, C, O]. What `conv` and
`conv_transpose` and their gradients compute are three sums, for all pixels (i, j) of y and all (a, b) of the kernel:

    gather    y[i, j] = sum over a, b of x[2 i + a, 2 j + b] @ kernel[a, b]
    scatter   x[2 i + a, 2 j + b] += y[i, j] @ kernel[a, b].T
    weights   kernel[a, b] = sum over i, j of x[2 i + a, 2 j + b].T @ y[i, j]

On accelerators XLA finds them by itself. On CPUs its gather is fast, but its scatter is slow, and what it derives
from these two for the gradients is tens of times slower in places. So there each sum has a form of its own, and with
many channels and frames one with fewer multiplications (fast/toom_cook.py).
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from fast import toom_cook
from fast.backend import on_cpu

CHUNK = 800
"""Frames times channels (of the largest layer's output) that go through the convolutions together on a CPU."""

FEW = 4
"""Up to so many channels, an image is small beside its patches, and a layer that reads it is computed again for its
gradient."""

MANY_CHANNELS = 64
MANY_FRAMES = 64
"""From these on, fewer multiplications pay for their additions and for preparing the kernel."""

LAYOUT = ("NHWC", "HWIO", "NHWC")


# ---------------------------------------------------------------------------------------------- layers


def layer(kernel: Array, transposed: bool, frames: int = 1) -> Callable[[Array], Array]:
    """Return `conv` or `conv_transpose` with a kernel, for so many frames in all.

    What prepares the kernel is computed here, outside of loops over frames.
    """
    direct = conv_transpose if transposed else conv
    size, _, C, O = kernel.shape  # noqa: E741
    large, small = (O, C) if transposed else (C, O)
    channels = min(4 * large, small)
    if not on_cpu() or kernel.dtype == jnp.bfloat16 or channels < MANY_CHANNELS or frames < MANY_FRAMES:
        return lambda x: direct(x, kernel)

    paired = pairs_of_kernel(kernel.swapaxes(2, 3) if transposed else kernel)
    taps = len(paired)
    prepared = toom_cook.at_points(paired)
    if not transposed:
        return lambda x: toom_cook.convolve(pairs(x, [(n - size) // 2 + taps for n in x.shape[1:3]]), prepared)
    reverse = toom_cook.at_points(paired[::-1, ::-1].swapaxes(2, 3))  # XLA leaves out whichever isn't used

    def function(y: Array) -> Array:
        H, W = y.shape[1:3]
        if -(-H // taps) < -(-(H + taps - 1) // taps):
            x = toom_cook.spread(y, prepared)
        else:  # as few tiles, and fewer additions
            around = (taps - 1, taps - 1)
            x = toom_cook.convolve(jnp.pad(y, ((0, 0), around, around, (0, 0))), reverse)
        return pixels(x)[:, : 2 * (H - 1) + size, : 2 * (W - 1) + size]

    return function


def conv(x: Array, kernel: Array) -> Array:
    """[N, H, W, C] with kernel [size, size, C, O] -> [N, (H - size) // 2 + 1, ., O]."""
    return gather_with_gradients(x, kernel) if on_cpu() else gather(x, kernel)


def conv_transpose(x: Array, kernel: Array) -> Array:
    """[N, H, W, C] with kernel [size, size, C, O] -> [N, 2 (H - 1) + size, ., O]. On one pixel, a Dense layer."""
    N, H, W, C = x.shape
    size, outputs = kernel.shape[0], kernel.shape[-1]
    if H == W == 1:
        x, kernel = x.reshape(N, C), kernel.reshape(-1, C, outputs)
        if on_cpu() and outputs >= MANY_CHANNELS:  # transposing the kernel takes longer than multiplying by it
            return jnp.stack([x @ tap for tap in toom_cook.slices(kernel)], 1).reshape(N, size, size, outputs)
        return (x @ kernel.swapaxes(0, 1).reshape(C, -1)).reshape(N, size, size, outputs)
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
    is multiplied. An odd size would need a kernel padded with zeros, which costs as much. For few outputs, a matmul
    makes a plane [N, H, W] of each tap and output, and sums of shifted planes are sub-pixels.
    """
    N, H, W, C = x.shape
    size, outputs = kernel.shape[0], kernel.shape[-1]
    if size % 2:
        return dilated(x, kernel)
    taps = size // 2
    if outputs <= FEW:
        planes = kernel.swapaxes(2, 3).reshape(-1, C) @ x.reshape(-1, C).T
        planes = planes.reshape(taps, 2, taps, 2, outputs, N, H, W)
        shifted = jnp.zeros((2, 2, outputs, N, H + taps - 1, W + taps - 1), x.dtype)
        for a in range(taps):
            for b in range(taps):
                shifted += jnp.pad(planes[a, :, b], [(0, 0)] * 4 + [(a, taps - 1 - a), (b, taps - 1 - b)])
        return pixels(shifted.transpose(3, 4, 5, 0, 1, 2).reshape(N, H + taps - 1, W + taps - 1, 4 * outputs))
    kernel = pairs_of_kernel(kernel.swapaxes(2, 3))[::-1, ::-1].swapaxes(2, 3)
    return pixels(jax.lax.conv_general_dilated(x, kernel, (1, 1), [(taps - 1,) * 2] * 2, dimension_numbers=LAYOUT))


def weights(x: Array, y: Array, size: int) -> Array:
    """Return the kernel's gradient [size, size, C, O] from x [N, H, W, C] and y [N, H', W', O] on a CPU.

    In matmuls over all pixels. With patches of x it is one, but they are size**2 / 4 times as large as x, and copying
    them takes longer than multiplying. So pairs of x's pixels become channels (stride 2 is then stride 1, with half as
    many taps each way), the taps of a row are shifts of the smaller y, side by side, and each row of taps is a matmul
    of its own. Patches remain if x has few channels, and for odd sizes, which have no pairs.
    """
    _, H, W, O = y.shape  # noqa: E741
    C, taps = x.shape[-1], size // 2
    if size % 2:
        patches = [x[:, a : a + 2 * H - 1 : 2, b : b + 2 * W - 1 : 2] for a in range(size) for b in range(size)]
        kernel = y.reshape(-1, O).T @ jnp.concatenate(patches, axis=-1).reshape(-1, size * size * C)
        return kernel.T.reshape(size, size, C, O)
    rows, columns = H + taps - 1, W + taps - 1
    x = pairs(x, [rows, columns])
    if C <= FEW:
        patches = [x[:, a : a + H, b : b + W] for a in range(taps) for b in range(taps)]
        kernel = y.reshape(-1, O).T @ jnp.concatenate(patches, axis=-1).reshape(-1, size * size * C)
        return kernel.reshape(O, taps, taps, 2, 2, C).transpose(1, 3, 2, 4, 5, 0).reshape(size, size, C, O)
    shifts = [jnp.pad(y, ((0, 0), (0, 0), (b, taps - 1 - b), (0, 0))) for b in range(taps)]
    y = jnp.concatenate(shifts, axis=-1).reshape(-1, taps * O)
    kernel = jnp.stack([y.T @ x[:, a : a + H].reshape(-1, 4 * C) for a in range(taps)])
    return kernel.reshape(taps, taps, O, 2, 2, C).transpose(0, 3, 1, 4, 5, 2).reshape(size, size, C, O)


def pairs(x: Array, extents: Sequence[int]) -> Array:
    """Make pairs of rows and columns channels: [N, H, W, C] -> [N, *extents, 4 C], cut or filled up with zeros."""
    (N, _, _, C), (rows, columns) = x.shape, extents
    x = x[:, : 2 * rows, : 2 * columns]
    x = jnp.pad(x, ((0, 0), (0, 2 * rows - x.shape[1]), (0, 2 * columns - x.shape[2]), (0, 0)))
    return x.reshape(N, rows, 2, columns, 2, C).transpose(0, 1, 3, 2, 4, 5).reshape(N, rows, columns, 4 * C)


def pixels(x: Array) -> Array:
    """Undo `pairs`: [N, H, W, 4 C] -> [N, 2 H, 2 W, C]."""
    N, H, W, C = x.shape
    return x.reshape(N, H, W, 2, 2, C // 4).transpose(0, 1, 3, 2, 4, 5).reshape(N, 2 * H, 2 * W, C // 4)


def pairs_of_kernel(kernel: Array) -> Array:
    """[size, size, C, O] -> [taps, taps, 4 C, O], which does with `pairs` what the kernel does; taps = size / 2, up."""
    size, _, C, O = kernel.shape  # noqa: E741
    taps, odd = -(-size // 2), size % 2
    kernel = jnp.pad(kernel, ((0, odd), (0, odd), (0, 0), (0, 0)))
    return kernel.reshape(taps, 2, taps, 2, C, O).transpose(0, 2, 1, 3, 4, 5).reshape(taps, taps, 4 * C, O)


# ---------------------------------------------------------------------------------------------- frames


def frame_by_frame(function: Callable[[Array], Array], x: Array, channels: int) -> Array:
    """Return function(x) for frames x [N, ...], none of which matters to another.

    On CPUs in chunks that fit into the caches: the fewer `channels` the largest layer has, the more frames. For the
    gradient only what is named "convolved" is kept.
    """
    N = x.shape[0]
    count = -(-N * channels // CHUNK)
    if not on_cpu() or count == 1:
        return function(x)
    size = -(-N // count)
    x = jnp.pad(x, [(0, count * size - N)] + [(0, 0)] * (x.ndim - 1)).reshape(count, size, *x.shape[1:])
    keep = jax.checkpoint_policies.save_only_these_names("convolved")
    body = jax.checkpoint(lambda carry, x: (carry, function(x)), prevent_cse=False, policy=keep)
    _, y = jax.lax.scan(body, (), x)
    return y.reshape(count * size, *y.shape[2:])[:N]

"""Convolutions of stride 2 without padding, in the forms that are fastest on each backend; and frames in chunks.

A kernel [size, size, C, O] connects a large image x [N, H, W, C] and a small one y [N, H', W', O]. `conv`,
`conv_transpose` and their gradients are three sums, for all pixels (i, j) of y and all taps (a, b) of the kernel:

    gather            y[i, j] = sum over a, b of x[2 i + a, 2 j + b] @ kernel[a, b]
    scatter           x[2 i + a, 2 j + b] += y[i, j] @ kernel[a, b].T
    kernel_gradient   kernel[a, b] = sum over i, j of x[2 i + a, 2 j + b].T @ y[i, j]

On accelerators, XLA's own forms are used. On CPUs, XLA's gather is fast and its scatter slow, and the gradients that it
derives from them are tens of times slower for some layers. So each sum has its own form on CPUs. For many channels and
frames, there is one with fewer multiplications (fast/toom_cook.py).
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from fast import toom_cook
from fast.backend import on_cpu

CHUNK = 800
"""Frames times channels (of the largest layer's output) that go through the convolutions together on a CPU."""

FEW_CHANNELS = 4
"""With up to this number of channels, an image is small compared with its patches. A layer that takes it is computed
again for its gradient."""

MANY_CHANNELS = 64
MANY_FRAMES = 64
"""From these numbers on, fewer multiplications are worth more additions and a transformed kernel."""

LAYOUT = ("NHWC", "HWIO", "NHWC")


# ---------------------------------------------------------------------------------------------- layers


def layer(kernel: Array, transposed: bool, frames: int) -> Callable[[Array], Array]:
    """Return `conv` or `conv_transpose` with this kernel, for `frames` frames in all.

    The kernel is transformed here, outside of loops over frames.
    """
    direct = conv_transpose if transposed else conv
    size, _, C, O = kernel.shape  # noqa: E741
    large, small = (O, C) if transposed else (C, O)
    channels = min(4 * large, small)
    if not on_cpu() or kernel.dtype == jnp.bfloat16 or channels < MANY_CHANNELS or frames < MANY_FRAMES:
        return lambda x: direct(x, kernel)

    stride1_kernel = kernel_space_to_depth(kernel.swapaxes(2, 3) if transposed else kernel)
    taps = len(stride1_kernel)
    points = toom_cook.evaluate_kernel(stride1_kernel)
    if not transposed:
        return lambda x: toom_cook.convolve(space_to_depth(x, [(n - size) // 2 + taps for n in x.shape[1:3]]), points)
    reversed_points = toom_cook.evaluate_kernel(stride1_kernel[::-1, ::-1].swapaxes(2, 3))  # XLA removes unused ones

    def function(y: Array) -> Array:
        H, W = y.shape[1:3]
        if -(-H // taps) < -(-(H + taps - 1) // taps):
            x = toom_cook.spread(y, points)
        else:  # as many tiles, and fewer additions
            around = (taps - 1, taps - 1)
            x = toom_cook.convolve(jnp.pad(y, ((0, 0), around, around, (0, 0))), reversed_points)
        return depth_to_space(x)[:, : 2 * (H - 1) + size, : 2 * (W - 1) + size]

    return function


def conv(x: Array, kernel: Array) -> Array:
    """Return the convolution of x [N, H, W, C] and a kernel [size, size, C, O], [N, (H - size) // 2 + 1, ., O]."""
    return gather_with_gradients(x, kernel) if on_cpu() else gather(x, kernel)


def conv_transpose(x: Array, kernel: Array) -> Array:
    """Return the transposed convolution of x [N, H, W, C] and a kernel [size, size, C, O], [N, 2 (H - 1) + size, ., O].

    For a single pixel, it is a matmul.
    """
    N, H, W, C = x.shape
    size, outputs = kernel.shape[0], kernel.shape[-1]
    if H == W == 1:
        x, kernel = x.reshape(N, C), kernel.reshape(-1, C, outputs)
        if on_cpu() and outputs >= MANY_CHANNELS:  # transposing the kernel takes longer than multiplying by it
            return jnp.stack([x @ tap for tap in toom_cook.unstack(kernel)], 1).reshape(N, size, size, outputs)
        return (x @ kernel.swapaxes(0, 1).reshape(C, -1)).reshape(N, size, size, outputs)
    return scatter_with_gradients(x, kernel) if on_cpu() else dilated_scatter(x, kernel)


@jax.custom_vjp
def gather_with_gradients(x: Array, kernel: Array) -> Array:
    return gather(x, kernel)


def gather_gradients(operands: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = operands
    dx = scatter(gradient, kernel.swapaxes(2, 3))
    # The convolution may not use the last row and column.
    unused = [(0, n - m) for n, m in zip(x.shape, dx.shape, strict=True)]
    return jnp.pad(dx, unused), kernel_gradient(x, gradient, kernel.shape[0])


gather_with_gradients.defvjp(lambda x, kernel: (gather(x, kernel), (x, kernel)), gather_gradients)


@jax.custom_vjp
def scatter_with_gradients(x: Array, kernel: Array) -> Array:
    return scatter(x, kernel)


def scatter_gradients(operands: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = operands
    return gather(gradient, kernel.swapaxes(2, 3)), kernel_gradient(gradient, x, kernel.shape[0]).swapaxes(2, 3)


scatter_with_gradients.defvjp(lambda x, kernel: (scatter(x, kernel), (x, kernel)), scatter_gradients)


# ---------------------------------------------------------------------------------------------- the three sums


def gather(x: Array, kernel: Array) -> Array:
    """Gather with XLA's convolution of stride 2."""
    return jax.lax.conv_general_dilated(x, kernel, (2, 2), "VALID", dimension_numbers=LAYOUT)


def dilated_scatter(x: Array, kernel: Array) -> Array:
    """Scatter with XLA's convolution of stride 1: of an image with zeros between its pixels and the reversed kernel."""
    padding = [(kernel.shape[0] - 1,) * 2] * 2
    return jax.lax.conv_general_dilated(
        x, kernel[::-1, ::-1], (1, 1), padding, lhs_dilation=(2, 2), dimension_numbers=LAYOUT
    )


def scatter(x: Array, kernel: Array) -> Array:
    """Scatter x [N, H, W, C] with a kernel [size, size, C, O] on a CPU.

    For an even size, a convolution of stride 1 computes 2x2 pixels of the output at a time, so no zero is multiplied.
    For few output channels, a matmul computes a plane [N, H, W] for each tap and channel; sums of shifted planes are
    the output. An odd size would need a kernel padded with zeros, which costs as much as `dilated_scatter`.
    """
    N, H, W, C = x.shape
    size, outputs = kernel.shape[0], kernel.shape[-1]
    if size % 2:
        return dilated_scatter(x, kernel)
    taps = size // 2
    if outputs <= FEW_CHANNELS:
        planes = kernel.swapaxes(2, 3).reshape(-1, C) @ x.reshape(-1, C).T
        planes = planes.reshape(taps, 2, taps, 2, outputs, N, H, W)
        shifted = jnp.zeros((2, 2, outputs, N, H + taps - 1, W + taps - 1), x.dtype)
        for a in range(taps):
            for b in range(taps):
                shifted += jnp.pad(planes[a, :, b], [(0, 0)] * 4 + [(a, taps - 1 - a), (b, taps - 1 - b)])
        return depth_to_space(shifted.transpose(3, 4, 5, 0, 1, 2).reshape(N, H + taps - 1, W + taps - 1, 4 * outputs))
    kernel = kernel_space_to_depth(kernel.swapaxes(2, 3))[::-1, ::-1].swapaxes(2, 3)
    x = jax.lax.conv_general_dilated(x, kernel, (1, 1), [(taps - 1,) * 2] * 2, dimension_numbers=LAYOUT)
    return depth_to_space(x)


def kernel_gradient(x: Array, y: Array, size: int) -> Array:
    """Return the kernel's gradient [size, size, C, O] from x [N, H, W, C] and y [N, H', W', O] on a CPU.

    It could be one matmul of y and patches of x. But patches are size**2 / 4 times as large as x, and copying them
    takes longer than multiplying. So 2x2 pixels of x become channels: the stride is then 1, with half as many taps in
    each direction. One matmul for each row of taps multiplies x with copies of y, shifted by each tap of the row.

    Patches are used if x has few channels, and for odd sizes, which have no pairs of taps.
    """
    _, H, W, O = y.shape  # noqa: E741
    C, taps = x.shape[-1], size // 2
    if size % 2:
        patches = [x[:, a : a + 2 * H - 1 : 2, b : b + 2 * W - 1 : 2] for a in range(size) for b in range(size)]
        kernel = y.reshape(-1, O).T @ jnp.concatenate(patches, axis=-1).reshape(-1, size * size * C)
        return kernel.T.reshape(size, size, C, O)
    rows, columns = H + taps - 1, W + taps - 1
    x = space_to_depth(x, [rows, columns])
    if C <= FEW_CHANNELS:
        patches = [x[:, a : a + H, b : b + W] for a in range(taps) for b in range(taps)]
        kernel = y.reshape(-1, O).T @ jnp.concatenate(patches, axis=-1).reshape(-1, size * size * C)
        return kernel.reshape(O, taps, taps, 2, 2, C).transpose(1, 3, 2, 4, 5, 0).reshape(size, size, C, O)
    shifts = [jnp.pad(y, ((0, 0), (0, 0), (b, taps - 1 - b), (0, 0))) for b in range(taps)]
    y = jnp.concatenate(shifts, axis=-1).reshape(-1, taps * O)
    kernel = jnp.stack([y.T @ x[:, a : a + H].reshape(-1, 4 * C) for a in range(taps)])
    return kernel.reshape(taps, taps, O, 2, 2, C).transpose(0, 3, 1, 4, 5, 2).reshape(size, size, C, O)


def space_to_depth(x: Array, extents: Sequence[int]) -> Array:
    """Turn 2x2 pixels into channels: [N, H, W, C] -> [N, *extents, 4 C], cut or padded with zeros to these extents."""
    (N, _, _, C), (rows, columns) = x.shape, extents
    x = x[:, : 2 * rows, : 2 * columns]
    x = jnp.pad(x, ((0, 0), (0, 2 * rows - x.shape[1]), (0, 2 * columns - x.shape[2]), (0, 0)))
    return x.reshape(N, rows, 2, columns, 2, C).transpose(0, 1, 3, 2, 4, 5).reshape(N, rows, columns, 4 * C)


def depth_to_space(x: Array) -> Array:
    """Turn channels into 2x2 pixels: [N, H, W, 4 C] -> [N, 2 H, 2 W, C]."""
    N, H, W, C = x.shape
    return x.reshape(N, H, W, 2, 2, C // 4).transpose(0, 1, 3, 2, 4, 5).reshape(N, 2 * H, 2 * W, C // 4)


def kernel_space_to_depth(kernel: Array) -> Array:
    """Return the kernel of stride 1 that does to space_to_depth(x) what this kernel of stride 2 does to x.

    [size, size, C, O] -> [taps, taps, 4 C, O], taps = ceil(size / 2)
    """
    size, _, C, O = kernel.shape  # noqa: E741
    taps, odd = -(-size // 2), size % 2
    kernel = jnp.pad(kernel, ((0, odd), (0, odd), (0, 0), (0, 0)))
    return kernel.reshape(taps, 2, taps, 2, C, O).transpose(0, 2, 1, 3, 4, 5).reshape(taps, taps, 4 * C, O)


# ---------------------------------------------------------------------------------------------- frames


def frame_by_frame(function: Callable[[Array], Array], x: Array, channels: int) -> Array:
    """Return function(x) for frames x [N, ...] that don't depend on each other.

    On CPUs, it is computed in chunks of frames that fit into the caches: the fewer `channels` the largest layer has,
    the more frames. For the gradient, only arrays named "convolved" are kept; the others are computed again.
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

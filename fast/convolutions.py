"""Convolutions of stride 2 without padding in the forms that are fastest on the backend, and frames in chunks."""

from collections.abc import Callable
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fast.backend import on_cpu

CHUNK = 25
"""Frames that go through the convolutions together on a CPU."""


def conv(x: Array, kernel: Array) -> Array:
    """The convolution of `Convolution`. On CPUs as patches and one matmul: XLA's gradients are several times slower."""
    size = kernel.shape[0]
    if not on_cpu() or size % 2:
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    N, H, W, C = x.shape
    taps, H, W = size // 2, H // 2, W // 2
    # Pairs of pixels become channels; stride 2 is then stride 1, with half as many taps each way.
    x = x[:, : 2 * H, : 2 * W].reshape(N, H, 2, W, 2, C).transpose(0, 1, 3, 2, 4, 5).reshape(N, H, W, 4 * C)
    H, W = H - taps + 1, W - taps + 1
    patches = jnp.concatenate([x[:, a : a + H, b : b + W] for a in range(taps) for b in range(taps)], axis=-1)
    kernel = kernel.reshape(taps, 2, taps, 2, C, -1).transpose(0, 2, 1, 3, 4, 5).reshape(patches.shape[-1], -1)
    return patches @ kernel


def conv_transpose(x: Array, kernel: Array) -> Array:
    """The transposed convolution of `Convolution`.

    On one pixel it is a Dense layer. On CPUs, one matmul makes each pixel's patch of outputs, and the patches are
    then added where they overlap, first along rows, then along columns: XLA's gradient of a dilated convolution is
    many times slower there.
    """
    N, H, W, C = x.shape
    size, outputs = kernel.shape[0], kernel.shape[-1]
    if H == W == 1:
        return (x.reshape(N, C) @ kernel.transpose(2, 0, 1, 3).reshape(C, -1)).reshape(N, size, size, outputs)
    if not on_cpu():
        # Input dilation 2 with the kernel flipped, padded by size - 1.
        padding = [(size - 1, size - 1)] * 2
        return jax.lax.conv_general_dilated(
            x, kernel[::-1, ::-1], (1, 1), padding, lhs_dilation=(2, 2), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    taps = (size + 1) // 2
    patches = (x.reshape(-1, C) @ kernel.transpose(2, 0, 1, 3).reshape(C, -1)).reshape(N, H, W, size, size, outputs)
    patches = jnp.pad(patches, ((0, 0),) * 3 + ((0, size % 2),) * 2 + ((0, 0),))
    patches = patches.reshape(N, H, W, taps, 2, taps, 2, outputs)
    rows = overlap_add(patches, 1, 3)  # [N, H', W, 2, taps, 2, C]
    full = overlap_add(rows, 2, 4)  # [N, H', W', 2, 2, C]
    N, H, W = full.shape[:3]
    full = full.transpose(0, 1, 3, 2, 4, 5).reshape(N, 2 * H, 2 * W, outputs)
    return full[:, : 2 * H - size % 2, : 2 * W - size % 2]


def overlap_add(x: Array, place: int, tap: int) -> Array:
    """out[i + a] sums x[i, a], where axis `place` < `tap` counts i and axis `tap`, which goes away, a."""
    taps = x.shape[tap]
    shifted = []
    for a in range(taps):
        part = jax.lax.index_in_dim(x, a, tap, keepdims=False)
        shifted.append(jnp.pad(part, [(a, taps - 1 - a) if axis == place else (0, 0) for axis in range(part.ndim)]))
    return reduce(jnp.add, shifted)


def frame_by_frame(function: Callable[[Any, Array], Array], module: nn.Module, x: Array) -> Array:
    """function(module, x), where no frame of x [N, ...] matters to another.

    On CPUs in chunks of a few dozen frames, which fit into the caches. For the gradient only the layers' outputs are
    kept; what else a layer makes (patches, many times larger) is made anew: a fifth of the memory, and faster.
    """
    N = x.shape[0]
    count = -(-N // CHUNK)
    if not on_cpu() or count == 1:
        return function(module, x)
    size = -(-N // count)
    x = jnp.pad(x, [(0, count * size - N)] + [(0, 0)] * (x.ndim - 1)).reshape(count, size, *x.shape[1:])
    keep = jax.checkpoint_policies.save_only_these_names("convolved")
    body = nn.remat(lambda module, carry, x: (carry, function(module, x)), prevent_cse=False, policy=keep)
    _, y = nn.scan(body, variable_broadcast="params", split_rngs={"params": False})(module, (), x)
    return y.reshape(count * size, *y.shape[2:])[:N]

"""Layers that only the baselines have."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fast.convolutions import LAYOUT, conv, conv_transpose
from fast.initial import normal, ones, zeros
from sequences.interface import Training

MOMENTUM, EPSILON = 0.1, 1e-5
"""PyTorch's defaults, as in the authors' codes. A step's statistics have a weight of 0.1 in the running averages."""


def convolve(kind: str, x: Array, kernel: Array) -> Array:
    """Return the convolution of frames with a kernel, [B, T, H', W', O].

    Args:
        kind: "down" and "up" halve and double H and W. "same" keeps them. "to_one" turns 4x4 pixels into one;
            "from_one" is the reverse.
        x: [B, T, H, W, C].
        kernel: [3, 3, C, O] for "same", else [4, 4, C, O].
    """
    B, T, *shape = x.shape
    x = x.reshape(B * T, *shape)
    if kind == "down":
        x = conv(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), kernel)
    elif kind == "up":
        x = conv_transpose(x, kernel)[:, 1:-1, 1:-1]
    elif kind == "same":
        x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT)
    else:
        x = {"to_one": conv, "from_one": conv_transpose}[kind](x, kernel)
    return x.reshape(B, T, *x.shape[1:])


class BatchNorm(nn.Module):
    """Batch normalisation: with the batch's statistics in training, with their running averages otherwise.

    The batch is that of all devices. As in PyTorch, batches are normalised with the biased variance, and the running
    average is of the unbiased variance.
    """

    channels: int
    scale_stddev: float = 0.02
    """Standard deviation of the initial scales. Their mean is 1."""

    @nn.compact
    def __call__(self, x: Array, training: Training | None) -> Array:
        """Return x [B, ..., C] normalised. Sequences of weight 0 are padding and do not count in the statistics."""
        C = self.channels
        scale = self.param("scale", normal(self.scale_stddev, mean=1.0), (C,))
        bias = self.param("bias", zeros, (C,))
        running_mean = self.variable("batch_stats", "mean", zeros, None, (C,))
        running_var = self.variable("batch_stats", "var", ones, None, (C,))
        mean, var = running_mean.value, running_var.value
        if training is not None:
            axes = tuple(range(1, x.ndim - 1))

            def batch_sum(per_sequence: Array) -> Array:
                weighted = jnp.tensordot(training.weight, per_sequence, 1)
                return jax.lax.psum(weighted, training.axis) if training.axis else weighted

            count = batch_sum(jnp.full(len(x), x[0].size // C, x.dtype))
            mean = batch_sum(x.sum(axes)) / count
            var = batch_sum(((x - mean) ** 2).sum(axes)) / count
            running_mean.value = (1 - MOMENTUM) * running_mean.value + MOMENTUM * mean
            running_var.value = (1 - MOMENTUM) * running_var.value + MOMENTUM * var * count / (count - 1)
        return (x - mean) * jax.lax.rsqrt(var + EPSILON) * scale + bias

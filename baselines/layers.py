"""Layers that the models of comparison have and the Clockwork VAE doesn't."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fast.convolutions import LAYOUT, conv, conv_transpose
from fast.initial import normal, ones, zeros
from sequences.interface import Training

MOMENTUM, EPSILON = 0.1, 1e-5
"""Of PyTorch, as the public codes leave them: a step's statistics are a tenth of the running averages."""


def convolve(kind: str, x: Array, kernel: Array) -> Array:
    """Convolve frames [B, T, H, W, C] with a kernel [size, size, C, O] -> [B, T, H', W', O].

    kind: "down" and "up" have a kernel of 4 and stride 2: they halve and double H and W. "same" has a kernel of 3.
    "to_one" makes one pixel of 4x4, "from_one" the reverse.
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
    """Normalise channels: in training by the batch over all devices, else by running averages of its statistics.

    In PyTorch's form: the variance is that of the sample in the averages, and that of the batch in the normalisation.
    """

    channels: int
    scale_stddev: float = 0.02
    """Of the initial scales, whose mean is 1."""

    @nn.compact
    def __call__(self, x: Array, training: Training | None) -> Array:
        """Return x [B, ..., C] normalised. Sequences of weight 0 are padding and don't count."""
        C = self.channels
        scale = self.param("scale", normal(self.scale_stddev, mean=1.0), (C,))
        bias = self.param("bias", zeros, (C,))
        running_mean = self.variable("batch_stats", "mean", zeros, None, (C,))
        running_var = self.variable("batch_stats", "var", ones, None, (C,))
        mean, var = running_mean.value, running_var.value
        if training is not None:
            axes = tuple(range(1, x.ndim - 1))

            def total(per_sequence: Array) -> Array:
                weighted = jnp.tensordot(training.weight, per_sequence, 1)
                return jax.lax.psum(weighted, training.axis) if training.axis else weighted

            count = total(jnp.full(len(x), x[0].size // C, x.dtype))
            mean = total(x.sum(axes)) / count
            var = total(((x - mean) ** 2).sum(axes)) / count
            running_mean.value = (1 - MOMENTUM) * running_mean.value + MOMENTUM * mean
            running_var.value = (1 - MOMENTUM) * running_var.value + MOMENTUM * var * count / (count - 1)
        return (x - mean) * jax.lax.rsqrt(var + EPSILON) * scale + bias

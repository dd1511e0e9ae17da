"""Layers that the models of comparison have and the Clockwork VAE doesn't."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from cwvae import Training

MOMENTUM, EPSILON = 0.1, 1e-5
"""Of PyTorch, as the public codes leave them: a step's statistics are a tenth of the running averages."""


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
        scale = self.param("scale", lambda key, shape: 1 + self.scale_stddev * jax.random.normal(key, shape), (C,))
        bias = self.param("bias", nn.initializers.zeros, (C,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (C,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (C,))
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

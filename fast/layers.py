"""Dense layers, convolutions and the GRU, and `linear`, which computes all dense layers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from fast import convolutions
from fast.initial import lecun_normal, orthogonal, zeros


class Dense(nn.Module):
    """A dense layer: concat([x, extra]) @ kernel + bias, with kernel [inputs, outputs]. `extra` is optional.

    In a cell, `extra` must not depend on the state: it is multiplied for all ticks at once (see fast/scan.py).
    """

    inputs: int
    outputs: int
    dtype: Any = None
    kernel_init: Any = lecun_normal

    def setup(self) -> None:
        self.kernel = self.param("kernel", self.kernel_init, (self.inputs, self.outputs))
        self.bias = self.param("bias", zeros, (self.outputs,))

    def __call__(self, x: Array, extra: Array | None = None) -> Array:
        return linear(x, self.kernel, self.bias, extra, self.dtype)


class GRU(nn.Module):
    """A GRU whose reset gate acts after the recurrent matmul, as in Flax's GRUCell.

    One kernel for the input and one for the state hold all gates, in the order reset, update, candidate.
    """

    inputs: int
    size: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, state: Array) -> Array:
        """Return the new state [..., D] for x [..., inputs] and the state before, [..., D]."""
        D = self.size
        input_kernel = self.param("input_kernel", lecun_normal, (self.inputs, 3 * D))
        input_bias = self.param("input_bias", zeros, (3 * D,))
        state_kernel = self.param("state_kernel", orthogonal, (D, 3 * D))
        candidate_bias = self.param("candidate_bias", zeros, (D,))
        state_bias = jnp.concatenate([jnp.zeros(2 * D), candidate_bias])

        input_gates, input_candidate = jnp.split(linear(x, input_kernel, input_bias, dtype=self.dtype), [2 * D], -1)
        state_gates, state_candidate = jnp.split(linear(state, state_kernel, state_bias, dtype=self.dtype), [2 * D], -1)
        reset, update = jnp.split(nn.sigmoid(input_gates + state_gates), 2, -1)
        return (1 - update) * jnp.tanh(input_candidate + reset * state_candidate) + update * state


class Convolution(nn.Module):
    """A convolution of stride 2 without padding, from x [N, H, W, C_in] to [N, H', W', C_out].

    The kernel is [size, size, C_in, C_out]. Plain: H' = (H - size) // 2 + 1. Transposed: H' = 2 (H - 1) + size, and
    pixel 2 i + a sums x[i] @ kernel[a] over i and a, as in Keras and PyTorch.
    """

    inputs: int
    outputs: int
    size: int
    transposed: bool = False

    def __call__(self, x: Array) -> Array:
        return self.layer(x.dtype)(x)

    @nn.compact
    def layer(self, dtype: Any, frames: int = 1) -> Callable[[Array], Array]:
        """Return the layer as a function of x, for `frames` frames in all; see `fast.convolutions.layer`."""
        kernel = self.param("kernel", lecun_normal, (self.size, self.size, self.inputs, self.outputs))
        bias = self.param("bias", zeros, (self.outputs,))
        convolve = convolutions.layer(kernel.astype(dtype), self.transposed, frames)

        def function(x: Array) -> Array:
            y = (convolve(x) + bias).astype(x.dtype)
            return y if self.inputs <= convolutions.FEW_CHANNELS else checkpoint_name(y, "convolved")

        return function


Linear = Callable[[Array, Array, Array, Array | None, Any], Array]

linear_override: ContextVar[Linear | None] = ContextVar("linear_override", default=None)


def linear(x: Array, kernel: Array, bias: Array, extra: Array | None = None, dtype: Any = None) -> Array:
    """Return concat([x, extra]) @ kernel + bias in the dtype of x, multiplied in `dtype` (None: in that of x).

    In a tick of `scan`, `extra` must not depend on the state.
    """
    if override := linear_override.get():
        return override(x, kernel, bias, extra, dtype)
    if extra is not None:
        x = jnp.concatenate([x, extra], -1)
    return (dot(x, kernel, dtype) + bias).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def dot(x: Array, kernel: Array, dtype: Any) -> Array:
    """Return x @ kernel. It and its gradients multiply in `dtype` and add up in the operands' own dtypes."""
    dtype = dtype or x.dtype
    return jnp.matmul(x.astype(dtype), kernel.astype(dtype), preferred_element_type=x.dtype)


def dot_backward(dtype: Any, operands: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = operands
    to_kernel = jnp.einsum(
        "...i,...o->io",
        x.astype(dtype or x.dtype),
        gradient.astype(dtype or x.dtype),
        preferred_element_type=kernel.dtype,
    )
    return dot(gradient, kernel.T, dtype), to_kernel


dot.defvjp(lambda x, kernel, dtype: (dot(x, kernel, dtype), (x, kernel)), dot_backward)


@contextmanager
def override_linear(function: Linear) -> Iterator[None]:
    """Let `linear` call `function` within the context."""
    token = linear_override.set(function)
    try:
        yield
    finally:
        linear_override.reset(token)

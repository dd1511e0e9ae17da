"""A scan over ticks whose loop has fewer operations per tick than with `jax.lax.scan`.

On an accelerator, each operation of a loop takes microseconds, however small it is. So the loop computes only states.
The rest is computed for all ticks at once, outside of the loop:

- Weights: what a tick does to build a dense layer's kernel, such as joining two, is done once.
- Inputs `extra` of dense layers do not depend on the state. One matmul multiplies them for all ticks:
  concat([x, extra]) @ kernel = x @ kernel[:n] + extra @ kernel[n:].
- Outputs: when all states are known, one call of the tick computes them for all ticks.
- Gradients: the backward loop only passes the gradient from state to state, and reuses the dense layers' outputs. One
  differentiated call of the tick for all ticks computes the gradients of weights and inputs.

A cell's `tick` is written for a single tick. `scan` calls it while it overrides `linear`, the function that computes
all dense layers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fast.backend import on_cpu
from fast.layers import dot, override_linear

UNROLL = 5
"""Ticks per iteration of the loops on accelerators. What these ticks share is computed once for all of them."""


class Layer(NamedTuple):
    """The weights of one call of `linear` in a tick."""

    kernel: Array  # the rows that multiply x
    bias: Array | None  # None with an input `extra`, whose contribution includes the bias


def unroll(cell: Any, state: Any, inputs: tuple) -> tuple[Any, Any]:
    """Call cell.tick(state, *inputs of a tick) -> (state, outputs) for each tick.

    Args:
        cell: a Flax module, within its parent's `apply` or `init`.
        state: before the first tick, [B, ...].
        inputs: pytrees of [B, T, ...].

    Returns:
        The states after each tick and the outputs of all ticks, [B, T, ...] each.
    """
    if cell.is_initializing():  # one tick creates all parameters
        first = cell.tick(state, *jax.tree.map(lambda x: x[:, 0], inputs))
        T = jax.tree.leaves(inputs)[0].shape[1]
        return jax.tree.map(lambda x: jnp.repeat(x[:, None], T, axis=1), first)
    inputs = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), inputs)
    unbound = cell.clone(parent=None)

    def tick(params: Any, state: Any, inputs: tuple) -> tuple[Any, Any]:
        return unbound.apply({"params": params}, state, *inputs, method="tick")

    unrolled = scan(tick, cell.variables["params"], state, inputs)
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), unrolled)


def scan(tick: Callable[..., tuple[Any, Any]], params: Any, state: Any, inputs: Any) -> tuple[Any, Any]:
    """Call tick(params, state, inputs) -> (state, outputs) for each tick, with the results of `jax.lax.scan`.

    Args:
        tick: works on one tick, and on all ticks at once if states and inputs have a leading axis T.
        params: a pytree of arrays.
        state: before the first tick.
        inputs: a pytree of [T, ...].

    Returns:
        The states after each tick and the outputs of all ticks, [T, ...] each.
    """
    ticks_per_iteration = 1 if on_cpu() else UNROLL
    T = jax.tree.leaves(inputs)[0].shape[0]
    layers, contributions, dtype = record_layers(
        tick, params, jax.tree.map(lambda x: jnp.broadcast_to(x, (T, *x.shape)), state), inputs
    )

    def cast_kernels(layers: list[Layer]) -> list[Layer]:
        return [Layer(kernel.astype(dtype or kernel.dtype), bias) for kernel, bias in layers]

    def call_tick(layers: list[Layer], params: Any, before: Any, inputs: Any) -> tuple[Any, list[Array]]:
        """Return what `tick` returns, for one tick or all, and the outputs of its dense layers."""
        contributions, tick_inputs = inputs
        layer_outputs: list[Array] = []

        def apply_next_layer(x: Array, *_: Any) -> Array:
            layer, contribution = layers[len(layer_outputs)], contributions[len(layer_outputs)]
            constant: Any = layer.bias if contribution is None else contribution
            layer_outputs.append(dot(x, layer.kernel, dtype) + constant)
            return layer_outputs[-1]

        with override_linear(apply_next_layer):
            return tick(params, before, tick_inputs), layer_outputs

    def compute_states(layers: list[Layer], params: Any, state: Any, inputs: Any) -> tuple[Any, Any]:
        """Return the states before and after each tick."""
        layers = cast_kernels(layers)

        def body(state: Any, inputs: Any) -> tuple[Any, Any]:
            (state, _), _ = call_tick(layers, params, state, inputs)
            return state, state

        _, after = jax.lax.scan(body, state, inputs, unroll=ticks_per_iteration)
        return jax.tree.map(lambda first, x: jnp.concatenate([first[None], x[:-1]]), state, after), after

    @jax.custom_vjp
    def run(layers: list[Layer], params: Any, state: Any, inputs: Any) -> tuple[Any, Any]:
        before, after = compute_states(layers, params, state, inputs)
        (_, outputs), _ = call_tick(layers, params, before, inputs)
        return after, outputs

    def forward(layers: list[Layer], params: Any, state: Any, inputs: Any) -> tuple:
        before, after = compute_states(layers, params, state, inputs)
        (_, outputs), pullback, layer_outputs = jax.vjp(call_tick, layers, params, before, inputs, has_aux=True)
        return (after, outputs), (pullback, layers, params, (before, inputs, layer_outputs))

    def backward(residuals: tuple, gradients: Any) -> tuple:
        pullback, layers, params, ticks = residuals
        transposed_kernels = [layer.kernel.T for layer in cast_kernels(layers)]  # once, outside of the loop

        def body(from_later: Any, slices: tuple) -> tuple[Any, Any]:
            """Return the gradients with respect to the state before a tick and the state after it."""
            (before, inputs, layer_outputs), (to_after, to_outputs) = slices
            to_after = jax.tree.map(jnp.add, to_after, from_later)
            kernels_and_outputs = iter(zip(transposed_kernels, layer_outputs, strict=True))

            def reuse_next_output(x: Array, *_: Any) -> Array:
                return reuse_output(x, *next(kernels_and_outputs), dtype)

            with override_linear(reuse_next_output):
                _, to_state = jax.vjp(lambda before: tick(params, before, inputs[1]), before)
            (to_before,) = to_state((to_after, to_outputs))
            return to_before, to_after

        to_states, to_outputs = gradients
        zeros = jax.tree.map(lambda x: jnp.zeros_like(x[0]), to_states)
        to_state, to_after = jax.lax.scan(body, zeros, (ticks, gradients), reverse=True, unroll=ticks_per_iteration)
        to_layers, to_params, _, to_inputs = pullback((to_after, to_outputs))
        return to_layers, to_params, to_state, to_inputs

    run.defvjp(forward, backward)
    return run(layers, params, state, (contributions, inputs))


def record_layers(
    tick: Callable[..., Any], params: Any, states: Any, inputs: Any
) -> tuple[list[Layer], list[Array | None], Any]:
    """Record the dense layers of a tick from one call for all ticks; the values of the states do not matter.

    Returns:
        For each call of `linear`, in order, its weights and the contribution of its input `extra` and its bias to each
        tick, [T, ...] (None without `extra`); and the dtype that they multiply in.
    """
    layers: list[Layer] = []
    contributions: list[Array | None] = []
    dtypes = []

    def record(x: Array, kernel: Array, bias: Array, extra: Array | None, dtype: Any) -> Array:
        n = x.shape[-1]
        layers.append(Layer(kernel[:n], bias if extra is None else None))
        contributions.append(None if extra is None else dot(extra, kernel[n:], dtype) + bias)
        dtypes.append(dtype)
        return jnp.zeros((*x.shape[:-1], kernel.shape[-1]), x.dtype)

    with override_linear(record):
        tick(params, states, inputs)
    return layers, contributions, dtypes[0]


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def reuse_output(x: Array, transposed_kernel: Array, output: Array, dtype: Any) -> Array:
    """Return `output`, which is dot(x, transposed_kernel.T, dtype) plus a constant. Only x gets a gradient."""
    return output


reuse_output.defvjp(
    lambda x, transposed_kernel, output, dtype: (output, transposed_kernel),
    lambda dtype, transposed_kernel, gradient: (dot(gradient, transposed_kernel, dtype), None, None),
)

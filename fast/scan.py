"""A scan over ticks with fewer operations per tick than JAX's own: a tick is written as if it were alone.

On an accelerator each operation of a loop takes microseconds, however small it is. So the loop computes nothing but
states, and all that can be done for all ticks at once is done outside of it:

- A dense layer's weights are put together once. What its inputs `given` contribute, which don't depend on the state, is
  multiplied once for all ticks: concat([x, given]) @ kernel = x @ kernel[:n] + given @ kernel[n:].
- Outputs come from one call of the tick for all ticks, with the states known.
- The backward loop only hands the gradient from state to state, with the dense layers' outputs known. Gradients of
  weights and inputs come from one differentiated call for all ticks.

For this, `scan` calls the tick with other meanings of `linear`, the function that all dense layers go through.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fast.backend import on_cpu
from fast.layers import dot, meaning

UNROLL = 5
"""Ticks per iteration of the loops on accelerators, where what ticks share is then done once for all of them."""


class Layer(NamedTuple):
    """One call of `linear` in a tick: x @ kernel plus the bias, or plus what `given` contributes at the tick."""

    kernel: Array
    bias: Array | None


def unroll(cell: Any, state: Any, inputs: tuple) -> tuple[Any, Any]:
    """Call cell.tick(state, *inputs of a tick) -> (state, outputs) for each tick of a Flax module.

    Args:
        cell: the module, within its parent's `apply` or `init`.
        state: before the first tick, [B, ...].
        inputs: pytrees of [B, T, ...].

    Returns:
        States and outputs of all ticks, [B, T, ...].
    """
    if cell.is_initializing():  # one tick has all parameters
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
    """Call tick(params, state, inputs) -> (state, outputs) for each tick, as `lax.scan` would.

    Args:
        tick: takes one tick's inputs, or with a leading axis those of all ticks at once.
        params: a pytree of arrays.
        state: before the first tick.
        inputs: a pytree of [T, ...].

    Returns:
        States and outputs of all ticks, [T, ...] each.
    """
    at_once = 1 if on_cpu() else UNROLL
    T = jax.tree.leaves(inputs)[0].shape[0]
    layers, contributions, dtype = prepare(
        tick, params, jax.tree.map(lambda x: jnp.broadcast_to(x, (T, *x.shape)), state), inputs
    )

    def in_matmul_precision(layers: list[Layer]) -> list[Layer]:
        return [Layer(kernel.astype(dtype or kernel.dtype), bias) for kernel, bias in layers]

    def call(layers: list[Layer], params: Any, before: Any, inputs: Any) -> tuple[Any, list[Array]]:
        """Return what `tick` returns, for one tick or all, and the outputs of its dense layers."""
        computed: list[Array] = []

        def known_weights(x: Array, *_: Any) -> Array:
            layer, contribution = layers[len(computed)], inputs[0][len(computed)]
            constant: Any = layer.bias if contribution is None else contribution
            computed.append(dot(x, layer.kernel, dtype) + constant)
            return computed[-1]

        with meaning(known_weights):
            return tick(params, before, inputs[1]), computed

    def follow(layers: list[Layer], params: Any, state: Any, inputs: Any) -> tuple[Any, Any]:
        """Return the states before and after each tick."""
        layers = in_matmul_precision(layers)

        def body(state: Any, inputs: Any) -> tuple[Any, Any]:
            (state, _), _ = call(layers, params, state, inputs)
            return state, state

        _, after = jax.lax.scan(body, state, inputs, unroll=at_once)
        return jax.tree.map(lambda first, x: jnp.concatenate([first[None], x[:-1]]), state, after), after

    @jax.custom_vjp
    def run(layers: list[Layer], params: Any, state: Any, inputs: Any) -> tuple[Any, Any]:
        before, after = follow(layers, params, state, inputs)
        (_, outputs), _ = call(layers, params, before, inputs)
        return after, outputs

    def forward(layers: list[Layer], params: Any, state: Any, inputs: Any) -> tuple:
        before, after = follow(layers, params, state, inputs)
        (_, outputs), pullback, computed = jax.vjp(call, layers, params, before, inputs, has_aux=True)
        return (after, outputs), (pullback, layers, params, (before, inputs, computed))

    def backward(residuals: tuple, gradient: Any) -> tuple:
        pullback, layers, params, ticks = residuals
        layers = in_matmul_precision(layers)
        transposed = [layer.kernel.T for layer in layers]  # outside of the loop

        def body(later: Any, slices: tuple) -> tuple[Any, Any]:
            (before, inputs, computed), (after, outputs) = slices
            after = jax.tree.map(jnp.add, after, later)
            kernels_and_outputs = iter(zip(transposed, computed, strict=True))

            def known_output(x: Array, *_: Any) -> Array:
                return known(x, *next(kernels_and_outputs), dtype)

            with meaning(known_output):
                _, to_state = jax.vjp(lambda before: tick(params, before, inputs[1]), before)
            return *to_state((after, outputs)), after

        end = jax.tree.map(lambda x: jnp.zeros_like(x[0]), gradient[0])
        state, after = jax.lax.scan(body, end, (ticks, gradient), reverse=True, unroll=at_once)
        to_layers, to_params, _, to_inputs = pullback((after, gradient[1]))
        return to_layers, to_params, state, to_inputs

    run.defvjp(forward, backward)
    return run(layers, params, state, (contributions, inputs))


def prepare(
    tick: Callable[..., Any], params: Any, states: Any, inputs: Any
) -> tuple[list[Layer], list[Array | None], Any]:
    """Find out what the tick's calls of `linear` need, from a call for all ticks at any states.

    Returns:
        Each call's layer, what its `given` contributes at each tick [T, ...] (None without any), and the dtype.
    """
    layers: list[Layer] = []
    contributions: list[Array | None] = []
    dtypes = []

    def record(x: Array, kernel: Array, bias: Array, given: Array | None, dtype: Any) -> Array:
        n = x.shape[-1]
        layers.append(Layer(kernel[:n], bias if given is None else None))
        contributions.append(None if given is None else dot(given, kernel[n:], dtype) + bias)
        dtypes.append(dtype)
        return jnp.zeros((*x.shape[:-1], kernel.shape[-1]), x.dtype)

    with meaning(record):
        tick(params, states, inputs)
    return layers, contributions, dtypes[0]


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def known(x: Array, transposed: Array, output: Array, dtype: Any) -> Array:
    """Return `output`, computed before as dot(x, transposed.T, dtype) plus a constant. A gradient goes to x alone."""
    return output


known.defvjp(
    lambda x, transposed, output, dtype: (output, transposed),
    lambda dtype, transposed, gradient: (dot(gradient, transposed, dtype), None, None),
)

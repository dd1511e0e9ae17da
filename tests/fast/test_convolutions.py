"""All forms of the convolutions against the textbook form: values and gradients, on the shapes of all layers."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax import Array

from fast import convolutions

SMALL = [
    (False, 10, 4, 1, 3),
    (False, 9, 4, 5, 3),
    (False, 8, 5, 2, 3),
    (True, 1, 5, 4, 3),
    (True, 3, 5, 4, 3),
    (True, 4, 6, 4, 5),
    (True, 4, 6, 4, 1),
]


def layers(filters: int, channels: int) -> list[tuple[bool, int, int, int, int]]:
    """Return (transposed, H, size, C, O) of each layer, and of some that the model doesn't have."""
    f = filters
    plain = [(64, 4, channels, f), (31, 4, f, 2 * f), (14, 4, 2 * f, 4 * f), (6, 4, 4 * f, 8 * f)]
    transposed = [(1, 5, 16, 4 * f), (5, 5, 4 * f, 2 * f), (13, 6, 2 * f, f), (30, 6, f, channels)]
    if f == 2:
        plain += [(9, 5, 5, f), (10, 5, f, 6), (11, 6, 5, f)]
        transposed += [(3, 4, f, 5)]
    return [(False, *sizes) for sizes in plain] + [(True, *sizes) for sizes in transposed]


def operands(transposed: bool, H: int, size: int, C: int, O: int, dtype: type = np.float64) -> list[Array]:  # noqa: E741
    """Return an input, a kernel, and a gradient of the output."""
    H_out = 2 * (H - 1) + size if transposed else (H - size) // 2 + 1
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=s), dtype) for s in ((2, H, H, C), (size, size, C, O), (2, H_out, H_out, O))]


def textbook(transposed: bool):
    layer = oracle.conv_transpose if transposed else oracle.conv
    return lambda x, kernel: layer({"kernel": kernel, "bias": 0}, x)


def value_and_gradients(function, x, kernel, gradient):
    y, gradients = jax.vjp(function, x, kernel)
    return y, *gradients(gradient)


def by_few_multiplications(transposed: bool):
    return lambda x, kernel: convolutions.layer(kernel, transposed, convolutions.MANY_FRAMES)(x)


@pytest.mark.parametrize(
    "filters, channels, cpu, frames",
    [
        *((1, 1, True, 1), (2, 3, True, 1), (2, 3, False, 1), (8, 1, True, 1), (32, 3, True, 1)),
        *((2, 3, True, convolutions.MANY_FRAMES), (2, 3, False, convolutions.MANY_FRAMES)),
        (32, 3, True, convolutions.MANY_FRAMES),
    ],
)
def test_layers_equal_the_textbook(monkeypatch, filters, channels, cpu, frames):
    monkeypatch.setattr(convolutions, "on_cpu", lambda: cpu)
    if filters == 2:
        monkeypatch.setattr(convolutions, "MANY_CHANNELS", 1)
    for layer in layers(filters, channels):
        if layer[1] == 1 and frames > 1:
            continue  # one pixel is a Dense layer's
        forms = lambda x, kernel, layer=layer: convolutions.layer(kernel, layer[0], frames)(x)  # noqa: E731
        x, kernel, gradient = operands(*layer, np.float32)
        want = jax.jit(lambda *args, layer=layer: value_and_gradients(textbook(layer[0]), *args))(x, kernel, gradient)
        got = jax.jit(lambda *args, forms=forms: value_and_gradients(forms, *args))(x, kernel, gradient)
        for name, a, b in zip(("value", "to x", "to kernel"), got, want, strict=True):
            assert a.shape == b.shape
            scale = float(jnp.abs(b).max())
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * scale, err_msg=f"{name} of {layer}")


def test_transposed_convolutions_equal_sums_by_hand():
    """The sums are written out, and don't depend on a library's conventions."""
    for layer in layers(2, 3):
        if layer[0]:
            x, kernel, _ = operands(*layer, np.float32)
            by_hand = oracle.conv_transpose_by_hand({"kernel": kernel, "bias": 0}, x)
            np.testing.assert_allclose(convolutions.conv_transpose(x, kernel), by_hand, rtol=0, atol=1e-4)


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-12), (jnp.bfloat16, 0.02)])
def test_layers_equal_the_textbook_in_other_precisions(monkeypatch, dtype, tolerance, many):
    if many:
        monkeypatch.setattr(convolutions, "MANY_CHANNELS", 1)
    with jax.enable_x64(True):
        for layer in SMALL:
            forms = convolutions.conv_transpose if layer[0] else convolutions.conv
            if many:
                forms = by_few_multiplications(layer[0])
            exact = operands(*layer, np.float64)
            got = value_and_gradients(forms, *(x.astype(dtype) for x in exact))
            rounded = [x.astype(dtype).astype(np.float64) for x in exact]
            for a, b in zip(got, value_and_gradients(textbook(layer[0]), *rounded), strict=True):
                assert a.dtype == dtype
                difference = jnp.abs(a.astype(np.float64) - b).max() / jnp.abs(b).max()
                assert difference < tolerance, layer


@pytest.mark.parametrize("transposed", [False, True])
def test_transformations_of_jax_change_nothing(transposed):
    """jit, vmap, remat and eval_shape change nothing."""
    forms = convolutions.conv_transpose if transposed else convolutions.conv
    x, kernel, gradient = operands(transposed, 6, 4, 5, 3, np.float32)

    def gradients(function):
        return jax.grad(lambda x, kernel: (function(x, kernel) * gradient).sum(), (0, 1))(x, kernel)

    want = gradients(forms)
    one_by_one = jax.vmap(lambda x, kernel: forms(x[None], kernel)[0], (0, None))
    for function in (jax.jit(forms), jax.checkpoint(forms), one_by_one):
        for a, b in zip(gradients(function), want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert jax.eval_shape(forms, x, kernel).shape == gradient.shape
    jitted = jax.jit(lambda: gradients(forms))
    for a, b in zip(jitted(), jitted(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "transposed, H, size, C, O, products",
    [
        (False, 31, 4, 32, 64, 49 * 9 * 128 * 64),
        (False, 14, 4, 64, 128, 9 * 9 * 256 * 128),
        (False, 6, 4, 128, 256, 9 * 512 * 256),
        (True, 5, 5, 128, 64, 4 * 25 * 128 * 256),
        (True, 13, 6, 64, 32, 25 * 25 * 64 * 128),
    ],
)
def test_published_layers_multiply_as_rarely_as_the_algorithm_can(transposed, H, size, C, O, products):  # noqa: E741
    """The multiplications of the algorithm are needed once forward, and once for each gradient."""
    N, out = convolutions.MANY_FRAMES, 2 * (H - 1) + size if transposed else (H - size) // 2 + 1
    shapes = [jax.ShapeDtypeStruct(s, np.float32) for s in ((N, H, H, C), (size, size, C, O), (N, out, out, O))]

    def multiplications(function, *shapes) -> int:
        program = jax.jit(function).lower(*shapes).as_text()
        assert "stablehlo.convolution" not in program
        pattern = r"dot_general .*contracting_dims = \[(.)\].*: \(tensor<(.*)xf32>, .*\) -> tensor<(.*)xf32>"
        dots = re.findall(pattern, program)
        assert len(dots) == program.count("dot_general")
        return sum(int(a.split("x")[int(axis)]) * math.prod(map(int, y.split("x"))) for axis, a, y in dots)

    forms = by_few_multiplications(transposed)
    assert multiplications(forms, *shapes[:2]) == N * products
    assert multiplications(lambda *args: value_and_gradients(forms, *args), *shapes) == 3 * N * products
    few = convolutions.layer(jnp.zeros(shapes[1].shape), transposed, N - 1)
    assert "stablehlo.convolution" in jax.jit(few).lower(shapes[0]).as_text()

"""SSIM and PSNR of predicted frames, in two protocols."""

import jax
import jax.numpy as jnp
from jax import Array

import tools

PROTOCOLS = {
    "paper": "SSIM with data range 2; PSNR with data range 1 per channel, then averaged; predictions as they are",
    "standard": "SSIM with data range 1; PSNR with data range 1, over all channels; frames as saved, with 8 bits",
}
"""The protocols of SSIM and PSNR. Values of different protocols aren't comparable.

paper: as both earlier codes computed, with scikit-image 0.18 on floats. standard: can be computed from the saved
frames. In both, SSIM is per channel, with a uniform 7x7 window and sample covariances.
"""


PSNR_OF_EQUAL_FRAMES = 100.0
"""The greatest PSNR. It keeps averages finite: the PSNR of a frame that equals the truth is infinite."""


def frame_metrics(truth: Array, prediction: Array, protocol: str) -> dict[str, Array]:
    """Return SSIM and PSNR (in dB) of each frame.

    Args:
        truth: [..., H, W, C], uint8 or floats in [0, 1].
        prediction: the same shape, uint8 or floats, which may be outside of [0, 1].
        protocol: one of PROTOCOLS.

    Returns:
        "ssim" and "psnr", [...] each.
    """
    assert protocol in PROTOCOLS, protocol
    if protocol == "standard":
        truth, prediction = (x if x.dtype == jnp.uint8 else tools.to_uint8(x) for x in (truth, prediction))
    truth, prediction = (x / jnp.float32(255) if x.dtype == jnp.uint8 else x for x in (truth, prediction))
    ssim = structural_similarity(truth, prediction, data_range=2.0 if protocol == "paper" else 1.0).mean(-1)
    error = ((truth - prediction) ** 2).mean((-3, -2))
    error = error if protocol == "paper" else error.mean(-1, keepdims=True)
    psnr = -10 * jnp.log10(jnp.maximum(error, 10 ** (-PSNR_OF_EQUAL_FRAMES / 10)))
    return {"ssim": ssim, "psnr": psnr.mean(-1)}


def structural_similarity(a: Array, b: Array, data_range: float) -> Array:
    """Return the SSIM per channel, [..., H, W, C] -> [..., C], as scikit-image with its defaults."""
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    window = 7
    pixels = window**2

    def window_mean(x: Array) -> Array:
        """Average over each window within the frame, [..., H, W] -> [..., H - window + 1, W - window + 1]."""
        for sizes in (1, window), (window, 1):
            x = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1,) * (x.ndim - 2) + sizes, (1,) * x.ndim, "valid")
        return x / pixels

    # Channels first, since a last axis of size 1 is slow. Subtracting the mean doesn't change variances, but reduces
    # their rounding errors.
    a, b = (jnp.moveaxis(x, -1, -3) for x in (a, b))
    center = a.mean((-2, -1), keepdims=True)
    a, b = a - center, b - center
    mean_a, mean_b = window_mean(a), window_mean(b)
    sample = pixels / (pixels - 1)
    var_a = sample * (window_mean(a**2) - mean_a**2)
    var_b = sample * (window_mean(b**2) - mean_b**2)
    covariance = sample * (window_mean(a * b) - mean_a * mean_b)
    mean_a, mean_b = mean_a + center, mean_b + center
    similarity = (
        (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    )
    return similarity.mean((-2, -1))

"""Frames: how good they are (SSIM, PSNR) and how they look (grids, GIFs)."""

from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax import Array
from PIL import Image, ImageDraw, ImageFont

PROTOCOLS = {
    "paper": "SSIM with data range 2; PSNR with data range 1 per channel, then averaged; predictions as they are",
    "standard": "SSIM with data range 1; PSNR with data range 1, over all channels; frames as saved, with 8 bits",
}
"""How predictions are compared with the truth. Figures of different protocols can't be compared.

paper is what both earlier codes computed, with scikit-image 0.18, on floats. standard can be computed from the saved
frames. In both protocols, SSIM is per channel with a uniform 7x7 window and sample covariance.
"""


PSNR_OF_EQUAL_FRAMES = 100.0
"""Bounds the PSNR, which is infinite for a frame that equals the truth, to keep averages finite."""


def frame_metrics(truth: Array, prediction: Array, protocol: str) -> dict[str, Array]:
    """Return SSIM and PSNR (in dB) of each frame.

    Args:
        truth: [..., H, W, C], uint8 or floats in [0, 1].
        prediction: likewise, but floats may leave [0, 1].
        protocol: one of PROTOCOLS.

    Returns:
        "ssim" and "psnr", [...] each.
    """
    assert protocol in PROTOCOLS, protocol
    if protocol == "standard":
        truth, prediction = (x if x.dtype == jnp.uint8 else to_uint8(x) for x in (truth, prediction))
    truth, prediction = (x / jnp.float32(255) if x.dtype == jnp.uint8 else x for x in (truth, prediction))
    ssim = structural_similarity(truth, prediction, data_range=2.0 if protocol == "paper" else 1.0).mean(-1)
    error = ((truth - prediction) ** 2).mean((-3, -2))
    error = error if protocol == "paper" else error.mean(-1, keepdims=True)
    psnr = -10 * jnp.log10(jnp.maximum(error, 10 ** (-PSNR_OF_EQUAL_FRAMES / 10)))
    return {"ssim": ssim, "psnr": psnr.mean(-1)}


def structural_similarity(a: Array, b: Array, data_range: float, window: int = 7) -> Array:
    """SSIM per channel, [..., H, W, C] -> [..., C], as scikit-image's `structural_similarity` with its defaults."""
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    pixels = window**2

    def window_mean(x: Array) -> Array:
        """Over each window that lies within the frame: a matmul with a band matrix along each axis."""
        rows, columns = (
            (jnp.tri(size - window + 1, size, window - 1) - jnp.tri(size - window + 1, size, -1)) / window
            for size in x.shape[-3:-1]
        )
        return jnp.einsum("ph,...hwc,qw->...pqc", rows, x, columns, precision="highest")

    # Variances don't change when a constant is subtracted, but their rounding errors shrink.
    mean_a, mean_b = window_mean(a - 0.5), window_mean(b - 0.5)
    sample = pixels / (pixels - 1)
    var_a = sample * (window_mean((a - 0.5) ** 2) - mean_a**2)
    var_b = sample * (window_mean((b - 0.5) ** 2) - mean_b**2)
    covariance = sample * (window_mean((a - 0.5) * (b - 0.5)) - mean_a * mean_b)
    mean_a, mean_b = mean_a + 0.5, mean_b + 0.5
    similarity = (
        (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    )
    return similarity.mean((-3, -2))


def to_uint8(video: Array) -> Array:
    """Floats, clipped to [0, 1], as uint8; truncated like in the earlier codes."""
    return (jnp.clip(video, 0, 1) * 255).astype(jnp.uint8)


GREEN, RED = (0, 160, 80), (200, 40, 40)
"""Around frames that the model sees and reconstructs; around those that it predicts on its own."""


def save_grid(video: np.ndarray, path: Path, strip: int = 50) -> None:
    """Writes uint8 [T, H, W, C] as a PNG: rows of `strip` frames, 1 pixel apart; the last row may be shorter."""
    T, H, W, C = video.shape
    columns, rows = min(T, strip), -(-T // strip)
    grid = np.zeros((rows * columns, H + 1, W + 1, C), np.uint8)
    grid[:T, :H, :W] = video
    grid = (
        grid.reshape(rows, columns, H + 1, W + 1, C)
        .transpose(0, 2, 1, 3, 4)
        .reshape(rows * (H + 1), columns * (W + 1), C)
    )
    Image.fromarray(rgb(grid)[:-1, :-1]).save(path)


def rgb(image: np.ndarray) -> np.ndarray:
    """[..., C] as [..., 3]: colour as it is, else the first channel as grey."""
    return image if image.shape[-1] == 3 else np.repeat(image[..., :1], 3, axis=-1)


def triptych(truth: np.ndarray, prediction: np.ndarray, context: int) -> np.ndarray:
    """Truth | prediction | absolute error side by side, one row per example, uint8 [B, T, H, W, C] -> [T, H', W', 3].

    The frame around the prediction is green while the model sees the context and reconstructs it, then red.
    """
    B, T, H, W, _ = truth.shape
    error = np.abs(truth.astype(np.int16) - prediction).astype(np.uint8)
    border = 2
    picture = np.zeros((T, B, H + 2 * border, 3, W + 2 * border, 3), np.uint8)
    picture[:context, :, :, 1] = GREEN
    picture[context:, :, :, 1] = RED
    for column, video in enumerate((truth, prediction, error)):
        picture[:, :, border:-border, column, border:-border] = rgb(video).swapaxes(0, 1)
    return picture.reshape(T, B * (H + 2 * border), 3 * (W + 2 * border), 3)


def save_gif(video: np.ndarray, path: Path | str, frames_per_second: int = 15, scale: int = 2) -> None:
    """Writes uint8 [T, H, W, 3] as a GIF that repeats for ever, `scale` times enlarged.

    All frames share a palette, of 32 of them: 4 times as fast as one for each, and half the size.
    """
    sample = video[:: -(-len(video) // 32)]
    palette = Image.fromarray(sample.reshape(-1, *sample.shape[2:])).quantize(256)
    frames = [
        Image.fromarray(frame)
        .quantize(palette=palette, dither=Image.Dither.NONE)
        .resize((frame.shape[1] * scale, frame.shape[0] * scale), Image.Resampling.NEAREST)
        for frame in video
    ]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000 // frames_per_second, loop=0)


def side_by_side(rows: Mapping[str, np.ndarray], context: Mapping[str, int]) -> np.ndarray:
    """Named videos uint8 [T, H, W, C] beside each other under their names, framed as in `save_rows`: [T, H', W', 3]."""
    border, top = 2, 14
    panels = []
    for name, video in rows.items():
        T, H, W, _ = video.shape
        panel = np.zeros((T, top + H + 2 * border, W + 2 * border, 3), np.uint8)
        if name in context:
            panel[: context[name], top:] = GREEN
            panel[context[name] :, top:] = RED
        panel[:, top + border : -border, border:-border] = rgb(video)
        caption = Image.new("RGB", (W + 2 * border, top))
        ImageDraw.Draw(caption).text((border, 1), name, font=ImageFont.load_default(9))
        panel[:, :top] = np.asarray(caption)
        panels.append(panel)
    return np.concatenate(panels, axis=2)

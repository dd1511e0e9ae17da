"""Frames in files: grids, GIFs and MP4s for people, NPZ for programs."""

import io
import math
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from PIL import Image, ImageDraw, ImageFont

from system.files import replace_file


def to_uint8(video: Array) -> Array:
    """Return floats as uint8: clipped to [0, 1], and rounded down, as in the earlier codes."""
    return (jnp.clip(video, 0, 1) * 255).astype(jnp.uint8)


def joined(chunks: Iterable[Array]) -> np.ndarray:
    """Return frames that come in chunks of time as one array, uint8 [B, T, H, W, C]."""
    return np.concatenate([np.asarray(to_uint8(chunk)) for chunk in chunks], axis=1)


GREEN, RED = (0, 170, 130), (220, 50, 0)
"""Borders of reconstructed frames (green) and of predicted frames (red). Colour-blind people can tell them apart: green
is bluish here, and red yellowish."""
GREY = (110, 110, 110)
"""Border of all other frames, so that black ones have an edge."""


def save_frames(frames: np.ndarray, path: Path) -> None:
    """Write an array as a compressed NPZ.

    It takes a third of the time of `np.savez_compressed`, for a file of similar size.
    """
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file,
        file.open("arr_0.npy", "w", force_zip64=True) as entry,
    ):
        np.lib.format.write_array(entry, frames, allow_pickle=False)
    replace_file(path, buffer.getvalue())


def save_grid(video: np.ndarray, path: Path, columns: int | None = None) -> None:
    """Write uint8 [T, H, W, C] as a PNG: rows of `columns` frames, separated by grey lines.

    The last row may be shorter. The default number of columns is a multiple of 10 that makes the grid about square.
    """
    T, H, W, C = video.shape
    columns = min(T, columns or 10 * math.ceil(math.sqrt(T) / 10))
    rows = -(-T // columns)
    grid = np.full((rows * columns, H + 1, W + 1, C), GREY[0], np.uint8)
    grid[:T, :H, :W] = video
    grid = (
        grid.reshape(rows, columns, H + 1, W + 1, C)
        .transpose(0, 2, 1, 3, 4)
        .reshape(rows * (H + 1), columns * (W + 1), C)
    )
    buffer = io.BytesIO()
    Image.fromarray(rgb(grid)[:-1, :-1]).save(buffer, "PNG", compress_level=1)
    replace_file(path, buffer.getvalue())


def rgb(image: np.ndarray) -> np.ndarray:
    """Return [..., C] as [..., 3]. If C isn't 3, the first channel is shown as grey."""
    return image if image.shape[-1] == 3 else np.repeat(image[..., :1], 3, axis=-1)


def triptych(truth: np.ndarray, prediction: np.ndarray, context: int) -> np.ndarray:
    """Return truth, prediction and absolute error side by side, with the examples one below the other.

    Args:
        truth: uint8 [B, T, H, W, C].
        prediction: uint8 [B, T, H, W, C]; its context frames are reconstructions.
        context: number of context frames.

    Returns:
        uint8 [T, H', W', 3], as `side_by_side`.
    """
    error = np.abs(truth.astype(np.int16) - prediction).astype(np.uint8)
    videos = {"truth": truth, "prediction": prediction, "error": error}
    return side_by_side({name: stacked(video) for name, video in videos.items()}, {"prediction": context})


def stacked(videos: np.ndarray) -> np.ndarray:
    """Return videos [B, T, H, W, C] one below the other, separated by grey lines, [T, H', W, 3]."""
    B, T, H, W, _ = videos.shape
    picture = np.full((T, B, H + 2, W, 3), GREY, np.uint8)
    picture[:, :, :H] = rgb(videos).swapaxes(0, 1)
    return picture.reshape(T, B * (H + 2), W, 3)[:, :-2]


def save_video(video: np.ndarray, path: Path, formats: Sequence[str]) -> None:
    """Write uint8 [T, H, W, 3] in each of the formats (gif, mp4). The format replaces the suffix of the path."""
    for suffix in formats:
        {"gif": save_gif, "mp4": save_mp4}[suffix](video, path.with_suffix(f".{suffix}"))


FRAMES_PER_SECOND = 20
"""The rate of written videos. The frames of a GIF take whole hundredths of a second each."""


SCALE = 2
"""The factor by which written videos are enlarged. It is even, since the codec of MP4s needs even sizes."""


def save_gif(video: np.ndarray, path: Path | str) -> None:
    """Write uint8 [T, H, W, 3] as an enlarged GIF that repeats forever.

    All frames share a palette, which is made from up to 32 of them. That is 4 times as fast as a palette per frame, and
    halves the size.
    """
    sample = video[:: -(-len(video) // 32)]
    palette = Image.fromarray(sample.reshape(-1, *sample.shape[2:])).quantize(256)
    frames = [
        Image.fromarray(frame)
        .quantize(palette=palette, dither=Image.Dither.NONE)
        .resize((frame.shape[1] * SCALE, frame.shape[0] * SCALE), Image.Resampling.NEAREST)
        for frame in video
    ]
    buffer, duration = io.BytesIO(), 1000 // FRAMES_PER_SECOND  # ms
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=duration, loop=0)
    replace_file(Path(path), buffer.getvalue())


def save_mp4(video: np.ndarray, path: Path | str) -> None:
    """Write uint8 [T, H, W, 3] as an enlarged MP4 (H.264)."""
    import av  # slow to import

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        stream: Any = file.add_stream("libx264", rate=FRAMES_PER_SECOND, options={"crf": "18"})
        stream.height, stream.width = (SCALE * size for size in video.shape[1:3])
        stream.pix_fmt = "yuv420p"
        for image in video:
            enlarged = np.ascontiguousarray(image.repeat(SCALE, axis=0).repeat(SCALE, axis=1))
            file.mux(stream.encode(av.VideoFrame.from_ndarray(enlarged, format="rgb24")))
        file.mux(stream.encode())
    replace_file(Path(path), buffer.getvalue())


def side_by_side(videos: Mapping[str, np.ndarray], context: Mapping[str, int]) -> np.ndarray:
    """Return named videos uint8 [T, H, W, C] next to each other, [T, H', W', 3].

    Each video has its name above it. The first one has the frame's number below it. A video with an entry in `context`
    is a model's: that many frames have a green border and the label "reconstructed", the others a red border and the
    label "predicted". Other videos have a grey border.
    """
    border, top = 2, 14
    font = ImageFont.load_default(9)
    panels: list[np.ndarray] = []
    for name, video in videos.items():
        T, H, W, _ = video.shape
        observed = context.get(name, T)
        below = [f"{number} / {T}" for number in range(1, T + 1)] if not panels else [""] * T
        color = GREEN if name in context else GREY
        if name in context:
            below = ["reconstructed"] * observed + ["predicted"] * (T - observed)
        width = max(W, *(math.ceil(font.getlength(line)) for line in (name, *dict.fromkeys(below)))) + 2 * border
        panel = np.zeros((T, top + H + 2 * border + top, width, 3), np.uint8)
        framed = panel[:, top:-top, : W + 2 * border]
        framed[:observed], framed[observed:] = color, RED
        framed[:, border:-border, border:-border] = rgb(video)
        panel[:, :top] = text_image(name, width, top, font)
        labels = {line: text_image(line, width, top, font) for line in below}
        panel[:, -top:] = np.stack([labels[line] for line in below])
        panels.append(panel)
    return np.concatenate(panels, axis=2)


def text_image(line: str, width: int, height: int, font: Any) -> np.ndarray:
    """Return a line of text, white on black, uint8 [height, width, 3]."""
    image = Image.new("RGB", (width, height))
    ImageDraw.Draw(image).text((2, 1), line, font=font)
    return np.asarray(image)

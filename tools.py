"""Write frames for people to look at (grids, GIFs, MP4s) and for programs to read (NPZ)."""

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
    """Return floats, clipped to [0, 1], as uint8; truncated as in the earlier codes."""
    return (jnp.clip(video, 0, 1) * 255).astype(jnp.uint8)


def joined(chunks: Iterable[Array]) -> np.ndarray:
    """Join frames that come in chunks of time, as uint8 [B, T, H, W, C]."""
    return np.concatenate([np.asarray(to_uint8(chunk)) for chunk in chunks], axis=1)


GREEN, RED = (0, 170, 130), (220, 50, 0)
"""Around frames that the model sees and reconstructs; around those that it predicts on its own. Colour-blind readers
can tell them apart: one is bluish, the other yellowish."""
GREY = (110, 110, 110)
"""Around all other frames, so that black ones have an edge."""


def save_frames(frames: np.ndarray, path: Path) -> None:
    """Write an array as a compressed NPZ, as `np.savez_compressed` does, at a third of the time and of similar size."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file,
        file.open("arr_0.npy", "w", force_zip64=True) as entry,
    ):
        np.lib.format.write_array(entry, frames, allow_pickle=False)
    replace_file(path, buffer.getvalue())


def save_grid(video: np.ndarray, path: Path, columns: int | None = None) -> None:
    """Write uint8 [T, H, W, C] as a PNG: rows of `columns` frames between grey lines; the last row may be shorter.

    By default, the columns are so many tens that the grid is about square.
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
    """Return [..., C] as [..., 3]: colour as it is, else the first channel as grey."""
    return image if image.shape[-1] == 3 else np.repeat(image[..., :1], 3, axis=-1)


def triptych(truth: np.ndarray, prediction: np.ndarray, context: int) -> np.ndarray:
    """Return truth, prediction and absolute error side by side, an example below the other, [B, T, H, W, C] each.

    The prediction is what the model shows: of the `context`, which it sees, the reconstruction.

    Returns:
        uint8 [T, H', W', 3], as `side_by_side` does.
    """
    error = np.abs(truth.astype(np.int16) - prediction).astype(np.uint8)
    videos = {"truth": truth, "prediction": prediction, "error": error}
    return side_by_side({name: stacked(video) for name, video in videos.items()}, {"prediction": context})


def stacked(videos: np.ndarray) -> np.ndarray:
    """Return videos [B, T, H, W, C] one below the other, with a grey line between, [T, H', W, 3]."""
    B, T, H, W, _ = videos.shape
    picture = np.full((T, B, H + 2, W, 3), GREY, np.uint8)
    picture[:, :, :H] = rgb(videos).swapaxes(0, 1)
    return picture.reshape(T, B * (H + 2), W, 3)[:, :-2]


def save_video(video: np.ndarray, path: Path, formats: Sequence[str] = ("gif",)) -> None:
    """Write uint8 [T, H, W, 3] in each of the formats (gif, mp4), which take the place of the path's suffix."""
    for suffix in formats:
        {"gif": save_gif, "mp4": save_mp4}[suffix](video, path.with_suffix(f".{suffix}"))


FRAMES_PER_SECOND = 20
"""Of the videos that are written. A GIF holds whole hundredths of a second per frame."""


def save_gif(video: np.ndarray, path: Path | str, scale: int = 2) -> None:
    """Write uint8 [T, H, W, 3] as a GIF that repeats forever, `scale` times enlarged.

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
    buffer, duration = io.BytesIO(), 1000 // FRAMES_PER_SECOND  # ms
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=duration, loop=0)
    replace_file(Path(path), buffer.getvalue())


def save_mp4(video: np.ndarray, path: Path | str, scale: int = 2) -> None:
    """Write uint8 [T, H, W, 3] as an MP4 (H.264), `scale` times enlarged: an even number, which the codec needs."""
    import av  # slow to import

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        stream: Any = file.add_stream("libx264", rate=FRAMES_PER_SECOND, options={"crf": "18"})
        stream.height, stream.width = (scale * size for size in video.shape[1:3])
        stream.pix_fmt = "yuv420p"
        for image in video:
            enlarged = np.ascontiguousarray(image.repeat(scale, axis=0).repeat(scale, axis=1))
            file.mux(stream.encode(av.VideoFrame.from_ndarray(enlarged, format="rgb24")))
        file.mux(stream.encode())
    replace_file(Path(path), buffer.getvalue())


def side_by_side(rows: Mapping[str, np.ndarray], context: Mapping[str, int]) -> np.ndarray:
    """Return named videos uint8 [T, H, W, C] beside each other: [T, H', W', 3].

    Their names stand above, the frame's number below the first one. A row with `context` is a model's: its frames are
    framed green and called reconstructed as long as the model sees the video, then framed red and called predicted.
    Other rows are framed grey.
    """
    border, top = 2, 14
    font = ImageFont.load_default(9)
    panels: list[np.ndarray] = []
    for name, video in rows.items():
        T, H, W, _ = video.shape
        seen = context.get(name, T)
        below = [f"{number} / {T}" for number in range(1, T + 1)] if not panels else [""] * T
        color = GREEN if name in context else GREY
        if name in context:
            below = ["reconstructed"] * seen + ["predicted"] * (T - seen)
        width = max(W, *(math.ceil(font.getlength(line)) for line in (name, *dict.fromkeys(below)))) + 2 * border
        panel = np.zeros((T, top + H + 2 * border + top, width, 3), np.uint8)
        framed = panel[:, top:-top, : W + 2 * border]
        framed[:seen], framed[seen:] = color, RED
        framed[:, border:-border, border:-border] = rgb(video)
        panel[:, :top] = text(name, width, top, font)
        written = {line: text(line, width, top, font) for line in below}
        panel[:, -top:] = np.stack([written[line] for line in below])
        panels.append(panel)
    return np.concatenate(panels, axis=2)


def text(line: str, width: int, height: int, font: Any) -> np.ndarray:
    """Return a line of text, white on black, uint8 [height, width, 3]."""
    image = Image.new("RGB", (width, height))
    ImageDraw.Draw(image).text((2, 1), line, font=font)
    return np.asarray(image)

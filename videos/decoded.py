"""Videos of any kind -> one memory-mapped file of uint8 frames per split, decoded once.

A frame file is two files: `<name>.frames`, the frames of all videos one after another, and `<name>.json`, its index.
The index is written last: if it exists, the frames are complete.
"""

import collections
import concurrent.futures
import contextlib
import errno
import io
import itertools
import json
import os
import re
import shutil
import tempfile
import threading
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeGuard

import filelock
import numpy as np
from tqdm import tqdm

from config import FRAME_SIZE, ConfigError
from system.files import replace_file

if TYPE_CHECKING:
    import av  # slow to import, and not there where nothing is decoded: each function that needs it imports it


class Video(NamedTuple):
    """An encoded video: a file's path, or its contents."""

    name: str
    content: Path | bytes


class Videos(Protocol):
    """A random-access source of videos."""

    @property
    def origin(self) -> str:
        """What identifies the videos: it changes when they do."""

    @property
    def remedy(self) -> str:
        """What to do if none of them can be decoded."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Video: ...


class Unreadable(Exception):
    """Why a video can't be decoded."""


# ---------------------------------------------------------------------------------------------- decoding


class Decoding(NamedTuple):
    """How frames are converted to 64x64 pixels and to the number of channels."""

    channels: int
    crop: bool = False
    """Scale the shorter side to 64 and crop the longer one around the centre; otherwise stretch."""
    luma: bool = False
    """Convert colours to grey by their brightness; otherwise take the first channel, for videos that are grey."""


def decode(video: Video, how: Decoding) -> Iterator[np.ndarray]:
    """Decode the frames of a video one by one, upright, uint8 [64, 64, C].

    Raises:
        Unreadable: no frame, or not all frames, could be decoded.
    """
    import av

    frames = array_frames(video.content) if is_array(video.content) else file_frames(video.content)
    # They hold the tables of their conversion, so each serves all frames.
    to_rgb, to_size = av.video.reformatter.VideoReformatter(), av.video.reformatter.VideoReformatter()
    matrix: np.ndarray | None = None
    try:
        for frame, pixel_aspect in frames:
            if matrix is None:
                matrix = display_matrix(frame)
            width = height = FRAME_SIZE
            if how.crop:
                shown = max(1, round(frame.width * pixel_aspect)), frame.height
                width, height = (-(-FRAME_SIZE * extent // min(shown)) for extent in shown)
            colour = how.channels == 3 or how.luma
            if colour and (width, height) != (frame.width, frame.height) and not is_grey(frame):
                # Scaled directly, colours would have half the horizontal resolution.
                frame = to_rgb.reformat(frame, format="rgb24")
            pixels = to_size.reformat(frame, width, height, "rgb24", interpolation="AREA").to_ndarray()
            top, left = (height - FRAME_SIZE) // 2, (width - FRAME_SIZE) // 2
            pixels = upright(pixels[top : top + FRAME_SIZE, left : left + FRAME_SIZE], matrix)
            if how.channels == 1:
                luma = (pixels @ np.array([299, 587, 114]) + 500) // 1000 if how.luma else pixels[..., 0]
                pixels = luma.astype(np.uint8)[..., None]
            yield pixels
    except (av.FFmpegError, ValueError) as error:  # ValueError: formats that PyAV doesn't know
        raise Unreadable(" ".join(str(error).split())) from error


def is_grey(frame: "av.VideoFrame") -> bool:
    """Return whether a frame has no colours: one channel, or 8-bit chroma that is neutral throughout."""
    if frame.format.name.startswith("gray"):
        return True
    if not re.fullmatch(r"yuvj?4\d\dp", frame.format.name):
        return False
    planes: Any = frame.planes[1:]
    chroma = (np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:, : plane.width] for plane in planes)
    return all((plane == 128).all() for plane in chroma)


def display_matrix(frame: "av.VideoFrame") -> np.ndarray:
    """Return how a frame is to be shown, int32 [2, 2]: [x, y] @ matrix are its coordinates on the screen."""
    data: Any = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return np.eye(2, dtype=np.int32)
    return np.frombuffer(bytes(data)[:36], np.int32).reshape(3, 3)[:2, :2]


def upright(pixels: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Turn and mirror [H, W, C] as a display matrix says, by the nearest multiple of 90 degrees."""
    (xx, xy), (yx, yy) = matrix.tolist()
    if abs(xy) > abs(xx):
        pixels, xx, yy = pixels.transpose(1, 0, 2), yx, xy
    return pixels[:: -1 if yy < 0 else 1, :: -1 if xx < 0 else 1]


def is_array(content: Path | bytes) -> TypeGuard[Path]:
    return isinstance(content, Path) and content.suffix.lower() in (".npy", ".npz")


def open_container(content: Path | bytes) -> Any:
    import av

    return av.open(io.BytesIO(content) if isinstance(content, bytes) else str(content), mode="r")


def file_frames(content: Path | bytes) -> Iterator[tuple["av.VideoFrame", Fraction]]:
    """Decode the frames of a file as they are, each with the aspect ratio (width : height) of its pixels."""
    with open_container(content) as container:
        if not container.streams.video:
            raise Unreadable("it has no video stream")
        stream = container.streams.video[0]
        for frame in container.decode(stream):
            yield frame, stream.sample_aspect_ratio or Fraction(1)


def array_frames(path: Path) -> Iterator[tuple["av.VideoFrame", Fraction]]:
    """Read the frames of an array, as `file_frames` does those of a video."""
    import av

    for frame in read_array(path):
        colour = np.repeat(frame, 3, -1) if frame.shape[-1] == 1 else np.ascontiguousarray(frame)
        yield av.VideoFrame.from_ndarray(colour, "rgb24"), Fraction(1)


def read_array(path: Path) -> np.ndarray:
    """Read a video from .npy or the only array in .npz, uint8 [T, H, W, 1 or 3].

    Raises:
        Unreadable: it is something else.
    """
    try:
        if path.suffix.lower() == ".npy":
            loaded = np.load(path, mmap_mode="r")
        else:
            with path.open("rb") as opened, np.load(opened) as file:  # opened here: NumPy leaves a damaged one open
                if len(file.files) != 1:
                    raise Unreadable(f"it holds {len(file.files)} arrays instead of one")
                loaded = np.asarray(file[file.files[0]])
    except Unreadable:
        raise
    except Exception as error:  # whatever NumPy and zipfile meet in a damaged file
        raise Unreadable("it isn't an array") from error
    if loaded.dtype != np.uint8 or loaded.ndim != 4 or loaded.shape[-1] not in (1, 3):
        raise Unreadable(f"it is {loaded.dtype} {list(loaded.shape)} instead of uint8 [T, H, W, 1 or 3]")
    return loaded


def count_frames(video: Video) -> int:
    """Return how many frames a video claims to have: an estimate; 0 if it claims nothing."""
    import av

    try:
        if is_array(video.content):
            return len(read_array(video.content))
        with open_container(video.content) as container:
            stream = container.streams.video[0]
            if stream.frames:
                return stream.frames
            seconds = Fraction(container.duration or 0, av.time_base)
            return round(seconds * (stream.average_rate or 0))
    except (av.FFmpegError, Unreadable, IndexError, ValueError):
        return 0


# ---------------------------------------------------------------------------------------------- the frame file


class FrameFile:
    """The decoded videos of a split.

    `frames` is uint8 [N, 64, 64, C], memory-mapped; video i is frames[starts[i] : starts[i] + lengths[i]].
    """

    def __init__(self, path: Path):
        """Open a frame file, given without its suffix.

        Raises:
            ConfigError: it is damaged.
        """
        self.path = path
        try:
            index = json.loads(index_path(path).read_text())
            if index.pop("checksum") != checksum(index):
                raise ValueError
            shape = (index["frames"], FRAME_SIZE, FRAME_SIZE, index["channels"])
            if frames_path(path).stat().st_size != np.prod(shape):
                raise ValueError
            self.frames = np.memmap(frames_path(path), np.uint8, "r", shape=shape)
        except PermissionError as error:
            raise ConfigError(f"datadir: {error.filename} can't be read ({error.strerror}); permit it") from error
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ConfigError(f"datadir: {path}.* is damaged; run again with --rebuild_frames") from error
        self.names: list[str] = [name for name, _ in index["videos"]]
        self.lengths = np.array([length for _, length in index["videos"]], np.int64)
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.skipped: dict[str, str] = index["skipped"]
        self.origin: str = index["origin"]


def frames_path(path: Path) -> Path:
    return path.with_name(path.name + ".frames")


def index_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def checksum(index: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(index, sort_keys=True).encode())


def frame_file(
    path: Path, open_videos: Callable[[], Videos], how: Decoding, origin: str | None = None, rebuild: bool = False
) -> FrameFile:
    """Open the frame file at `path` (without suffix); decode it first if needed, by one process at a time.

    Args:
        path: where it is or will be.
        open_videos: returns the videos; only called to decode.
        how: how to decode.
        origin: if given, that of the videos; a file of others is refused.
        rebuild: decode again.

    Raises:
        ConfigError: it can't be read or made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with one_process(path.with_name(path.name + ".lock"), f"decoding {path}.*"):
            if rebuild or not index_path(path).exists():
                build(path, open_videos(), how)
    except OSError as error:
        if index_path(path).exists() and not rebuild:
            pass  # complete, on a disk that can't be written
        elif error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ConfigError(
                f"datadir: no space left in {path.parent} for decoded frames; free some, or choose another"
            ) from error
        else:
            raise ConfigError(f"datadir: can't write to {path.parent} ({error.strerror}); choose another") from error
    file = FrameFile(path)
    if origin not in (None, file.origin):
        raise ConfigError(
            f"datadir: the videos have changed since {path}.* was decoded; run again with --rebuild_frames"
        )
    return file


@contextlib.contextmanager
def one_process(lock: Path, what: str) -> Iterator[None]:
    """Hold a lock, which the system releases if the process dies; say so if another process holds it.

    Args:
        lock: the lock's file.
        what: what it is held for, such as "decoding x".
    """
    held = filelock.FileLock(lock)
    try:
        held.acquire(timeout=0)
    except filelock.Timeout:
        print(f"Another process is {what}; waiting for it")
        held.acquire()
    try:
        yield
    finally:
        held.release()


def remove_others(frames: Path, dataset: str, origin: str) -> None:
    """Remove a dataset's frame files in the folder `frames` that were decoded from other videos."""
    for index in frames.glob(f"{dataset}-*.json"):
        path = index.with_suffix("")
        with contextlib.suppress(ConfigError):  # a damaged one is refused when it is used
            if FrameFile(path).origin != origin:
                print(f"Removing {path}.*, which was decoded from another source")
                index.unlink()
                frames_path(path).unlink()


def listed(names: Collection[str], limit: int = 100) -> str:
    """Join names for a message, the first `limit` of them."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(itertools.islice(names, limit)) + more


def build(path: Path, videos: Videos, how: Decoding) -> None:
    """Decode videos in parallel into a file beside the final one, then move it there.

    Threads decode (PyAV releases the GIL). Of a long video only some megabytes of frames are held in memory, the rest
    is on disk.

    Raises:
        ConfigError: too little space, or none of the videos can be decoded.
    """
    frame_bytes = FRAME_SIZE * FRAME_SIZE * how.channels
    expected = sum(count_frames(videos[i]) for i in range(len(videos)))
    free = shutil.disk_usage(path.parent).free
    needed = expected * frame_bytes
    print(f"Decoding {len(videos)} videos, about {expected:,} frames, {needed / 1e9:.2f} GB, to {path}.frames")
    if needed > free:
        raise ConfigError(
            f"datadir: {path.parent} has {free // 10**6:,} MB free, decoded frames need {-(-needed // 10**6):,} MB; "
            "free some, or choose another"
        )

    stopped = threading.Event()

    def decode_aside(video: Video) -> tuple[str, Any]:
        spool: Any = spools.enter_context(tempfile.SpooledTemporaryFile(32 * 2**20, dir=str(path.parent)))
        try:
            count = 0
            for frame in decode(video, how):
                if stopped.is_set():
                    raise Unreadable("interrupted")
                spool.write(frame.tobytes())
                count += 1
            if not count:
                raise Unreadable("it has no frames")
            spool.seek(0)
            return video.name, (count, spool)
        except Unreadable as error:
            spool.close()
            return video.name, str(error)

    kept: list[tuple[str, int]] = []
    skipped: dict[str, str] = {}
    aside = frames_path(path).with_suffix(".frames.new")
    threads = os.cpu_count() or 1
    try:
        with (
            contextlib.ExitStack() as spools,
            aside.open("wb") as out,
            concurrent.futures.ThreadPoolExecutor(threads) as pool,
            tqdm(total=expected or None, unit=" frames", unit_scale=True, dynamic_ncols=True, mininterval=0.5) as bar,
        ):
            try:
                for name, result in in_order(pool, decode_aside, (videos[i] for i in range(len(videos))), 2 * threads):
                    if isinstance(result, str):
                        skipped[name] = result
                        continue
                    count, spool = result
                    with spool:
                        shutil.copyfileobj(spool, out)
                    kept.append((name, count))
                    bar.update(count)
            finally:
                stopped.set()  # after an error or an interrupt, the threads end at their next frame
            out.flush()
            os.fsync(out.fileno())
        if skipped:
            reasons = [f"{name} ({reason})" for name, reason in skipped.items()]
            print(f"Skipped {len(skipped)} unreadable videos: {listed(reasons)}")
        if not kept:
            raise ConfigError(
                f"datadir: none of the {len(videos)} videos for {path.name} can be decoded; {videos.remedy}"
            )
        index_path(path).unlink(missing_ok=True)
        os.replace(aside, frames_path(path))
    finally:
        aside.unlink(missing_ok=True)
    index: dict[str, Any] = {
        "origin": videos.origin,
        "channels": how.channels,
        "frames": sum(count for _, count in kept),
        "videos": kept,
        "skipped": skipped,
    }
    index = json.loads(json.dumps(index))
    replace_file(index_path(path), json.dumps(index | {"checksum": checksum(index)}).encode())


def in_order(pool: concurrent.futures.Executor, function: Any, items: Iterable[Any], ahead: int) -> Iterator[Any]:
    """Map like `pool.map`, but compute at most `ahead` results before they are asked for."""
    futures: collections.deque[concurrent.futures.Future] = collections.deque()
    items = iter(items)
    for item in itertools.islice(items, ahead):
        futures.append(pool.submit(function, item))
    while futures:
        result = futures.popleft().result()
        for item in itertools.islice(items, 1):
            futures.append(pool.submit(function, item))
        yield result


# ---------------------------------------------------------------------------------------------- a folder of videos

SUFFIXES = {".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".npy", ".npz", ".webm"}


class Folder(Sequence[Video]):
    """The videos below a folder, in the order of their paths."""

    def __init__(self, folder: Path):
        """Find the videos.

        Raises:
            ConfigError: the folder is missing, can't be read, or holds no videos.
        """
        wanted = f"put {', '.join(sorted(SUFFIXES))} files there"
        if not folder.is_dir():
            raise ConfigError(f"datadir: {folder} is missing; {wanted}")
        self.folder = folder
        try:
            paths = sorted(files_below(folder))
        except OSError as error:
            raise ConfigError(f"datadir: {error.filename} can't be read ({error.strerror}); permit it") from error
        self.paths = [path for path in paths if is_video(path)]
        self.ignored = [str(path.relative_to(folder)) for path in paths if not is_video(path)]
        if not self.paths:
            found = f" (but {listed(self.ignored)})" if self.ignored else ""
            raise ConfigError(f"datadir: {folder} holds no videos{found}; {wanted}")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> Any:
        path = self.paths[index]
        return Video(str(path.relative_to(self.folder)), path)

    @property
    def origin(self) -> str:
        """Changes when a file is added, removed, renamed or written."""
        stats = [
            (str(path.relative_to(self.folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in self.paths
        ]
        return f"{len(stats)} files, {zlib.crc32(json.dumps(stats).encode()):08x}"

    @property
    def remedy(self) -> str:
        return f"put others into {self.folder}"


def files_below(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Find all files below a folder, following links to folders except to one of those `above`."""
    real = folder.resolve()
    if real in above:
        return
    for path in folder.iterdir():
        if path.is_dir():
            yield from files_below(path, (*above, real))
        else:
            yield path


def is_video(path: Path) -> bool:
    """Return whether a path is a file with a video's suffix, and not macOS's metadata of one (`._name`)."""
    return path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith("._")

"""Videos of any kind -> one memory-mapped file of uint8 frames per split, decoded once.

A frame file is two files: `<name>.frames`, the frames of all videos one after the other, and `<name>.json`, its index,
which comes last and so says that the frames are complete.
"""

import collections
import concurrent.futures
import contextlib
import errno
import io
import itertools
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import av
import filelock
import numpy as np
from tqdm import tqdm

from config import FRAME_SIZE, ConfigError


class Video(NamedTuple):
    """A video that isn't decoded yet: a file's path, or its contents."""

    name: str
    content: Path | bytes


class Videos(Protocol):
    """A random-access source of videos."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Video: ...


class Unreadable(Exception):
    """A video that can't be decoded, and why."""


# ---------------------------------------------------------------------------------------------- decoding


class Decoding(NamedTuple):
    """How frames are brought to 64x64 and to the number of channels."""

    channels: int
    crop: bool = False
    """Scale the shorter side to 64 and cut the longer one's ends; else stretch."""
    luma: bool = False
    """Grey is the brightness of colours; else the first channel, for videos that are grey already."""


def decode(video: Video, how: Decoding) -> Iterator[np.ndarray]:
    """The frames of a video, one after the other, uint8 [64, 64, C].

    Raises:
        Unreadable: no frame, or not all frames, could be decoded.
    """
    if isinstance(video.content, Path) and video.content.suffix in (".npy", ".npz"):
        frames: Iterator[av.VideoFrame] = array_frames(video.content)
    else:
        frames = file_frames(video.content)
    # One for all frames: it holds the tables of the conversion.
    reformatter = av.video.reformatter.VideoReformatter()
    try:
        for frame in frames:
            width = height = FRAME_SIZE
            if how.crop:
                shorter = min(frame.width, frame.height)
                width, height = (-(-FRAME_SIZE * extent // shorter) for extent in (frame.width, frame.height))
            pixels = reformatter.reformat(frame, width, height, "rgb24", interpolation="AREA").to_ndarray()
            top, left = (height - FRAME_SIZE) // 2, (width - FRAME_SIZE) // 2
            pixels = pixels[top : top + FRAME_SIZE, left : left + FRAME_SIZE]
            if how.channels == 1:
                luma = (pixels @ np.array([299, 587, 114]) + 500) // 1000 if how.luma else pixels[..., 0]
                pixels = luma.astype(np.uint8)[..., None]
            yield pixels
    except (av.FFmpegError, ValueError) as error:  # ValueError: formats that PyAV doesn't know
        raise Unreadable(" ".join(str(error).split())) from error


def open_container(content: Path | bytes) -> Any:
    return av.open(io.BytesIO(content) if isinstance(content, bytes) else str(content), mode="r")


def file_frames(content: Path | bytes) -> Iterator[av.VideoFrame]:
    with open_container(content) as container:
        if not container.streams.video:
            raise Unreadable("it has no video stream")
        yield from container.decode(video=0)


def array_frames(path: Path) -> Iterator[av.VideoFrame]:
    frames = read_array(path)
    for frame in frames:
        if frame.shape[-1] == 1:
            yield av.VideoFrame.from_ndarray(np.repeat(frame, 3, -1), "rgb24")
        else:
            yield av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")


def read_array(path: Path) -> np.ndarray:
    """uint8 [T, H, W, C] with 1 or 3 channels, from .npy or the only array of .npz."""
    try:
        loaded = np.load(path, mmap_mode="r" if path.suffix == ".npy" else None)
        if path.suffix == ".npz":
            with loaded:
                if len(loaded.files) != 1:
                    raise Unreadable(f"it holds {len(loaded.files)} arrays instead of one")
                loaded = loaded[loaded.files[0]]
    except (OSError, ValueError, EOFError) as error:
        raise Unreadable("it is no array") from error
    if loaded.dtype != np.uint8 or loaded.ndim != 4 or loaded.shape[-1] not in (1, 3):
        raise Unreadable(f"it is {loaded.dtype} {list(loaded.shape)} instead of uint8 [T, H, W, 1 or 3]")
    return loaded


def count_frames(video: Video) -> int:
    """The frames that a video says it has: an estimate. 0 where it says nothing."""
    try:
        if isinstance(video.content, Path) and video.content.suffix in (".npy", ".npz"):
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
        """Opens a frame file, without its suffix.

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
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ConfigError(f"datadir: {path}.* is damaged; run again with --rebuild_frames") from error
        self.frames = np.memmap(frames_path(path), np.uint8, "r", shape=shape)
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


def frame_file(path: Path, open_videos: Any, how: Decoding, origin: str, rebuild: bool = False) -> FrameFile:
    """The frame file at `path` (without suffix), decoded now where it isn't there, by one process at a time.

    Args:
        path: where it is or shall be.
        open_videos: returns the `Videos`; only called to decode.
        how: to decode.
        origin: what the videos are; a file of other videos isn't used.
        rebuild: decode again.

    Raises:
        ConfigError: it can't be read or made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path.with_name(path.name + ".lock"))
        with waiting(lock, path):
            if rebuild or not index_path(path).exists():
                with contextlib.suppress(FileNotFoundError):
                    index_path(path).unlink()
                build(path, open_videos(), how, origin)
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
    if file.origin != origin:
        raise ConfigError(
            f"datadir: the videos have changed since {path}.* was decoded; run again with --rebuild_frames"
        )
    return file


@contextlib.contextmanager
def waiting(lock: filelock.BaseFileLock, path: Path) -> Iterator[None]:
    """Holds the lock, which the system takes back from a process that dies; says so where another process has it."""
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        print(f"Another process is decoding {path}.*; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def build(path: Path, videos: Videos, how: Decoding, origin: str) -> None:
    """Decodes the videos, some at a time, into a file beside the final one, and moves it there.

    Threads decode (PyAV releases the GIL). Of a long video only some megabytes of frames are held in memory, the rest
    goes to disk.
    """
    frame_bytes = FRAME_SIZE * FRAME_SIZE * how.channels
    expected = sum(count_frames(videos[i]) for i in range(len(videos)))
    free = shutil.disk_usage(path.parent).free
    needed = expected * frame_bytes
    print(f"Decoding {len(videos)} videos, about {expected:,} frames, {needed / 1e9:.2f} GB, to {path}.frames")
    if needed > free:
        raise ConfigError(
            f"datadir: {path.parent} has {free / 1e9:.1f} GB free, decoded frames need {needed / 1e9:.1f} GB; "
            "free some, or choose another"
        )

    def decode_aside(video: Video) -> tuple[str, Any]:
        spool: Any = spools.enter_context(tempfile.SpooledTemporaryFile(32 * 2**20, dir=str(path.parent)))
        try:
            count = 0
            for frame in decode(video, how):
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
            for name, result in in_order(pool, decode_aside, (videos[i] for i in range(len(videos))), 2 * threads):
                if isinstance(result, str):
                    skipped[name] = result
                    continue
                count, spool = result
                with spool:
                    shutil.copyfileobj(spool, out)
                kept.append((name, count))
                bar.update(count)
            out.flush()
            os.fsync(out.fileno())
        if skipped:
            listed = "; ".join(f"{name} ({reason})" for name, reason in skipped.items())
            print(f"Skipped {len(skipped)} unreadable videos: {listed}")
        if not kept:
            raise ConfigError(f"datadir: none of the {len(videos)} videos for {path.name} can be decoded")
        os.replace(aside, frames_path(path))
    finally:
        aside.unlink(missing_ok=True)
    index: dict[str, Any] = {
        "origin": origin,
        "channels": how.channels,
        "frames": sum(count for _, count in kept),
        "videos": kept,
        "skipped": skipped,
    }
    index = json.loads(json.dumps(index))
    new = index_path(path).with_suffix(".json.new")
    new.write_text(json.dumps(index | {"checksum": checksum(index)}))
    os.replace(new, index_path(path))


def in_order(pool: concurrent.futures.Executor, function: Any, items: Iterable[Any], ahead: int) -> Iterator[Any]:
    """`pool.map`, but with at most `ahead` results computed before they are asked for."""
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

SUFFIXES = {".mp4", ".avi", ".webm", ".gif", ".npy", ".npz"}


class Folder(Sequence[Video]):
    """The videos below a folder, in the order of their paths."""

    def __init__(self, folder: Path):
        """Raises ConfigError where there is no such folder or no video in it."""
        if not folder.is_dir():
            raise ConfigError(f"datadir: {folder} is missing; put {', '.join(sorted(SUFFIXES))} files there")
        self.folder = folder
        self.paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        if not self.paths:
            raise ConfigError(f"datadir: {folder} holds no videos; put {', '.join(sorted(SUFFIXES))} files there")

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

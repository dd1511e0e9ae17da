"""Decode videos of any kind once, into one memory-mapped file of uint8 frames per split.

A frame file consists of `<name>.frames`, the frames of all videos one after another, and `<name>.json`, its index.
Actions, if the videos have any, are in `<name>.actions`. The index is written last: if it exists, the others are
complete.
"""

import collections
import concurrent.futures
import contextlib
import errno
import io
import itertools
import json
import math
import os
import re
import shutil
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypeGuard

import filelock
import numpy as np
from tqdm import tqdm

from config import FRAME_SIZE, ConfigError
from system.files import replace_file

if TYPE_CHECKING:
    import av  # slow to import, and only needed to decode: each function that needs it imports it


class Clip(NamedTuple):
    """Frames `first` to `stop` (exclusive) of the array `image` in an .npz file."""

    path: Path
    first: int
    stop: int


class Video(NamedTuple):
    """A video to decode: a file's path, its contents, or a clip of an array."""

    name: str
    content: Path | bytes | Clip
    actions: np.ndarray | None = None
    """float32 [T, A]: each action led to its frame. None: the video has no actions."""


class Videos(Protocol):
    """A random-access source of videos."""

    @property
    def origin(self) -> str:
        """A text that identifies the videos: it changes if they do."""

    @property
    def remedy(self) -> str:
        """What the user can do if no video can be decoded."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Video: ...


class Unreadable(Exception):
    """The error of a video that can't be decoded."""


class Truncated(Exception):
    """The error of a file that ends before the last frame that it announces."""


class Unordered(Exception):
    """The error of a file whose frames' times are missing or don't increase."""


# ---------------------------------------------------------------------------------------------- decoding


class Decoding(NamedTuple):
    """How frames are converted to 64x64 pixels and to the number of channels."""

    channels: int
    fit: str = "stretch"
    """crop: scale the shorter side to 64, crop the longer side around its centre. pad: scale the longer side to 64,
    centre the frame on black. stretch: scale both sides to 64."""
    luma: bool = False
    """Convert colours to grey by their brightness. Otherwise take the first channel: the videos are grey."""
    partial: bool = False
    """Keep the frames of a truncated video. Otherwise leave the video out."""
    fps: float | None = None
    """Sample frames at this rate, by their times. None: keep every frame."""
    in_order: bool = False
    """Ignore the frames' own times, and assume the file's average rate."""


def decode(video: Video, how: Decoding) -> Iterator[np.ndarray]:
    """Yield the frames of a video, upright, uint8 [64, 64, C].

    Raises:
        Unreadable: no frame can be decoded or, unless `how.partial`, fewer frames than the file announces.
        Unordered: the frames' times can't be used; decode again with `in_order`.
    """
    import av

    frames = array_frames(video.content) if is_array(video.content) else file_frames(video.content, how)
    count = 0
    # Both keep the tables of their conversion from frame to frame.
    to_rgb, to_size = ToRGB(), av.video.reformatter.VideoReformatter()
    matrix: np.ndarray | None = None
    try:
        for frame, pixel_aspect in frames:
            if matrix is None:
                matrix = display_matrix(frame)
            width = height = FRAME_SIZE
            if how.fit != "stretch":
                shown = max(1, round(frame.width * pixel_aspect)), frame.height
                if how.fit == "crop":
                    width, height = (-(-FRAME_SIZE * extent // min(shown)) for extent in shown)
                else:
                    width, height = (max(1, round(FRAME_SIZE * extent / max(shown))) for extent in shown)
            colour = how.channels == 3 or how.luma
            # If a frame is scaled directly, its colours lose half of the horizontal resolution.
            if (width, height) == (frame.width, frame.height) or (colour and not is_grey(frame)):
                frame = to_rgb(frame)
            # Files are decoded in parallel. More threads for one frame take longer to start than to scale it.
            frame = to_size.reformat(frame, width, height, "rgb24", interpolation="AREA", threads=1)
            pixels = frame.to_ndarray()
            pixels = upright(centred(pixels), matrix)
            if how.channels == 1:
                luma = (pixels @ np.array([299, 587, 114]) + 500) // 1000 if how.luma else pixels[..., 0]
                pixels = luma.astype(np.uint8)[..., None]
            yield pixels
            count += 1
    except (av.FFmpegError, ValueError, Truncated) as error:  # ValueError: formats that PyAV doesn't know
        if not (how.partial and count):
            raise Unreadable(" ".join(str(error).split())) from error


def centred(pixels: np.ndarray) -> np.ndarray:
    """Crop or pad [H, W, C] around its centre to [64, 64, C]."""
    for axis in 0, 1:
        excess = pixels.shape[axis] - FRAME_SIZE
        if excess > 0:
            pixels = pixels.take(range(excess // 2, excess // 2 + FRAME_SIZE), axis)
        elif excess < 0:
            before = -excess // 2
            pixels = np.pad(pixels, [(before, -excess - before) if i == axis else (0, 0) for i in range(3)])
    return pixels


class ToRGB:
    """A conversion to rgb24 in a filter graph, as in ffmpeg. (A reformatter ignores where colours are sampled.)"""

    def __init__(self) -> None:
        self.properties: Any = None

    def __call__(self, frame: Any) -> Any:
        import av

        if frame.format.name == "rgb24":
            return frame
        properties = frame.width, frame.height, frame.format.name
        if properties != self.properties:  # at the first frame, and if they change within a video
            self.properties, self.graph = properties, av.filter.Graph()
            self.graph.threads = 1
            source = self.graph.add_buffer(
                width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base
            )
            convert, sink = self.graph.add("format", "rgb24"), self.graph.add("buffersink")
            source.link_to(convert)
            convert.link_to(sink)
            self.graph.configure()
        self.graph.push(frame)
        return self.graph.pull()


def is_grey(frame: "av.VideoFrame") -> bool:
    """Return whether a frame has no colours: it has one channel, or all its 8-bit chroma is neutral."""
    if frame.format.name.startswith("gray"):
        return True
    if not re.fullmatch(r"yuvj?4\d\dp", frame.format.name):
        return False
    planes: Any = frame.planes[1:]
    chroma = (np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:, : plane.width] for plane in planes)
    return all((plane == 128).all() for plane in chroma)


def display_matrix(frame: "av.VideoFrame") -> np.ndarray:
    """Return a frame's display matrix, int32 [2, 2]: [x, y] @ matrix are its coordinates on the screen."""
    data: Any = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return np.eye(2, dtype=np.int32)
    return np.frombuffer(bytes(data)[:36], np.int32).reshape(3, 3)[:2, :2]


def upright(pixels: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Rotate and mirror [H, W, C] as a display matrix says, by the nearest multiple of 90 degrees."""
    (xx, xy), (yx, yy) = matrix.tolist()
    if abs(xy) > abs(xx):
        pixels, xx, yy = pixels.transpose(1, 0, 2), yx, xy
    return pixels[:: -1 if yy < 0 else 1, :: -1 if xx < 0 else 1]


def is_array(content: Path | bytes | Clip) -> TypeGuard[Path | Clip]:
    return isinstance(content, Clip) or (isinstance(content, Path) and content.suffix.lower() in (".npy", ".npz"))


def open_container(content: Path | bytes | Clip) -> Any:
    import av

    return av.open(io.BytesIO(content) if isinstance(content, bytes) else str(content), mode="r")


def video_stream(container: Any) -> Any:
    """Return the stream that players show: no cover or thumbnail; of several streams, the default or the largest.

    Raises:
        Unreadable: the file has none.
    """
    from av.stream import Disposition

    pictures = Disposition.attached_pic | Disposition.timed_thumbnails
    streams = [stream for stream in container.streams.video if not stream.disposition & pictures]
    if not streams:
        raise Unreadable("it has no video stream")
    return max(streams, key=lambda s: (s.frames != 1, bool(s.disposition & Disposition.default), s.width * s.height))


def file_frames(content: Path | bytes | Clip, how: Decoding) -> Iterator[tuple["av.VideoFrame", Fraction]]:
    """Yield the frames of a file, each with the aspect ratio (width : height) of its pixels.

    Raises:
        Unreadable: the file has no video stream or, if `how.fps` is set, no frame rate.
        Truncated: at the end, if the file announces more frames, unless `how.partial`.
        Unordered: the frames' times are needed, and missing or not increasing.
    """
    with open_container(content) as container:
        stream = video_stream(container)
        frames: Iterator[Any] = all_frames(container, stream, how.partial)
        if how.fps is not None:
            rate = stream.average_rate or stream.guessed_rate
            if not rate:
                raise Unreadable("it has no frame rate")
            times = in_order(frames, rate) if how.in_order else by_time(frames, rate)
            frames = at_rate(times, Fraction(str(how.fps)))
        aspect = stream.sample_aspect_ratio or Fraction(1)
        for frame in frames:
            yield frame, aspect


def all_frames(container: Any, stream: Any, partial: bool) -> Iterator["av.VideoFrame"]:
    """Yield the frames of a stream.

    Raises:
        Truncated: at the end, if the file announces more frames, unless `partial`.
    """
    count = end = 0
    for packet in container.demux(stream):
        if packet.is_corrupt:  # the last packet of a truncated file
            continue
        if packet.pts is not None:
            end = max(end, packet.pts + (packet.duration or 0))
        for frame in packet.decode():
            count += 1
            yield frame
    announced, rate = announced_end(container, stream), stream.average_rate or stream.guessed_rate
    if not partial and announced and rate and (announced - end * stream.time_base) * rate > Fraction(1, 2):
        frames = stream.frames or round(announced * rate)
        raise Truncated(f"it ends after {count} of the {frames} frames that it announces; --partial_videos takes these")


class TimedFrame(NamedTuple):
    """A frame and the time at which it is shown, in seconds."""

    frame: "av.VideoFrame"
    begin: Fraction
    end: Fraction
    """The time until which the frame is shown, if no other frame begins earlier."""
    tolerance: Fraction
    """How much earlier the frame may be taken, since times are rounded."""


def by_time(frames: Iterator[Any], rate: Fraction) -> Iterator[TimedFrame]:
    """Yield frames with their own times.

    Raises:
        Unordered: times are missing or don't increase.
    """
    last = None
    for frame in frames:
        if frame.pts is None or (last is not None and frame.pts <= last):
            raise Unordered
        last, unit = frame.pts, frame.time_base
        begin = last * unit
        yield TimedFrame(frame, begin, begin + (frame.duration * unit or 1 / rate), unit / 2)


def in_order(frames: Iterator[Any], rate: Fraction) -> Iterator[TimedFrame]:
    """Yield frames with the times that they have at a constant rate."""
    for number, frame in enumerate(frames):
        yield TimedFrame(frame, number / rate, (number + 1) / rate, 1 / rate / 2)


def at_rate(frames: Iterator[TimedFrame], fps: Fraction) -> Iterator["av.VideoFrame"]:
    """Yield the frame shown at each time n / fps, from the start of the first frame to the end of the last.

    It is the last frame that has begun by then, also during a pause between two frames.
    """
    shown, number, first = None, 0, Fraction(0)
    for following in frames:
        if shown is None:
            first = following.begin
        while shown is not None and first + number / fps + shown.tolerance <= following.begin:
            yield shown.frame
            number += 1
        shown = following
    while shown is not None and first + number / fps + shown.tolerance < shown.end:
        yield shown.frame
        number += 1


def announced_end(container: Any, stream: Any) -> Fraction | None:
    """Return the time in seconds at which a video ends according to its file, or None if the file doesn't say.

    The number of frames doesn't tell whether a file is complete: edit lists hide frames, and an AVI counts pauses.
    """
    import av

    if "mov" in container.format.name and stream.duration:
        return ((stream.start_time or 0) + stream.duration) * stream.time_base
    if container.format.name == "avi" and stream.frames:
        return stream.frames * stream.time_base
    if "matroska" in container.format.name:
        for key, value in stream.metadata.items():
            match = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", value)
            if key.startswith("DURATION") and match:
                hours, minutes, seconds = map(Fraction, match.groups())
                return 3600 * hours + 60 * minutes + seconds
        if len(container.streams) == 1 and container.duration:  # of the longest stream
            return Fraction(container.duration, av.time_base)
    return None


def array_frames(content: Path | Clip) -> Iterator[tuple["av.VideoFrame", Fraction]]:
    """Yield the frames of an array, in the form of `file_frames`."""
    import av

    for frame in read_array(content):
        colour = np.repeat(frame, 3, -1) if frame.shape[-1] == 1 else np.ascontiguousarray(frame)
        yield av.VideoFrame.from_ndarray(colour, "rgb24"), Fraction(1)


def read_array(content: Path | Clip) -> np.ndarray:
    """Return the array of an .npy file, the only array of an .npz file, or a clip: uint8 [T, H, W, 1 or 3].

    Raises:
        Unreadable: the file is damaged, or holds something else.
    """
    path = content.path if isinstance(content, Clip) else content
    try:
        if path.suffix.lower() == ".npy":
            loaded = np.load(path, mmap_mode="r")
        else:
            with path.open("rb") as opened, np.load(opened) as file:  # opened here: NumPy doesn't close a damaged file
                if isinstance(content, Clip):
                    loaded = np.asarray(file["image"])[content.first : content.stop]
                elif len(file.files) == 1:
                    loaded = np.asarray(file[file.files[0]])
                else:
                    raise Unreadable(f"it holds {len(file.files)} arrays instead of one")
    except Unreadable:
        raise
    except Exception as error:  # a damaged file raises errors of many types in NumPy and zipfile
        raise Unreadable("it isn't an array") from error
    if loaded.dtype != np.uint8 or loaded.ndim != 4 or loaded.shape[-1] not in (1, 3) or not loaded.size:
        raise Unreadable(f"it is {loaded.dtype} {list(loaded.shape)} instead of uint8 [T, H, W, 1 or 3]")
    return loaded


def image_shape(path: Path) -> tuple[int, ...]:
    """Return the shape of the array `image` in an .npz file, without reading it.

    Raises:
        KeyError: the file has no such array.
        ValueError, OSError, zipfile.BadZipFile: the file is damaged.
    """
    with zipfile.ZipFile(path) as file, file.open("image.npy") as member:
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, _ = readers[np.lib.format.read_magic(member)](member)
    return shape


class Survey(NamedTuple):
    """What is known of a video before it is decoded."""

    frames: int
    """The estimated number of decoded frames; 0 if the video can't be read."""
    rate: float | None = None
    """Average frames per second; None for an array, or if unknown."""
    size: tuple[int, int] | None = None
    """Width and height."""


def survey(video: Video, fps: float | None = None) -> Survey:
    """Return what is known of a video that will be decoded at `fps`."""
    import av

    try:
        if isinstance(video.content, Clip):
            clip = video.content
            _, height, width, _ = image_shape(clip.path)
            return Survey(clip.stop - clip.first, size=(width, height))
        if is_array(video.content):
            frames, height, width, _ = read_array(video.content).shape
            return Survey(frames, size=(width, height))
        with open_container(video.content) as container:
            stream = video_stream(container)
            if "mov" in container.format.name and stream.frames and stream.duration and stream.average_rate:
                seconds, rate = stream.duration * stream.time_base, stream.average_rate
                frames = min(stream.frames, round(seconds * rate))  # an edit list may hide some
            else:
                packets = [packet.pts for packet in container.demux(stream) if packet.size]
                times = [time for time in packets if time is not None] or [0]
                frames, span = len(packets), (max(times) - min(times)) * stream.time_base
                rate = (frames - 1) / span if span else stream.average_rate
                seconds = frames / rate if rate else 0
            frames = round(seconds * Fraction(str(fps))) if fps else frames
            return Survey(frames, rate and float(rate), (stream.width, stream.height))
    except (av.FFmpegError, Unreadable, ValueError):
        return Survey(0)


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
            self.action_size: int = index.get("action_size", 0)
            self.actions: np.ndarray | None = None
            """float32 [N, A], memory-mapped: each action led to its frame. None: there are no actions."""
            if self.action_size:
                actions_shape = (index["frames"], self.action_size)
                if actions_path(path).stat().st_size != 4 * math.prod(actions_shape):
                    raise ValueError
                self.actions = np.memmap(actions_path(path), np.float32, "r", shape=actions_shape)
        except PermissionError as error:
            raise ConfigError(f"datadir: {error.filename} can't be read ({error.strerror}); permit it") from error
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ConfigError(f"datadir: {path}.* is damaged; run again with --rebuild_frames") from error
        self.names: list[str] = [name for name, _ in index["videos"]]
        self.lengths = np.array([length for _, length in index["videos"]], np.int64)
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.rates: list[float | None] = index.get("rates", [None] * len(self.names))
        """Frames per second of the original files. None: an array, or decoded by a version that didn't keep them."""
        self.sizes: list[list[int] | None] = index.get("sizes", [None] * len(self.names))
        """Width and height of the original frames. None: decoded by a version that didn't keep them."""
        self.skipped: dict[str, str] = index["skipped"]
        self.origin: str = index["origin"]


def frames_path(path: Path) -> Path:
    return path.with_name(path.name + ".frames")


def actions_path(path: Path) -> Path:
    return path.with_name(path.name + ".actions")


def index_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def checksum(index: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(index, sort_keys=True).encode())


def frame_file(
    path: Path, open_videos: Callable[[], Videos], how: Decoding, origin: str | None = None, rebuild: bool = False
) -> FrameFile:
    """Return the frame file at `path`. If needed, decode the videos into it first, while other processes wait.

    Args:
        path: the path of an existing or new frame file, without suffix.
        open_videos: returns the videos; only called to decode.
        how: how to decode.
        origin: the videos' origin, if known; a frame file of another origin is refused.
        rebuild: decode again.

    Raises:
        ConfigError: the file can't be read or written, or is of another origin.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with one_process(path.with_name(path.name + ".lock"), f"decoding {path}.*"):
            if rebuild or not index_path(path).exists():
                build(path, open_videos(), how)
    except OSError as error:
        if index_path(path).exists() and not rebuild:
            pass  # the file is complete, on a read-only disk
        elif error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ConfigError(
                f"datadir: no space left in {path.parent} for decoded frames; free some, or choose another"
            ) from error
        else:
            raise ConfigError(f"datadir: can't write to {path.parent} ({error.strerror}); choose another") from error
    file = FrameFile(path)
    if origin not in (None, file.origin):
        raise ConfigError(
            f"datadir: the videos, or the keys that choose them, have changed since {path}.* was decoded; run again "
            "with --rebuild_frames"
        )
    return file


@contextlib.contextmanager
def one_process(lock: Path, what: str) -> Iterator[None]:
    """Hold a lock within the block. If another process holds it, say so and wait.

    The system releases the lock of a process that dies.

    Args:
        lock: the lock's file.
        what: what the lock is held for, such as "decoding x".
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
        with contextlib.suppress(ConfigError):  # a damaged file is refused when it is used
            if FrameFile(path).origin != origin:
                print(f"Removing {path}.*, which was decoded from another source")
                index.unlink()
                frames_path(path).unlink()


def listed(names: Collection[str], limit: int = 100) -> str:
    """Join the first `limit` names for a message."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(itertools.islice(names, limit)) + more


def build(path: Path, videos: Videos, how: Decoding) -> None:
    """Decode videos into a new frame file, which replaces the one at `path` when it is complete.

    Raises:
        ConfigError: there is too little space, or no video can be decoded.
    """
    surveys, actions = {}, {}
    for i in range(len(videos)):
        video = videos[i]
        surveys[video.name] = survey(video, how.fps)
        if video.actions is not None:
            actions[video.name] = video.actions
    expected = sum(found.frames for found in surveys.values())
    free = shutil.disk_usage(path.parent).free
    needed = expected * FRAME_SIZE**2 * how.channels
    print(f"Decoding {len(videos)} videos, about {expected:,} frames, {needed / 1e9:.2f} GB, to {path}.frames")
    if needed > free:
        raise ConfigError(
            f"datadir: {path.parent} has {free // 10**6:,} MB free, decoded frames need {-(-needed // 10**6):,} MB; "
            "free some, or choose another"
        )

    # With frames of 64x64, threads wait for the GIL: two take 1.6 times as long as one.
    large = any(found.size and math.prod(found.size) >= 2 * FRAME_SIZE**2 for found in surveys.values())
    threads = (os.cpu_count() or 1) if large else 1
    unfinished = frames_path(path).with_suffix(".frames.new")
    try:
        kept, skipped = decode_all(videos, how, unfinished, expected, threads)
        if skipped:
            reasons = [f"{name} ({reason})" for name, reason in skipped.items()]
            print(f"Skipped {len(skipped)} unreadable videos: {listed(reasons)}")
        rates = [rate for name, _ in kept if (rate := surveys[name].rate)]
        if how.fps is None and rates and max(rates) > 1.05 * min(rates):
            print(
                f"The videos have {min(rates):.4g} to {max(rates):.4g} frames a second, and each frame is kept; "
                "--fps takes them at one rate"
            )
        if not kept:
            raise ConfigError(
                f"datadir: none of the {len(videos)} videos for {path.name} can be decoded; {videos.remedy}"
            )
        index_path(path).unlink(missing_ok=True)
        os.replace(unfinished, frames_path(path))
    finally:
        unfinished.unlink(missing_ok=True)
    kept_actions = np.concatenate([actions[name] for name, _ in kept]) if actions else np.zeros((0, 0), np.float32)
    if actions:
        replace_file(actions_path(path), kept_actions.tobytes())
    index: dict[str, Any] = {
        "origin": videos.origin,
        "channels": how.channels,
        "frames": sum(count for _, count in kept),
        "videos": kept,
        "rates": [surveys[name].rate for name, _ in kept],
        "sizes": [surveys[name].size for name, _ in kept],
        "action_size": kept_actions.shape[1],
        "skipped": skipped,
    }
    index = json.loads(json.dumps(index))
    replace_file(index_path(path), json.dumps(index | {"checksum": checksum(index)}).encode())


def decode_all(
    videos: Videos, how: Decoding, out: Path, expected: int, threads: int
) -> tuple[list[tuple[str, int]], dict[str, str]]:
    """Decode videos into a file of frames, in threads: PyAV releases the GIL.

    At most 32 MB of a video's frames are held in memory, the rest is on disk.

    Args:
        videos: the videos.
        how: how to decode.
        out: the new file; the frames of all videos one after another.
        expected: the estimated number of frames.
        threads: the number of threads.

    Returns:
        The name and number of frames of each decoded video; the name of each other video, with the reason.
    """
    kept: list[tuple[str, int]] = []
    skipped: dict[str, str] = {}
    stopped = threading.Event()

    def decode_to_spool(video: Video, how: Decoding = how) -> tuple[str, Any]:
        spool: Any = spools.enter_context(tempfile.SpooledTemporaryFile(32 * 2**20, dir=str(out.parent)))
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
        except Unordered:
            spool.close()
            return decode_to_spool(video, how._replace(in_order=True))
        except Unreadable as error:
            spool.close()
            return video.name, str(error)

    with (
        contextlib.ExitStack() as spools,
        out.open("wb") as file,
        concurrent.futures.ThreadPoolExecutor(threads) as pool,
        tqdm(total=expected or None, unit=" frames", unit_scale=True, dynamic_ncols=True, mininterval=0.5) as bar,
    ):
        try:
            for name, result in map_ahead(pool, decode_to_spool, (videos[i] for i in range(len(videos))), 2 * threads):
                if isinstance(result, str):
                    skipped[name] = result
                    continue
                count, spool = result
                with spool:
                    shutil.copyfileobj(spool, file)
                kept.append((name, count))
                bar.update(count)
        finally:
            stopped.set()  # after an error or an interrupt, the threads end at their next frame
        file.flush()
        os.fsync(file.fileno())
    return kept, skipped


def map_ahead(pool: concurrent.futures.Executor, function: Any, items: Iterable[Any], ahead: int) -> Iterator[Any]:
    """Yield results in order like `pool.map`, but compute at most `ahead` of them before they are needed."""
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


class Folder(Sequence[Video]):
    """The videos below a folder, in the order of their paths."""

    SUFFIXES: ClassVar[Collection[str]] = {".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".npy", ".npz", ".webm"}

    def __init__(self, folder: Path, keys: str, belongs: Callable[[Path], bool]):
        """Find the videos.

        Args:
            folder: the folder; videos may be at any depth.
            keys: the configuration keys that decoding depends on, as a text; it becomes part of `origin`.
            belongs: tells whether a file, given by its path in the folder, is one of these videos.

        Raises:
            ConfigError: the folder is missing, can't be read, or holds no videos.
        """
        wanted = f"put {', '.join(sorted(self.SUFFIXES))} files there"
        if not folder.is_dir():
            raise ConfigError(f"datadir: {folder} is missing; {wanted}")
        self.folder, self.keys = folder, keys
        try:
            paths = sorted(path for path in files_below(folder) if belongs(path.relative_to(folder)))
        except OSError as error:
            raise ConfigError(f"datadir: {error.filename} can't be read ({error.strerror}); permit it") from error
        self.paths = [path for path in paths if is_video(path, self.SUFFIXES)]
        self.ignored = [str(path.relative_to(folder)) for path in paths if not is_video(path, self.SUFFIXES)]
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
        """A text that changes if a file is added, removed, renamed or written, or if the keys change."""
        stats = [
            (str(path.relative_to(self.folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in self.paths
        ]
        return f"{len(stats)} files, {zlib.crc32(json.dumps(stats).encode()):08x}{self.keys}"

    @property
    def remedy(self) -> str:
        return f"put others into {self.folder}"


def files_below(folder: Path, ancestors: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yield all files below a folder. Follow links to folders, except to its `ancestors`."""
    real = folder.resolve()
    if real in ancestors:
        return
    for path in folder.iterdir():
        if path.is_dir():
            yield from files_below(path, (*ancestors, real))
        else:
            yield path


def is_video(path: Path, suffixes: Collection[str]) -> bool:
    """Return whether a path is a file with a video's suffix, and not macOS's metadata (`._name`)."""
    return path.suffix.lower() in suffixes and path.is_file() and not path.name.startswith("._")

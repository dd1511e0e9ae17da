"""Windows of uint8 frames -> batches, in an order that the step number alone determines.

A dataset split is a random-access sequence of windows, each uint8 [T, 64, 64, C]. Nothing here touches an accelerator.
"""

import functools
import gzip
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import grain
import numpy as np

import config as config_module
import pictures
import videos
from config import FRAME_SIZE, Config, ConfigError
from interrupts import exit_codes


class Windows(Protocol):
    """A random-access source of windows, uint8 [T, 64, 64, C] each."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> np.ndarray: ...


ALL = slice(None)


class Batch(NamedTuple):
    """Windows and what each counts: rows of weight 0 are padding."""

    video: Any  # uint8 [B, T, H, W, C], on the host or on devices
    weight: Any  # float32 [B]


def windows(config: Config, split: str) -> Windows:
    """The windows of `split` ("train" or "test"): `seq_len` frames for training, `eval_seq_len` for test.

    Raises:
        ConfigError: the dataset can't be had, or is no such thing; with the remedy.
    """
    c = config
    length = c.seq_len if split == "train" else c.eval_seq_len
    if c.dataset == "digits":
        images, labels = digits_of_scikit_learn, labels_of_scikit_learn
        return MovingDigits(images, labels, split, length or 1000, c.num_digits, c.digit_speed)
    if c.dataset == "mnist":
        idx_images, idx_labels = (functools.partial(read, c.datadir) for read in (digits_of_mnist, labels_of_mnist))
        return MovingDigits(idx_images, idx_labels, split, length or 1000, c.num_digits, c.digit_speed)
    return VideoWindows(decoded(c, split), length, split)


def decoded(config: Config, split: str) -> videos.FrameFile:
    """The frames of a split's videos: decoded now, and before that downloaded, where they aren't there yet."""
    c = config
    datadir = Path(c.datadir)
    path = datadir / "frames" / f"{c.dataset}-{split}-{c.channels}"
    if c.dataset == "videos":
        # A folder that is gone after decoding is no reason to stop.
        if not c.rebuild_frames and videos.index_path(path).exists() and not (datadir / split).exists():
            return videos.FrameFile(path)
        folder = videos.Folder(datadir / split)
        how = videos.Decoding(c.channels, crop=True, luma=True)
        return videos.frame_file(path, lambda: folder, how, folder.origin, c.rebuild_frames)

    def prepared() -> videos.Videos:
        import published  # TFDS is slow to import, and only needed once

        builder = published.prepare(c.dataset, datadir)
        source = published.PreparedVideos(builder.as_data_source(split=split))
        expected = builder.VIDEOS.get(split)
        if expected not in (None, len(source)):
            print(f"Warning: {c.dataset} has {len(source)} {split} videos; {expected} were published")
        return source

    return videos.frame_file(path, prepared, videos.Decoding(c.channels), c.dataset, c.rebuild_frames)


class VideoWindows:
    """The windows of decoded videos: of each, as many as fit, from its beginning on; with `length` 0, whole videos."""

    def __init__(self, file: videos.FrameFile, length: int, split: str):
        """Raises ConfigError where no video is as long as a window, or whole videos differ in length."""
        self.file = file
        if not length and len(set(file.lengths)) > 1:
            raise ConfigError(
                f"eval_seq_len: 0 takes whole videos, but the {split} videos have {min(file.lengths)} to "
                f"{max(file.lengths)} frames; set a number, at most {max(file.lengths)}"
            )
        self.length = length or int(file.lengths[0])
        counts = file.lengths // self.length
        short = int((counts == 0).sum())
        if short == len(counts):
            key = "seq_len" if split == "train" else "eval_seq_len"
            raise ConfigError(f"{key}: no {split} video has {self.length} frames; set at most {max(file.lengths)}")
        if short:
            names = ", ".join(name for name, count in zip(file.names[:1000], counts, strict=False) if not count)
            print(f"Skipped {short} {split} videos of less than {self.length} frames: {names}")
        self.video = np.repeat(np.arange(len(counts)), counts)
        first = np.cumsum(counts) - counts
        within = np.arange(len(self.video)) - first[self.video]
        self.starts = file.starts[self.video] + within * self.length

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> np.ndarray:
        """uint8 [T, 64, 64, C]"""
        return self._frames(self.starts[index])

    def anywhere(self, index: int, random: np.random.Generator) -> np.ndarray:
        """A window of the same video as window `index`, from a random frame on."""
        video = self.video[index]
        slack = self.file.lengths[video] - self.length
        return self._frames(self.file.starts[video] + random.integers(slack + 1))

    def _frames(self, start: int) -> np.ndarray:
        return self.file.frames[start : start + self.length]


def training_order(config: Config, train: Windows) -> grain.MapDataset:
    """The windows' numbers in the whole training: `num_epochs` passes over them, each in a random order of its own.

    Any position is found at once, without the ones before it.
    """
    return grain.MapDataset.range(len(train)).seed(config.seed or 0).shuffle().repeat(config.num_epochs)


def training_indices(config: Config, train: Windows, step: int) -> list[int]:
    """The numbers of the windows in the batch of a step (counted from 0)."""
    order, B = training_order(config, train), config.batch_size
    return [int(order[i]) for i in range(step * B, min((step + 1) * B, len(order)))]


def training_steps(config: Config, train: Windows) -> int:
    """Batches in a training, the last of which may be partial; no more than `max_steps`."""
    steps = -(-len(train) * config.num_epochs // config.batch_size)
    return min(steps, config.max_steps or steps)


def training_sequences(config: Config, train: Windows) -> grain.MapDataset:
    """The windows of the whole training in their order."""
    order = training_order(config, train)
    if config.random_start and isinstance(train, VideoWindows):
        return order.random_map(train.anywhere)
    return order.map(train.__getitem__)


def training_batches(config: Config, train: Windows, start: int, rows: int, own: slice = ALL) -> Iterator[Batch]:
    """The batches from step `start` on, padded to `rows` rows, of which those in `own` are read (ahead, by threads)."""
    return batches(
        training_sequences(config, train), config.batch_size, range(start, training_steps(config, train)), rows, own
    )


def eval_batches(
    test: Windows, batch_size: int, count: int, rows: int, own: slice = ALL, first: int = 0
) -> Iterator[Batch]:
    """The first `count` windows in their own order, in batches padded to `rows` rows, from batch number `first` on."""
    count = min(count, len(test))
    order = grain.MapDataset.source(test)[:count]
    return batches(order, batch_size, range(first, -(-count // batch_size)), rows, own)


def batches(order: grain.MapDataset, batch_size: int, steps: range, rows: int, own: slice) -> Iterator[Batch]:
    """Batch n holds the windows from n * batch_size on, read by threads: the work is in code that releases the GIL."""
    shape = order[0].shape
    mine = range(rows)[own]

    def batch(step: int) -> Batch:
        video = np.empty((len(mine), *shape), np.uint8)
        count = min(batch_size, len(order) - step * batch_size)
        for i, row in enumerate(mine):
            video[i] = order[step * batch_size + row] if row < count else 0
        return Batch(video, (np.array(mine) < count).astype(np.float32))

    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    return iter(grain.MapDataset.range(steps.start, steps.stop).map(batch).to_iter_dataset(options))


# ---------------------------------------------------------------------------------------------- moving digits


class MovingDigits:
    """Videos of handwritten digits that bounce within the frame, generated by index.

    The rules of the paper's Moving MNIST: each digit, 28x28 pixels, moves at a constant speed, uniform in a range of
    pixels per frame, in a random direction, and is reflected at the edges; where digits overlap the brighter pixel
    shows.
    """

    VIDEOS: ClassVar = {"train": 20_000, "test": 1_000}

    def __init__(
        self,
        read_digits: Callable[[str], np.ndarray],
        read_labels: Callable[[str], np.ndarray],
        split: str,
        frames: int,
        digits: int = 2,
        speed: tuple[float, ...] = (2.0, 6.0),
    ):
        """`read_digits(split)` gives the images to draw from, uint8 [N, 28, 28], and `read_labels(split)`, which only
        `labels` needs, what they show, [N] from 0 to 9."""
        self.glyphs = read_digits(split)
        self.read_labels = read_labels
        self.split, self.frames, self.digits, self.speed = split, frames, digits, speed

    def __len__(self) -> int:
        return self.VIDEOS[self.split]

    def __getitem__(self, index: int) -> np.ndarray:
        """uint8 [T, 64, 64, 1]"""
        glyphs, paths = self.motion(index)
        return compose(self.glyphs[glyphs][:, None], paths)[..., None]

    def motion(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Which glyphs video `index` shows, [digits], and where their upper left corners are, [digits, T, (y, x)]."""
        random = np.random.default_rng([index, int(self.split == "test")])
        room = FRAME_SIZE - self.glyphs.shape[-1]
        time = np.arange(self.frames)
        glyphs, paths = [], []
        for _ in range(self.digits):
            glyphs.append(random.integers(len(self.glyphs)))
            angle, speed = random.uniform(0, 2 * np.pi), random.uniform(self.speed[0], self.speed[1])
            start = random.uniform(0, room, 2)
            path = start + speed * np.array([np.sin(angle), np.cos(angle)]) * time[:, None]
            # Reflection at both edges: a triangle wave of the straight path.
            path = room - np.abs(path % (2 * room) - room)
            paths.append(np.rint(path).astype(int))
        return np.array(glyphs), np.array(paths)

    @property
    def labels(self) -> np.ndarray:
        """What each glyph shows, [N] from 0 to 9."""
        labels = self.read_labels(self.split)
        if len(labels) != len(self.glyphs):
            raise ConfigError(f"datadir: {len(self.glyphs)} {self.split} digits have {len(labels)} labels; they differ")
        return labels

    def digits_in(self, index: int) -> np.ndarray:
        """The digits that video `index` shows, [digits] from 0 to 9."""
        return self.labels[self.motion(index)[0]]

    def overlaps(self, index: int) -> np.ndarray:
        """In which frames of video `index` some pixel belongs to more than one digit, bool [T]."""
        glyphs, paths = self.motion(index)
        ink = [
            compose((self.glyphs[[glyph]] > 0)[:, None], path[None]) for glyph, path in zip(glyphs, paths, strict=True)
        ]
        return (np.sum(ink, axis=0) > 1).any((1, 2))


def compose(glyphs: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Frames [T, 64, 64] of glyphs [digits, T or 1, h, w] at corners [digits, T, (y, x)]; the brighter pixel shows."""
    _, T, _ = corners.shape
    frames = np.zeros((T, FRAME_SIZE, FRAME_SIZE), np.uint8)
    # patches[t, y, x] is a view of the pixels of frame t that a glyph at (y, x) covers.
    patches = np.lib.stride_tricks.sliding_window_view(frames, glyphs.shape[-2:], axis=(1, 2), writeable=True)
    time = np.arange(T)
    for glyph, (y, x) in zip(glyphs, corners.transpose(0, 2, 1), strict=True):
        patches[time, y, x] = np.maximum(patches[time, y, x], glyph)
    return frames


@functools.cache
def digits_of_scikit_learn(split: str) -> np.ndarray:
    """The 1797 digits of 8x8 pixels that scikit-learn ships (Alpaydin and Kaynak 1998), at MNIST's size and contrast.

    Every sixth is a test digit: the splits share none.
    """
    import scipy.ndimage
    from sklearn.datasets import load_digits  # slow to import, and only this dataset needs it

    images = load_digits().images / 16
    images = images[of_split(split, len(images))]
    images = scipy.ndimage.zoom(images, (1, 2.5, 2.5), order=3, mode="nearest", grid_mode=True)  # 8x8 -> 20x20
    images = np.pad(images, ((0, 0), (4, 4), (4, 4)))
    # Interpolated strokes are blurry; MNIST's are nearly black and white.
    return np.rint(np.clip((images - 0.5) * 2.2 + 0.5, 0, 1) * 255).astype(np.uint8)


def labels_of_scikit_learn(split: str) -> np.ndarray:
    """What the images of `digits_of_scikit_learn` show."""
    from sklearn.datasets import load_digits

    labels = load_digits().target
    return labels[of_split(split, len(labels))]


def of_split(split: str, count: int) -> np.ndarray:
    """Which of scikit-learn's digits are a split's, bool [count]."""
    return (np.arange(count) % 6 == 5) == (split == "test")


@functools.cache
def digits_of_mnist(datadir: str, split: str) -> np.ndarray:
    """MNIST's training or test digits from its idx files, plain or gzipped, uint8 [N, 28, 28].

    Raises:
        ConfigError: the file is missing or something else.
    """
    return read_idx(datadir, split, "images-idx3", (28, 28))


def labels_of_mnist(datadir: str, split: str) -> np.ndarray:
    """What the images of `digits_of_mnist` show; raises ConfigError likewise."""
    return read_idx(datadir, split, "labels-idx1", ())


def read_idx(datadir: str, split: str, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """One of MNIST's files, uint8 [N, *shape].

    Raises:
        ConfigError: the file is missing or something else.
    """
    name = f"{'train' if split == 'train' else 't10k'}-{kind}-ubyte"
    plain, zipped = Path(datadir) / name, Path(datadir) / f"{name}.gz"
    path = plain if plain.exists() else zipped
    if not path.exists():
        raise ConfigError(f"datadir: {plain}[.gz] is missing; put MNIST's {kind.split('-')[0][:-1]} files there")
    try:
        content = plain.read_bytes() if path == plain else gzip.decompress(zipped.read_bytes())
        words = 2 + len(shape)
        magic, count, *sizes = np.frombuffer(content[: 4 * words], ">u4").tolist()
        if (magic, *sizes) != (2048 + 1 + len(shape), *shape):
            raise ValueError
        return np.frombuffer(content[4 * words :], np.uint8).reshape(count, *shape)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        what = f"{'x'.join(map(str, shape))} images" if shape else "labels"
        raise ConfigError(f"datadir: {path} isn't an idx file of {what}; put MNIST's there") from error


# ---------------------------------------------------------------------------------------------- looking at the data


def look(config: Config) -> None:
    """Prepares a dataset, prints what it holds, and writes pictures of it, `<datadir>/<dataset>.{png,gif}`."""
    c = config
    sources = {split: windows(c, split) for split in ("train", "test")}
    print(f"{'split':<6} {'videos':>9} {'frames':>13} {'windows':>9} {'bytes':>16}")
    for split, source in sources.items():
        if isinstance(source, VideoWindows):
            counts = len(source.file.lengths), int(source.file.lengths.sum()), len(source), source.file.frames.nbytes
        else:
            frames = len(source) * len(source[0])
            counts = len(source), frames, len(source), frames * FRAME_SIZE**2 * c.channels
        print(f"{split:<6} {counts[0]:9,} {counts[1]:13,} {counts[2]:9,} {counts[3]:16,}")
    train = sources["train"]
    chosen = [train[i] for i in np.linspace(0, len(train) - 1, min(8, len(train))).astype(int)]
    Path(c.datadir).mkdir(parents=True, exist_ok=True)
    sheet, animation = (Path(c.datadir) / f"{c.dataset}.{suffix}" for suffix in ("png", "gif"))
    pictures.save_grid(np.concatenate(chosen), sheet, strip=len(chosen[0]))
    pictures.save_gif(pictures.rgb(np.concatenate(chosen, axis=2)), animation)
    print(f"Look at {sheet} and {animation}")


def main() -> None:
    with exit_codes():
        look(config_module.parse(sys.argv[1:], "data.py", "Prepare a dataset, and look at it."))


if __name__ == "__main__":
    main()

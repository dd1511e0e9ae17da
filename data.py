"""Datasets: windows of uint8 frames, and batches of them in an order that only seed and step number determine.

A split of a dataset is a random-access sequence of windows, uint8 [T, 64, 64, C] each.
"""

import dataclasses
import functools
import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np

import config as configuration
import tools
from config import FRAME_SIZE, Config, ConfigError
from fast.backend import on_cpu
from system.files import require_utf8
from system.interrupts import Interrupts, exit_codes
from videos import decoded, digits, episodes


class Windows(Protocol):
    """A random-access source of windows, uint8 [T, 64, 64, C] each."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> np.ndarray: ...


ALL = slice(None)

THREADS = 2
"""The number of threads that read batches ahead."""


class Window(NamedTuple):
    """A window of frames, with their actions."""

    video: np.ndarray  # uint8 [T, 64, 64, C]
    actions: np.ndarray | None  # float32 [T, A]: each led to its frame; None for data without actions


class Batch(NamedTuple):
    """A batch of windows, with their weights. Rows of weight 0 are padding."""

    video: Any  # uint8 [B, T, H, W, C], on the host or on devices
    weight: Any  # float32 [B]
    actions: Any = None  # float32 [B, T, A], see Window


def windows(config: Config, split: str) -> Windows:
    """Return the windows of `split`: "train" with `seq_len` frames each, or "test" with `eval_seq_len`.

    Raises:
        ConfigError: the dataset is missing and can't be prepared, or doesn't fit the configuration.
    """
    c = config
    length = c.seq_len if split == "train" else c.eval_seq_len
    if c.dataset == "episodes":
        file = frame_file(c, split)
        check_actions(c, file)
        return VideoWindows(file, length, split, c.action_size != 0)
    if c.action_size:
        raise ConfigError(f"action_size: {c.dataset} has no actions, got {c.action_size}; leave it out")
    if c.dataset == "digits":
        images, labels = digits.scikit_learn_digits, digits.scikit_learn_labels
        return digits.MovingDigits(images, labels, split, length or 1000, c.num_digits, c.digit_speed)
    if c.dataset == "mnist":
        idx_images, idx_labels = (
            functools.partial(load, c.datadir) for load in (digits.mnist_digits, digits.mnist_labels)
        )
        return digits.MovingDigits(idx_images, idx_labels, split, length or 1000, c.num_digits, c.digit_speed)
    return VideoWindows(frame_file(c, split), length, split)


def check_actions(config: Config, file: decoded.FrameFile) -> None:
    """Raise ConfigError unless a file of episodes has the actions that the configuration asks for."""
    asked, found = config.action_size, file.action_size
    if asked != 0 and not found:
        raise ConfigError(
            f"action_size: the episodes of {file.path} have no actions; set --action_size 0 to train on frames only"
        )
    if asked and asked != found:
        raise ConfigError(
            f"action_size: the episodes of {file.path} have actions of {found} entries, got {asked}; choose other "
            "episodes"
        )


def with_action_size(config: Config, train: Windows) -> Config:
    """Return the configuration with `action_size` from the data, if it isn't set."""
    if config.action_size is not None or not isinstance(train, VideoWindows) or not train.action_size:
        return config
    return dataclasses.replace(config, action_size=train.action_size)


def window(source: Windows, index: int) -> Window:
    """Return a window by its number, with its actions if it has any."""
    return source.window(index) if isinstance(source, VideoWindows) else Window(source[index], None)


def stacked(source: Windows, indices: Iterable[int]) -> Window:
    """Return windows by their numbers as one, [B, T, ...]."""
    videos, actions = zip(*(window(source, index) for index in indices), strict=True)
    return Window(np.stack(videos), None if actions[0] is None else np.stack(actions))


def for_devices(train: Windows) -> tuple[Windows, Callable[[Batch], Batch]]:
    """Return the windows to send to the devices, and a function that turns their batches into frames there.

    Accelerators draw generated digits themselves, since a host draws only about 50 batches a second, and an accelerator
    may need more. More cores do not help the host, because much of the work is in Python.
    """
    if isinstance(train, digits.MovingDigits) and not on_cpu():
        return train.sprites(), lambda batch: batch._replace(video=digits.draw(batch.video))
    return train, lambda batch: batch


def frame_file(config: Config, split: str) -> decoded.FrameFile:
    """Return the decoded videos of a split. Download and decode them first if needed."""
    c = config
    path = Path(c.datadir) / "frames" / f"{c.dataset}-{split}-{c.channels}"
    exists = not c.rebuild_frames and decoded.index_path(path).exists()
    if c.dataset in USER_DATASETS:
        return user_frame_file(c, split, path, exists)
    return published_frame_file(c, split, path, exists)


USER_DATASETS = {
    "videos": ("fit", "split", "partial_videos", "fps"),
    "episodes": ("fit", "split", "action_leads", "num_actions"),
}
"""The datasets of the user's own files, with the keys that decide which files are decoded, and how."""


def user_folder(config: Config, split: str) -> Path:
    """Return the folder that holds the user's own files of a split."""
    datadir = Path(config.datadir)
    return datadir if config.split else datadir / split


def user_frame_file(config: Config, split: str, path: Path, exists: bool) -> decoded.FrameFile:
    """Return the frame file at `path`, decoded from the user's own files if needed.

    Raises:
        ConfigError: files are missing, or have changed since they were decoded.
    """
    c = config
    datadir = Path(c.datadir)
    names = USER_DATASETS[c.dataset]
    how = decoded.Decoding(c.channels, c.fit, luma=True, partial=c.partial_videos, fps=c.fps)
    changed = [key for key in names if getattr(c, key) != getattr(Config, key)]
    keys = "".join(f", {key} {getattr(c, key)}" for key in changed)
    folder = user_folder(c, split)
    if c.split and any((datadir / name).is_dir() for name in ("train", "test")):
        raise ConfigError(f"split: {datadir} has a folder train or test already, got {c.split}; leave it out")
    if exists and not folder.exists():  # it may be deleted after decoding
        file = decoded.FrameFile(path)
        if file.origin.split(", ")[2:] != keys.split(", ")[1:]:
            raise ConfigError(
                f"{', '.join(names)}: {path}.* was decoded with other values; set those again, or put the files back "
                f"into {folder}"
            )
        return file
    belongs = functools.partial(in_split, c, split)
    try:
        videos = (
            decoded.Folder(folder, keys, belongs)
            if c.dataset == "videos"
            else episodes.Episodes(folder, episodes.ActionFormat(c.action_leads, c.num_actions), keys, belongs)
        )
    except ConfigError as error:
        if c.split:
            raise ConfigError(f"{error}, or set another --split, so that some are {split} videos") from error
        raise

    def open_videos() -> decoded.Videos:
        if videos.ignored:
            print(f"Ignored in {folder}, since they aren't {c.dataset}: {decoded.listed(videos.ignored)}")
        return videos

    return decoded.frame_file(path, open_videos, how, videos.origin, c.rebuild_frames)


def published_frame_file(config: Config, split: str, path: Path, exists: bool) -> decoded.FrameFile:
    """Return the frame file at `path`, decoded from a published dataset if needed.

    Raises:
        ConfigError: the dataset can't be downloaded or prepared.
    """
    c = config
    datadir = Path(c.datadir)

    def open_videos() -> decoded.Videos:
        from videos import published  # TFDS is slow to import, and only needed once

        builder = published.prepare(c.dataset, datadir, c.rebuild_frames)
        videos = published.PreparedVideos(c.dataset, builder, split)
        expected = builder.VIDEOS.get(split)
        if expected not in (None, len(videos)):
            count = f"{c.dataset} has {len(videos)} {split} videos; {expected} were published"
            print(f"Warning: {count}. To prepare it again, {videos.remedy}")
        decoded.remove_others(path.parent, c.dataset, videos.origin)
        return videos

    how = decoded.Decoding(c.channels, partial=True)  # checksums prove that published videos are complete
    if not exists:
        require_utf8("datadir", datadir.absolute())  # TFDS needs it; checked before anything is written there
    return decoded.frame_file(path, open_videos, how, rebuild=c.rebuild_frames)


def in_split(config: Config, split: str, path: Path) -> bool:
    """Return whether a file of `datadir` is in this split.

    Its name decides, so that it stays in its split if other files are added.
    """
    if config.split is None:
        return True
    if path.parts[0] == "frames" or str(path) in (f"{config.dataset}.{suffix}" for suffix in ("png", "gif")):
        return False  # written by this program
    digest = hashlib.blake2b(os.fsencode(path.as_posix()), digest_size=8).digest()
    return (int.from_bytes(digest) / 2**64 < config.split) == (split == "train")


class VideoWindows:
    """The windows of decoded videos: as many as fit into each video, from its first frame on.

    With `length` 0, the windows are whole videos.
    """

    def __init__(self, file: decoded.FrameFile, length: int, split: str, with_actions: bool = False):
        """Divide the videos into windows.

        Raises:
            ConfigError: all videos are shorter than a window, or whole videos differ in length.
        """
        self.file = file
        self.actions = file.actions if with_actions else None
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
            names = [name for name, count in zip(file.names, counts, strict=True) if not count]
            print(f"Skipped {short} {split} videos with fewer than {self.length} frames: {decoded.listed(names)}")
        self.video = np.repeat(np.arange(len(counts)), counts)
        first = np.cumsum(counts) - counts
        within = np.arange(len(self.video)) - first[self.video]
        self.starts = file.starts[self.video] + within * self.length

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> np.ndarray:
        """Return a window's frames, uint8 [T, 64, 64, C]."""
        return self.window(index).video

    def window(self, index: int) -> Window:
        """Return a window by its number, with its actions if there are any."""
        return self._cut(self.starts[index])

    def random_window(self, index: int, random: np.random.Generator) -> Window:
        """Return a window of the video of window `index`, from a random frame on."""
        video = self.video[index]
        slack = self.file.lengths[video] - self.length
        return self._cut(self.file.starts[video] + random.integers(slack + 1))

    def _cut(self, start: int) -> Window:
        span = slice(start, start + self.length)
        return Window(self.file.frames[span], None if self.actions is None else self.actions[span])

    @property
    def action_size(self) -> int:
        """The number of entries of an action, 0 without actions."""
        return 0 if self.actions is None else self.actions.shape[1]


def other_arrays(
    config: Config, split: str, source: VideoWindows, index: int, names: Sequence[str]
) -> list[np.ndarray]:
    """Return arrays that models don't see, from the episode of a window, at the window's frames, [T, ...] each.

    Args:
        config: of dataset episodes.
        split: train or test.
        source: the windows of the split.
        index: the number of the window.
        names: the names of the arrays in the files.

    Raises:
        ConfigError: the file is missing or damaged, or lacks an array.
    """
    video = source.video[index]
    first = int(source.starts[index] - source.file.starts[video])
    frames = slice(first, first + source.length)
    return episodes.arrays(user_folder(config, split), source.file.names[video], frames, names)


def training_order(config: Config, train: Windows) -> grain.MapDataset:
    """Return the numbers of the windows in the order of training: `num_epochs` passes, each in a new random order.

    Each position is computed directly, without the positions before it.
    """
    return grain.MapDataset.range(len(train)).seed(config.seed or 0).shuffle().repeat(config.num_epochs)


def training_indices(config: Config, train: Windows, step: int) -> list[int]:
    """Return the numbers of the windows in the batch of a step. Steps count from 0."""
    order, B = training_order(config, train), config.batch_size
    return [int(order[i]) for i in range(step * B, min((step + 1) * B, len(order)))]


def training_steps(config: Config, train: Windows) -> int:
    """Return the number of steps of a training, at most `max_steps`. The last batch may be partial."""
    steps = -(-len(train) * config.num_epochs // config.batch_size)
    return min(steps, config.max_steps or steps)


def training_sequences(config: Config, train: Windows) -> grain.MapDataset:
    """Return the windows in the order of training, as a `Window` each."""
    order = training_order(config, train)
    if config.random_start and isinstance(train, VideoWindows):
        return order.random_map(train.random_window)
    return order.map(functools.partial(window, train))


def training_batches(config: Config, train: Windows, start: int, rows: int, own: slice = ALL) -> Iterator[Batch]:
    """Yield the training batches from step `start` on, padded to `rows` rows. Only the rows in `own` are read."""
    return batches(
        training_sequences(config, train), config.batch_size, range(start, training_steps(config, train)), rows, own
    )


def eval_batches(
    test: Windows, batch_size: int, count: int, rows: int, own: slice = ALL, first: int = 0
) -> Iterator[Batch]:
    """Yield the first `count` windows in order, in batches padded to `rows` rows, from batch number `first` on."""
    count = min(count, len(test))
    order = grain.MapDataset.range(count).map(functools.partial(window, test))
    return batches(order, batch_size, range(first, -(-count // batch_size)), rows, own)


def batches(order: grain.MapDataset, batch_size: int, steps: range, rows: int, own: slice) -> Iterator[Batch]:
    """Yield the batches of `steps`. Batch n holds the windows from n * batch_size on.

    Threads read ahead, since the work is in code that releases the GIL.
    """
    first: Window = order[0]
    own_rows = range(rows)[own]

    def batch(step: int) -> Batch:
        count = min(batch_size, len(order) - step * batch_size)
        video = np.zeros((len(own_rows), *first.video.shape), np.uint8)
        actions = None if first.actions is None else np.zeros((len(own_rows), *first.actions.shape), np.float32)
        for i, row in enumerate(own_rows):
            if row < count:
                video[i], row_actions = order[step * batch_size + row]
                if actions is not None:
                    actions[i] = row_actions
        return Batch(video, (np.array(own_rows) < count).astype(np.float32), actions)

    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=2 * THREADS)
    return iter(grain.MapDataset.range(steps.start, steps.stop).map(batch).to_iter_dataset(options))


# ---------------------------------------------------------------------------------------------- inspecting a dataset


def inspect_dataset(config: Config) -> None:
    """Prepare a dataset, print its contents, and draw some training windows to `<datadir>/<dataset>.{png,gif}`.

    Raises:
        ConfigError: the dataset can't be prepared, or the pictures can't be written.
    """
    c = config
    sources = {split: windows(c, split) for split in ("train", "test")}
    print(f"{'split':<6} {'videos':>9} {'frames':>13} {'windows':>9} {'bytes':>16} {'hours':>8}")
    for split, source in sources.items():
        if isinstance(source, VideoWindows):
            file = source.file
            counts = len(file.lengths), int(file.lengths.sum()), len(source), file.frames.nbytes
            hours = [
                length / rate / 3600 for length, rate in zip(file.lengths, decoded_rates(c, file), strict=True) if rate
            ]
        else:
            frames = len(source) * len(source[0])
            counts, hours = (len(source), frames, len(source), frames * FRAME_SIZE**2 * c.channels), []
        length = f"{sum(hours):.2f}" if hours else "-"
        print(f"{split:<6} {counts[0]:9,} {counts[1]:13,} {counts[2]:9,} {counts[3]:16,} {length:>8}")
    for split, source in sources.items():
        if isinstance(source, VideoWindows):
            rates = [rate and f"{rate:.4g} frames/s" for rate in source.file.rates]
            for rate in dict.fromkeys(rates):
                names = [name for name, other in zip(source.file.names, rates, strict=True) if other == rate]
                print(f"{split:<6} {rate or 'no known rate'}: {decoded.listed(names, 20)}")
            reasons = [f"{name} ({reason})" for name, reason in source.file.skipped.items()]
            if reasons:
                print(f"{split:<6} skipped: {decoded.listed(reasons, 20)}")
        describe_frames(split, source)
        if isinstance(source, VideoWindows) and source.actions is not None:
            describe_actions(split, source.actions)
    train = sources["train"]
    chosen = evenly_spaced(train, 8)
    sheet, animation = (Path(c.datadir) / f"{c.dataset}.{suffix}" for suffix in ("png", "gif"))
    shown = {f"{position}: {caption(c, train, number)}": train[number] for position, number in enumerate(chosen, 1)}
    try:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        tools.save_grid(np.concatenate(list(shown.values())), sheet, columns=c.seq_len)
        tools.save_gif(tools.side_by_side(shown, {}), animation)
    except OSError as error:
        raise ConfigError(
            f"datadir: the dataset is complete, but its pictures can't be written to {sheet.parent} "
            f"({error.strerror or error}); training doesn't need them"
        ) from error
    print(f"Look at {sheet} and {animation}")


def evenly_spaced(source: Windows, count: int) -> list[int]:
    """Return the numbers of at most `count` windows, evenly spaced from the first to the last."""
    return np.linspace(0, len(source) - 1, min(count, len(source))).astype(int).tolist()


def decoded_rates(config: Config, file: decoded.FrameFile) -> list[float | None]:
    """Return the decoded frames per second of each video; None if the file's rate is unknown."""
    return [rate and (config.fps or rate) for rate in file.rates]


def caption(config: Config, source: Windows, number: int) -> str:
    """Return a caption for a window: its number, or its video's file, its time there, and the size of the frames."""
    if not isinstance(source, VideoWindows):
        return f"window {number}"
    video, file = source.video[number], source.file
    rate, size = decoded_rates(config, file)[video], file.sizes[video]
    first = source.starts[number] - file.starts[video]
    name = Path(file.names[video]).name.encode("ascii", "replace").decode()
    start = f"{first / rate:.1f} s" if rate else f"frame {first}"
    return ", ".join([name, start] + (["x".join(map(str, size))] if size else []))


STILL, BLACK, CUT = 0.25, 32, 40
"""Thresholds, on a scale of 255. STILL: a frame whose mean absolute change is less is still. BLACK: a frame without a
brighter pixel is black. CUT: a frame whose mean absolute change is more, and also more than four times the median of
its window, comes after a cut."""


def describe_frames(split: str, source: Windows) -> None:
    """Print how many frames of up to 100 windows are still, black or after a cut; warn if they are many."""
    still = black = cuts = frames = 0
    numbers = evenly_spaced(source, 100)
    for number in numbers:
        window = source[number]
        change = np.abs(np.diff(window.astype(np.int16), axis=0)).mean((1, 2, 3))
        frames += len(window)
        still += int((change < STILL).sum())
        black += int((window.max((1, 2, 3)) < BLACK).sum())
        cuts += int((change > max(CUT, 4 * np.median(change))).sum()) if len(change) else 0
    print(
        f"{split:<6} in {len(numbers)} windows, {still / frames:.0%} of the frames nearly equal the one before, "
        f"{black / frames:.0%} are black, {cuts} come after a cut"
    )
    for found, warning in (
        (still > frames / 2, "most frames nearly equal the one before; a lower --fps would leave them out"),
        (black > frames / 20, "black frames teach nothing; cut them off"),
        (cuts > len(numbers) / 20, "frames after a cut can't be predicted; divide the videos there"),
        (split == "train" and len(source) < 100, f"{len(source)} windows are few; models memorise them"),
    ):
        if found:
            print(f"{split:<6} Warning: {warning}")


LARGE = 10
"""Actions of a larger magnitude are warned about: they aren't scaled, and would dominate the states next to them."""


def describe_actions(split: str, actions: np.ndarray) -> None:
    """Print the ranges of actions [N, A], and warn about constant and large ones."""
    low, high = actions.min(0), actions.max(0)
    ranges = [f"{a:.4g} to {b:.4g}" for a, b in zip(low, high, strict=True)]
    print(f"{split:<6} actions of {len(ranges)} entries, from {decoded.listed(ranges, 20)}")
    for entry in np.flatnonzero(low == high):
        print(f"{split:<6} Warning: entry {entry} of the actions is always {low[entry]:.4g}")
    if max(-low.min(), high.max()) > LARGE:
        print(f"{split:<6} Warning: actions aren't scaled; divide them in the files, so that they are at most about 1")


def main() -> None:
    with exit_codes(), Interrupts():
        examples = (
            "python data.py --config configs/minerl.yml --datadir DATASETS",
            "python data.py --dataset videos --datadir VIDEOS --channels 3 --fps 10",
        )
        inspect_dataset(configuration.parse(sys.argv[1:], "data.py", "Prepare and inspect a dataset.", examples))


if __name__ == "__main__":
    main()

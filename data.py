"""Windows of uint8 frames -> batches, in an order that the step number alone determines.

A dataset split is a random-access sequence of windows, each uint8 [T, 64, 64, C].
"""

import dataclasses
import functools
import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
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
"""How many read batches ahead."""


class Window(NamedTuple):
    """Frames and their actions."""

    video: np.ndarray  # uint8 [T, 64, 64, C]
    actions: np.ndarray | None  # float32 [T, A]: each led to its frame; None without any


class Batch(NamedTuple):
    """Windows and what each counts: rows of weight 0 are padding."""

    video: Any  # uint8 [B, T, H, W, C], on the host or on devices
    weight: Any  # float32 [B]
    actions: Any = None  # float32 [B, T, A], see Window


def windows(config: Config, split: str) -> Windows:
    """Return the windows of `split` ("train" or "test"), of `seq_len` or `eval_seq_len` frames.

    Raises:
        ConfigError: the dataset is missing and can't be prepared, or isn't what it should be; with the remedy.
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
        images, labels = digits.of_scikit_learn, digits.labels_of_scikit_learn
        return digits.MovingDigits(images, labels, split, length or 1000, c.num_digits, c.digit_speed)
    if c.dataset == "mnist":
        idx_images, idx_labels = (
            functools.partial(read, c.datadir) for read in (digits.of_mnist, digits.labels_of_mnist)
        )
        return digits.MovingDigits(idx_images, idx_labels, split, length or 1000, c.num_digits, c.digit_speed)
    return VideoWindows(frame_file(c, split), length, split)


def check_actions(config: Config, file: decoded.FrameFile) -> None:
    """Raise ConfigError unless a file of episodes has the actions that the configuration asks for."""
    asked, there = config.action_size, file.action_size
    if asked != 0 and not there:
        raise ConfigError(
            f"action_size: the episodes of {file.path} have no action; set --action_size 0 to train on frames alone"
        )
    if asked and asked != there:
        raise ConfigError(
            f"action_size: the episodes of {file.path} have actions of {there} entries, got {asked}; name others"
        )


def with_action_size(config: Config, train: Windows) -> Config:
    """Return the configuration with the size of the data's actions, where it leaves that to the data."""
    if config.action_size is not None or not isinstance(train, VideoWindows) or not train.action_size:
        return config
    return dataclasses.replace(config, action_size=train.action_size)


def window(source: Windows, index: int) -> Window:
    """Return a window with its actions, if it has any."""
    return source.window(index) if isinstance(source, VideoWindows) else Window(source[index], None)


def stacked(source: Windows, indices: Iterable[int]) -> Window:
    """Return some windows together, [B, T, ...]."""
    videos, actions = zip(*(window(source, index) for index in indices), strict=True)
    return Window(np.stack(videos), None if actions[0] is None else np.stack(actions))


def for_devices(train: Windows) -> tuple[Windows, Callable[[Batch], Batch]]:
    """Return windows in the form in which they travel to the devices, and what makes frames of their batches there.

    Accelerators draw the generated digits themselves: a host draws some 50 batches a second with any number of cores,
    since much of it is Python, and an accelerator may train on more.
    """
    if isinstance(train, digits.MovingDigits) and not on_cpu():
        return train.sprites(), lambda batch: batch._replace(video=digits.draw(batch.video))
    return train, lambda batch: batch


def frame_file(config: Config, split: str) -> decoded.FrameFile:
    """Return the frames of a split's videos; download and decode these first if needed."""
    c = config
    datadir = Path(c.datadir)
    path = datadir / "frames" / f"{c.dataset}-{split}-{c.channels}"
    kept = not c.rebuild_frames and decoded.index_path(path).exists()
    if c.dataset in OF_FILES:
        names = OF_FILES[c.dataset]
        how = decoded.Decoding(c.channels, c.fit, luma=True, partial=c.partial_videos, fps=c.fps)
        changed = [key for key in names if getattr(c, key) != getattr(Config, key)]
        keys = "".join(f", {key} {getattr(c, key)}" for key in changed)
        folder = datadir if c.split else datadir / split
        if c.split and any((datadir / name).is_dir() for name in ("train", "test")):
            raise ConfigError(f"split: {datadir} has train or test already, got {c.split}; leave it out")
        # After decoding, the folder may go.
        if kept and not folder.exists():
            file = decoded.FrameFile(path)
            if file.origin.split(", ")[2:] != keys.split(", ")[1:]:
                raise ConfigError(
                    f"{', '.join(names)}: {path}.* was decoded with other ones; set them as then, or put the "
                    f"files back into {folder}"
                )
            return file
        own = functools.partial(belongs, c, split)
        try:
            videos = (
                decoded.Folder(folder, keys, own)
                if c.dataset == "videos"
                else episodes.Episodes(folder, episodes.Meaning(c.action_leads, c.num_actions), keys, own)
            )
        except ConfigError as error:
            if c.split:
                raise ConfigError(f"{error}, or set another split, so that some are {split} videos") from error
            raise

        def found() -> decoded.Videos:
            if videos.ignored:
                print(f"Ignored in {folder}, since they aren't {c.dataset}: {decoded.listed(videos.ignored)}")
            return videos

        return decoded.frame_file(path, found, how, videos.origin, c.rebuild_frames)

    def prepared() -> decoded.Videos:
        from videos import published  # TFDS is slow to import, and only needed once

        builder = published.prepare(c.dataset, datadir, c.rebuild_frames)
        videos = published.PreparedVideos(c.dataset, builder, split)
        expected = builder.VIDEOS.get(split)
        if expected not in (None, len(videos)):
            count = f"{c.dataset} has {len(videos)} {split} videos; {expected} were published"
            print(f"Warning: {count}. To prepare it again, {videos.remedy}")
        decoded.remove_others(path.parent, c.dataset, videos.origin)
        return videos

    # Checksums say that published videos are whole.
    how = decoded.Decoding(c.channels, partial=True)
    if not kept:
        require_utf8("datadir", datadir.absolute())  # TFDS needs it; refused before anything is written there
    return decoded.frame_file(path, prepared, how, rebuild=c.rebuild_frames)


OF_FILES = {
    "videos": ("fit", "split", "partial_videos", "fps"),
    "episodes": ("fit", "split", "action_leads", "num_actions"),
}
"""Datasets whose files are the user's own, and the keys that say which of them are decoded, and how."""


def belongs(config: Config, split: str, path: Path) -> bool:
    """Return whether a file of `datadir` is of this split: by its name, so that it stays there if others are added."""
    if config.split is None:
        return True
    if path.parts[0] == "frames" or str(path) in (f"{config.dataset}.{suffix}" for suffix in ("png", "gif")):
        return False  # made here
    digest = hashlib.blake2b(os.fsencode(path.as_posix()), digest_size=8).digest()
    return (int.from_bytes(digest) / 2**64 < config.split) == (split == "train")


class VideoWindows:
    """The windows of decoded videos: as many as fit into each, from its first frame; with `length` 0, whole videos."""

    def __init__(self, file: decoded.FrameFile, length: int, split: str, with_actions: bool = False):
        """Divide the videos into windows.

        Raises:
            ConfigError: no video is as long as a window, or whole videos differ in length.
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
            print(f"Skipped {short} {split} videos of less than {self.length} frames: {decoded.listed(names)}")
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
        """Return a window with its actions, if there are any."""
        return self._cut(self.starts[index])

    def anywhere(self, index: int, random: np.random.Generator) -> Window:
        """Return a window of the same video as window `index`, from a random frame on."""
        video = self.video[index]
        slack = self.file.lengths[video] - self.length
        return self._cut(self.file.starts[video] + random.integers(slack + 1))

    def _cut(self, start: int) -> Window:
        place = slice(start, start + self.length)
        return Window(self.file.frames[place], None if self.actions is None else self.actions[place])

    @property
    def action_size(self) -> int:
        """The entries of an action, 0 without any."""
        return 0 if self.actions is None else self.actions.shape[1]


def training_order(config: Config, train: Windows) -> grain.MapDataset:
    """Return the numbers of the windows in the order of training: `num_epochs` passes, each in a new random order.

    Any position is found at once, without the ones before it.
    """
    return grain.MapDataset.range(len(train)).seed(config.seed or 0).shuffle().repeat(config.num_epochs)


def training_indices(config: Config, train: Windows, step: int) -> list[int]:
    """Return the numbers of the windows in the batch of a step (counted from 0)."""
    order, B = training_order(config, train), config.batch_size
    return [int(order[i]) for i in range(step * B, min((step + 1) * B, len(order)))]


def training_steps(config: Config, train: Windows) -> int:
    """Count the batches of a training, the last of which may be partial; at most `max_steps`."""
    steps = -(-len(train) * config.num_epochs // config.batch_size)
    return min(steps, config.max_steps or steps)


def training_sequences(config: Config, train: Windows) -> grain.MapDataset:
    """Return the windows in the order of training, a Window each."""
    order = training_order(config, train)
    if config.random_start and isinstance(train, VideoWindows):
        return order.random_map(train.anywhere)
    return order.map(functools.partial(window, train))


def training_batches(config: Config, train: Windows, start: int, rows: int, own: slice = ALL) -> Iterator[Batch]:
    """Read the batches from step `start` on, padded to `rows` rows, of which only those in `own` are read."""
    return batches(
        training_sequences(config, train), config.batch_size, range(start, training_steps(config, train)), rows, own
    )


def eval_batches(
    test: Windows, batch_size: int, count: int, rows: int, own: slice = ALL, first: int = 0
) -> Iterator[Batch]:
    """Read the first `count` windows in their order, in batches padded to `rows` rows, from batch number `first` on."""
    count = min(count, len(test))
    order = grain.MapDataset.range(count).map(functools.partial(window, test))
    return batches(order, batch_size, range(first, -(-count // batch_size)), rows, own)


def batches(order: grain.MapDataset, batch_size: int, steps: range, rows: int, own: slice) -> Iterator[Batch]:
    """Read batches ahead in threads, since the work is in code that releases the GIL.

    Batch n holds the windows from n * batch_size on.
    """
    first: Window = order[0]
    mine = range(rows)[own]

    def batch(step: int) -> Batch:
        count = min(batch_size, len(order) - step * batch_size)
        video = np.zeros((len(mine), *first.video.shape), np.uint8)
        actions = None if first.actions is None else np.zeros((len(mine), *first.actions.shape), np.float32)
        for i, row in enumerate(mine):
            if row < count:
                video[i], own = order[step * batch_size + row]
                if actions is not None:
                    actions[i] = own
        return Batch(video, (np.array(mine) < count).astype(np.float32), actions)

    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=2 * THREADS)
    return iter(grain.MapDataset.range(steps.start, steps.stop).map(batch).to_iter_dataset(options))


# ---------------------------------------------------------------------------------------------- looking at the data


def look(config: Config) -> None:
    """Prepare a dataset, print what it holds, and draw some training windows to `<datadir>/<dataset>.{png,gif}`.

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
            hours = [length / rate / 3600 for length, rate in zip(file.lengths, played(c, file), strict=True) if rate]
        else:
            frames = len(source) * len(source[0])
            counts, hours = (len(source), frames, len(source), frames * FRAME_SIZE**2 * c.channels), []
        length = f"{sum(hours):.2f}" if hours else "-"
        print(f"{split:<6} {counts[0]:9,} {counts[1]:13,} {counts[2]:9,} {counts[3]:16,} {length:>8}")
    for split, source in sources.items():
        if isinstance(source, VideoWindows):
            rates = [rate and f"{rate:.4g} frames/s" for rate in source.file.rates]
            for rate in dict.fromkeys(rates):
                names = [name for name, own in zip(source.file.names, rates, strict=True) if own == rate]
                print(f"{split:<6} {rate or 'no known rate'}: {decoded.listed(names, 20)}")
            reasons = [f"{name} ({reason})" for name, reason in source.file.skipped.items()]
            if reasons:
                print(f"{split:<6} skipped: {decoded.listed(reasons, 20)}")
        describe(split, source)
        if isinstance(source, VideoWindows) and source.actions is not None:
            describe_actions(split, source.actions)
    train = sources["train"]
    chosen = spread(train, 8)
    sheet, animation = (Path(c.datadir) / f"{c.dataset}.{suffix}" for suffix in ("png", "gif"))
    shown = {f"{place}: {caption(c, train, number)}": train[number] for place, number in enumerate(chosen, 1)}
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


def spread(source: Windows, count: int) -> list[int]:
    """Return the numbers of at most `count` windows from the first to the last."""
    return np.linspace(0, len(source) - 1, min(count, len(source))).astype(int).tolist()


def played(config: Config, file: decoded.FrameFile) -> list[float | None]:
    """Return how many of the decoded frames of each video are a second, as far as that is known."""
    return [rate and (config.fps or rate) for rate in file.rates]


def caption(config: Config, source: Windows, number: int) -> str:
    """Return a window's number or, of a video, its file, its time in it, and the size of the file's frames."""
    if not isinstance(source, VideoWindows):
        return f"window {number}"
    video, file = source.video[number], source.file
    rate, size = played(config, file)[video], file.sizes[video]
    first = source.starts[number] - file.starts[video]
    name = Path(file.names[video]).name.encode("ascii", "replace").decode()
    place = f"{first / rate:.1f} s" if rate else f"frame {first}"
    return ", ".join([name, place] + (["x".join(map(str, size))] if size else []))


STILL, BLACK, CUT = 0.25, 32, 40
"""Of 255: a frame that changes less on average is still; one without a brighter pixel is black; one that changes more,
and four times as much as usual in its window, comes after a cut."""


def describe(split: str, source: Windows) -> None:
    """Print what may hurt in up to 100 windows: frames that are still or black, and cuts."""
    still = black = cuts = frames = 0
    numbers = spread(source, 100)
    for number in numbers:
        window = source[number]
        change = np.abs(np.diff(window.astype(np.int16), axis=0)).mean((1, 2, 3))
        frames += len(window)
        still += int((change < STILL).sum())
        black += int((window.max((1, 2, 3)) < BLACK).sum())
        cuts += int((change > max(CUT, 4 * np.median(change))).sum()) if len(change) else 0
    print(
        f"{split:<6} in {len(numbers)} windows, {still / frames:.0%} of the frames are as the one before, "
        f"{black / frames:.0%} are black, {cuts} come after a cut"
    )
    for hurts, why in (
        (still > frames / 2, "most frames are as the one before; a lower --fps would leave them out"),
        (black > frames / 20, "black frames teach nothing; cut them off"),
        (cuts > len(numbers) / 20, "what comes after a cut can't be predicted; divide the videos there"),
        (split == "train" and len(source) < 100, f"{len(source)} windows are few; models learn them by heart"),
    ):
        if hurts:
            print(f"{split:<6} Warning: {why}")


LARGE = 10
"""Actions are used as they are; larger ones swamp the states beside them."""


def describe_actions(split: str, actions: np.ndarray) -> None:
    """Print the range of actions [N, A]."""
    low, high = actions.min(0), actions.max(0)
    ranges = [f"{a:.4g} to {b:.4g}" for a, b in zip(low, high, strict=True)]
    print(f"{split:<6} actions of {len(ranges)} entries, from {decoded.listed(ranges, 20)}")
    for entry in np.flatnonzero(low == high):
        print(f"{split:<6} Warning: entry {entry} of the actions is always {low[entry]:.4g}")
    if max(-low.min(), high.max()) > LARGE:
        print(f"{split:<6} Warning: actions are used as they are; divide them in the files, so that they reach about 1")


def main() -> None:
    with exit_codes(), Interrupts():
        examples = (
            "python data.py --config configs/minerl.yml --datadir DATASETS",
            "python data.py --dataset videos --datadir VIDEOS --channels 3 --fps 10",
        )
        look(configuration.parse(sys.argv[1:], "data.py", "Prepare a dataset, and look at it.", examples))


if __name__ == "__main__":
    main()

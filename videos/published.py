"""The paper's datasets, as TensorFlow Datasets builders that need no TensorFlow.

A builder downloads the published zip and keeps each video in it as it is, encoded: prepared data stays small, and any
program that has tensorflow-datasets reads it with `tfds.builder(name, data_dir=...)`. Features: `video` (the file's
bytes) and `name`.
"""

import errno
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import requests
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core.download import checksums, download_manager, resource

from config import ConfigError
from videos.decoded import Video

CONNECT_SECONDS = 10
"""How long the source may take to answer before we say that it can't be reached: TFDS itself tries for minutes."""


class Published(tfds.core.GeneratorBasedBuilder):
    """What the datasets have in common: zips at URLs, and a rule that says which split a file in them belongs to."""

    VERSION = tfds.core.Version("1.0.0")
    URLS: ClassVar[list[str]]
    HOMEPAGE: ClassVar[str]
    LICENCE: ClassVar[str]
    CITATION: ClassVar[str]
    SUMMARY: ClassVar[str]
    VIDEOS: ClassVar[dict[str, int]] = {}
    """How many videos the splits have as published, where that is known."""

    split_of: ClassVar[Any]
    """(name: str) -> str | None: the split of a file in the zip; None: it is none of the videos."""

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.SUMMARY,
            homepage=self.HOMEPAGE,
            citation=self.CITATION,
            license=self.LICENCE,
            # Text keeps bytes as they are; the Video feature would need TensorFlow.
            features=tfds.features.FeaturesDict({"name": tfds.features.Text(), "video": tfds.features.Text()}),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        key = next(key for key, cls in BUILDERS.items() if isinstance(self, cls))
        zips = [find_zip(key, url, Path(self._data_dir_root), dl_manager) for url in self.URLS]
        return {split: self._generate_examples(zips, split) for split in ("train", "test")}

    def _generate_examples(self, zips: list[Path], split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        number = 0
        for path in zips:
            with zipfile.ZipFile(path) as archive:
                for name in sorted(archive.namelist()):
                    if self.split_of(name) == split:
                        yield number, {"name": name, "video": archive.read(name)}
                        number += 1
        if not number:
            raise ConfigError(f"dataset: no {split} videos in {', '.join(map(str, zips))}; is it the published zip?")


PAPER = """@article{saxena2021clockworkvae,
  title={Clockwork Variational Autoencoders}, author={Saxena, Vaibhav and Ba, Jimmy and Hafner, Danijar},
  journal={arXiv preprint arXiv:2102.09532}, year={2021},
}"""


def by_folder(train: str, test: str) -> Callable[[str], str | None]:
    """mp4 files in a folder of one of these names, at any depth."""

    def split_of(name: str) -> str | None:
        match = re.search(rf"(?:^|/)(?:({re.escape(train)})|{re.escape(test)})/[^/]+\.mp4$", name)
        return None if match is None or "__MACOSX" in name else "train" if match[1] else "test"

    return split_of


class MinerlNavigate(Published):
    name = "minerl_navigate"
    URLS: ClassVar = ["https://archive.org/download/minerl_navigate/minerl_navigate.zip"]
    HOMEPAGE = "https://archive.org/details/minerl_navigate"
    LICENCE = "CC BY-NC-SA 4.0"
    CITATION = PAPER
    SUMMARY = "MineRL Navigate: Minecraft players on their way to goals, 500 frames of 64x64 pixels per video."
    VIDEOS: ClassVar = {"train": 961, "test": 225}
    split_of: ClassVar = staticmethod(by_folder("train", "test"))


class GqnMazes(Published):
    name = "gqn_mazes"
    URLS: ClassVar = ["https://archive.org/download/gqn_mazes/gqn_mazes.zip"]
    HOMEPAGE = "https://archive.org/details/gqn_mazes"
    LICENCE = "Apache 2.0"
    CITATION = PAPER
    SUMMARY = "GQN Mazes: walks through rooms with random textures, 300 frames of 64x64 pixels per video."
    split_of: ClassVar = staticmethod(by_folder("train", "test"))


class MovingMnist2digit(Published):
    name = "moving_mnist_2digit"
    URLS: ClassVar = ["https://archive.org/download/moving_mnist/moving_mnist_2digit.zip"]
    HOMEPAGE = "https://archive.org/details/moving_mnist"
    LICENCE = "CC BY-SA 3.0"
    CITATION = PAPER
    SUMMARY = (
        "Moving MNIST: two digits bouncing within 64x64 pixels; 100 frames per training video, 1000 per test video."
    )
    split_of: ClassVar = staticmethod(by_folder("train-seq100", "test-seq1000"))


class KthActions(Published):
    name = "kth_actions"
    ACTIONS = ("walking", "jogging", "running", "boxing", "handwaving", "handclapping")
    URLS: ClassVar = [f"http://www.csc.kth.se/cvap/actions/{action}.zip" for action in ACTIONS]
    HOMEPAGE = "https://www.csc.kth.se/cvap/actions/"
    LICENCE = "CC BY-NC"
    CITATION = """@inproceedings{schuldt2004recognizing,
  title={Recognizing human actions: a local SVM approach},
  author={Schuldt, Christian and Laptev, Ivan and Caputo, Barbara},
  booktitle={ICPR}, year={2004},
}"""
    SUMMARY = "KTH Actions: 25 persons, six actions, 160x120 pixels. Persons 1-16 are train, 17-25 test."

    @staticmethod
    def split_of(name: str) -> str | None:
        match = re.search(r"person(\d\d)_\w+\.avi$", name)
        return None if match is None else "train" if int(match[1]) <= 16 else "test"


BUILDERS: dict[str, type[Published]] = {
    "minerl": MinerlNavigate,
    "mazes": GqnMazes,
    "mmnist": MovingMnist2digit,
    "kth": KthActions,
}


class PreparedVideos:
    """A split of a prepared dataset."""

    def __init__(self, source: Any):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Video:
        example = self.source[index]
        return Video(example["name"].decode(), example["video"])


def prepare(dataset: str, datadir: Path) -> tfds.core.DatasetBuilder:
    """The builder of a dataset, its data prepared from what is downloaded, or was put by hand into downloads/manual.

    Raises:
        ConfigError: the source can't be reached or gave something else; one line that names URL and folder.
    """
    cls = BUILDERS[dataset]
    # Checksums are recorded at the first download, and verified at each later one.
    record = record_of(datadir)
    manual = datadir / "downloads" / "manual"
    try:
        builder = cls(data_dir=str(datadir), file_format="array_record")
        if builder.data_path.exists():
            return builder
        manual.mkdir(parents=True, exist_ok=True)
        record.touch()
        known = checksums.load_url_infos(record)
        cls._checksums_path, cls.url_infos = record, known
        options = tfds.download.DownloadConfig(
            manual_dir=str(manual), register_checksums=not all(url in known for url in cls.URLS), try_download_gcs=False
        )
        builder.download_and_prepare(download_config=options)
    except download_manager.NonMatchingChecksumError as error:
        raise ConfigError(
            f"dataset: what {dataset}'s source sent isn't what it sent the first time ({record} has the checksums); "
            f"delete {datadir / 'downloads'} to start anew, or put the right zip into {manual}"
        ) from error
    except (zipfile.BadZipFile, EOFError) as error:
        raise ConfigError(
            f"dataset: a zip of {dataset} is damaged ({error}); delete it below {datadir / 'downloads'} and run again"
        ) from error
    except (requests.RequestException, tfds.download.DownloadError) as error:
        raise unreachable(dataset, ", ".join(cls.URLS), manual, " ".join(str(error).split())) from error
    except OSError as error:
        reason = "no space left" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or error
        raise ConfigError(f"datadir: {dataset} can't be prepared in {datadir} ({reason}); choose another") from error
    return builder


def find_zip(dataset: str, url: str, datadir: Path, dl_manager: tfds.download.DownloadManager) -> Path:
    """The zip that was put by hand, or that was or is now downloaded.

    Raises:
        ConfigError: there is none, and the source doesn't answer.
    """
    manual = datadir / "downloads" / "manual"
    by_hand = manual / url.rsplit("/", 1)[1]
    if by_hand.exists():
        return by_hand
    known = checksums.load_url_infos(record_of(datadir)).get(url)
    if known is None or not any((datadir / "downloads").rglob(resource.get_dl_fname(url, known.checksum))):
        try:
            with requests.get(url, stream=True, timeout=CONNECT_SECONDS) as response:
                response.raise_for_status()
        except requests.RequestException as error:
            status = getattr(error.response, "status_code", None)
            raise unreachable(dataset, url, manual, f"HTTP {status}" if status else "no connection") from error
    return Path(dl_manager.download(url))


def record_of(datadir: Path) -> epath.Path:
    """The checksums of what was downloaded into `datadir`."""
    return epath.Path(datadir) / "downloads" / "checksums.tsv"


def unreachable(dataset: str, url: str, manual: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"dataset: {dataset} can't be downloaded from {url} ({reason}); put the zip by hand into {manual}"
    )

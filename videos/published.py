"""The paper's datasets, as TensorFlow Datasets builders that need no TensorFlow.

A builder keeps each video of the published zips encoded, so prepared data stays small. Any program that has
tensorflow-datasets reads it with `tfds.builder(name, data_dir=...)`. Features: `video` (the file's bytes) and `name`.

To add a dataset, write a subclass of `Published`, and enter it in `BUILDERS` and in `CHANNELS` of config.py.
"""

import contextlib
import errno
import glob
import io
import json
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import requests
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core.download import checksums, resource
from tqdm import tqdm

from config import ConfigError
from videos.decoded import Video, one_process

ANSWER_SECONDS = 10
"""How long a server may take to accept a connection."""
SILENCE_SECONDS = 60
"""How long a server may send nothing."""


class Published(tfds.core.GeneratorBasedBuilder):
    """The base class of all datasets: zips at URLs, and a rule that assigns their files to splits."""

    # Earlier implementations prepare 1.0.0, in a format that needs TensorFlow. A data directory may hold both versions.
    VERSION = tfds.core.Version("1.1.0")
    SUPPORTED_VERSIONS: ClassVar = [tfds.core.Version("1.0.0")]
    url_infos: ClassVar[dict[str, Any]] = {}
    """TFDS's checksums. They are empty: the zips exist before TFDS prepares them."""
    URLS: ClassVar[list[str]]
    HOMEPAGE: ClassVar[str]
    LICENCE: ClassVar[str]
    CITATION: ClassVar[str]
    SUMMARY: ClassVar[str]
    VIDEOS: ClassVar[dict[str, int]] = {}
    """The published number of videos of each split, if known."""

    split_of: ClassVar[Any]
    """(name: str) -> str | None: the split of a file in the zip; None: the file isn't one of the videos."""

    zips: list[Path]
    """The zips to prepare from; set before preparing."""

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

    def _split_generators(self, _: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in ("train", "test")}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        number = 0
        for path in self.zips:
            with open_zip(path) as archive:
                for name in sorted(archive.namelist()):
                    if self.split_of(name) == split and not is_metadata(name):
                        yield number, {"name": name, "video": read_member(archive, name)}
                        number += 1
        if not number:
            zips = ", ".join(map(str, self.zips))
            raise ConfigError(f"dataset: no {split} videos in {zips}; is it the published zip?")


def open_zip(path: Path) -> zipfile.ZipFile:
    """Open a zip; raise ConfigError if it is damaged."""
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, EOFError) as error:
        raise damaged(path, error) from error


def read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    """Return the bytes of a file in a zip.

    Raises:
        ConfigError: the file is damaged, encrypted, or compressed in a way that Python can't read.
    """
    path = Path(str(archive.filename))
    try:
        return archive.read(name)
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise damaged(path, error) from error
    except (NotImplementedError, RuntimeError) as error:
        raise ConfigError(
            f"dataset: {name} in {path} can't be unpacked ({error}); pack it again with deflate and no password"
        ) from error


def damaged(path: Path, error: Exception) -> ConfigError:
    return ConfigError(f"dataset: {path} is damaged ({error}); delete it and run again")


def is_metadata(name: str) -> bool:
    """Return whether a file in a zip is macOS's metadata: __MACOSX/*, ._*."""
    return "__MACOSX" in name or name.rsplit("/", 1)[-1].startswith("._")


PAPER = """@article{saxena2021clockworkvae,
  title={Clockwork Variational Autoencoders}, author={Saxena, Vaibhav and Ba, Jimmy and Hafner, Danijar},
  journal={arXiv preprint arXiv:2102.09532}, year={2021},
}"""


def by_folder(train: str, test: str) -> Callable[[str], str | None]:
    """Return a `split_of` rule for mp4 files in folders of these names, at any depth."""

    def split_of(name: str) -> str | None:
        match = re.search(rf"(?:^|/)(?:({re.escape(train)})|{re.escape(test)})/[^/]+\.mp4$", name)
        return None if match is None else "train" if match[1] else "test"

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
    """The videos of a split of a prepared dataset. Reading damaged data raises a ConfigError that names the folder."""

    def __init__(self, dataset: str, builder: Published, split: str):
        self.dataset, self.builder = dataset, builder
        with undamaged(Path(builder.data_path)):
            self.source = builder.as_data_source(split=split)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Video:
        with undamaged(Path(self.builder.data_path)):
            example = self.source[index]
            return Video(example["name"].decode(), example["video"])

    @property
    def origin(self) -> str:
        return f"{self.dataset} {source(self.builder)}".strip()

    @property
    def remedy(self) -> str:
        """How to prepare the dataset from other zips."""
        manual = Path(self.builder._data_dir_root) / "downloads" / "manual"
        names = ", ".join(map(zip_name, self.builder.URLS))
        return f"put {names} as published into {manual} and run again with --rebuild_frames"


def prepare(dataset: str, datadir: Path, again: bool = False) -> Published:
    """Return a dataset's builder; prepare the dataset first if needed.

    Zips in downloads/manual, where users put them, are preferred. Missing ones are downloaded.

    Args:
        dataset: the dataset's key in `BUILDERS`.
        datadir: the directory of all datasets.
        again: prepare the dataset again if all zips exist and differ from those that it was prepared from.

    Raises:
        ConfigError: a zip can't be downloaded or read, or the dataset can't be written.
    """
    cls = BUILDERS[dataset]
    try:
        builder = find_prepared(cls, datadir)
        if builder is not None and not again:
            return builder
        (datadir / "downloads" / "manual").mkdir(parents=True, exist_ok=True)
        with one_process(datadir / "downloads" / f"{cls.name}.lock", f"preparing {dataset}"):
            remove_leftovers(cls, datadir)
            builder = find_prepared(cls, datadir)  # another process may have prepared it meanwhile
            local = [path for url in cls.URLS if (path := find_zip(cls, url, datadir))]
            complete = len(local) == len(cls.URLS)
            changed = again and builder is not None and complete and source(builder) != zips_checksum(local)
            if builder is None or changed:
                zips = [find_zip(cls, url, datadir) or download(dataset, url, datadir) for url in cls.URLS]
                print(f"Preparing {dataset}{' again' if changed else ''} from {', '.join(map(str, zips))}")
                try:
                    builder = prepare_from(zips, cls, datadir)
                finally:
                    remove_leftovers(cls, datadir)
                record_checksums(cls, datadir)
            return builder
    except OSError as error:
        reason = "no space left" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or error
        raise ConfigError(f"datadir: {dataset} can't be prepared in {datadir} ({reason}); choose another") from error


@contextlib.contextmanager
def undamaged(folder: Path) -> Iterator[None]:
    """Turn errors of reading the prepared dataset in a folder into a ConfigError."""
    try:
        yield
    except Exception as error:  # damaged files raise errors of many types in TFDS and ArrayRecord
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"datadir: can't read the dataset in {folder} ({reason}); delete it and run again") from error


def find_prepared(cls: type[Published], datadir: Path) -> Published | None:
    """Return the builder of a prepared dataset, or None.

    Raises:
        ConfigError: the prepared dataset is damaged.
    """
    for version in str(cls.VERSION), "1.0.0":
        folder = datadir / cls.name / version
        try:
            with undamaged(folder):
                file_format = json.loads((folder / "dataset_info.json").read_text()).get("fileFormat")
                if file_format != "array_record":
                    raise ValueError(f"its format is {file_format}")
                return cls(data_dir=str(datadir), version=version, file_format=file_format)
        except ConfigError:
            # 1.0.0 may be from an earlier implementation, and is left alone then.
            if folder.exists() and version != "1.0.0":
                raise
    return None


def prepare_from(zips: list[Path], cls: type[Published], datadir: Path) -> Published:
    """Prepare a dataset in a separate folder, move it to its final one, and return its builder.

    After a failure, `remove_leftovers` restores the earlier state.
    """
    unfinished = unfinished_folder(cls, datadir)
    builder = cls(data_dir=str(unfinished), file_format="array_record")
    builder.zips = zips
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS would print the separate folder
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    new, final = Path(builder.data_path), final_folder(cls, datadir)
    (new / SOURCE).write_text(zips_checksum(zips))
    if final.exists():
        final.rename(unfinished / "replaced")
    new.rename(final)
    return cls(data_dir=str(datadir), file_format="array_record")


SOURCE = "source.txt"
"""The file in a prepared dataset that holds the checksum of its zips."""


def source(builder: Published) -> str:
    """Return the checksum of the zips that a dataset was prepared from; "" if unknown."""
    path = Path(builder.data_path) / SOURCE
    with undamaged(path.parent):
        return path.read_text() if path.exists() else ""


def zips_checksum(zips: list[Path]) -> str:
    """Return a checksum of the files in zips, which doesn't depend on the zips' paths."""
    listing = []
    for path in zips:
        with open_zip(path) as archive:
            listing += [(member.filename, member.file_size, member.CRC) for member in archive.infolist()]
    return f"{zlib.crc32(json.dumps(listing).encode()):08x}"


def unfinished_folder(cls: type[Published], datadir: Path) -> Path:
    return datadir / cls.name / "incomplete.new"


def final_folder(cls: type[Published], datadir: Path) -> Path:
    return datadir / cls.name / str(cls.VERSION)


def remove_leftovers(cls: type[Published], datadir: Path) -> None:
    """Remove what interrupted downloads and preparations left, of this program and of TFDS.

    A dataset that was being replaced is put back first.
    """
    final, replaced = final_folder(cls, datadir), unfinished_folder(cls, datadir) / "replaced"
    if replaced.exists() and not final.exists():
        replaced.rename(final)
    leftovers = list((datadir / cls.name).glob("incomplete.*"))
    leftovers += (datadir / "downloads" / cls.name).glob("*.new")
    for url in cls.URLS:
        leftovers += (datadir / "downloads").rglob(glob.escape(resource.get_dl_fname(url)) + ".tmp.*")
    for path in leftovers:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def zip_name(url: str) -> str:
    return url.rsplit("/", 1)[1]


def downloaded(cls: type[Published], url: str, datadir: Path) -> Path:
    return datadir / "downloads" / cls.name / zip_name(url)


def find_zip(cls: type[Published], url: str, datadir: Path) -> Path | None:
    """Return the path of a zip that a user put there or that was downloaded, or None."""
    downloads = datadir / "downloads"
    candidates = [downloads / "manual" / zip_name(url), downloaded(cls, url, datadir)]
    recorded = checksums.load_url_infos(checksums_file(datadir)).get(url)
    if recorded:  # under the name that TFDS gives a download
        candidates += downloads.rglob(glob.escape(resource.get_dl_fname(url, recorded.checksum)))
    return next((path for path in candidates if path.exists()), None)


def download(dataset: str, url: str, datadir: Path) -> Path:
    """Download a zip.

    Raises:
        ConfigError: the server doesn't answer, or sends no zip, or another one than the first time.
    """
    manual = datadir / "downloads" / "manual"
    path = downloaded(BUILDERS[dataset], url, datadir)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".new")
    try:
        try:
            with (
                requests.get(url, stream=True, timeout=(ANSWER_SECONDS, SILENCE_SECONDS)) as response,
                unfinished.open("wb") as file,
                tqdm(desc=path.name, unit="B", unit_scale=True, dynamic_ncols=True, mininterval=0.5) as bar,
            ):
                response.raise_for_status()
                bar.total = int(response.headers.get("Content-Length", 0)) or None
                for block in response.iter_content(2**20):
                    file.write(block)
                    bar.update(len(block))
        except requests.RequestException as error:
            received = unfinished.stat().st_size if unfinished.exists() else 0
            status = getattr(error.response, "status_code", None)
            reason = f"connection lost after {received:,} bytes" if received else "no connection"
            reason = f"HTTP {status}" if status else reason
            raise ConfigError(
                f"dataset: {dataset} can't be downloaded from {url} ({reason}); put the zip by hand into {manual}"
            ) from error
        if not zipfile.is_zipfile(unfinished):
            raise ConfigError(
                f"dataset: the {unfinished.stat().st_size:,} bytes that {url} sent aren't a whole zip; run again "
                f"later, or put the zip by hand into {manual}"
            )
        record = checksums_file(datadir)
        recorded = checksums.load_url_infos(record).get(url)
        if recorded and recorded != checksums.compute_url_info(unfinished):
            raise ConfigError(
                f"dataset: what {url} sent isn't what it sent the first time; delete {record}, which has the checksum, "
                f"to accept it, or put the right zip into {manual}"
            )
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def record_checksums(cls: type[Published], datadir: Path) -> None:
    """Record the checksums of new downloads. Call this only after the dataset is prepared from them."""
    record = checksums_file(datadir)
    recorded = checksums.load_url_infos(record)
    for url in cls.URLS:
        path = downloaded(cls, url, datadir)
        if path.exists() and url not in recorded:
            checksums.save_url_infos(record, {url: checksums.compute_url_info(path)})


def checksums_file(datadir: Path) -> epath.Path:
    """Return the file of the checksums of what was downloaded into `datadir`; create it if needed."""
    record = epath.Path(datadir) / "downloads" / "checksums.tsv"
    record.touch()
    return record

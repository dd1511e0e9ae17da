"""From published zips, folders and arrays to frames, windows and a trained model; damaged and missing data.

All data are made here, in the published layouts, and served on the loopback interface. Nothing uses the internet.
"""

import contextlib
import dataclasses
import functools
import gzip
import http.server
import importlib.util
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
import zipfile
from fractions import Fraction
from unittest.mock import Mock

import av
import numpy as np
import pytest
from av.stream import Disposition
from conftest import ROOT

import config as configuration
import data
from config import ConfigError
from system.checkpoints import Checkpoints
from videos import decoded, digits, published
from videos.decoded import Decoding, Video


def make_video(frames, codec="libx264", format="mp4", size=(64, 64), seed=0, grey=False, rotation=0, pixel_aspect=None):
    """Return the bytes of a video of moving gradients. All frames differ, also between seeds."""
    random = np.random.default_rng(seed)
    width, height = size
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=format) as container:
        stream = container.add_stream(codec, rate=20)
        stream.width, stream.height = size
        if rotation:
            stream.set_display_rotation(rotation)
        if pixel_aspect:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        stream.pix_fmt = {"libx264": "yuv420p", "mpeg4": "yuv420p", "libvpx": "yuv420p", "gif": "rgb8"}[codec]
        phase, colour = random.uniform(0, 6, 2), random.uniform(60, 195, 3)
        for t in range(frames):
            wave = np.sin(np.arange(width) / 9 + phase[0] + t / 3) + np.cos(np.arange(height) / 7 + phase[1])[:, None]
            image = np.clip(colour * (1 + 0.3 * wave[..., None]), 0, 255).astype(np.uint8)
            image = np.repeat(image[..., :1], 3, -1) if grey else image
            for packet in stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return buffer.getvalue()


make_video = functools.cache(make_video)


def reference(content, channels=3):
    """Return the frames of a video, converted by PyAV itself."""
    with av.open(io.BytesIO(content)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    return frames if channels == 3 else frames[..., :1]


def zipped(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def contents(dataset):
    """Return small zips in the published layouts, as bytes by the file name in the URL."""
    if dataset == "kth":
        actions = published.KthActions.ACTIONS
        persons = {"boxing": (1, 16, 17, 25), "walking": (2, 18)}
        return {
            f"{action}.zip": zipped(
                {
                    f"person{i:02}_{action}_d1_uncomp.avi": make_video(20 + i, "mpeg4", "avi", (160, 120), i, True)
                    for i in persons.get(action, (3,))
                }
            )
            for action in actions
        }
    folders = {
        "minerl": ("minerl_navigate/train", "minerl_navigate/test", "minerl_navigate.zip", 40, 30),
        "mazes": ("train", "test", "gqn_mazes.zip", 30, 30),
        "mmnist": ("train-seq100", "test-seq1000", "moving_mnist_2digit.zip", 20, 40),
    }
    train, test, name, train_frames, test_frames = folders[dataset]
    grey = dataset == "mmnist"
    files = {f"{train}/{i}.mp4": make_video(train_frames, seed=i, grey=grey) for i in (10, 2, 1)}
    files |= {f"{test}/{i}.mp4": make_video(test_frames, seed=20 + i, grey=grey) for i in range(2)}
    return {name: zipped(files | {"README.txt": b"about", f"__MACOSX/{train}/._1.mp4": b"junk"})}


@pytest.fixture
def server(monkeypatch):
    """Serve `files` (name -> bytes) on loopback instead of the datasets' servers, and record requests in `asked`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.rsplit("/", 1)[1]
            asked.append(name)
            content = files.get(name)
            self.send_response(200 if content is not None else 404)
            if server.states_length:
                self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            time.sleep(server.pause)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(content or b"")

        def log_message(self, *_):
            pass

    files, asked = {}, []
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    for cls in published.BUILDERS.values():
        local = [f"http://127.0.0.1:{httpd.server_port}/{url.rsplit('/', 1)[1]}" for url in cls.URLS]
        monkeypatch.setattr(cls, "URLS", local)
        monkeypatch.setattr(cls, "VIDEOS", {})
    server = types.SimpleNamespace(files=files, asked=asked, states_length=True, pause=0)
    yield server
    httpd.shutdown()
    httpd.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def no_tensorflow():
    """Check that TensorFlow isn't installed, and that no test imports it."""
    assert importlib.util.find_spec("tensorflow") is None
    yield
    assert "tensorflow" not in sys.modules


CHANNELS = {"minerl": 3, "mazes": 3, "mmnist": 1, "kth": 1}


def for_dataset(tiny, dataset, **keys):
    keys = {"seq_len": 10, "eval_seq_len": 20, "open_loop_ctx": 8, "channels": CHANNELS.get(dataset, 3)} | keys
    return dataclasses.replace(tiny, dataset=dataset, **keys)


# ---------------------------------------------------------------------------------------------- published datasets


@pytest.mark.parametrize("dataset", ["minerl", "mazes", "mmnist", "kth"])
def test_published_datasets_work_from_download_to_evaluation(tiny, server, dataset):
    import eval as evaluation
    import train
    from training import runs

    server.files.update(contents(dataset))
    c = for_dataset(tiny, dataset, max_steps=2, num_examples=2, seq_len=11)  # not whole ticks of the top level
    train.train(c)
    evaluation.evaluate(*evaluation.parse(["--logdir", str(runs.directory(c)), "--no_save_grid"]))
    file = decoded.FrameFile(data.Path(c.datadir) / "frames" / f"{dataset}-train-{c.channels}")
    if dataset == "kth":
        assert len(file.names) == 2 + 1 + 4 and "person16_boxing_d1_uncomp.avi" in file.names
        assert len(data.windows(c, "test").file.names) == 3
        assert sorted(file.lengths) == [21, 22, 23, 23, 23, 23, 36]
    else:
        # In the order of their names, to the pixel.
        assert [name.rsplit("/", 1)[1] for name in file.names] == ["1.mp4", "10.mp4", "2.mp4"]
        length = {"minerl": 40, "mazes": 30, "mmnist": 20}[dataset]
        for start, seed in zip(file.starts, (1, 10, 2), strict=True):
            want = reference(make_video(length, seed=seed, grey=dataset == "mmnist"), c.channels)
            np.testing.assert_array_equal(file.frames[start : start + length], want)
    # The dataset is complete. The server isn't asked again, and may be gone.
    asked = len(server.asked)
    server.files.clear()
    assert len(data.windows(c, "train")) and len(server.asked) == asked
    # Another program can read the prepared dataset without this project.
    program = "import tensorflow_datasets as tfds, sys; "
    program += f"b = tfds.builder({published.BUILDERS[dataset].name!r}, data_dir={c.datadir!r}); e = b.as_data_source(split='train')[0]; "
    program += "print(len(e['video']), b.info.as_proto.redistribution_info.license, b.info.citation[:3], 'tensorflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tiny.datadir)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        str(
            len(published.PreparedVideos(dataset, published.prepare(dataset, data.Path(c.datadir)), "train")[0].content)
        )
    )
    assert "@" in done.stdout and "False" in done.stdout


def test_a_zip_put_by_hand_is_used(tiny, server):
    c = for_dataset(tiny, "mazes")
    manual = data.Path(c.datadir) / "downloads" / "manual"
    manual.mkdir(parents=True)
    (manual / "gqn_mazes.zip").write_bytes(contents("mazes")["gqn_mazes.zip"])
    assert len(data.windows(c, "train")) == 9
    assert not server.asked


def refused(c, pattern):
    with pytest.raises(ConfigError, match=pattern) as error:
        data.windows(c, "train")
    assert "\n" not in str(error.value)
    assert not list(data.Path(c.datadir).glob("frames/*.frames*"))


def test_a_failing_url_is_named(tiny, server):
    c = for_dataset(tiny, "mazes")
    refused(
        c,
        rf"mazes can't be downloaded from http://127.0.0.1:\d+/gqn_mazes.zip \(HTTP 404\); put the zip by hand into {c.datadir}/downloads/manual",
    )


def test_a_refused_or_silent_connection_is_named(tiny, server, monkeypatch):
    c = for_dataset(tiny, "mazes")
    begin = time.monotonic()
    with contextlib.closing(__import__("socket").socket()) as silent:
        silent.bind(("127.0.0.1", 0))
        monkeypatch.setattr(published.GqnMazes, "URLS", [f"http://127.0.0.1:{silent.getsockname()[1]}/gqn_mazes.zip"])
        refused(c, r"can't be downloaded from .* \(no connection\)")  # bound, but not listening
        silent.listen()
        monkeypatch.setattr(published, "SILENCE_SECONDS", 1)
        refused(c, r"can't be downloaded from .* \(no connection\)")  # accepts, and never answers
    assert time.monotonic() - begin < 15


@pytest.mark.parametrize("what", ["truncated", "html"])
@pytest.mark.parametrize("states_length", [True, False])
def test_an_incomplete_zip_is_refused(tiny, server, what, states_length):
    whole = contents("mazes")["gqn_mazes.zip"]
    wrong = whole[: len(whole) // 2] if what == "truncated" else b"<html>Please log in</html>"
    server.files["gqn_mazes.zip"], server.states_length = wrong, states_length
    c = for_dataset(tiny, "mazes")
    refused(
        c, rf"the {len(wrong):,} bytes that http.* sent aren't a whole zip; run again later, or put the zip by hand"
    )
    # Nothing of it is kept: when the server is right, the same command works.
    server.files["gqn_mazes.zip"] = whole
    assert len(data.windows(c, "train")) == 9


def test_a_lost_connection_is_named(tiny, server, monkeypatch):
    monkeypatch.setattr(published, "SILENCE_SECONDS", 1)
    whole = contents("mazes")["gqn_mazes.zip"]

    class Content(bytes):
        def __len__(self):
            return 10**6  # that is announced

    server.files["gqn_mazes.zip"] = Content(whole)
    refused(
        for_dataset(tiny, "mazes"),
        r"can't be downloaded from .* \((no connection|connection lost after [\d,]+ bytes)\)",
    )


def test_each_zip_is_downloaded_once(tiny, server):
    server.files.update(contents("kth"))
    data.windows(for_dataset(tiny, "kth"), "train")
    assert sorted(server.asked) == sorted(server.files)


def test_a_damaged_video_in_a_zip_is_named(tiny, server):
    """The zip opens, but the checksum of a file in it is wrong."""
    whole = contents("mazes")["gqn_mazes.zip"]
    at = whole.index(b"train/2.mp4") + 2000
    server.files["gqn_mazes.zip"] = whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :]
    c = for_dataset(tiny, "mazes")
    path = data.Path(c.datadir) / "downloads" / "gqn_mazes" / "gqn_mazes.zip"
    refused(c, rf"{path} is damaged \(Bad CRC-32 for file 'train/2.mp4'\); delete it and run again")
    path.unlink()
    server.files["gqn_mazes.zip"] = whole
    assert len(data.windows(c, "train")) == 9


@pytest.mark.parametrize("how", ["deflate64", "encrypted"])
def test_a_zip_that_python_cannot_unpack_is_refused(tiny, server, how):
    content = bytearray(contents("mazes")["gqn_mazes.zip"])
    for magic, flags in (b"PK\x03\x04", 6), (b"PK\x01\x02", 8):
        at = content.find(magic)
        while at >= 0:
            content[at + flags + 2 * (how == "deflate64")] = {"deflate64": 9, "encrypted": 1}[how]
            at = content.find(magic, at + 1)
    server.files["gqn_mazes.zip"] = bytes(content)
    refused(
        for_dataset(tiny, "mazes"),
        r"train/1.mp4 in .*gqn_mazes.zip can't be unpacked \(.*\); pack it again with deflate and no password",
    )


def test_macos_metadata_is_no_video(tiny, server):
    server.files.update(contents("kth"))
    with zipfile.ZipFile(io.BytesIO(server.files["boxing.zip"])) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    junk = {f"{folder}._person01_boxing_d1_uncomp.avi": b"junk" for folder in ("", "__MACOSX/")}
    server.files["boxing.zip"] = zipped(files | junk)
    file = data.windows(for_dataset(tiny, "kth"), "train").file
    assert len(file.names) == 7 and not file.skipped


def test_data_of_earlier_implementations_are_left_alone(tiny, server):
    """They prepare version 1.0.0 in a format that needs TensorFlow. An own version 1.0.0 is used."""
    c = for_dataset(tiny, "mazes")
    theirs = data.Path(c.datadir) / "gqn_mazes" / "1.0.0"
    theirs.mkdir(parents=True)
    (theirs / "dataset_info.json").write_text('{"fileFormat": "tfrecord", "name": "gqn_mazes", "version": "1.0.0"}')
    before = (theirs / "dataset_info.json").read_bytes()
    server.files.update(contents("mazes"))
    assert len(data.windows(c, "train")) == 9
    assert (theirs / "dataset_info.json").read_bytes() == before
    # An earlier version of ours has that number too, and is used.
    other = dataclasses.replace(c, datadir=str(data.Path(c.datadir).parent / "other"))
    ours = data.Path(other.datadir) / "gqn_mazes" / "1.0.0"
    shutil.copytree(theirs.with_name("1.1.0"), ours)
    info = ours / "dataset_info.json"
    info.write_text(info.read_text().replace("1.1.0", "1.0.0"))
    (ours / "source.txt").unlink()
    server.files.clear()
    assert len(data.windows(other, "train")) == 9
    # A damaged dataset is named.
    (theirs.with_name("1.1.0") / "dataset_info.json").write_text("{")
    with pytest.raises(
        ConfigError, match=r"can't read the dataset in .*gqn_mazes/1.1.0 \(.*\); delete it and run again"
    ):
        data.windows(c, "test")


DAMAGES = {
    "cut": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content[:-1],
    "empty": lambda content: b"",
    "flipped byte": lambda content: content[: len(content) // 2] + b"\xff" + content[len(content) // 2 + 1 :],
}


@pytest.mark.parametrize("damage", ["missing", *DAMAGES])
def test_damaged_prepared_data_are_named(tiny, server, damage):
    """For each damaged file, the frames are still right, or the error names the folder to delete."""
    c = for_dataset(tiny, "mazes")
    server.files.update(contents("mazes"))
    frames = data.windows(c, "train").file.frames.copy()
    folder = data.Path(c.datadir) / "gqn_mazes" / "1.1.0"
    named = {}
    for path in sorted(folder.iterdir()):
        shutil.rmtree(data.Path(c.datadir) / "frames")
        content = path.read_bytes()
        path.unlink() if damage == "missing" else path.write_bytes(DAMAGES[damage](content))
        try:
            np.testing.assert_array_equal(data.windows(c, "train").file.frames, frames)
        except ConfigError as error:
            named[path.name] = str(error)
        path.write_bytes(content)
    assert "gqn_mazes-train.array_record-00000-of-00001" in named
    for message in named.values():
        assert re.fullmatch(rf"datadir: can't read the dataset in {folder} \(.+\); delete it and run again", message)
    shutil.rmtree(folder)
    np.testing.assert_array_equal(data.windows(c, "train").file.frames, frames)


def test_two_processes_prepare_a_dataset_once(tiny, server):
    """They need the two splits of a new dataset at the same time."""
    server.files.update(contents("mazes"))
    server.pause = 3
    program = "import sys; sys.path.insert(0, {!r}); import config, data; from videos import published; "
    program += "published.GqnMazes.URLS = {!r}; "
    program += "c = config.Config(dataset='mazes', channels=3, seq_len=10, eval_seq_len=20, open_loop_ctx=8, levels=1, datadir={!r}); "
    program += "print(len(data.windows(c, sys.argv[1])))"
    program = program.format(str(ROOT), published.GqnMazes.URLS, tiny.datadir)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, split], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for split in ("train", "test")
    ]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert [output.splitlines()[-1] for output in outputs] == ["9", "2"]
    assert server.asked == ["gqn_mazes.zip"]


def test_leftovers_of_killed_programs_are_removed(tiny, server):
    """They come from downloads and preparations of this program and of TFDS."""
    c = for_dataset(tiny, "mazes")
    server.files.update(contents("mazes"))
    datadir = data.Path(c.datadir)
    (url,) = published.GqnMazes.URLS
    tmp = published.resource.get_dl_fname(url) + ".tmp.0123"
    for folder in (
        datadir / "downloads" / "gqn_mazes" / tmp,
        datadir / "downloads" / tmp,
        datadir / "gqn_mazes" / "incomplete.ABCDEF_1.0.0",
        datadir / "gqn_mazes" / "incomplete.new",
    ):
        folder.mkdir(parents=True)
        (folder / "half").write_bytes(b"x")
    (datadir / "downloads" / "gqn_mazes" / "gqn_mazes.zip.new").write_bytes(b"x")
    (datadir / "downloads" / "others.zip.tmp.1").mkdir()
    data.windows(c, "train")
    assert {path.name for path in (datadir / "gqn_mazes").iterdir()} == {"1.1.0"}
    assert {path.name for path in (datadir / "downloads" / "gqn_mazes").iterdir()} == {"gqn_mazes.zip"}
    assert [path.name for path in (datadir / "downloads").glob("*.tmp.*")] == ["others.zip.tmp.1"]


def test_a_killed_replacement_is_undone(tiny, server):
    c = for_dataset(tiny, "mazes")
    server.files.update(contents("mazes"))
    data.windows(c, "train")
    prepared = data.Path(c.datadir) / "gqn_mazes" / "1.1.0"
    aside = prepared.with_name("incomplete.new")
    aside.mkdir()
    prepared.rename(aside / "replaced")
    server.files.clear()
    shutil.rmtree(data.Path(c.datadir) / "downloads")
    assert len(data.windows(c, "test")) == 2


def test_a_dataset_that_cannot_be_decoded_is_replaced(tiny, server, capsys):
    c = for_dataset(tiny, "mazes")
    right = contents("mazes")["gqn_mazes.zip"]
    server.files["gqn_mazes.zip"] = zipped({f"{split}/1.mp4": b"junk" for split in ("train", "test")})
    manual = data.Path(c.datadir) / "downloads" / "manual"
    remedy = f"put gqn_mazes.zip as published into {manual} and run again with --rebuild_frames"
    refused(c, f"none of the 1 videos for mazes-train-3 can be decoded; {remedy}")
    (manual / "gqn_mazes.zip").write_bytes(right)
    again = dataclasses.replace(c, rebuild_frames=True)
    assert len(data.windows(again, "train")) == 9 and len(data.windows(again, "test")) == 2
    assert capsys.readouterr().out.count("Preparing mazes again") == 1


def test_a_replaced_zip_is_prepared_again(tiny, server, capsys):
    """--rebuild_frames only prepares changed zips again. Frames of the old zip are removed."""
    c = for_dataset(tiny, "mazes")
    again = dataclasses.replace(c, rebuild_frames=True)
    server.files.update(contents("mazes"))
    assert len(data.windows(c, "train")) == 9 and len(data.windows(c, "test")) == 2
    manual = data.Path(c.datadir) / "downloads" / "manual" / "gqn_mazes.zip"
    manual.write_bytes(server.files["gqn_mazes.zip"])
    capsys.readouterr()
    data.windows(again, "train")
    assert "Preparing" not in capsys.readouterr().out
    # A damaged zip replaces nothing.
    manual.write_bytes(server.files["gqn_mazes.zip"][:2000])
    with pytest.raises(ConfigError, match=rf"{manual} is damaged \(.*\); delete it and run again"):
        data.windows(again, "train")
    assert len(data.windows(c, "train")) == 9
    manual.write_bytes(zipped({"train/1.mp4": make_video(30, seed=7), "test/1.mp4": b"junk"}))
    assert len(data.windows(again, "train")) == 3
    printed = capsys.readouterr().out
    assert (
        "Preparing mazes again from" in printed and "mazes-test-3.*, which was decoded from another source" in printed
    )
    with pytest.raises(ConfigError, match="none of the 1 videos for mazes-test-3 can be decoded"):
        data.windows(c, "test")
    # Without any zip, the prepared dataset is kept.
    manual.unlink()
    shutil.rmtree(manual.parent.parent / "gqn_mazes")
    assert len(data.windows(again, "train")) == 3


def test_a_zip_with_another_checksum_is_refused(tiny, server):
    c = for_dataset(tiny, "mazes")
    server.files.update(contents("mazes"))
    data.windows(c, "train")
    datadir = data.Path(c.datadir)
    for path in datadir / "downloads" / "gqn_mazes", datadir / "gqn_mazes", datadir / "frames":
        shutil.rmtree(path)
    server.files["gqn_mazes.zip"] = zipped({"train/1.mp4": make_video(30), "test/1.mp4": make_video(30)})
    refused(c, r"isn't what it sent the first time; delete .*checksums.tsv")


def test_a_downloaded_zip_is_used_again(tiny, server):
    c = for_dataset(tiny, "mazes")
    server.files.update(contents("mazes"))
    data.windows(c, "train")
    for folder in "gqn_mazes", "frames":
        shutil.rmtree(data.Path(c.datadir) / folder)
    server.files.clear()
    asked = len(server.asked)
    assert len(data.windows(c, "train")) == 9 and len(server.asked) == asked


def test_a_zip_without_videos_is_refused(tiny, server):
    server.files["gqn_mazes.zip"] = zipped({"a.txt": b"hello"})
    refused(for_dataset(tiny, "mazes"), "no train videos in .*; is it the published zip")


def test_other_counts_than_published_are_reported(tiny, server, monkeypatch, capsys):
    server.files.update(contents("minerl"))
    monkeypatch.setattr(published.MinerlNavigate, "VIDEOS", {"train": 961, "test": 225})
    data.windows(for_dataset(tiny, "minerl"), "train")
    printed = capsys.readouterr().out
    assert (
        "Warning: minerl has 3 train videos; 961 were published. To prepare it again, put minerl_navigate.zip"
        in printed
    )
    assert "downloads/manual and run again with --rebuild_frames" in printed


# ---------------------------------------------------------------------------------------------- folders


@pytest.fixture
def folder(tiny, tmp_path):
    """Return the configuration of a folder with videos of many kinds."""
    for split in "train", "test":
        (tmp_path / "my" / split / "deep").mkdir(parents=True)
    train = tmp_path / "my" / "train"
    (train / "a.mp4").write_bytes(make_video(25))
    (train / "deep" / "b.avi").write_bytes(make_video(24, "mpeg4", "avi", (96, 64), 1))
    (train / "c.webm").write_bytes(make_video(23, "libvpx", "webm", (64, 128), 2))
    (train / "d.gif").write_bytes(make_video(22, "gif", "gif", seed=3))
    random = np.random.default_rng(0)
    np.save(train / "e.npy", random.integers(0, 256, (21, 64, 64, 3), dtype=np.uint8))
    np.savez(train / "f.npz", random.integers(0, 256, (20, 64, 64, 1), dtype=np.uint8))
    (train / "notes.txt").write_text("no video")
    (tmp_path / "my" / "test" / "a.mp4").write_bytes(make_video(40, seed=9))
    return for_dataset(tiny, "videos", datadir=str(tmp_path / "my"))


def test_a_folder_of_videos_is_decoded(folder):
    train = data.windows(folder, "train")
    assert train.file.names == ["a.mp4", "c.webm", "d.gif", "deep/b.avi", "e.npy", "f.npz"]
    assert train.file.lengths.tolist() == [25, 23, 22, 24, 21, 20]
    assert len(train) == 12 and train[0].shape == (10, 64, 64, 3)
    np.testing.assert_array_equal(np.concatenate([train[0], train[1]]), reference(make_video(25))[:20])
    array = np.load(data.Path(folder.datadir) / "train" / "e.npy")
    np.testing.assert_array_equal(np.concatenate([train[8], train[9]]), array[:20])
    assert len(data.windows(folder, "test")) == 2


def with_streams(path, *streams):
    """Write a file of several video streams: codec, width and height, frames, disposition of each."""
    with av.open(str(path), "w", options={"default_mode": "passthrough"} if path.suffix == ".mkv" else {}) as container:
        opened = []
        for codec, size, _, disposition in streams:
            opened.append(stream := container.add_stream(codec, rate=20))
            stream.width, stream.height = size
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            stream.disposition = disposition
        for stream, (_, (width, height), frames, _) in zip(opened, streams, strict=True):
            for t in range(frames):
                grey = np.full((height, width, 3), 10 * t, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, "rgb24")))
            container.mux(stream.encode())


COVER, NORMAL, DEFAULT = Disposition.attached_pic, Disposition(0), Disposition.default


@pytest.mark.parametrize(
    "name, streams",
    [
        ("cover.mp4", [("mjpeg", (96, 96), 1, COVER), ("libx264", (64, 64), 12, DEFAULT)]),
        ("cover_as_a_track.mp4", [("mjpeg", (96, 96), 1, DEFAULT), ("libx264", (64, 64), 12, DEFAULT)]),
        ("default.mkv", [("libx264", (96, 96), 9, NORMAL), ("libx264", (64, 64), 12, DEFAULT)]),
        ("largest.mkv", [("libx264", (32, 24), 9, NORMAL), ("libx264", (64, 64), 12, NORMAL)]),
    ],
)
def test_the_stream_that_players_show_is_decoded(tmp_path, name, streams):
    with_streams(tmp_path / name, *streams)
    video = Video(name, tmp_path / name)
    assert decoded.survey(video).frames == 12
    frames = list(decoded.decode(video, Decoding(3)))
    assert len(frames) == 12
    np.testing.assert_allclose([frame.mean() for frame in frames], 10 * np.arange(12), atol=2)


def test_a_cover_is_no_video(tmp_path):
    with_streams(tmp_path / "a.mp4", ("mjpeg", (96, 96), 1, COVER))
    with pytest.raises(decoded.Unreadable, match="it has no video stream"):
        list(decoded.decode(Video("a.mp4", tmp_path / "a.mp4"), Decoding(3)))


@pytest.mark.parametrize("shape", [(5, 0, 64, 3), (5, 64, 0, 3), (0, 64, 64, 3)])
def test_arrays_without_pixels_are_skipped(folder, shape, capsys):
    np.save(data.Path(folder.datadir) / "train" / "none.npy", np.zeros(shape, np.uint8))
    assert data.windows(folder, "train").file.skipped == {
        "none.npy": f"it is uint8 {list(shape)} instead of uint8 [T, H, W, 1 or 3]"
    }
    assert "Skipped 1 unreadable videos: none.npy" in capsys.readouterr().out


CUT = r"it ends after \d+ of the 60 frames that it announces; --partial_videos takes these"


def test_truncated_videos_are_left_out_or_kept_in_part(folder, capsys):
    train = data.Path(folder.datadir) / "train"
    for path in train.rglob("*.*"):
        path.unlink()
    for name, codec, format in (
        ("a.mkv", "libx264", "matroska"),
        ("b.avi", "mpeg4", "avi"),
        ("c.webm", "libvpx", "webm"),
    ):
        whole = make_video(60, codec, format)
        (train / name).write_bytes(whole[: len(whole) * 8 // 10])
        (train / f"whole_{name}").write_bytes(whole)
        assert 0 < decoded.survey(Video(name, train / name)).frames < 60
    windows = data.windows(folder, "train")
    assert windows.file.names == ["whole_a.mkv", "whole_b.avi", "whole_c.webm"]
    assert set(windows.file.lengths) == {60}
    assert all(re.fullmatch(CUT, reason) for reason in windows.file.skipped.values()) and len(windows.file.skipped) == 3
    assert "Skipped 3 unreadable videos: a.mkv (it ends after " in capsys.readouterr().out
    partial = dataclasses.replace(folder, partial_videos=True)
    with pytest.raises(
        ConfigError, match=r"the keys that choose them, have changed since .*; run again with --rebuild"
    ):
        data.windows(partial, "train")
    windows = data.windows(dataclasses.replace(partial, rebuild_frames=True), "train")
    assert windows.file.names[:3] == ["a.mkv", "b.avi", "c.webm"] and not windows.file.skipped
    assert all(10 <= length < 60 for length in windows.file.lengths[:3])
    for start, length, name in zip(windows.file.starts, windows.file.lengths, windows.file.names, strict=True):
        whole = reference((train / f"whole_{name.removeprefix('whole_')}").read_bytes())
        sure = length if length == 60 else length - 3  # some of the last frames are missing
        np.testing.assert_array_equal(windows.file.frames[start : start + sure], whole[:sure])


def at_times(path, ticks, rate=20, shift=0, **options):
    """Write a video with frames at these ticks of `rate` per second, from tick `shift` on."""
    encoded = io.BytesIO()
    with av.open(encoded, "w", format="matroska", options={"avoid_negative_ts": "disabled"}) as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width = stream.height = 64
        stream.codec_context.max_b_frames = 0
        for number, tick in enumerate(ticks):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), min(16 * number, 255), np.uint8), "rgb24")
            frame.pts, frame.time_base = tick, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    encoded.seek(0)
    with av.open(encoded) as source, av.open(str(path), "w", options=options) as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        stream.time_base = Fraction(1, rate)
        for packet in source.demux(video=0):
            if packet.dts is not None:
                times = (
                    round(packet.pts * packet.time_base * rate) - shift,
                    round(packet.dts * packet.time_base * rate) - shift,
                )
                packet.time_base, packet.stream = Fraction(1, rate), stream
                packet.pts, packet.dts, packet.duration = *times, 1
                container.mux(packet)


@pytest.mark.parametrize(
    "name, ticks, shift, frames",
    [
        ("pauses.avi", range(0, 60, 5), 0, 12),  # announces 56 frames
        ("pauses.mkv", range(0, 60, 5), 0, 12),
        ("late.mp4", range(10, 70), 0, 60),
        ("edited.mp4", range(60), 10, 50),  # an edit list hides what was before 0
    ],
)
def test_complete_videos_that_announce_other_counts_are_kept(tmp_path, name, ticks, shift, frames):
    at_times(tmp_path / name, ticks, shift=shift, **({"avoid_negative_ts": "disabled"} if shift else {}))
    video = Video(name, tmp_path / name)
    assert len(list(decoded.decode(video, Decoding(3)))) == frames
    assert decoded.survey(video).frames == frames


@pytest.mark.parametrize(
    "name, rate, ticks, shift, fps, numbers",
    [
        ("same.mp4", 20, range(6), 0, 20, [0, 1, 2, 3, 4, 5]),
        ("rounded.mkv", 30, range(15), 0, 30, list(range(15))),  # to milliseconds
        ("rounded.mkv", 60, range(15), 0, 30, list(range(0, 15, 2))),
        ("slower.avi", 20, range(6), 0, 10, [0, 2, 4]),
        ("faster.mkv", 10, range(3), 0, 20, [0, 0, 1, 1, 2, 2]),
        ("other.mp4", 60, range(12), 0, 25, [0, 2, 4, 7, 9]),
        ("pauses.mkv", 20, [0, 1, 6, 7], 0, 20, [0, 1, 1, 1, 1, 1, 2, 3]),
        ("pauses.avi", 20, [0, 1, 6, 7], 0, 10, [0, 1, 1, 2]),
        ("late.mp4", 20, range(10, 16), 0, 10, [0, 2, 4]),  # counted from the first frame
        ("edited.mp4", 20, range(16), 10, 10, [10, 12, 14]),
        ("without_times.mkv", 20, range(16), 10, 10, [0, 2, 4, 6, 8, 10, 12, 14]),  # negative ones, which MKV lacks
    ],
)
def test_fps_samples_frames_by_their_times(folder, name, rate, ticks, shift, fps, numbers):
    train = data.Path(folder.datadir) / "train"
    at_times(train / name, ticks, rate=rate, shift=shift, **({"avoid_negative_ts": "disabled"} if shift else {}))
    c = dataclasses.replace(folder, fps=fps, seq_len=1)
    file = data.windows(c, "train").file
    own = file.names.index(name)
    frames = file.frames[file.starts[own] :][: file.lengths[own]]
    assert np.rint(frames.mean((1, 2, 3)) / 16).astype(int).tolist() == numbers
    assert file.rates[own] == pytest.approx(rate * (len(ticks) - 1) / (max(ticks) - min(ticks)), rel=0.02)


def test_fps_repeats_the_long_frames_of_a_gif(tmp_path):
    """Pillow stores equal frames once, with a longer duration."""
    from PIL import Image

    shades = [0, 0, 0, 40, 80, 80, 80, 80, 120, 160]
    images = [Image.new("L", (64, 64), shade) for shade in shades]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=50)
    video = Video("a.gif", tmp_path / "a.gif")
    assert [frame.mean() for frame in decoded.decode(video, Decoding(3))] == [0, 40, 80, 120, 160]
    assert [frame.mean() for frame in decoded.decode(video, Decoding(3, fps=20))] == shades
    assert decoded.survey(video).frames == 5 and decoded.survey(video, 20).frames == pytest.approx(10, abs=1)


def test_decoded_frames_without_their_folder_need_the_same_keys(folder):
    c = dataclasses.replace(folder, fps=10)
    frames = data.windows(c, "test").file.frames.copy()
    shutil.rmtree(data.Path(folder.datadir) / "test")
    np.testing.assert_array_equal(data.windows(c, "test").file.frames, frames)
    for other in folder, dataclasses.replace(c, fps=5), dataclasses.replace(c, partial_videos=True):
        with pytest.raises(
            ConfigError, match=r"^fit, split, partial_videos, fps: .*videos-test-3.* was decoded with other values"
        ):
            data.windows(other, "test")


def test_a_folder_is_split_by_names(folder, capsys):
    datadir = data.Path(folder.datadir)
    shutil.rmtree(datadir / "test")
    c = dataclasses.replace(folder, split=0.5, eval_seq_len=10)
    refused(c, "^split: .* has a folder train or test already")
    (datadir / "train").rename(datadir / "all")
    for number in range(30):
        shutil.copy(datadir / "all" / "a.mp4", datadir / "all" / f"{number}.mp4")

    def names(split):
        return set(data.windows(dataclasses.replace(c, rebuild_frames=True), split).file.names)

    train, test = names("train"), names("test")
    assert not train & test and len(train | test) == 36 and min(len(train), len(test)) > 9
    data.inspect_dataset(c)  # leaves pictures there, which are no videos of it
    for number in range(30, 60):
        shutil.copy(datadir / "all" / "a.mp4", datadir / "all" / f"{number}.mp4")
    assert names("train") > train and names("test") > test and len(names("train") | names("test")) == 66
    for path in (datadir / "all").rglob("*.*"):
        if path.name != "a.mp4":
            path.unlink()
    one = "train" if "all/a.mp4" in train else "test"
    assert names(one) == {"all/a.mp4"}
    with pytest.raises(
        ConfigError, match=r"holds no videos; put .* files there, or set another --split, so that some are"
    ):
        names("test" if one == "train" else "train")


def test_times_must_increase():
    for times in [None], [0, 1, 1], [0, 2, 1], [0, None]:
        frames = [types.SimpleNamespace(pts=time, time_base=Fraction(1, 20), duration=1) for time in times]
        with pytest.raises(decoded.Unordered):
            list(decoded.by_time(iter(frames), Fraction(20)))


def test_different_frame_rates_are_reported(folder, capsys):
    at_times(data.Path(folder.datadir) / "train" / "slow.mkv", range(12), rate=12)
    data.inspect_dataset(folder)
    printed = capsys.readouterr().out
    assert "The videos have 12 to 20 frames a second, and each frame is kept; --fps takes them at one rate" in printed
    assert "train  20 frames/s: a.mp4, c.webm, d.gif, deep/b.avi\ntrain  no known rate: e.npy, f.npz\n" in printed
    assert "train  12 frames/s: slow.mkv\n" in printed
    data.inspect_dataset(dataclasses.replace(folder, fps=12, rebuild_frames=True))
    assert "each frame is kept" not in capsys.readouterr().out


BLUE, RED = [0, 0, 253], [253, 0, 0]


@pytest.mark.parametrize(
    "codec, pixels, across, down",
    [
        ("libx264", "yuv420p", [[0, 0, 254]] * 4 + [RED] * 4, [254, 254, 240, 240, 140, 140, 125, 125]),
        ("libx264", "yuv420p10le", [BLUE] * 4 + [RED] * 4, [255, 253, 250, 222, 159, 131, 126, 125]),
        ("libx265", "yuv420p10le", [BLUE] * 4 + [RED] * 4, [255, 253, 250, 222, 159, 131, 126, 125]),
        ("libx264", "nv12", [[0, 0, 254]] * 4 + [RED] * 4, [254, 254, 240, 240, 140, 140, 125, 125]),
        (
            "ffv1",
            "yuv411p",
            [
                [5, 0, 242],
                [5, 0, 242],
                [59, 0, 165],
                [59, 0, 165],
                [192, 11, 87],
                [192, 11, 87],
                [246, 0, 10],
                [246, 0, 10],
            ],
            [253] * 4 + [125] * 4,
        ),
        (
            "ffv1",
            "yuv440p",
            [
                [0, 0, 255],
                [0, 0, 255],
                [11, 0, 233],
                [11, 0, 233],
                [240, 2, 18],
                [240, 2, 18],
                [255, 0, 0],
                [255, 0, 0],
            ],
            [255, 253, 250, 222, 158, 130, 125, 124],
        ),
    ],
)
def test_colours_equal_those_of_ffmpeg(codec, pixels, across, down):
    """ffmpeg 9.0.2 gave these values: the middle of a row from blue to red, and of a column that darkens."""
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, :32, 2] = image[:, 32:, 0] = 255
    image[40:] //= 2
    lossless = {"libx264": {"qp": "0"}, "libx265": {"x265-params": "lossless=1:log-level=none"}, "ffv1": {}}
    content = io.BytesIO()
    with av.open(content, "w", format="matroska") as container:
        stream = container.add_stream(codec, rate=20, options=lossless[codec])
        stream.width = stream.height = 64
        stream.pix_fmt = pixels
        container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(stream.encode())
    for how in Decoding(3), Decoding(3, "crop", luma=True):
        (frame,) = decoded.decode(Video("a.mkv", content.getvalue()), how)
        np.testing.assert_array_equal(frame[10, 28:36], across)
        np.testing.assert_array_equal(frame[36:44, 10, 2], down)


def test_sizes_and_formats_may_change_within_a_video():
    convert = decoded.ToRGB()
    for size, pixels in ((64, 48), "yuv420p"), ((64, 48), "yuv444p"), ((32, 32), "yuv444p"), ((32, 32), "gray10le"):
        grey = av.VideoFrame.from_ndarray(np.full((*size[::-1], 3), 100, np.uint8), "rgb24").reformat(format=pixels)
        grey.time_base = Fraction(1, 20)
        for _ in range(2):
            got = convert(grey).to_ndarray()
            assert got.shape == (*size[::-1], 3) and abs(got.astype(int) - 100).max() <= 2


def test_a_folder_can_be_decoded_to_grey(folder):
    c = dataclasses.replace(folder, channels=1)
    train = data.windows(c, "train")
    colour = reference(make_video(25)).astype(float)
    want = colour @ [0.299, 0.587, 0.114]
    assert np.abs(train[0][..., 0] - want[:10]).max() <= 0.5
    array = np.load(data.Path(folder.datadir) / "train" / "f.npz")["arr_0"]
    np.testing.assert_array_equal(train[10], array[:10])


def test_other_sizes_are_cropped_or_stretched():
    image = np.zeros((1, 64, 192, 3), np.uint8)
    image[:, :, 64:128] = 200  # the middle third
    frames = [(av.VideoFrame.from_ndarray(image[0], "rgb24"), 1)]
    video = Video("x", data.Path("x.npy"))
    original, decoded.array_frames = decoded.array_frames, lambda _: iter(frames)
    try:
        (cropped,) = decoded.decode(video, Decoding(3, "crop"))
        (stretched,) = decoded.decode(video, Decoding(3))
    finally:
        decoded.array_frames = original
    assert np.all(cropped == 200)
    assert stretched.shape == (64, 64, 3) and np.all(stretched[:, 24:40] == 200) and not stretched[:, :20].any()


def decoded_frames(content, how=None):
    return np.stack(list(decoded.decode(Video("x", content), how or Decoding(3, "crop", luma=True))))


def encoded_frames(content):
    with av.open(io.BytesIO(content)) as container:
        return list(container.decode(video=0))


@pytest.mark.parametrize("size", [(128, 64), (64, 128), (256, 16), (64, 64), (1000, 4)])
def test_padded_frames_are_whole_and_centred(size):
    width, height = size
    image = np.full((height, width, 3), 200, np.uint8)
    image[: height // 2, :, 0] = 100
    content = io.BytesIO()
    with av.open(content, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=20)
        stream.width, stream.height = size
        stream.pix_fmt = "bgr0"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(stream.encode())
    (frame,) = decoded.decode(Video("a", content.getvalue()), Decoding(3, "pad"))
    shown = [max(1, round(64 * extent / max(size))) for extent in (height, width)]
    rows, columns = (slice((64 - extent) // 2, (64 - extent) // 2 + extent) for extent in shown)
    assert (frame[rows, columns, 1] == 200).all() and frame[..., 1].sum() == 200 * shown[0] * shown[1]
    if height >= 16:
        middle = rows.start + shown[0] // 2
        assert (frame[rows.start : middle, columns, 0] == 100).all() and (
            frame[middle : rows.stop, columns, 0] == 200
        ).all()


def test_colours_are_scaled_at_full_resolution():
    """Bars of saturated colours equal the means of four pixels each."""
    image = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]], np.uint8)[np.arange(128) // 4 % 4]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=20, options={"crf": "1"})
        stream.width = stream.height = 128
        frame = av.VideoFrame.from_ndarray(np.tile(image, (128, 1, 1)), "rgb24")
        container.mux([*stream.encode(frame), *stream.encode()])
    (want,) = reference(buffer.getvalue()).astype(float)
    want = want.reshape(64, 2, 64, 2, 3).mean((1, 3))
    for how in Decoding(3), Decoding(3, "crop"):
        assert np.abs(decoded_frames(buffer.getvalue(), how)[0] - want).mean() < 0.5
    luma = decoded_frames(buffer.getvalue(), Decoding(1, "crop", luma=True))[0, ..., 0]
    assert np.abs(luma - want @ [0.299, 0.587, 0.114]).mean() < 0.5


@pytest.mark.parametrize("how", [Decoding(1), Decoding(3), Decoding(1, "crop", luma=True)])
def test_grey_videos_are_scaled_as_ffmpeg_does(how):
    content = make_video(5, size=(160, 120), grey=True)
    size = (86, 64) if how.fit == "crop" else (64, 64)
    reformatter = av.video.reformatter.VideoReformatter()
    frames = [
        reformatter.reformat(frame, *size, "rgb24", interpolation="AREA").to_ndarray()
        for frame in encoded_frames(content)
    ]
    want = np.stack(frames)[:, :, (size[0] - 64) // 2 :][:, :, :64, : how.channels]
    np.testing.assert_array_equal(decoded_frames(content, how), want)


@pytest.mark.parametrize("rotation", [90, 180, -90])
@pytest.mark.parametrize("format", ["mp4", "mov", "matroska"])
def test_rotated_videos_are_turned_upright(rotation, format):
    """`rotation` is counterclockwise."""
    content = make_video(3, format=format, size=(128, 64), rotation=rotation)
    want = decoded_frames(make_video(3, format=format, size=(128, 64)))
    np.testing.assert_array_equal(decoded_frames(content), np.rot90(want, rotation // 90, axes=(1, 2)))
    assert encoded_frames(content)[0].rotation % 360 == rotation % 360


def test_display_matrices_move_corners_by_their_definition():
    corners = np.arange(4).reshape(2, 2, 1)  # of pixels at x, y = +-1
    for matrix in (
        ([1, 0], [0, 1]),
        ([-1, 0], [0, 1]),
        ([1, 0], [0, -1]),
        ([0, 1], [1, 0]),
        ([0, 1], [-1, 0]),
        ([0, -1], [-1, 0]),
    ):
        want = np.empty((2, 2, 1))
        for y, x in np.ndindex(2, 2):
            to_x, to_y = np.array([2 * x - 1, 2 * y - 1]) @ matrix
            want[(to_y + 1) // 2, (to_x + 1) // 2] = corners[y, x]
        np.testing.assert_array_equal(decoded.upright(corners, 65536 * np.array(matrix)), want)


def test_pixels_need_not_be_square():
    """128x64 pixels that are half as wide as high form a square picture, which isn't cropped."""
    content = make_video(3, size=(128, 64), pixel_aspect=Fraction(1, 2))
    with av.open(io.BytesIO(content)) as container:
        assert container.streams.video[0].sample_aspect_ratio == Fraction(1, 2)
    np.testing.assert_array_equal(decoded_frames(content), decoded_frames(content, Decoding(3)))


def test_all_suffixes_and_links_to_folders_are_found(folder, tmp_path, capsys):
    train = data.Path(folder.datadir) / "train"
    for path in train.rglob("*.*"):
        path.unlink()
    for name, format in ("a.mkv", "matroska"), ("b.mov", "mov"), ("c.m4v", "mp4"), ("D.MP4", "mp4"):
        (train / name).write_bytes(make_video(12, format=format))
    np.save(tmp_path / "e.npy", np.zeros((11, 64, 64, 3), np.uint8))
    (tmp_path / "e.npy").rename(train / "E.NPY")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "f.mp4").write_bytes(make_video(12))
    (train / "link").symlink_to(elsewhere)
    (elsewhere / "round").symlink_to(train)
    (train / "gone.mp4").symlink_to("nowhere.mp4")
    (train / "notes.txt").write_text("not a video")
    (train / "._a.mkv").write_bytes(b"macOS")
    windows = data.windows(folder, "train")
    assert windows.file.names == ["D.MP4", "E.NPY", "a.mkv", "b.mov", "c.m4v", "link/f.mp4"]
    line = f"Ignored in {train}, since they aren't videos: ._a.mkv, gone.mp4, notes.txt\n"
    assert line in capsys.readouterr().out
    data.windows(folder, "train")
    assert "Ignored" not in capsys.readouterr().out


def test_long_lists_are_shortened():
    names = [str(i) for i in range(7)]
    assert decoded.listed(names, 7) == "0, 1, 2, 3, 4, 5, 6" and decoded.listed(names, 5) == "0, 1, 2, 3, 4 and 2 more"


def test_broken_and_short_videos_are_listed_and_skipped(folder, capsys):
    train = data.Path(folder.datadir) / "train"
    (train / "bad.mp4").write_bytes(b"not a video at all" * 100)
    whole = make_video(25, seed=5)
    (train / "cut.mp4").write_bytes(whole[: len(whole) // 3])
    (train / "empty.avi").write_bytes(b"")
    np.save(train / "floats.npy", np.zeros((30, 64, 64, 3)))
    whole = (train / "f.npz").read_bytes()
    (train / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (train / "flipped.npz").write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    (train / "text.npz").write_bytes(zipped({"arr_0.npy": b"text"}))
    (train / "two.npz").write_bytes(zipped({"a.npy": b"", "b.npy": b""}))
    (train / "short.mp4").write_bytes(make_video(9))
    windows = data.windows(folder, "train")
    arrays = {"floats.npy", "cut.npz", "flipped.npz", "text.npz", "two.npz"}
    assert set(windows.file.skipped) == {"bad.mp4", "cut.mp4", "empty.avi"} | arrays
    assert windows.file.skipped["cut.npz"] == windows.file.skipped["flipped.npz"] == "it isn't an array"
    assert windows.file.skipped["two.npz"] == "it holds 2 arrays instead of one"
    assert len(windows) == 12
    printed = capsys.readouterr().out
    assert (
        "Skipped 8 unreadable videos: bad.mp4 (" in printed
        and "floats.npy (it is float64 [30, 64, 64, 3] instead of" in printed
    )
    assert "Skipped 1 train videos with fewer than 10 frames: short.mp4" in printed


OTHER_BYTES = os.fsdecode(b"caf\xe9")


def test_file_names_need_not_be_utf8(folder, tmp_path):
    """Messages about such files can be printed with any encoding. Their videos are used."""
    datadir = data.Path(folder.datadir).rename(tmp_path / OTHER_BYTES)
    for path in (datadir / "train").rglob("*.*"):
        path.unlink()
    for name, content in {
        "whole.mp4": make_video(25),
        "short.mp4": make_video(9),
        "bad.mp4": b"not a video",
        "notes.txt": b"no video",
    }.items():
        (datadir / "train" / (OTHER_BYTES + name)).write_bytes(content)
    c = dataclasses.replace(folder, datadir=str(datadir))
    (tmp_path / "config.yml").write_bytes(c.to_yaml().encode())
    assert configuration.load(tmp_path / "config.yml") == c

    def look():
        return subprocess.run(
            [sys.executable, ROOT / "data.py", f"--config={tmp_path / 'config.yml'}"],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONIOENCODING": "ascii"},
        )

    done = look()
    assert done.returncode == 0, done.stderr
    escaped = r"caf\udce9"
    assert f"they aren't videos: {escaped}notes.txt" in done.stdout
    assert f"Skipped 1 unreadable videos: {escaped}bad.mp4 (" in done.stdout
    assert f"Skipped 1 train videos with fewer than 10 frames: {escaped}short.mp4" in done.stdout
    assert data.windows(c, "train").file.names == [f"{OTHER_BYTES}{name}" for name in ("short.mp4", "whole.mp4")]
    shutil.rmtree(datadir / "train")
    shutil.rmtree(datadir / "frames")
    done = look()
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: datadir: {tmp_path}/{escaped}/train is missing; put ")


def test_directories_of_checkpoints_and_tfds_must_be_utf8(tiny, server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^logdir: .*caf\\udce9.* isn't UTF-8; rename it"):
        Checkpoints(tmp_path / OTHER_BYTES)
    refused(dataclasses.replace(for_dataset(tiny, "mazes"), datadir=OTHER_BYTES), r"^datadir: .* isn't UTF-8")
    assert not server.asked and not list(tmp_path.iterdir())


def test_a_folder_without_usable_videos_is_refused(folder):
    for path in (data.Path(folder.datadir) / "train").rglob("*.*"):
        path.unlink()
    refused(folder, "train holds no videos; put .avi, .gif, .m4v, .mkv, .mov, .mp4")
    (data.Path(folder.datadir) / "train" / "a.mp4").write_bytes(b"junk")
    refused(folder, "none of the 1 videos for videos-train-3 can be decoded")
    refused(dataclasses.replace(folder, datadir="nowhere"), "nowhere/train is missing")


def test_windows_longer_than_all_videos_are_refused(folder):
    with pytest.raises(ConfigError, match=r"^seq_len: no train video has 30 frames; set at most 25"):
        data.windows(dataclasses.replace(folder, seq_len=30), "train")
    with pytest.raises(ConfigError, match="eval_seq_len: no test video has 41 frames; set at most 40"):
        data.windows(dataclasses.replace(folder, eval_seq_len=41), "test")


def test_whole_videos_must_have_the_same_length(folder):
    c = dataclasses.replace(folder, eval_seq_len=0)
    assert data.windows(c, "test")[0].shape == (40, 64, 64, 3)
    (data.Path(folder.datadir) / "test" / "b.mp4").write_bytes(make_video(30))
    c = dataclasses.replace(c, rebuild_frames=True)
    with pytest.raises(
        ConfigError, match="eval_seq_len: 0 takes whole videos, but the test videos have 30 to 40 frames"
    ):
        data.windows(c, "test")


def test_a_changed_folder_is_noticed(folder):
    data.windows(folder, "train")
    (data.Path(folder.datadir) / "train" / "new.mp4").write_bytes(make_video(25, seed=7))
    with pytest.raises(ConfigError, match=r"have changed since .* was decoded; run again with --rebuild_frames"):
        data.windows(folder, "train")
    assert len(data.windows(dataclasses.replace(folder, rebuild_frames=True), "train")) == 14
    assert len(data.windows(folder, "train")) == 14
    # The original files may be removed.
    shutil.rmtree(data.Path(folder.datadir) / "train")
    assert len(data.windows(folder, "train")) == 14


# ---------------------------------------------------------------------------------------------- the frame file


@pytest.mark.parametrize("damage", ["shorter", "index", "other index", "checksum", "no frames"])
def test_damaged_frame_files_are_refused(folder, damage):
    data.windows(folder, "train")
    path = data.Path(folder.datadir) / "frames" / "videos-train-3"
    frames, index = decoded.frames_path(path), decoded.index_path(path)
    if damage == "shorter":
        os.truncate(frames, frames.stat().st_size - 1)
    elif damage == "index":
        index.write_text(index.read_text()[:-20])
    elif damage == "other index":
        index.write_text("[1]")
    elif damage == "checksum":
        index.write_text(index.read_text().replace('["a.mp4", 25]', '["a.mp4", 24]'))
    else:
        frames.unlink()
    with pytest.raises(ConfigError, match=r"videos-train-3\.\* is damaged; run again with --rebuild_frames"):
        data.windows(folder, "train")
    assert len(data.windows(dataclasses.replace(folder, rebuild_frames=True), "train")) == 12


def test_frame_files_without_permission_are_named(folder, monkeypatch):
    data.windows(folder, "train")
    path = str(decoded.frames_path(data.Path(folder.datadir) / "frames" / "videos-train-3"))
    monkeypatch.setattr(np, "memmap", Mock(side_effect=PermissionError(13, "Permission denied", path)))
    with pytest.raises(ConfigError, match=r"^datadir: .*-3.frames can't be read \(Permission denied\); permit it"):
        data.windows(folder, "train")


def start_preparing(c, **environment):
    flags = [f"--{f.name}={v}" for f in dataclasses.fields(c) if (v := getattr(c, f.name)) not in (None, f.default)]
    return subprocess.Popen(
        [sys.executable, ROOT / "data.py", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | environment,
    )


@pytest.fixture
def large(folder):
    """Return the configuration of a folder that takes some seconds to decode."""
    content = make_video(400, seed=11)
    for i in range(60):
        (data.Path(folder.datadir) / "train" / f"v{i:02}.mp4").write_bytes(content)
    return folder


def test_decoding_starts_again_after_a_kill(large):
    process = start_preparing(large)
    aside = data.Path(large.datadir) / "frames" / "videos-train-3.frames.new"
    while process.poll() is None and not (aside.exists() and aside.stat().st_size):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output
    assert aside.exists() and not decoded.index_path(aside.with_name("videos-train-3")).exists()
    train = data.windows(large, "train")
    assert len(train) == 12 + 60 * 40 and not aside.exists()
    np.testing.assert_array_equal(train[len(train) - 1], reference(make_video(400, seed=11))[-10:])


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_decoding_leaves_no_files(large, signum):
    process = start_preparing(large)
    aside = data.Path(large.datadir) / "frames" / "videos-train-3.frames.new"
    while process.poll() is None and not (aside.exists() and aside.stat().st_size):
        time.sleep(0.02)
    process.send_signal(signum)
    output, _ = process.communicate()
    assert process.returncode == 128 + signum, output
    assert "Traceback" not in output and f"Interrupted by {signum.name}; call the same command again" in output
    assert not aside.exists() and not decoded.frames_path(aside.with_name("videos-train-3")).exists()


def test_an_interrupt_stops_within_a_long_video(folder, monkeypatch):
    """The decoding thread ends at its next frame."""
    frame, given = (av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), "rgb24"), 1), []

    def frames(_):
        for i in range(20_000):
            given.append(i)
            yield frame

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(decoded, "file_frames", frames)
    monkeypatch.setattr(decoded.concurrent.futures.Future, "result", interrupt)
    with pytest.raises(KeyboardInterrupt):
        data.windows(folder, "train")
    assert len(given) < 10_000


def test_a_failed_rebuild_keeps_the_frames(folder, monkeypatch):
    windows = data.windows(folder, "train")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=10**6))
    with pytest.raises(ConfigError, match="MB free"):
        data.windows(dataclasses.replace(folder, rebuild_frames=True), "train")
    assert data.windows(folder, "train").file.names == windows.file.names


def test_two_processes_decode_a_dataset_once(large):
    processes = [start_preparing(large), start_preparing(large)]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sum(output.count("Decoding 66 videos") for output in outputs) == 1
    assert sum("Another process is decoding" in output for output in outputs) >= 1


def test_too_little_space_is_refused(folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**6}))
    refused(folder, r"has 1 MB free, decoded frames need 2 MB; free some")


def test_a_full_disk_while_decoding_is_named(folder, monkeypatch):
    """The system's error comes while frames are written."""
    monkeypatch.setattr(
        shutil, "copyfileobj", lambda a, b: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    refused(folder, "no space left in .*frames")


def test_a_read_only_datadir_needs_decoded_frames(folder, monkeypatch):
    """Decoded frames are read. A split without them is refused in one line."""
    windows = len(data.windows(folder, "train"))

    def read_only(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(decoded.filelock.FileLock, "acquire", read_only)
    assert len(data.windows(folder, "train")) == windows
    with pytest.raises(ConfigError, match=r"can't write to .*frames \(Read-only file system\); choose another"):
        data.windows(folder, "test")


# ---------------------------------------------------------------------------------------------- windows


def test_videos_of_any_length_give_each_window_once(folder):
    train = data.windows(folder, "train")
    seen = []
    for i in range(len(train)):
        video = int(train.video[i])
        start = int(train.starts[i] - train.file.starts[video])
        assert start % 10 == 0 and start + 10 <= train.file.lengths[video]
        seen.append((video, start))
    assert len(set(seen)) == len(seen) == sum(length // 10 for length in train.file.lengths)


def test_random_starts_take_windows_from_any_frame(folder):
    c = dataclasses.replace(folder, random_start=True, num_epochs=40, seed=3)
    train = data.windows(c, "train")
    order = data.training_sequences(c, train)
    first_video = [train.file.frames[s : s + 10].tobytes() for s in range(16)]
    found = [first_video.index(w) for i in range(len(order)) if (w := order[i].video.tobytes()) in first_video]
    assert len(found) == 80 and set(found) >= set(range(1, 15)) and max(found) == 15
    again = data.training_sequences(c, train)
    assert all(np.array_equal(order[i].video, again[i].video) for i in (0, 5, 100))
    plain = data.training_sequences(dataclasses.replace(c, random_start=False), train)
    assert {plain[i].video.tobytes() for i in range(12)} == {train[i].tobytes() for i in range(12)}


# ---------------------------------------------------------------------------------------------- MNIST, and looking


def write_idx(path, images, opener=open):
    with opener(path, "wb") as file:
        file.write(np.array([2051, *images.shape], ">u4").tobytes() + images.tobytes())


def test_moving_mnist_is_read_from_idx_files(tiny, tmp_path):
    images = np.zeros((4, 28, 28), np.uint8)
    images[:, 4:24, 4:24] = np.array([100, 150, 200, 250])[:, None, None]
    write_idx(tmp_path / "train-images-idx3-ubyte", images[:2])
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", images[2:], gzip.open)
    c = dataclasses.replace(tiny, dataset="mnist", datadir=str(tmp_path), num_digits=1, digit_speed=(3, 3))
    train, test = data.windows(c, "train"), data.windows(c, "test")
    assert {int(train[i].max()) for i in range(20)} == {100, 150} and {int(test[i].max()) for i in range(20)} == {
        200,
        250,
    }
    write_idx(tmp_path / "train-images-idx3-ubyte", images[:0])
    digits.mnist_digits.cache_clear()
    with pytest.raises(ConfigError, match="train-images-idx3-ubyte isn't an idx file of 28x28 images"):
        data.windows(c, "train")
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"junk")
    with pytest.raises(ConfigError, match="train-images-idx3-ubyte isn't an idx file of 28x28 images"):
        data.windows(c, "train")
    with pytest.raises(ConfigError, match=r"nowhere/train-images-idx3-ubyte\[.gz\] is missing"):
        data.windows(dataclasses.replace(c, datadir="nowhere"), "train")


def test_data_py_draws_windows(folder, capsys):
    from PIL import Image

    data.inspect_dataset(folder)
    printed = capsys.readouterr().out
    assert f"train          6           135        12 {135 * 64 * 64 * 3:16,}" in printed
    with Image.open(data.Path(folder.datadir) / "videos.png") as sheet:
        assert sheet.size == (10 * 65 - 1, 8 * 65 - 1)  # 8 windows of 10 frames
    with Image.open(data.Path(folder.datadir) / "videos.gif") as gif:
        assert gif.n_frames == 10


def test_data_py_warns_of_what_harms_training(capsys):
    random = np.random.default_rng(0)
    moving = (100 + 40 * np.sin(np.arange(64) / 9 + np.arange(40)[:, None] / 3)).astype(np.uint8)
    moving = np.broadcast_to(moving[:, None, :, None], (40, 64, 64, 3))
    cut = np.concatenate([moving[:20], 255 - moving[20:]])
    data.describe_frames("test", [moving] * 200)
    assert capsys.readouterr().out == (
        "test   in 100 windows, 0% of the frames nearly equal the one before, 0% are black, 0 come after a cut\n"
    )
    data.describe_frames("train", [np.zeros_like(moving), moving, cut])
    assert capsys.readouterr().out == (
        "train  in 3 windows, 32% of the frames nearly equal the one before, 33% are black, 1 come after a cut\n"
        "train  Warning: black frames teach nothing; cut them off\n"
        "train  Warning: frames after a cut can't be predicted; divide the videos there\n"
        "train  Warning: 3 windows are few; models memorise them\n"
    )
    data.describe_frames("test", [np.full_like(moving, 90)])
    assert (
        "Warning: most frames nearly equal the one before; a lower --fps would leave them out"
        in capsys.readouterr().out
    )
    noise = random.integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)  # it changes much, but all the time
    data.describe_frames("test", [noise])
    assert "0 come after a cut" in capsys.readouterr().out


def test_captions_name_the_source_of_a_window(folder):
    at_times(data.Path(folder.datadir) / "train" / "a b.mkv", range(16), rate=8)
    train = data.windows(folder, "train")
    captions = [data.caption(folder, train, number) for number in range(len(train))]
    assert captions[0] == "a b.mkv, 0.0 s, 64x64" and "a.mp4, 0.5 s, 64x64" in captions
    assert "b.avi, 0.5 s, 96x64" in captions and "e.npy, frame 10, 64x64" in captions
    slower = dataclasses.replace(folder, fps=4, rebuild_frames=True, seq_len=2)
    train = data.windows(slower, "train")
    assert data.caption(slower, train, 1) == "a b.mkv, 0.5 s, 64x64"
    assert data.caption(folder, [None], 0) == "window 0"


def test_pictures_that_cannot_be_written_are_reported(folder, monkeypatch, capsys):
    """The dataset itself is complete, on a read-only disk."""

    def read_only(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(data.tools, "save_grid", read_only)
    message = (
        rf"the dataset is complete, but its pictures can't be written to {folder.datadir} \(Read-only file system\)"
    )
    with pytest.raises(ConfigError, match=message):
        data.inspect_dataset(folder)
    assert "train          6           135" in capsys.readouterr().out


def test_data_py_describes_generated_digits(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "data.py", "--dataset=digits", f"--datadir={tmp_path}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "train     20,000     2,000,000    20,000    8,192,000,000" in done.stdout
    assert {p.name for p in tmp_path.iterdir()} == {"digits.png", "digits.gif"}

#!/usr/bin/env bash
# opencv-python-headless 5.0.0.93, imageio 2.38.1 with imageio-ffmpeg 0.8.1 (ffmpeg 9.0.2), decord 0.6.0 (Python 3.12):
# what readers of videos make of the same valid files, beside ffmpeg itself.
#
# Guess: they give the same frames, and colours that differ by rounding (3 of 255).
#
# Seen:
#     8-bit 4:2:0, 60 frames          all 60, and equal to ffmpeg's to the bit
#     10-bit 4:2:0 (H.264 high 10)    largest difference from ffmpeg: OpenCV 112, decord 209, imageio 0
#     MP4 whose edit list hides 10    ffmpeg, OpenCV, imageio 50 frames; decord all 60 that are stored
#     MKV, small track, default track  ffmpeg and imageio the default one; OpenCV and decord the first one
#     12 frames within 2.8 s          ffmpeg (as stored), OpenCV, decord 12; imageio repeats them up to a constant rate: 59
# So a dataset depends on its reader, in frames, sizes and colours.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check opencv-python-headless==5.0.0.93 imageio==2.38.1 \
    imageio-ffmpeg==0.8.1 decord==0.6.0

cat >readers.py <<'PYTHON'
import subprocess

import cv2
import decord
import imageio.v2
import imageio_ffmpeg
import numpy as np

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()


def ffmpeg(*arguments):
    return subprocess.run([FFMPEG, "-v", "error", "-y", *arguments], check=True, capture_output=True).stdout


def with_ffmpeg(path, size=(64, 64)):
    content = ffmpeg("-i", path, "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    return np.frombuffer(content, np.uint8).reshape(-1, *size, 3)


def with_opencv(path):
    file, frames = cv2.VideoCapture(path), []
    while (read := file.read())[0]:
        frames.append(read[1][..., ::-1])
    return np.stack(frames)


READERS = {
    "ffmpeg": with_ffmpeg,
    "OpenCV": with_opencv,
    "imageio": lambda path: np.stack([frame for frame in imageio.v2.get_reader(path, "ffmpeg")]),
    "decord": lambda path: decord.VideoReader(path, num_threads=1)[:].asnumpy(),
}

source = ["-f", "lavfi", "-i", "testsrc2=size=64x64:rate=20:duration=3"]
x264 = ["-c:v", "libx264", "-bf", "0"]
ffmpeg(*source, "-pix_fmt", "yuv420p", *x264, "-g", "60", "plain.mp4")
ffmpeg(*source, "-pix_fmt", "yuv420p10le", *x264, "ten_bits.mkv")
ffmpeg("-ss", "0.5", "-i", "plain.mp4", "-c", "copy", "edited.mp4")
ffmpeg(*source, "-pix_fmt", "yuv420p", "-filter_complex", "split[a][b];[a]scale=32:24[small]", "-map", "[small]", "-map",
       "[b]", *x264, "-disposition:v:0", "0", "-disposition:v:1", "default", "two_tracks.mkv")
ffmpeg(*source, "-vf", "select=not(mod(n\\,5))", "-fps_mode", "vfr", "-pix_fmt", "yuv420p", *x264, "pauses.mkv")

frames = {
    name: {reader: read(name) for reader, read in READERS.items()}
    for name in ("plain.mp4", "ten_bits.mkv", "edited.mp4", "two_tracks.mkv", "pauses.mkv")
}
counts = {name: {reader: len(x) for reader, x in found.items()} for name, found in frames.items()}
differences = {
    name: {reader: int(abs(x.astype(int) - frames[name]["ffmpeg"]).max()) for reader, x in frames[name].items()}
    for name in ("plain.mp4", "ten_bits.mkv")
}
sizes = {reader: x.shape[2:0:-1] for reader, x in frames["two_tracks.mkv"].items()}
print(counts, differences, sizes, sep="\n")
assert set(counts["plain.mp4"].values()) == {60} and set(differences["plain.mp4"].values()) == {0}
ten = differences["ten_bits.mkv"]
assert ten["imageio"] == 0 and ten["OpenCV"] > 50 and ten["decord"] > 50
assert counts["edited.mp4"] == {"ffmpeg": 50, "OpenCV": 50, "imageio": 50, "decord": 60}
assert sizes == {"ffmpeg": (64, 64), "OpenCV": (32, 24), "imageio": (64, 64), "decord": (32, 24)}
assert counts["pauses.mkv"]["ffmpeg"] == counts["pauses.mkv"]["OpenCV"] == counts["pauses.mkv"]["decord"] == 12
assert counts["pauses.mkv"]["imageio"] == 59
PYTHON
venv/bin/python readers.py

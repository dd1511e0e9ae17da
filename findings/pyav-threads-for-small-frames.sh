#!/usr/bin/env bash
# PyAV 19.0.2 (Python 3.12, 2 cores): what VideoReformatter's automatic number of threads, the default, costs.
#
# Guess: small frames are converted in one thread; the default is as fast as threads=1.
#
# Seen, yuv420p to rgb24, microseconds of CPU time a frame, default and threads=1:
#     64x64     14 to 52     4 to 6
#     320x240   70 to 105   33 to 42
# So whoever converts many small frames, or converts in threads of their own, sets threads=1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check av==19.0.2 numpy==2.3.5

cat >threads.py <<'PYTHON'
import os
import time

import av
import numpy as np


def microseconds(width, height, **options):
    frame = av.VideoFrame.from_ndarray(np.full((height * 3 // 2, width), 100, np.uint8), "yuv420p")
    reformatter, best = av.video.reformatter.VideoReformatter(), np.inf
    for _ in range(9):
        begin = time.process_time()
        for _ in range(300):
            reformatter.reformat(frame, format="rgb24", **options)
        best = min(best, (time.process_time() - begin) / 300 * 1e6)
    return best


assert os.cpu_count() > 1, "one core has one thread in any case"
for size in (64, 64), (320, 240):
    automatic, one = microseconds(*size), microseconds(*size, threads=1)
    print(f"{size[0]}x{size[1]}: {automatic:.0f} {one:.0f}")
    if size == (64, 64):
        assert automatic > 2 * one, "the default isn't slower any more"
PYTHON
venv/bin/python threads.py

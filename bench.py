"""Benchmarks, each a table and on request JSON: python bench.py data [--json FILE]. Not tests: machines are noisy."""

import argparse
import dataclasses
import io
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import av
import numpy as np

import data
from config import FRAME_SIZE, Config


def bench_data() -> list[dict[str, Any]]:
    """From mp4 to frames, and from frames to batches of 50 windows of 100 colour frames (61 MB each)."""
    with tempfile.TemporaryDirectory() as folder:
        train = Path(folder) / "train"
        train.mkdir()
        content = encode(np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8), frames=500)
        count = 120
        for i in range(count):
            (train / f"{i:03}.mp4").write_bytes(content)
        (Path(folder) / "test").symlink_to(train)
        c = Config(dataset="videos", channels=3, datadir=folder, num_epochs=100_000, seed=0, eval_seq_len=100)
        begin, cpu = time.perf_counter(), time.process_time()
        windows = data.windows(c, "train")
        wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
        frames = count * 500
        rows = [row("decode mp4, 64x64", "frames/s", frames / wall, cores=cpu / wall)]

        begin = time.perf_counter()
        windows = data.windows(c, "train")
        batches = data.training_batches(c, windows, 1_000_000, 50)
        first = next(batches)
        rows.append(row("prepared dataset to first batch, from step 1,000,000", "s", time.perf_counter() - begin))

        size = first.video.nbytes
        rates, cores = [], []
        for _ in range(5):
            begin, cpu = time.perf_counter(), time.process_time()
            for _ in range(60):
                next(batches)
            wall = time.perf_counter() - begin
            rates.append(60 / wall)
            cores.append((time.process_time() - cpu) / wall)
        rate, used = statistics.median(rates), statistics.median(cores)
        rows.append(row("batches, warm", "batches/s", rate, cores=used, spread=max(rates) - min(rates)))
        rows.append(row("batches, warm, per core", "MB per core-second", rate * size / 1e6 / used))
        own = memory_besides_page_cache()
        rows.append(row("host memory besides the page cache", "MB", own))
    digits = data.windows(dataclasses.replace(c, dataset="digits", channels=1, datadir=""), "train")
    begin, cpu = time.perf_counter(), time.process_time()
    for i in range(200):
        digits[i]
    rows.append(row("generate digits", "frames per core-second", 200 * 100 / (time.process_time() - cpu)))
    return rows


def encode(noise: np.ndarray, frames: int) -> bytes:
    """An mp4 of slowly changing noise."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=20)
        stream.width = stream.height = FRAME_SIZE
        stream.pix_fmt = "yuv420p"
        for t in range(frames):
            image = np.kron(np.roll(noise[t // 20 % len(noise)], t % 8, 1), np.ones((8, 8, 1), np.uint8))
            for packet in stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return buffer.getvalue()


def memory_besides_page_cache() -> float:
    """Megabytes of anonymous memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1000
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def row(what: str, unit: str, value: float, **more: float) -> dict[str, Any]:
    return {"what": what, "value": value, "unit": unit, **more}


BENCHMARKS = {"data": bench_data}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    rows = BENCHMARKS[arguments.benchmark]()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    machine = {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": sys.version.split()[0],
        "commit": commit,
    }
    print(f"\n{machine}\n")
    for entry in rows:
        more = ", ".join(f"{key} {value:.3g}" for key, value in entry.items() if key not in ("what", "value", "unit"))
        print(f"{entry['what']:<55} {entry['value']:12.4g} {entry['unit']:<24} {more}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()

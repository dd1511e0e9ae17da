"""Benchmarks for an accelerator that is available for only a few minutes.

    python -m benchmarks accelerator --out DIR --seconds 540    measure items, and train a model
    python -m benchmarks join DIR --out RUN                     join the trained run, on any machine that has DIR

The most important items come first. Each item is a separate process with its own time limit, so the others continue if
it fails or takes too long. While the item `training` runs, other processes compile what later items need.

    DIR/results.jsonl           a measurement a line, in order of time
    DIR/results.md              the measurements as tables
    DIR/log.txt                 the output of the processes
    DIR/profile.xplane.pb.gz    the profile of a training step, for XProf or TensorBoard
    DIR/run.tar.<n>             the trained run in pieces
"""

import argparse
import collections
import contextlib
import dataclasses
import gzip
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import config as configuration
import data
import eval as evaluation
import tools
import train
from analyses import export
from analyses.arguments import new_directory
from benchmarks.measuring import (
    Bench,
    Row,
    Stepper,
    in_turn,
    machine,
    memory_row,
    plain_scan,
    row,
    seconds,
    timed,
    training_flop,
)
from config import FRAME_SIZE, Config, ConfigError
from cwvae import CWVAE
from fast import convolutions, scan
from sequences import rollout
from sequences.noise import sequence_keys
from system.devices import Devices
from system.interrupts import Interrupted
from training import loading, runs
from training.step import make_state

ROOT = Path(__file__).parent.parent
PIECE_SIZE = 15 * 2**20
"""The most bytes of a piece of the trained run."""
SAVING_SECONDS = 45.0
"""The last seconds of the training's time limit, for its checkpoint and the pieces."""
COMPILING_SHARE = 0.75
"""The share of an item's time limit for compilation. Programs that aren't compiled by then aren't timed."""
TINY: dict[str, Any] = dict(
    levels=1,
    tmp_abs_factor=2,
    enc_dense_layers=2,
    enc_dense_embed_size=6,
    cell_stoch_size=3,
    cell_deter_size=5,
    cell_embed_size=4,
    filters=1,
    seq_len=8,
    eval_seq_len=12,
    open_loop_ctx=4,
    batch_size=2,
)
"""The keys of a rehearsal's tiny models."""


class Setting(NamedTuple):
    """The setting in which a process measures an item."""

    out: Path
    limit: float  # seconds
    rehearse: bool  # with tiny sizes
    ahead: bool  # only compile what the item needs, for a later process that measures it

    def config(self, name: str, **keys: Any) -> Config:
        """Return a configuration in configs/ with `keys` replaced; of tiny sizes in a rehearsal."""
        c = configuration.load(ROOT / "configs" / f"{name}.yml")
        return dataclasses.replace(c, seed=0, wandb="disabled", **(keys | (TINY if self.rehearse else {})))


# ---------------------------------------------------------------------------------------------- training steps


class Program(NamedTuple):
    """A training step of a configuration, and contexts in which it is traced."""

    config: Config
    stepper: Callable[[], Stepper]
    contexts: Sequence[contextlib.AbstractContextManager[Any]] = ()


def compiled(programs: dict[str, Program], limit: float) -> Iterator[tuple[str, Stepper, Row]]:
    """Compile programs in parallel, and yield those that are compiled within `limit` seconds.

    Yields:
        The program's name, its training with the compiled step, and its device memory, if it is known.
    """
    end, pool, started = time.monotonic() + limit, ThreadPoolExecutor(len(programs)), {}
    for name, program in programs.items():
        with contextlib.ExitStack() as contexts:
            contexts.enter_context(continue_on_error(name))
            for context in program.contexts:
                contexts.enter_context(context)
            stepper = program.stepper()
            started[name] = stepper, pool.submit(stepper.lower().compile)
    for name, (stepper, compiling) in started.items():
        with continue_on_error(name):
            stepper.step = compiling.result(timeout=max(0.0, end - time.monotonic()))
            memory = stepper.step.memory_analysis() and memory_row(name, stepper.step)["value"] / 1e3
            yield name, stepper, {"memory_GB": memory} if memory else {}
    pool.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def continue_on_error(name: str) -> Iterator[None]:
    """Print any error in the block instead of raising it, so that the other programs continue."""
    try:
        yield
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {error}", flush=True)


def time_steps(setting: Setting, programs: dict[str, Program]) -> Iterator[Row]:
    """Time training steps, and yield a row for each program.

    Preliminary rows are of a single step while other programs compile. Then programs take turns. Each turn is many
    steps without waiting for the device, as in a training.
    """
    found: dict[str, tuple[Callable[[], Any], Row]] = {}
    for name, stepper, more in compiled(programs, COMPILING_SHARE * setting.limit):
        if setting.ahead:
            continue
        with continue_on_error(name):
            seconds(stepper)  # the first call is slower
            yield row(name, "ms", seconds(stepper) * 1e3, preliminary=True, **more)
            found[name] = stepper, more
    counts: dict[str, int] = {}
    for name, (take_step, _) in found.items():
        with continue_on_error(name):
            counts[name] = max(1, round(0.2 / seconds(take_step)))

    def take_steps(name: str) -> Callable[[], Any]:
        return lambda: [found[name][0]() for _ in range(counts[name])][-1]

    times = in_turn({name: take_steps(name) for name in counts}, 3 if setting.rehearse else 7)
    each = {name: [s / counts[name] for s in values] for name, values in times.items()}
    first: dict[Config, str] = {}
    for name, program in programs.items():
        reference = first.setdefault(dataclasses.replace(program.config, dtype="float32"), name)
        if name not in each:
            continue
        c, s, more = program.config, statistics.median(each[name]), dict(found[name][1])
        more |= {"frames_per_s": c.batch_size * c.seq_len / s, "TFLOP_per_s": training_flop(c) / s / 1e12}
        if reference in each:
            more["to_first"] = s / statistics.median(each[reference])
        yield timed(name, each[name], **more)


def steps(setting: Setting) -> Iterator[Row]:
    """Time the training step in each precision, and the textbook form."""
    programs: dict[str, Program] = {}
    for name in ("mmnist",) if setting.rehearse else ("mmnist", "minerl"):
        c = setting.config(name)
        half = dataclasses.replace(c, dtype="bfloat16")
        bench, half_bench = Bench(c), Bench(half)
        programs |= {
            f"{name}, float32, default precision": Program(c, bench.stepper),
            f"{name}, float32, highest precision": Program(c, bench.stepper, [jax.default_matmul_precision("highest")]),
            f"{name}, bfloat16": Program(half, half_bench.stepper),
            f"{name}, textbook form, default precision": Program(c, bench.textbook_stepper),
        }
    return time_steps(setting, programs)


def alternatives(setting: Setting) -> Iterator[Row]:
    """Time alternative forms of the training step."""
    bench = Bench(setting.config("mmnist"))
    forms: dict[str, list[Any]] = {
        f"{scan.UNROLL} ticks per iteration (default)": [],
        **{f"{n} ticks per iteration": [mock.patch.object(scan, "UNROLL", n)] for n in (1, 20)},
        "JAX's scan and its gradient": [mock.patch.object(scan, "scan", plain_scan)],
        "convolutions in the forms for CPUs": [
            mock.patch.object(convolutions, "on_cpu", return_value=True),
            mock.patch.object(convolutions, "CHUNK", 10**9),
        ],
    }
    programs = {name: Program(bench.config, bench.stepper, contexts) for name, contexts in forms.items()}
    return time_steps(setting, programs)


def with_flags(setting: Setting) -> Iterator[Row]:
    """Time the training step with the XLA_FLAGS of this process."""
    bench = Bench(setting.config("mmnist"))
    return time_steps(setting, {os.environ["XLA_FLAGS"]: Program(bench.config, bench.stepper)})


# ---------------------------------------------------------------------------------------------- a step's profile


class Event(NamedTuple):
    """A run of a kernel, or of an operation on a CPU."""

    name: str
    start: float  # ns
    duration: float  # ns
    operation: str  # its name in the compiled program; "" if unknown


PARTS = {
    "noise": r"draw|threefry|random|uniform",
    "ticks, one after the other": r"cell_\d+/.*while/",
    "cells, all ticks at once": r"cell_\d+",
    "convolutions": r"conv_\d+|_convolutions",
    "Dense layers between levels": r"level_\d+_dense",
    "rest of the model": r"CWVAE",
}
"""Parts of a training step. An operation belongs to the first part whose pattern is in its traced name."""


def profile(setting: Setting) -> Iterator[Row]:
    """Profile one training step by parts and kernels. XLA doesn't use command buffers during a profile."""
    bench = Bench(setting.config("mmnist"))
    for _, stepper, _ in compiled({"training step": Program(bench.config, bench.stepper)}, setting.limit):
        if setting.ahead:
            return
        for _ in range(3):
            seconds(stepper)
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                seconds(stepper)
            (path,) = Path(folder).glob("**/*.xplane.pb")
            with continue_on_error("profile"):
                yield from profile_rows(list(events(path)), traced_names(stepper.step.as_text()))
            packed = gzip.compress(path.read_bytes(), 1)
            if len(packed) <= PIECE_SIZE:
                (setting.out / "profile.xplane.pb.gz").write_bytes(packed)
            else:
                print(f"profile: not written, since {len(packed):,} bytes are too many")


def events(path: Path) -> Iterator[Event]:
    """Yield the events of a profile: kernels in a GPU's streams, or operations of a TPU or a CPU."""
    with warnings.catch_warnings(action="ignore"):  # ProfileData itself uses something deprecated
        planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
        on_devices = [plane for plane in planes if plane.name.startswith("/device:")]
        for plane in on_devices or planes:
            for line in plane.lines:
                if on_devices and not line.name.startswith(("Stream", "XLA Ops")):
                    continue
                for event in line.events:
                    operation = str(dict(event.stats).get("hlo_op", ""))
                    if on_devices or operation:
                        yield Event(event.name, event.start_ns, event.duration_ns, operation)


def traced_names(program: str) -> dict[str, str]:
    """Return the traced name of each operation of a compiled program, by the operation's name."""
    return dict(re.findall(r"^\s*(?:ROOT )?%?([\w.-]+) = .*op_name=\"([^\"]*)\"", program, re.MULTILINE))


def profile_rows(found: list[Event], names: dict[str, str]) -> Iterator[Row]:
    """Yield a step's time by parts and by kernels, and the time without any kernel."""
    if not found:
        raise ConfigError("profile: it has no kernels")
    end, busy = 0.0, 0.0
    for event in sorted(found, key=lambda event: event.start):
        busy += max(0.0, event.start + event.duration - max(end, event.start))
        end = max(end, event.start + event.duration)
    span = end - min(event.start for event in found)
    yield row("from the first kernel to the end of the last", "ms", span / 1e6, kernels=len(found))
    yield row("of it without any kernel", "ms", (span - busy) / 1e6, share=(span - busy) / span)

    def part(event: Event) -> str:
        name = names.get(event.operation)
        if name is None:
            return "unknown"
        return next((part for part, pattern in PARTS.items() if re.search(pattern, name)), "optimizer and others")

    total = sum(event.duration for event in found)
    for kind, key in ("part", part), ("kernel", lambda event: event.name):
        groups = collections.defaultdict(list)
        for event in found:
            groups[key(event)].append(event.duration)
        for name, durations in sorted(groups.items(), key=lambda group: -sum(group[1]))[:15]:
            ms = sum(durations) / 1e6
            yield row(f"{kind}: {name[:80]}", "ms", ms, kernels=len(durations), share=sum(durations) / total)


# ---------------------------------------------------------------------------------------------- a training


def training(setting: Setting) -> Iterator[Row]:
    """Train the published model on two digits until the time is over, and write the run in pieces.

    No videos are saved, since they can be made from the parameters later.
    """
    c = setting.config("digits", eval_seq_len=432, save_scalars_every=2000, save_model_every=2000)
    c = dataclasses.replace(c, save_gifs=False, save_named_model_every=10**9)
    with tempfile.TemporaryDirectory() as logdir:
        c = dataclasses.replace(c, logdir=logdir)
        if setting.ahead:
            model, test = CWVAE(c), data.windows(c, "test")
            params = Devices().replicate(make_state(model).params)
            train.validate(model, params, test, Devices())
            return
        begin = time.perf_counter()
        timer = threading.Timer(setting.limit - SAVING_SECONDS, os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
        with continue_on_error("training"), contextlib.suppress(Interrupted):
            train.train(c)
        timer.cancel()
        duration = time.perf_counter() - begin
        checkpoint = loading.find_checkpoint(runs.directory(c))
        copy, log = Path(logdir) / "copy", checkpoint.run / "metrics.jsonl"
        copy.mkdir()
        export.write_run(copy, c, loading.load_state(CWVAE(c), checkpoint), [])
        if log.exists():
            shutil.copy(log, copy)
        yield split(copy, setting.out)
        yield row("steps of a whole training", "", checkpoint.step, seconds=duration)
        for line in map(json.loads, log.read_text().splitlines() if log.exists() else []):
            yield row(f"validation loss after {line['step']} steps", "nats per frame", line["validation/loss"])
        if memory := jax.local_devices()[0].memory_stats():
            yield row("peak device memory", "GB", memory["peak_bytes_in_use"] / 1e9)


def split(run: Path, out: Path, size: int = PIECE_SIZE) -> Row:
    """Write an archive of a run's directory to `<out>/run.tar.<n>`, in pieces of at most `size` bytes.

    Returns:
        The row of results that `join` needs: the number of pieces, and the SHA-256 of the archive.
    """
    with tempfile.TemporaryFile() as file:
        with tarfile.open(fileobj=file, mode="w") as archive:
            archive.add(run, ".")
        file.seek(0)
        digest, count = hashlib.sha256(), 0
        while piece := file.read(size):
            (out / f"run.tar.{count}").write_bytes(piece)
            digest.update(piece)
            count += 1
    return row("pieces of the trained run", "", count) | {"sha256": digest.hexdigest()}


def join(directory: Path, run: Path) -> None:
    """Join the pieces that `split` wrote to a run directory.

    Raises:
        ConfigError: results.jsonl has no trained run, or pieces are missing or damaged.
    """
    described = [x for x in read_rows(directory) if x.get("what") == "pieces of the trained run"]
    if not described:
        raise ConfigError(f"{directory}: results.jsonl has no trained run; give accelerator more --seconds")
    digest = hashlib.sha256()
    with tempfile.TemporaryFile() as file:
        for number in range(described[-1]["value"]):
            piece = directory / f"run.tar.{number}"
            if not piece.is_file():
                raise ConfigError(f"{piece} is missing; copy it there")
            content = piece.read_bytes()
            digest.update(content)
            file.write(content)
        if digest.hexdigest() != described[-1]["sha256"]:
            raise ConfigError(f"{directory}: run.tar.* differ from what was written; copy them again")
        file.seek(0)
        with tarfile.open(fileobj=file) as archive:
            archive.extractall(run, filter="data")


# ---------------------------------------------------------------------------------------------- rollout, data


def rollouts(setting: Setting) -> Iterator[Row]:
    """Time open-loop prediction and evaluation, and compare the metrics with scikit-image's."""
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    c = setting.config("mmnist")
    model = CWVAE(c)
    params = Devices().replicate(make_state(model).params)
    random = np.random.default_rng(0)
    context = random.integers(0, 256, (c.batch_size, c.open_loop_ctx, FRAME_SIZE, FRAME_SIZE, c.channels), np.uint8)
    keys, frames = sequence_keys(jax.random.key(0), 0, c.batch_size), c.eval_seq_len - c.open_loop_ctx

    def predict() -> Any:
        return list(rollout.open_loop(model, params, context, keys, frames).prediction)

    seconds(predict)
    truth, prediction = (random.uniform(size=(2, 10, FRAME_SIZE, FRAME_SIZE, 1)).astype(np.float32) for _ in range(2))
    metrics = jax.device_get(evaluation.frame_metrics(truth, {"prediction": prediction})["prediction"])
    with tempfile.TemporaryDirectory() as folder:
        argv = ["--logdir", str(ROOT / "pretrained"), "--out", f"{folder}/out"]
        argv += ["--num_examples", "1", "--eval_seq_len", "72"] if setting.rehearse else ["--num_examples", "16"]
        if setting.ahead:
            evaluation.evaluate(*evaluation.parse(argv))
            return
        times = in_turn({"": predict}, 3)[""]
        name = f"open loop, {c.batch_size} sequences, {frames} frames"
        yield timed(name, times, frames_per_s=c.batch_size * frames / statistics.median(times))
        for protocol, data_range in ("paper", 2), ("standard", 1):
            # The standard protocol compares frames as saved.
            compared = (
                tools.to_uint8(jnp.asarray(x)) / np.float32(255) if protocol == "standard" else x
                for x in (truth, prediction)
            )
            pairs = list(zip(*(np.reshape(x, (-1, FRAME_SIZE, FRAME_SIZE, 1)) for x in compared), strict=True))
            for metric, want in (
                ("ssim", [structural_similarity(*pair, data_range=data_range, channel_axis=-1) for pair in pairs]),
                ("psnr", [peak_signal_noise_ratio(*pair, data_range=1) for pair in pairs]),
            ):
                difference = float(np.abs(metrics[protocol][metric].ravel() - want).max())
                yield row(f"{metric}, {protocol}: difference from scikit-image, at most", "", difference)
        duration = seconds(lambda: evaluation.evaluate(*evaluation.parse(argv)) and ())
        yield row(f"eval.py --logdir pretrained {' '.join(argv[4:])}", "s", duration)


def loader(setting: Setting) -> Iterator[Row]:
    """Time the loading of batches to the devices: digits, digits drawn by the devices, and colour frames."""
    if setting.ahead:
        return
    c = setting.config("digits", num_epochs=1000)
    T, count, devices = c.seq_len, 4 if setting.rehearse else 400, Devices()
    colour = np.random.default_rng(0).integers(0, 256, (count, T, FRAME_SIZE, FRAME_SIZE, 3), np.uint8)
    digits = data.windows(c, "train")
    begin = time.perf_counter()
    sprites = digits.sprites()  # type: ignore[attr-defined]
    yield row("sprites of all digit videos", "s", time.perf_counter() - begin)
    for name, source in ("digits", digits), ("digits, drawn by the devices", sprites), ("frames in colour", colour):
        for threads in 2, 4, 8:
            with mock.patch.object(data, "THREADS", threads):
                batches = devices.spread(data.training_batches(c, source, 0, devices.rows(c.batch_size)))
                if source is sprites:
                    batches = (data.digits.draw(batch.video) for batch in batches)
                jax.block_until_ready(next(batches))
                begin, loaded = time.perf_counter(), 0
                for batch in itertools.islice(batches, 4 if setting.rehearse else 200):
                    jax.block_until_ready(batch)
                    loaded += 1
                    if time.perf_counter() - begin > 2:
                        break
                yield row(f"{name}, {threads} threads", "batches/s", loaded / (time.perf_counter() - begin))


# ---------------------------------------------------------------------------------------------- the items


class Item(NamedTuple):
    """Something that a process measures."""

    measure: Callable[[Setting], Iterator[Row]]
    limit: float | None  # seconds; None: the time that the other items leave
    flags: str = ""  # XLA_FLAGS


ITEMS = {
    "steps": Item(steps, 140),
    "training": Item(training, None),
    "profile": Item(profile, 30),
    "alternatives": Item(alternatives, 45),
    "split-k": Item(with_flags, 15, "--xla_gpu_experimental_force_split_k=1"),
    "without command buffers": Item(with_flags, 15, "--xla_gpu_enable_command_buffer="),
    "rollout and evaluation": Item(rollouts, 45),
    "loading": Item(loader, 25),
}


def measure_item(name: str, setting: Setting) -> None:
    """Measure an item, and write its rows. `start` calls it in a separate process."""
    if not setting.ahead:
        write_row(setting.out, name, machine() | {"what": "machine"})
    for entry in ITEMS[name].measure(setting):
        write_row(setting.out, name, entry)


def write_row(out: Path, item: str, entry: Row) -> None:
    """Append a row of an item to results.jsonl."""
    with (out / "results.jsonl").open("a") as file:
        file.write(json.dumps({"item": item, **entry}) + "\n")


def read_rows(out: Path) -> list[Row]:
    """Return the rows of results.jsonl; raise ConfigError if it can't be read."""
    path = out / "results.jsonl"
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} can't be read ({error}); name the directory that accelerator wrote") from error


def command(name: str, setting: Setting) -> list[str]:
    """Return the command line of the process that measures an item."""
    return [
        *(sys.executable, "-m", "benchmarks", "accelerator", "--item", name),
        *("--out", str(setting.out.absolute()), "--seconds", str(setting.limit)),
        *["--rehearse"] * setting.rehearse,
        *["--ahead"] * setting.ahead,
    ]


@contextlib.contextmanager
def start(name: str, setting: Setting, cache: str, log: Any) -> Iterator[subprocess.Popen]:
    """Start the process of an item; at the end of the block, kill it and the processes that it started."""
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_COMPILATION_CACHE_DIR": cache}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", **os.environ}
    if setting.rehearse:
        environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # these would take most of the time of tiny models
    environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {ITEMS[name].flags}".strip()
    process = subprocess.Popen(
        command(name, setting), cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True, text=True
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def bench_accelerator(out: Path, limit: float, rehearse: bool) -> None:
    """Measure all items within `limit` seconds, and print and write their tables."""
    end = time.monotonic() + limit
    with (out / "log.txt").open("a") as log, tempfile.TemporaryDirectory() as cache:
        for index, (name, item) in enumerate(ITEMS.items()):
            later = list(ITEMS)[index + 1 :]
            left = end - time.monotonic()
            spare = left - sum(ITEMS[x].limit or 0 for x in later)
            share = item.limit or max(spare, 3 * SAVING_SECONDS)
            if item.limit and all(ITEMS[x].limit for x in later):
                share = max(item.limit, spare)
            allowed = min(left, share)
            if rehearse:
                allowed = left if item.limit else min(left, SAVING_SECONDS + 20)
            if allowed < (5 if item.limit else SAVING_SECONDS + 20):
                write_row(out, name, {"what": "ended", "how": "not begun, since no time was left"})
                continue
            begin, stop = time.monotonic(), threading.Event()
            setting = Setting(out, allowed, rehearse, ahead=False)
            with start(name, setting, cache, log) as process:
                ahead = threading.Thread(target=compile_ahead, args=([name, *later], setting, cache, log, stop))
                if item.limit is None:
                    ahead.start()
                try:
                    process.wait(allowed)
                    how = "whole" if process.returncode == 0 else f"failed with exit code {process.returncode}"
                except subprocess.TimeoutExpired:
                    how = "cut off"
                finally:
                    stop.set()
                    if ahead.ident:
                        ahead.join()
            duration = time.monotonic() - begin
            write_row(out, name, {"what": "ended", "how": how, "seconds": duration})
            print(f"{name}: {how} after {duration:.0f} s", flush=True)
    table = markdown(read_rows(out))
    (out / "results.md").write_text(table)
    print(f"\n{table}")


def compile_ahead(names: Sequence[str], setting: Setting, cache: str, log: Any, stop: threading.Event) -> None:
    """Compile what items need, one item after the other, until `stop` is set."""
    for name in names:
        if stop.is_set():
            return
        with start(name, setting._replace(ahead=True), cache, log) as process:
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, process.pid, 10)
            while process.poll() is None and not stop.wait(0.2):
                pass


def markdown(entries: list[Row]) -> str:
    """Return a Markdown table for each item."""
    lines = []
    for name, group in itertools.groupby(entries, key=lambda entry: entry["item"]):
        rows = list(group)
        about = next((x for x in rows if x["what"] == "machine"), {})
        ended = next((x for x in rows if x["what"] == "ended"), {})
        device = ", ".join(f"{key} {about[key]}" for key in ("device", "driver", "jax", "commit") if about.get(key))
        lines += [f"## {name}", "", f"{ended.get('how', 'not ended')}, {ended.get('seconds', 0):.0f} s. {device}", ""]
        final = {x["what"] for x in rows if "value" in x and "preliminary" not in x}
        found = [x for x in rows if "value" in x and not ("preliminary" in x and x["what"] in final)]
        if found:
            lines += ["| what | value | unit | |", "|---|---|---|---|"]
        for x in found:
            more = [
                f"{key} {format_value(value)}"
                for key, value in x.items()
                if key not in ("item", "what", "value", "unit")
            ]
            lines.append(f"| {x['what']} | {format_value(x['value'])} | {x['unit']} | {', '.join(more)} |")
        lines.append("")
    return "\n".join(lines)


def format_value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(argv: Sequence[str]) -> None:
    """Run the command `accelerator`."""
    parser = configuration.ArgumentParser(
        prog="python -m benchmarks accelerator", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", required=True, help="new directory for the results")
    parser.add_argument("--seconds", type=float, default=540.0, help="time for all items (default: 540)")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on any machine")
    parser.add_argument("--item", choices=ITEMS, help=argparse.SUPPRESS)
    parser.add_argument("--ahead", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.item:
        measure_item(given.item, Setting(Path(given.out), given.seconds, given.rehearse, given.ahead))
    else:
        bench_accelerator(new_directory("accelerator", given.out), given.seconds, given.rehearse)


def main_join(argv: Sequence[str]) -> None:
    """Run the command `join`."""
    parser = configuration.ArgumentParser(prog="python -m benchmarks join", description=join.__doc__)
    parser.add_argument("directory", help="directory that accelerator wrote")
    parser.add_argument("--out", required=True, help="new directory for the run")
    given = parser.parse_args(argv)
    run = new_directory("join", given.out)
    join(Path(given.directory), run)
    print(f"Evaluate it with: python eval.py --logdir {run}")


COMMANDS = {"accelerator": main, "join": main_join}

"""Benchmarks: python -m benchmarks step --config configs/mmnist.yml --batch_size 2 [--json FILE] [--key value ...]

They aren't tests, since machines are noisy. Programs that are compared take turns in one process, and each call waits
for the devices. Times are medians. Compilation is timed separately.
"""

import dataclasses
import functools
import io
import json
import math
import os
import re
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

import config as configuration
import cwvae
import data
import eval as evaluation
import train
from benchmarks import accelerator, textbook
from benchmarks.measuring import (
    Bench,
    Row,
    compare_times,
    floor,
    in_turn,
    machine,
    memory_row,
    plain_scan,
    row,
    timed,
    training_flop,
)
from config import FRAME_SIZE, Config, ConfigError
from cwvae import CWVAE
from fast import convolutions, scan
from sequences import rollout
from sequences.noise import Inputs, draw, sequence_keys, ticks
from system.devices import Devices
from system.interrupts import exit_codes
from training.step import make_optimizer, make_state, make_train_step

# ---------------------------------------------------------------------------------------------- training step


def bench_step(config: Config) -> list[Row]:
    """Time a training step, the textbook form of the same model, and a lower bound for this machine."""
    c, bench = config, Bench(config)
    times = in_turn({"textbook form": bench.textbook_stepper(), "training step": bench.stepper()})
    least, rows = floor(c)
    frames, flop = c.batch_size * c.seq_len, training_flop(c)
    return compare_times(times, frames_per_s=frames, TFLOP_per_s=flop / 1e12, floor_share=least) + rows


def bench_tricks(config: Config) -> list[Row]:
    """Time the training step in the textbook form, then with one trick added after the other."""
    bench = Bench(config)
    forms: dict[str, Any] = {}
    contenders: dict[str, Callable[[], Any]] = {"textbook form": bench.textbook_stepper()}
    for name, form in (
        ("+ convolutions", {"conv": convolutions.conv}),
        ("+ transposed convolutions", {"conv_transpose": convolutions.conv_transpose}),
        ("+ sum before the last Dense", {"sum_first": True}),
    ):
        forms |= form
        contenders[name] = bench.textbook_stepper(**forms)
    with mock.patch.object(convolutions, "MANY_FRAMES", 10**9):
        with mock.patch.object(convolutions, "CHUNK", 10**9):
            with mock.patch.object(scan, "scan", plain_scan):
                contenders["+ projections, prior outside the scan, fused gates"] = called_once(bench.stepper())
            contenders["+ nothing but states and their gradients inside the scan"] = called_once(bench.stepper())
        contenders["+ chunks of frames, patches made again"] = called_once(bench.stepper())
    contenders["+ fewer multiplications (training step)"] = bench.stepper()
    times = in_turn(contenders)
    rows, previous = [], 0.0
    for name, values in times.items():
        median = statistics.median(values)
        rows.append(timed(name, values, faster_than_before=previous / median if previous else 1.0))
        previous = median
    return rows


def called_once(run: Callable[[], Any]) -> Callable[[], Any]:
    """Call a function and return it: it is compiled then, and patches that end later don't change it."""
    run()
    return run


def bench_parts(config: Config) -> list[Row]:
    """Time each part of a training step separately: forward, and forward with backward."""
    c = config
    B, T, S, D = c.batch_size, c.seq_len, c.cell_stoch_size, c.cell_deter_size
    random = np.random.default_rng(0)
    video = jnp.asarray(random.uniform(size=(B, T, FRAME_SIZE, FRAME_SIZE, c.channels)), jnp.float32)
    output = jnp.asarray(random.normal(size=(B, T, S + D)), jnp.float32)
    state = cwvae.LevelState(jnp.zeros((B, S)), jnp.zeros((B, D)))
    parts: dict[str, tuple[Any, tuple]] = {
        "encoder, convolutions": (cwvae.Encoder(dataclasses.replace(c, levels=1, open_loop_ctx=1)), (video,)),
        "encoder, with Dense layers": (cwvae.Encoder(c), (video,)),
        "decoder": (cwvae.Decoder(c), (output,)),
    }
    feature_size = cwvae.Encoder(c).feature_size
    for level, count in enumerate(ticks(c, T)):
        context, features, noise = (
            jnp.asarray(random.normal(size=(B, count, size)), jnp.float32) for size in (S + D, feature_size, S)
        )
        arguments = state, context, features, Inputs(noise)
        parts[f"cell of level {level}"] = cwvae.RSSMCell(c, S + D, feature_size), arguments

    contenders: dict[str, Callable[[], Any]] = {}
    for name, (module, arguments) in parts.items():
        params = jax.jit(module.init)(jax.random.key(0), *arguments)

        def total(params: Any, *arguments: Any, module: Any = module) -> Any:
            return sum(x.sum() for x in jax.tree.leaves(module.apply(params, *arguments)))

        wanted = (0,) if "convolutions" in name or "Dense" in name else (0, 1)  # the video needs no gradient
        contenders[f"{name}, forward"] = functools.partial(jax.jit(total), params, *arguments)
        contenders[f"{name}, with backward"] = functools.partial(jax.jit(jax.grad(total, wanted)), params, *arguments)
    model = CWVAE(dataclasses.replace(c, seed=0))
    params, optimizer = make_state(model).params, make_optimizer(model)
    update = jax.jit(lambda gradients, opt_state: optimizer.update(gradients, opt_state, gradients))
    contenders["optimizer"] = functools.partial(update, params, optimizer.init(params))
    return [timed(name, times) for name, times in in_turn(contenders).items()]


# ---------------------------------------------------------------------------------------------- rollout, metrics


def bench_rollout(config: Config) -> list[Row]:
    """Time open-loop prediction up to `eval_seq_len` frames, and the textbook form, which encodes all frames."""
    c = config
    model = CWVAE(dataclasses.replace(c, seed=0))
    params = make_state(model).params
    T, context = c.eval_seq_len, c.open_loop_ctx
    video = np.random.default_rng(0).integers(0, 256, (c.batch_size, T, FRAME_SIZE, FRAME_SIZE, c.channels), np.uint8)
    keys = sequence_keys(jax.random.key(0), 0, c.batch_size)
    slow = jax.jit(functools.partial(textbook.open_loop, c))
    times = in_turn(
        {
            "textbook form": lambda: slow(params, video, [x.noise for x in draw(c, keys, T)]),
            "open_loop": lambda: list(
                rollout.open_loop(model, params, video[:, :context], keys, T - context).prediction
            ),
        },
        3,
    )
    return compare_times(times, frames_per_s=c.batch_size * (T - context))


def bench_metrics(config: Config) -> list[Row]:
    """Time SSIM and PSNR of `batch_size` videos of 100 frames in both protocols, and with scikit-image."""
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    random = np.random.default_rng(0)
    shape = (config.batch_size, 100, FRAME_SIZE, FRAME_SIZE, config.channels)
    truth, prediction = (random.uniform(size=shape).astype(np.float32) for _ in range(2))

    def host() -> Any:
        for a, b in zip(truth.reshape(-1, *shape[2:]), prediction.reshape(-1, *shape[2:]), strict=True):
            for data_range in 1, 2:
                structural_similarity(a, b, data_range=data_range, channel_axis=-1)
                peak_signal_noise_ratio(a, b, data_range=data_range)

    both = {
        "scikit-image": host,
        "frame_metrics": lambda: evaluation.frame_metrics(truth, {"prediction": prediction}),
    }
    times = in_turn(both, 3)
    return compare_times(times, frames_per_s=math.prod(shape[:2]))


# ---------------------------------------------------------------------------------------------- memory


def lower_step(config: Config, devices: int, per_device: int) -> Any:
    """Return the training step, lowered for shapes without arrays."""
    c, model = config, CWVAE(config)
    state = make_state(model)
    shape = devices, per_device, c.seq_len, FRAME_SIZE, FRAME_SIZE, c.channels
    video, weight = jax.ShapeDtypeStruct(shape, np.uint8), jax.ShapeDtypeStruct(shape[:2], np.float32)
    step: Any = make_train_step(model)
    (seed,) = step.args
    return step.func.lower(jax.ShapeDtypeStruct(seed.shape, seed.dtype), state, data.Batch(video, weight))


def bench_memory(config: Config) -> list[Row]:
    """Report the device memory of each program, as planned by the compiler. Nothing is run."""
    c, model = config, CWVAE(config)
    B, frame, chunk = c.batch_size, (FRAME_SIZE, FRAME_SIZE, c.channels), rollout.chunk_size(c)

    def shaped(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, np.uint8)

    def inputs(frames: int) -> Any:
        return jax.eval_shape(lambda: draw(c, sequence_keys(jax.random.key(0), 0, B), frames))

    carried = jax.eval_shape(lambda: model.apply({"params": {}}, B, method="initial_state"))
    params, context = make_state(model).params, c.open_loop_ctx
    devices = Devices()
    programs = {
        "training step": lower_step(c, devices.local, devices.rows(B) // devices.total),
        "validation, a chunk": rollout.apply.lower(
            model, "elbo", params, shaped(B, chunk, *frame), inputs(chunk), state=carried
        ),
        "context": rollout.filter_frames.lower(model, params, shaped(B, context, *frame), inputs(context), c.use_obs),
        "prediction, a chunk": rollout.imagine_frames.lower(model, params, inputs(chunk), carried),
    }
    return [memory_row(name, lowered.compile()) for name, lowered in programs.items()]


# ---------------------------------------------------------------------------------------------- other accelerators


H200 = """
    platform_name: "CUDA" runtime_version { major: 13 } dnn_version_info { major: 9 minor: 8 }
    device_description_str: "NVIDIA H200"
    gpu_device_info {
        cuda_compute_capability { major: 9 } core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
        threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
        block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
        registers_per_core_limit: 65536 registers_per_block_limit: 65536
        l2_cache_size: 62914560 memory_bandwidth: 4800000000000 device_memory_size: 150000000000
    }
"""
"""XLA's description of a GPU, for which it can compile without one."""

TARGETS: dict[str, tuple[str, dict[str, str]]] = {
    "H200": ("cuda", {"target_config": H200, "topology": "1x1x1"}),
    "TPU v5e": ("tpu", {"topology_name": "v5e:2x2"}),
}
"""Accelerators: name -> backend, arguments of `topologies.get_topology_desc`."""


def bench_kernels(config: Config) -> list[Row]:
    """Compile a training step for accelerators that this machine may not have; report memory, and kernels on a GPU."""
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    rows = []
    for target, (backend, description) in TARGETS.items():
        try:
            device = topologies.get_topology_desc(platform=backend, **description).devices[0]
        except (NotImplementedError, RuntimeError) as error:
            print(f"{target} is left out: JAX's compiler for {backend} isn't installed ({error})")
            continue
        forms = {"training step": scan.scan}
        if backend == "cuda":
            forms = {"with JAX's scan": plain_scan} | forms
        for name, form in forms.items():
            with (
                mock.patch.object(jax, "default_backend", lambda backend=backend: backend),
                mock.patch.object(jax, "pmap", functools.partial(jax.pmap, devices=[device])),
                mock.patch.object(scan, "scan", form),
            ):
                program = lower_step(config, 1, config.batch_size).compile()
            if backend == "cuda":
                outside, loops = kernels(program.as_text())
                total = outside + sum(iterations * count for iterations, count in loops)
                rows.append(row(f"{target}, {name}: kernels", "per step", total, in_loops=total - outside))
            rows.append(memory_row(f"{target}, {name}: memory", program))
    if not rows:
        raise ConfigError("kernels: no accelerator's compiler is installed; pip install jax[cuda13] or jax[tpu]")
    return rows


def kernels(program: str) -> tuple[int, list[tuple[int, int]]]:
    """Count the kernels that a compiled GPU program launches.

    Args:
        program: the text of its HLO.

    Returns:
        The number of kernels outside loops; iterations, and kernels per iteration, of each loop.
    """
    computations: dict[str, list[str]] = {}
    for line in program.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            name = "ENTRY" if line.startswith("ENTRY") else line.split()[0].lstrip("%")
            computations[name] = []
        elif found := re.search(r" = (?:\(.*?\)|\S+) ([\w-]+)\(", line):
            computations[name].append(found[1] if found[1] != "while" else line)

    def launched(operations: list[str]) -> int:
        free = "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "fusion-done", "partition-id"
        return sum(operation not in free and " while(" not in operation for operation in operations)

    loop = re.compile(r' while\(.*body=%?([\w.-]+).*known_trip_count":{"n":"(\d+)"')
    loops = [found for operation in computations["ENTRY"] if (found := loop.search(operation))]
    return launched(computations["ENTRY"]), [
        (int(iterations), launched(computations[body])) for body, iterations in map(re.Match.groups, loops)
    ]


# ---------------------------------------------------------------------------------------------- whole programs


def bench_train(config: Config) -> list[Row]:
    """Time a whole training with data, validation, videos and checkpoints, and bare training steps.

    The training is timed from its first log to its second one, since programs compile before the first one.
    """
    every = config.save_scalars_every
    c = dataclasses.replace(
        config, seed=0, wandb="disabled", max_steps=2 * every, save_gifs_every=every, save_model_every=every
    )
    times: list[float] = []
    update = train.Progress.update

    def timed_update(progress: Any, loss: Any) -> None:
        times.append(time.perf_counter())
        if len(times) == every + 1:
            jax.block_until_ready(loss)
            times[-1] = time.perf_counter()
        update(progress, loss)

    step = Bench(c).stepper()
    bare = in_turn({"bare step": step}, 100)["bare step"]  # half before, half after: machines change their pace
    with tempfile.TemporaryDirectory() as logdir, mock.patch.object(train.Progress, "update", timed_update):
        state = train.train(dataclasses.replace(c, logdir=logdir))
        jax.block_until_ready(state)
        whole = (time.perf_counter() - times[every]) / (every - 1)
    bare += in_turn({"bare step": step}, 100)["bare step"]
    return [
        row("whole program", "ms per step", whole * 1e3, frames_per_s=c.batch_size * c.seq_len / whole),
        timed("bare step", bare),
        row("whole program's throughput", "of the bare step's", statistics.median(bare) / whole),
    ]


# ---------------------------------------------------------------------------------------------- data


def bench_data(config: Config) -> list[Row]:
    """Time the decoding of mp4 files, and the loading of batches of 50 windows of 100 colour frames (61 MB each)."""
    with tempfile.TemporaryDirectory() as folder:
        videos = Path(folder) / "train"
        videos.mkdir()
        content = encode(np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8), frames=500)
        count = 120
        for i in range(count):
            (videos / f"{i:03}.mp4").write_bytes(content)
        (Path(folder) / "test").symlink_to(videos)
        c = dataclasses.replace(
            config,
            dataset="videos",
            channels=3,
            datadir=folder,
            batch_size=50,
            seq_len=100,
            num_epochs=100_000,
            max_steps=None,
            seed=0,
            eval_seq_len=100,
        )
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
        warm = batches_per_second("frames in colour", batches)
        rows += [warm, row("the same, per core", "MB per core-second", warm["value"] * size / 1e6 / warm["cores"])]
        own = memory_besides_page_cache()
        rows.append(row("host memory besides the page cache", "MB", own))
    c = dataclasses.replace(c, dataset="digits", channels=1, datadir="")
    digits: Any = data.windows(c, "train")
    for name, source in ("digits, drawn", digits), ("digits, to be drawn by accelerators", digits.sprites()):
        rows.append(batches_per_second(name, data.training_batches(c, source, 0, 50)))
    return rows


def batches_per_second(name: str, batches: Iterator[data.Batch]) -> Row:
    """Time batches of an iterator, after its first one."""
    next(batches)
    rates, cores = [], []
    for _ in range(5):
        begin, cpu = time.perf_counter(), time.process_time()
        for _ in range(60):
            next(batches)
        wall = time.perf_counter() - begin
        rates.append(60 / wall)
        cores.append((time.process_time() - cpu) / wall)
    rate, used = statistics.median(rates), statistics.median(cores)
    return row(f"batches of {name}", "batches/s", rate, cores=used, spread=max(rates) - min(rates))


def encode(noise: np.ndarray, frames: int) -> bytes:
    """Return an mp4 of slowly changing noise."""
    import av

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
    """Return the megabytes of anonymous memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1000
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


# ---------------------------------------------------------------------------------------------- the command


BENCHMARKS = {
    "step": bench_step,
    "tricks": bench_tricks,
    "parts": bench_parts,
    "rollout": bench_rollout,
    "metrics": bench_metrics,
    "memory": bench_memory,
    "kernels": bench_kernels,
    "train": bench_train,
    "data": bench_data,
}


def main() -> None:
    with exit_codes():
        name, *argv = sys.argv[1:] or ["nothing"]
        configuration.choose("command line", name, [*BENCHMARKS, *accelerator.COMMANDS])
        if name in accelerator.COMMANDS:
            accelerator.COMMANDS[name](argv)
            return
        special, flags = configuration.parse_flags(
            argv,
            f"python -m benchmarks {name}",
            str(BENCHMARKS[name].__doc__),
            config=configuration.Flag("FILE", "YAML file"),
            json=configuration.Flag("FILE", "also write the results here"),
        )
        rows = BENCHMARKS[name](configuration.merged(special.get("config"), flags))
    results = {"benchmark": name, **machine(), "config": special.get("config"), **flags}
    print("\n" + ", ".join(f"{key} {value}" for key, value in results.items() if value is not None) + "\n")
    for entry in rows:
        more = ", ".join(f"{key} {value:.3g}" for key, value in entry.items() if key not in ("what", "value", "unit"))
        print(f"{entry['what']:<55} {entry['value']:12.4g} {entry['unit']:<24} {more}")
    if "json" in special:
        with exit_codes():
            Path(special["json"]).write_text(json.dumps(results | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()

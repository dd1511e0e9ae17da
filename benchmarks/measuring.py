"""Tools of all benchmarks: times and rows, the arithmetic of a training step, and steps that can be timed."""

import contextlib
import dataclasses
import functools
import itertools
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import cwvae
import data
from benchmarks import textbook
from config import FRAME_SIZE, Config
from cwvae import CWVAE
from sequences.noise import draw, sequence_keys, ticks
from system.devices import Devices
from training.step import make_optimizer, make_state, make_train_step

Row = dict[str, Any]
"""A row of results: "what", "value", "unit", and more numbers by name."""

# ---------------------------------------------------------------------------------------------- times


def seconds(run: Callable[[], Any]) -> float:
    """Return the time of a call until its results are ready."""
    begin = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - begin


def in_turn(contenders: Mapping[str, Callable[[], Any]], repeats: int = 5) -> dict[str, list[float]]:
    """Return the seconds of `repeats` calls of each contender, by name.

    The contenders take turns. Each is called once more at first, to compile it.
    """
    for run in contenders.values():
        seconds(run)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            times[name].append(seconds(run))
    return times


def row(what: str, unit: str, value: float, **more: float) -> Row:
    return {"what": what, "value": value, "unit": unit, **more}


def timed(what: str, times: list[float], **more: float) -> Row:
    """Return a row with the median of times in seconds, as milliseconds."""
    return row(what, "ms", statistics.median(times) * 1e3, spread=(max(times) - min(times)) * 1e3, **more)


def compare_times(times: dict[str, list[float]], **amounts: float) -> list[Row]:
    """Return rows with the times of two contenders, and with the speed-up of the second one.

    Each amount, divided by a contender's seconds, is a number of its row.
    """
    medians = {name: statistics.median(values) for name, values in times.items()}
    first, second = medians.values()
    return [
        *(
            timed(name, times[name], **{key: amount / s for key, amount in amounts.items()})
            for name, s in medians.items()
        ),
        row("speed-up", "times", first / second),
    ]


# ---------------------------------------------------------------------------------------------- lower bound


def multiply_adds(config: Config) -> dict[str, float]:
    """Return the multiply-adds of the paper's model per frame, in the forward pass, by part of the model."""
    c = config
    base, feature_size = c.filters * c.channels_mult, 2 * 2 * 8 * c.filters * c.channels_mult
    S, D, E, width = c.cell_stoch_size, c.cell_deter_size, c.cell_embed_size, c.enc_dense_embed_size
    encoder, channels = 0.0, c.channels
    for extent, outputs in (31, base), (14, 2 * base), (6, 4 * base), (2, 8 * base):
        encoder += extent**2 * 16 * channels * outputs
        channels = outputs
    sizes = [feature_size, *[width] * (c.enc_dense_layers - 1), feature_size][: c.enc_dense_layers + 1]
    tower = (c.levels - 1) * sum(a * b for a, b in itertools.pairwise(sizes))
    channels = 1024 * c.channels_mult
    decoder = float((S + D) * channels)
    for extent, size, outputs in (1, 5, 4 * base), (5, 5, 2 * base), (13, 6, base), (30, 6, c.channels):
        decoder += (extent * size) ** 2 * channels * outputs
        channels = outputs
    cell = (S + S + D) * E + 3 * D * (E + D) + D * E + 2 * E * S + (D + feature_size) * E + E * E + 2 * E * S
    cells = cell * sum(c.tmp_abs_factor**-level for level in range(c.levels))
    return {"encoder": encoder, "tower": float(tower), "decoder": decoder, "cells": cells}


def training_flop(config: Config) -> float:
    """Return the floating-point operations of a training step: two per multiply-add, forward once, backward twice."""
    return 6 * sum(multiply_adds(config).values()) * config.batch_size * config.seq_len


def floor(config: Config) -> tuple[float, list[Row]]:
    """Return a lower bound in seconds for a training step on this machine, and rows with its two summands.

    The summands are the step's arithmetic at the speed of large matmuls, and its ticks, each a matmul that depends on
    the tick before.
    """
    dtype = jnp.dtype(config.dtype)
    size = 1024 if jax.default_backend() == "cpu" else 8192
    matrix = jnp.ones((size, size), dtype)
    multiply = jax.jit(lambda a: a @ a)
    rate = 2 * size**3 / statistics.median(in_turn({"": lambda: multiply(matrix)}, 10)[""])

    length = 1000
    kernel = jnp.ones((config.cell_deter_size,) * 2, dtype)
    chain = jax.jit(lambda x: jax.lax.scan(lambda x, _: (jnp.tanh(x @ kernel), None), x, None, length)[0])
    state = jnp.ones((1, config.cell_deter_size), dtype)
    tick = statistics.median(in_turn({"": lambda: chain(state)}, 10)[""]) / length

    count = sum(ticks(config, config.seq_len))
    arithmetic, sequence = training_flop(config) / rate, 2 * count * tick
    return arithmetic + sequence, [
        row("floor: arithmetic", "ms", arithmetic * 1e3, TFLOP=training_flop(config) / 1e12, TFLOP_per_s=rate / 1e12),
        row("floor: dependent ticks, both ways", "ms", sequence * 1e3, ticks=count, us_per_tick=tick * 1e6),
    ]


# ---------------------------------------------------------------------------------------------- training step


class Bench:
    """A model with a batch of random videos for training."""

    def __init__(self, config: Config):
        c = self.config = dataclasses.replace(config, seed=0)
        self.model, self.devices = CWVAE(c), Devices()
        self.host = make_state(self.model)
        shape = (self.devices.rows(c.batch_size), c.seq_len, FRAME_SIZE, FRAME_SIZE, c.channels)
        self.video = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        weight = (np.arange(shape[0]) < c.batch_size).astype(np.float32)
        self.batch = next(self.devices.spread(iter([data.Batch(self.video, weight)])))

    def stepper(self) -> "Stepper":
        """Return the training step, on all devices."""
        step = make_train_step(self.model)
        return Stepper(step.func, self.devices.replicate(self.host), self.batch, *step.args)

    def textbook_stepper(self, **forms: Any) -> "Stepper":
        """Return the training step in the textbook form, on one device; `forms` are keywords of `textbook.elbo`."""
        c, optimizer = self.config, make_optimizer(self.model)

        @functools.partial(jax.jit, donate_argnums=0)
        def step(state: Any, video: Any) -> Any:
            number, params, opt_state = state
            keys = sequence_keys(jax.random.fold_in(jax.random.key(0), number), 0, c.batch_size)
            noise = [x.noise for x in draw(c, keys, c.seq_len)]

            def loss(params: Any) -> Any:
                found = textbook.elbo(c, params, video, noise, **forms)
                terms = cwvae.Terms(**found, kl_prior=found["kl"], kl_posterior=found["kl"])
                return cwvae.objective(c, terms, jnp.ones(c.batch_size), c.seq_len)

            gradients, metrics = jax.grad(loss, has_aux=True)(params)
            updates, opt_state = optimizer.update(gradients, opt_state, params)
            return (number + 1, jax.tree.map(jnp.add, params, updates), opt_state), metrics

        state = jax.tree.map(jnp.array, (self.host.step, self.host.params, self.host.opt_state))
        return Stepper(step, state, jnp.asarray(self.video[: c.batch_size]))


class Stepper:
    """A training with the function `step`, (*constants, state, batch) -> (state, metrics); each call takes a step."""

    def __init__(self, step: Any, state: Any, batch: Any, *constants: Any):
        self.step, self.state, self.batch, self.constants = step, state, batch, constants

    def __call__(self) -> Any:
        self.state, metrics = self.step(*self.constants, self.state, self.batch)
        return metrics

    def lower(self) -> Any:
        """Return the lowered step."""
        return self.step.lower(*self.constants, self.state, self.batch)


def plain_scan(tick: Any, params: Any, state: Any, inputs: Any) -> Any:
    """Compute what `fast.scan.scan` does in the obvious way, with JAX's own gradient."""

    def body(state: Any, inputs: Any) -> Any:
        state, outputs = tick(params, state, inputs)
        return state, (state, outputs)

    return jax.lax.scan(body, state, inputs)[1]


# ---------------------------------------------------------------------------------------------- memory


def memory_row(what: str, program: Any) -> Row:
    """Return a row with the device memory of a compiled program."""
    memory = program.memory_analysis()
    arguments, outputs = memory.argument_size_in_bytes, memory.output_size_in_bytes - memory.alias_size_in_bytes
    total = arguments + outputs + memory.temp_size_in_bytes
    return row(what, "MB", total / 1e6, arguments=arguments / 1e6, temporary=memory.temp_size_in_bytes / 1e6)


# ---------------------------------------------------------------------------------------------- the machine


def machine() -> Row:
    """Return what the results depend on: device, versions and commit."""
    return {
        "device": f"{jax.device_count()} {jax.devices()[0].device_kind}",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "commit": output("git", "rev-parse", "--short", "HEAD"),
    }


def output(*command: str) -> str | None:
    """Return the output of a program; None if it isn't installed or fails."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None

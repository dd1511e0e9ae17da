"""Where randomness comes from: one key per purpose, sequence and tick.

Noise belongs to a sequence, whatever batch, chunk or device it is computed in, so that nothing of it needs to be saved
and results don't depend on how the work is divided.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from config import Config

PURPOSES = ("params", "train", "validation", "videos", "evaluation")


def key_for(purpose: str, config: Config) -> Array:
    """Return the PRNG key of one of PURPOSES."""
    keys = jax.random.split(jax.random.key(config.seed or 0), len(PURPOSES))
    return keys[PURPOSES.index(purpose)]


def sequence_keys(key: Array, first: Array | int, count: int) -> Array:
    """Return the keys of `count` sequences from number `first` on, [count]."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(first + jnp.arange(count))


def example_keys(config: Config, first: int, count: int, sample: int) -> Array:
    """Return the keys of one sample for each of `count` test sequences from number `first` on, [count]."""
    return fold_in(sequence_keys(key_for("evaluation", config), first, count), sample)


def fold_in(keys: Array, number: Array | int) -> Array:
    """Return keys [B] that follow from others and a number."""
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def ticks(config: Config, frames: int) -> list[int]:
    """Return the number of ticks of each level, T_l = ceil(frames / k**l) (Equation 1)."""
    return [-(-frames // config.tmp_abs_factor**level) for level in range(config.levels)]


class Inputs(NamedTuple):
    """What one level's ticks take besides the frames and the level above."""

    noise: Array  # [B, T_l, S], standard normal
    keep: Array | None = None  # [T_l], multiplies the previous stoch; only with `cell_reset_state`
    actions: Array | None = None  # [B, T, A]; only at level 0 of a model with actions


def draw(
    config: Config, keys: Array, frames: int, context: int = 0, actions: Array | None = None
) -> tuple[Inputs, ...]:
    """Draw the inputs of each level over `frames` frames.

    Args:
        config: for sizes, and for `cell_reset_state`.
        keys: one PRNG key per sequence [B].
        frames: T.
        context: the first so many of them are observed and the others imagined; both begin a reset pattern.
        actions: [B, T, A], for a model with actions.
    """
    sizes = ticks(config, frames)
    normal = jax.vmap(lambda key: jax.random.normal(key, (sum(sizes), config.cell_stoch_size)))(keys)
    starts = [sum(sizes[: level + 1]) for level in range(config.levels - 1)]
    noise = jnp.split(normal, starts, axis=1)
    observed = [context // config.tmp_abs_factor**level for level in range(config.levels)]
    imagined = [total - seen for total, seen in zip(sizes, observed, strict=True)]
    keep = [
        None if a is None or b is None else jnp.concatenate([a, b])
        for a, b in zip(keep_patterns(config, observed), keep_patterns(config, imagined), strict=True)
    ]
    return tuple(Inputs(noise[level], keep[level], actions if level == 0 else None) for level in range(config.levels))


def keep_patterns(config: Config, sizes: Sequence[int]) -> list[Array | None]:
    """Return the factors of the previous stoch for so many ticks of each level, None for ones.

    With `cell_reset_state`, as in the official code: 0, 1, 0, 1, ... over the ticks of level L-2; each level further
    down repeats the whole pattern of the level above k times, cut to its own ticks.
    """
    patterns: list[Array | None] = [None] * len(sizes)
    if config.cell_reset_state and config.levels > 1:
        pattern = jnp.arange(sizes[-2]) % 2.0
        for level in range(config.levels - 2, -1, -1):
            patterns[level] = pattern = pattern[: sizes[level]]
            pattern = jnp.tile(pattern, config.tmp_abs_factor)
    return patterns


def time_slice(config: Config, inputs: Sequence[Inputs], start: int, stop: int) -> tuple[Inputs, ...]:
    """Cut out the ticks from frame `start` (a multiple of k**(L-1)) to frame `stop`; zeros behind an array's end."""
    sliced = []
    for level, (noise, keep, actions) in enumerate(inputs):
        first = start // config.tmp_abs_factor**level
        count = -(-stop // config.tmp_abs_factor**level) - first
        sliced.append(
            Inputs(
                cut(noise, first, count, 1),
                None if keep is None else cut(keep, first, count, 0),
                None if actions is None else cut(actions, first, count, 1),
            )
        )
    return tuple(sliced)


@partial(jax.jit, static_argnames=("count", "axis"))
def cut(x: Array, first: int, count: int, axis: int) -> Array:
    """Return x[first : first + count] along an axis, with zeros where x has ended. Compiled once for all `first`."""
    padded = jnp.pad(x, [(0, count if i == axis else 0) for i in range(x.ndim)])
    return jax.lax.dynamic_slice_in_dim(padded, first, count, axis)

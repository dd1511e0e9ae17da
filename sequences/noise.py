"""The model's randomness: a PRNG key for each purpose and sequence, and the noise of each tick.

The noise of a sequence is the same in any batch or chunk and on any device. So results don't depend on how the work is
divided, and no noise needs to be saved.
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
    """Return the keys of `count` sequences, from number `first` on, [count]."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(first + jnp.arange(count))


def example_keys(config: Config, first: int, count: int, sample: int) -> Array:
    """Return the keys of sample number `sample` of `count` test sequences, from number `first` on, [count]."""
    return fold_in(sequence_keys(key_for("evaluation", config), first, count), sample)


def fold_in(keys: Array, number: Array | int) -> Array:
    """Fold a number into each of the keys [B]."""
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def ticks(config: Config, frames: int) -> list[int]:
    """Return the number of ticks of each level, T_l = ceil(frames / k**l) (Equation 1)."""
    return [-(-frames // config.tmp_abs_factor**level) for level in range(config.levels)]


class Inputs(NamedTuple):
    """The inputs of one level's ticks, except its features and the level above."""

    noise: Array  # [B, T_l, S], standard normal
    keep: Array | None = None  # [T_l], 0 or 1, multiplies the previous stoch; only with `cell_reset_state`
    actions: Array | None = None  # [B, T, A], only at level 0 of a model with actions


def draw(
    config: Config, keys: Array, frames: int, context: int = 0, actions: Array | None = None
) -> tuple[Inputs, ...]:
    """Return the inputs of each level for T frames.

    Args:
        config: of the model.
        keys: one PRNG key per sequence [B].
        frames: T.
        context: number of frames, at the beginning, that are observed. The others are imagined. With
            `cell_reset_state`, the pattern of resets begins again with them.
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
    """Return `Inputs.keep` of each level for these numbers of ticks; None: nothing is reset.

    With `cell_reset_state`, as in the official code: level L-2 has 0, 1, 0, 1, ... Each level below repeats the whole
    pattern of the level above k times, cut to its number of ticks.
    """
    patterns: list[Array | None] = [None] * len(sizes)
    if config.cell_reset_state and config.levels > 1:
        pattern = jnp.arange(sizes[-2]) % 2.0
        for level in range(config.levels - 2, -1, -1):
            patterns[level] = pattern = pattern[: sizes[level]]
            pattern = jnp.tile(pattern, config.tmp_abs_factor)
    return patterns


def time_slice(config: Config, inputs: Sequence[Inputs], start: int, stop: int) -> tuple[Inputs, ...]:
    """Return the inputs of frames `start` to `stop` (exclusive). Arrays that end earlier are padded with zeros.

    `start` is a multiple of k**(L-1).
    """
    sliced = []
    for level, (noise, keep, actions) in enumerate(inputs):
        first = start // config.tmp_abs_factor**level
        count = -(-stop // config.tmp_abs_factor**level) - first
        sliced.append(
            Inputs(
                padded_slice(noise, first, count, 1),
                None if keep is None else padded_slice(keep, first, count, 0),
                None if actions is None else padded_slice(actions, first, count, 1),
            )
        )
    return tuple(sliced)


@partial(jax.jit, static_argnames=("count", "axis"))
def padded_slice(x: Array, first: int, count: int, axis: int) -> Array:
    """Return x[first : first + count] along an axis, with zeros after the end of x. Compiled once for all `first`."""
    padded = jnp.pad(x, [(0, count if i == axis else 0) for i in range(x.ndim)])
    return jax.lax.dynamic_slice_in_dim(padded, first, count, axis)

"""Long sequences in chunks of time: evidence lower bound, filtering, reconstruction, open-loop prediction.

The chunks bound the memory on the devices. Noise is drawn for the whole sequence, so results don't depend on the
chunks. Videos are on the host; `place` copies a chunk to the devices.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from config import Config
from cwvae import LevelRollout
from sequences.interface import Model, Terms

Place = Callable[[Any], Any]


def chunk_size(config: Config) -> int:
    """Return the number of frames in a chunk: `seq_len`, rounded up to whole ticks of the top level."""
    return -(-config.seq_len // config.block) * config.block


def chunks(config: Config, frames: int, chunk: int | None, first: int = 0) -> Iterator[tuple[int, int]]:
    """Yield each chunk's first frame and the one after its last, for the frames from `first` to `frames`."""
    chunk = chunk or chunk_size(config)
    for start in range(first, frames, chunk):
        yield start, min(start + chunk, frames)


def elbo(
    model: Model,
    params: Any,
    video: Any,
    keys: Array,
    chunk: int | None = None,
    place: Place = jnp.asarray,
    actions: Any = None,
) -> Terms:
    """Return the terms of the evidence lower bound; arguments as in `observe`."""
    c, T = model.config, video.shape[1]
    inputs, state, total = model.draw(keys, T, actions=actions), None, None
    for start, stop in chunks(c, T, chunk):
        terms, state = apply(
            model, "elbo", params, place(video[:, start:stop]), model.time_slice(inputs, start, stop), state=state
        )
        total = terms if total is None else jax.tree.map(jnp.add, total, terms)
    assert total is not None
    return total


def observe(
    model: Model,
    params: Any,
    video: Any,
    keys: Array,
    use_obs: str | None = None,
    chunk: int | None = None,
    place: Place = jnp.asarray,
    actions: Any = None,
    seen: int | None = None,
) -> Iterator[tuple[LevelRollout, ...]]:
    """Infer the states of all frames of a video, chunk by chunk; or of its first frames, and imagine the others.

    Args:
        model: the model.
        params: its parameters.
        video: [B, T, H, W, C].
        keys: one PRNG key per sequence [B]. `open_loop` draws the same noise from them.
        use_obs: the levels that see the frames; see `CWVAE.observe`.
        chunk: number of frames in a chunk, a multiple of k**(L-1); None: `chunk_size`.
        place: copies arrays to the devices.
        actions: [B, T, A], for a model with actions.
        seen: number of frames, at the beginning, that are seen, a multiple of k**(L-1); None: all.

    Yields:
        Each level's rollout over the ticks of a chunk.
    """
    c, T = model.config, video.shape[1]
    inputs, state = model.draw(keys, T, context=seen or 0, actions=actions), None
    seen = T if seen is None else seen
    for start, stop in chunks(c, seen, chunk):
        rollouts, state = apply(
            model,
            "observe",
            params,
            place(video[:, start:stop]),
            model.time_slice(inputs, start, stop),
            state=state,
            use_obs=use_obs,
        )
        yield rollouts
    for start, stop in chunks(c, T, chunk, seen):
        rollouts, state = apply(model, "imagine", params, model.time_slice(inputs, start, stop), state)
        yield rollouts


def reconstruct(
    model: Model, params: Any, video: Any, keys: Array, place: Place = jnp.asarray, actions: Any = None
) -> Iterator[Array]:
    """Yield reconstructions of the frames after the context, in chunks of time: decoded from the posterior.

    The frames are those that `predict` predicts. The context has the same noise as in `predict`.
    """
    c, T, context = model.config, video.shape[1], model.config.open_loop_ctx
    inputs = model.draw(keys, T, actions=actions)
    _, state = filter_frames(model, params, place(video[:, :context]), model.time_slice(inputs, 0, context), None)
    for start, stop in chunks(c, T, None, context):
        seen = place(video[:, start:stop])
        frames, state = filter_frames(model, params, seen, model.time_slice(inputs, start, stop), None, state)
        yield frames


class OpenLoop(NamedTuple):
    """An open-loop prediction: frames [B, T, H, W, C], not clipped to [0, 1]."""

    reconstruction: Array  # of the context frames
    prediction: Iterator[Array]  # of the frames after the context, in chunks of time


def open_loop(
    model: Model,
    params: Any,
    context: Any,
    keys: Array,
    frames: int,
    use_obs: str | None = None,
    chunk: int | None = None,
    place: Place = jnp.asarray,
    actions: Any = None,
) -> OpenLoop:
    """Predict what follows context frames: filter them, then follow the prior at all levels (Section 3).

    Args:
        model: the model.
        params: its parameters.
        context: [B, T, H, W, C], T a multiple of k**(L-1). No other frames of the video are used.
        keys: one PRNG key per sequence [B].
        frames: number of frames to predict after the context.
        use_obs: the levels that see the context; see `CWVAE.observe`.
        chunk: number of frames predicted at a time, a multiple of k**(L-1); None: `chunk_size`.
        place: copies the context to the devices.
        actions: [B, T + frames, A], for a model with actions: those of the context and of the predicted frames.

    Raises:
        ValueError: the context isn't a multiple of k**(L-1) frames.
    """
    T = context.shape[1]
    inputs = model.draw(keys, T + frames, context=T, actions=actions)
    reconstruction, state = filter_frames(model, params, place(context), model.time_slice(inputs, 0, T), use_obs)
    return OpenLoop(reconstruction, imagine(model, params, inputs, state, T, frames, chunk))


def imagine(
    model: Model, params: Any, inputs: Any, state: Any, start: int, frames: int, chunk: int | None
) -> Iterator[Array]:
    """Yield `frames` predicted frames from frame `start` on, in chunks.

    All chunks are computed at the same size, so that the model is compiled only once. The last chunk is then cut to the
    frames that are missing.
    """
    size = chunk or chunk_size(model.config)
    for first in range(start, start + frames, size):
        predicted, state = imagine_frames(model, params, model.time_slice(inputs, first, first + size), state)
        yield predicted[:, : start + frames - first]


def predict(
    model: Model, params: Any, video: Any, keys: Array, place: Place = jnp.asarray, actions: Any = None
) -> OpenLoop:
    """Predict the frames of a video after its context (`open_loop_ctx`, `use_obs`): one sample; see `open_loop`."""
    c, T = model.config, model.config.open_loop_ctx
    frames = video.shape[1] - T
    return open_loop(model, params, video[:, :T], keys, frames, c.use_obs, place=place, actions=actions)


@partial(jax.jit, static_argnums=(0, 1), static_argnames="use_obs")
def apply(model: Model, method: str, params: Any, *arguments: Any, **keywords: Any) -> Any:
    """Return the result of a method of the model, compiled."""
    return model.apply(params, *arguments, method=method, **keywords)


@partial(jax.jit, static_argnums=(0, 4))
def filter_frames(model: Model, params: Any, video: Array, inputs: Any, use_obs: str | None, state: Any = None) -> Any:
    """Return the reconstruction of a chunk and the state after it. Returning rollouts would take time to compile."""
    rollouts, state = model.apply(params, video, inputs, state, use_obs, method="observe")
    return model.apply(params, rollouts, method="decode"), state


@partial(jax.jit, static_argnums=0)
def imagine_frames(model: Model, params: Any, inputs: Any, state: Any) -> Any:
    """Return the frames that follow a state, as many as the inputs are for, and the state after them."""
    rollouts, state = model.apply(params, inputs, state, method="imagine")
    return model.apply(params, rollouts, method="decode"), state

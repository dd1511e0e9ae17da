"""A trained Clockwork VAE in an agent's loop: observe one frame at a time, imagine many futures at once.

The posterior of an upper level sees all frames of a tick, so it is known only when the tick ends. Until then, the level
follows its prior. When the tick ends, the posterior replaces the prior, and the levels below are inferred again for
this tick. Level 0 has a tick for each frame. When a tick of the top level ends, the belief equals what `CWVAE.observe`
infers from all frames so far.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from config import FRAME_SIZE, ConfigError
from cwvae import CWVAE, Encoder, LevelState, floats
from sequences.interface import Model
from sequences.noise import Inputs, draw, fold_in, sequence_keys


@flax.struct.dataclass
class Belief:
    """A belief state, as in POMDPs: what the model knows of B sequences after the frames and actions so far.

    N = k**(L-1) is the number of frames in a tick of the top level.
    """

    frame: Array  # int32 [], number of frames so far
    levels: tuple[LevelState, ...]  # of each level after these frames, [B, ...]
    tick_starts: tuple[tuple[LevelState, ...], ...]  # for each level l > 0: of levels 0 to l before its current tick
    features: tuple[Array, ...]  # of each level, for each frame in the current tick of the top level, [B, N, F]
    actions: Array | None  # those that led to these frames, [B, N, A]
    keys: Array  # PRNG keys [B]


class WorldModel:
    """A model and its parameters, for use step by step. `observe` is compiled once, for any number of frames."""

    def __init__(self, model: Model, params: Any):
        """Take a model and its parameters, as `loading.load` returns them.

        Raises:
            ConfigError: the model is no Clockwork VAE, or has `cell_reset_state`.
        """
        if not isinstance(model, CWVAE):
            raise ConfigError(f"model: only cwvae can be used step by step, got {model.config.model}")
        if model.config.cell_reset_state:
            raise ConfigError("cell_reset_state: can't be used step by step, got True; use CWVAE.observe")
        self.model, self.params = model, params

    def start(self, batch: int = 1, seed: int = 0) -> Belief:
        """Return the belief about `batch` sequences before their first frames."""
        c, levels = self.model.config, self.model.initial_state(batch).levels
        size = Encoder(c).feature_size
        return Belief(
            frame=jnp.int32(0),
            levels=levels,
            tick_starts=tuple(levels[: level + 1] for level in range(1, c.levels)),
            features=(jnp.zeros((batch, c.block, size)),) * c.levels,
            actions=jnp.zeros((batch, c.block, c.action_size)) if c.action_size else None,
            keys=sequence_keys(jax.random.key(seed), 0, batch),
        )

    def observe(self, belief: Belief, frame: Any, action: Any = None) -> Belief:
        """Return the belief after one more frame.

        Args:
            belief: of `start` or an earlier call.
            frame: [B, H, W, C], uint8 or floats in [0, 1].
            action: [B, A], the one that led to the frame; zeros for the first frame. None for models without actions.

        Raises:
            ValueError: frame or action has a wrong shape.
        """
        B = len(belief.keys)
        shape, wanted = np.shape(frame), (B, FRAME_SIZE, FRAME_SIZE, self.model.config.channels)
        if shape != wanted:
            raise ValueError(f"frame: must be {list(wanted)}, got {shape}")
        return observe(self.model, self.params, belief, jnp.asarray(frame), self._check_actions(action, B))

    def imagine(self, belief: Belief, actions: Any = None, frames: int = 0) -> LevelState:
        """Imagine futures: follow the prior from a belief.

        Args:
            belief: about B sequences; or about one sequence, from which all B futures start.
            actions: [B, T, A], the actions that lead to the T frames.
            frames: T, for models without actions.

        Returns:
            Sampled states of level 0, [B, T, ...].

        Raises:
            ValueError: the actions have a wrong shape, or T is 0.
        """
        B = len(belief.keys)
        actions = self._check_actions(actions, "B" if B == 1 else B, "T")
        frames = frames if actions is None else actions.shape[1]
        if frames < 1:
            raise ValueError(f"frames: must be at least 1, got {frames}")
        return imagine(self.model, self.params, belief, actions, frames)

    def decode(self, state: LevelState) -> Array:
        """Return the frames [..., H, W, C] for states of level 0 [..., S] and [..., D]: floats, not clipped."""
        return decode(self.model, self.params, state)

    def _check_actions(self, actions: Any, *axes: int | str) -> Array | None:
        """Return actions [*axes, A] as floats, None for a model without actions. A letter matches any size.

        Raises:
            ValueError: they have another shape, or are missing, or the model takes none.
        """
        size, shape = self.model.config.action_size or 0, None if actions is None else np.shape(actions)
        wanted = (*axes, size) if size else None
        if shape is None or wanted is None:
            fits = shape == wanted
        else:
            fits = len(shape) == len(wanted) and all(
                isinstance(axis, str) or axis == n for axis, n in zip(wanted, shape, strict=True)
            )
        if not fits:
            text = f"must be [{', '.join(map(str, wanted))}]" if wanted else "this model takes none"
            raise ValueError(f"actions: {text}, got {shape}")
        return None if actions is None else jnp.asarray(actions, jnp.float32)


def prior_tick(cell: Any, state: LevelState, context: Array, noise: Array) -> LevelState:
    """Return a level's state [B, ...] after a tick that follows the prior."""
    unbound, params = cell.clone(parent=None), {"params": cell.variables["params"]}
    next_state: LevelState = unbound.apply(params, state, context, None, noise, None, method="tick")[0]
    return next_state


def context_of(level: int, levels: tuple[LevelState, ...]) -> Array:
    """Return the context of a level [B, S + D], without actions: the output of the level above, or zeros."""
    return levels[level + 1].output if level + 1 < len(levels) else jnp.zeros_like(levels[level].output)


def begin_ticks(model: CWVAE, levels: tuple[LevelState, ...], time: Array, noise: Sequence[Array]) -> list[LevelState]:
    """Return the states after the levels above 0 that begin a tick with frame number `time` followed their priors.

    The other levels keep their states. `noise` has each level's, [B, S].
    """
    updated = list(levels)
    for level in reversed(range(1, len(levels))):
        updated[level] = jax.lax.cond(
            time % model.config.tmp_abs_factor**level == 0,
            partial(prior_tick, model.cells[level], context=context_of(level, tuple(updated)), noise=noise[level]),
            lambda state: state,
            levels[level],
        )
    return updated


@partial(jax.jit, static_argnums=0)
def observe(model: CWVAE, params: Any, belief: Belief, frame: Array, action: Array | None) -> Belief:
    """See `WorldModel.observe`. The highest level whose tick ends and the levels below infer this tick again."""
    c, N, k = model.config, model.config.block, model.config.tmp_abs_factor
    B, position = len(frame), belief.frame % N  # within the tick of the top level

    def store(buffer: Array, x: Any) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(buffer, x[:, None], position, 1)

    def time_slice(x: Array, first: Array, count: int) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, first, count, 1)

    def infer(model: CWVAE) -> tuple[tuple[LevelState, ...], tuple[Array, ...], Array | None]:
        # A tick's features are a sum over its frames, so those of single frames are stored and summed later.
        features = tuple(
            store(buffer, frame_features[:, 0])
            for buffer, frame_features in zip(belief.features, model.encoder(floats(frame[:, None])), strict=True)
        )
        actions = None if belief.actions is None else store(belief.actions, action)
        noise = [x.noise for x in draw(c, fold_in(belief.keys, belief.frame // N), N)]
        levels = begin_ticks(
            model, belief.levels, belief.frame, [x[:, position // k**level] for level, x in enumerate(noise)]
        )
        cells = [(cell.clone(parent=None), {"params": cell.variables["params"]}) for cell in model.cells]

        def infer_tick(top: int) -> list[LevelState]:
            """Infer the tick of level `top` that ends with this frame, and the ticks below it."""
            first, states = position + 1 - k**top, (belief.levels[:1], *belief.tick_starts)[top]
            inferred, context = list(levels), context_of(top, tuple(levels))[:, None]
            for level in reversed(range(top + 1)):
                frames_per_tick, ticks = k**level, k ** (top - level)
                summed = time_slice(features[level], first, k**top).reshape(B, ticks, frames_per_tick, -1).sum(2)
                if level == 0:
                    led = None if actions is None else time_slice(actions, first, k**top)
                    context = model.with_actions(context, led)
                inputs = Inputs(time_slice(noise[level], first // frames_per_tick, ticks))
                cell, params = cells[level]
                result: Any = cell.apply(params, states[level], context, summed, inputs)
                rollout, inferred[level] = result
                context = jnp.repeat(rollout.output, k, axis=1)
            return inferred

        highest_ended = sum(((position + 1) % k**level == 0).astype(int) for level in range(1, c.levels))
        inferred = jax.lax.switch(highest_ended, [partial(infer_tick, level) for level in range(c.levels)])
        return tuple(inferred), features, actions

    result: Any = model.apply(params, method=infer)
    levels, features, actions = result
    tick_starts = tuple(
        jax.tree.map(partial(jnp.where, (position + 1) % k**level == 0), levels[: level + 1], before)
        for level, before in enumerate(belief.tick_starts, 1)
    )
    return Belief(belief.frame + 1, levels, tick_starts, features, actions, belief.keys)


@partial(jax.jit, static_argnums=(0, 4))
def imagine(model: CWVAE, params: Any, belief: Belief, actions: Array | None, frames: int) -> LevelState:
    """See `WorldModel.imagine`."""
    c, N, k = model.config, model.config.block, model.config.tmp_abs_factor
    B = len(belief.keys) if actions is None else len(actions)
    keys, levels = belief.keys, belief.levels
    if len(keys) != B:
        keys = sequence_keys(keys[0], 0, B)
        levels = jax.tree.map(lambda x: jnp.broadcast_to(x, (B, *x.shape[1:])), levels)
    first = belief.frame // N
    # The noise of each level, [ticks, B, S], for all ticks of the top level that the frames may be in. It is drawn at
    # once: drawing it tick by tick takes long to compile.
    top_ticks = first + jnp.arange(-(-frames // N) + 1)
    drawn = jax.vmap(lambda tick: draw(c, fold_in(keys, tick), N))(top_ticks)
    noise = [x.noise.swapaxes(1, 2).reshape(-1, B, c.cell_stoch_size) for x in drawn]

    def follow_prior(model: CWVAE) -> LevelState:
        def body(levels: tuple[LevelState, ...], inputs: Any) -> tuple[tuple[LevelState, ...], LevelState]:
            time, action = inputs
            tick_noise = [x[time // k**level - first * (N // k**level)] for level, x in enumerate(noise)]
            _, *upper = begin_ticks(model, levels, time, tick_noise)
            context = model.with_actions(context_of(0, (levels[0], *upper)), action)
            lowest = prior_tick(model.cells[0], levels[0], context, tick_noise[0])
            return (lowest, *upper), lowest

        times = belief.frame + jnp.arange(frames)
        _, states = jax.lax.scan(body, levels, (times, None if actions is None else actions.swapaxes(0, 1)))
        return jax.tree.map(lambda x: x.swapaxes(0, 1), states)

    states: Any = model.apply(params, method=follow_prior)
    return states


@partial(jax.jit, static_argnums=0)
def decode(model: CWVAE, params: Any, state: LevelState) -> Array:
    """See `WorldModel.decode`."""
    flat = LevelState(*(x.reshape(1, -1, x.shape[-1]) for x in state))
    frames: Any = model.apply(params, (flat,), method="decode")
    return frames.reshape(*state.stoch.shape[:-1], *frames.shape[2:])

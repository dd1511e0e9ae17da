"""A trained Clockwork VAE in an agent's loop: observe a frame at a time, imagine many futures at once.

Within a tick of an upper level its posterior isn't known yet, since it sees all frames of the tick. So a level follows
its posterior in the ticks that have ended and its prior in the one that is in progress; level 0 has seen every frame.
Whenever a tick of the top level ends, what is believed is what `CWVAE.observe` infers.
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
    """What a model believes after some frames of B sequences. N = k**(L-1): the frames of a tick of the top level."""

    frame: Array  # int32 [], frames so far
    levels: tuple[LevelState, ...]  # now, [B, ...]
    begin: tuple[tuple[LevelState, ...], ...]  # for each level above 0: itself and those below it, before its last tick
    features: tuple[Array, ...]  # of each frame in the last tick of the top level, for each level, [B, N, F]
    actions: Array | None  # those that led to these frames, [B, N, A]
    keys: Array  # PRNG keys [B]


class WorldModel:
    """A model and its parameters, step by step. What it computes is compiled once, however many frames there are."""

    def __init__(self, model: Model, params: Any):
        """Take what `loading.load` returns.

        Raises:
            ConfigError: the model is none of Clockwork VAE, or resets its states.
        """
        if not isinstance(model, CWVAE):
            raise ConfigError(f"model: step by step only cwvae can be used, got {model.config.model}")
        if model.config.cell_reset_state:
            raise ConfigError("cell_reset_state: step by step states aren't reset, got True; use CWVAE.observe")
        self.model, self.params = model, params

    def start(self, batch: int = 1, seed: int = 0) -> Belief:
        """Return what is believed of `batch` sequences before their first frames."""
        c, levels = self.model.config, self.model.initial_state(batch).levels
        size = Encoder(c).feature_size
        return Belief(
            frame=jnp.int32(0),
            levels=levels,
            begin=tuple(levels[: level + 1] for level in range(1, c.levels)),
            features=(jnp.zeros((batch, c.block, size)),) * c.levels,
            actions=jnp.zeros((batch, c.block, c.action_size)) if c.action_size else None,
            keys=sequence_keys(jax.random.key(seed), 0, batch),
        )

    def observe(self, belief: Belief, frame: Any, action: Any = None) -> Belief:
        """Return what is believed after a further frame.

        Args:
            belief: of `start` or an earlier call.
            frame: [B, H, W, C], uint8 or floats in [0, 1].
            action: [B, A], which led to the frame; zeros for the first one. None for models without actions.

        Raises:
            ValueError: a shape is another.
        """
        B = len(belief.keys)
        shape, wanted = np.shape(frame), (B, FRAME_SIZE, FRAME_SIZE, self.model.config.channels)
        if shape != wanted:
            raise ValueError(f"frame: must be {list(wanted)}, got {shape}")
        return observe(self.model, self.params, belief, jnp.asarray(frame), self._checked(action, B))

    def imagine(self, belief: Belief, actions: Any = None, frames: int = 0) -> LevelState:
        """Follow the prior from a belief.

        Args:
            belief: of as many sequences as there are to imagine, or of one, from which all start.
            actions: [B, T, A], those that are to lead to the T frames.
            frames: T, of models without actions.

        Returns:
            The states of level 0, [B, T, ...] each, a sample.

        Raises:
            ValueError: a shape is another, or there is nothing to imagine.
        """
        B = len(belief.keys)
        actions = self._checked(actions, "B" if B == 1 else B, "T")
        frames = frames if actions is None else actions.shape[1]
        if frames < 1:
            raise ValueError(f"frames: must be at least 1, got {frames}")
        return imagine(self.model, self.params, belief, actions, frames)

    def decode(self, state: LevelState) -> Array:
        """Return the frames [..., H, W, C] of states of level 0 [..., S] and [..., D]; floats, not clipped."""
        return decode(self.model, self.params, state)

    def _checked(self, actions: Any, *axes: int | str) -> Array | None:
        """Return actions [*axes, A] as floats, None for a model without; a letter stands for any number."""
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


def tick(cell: Any, state: LevelState, context: Array, noise: Array) -> LevelState:
    """Return a level's state [B, ...] after a tick by its prior."""
    unbound, params = cell.clone(parent=None), {"params": cell.variables["params"]}
    following: LevelState = unbound.apply(params, state, context, None, noise, None, method="tick")[0]
    return following


def above(levels: tuple[LevelState, ...], level: int) -> Array:
    """Return the context of a level [B, S + D], without actions."""
    return levels[level + 1].output if level + 1 < len(levels) else jnp.zeros_like(levels[level].output)


def begin_ticks(model: CWVAE, levels: tuple[LevelState, ...], time: Array, noise: Sequence[Array]) -> list[LevelState]:
    """Let those levels above 0 whose ticks begin with frame number `time` follow their priors; noise [B, S] each."""
    following = list(levels)
    for level in reversed(range(1, len(levels))):
        following[level] = jax.lax.cond(
            time % model.config.tmp_abs_factor**level == 0,
            partial(tick, model.cells[level], context=above(tuple(following), level), noise=noise[level]),
            lambda state: state,
            levels[level],
        )
    return following


@partial(jax.jit, static_argnums=0)
def observe(model: CWVAE, params: Any, belief: Belief, frame: Array, action: Array | None) -> Belief:
    """See `WorldModel.observe`. The highest level whose tick ends and those below it infer this tick again."""
    c, N, k = model.config, model.config.block, model.config.tmp_abs_factor
    B, place = len(frame), belief.frame % N

    def put(buffer: Array, now: Any) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(buffer, now[:, None], place, 1)

    def cut(x: Array, first: Array, count: int) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, first, count, 1)

    def infer(model: CWVAE) -> tuple[tuple[LevelState, ...], tuple[Array, ...], Array | None]:
        # Features are sums over the frames of a tick, so those of single frames can be summed later.
        features = tuple(
            put(buffer, of_frame[:, 0])
            for buffer, of_frame in zip(belief.features, model.encoder(floats(frame[:, None])), strict=True)
        )
        actions = None if belief.actions is None else put(belief.actions, action)
        noise = [x.noise for x in draw(c, fold_in(belief.keys, belief.frame // N), N)]
        levels = begin_ticks(
            model, belief.levels, belief.frame, [x[:, place // k**level] for level, x in enumerate(noise)]
        )
        cells = [(cell.clone(parent=None), {"params": cell.variables["params"]}) for cell in model.cells]

        def infer_tick(top: int) -> list[LevelState]:
            """Infer the tick of a level that ends with this frame."""
            first, states = place + 1 - k**top, (belief.levels[:1], *belief.begin)[top]
            inferred, context = list(levels), above(tuple(levels), top)[:, None]
            for level in reversed(range(top + 1)):
                span, ticks = k**level, k ** (top - level)
                summed = cut(features[level], first, k**top).reshape(B, ticks, span, -1).sum(2)
                if level == 0:
                    context = model.with_actions(context, None if actions is None else cut(actions, first, k**top))
                inputs = Inputs(cut(noise[level], first // span, ticks))
                cell, params = cells[level]
                found: Any = cell.apply(params, states[level], context, summed, inputs)
                rollout, inferred[level] = found
                context = jnp.repeat(rollout.output, k, axis=1)
            return inferred

        ended = sum(((place + 1) % k**level == 0).astype(int) for level in range(1, c.levels))
        inferred = jax.lax.switch(ended, [partial(infer_tick, level) for level in range(c.levels)])
        return tuple(inferred), features, actions

    found: Any = model.apply(params, method=infer)
    levels, features, actions = found
    begin = tuple(
        jax.tree.map(partial(jnp.where, (place + 1) % k**level == 0), levels[: level + 1], before)
        for level, before in enumerate(belief.begin, 1)
    )
    return Belief(belief.frame + 1, levels, begin, features, actions, belief.keys)


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
    # Noise of all ticks of the top level that the frames may be in, [ticks, B, S] for each level: drawn at once, since
    # one by one takes long to compile.
    tops = first + jnp.arange(-(-frames // N) + 1)
    drawn = jax.vmap(lambda top: draw(c, fold_in(keys, top), N))(tops)
    noise = [x.noise.swapaxes(1, 2).reshape(-1, B, c.cell_stoch_size) for x in drawn]

    def follow(model: CWVAE) -> LevelState:
        def body(levels: tuple[LevelState, ...], inputs: Any) -> tuple[tuple[LevelState, ...], LevelState]:
            time, action = inputs
            now = [x[time // k**level - first * (N // k**level)] for level, x in enumerate(noise)]
            _, *uppers = begin_ticks(model, levels, time, now)
            context = model.with_actions(above((levels[0], *uppers), 0), action)
            lowest = tick(model.cells[0], levels[0], context, now[0])
            return (lowest, *uppers), lowest

        times = belief.frame + jnp.arange(frames)
        _, states = jax.lax.scan(body, levels, (times, None if actions is None else actions.swapaxes(0, 1)))
        return jax.tree.map(lambda x: x.swapaxes(0, 1), states)

    found: Any = model.apply(params, method=follow)
    states: LevelState = found
    return states


@partial(jax.jit, static_argnums=0)
def decode(model: CWVAE, params: Any, state: LevelState) -> Array:
    """See `WorldModel.decode`."""
    in_a_row = LevelState(*(x.reshape(1, -1, x.shape[-1]) for x in state))
    frames: Any = model.apply(params, (in_a_row,), method="decode")
    shaped: Array = frames.reshape(*state.stoch.shape[:-1], *frames.shape[2:])
    return shaped

"""One training step: the state, the optimizer and the update over all devices."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import cwvae
from config import FRAME_SIZE, Config
from cwvae import CWVAE
from data import Batch
from noise import draw, key_for, sequence_keys

NEVER = np.int32(2**31 - 1)


@flax.struct.dataclass
class TrainState:
    """What a checkpoint holds. Noise and data order follow from seed and step, so nothing of them is kept."""

    step: Array  # int32 []
    first_bad: Array  # int32 []: the first step whose loss or gradient wasn't finite, or NEVER
    params: Any
    opt_state: optax.OptState


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Return Adam with eps 1e-4, behind clipping by the global norm."""
    clip = optax.clip_by_global_norm(config.clip_grad_norm_by) if config.clip_grad_norm_by else optax.identity()
    return optax.chain(clip, optax.adam(config.lr, eps=1e-4))


@partial(jax.jit, static_argnums=0)
def make_state(model: CWVAE) -> TrainState:
    """Return the state before the first step."""
    c = model.config
    block = c.tmp_abs_factor ** (c.levels - 1)  # parameters don't depend on the length
    video = jnp.zeros((1, block, FRAME_SIZE, FRAME_SIZE, c.channels))
    params = model.init(key_for("params", c), video, draw(c, jax.random.split(jax.random.key(0), 1), block))
    return TrainState(jnp.int32(0), jnp.int32(NEVER), params, make_optimizer(c).init(params))


def make_train_step(model: CWVAE) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """Return Adam's step on Equation 5 over all devices, (state, batch) -> (state, metrics).

    Batches are [devices, B / devices, ...], the state is whole on each device. The state's memory is donated: the state
    that was passed in can't be used again.
    """
    c = model.config
    optimizer = make_optimizer(c)
    key = key_for("train", c)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        b, T = batch.video.shape[:2]
        first = jax.lax.axis_index("data") * b
        inputs = draw(c, sequence_keys(jax.random.fold_in(key, state.step), first, b), T)

        def loss(params: Any) -> tuple[Array, dict[str, Array]]:
            terms, _ = model.apply(params, batch.video, inputs)
            return cwvae.objective(c, terms, batch.weight, T, axis="data")

        gradients, metrics = jax.grad(loss, has_aux=True)(state.params)
        gradients, metrics = jax.lax.psum((gradients, metrics), "data")
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics |= {"grad_norm": optax.tree.norm(gradients), "learning_rate": jnp.float32(c.lr)}
        # Read when something is logged or saved: no step waits for it. A loss that is NaN can have finite gradients.
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        first_bad = jnp.where(finite, state.first_bad, jnp.minimum(state.first_bad, state.step + 1))
        return TrainState(state.step + 1, first_bad, params, opt_state), metrics

    return jax.pmap(step, axis_name="data", in_axes=(None, 0), out_axes=None, donate_argnums=0)

"""The training step: its state, the optimizer, and the update over all devices."""

from functools import partial
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import cwvae
from config import FRAME_SIZE
from data import Batch
from fast.initial import init
from sequences.interface import Model, Training
from sequences.noise import key_for, sequence_keys
from system.devices import Devices

NEVER = np.int32(2**31 - 1)


@flax.struct.dataclass
class TrainState:
    """The state that a checkpoint holds. Noise and order of the data follow from the seed and the step."""

    step: Array  # int32 []
    first_bad: Array  # int32 []: the first step whose loss or gradient wasn't finite, or NEVER
    params: Any  # the model's variables: parameters, and running averages if it has any
    opt_state: optax.OptState


def make_optimizer(model: Model) -> optax.GradientTransformation:
    """Return the model's optimizer, after clipping of the gradient by its global norm."""
    bound = model.config.clip_grad_norm_by
    return optax.chain(optax.clip_by_global_norm(bound) if bound else optax.identity(), model.optimizer())


def split_variables(params: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the parameters, which the optimizer changes, and the other variables (running averages)."""
    return {"params": params["params"]}, {name: x for name, x in params.items() if name != "params"}


def make_state(model: Model, draw: bool = True) -> TrainState:
    """Return the state before the first step. With draw=False, only its shapes matter. Nothing is compiled for it."""
    c = model.config
    frames = model.min_frames  # the shapes of parameters don't depend on the number of frames
    video = jax.ShapeDtypeStruct((1, frames, FRAME_SIZE, FRAME_SIZE, c.channels), jnp.float32)
    actions = jnp.zeros((1, frames, c.action_size)) if c.action_size else None
    inputs = jax.eval_shape(lambda: model.draw(jax.random.split(jax.random.key(0), 1), frames, actions=actions))
    params = init(model, key_for("params", c), video, inputs, draw=draw)
    opt_state = jax.eval_shape(make_optimizer(model).init, split_variables(params)[0])
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), opt_state)  # Adam starts from zeros
    return TrainState(jnp.int32(0), jnp.int32(NEVER), params, zeros)


def make_train_step(model: Model) -> partial[tuple[TrainState, dict[str, Array]]]:
    """Return a training step (Equation 5) over all devices: (state, batch) -> (state, metrics).

    A batch is [devices, B / devices, ...]. Each device has the whole state. The state's memory is donated: a state that
    was passed in can't be used again. The compiled function, `func`, takes the seed as its first argument, so it is the
    same for all seeds.
    """
    c = model.config
    optimizer = make_optimizer(model)
    seed = Devices().replicate(jax.random.key_data(key_for("train", c)))

    def step(seed: Array, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        b, T = batch.video.shape[:2]
        first = jax.lax.axis_index("data") * b
        key = jax.random.fold_in(jax.random.wrap_key_data(seed), state.step)
        inputs = model.draw(sequence_keys(key, first, b), T, actions=batch.actions)
        training = Training(state.step, batch.weight, "data")
        params, averages = split_variables(state.params)

        def loss(params: Any) -> tuple[Array, tuple[dict[str, Array], Any]]:
            (terms, _), changed = model.apply(
                {**params, **averages}, batch.video, inputs, training=training, mutable=list(averages)
            )
            loss, metrics = cwvae.objective(c, terms, batch.weight, T, axis="data")
            return loss, (metrics, changed)

        gradients, (metrics, averages) = jax.grad(loss, has_aux=True)(params)
        gradients, metrics = jax.lax.psum((gradients, metrics), "data")
        updates, opt_state = optimizer.update(gradients, state.opt_state, params)
        params = {**optax.apply_updates(params, updates), **averages}
        metrics |= {"grad_norm": optax.tree.norm(gradients), "learning_rate": jnp.float32(c.lr)}
        # It is read only when a step is logged or saved, so that no step waits for it. Both are checked: a loss that is
        # NaN can have finite gradients.
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        first_bad = jnp.where(finite, state.first_bad, jnp.minimum(state.first_bad, state.step + 1))
        return TrainState(state.step + 1, first_bad, params, opt_state), metrics

    return partial(jax.pmap(step, axis_name="data", in_axes=(None, None, 0), out_axes=None, donate_argnums=1), seed)

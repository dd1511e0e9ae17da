"""Programs of a Clockwork VAE that need only JAX: StableHLO of jax.export, with the parameters inside."""

import contextlib
import io
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, export

from config import FRAME_SIZE
from cwvae import CWVAE
from fast.backend import any_backend

PLATFORMS = ("cpu", "cuda", "tpu")

Arrays = tuple[Array, ...]


class Programs:
    """The exported functions of a model with its parameters.

    They compute a block at a time: the `config.block` frames of one tick of the top level. Each call takes any number
    of blocks, and results don't depend on how a video is divided into calls. Noise comes from random bits for each
    sequence and block. The state is a flat tuple: stoch and deter [B, ...] of each level, from level 0 up. At the
    beginning of a video, it is zeros.
    """

    def __init__(self, model: CWVAE, params: Any):
        self.model, self.params = model, params
        self.initial = jax.eval_shape(lambda: model.apply(params, 1, method="initial_state"))

    @property
    def state_sizes(self) -> list[int]:
        return [x.shape[-1] for x in jax.tree.leaves(self.initial)]

    def observe(self, video: Array, seeds: Array, state: Arrays, actions: Array | None = None) -> tuple[Arrays, Arrays]:
        """Infer states from frames.

        Args:
            video: uint8 [B, T, H, W, C], T = N `config.block`.
            seeds: random bits, uint32 [B, N, 2].
            state: what an earlier call returned, or zeros.
            actions: [B, T, A], for a model with actions.

        Returns:
            Stoch and deter of each level, concatenated [B, T_l, S + D], and the state at the end.
        """
        return self._unroll(seeds, state, video, actions)

    def imagine(self, seeds: Array, state: Arrays, actions: Array | None = None) -> tuple[Arrays, Arrays]:
        """Predict N `config.block` frames. Arguments and results are as in `observe`."""
        return self._unroll(seeds, state, None, actions)

    def decode(self, output: Array) -> Array:
        """Return the frames' means [B, T, H, W, C] from the output of level 0 [B, T, S + D]."""
        frames: Any = self.model.apply(self.params, output, method=lambda model, output: model.decoder(output))
        return frames

    def _unroll(self, seeds: Array, state: Arrays, video: Array | None, actions: Array | None) -> tuple[Arrays, Arrays]:
        B, N = seeds.shape[:2]

        def blocks(x: Array) -> Array:
            """[B, N block, ...] -> [N, B, block, ...]"""
            return jnp.swapaxes(x.reshape(B, N, -1, *x.shape[2:]), 0, 1)

        def block(state: Arrays, inputs: Any) -> tuple[Arrays, Arrays]:
            seeds, video, actions = inputs
            keys = jax.random.wrap_key_data(seeds, impl="threefry2x32")
            noise = self.model.draw(keys, self.model.config.block, actions=actions)
            method, frames = ("imagine", ()) if video is None else ("observe", (video,))
            before = jax.tree.unflatten(jax.tree.structure(self.initial), state)
            rollouts, after = self.model.apply(self.params, *frames, noise, before, method=method)
            return tuple(jax.tree.leaves(after)), tuple(rollout.output for rollout in rollouts)

        inputs = (jnp.swapaxes(seeds, 0, 1), *jax.tree.map(blocks, (video, actions)))
        state, outputs = jax.lax.scan(block, state, inputs)
        return tuple(jnp.swapaxes(x, 0, 1).reshape(B, -1, x.shape[-1]) for x in outputs), state

    def exported(self) -> dict[str, bytes]:
        """Return the functions by name, serialised for any number of sequences and blocks."""
        c = self.model.config
        b, n, t = export.symbolic_shape("b, n, t")
        T = c.block * n
        array = jax.ShapeDtypeStruct
        video = array((b, T, FRAME_SIZE, FRAME_SIZE, c.channels), jnp.uint8)
        seeds = array((b, n, 2), jnp.uint32)
        state = tuple(array((b, size), jnp.float32) for size in self.state_sizes)
        actions = [array((b, T, c.action_size), jnp.float32)] if c.action_size else []
        output = array((b, t, c.cell_stoch_size + c.cell_deter_size), jnp.float32)
        arguments: list[tuple[Callable, list[Any]]] = [
            (self.observe, [video, seeds, state, *actions]),
            (self.imagine, [seeds, state, *actions]),
            (self.decode, [output]),
        ]
        with any_backend(), without_source_locations():
            return {
                function.__name__: bytes(
                    # Numbers of sequences and blocks are inferred from all arguments, also from unused ones.
                    export.export(jax.jit(function, keep_unused=True), platforms=PLATFORMS)(*shapes).serialize()
                )
                for function, shapes in arguments
            }


@contextlib.contextmanager
def without_source_locations() -> Iterator[None]:
    """Lower programs without source locations in the block: these would hold this machine's paths and line numbers."""
    option = "jax_traceback_in_locations_limit"
    earlier = getattr(jax.config, option)
    jax.config.update(option, 0)
    try:
        yield
    finally:
        jax.config.update(option, earlier)


def archive(files: Mapping[str, bytes]) -> bytes:
    """Return a zip of files by name. It holds no times, so that equal files give equal zips."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as opened:
        for name, content in files.items():
            opened.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()

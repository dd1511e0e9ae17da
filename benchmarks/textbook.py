"""The textbook form of the model: the obvious implementation in JAX, with which benchmarks compare the fast one.

The scan computes everything of a tick, inputs are concatenated, each gate has its own matmul, and convolutions are
XLA's. Keywords turn on some of the fast forms. Parameters and noise are the same as in the fast model. tests/oracle.py,
which is even slower, defines the right results.
"""

import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import Array

sys.path.append(str(Path(__file__).parent.parent / "tests"))
import oracle

from cwvae import floats
from sequences.noise import ticks


def lax_conv(x: Array, kernel: Array) -> Array:
    return oracle.conv({"kernel": kernel, "bias": 0}, x)


def lax_conv_transpose(x: Array, kernel: Array) -> Array:
    return oracle.conv_transpose({"kernel": kernel, "bias": 0}, x)


def encode(c, p, video, conv=lax_conv, sum_first=False):
    """Return the features of each level, [B, T, H, W, C] -> [B, T_l, F]."""
    B, T = video.shape[:2]
    x = video.reshape(B * T, *video.shape[2:])
    for i in range(4):
        layer = p[f"conv_{i}"]
        x = oracle.leaky_relu(conv(x, layer["kernel"]) + layer["bias"])
    x = x.reshape(B, T, -1)
    features = [x]
    for level in range(1, c.levels):
        size = c.tmp_abs_factor**level

        def blocks(x, size=size):
            return jnp.pad(x, ((0, 0), (0, -T % size), (0, 0))).reshape(B, -1, size, x.shape[-1]).sum(2)

        for i in range(c.enc_dense_layers - 1):
            x = jax.nn.relu(oracle.dense(p[f"level_{level}_dense_{i}"], x))
        if c.enc_dense_layers:
            last = p[f"level_{level}_dense_{c.enc_dense_layers - 1}"]
            if sum_first:
                features.append(blocks(x) @ last["kernel"] + blocks(jnp.ones((B, T, 1))) * last["bias"])
                x = oracle.dense(last, x) if level < c.levels - 1 else x
                continue
            x = oracle.dense(last, x)
        features.append(blocks(x))
    return features


def decode(p, output, conv_transpose=lax_conv_transpose):
    """Return the frames' means, [B, T, S + D] -> [B, T, H, W, C]."""
    B, T = output.shape[:2]
    x = oracle.dense(p["dense"], output).reshape(B * T, 1, 1, -1)
    for i in range(4):
        layer = p[f"conv_{i}"]
        x = conv_transpose(x, layer["kernel"]) + layer["bias"]
        x = jnp.tanh(x) if i == 3 else oracle.leaky_relu(x)
    return x.reshape(B, T, *x.shape[1:])


def unroll(c, params, noise, features, context_ticks=None):
    """Return prior, posterior, stoch and deter of each level over time, from states of zeros.

    After `context_ticks` of a level, its stoch is a sample of the prior.
    """
    context, levels = None, [()] * c.levels
    for level in reversed(range(c.levels)):
        B, T, S = noise[level].shape
        p = params[f"cell_{level}"]

        def tick(state, inputs, p=p, level=level):
            t, context, features, noise = inputs
            prior, posterior, z, h = oracle.tick(c, p, *state, context, features, noise)
            if context_ticks is not None:
                blind = t >= context_ticks[level]
                z = jnp.where(blind, prior[0] + prior[1] * noise, z)
            return (z, h), (prior, posterior, z, h)

        context = jnp.zeros((B, T, S + c.cell_deter_size)) if context is None else context[:, :T]
        inputs = [jnp.swapaxes(x, 0, 1) for x in (context, features[level], noise[level])]
        state = jnp.zeros((B, S)), jnp.zeros((B, c.cell_deter_size))
        _, outputs = jax.lax.scan(tick, state, (jnp.arange(T), *inputs))
        levels[level] = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), outputs)
        context = jnp.repeat(jnp.concatenate(levels[level][2:], -1), c.tmp_abs_factor, axis=1)
    return levels


def elbo(c, params, video, noise, conv=lax_conv, conv_transpose=lax_conv_transpose, sum_first=False):
    """Return the terms of `CWVAE.elbo` that training without options needs."""
    params, video = params["params"], floats(video)
    levels = unroll(c, params, noise, encode(c, params["encoder"], video, conv, sum_first))
    frames = decode(params["decoder"], jnp.concatenate(levels[0][2:], -1), conv_transpose)
    error = ((video - frames) ** 2 / (2 * c.dec_stddev**2)).sum((1, 2, 3, 4))
    kl = jnp.stack([oracle.kl(posterior, prior).sum(1) for prior, posterior, _, _ in levels])
    stddevs = [[jnp.log(stats[1]) for stats in level[:2]] for level in levels]
    prior, posterior = (
        jnp.stack([(x[i] + 0.5 * math.log(2 * math.pi * math.e)).sum((1, 2)) for x in stddevs]) for i in (0, 1)
    )
    constant = math.prod(video.shape[1:]) * (math.log(c.dec_stddev) + 0.5 * math.log(2 * math.pi))
    return {"nll": error + constant, "kl": kl, "entropy_prior": prior, "entropy_posterior": posterior}


def open_loop(c, params, video, noise):
    """Return the frames after the context, [B, T - context, H, W, C].

    All frames are encoded, as in both earlier codes.
    """
    params = params["params"]
    features = encode(c, params["encoder"], floats(video))
    levels = unroll(c, params, noise, features, ticks(c, c.open_loop_ctx))
    return decode(params["decoder"], jnp.concatenate(levels[0][2:], -1)[:, c.open_loop_ctx :])

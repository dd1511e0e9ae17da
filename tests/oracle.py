"""The model in textbook form: one frame, level and tick at a time, concatenated inputs, a separate matmul for each gate.

It shares only parameters and noise with the fast model. It is slow, and meant to be obviously right. Its compiled
functions depend on few keys, so that configurations share them.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def conv(p, x):
    """Convolve with 4x4 kernels, stride 2 and no padding."""
    out = jax.lax.conv_general_dilated(x, p["kernel"], (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return out + p["bias"]


def conv_transpose(p, x):
    """Apply a transposed convolution with stride 2 and no padding. JAX's convention flips the kernel."""
    return jax.lax.conv_transpose(x, p["kernel"][::-1, ::-1], (2, 2), "VALID") + p["bias"]


def conv_transpose_by_hand(p, x):
    """Add each input pixel's value times the kernel to the output, at twice the pixel's position."""
    size, outputs = p["kernel"].shape[0], p["kernel"].shape[-1]
    N, H, W, _ = x.shape
    out = jnp.zeros((N, 2 * (H - 1) + size, 2 * (W - 1) + size, outputs))
    for a in range(size):
        for b in range(size):
            out = out.at[:, a : a + 2 * H - 1 : 2, b : b + 2 * W - 1 : 2].add(x @ p["kernel"][a, b])
    return out + p["bias"]


def leaky_relu(x):
    return jnp.where(x > 0, x, 0.2 * x)


@jax.jit
def convolved(p, video):
    """Return the features of each frame, a list of [B, F]."""
    B, T = video.shape[:2]
    x = video.reshape(B * T, *video.shape[2:])
    for i in range(4):
        x = leaky_relu(conv(p[f"conv_{i}"], x))
    x = x.reshape(B, T, -1)
    return [x[:, t] for t in range(T)]


@jax.jit
def tower(layers, x):
    for layer in layers[:-1]:
        x = jax.nn.relu(dense(layer, x))
    return dense(layers[-1], x)


def encode(c, p, video):
    """Return the features of each level: a list over levels of lists over ticks of [B, F]."""
    per_frame = convolved({name: p[name] for name in p if name.startswith("conv")}, video)
    features = [per_frame]
    for level in range(1, c.levels):
        if layers := [p[f"level_{level}_dense_{i}"] for i in range(c.enc_dense_layers)]:
            per_frame = [tower(layers, x) for x in per_frame]
        ticks = c.tmp_abs_factor**level
        features.append([sum(per_frame[start : start + ticks]) for start in range(0, len(per_frame), ticks)])
    return features


@jax.jit
def decode(p, output):
    """Decode states [N, S + D] to frames [N, H, W, C]."""
    x = dense(p["dense"], output)[:, None, None]
    for i in range(3):
        x = leaky_relu(conv_transpose(p[f"conv_{i}"], x))
    return jnp.tanh(conv_transpose(p["conv_3"], x))


def gru(p, inputs, state):
    """Apply Flax's own cell."""
    D = state.shape[-1]
    ir, iz, i_n = jnp.split(p["input_kernel"], 3, 1)
    br, bz, bn = jnp.split(p["input_bias"], 3)
    hr, hz, hn = jnp.split(p["state_kernel"], 3, 1)
    params = {
        "ir": {"kernel": ir, "bias": br},
        "iz": {"kernel": iz, "bias": bz},
        "in": {"kernel": i_n, "bias": bn},
        "hr": {"kernel": hr},
        "hz": {"kernel": hz},
        "hn": {"kernel": hn, "bias": p["candidate_bias"]},
    }
    return nn.GRUCell(D, dtype=state.dtype, param_dtype=state.dtype).apply({"params": params}, state, inputs)[0]


def stats(min_stddev, p, h):
    return dense(p["mean"], h), jnp.log1p(jnp.exp(dense(p["stddev"], h + 0.54))) + min_stddev


def tick(c, p, z, h, context, features, noise):
    """Return prior, posterior, z and h after one transition. Without features, the level is blind."""
    return transition(c.cell_min_stddev, c.cell_mean_only, p, z, h, context, features, noise)


@partial(jax.jit, static_argnums=(0, 1))  # compiled once, called at every tick
def transition(min_stddev, mean_only, p, z, h, context, features, noise):
    x = jax.nn.relu(dense(p["transition"], jnp.concatenate([z, context], -1)))
    h = gru(p["gru"], x, h)
    prior = stats(min_stddev, p["prior_stats"], jax.nn.relu(dense(p["prior_hidden"], h)))
    posterior = prior
    if features is not None:
        x = jax.nn.relu(dense(p["posterior_in"], jnp.concatenate([h, features], -1)))
        x = jax.nn.relu(dense(p["posterior_hidden"], x))
        posterior = stats(min_stddev, p["posterior_stats"], x)
    mean, stddev = posterior
    return prior, posterior, mean if mean_only else mean + stddev * noise, h


def reset_pattern(c, sizes):
    """Return 0, 1, 0, 1, ... at level L-2, repeated k times (and cut) for each level below it; ones at the top level."""
    patterns = [[1.0] * size for size in sizes]
    if c.cell_reset_state and c.levels > 1:
        pattern = [float(t % 2) for t in range(sizes[-2])]
        for level in reversed(range(c.levels - 1)):
            patterns[level] = pattern[: sizes[level]]
            pattern = patterns[level] * c.tmp_abs_factor
    return patterns


def unroll(c, params, T, noise, features, actions=None):
    """Unroll all levels over T frames from zeros.

    `features` has a list over ticks for each level, or None for a blind level.
    """
    B = noise[0].shape[0]
    S, D = c.cell_stoch_size, c.cell_deter_size
    sizes = [math.ceil(T / c.tmp_abs_factor**level) for level in range(c.levels)]
    resets = reset_pattern(c, sizes)
    above = None
    levels = [None] * c.levels
    for level in reversed(range(c.levels)):
        z, h = jnp.zeros((B, S)), jnp.zeros((B, D))
        rows = []
        for t in range(sizes[level]):
            context = jnp.zeros((B, S + D)) if above is None else above[t // c.tmp_abs_factor]
            if level == 0 and actions is not None:
                context = jnp.concatenate([context, actions[:, t]], -1)
            seen = None if features[level] is None else features[level][t]
            z = z * resets[level][t]
            prior, posterior, z, h = tick(c, params[f"cell_{level}"], z, h, context, seen, noise[level][:, t])
            rows.append((prior, posterior, z, h))
        above = [jnp.concatenate([z, h], -1) for _, _, z, h in rows]
        levels[level] = rows
    return levels


@jax.jit
def kl(q, p):
    (qm, qs), (pm, ps) = q, p
    return (jnp.log(ps) - jnp.log(qs) + (qs**2 + (qm - pm) ** 2) / (2 * ps**2) - 0.5).sum(-1)


def elbo(c, params, video, noise, actions=None, use_obs=None):
    """Return the terms of the fast model's `elbo`, the states of its `observe`, and the frames."""
    B, T = video.shape[:2]
    features = encode(c, params["encoder"], video)
    features = [x if letter == "T" else None for x, letter in zip(features, use_obs or "T" * c.levels, strict=True)]
    levels = unroll(c, params, T, noise, features, actions)
    frames = decode(params["decoder"], jnp.concatenate([jnp.concatenate([z, h], -1) for _, _, z, h in levels[0]]))
    frames = frames.reshape(T, *video[:, 0].shape)
    nll = 0.0
    for t in range(T):
        error = ((video[:, t] - frames[t]) ** 2).reshape(B, -1)
        nll += (error / (2 * c.dec_stddev**2) + jnp.log(c.dec_stddev) + 0.5 * jnp.log(2 * jnp.pi)).sum(-1)
    return {
        "nll": nll,
        "kl": jnp.stack([sum(kl(q, p) for p, q, _, _ in rows) for rows in levels]),
        "entropy_prior": jnp.stack(
            [sum((0.5 * jnp.log(2 * jnp.pi * jnp.e * p[1] ** 2)).sum(-1) for p, _, _, _ in rows) for rows in levels]
        ),
        "entropy_posterior": jnp.stack(
            [sum((0.5 * jnp.log(2 * jnp.pi * jnp.e * q[1] ** 2)).sum(-1) for _, q, _, _ in rows) for rows in levels]
        ),
        "levels": [
            [jnp.stack(x, 1) for x in zip(*((*p, *q, z, h) for p, q, z, h in rows), strict=True)] for rows in levels
        ],
        "frames": frames.swapaxes(0, 1),
    }

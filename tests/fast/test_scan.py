"""The scan with its own gradient against JAX's scan, on cells that the model doesn't have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from flax import linen as nn
from jax import Array

import cwvae
from benchmarks.__main__ import plain_scan
from config import Config
from fast import scan
from fast.layers import Dense
from sequences.noise import Inputs


class DeeperPrior(cwvae.Prior):
    """A prior with one more dense layer and a layer normalization."""

    @nn.compact
    def __call__(self, deter: Array) -> cwvae.Gaussian:
        c = self.config
        hidden = nn.relu(Dense(c.cell_deter_size, c.cell_embed_size, name="prior_hidden")(deter))
        hidden = nn.LayerNorm(name="prior_norm", param_dtype=deter.dtype)(hidden)
        hidden = nn.tanh(Dense(c.cell_embed_size, c.cell_embed_size, name="prior_more")(hidden))
        return cwvae.Stats(c, name="prior_stats")(hidden)


@pytest.mark.parametrize("seen, on_cpu", [(7, True), (4, True), (4, False), (0, False)])
def test_the_scan_equals_jax_with_another_prior(monkeypatch, seen, on_cpu):
    """Values, and gradients of parameters, state, context, features and noise, from posterior and prior."""
    monkeypatch.setattr(cwvae, "Prior", DeeperPrior)
    monkeypatch.setattr(scan, "on_cpu", lambda: on_cpu)
    with jax.enable_x64(True):
        c = Config(**TINY)
        cell = cwvae.RSSMCell(c, context_size=6, feature_size=9)
        random = np.random.default_rng(0)
        state = cwvae.LevelState(random.normal(size=(2, 3)), random.normal(size=(2, 5)))
        context, features, noise = (random.normal(size=(2, 7, size)) for size in (6, 9, 3))
        shapes = jax.eval_shape(cell.init, jax.random.key(0), state, context, features, Inputs(noise))
        params = jax.tree.map(lambda x: random.normal(size=x.shape), shapes)
        assert {"prior_hidden", "prior_norm", "prior_more", "prior_stats", "transition"} <= set(params["params"])

        def probe(params, state, context, features, noise):
            seen_features = features[:, :seen] if seen else None
            outputs = cell.apply(params, state, context, seen_features, Inputs(noise))
            weights = np.random.default_rng(1)
            return sum((x * weights.normal(size=x.shape)).sum() for x in jax.tree.leaves(outputs)), outputs

        results = []
        for form in scan.scan, plain_scan:
            monkeypatch.setattr(scan, "scan", form)
            differentiate = jax.jit(jax.value_and_grad(probe, range(5), has_aux=True))
            results.append(differentiate(params, state, context, features, noise))
        for a, b in zip(*map(jax.tree.leaves, results), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
        assert all(np.any(x) for x in jax.tree.leaves(results[0][1][0]["params"]["prior_more"]))


def test_a_single_tick_equals_a_tick_of_the_scan():
    c = Config(**TINY)
    cell = cwvae.RSSMCell(c, context_size=6, feature_size=9)
    random = np.random.default_rng(0)
    state = cwvae.LevelState(jnp.zeros((2, 3)), jnp.zeros((2, 5)))
    context, features, noise = (random.normal(size=(2, 4, n)).astype(np.float32) for n in (6, 9, 3))
    params = cell.init(jax.random.key(0), state, context, features, Inputs(noise))
    rollout, last = cell.apply(params, state, context, features, Inputs(noise))
    for t in range(4):
        given = context[:, t], features[:, t], noise[:, t], None
        state, posterior = cell.apply(params, state, *given, method="tick")
        np.testing.assert_allclose(rollout.posterior.mean[:, t], posterior.mean, atol=1e-6)
        np.testing.assert_allclose(rollout.stoch[:, t], state.stoch, atol=1e-6)
    np.testing.assert_allclose(last.deter, state.deter, atol=1e-6)

"""Initial parameters: their distributions, and that a seed gives the same ones everywhere."""

import dataclasses
import logging
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, tiny_keys

import config as configuration
from baselines.layers import BatchNorm
from baselines.svg import SVG
from baselines.vta import VTA
from config import Config
from cwvae import CWVAE
from fast import initial
from training import loading
from training.step import make_optimizer, make_state, split_variables

MODELS = {"cwvae": CWVAE, "svg": SVG, "vta": VTA}


@pytest.fixture(params=MODELS)
def model(request):
    keys = {"seq_len": 32} if request.param == "vta" else {}
    return MODELS[request.param](Config(**tiny_keys(request.param) | keys, model=request.param))


def leaves(tree):
    return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def test_a_state_has_the_shapes_of_init_and_optimizer(model):
    state = make_state(model)
    frames = model.min_frames
    video = jnp.zeros((1, frames, 64, 64, model.config.channels))

    def by_flax():
        params = model.init(jax.random.key(0), video, model.draw(jax.random.split(jax.random.key(0), 1), frames))
        return params, make_optimizer(model).init({"params": params["params"]})

    expected = jax.eval_shape(by_flax)
    there, here = leaves(expected), leaves((state.params, state.opt_state))
    assert {name: (x.shape, x.dtype) for name, x in there.items()} == {
        name: (x.shape, x.dtype) for name, x in here.items()
    }
    opt_state = make_optimizer(model).init(split_variables(state.params)[0])
    jax.tree.map(np.testing.assert_array_equal, opt_state, state.opt_state)


def test_every_kernel_is_drawn(model):
    """The elements of each kernel differ, and the kernels differ from each other."""
    state = make_state(dataclasses.replace(model, config=model.config))
    firsts = []
    for name, x in leaves(state.params["params"]).items():
        if "kernel" in name:
            assert len(np.unique(x)) > 0.9 * x.size, name
            firsts.append(x.flat[0])
    assert len(set(firsts)) == len(firsts) > 8


@pytest.mark.parametrize("shape", [(300, 400), (4, 4, 16, 256)])
@pytest.mark.parametrize("form", ["by init", "by Flax's key"])
def test_initializers_have_the_distributions_of_flax_and_pytorch(shape, form):
    """Compared with their moments, limits and quantiles."""

    def draw(initializer, shape):
        if form == "by Flax's key":
            return np.asarray(initializer(jax.random.key(3), shape))
        draws = {}
        token = initial.pending_draws.set(draws)
        initializer(None, shape)
        initial.pending_draws.reset(token)
        ((array, draw),) = draws.values()
        assert not array.any()
        return draw(np.random.default_rng(3), shape).astype(np.float32)

    fan_in = np.prod(shape[:-1])
    x = draw(initial.lecun_normal, shape) * math.sqrt(fan_in)
    flax = np.asarray(jax.nn.initializers.lecun_normal()(jax.random.key(0), shape)) * np.sqrt(fan_in)
    assert x.dtype == np.float32
    assert abs(x.mean()) < 0.02
    assert x.std() == pytest.approx(1, rel=0.01)
    assert np.abs(x).max() == pytest.approx(2 / 0.8796, rel=0.001) == np.abs(flax).max()
    np.testing.assert_allclose(
        np.quantile(x, np.linspace(0, 1, 11)), np.quantile(flax, np.linspace(0, 1, 11)), atol=0.03
    )

    x = draw(initial.normal(0.02, mean=1.0), shape)
    assert (x.mean(), x.std()) == (pytest.approx(1, abs=5e-4), pytest.approx(0.02, rel=0.01))
    assert ((x - 1) ** 4).mean() / 0.02**4 == pytest.approx(3, rel=0.1)

    x = draw(initial.uniform(0.1), shape)
    assert (x.min(), x.max()) == (pytest.approx(-0.1, rel=0.01), pytest.approx(0.1, rel=0.01))
    assert (x.mean(), x.std()) == (pytest.approx(0, abs=1e-3), pytest.approx(0.1 / np.sqrt(3), rel=0.01))

    x = draw(initial.orthogonal, (60, 180))
    gates = np.split(x, 3, 1)
    for gate in gates:
        np.testing.assert_allclose(gate.T @ gate, np.eye(60), atol=1e-6)
    assert not np.allclose(gates[0], gates[1])


def test_orthogonal_matrices_are_uniform():
    """Traces of uniform orthogonal matrices have mean 0 and variance 1. A QR decomposition alone is far from that."""
    kernel = np.asarray(initial.orthogonal(jax.random.key(0), (6, 6 * 3000)))
    traces = np.trace(kernel.reshape(6, 3000, 6), axis1=0, axis2=2)
    assert (traces.mean(), traces.var()) == (pytest.approx(0, abs=0.06), pytest.approx(1, abs=0.1))


def test_zeros_ones_and_batch_norm_scales_have_their_values():
    assert initial.zeros(None, (2, 3)).tolist() == [[0, 0, 0]] * 2
    assert initial.ones(None, ()) == 1
    scale = BatchNorm(5000).init(jax.random.key(0), jnp.zeros((1, 5000)), None)["params"]["scale"]
    assert (scale.mean(), scale.std()) == (pytest.approx(1, abs=1e-3), pytest.approx(0.02, rel=0.05))


CHECKSUM = """
import sys
import config, cwvae, system.checkpoints
from training.step import make_state
c = config.parse(sys.argv[1:])
print(system.checkpoints.checksum(make_state(cwvae.CWVAE(c)).params, {}))
"""


def test_a_seed_gives_the_same_bits_with_any_number_of_threads():
    sums = []
    for seed, threads in (1, "1"), (1, "2"), (2, "2"):
        flags = ["--config", "configs/debug.yml", f"--seed={seed}"]
        environment = os.environ | {"OPENBLAS_NUM_THREADS": threads}
        done = subprocess.run(
            [sys.executable, "-c", CHECKSUM, *flags],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        sums.append(done.stdout)
    assert sums[0] == sums[1] != sums[2]


def test_parameters_that_a_checkpoint_replaces_are_not_drawn(trained, monkeypatch):
    model = CWVAE(loading.load_config(trained, {}))
    drawn, undrawn = make_state(model), make_state(model, draw=False)
    assert loading.shapes(drawn) == loading.shapes(undrawn)
    monkeypatch.setattr(initial, "generator", lambda key: {}["nothing is to be drawn"])
    loaded = loading.load_state(model, loading.find_checkpoint(trained))
    assert all(np.any(x) for name, x in leaves(loaded.params).items() if "kernel" in name)


def test_making_a_state_compiles_only_keys(caplog):
    c = dataclasses.replace(configuration.load(ROOT / "configs" / "debug.yml"), cell_embed_size=17, filters=3, seed=0)
    with caplog.at_level(logging.WARNING), jax.log_compiles():
        make_state(CWVAE(c))
    compiled = {record.getMessage().split()[1] for record in caplog.records if record.msg.startswith("Compiling")}
    assert all("key" in name or "random" in name or "split" in name or "fold" in name for name in compiled), compiled

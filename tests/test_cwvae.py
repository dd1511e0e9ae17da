"""The fast model against the textbook form in oracle.py; properties of the model; its objective."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import scipy.stats
from conftest import ROOT, TINY
from helpers import make

import config as configuration
import cwvae
from benchmarks import textbook
from config import Config
from cwvae import CWVAE, Gaussian
from fast import convolutions
from sequences import rollout
from sequences.interface import Terms
from sequences.noise import Inputs, draw, keep_patterns, ticks, time_slice
from training import loading

GRID = [
    dict(T=11, levels=3, tmp_abs_factor=2, chunk=4),
    dict(T=11, levels=3, tmp_abs_factor=2, backend="gpu"),
    dict(T=11, levels=1, tmp_abs_factor=6, action_size=2, enc_dense_layers=0, chunk=4, few_multiplications=True),
    dict(T=11, levels=2, tmp_abs_factor=6, enc_dense_layers=3, use_obs="FT", filters=2),
    dict(T=11, levels=3, tmp_abs_factor=1, enc_dense_layers=1, dec_stddev=0.4),
    dict(T=11, levels=4, tmp_abs_factor=2, enc_dense_layers=4, cell_reset_state=True),
    dict(
        **dict(T=11, levels=3, tmp_abs_factor=2, dataset="minerl", channels=3, channels_mult=2),
        **dict(cell_mean_only=True, cell_min_stddev=0.1),
    ),
    dict(T=11, levels=3, tmp_abs_factor=2, cell_reset_state=True, use_obs="TTF", action_size=2),
]


@pytest.mark.parametrize("case", GRID, ids=lambda case: "-".join(f"{k}{v}" for k, v in case.items()))
def test_cwvae_equals_the_textbook_form(case, monkeypatch):
    """All outputs, terms and gradients, in double precision."""
    case = dict(case)
    monkeypatch.setattr(convolutions, "CHUNK", case.pop("chunk", convolutions.CHUNK))
    if case.pop("few_multiplications", False):
        monkeypatch.setattr(convolutions, "MANY_CHANNELS", 1)
        monkeypatch.setattr(convolutions, "MANY_FRAMES", 1)
    backend = case.pop("backend", "cpu")  # selects the forms for this backend; the CPU computes them
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    with jax.enable_x64(True):
        c, model, params, video, inputs = make(dtype=np.float64, **case)

        noise, actions = [x.noise for x in inputs], inputs[0].actions

        def fast(params, video, actions):
            given = (inputs[0]._replace(actions=actions), *inputs[1:])
            rollouts, _ = model.apply(params, video, given, use_obs=c.use_obs, method="observe")
            frames = model.apply(params, rollouts, method="decode")
            terms, _ = model.apply(params, video, given)
            levels = [[*r.prior, *r.posterior, r.stoch, r.deter] for r in rollouts]
            return terms._asdict() | {"levels": levels, "frames": frames}

        def slow(params, video, actions):
            seen = oracle.elbo(c, params["params"], video, noise, actions, c.use_obs)
            terms = seen if c.use_obs is None else oracle.elbo(c, params["params"], video, noise, actions)
            same = {name: terms[name] for name in ("nll", "kl", "entropy_prior", "entropy_posterior")}
            return same | {
                "kl_prior": terms["kl"],
                "kl_posterior": terms["kl"],
                "other": {},
                "levels": seen["levels"],
                "frames": seen["frames"],
            }

        def probe(form, params, video, actions):
            """Return all outputs, and a random projection of those that autodiff treats alike in both forms."""
            outputs = form(params, video, actions)
            leaves = [
                x
                for name in ("nll", "kl", "entropy_prior", "entropy_posterior", "levels", "frames")
                for x in jax.tree.leaves(outputs[name])
            ]
            random = np.random.default_rng(1)
            return sum((x * random.normal(size=x.shape)).sum() for x in leaves), outputs

        arguments = (0, 1, 2) if actions is not None else (0, 1)
        (_, got), got_gradients = jax.jit(jax.value_and_grad(partial(probe, fast), arguments, has_aux=True))(
            params, video, actions
        )
        (_, want), want_gradients = jax.value_and_grad(partial(probe, slow), arguments, has_aux=True)(
            params, video, actions
        )
    for kind, a, b in ("output", got, want), ("gradient", got_gradients, want_gradients):
        assert jax.tree.structure(a) == jax.tree.structure(b)
        for path, difference in jax.tree_util.tree_leaves_with_path(
            jax.tree.map(lambda x, y: float(np.abs(x - y).max() / (1 + np.abs(y).max())), a, b)
        ):
            assert difference < 1e-9, (kind, jax.tree_util.keystr(path), difference)


def test_cwvae_equals_the_textbook_form_in_single_precision():
    c, model, params, video, inputs = make(T=13, levels=3, tmp_abs_factor=2)
    terms, _ = model.apply(params, video, inputs)
    want = oracle.elbo(c, params["params"], video, [x.noise for x in inputs])
    for name in ("nll", "kl", "entropy_prior", "entropy_posterior"):
        np.testing.assert_allclose(getattr(terms, name), want[name], rtol=1e-5, atol=1e-5)


def test_the_textbook_form_of_the_benchmarks_equals_the_model():
    """The form that the benchmarks compare with computes the same, with each of its switches."""
    c, model, params, video, inputs = make(T=13, levels=3, tmp_abs_factor=2, filters=2)
    terms, _ = model.apply(params, video, inputs)
    for forms in (
        {},
        dict(conv=convolutions.conv),
        dict(conv_transpose=convolutions.conv_transpose, sum_first=True),
    ):
        slow = jax.jit(partial(textbook.elbo, c, **forms))(params, video, [x.noise for x in inputs])
        for name, values in slow.items():
            np.testing.assert_allclose(values, getattr(terms, name), rtol=1e-5, atol=1e-4)
    c = dataclasses.replace(c, open_loop_ctx=8)
    keys = jax.random.split(jax.random.key(0), 2)
    want = jax.jit(partial(textbook.open_loop, c))(params, video, [x.noise for x in draw(c, keys, 13)])
    got = jnp.concatenate(list(rollout.open_loop(CWVAE(c), params, video[:, :8], keys, 5).prediction), 1)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_close_to_float32_and_returns_float32():
    keys = dict(T=13, levels=3, tmp_abs_factor=2, filters=2, cell_deter_size=20, cell_embed_size=20)
    results = {}
    for dtype in "float32", "bfloat16":
        c, model, params, video, inputs = make(**keys)
        c = dataclasses.replace(c, dtype=dtype)

        def loss(params, c=c):
            terms, _ = CWVAE(c).apply(params, video, inputs)
            return cwvae.objective(c, terms, jnp.ones(2), 13)[0], terms

        results[dtype] = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    (loss, terms), gradient = results["float32"]
    (low_loss, low_terms), low_gradient = results["bfloat16"]
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((low_loss, low_terms, low_gradient)))
    assert low_loss == pytest.approx(float(loss), rel=1e-2) and low_loss != loss
    np.testing.assert_allclose(low_terms.kl, terms.kl, rtol=0.05, atol=0.1)
    g, low = (jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)]) for tree in (gradient, low_gradient))
    assert (g * low).sum() / jnp.sqrt((g**2).sum() * (low**2).sum()) > 0.99


@pytest.mark.parametrize(
    "name, channels, sizes, total",
    [("mmnist", 1, (20, 200), 12_465_617), ("mazes", 3, (20, 200), None), ("minerl", 3, (100, 800), 34_391_827)],
)
def test_published_configurations_have_the_expected_parameter_counts(name, channels, sizes, total):
    c = configuration.load(ROOT / "configs" / f"{name}.yml")
    S, D = sizes
    E = D
    assert (c.cell_stoch_size, c.cell_deter_size, c.cell_embed_size, c.channels) == (S, D, E, channels)
    video = jnp.zeros((1, 36, 64, 64, channels))
    inputs = [Inputs(jnp.zeros((1, t, S))) for t in ticks(c, 36)]
    params = jax.eval_shape(CWVAE(c).init, jax.random.key(0), video, inputs)["params"]
    F = 1024
    transition, gru = (S + S + D) * E + E, 6 * E * D + 4 * D
    prior = D * E + E + 2 * (E * S + S)
    posterior = (D + F) * E + E + E * E + E + 2 * (E * S + S)
    want = {f"cell_{level}": transition + gru + prior + posterior for level in range(3)}
    convolutions = [(4, channels, 32), (4, 32, 64), (4, 64, 128), (4, 128, 256)]
    want["encoder"] = sum(n * n * i * o + o for n, i, o in convolutions)
    want["encoder"] += 2 * ((F * 1000 + 1000) + (1000 * 1000 + 1000) + (1000 * F + F))
    want["decoder"] = (S + D) * 1024 + 1024
    want["decoder"] += sum(
        n * n * i * o + o for n, i, o in [(5, 1024, 128), (5, 128, 64), (6, 64, 32), (6, 32, channels)]
    )
    got = {module: sum(x.size for x in jax.tree.leaves(tree)) for module, tree in params.items()}
    assert got == want
    assert total in (None, sum(got.values()))
    shapes = loading.shapes(params)
    assert shapes["encoder/conv_0/kernel"] == (4, 4, channels, 32)
    assert shapes["encoder/level_2_dense_2/kernel"] == (1000, 1024)
    assert shapes["decoder/conv_3/kernel"] == (6, 6, 32, channels)
    assert shapes["cell_1/transition/kernel"] == (2 * S + D, E)
    assert shapes["cell_1/posterior_in/kernel"] == (D + 1024, E)
    assert shapes["cell_1/gru/state_kernel"] == (D, 3 * D)
    assert shapes["cell_1/posterior_stats/stddev/kernel"] == (E, S)


def test_initial_parameters_have_flax_distributions():
    c = configuration.load(ROOT / "configs" / "mmnist.yml")
    cell = cwvae.RSSMCell(c, 220, 1024)
    zeros = partial(jnp.zeros, dtype=jnp.float32)
    state = cwvae.LevelState(zeros((1, 20)), zeros((1, 200)))
    inputs = Inputs(zeros((1, 1, 20)))
    params = cell.init(jax.random.key(0), state, zeros((1, 1, 220)), zeros((1, 1, 1024)), inputs)["params"]
    for gate in np.split(np.asarray(params["gru"]["state_kernel"]), 3, 1):
        np.testing.assert_allclose(gate.T @ gate, np.eye(200), atol=1e-4)
    for kernel, size in (
        (params["gru"]["input_kernel"], 200),
        (params["posterior_in"]["kernel"], 1224),
        (params["transition"]["kernel"], 240),
    ):
        assert np.std(kernel) == pytest.approx(1 / math.sqrt(size), rel=0.02)
    assert not np.any(params["gru"]["input_bias"]) and not np.any(params["gru"]["candidate_bias"])


# ---------------------------------------------------------------------------------------------- properties


def all_predictions(model, params, video, context, frames, **options):
    keys = jax.random.split(jax.random.key(0), len(video))
    found = rollout.open_loop(model.module, params, video[:, :context], keys, frames, **options)
    return found._replace(prediction=np.concatenate(list(found.prediction), 1))


def test_states_do_not_depend_on_later_frames():
    """Also if the whole video is given, states up to the end of a tick don't depend on later frames."""
    c, model, params, video, inputs = make(T=12, levels=3, tmp_abs_factor=2)
    changed = video.copy()
    changed[:, 8:] = 0
    (a, _), (b, _) = (model.apply(params, v, inputs, method="observe") for v in (video, changed))
    for level, (x, y) in enumerate(zip(a, b, strict=True)):
        n = 8 // 2**level
        for p, q in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
            np.testing.assert_array_equal(p[:, :n], q[:, :n])
        assert not np.array_equal(x.stoch[:, n:], y.stoch[:, n:])


def test_a_predictions_gradient_reaches_the_context_only_through_seeing_levels():
    c, model, params, video, inputs = make(T=8, levels=3, tmp_abs_factor=2)
    ahead = time_slice(c, inputs, 0, 4)

    def predict(video, use_obs):
        _, state = model.apply(params, video, inputs, use_obs=use_obs, method="observe")
        rollouts, _ = model.apply(params, ahead, state=state, method="imagine")
        return model.apply(params, rollouts, method="decode").sum(), state

    gradient = jax.grad(lambda v: predict(v, None)[0])(video)
    assert np.all(np.abs(gradient).max(axis=(0, 2, 3, 4)) > 0)
    assert not np.any(jax.grad(lambda v: predict(v, "FFF")[0])(video))
    _, blind = predict(video, "TTF")
    _, other = predict(1 - video, "TTF")
    for a, b in zip(blind.levels[2], other.levels[2], strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(blind.levels[1].stoch, other.levels[1].stoch)


def test_open_loop_equals_observe_then_imagine_for_any_chunk():
    c, model, params, video, _ = make(T=20, levels=3, tmp_abs_factor=2, cell_reset_state=True)
    want = all_predictions(model, params, video, 8, 11, chunk=12)
    assert [x.shape[1] for x in want] == [8, 11]
    for chunk in 4, 8:
        got = all_predictions(model, params, video, 8, 11, chunk=chunk)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
    inputs = draw(c, jax.random.split(jax.random.key(0), 2), 19, context=8)
    rollouts, state = model.apply(params, video[:, :8], time_slice(c, inputs, 0, 8), method="observe")
    np.testing.assert_allclose(model.apply(params, rollouts, method="decode"), want.reconstruction, atol=1e-5)
    rollouts, _ = model.apply(params, time_slice(c, inputs, 8, 19), state=state, method="imagine")
    np.testing.assert_allclose(model.apply(params, rollouts, method="decode"), want.prediction, atol=1e-5)


@pytest.mark.parametrize("reset", [False, True])
def test_the_elbo_in_chunks_equals_the_elbo_of_the_whole(reset):
    c, model, params, video, _ = make(T=19, levels=3, tmp_abs_factor=2, cell_reset_state=reset)
    keys = jax.random.split(jax.random.key(3), 2)
    want, _ = model.apply(params, video, draw(c, keys, 19))
    for chunk in 4, 12, 20:
        got = rollout.elbo(model.module, params, video, keys, chunk)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5)


def test_imagining_after_an_unfinished_tick_is_refused():
    c, model, params, video, inputs = make(T=6, levels=3, tmp_abs_factor=2)
    _, state = model.apply(params, video, inputs, method="observe")
    with pytest.raises(ValueError, match="multiple of 4 frames"):
        model.apply(params, time_slice(c, inputs, 0, 2), state=state, method="imagine")


def test_uint8_videos_are_divided_by_255():
    c, model, params, _, inputs = make(T=4, levels=2, tmp_abs_factor=2)
    video = np.random.default_rng(0).integers(0, 256, (2, 4, 64, 64, 1), dtype=np.uint8)
    (a, _), (b, _) = (model.apply(params, v, inputs) for v in (video, (video / 255).astype(np.float32)))
    np.testing.assert_allclose(a.nll, b.nll, rtol=1e-6)


def test_noise_is_normal_and_depends_only_on_the_sequences_key():
    c = Config(**TINY)
    keys = jax.random.split(jax.random.key(0), 3)
    for whole, one in zip(draw(c, keys, 9), draw(c, keys[1:2], 9), strict=True):
        np.testing.assert_array_equal(whole.noise[1:2], one.noise)
    everything = np.concatenate([np.ravel(x.noise) for x in draw(c, jax.random.split(jax.random.key(0), 500), 9)])
    assert scipy.stats.kstest(everything, "norm").pvalue > 0.01
    assert len(np.unique(everything)) > 0.99 * len(everything)


def test_reset_patterns_alternate_below_the_top_level():
    c = Config(levels=3, tmp_abs_factor=2, cell_reset_state=True, open_loop_ctx=4)
    bottom, middle, top = keep_patterns(c, ticks(c, 10))
    assert middle.tolist() == [0, 1, 0, 1, 0]
    assert bottom.tolist() == [0, 1, 0, 1, 0, 0, 1, 0, 1, 0]
    assert top is None
    # Imagined frames begin a new pattern.
    bottom, middle, _ = (x.keep for x in draw(c, jax.random.split(jax.random.key(0), 1), 10, context=4))
    assert middle.tolist() == [0, 1, 0, 1, 0] and bottom.tolist() == [0, 1, 0, 1, 0, 1, 0, 0, 1, 0]


# ---------------------------------------------------------------------------------------------- objective


def test_kl_divergence_and_entropy_equal_sampled_estimates():
    random = np.random.default_rng(0)
    q = Gaussian(random.normal(size=3), random.uniform(0.3, 2, 3))
    p = Gaussian(random.normal(size=3), random.uniform(0.3, 2, 3))
    z = random.normal(q.mean, q.stddev, (1_000_000, 3))
    log_q, log_p = (scipy.stats.norm.logpdf(z, d.mean, d.stddev).sum(-1) for d in (q, p))
    estimate, error = (log_q - log_p).mean(), (log_q - log_p).std() / 1000
    assert float(cwvae.kl_divergence(q, p)) == pytest.approx(estimate, abs=4 * error)
    assert float(cwvae.kl_divergence(q, q)) == pytest.approx(0, abs=1e-6)
    assert float(cwvae.entropy(q)) == pytest.approx(scipy.stats.norm(q.mean, q.stddev).entropy().sum(), rel=1e-5)


def test_nll_equals_scipy():
    c, model, params, video, inputs = make(T=4, levels=2, tmp_abs_factor=2, dec_stddev=0.3)
    rollouts, _ = model.apply(params, video, inputs, method="observe")
    mean = np.asarray(model.apply(params, rollouts, method="decode"))
    want = -scipy.stats.norm.logpdf(video, mean, 0.3).sum((1, 2, 3, 4))
    np.testing.assert_allclose(model.apply(params, video, inputs)[0].nll, want, rtol=1e-5)


TERMS = {
    "nll": jnp.array([10.0, 20.0, 99.0]),
    "kl": jnp.array([[3.0, 5.0, 99.0], [0.5, 0.7, 99.0]]),
    "entropy_prior": jnp.zeros((2, 3)),
    "entropy_posterior": jnp.zeros((2, 3)),
}
TERMS = Terms(**TERMS, kl_prior=TERMS["kl"], kl_posterior=TERMS["kl"])
WEIGHT = jnp.array([1.0, 1.0, 0.0])  # means: nll 15, kl 4 and 0.6


@pytest.mark.parametrize(
    "options, kl",
    [
        ({}, 4.6),
        ({"beta": 0.5}, 2.3),
        ({"beta": [1, 10]}, 10),
        ({"free_nats": 1}, 3),
        ({"free_nats": 1, "beta": [0.5, 1]}, 1.5),
        ({"kl_grad_post_perc": 0.8}, 0.2 * 4 + 3.2 + 0.2 * 0.6 + 1),
        ({"kl_grad_post_perc": 0.0}, 4 + 1 + 0.6 + 1),
        ({"kl_grad_post_perc": 0.8, "free_nats": 2, "beta": 2}, 2 * 2),
    ],
)
def test_options_weight_the_terms_of_the_objective(options, kl):
    c = Config(levels=2, tmp_abs_factor=2, open_loop_ctx=2, **options)
    loss, metrics = cwvae.objective(c, TERMS, WEIGHT, frames=5)
    assert float(loss) == pytest.approx((15 + kl) / 5)
    assert float(metrics["kl_term"]) == pytest.approx(kl / 5)
    assert float(metrics["nll_term"]) == pytest.approx(3)
    assert float(metrics["avg_kl_prior_posterior__level_0"]) == pytest.approx(4 / 5)
    # The same over two devices with different numbers of examples.
    spread = jax.tree.map(
        lambda x: jnp.stack([jnp.pad(x[..., :1], [(0, 0)] * (x.ndim - 1) + [(0, 1)]), x[..., 1:]]), (TERMS, WEIGHT)
    )
    shares, _ = jax.vmap(lambda t, w: cwvae.objective(c, t, w, 5, "data"), axis_name="data")(*spread)
    assert float(shares.sum()) == pytest.approx(float(loss))


def test_kl_balancing_splits_the_gradient():
    """The posterior gets the share p, the prior 1 - p. The value is that of the plain KL."""
    p = 0.8
    plain, balanced = (Config(levels=1, kl_grad_post_perc=x) for x in (None, p))
    stats = jnp.array([0.3, 1.5]), jnp.array([-2.0, 0.4])

    def loss(c, q, prior):
        q, prior = Gaussian(q[:1], q[1:]), Gaussian(prior[:1], prior[1:])
        stop = jax.lax.stop_gradient
        kl = {"kl": (q, prior), "kl_prior": (stop(q), prior), "kl_posterior": (q, stop(prior))}
        terms = {name: cwvae.kl_divergence(*pair).reshape(1, 1) for name, pair in kl.items()}
        terms |= {"nll": jnp.zeros(1), "entropy_prior": jnp.zeros((1, 1)), "entropy_posterior": jnp.zeros((1, 1))}
        return cwvae.objective(c, Terms(**terms), jnp.ones(1), 1)[0]

    (a, (aq, ap)), (b, (bq, bp)) = (jax.value_and_grad(partial(loss, c), (0, 1))(*stats) for c in (plain, balanced))
    assert float(a) == pytest.approx(float(b)) and float(p * a) > 1
    np.testing.assert_allclose(bq, p * aq, rtol=1e-5)
    np.testing.assert_allclose(bp, (1 - p) * ap, rtol=1e-5)


def test_elbo_stops_the_gradients_of_kl_balancing():
    """kl_prior doesn't train the posterior's layers, and kl_posterior doesn't train the prior's."""
    c, model, params, video, inputs = make(T=4, levels=2, tmp_abs_factor=2)

    def gradient(name):
        return jax.grad(lambda p: getattr(model.apply(p, video, inputs)[0], name)[0].sum())(params)["params"]["cell_0"]

    prior, posterior, both = gradient("kl_prior"), gradient("kl_posterior"), gradient("kl")
    norm = lambda tree: sum(float(jnp.abs(x).sum()) for x in jax.tree.leaves(tree))  # noqa: E731
    assert (
        norm(posterior["prior_stats"]) == 0
        and norm(posterior["prior_hidden"]) == 0
        and norm(posterior["posterior_stats"]) > 0
    )
    assert norm(prior["prior_stats"]) > 0
    for a, b in zip(jax.tree.leaves(prior["prior_stats"]), jax.tree.leaves(both["prior_stats"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    for x, y, z in zip(*map(jax.tree.leaves, (prior, posterior, both)), strict=True):
        np.testing.assert_allclose(x + y, z, rtol=1e-3, atol=1e-4)


def test_a_model_is_hashable_for_jit():
    assert hash(CWVAE(Config(beta=(1, 2, 3)))) == hash(CWVAE(dataclasses.replace(Config(), beta=[1, 2, 3])))

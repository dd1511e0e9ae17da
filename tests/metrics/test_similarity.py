"""SSIM and PSNR against scikit-image."""

import warnings

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import tools
from metrics import similarity


def frames(kind, channels):
    random = np.random.default_rng(0)
    truth = random.uniform(size=(3, 64, 64, channels)).astype(np.float32)
    prediction = {
        "random": random.uniform(-0.2, 1.2, truth.shape),
        "noisy": truth + random.normal(size=truth.shape) * 0.05,
        "constant": np.full(truth.shape, 0.3),
        "shifted": np.roll(truth, 1, axis=2),
        "black": np.zeros(truth.shape),
    }[kind]
    if kind == "black":
        truth = np.ones_like(truth)
    return truth, prediction.astype(np.float32)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["random", "noisy", "constant", "shifted", "black"])
def test_metrics_equal_scikit_image(kind, channels):
    truth, prediction = frames(kind, channels)
    paper = similarity.frame_metrics(truth, prediction, "paper")
    standard = similarity.frame_metrics(truth, prediction, "standard")
    saved_truth, saved = (np.asarray(tools.to_uint8(x)) for x in (truth, prediction))
    for i in range(3):
        per_channel = [(truth[i, ..., c], prediction[i, ..., c]) for c in range(channels)]
        want = np.mean([structural_similarity(t, p, data_range=2) for t, p in per_channel])
        assert float(paper["ssim"][i]) == pytest.approx(want, abs=1e-5)
        want = structural_similarity(saved_truth[i], saved[i], channel_axis=-1)
        assert float(standard["ssim"][i]) == pytest.approx(want, abs=1e-5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            want = np.mean([peak_signal_noise_ratio(t, p, data_range=1) for t, p in per_channel])
            assert float(paper["psnr"][i]) == pytest.approx(want, abs=1e-4)
            assert float(standard["psnr"][i]) == pytest.approx(
                peak_signal_noise_ratio(saved_truth[i], saved[i]), abs=1e-4
            )


@pytest.mark.parametrize("inverted", [False, True])
def test_rounding_in_empty_backgrounds_is_small(inverted):
    """A digit is on black or on white. In a constant region, SSIM is a quotient of small differences."""
    truth, prediction = np.random.default_rng(0).integers(0, 4, (2, 3, 64, 64, 1), dtype=np.uint8)
    truth[:, 20:40, 20:40] = prediction[:, 21:41, 20:40] = 250
    if inverted:
        truth, prediction = 255 - truth, 255 - prediction
    got = np.asarray(similarity.frame_metrics(truth, prediction, "standard")["ssim"])
    want = [structural_similarity(a, b, channel_axis=-1) for a, b in zip(truth, prediction, strict=True)]
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_metrics_of_equal_frames_are_finite():
    truth, _ = frames("random", 1)
    for protocol in similarity.PROTOCOLS:
        metrics = similarity.frame_metrics(truth, truth, protocol)
        np.testing.assert_allclose(metrics["ssim"], 1, atol=1e-6)
        np.testing.assert_allclose(metrics["psnr"], 100)


def test_metrics_of_8_bits_equal_those_of_their_floats():
    """Saved frames give the same standard metrics again. A still frame gives those of its repetition."""
    truth, prediction = (np.asarray(tools.to_uint8(x)) for x in frames("noisy", 3))
    for protocol in similarity.PROTOCOLS:
        saved = similarity.frame_metrics(truth, prediction, protocol)
        for name, values in similarity.frame_metrics(truth, prediction / np.float32(255), protocol).items():
            np.testing.assert_allclose(saved[name], values, rtol=1e-5)
        still, repeated = (
            similarity.frame_metrics(truth, x, protocol) for x in (prediction[:1], prediction[[0, 0, 0]])
        )
        for name in saved:
            np.testing.assert_allclose(still[name], repeated[name], rtol=1e-5)

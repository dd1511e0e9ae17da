"""Averages of examples' curves, with confidence intervals."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

DISTANCES = (10, 50, 100, 200, 400, 1000)
"""Numbers of first predicted frames over which averages are reported, if there are so many."""

REFERENCES = {
    "posterior": "posterior reconstruction",
    "copy": "last context frame",
    "random": "random training frame",
    "shuffled": "shuffled actions",
}
"""The references with which predictions are compared.

posterior: the model's reconstruction of the frames, from a posterior that sees them; an upper bound. copy: the last
context frame, repeated. random: a random training frame at each step, the quality of a prediction that has lost the
video (the paper's Figure 1). shuffled, for models with actions: a prediction with the actions after the context in
random order; its lower quality shows what the actions tell the model.
"""


METRICS = {"ssim": "SSIM", "psnr": "PSNR (dB)"}
"""The metrics of each protocol."""

PERCEPTUAL = {"lpips": "LPIPS", "fvd": "FVD"}
"""The metrics by a network from a file. They don't depend on the protocol, and lower is better."""

PERCEPTUAL_NOTE = "Computed on frames as saved, with 8 bits. Lower is better. FVD uses one sample of each sequence."

LOWER_IS_BETTER = frozenset(PERCEPTUAL)

NAMES = METRICS | PERCEPTUAL
DIGITS = {"ssim": 4, "psnr": 2, "lpips": 4, "fvd": 1}

FEW_CLIPS = 256
"""With fewer clips than this, FVD depends mainly on their number: it is biased, more so with fewer clips."""


def goodness(metric: str, values: Any) -> Any:
    """Return the values of a metric, negated if lower is better."""
    return -values if metric in LOWER_IS_BETTER else values


def estimate(values: np.ndarray, resamples: int = 1000) -> dict[str, np.ndarray]:
    """Return averages over examples [N, ...] with 95 % confidence intervals.

    The intervals are percentiles of a bootstrap over the examples. Its seed is fixed, so each call draws the same
    resamples. The interval of a single example has no extent.

    Returns:
        "value", "low" and "high", [...] each.
    """
    N = len(values)
    draws = np.random.default_rng(0).multinomial(N, np.full(N, 1 / N), size=resamples) / N  # [resamples, N]
    means = np.tensordot(draws, values, axes=1)
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return {"value": values.mean(0), "low": low, "high": high}


def estimate_over_seeds(
    values: np.ndarray, minus: np.ndarray | None = None, resamples: int = 1000
) -> dict[str, np.ndarray]:
    """Return averages over seeds and examples [S, N, ...] with 95 % confidence intervals.

    The intervals are percentiles of a bootstrap that draws seeds and examples. All seeds and both models have the same
    drawn examples. With few seeds, the intervals are too narrow.

    Args:
        values: of a model.
        minus: of another model, [S', N, ...]; the averages are then differences of the two models.
        resamples: the number of resamples.

    Returns:
        "value", "low" and "high", [...] each.
    """
    random = np.random.default_rng(0)

    def shares(count: int) -> np.ndarray:
        return random.multinomial(count, np.full(count, 1 / count), size=resamples) / count

    example_shares = shares(values.shape[1])  # [resamples, N]

    def means(values: np.ndarray) -> np.ndarray:
        each_seed = np.tensordot(example_shares, values, axes=(1, 1))  # [resamples, S, ...]
        return np.einsum("rs,rs...->r...", shares(len(values)), each_seed)

    value, drawn = values.mean((0, 1)), means(values)
    if minus is not None:
        value, drawn = value - minus.mean((0, 1)), drawn - means(minus)
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    return {"value": value, "low": low, "high": high}


def summary(curves: np.ndarray, estimate: Callable[[np.ndarray], dict[str, np.ndarray]] = estimate) -> dict[str, Any]:
    """Return what is reported of a line, ready for JSON.

    Args:
        curves: over the predicted frames of each example, [N, T], or of several seeds, [S, N, T].
        estimate: `estimate`, or `estimate_over_seeds` for several seeds.

    Returns:
        "average": over all frames; "first": d -> over the first d frames, for DISTANCES; "curve": at each frame, as in
        the paper's Figure 1. Each has "value", "low" and "high".
    """
    T = curves.shape[-1]
    distances = [d for d in DISTANCES if d <= T]
    means = curves.cumsum(-1) / np.arange(1, T + 1)
    return {
        "average": plain(estimate(means[..., -1])),
        "first": {str(d): plain(estimate(means[..., d - 1])) for d in distances},
        "curve": plain(estimate(curves)),
    }


def plain(tree: Any) -> Any:
    """Return a tree for JSON: arrays as lists, and numbers with six significant digits."""
    if isinstance(tree, Mapping):
        return {key: plain(value) for key, value in tree.items()}
    if isinstance(tree, np.ndarray) and tree.ndim:
        return [plain(value) for value in tree]
    return float(f"{tree:.6g}")

"""Curves of single examples -> averages with confidence intervals."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

DISTANCES = (10, 50, 100, 200, 400, 1000)
"""Averages over the first so many predicted frames are reported, as far as there are so many."""

REFERENCES = {
    "posterior": "posterior reconstruction",
    "copy": "last context frame",
    "random": "random training frame",
    "shuffled": "shuffled actions",
}
"""What predictions are compared with. posterior: the model's reconstruction of the very frames that are to be
predicted, from a posterior that sees them: its upper bound. copy: the last context frame, forever. random: another
training frame at each step, the quality of a prediction that has lost the video (the paper's Figure 1). shuffled: the
model's prediction under the actions after the context in another order, where it takes actions: what it is worse by,
actions tell."""


METRICS = {"ssim": "SSIM", "psnr": "PSNR (dB)"}
"""What is measured in each protocol."""

PERCEPTUAL = {"lpips": "LPIPS", "fvd": "FVD"}
"""What is measured with a network's file, of frames as saved: no matter of a protocol, and lower is better."""

PERCEPTION = "Of frames as saved, with 8 bits. Lower is better. FVD is of one sample of each sequence."

NAMES = METRICS | PERCEPTUAL
DIGITS = {"ssim": 4, "psnr": 2, "lpips": 4, "fvd": 1}

FEW_CLIPS = 256
"""Of fewer clips than this, an FVD is mainly one of their number: it is biased, the more so the fewer there are."""


def goodness(metric: str, values: Any) -> Any:
    """Return values of a metric so that higher ones are better."""
    return -values if metric in PERCEPTUAL else values


def estimate(values: np.ndarray, resamples: int = 1000) -> dict[str, np.ndarray]:
    """Return averages over examples [N, ...] with 95 % confidence intervals.

    These are percentiles of a bootstrap over the examples. Each call draws the same resamples, from a fixed seed.
    The interval of a single example has no extent.

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
    """Return averages over seeds and examples [S, N, ...], or their difference from those of another model, with 95 %
    intervals.

    These are percentiles of a bootstrap over both: seeds and, for all seeds and both models alike, examples are drawn.
    Of few seeds it says too little: intervals are then too narrow.

    Returns:
        "value", "low" and "high", [...] each.
    """
    random = np.random.default_rng(0)

    def shares(count: int) -> np.ndarray:
        return random.multinomial(count, np.full(count, 1 / count), size=resamples) / count

    of_examples = shares(values.shape[1])  # [resamples, N]

    def means(values: np.ndarray) -> np.ndarray:
        each_seed = np.tensordot(of_examples, values, axes=(1, 1))  # [resamples, S, ...]
        return np.einsum("rs,rs...->r...", shares(len(values)), each_seed)

    value, drawn = values.mean((0, 1)), means(values)
    if minus is not None:
        value, drawn = value - minus.mean((0, 1)), drawn - means(minus)
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    return {"value": value, "low": low, "high": high}


def summary(curves: np.ndarray, estimate: Callable[[np.ndarray], dict[str, np.ndarray]] = estimate) -> dict[str, Any]:
    """Return what is reported of one line, from the examples' curves over predicted frames [N, T], of several seeds
    [S, N, T].

    Returns:
        "average": over all frames; "first": over the first d frames, by d of DISTANCES; "curve": at each frame (what
        the paper's Figure 1 shows). Each with "value", "low" and "high", ready for JSON.
    """
    T = curves.shape[-1]
    distances = [d for d in DISTANCES if d <= T]
    until = curves.cumsum(-1) / np.arange(1, T + 1)
    return {
        "average": plain(estimate(until[..., -1])),
        "first": {str(d): plain(estimate(until[..., d - 1])) for d in distances},
        "curve": plain(estimate(curves)),
    }


def plain(tree: Any) -> Any:
    """Return a tree with arrays as lists and numbers of six digits."""
    if isinstance(tree, Mapping):
        return {key: plain(value) for key, value in tree.items()}
    if isinstance(tree, np.ndarray) and tree.ndim:
        return [plain(value) for value in tree]
    return float(f"{tree:.6g}")

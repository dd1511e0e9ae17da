"""LPIPS and FVD: predictions as networks see them, whose TorchScript files the user has.

LPIPS (Zhang et al. 2018) is a distance of two frames, FVD (Unterthiner et al. 2018) one of two sets of clips. For both,
lower is better, and both are of frames as saved, with 8 bits.
"""

import hashlib
import io
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
from tqdm import tqdm

import tools
from config import ConfigError, Flag
from report.results import load_frames
from report.statistics import FEW_CLIPS, plain

LPIPS_FLAG = Flag(
    "FILE", "TorchScript file of LPIPS's network (vgg16.pt); measures it, too (needs requirements-perceptual.txt)"
)
FVD_FLAG = Flag(
    "FILE",
    "TorchScript file of FVD's network (i3d_torchscript.pt); measures it, too",
)

SHORT = 16
"""The fewest frames of a clip for FVD. Of longer predictions, it is measured on their first 16 frames, too."""

FEATURES = 400
"""Of a clip, by the I3D network: what it says of each class of Kinetics-400, before the softmax."""


class Network(NamedTuple):
    """What a file's network computes.

    lpips: (truth, prediction), uint8 [N, H, W, C] each -> distances [N].
    fvd: clips uint8 [N, T, H, W, C] -> features [N, 400].
    """

    file: str
    sha256: str
    apply: Callable[..., np.ndarray]


class Networks(NamedTuple):
    lpips: Network | None = None
    fvd: Network | None = None


# ---------------------------------------------------------------------------------------------- networks from files


def load(lpips: Path | None, fvd: Path | None, frames: int, clips: int) -> Networks:
    """Load the networks of the files that are given, and try them on black frames.

    Args:
        lpips: file of a network that is called as `network(images, resize_images=False, return_lpips=True)`. Of images
            float32 [N, 3, H, W] from 0 to 255 it returns vectors, whose squared distance is the LPIPS.
        fvd: file of a network that is called as `network(clips, rescale=True, resize=True, return_features=True)`. Of
            clips float32 [N, 3, T, H, W] from 0 to 255 it returns 400 features.
        frames: predicted frames of a sequence.
        clips: how many sequences there are.

    Raises:
        ConfigError: PyTorch, or a file, is missing, or isn't what is said above; or FVD lacks frames or clips.
    """
    if fvd is not None and (frames < SHORT or clips < 2):
        raise ConfigError(
            f"fvd: needs at least {SHORT} predicted frames of at least 2 sequences, got {frames} of {clips}; raise "
            "--eval_seq_len or --num_examples, or leave out --fvd"
        )
    return Networks(load_lpips(lpips) if lpips else None, load_fvd(fvd) if fvd else None)


def load_lpips(path: Path) -> Network:
    sha256, network = load_torchscript("lpips", path, dict(resize_images=False, return_lpips=True))

    def distances(truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
        a, b = (network(np.moveaxis(tools.rgb(frames), -1, 1)) for frames in (truth, prediction))
        return (a - b).square().sum(1).cpu().numpy()

    frame = np.zeros((1, 64, 64, 3), np.uint8)
    distances(frame, frame)
    return Network(path.name, sha256, distances)


def load_fvd(path: Path) -> Network:
    sha256, network = load_torchscript("fvd", path, dict(rescale=True, resize=True, return_features=True))

    def features(clips: np.ndarray) -> np.ndarray:
        return network(np.moveaxis(tools.rgb(clips), -1, 1)).double().cpu().numpy()

    if (count := features(np.zeros((1, SHORT, 64, 64, 3), np.uint8)).shape[1]) != FEATURES:
        raise ConfigError(
            f"fvd: {path} returns {count} features of a clip, not {FEATURES}; name the I3D network's file"
        )
    return Network(path.name, sha256, features)


def load_torchscript(key: str, path: Path, options: Mapping[str, bool]) -> tuple[str, Callable[[np.ndarray], Any]]:
    """Return a file's SHA-256, and its network: uint8 [N, ...] -> float32 tensor [N, F]. On a GPU, if there is one.

    Raises:
        ConfigError: now or in a call, in one line.
    """
    try:
        import torch
    except ImportError as error:
        raise ConfigError(
            f"{key}: PyTorch can't be imported ({said(error)}); pip install -r requirements-perceptual.txt"
        ) from None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{key}: {path} can't be read ({error.strerror}); name a TorchScript file") from None
    try:
        module = torch.jit.load(io.BytesIO(content), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"{key}: {path} isn't a TorchScript file ({said(error)})") from None
    call = f"({', '.join(f'{name}={value}' for name, value in options.items())})"

    def network(pixels: np.ndarray) -> Any:
        try:
            with torch.no_grad():
                found = module(torch.from_numpy(np.ascontiguousarray(pixels)).to(device).float(), **options)
        except (RuntimeError, torch.jit.Error) as error:
            raise ConfigError(f"{key}: {path} can't be called with {call}: {said(error)}") from None
        shape = list(getattr(found, "shape", []))
        if len(shape) != 2 or shape[0] != len(pixels):
            raise ConfigError(
                f"{key}: {path}, called with {call}, must return a vector for each of {len(pixels)} inputs, got "
                f"{shape or type(found).__name__}"
            )
        if not found.isfinite().all():
            raise ConfigError(f"{key}: {path} returns values that aren't finite; name another file")
        return found

    return hashlib.sha256(content).hexdigest(), network


def said(error: Exception) -> str:
    """Return what an error says in a sentence, without the trace through the network that PyTorch adds."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = lines[-1] if "Traceback of TorchScript" in str(error) else lines[0]
    return line.strip().partition(". ")[0]


# ---------------------------------------------------------------------------------------------- what they measure


def lpips(network: Network, truth: np.ndarray, prediction: np.ndarray, batch: int = 64) -> np.ndarray:
    """Return the LPIPS of each frame: uint8 [..., H, W, C] twice -> float32 [...]."""
    *leading, H, W, C = truth.shape
    a, b = (frames.reshape(-1, H, W, C) for frames in (truth, prediction))
    parts = [network.apply(a[i : i + batch], b[i : i + batch]) for i in range(0, len(a), batch)]
    return np.concatenate(parts).reshape(leading).astype(np.float32)


def measure_fvd(network: Network, directory: Path, count: int) -> dict[str, Any]:
    """Return what is told of an evaluation's FVD, from its saved frames.

    Each sequence is a clip: the frames after its context, as they are and as they are in its first sample. There are as
    many real clips as predicted ones, and the real ones are the continuations of the very contexts that the model saw.

    Returns:
        "clips": how many; "frames": number of frames -> FVD, of the first 16 ones and of all.
    """
    features: dict[tuple[str, int], list[np.ndarray]] = {}
    for number in progress(range(count), "FVD"):
        for name in "gt_pred", "random_sample_1":
            video = load_frames(directory, number, name)
            for length in sorted({SHORT, len(video)}):
                features.setdefault((name, length), []).append(network.apply(video[None, :length])[0])
    lengths = [length for name, length in features if name == "gt_pred"]
    values = {
        str(length): frechet_distance(*(np.stack(features[name, length]) for name in ("gt_pred", "random_sample_1")))
        for length in lengths
    }
    return {"clips": len(features["gt_pred", SHORT]), "frames": plain({k: np.float64(v) for k, v in values.items()})}


def progress(numbers: Iterable[int], metric: str) -> Iterable[int]:
    """Show the progress over sequences on the terminal; in a log, a line every half a minute."""
    return tqdm(
        numbers,
        desc=metric,
        unit="sequence",
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return the Fréchet distance of Gaussians with the means and sample covariances of features [N, F], [M, F]."""
    (mean_a, cov_a), (mean_b, cov_b) = (
        (x.mean(0), np.atleast_2d(np.cov(x, rowvar=False))) for x in (a.astype(np.float64), b.astype(np.float64))
    )
    return gaussian_distance(mean_a, cov_a, mean_b, cov_b)


def gaussian_distance(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """Return |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), the squared 2-Wasserstein distance.

    The product's root has the trace of that of the symmetric cov_a^(1/2) cov_b cov_a^(1/2). Its eigenvalues are real
    and not negative, also where there are fewer clips than features and no covariance can be inverted.
    """
    values, vectors = scipy.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    product = scipy.linalg.eigvalsh(root @ cov_b @ root)
    trace = np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(np.maximum(product, 0)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + trace)


def measured(networks: Networks, directory: Path, count: int) -> dict[str, Any]:
    """Measure the FVD, if its network is given, and return what `metrics.json` says of both metrics.

    Args:
        networks: those that were given.
        directory: an evaluation's, of `count` sequences.
        count: how many sequences there are.

    Returns:
        metric -> "file", "sha256"; for FVD also what `measure_fvd` returns.
    """
    found: dict[str, Any] = {
        metric: {"file": network.file, "sha256": network.sha256}
        for metric, network in networks._asdict().items()
        if network
    }
    if networks.fvd:
        found["fvd"] |= measure_fvd(networks.fvd, directory, count)
        if count < FEW_CLIPS:
            print(
                f"Warning: FVD of {count} clips. Of fewer than {FEW_CLIPS} it is much too high, and can only be "
                "compared with that of the same sequences."
            )
    return found

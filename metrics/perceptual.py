"""LPIPS and FVD, by networks from TorchScript files that the user provides.

LPIPS (Zhang et al. 2018) is a distance between two frames, FVD (Unterthiner et al. 2018) between two sets of clips.
Lower is better for both. Both are computed on frames as saved, with 8 bits.
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
    "FILE", "TorchScript file of LPIPS's network (vgg16.pt): measure LPIPS, too (needs requirements-perceptual.txt)"
)
FVD_FLAG = Flag(
    "FILE",
    "TorchScript file of FVD's network (i3d_torchscript.pt): measure FVD, too (needs requirements-perceptual.txt)",
)

MIN_FRAMES = 16
"""The fewest frames of a clip for FVD. For longer predictions, FVD is also measured on the first 16 frames."""

FEATURE_SIZE = 400
"""The features of a clip by the I3D network: its logits of the classes of Kinetics-400."""


class Network(NamedTuple):
    """A network from a file, with what `apply` computes.

    LPIPS: truth and prediction, uint8 [N, H, W, C] each -> distances [N].
    FVD: clips, uint8 [N, T, H, W, C] -> features [N, 400].
    """

    file: str
    sha256: str
    apply: Callable[..., np.ndarray]


class Networks(NamedTuple):
    """The networks of the metrics that are asked for."""

    lpips: Network | None
    fvd: Network | None


# ---------------------------------------------------------------------------------------------- networks from files


def load(lpips: Path | None, fvd: Path | None, frames: int, clips: int) -> Networks:
    """Load the networks from their files, and try each on black frames.

    Args:
        lpips: the file of a network with the call `network(images, resize_images=False, return_lpips=True)`. For
            images float32 [N, 3, H, W] from 0 to 255, it returns vectors [N, F]. LPIPS is the squared distance between
            two images' vectors.
        fvd: the file of a network with the call `network(clips, rescale=True, resize=True, return_features=True)`. For
            clips float32 [N, 3, T, H, W] from 0 to 255, it returns features [N, 400].
        frames: the number of predicted frames of a sequence.
        clips: the number of sequences.

    Raises:
        ConfigError: PyTorch or a file is missing, a network doesn't work as above, or there are too few frames or
            clips for FVD.
    """
    if fvd is not None and (frames < MIN_FRAMES or clips < 2):
        raise ConfigError(
            f"fvd: needs at least {MIN_FRAMES} predicted frames of at least 2 sequences, got {frames} of {clips}; "
            "raise --eval_seq_len or --num_examples, or leave out --fvd"
        )
    return Networks(load_lpips(lpips) if lpips else None, load_fvd(fvd) if fvd else None)


def load_lpips(path: Path) -> Network:
    """Load the network of LPIPS; raise ConfigError as `load_torchscript`."""
    sha256, network = load_torchscript("lpips", path, dict(resize_images=False, return_lpips=True))

    def distances(truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
        a, b = (network(np.moveaxis(tools.rgb(frames), -1, 1)) for frames in (truth, prediction))
        return (a - b).square().sum(1).cpu().numpy()

    frame = np.zeros((1, 64, 64, 3), np.uint8)
    distances(frame, frame)
    return Network(path.name, sha256, distances)


def load_fvd(path: Path) -> Network:
    """Load the network of FVD; raise ConfigError as `load_torchscript`, or if it isn't I3D."""
    sha256, network = load_torchscript("fvd", path, dict(rescale=True, resize=True, return_features=True))

    def features(clips: np.ndarray) -> np.ndarray:
        return network(np.moveaxis(tools.rgb(clips), -1, 1)).double().cpu().numpy()

    if (count := features(np.zeros((1, MIN_FRAMES, 64, 64, 3), np.uint8)).shape[1]) != FEATURE_SIZE:
        raise ConfigError(
            f"fvd: {path} returns {count} features of a clip, not {FEATURE_SIZE}; name the I3D network's file"
        )
    return Network(path.name, sha256, features)


def load_torchscript(key: str, path: Path, options: Mapping[str, bool]) -> tuple[str, Callable[[np.ndarray], Any]]:
    """Return the SHA-256 of a file and its network, uint8 [N, ...] -> float32 tensor [N, F].

    The network runs on a GPU, if there is one.

    Args:
        key: the metric's flag, for messages.
        path: the file.
        options: keyword arguments of each call.

    Raises:
        ConfigError: PyTorch or the file can't be used. Also raised by a call that fails.
    """
    try:
        import torch
    except ImportError as error:
        raise ConfigError(
            f"{key}: PyTorch can't be imported ({error_text(error)}); pip install -r requirements-perceptual.txt"
        ) from None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{key}: {path} can't be read ({error.strerror}); name a TorchScript file") from None
    try:
        module = torch.jit.load(io.BytesIO(content), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"{key}: {path} isn't a TorchScript file ({error_text(error)}); name another file") from None
    call = f"({', '.join(f'{name}={value}' for name, value in options.items())})"

    def network(pixels: np.ndarray) -> Any:
        try:
            with torch.no_grad():
                found = module(torch.from_numpy(np.ascontiguousarray(pixels)).to(device).float(), **options)
        except (RuntimeError, torch.jit.Error) as error:
            raise ConfigError(f"{key}: {path} can't be called with {call}: {error_text(error)}") from None
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


def error_text(error: Exception) -> str:
    """Return the first sentence of an error, without the trace through the network that PyTorch adds."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = lines[-1] if "Traceback of TorchScript" in str(error) else lines[0]
    return line.strip().partition(". ")[0]


# ---------------------------------------------------------------------------------------------- metrics


def lpips(network: Network, truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Return the LPIPS of each frame, for truth and prediction uint8 [..., H, W, C] -> float32 [...]."""
    *leading, H, W, C = truth.shape
    a, b = (frames.reshape(-1, H, W, C) for frames in (truth, prediction))
    distances = [network.apply(a[i : i + 64], b[i : i + 64]) for i in range(0, len(a), 64)]
    return np.concatenate(distances).reshape(leading).astype(np.float32)


def compute_fvd(network: Network, directory: Path, count: int) -> dict[str, Any]:
    """Return the FVD of an evaluation of `count` sequences, from its saved frames.

    Each sequence gives a real clip, the true frames after its context, and a predicted clip, those of its first sample.

    Returns:
        "clips": the number of clips; "frames": number of frames -> FVD, for the first 16 frames and for all.
    """
    features: dict[tuple[str, int], list[np.ndarray]] = {}
    for number in progress(range(count), "FVD"):
        for name in "gt_pred", "random_sample_1":
            video = load_frames(directory, number, name)
            for length in sorted({MIN_FRAMES, len(video)}):
                features.setdefault((name, length), []).append(network.apply(video[None, :length])[0])
    lengths = [length for name, length in features if name == "gt_pred"]
    values = {
        str(length): frechet_distance(*(np.stack(features[name, length]) for name in ("gt_pred", "random_sample_1")))
        for length in lengths
    }
    return {
        "clips": len(features["gt_pred", MIN_FRAMES]),
        "frames": plain({k: np.float64(v) for k, v in values.items()}),
    }


def progress(numbers: Iterable[int], metric: str) -> Iterable[int]:
    """Yield the numbers of sequences, and show the progress; in a log, a line every half a minute."""
    return tqdm(
        numbers,
        desc=metric,
        unit="sequence",
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return the Fréchet distance between two sets of features, [N, F] and [M, F].

    It is the distance of Gaussians with their means and sample covariances.
    """
    (mean_a, cov_a), (mean_b, cov_b) = (
        (x.mean(0), np.atleast_2d(np.cov(x, rowvar=False))) for x in (a.astype(np.float64), b.astype(np.float64))
    )
    return gaussian_distance(mean_a, cov_a, mean_b, cov_b)


def gaussian_distance(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """Return |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), the squared 2-Wasserstein distance.

    The trace of the root of cov_a cov_b equals that of the root of the symmetric cov_a^(1/2) cov_b cov_a^(1/2), whose
    eigenvalues are real and not negative. This also holds for singular covariances, of fewer clips than features.
    """
    values, vectors = scipy.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    product = scipy.linalg.eigvalsh(root @ cov_b @ root)
    trace = np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(np.maximum(product, 0)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + trace)


def summarise(networks: Networks, directory: Path, count: int) -> dict[str, Any]:
    """Return the entry of `metrics.json` for LPIPS and FVD; compute FVD, if its network is given.

    Args:
        networks: the networks of the metrics that are asked for.
        directory: the directory of the evaluation.
        count: the number of sequences.

    Returns:
        metric -> "file" and "sha256" of its network, for FVD also what `compute_fvd` returns.
    """
    found: dict[str, Any] = {
        metric: {"file": network.file, "sha256": network.sha256}
        for metric, network in networks._asdict().items()
        if network
    }
    if networks.fvd:
        found["fvd"] |= compute_fvd(networks.fvd, directory, count)
        if count < FEW_CLIPS:
            print(
                f"Warning: FVD of {count} clips. With fewer than {FEW_CLIPS} clips it is much too high; compare it "
                "only with FVD of the same sequences."
            )
    return found

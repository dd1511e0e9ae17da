"""What training and evaluation share: image metrics and logs."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax import Array

from config import Config

# ---------------------------------------------------------------------------------------------- metrics

PROTOCOLS = {
    "paper": "SSIM with data range 2; PSNR with data range 1 per channel, then averaged; predictions as they are",
    "standard": "SSIM with data range 1; PSNR with data range 1, over all channels; predictions clipped to [0, 1]",
}
"""How predictions are compared with the truth. Figures of different protocols can't be compared.

paper is what both earlier codes computed, with scikit-image 0.18. In both protocols, SSIM is per channel with a uniform
7x7 window and sample covariance.
"""

PSNR_OF_EQUAL_FRAMES = 100.0
"""Bounds the PSNR, which is infinite for a frame that equals the truth, to keep averages finite."""


def frame_metrics(truth: Array, prediction: Array, protocol: str) -> dict[str, Array]:
    """SSIM and PSNR (in dB) of each frame.

    Args:
        truth: [..., H, W, C] floats in [0, 1].
        prediction: likewise, but may leave [0, 1].
        protocol: one of PROTOCOLS.

    Returns:
        "ssim" and "psnr", [...] each.
    """
    assert protocol in PROTOCOLS, protocol
    if protocol == "standard":
        prediction = prediction.clip(0, 1)
    ssim = structural_similarity(truth, prediction, data_range=2.0 if protocol == "paper" else 1.0).mean(-1)
    error = ((truth - prediction) ** 2).mean((-3, -2))
    error = error if protocol == "paper" else error.mean(-1, keepdims=True)
    psnr = -10 * jnp.log10(jnp.maximum(error, 10 ** (-PSNR_OF_EQUAL_FRAMES / 10)))
    return {"ssim": ssim, "psnr": psnr.mean(-1)}


def structural_similarity(a: Array, b: Array, data_range: float, window: int = 7) -> Array:
    """SSIM per channel, [..., H, W, C] -> [..., C], as scikit-image's `structural_similarity` with its defaults."""
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    pixels = window**2

    def window_mean(x: Array) -> Array:
        """Over each window that lies within the frame: a matmul with a band matrix along each axis."""
        rows, columns = (
            (jnp.tri(size - window + 1, size, window - 1) - jnp.tri(size - window + 1, size, -1)) / window
            for size in x.shape[-3:-1]
        )
        return jnp.einsum("ph,...hwc,qw->...pqc", rows, x, columns, precision="highest")

    # Variances don't change when a constant is subtracted, but their rounding errors shrink.
    mean_a, mean_b = window_mean(a - 0.5), window_mean(b - 0.5)
    sample = pixels / (pixels - 1)
    var_a = sample * (window_mean((a - 0.5) ** 2) - mean_a**2)
    var_b = sample * (window_mean((b - 0.5) ** 2) - mean_b**2)
    covariance = sample * (window_mean((a - 0.5) * (b - 0.5)) - mean_a * mean_b)
    mean_a, mean_b = mean_a + 0.5, mean_b + 0.5
    similarity = (
        (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    )
    return similarity.mean((-3, -2))


def to_uint8(video: Array) -> Array:
    """Floats, clipped to [0, 1], as uint8; truncated like in the earlier codes."""
    return (jnp.clip(video, 0, 1) * 255).astype(jnp.uint8)


# ---------------------------------------------------------------------------------------------- logs


class Log:
    """Metrics to `metrics.jsonl`, one line per log, and to wandb where it runs. Neither's failure stops training."""

    def __init__(self, directory: Path, step: int, wandb_run: Any | None):
        """Opens the log of a run that stands at `step`; drops lines of later steps, which will come again."""
        self.path = directory / "metrics.jsonl"
        self.wandb_run = wandb_run
        self.unwritten: list[str] = []
        if self.path.exists():
            lines = [line for line in self.path.read_text().splitlines(keepends=True) if before(line, step)]
            replace_file(self.path, "".join(lines).encode())

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self.unwritten.append(json.dumps({"step": step, **values}) + "\n")
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a") as file:
                file.write("".join(self.unwritten))
            self.unwritten.clear()
        except OSError as error:  # disk full: these lines go with the next ones
            os.truncate(self.path, size)
            print(f"Warning: {self.path} couldn't be written ({error.strerror}); training goes on")
        self._to_wandb(dict(values), step)

    def gif(self, step: int, name: str, path: Path) -> None:
        if self.wandb_run is not None:
            import wandb

            self._to_wandb({name: wandb.Video(str(path), format="gif")}, step)

    def _to_wandb(self, values: dict[str, Any], step: int) -> None:
        if self.wandb_run is None:
            return
        try:
            self.wandb_run.log(values, step=step)
        except Exception as error:  # whatever happens there
            print(f"Warning: wandb failed ({' '.join(str(error).split())}); training goes on without it")
            self.wandb_run = None


def finish(wandb_run: Any | None) -> Callable[..., None]:
    """For an ExitStack: ends the wandb run as finished, or after an exception as failed."""

    def exit(error: Any, *_: Any) -> None:
        if wandb_run is not None:
            wandb_run.finish(exit_code=0 if error is None else 1)

    return exit


def before(line: str, step: int) -> bool:
    """Whether a line of `metrics.jsonl` is whole and of no later step."""
    try:
        return line.endswith("\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file such that at any time the old or the new one is there, whole."""
    aside = path.with_name(path.name + ".new")
    aside.write_bytes(content)
    os.replace(aside, path)


def start_wandb(config: Config, directory: Callable[[Config], Path]) -> tuple[Config, Any | None]:
    """Starts a wandb run, or continues the one of the run directory; a sweep's values replace the configuration's.

    Without a login, `auto` runs offline and says so: nobody is asked for a key. WANDB_MODE, if set, decides for `auto`.

    Args:
        config: the configuration so far.
        directory: the run directory of a configuration.

    Returns:
        The configuration with the sweep's values, and the run, or None where wandb is disabled.

    Raises:
        ConfigError: a sweep's key or value can't work.
    """
    mode: Any = config.wandb if config.wandb != "auto" else os.environ.get("WANDB_MODE", "auto")
    if mode == "disabled":
        return config, None
    import wandb  # slow to import

    if mode == "auto":
        try:
            mode = "online" if wandb.login(prompt=False) else "offline"
            reason = "no API key is configured"
        except wandb.Error as error:
            mode, reason = "offline", " ".join(str(error).split())
        if mode == "offline":
            print(f"wandb: offline, since {reason}; `wandb login` before a run, or `wandb sync` after it, uploads it")
    saved_id = directory(config) / "wandb_id"
    Path(config.logdir).mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project="cwvae",
        mode=mode,
        dir=config.logdir,
        config=dataclasses.asdict(config),
        id=saved_id.read_text() if saved_id.exists() and "WANDB_RUN_ID" not in os.environ else None,
        resume="allow",
        settings=wandb.Settings(silent=True),
    )
    config = config.updated(dict(run.config), "wandb")
    run.name = config.run_name
    directory(config).mkdir(parents=True, exist_ok=True)
    (directory(config) / "wandb_id").write_text(run.id)
    return config, run

"""What training and evaluation share: image metrics, logs and checkpoints."""

import dataclasses
import functools
import json
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from config import Config, ConfigError

# ---------------------------------------------------------------------------------------------- metrics

PROTOCOLS = ("paper", "standard")
"""How predictions are compared with the truth. Figures of different protocols can't be compared.

paper: what both earlier codes computed with scikit-image 0.18: predictions as they are, SSIM with data range 2, PSNR
with data
    range 1 per channel, then averaged.
standard: predictions clipped to [0, 1], data range 1, PSNR over all channels together.
Both: SSIM per channel with a uniform 7x7 window and sample covariance.
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
        """Over each window that lies within the frame."""
        for axis in (-3, -2):
            places = x.shape[axis] - window + 1
            shifted = [jax.lax.slice_in_dim(x, i, i + places, axis=x.ndim + axis) for i in range(window)]
            x = functools.reduce(jnp.add, shifted)
        return x / pixels

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
    """Metrics to `metrics.jsonl`, one line per log, and to wandb where it runs."""

    def __init__(self, directory: Path, step: int, wandb_run: Any | None):
        """Opens the log of a run that stands at `step`; drops lines of later steps, which will come again."""
        self.path = directory / "metrics.jsonl"
        self.wandb_run = wandb_run
        if self.path.exists():
            lines = [line for line in self.path.read_text().splitlines(keepends=True) if before(line, step)]
            replace_file(self.path, "".join(lines).encode())
        self.file = self.path.open("a")

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        if self.wandb_run is not None:
            self.wandb_run.log(dict(values), step=step)

    def gif(self, step: int, name: str, path: Path) -> None:
        if self.wandb_run is not None:
            import wandb

            self.wandb_run.log({name: wandb.Video(str(path), format="gif")}, step=step)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, error: Any, *_: Any) -> None:
        self.file.close()
        if self.wandb_run is not None:
            self.wandb_run.finish(exit_code=0 if error is None else 1)


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


# ---------------------------------------------------------------------------------------------- checkpoints


class DamagedCheckpoint(ConfigError):
    """A checkpoint that isn't what was saved."""


def open_checkpoints(directory: Path, keep_every: int | None = None) -> Any:
    """An Orbax `Checkpointer` that keeps the newest two checkpoints, and for ever one of each `keep_every` steps."""
    from orbax.checkpoint import v1 as ocp  # slow to import

    policies = ocp.training.preservation_policies
    keep = [policies.LatestN(2), policies.EveryNSteps(keep_every)] if keep_every else [policies.PreserveAll()]
    return ocp.training.Checkpointer(
        directory.absolute(),
        preservation_policy=policies.AnyPreservationPolicy(keep),
        cleanup_tmp_directories=bool(keep_every),
    )


def save_checkpoint(checkpoints: Any, step: int, state: Any) -> None:
    """Saves a pytree of arrays with its checksum. Returns once it is copied; a thread writes it."""
    host = jax.tree.map(lambda x: np.array(x), state)  # a copy: the device's memory is donated to the next step
    checkpoints.save_async(step, host, force=True, overwrite=True, custom_metadata={"checksum": checksum(host)})


def load_checkpoint(checkpoints: Any, step: int, like: Any) -> Any:
    """The pytree of numpy arrays that was saved at `step`, of the shapes and dtypes of `like`.

    Raises:
        DamagedCheckpoint: it isn't there whole, is of other shapes, or fails its checksum.
    """
    path = Path(checkpoints.directory) / str(step)
    try:
        state = checkpoints.load(step, jax.tree.map(lambda x: np.empty(x.shape, x.dtype), like))
        saved = checkpoints.metadata(step).custom_metadata["checksum"]
        assert [x.shape for x in jax.tree.leaves(state)] == [
            x.shape for x in jax.tree.leaves(like)
        ]  # Orbax doesn't compare them
    except Exception as error:  # whatever Orbax meets in a damaged file; its texts mislead
        raise DamagedCheckpoint(
            f"checkpoint: {path} is damaged or of another model ({type(error).__name__}); choose another"
        ) from error
    if checksum(state) != saved:
        raise DamagedCheckpoint(
            f"checkpoint: {path} is damaged (its checksum differs from the saved one); choose another"
        )
    return state


def load_newest_checkpoint(checkpoints: Any, like: Any) -> tuple[int, Any] | None:
    """The newest intact checkpoint's step and state, or None where there is none. Says which newer ones are damaged."""
    for info in reversed(checkpoints.checkpoints):
        try:
            return info.step, load_checkpoint(checkpoints, info.step, like)
        except DamagedCheckpoint as error:
            print(f"{error.args[0].rsplit(';', 1)[0]}; falling back to the one before")
    return None


def checksum(tree: Any) -> int:
    """Of the bytes of all leaves and their places in the tree."""
    crc = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        crc = zlib.crc32(
            np.ascontiguousarray(leaf).view(np.uint8).data, zlib.crc32(jax.tree_util.keystr(path).encode(), crc)
        )
    return crc

"""Open-loop predictions where some levels don't see the context (Figure 7)."""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import tools
from analyses.arguments import EXAMPLE, parse_models, results_directory, single_run
from analyses.worker import Worker
from config import ConfigError, Flag, whole_number
from cwvae import CWVAE
from data import Window
from report import plots
from sequences.noise import Inputs, draw
from system.files import replace_arrays


def blind(arguments: Sequence[str]) -> None:
    """Predict one test sequence once for each subset of blind levels: blind.png, blind.gif, blind.npz."""
    models, given = parse_models(
        "blind",
        __doc__,
        arguments,
        ["python analysis.py blind pretrained --eval_seq_len 200 --out DIR"],
        example=EXAMPLE,
        blind_ctx=Flag(
            "INT", "context frames if the top level is blind (default: 8, as in the paper; otherwise open_loop_ctx)"
        ),
    )
    run = single_run("blind", models)
    if run.config.model != "cwvae":
        raise ConfigError(f"model: blind needs a run of cwvae, got one of {run.config.model}")
    number, blind_context = whole_number(given, "example", 0, at_least=0), whole_number(given, "blind_ctx", 8)
    worker = Worker(run)
    window = worker.sequence(number)
    video = window.video
    if blind_context >= len(video):
        raise ConfigError(f"blind_ctx: must be less than the sequence's {len(video)} frames, got {blind_context}")
    directory = results_directory("blind", models, given)
    rows, context = {"truth": video}, {}
    for use_obs in itertools.product("TF", repeat=run.config.levels):
        blind_levels = [str(level) for level, letter in enumerate(use_obs) if letter == "F"]
        name = f"blind {' '.join(blind_levels)}" if blind_levels else "sees all"
        context[name] = run.config.open_loop_ctx if use_obs[-1] == "T" else blind_context
        rows[name] = predict_blind(worker, number, window, context[name], "".join(use_obs))
    times = np.unique(np.linspace(0, len(video) - 1, 16).astype(int))
    plots.save_rows(rows, directory / "blind.png", times, context)
    tools.save_gif(tools.side_by_side(rows, context), directory / "blind.gif")
    arrays: Any = {name.replace(" ", "_"): frames for name, frames in rows.items()}
    replace_arrays(directory / "blind.npz", **arrays)
    print(f"Results: {directory}")


def predict_blind(worker: Worker, number: int, window: Window, context: int, use_obs: str) -> np.ndarray:
    """Return a test sequence as reconstructed and predicted from `context` frames, uint8 [T, H, W, C].

    The noise is the same for each `use_obs`.
    """
    video, actions = window
    actions_batch = None if actions is None else jnp.asarray(actions)[None]
    inputs = draw(worker.config, worker.keys(number, 1), len(video), context, actions_batch)
    frames = observe_and_imagine(worker.model, worker.params, video[None, :context], inputs, use_obs)
    return np.asarray(tools.to_uint8(frames))[0]


@partial(jax.jit, static_argnums=(0, 4))
def observe_and_imagine(model: CWVAE, params: Any, context: Array, inputs: Sequence[Inputs], use_obs: str) -> Array:
    """Return all frames that `inputs` are for, predicted from any number of context frames (Section 3.6).

    A level that sees the context follows its posterior in the ticks that end within the context, then its prior.
    """
    T, k = context.shape[1], model.config.tmp_abs_factor

    def frames(model: CWVAE) -> Array:
        visible = model.visible_features(context, use_obs)
        features = [x if x is None else x[:, : T // k**level] for level, x in enumerate(visible)]
        rollouts, _ = model.unroll(inputs, None, features)
        return model.decode(rollouts)

    predicted: Any = model.apply(params, method=frames)
    return predicted

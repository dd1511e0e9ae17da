"""Model cards in Markdown: what an exported file holds, where it comes from, and how to use it."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

import config as configuration
from analyses.arguments import TrainedModel
from config import FRAME_SIZE, Config
from data import USER_DATASETS
from report.statistics import DIGITS, NAMES
from report.tables import to_markdown
from system import weights
from training import loading

MODELS = {
    "cwvae": "the Clockwork VAE of [Saxena, Ba, Hafner 2021](https://arxiv.org/abs/2102.09532)",
    "svg": "SVG-LP of [Denton, Fergus 2018](https://arxiv.org/abs/1802.07687)",
    "vta": "VTA of [Kim, Ahn, Bengio 2019](https://arxiv.org/abs/1910.00775)",
}


def card(run: TrainedModel, params: Any, path: Path) -> str:
    """Return the model card of the file at `path`, to which a run's checkpoint with `params` is exported."""
    c = run.config
    parts = [
        f"# {path.stem}",
        f"A model that predicts videos of {FRAME_SIZE}x{FRAME_SIZE} pixels: {MODELS.get(c.model, c.model)}, in JAX.",
        "\n".join(f"- {name}: {fact}" for name, fact in facts(run, params)),
        *scores(run),
        "## How to use it",
        parameters_usage(path) if path.suffix == weights.SUFFIX else programs_usage(c, path),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def facts(run: TrainedModel, params: Any) -> Iterator[tuple[str, str]]:
    """Yield names and values of facts about a run, from its configuration, parameters and checkpoint."""
    c = run.config
    yield "data", data_source(c)
    shown = configuration.read_by(c.model) & (configuration.marked("shapes") | {"tmp_abs_factor"}) - {"model"}
    keys = [key for key, value in vars(c).items() if key in shown and value is not None]
    yield "model", ", ".join(f"{key} {getattr(c, key)}" for key in keys)
    yield "parameters", f"{sum(math.prod(x.shape) for x in jax.tree.leaves(params['params'])):,}"
    yield "checkpoint", loading.describe_steps(run.checkpoint.step, loading.stages_before(run.checkpoint))
    yield "last stage", f"batches of {c.batch_size} sequences of {c.seq_len} frames, learning rate {c.lr}"
    if c.seed is not None:
        yield "seed", str(c.seed)
    yield "licence of the code", "MIT"


def data_source(config: Config) -> str:
    """Return a description of the dataset, with its origin and licence if they are known."""
    c = config
    if c.dataset == "digits":
        return f"`digits`: scikit-learn's handwritten digits, {c.num_digits} in a video (BSD)"
    if c.dataset == "mnist":
        return f"`mnist`: MNIST's handwritten digits, {c.num_digits} in a video (CC BY-SA 3.0)"
    if c.dataset in USER_DATASETS:
        return f"`{c.dataset}`: files of the person who trained the model"
    from videos.published import BUILDERS  # slow to import

    if c.dataset not in BUILDERS:
        return f"`{c.dataset}`"
    builder = BUILDERS[c.dataset]
    return f"`{c.dataset}`: [{builder.SUMMARY.split(':')[0]}]({builder.HOMEPAGE}) ({builder.LICENCE})"


def scores(run: TrainedModel) -> Iterator[str]:
    """Yield a section with the scores of the checkpoint's newest finished evaluation in its run, if there is one."""
    for path in sorted(run.checkpoint.run.glob("eval_*/metrics.json"), reverse=True):
        try:
            results = json.loads(path.read_text())
            if results["checkpoint_step"] != run.checkpoint.step:
                continue
            c = results["config"]
            samples = "one sample each" if c["num_samples"] == 1 else f"the best of {c['num_samples']} samples each"
            text = (
                f"Averages over {results['num_examples']} test sequences of `{c['dataset']}` and the "
                f"{results['predicted_frames']} frames that follow {c['open_loop_ctx']} context frames, {samples}."
            )
            rows = [
                (protocol, NAMES[metric], f"{value:.{DIGITS[metric]}f}")
                for protocol, metrics in results["averages"].items()
                for metric, value in metrics.items()
            ]
        except (OSError, ValueError, KeyError, TypeError):  # damaged, or from an earlier version
            continue
        yield "## Scores"
        yield text
        yield to_markdown(["protocol", "metric", "value"], rows)
        return


def parameters_usage(path: Path) -> str:
    """Return how to use a .safetensors file."""
    return f"""
With this project's programs:

```sh
python eval.py --logdir {path.name} --out DIR
python train.py --init_from {path.name} ...
```

In any program (the file's metadata hold the configuration as JSON):

```python
from safetensors.numpy import load_file

params = load_file("{path.name}")  # arrays by name
```
"""


def programs_usage(config: Config, path: Path) -> str:
    """Return how to use a zip of StableHLO programs."""
    c, block = config, config.block
    S, D, A = c.cell_stoch_size, c.cell_deter_size, c.action_size
    frame = f"{FRAME_SIZE}, {FRAME_SIZE}, {c.channels}"
    actions, following, text = "", "", ""
    if A:
        actions, following = ", actions", ", following"
        text = f"""
`actions` and `following` are the actions of the observed and the imagined frames, float32 [B, frames, {A}]. Each is the
action that led to its frame; the first action of an episode is zeros.
"""
    return f"""
With only JAX (`pip install jax flatbuffers`), on a CPU, a GPU or a TPU:

```python
import zipfile
import jax, jax.numpy as jnp
from jax import export

file = zipfile.ZipFile("{path.name}")
observe, imagine, decode = (
    jax.jit(export.deserialize(bytearray(file.read(f"{{name}}.stablehlo"))).call)
    for name in ("observe", "imagine", "decode")
)
B, T = video.shape[:2]  # uint8 [B, T, {frame}], T a multiple of {block}
state = tuple(jnp.zeros((B, size)) for size in {c.levels} * ({S}, {D}))
seen, unseen = jax.random.split(jax.random.key(0))
outputs, state = observe(video, jax.random.bits(seen, (B, T // {block}, 2)), state{actions})
outputs, state = imagine(jax.random.bits(unseen, (B, 2, 2)), state{following})  # 2 x {block} frames
frames = decode(outputs[0])  # float32 [B, {2 * block}, {frame}], not clipped to [0, 1]
```
{text}
`outputs[l]` are the states of level l, the stochastic followed by the deterministic one, float32 [B, ticks, {S} + {D}].
The next call continues from `state`. There can be any number of sequences, and of blocks of {block} frames.
Each block of each sequence takes two random uint32.
"""

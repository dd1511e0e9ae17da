"""A model card: what a file holds, where that comes from, and how to use it, in Markdown."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

import config as configuration
from analyses.arguments import TrainedModel
from config import FRAME_SIZE, Config
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
    """Return the card of a file that a run's checkpoint is written to, with what is known of it."""
    c = run.config
    parts = [
        f"# {path.stem}",
        f"A model that predicts videos of {FRAME_SIZE}x{FRAME_SIZE} pixels: {MODELS[c.model]}, in JAX.",
        "\n".join(f"- {name}: {fact}" for name, fact in facts(run, params)),
        *scores(run),
        "## How to use it",
        parameters_usage(path) if path.suffix == weights.SUFFIX else programs_usage(c, path),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def facts(run: TrainedModel, params: Any) -> Iterator[tuple[str, str]]:
    """Yield what a run's configuration and its parameters tell."""
    c = run.config
    yield "data", source(c)
    shown = configuration.read_by(c.model) & (configuration.marked("shapes") | {"tmp_abs_factor"}) - {"model"}
    keys = [key for key, value in vars(c).items() if key in shown and value is not None]
    yield "model", ", ".join(f"{key} {getattr(c, key)}" for key in keys)
    yield "parameters", f"{sum(math.prod(x.shape) for x in jax.tree.leaves(params['params'])):,}"
    yield "checkpoint", loading.steps_of_all_stages(run.checkpoint.step, loading.stages_before(run.checkpoint))
    yield "last stage", f"batches of {c.batch_size} sequences of {c.seq_len} frames, learning rate {c.lr}"
    if c.seed is not None:
        yield "seed", str(c.seed)
    yield "licence of the code", "MIT"


def source(config: Config) -> str:
    """Return what the data is, where it comes from and its licence, as far as that is known."""
    c = config
    if c.dataset == "digits":
        return f"`digits`: scikit-learn's handwritten digits, {c.num_digits} in a video (BSD)"
    if c.dataset == "mnist":
        return f"`mnist`: MNIST's handwritten digits, {c.num_digits} in a video (CC BY-SA 3.0)"
    if c.dataset in ("videos", "episodes"):
        return f"{c.dataset} of those who trained it"
    from videos.published import BUILDERS  # slow to import

    builder = BUILDERS[c.dataset]
    return f"`{c.dataset}`: [{builder.SUMMARY.split(':')[0]}]({builder.HOMEPAGE}) ({builder.LICENCE})"


def scores(run: TrainedModel) -> Iterator[str]:
    """Yield the scores of the checkpoint's newest finished evaluation below its run, if there is one."""
    for path in sorted(run.checkpoint.run.glob("eval_*/metrics.json"), reverse=True):
        try:
            results = json.loads(path.read_text())
            if results["checkpoint_step"] != run.checkpoint.step:
                continue
            c = results["config"]
            samples = "one sample each" if c["num_samples"] == 1 else f"the best of {c['num_samples']} samples each"
            text = (
                f"Of {results['num_examples']} test sequences of `{c['dataset']}`: averages over the "
                f"{results['predicted_frames']} frames that follow {c['open_loop_ctx']} of context, {samples}."
            )
            rows = [
                (protocol, NAMES[metric], f"{value:.{DIGITS[metric]}f}")
                for protocol, metrics in results["averages"].items()
                for metric, value in metrics.items()
            ]
        except (OSError, ValueError, KeyError, TypeError):  # damaged, or of an earlier version
            continue
        yield "## Scores"
        yield text
        yield to_markdown(["protocol", "metric", "value"], rows)
        return


def parameters_usage(path: Path) -> str:
    return f"""
With the programs of the repository that it comes from:

```sh
python eval.py --logdir {path.name} --out DIR
python train.py --init_from {path.name} ...
```

Anywhere (the configuration is in the file's metadata, as JSON):

```python
from safetensors.numpy import load_file

params = load_file("{path.name}")  # arrays by name
```
"""


def programs_usage(config: Config, path: Path) -> str:
    c, block = config, config.block
    S, D, A = c.cell_stoch_size, c.cell_deter_size, c.action_size
    frame = f"{FRAME_SIZE}, {FRAME_SIZE}, {c.channels}"
    actions, following, text = "", "", ""
    if A:
        actions, following = ", actions", ", following"
        text = f"""
`actions` and `following` are the actions of these frames, float32 [B, frames, {A}]: each is the one that led to its
frame, an episode's first one zeros.
"""
    return f"""
With JAX alone (`pip install jax flatbuffers`), on a CPU, a GPU or a TPU:

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
`outputs[l]` are the states of level l, the stochastic and the deterministic part side by side, float32
[B, ticks, {S} + {D}]. `state` is where a call ended; the next one goes on from there. There can be any number of
sequences, and of {block} frames each; each of these has two random uint32 of its own.
"""

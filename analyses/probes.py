"""What small networks read from the states of each level in a Memory Maze: walls, objects, the agent's place."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import Array

import data
from analyses.accuracy import accuracy_line
from analyses.arguments import parse_models, require_same_keys, results_directory
from analyses.worker import Worker
from config import ConfigError
from report import plots, statistics, tables
from sequences import rollout


class Quantity(NamedTuple):
    """What a probe reads: a field of `Labels`."""

    ylabel: str
    binary: bool
    given_pose: bool
    """Whether the probe is also given the agent's true pose."""


QUANTITIES = {
    "walls": Quantity("walls: share of cells that are right", binary=True, given_pose=True),
    "objects": Quantity("objects: squared distance, cells$^2$", binary=False, given_pose=False),
    "place": Quantity("place: squared distance, cells$^2$", binary=False, given_pose=False),
}
"""The quantities. Walls and objects are as in the Memory Maze paper (Pasukonis, Lillicrap, Hafner 2022)."""

ALL, WITHOUT = "all levels", "no states"

FRAMES = 64
"""The number of frames of each training episode from which probes learn."""

ROUNDS = 20
"""The number of rounds of 100 steps in which a probe learns."""

LAST = 10
"""The number of frames, up to each distance, over which tables average."""


def probes(arguments: Sequence[str]) -> None:
    """Write what probes read from posterior and predicted states: walls.png, objects.png, place.png, probes.*.

    A probe is a network with two hidden layers. It learns from the posterior states of the training episodes, and is
    tested on the test episodes. Both have `eval_seq_len` frames each.
    """
    models, given = parse_models("probes", __doc__, arguments, ["python analysis.py probes k2=RUN k4=RUN --out DIR"])
    for run in models:
        if run.config.dataset != "episodes":
            raise ConfigError(f"dataset: probes needs episodes of a memory_maze, got {run.config.dataset}")
        require_same_keys(models[0], run, ("eval_seq_len", "open_loop_ctx"))
    workers = [Worker(run) for run in models]
    found: dict[str, dict[tuple[str, str], Scores]] = {name: {} for name in QUANTITIES}
    windows = [episode_windows(worker) for worker in workers]
    labels = [
        (read_labels(worker, "train", train, len(train)), read_labels(worker, "test", test, worker.count))
        for worker, (train, test) in zip(workers, windows, strict=True)
    ]
    directory = results_directory("probes", models, given)
    for worker, (train, _), (learnt, tested) in zip(workers, windows, labels, strict=True):
        every = slice(None, None, max(1, train.length // FRAMES))
        states = [x[:, every] for x in read_states(worker, train)]
        seen, predicted = read_states(worker), read_states(worker, seen=worker.config.open_loop_ctx)
        learnt = Labels(*(x[:, every] for x in learnt))
        sets = {ALL: range(len(states))} | {f"level {i}": (i,) for i in range(len(states)) if len(states) > 1}
        for name in QUANTITIES:
            for part, levels in sets.items():
                probe = train_probe(name, [states[i] for i in levels], learnt)
                found[name][worker.name, part] = Scores(
                    *(probe([x[i] for i in levels], tested) for x in (predicted, seen))
                )
            if worker is workers[0]:
                nothing = train_probe(name, [], learnt)([], tested)
                found[name][WITHOUT, ""] = Scores(nothing, nothing)
    write_probes(found, models[0].config.open_loop_ctx, directory)


class Labels(NamedTuple):
    """The labels of N episodes at T frames. Distances are in cells."""

    pose: np.ndarray  # [N, T, 4], position from the middle of the maze, in its size; direction
    walls: np.ndarray  # [N, T, cells], 1 where a cell is free, 0 where it is a wall
    objects: np.ndarray  # [N, T, 2 * objects], positions relative to the agent and its direction
    place: np.ndarray  # [N, T, 2], the agent's position relative to its first one and its first direction


class Scores(NamedTuple):
    """How well a probe reads a quantity, [N, T] each: the share of cells or the squared distance."""

    predicted: np.ndarray  # from the posterior's states in the context, and from predicted ones after it
    seen: np.ndarray  # from the posterior's states


def episode_windows(worker: Worker) -> tuple[data.VideoWindows, data.VideoWindows]:
    """Return the windows of training and test, with as many frames.

    Raises:
        ConfigError: there are too few.
    """
    test = worker.test
    assert isinstance(test, data.VideoWindows)
    train = data.windows(dataclasses.replace(worker.config, seq_len=test.length), "train")
    assert isinstance(train, data.VideoWindows)
    if len(train) < 2:
        raise ConfigError(f"datadir: probes needs two training episodes of {test.length} frames; record more")
    return train, test


def read_labels(worker: Worker, split: str, windows: data.VideoWindows, count: int) -> Labels:
    """Return the labels of the first `count` windows.

    Raises:
        ConfigError: the episodes aren't those of a Memory Maze, or their files are missing.
    """
    names = "maze_layout", "agent_pos", "agent_dir", "targets_vec"
    found = []
    for index in range(count):
        layout, position, direction, objects = data.other_arrays(worker.config, split, windows, index, names)
        moved, (x, y) = position - position[0], direction[0]
        place = moved @ np.array([[x, -y], [y, x]])  # forwards, to the left
        pose = np.concatenate([position / layout.shape[1:] - 0.5, direction], 1)
        found.append(Labels(pose, *(array.reshape(len(pose), -1) for array in (layout, objects, place))))
    return Labels(*(np.stack(arrays).astype(np.float32) for arrays in zip(*found, strict=True)))


def read_states(worker: Worker, source: data.Windows | None = None, seen: int | None = None) -> list[np.ndarray]:
    """Return each level's states at each frame of the windows, as `Worker.batches` yields them, [N, T, S + D].

    `seen` is the number of frames that the model sees; it predicts the states of the others. None: it sees all.
    """
    c = worker.config
    levels: list[list[np.ndarray]] = [[] for _ in range(c.levels)]
    for first, valid, batch in worker.batches(source):
        T = batch.video.shape[1]
        chunks = rollout.observe(
            worker.model,
            worker.params,
            batch.video,
            worker.keys(first, len(batch.video)),
            c.use_obs,
            place=worker.devices.put,
            actions=batch.actions,
            seen=seen,
        )
        by_level = zip(*([np.asarray(x.output) for x in chunk] for chunk in chunks), strict=True)
        for level, outputs in enumerate(by_level):
            states = np.concatenate(outputs, axis=1)[:valid]
            levels[level].append(np.repeat(states, c.tmp_abs_factor**level, axis=1)[:, :T])
    return [np.concatenate(found) for found in levels]


class Network(nn.Module):
    """A probe's network. Its last layer begins with zeros."""

    outputs: int
    binary: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Return means, or logits if `binary`, [N, outputs] for inputs [N, F]."""
        for _ in range(2):
            x = nn.relu(nn.Dense(256)(x))
        return nn.Dense(self.outputs, kernel_init=nn.initializers.zeros, name="last")(x)

    def loss(self, x: Array, y: Array) -> Array:
        """Return the mean loss, [], for targets [N, outputs]: squared error, or cross-entropy if `binary`."""
        found = self(x)
        return (optax.sigmoid_binary_cross_entropy(found, y) if self.binary else (found - y) ** 2).mean()


OPTIMIZER = optax.adam(1e-3)


@partial(jax.jit, static_argnums=0)
def mean_loss(network: Network, params: Any, x: Array, y: Array) -> Any:
    """Return the mean loss of a probe, []."""
    return network.apply(params, x, y, method="loss")


@partial(jax.jit, static_argnums=0)
def train_round(network: Network, params: Any, opt_state: Any, key: Array, x: Array, y: Array) -> Any:
    """Take 100 steps with batches of 128 samples, drawn from x [N, F] and y [N, outputs]."""

    def step(carry: Any, rows: Array) -> tuple[Any, None]:
        params, opt_state = carry
        gradients = jax.grad(mean_loss, 1)(network, params, x[rows], y[rows])
        updates, opt_state = OPTIMIZER.update(gradients, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    return jax.lax.scan(step, (params, opt_state), jax.random.randint(key, (100, 128), 0, len(x)))[0]


def train_probe(
    name: str, states: Sequence[np.ndarray], labels: Labels
) -> Callable[[Sequence[np.ndarray], Labels], np.ndarray]:
    """Train a probe, and return a function of the arguments `states` and `labels` that returns its scores [N, T].

    The last tenth of the episodes is held out. Their loss is computed before training and after each of ROUNDS rounds.
    The parameters with the lowest one are kept, since probes would learn a few mazes by heart.

    Args:
        name: what the probe reads, one of QUANTITIES.
        states: of some levels, [N, T, F] each; none: the probe only has the pose, or knows nothing.
        labels: of the same frames.
    """
    quantity = QUANTITIES[name]
    columns = np.concatenate([x.reshape(-1, x.shape[-1]) for x in inputs(quantity, states, labels)], 1)
    targets = getattr(labels, name).reshape(len(columns), -1)
    (x_mean, x_scale), (y_mean, y_scale) = ((v.mean(0), v.std(0) + 1e-3) for v in (columns, targets))
    if quantity.binary:
        y_mean, y_scale = np.zeros(1), np.ones(1)
    T = labels.pose.shape[1]
    split = len(columns) - T * max(1, len(labels.pose) // 10)
    x, y = jnp.asarray((columns - x_mean) / x_scale), jnp.asarray((targets - y_mean) / y_scale)
    network = Network(targets.shape[1], quantity.binary)
    params: Any = jax.jit(network.init)(jax.random.key(0), x[:1])
    if quantity.binary:  # begin with the targets' frequencies, as the others do with their means
        frequency = y.mean(0).clip(0.01, 0.99)
        params["params"]["last"]["bias"] = jnp.log(frequency / (1 - frequency))
    opt_state, candidates = OPTIMIZER.init(params), [params]
    for key in jax.random.split(jax.random.key(1), ROUNDS):
        params, opt_state = train_round(network, params, opt_state, key, x[:split], y[:split])
        candidates.append(params)
    best = min(candidates, key=lambda params: mean_loss(network, params, x[split:], y[split:]))

    @jax.jit
    def read(x: Array) -> Array:
        outputs: Any = network.apply(best, (x - x_mean) / x_scale)
        return outputs * y_scale + y_mean

    def score(states: Sequence[np.ndarray], labels: Labels) -> np.ndarray:
        truth = getattr(labels, name)
        found = np.stack(
            [read(np.concatenate(rows, 1)) for rows in zip(*inputs(quantity, states, labels), strict=True)]
        )
        if quantity.binary:
            return ((found > 0) == truth).mean(-1)
        N, T, _ = truth.shape
        return ((found - truth) ** 2).reshape(N, T, -1, 2).sum(-1).mean(-1)

    return score


def inputs(quantity: Quantity, states: Sequence[np.ndarray], labels: Labels) -> list[np.ndarray]:
    """Return the inputs of a probe, [N, T, F] each."""
    return [*states, *([labels.pose] if quantity.given_pose else [np.zeros_like(labels.pose[..., :1])])]


def write_probes(found: Mapping[str, Mapping[tuple[str, str], Scores]], context: int, directory: Path) -> None:
    """Write and print the scores: a plot of each quantity, probes.json, probes.csv, probes.md.

    Args:
        found: quantity -> model and levels, or WITHOUT and "" -> scores.
        context: number of context frames.
        directory: the directory of the results.
    """
    T = next(iter(found["place"].values())).seen.shape[1] - context
    ends = {"context": context} | {str(d): context + d for d in statistics.DISTANCES if d <= T}
    results: dict[str, dict[str, dict[str, Any]]] = {}
    rows, text = [], ""
    for name, by_line in found.items():
        results[name], lines = {}, {}
        for (model, part), scores in by_line.items():
            line = ", ".join(filter(None, (model, part)))
            results[name][line] = {}
            for kind, values in scores._asdict().items():
                points = {
                    label: statistics.plain(statistics.estimate(values[:, max(0, end - LAST) : end].mean(1)))
                    for label, end in ends.items()
                }
                summary = statistics.summary(values[:, context:])
                results[name][line][kind] = summary | {"points": points}
                rows += [[name, line, kind, label, *point.values()] for label, point in points.items()]
            kinds = results[name][line]
            if part == ALL:
                curve = np.array(kinds["seen"]["curve"]["value"])
                lines[model] = accuracy_line(kinds["predicted"])
                lines[f"{model}, posterior"] = plots.Line(curve, companion_of=model)
            elif model == WITHOUT:
                lines[line] = accuracy_line(kinds["predicted"])._replace(reference=True)
        plots.plot_lines(lines, directory / f"{name}.png", QUANTITIES[name].ylabel)
        table = [
            [
                line,
                *(f"{point['value']:.3f}" for point in kinds["predicted"]["points"].values()),
                tables.with_interval(kinds["predicted"]["average"], 3),
                tables.with_interval(kinds["seen"]["average"], 3),
            ]
            for line, kinds in results[name].items()
        ]
        header = [f"{name}: states of", *ends, "all predicted", "posterior"]
        text += tables.to_markdown(header, table) + "\n"
    header = ["quantity", "line", "states", "frames", "value", "low", "high"]
    tables.write(directory / "probes.csv", tables.to_csv(header, rows))
    tables.write(directory / "probes.md", text)
    tables.write(directory / "probes.json", tables.to_json(results))
    print(f"\n{text}Walls: higher is better. Objects and place: lower is better.\nResults: {directory}")

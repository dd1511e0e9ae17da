"""Accuracy of the digits, averaged over several seeds."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from analyses.accuracy import accuracy_line, write_accuracy
from analyses.arguments import new_directory, parse_directories
from config import ConfigError, Flag
from report import plots, statistics, tables
from system.files import load_arrays


def seeds(arguments: Sequence[str]) -> None:
    """Average the accuracy of the digits over seeds: identities.png, identities.json, identities.csv.

    Each DIGITS is a directory that `digits` wrote for the models of one seed, with the same names and videos.
    Intervals are over seeds and videos. Models are compared on the same videos. Each thin line is a single seed.
    """
    program = "analysis.py seeds DIGITS DIGITS ... --out DIR"
    paths, given, _ = parse_directories(
        arguments,
        program,
        str(seeds.__doc__),
        keys=False,
        examples=["python analysis.py seeds digits_seed1 digits_seed2 digits_seed3 --out DIR"],
        out=Flag("DIR", "new directory"),
    )
    if len({Path(path).resolve() for path in paths}) < len(paths):
        raise ConfigError("command line: a directory is named twice; name one directory per seed")
    by_seed = [read_curves(Path(path)) for path in paths]
    shapes = {curve.shape for curves in by_seed for curve in curves.values()}
    if len(shapes) > 1:
        raise ConfigError(
            f"command line: the directories differ in videos and frames, {sorted(shapes)}; call digits with the same "
            "--num_examples and --eval_seq_len for each"
        )
    names = dict.fromkeys(itertools.chain(*by_seed))
    found = {
        name: np.stack(curves)  # [seeds, N, T]
        for name in names
        if len(curves := [each[name] for each in by_seed if name in each]) > 1
    }
    if left_out := [name for name in names if name not in found]:
        print(f"Left out, since only one directory has them: {', '.join(left_out)}")
    if not found:
        raise ConfigError("command line: no model is in two of the directories; give it the same name in each")
    results = {name: statistics.summary(curves, statistics.estimate_over_seeds) for name, curves in found.items()}
    lines = {name: accuracy_line(results[name]) for name in found}
    for name, of_seeds in found.items():
        each_seed = (plots.Line(curve.mean(0), companion_of=name, thin_label="single seed") for curve in of_seeds)
        lines |= {f"{name}, {i}": line for i, line in enumerate(each_seed)}
    averages = {name: of_seeds.mean(-1) for name, of_seeds in found.items()}
    differences = {
        f"{a} - {b}": statistics.plain(statistics.estimate_over_seeds(averages[a], averages[b]))
        for a, b in itertools.combinations(found, 2)
    }
    each = {name: statistics.plain(values.mean(-1)) for name, values in averages.items()}
    directory = new_directory("seeds", given.get("out"))
    plots.plot_lines(lines, directory / "identities.png", "accuracy of the digits' identities")
    write_accuracy("identities", results, directory, {"seeds": each, "differences": differences})
    print("\nSingle seeds, and differences with their intervals:")
    for name, values in each.items():
        print(f"{name}: {', '.join(f'{value:.3f}' for value in values)}")
    for name, difference in differences.items():
        print(f"{name}: {tables.with_interval(difference, 3)}")


def read_curves(directory: Path) -> dict[str, np.ndarray]:
    """Return what `digits.write_curves` wrote to a directory: name of a model -> [N, T].

    Raises:
        ConfigError: the file can't be read.
    """
    path = directory / "digits.npz"
    try:
        file = load_arrays(path, ["names", "right"])
        return dict(zip(file["names"].tolist(), file["right"], strict=True))
    except (OSError, TypeError, ValueError) as error:  # ConfigErrors are ValueErrors
        raise ConfigError(f"{path} can't be read; name a directory that analysis.py digits wrote") from error

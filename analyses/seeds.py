"""What trainings with several seeds have in common: identities, averaged over seeds and videos."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from analyses.accuracy import accuracy_line, write_readout
from analyses.arguments import new_directory, parse_directories
from config import ConfigError, Flag
from report import plots, statistics, tables
from system.files import load_arrays


def seeds(arguments: Sequence[str]) -> None:
    """Average the identities of models over seeds: identities.png, .json, .csv.

    Each directory is what `digits` wrote of the models of one seed, under the same names and on the same videos.
    Intervals are over seeds and videos; differences between models are of the same videos. A thin line is one seed.
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
        raise ConfigError("command line: a directory is named twice; each is of another seed")
    read = [read_curves(Path(path)) for path in paths]
    shapes = {curve.shape for curves in read for curve in curves.values()}
    if len(shapes) > 1:
        raise ConfigError(f"command line: the directories differ in videos and frames, {sorted(shapes)}; read the same")
    found = {
        name: np.stack(curves)  # [seeds, N, T]
        for name in dict.fromkeys(itertools.chain(*read))
        if len(curves := [each[name] for each in read if name in each]) > 1
    }
    if left_out := [name for name in dict.fromkeys(itertools.chain(*read)) if name not in found]:
        print(f"Left out, since one directory alone has them: {', '.join(left_out)}")
    if not found:
        raise ConfigError("command line: no model is in two of the directories; give it the same name in each")
    results = {name: statistics.summary(curves, statistics.estimate_over_seeds) for name, curves in found.items()}
    lines = {name: accuracy_line(results[name]) for name in found}
    for name, of_seeds in found.items():
        each_seed = (plots.Line(curve.mean(0), beside=name, thin="single seed") for curve in of_seeds)
        lines |= {f"{name}, {i}": line for i, line in enumerate(each_seed)}
    averages = {name: of_seeds.mean(-1) for name, of_seeds in found.items()}
    differences = {
        f"{a} - {b}": statistics.plain(statistics.estimate_over_seeds(averages[a], averages[b]))
        for a, b in itertools.combinations(found, 2)
    }
    each = {name: statistics.plain(values.mean(-1)) for name, values in averages.items()}
    directory = new_directory("seeds", given.get("out"))
    plots.plot_lines(lines, directory / "identities.png", "accuracy of the digits' identities")
    write_readout("identities", results, directory, {"seeds": each, "differences": differences})
    print("\nSingle seeds, and differences with their intervals:")
    for name, values in each.items():
        print(f"{name}: {', '.join(f'{value:.3f}' for value in values)}")
    for name, difference in differences.items():
        print(f"{name}: {tables.with_interval(difference, 3)}")


def read_curves(directory: Path) -> dict[str, np.ndarray]:
    """Return whether the predicted frames of each model are right, [N, T] by its name.

    Raises:
        ConfigError: `digits` hasn't written them there.
    """
    path = directory / "digits.npz"
    try:
        file = load_arrays(path, ["names", "right"])
        return dict(zip(file["names"].tolist(), file["right"], strict=True))
    except (OSError, TypeError, ValueError) as error:  # ConfigErrors are ValueErrors
        raise ConfigError(f"{path} can't be read; name a directory that analysis.py digits wrote") from error

"""The paper's analyses, each a command: python analysis.py <command> [NAME=]RUN ... [--out DIR] [--key value ...]

For trained models, with configuration keys as in eval.py:
    levels      information per level: KL divergence and entropies (Table 1, Figure 8); also writes the latents
    blind       open-loop predictions where some levels don't see the context (Figure 7)
    boundaries  frames at which VTA's segments begin, inferred and predicted
    digits      accuracy of the digits in predicted frames, classified (Figure 5b); of one digit, also its position
    rooms       accuracy of the rooms in predicted videos, told apart by their colours (Figure 5a)
    probes      what can be read from each level's states in a Memory Maze: walls, objects, the agent's place
    export      a model for use elsewhere: a small run, a file of parameters, or programs
For results of train.py, eval.py or digits:
    perceptual  LPIPS and FVD of finished evaluations, with the networks' files
    compare     quality of several models on one dataset, over the distance from the context (Figure 1)
    ranks       average ranks over several comparisons (Figure 5c)
    seeds       results of digits, averaged over several seeds
    curves      losses over the steps of several trainings
"""

import sys
from collections.abc import Callable, Sequence

import config as configuration
from analyses.blind import blind
from analyses.boundaries import boundaries
from analyses.compare import compare, ranks
from analyses.curves import curves
from analyses.digits import digits
from analyses.export import export
from analyses.levels import levels
from analyses.perceptual import perceptual
from analyses.probes import probes
from analyses.rooms import rooms
from analyses.seeds import seeds
from report.output import writing
from system.devices import use_compilation_cache
from system.interrupts import Interrupts, exit_codes

COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    command.__name__: command
    for command in (levels, blind, boundaries, digits, rooms, probes, export, perceptual, compare, ranks, seeds, curves)
}

EXAMPLES = """\
  python analysis.py levels pretrained --num_examples 8 --out levels
  python analysis.py compare 'three levels'=RUN 'one level'=RUN --out comparison"""


def main() -> None:
    with exit_codes(), Interrupts():
        use_compilation_cache()
        command, *arguments = sys.argv[1:] or ["--help"]
        if command in ("-h", "--help"):
            print(__doc__)
            print(f"python analysis.py <command> --help lists a command's flags.\n\nexamples:\n{EXAMPLES}")
            return
        configuration.choose("command", command, list(COMMANDS))
        with writing(None):
            COMMANDS[command](arguments)


if __name__ == "__main__":
    main()

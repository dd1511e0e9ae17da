"""The paper's analyses, each a command: python analysis.py <command> [NAME=]RUN ... [--out DIR] [--key value ...]

Of trained models, with the keys of the configuration as in eval.py:
    levels      information per level: KL and entropies (Table 1, Figure 8); exports the latents
    blind       open-loop predictions where some levels don't see the context (Figure 7)
    boundaries  where segments begin, as VTA finds and predicts it
    digits      which digits are in the predicted frames, read by a classifier (Figure 5b); of one, also where
    rooms       which rooms the predicted videos visit, read from their colours (Figure 5a)
    export      writes a model to be used elsewhere: a small run, a file of parameters, programs
Of what train.py and eval.py wrote:
    perceptual  adds LPIPS and FVD to finished evaluations, with the networks' files
    compare     quality over distance of several models on one dataset (Figure 1)
    ranks       average ranks over several comparisons (Figure 5c)
    seeds       averages what digits wrote of several seeds
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
from analyses.rooms import rooms
from analyses.seeds import seeds
from report.output import writing
from system.devices import use_compilation_cache
from system.interrupts import Interrupts, exit_codes

COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    command.__name__: command
    for command in (levels, blind, boundaries, digits, rooms, export, perceptual, compare, ranks, seeds, curves)
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

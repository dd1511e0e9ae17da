"""The paper's analyses, each a command: python analysis.py <command> [NAME=]RUN ... [--out DIR] [--key value ...]

Of trained models, with the keys of the configuration as in eval.py:
    levels   information per level: KL and entropies (Table 1, Figure 8); exports the latents
    blind    open-loop predictions where some levels don't see the context (Figure 7)
    digits   which digits are in the predicted frames, read by a classifier (Figure 5b)
    rooms    which rooms the predicted videos visit, read from their colours (Figure 5a)
    export   writes a small copy of a run, to share
Of what train.py and eval.py wrote:
    compare  quality over distance of several models on one dataset (Figure 1)
    ranks    average ranks over several comparisons (Figure 5c)
    curves   losses over the steps of several trainings"""

import sys
from collections.abc import Callable, Sequence


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "levels": (levels, "KL and entropies per level, and the latents (Table 1, Figure 8)"),
    "blind": (blind, "Open-loop predictions with levels that don't see the context (Figure 7)"),
    "digits": (digits, "Which digits predicted frames show (Figure 5b)"),
    "rooms": (rooms, "Which rooms predicted videos visit (Figure 5a)"),
    "export": (export, "A small copy of a run, to share"),
    "compare": (comparisons.compare, "Quality over distance of several evaluations (Figure 1)"),
    "ranks": (comparisons.ranks, "Average ranks over several comparisons (Figure 5c)"),
    "curves": (comparisons.curves, "Losses over the steps of several trainings"),
}


def main() -> None:
    with exit_codes(), Interrupts():
        train.use_compilation_cache()
        command, *arguments = sys.argv[1:] or ["--help"]
        if command in ("-h", "--help"):
            print(__doc__)
            print("python analysis.py <command> --help lists a command's flags.")
            return
        configuration.choose("command", command, list(COMMANDS))
        COMMANDS[command][0](arguments)

"""Draw assets/model.svg, three levels of a Clockwork VAE with k = 2: python -m assets.draw_model"""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

import tools

K, LEVELS, FRAMES, CONTEXT = 2, 3, 8, 4
GREEN, RED = (f"#{bytes(color).hex()}" for color in (tools.GREEN, tools.RED))
GREY = "#777777"
HEIGHT, PITCH = 0.46, 1.05
"""Of a tick's box; from one row to the next. A frame is 1 wide."""


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], **style: Any) -> None:
    look: dict[str, Any] = {
        "arrowstyle": "-|>",
        "mutation_scale": 9,
        "linewidth": 1,
        "color": "black",
        "shrinkA": 0,
        "shrinkB": 0,
    }
    axes.add_patch(FancyArrowPatch(start, end, **(look | style)))


def box(axes: Axes, left: float, y: float, width: float, text: str, seen: bool, square: bool = False) -> None:
    color = GREEN if seen else RED
    shape = "square,pad=0" if square else "round,pad=0,rounding_size=0.12"
    corner, tint = (left, y - HEIGHT / 2), color + "22"
    axes.add_patch(
        FancyBboxPatch(corner, width, HEIGHT, boxstyle=shape, facecolor="white" if square else tint, edgecolor=color)
    )
    axes.text(left + width / 2, y, text, ha="center", va="center", fontsize=10)


def draw(axes: Axes) -> None:
    """Draw ticks as boxes over the frames that they span; what is seen green, what is predicted red."""
    for level in range(LEVELS):
        y, span = (level + 1) * PITCH, K**level
        ticks = FRAMES // span
        axes.text(-0.25, y, f"level {level}", ha="right", va="center", fontsize=10)
        for tick in range(ticks):
            left, seen = tick * span, tick * span < CONTEXT
            box(axes, left + 0.14, y, span - 0.28, f"$s_{{{tick + 1}}}^{{{level}}}$", seen)
            if tick + 1 < ticks:
                arrow(axes, (left + span - 0.14, y), (left + span + 0.14, y))
            below = K ** max(level - 1, 0)  # frames that a tick of the row below spans
            for child in range(K if level else 1):
                x = left + (child + 0.5) * below + (0.12 if seen else 0)
                arrow(axes, (x, y - HEIGHT / 2), (x, y - PITCH + HEIGHT / 2))
    axes.text(-0.25, 0, "frames", ha="right", va="center", fontsize=10)
    for frame in range(FRAMES):
        seen = frame < CONTEXT
        box(axes, frame + 0.22, 0, 0.56, f"$x_{frame + 1}$" if seen else rf"$\hat{{x}}_{frame + 1}$", seen, square=True)
    for frame in range(CONTEXT):
        for level in range(LEVELS):  # behind the boxes between
            x, y = frame + 0.5 - 0.09 - 0.08 * level, (level + 1) * PITCH
            arrow(axes, (x, HEIGHT / 2), (x, y - HEIGHT / 2), color=GREY, linestyle=(0, (3, 2)), zorder=0)
    axes.axvline(CONTEXT, color=GREY, linewidth=0.8, linestyle=":")
    top = (LEVELS + 0.62) * PITCH
    axes.text(CONTEXT / 2, top, "context: follows the posterior", ha="center", color=GREEN, fontsize=10)
    axes.text((CONTEXT + FRAMES) / 2, top, "prediction: follows the prior", ha="center", color=RED, fontsize=10)
    axes.set(xlim=(-1.15, FRAMES + 0.05), ylim=(-0.4, top + 0.3), aspect="equal")
    axes.axis("off")


def main() -> None:
    matplotlib.rcParams |= {"svg.hashsalt": "model", "svg.fonttype": "path", "mathtext.fontset": "dejavusans"}
    figure = Figure(figsize=(7.6, 3.9))
    draw(figure.add_axes((0, 0, 1, 1)))
    path = Path(__file__).with_name("model.svg")
    figure.savefig(path, facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    main()

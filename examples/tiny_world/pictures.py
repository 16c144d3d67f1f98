"""A picture people can look at: scenes with question, answer, right or wrong."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from .dialogue import Example


matplotlib.use("Agg")
COLUMNS = 5
GREEN, RED = "#1a7f37", "#cf222e"


def draw_answers(shown: Sequence[tuple[Example, str]], path: Path) -> None:
    """Draw examples with the replies they got, and save the figure as PNG."""
    rows = -(-len(shown) // COLUMNS)
    figure = Figure(figsize=(2.7 * COLUMNS, 2.8 * rows))
    figure.subplots_adjust(left=0.02, right=0.98, top=0.95, bottom=0.05, wspace=0.1, hspace=0.85)
    for axes, (example, reply) in zip(figure.subplots(rows, COLUMNS, squeeze=False).flat, shown, strict=False):
        _draw_one(axes, example, reply)
    for axes in figure.axes[len(shown) :]:
        axes.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _draw_one(axes, example: Example, reply: str) -> None:
    axes.axis("off")
    if example.images:
        axes.imshow(example.images[-1], interpolation="nearest")
    turns = [message["content"][-1]["text"] for message in example.messages[:-1]]  # question, answer, ..., question
    said = [" ".join(turns[i : i + 2]) for i in range(0, len(turns), 2)]
    is_right = reply == example.answer
    verdict = "right" if is_right else f"wrong, it is: {example.answer}"
    axes.set_title("\n".join(textwrap.fill(line, 36) for line in said), fontsize=8)
    axes.text(
        0.5,
        -0.04 if example.images else 0.6,
        "\n".join([textwrap.fill(reply, 38), textwrap.fill(f"({verdict})", 38)]),
        transform=axes.transAxes,
        ha="center",
        va="top",
        fontsize=8,
        color=GREEN if is_right else RED,
    )

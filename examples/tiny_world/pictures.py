"""A picture people can look at: scenes with question, answer, right or wrong."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from .dialogue import Example


matplotlib.use("Agg")
COLUMNS = 4
GREEN, RED = "#1a7f37", "#cf222e"


def draw_answers(shown: Sequence[tuple[Example, str]], path: Path) -> None:
    """Draw examples with the replies they got, and save the figure as PNG."""
    rows = -(-len(shown) // COLUMNS)
    figure = Figure(figsize=(3.2 * COLUMNS, 2.9 * rows), layout="constrained")
    for axes, (example, reply) in zip(figure.subplots(rows, COLUMNS).flat, shown, strict=False):
        _draw_one(axes, example, reply)
    for axes in figure.axes[len(shown) :]:
        axes.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _draw_one(axes, example: Example, reply: str) -> None:
    axes.axis("off")
    if example.images:
        axes.imshow(example.images[-1], interpolation="nearest")
    question = example.messages[-2]["content"][-1]["text"]
    is_right = reply == example.answer
    verdict = "right" if is_right else f"wrong, it is: {example.answer}"
    axes.set_title(textwrap.fill(question, 34), fontsize=9)
    axes.text(
        0.5,
        -0.03 if example.images else 0.5,
        "\n".join([textwrap.fill(reply, 38), f"({verdict})"]),
        transform=axes.transAxes,
        ha="center",
        va="top",
        fontsize=9,
        color=GREEN if is_right else RED,
    )

"""Draw pictures with what a model says of them, right in green and wrong in red.

    python -m examples.real_pictures.show_answers outputs/real/test/answers.jsonl --data outputs/real_pictures \
        --output outputs/real/answers.png

Drawn are rows of the tests on photographs, at random by `--seed`.
"""

import argparse
import random
from pathlib import Path

import matplotlib.pyplot as plt
from PIL import Image

from .evaluate import is_right, read


def draw(rows: list[dict], folder: Path, columns: int = 4) -> plt.Figure:
    """Draw rows of `answers.jsonl`, each with its last question, and what is said to it."""
    lines = -(-len(rows) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(2.6 * columns, 3.1 * lines), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, row in zip(axes.flat, rows, strict=False):
        said = row["said"]["as they are"]
        axis.imshow(Image.open(folder / row["images"][-1]))
        colour = "green" if is_right(said, row["answers"]) else "red"
        axis.set_title(f"{row['messages'][-1]['content'][-1]['text']}\n{said}", color=colour, fontsize=9, wrap=True)
    figure.tight_layout()
    return figure


def main() -> None:
    """Choose and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("answers", type=Path, help="answers.jsonl of evaluate.py")
    parser.add_argument("--data", type=Path, required=True, help="folder that make_data.py has written")
    parser.add_argument("--output", type=Path, required=True, help="file of the picture")
    parser.add_argument("--tests", default="photographs", help="part of the names of the tests that are shown")
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = [row for row in read(args.answers) if args.tests in row["test"]]
    rows = random.Random(args.seed).sample(rows, min(args.count, len(rows)))
    draw(rows, args.data).savefig(args.output, dpi=110)


if __name__ == "__main__":
    main()

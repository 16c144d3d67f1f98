"""Draw pictures with what a model says of them, right in green and wrong in red.

    python -m examples.real_pictures.show_answers outputs/real/test/answers.jsonl --data outputs/real_pictures \
        --output outputs/real/answers.png

Drawn are pictures of the tests on photographs, at random by `--seed`, each with all that is asked about it.
"""

import argparse
import random
from pathlib import Path

import matplotlib.pyplot as plt
from PIL import Image, ImageOps

from .evaluate import is_right, read


def by_picture(rows: list[dict]) -> dict[str, list[dict]]:
    """Group rows of `answers.jsonl` by the picture that their last question is about."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["images"][-1], []).append(row)
    return groups


def draw(pictures: dict[str, list[dict]], folder: Path, columns: int = 3) -> plt.Figure:
    """Draw each picture, and below it the questions and what is said to them."""
    lines = -(-len(pictures) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.4 * columns, 3.6 * lines), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (path, rows) in zip(axes.flat, pictures.items(), strict=False):
        axis.imshow(ImageOps.fit(Image.open(folder / path), (224, 224)))  # what the model sees of it
        for number, row in enumerate(rows):
            said = row["said"]["as they are"]
            colour = "green" if is_right(said, row["answers"]) else "red"
            line = f"{row['messages'][-1]['content'][-1]['text']} {said}"
            axis.text(0.5, -0.03 - 0.08 * number, line, color=colour, ha="center", va="top", transform=axis.transAxes)
    figure.subplots_adjust(0.01, 0.09, 0.99, 0.99, wspace=0.04, hspace=0.24)
    return figure


def main() -> None:
    """Choose and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("answers", type=Path, help="answers.jsonl of evaluate.py")
    parser.add_argument("--data", type=Path, required=True, help="folder that make_data.py has written")
    parser.add_argument("--output", type=Path, required=True, help="file of the picture")
    parser.add_argument("--tests", default="photographs", help="part of the names of the tests that are shown")
    parser.add_argument("--count", type=int, default=12, help="pictures")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pictures = by_picture([row for row in read(args.answers) if args.tests in row["test"]])
    chosen = random.Random(args.seed).sample([*pictures], min(args.count, len(pictures)))
    draw({path: pictures[path] for path in chosen}, args.data).savefig(args.output, dpi=100)


if __name__ == "__main__":
    main()

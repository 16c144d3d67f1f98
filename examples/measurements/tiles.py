"""Measure whether small text in a large picture is read from tiles of it, on the tiny world.

    python examples/measurements/tiles.py outputs/quickstart/adapter

The texts of the skill "reading" (1 to 3 characters, 48 x 48 pixels) are put into one cell of an empty picture of
144 x 144 pixels, three times the side that the tower sees. The same question is asked about the original picture,
the whole large one, the cell alone, the whole followed by the cell, and the nine cells as nine images. It prints the
share of right replies, with its 95 % interval, in a minute on two cores.
"""

import argparse
import random
import sys
from pathlib import Path

import numpy as np
from PIL import Image


sys.path.insert(0, str(Path(__file__).parents[1]))
from quickstart import load
from tiny_world import evaluation
from tiny_world.dialogue import Example
from tiny_world.mixture import example
from tiny_world.scenes import SIDE, noisy_image


CELLS = [(column * SIDE, row * SIDE) for row in range(3) for column in range(3)]  # left and top edges


def enlarge(picture: Image.Image, cell: tuple[int, int], seed: int) -> Image.Image:
    """An empty picture of three times the side, with the picture in one of its cells."""
    large = noisy_image(np.full((3 * SIDE, 3 * SIDE, 3), 24, np.float32), seed)
    large.paste(picture, cell)
    return large


def views(asked: Example, seed: int) -> dict[str, list[Image.Image]]:
    """The images of each way to show one question's picture."""
    (picture,) = asked.images
    cell = random.Random(seed).choice(CELLS)
    large = enlarge(picture, cell, seed)
    tiles = [large.crop((left, top, left + SIDE, top + SIDE)) for left, top in CELLS]
    return {
        "48 x 48, as drawn": [picture],
        "whole, 144 x 144": [large],
        "the cell that holds the text": [tiles[CELLS.index(cell)]],
        "the whole, then the cell": [large, tiles[CELLS.index(cell)]],
        "nine cells as nine images": tiles,
    }


def main() -> None:
    """Ask, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--count", type=int, default=200, help="questions")
    args = parser.parse_args()
    model, processor = load(args.adapter)
    asked = [example("reading", 0, index, "test") for index in range(args.count)]
    shown = [views(one, index) for index, one in enumerate(asked)]
    for way in shown[0]:
        examples = []
        for one, images in zip(asked, shown, strict=True):
            question, reply = one.messages
            text = question["content"][-1]
            parts = [{"type": "image"}] * len(images[way])
            examples.append(Example(one.skill, [{**question, "content": [*parts, text]}, reply], images[way]))
        score = evaluation.score(examples, evaluation.answer(model, processor, examples, way))
        print(f"{way:<30}{score['accuracy']:>7.1%}  {score['low']:.1%} .. {score['high']:.1%}")


if __name__ == "__main__":
    main()

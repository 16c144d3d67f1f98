"""Handwritten digits: the 1,797 scans of 8x8 pixels that come with scikit-learn, framed like the scenes.

Training reaches the scans of `TRAIN` only, through `sample_digit`; `TEST` holds the other 500.
"""

import random
from functools import cache

import numpy as np
from PIL import Image

from .scenes import SIDE, blank_canvas, noisy_image, paint


COUNT = 1797
INK_SIDE = 40
BACKGROUND, INK = 24, 235  # grey levels
_ORDER = tuple(random.Random("handwritten digits").sample(range(COUNT), COUNT))
TRAIN, TEST = _ORDER[:1297], _ORDER[1297:]
SPLITS = {"train": TRAIN, "test": TEST}


@cache
def _scans() -> tuple[np.ndarray, np.ndarray]:
    """The scans, `(1797, 8, 8)` in 0..255, and their digits, `(1797,)`."""
    from sklearn.datasets import load_digits  # an import of a second, only where digits are drawn

    data = load_digits()
    return (data.images * (255 / 16)).astype(np.uint8), data.target


def digit_label(index: int) -> str:
    """The digit, "0".."9", of the scan `index` in 0..1796."""
    return str(_scans()[1][index])


def digit_picture(index: int, rng: random.Random | None = None) -> Image.Image:
    """The 48x48 RGB picture of the scan `index` in 0..1796.

    With `rng`, size, place and brightness vary a little and the noise is drawn anew (for training); without, the
    picture is plain and always the same (for tests).
    """
    side = rng.randint(INK_SIDE - 4, INK_SIDE + 4) if rng else INK_SIDE
    left, top = (rng.randint(0, SIDE - side) if rng else (SIDE - side) // 2 for _ in range(2))
    ink = rng.randint(INK - 40, INK + 20) if rng else INK
    background = rng.randint(BACKGROUND - 16, BACKGROUND + 16) if rng else BACKGROUND
    scan = Image.fromarray(_scans()[0][index]).resize((side, side), Image.Resampling.BICUBIC)
    canvas = blank_canvas([background] * 3)
    paint(canvas, np.asarray(scan, np.float32)[..., None] / 255, [ink] * 3, left, top)
    return noisy_image(canvas, rng.getrandbits(32) if rng else index)


def sample_digit(rng: random.Random, split: str = "train") -> tuple[Image.Image, str]:
    """A digit of the split, "train" (picture varied) or "test" (plain): its picture and its label."""
    index = rng.choice(SPLITS[split])
    return digit_picture(index, rng if split == "train" else None), digit_label(index)

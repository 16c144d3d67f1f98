"""Scenes of 48x48 pixels: one to four coloured shapes in the cells of a 3x3 grid, or one to three characters of text.

A scene is a value; drawing one (`sample_scene`, `sample_text_scene`) and showing it (`render`) are apart, so that a
question is answered from the scene and never from its pixels.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont


SIDE = 48
CELL = 16
POSITIONS = (
    ("top-left", "top", "top-right"),
    ("left", "center", "right"),
    ("bottom-left", "bottom", "bottom-right"),
)
CELLS = {name: (column, row) for row, names in enumerate(POSITIONS) for column, name in enumerate(names)}

COLOURS = {
    "red": (225, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 90, 240),
    "yellow": (240, 225, 50),
    "purple": (165, 60, 205),
    "orange": (245, 140, 25),
    "white": (240, 240, 240),
}
SIZES = {"small": 9, "large": 15}  # side in pixels, at most CELL
UNSEEN_PAIRS = (("red", "heart"), ("green", "star"), ("blue", "triangle"), ("yellow", "cross"))
SAMENESS = (0.0, 0.0, 0.5, 0.8)  # a scene draws one: how likely an object repeats the colour of an earlier one

# The 32 characters whose pictures differ most: no O (Q), F (E), G (C), I (T), P (R), 0, 1, 8 (3, S).
SYMBOLS = "ABCDEHJKLMNQRSTUVWXYZ2345679#%+="
FONT_SIZE, STROKE = 19, 0.4  # pixels; the stroke makes the thin lines of the embedded font bolder
GLYPH_WIDTH, GLYPH_HEIGHT = 14, 16  # the wide M and W are narrowed, so that three glyphs fit in a row
PITCH = 15

BACKGROUND = (8, 40)  # darkest and brightest level of a background channel
NOISE = 6.0  # standard deviation, in levels of 0..255

DESCRIPTION = "{0.size} {0.colour} {0.shape} at {0.position}"

Pair = tuple[str, str]


@dataclass(frozen=True)
class Object:
    """A shape in a cell: `left`, `top` are its first pixel inside the cell."""

    colour: str
    shape: str
    size: str
    position: str
    left: int
    top: int

    @property
    def pair(self) -> Pair:
        """Colour and shape."""
        return self.colour, self.shape


@dataclass(frozen=True)
class Text:
    """A line of characters out of `SYMBOLS`: `left`, `top` are its first pixel in the picture."""

    characters: str
    colour: str
    left: int
    top: int


@dataclass(frozen=True)
class Scene:
    """Everything a picture shows. It holds objects, in reading order and in different cells, or a text.

    `background` is RGB in 0..255, `noise` the seed of the pixel noise.
    """

    background: tuple[int, int, int]
    noise: int
    objects: tuple[Object, ...] = ()
    text: Text | None = None


def _points(x: Callable[[float], float], y: Callable[[float], float], count: int) -> list[tuple[float, float]]:
    """`count` points of a closed curve over one turn, y pointing down."""
    turns = [2 * math.pi * k / count for k in range(count)]
    return [(x(t), y(t)) for t in turns]


def _star() -> list[tuple[float, float]]:
    radii = [1.1 if k % 2 == 0 else 0.45 for k in range(10)]
    return [(r * math.sin(math.pi * k / 5), 0.08 - r * math.cos(math.pi * k / 5)) for k, r in enumerate(radii)]


# Outlines in a square from -1 to 1.
_ARM = 0.34
SHAPES = {
    "circle": _points(math.sin, math.cos, 64),
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0.0, -1.0), (1.0, 0.9), (-1.0, 0.9)],
    "star": _star(),
    "cross": [
        *((-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM)),
        *((_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)),
    ],
    "heart": _points(
        lambda t: math.sin(t) ** 3,
        lambda t: -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16 - 0.1,
        64,
    ),
}
SEEN_PAIRS = tuple((c, s) for c in COLOURS for s in SHAPES if (c, s) not in UNSEEN_PAIRS)


def _next_pair(rng: random.Random, earlier: Sequence[Pair], sameness: float) -> Pair:
    """A pair out of `SEEN_PAIRS`, which may repeat the colour or the shape of an earlier one."""
    while True:
        colour, shape = rng.choice(SEEN_PAIRS)
        if earlier and rng.random() < sameness:
            colour = rng.choice(earlier)[0]
        if earlier and rng.random() < sameness / 2:
            shape = rng.choice(earlier)[1]
        if (colour, shape) not in UNSEEN_PAIRS:
            return colour, shape


def _background(rng: random.Random) -> tuple[int, int, int]:
    level = rng.randint(*BACKGROUND)
    red, green, blue = (level + rng.randint(-6, 6) for _ in range(3))
    return red, green, blue


def describe(objects: Sequence["Object"]) -> str:
    """The objects in words, in the order in which they are given."""
    return ", ".join(DESCRIPTION.format(o) for o in objects)


def sample_scene(rng: random.Random, *, count: int | None = None, pairs: Sequence[Pair] = ()) -> Scene:
    """A scene of objects.

    Args:
        rng: Source of all randomness.
        count: Objects in the scene, 1..4; drawn evenly if None.
        pairs: Colour and shape of objects the scene must hold. The others are drawn out of `SEEN_PAIRS`: a pair of
            `UNSEEN_PAIRS` is in a scene only if it is named here.
    """
    count = count or rng.randint(max(1, len(pairs)), 4)
    sameness = rng.choice(SAMENESS)
    drawn = list(pairs)
    while len(drawn) < count:
        drawn.append(_next_pair(rng, drawn, sameness))
    objects = []
    for (colour, shape), position in zip(drawn, rng.sample(list(CELLS), count), strict=True):
        size = rng.choice(list(SIZES))
        room = CELL - SIZES[size]
        objects.append(Object(colour, shape, size, position, rng.randint(0, room), rng.randint(0, room)))
    reading_order = sorted(objects, key=lambda o: list(CELLS).index(o.position))
    return Scene(_background(rng), rng.getrandbits(32), objects=tuple(reading_order))


def sample_text_scene(rng: random.Random) -> Scene:
    """A scene of one to three characters, each length and each character as likely as the others."""
    characters = "".join(rng.choices(SYMBOLS, k=rng.randint(1, 3)))
    left = rng.randint(0, SIDE - PITCH * (len(characters) - 1) - GLYPH_WIDTH)
    text = Text(characters, rng.choice(list(COLOURS)), left, rng.randint(0, SIDE - GLYPH_HEIGHT))
    return Scene(_background(rng), rng.getrandbits(32), text=text)


@cache
def _shape_mask(shape: str, side: int) -> np.ndarray:
    """Coverage of a shape, `(side, side, 1)` in 0..1, drawn eight times as large and averaged down."""
    large = Image.new("L", (8 * side, 8 * side))
    corners = [(4 * side * (1 + x), 4 * side * (1 + y)) for x, y in SHAPES[shape]]
    ImageDraw.Draw(large).polygon(corners, fill=255)
    return np.asarray(large.resize((side, side), Image.Resampling.BOX), np.float32)[..., None] / 255


@cache
def _glyph_mask(character: str) -> np.ndarray:
    """Coverage of a character, `(GLYPH_HEIGHT, GLYPH_WIDTH, 1)` in 0..1, centred, on a common base line."""
    font = ImageFont.load_default(FONT_SIZE)
    left, _, right, _ = font.getbbox(character, anchor="ls", stroke_width=STROKE)
    glyph = Image.new("L", (math.ceil(right - left), GLYPH_HEIGHT))
    base_line = (-left, GLYPH_HEIGHT - 2)
    ImageDraw.Draw(glyph).text(base_line, character, fill=255, font=font, anchor="ls", stroke_width=STROKE)
    if glyph.width > GLYPH_WIDTH:
        glyph = glyph.resize((GLYPH_WIDTH, GLYPH_HEIGHT))
    centred = Image.new("L", (GLYPH_WIDTH, GLYPH_HEIGHT))
    centred.paste(glyph, ((GLYPH_WIDTH - glyph.width) // 2, 0))
    return np.asarray(centred, np.float32)[..., None] / 255


def paint(canvas: np.ndarray, mask: np.ndarray, colour: Sequence[int], left: int, top: int) -> None:
    """Blend `colour` into `canvas` `(SIDE, SIDE, 3)`, in place, where `mask` `(height, width, 1)` covers it."""
    window = canvas[top : top + mask.shape[0], left : left + mask.shape[1]]
    window += mask * (np.asarray(colour, np.float32) - window)


def noisy_image(canvas: np.ndarray, seed: int) -> Image.Image:
    """The picture of `canvas` `(SIDE, SIDE, 3)` in 0..255, with pixel noise drawn from `seed`."""
    noise = np.random.default_rng(seed).standard_normal(canvas.shape, np.float32)
    return Image.fromarray(np.clip(canvas + NOISE * noise, 0, 255).astype(np.uint8))


def blank_canvas(background: Sequence[int]) -> np.ndarray:
    """A canvas `(SIDE, SIDE, 3)`, float32 in 0..255, of one colour."""
    return np.full((SIDE, SIDE, 3), background, np.float32)


def render(scene: Scene) -> Image.Image:
    """The 48x48 RGB picture of a scene; the same scene always gives the same pixels."""
    canvas = blank_canvas(scene.background)
    for o in scene.objects:
        column, row = CELLS[o.position]
        mask = _shape_mask(o.shape, SIZES[o.size])
        paint(canvas, mask, COLOURS[o.colour], CELL * column + o.left, CELL * row + o.top)
    if scene.text:
        for k, character in enumerate(scene.text.characters):
            paint(
                canvas, _glyph_mask(character), COLOURS[scene.text.colour], scene.text.left + PITCH * k, scene.text.top
            )
    return noisy_image(canvas, scene.noise)

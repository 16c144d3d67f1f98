"""Cut-outs and backgrounds to pictures."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageEnhance, ImageFilter, ImageOps


TABLES = Path(__file__).parent
UPRIGHT = (None, "sign")  # kinds that are not mirrored: they may hold writing

Box = tuple[float, float, float, float]  # left, top, right, bottom, as shares of the picture
WHOLE: Box = (0, 0, 1, 1)
LEFT, RIGHT = (0, 0, 0.5, 1), (0.5, 0, 1, 1)
QUARTERS = [(x, y, x + 0.5, y + 0.5) for x in (0, 0.5) for y in (0, 0.5)]


@dataclass(frozen=True)
class Stamp:
    """A cut-out.

    Args:
        file: Its file, the name of the row of both tables.
        name: A short English name.
        kind: `"animal"`, `"food"` and so on; `None` for what is none of them.
        caption: What the source says of it, in English.
        translations: The same in other languages, by their codes.
        held_out: Never shown and never named in training.
    """

    file: str
    name: str
    kind: str | None
    caption: str
    translations: dict[str, str]
    held_out: bool


@dataclass(frozen=True)
class Photo:
    """A photograph of another source: its file, the names that are right (none of them trained: `None`), its kind."""

    file: str
    names: list[str] | None
    kind: str
    split: str


def load_stamps(folder: Path, table: Path = TABLES / "stamps.json") -> list[Stamp]:
    """Read both tables: ours, and `stamps.jsonl` beside the pictures, with captions and translations."""
    said = {row["file"]: row for row in map(json.loads, (folder / "stamps.jsonl").read_text().splitlines())}
    return [
        Stamp(**row, caption=said[row["file"]]["caption"], translations=said[row["file"]]["translations"])
        for row in json.loads(table.read_text())
        if row["file"] in said
    ]


def load_photos(folder: Path, split: str, table: Path = TABLES / "photos.json") -> list[Photo]:
    """Read our table of photographs; drawn ones, and those that the folder lacks, are left out."""
    rows = [row for row in json.loads(table.read_text()) if row["split"] == split and not row["drawn"]]
    photos = [Photo(row["file"], row["names"], row["kind"], split) for row in rows]
    return [photo for photo in photos if (folder / photo.file).is_file()]


class Studio:
    """Composes pictures of cut-outs.

    Args:
        stamps: The cut-outs.
        folder: The folder of their files.
        backgrounds: Files of photographs to stand before.
        size: Side of a picture, in pixels.
    """

    def __init__(self, stamps: list[Stamp], folder: Path, backgrounds: list[Path], size: int = 224):
        self.size = size
        self.cut_outs = {stamp.file: _cut_out(folder / stamp.file) for stamp in stamps}
        self.backgrounds = [Image.open(path).convert("RGB") for path in backgrounds]

    def compose(self, placed: list[tuple[Stamp, Box]], rng: random.Random, wild: bool = False) -> Image.Image:
        """Set cut-outs into their boxes, each with a size, place, turn and light of its own.

        Args:
            placed: The cut-outs, and where each may stand.
            rng: Where all that is random comes from.
            wild: Turn and stretch them further, and see the whole as a poor photograph may: a part of it, blurred,
                grey, half hidden. So a thing is learnt by more than the one view that there is of it.
        """
        picture = self._background(rng)
        for stamp, (left, top, right, bottom) in placed:
            cut_out = self.cut_outs[stamp.file]
            if stamp.kind not in UPRIGHT and rng.random() < 0.5:
                cut_out = ImageOps.mirror(cut_out)
            if wild:
                stretched = [max(1, round(side * rng.uniform(0.75, 1.3))) for side in cut_out.size]
                cut_out = cut_out.resize(stretched, Image.Resampling.BILINEAR)
            turn = rng.uniform(-45, 45) if wild else rng.uniform(-15, 15)
            cut_out = cut_out.rotate(turn, Image.Resampling.BILINEAR, expand=True)
            width, height = (right - left) * self.size, (bottom - top) * self.size
            scale = rng.uniform(0.55, 0.98) * min(width / cut_out.width, height / cut_out.height)
            cut_out = cut_out.resize([max(1, round(side * scale)) for side in cut_out.size])
            light, alpha = cut_out.convert("RGB"), cut_out.getchannel("A")
            for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
                light = enhance(light).enhance(rng.uniform(0.5, 1.5) if wild else rng.uniform(0.75, 1.25))
            x = left * self.size + rng.uniform(0, width - cut_out.width)
            y = top * self.size + rng.uniform(0, height - cut_out.height)
            picture.paste(light, (round(x), round(y)), alpha)
        return self._worsened(picture, rng, whole=placed[0][1] == WHOLE) if wild else picture

    def _worsened(self, picture: Image.Image, rng: random.Random, whole: bool) -> Image.Image:
        """See a picture as a poor photograph; where it is of one thing alone, a part of it, and partly hidden."""
        if whole and rng.random() < 0.6:
            side = rng.uniform(0.5, 1) * self.size
            x, y = (rng.uniform(0, self.size - side) for _ in range(2))
            picture = picture.resize(picture.size, Image.Resampling.BICUBIC, (x, y, x + side, y + side))
        if whole and rng.random() < 0.3:
            sides = [round(rng.uniform(0.1, 0.45) * self.size) for _ in range(2)]
            corner = [rng.randrange(self.size - side) for side in sides]
            picture.paste(
                tuple(rng.randrange(256) for _ in range(3)), (*corner, *map(sum, zip(corner, sides, strict=True)))
            )
        if rng.random() < 0.25:
            picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 2)))
        return ImageOps.grayscale(picture).convert("RGB") if rng.random() < 0.1 else picture

    def _background(self, rng: random.Random) -> Image.Image:
        """White, a colour, two colours that run into each other, or a part of a photograph."""
        square, drawn = (self.size, self.size), rng.random()
        colours = [tuple(rng.randrange(256) for _ in range(3)) for _ in range(2)]
        if drawn < 0.2:
            return Image.new("RGB", square, "white")
        if drawn < 0.4 or not self.backgrounds:
            return Image.new("RGB", square, colours[0])
        if drawn < 0.55:
            shade = Image.linear_gradient("L").rotate(rng.choice([0, 90, 180, 270])).resize(square)
            return Image.composite(*(Image.new("RGB", square, colour) for colour in colours), shade)
        photo = rng.choice(self.backgrounds)
        side = rng.uniform(0.5, 1) * min(photo.size)
        x, y = (rng.uniform(0, length - side) for length in photo.size)
        part = photo.resize(square, Image.Resampling.BILINEAR, (x, y, x + side, y + side))
        return ImageOps.mirror(part) if rng.random() < 0.5 else part


def _cut_out(path: Path) -> Image.Image:
    """Open a picture with its alpha, without the border that nothing stands in, 256 pixels at most."""
    picture = Image.open(path).convert("RGBA")
    picture = picture.crop(picture.getchannel("A").getbbox())
    picture.thumbnail((256, 256))
    return picture

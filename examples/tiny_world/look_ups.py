"""Look-ups: what can be asked about a scene, with the one right answer, before it is worded.

`questions.py` words a look-up as an instruction, `corpus.py` as a key and its value.
"""

import random
from dataclasses import dataclass

from .scenes import COLOURS, SEEN_PAIRS, Object, Pair, Scene


# What names the object, for the kinds that ask for an attribute of one object.
NAMED_BY = {
    "colour": ("shape",),
    "shape": ("colour",),
    "size": ("colour", "shape"),
    "position": ("colour", "shape"),
}
OBJECT_KINDS = (*NAMED_BY, "count", "count_colour", "yes_no")
TEXT_KINDS = ("reading", "text_colour")


@dataclass(frozen=True)
class LookUp:
    """A question without its wording: the kind, the `colour` and `shape` to mention where it has them, the answer."""

    kind: str
    words: dict[str, str]
    answer: str


def objects_named_alone(scene: Scene, kind: str) -> list[Object]:
    """The objects that a look-up of this kind, one of `NAMED_BY`, names without ambiguity."""
    names = [tuple(getattr(o, attribute) for attribute in NAMED_BY[kind]) for o in scene.objects]
    return [o for o, name in zip(scene.objects, names, strict=True) if names.count(name) == 1]


def named_look_up(kind: str, o: Object) -> LookUp:
    """Asks for the attribute `kind`, one of `NAMED_BY`, of an object."""
    return LookUp(kind, {name: getattr(o, name) for name in NAMED_BY[kind]}, getattr(o, kind))


def _count_colour(rng: random.Random, scene: Scene) -> LookUp:
    """Count a colour; large counts, which are rare, are drawn more often."""
    shown = [o.colour for o in scene.objects]
    numbers = sorted({shown.count(colour) for colour in COLOURS})
    (number,) = rng.choices(numbers, [n + 1 for n in numbers])
    colour = rng.choice([colour for colour in COLOURS if shown.count(colour) == number])
    return LookUp("count_colour", {"colour": colour}, str(number))


def _yes_no(rng: random.Random, scene: Scene) -> LookUp:
    """Half yes, half no; a no asks, if possible, for a colour and a shape that are both there, but not together.

    Where it cannot (a single object, say), one of the two is there. Unseen pairs are never asked for.
    """
    shown = [o.pair for o in scene.objects]
    answer = rng.choice(("yes", "no"))
    if answer == "yes":
        colour, shape = rng.choice(shown)
    else:
        colours, shapes = {colour for colour, _ in shown}, {shape for _, shape in shown}
        absent = [pair for pair in SEEN_PAIRS if pair not in shown]
        both = [(c, s) for c, s in absent if c in colours and s in shapes]
        colour, shape = rng.choice(both or [(c, s) for c, s in absent if c in colours or s in shapes])
    return LookUp("yes_no", {"colour": colour, "shape": shape}, answer)


def look_up(rng: random.Random, kind: str, scene: Scene, pair: Pair | None = None) -> LookUp | None:
    """Draw a look-up about a scene.

    Args:
        rng: Source of all randomness.
        kind: One of `OBJECT_KINDS` for a scene of objects, of `TEXT_KINDS` for a text.
        scene: What is asked about.
        pair: Colour and shape of the object to ask about, for the kinds of `NAMED_BY`.

    Returns:
        The look-up, or None if the scene has no object that can be named without ambiguity.
    """
    match kind:
        case "count":
            return LookUp(kind, {}, str(len(scene.objects)))
        case "count_colour":
            return _count_colour(rng, scene)
        case "yes_no":
            return _yes_no(rng, scene)
        case "reading":
            return LookUp(kind, {}, scene.text.characters)
        case "text_colour":
            return LookUp(kind, {}, scene.text.colour)
    candidates = [o for o in objects_named_alone(scene, kind) if pair in (None, o.pair)]
    return named_look_up(kind, rng.choice(candidates)) if candidates else None

"""The training data of the base model: captions, look-ups, in-context sequences, lines of text, and no instruction.

A document is a list of pieces of text, each marked as learned or not, and the pictures of its `<image>` tokens in
order. A value is on the line of its key or on a line of its own, next to it or after a leader of dots, so that a base
does not find operands by their distance, which differs in an instruction.
"""

import random
from dataclasses import dataclass, field

from PIL import Image

from .dialogue import article
from .digits import sample_digit
from .language import CATEGORY, SPELLED_WORDS, draw_difference, draw_digits, draw_summands, draw_words, joined
from .look_ups import OBJECT_KINDS, TEXT_KINDS, look_up
from .scenes import COLOURS, SEEN_PAIRS, SHAPES, Scene, describe, render, sample_scene, sample_text_scene


IMAGE, END_OF_CHUNK = "<image>", "<|endofchunk|>"

# Shares of the kinds of documents, and of what their pictures show, in each phase of training.
DOCUMENTS = {
    "perceive": {"dense_caption": 60, "look_ups": 8, "in_context": 12, "text_lines": 20},
    "look_up": {"dense_caption": 12, "look_ups": 46, "in_context": 14, "text_lines": 28},
}
PICTURES = {
    "perceive": {"objects": 57, "text": 35, "digit": 8},
    "look_up": {"objects": 70, "text": 22, "digit": 8},
}
LEADERS, LONGEST_LEADER = 0.5, 9  # how many of the entries have dots before their value, and how many dots
SHARES = {"yes_no": 3, "position": 2}  # look-ups of these kinds, the last to be learned, to one of each other kind

CAPTIONS = {
    "text": "{0.colour} text: {0.characters}",
    "digit": "digit: {}",
}
IN_ORDER = "in order:"
# Each key in two forms: a base that knows one form alone answers to that form alone.
KEYS = {
    "colour": ("{shape}:", "{shape} colour:"),
    "shape": ("{colour}:", "{colour} shape:"),
    "size": ("{colour} {shape} size:", "size {colour} {shape}:"),
    "position": ("{colour} {shape} position:", "position {colour} {shape}:"),
    "count": ("objects:", "count:"),
    "count_colour": ("{colour} objects:", "count {colour}:"),
    "yes_no": ("any {colour} {shape}:", "{colour} {shape} there:"),
    "reading": ("text:", "characters:"),
    "text_colour": ("colour:", "text colour:"),
    "digit": ("digit:", "number:"),
}
LABELLED = "this is a"
TEXT_KEYS = {
    "sum": ("{} + {} =", "{} plus {}:", "plus {} {}:"),
    "difference": ("{} - {} =", "{} minus {}:", "minus {} {}:"),
    "sort": ("sort {}:", "{} sorted:"),
    "copy": ("copy {}:", "{} again:"),
    "fact": ("{}:", "kind {}:"),
}
STATEMENT = "{} {} is {} {}\n"
# What in-context sequences call their classes: these words, of one token each, or words that are spelled. A base that
# knew such tokens alone as names said no other word as one.
PSEUDO_WORDS = tuple(
    start + end for start in "da fe gi ko lu mo ni pu ra ze".split() for end in "x v k b sk lk mp nt rg zz".split()
)
SPELLED = 1 / 3  # how many sequences have spelled names, and how many words to copy are such

Piece = tuple[str, bool]


@dataclass(frozen=True)
class Document:
    """A text in pieces `(text, is learned)`, and the pictures of its `<image>` tokens in their order."""

    pieces: list[Piece]
    images: list[Image.Image] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The whole text, with its control tokens."""
        return "".join(text for text, _ in self.pieces)


def _entry(rng: random.Random, key: str, value: str | int) -> list[Piece]:
    """A key and its value, on one line or on two; the value is learned, and where it ends."""
    if rng.random() < LEADERS:
        key += " ." * rng.randint(1, LONGEST_LEADER)
    if rng.random() < 0.5:
        return [(f"{key}\n", False), (f"{value}\n", True)]
    return [(key, False), (f" {value}\n", True)]


def _object_caption(rng: random.Random, scene: Scene) -> list[Piece]:
    """All objects, in reading order where the caption says so, and else in any."""
    in_order = rng.random() < 0.5
    objects = scene.objects if in_order else rng.sample(scene.objects, len(scene.objects))
    return [(IN_ORDER, False), (f" {describe(objects)}", True)] if in_order else [(describe(objects), True)]


def dense_caption(rng: random.Random, shows: str = "objects") -> Document:
    """All that a picture shows. `shows`: "objects", "text" or "digit"."""
    match shows:
        case "objects":
            scene = sample_scene(rng)
            picture, caption = render(scene), _object_caption(rng, scene)
        case "text":
            scene = sample_text_scene(rng)
            picture, caption = render(scene), [(CAPTIONS["text"].format(scene.text), True)]
        case "digit":
            picture, label = sample_digit(rng)
            caption = [(CAPTIONS["digit"].format(label), True)]
    return Document([(IMAGE, False), *caption, (END_OF_CHUNK, True)], [picture])


def _scene_entries(rng: random.Random, scene: Scene) -> list[tuple[str, str]]:
    """Five or six keys with their values about a scene of objects, the two of a text.

    No key occurs twice, except for yes and no: redrawing those would leave more no's than yes's.
    """
    if scene.text:
        found = [look_up(rng, kind, scene) for kind in rng.sample(TEXT_KINDS, len(TEXT_KINDS))]
        return [(rng.choice(KEYS[f.kind]), f.answer) for f in found]
    weights = [SHARES.get(kind, 1) for kind in OBJECT_KINDS]
    asked, count = [], rng.randint(5, 6)
    while len(asked) < count:
        (kind,) = rng.choices(OBJECT_KINDS, weights)
        found = look_up(rng, kind, scene)
        if found and (kind == "yes_no" or found not in asked):
            asked.append(found)
    return [(rng.choice(KEYS[found.kind]).format(**found.words), found.answer) for found in asked]


def look_ups(rng: random.Random, shows: str = "objects") -> Document:
    """Keys and values about one picture. `shows`: "objects", "text" or "digit"."""
    if shows == "digit":
        picture, label = sample_digit(rng)
        entries = [(rng.choice(KEYS["digit"]), label)]
    else:
        scene = sample_text_scene(rng) if shows == "text" else sample_scene(rng)
        picture, entries = render(scene), _scene_entries(rng, scene)
    lines = [piece for key, value in entries for piece in _entry(rng, key, value)]
    return Document([(IMAGE, False), *lines, (END_OF_CHUNK, False)], [picture])


def in_context(rng: random.Random, *, count: int = 9, classes: int | None = None, rule: str | None = None) -> Document:
    """Pictures of one object, each followed by the made-up name of its class; names are drawn anew for every sequence.

    Only names are learned, and each only where an example has shown it: the first of a class can only be guessed.

    Args:
        rng: Source of all randomness.
        count: Pictures in the sequence.
        classes: How many classes, 2..4 at random if None.
        rule: What a class has in common, "colour" or "shape"; either if None.
    """
    axis = ("colour", "shape").index(rule or rng.choice(("colour", "shape")))
    members = rng.sample(list((COLOURS, SHAPES)[axis]), classes or rng.randint(2, 4))
    words = SPELLED_WORDS["train"] if rng.random() < SPELLED else PSEUDO_WORDS
    names = dict(zip(members, rng.sample(words, len(members)), strict=True))
    pieces, images, shown = [], [], set()
    for _ in range(count):
        member = rng.choice(members)
        pair = rng.choice([pair for pair in SEEN_PAIRS if pair[axis] == member])
        images.append(render(sample_scene(rng, count=1, pairs=[pair])))
        name = (f" {names[member]}", member in shown)
        pieces += [(IMAGE, False), (LABELLED, False), name, (END_OF_CHUNK, False)]
        shown.add(member)
    return Document(pieces, images)


def _text_line(rng: random.Random) -> list[Piece]:
    kind = rng.choice((*TEXT_KEYS, "statement"))
    match kind:
        case "sum":
            a, b = draw_summands(rng, "train")
            words, value = (a, b), a + b
        case "difference":
            a, b = draw_difference(rng, "train")
            words, value = (a, b), a - b
        case "sort":
            numbers = draw_digits(rng, "train")
            words, value = (joined(numbers),), joined(sorted(numbers))
        case "copy":
            spelled = rng.sample(SPELLED_WORDS["train"], rng.randint(1, 3))
            value = joined(spelled if rng.random() < SPELLED else draw_words(rng, "train"))
            words = (value,)
        case "fact":
            noun, value = rng.choice(list(CATEGORY.items()))
            words = (noun,)
        case "statement":
            noun, category = rng.choice(list(CATEGORY.items()))
            return [(STATEMENT.format(article(noun), noun, article(category), category), True)]
    return _entry(rng, rng.choice(TEXT_KEYS[kind]).format(*words), value)


def text_lines(rng: random.Random) -> Document:
    """Five to eight lines of arithmetic, sorting, copying and facts; of what is held out, only the facts."""
    return Document([piece for _ in range(rng.randint(5, 8)) for piece in _text_line(rng)])


def document(seed: int, index: int, phase: str) -> Document:
    """Document `index` of a phase, "perceive" or "look_up", as a pure function of its arguments."""
    rng = random.Random(f"{phase} {seed} {index}")
    (kind,) = rng.choices(list(DOCUMENTS[phase]), DOCUMENTS[phase].values())
    (shows,) = rng.choices(list(PICTURES[phase]), PICTURES[phase].values())
    match kind:
        case "dense_caption":
            return dense_caption(rng, shows)
        case "look_ups":
            return look_ups(rng, shows)
        case "in_context":
            return in_context(rng)
        case "text_lines":
            return text_lines(rng)

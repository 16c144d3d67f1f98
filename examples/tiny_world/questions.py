"""Skills that need a picture: one function each, `(rng, split) -> Example`.

Scenes are drawn anew in both splits, from other streams of `rng`; only the digits are a finite set with a test part.
"""

import random
from collections.abc import Callable
from functools import partial

from PIL import Image

from .dialogue import Example, Turn, article, dialogue
from .digits import sample_digit
from .look_ups import OBJECT_KINDS, TEXT_KINDS, LookUp, look_up, named_look_up, objects_named_alone
from .scenes import UNSEEN_PAIRS, Pair, Scene, describe, render, sample_scene, sample_text_scene


WORDINGS = {
    "colour": ("What colour is the {shape}?", "Tell me the colour of the {shape}.", "Name the colour of the {shape}."),
    "shape": (
        "What shape is the {colour} object?",
        "Tell me the shape of the {colour} object.",
        "Name the shape of the {colour} object.",
    ),
    "size": ("Is the {colour} {shape} small or large?", "What size is the {colour} {shape}?"),
    "position": ("Where is the {colour} {shape}?", "Tell me where the {colour} {shape} is."),
    "count": ("How many objects are there?", "How many objects does the picture show?", "Count the objects."),
    "count_colour": (
        "How many {colour} objects are there?",
        "How many {colour} objects does the picture show?",
        "Count the {colour} objects.",
    ),
    "yes_no": (
        "Is there {a} {colour} {shape}?",
        "Does the picture show {a} {colour} {shape}?",
        "Can you see {a} {colour} {shape}?",
    ),
    "reading": ("What does the text say?", "Read the text.", "Tell me what the text says."),
    "text_colour": ("What colour is the text?", "Tell me the colour of the text.", "Name the colour of the text."),
    "it_position": ("Where is it?", "Tell me where it is."),
    "caption": ("Describe the picture.", "What does the picture show?"),
    "digits": ("Which digit is this?", "What digit does the picture show?", "Read the digit."),
}


def ask(rng: random.Random, found: LookUp, *images: Image.Image) -> Turn:
    """A look-up as a question, worded at random, with its answer."""
    question = rng.choice(WORDINGS[found.kind])
    return Turn(question.format(a=article(found.words.get("colour", "a")), **found.words), found.answer, images)


def scene_with(rng: random.Random, kind: str, pair: Pair | None = None) -> tuple[Scene, LookUp]:
    """A scene and a look-up of this kind about it, about the object `pair` if given."""
    while True:
        scene = sample_text_scene(rng) if kind in TEXT_KINDS else sample_scene(rng, pairs=[pair] if pair else ())
        if found := look_up(rng, kind, scene, pair):
            return scene, found


def single_look_up(rng: random.Random, split: str = "train", *, kind: str) -> Example:
    """One question of a kind, of `OBJECT_KINDS` or `TEXT_KINDS`, about one picture."""
    scene, found = scene_with(rng, kind)
    return dialogue(kind, [ask(rng, found, render(scene))])


def count_colour(rng: random.Random, split: str = "train") -> Example:
    """How many objects have a colour: "0" to "4", each as likely as the others."""
    answer = str(rng.randint(0, 4))
    while True:
        scene, found = scene_with(rng, "count_colour")
        if found.answer == answer:
            return dialogue("count_colour", [ask(rng, found, render(scene))])


def unseen_pairs(rng: random.Random, split: str = "test") -> Example:
    """Colour, shape or position of an object whose pair of colour and shape occurs in no training sample."""
    scene, found = scene_with(rng, rng.choice(("colour", "shape", "position")), rng.choice(UNSEEN_PAIRS))
    return dialogue("unseen_pairs", [ask(rng, found, render(scene))])


def second_turn(rng: random.Random, split: str = "train") -> Example:
    """A question that names an object, then where "it" is."""
    kind = rng.choice(("colour", "shape", "size"))
    while not (candidates := objects_named_alone(scene := sample_scene(rng), kind)):
        pass
    it = rng.choice(candidates)
    where = Turn(rng.choice(WORDINGS["it_position"]), it.position)
    return dialogue("second_turn", [ask(rng, named_look_up(kind, it), render(scene)), where])


def two_pictures(rng: random.Random, split: str = "train") -> Example:
    """A picture and a question, then another picture and a question, each about the picture it comes with."""
    drawn = [scene_with(rng, rng.choice(OBJECT_KINDS)) for _ in range(2)]
    return dialogue("two_pictures", [ask(rng, found, render(scene)) for scene, found in drawn])


def three_turns(rng: random.Random, split: str = "train") -> Example:
    """Three questions of different kinds about one picture, which comes with the first."""
    kinds = rng.sample(OBJECT_KINDS, 3)
    while True:
        scene = sample_scene(rng)
        found = [look_up(rng, kind, scene) for kind in kinds]
        if all(found):
            break
    first, *others = found
    return dialogue("three_turns", [ask(rng, first, render(scene)), *(ask(rng, f) for f in others)])


def caption(rng: random.Random, split: str = "train") -> Example:
    """All objects of the picture, in reading order."""
    scene = sample_scene(rng)
    return dialogue("caption", [Turn(rng.choice(WORDINGS["caption"]), describe(scene.objects), [render(scene)])])


def digits(rng: random.Random, split: str = "train") -> Example:
    """A handwritten digit."""
    picture, label = sample_digit(rng, split)
    return dialogue("digits", [Turn(rng.choice(WORDINGS["digits"]), label, [picture])])


SKILLS: dict[str, Callable[..., Example]] = {
    "colour": partial(single_look_up, kind="colour"),
    "shape": partial(single_look_up, kind="shape"),
    "size": partial(single_look_up, kind="size"),
    "position": partial(single_look_up, kind="position"),
    "count": partial(single_look_up, kind="count"),
    "count_colour": count_colour,
    "yes_no": partial(single_look_up, kind="yes_no"),
    "reading": partial(single_look_up, kind="reading"),
    "text_colour": partial(single_look_up, kind="text_colour"),
    "caption": caption,
    "digits": digits,
    "second_turn": second_turn,
    "two_pictures": two_pictures,
    "three_turns": three_turns,
    "unseen_pairs": unseen_pairs,
}

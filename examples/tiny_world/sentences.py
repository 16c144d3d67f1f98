"""Two sources of instructions about pictures, one that answers in a sentence and one that answers in a word.

Both ask for colours and positions, in the same words; one kind, and captions, the first asks alone, and two kinds the
second.
"""

import random
from dataclasses import replace

from . import questions
from .dialogue import Example, article, dialogue
from .scenes import render


# Of words that the base has learnt to write: the output rows of all others stay as they were drawn.
SENTENCES = {
    "colour": "a {shape} is {answer}",
    "size": "{article} {colour} {shape} is {answer}",
    "position": "{article} {colour} {shape} is at {answer}",
}
IN_SENTENCES = ("colour", "position", "size", "caption")
IN_A_WORD = ("colour", "position", "shape", "count")
KINDS = tuple(dict.fromkeys((*IN_SENTENCES, *IN_A_WORD)))


def reply(kind: str, seed: int, index: int, in_a_word: bool, split: str = "train") -> Example:
    """Example `index` of a kind, of `KINDS`; the same scene and question whether or not it is answered in a word.

    A caption has one form, all objects of the picture.
    """
    rng = random.Random(f"{split} sentences {kind} {seed} {index}")
    if kind == "caption":
        return questions.caption(rng, split)
    scene, found = questions.scene_with(rng, kind)
    turn = questions.ask(rng, found, render(scene))
    if in_a_word:
        return dialogue(kind, [turn])
    some = article(found.words.get("colour", "a"))
    sentence = SENTENCES[kind].format(article=some, answer=found.answer, **found.words)
    return dialogue(kind, [replace(turn, answer=sentence)])


def two_sources(seed: int, count: int, share: float) -> list[Example]:
    """`count` examples, each with the probability `share` from the source that answers in a word."""
    examples = []
    for index in range(count):
        rng = random.Random(f"two sources {seed} {index}")
        in_a_word = rng.random() < share
        examples.append(reply(rng.choice(IN_A_WORD if in_a_word else IN_SENTENCES), seed, index, in_a_word))
    return examples

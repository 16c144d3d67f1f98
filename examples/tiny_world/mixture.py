"""The instruction-tuning set: an endless sequence of examples, each a pure function of a seed and its index."""

import random

from . import language, questions
from .dialogue import Example


SKILLS = {**questions.SKILLS, **language.SKILLS}

# Shares in percent: 65 with pictures, a quarter of them with several turns, and 35 without.
MIXTURE = {
    "colour": 3.5,
    "shape": 3.5,
    "size": 3.5,
    "position": 3.5,
    "count": 3.5,
    "count_colour": 3.5,
    "text_colour": 3.5,
    "caption": 3.5,
    "yes_no": 10.5,  # the last to be learned
    "reading": 5.25,
    "digits": 5.0,
    "second_turn": 6.0,
    "two_pictures": 4.25,
    "three_turns": 6.0,
    "sums": 6.5,
    "differences": 6.5,
    "sorting": 6.5,
    "copying": 9.0,
    "facts": 6.5,
}


def example(skill: str, seed: int, index: int, split: str = "train") -> Example:
    """Example `index` of one skill; the splits "train" and "test" have no stream of randomness in common."""
    return SKILLS[skill](random.Random(f"{split} {skill} {seed} {index}"), split)


def mixture(seed: int, index: int, split: str = "train") -> Example:
    """Example `index` of the mixture; the seed gives another sequence of the same shares."""
    (skill,) = random.Random(f"mixture {split} {seed} {index}").choices(list(MIXTURE), MIXTURE.values())
    return example(skill, seed, index, split)

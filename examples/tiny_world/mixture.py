"""The instruction-tuning set: an endless sequence of examples, each a pure function of a seed and its index."""

import random

from . import language, questions
from .dialogue import Example


SKILLS = {**questions.SKILLS, **language.SKILLS}

# Shares in percent: 60 with pictures, more than a fifth of them with several turns, and 40 without. Skills that are
# learned late have more: yes and no, positions, counting what has a colour, reading, arithmetic.
MIXTURE = {
    "colour": 2.5,
    "shape": 2.5,
    "size": 3.0,
    "position": 5.0,
    "count": 2.5,
    "count_colour": 6.0,
    "text_colour": 2.0,
    "caption": 4.5,
    "yes_no": 8.0,
    "reading": 4.5,
    "digits": 5.0,
    "second_turn": 7.5,
    "two_pictures": 3.5,
    "three_turns": 3.5,
    "sums": 15.0,
    "differences": 13.0,
    "sorting": 4.0,
    "copying": 3.5,
    "facts": 4.5,
}


def example(skill: str, seed: int, index: int, split: str = "train") -> Example:
    """Example `index` of one skill; the splits "train" and "test" have no stream of randomness in common."""
    return SKILLS[skill](random.Random(f"{split} {skill} {seed} {index}"), split)


def mixture(seed: int, index: int, split: str = "train") -> Example:
    """Example `index` of the mixture; the seed gives another sequence of the same shares."""
    (skill,) = random.Random(f"mixture {split} {seed} {index}").choices(list(MIXTURE), MIXTURE.values())
    return example(skill, seed, index, split)

"""The instruction-tuning set: an endless sequence of examples, each a pure function of a seed and its index."""

import random

from . import language, questions
from .dialogue import Example


SKILLS = {**questions.SKILLS, **language.SKILLS}

# Shares in percent: 65 with pictures, more than a fifth of them with several turns, and 35 without. Skills that are
# learned late have more: yes and no, positions, counting what has a colour, reading, arithmetic.
MIXTURE = {
    "colour": 3.0,
    "shape": 3.0,
    "size": 3.5,
    "position": 6.0,
    "count": 3.0,
    "count_colour": 6.0,
    "text_colour": 2.5,
    "caption": 3.5,
    "yes_no": 9.0,
    "reading": 6.0,
    "digits": 5.0,
    "second_turn": 7.0,
    "two_pictures": 3.5,
    "three_turns": 4.0,
    "sums": 11.0,
    "differences": 9.5,
    "sorting": 5.0,
    "copying": 4.5,
    "facts": 5.0,
}


def example(skill: str, seed: int, index: int, split: str = "train") -> Example:
    """Example `index` of one skill; the splits "train" and "test" have no stream of randomness in common."""
    return SKILLS[skill](random.Random(f"{split} {skill} {seed} {index}"), split)


def mixture(seed: int, index: int, split: str = "train") -> Example:
    """Example `index` of the mixture; the seed gives another sequence of the same shares."""
    (skill,) = random.Random(f"mixture {split} {seed} {index}").choices(list(MIXTURE), MIXTURE.values())
    return example(skill, seed, index, split)

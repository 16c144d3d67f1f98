"""Skills that need no picture: one function each, `(rng, split) -> Example`, and their held-out parts.

About a tenth of all operands, numbers to sort and words to copy belong to the split "test", by a fixed hash. The
base model is told all facts (`corpus.py`), but the questions of the split "train" ask for two nouns in three.
"""

import random
import zlib
from collections.abc import Callable, Sequence

from .dialogue import Example, Turn, article, dialogue
from .scenes import COLOURS


NOUNS = {
    "fruit": "apple banana pear grape cherry peach plum lemon mango melon kiwi fig".split(),
    "vegetable": "carrot potato onion leek radish turnip cucumber cabbage parsnip bean pea pepper".split(),
    "animal": "dog cat horse cow pig sheep goat lion tiger bear wolf fox".split(),
    "vehicle": "car bus train truck tram bicycle ship boat plane taxi scooter tractor".split(),
    "tool": "hammer saw drill wrench axe shovel rake chisel screwdriver hoe spade trowel".split(),
    "instrument": "piano guitar violin flute trumpet drum harp cello clarinet banjo oboe tuba".split(),
    "garment": "shirt hat coat scarf sock glove jacket skirt dress sweater vest cap".split(),
    "building": "house church castle school hotel library museum hospital barn temple palace factory".split(),
}
CATEGORY = {noun: category for category, nouns in NOUNS.items() for noun in nouns}
FACT_NOUNS = {
    "train": [noun for nouns in NOUNS.values() for k, noun in enumerate(nouns) if k % 3 < 2],
    "test": [noun for nouns in NOUNS.values() for k, noun in enumerate(nouns) if k % 3 == 2],
}
WORDS = (*CATEGORY, *COLOURS)  # to copy

WORDINGS = {
    "sums": ("What is {} plus {}?", "Add {} and {}.", "How much is {} plus {}?"),
    "differences": ("What is {} minus {}?", "How much is {} minus {}?"),
    "sorting": ("Sort these numbers: {}", "Put these numbers in order: {}"),
    "copying": ("Repeat these words: {}", "Say these words again: {}"),
    "facts": ("What is {} {}?", "Tell me what {} {} is.", "What kind of thing is {} {}?"),
}


def is_held_out(*items: str | int) -> bool:
    """Whether this sequence belongs to the split "test": one in ten does."""
    return zlib.crc32(" ".join(map(str, items)).encode()) % 10 == 0


# Made-up words that no token stands for: the tokenizer spells them.
_SYLLABLES = [consonant + vowel for consonant in "bdfglmnprsv" for vowel in "aeiou"]
_SPELLED = [first + second for first in _SYLLABLES for second in _SYLLABLES]
SPELLED_WORDS = {split: [w for w in _SPELLED if is_held_out(w) == (split == "test")] for split in ("train", "test")}


def _draw(rng: random.Random, split: str, sample: Callable[[], Sequence], key: Callable = tuple) -> Sequence:
    """Sample until the drawn sequence, by its `key`, belongs to the split."""
    while True:
        items = sample()
        if is_held_out(*key(items)) == (split == "test"):
            return items


def draw_summands(rng: random.Random, split: str, lowest: int = 0, highest: int = 99) -> Sequence[int]:
    """Two numbers in `lowest`..`highest`; a pair and its mirror image belong to the same split."""
    return _draw(rng, split, lambda: [rng.randint(lowest, highest) for _ in range(2)], key=sorted)


def draw_difference(rng: random.Random, split: str) -> Sequence[int]:
    """A number in 0..99 and one that is not greater."""
    return _draw(rng, split, lambda: ((a := rng.randint(0, 99)), rng.randint(0, a)))


def draw_digits(rng: random.Random, split: str) -> Sequence[int]:
    """Three to five different digits, in any order."""
    return _draw(rng, split, lambda: rng.sample(range(10), rng.randint(3, 5)))


def draw_words(rng: random.Random, split: str) -> Sequence[str]:
    """Two to four different words."""
    return _draw(rng, split, lambda: rng.sample(WORDS, rng.randint(2, 4)))


def joined(items: Sequence[str | int]) -> str:
    """The items with spaces between."""
    return " ".join(map(str, items))


def _example(rng: random.Random, skill: str, answer: str | int, *words: str | int) -> Example:
    return dialogue(skill, [Turn(rng.choice(WORDINGS[skill]).format(*words), str(answer))])


# Only numbers of two digits: of smaller ones there are so few pairs that the base knows them by heart, and those that
# are held out not at all.
def sums(rng: random.Random, split: str = "train") -> Example:
    """Two numbers in 10..49, added."""
    a, b = draw_summands(rng, split, lowest=10, highest=49)
    return _example(rng, "sums", a + b, a, b)


def differences(rng: random.Random, split: str = "train") -> Example:
    """Two numbers in 10..99, the smaller subtracted from the greater."""
    a, b = _draw(rng, split, lambda: sorted((rng.randint(10, 99) for _ in range(2)), reverse=True))
    return _example(rng, "differences", a - b, a, b)


def sorting(rng: random.Random, split: str = "train") -> Example:
    """Digits, the smallest first."""
    numbers = draw_digits(rng, split)
    return _example(rng, "sorting", joined(sorted(numbers)), joined(numbers))


def copying(rng: random.Random, split: str = "train") -> Example:
    """Words, repeated."""
    words = joined(draw_words(rng, split))
    return _example(rng, "copying", words, words)


def facts(rng: random.Random, split: str = "train") -> Example:
    """The category of a noun."""
    noun = rng.choice(FACT_NOUNS[split])
    return _example(rng, "facts", CATEGORY[noun], article(noun), noun)


SKILLS: dict[str, Callable[..., Example]] = {
    "sums": sums,
    "differences": differences,
    "sorting": sorting,
    "copying": copying,
    "facts": facts,
}

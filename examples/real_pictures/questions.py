"""Questions about compositions, with their answers: what is trained, and what is tested."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from .compositions import LEFT, QUARTERS, RIGHT, WHOLE, Box, Stamp, Studio


NAME = [
    "What is this?",
    "What do you see?",
    "Name the thing in the picture.",
    "What is in the picture?",
    "What is it called?",
    "Which thing is shown here?",
]
CAPTION = ["Describe the picture.", "Write a caption.", "What does the picture show? Answer in a sentence."]
KIND = [
    "What kind of thing is this?",
    "Which kind of thing is in the picture?",
    "Is it an animal, a plant, food, or what else?",
]
IS_IT = ["Is this called {}?", "Does the picture show this: {}?", "Would you call it {}?"]
LANGUAGES = {"de": "German", "fr": "French", "es": "Spanish"}
IN_LANGUAGE = ["What is it called in {}?", "Caption the picture in {}.", "Say in {} what it is."]
UNSEEN = ["How old is it?", "Who took the picture?", "What did it cost?", "How much does it weigh?", "Who owns it?"]
NOT_SHOWN = "The picture does not show that."
COUNT = ["How many are there?", "How many things are in the picture?", "Count them."]
SECOND = ["And what is this?", "And this?", "What is in this one?", "What is this?"]
SIDES = {"left": LEFT, "right": RIGHT}

Dialogue = tuple[list[tuple[Image.Image | None, str, str]], list[Stamp]]


@dataclass
class Questions:
    """Draws dialogues: turns of a picture or `None`, a question and its answer; and what is in the pictures.

    Args:
        studio: Makes the pictures.
        stamps: What may be in them.
        rng: Where all that is random comes from.
        wild: The share of the pictures that are, see [`Studio.compose`].
    """

    studio: Studio
    stamps: list[Stamp]
    rng: random.Random
    wild: float = 0.0

    def one_thing(self) -> Dialogue:
        """One to three questions about one thing."""
        stamp = self.rng.choice(self.stamps)
        kinds: list[Callable] = [self.name, self.name, self.caption, self.kind, self.kind, self.language, self.unseen]
        asked = self.rng.sample(kinds, self.rng.choice([1, 2, 3]))
        turns = [turn for ask in dict.fromkeys(asked) if (turn := ask(stamp))]
        return self._about([(stamp, WHOLE)], turns or [self.name(stamp)])

    def yes_or_no(self) -> Dialogue:
        """Is it this, or that? Asked up to four times, until it is: no answer can be told from those before it."""
        stamp = self.rng.choice(self.stamps)
        turns = [self.is_it(stamp)]
        while len(turns) < 4 and turns[-1][1] == "no":
            turns.append(self.is_it(stamp))
        return self._about([(stamp, WHOLE)], turns)

    def sides(self) -> Dialogue:
        """Two things beside each other; the second answer cannot be told from the first."""
        both = dict(zip(SIDES, self._apart(), strict=True))
        side, other = self.rng.sample([*SIDES], 2)
        on_the = {side: (f"What is on the {side}?", both[side].name) for side in SIDES}
        which = {side: (f"On which side is the {both[side].name}?", side) for side in SIDES}
        turns = self.rng.choice(
            [
                [on_the[side], on_the[other]],
                [which[side], on_the[other]],
                [(f"What is next to the {both[other].name}?", both[side].name), which[side]],
            ]
        )
        return self._about([(both[side], box) for side, box in SIDES.items()], turns)

    def count(self) -> Dialogue:
        """One to four of the same."""
        stamp, number = self.rng.choice(self.stamps), self.rng.randint(1, 4)
        turns = [(self.rng.choice(COUNT), str(number)), *([self.name(stamp)] if self.rng.random() < 0.5 else [])]
        return self._about([(stamp, box) for box in self.rng.sample(QUARTERS, number)], turns)

    def two_pictures(self) -> Dialogue:
        """A picture, and in the next turn another one."""
        first, second = self._apart()
        ask = self.rng.choice([self.name, self.name, self.kind])
        turns = [ask(first) or self.name(first)], [(self.rng.choice(SECOND), second.name)]
        one, two = (self._about([(stamp, WHOLE)], own)[0] for stamp, own in zip((first, second), turns, strict=True))
        return one + two, [first, second]

    def name(self, stamp: Stamp) -> tuple[str, str]:
        """What is it?"""
        return self.rng.choice(NAME), stamp.name

    def caption(self, stamp: Stamp) -> tuple[str, str]:
        """What the source says."""
        return self.rng.choice(CAPTION), stamp.caption

    def kind(self, stamp: Stamp) -> tuple[str, str] | None:
        """Which kind of thing is it?"""
        return stamp.kind and (self.rng.choice(KIND), stamp.kind)

    def is_it(self, stamp: Stamp) -> tuple[str, str]:
        """Is it this? If not, it is mostly something else of the same kind."""
        if self.rng.random() < 0.5:
            return self.rng.choice(IS_IT).format(stamp.name), "yes"
        others = [other for other in self.stamps if other.name != stamp.name]
        near = [other for other in others if other.kind == stamp.kind]
        wrong = self.rng.choice(near if near and self.rng.random() < 0.7 else others)
        return self.rng.choice(IS_IT).format(wrong.name), "no"

    def language(self, stamp: Stamp) -> tuple[str, str] | None:
        """What is it in another language? Where its caption is short."""
        known = [code for code in LANGUAGES if stamp.translations.get(code)]
        if not known or len(stamp.caption.split()) > 4:
            return None
        code = self.rng.choice(known)
        return self.rng.choice(IN_LANGUAGE).format(LANGUAGES[code]), stamp.translations[code].strip()

    def unseen(self, stamp: Stamp) -> tuple[str, str]:
        """What no picture shows."""
        return self.rng.choice(UNSEEN), NOT_SHOWN

    def _about(self, placed: list[tuple[Stamp, Box]], turns: list[tuple[str, str]]) -> Dialogue:
        """Make the picture that turns are about; the first of them shows it."""
        picture = self.studio.compose(placed, self.rng, wild=self.rng.random() < self.wild)
        shown = [(picture if number == 0 else None, *turn) for number, turn in enumerate(turns)]
        return shown, [stamp for stamp, _ in placed]

    def _apart(self) -> list[Stamp]:
        """Two things of different names."""
        first = self.rng.choice(self.stamps)
        return [first, self.rng.choice([other for other in self.stamps if other.name != first.name])]

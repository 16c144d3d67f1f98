"""Example: one dialogue of the instruction data, in the chat form of transformers."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class Example:
    """A dialogue, its pictures in the order of their `{"type": "image"}` parts, and the skill its last reply needs."""

    skill: str
    messages: list[dict]
    images: list[Image.Image]

    @property
    def answer(self) -> str:
        """The last reply."""
        return self.messages[-1]["content"][0]["text"]


@dataclass(frozen=True)
class Turn:
    """A question, the one right answer to it, and the pictures that come with the question."""

    question: str
    answer: str
    images: Sequence[Image.Image] = ()


def dialogue(skill: str, turns: Sequence[Turn]) -> Example:
    """The turns as an `Example`: the pictures of a turn stand before its question."""
    messages = []
    for turn in turns:
        pictures = [{"type": "image"} for _ in turn.images]
        messages.append({"role": "user", "content": [*pictures, {"type": "text", "text": turn.question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    return Example(skill, messages, [image for turn in turns for image in turn.images])


def article(word: str) -> str:
    """The indefinite article before `word`."""
    return "an" if word[0] in "aeiou" else "a"

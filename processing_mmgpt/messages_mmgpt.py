"""Chat messages: what one may hold, checked before anything is rendered from it."""

import re
from collections.abc import Iterator
from typing import Any


CONTENT_TYPES = {"system": ("text",), "user": ("image", "text", "input"), "assistant": ("text",)}
IMAGE_SOURCES = ("image", "url", "path", "base64")

# Where a control token stands literally in somebody's text, rendering carries this private character and one more that
# numbers the token: neither the template nor the tokenizer can take them for control.
HIDDEN = "\U000f0000"


def normalise(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Check messages and bring them into one form.

    Every content becomes a list: its images, then at most one text, then at most one input. Texts of one message are
    joined, by line breaks in a user's turn; so nothing can be spelt across two parts that is not seen in one.

    Args:
        messages: Chat messages of transformers; a string content is one text part. `datasets` pads the parts of a
            message to one schema, so a part may have fields that are `None`.

    Returns:
        New messages; the given ones are left alone.

    Raises:
        TypeError: If `messages` is no list of dicts.
        ValueError: On an empty list, an unknown role or content type, a system message that is not the first, or a
            response to nothing.
    """
    if not isinstance(messages, list | tuple) or not all(isinstance(message, dict) for message in messages):
        raise TypeError(f"A conversation is a list of messages, each a dict with role and content; got {messages!r}.")
    if not messages:
        raise ValueError("A conversation needs at least one message; the list is empty.")
    result: list[dict[str, Any]] = []
    for number, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in CONTENT_TYPES:
            raise ValueError(f"Message {number} has the role {role!r}; it has to be one of {list(CONTENT_TYPES)}.")
        if role == "system" and number > 0:
            raise ValueError(f"Message {number} is a system message; only the first can be one.")
        if role == "assistant" and (not result or result[-1]["role"] != "user"):
            raise ValueError(
                f"Message {number} is a response to nothing: an assistant turn has to follow a user turn."
            )
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list | tuple):
            raise ValueError(
                f"Message {number} has the content {content!r}; it has to be a string or a list of parts."
            )
        parts = [_part(part, role, number) for part in content]
        images = [part for part in parts if part["type"] == "image"]
        separator = "\n" if role == "user" else ""
        texts = [_joined(kind, parts, separator) for kind in ("text", "input")]
        result.append({"role": role, "content": [*images, *filter(None, texts)]})
    return result


def _joined(kind: str, parts: list[dict[str, Any]], separator: str) -> dict[str, str] | None:
    texts = [part["text"] for part in parts if part["type"] == kind]
    return {"type": kind, "text": separator.join(texts)} if texts else None


def _part(part: Any, role: str, number: int) -> dict[str, Any]:
    if not isinstance(part, dict):
        raise ValueError(f"Message {number} has the content part {part!r}; a part is a dict with a type.")
    part = {key: value for key, value in part.items() if value is not None}
    if part.get("type") not in CONTENT_TYPES[role]:
        raise ValueError(
            f"Message {number} has a content part of type {part.get('type')!r}; in a {role} turn it has to be one of "
            f"{list(CONTENT_TYPES[role])}."
        )
    if part["type"] != "image" and not isinstance(part.get("text"), str):
        raise ValueError(f"Message {number} has a content part of type {part['type']!r} without a text: {part!r}.")
    return part


def image_parts(messages: list[dict[str, Any]]) -> Iterator[Any]:
    """The source of each image in order; `None` where a part only marks the place."""
    for message in messages:
        for part in message["content"]:
            if part["type"] == "image":
                key = next((key for key in IMAGE_SOURCES if key in part), None)
                yield f"data:;base64,{part[key]}" if key == "base64" else part.get(key)


def fill_images(messages: list[dict[str, Any]], images: list | None) -> list:
    """Join the sources in the messages with a list of pictures for the parts that only mark a place.

    Raises:
        ValueError: If places and pictures differ in number.
    """
    sources = list(image_parts(messages))
    given = list(images) if images is not None else []
    places = sum(source is None for source in sources)
    if places != len(given):
        raise ValueError(
            f"The messages mark the place of {places} images without a source, and {len(given)} images were given."
        )
    rest = iter(given)
    return [next(rest) if source is None else source for source in sources]


def hide_control_tokens(messages: list[dict[str, Any]], tokens: list[str]) -> list[dict[str, Any]]:
    """Replace each control token that stands literally in a text by two private characters."""
    hidden = [HIDDEN, *tokens]
    pattern = re.compile("|".join(re.escape(token) for token in sorted(hidden, key=len, reverse=True)))

    def hide(text: str) -> str:
        return pattern.sub(lambda match: HIDDEN + chr(ord(HIDDEN) + hidden.index(match.group())), text)

    return [
        {
            **message,
            "content": [
                {**part, "text": hide(part["text"])} if "text" in part else part for part in message["content"]
            ],
        }
        for message in messages
    ]


def split_hidden(rendered: str, tokens: list[str]) -> Iterator[tuple[str, int, bool]]:
    """Split a rendered text into pieces.

    Yields:
        Each piece as it is meant, its length in `rendered`, and whether it is a control token that has to stay text.
    """
    hidden = [HIDDEN, *tokens]
    for number, piece in enumerate(re.split(f"{HIDDEN}(.)", rendered, flags=re.DOTALL)):
        if number % 2:
            yield hidden[ord(piece) - ord(HIDDEN)], 2, True
        elif piece:
            yield piece, len(piece), False

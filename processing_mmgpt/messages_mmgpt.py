"""Chat messages: what one may hold, checked before anything is rendered from it."""

import re
from collections.abc import Iterator
from typing import Any


CONTENT_TYPES = {"system": ("text",), "user": ("image", "text", "input"), "assistant": ("text",)}
IMAGE_SOURCES = ("image", "url", "path", "base64")

# Where a control token stands literally in somebody's text, rendering carries a character of this private plane
# instead: neither the template nor the tokenizer can take it for control.
PRIVATE_USE = 0xF0000


def normalise(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Check messages and bring them into one form: every content a list of parts without empty fields.

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
        result.append({"role": role, "content": [_part(part, role, number) for part in content]})
    return result


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
                yield next((part[key] for key in IMAGE_SOURCES if key in part), None)


def fill_images(messages: list[dict[str, Any]], images: list | None) -> list:
    """Join the sources in the messages with a list of pictures for the parts that only mark a place.

    Raises:
        ValueError: If places and pictures differ in number.
    """
    sources = list(image_parts(messages))
    given = list(images) if images is not None else []
    places = sources.count(None)
    if places != len(given):
        raise ValueError(
            f"The messages mark the place of {places} images without a source, and {len(given)} images were given."
        )
    rest = iter(given)
    return [next(rest) if source is None else source for source in sources]


def hide_control_tokens(messages: list[dict[str, Any]], tokens: list[str]) -> list[dict[str, Any]]:
    """Replace each control token that stands literally in a text by the private character of its number."""
    pattern = re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)))

    def hide(text: str) -> str:
        return pattern.sub(lambda match: chr(PRIVATE_USE + tokens.index(match.group())), text)

    return [
        {
            **message,
            "content": [
                {**part, "text": hide(part["text"])} if "text" in part else part for part in message["content"]
            ],
        }
        for message in messages
    ]


def split_hidden(rendered: str, tokens: list[str]) -> Iterator[tuple[str, bool]]:
    """Split a rendered text into pieces, and say of each whether it is a control token that has to stay text."""
    for piece in re.split(f"([{chr(PRIVATE_USE)}-{chr(PRIVATE_USE + len(tokens) - 1)}])", rendered):
        if len(piece) == 1 and PRIVATE_USE <= ord(piece) < PRIVATE_USE + len(tokens):
            yield tokens[ord(piece) - PRIVATE_USE], True
        elif piece:
            yield piece, False

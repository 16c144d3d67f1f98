"""Chat messages: what one may hold, checked before anything is rendered from it."""

import re
from collections.abc import Iterator
from typing import Any


CONTENT_TYPES = {"system": ("text",), "user": ("image", "video", "text", "input"), "assistant": ("text",)}
IMAGE_SOURCES = {"image": ("image", "url", "path", "base64"), "video": ("video", "url", "path")}

# Where a control token stands literally in somebody's text, rendering carries this private character and one more that
# numbers the token: neither the template nor the tokenizer can take them for control.
HIDDEN = "\U000f0000"


def normalise(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Check messages and bring them into one form.

    Every content becomes a list: its images and videos, then at most one text, then at most one input. Texts of one
    message are joined, by line breaks in a user's turn; so nothing can be spelt across two parts that is not seen in
    one.

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
        images = [part for part in parts if part["type"] in IMAGE_SOURCES]
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
    if part["type"] not in IMAGE_SOURCES and not isinstance(part.get("text"), str):
        raise ValueError(f"Message {number} has a content part of type {part['type']!r} without a text: {part!r}.")
    if any("\ud800" <= character <= "\udfff" for character in part.get("text", "")):
        raise ValueError(f"Message {number} has a text with half of a character (a lone surrogate): {part['text']!r}.")
    return part


def image_parts(messages: list[dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The type and the source of each image or video in order; the source is `None` if a part only marks the place.

    A video's source is a list of frames, or `{"type": "video", "video": file}`, which a file of pictures is not.
    """
    for message in messages:
        for part in message["content"]:
            if part["type"] in IMAGE_SOURCES:
                key = next((key for key in IMAGE_SOURCES[part["type"]] if key in part), None)
                source = f"data:;base64,{part[key]}" if key == "base64" else part.get(key)
                yield part["type"], _marked(part["type"], source)


def _marked(kind: str, source: Any) -> Any:
    """Mark the file of a video as such."""
    is_file = kind == "video" and source is not None and not isinstance(source, list | tuple | dict)
    return {"type": "video", "video": source} if is_file else source


def take_images(messages: list[dict[str, Any]], images: list | None = None) -> tuple[list[dict[str, Any]], list]:
    """Take the sources of pictures out of normalised messages.

    Returns:
        New messages, whose image and video parts only mark a place, and the pictures for these places.

    Raises:
        ValueError: If places and pictures differ in number.
    """
    pictures = fill_images(messages, images)
    marked = [
        {**m, "content": [{"type": p["type"]} if p["type"] in IMAGE_SOURCES else p for p in m["content"]]}
        for m in messages
    ]
    return marked, pictures


def fill_images(messages: list[dict[str, Any]], images: list | None) -> list:
    """Join the sources in the messages with a list of pictures for the parts that only mark a place.

    Raises:
        ValueError: If places and pictures differ in number.
    """
    sources = list(image_parts(messages))
    given = list(images) if images is not None else []
    places = sum(source is None for _, source in sources)
    if places != len(given):
        raise ValueError(
            f"The messages mark the place of {places} images without a source, and {len(given)} images were given."
        )
    rest = iter(given)
    return [_marked(kind, next(rest)) if source is None else source for kind, source in sources]


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

    Raises:
        ValueError: If what stands behind a private character is not what was put there.
    """
    hidden = [HIDDEN, *tokens]
    for number, piece in enumerate(re.split(f"{HIDDEN}(.)", rendered, flags=re.DOTALL)):
        if number % 2:
            token = ord(piece) - ord(HIDDEN)
            if not 0 <= token < len(hidden):
                raise ValueError("The chat template takes texts apart, or holds a private character of ours: U+F0000.")
            yield hidden[token], 2, True
        elif piece:
            yield piece, len(piece), False

"""Chat messages: what they may hold, checked before anything is rendered."""

import os
from dataclasses import dataclass
from typing import Any

import torch

from .image_files_mmgpt import shorten


CONTENT_TYPES = {"system": ("text",), "user": ("image", "video", "text", "input"), "assistant": ("text",)}
IMAGE_SOURCES = {"image": ("image", "url", "path", "base64"), "video": ("video", "url", "path")}


@dataclass(frozen=True)
class Video:
    """A video in place of an image: a path, or the bytes of a file."""

    source: str | os.PathLike | bytes


@dataclass(frozen=True)
class Latents:
    """Latents in place of an image, computed before by the model's frozen parts: `tensor` is `(N, D_vision)`."""

    tensor: torch.Tensor


def normalise(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Check messages and bring them into one form.

    Every content becomes a list: its images and videos, then at most one text, then at most one input. Texts of one
    message are joined, by line breaks in a user's turn, so no control token can be spelt across two parts. Pictures
    after all texts are moved before them.

    Args:
        messages: Chat messages of transformers; a string content is one text part, and `{"type": "image_url",
            "image_url": {"url": ...}}`, as OpenAI has it, an image part. `datasets` pads the parts of a message to one
            schema, so a part may have fields that are `None`.

    Returns:
        New messages; the given ones are not changed.

    Raises:
        TypeError: If `messages` is not a list of dicts.
        ValueError: On an empty list, an unknown role or content type, a system message that is not the first, a
            response without a question, or a picture between two texts of a turn.
    """
    if not isinstance(messages, list | tuple) or not all(isinstance(message, dict) for message in messages):
        raise TypeError(
            f"A conversation is a list of messages, each a dict with role and content; got {shorten(messages)}."
        )
    if not messages:
        raise ValueError("A conversation needs at least one message; the list is empty.")
    result: list[dict[str, Any]] = []
    for number, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in CONTENT_TYPES:
            raise ValueError(
                f"Message {number} has the role {shorten(role)}; it has to be one of {list(CONTENT_TYPES)}."
            )
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
                f"Message {number} has the content {shorten(content)}; it has to be a string or a list of parts."
            )
        parts = [_part(part, role, number) for part in content]
        images = [part for part in parts if part["type"] in IMAGE_SOURCES]
        _check_order(parts, number)
        separator = "\n" if role == "user" else ""
        texts = [_joined(kind, parts, separator) for kind in ("text", "input")]
        result.append({"role": role, "content": [*images, *filter(None, texts)]})
    return result


def _check_order(parts: list[dict[str, Any]], number: int) -> None:
    """Raise if a picture stands between two texts: it would be moved before the first, and mean something else."""
    kinds = ["image" if part["type"] in IMAGE_SOURCES else "text" for part in parts if part.get("text", "#").strip()]
    turns = [kind for kind, before in zip(kinds, [None, *kinds], strict=False) if kind != before]
    if turns.count("text") > 1:
        raise ValueError(
            f"Message {number} has a picture between two texts, and a turn shows its pictures before its text. Give "
            "each text with its pictures as a turn of its own, or write the few-shot form as control text, "
            '`processor(text="<image>text<|endofchunk|><image>text", images=[...])`, which mixes them freely.'
        )


def _joined(kind: str, parts: list[dict[str, Any]], separator: str) -> dict[str, str] | None:
    texts = [part["text"] for part in parts if part["type"] == kind]
    return {"type": kind, "text": separator.join(texts)} if texts else None


def _part(part: Any, role: str, number: int) -> dict[str, Any]:
    if not isinstance(part, dict):
        raise ValueError(f"Message {number} has the content part {shorten(part)}; a part is a dict with a type.")
    part = {key: value for key, value in part.items() if value is not None}
    if part.get("type") == "image_url" and "image_url" in part:
        source = part["image_url"]
        url = source.get("url") if isinstance(source, dict) else source
        if not isinstance(url, str):
            raise ValueError(f"Message {number} has an image_url part without a url: {part!r}.")
        part = {"type": "image", "url": url}
    if part.get("type") not in CONTENT_TYPES[role]:
        raise ValueError(
            f"Message {number} has a content part of type {shorten(part.get('type'))}; in a {role} turn it has to be "
            f"one of {list(CONTENT_TYPES[role])}."
        )
    if part["type"] not in IMAGE_SOURCES and not isinstance(part.get("text"), str):
        raise ValueError(
            f"Message {number} has a content part of type {part['type']!r} without a text: {shorten(part)}."
        )
    if any("\ud800" <= character <= "\udfff" for character in part.get("text", "")):
        raise ValueError(
            f"Message {number} has a text with half of a character (a lone surrogate): {shorten(part['text'])}."
        )
    return part


def take_images(messages: list[dict[str, Any]], images: list | None = None) -> tuple[list[dict[str, Any]], list]:
    """Take images and videos out of normalised messages, and fill those parts that only mark a place.

    Args:
        messages: Messages from [`normalise`].
        images: One for each image or video part without a source, in order.

    Returns:
        New messages, whose image and video parts only mark a place; and what stands at each of these places: an image
        in any form of `open_image`, a list of them (the frames of a video), a [`Video`] or [`Latents`].

    Raises:
        ValueError: If places and images differ in number, or `images` is not a list.
    """
    parts = [part for message in messages for part in message["content"] if part["type"] in IMAGE_SOURCES]
    sources = [_source(part) for part in parts]
    if images is not None and not isinstance(images, list | tuple):
        raise ValueError(
            f"The images of a conversation are a list, one for each image part; got a {type(images).__name__}: put it "
            "into a list."
        )
    given = images or []
    places = sum(source is None for source in sources)
    if places != len(given):
        raise ValueError(
            f"The messages mark the place of {places} images without a source, and {len(given)} images were given: "
            "give one for each, in order, as `images`."
        )
    rest = iter(given)
    taken = [
        as_video(next(rest) if source is None else source, is_video=part["type"] == "video")
        for part, source in zip(parts, sources, strict=True)
    ]
    return only_places(messages), taken


def only_places(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Normalised messages whose image and video parts only mark a place."""
    return [
        {**m, "content": [{"type": p["type"]} if p["type"] in IMAGE_SOURCES else p for p in m["content"]]}
        for m in messages
    ]


def _source(part: dict[str, Any]) -> Any:
    """What an image or video part holds; `None` if it only marks a place."""
    key = next((key for key in IMAGE_SOURCES[part["type"]] if key in part), None)
    return f"data:;base64,{part[key]}" if key == "base64" else part.get(key)


def as_video(image: Any, is_video: bool = False) -> Any:
    """Name a video's file, which is `{"type": "video", "video": file}`, or any that `is_video` says; else `image`."""
    if isinstance(image, dict) and image.get("type") == "video":
        return Video(image.get("video"))
    is_file = is_video and not isinstance(image, list | tuple | dict | Video | Latents)
    return Video(image) if is_file else image

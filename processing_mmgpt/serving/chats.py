"""What a request to a server of chats may say, in the form of OpenAI's API.

What the server would not do is refused, not ignored, and the first error is the last.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator


MAX_MESSAGES, MAX_PARTS, MAX_PICTURES = 1000, 64, 16  # of a request, of a message, of a request
MAX_TEXT, MAX_ELEMENTS = 1_000_000, 10_000  # characters of a request; its fields, parts and brackets
COLDEST = 0.01  # temperature: colder ones divide to what is no number, which on a GPU ends the process's context


class Strict(BaseModel):
    """A part of a request; an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class ImageURL(Strict):
    """Where a picture is. The `detail` is the same for every picture."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(Strict):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageURL

    def ours(self) -> dict:
        """In our form."""
        return {"type": "image", "image": self.image_url.url}


class TextPart(Strict):
    """A text, or ours: the text of the `### Input:` block."""

    type: Literal["text", "input"]
    text: str

    def ours(self) -> dict:
        """In our form, which is the same."""
        return self.model_dump()


Part = Annotated[ImagePart | TextPart, Field(discriminator="type")]
Stop = Annotated[str, Field(min_length=1, max_length=100)]


class Message(Strict):
    """A message of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str | Annotated[list[Part], Field(max_length=MAX_PARTS, fail_fast=True)]

    def parts(self) -> list[ImagePart | TextPart]:
        """Its parts; a bare string is one."""
        return [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content


class Chat(Strict):
    """A request, with the fields that are honoured, and those that may only say what is done anyway."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    model: str | None = None
    stream: bool = False
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stop: Stop | Annotated[list[Stop], Field(max_length=8)] | None = None
    n: int = Field(1, ge=1, le=1)
    frequency_penalty: float = Field(0, ge=0, le=0)
    presence_penalty: float = Field(0, ge=0, le=0)
    stream_options: dict | None = None  # usage is always told
    user: str | None = None

    @field_validator("temperature")
    @classmethod
    def _leaves_numbers(cls, value: float | None) -> float | None:
        if value and value < COLDEST:
            raise ValueError(f"between 0 and {COLDEST} there is nothing left to sample; 0 takes the likeliest token")
        return value


def count_elements(body: bytes) -> int:
    """About how many elements a JSON text has, without reading it; what stands in strings does not count."""
    plain = body.replace(rb"\\", b"").replace(rb"\"", b"")  # every quote that is left begins or ends a string
    strings = plain.count(b'"') // 2
    if strings > MAX_ELEMENTS:
        return strings
    return sum(part.count(mark) for part in plain.split(b'"')[::2] for mark in (b",", b"[", b"{"))


def read_chat(body: bytes) -> Chat:
    """Read a request.

    Raises:
        ValueError: If it is none, or holds too much.
    """
    if count_elements(body) > MAX_ELEMENTS:
        raise ValueError(f"A request may have {MAX_ELEMENTS:,} elements.")
    try:
        chat = Chat.model_validate_json(body)
    except ValidationError as error:
        deepest = max(error.errors(include_url=False, include_input=False), key=lambda one: len(one["loc"]))
        raise ValueError(f"{'.'.join(map(str, deepest['loc']))}: {deepest['msg']}"[:500]) from None
    parts = [part for message in chat.messages for part in message.parts()]
    if sum(isinstance(part, ImagePart) for part in parts) > MAX_PICTURES:
        raise ValueError(f"A chat may hold {MAX_PICTURES} pictures.")
    if sum(len(part.text) for part in parts if isinstance(part, TextPart)) > MAX_TEXT:
        raise ValueError(f"A chat may hold {MAX_TEXT:,} characters of text.")
    return chat

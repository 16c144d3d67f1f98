"""Writing replies: what is asked of an engine, one that writes a reply after the other, and stop sequences."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedModel

from ..processing_mmgpt import MMGPTProcessor
from .rendering import room


@dataclass(frozen=True)
class Prompt:
    """What is to be answered, and how.

    Args:
        input_ids: The conversation up to the head of the reply.
        images: An RGB picture for each `<image>`, cut to the square that the model sees.
        max_new_tokens: The most tokens of the reply.
        temperature: 0 for the likeliest token each time, else that of sampling.
        top_p: The likeliest tokens of so much probability are sampled from; 1 for all.
        stops: Texts before the first of which the reply ends; none of the engine's business, see [`written`].
    """

    input_ids: list[int]
    images: list[Image.Image]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    stops: tuple[str, ...] = ()


class Engine(Protocol):
    """What writes replies.

    It has room for so many tokens of a chat, the reply included; and an `error` once it is dead, and all chats fail.
    """

    room: int
    error: Exception | None

    def write(self, prompt: Prompt) -> AsyncIterator[str]:
        """Yield the text of a reply, one string for each token, which may be empty; the end token counts as well.

        It ends with the reply. Closing it, or cancelling who reads it, ends the work soon; before the reply has begun,
        at once. An error of the model is raised to who reads; a `ValueError` if the prompt cannot be answered.
        """

    def counts(self) -> dict[str, int]:
        """What else it counts, by name."""

    def close(self) -> None:
        """End it."""


class OneByOne:
    """An engine that writes one reply after the other, each as if it were alone.

    Args:
        model: The model.
        processor: Its processor.
    """

    error = None  # of the model's failures the next reply knows nothing

    def __init__(self, model: PreTrainedModel, processor: MMGPTProcessor):
        self.model, self.processor, self.room = model, processor, room(model, processor)
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="writing")

    def write(self, prompt: Prompt) -> AsyncIterator[str]:
        """See [`Engine`]."""
        sampling = {"temperature": prompt.temperature, "top_p": prompt.top_p} if prompt.temperature else {}
        options = {"max_new_tokens": prompt.max_new_tokens, "do_sample": bool(sampling), **sampling}
        return write(self.thread, self.model, self.processor, prompt.input_ids, prompt.images, **options)

    def counts(self) -> dict[str, int]:
        """Nothing."""
        return {}

    def close(self) -> None:
        """Nothing: what is under way ends with its reader."""


async def write(
    thread: Executor,
    model: PreTrainedModel,
    processor: MMGPTProcessor,
    input_ids: list[int],
    images: list[Image.Image],
    before: Callable[[], Any] = lambda: None,
    **options,
) -> AsyncIterator[str]:
    """Yield a reply as `generate` writes it, one string for each token; closing this stops it at the next token.

    Args:
        thread: Where `generate` runs, when its turn comes.
        model: The model.
        processor: Its processor.
        input_ids: See [`Prompt`].
        images: Likewise.
        before: Called in that thread before it begins.
        **options: For `generate`.
    """
    loop, texts, stopped = asyncio.get_running_loop(), asyncio.Queue(), threading.Event()

    def give(text: str | None) -> None:
        loop.call_soon_threadsafe(texts.put_nowait, text)

    def generate() -> None:
        try:
            before()
            inputs = processor.batch([input_ids], [images], padding=False, padding_side="left")
            streamer = _Streamer(processor.tokenizer.backend_tokenizer, give)
            criteria = [lambda ids, scores, **kwargs: stopped.is_set()]
            model.generate(**inputs.to(model.device), streamer=streamer, stopping_criteria=criteria, **options)
        finally:
            give(None)  # an error must not leave the reader waiting

    writing = thread.submit(generate)
    try:
        while (text := await texts.get()) is not None:
            yield text
        await asyncio.wrap_future(writing)  # raises what the model raised
    finally:
        stopped.set()
        writing.cancel()  # if it has not begun


class _Streamer:
    """Takes tokens from `generate` and gives the text of each."""

    def __init__(self, tokenizer: Tokenizer, give: Callable[[str], None]):
        self.tokenizer, self.give = tokenizer, give
        self.decoding, self.is_prompt = DecodeStream([], skip_special_tokens=True), True

    def put(self, tokens: torch.LongTensor) -> None:
        """Take the prompt `(1, T)`, which is not repeated, and then one token `(1,)` at a time."""
        if self.is_prompt:
            self.is_prompt = False
            return
        for token in tokens.tolist():
            self.give(self.decoding.step(self.tokenizer, token) or "")

    def end(self) -> None:
        """The end is told by the thread."""


async def written(engine: Engine, prompt: Prompt) -> AsyncIterator[tuple[str, int, str | None]]:
    """What an engine writes, up to the first stop sequence, see [`until_stop`]; closing this ends the work."""
    async with aclosing(engine.write(prompt)) as texts:
        async for piece in until_stop(texts, prompt.stops, prompt.max_new_tokens):
            yield piece


async def until_stop(
    texts: AsyncIterator[str], stops: Sequence[str], max_tokens: int
) -> AsyncIterator[tuple[str, int, str | None]]:
    """Yield a reply up to its first stop sequence; hold back what may be the beginning of one.

    Args:
        texts: One string for each token.
        stops: The stop sequences, which are looked for in the text: they may be spelt in any way.
        max_tokens: The most tokens that were asked for.

    Returns:
        Pieces of the text, each with the number of tokens so far; and last with why it ended, `"stop"` or `"length"`.
    """
    held, tokens = "", 0
    async for text in texts:
        tokens += 1
        held += text
        end = find_first(held, stops)
        if end < len(held):
            yield held[:end], tokens, "stop"
            return
        end -= max((n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)
        if end:
            yield held[:end], tokens, None
            held = held[end:]
    yield held, tokens, "length" if tokens == max_tokens else "stop"


def find_first(text: str, stops: Sequence[str]) -> int:
    """Where the first stop sequence begins; the length of the text where there is none."""
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))

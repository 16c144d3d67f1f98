"""The engine of many requests at once, as a server of chats wants it."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedModel, ProcessorMixin

from .batching import BatchingEngine, default_config


class ManyAtOnce:
    """An `Engine` of `processing_mmgpt/serving/replies.py` that writes many replies at once, from its making on.

    Args:
        model: The model.
        processor: Its processor.
        max_chats: Replies that are written at the same time; other chats wait. See [`default_config`] for the default.
        cache_tokens: Tokens of all those chats together that are held; likewise.
        max_pictures: Pictures of a chat at most.

    Raises:
        ImportError, ValueError: See [`BatchingEngine`].
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        max_chats: int | None = None,
        cache_tokens: int | None = None,
        max_pictures: int = 16,
    ):
        config = default_config(model.device, max_chats, cache_tokens)
        num_slots = max(max_pictures, 2 * config.max_requests_per_batch)
        engine = BatchingEngine(model, config=config, num_slots=num_slots, max_pictures=max_pictures)
        self.processor, self.running = processor, ExitStack()
        self.thread = self.running.enter_context(ThreadPoolExecutor(1, thread_name_prefix="admitting"))
        self.engine = self.running.enter_context(engine)
        self.room = self.engine.room

    @property
    def error(self) -> Exception | None:
        """What ended the engine; `None` while it runs."""
        return self.engine.fatal_error

    def counts(self) -> dict[str, int]:
        """Chats that wait for slots, and pictures that were asked about and that had to be encoded, so far."""
        pool = self.engine.pool
        return {"queued": self.engine.requests.qsize(), "pictures": pool.asked, "pictures_encoded": pool.encoded}

    async def write(self, prompt: Any) -> AsyncIterator[str]:
        """Yield the text of a reply, one string for each token; closing this ends it, waiting or under way.

        Raises:
            ValueError: If the prompt cannot be answered.
            RuntimeError: If the engine has died.
        """
        name, results, written = uuid.uuid4().hex, asyncio.Queue(), 0
        decoding, tokenizer = DecodeStream([], skip_special_tokens=True), self.processor.tokenizer.backend_tokenizer
        self.engine.register_result_handler(name, results.put_nowait)
        adding = self.thread.submit(self._add, name, prompt)
        try:
            await asyncio.wrap_future(adding)
            while True:
                result = await results.get()
                if result.error is not None:
                    raise RuntimeError(f"The engine could not finish a reply: {result.error}")
                for token in result.generated_tokens[written:]:
                    yield decoding.step(tokenizer, token) or ""
                written = len(result.generated_tokens)
                if result.is_finished():
                    break
        finally:
            adding.cancel()  # if it has not begun
            adding.add_done_callback(lambda _: self.engine.cancel_request(name))

    def _add(self, name: str, prompt: Any) -> None:
        inputs = self.processor.batch([prompt.input_ids], [prompt.images], padding=False, padding_side="left")
        settings = {"do_sample": bool(prompt.temperature), "max_new_tokens": prompt.max_new_tokens}
        if prompt.temperature:
            settings |= {"temperature": prompt.temperature, "top_p": prompt.top_p}
        self.engine.add_request(**inputs, request_id=name, streaming=True, **settings)

    def close(self) -> None:
        """End the engine, and what it is at work on."""
        self.running.close()

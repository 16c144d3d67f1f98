"""Rendering strangers' conversations: measured before and after, and in a process of its own."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..messages_mmgpt import normalise
from ..processing_mmgpt import MMGPTProcessor
from .processes import Processes


WORKER = Path(__file__).with_name("rendering_worker.py")
# What is looked at before anything is rendered: the characters that a token stands for at the most, and the tokens
# that a message takes at the least, those of the template included.
LETTERS, TURN = 16, 4


def room(model: PreTrainedModel, processor: MMGPTProcessor) -> int:
    """Tokens that a model has room for, the reply included; for one of unlimited positions what its tokenizer says."""
    return getattr(model.config.text_config, "max_position_embeddings", processor.tokenizer.model_max_length)


def render(messages: list[dict[str, Any]], processor: MMGPTProcessor, longest: int) -> tuple[list[int], list]:
    """Render a conversation up to the head of the reply.

    Args:
        messages: The conversation, of text, input and image parts.
        processor: Its processor.
        longest: The [`room`] of the model.

    Returns:
        The ids, and what stands at each `<image>`.

    Raises:
        ValueError: If it is no conversation, or there is no room for it.
    """
    if TURN * len(messages) > longest:
        raise ValueError(f"The chat has {len(messages)} messages; the model has room for {longest} tokens.")
    messages = normalise(messages)
    letters = sum(len(part.get("text", "")) for message in messages for part in message["content"])
    if letters > LETTERS * longest:
        raise ValueError(f"The chat has {letters:,} characters; the model has room for {longest} tokens.")
    chat = processor.encode_chat(messages, add_generation_prompt=True)
    if (length := len(chat.input_ids)) >= longest:
        raise ValueError(f"The chat has {length} tokens; with the reply the model has room for {longest}.")
    return chat.input_ids, chat.images


class Renderer:
    """Renders in a process of its own: Python that runs beside the thread that generates makes it ten times slower.

    Args:
        processor: See [`render`].
    """

    def __init__(self, processor: MMGPTProcessor):
        self.processes = Processes(WORKER, processor, 1, "The chat cannot be rendered.")
        self.first = self.processes.submit(([{"role": "user", "content": ""}], 1000))  # so that it starts at once

    async def render(self, messages: list[dict[str, Any]], longest: int) -> tuple[list[int], list]:
        """As [`render`]; pictures stay here, only their places travel."""
        pictures = [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
        places = iter(range(len(pictures)))
        marked = [
            {**m, "content": [{**p, "image": next(places)} if p["type"] == "image" else p for p in m["content"]]}
            for m in messages
        ]
        input_ids, order = json.loads(await self.processes.do((marked, longest)))
        return input_ids, [pictures[place] for place in order]

    def wait(self) -> None:
        """Until it is ready, which takes some seconds."""
        self.first.result()

    def close(self) -> None:
        """End the process."""
        self.processes.close()

"""Preparing a conversation to be answered: rendered, measured, its pictures opened, without stopping anybody else."""

import asyncio
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from ..messages_mmgpt import normalise
from ..processing_mmgpt import MMGPTProcessor
from ..rendering_mmgpt import EncodedChat
from .pictures import PictureDecoder


LETTERS = 32  # characters that a token stands for at the most, before anything is rendered


def room(model: PreTrainedModel, processor: MMGPTProcessor) -> int:
    """Tokens that a model has room for, the reply included; for one of unlimited positions what its tokenizer says."""
    return getattr(model.config.text_config, "max_position_embeddings", processor.tokenizer.model_max_length)


async def prepare(
    messages: list[dict[str, Any]], processor: MMGPTProcessor, decoder: PictureDecoder, longest: int
) -> EncodedChat:
    """Render a conversation up to the head of the reply, and open its pictures if there is room for it.

    Args:
        messages: The conversation, of text, input and image parts.
        processor: Renders it.
        decoder: Opens its pictures.
        longest: The [`room`] of the model.

    Returns:
        The conversation as tokens; its `images` are RGB pictures, cut to what the model sees.

    Raises:
        ValueError: If there is no room, or a picture is refused.
        FileNotFoundError: If there is no such picture.
    """
    chat = await asyncio.to_thread(_encode, messages, processor, longest)
    return replace(chat, images=await decoder.squares(chat.images, processor.image_processor.size))


def _encode(messages: list[dict[str, Any]], processor: MMGPTProcessor, longest: int) -> EncodedChat:
    messages = normalise(messages)
    letters = sum(len(part.get("text", "")) for message in messages for part in message["content"])
    if letters > LETTERS * longest:
        raise ValueError(f"The chat has {letters:,} characters; the model has room for {longest} tokens.")
    chat = processor.encode_chat(messages, add_generation_prompt=True)
    if (length := len(chat.input_ids)) >= longest:
        raise ValueError(f"The chat has {length} tokens; with the reply the model has room for {longest}.")
    return chat

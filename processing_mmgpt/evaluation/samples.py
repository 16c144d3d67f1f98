"""Samples: the replies of a model during its tuning, beside the references."""

from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback

from ..messages_mmgpt import IMAGE_SOURCES, normalise, take_images
from ..processing_mmgpt import MMGPTProcessor


class SampleCallback(TrainerCallback):
    """At every evaluation, reply to a few records, show the table, and log it to the Trainer's trackers.

    TRL's `LogCompletionsCallback` takes prompts that are text, and knows two trackers.

    Args:
        log: The Trainer's `log`.
        processor: The processor.
        records: Records `{"messages": [...], "images": [...]}` that are held out; the last response is the reference.
        max_new_tokens: The most tokens of a reply.
    """

    def __init__(
        self,
        log: Callable[[dict[str, Any]], None],
        processor: MMGPTProcessor,
        records: list[dict[str, Any]],
        max_new_tokens: int = 64,
    ):
        self.log, self.processor, self.max_new_tokens = log, processor, max_new_tokens
        self.asked = [split_last_response(record) for record in records]

    def on_evaluate(self, args, state, control, model=None, **kwargs) -> None:
        """Reply, show, log."""
        replies = reply(model, self.processor, [record for record, _ in self.asked], self.max_new_tokens)
        rows = [
            (record["messages"][-1]["content"][-1].get("text", ""), given, reference)
            for (record, reference), given in zip(self.asked, replies, strict=True)
        ]
        table = markdown(("prompt", "reply", "reference"), rows)
        if state.is_world_process_zero:
            tqdm.write(f"step {state.global_step}\n{table}")
        self.log({"eval_samples": table})


def split_last_response(record: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Cut a record before its last response.

    Returns:
        The record up to there, with the pictures of its messages; and the response.

    Raises:
        ValueError: If there is no response.
    """
    messages, images = take_images(normalise(record["messages"]), record.get("images"))
    at = max((number for number, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    if at is None:
        raise ValueError("A sample needs a response to compare with; the record has none.")
    lost = sum(part["type"] in IMAGE_SOURCES for message in messages[at:] for part in message["content"])
    return {"messages": messages[:at], "images": images[: len(images) - lost]}, messages[at]["content"][0]["text"]


@torch.no_grad()
def reply(
    model: torch.nn.Module, processor: MMGPTProcessor, records: list[dict[str, Any]], max_new_tokens: int
) -> list[str]:
    """Reply greedily to records that end with a user's turn, in one batch.

    The model keeps its mode, training or evaluation.
    """
    inputs = processor.apply_chat_template(
        [record["messages"] for record in records],
        images=[record["images"] for record in records],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
    ).to(model.device)
    training = model.training
    model.eval()
    # What is compiled for training would be compiled anew for generation, once for each layer's place in the cache.
    with torch.compiler.set_stance("force_eager"):
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    model.train(training)
    return processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Write a table in Markdown, which trackers render."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(' '.join(cell.replace('|', '/').split()) for cell in line)} |" for line in lines)

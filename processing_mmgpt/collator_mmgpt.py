"""The collator: conversations to a batch with labels. It owns what is learnt from."""

from dataclasses import dataclass
from typing import Any

import torch

from .messages_mmgpt import image_parts, normalise
from .processing_mmgpt import MMGPTProcessor, pad_rows


IGNORED = -100


@dataclass
class MMGPTCollator:
    """Turn records `{"messages": [...], "images": [...]}` into what the model takes.

    Labels are the responses of every assistant turn and their end tokens; all else is -100. Rows with pictures and
    rows without stand in one batch. A conversation that is too long is cut at the end of a turn, and loses exactly
    the pictures of the turns that are cut.

    Args:
        processor: The processor.
        max_length: The most tokens a row may have; `None` for no limit.
        pad_to_multiple_of: Pad the batch to a multiple of so many tokens.
        placeholder_picture: Give a batch without any picture a zero one, which no token attends to. Training sharded
            over processes (FSDP, ZeRO-3) needs it, since all of them have to touch the same parameters.
    """

    processor: MMGPTProcessor
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    placeholder_picture: bool = False

    def __call__(self, records: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate.

        Returns:
            `input_ids`, `attention_mask` and `labels` `(B, T)`, padded on the right; with pictures, `pixel_values`.

        Raises:
            ValueError: With the row, if nothing of it is left to learn from or its pictures do not fit.
        """
        rows = []
        for number, record in enumerate(records):
            try:
                rows.append(self.encode(record))
            except ValueError as error:
                raise ValueError(f"Row {number} of the batch: {error}") from error
        batch = self.processor.batch(
            [row["input_ids"] for row in rows],
            [row["images"] for row in rows],
            padding=True,
            padding_side="right",
            pad_to_multiple_of=self.pad_to_multiple_of,
        )
        labels = [
            [
                token if learnt else IGNORED
                for token, learnt in zip(row["input_ids"], row["assistant_masks"], strict=True)
            ]
            for row in rows
        ]
        batch["labels"] = torch.tensor(pad_rows(labels, IGNORED, "right", batch["input_ids"].shape[1]))
        if self.placeholder_picture and "pixel_values" not in batch:
            size = self.processor.image_processor.size
            batch["pixel_values"] = torch.zeros(len(rows), 1, 3, size, size)
        return dict(batch)

    def encode(self, record: dict[str, Any]) -> dict[str, list]:
        """Encode as many whole turns of one record as fit.

        Returns:
            As [`MMGPTProcessor.encode_chat`].

        Raises:
            ValueError: If nothing is left to learn from, or its pictures do not fit.
        """
        messages, images = normalise(record["messages"]), record.get("images")
        while True:
            row = self.processor.encode_chat(messages, images)
            if not any(row["assistant_masks"]):
                raise ValueError("It has no response to learn from.")
            if self.max_length is None or len(row["input_ids"]) <= self.max_length:
                return row
            messages = without_last_exchange(messages)
            if not messages:
                raise ValueError(
                    f"Its first exchange alone has {len(row['input_ids'])} tokens, and max_length is "
                    f"{self.max_length}: nothing is left to learn from."
                )
            images = images and images[: sum(source is None for source in image_parts(messages))]


def without_last_exchange(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cut behind the last response that something follows; `[]` if there is none."""
    ends = [number for number, message in enumerate(messages, start=1) if message["role"] == "assistant"]
    shorter = [end for end in ends if end < len(messages)]
    return messages[: shorter[-1]] if shorter else []

"""The collator: conversations to a batch with labels. It owns what is learnt from."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch

from ..messages_mmgpt import image_parts, normalise
from ..processing_mmgpt import MMGPTProcessor, pad_rows
from .skip_log import log_skip


IGNORED = -100


class NothingToLearnError(ValueError):
    """A conversation has no response, or none that `max_length` leaves whole."""


@dataclass
class MMGPTCollator:
    """Turn records `{"messages": [...], "images": [...]}` into what the model takes.

    Labels are the responses of every assistant turn and their end tokens; all else is -100. Rows with pictures and
    rows without stand in one batch. A conversation that is too long is cut at the end of a turn, and loses exactly
    the pictures of the turns that are cut.

    With `packing`, a row holds as many conversations as fit into `max_length` tokens, and `document_index` says which
    token belongs to which. The model computes each as if it stood alone; the loss is that of the same conversations
    in rows of their own, and the batch is almost free of padding.

    Args:
        processor: The processor.
        max_length: The most tokens a row may have; `None` for no limit.
        packing: Put several conversations into a row.
        skip_log: Where a conversation leaves nothing to learn from, skip it and add a line to this file, which
            [`~processing_mmgpt.data.skip_log.count_skips`] counts; `None` to raise.
        pad_to_multiple_of: Pad the batch to a multiple of so many tokens.
        placeholder_picture: Give a batch without any picture a zero one, which no token attends to. Training sharded
            over processes (FSDP, ZeRO-3) needs it, since all of them have to touch the same parameters. Where records
            bring latents, the latents that stand for it: `{"type": "latents", "latents": (N, D_vision)}`.
        template: Arguments of [`MMGPTProcessor.encode_chat`], such as another `chat_template` with its variables.
    """

    processor: MMGPTProcessor
    max_length: int | None = None
    packing: bool = False
    skip_log: str | None = None
    pad_to_multiple_of: int | None = None
    placeholder_picture: bool | dict[str, Any] = False
    template: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.packing and self.max_length is None:
            raise ValueError("`packing` fills rows of `max_length` tokens, and there is no `max_length`: give one.")

    def __call__(self, records: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate.

        Returns:
            `input_ids`, `attention_mask` and `labels` `(B, T)`, padded on the right; with pictures, `pixel_values`
            or `image_latents`; with packing, `document_index` `(B, T)`, and `B` is the number of rows that it takes.

        Raises:
            ValueError: With the row, if nothing of it is left to learn from or its pictures do not fit.
        """
        rows = [row for number, record in enumerate(records) if (row := self._encode(number, record)) is not None]
        if not rows:
            raise ValueError(
                f"Nothing is left to learn from in any of the {len(records)} conversations of a batch; "
                f"{self.skip_log} says why. Raise max_length ({self.max_length}), or look at the data."
            )
        documents = [[row] for row in rows] if not self.packing else fill_rows(rows, self.max_length)
        batch = self.processor.batch(
            [_joined(row, "input_ids") for row in documents],
            [_joined(row, "images") for row in documents],
            padding=True,
            padding_side="right",
            pad_to_multiple_of=self.pad_to_multiple_of,
        )
        learnt = torch.tensor(self._pad([_joined(row, "assistant_masks") for row in documents], batch))
        batch["labels"] = batch["input_ids"].where(learnt == 1, IGNORED)
        if self.packing:
            numbers = [
                [number for number, document in enumerate(row, start=1) for _ in document["input_ids"]]
                for row in documents
            ]
            batch["document_index"] = torch.tensor(self._pad(numbers, batch))
        if self.placeholder_picture and not any(document["images"] for document in rows):
            batch.update(self._placeholder(len(documents)))
        return dict(batch)

    def _placeholder(self, num_rows: int) -> dict[str, torch.Tensor]:
        if isinstance(self.placeholder_picture, dict):
            return self.processor.stack_pictures([[self.placeholder_picture]] * num_rows)
        size = self.processor.image_processor.size
        return {"pixel_values": torch.zeros(num_rows, 1, 3, size, size)}

    def _encode(self, number: int, record: dict[str, Any]) -> dict[str, list] | None:
        """Encode one record; `None` if it is skipped."""
        try:
            return self.encode(record)
        except NothingToLearnError as error:
            if self.skip_log is None:
                raise NothingToLearnError(f"Row {number} of the batch: {error}") from error
            digest = hashlib.sha256(str(record["messages"]).encode()).hexdigest()
            log_skip(self.skip_log, "collator", digest, str(error))
            return None
        except ValueError as error:
            raise ValueError(f"Row {number} of the batch: {error}") from error

    def _pad(self, rows: list[list[int]], batch: dict[str, torch.Tensor]) -> list[list[int]]:
        return pad_rows(rows, 0, "right", batch["input_ids"].shape[1])

    def encode(self, record: dict[str, Any]) -> dict[str, list]:
        """Encode as many whole turns of one record as fit.

        Returns:
            As [`MMGPTProcessor.encode_chat`].

        Raises:
            NothingToLearnError: If nothing is left to learn from.
            ValueError: If its pictures do not fit.
        """
        messages, images = normalise(record["messages"]), record.get("images")
        while True:
            row = self.processor.encode_chat(messages, images, **self.template)
            if not any(row["assistant_masks"]):
                raise NothingToLearnError("It has no response to learn from.")
            if self.max_length is None or len(row["input_ids"]) <= self.max_length:
                return row
            messages = without_last_exchange(messages)
            if not messages:
                raise NothingToLearnError(
                    f"Nothing is left to learn from: its first exchange alone has {len(row['input_ids'])} tokens, and "
                    f"max_length is {self.max_length}."
                )
            images = images and images[: sum(source is None for _, source in image_parts(messages))]


def without_last_exchange(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cut behind the last response that something follows; `[]` if there is none."""
    ends = [number for number, message in enumerate(messages, start=1) if message["role"] == "assistant"]
    shorter = [end for end in ends if end < len(messages)]
    return messages[: shorter[-1]] if shorter else []


def fill_rows(documents: list[dict[str, list]], length: int) -> list[list[dict[str, list]]]:
    """Put documents into few rows of at most `length` tokens: the longest first, each where it leaves least room.

    Best-fit decreasing: https://en.wikipedia.org/wiki/Best-fit_bin_packing.
    """
    rows: list[list[dict[str, list]]] = []
    room: list[int] = []
    for document in sorted(documents, key=lambda document: -len(document["input_ids"])):
        needed = len(document["input_ids"])
        fitting = [row for row in range(len(rows)) if room[row] >= needed]
        if fitting:
            row = min(fitting, key=lambda row: room[row])
            rows[row].append(document)
            room[row] -= needed
        else:
            rows.append([document])
            room.append(length - needed)
    return rows


def _joined(documents: list[dict[str, list]], key: str) -> list:
    return [item for document in documents for item in document[key]]

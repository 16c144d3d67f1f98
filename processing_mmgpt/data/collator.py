"""The collator: conversations to a batch with labels. It decides what is learnt."""

import hashlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..messages_mmgpt import Latents
from ..processing_mmgpt import MMGPTProcessor, pad_rows
from ..rendering_mmgpt import EncodedChat
from .packing import fill_rows
from .skip_log import log_skip


IGNORED = -100


class NothingToLearnError(ValueError):
    """A conversation has no response, or none that fits into `max_length`."""


@dataclass
class MMGPTCollator:
    """Turn records `{"messages": [...], "images": [...]}` into what the model takes.

    Labels are the responses of every assistant turn and their end tokens; all else is -100. Rows with pictures and
    rows without may be in one batch. A conversation that is too long is cut at the end of a turn, and loses exactly
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
        pad_to_multiple_of: Pad the batch to a multiple of this number of tokens.
        placeholder_image: Give a batch without any image a zero one, which no token attends to. Training sharded over
            processes (FSDP, ZeRO-3) needs it, since all of them have to touch the same parameters. Where records hold
            latents, the [`~processing_mmgpt.messages_mmgpt.Latents`] that stand for it.
        template: Arguments of [`MMGPTProcessor.encode_chat`], such as another `chat_template` with its variables. With
            `max_length`, the template has to write an exchange in the same way whatever follows.
    """

    processor: MMGPTProcessor
    max_length: int | None = None
    packing: bool = False
    skip_log: str | None = None
    pad_to_multiple_of: int | None = None
    placeholder_image: bool | Latents = False
    template: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.packing and self.max_length is None:
            raise ValueError("`packing` fills rows of `max_length` tokens, and there is no `max_length`: give one.")
        if self.max_length is not None:
            self._check_template()

    def __call__(self, records: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate.

        Returns:
            `input_ids`, `attention_mask` and `labels` `(B, T)`, padded on the right; with pictures, `pixel_values`
            or `image_latents`; with packing, `document_index` `(B, T)`, and `B` is the number of rows that it takes.

        Raises:
            ValueError: With the row, if nothing of it is left to learn from or its pictures do not fit.
        """
        chats = [chat for number, record in enumerate(records) if (chat := self._encode(number, record)) is not None]
        if not chats:
            raise ValueError(
                f"Nothing is left to learn from in any of the {len(records)} conversations of a batch; "
                f"{self.skip_log} says why. Raise max_length ({self.max_length}), or look at the data."
            )
        rows = [[number] for number in range(len(chats))]
        if self.packing:
            rows = fill_rows([len(chat.input_ids) for chat in chats], self.max_length)
        documents = [[chats[number] for number in row] for row in rows]
        batch = self.processor.batch(
            [_joined(chat.input_ids for chat in row) for row in documents],
            [_joined(chat.images for chat in row) for row in documents],
            padding=True,
            padding_side="right",
            pad_to_multiple_of=self.pad_to_multiple_of,
        )
        width = batch["input_ids"].shape[1]
        learnt = _padded([_joined(chat.learnt for chat in row) for row in documents], width)
        batch["labels"] = batch["input_ids"].where(learnt == 1, IGNORED)
        if self.packing:
            numbers = [[[number] * len(chat.learnt) for number, chat in enumerate(row, start=1)] for row in documents]
            batch["document_index"] = _padded(list(map(_joined, numbers)), width)
        if self.placeholder_image and not any(chat.images for chat in chats):
            batch.update(self._placeholder(len(documents)))
        return dict(batch)

    def _placeholder(self, num_rows: int) -> dict[str, torch.Tensor]:
        if isinstance(self.placeholder_image, Latents):
            return self.processor.image_processor.stack([[self.placeholder_image]] * num_rows)
        size = self.processor.image_processor.size
        return {"pixel_values": torch.zeros(num_rows, 1, 3, size, size)}

    def _encode(self, number: int, record: dict[str, Any]) -> EncodedChat | None:
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

    def encode(self, record: dict[str, Any]) -> EncodedChat:
        """Encode as many whole exchanges of one record as fit.

        Raises:
            NothingToLearnError: If nothing is left to learn from.
            ValueError: If its pictures do not fit, or it is not a record.
        """
        if record.get("messages") is None:
            raise ValueError(
                f"A record has `messages`; this one has {sorted(record)}. A prompt and a completion become the turns "
                "of user and assistant in `messages`."
            )
        if record.get("image") is not None:
            raise ValueError("A record has its pictures in `images`, a list; this one has `image`: make it a list.")
        chat = self.processor.encode_chat(record["messages"], record.get("images"), **self.template)
        if not any(chat.learnt):
            raise NothingToLearnError("It has no response to learn from.")
        if self.max_length is None:
            return chat
        kept = chat.cut(self.max_length, self.processor.image_token_id)
        if not any(kept.learnt):
            raise NothingToLearnError(
                f"Nothing is left to learn from: its first exchange alone has {chat.ends[0]} tokens, and "
                f"max_length is {self.max_length}."
            )
        return kept

    def _check_template(self) -> None:
        """Raise unless the template writes an exchange in the same way whatever follows: else it cannot be cut."""
        exchange = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        once, twice = (self.processor.encode_chat(exchange * count, **self.template) for count in (1, 2))
        if twice.cut(len(twice.input_ids) - 1, self.processor.image_token_id) != once:
            raise ValueError(
                "The chat template writes an exchange in another way if one follows, so that a conversation of more "
                "than max_length tokens cannot be cut: give a template that only adds, or no max_length."
            )


def _joined(lists: Iterable[list]) -> list:
    return list(itertools.chain.from_iterable(lists))


def _padded(rows: list[list[int]], width: int) -> torch.Tensor:
    return torch.tensor(pad_rows(rows, 0, "right", width))

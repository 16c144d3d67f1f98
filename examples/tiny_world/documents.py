"""Documents of `corpus.py` as batches, and the share of them that a base knows."""

import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset
from transformers.modeling_outputs import ModelOutput

from modeling_mmgpt import MMGPTForConditionalGeneration
from processing_mmgpt import MMGPTProcessor
from processing_mmgpt.data.collator import IGNORED
from processing_mmgpt.processing_mmgpt import pad_rows

from . import corpus
from .language import CATEGORY, SPELLED_WORDS
from .scenes import COLOURS, SHAPES, SIDE


PROBE_SEED = 10**6
FORMS = dict.fromkeys((*CATEGORY, *SPELLED_WORDS["train"]), "WORD")
FORMS |= dict.fromkeys(COLOURS, "COLOUR") | dict.fromkeys(SHAPES, "SHAPE")


class Documents(Dataset):
    """The documents of a phase as ids, labels and pictures; item `i` is a function of seed, phase and `i` alone."""

    def __init__(self, processor: MMGPTProcessor, seed: int, phase: str, length: int):
        self.processor, self.seed, self.phase, self.length = processor, seed, phase, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, list]:
        return encode(corpus.document(self.seed, index, self.phase), self.processor)


def encode(document: corpus.Document, processor: MMGPTProcessor) -> dict[str, list]:
    """Turn a document into `input_ids`, `labels` of what is learned and of the end, and `pictures` (3, 48, 48)."""
    tokenizer = processor.tokenizer
    ids, labels = [tokenizer.bos_token_id], [IGNORED]
    pieces = tokenizer([text for text, _ in document.pieces], add_special_tokens=False)["input_ids"]
    for piece, (_, is_learned) in zip(pieces, document.pieces, strict=True):
        ids += piece
        labels += piece if is_learned else [IGNORED] * len(piece)
    pictures = [processor.image_processor.pixels(image) for image in document.images]
    end = tokenizer.eos_token_id
    return {"input_ids": [*ids, end], "labels": [*labels, end], "pictures": pictures}


@dataclass
class Collator:
    """Pad ids and labels; the pictures of all rows are in one list, so that none is padding."""

    pad_token_id: int

    def __call__(self, rows: list[dict[str, list]]) -> dict[str, torch.Tensor]:
        """Collate.

        Returns:
            `input_ids`, `attention_mask`, `labels` `(B, T)`, and `pictures` `(K, 3, 48, 48)` in the order of rows.
        """
        width = max(len(row["input_ids"]) for row in rows)
        pictures = [picture for row in rows for picture in row["pictures"]]
        return {
            "input_ids": torch.tensor(pad_rows([row["input_ids"] for row in rows], self.pad_token_id, "right", width)),
            "attention_mask": torch.tensor(pad_rows([[1] * len(row["input_ids"]) for row in rows], 0, "right", width)),
            "labels": torch.tensor(pad_rows([row["labels"] for row in rows], IGNORED, "right", width)),
            "pictures": torch.stack(pictures) if pictures else torch.empty(0, 3, SIDE, SIDE),
        }


def forward(model: MMGPTForConditionalGeneration, batch: dict[str, torch.Tensor]) -> ModelOutput:
    """Run a batch of `Collator`: encode its pictures, give each row its own."""
    is_image = batch["input_ids"] == model.config.image_token_id  # (B, T)
    row, column = is_image.nonzero(as_tuple=True)
    pictures, image_latents = batch["pictures"], None
    if len(pictures):
        latents = model.model.encode_images(pictures[None])[0]  # (K, N, D)
        slot = is_image.cumsum(dim=1)[row, column] - 1  # (K,)
        image_latents = latents.new_zeros(len(is_image), int(slot.max()) + 1, *latents.shape[1:])  # (B, M, N, D)
        image_latents = image_latents.index_put((row, slot), latents)
    text = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
    return model(**text, image_latents=image_latents, use_cache=False)


@torch.no_grad()
def probe(model, processor, count: int = 600) -> dict[str, float]:
    """Share of values that are wholly right, by key, on documents that no phase trains on.

    Teacher forcing, which for a single exact match is the same as greedy decoding.
    """
    model.eval()
    collate, right, seen = Collator(processor.tokenizer.pad_token_id), Counter(), Counter()
    rng = random.Random(PROBE_SEED)
    kinds = [lambda shows=shows: corpus.look_ups(rng, shows) for shows in ("objects", "text", "digit")]
    for make in (*kinds, lambda: corpus.text_lines(rng), lambda: corpus.in_context(rng)):
        documents = [make() for _ in range(count)]
        for start in range(0, count, 100):
            some = documents[start : start + 100]
            batch = collate([encode(document, processor) for document in some])
            batch = {key: value.to(model.device) for key, value in batch.items()}
            guesses = forward(model, batch).logits[:, :-1].argmax(dim=-1)  # (B, T - 1)
            hits = (guesses == batch["input_ids"][:, 1:]).tolist()
            for document, hit in zip(some, hits, strict=True):
                for key, is_right in _values(document, hit, processor):
                    seen[key] += 1
                    right[key] += is_right
    return {key: right[key] / seen[key] for key in sorted(seen)}


def _values(document: corpus.Document, hits: list[bool], processor: MMGPTProcessor) -> Iterator[tuple[str, bool]]:
    """Yield each value of a document: the form of its key, and whether its tokens were guessed, bar a line break.

    A name counts as a value also where it is not learned, so the shares are of all names.
    """
    start, shots, key = 0, 0, ""
    for text, is_learned in document.pieces:
        length = len(processor.tokenizer(text, add_special_tokens=False)["input_ids"])
        if key and (is_learned or key == corpus.LABELLED):
            name = f"{key}, {shots} shots" if key == corpus.LABELLED else _form(key)
            shots += key == corpus.LABELLED
            yield name, all(hits[start : start + length - text.endswith("\n")])
            key = ""
        elif not is_learned:  # what is learned without a key is a statement, which cannot be guessed
            key = text.strip()
        start += length


def _form(key: str) -> str:
    """The key without what varies from one document to the next."""
    key = re.sub("[a-z]+", lambda match: FORMS.get(match[0], match[0]), key)
    key = re.sub(r"( \.)+", " ...", key)
    return re.sub(r"\d+( \d+)*", "N", re.sub(r"(WORD|COLOUR)( WORD| COLOUR)+", "WORDS", key))

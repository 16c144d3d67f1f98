"""Build the base model of the tiny world from nothing: tokenizer, tower, resampler, gated blocks and LM.

    python -m examples.tiny_world.build_base --output_dir outputs/base                  # one GPU, about 7 minutes
    python -m examples.tiny_world.build_base --output_dir outputs/base --perceive_steps 20 --look_up_steps 20 \
        --batch_size 16                                                                 # a CPU, to see that it runs

Two phases, both of documents of `corpus.py`. "perceive": mostly dense captions, from which the tower learns to see.
"look_up": mostly look-ups with loss on their values alone, because dense captions teach to name a colour and then its
shape, and not the other way round. Rows without a picture see the bare LM in both. Run again with the same arguments,
it goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.data import Dataset, SequentialSampler
from transformers import HfArgumentParser, LlamaConfig, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from modeling_mmgpt import MMGPTConfig, MMGPTForConditionalGeneration, MMGPTVisionConfig
from processing_mmgpt import MMGPTImageProcessor, MMGPTProcessor
from processing_mmgpt.data.collator import IGNORED
from processing_mmgpt.processing_mmgpt import add_control_tokens, pad_rows

from . import corpus
from .language import CATEGORY, SPELLED_WORDS
from .scenes import COLOURS, SHAPES, SIDE
from .tokenizer import build_tokenizer


GATE = 0.5  # a shut gate is right over a pretrained LM; from nothing, it makes perception three times slower
PROBE_SEED = 10**6
FORMS = dict.fromkeys((*CATEGORY, *SPELLED_WORDS["train"]), "WORD")
FORMS |= dict.fromkeys(COLOURS, "COLOUR") | dict.fromkeys(SHAPES, "SHAPE")


@dataclass
class BuildArguments:
    """What to build."""

    output_dir: str = "outputs/base"
    seed: int = 0
    batch_size: int = 1024
    perceive_steps: int = 1600
    look_up_steps: int = 2300
    learning_rate: float = 2e-3
    look_up_learning_rate: float = 1e-3
    workers: int = 15
    media_attention: str = field(default="preceding", metadata={"help": "as in MMGPTConfig"})


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
    """Pad ids and labels; the pictures of all rows stand in one list, so that none is padding."""

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


def forward(model: MMGPTForConditionalGeneration, batch: dict[str, torch.Tensor]):
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


class DocumentTrainer(Trainer):
    """Trainer over `Documents`, which are random already: they are taken in their order."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean loss of the learned tokens."""
        outputs = forward(model, inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)


def build_processor() -> MMGPTProcessor:
    """The tokenizer with the tokens of images, and 48x48 pictures as they are."""
    tokenizer = build_tokenizer()
    add_control_tokens(tokenizer)
    return MMGPTProcessor(MMGPTImageProcessor(size=SIDE), tokenizer)


def build_model(processor: MMGPTProcessor, media_attention: str = "preceding") -> MMGPTForConditionalGeneration:
    """A fresh model of 3.8 M parameters, its gates half open."""
    tokenizer = processor.tokenizer
    text_config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=5,
        max_position_embeddings=512,
        # Tied, the words that only instructions use would all be pushed to one place by the softmax.
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = MMGPTConfig(
        vision_config=MMGPTVisionConfig(width=128, layers=4, head_width=32, patch_size=8, image_size=SIDE),
        text_config=text_config,
        resampler={"depth": 2, "num_heads": 4, "head_dim": 32, "num_latents": 32},
        cross_attention={"num_heads": 4, "head_dim": 32},
        cross_attn_every_n_layers=1,
        media_attention=media_attention,
        image_token_id=processor.image_token_id,
        end_of_chunk_token_id=processor.end_of_chunk_token_id,
    )
    model = MMGPTForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("attn_gate", "ff_gate")):
            parameter.data.fill_(GATE)
    return model


def train(model, processor, phase: str, steps: int, learning_rate: float, args: BuildArguments) -> None:
    """Train one phase in place, or take up where an earlier run of it stopped."""
    folder = Path(args.output_dir) / phase
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": steps // 3},
        warmup_steps=min(200, steps // 10),
        weight_decay=0.01,
        adam_beta2=0.98,
        optim="adamw_torch_fused",
        bf16=torch.cuda.is_available(),
        dataloader_num_workers=args.workers,
        dataloader_prefetch_factor=4 if args.workers else None,
        remove_unused_columns=False,
        logging_steps=max(1, steps // 20),
        save_steps=max(1, steps // 4),
        save_total_limit=1,
        seed=args.seed,
        report_to="none",
    )
    documents = Documents(processor, args.seed, phase, steps * args.batch_size)
    collator = Collator(processor.tokenizer.pad_token_id)
    trainer = DocumentTrainer(model=model, args=arguments, train_dataset=documents, data_collator=collator)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.is_dir() else None)


@torch.no_grad()
def probe(model, processor, count: int = 600) -> dict[str, float]:
    """Share of values that are wholly right, by their keys, on documents that no phase has seen.

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

    A name is a value also where it is not learned, so that the shares are of all names.
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


def main() -> None:
    """Build, probe and save the base."""
    (args,) = HfArgumentParser(BuildArguments).parse_args_into_dataclasses()
    set_seed(args.seed)
    processor = build_processor()
    model = build_model(processor, args.media_attention)
    print(f"{model.num_parameters():,} parameters, {len(processor.tokenizer)} ids")
    train(model, processor, "perceive", args.perceive_steps, args.learning_rate, args)
    train(model, processor, "look_up", args.look_up_steps, args.look_up_learning_rate, args)
    model.to(torch.bfloat16)
    folder = Path(args.output_dir) / "base"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    probes = probe(model.float(), processor)
    for key, share in probes.items():
        print(f"{share:6.3f}  {key}")
    (folder / "probes.json").write_text(json.dumps(probes, indent=2) + "\n")


if __name__ == "__main__":
    main()

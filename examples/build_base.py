"""Build the base model of the tiny world from nothing: tokenizer, tower, resampler, gated blocks and LM.

    python examples/build_base.py --output_dir outputs/base                  # one GPU, about 7 minutes
    python examples/build_base.py --output_dir outputs/base --perceive_steps 20 --look_up_steps 20 \
        --batch_size 16                                                                 # a CPU, to see that it runs

There are two phases, both on documents of `corpus.py`. "perceive" has mostly dense captions, from which the tower
learns to see. "look_up" has mostly look-ups with loss on their values alone, because dense captions teach to name a
colour and then its shape, but not the other way round. Rows without a picture pass the bare LM in both. Run again with
the same arguments, the program resumes from its last checkpoint.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tiny_world.documents import Collator, Documents, forward, probe
from tiny_world.scenes import SIDE
from tiny_world.tokenizer import build_tokenizer
from torch.utils.data import SequentialSampler
from transformers import HfArgumentParser, LlamaConfig, Trainer, TrainingArguments, set_seed

from modeling_mmgpt import MMGPTConfig, MMGPTForConditionalGeneration, MMGPTVisionConfig
from modeling_mmgpt.training.checkpoints import WholeCheckpoints, last_checkpoint
from processing_mmgpt import MMGPTImageProcessor, MMGPTProcessor
from processing_mmgpt.processing_mmgpt import add_control_tokens


GATE = 0.5  # a shut gate is right over a pretrained LM; from nothing, it makes perception three times slower


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


class DocumentTrainer(Trainer):
    """Trainer over `Documents`, which are random already and are taken in order."""

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


def build_model(processor: MMGPTProcessor) -> MMGPTForConditionalGeneration:
    """A new model of 3.8 M parameters, its gates half open."""
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
        image_token_id=processor.image_token_id,
        end_of_chunk_token_id=processor.end_of_chunk_token_id,
    )
    model = MMGPTForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("attn_gate", "ff_gate")):
            parameter.data.fill_(GATE)
    return model


def train(model, processor, phase: str, steps: int, learning_rate: float, args: BuildArguments) -> None:
    """Train one phase in place, or resume it."""
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
    callbacks = [WholeCheckpoints(arguments)]
    trainer = DocumentTrainer(
        model=model, args=arguments, train_dataset=documents, data_collator=collator, callbacks=callbacks
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))


def main() -> None:
    """Build, probe and save the base."""
    (args,) = HfArgumentParser(BuildArguments).parse_args_into_dataclasses()
    set_seed(args.seed)
    processor = build_processor()
    model = build_model(processor)
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

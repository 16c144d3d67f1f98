"""Tune the tiny base on pictures and text together, load the adapter, and ask it about scenes it has never seen.

    python examples/quickstart.py

No GPU, no Hub, nothing to download: about five minutes on two cores. Writes `report.json`, `answers.png` and the
adapter to `outputs/quickstart`. `--seed` draws new scenes for tuning and for the test.
"""

import argparse
import json
import random
import time
from collections import Counter
from pathlib import Path

import torch
from datasets import Dataset
from tiny_world import evaluation
from tiny_world.dialogue import Example
from tiny_world.mixture import mixture
from tiny_world.pictures import draw_answers
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin, set_seed
from trl import SFTConfig, SFTTrainer

from modeling_mmgpt.adapters_mmgpt import lora_config
from processing_mmgpt import MMGPTCollator


BASE = Path(__file__).with_name("tiny_world") / "base"
BATCH = 32


def batches_of_like_length(examples: list[Example], seed: int) -> list[Example]:
    """Sort every few batches by length and shuffle the batches; two fifths of a random batch would be padding."""
    few, batches = 8 * BATCH, []
    for start in range(0, len(examples), few):
        chunk = sorted(examples[start : start + few], key=lambda e: len(str(e.messages)))
        batches += [chunk[i : i + BATCH] for i in range(0, len(chunk), BATCH)]
    random.Random(seed).shuffle(batches)
    return [example for batch in batches for example in batch]


def tune(examples: list[Example], seed: int, output_dir: Path) -> None:
    """Instruction-tune the base with LoRA, one pass over the examples, and save the adapter with its processor."""
    model = AutoModelForImageTextToText.from_pretrained(BASE, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(BASE)

    def fetch(batch: dict) -> dict:
        fetched = [examples[index] for index in batch["index"]]
        return {"messages": [e.messages for e in fetched], "images": [e.images for e in fetched]}

    arguments = SFTConfig(
        output_dir=str(output_dir / "training"),
        max_steps=len(examples) // BATCH,
        per_device_train_batch_size=BATCH,
        train_sampling_strategy="sequential",  # the examples are in batches already
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=30,
        bf16=False,
        activation_checkpointing=False,
        max_length=None,  # the collator's
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_pin_memory=False,
        logging_steps=25,
        save_strategy="no",
        report_to="none",
        seed=seed,
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"index": range(len(examples))}).with_transform(fetch),
        data_collator=MMGPTCollator(processor),
        processing_class=processor,
        peft_config=lora_config(model, r=16, lora_alpha=32, language_mlp=True),
    )
    trainer.train()
    trainer.save_model(str(output_dir / "adapter"))  # with the processor


def load(adapter: Path) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load an adapter with its base, and its processor."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForImageTextToText.from_pretrained(adapter, dtype=torch.float32).eval().to(device)
    return model, AutoProcessor.from_pretrained(adapter)


def main() -> None:
    """Tune, load, ask, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="draws the scenes of tuning and of the test")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--steps", type=int, default=500, help="tuning steps of 32 dialogues each")
    parser.add_argument("--count", type=int, default=400, help="test questions of each skill")
    parser.add_argument("--control-count", type=int, default=150, help="of these with a blank or a swapped picture")
    args = parser.parse_args()
    start = time.perf_counter()
    set_seed(args.seed)
    examples = [mixture(args.seed, index) for index in range(args.steps * BATCH)]
    tune(batches_of_like_length(examples, args.seed), args.seed, args.output_dir)
    print(f"tuned after {time.perf_counter() - start:.0f} s")
    skills, controls, shown = evaluation.evaluate(
        *load(args.output_dir / "adapter"), args.seed, args.count, args.control_count
    )
    evaluation.print_table(skills, controls)
    draw_answers(shown, args.output_dir / "answers.png")
    report = {
        "seconds": round(time.perf_counter() - start, 1),
        "seed": args.seed,
        "training": {"steps": args.steps, "dialogues a step": BATCH, "seed": args.seed},
        "data": dict(sorted(Counter(example.skill for example in examples).items())),
        **evaluation.measured_with(f"python examples/quickstart.py --seed {args.seed} --steps {args.steps}"),
        "dataset": "Tiny world",
        "protocol": "exact match of the whole greedy reply, held-out questions",
        "skills": skills,
        "controls": controls,
    }
    (args.output_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"{report['seconds']:.0f} s in all; see {args.output_dir}/answers.png, report.json and adapter/")


if __name__ == "__main__":
    main()

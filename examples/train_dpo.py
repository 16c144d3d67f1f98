"""Tune a model by preferences (DPO): of two replies the better one, on pictures and text together.

    accelerate launch examples/train_dpo.py --model_name_or_path outputs/quickstart/adapter \
        --data examples/records/preferences.jsonl --output_dir outputs/dpo --learning_rate 1e-4

The records are those of `train_sft.py`; their last reply is the better one, and `rejected` is a worse one:

    {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
                  {"role": "assistant", "content": "A cat."}], "images": ["cat.png"], "rejected": "A dog."}

The model that one begins with is what the new one is held to: of an adapter, the adapter as it was. All options of
`trl.DPOConfig` are options here; `--config` and `--resume` are those of `train_sft.py`.
"""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoProcessor
from trl import DPOConfig, DPOTrainer, TrlParser

from modeling_mmgpt.adapters_mmgpt import load_for_tuning, lora_config
from modeling_mmgpt.training.checkpoints import WholeCheckpoints, last_checkpoint, one_run
from modeling_mmgpt.training.finite import FiniteSteps, avoid_cudnn_attention
from modeling_mmgpt.training.launching import check_launch
from processing_mmgpt.data.annotations import MESSAGES, read_record
from processing_mmgpt.data.records import check_no_video
from processing_mmgpt.data.records import field as field_of


@dataclass
class ScriptArguments:
    """What is tuned, and on what."""

    model_name_or_path: str = field(metadata={"help": "folder or Hub id of the base, or of an adapter to go on with"})
    data: Path = field(metadata={"help": "JSONL file of records with `rejected`"})
    dtype: str = field(default="auto", metadata={"help": "of the base, such as float32; auto as it was saved"})
    lora_r: int = 16
    lora_alpha: int = 16
    language_mlp: bool = field(default=False, metadata={"help": "adapt the LM's feed-forward as well"})
    resume: bool = field(default=False, metadata={"help": "go on from the last whole checkpoint, if there is one"})


def read_pairs(path: Path) -> Dataset:
    """Read records as TRL wants preferences: `prompt`, `chosen` and `rejected` as messages, and `images`.

    Raises:
        ValueError: If a record cannot be read, does not end with a reply or has a video; with its line.
    """
    pairs = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
            *prompt, chosen = (read := read_record(record, MESSAGES, str(path.parent), random.Random(0)))["messages"]
            if chosen["role"] != "assistant":
                raise ValueError("The record does not end with a reply.")
            check_no_video(read["images"], "The record")
            rejected = {"role": "assistant", "content": [{"type": "text", "text": field_of(record, "rejected", str)}]}
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        pairs.append({"prompt": prompt, "chosen": [chosen], "rejected": [rejected], "images": read["images"]})
    return Dataset.from_list(pairs)


class Trainer(FiniteSteps, DPOTrainer):
    """TRL's Trainer, which skips and names steps that are not finite."""


def tune(script: ScriptArguments, config: DPOConfig) -> None:
    """Load, tune, save adapter and processor."""
    check_launch(config)
    model = load_for_tuning(script.model_name_or_path, dtype=script.dtype)
    processor = AutoProcessor.from_pretrained(script.model_name_or_path)
    peft_config = None
    if not isinstance(model, PeftModel):
        peft_config = lora_config(model, script.lora_r, script.lora_alpha, script.language_mlp)
    trainer = Trainer(
        model=model,
        args=config,
        train_dataset=read_pairs(script.data),
        processing_class=processor,
        peft_config=peft_config,
        callbacks=[WholeCheckpoints(config, [script.data])],
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(config.output_dir) if script.resume else None)
    trainer.save_model(config.output_dir)  # with the processor


def main() -> None:
    """Read the options, and have the output folder alone while tuning."""
    parser = TrlParser((ScriptArguments, DPOConfig))
    # TRL's defaults: arithmetic that a CPU refuses, and a length at which it cuts behind an `<image>`.
    parser.set_defaults(bf16=torch.cuda.is_available(), max_length=None)
    script, config = parser.parse_args_and_config()
    avoid_cudnn_attention()
    with one_run(config.output_dir):
        tune(script, config)


if __name__ == "__main__":
    main()

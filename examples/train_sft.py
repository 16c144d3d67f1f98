"""Instruction-tune a model with LoRA on your own pictures and dialogues.

    accelerate launch examples/train_sft.py --model_name_or_path examples/tiny_world/base \
        --data examples/records/records.jsonl --output_dir outputs/adapter --learning_rate 1e-3

Each line of the file is one record; pictures are paths relative to the file, one for each image part, in order:

    {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
                  {"role": "assistant", "content": "A cat."}], "images": ["cat.png"]}

Records with pictures and records without may stand in one file. In its place, a YAML file mixes public instruction
sets (`examples/recipes`, `processing_mmgpt/mixture_mmgpt.py`). All options of `trl.SFTConfig` are options here.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer, TrlParser

from modeling_mmgpt.adapters_mmgpt import lora_config
from processing_mmgpt import MMGPTCollator, load_instruction_dataset


@dataclass
class ScriptArguments:
    """What is tuned, on what, and how."""

    model_name_or_path: str = field(metadata={"help": "folder or Hub id of the base"})
    data: Path = field(metadata={"help": "JSONL file of records, or YAML file of a mixture"})
    lora_r: int = 16
    lora_alpha: int = 16
    language_mlp: bool = field(default=False, metadata={"help": "adapt the LM's feed-forward as well"})


def open_data(path: Path, seed: int) -> Dataset | IterableDataset:
    """Open a mixture, or a JSONL file as a mixture of one source whose pictures stand beside it."""
    if path.suffix in (".yaml", ".yml"):
        return load_instruction_dataset(path, seed)
    source = {"reader": "messages", "files": [str(path)], "image_root": str(path.parent)}
    return load_instruction_dataset({"sources": [source]}, seed)


def main() -> None:
    """Load, tune, save adapter and processor."""
    parser = TrlParser((ScriptArguments, SFTConfig))
    parser.set_defaults(bf16=torch.cuda.is_available())  # TRL's default is true, which a CPU refuses
    script, config = parser.parse_args_and_config()
    data = open_data(script.data, config.seed)
    model = AutoModelForImageTextToText.from_pretrained(script.model_name_or_path, dtype="auto")
    processor = AutoProcessor.from_pretrained(script.model_name_or_path)

    # What belongs to the collator is its own: TRL neither renders, cuts nor drops anything.
    max_length, config.max_length = config.max_length, None
    config.dataset_kwargs = {"skip_prepare_dataset": True}
    config.remove_unused_columns = False
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=data,
        data_collator=MMGPTCollator(processor, max_length=max_length),
        processing_class=processor,
        peft_config=lora_config(model, script.lora_r, script.lora_alpha, script.language_mlp),
    )
    trainer.train()
    trainer.save_model(config.output_dir)
    if trainer.accelerator.is_main_process:
        processor.save_pretrained(config.output_dir)


if __name__ == "__main__":
    main()

"""Instruction-tune a model with LoRA on your own pictures and dialogues.

    accelerate launch examples/train_sft.py --model_name_or_path examples/tiny_world/base \
        --data examples/records/records.jsonl --output_dir outputs/adapter --learning_rate 1e-3

Each line of the file is one record; pictures are paths relative to the file, one for each image part, in order:

    {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
                  {"role": "assistant", "content": "A cat."}], "images": ["cat.png"]}

Records with pictures and records without may stand in one file. In its place, a YAML file mixes public instruction
sets (`examples/recipes`, `processing_mmgpt/data/mixture.py`). All options of `trl.SFTConfig` are options here, on the
command line or, with `--config examples/recipes/lora.yaml`, in a file. What killed the run does not matter: the same
command with `--resume` goes on. Many GPUs: `docs/scaling.md`.
"""

import json
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import AutoProcessor, PreTrainedModel
from trl import SFTConfig, SFTTrainer, TrlParser

from modeling_mmgpt.adapters_mmgpt import load_for_tuning, lora_config, quantization_config, show_head_bias
from modeling_mmgpt.speed.compiling import compile_parts, fill_vocabulary
from modeling_mmgpt.training.checkpoints import WholeCheckpoints, last_checkpoint, one_run
from modeling_mmgpt.training.finite import FiniteSteps, avoid_cudnn_attention
from modeling_mmgpt.training.latents import frozen_encoder
from modeling_mmgpt.training.launching import check_launch
from modeling_mmgpt.training.weights import decayed_weights
from processing_mmgpt import MMGPTCollator, load_instruction_dataset
from processing_mmgpt.data.latents import keep_latents
from processing_mmgpt.data.recipe import files_of
from processing_mmgpt.evaluation.samples import SampleCallback
from processing_mmgpt.messages_mmgpt import Latents


@dataclass
class ScriptArguments:
    """What is tuned, on what, and how."""

    model_name_or_path: str = field(metadata={"help": "folder or Hub id of the base, or of an adapter to go on with"})
    data: Path = field(metadata={"help": "JSONL file of records, or YAML file of a mixture"})
    eval_data: Path | None = field(default=None, metadata={"help": "the same, to evaluate on"})
    eval_rows: int = field(default=0, metadata={"help": "without eval_data: hold out so many rows of the data"})
    samples: int = field(default=4, metadata={"help": "reply to so many rows at every evaluation"})
    lora_r: int = 16
    lora_alpha: int = 16
    language_mlp: bool = field(default=False, metadata={"help": "adapt the LM's feed-forward as well"})
    new_tokens: bool = field(default=False, metadata={"help": "train the rows of <image> and <|endofchunk|>"})
    dtype: str = field(default="auto", metadata={"help": "of the base, such as float32; auto as it was saved"})
    load_in_4bit: bool = field(default=False, metadata={"help": "QLoRA: the base in 4 bits, by bitsandbytes"})
    cache_pictures: bool = field(
        default=False, metadata={"help": "encode each picture once, before training: faster epochs, takes disk"}
    )
    compile_layers: bool = field(default=False, metadata={"help": "compile layers and tower: faster on a GPU"})
    fill_vocabulary: bool = field(
        default=False, metadata={"help": "fill the vocabulary up to a multiple of 64: faster on a GPU if it is odd"}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "of the LM: flex_attention is faster on packed rows on a GPU"}
    )
    resume: bool = field(default=False, metadata={"help": "go on from the last whole checkpoint, if there is one"})


class Trainer(FiniteSteps, SFTTrainer):
    """TRL's Trainer with the decay of the reference."""

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Name the weights that decay, see [`decayed_weights`]."""
        return decayed_weights(model)


def split_data(script: ScriptArguments, config: SFTConfig) -> tuple[Dataset | IterableDataset, ...]:
    """Open what is trained on and what is evaluated on, which may be `None`."""
    data, held_out = load_instruction_dataset(script.data, config.seed), None
    if script.eval_data:
        held_out = load_instruction_dataset(script.eval_data, config.seed)
    elif script.eval_rows:
        data, held_out = data.skip(script.eval_rows), data.take(script.eval_rows)
    if (held_out is None) != (config.eval_strategy == "no"):
        raise ValueError("To evaluate takes both: eval_data or eval_rows, and eval_strategy: steps or epoch.")
    if isinstance(data, IterableDataset):
        data = data.repeat(None)  # one endless epoch: where a run resumes, steps then say how many rows to pass over
    return data, held_out


def load_model(script: ScriptArguments) -> PreTrainedModel | PeftModel:
    """Load the base, or an adapter over its base, to be trained further."""

    def prepare(model: PreTrainedModel) -> None:
        if script.attn_implementation is not None:
            model.model.text_model.set_attn_implementation(script.attn_implementation)
        if script.fill_vocabulary:
            fill_vocabulary(model)
        if script.compile_layers:
            compile_parts(model)

    quantization = quantization_config() if script.load_in_4bit else None
    return load_for_tuning(script.model_name_or_path, prepare, dtype=script.dtype, quantization_config=quantization)


def cache_pictures(trainer: Trainer) -> None:
    """Encode each picture once, before training, and give its latents to the rows in place of its pixels."""
    collator, image_processor = trainer.data_collator, trainer.processing_class.image_processor
    encode, fingerprint = frozen_encoder(trainer.model, trainer.accelerator)
    given = (image_processor, encode, fingerprint, trainer.args.dataloader_num_workers)
    trainer.train_dataset = keep_latents(trainer.train_dataset, *given)
    if trainer.eval_dataset is not None:
        trainer.eval_dataset = keep_latents(trainer.eval_dataset, *given)
    if collator.placeholder_image:
        zero = encode(torch.zeros(1, 1, 3, image_processor.size, image_processor.size))
        collator.placeholder_image = Latents(zero[0, 0].cpu())


def tune(script: ScriptArguments, config: SFTConfig) -> None:
    """Load, tune, save adapter and processor."""
    check_launch(config, *(option for option in ("new_tokens", "cache_pictures") if getattr(script, option)))
    data, held_out = split_data(script, config)
    model = load_model(script)
    avoid_cudnn_attention()
    processor = AutoProcessor.from_pretrained(script.model_name_or_path)
    peft_config = None
    if not isinstance(model, PeftModel):
        peft_config = lora_config(model, script.lora_r, script.lora_alpha, script.language_mlp, script.new_tokens)

    # What belongs to the collator is its own: TRL neither renders, cuts, packs nor drops anything.
    max_length, config.max_length = config.max_length, None
    packing, config.packing = config.packing, False
    config.dataset_kwargs = {"skip_prepare_dataset": True}
    config.remove_unused_columns = False
    config.accelerator_config.dispatch_batches = False  # a process reads its own rows; sent around, ragged ones break
    collator = MMGPTCollator(
        processor,
        max_length,
        packing,
        pad_to_multiple_of=config.pad_to_multiple_of,
        placeholder_image=config.world_size > 1,
    )
    read = [file for path in (script.data, script.eval_data) if path for file in files_of(path)]
    trainer = Trainer(
        model=model,
        args=config,
        train_dataset=data,
        eval_dataset=held_out,
        data_collator=collator,
        processing_class=processor,
        peft_config=peft_config,
        callbacks=[WholeCheckpoints(config, read)],
    )
    show_head_bias(trainer.model)
    if script.cache_pictures:
        cache_pictures(trainer)
    if held_out is not None and script.samples:
        samples = list(islice(held_out, script.samples))
        trainer.add_callback(SampleCallback(trainer.log, processor, samples))
    trainer.train(resume_from_checkpoint=last_checkpoint(config.output_dir) if script.resume else None)
    trainer.save_model(config.output_dir)  # with the processor
    if trainer.accelerator.is_main_process:
        training = {"steps": trainer.state.global_step, "learning rate": config.learning_rate, "seed": config.seed}
        report = {"training": training} | (
            {"data": {script.data.name: len(data)}} if isinstance(data, Dataset) else {}
        )
        Path(config.output_dir, "report.json").write_text(json.dumps(report, indent=1) + "\n")  # for push_to_hub.py


def main() -> None:
    """Read the options, and have the output folder alone while tuning."""
    parser = TrlParser((ScriptArguments, SFTConfig))
    parser.set_defaults(bf16=torch.cuda.is_available())  # TRL's default is true, which a CPU refuses
    parser.set_defaults(ddp_find_unused_parameters=False)  # the collator sees to it that there are none
    parser.set_defaults(logging_nan_inf_filter=False)  # it would log another loss in place of one that is not finite
    script, config = parser.parse_args_and_config()
    with one_run(config.output_dir):
        tune(script, config)


if __name__ == "__main__":
    main()

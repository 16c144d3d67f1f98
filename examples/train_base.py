"""Teach a fresh resampler and fresh gated blocks to see, between your own vision tower and language model.

    accelerate launch examples/train_base.py --vision openai/clip-vit-large-patch14 --text HuggingFaceTB/SmolLM2-360M \
        --data captions.jsonl --output_dir outputs/base --learning_rate 1e-4 --weight_decay 0.1 --bf16

Stage one, before `train_sft.py`: captions and interleaved documents, in the records of `train_sft.py`. User turns hold
pictures, and text that is given; assistant turns hold the text that is learnt:

    {"messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "A cat."},
                  {"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "Its tail."}],
     "images": ["cat.png", "tail.png"]}

becomes `<image>A cat.<|endofchunk|><image>Its tail.<|endofchunk|>`. Trained are the resampler, the blocks, and the
rows of `<image>` and `<|endofchunk|>` in embedding and head; tower and LM keep every other weight. All options of
`transformers.TrainingArguments` are options here; `--config` and `--resume` are those of `train_sft.py`.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from datasets import IterableDataset
from transformers import Trainer, TrainingArguments, set_seed
from trl import TrlParser

from modeling_mmgpt import MMGPTForConditionalGeneration
from modeling_mmgpt.training.checkpoints import WholeCheckpoints, last_checkpoint, one_run
from modeling_mmgpt.training.weights import decayed_weights, keep_rows
from processing_mmgpt import MMGPTCollator, MMGPTProcessor, load_instruction_dataset
from processing_mmgpt.data.recipe import files_of
from processing_mmgpt.evaluation.few_shot import TEMPLATE


# The few-shot form without its words. Learnt is the text behind pictures, up to `<|endofchunk|>`, as in OpenFlamingo:
# https://github.com/mlfoundations/open_flamingo/blob/v2.0.1/open_flamingo/train/train_utils.py. No end token follows.
DOCUMENT = {"chat_template": TEMPLATE, "question": "{}", "caption": "", "separator": ""}


@dataclass
class ScriptArguments:
    """What is joined, and what it learns from."""

    vision: str = field(metadata={"help": "vision model of transformers; with vision_config, open_clip weights"})
    text: str = field(metadata={"help": "folder or Hub id of the language model"})
    data: Path = field(metadata={"help": "JSONL file of records, or YAML file of a mixture"})
    vision_config: str | None = field(default=None, metadata={"help": "name of an open_clip model"})
    cross_attn_every_n_layers: int = field(default=4, metadata={"help": "a block before every n-th layer of the LM"})
    max_length: int = 256
    dtype: str = field(default="float32", metadata={"help": "of all weights; --bf16 is for the arithmetic"})
    resume: bool = field(default=False, metadata={"help": "go on from the last whole checkpoint, if there is one"})


class BaseTrainer(Trainer):
    """The Trainer of transformers; of embedding and head, it trains the rows of the new tokens alone."""

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Name the weights that decay, see [`decayed_weights`]."""
        return decayed_weights(model)

    def training_step(self, model, *args, **kwargs) -> torch.Tensor:
        """Compute gradients, and zero those of all other rows before they count in the norm that is clipped."""
        loss = super().training_step(model, *args, **kwargs)
        rows = [self.model.config.image_token_id, self.model.config.end_of_chunk_token_id]
        for module in (self.model.get_input_embeddings(), self.model.get_output_embeddings()):
            keep_rows(module.weight, rows)
        return loss


def join(script: ScriptArguments) -> tuple[MMGPTForConditionalGeneration, MMGPTProcessor]:
    """Join tower and LM, and choose what is trained."""
    model = MMGPTForConditionalGeneration.from_vision_text_pretrained(
        script.vision,
        script.text,
        vision_config=script.vision_config,
        cross_attn_every_n_layers=script.cross_attn_every_n_layers,
        dtype=getattr(torch, script.dtype),
    )
    model.freeze(vision=True, text=True)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        module.weight.requires_grad_(True)  # OpenFlamingo keeps the head's rows random: it cannot say <|endofchunk|>
    processor = MMGPTProcessor.from_vision_text_pretrained(
        script.vision, script.text, vision_config=script.vision_config
    )
    return model, processor


def train(script: ScriptArguments, config: TrainingArguments) -> None:
    """Join, train, save model and processor."""
    data = load_instruction_dataset(script.data, config.seed)
    if isinstance(data, IterableDataset):
        data = data.repeat(None)  # one endless epoch: where a run resumes, steps then say how many rows to pass over
    set_seed(config.seed)  # the Trainer does so too, when the new parts are there already
    model, processor = join(script)
    config.remove_unused_columns = False
    config.accelerator_config.dispatch_batches = False  # a process reads its own rows; sent around, ragged ones break
    collator = MMGPTCollator(
        processor, max_length=script.max_length, placeholder_image=config.world_size > 1, template=DOCUMENT
    )
    trainer = BaseTrainer(
        model=model,
        args=config,
        train_dataset=data,
        data_collator=collator,
        processing_class=processor,
        callbacks=[WholeCheckpoints(config, files_of(script.data))],
    )
    if trainer.label_smoother is not None:  # transformers shifts the labels of its own classes alone
        trainer.label_smoother = partial(trainer.label_smoother, shift_labels=True)
    if trainer.is_deepspeed_enabled:
        raise ValueError("DeepSpeed keeps gradients to itself, so no rows can be chosen: launch with DDP or FSDP2.")
    trainer.train(resume_from_checkpoint=last_checkpoint(config.output_dir) if script.resume else None)
    trainer.save_model(config.output_dir)
    if trainer.accelerator.is_main_process:
        processor.save_pretrained(config.output_dir)


def main() -> None:
    """Read the options, and have the output folder alone while training."""
    script, config = TrlParser((ScriptArguments, TrainingArguments)).parse_args_and_config()
    with one_run(config.output_dir):
        train(script, config)


if __name__ == "__main__":
    main()

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

Both stages in one, on dialogues: `--template chat --lora_r 16`. LoRA is then on the LM's self-attention, and merged
into it at the end, so that the output folder is a whole model like any other.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from datasets import IterableDataset
from peft import LoraModel
from transformers import Trainer, TrainingArguments, set_seed
from trl import TrlParser

from modeling_mmgpt import MMGPTForConditionalGeneration
from modeling_mmgpt.adapters_mmgpt import lora_config
from modeling_mmgpt.speed.compiling import compile_parts
from modeling_mmgpt.training.checkpoints import WholeCheckpoints, last_checkpoint, one_run
from modeling_mmgpt.training.finite import FiniteSteps, avoid_cudnn_attention
from modeling_mmgpt.training.launching import check_launch
from modeling_mmgpt.training.weights import decayed_weights, gates, keep_rows
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
    resampler_depth: int = field(default=6, metadata={"help": "layers of the resampler"})
    num_latents: int = field(default=64, metadata={"help": "latents that a picture becomes"})
    template: str = field(
        default="document",
        metadata={"help": "how records are read: document; chat, as dialogues; or the file of another chat template"},
    )
    lora_r: int = field(default=0, metadata={"help": "rank of LoRA on the LM, merged at the end; 0 for none"})
    lora_alpha: int = 16
    language_mlp: bool = field(default=False, metadata={"help": "with LoRA on the LM's feed-forward as well"})
    gate_learning_rate: float | None = field(default=None, metadata={"help": "of the gates, if not learning_rate"})
    max_length: int = 256
    packing: bool = field(default=False, metadata={"help": "fill rows of max_length with several records"})
    compile_layers: bool = field(default=False, metadata={"help": "compile layers and tower: faster on a GPU"})
    dtype: str = field(default="float32", metadata={"help": "of all weights; --bf16 is for the arithmetic"})
    resume: bool = field(default=False, metadata={"help": "go on from the last whole checkpoint, if there is one"})


class BaseTrainer(FiniteSteps, Trainer):
    """The Trainer of transformers; of embedding and head, it trains the rows of the new tokens alone."""

    gate_learning_rate: float | None = None

    def create_optimizer(self, *args) -> torch.optim.Optimizer:
        """Make the optimizer, with a group for the gates if they have a learning rate of their own."""
        is_new, optimizer = self.optimizer is None, super().create_optimizer(*args)
        if is_new and self.gate_learning_rate is not None:
            shut = {id(gate): gate for gate in gates(self.model)}
            for group in optimizer.param_groups:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in shut]
            optimizer.add_param_group({"params": [*shut.values()], "lr": self.gate_learning_rate, "weight_decay": 0.0})
        return optimizer

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


def join(script: ScriptArguments) -> tuple[MMGPTForConditionalGeneration, MMGPTProcessor, LoraModel | None]:
    """Join tower and LM, and choose what is trained; the last is LoRA inside of the model."""
    model = MMGPTForConditionalGeneration.from_vision_text_pretrained(
        script.vision,
        script.text,
        vision_config=script.vision_config,
        cross_attn_every_n_layers=script.cross_attn_every_n_layers,
        resampler={"depth": script.resampler_depth, "num_latents": script.num_latents},
        dtype=getattr(torch, script.dtype),
    )
    model.freeze(vision=True, text=True)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        module.weight.requires_grad_(True)  # OpenFlamingo keeps the head's rows random: it cannot say <|endofchunk|>
    lora = None
    if script.lora_r:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        sizes = script.lora_r, script.lora_alpha, script.language_mlp
        lora = LoraModel(
            model, lora_config(model, *sizes, exclude_modules=r".*\.gated_cross_attn_layer\..*"), "default"
        )
        for parameter in trained:  # which PEFT has frozen
            parameter.requires_grad_(True)
    if script.compile_layers:
        compile_parts(model)
    processor = MMGPTProcessor.from_vision_text_pretrained(
        script.vision, script.text, vision_config=script.vision_config
    )
    if script.template not in ("document", "chat"):
        template = Path(script.template).read_text(encoding="utf-8")
        processor = MMGPTProcessor(processor.image_processor, processor.tokenizer, template)
    return model, processor, lora


def train(script: ScriptArguments, config: TrainingArguments) -> None:
    """Join, train, save model and processor."""
    check_launch(config, "train_base.py", *(["lora_r of train_base.py"] if script.lora_r else []))
    data = load_instruction_dataset(script.data, config.seed)
    if isinstance(data, IterableDataset):
        data = data.repeat(None)  # one endless epoch: where a run resumes, steps then say how many rows to pass over
    set_seed(config.seed)  # the Trainer does so too, when the new parts are there already
    model, processor, lora = join(script)
    avoid_cudnn_attention()
    config.remove_unused_columns = False
    config.accelerator_config.dispatch_batches = False  # a process reads its own rows; sent around, ragged ones break
    collator = MMGPTCollator(
        processor,
        script.max_length,
        script.packing,
        placeholder_image=config.world_size > 1,
        template=DOCUMENT if script.template == "document" else {},
    )
    trainer = BaseTrainer(
        model=model,
        args=config,
        train_dataset=data,
        data_collator=collator,
        processing_class=processor,
        callbacks=[WholeCheckpoints(config, files_of(script.data))],
    )
    trainer.gate_learning_rate = script.gate_learning_rate
    if trainer.label_smoother is not None:  # transformers shifts the labels of its own classes alone
        trainer.label_smoother = partial(trainer.label_smoother, shift_labels=True)
    trainer.train(resume_from_checkpoint=last_checkpoint(config.output_dir) if script.resume else None)
    if lora is not None:
        lora.merge_and_unload(safe_merge=True)
    trainer.save_model(config.output_dir)  # with the processor


def main() -> None:
    """Read the options, and have the output folder alone while training."""
    parser = TrlParser((ScriptArguments, TrainingArguments))
    parser.set_defaults(logging_nan_inf_filter=False)  # it would log another loss in place of one that is not finite
    script, config = parser.parse_args_and_config()
    with one_run(config.output_dir):
        train(script, config)


if __name__ == "__main__":
    main()

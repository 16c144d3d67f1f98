"""Tune a model by rewards for its own replies (GRPO), on pictures and text together.

    accelerate launch examples/train_grpo.py --model_name_or_path outputs/quickstart/adapter \
        --data examples/records/records.jsonl --output_dir outputs/grpo --learning_rate 1e-4 \
        --per_device_train_batch_size 8 --num_generations 8 --max_completion_length 32

The records are those of `train_sft.py`. The last reply of each is not learnt: the model replies several times to what
comes before it, and the replies that are rewarded more than their mean become more likely. A reward is 1 for the whole
reply of the record and 0 for anything else, or what a function of yours says, `--reward my_rewards.py:of_mine`:

    def of_mine(completions, answer, **kwargs) -> list[float]:  # the replies as lists of one message, and the record's
        return [float(len(reply[0]["content"]) < len(right)) for reply, right in zip(completions, answer)]

All options of `trl.GRPOConfig` are options here; `--config` and `--resume` are those of `train_sft.py`.
"""

import runpy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import AutoProcessor
from trl import GRPOConfig, GRPOTrainer, TrlParser

from modeling_mmgpt.adapters_mmgpt import load_for_tuning, lora_config
from modeling_mmgpt.training.checkpoints import WholeCheckpoints, last_checkpoint, one_run
from modeling_mmgpt.training.finite import FiniteSteps, avoid_cudnn_attention
from modeling_mmgpt.training.launching import check_launch
from processing_mmgpt import load_instruction_dataset
from processing_mmgpt.data.recipe import files_of
from processing_mmgpt.data.records import check_no_video


@dataclass
class ScriptArguments:
    """What is tuned, on what, and what is rewarded."""

    model_name_or_path: str = field(metadata={"help": "folder or Hub id of the base, or of an adapter to go on with"})
    data: Path = field(metadata={"help": "JSONL file of records, or YAML file of a mixture"})
    reward: str = field(default="exact", metadata={"help": "exact, or FILE.py:FUNCTION"})
    dtype: str = field(default="auto", metadata={"help": "of the base, such as float32; auto as it was saved"})
    lora_r: int = 16
    lora_alpha: int = 16
    language_mlp: bool = field(default=False, metadata={"help": "adapt the LM's feed-forward as well"})
    resume: bool = field(default=False, metadata={"help": "go on from the last whole checkpoint, if there is one"})


def exact(completions: list[list[dict]], answer: list[str], **kwargs) -> list[float]:
    """Reward the replies that are the record's, letter by letter, but for space around them."""
    return [
        float(reply[0]["content"].strip() == right.strip()) for reply, right in zip(completions, answer, strict=True)
    ]


def find_reward(name: str) -> Callable:
    """Find a reward function.

    Raises:
        ValueError: If the file has no function of this name.
    """
    if name == "exact":
        return exact
    file, _, function = name.rpartition(":")
    if not Path(file).is_file() or function not in (found := runpy.run_path(file)):
        raise ValueError(f"--reward is exact or FILE.py:FUNCTION, and there is no {name!r}.")
    return found[function]


def prompts(path: Path, seed: int) -> Dataset:
    """Open records as TRL wants prompts: what comes before the last reply, the pictures, and the reply as `answer`.

    Raises:
        ValueError: If the data are streamed, which GRPO cannot repeat, end without a reply, or have a video.
    """
    data = load_instruction_dataset(path, seed)
    if isinstance(data, IterableDataset):
        raise ValueError(f"{path} is streamed, and GRPO goes back to its prompts: leave out `streaming`.")

    def fetch(rows: dict[str, list]) -> dict[str, list]:
        records = [data[index] for index in rows["index"]]
        for index, record in zip(rows["index"], records, strict=True):
            if record["messages"][-1]["role"] != "assistant":
                raise ValueError(f"Row {index} of {path} does not end with a reply.")
            check_no_video(record["images"], f"Row {index} of {path}")
        return {
            "prompt": [record["messages"][:-1] for record in records],
            "images": [record["images"] for record in records],
            "answer": ["".join(part["text"] for part in record["messages"][-1]["content"]) for record in records],
        }

    return Dataset.from_dict({"index": range(len(data))}).with_transform(fetch)


class Trainer(FiniteSteps, GRPOTrainer):
    """TRL's Trainer, which skips and names steps that are not finite, and leaves the pictures of a row in their row.

    TRL (1.16) takes `pixel_values` with as many rows as there are pictures for a list of pictures, and cuts it by how
    many each prompt has. Ours hold the pictures of one prompt in each row, and two prompts of two pictures and none
    make as many pictures as rows: each would get pictures of others. Told of no picture, TRL leaves the rows alone.
    """

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict:
        batch = super()._generate_and_score_completions(inputs)
        if "num_images" in batch:
            batch["num_images"] = [0] * len(batch["num_images"])
        return batch

    def _get_per_token_logps_and_entropies(self, model, input_ids, *args, num_images=None, **kwargs):
        num_images = None if num_images is None else [0] * len(input_ids)
        return super()._get_per_token_logps_and_entropies(model, input_ids, *args, num_images=num_images, **kwargs)


def tune(script: ScriptArguments, config: GRPOConfig) -> None:
    """Load, tune, save adapter and processor."""
    check_launch(config)
    model = load_for_tuning(script.model_name_or_path, dtype=script.dtype)
    processor = AutoProcessor.from_pretrained(script.model_name_or_path)
    peft_config = None
    if not isinstance(model, PeftModel):
        peft_config = lora_config(model, script.lora_r, script.lora_alpha, script.language_mlp)
    config.remove_unused_columns = False
    # TRL pads prompts itself and would take padding of ours for text.
    config.chat_template_kwargs = {"padding": False, "return_tensors": None}
    trainer = Trainer(
        model=model,
        args=config,
        reward_funcs=find_reward(script.reward),
        train_dataset=prompts(script.data, config.seed),
        processing_class=processor,
        peft_config=peft_config,
        callbacks=[WholeCheckpoints(config, files_of(script.data))],
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(config.output_dir) if script.resume else None)
    trainer.save_model(config.output_dir)  # with the processor


def main() -> None:
    """Read the options, and have the output folder alone while tuning."""
    parser = TrlParser((ScriptArguments, GRPOConfig))
    parser.set_defaults(bf16=torch.cuda.is_available())  # TRL's default is true, which a CPU refuses
    script, config = parser.parse_args_and_config()
    avoid_cudnn_attention()
    with one_run(config.output_dir):
        tune(script, config)


if __name__ == "__main__":
    main()

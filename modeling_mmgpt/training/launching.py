"""What does not go with the way that processes were launched, said before weights are loaded."""

import os

from transformers import TrainingArguments


# Why something does not go with a way of launching. docs/scaling.md has the table of what does.
NO_ROWS = "DeepSpeed keeps gradients to itself, so the rows of new tokens cannot be chosen"
REFUSED = {
    ("new_tokens", "FSDP"): "PEFT would put new rows that are taken apart into a weight that is whole",
    ("new_tokens", "ZeRO-3"): "PEFT makes a head with the new rows, and TRL's loss wants the one that DeepSpeed holds",
    ("cache_pictures", "ZeRO-3"): "the tower is taken apart before it has encoded a picture",
    ("train_base.py", "ZeRO-2"): NO_ROWS,
    ("train_base.py", "ZeRO-3"): NO_ROWS,
    ("lora_r of train_base.py", "FSDP"): "LoRA cannot be merged into weights that are taken apart",
}


def way_of(config: TrainingArguments) -> str:
    """Name the way in which processes share the work: `one process`, `DDP`, `FSDP`, `ZeRO-2` or another stage.

    Args:
        config: The Trainer's arguments.
    """
    if config.deepspeed_plugin is not None:
        return f"ZeRO-{config.deepspeed_plugin.zero_stage}"
    if config.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return "FSDP"
    return "DDP" if config.world_size > 1 else "one process"


def check_launch(config: TrainingArguments, *asked: str) -> None:
    """Raise if something does not go with the way that processes were launched.

    Args:
        config: The Trainer's arguments.
        *asked: What is asked for, by its name in [`REFUSED`].

    Raises:
        ValueError: With what is asked for and the way; or if one process sees several GPUs, over which the Trainer
            would spread each batch by `DataParallel`.
    """
    if config.n_gpu > 1:
        raise ValueError(
            f"One process sees {config.n_gpu} GPUs: launch by `accelerate launch`, with the config ddp.yaml for all "
            "of them or one_gpu.yaml for one, or let CUDA_VISIBLE_DEVICES name one."
        )
    way = way_of(config)
    for one in asked:
        if (one, way) in REFUSED:
            raise ValueError(f"{one} does not go with {way}: {REFUSED[one, way]}. Launch with ddp.yaml.")

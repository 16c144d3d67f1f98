r"""Measure LoRA training over several GPUs that share out the weights: tokens a second and the peak memory of a GPU.

    accelerate launch --config_file examples/accelerate/fsdp2.yaml --num_processes 4 \
        examples/measurements/benchmark_sharded.py

The shape is that of OpenFlamingo-9B (LLaMA-7B, ViT-L/14, 64 latents, a block before every 4th layer), the weights are
random: built on the meta device, sharded, and only then given memory, so that no process ever holds them all. Prints
one JSON object. `--tiny true` is a model of no size; with `torchrun` in place of `accelerate launch`, and on CPUs.
"""

import json
import statistics
import time
from dataclasses import dataclass

import peft
import torch
import torch.distributed as dist
import transformers
from accelerate import init_empty_weights
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForImageTextToText, HfArgumentParser, LlamaConfig

from modeling_mmgpt import MMGPTConfig, MMGPTVisionConfig
from modeling_mmgpt.adapters_mmgpt import lora_config


@dataclass
class Arguments:
    """What a step is."""

    batch_size: int = 8  # rows of a GPU, one picture each
    length: int = 512  # tokens of a row
    steps: int = 10  # that are timed, after three that are not
    activation_checkpointing: bool = False
    tiny: bool = False


def config_of(tiny: bool) -> MMGPTConfig:
    """The config of OpenFlamingo-9B, or of a model of no size."""
    text = LlamaConfig(vocab_size=32003)  # the defaults are those of LLaMA-7B
    vision = MMGPTVisionConfig(width=1024, layers=24, head_width=64, patch_size=14, image_size=224, quick_gelu=True)
    if tiny:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
        text = LlamaConfig(vocab_size=32003, **sizes)
        vision = MMGPTVisionConfig(width=16, layers=2, head_width=8, patch_size=8, image_size=24)
    return MMGPTConfig(
        vision_config=vision,
        text_config=text,
        cross_attn_every_n_layers=4,
        image_token_id=32001,
        end_of_chunk_token_id=32002,
    )


def build(config: MMGPTConfig, device: torch.device, activation_checkpointing: bool) -> FSDPModule:
    """Build on the meta device, adapt, shard, and give each process memory for its part."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
        if activation_checkpointing:
            model.activation_checkpointing_enable()
        units = set(model._no_split_modules)
        model = peft.get_peft_model(model, lora_config(model), autocast_adapter_dtype=False)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in model.modules():
        if type(module).__name__ in units:
            fully_shard(module, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    buffers = {name: buffer.to(device) for name, buffer in model.named_buffers()}
    model.to_empty(device=device)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        for name, parameter in model.named_parameters():
            parameter.fill_(1) if "norm" in name and name.endswith("weight") else parameter.normal_(std=0.02)
    return model.train()


def batch_of(config: MMGPTConfig, args: Arguments, device: torch.device) -> dict[str, torch.Tensor]:
    """Rows of random ids, each with a picture at its head, all of them learnt."""
    ids = torch.randint(3, 32000, (args.batch_size, args.length), device=device)
    ids[:, 1] = config.image_token_id
    side = config.vision_config.image_size
    pictures = torch.randn(args.batch_size, 1, 3, side, side, device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pictures, "labels": ids}


def main() -> None:
    """Build, step, report."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    torch.manual_seed(dist.get_rank())
    config = config_of(args.tiny)
    model = build(config, device, args.activation_checkpointing)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    batch, seconds = batch_of(config, args, device), []
    for _ in range(3 + args.steps):
        dist.barrier()
        start = time.perf_counter()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.item()  # waits for the GPU
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    step = statistics.median(seconds[3:])
    tokens = args.batch_size * args.length * dist.get_world_size()
    report = {
        "gpus": dist.get_world_size(),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        **vars(args),
        "seconds_a_step": round(step, 4),
        "tokens_a_second": round(tokens / step, 1),
        "peak_gib_a_gpu": round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else None,
        "loss": loss,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if dist.get_rank() == 0:
        print(json.dumps(report, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""Turn an old checkpoint into a folder that `AutoModel` and `AutoProcessor` load.

OpenFlamingo-9B, version 1, and the LoRA of Multimodal-GPT on it:

    python examples/convert_checkpoint.py flamingo checkpoint.pt llama-7b outputs/openflamingo-9b \
        --cross_attn_every_n_layers 4 --media_attention following
    python examples/convert_checkpoint.py lora mmgpt-lora-v0-release.pt outputs/openflamingo-9b outputs/mmgpt

`docs/old_checkpoints.md` has the commands for every released checkpoint. Unlike `python -m
modeling_mmgpt.converting_mmgpt`, which has an option for every size, this asks the tokenizer for the ids of the
control tokens, and saves the processor with the weights.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoProcessor

from modeling_mmgpt.converting_mmgpt import check_free, convert_flamingo, convert_lora, new_folder
from processing_mmgpt import MMGPTProcessor


def flamingo(args: argparse.Namespace) -> None:
    """Convert a checkpoint of OpenFlamingo 1 or 2."""
    check_free(args.output_dir)
    vision_config = args.vision_config
    if vision_config.endswith(".json"):
        vision_config = json.loads(Path(vision_config).read_text())
    processor = MMGPTProcessor.from_vision_text_pretrained(None, args.language_model, vision_config=vision_config)
    model = convert_flamingo(
        args.checkpoint,
        args.language_model,
        args.vision_tower,
        vision_config,
        cross_attn_every_n_layers=args.cross_attn_every_n_layers,
        media_attention=args.media_attention,
        image_token_id=processor.image_token_id,
        end_of_chunk_token_id=processor.end_of_chunk_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
        dtype=args.dtype and getattr(torch, args.dtype),
    )
    with new_folder(args.output_dir) as folder:
        model.save_pretrained(folder, max_shard_size="5GB")
        processor.save_pretrained(folder)


def lora(args: argparse.Namespace) -> None:
    """Convert a LoRA of Multimodal-GPT for a base that `flamingo` made."""
    processor = AutoProcessor.from_pretrained(args.base)
    convert_lora(args.lora_checkpoint, args.base, args.output_dir, args.lora_alpha)
    processor.save_pretrained(args.output_dir)


def main() -> None:
    """Convert."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("flamingo", help="OpenFlamingo 1 or 2")
    command.set_defaults(run=flamingo)
    command.add_argument("checkpoint", help="checkpoint.pt")
    command.add_argument("language_model", help="folder or Hub id of the LM it was trained on, with its tokenizer")
    command.add_argument("output_dir", type=Path, help="the folder to make")
    command.add_argument("--vision_tower", default="openai", help="open_clip pretrained tag, or file of a state dict")
    command.add_argument("--vision_config", default="ViT-L-14-quickgelu", help="open_clip model name, or a .json")
    command.add_argument("--cross_attn_every_n_layers", type=int, required=True, help="9B: 4, 4B: 2, 3B: 1")
    command.add_argument(
        "--media_attention",
        required=True,
        choices=["preceding", "all_preceding", "following"],
        help="following: OpenFlamingo 1 and Multimodal-GPT; preceding: OpenFlamingo 2",
    )
    command.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: that of the LM")
    command = commands.add_parser("lora", help="a LoRA of Multimodal-GPT")
    command.set_defaults(run=lora)
    command.add_argument("lora_checkpoint", help=".pt or .safetensors")
    command.add_argument("base", help="folder that `flamingo` made")
    command.add_argument("output_dir", type=Path, help="the folder to make")
    command.add_argument("--lora_alpha", type=float, help="where the file does not say")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()

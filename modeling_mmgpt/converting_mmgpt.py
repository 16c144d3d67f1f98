r"""Old checkpoints become MMGPT models: OpenFlamingo 1 and 2, and the LoRA adapters of Multimodal-GPT.

    python -m modeling_mmgpt.converting_mmgpt flamingo checkpoint.pt llama-7b outputs/openflamingo-9b \
        --cross_attn_every_n_layers 4 --media_attention following
    python -m modeling_mmgpt.converting_mmgpt lora mmgpt-lora-v0-release.pt outputs/openflamingo-9b outputs/mmgpt

leave folders that `AutoModel` and `AutoProcessor` load; `docs/old_checkpoints.md` says what each released checkpoint
needs. Every key of an old file is used, known to be redundant, or an error. Nothing in a file is ever run.

Not part of the remote code. Letters: `V` vocabulary, `D` width, `r` rank.
"""

import argparse
import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoProcessor

from .configuration_mmgpt import MMGPTConfig
from .conversion.fitting import block_sizes, check_lora, fill, resampler_sizes
from .conversion.names import add_head, rename
from .conversion.old_files import read_weights
from .conversion.parts import load_language_model, load_tower, resize_vocabulary
from .modeling_mmgpt import MMGPTForConditionalGeneration
from .saving.whole import check_free, whole


def convert_flamingo(
    checkpoint: str | os.PathLike,
    language_model: str | os.PathLike,
    vision_tower: str | os.PathLike,
    vision_config: str | dict,
    *,
    cross_attn_every_n_layers: int,
    media_attention: str,
    image_token_id: int,
    end_of_chunk_token_id: int,
    pad_token_id: int | None = None,
    resampler: dict | None = None,
    cross_attention: dict | None = None,
    vision_post_norm: bool = False,
    dtype: torch.dtype | None = None,
    lm_head: str | os.PathLike | None = None,
) -> MMGPTForConditionalGeneration:
    """Join an OpenFlamingo checkpoint, 1 or 2, with the LM and the vision tower it was trained on.

    Args:
        checkpoint: `checkpoint.pt`: filtered or complete, flat or a training dictionary, with `module.` or without.
        language_model: Folder or Hub id of the LM with its original vocabulary; it gets that of the checkpoint.
        vision_tower: An open_clip state dict (`.safetensors`, `.pt`), or an open_clip pretrained tag.
        vision_config: An open_clip model name, or its model config. `quick_gelu` has to be what the tag needs.
        cross_attn_every_n_layers: Put a gated block before every n-th decoder layer. Released: 4 for the 9B models
            and Multimodal-GPT, 2 for 4B, 1 for 3B.
        media_attention: Which image a token attends to. There is no default, because no file tells.
            `"following"` for OpenFlamingo-9B version 1 and for Multimodal-GPT, whose code lets a token attend to the
            next image unless `use_media_placement_augmentation` is on, and always at inference: in its prompt only
            the words before `<image>`, never the reply, look at the picture. `"preceding"` for every OpenFlamingo 2,
            which has no such flag. `"all_preceding"` for models trained with `only_attend_immediate_media=False`.
            https://github.com/mlfoundations/open_flamingo/issues/242
        image_token_id: Id of `<image>`.
        end_of_chunk_token_id: Id of `<|endofchunk|>`.
        pad_token_id: Id of the padding token; by default that of the LM.
        resampler: `num_heads` and `head_dim` where they are not 8 and 64; all other sizes are read off the checkpoint.
        cross_attention: Likewise.
        vision_post_norm: Patch tokens after the tower's last norm. For models trained with open_clip 2.23 or later;
            the released ones expect them before it.
        dtype: Data type of all weights; by default that of the LM.
        lm_head: A file of one tensor `(V, D)`, the LM head with the rows of the added tokens. OpenFlamingo neither
            trains nor saves these rows of an untied head. Without the file they become the mean of the others.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is cut off or holds more than tensors, if keys are missing, left over or of another
            shape (the message names the first of each and what was expected), if an id lies outside the vocabulary,
            or if the LM is an MPT that transformers cannot express.
    """
    weights, _ = read_weights(checkpoint)
    if not any(key.endswith("perceiver.latents") for key in weights):
        raise ValueError(
            f"{checkpoint} is no OpenFlamingo checkpoint: expected `perceiver.latents` and others, found "
            f"{sorted(weights)[:5]}."
        )
    text_model = load_language_model(language_model, dtype)
    found = rename(weights, text_model)
    if lm_head is not None:
        add_head(found, lm_head, text_model)
    ids = {"image": image_token_id, "end_of_chunk": end_of_chunk_token_id, "pad": pad_token_id}
    resize_vocabulary(text_model, found, ids)
    tower_weights, tower_config = load_tower(vision_tower, vision_config, vision_post_norm, text_model.dtype)
    model = MMGPTForConditionalGeneration.from_vision_text_pretrained(
        tower_weights,
        text_model,
        vision_config=tower_config,
        image_token_id=image_token_id,
        end_of_chunk_token_id=end_of_chunk_token_id,
        pad_token_id=pad_token_id,
        dtype=dtype,
        cross_attn_every_n_layers=cross_attn_every_n_layers,
        media_attention=media_attention,
        resampler={**resampler_sizes(found), **(resampler or {})},
        cross_attention={**block_sizes(found), **(cross_attention or {})},
    )
    fill(model, found, checkpoint)
    return model.eval()


def convert_lora(
    lora_checkpoint: str | os.PathLike,
    base: str | os.PathLike,
    output_dir: str | os.PathLike,
    lora_alpha: float | None = None,
) -> Path:
    """Turn a LoRA file of Multimodal-GPT into a PEFT folder.

    Args:
        lora_checkpoint: `.pt` of a training (final, per epoch, released, with a mmengine config) or `.safetensors`.
        base: Folder or Hub id of the model from [`convert_flamingo`]. A folder is recorded by its absolute path.
        output_dir: The folder to make; written only if all of it is right.
        lora_alpha: The update is `lora_alpha / r * B @ A`. Needed where the file does not say.

    Returns:
        `output_dir`, for `AutoModel.from_pretrained(output_dir)` or `PeftModel.from_pretrained(base, output_dir)`.

    Raises:
        FileExistsError: If `output_dir` holds something.
        FileNotFoundError: If the file is missing.
        ValueError: If the file cannot be read without running it, if it is for another base (the message names the
            first keys that do not fit and what was expected), or if neither file nor caller gives `lora_alpha`.
    """
    import peft

    check_free(output_dir)
    weights, settings = read_weights(lora_checkpoint)
    lora_alpha = _lora_alpha(lora_checkpoint, settings, lora_alpha)
    config = AutoConfig.from_pretrained(base)
    if not isinstance(config, MMGPTConfig):
        raise ValueError(f"{base} is a {config.model_type!r}, no MMGPT model: convert the checkpoint it is for first.")
    with torch.device("meta"):
        model = MMGPTForConditionalGeneration(config)
    found = rename(weights, model.model.text_model)
    pattern, rank = check_lora(found, model, lora_checkpoint)
    adapter = peft.LoraConfig(
        r=rank,
        lora_alpha=lora_alpha,
        lora_dropout=settings.get("lora_dropout", 0.0),
        target_modules=pattern,
        base_model_name_or_path=str(Path(base).resolve() if Path(base).exists() else base),
        inference_mode=True,
    )
    with whole(output_dir) as folder:
        adapter.save_pretrained(folder)
        tensors = {f"base_model.model.{name}": tensor for name, (_, tensor) in found.items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return Path(output_dir)


def _lora_alpha(path: str | os.PathLike, settings: dict, given: float | None) -> float:
    """Take `lora_alpha` from the file or from the caller; both have to agree."""
    own = settings.get("lora_alpha")
    if own is None and given is None:
        raise ValueError(f"{path} does not say what `lora_alpha` is: give it.")
    if own is not None and given is not None and own != given:
        raise ValueError(f"`lora_alpha` is {given}, but {path} says {own}.")
    return own if given is None else given


def _flamingo(checkpoint: str, language_model: str, output_dir: str, dtype: str | None, **options) -> None:
    """Convert a checkpoint and save it with its processor, whose tokenizer says the ids of the control tokens."""
    from processing_mmgpt import MMGPTProcessor  # text: none of this package's business but here

    check_free(output_dir)
    if options["vision_config"].endswith(".json"):
        options["vision_config"] = json.loads(Path(options["vision_config"]).read_text())
    processor = MMGPTProcessor.from_vision_text_pretrained(
        None, language_model, vision_config=options["vision_config"]
    )
    model = convert_flamingo(
        checkpoint,
        language_model,
        image_token_id=processor.image_token_id,
        end_of_chunk_token_id=processor.end_of_chunk_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
        dtype=dtype and getattr(torch, dtype),
        **options,
    )
    with whole(output_dir) as folder:
        model.save_pretrained(folder, max_shard_size="5GB")
        processor.save_pretrained(folder)


def _lora(lora_checkpoint: str, base: str, output_dir: str, lora_alpha: float | None) -> None:
    """Convert an adapter for a base that `flamingo` made, and save it with the processor of the base."""
    import processing_mmgpt  # noqa: F401 - for AutoProcessor

    check_free(output_dir)
    processor = AutoProcessor.from_pretrained(base)
    with whole(output_dir) as folder:
        convert_lora(lora_checkpoint, base, folder, lora_alpha)
        processor.save_pretrained(folder)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m modeling_mmgpt.converting_mmgpt", description=__doc__.split("\n")[0]
    )
    commands = parser.add_subparsers(required=True)
    flamingo = commands.add_parser("flamingo", help="an OpenFlamingo checkpoint, 1 or 2 -> a model folder")
    flamingo.set_defaults(run=_flamingo)
    flamingo.add_argument("checkpoint", help="checkpoint.pt")
    flamingo.add_argument("language_model", help="folder or Hub id of the LM it was trained on, with its tokenizer")
    flamingo.add_argument("output_dir", help="the folder to make")
    flamingo.add_argument("--cross_attn_every_n_layers", type=int, required=True, help="9B: 4, 4B: 2, 3B: 1")
    flamingo.add_argument(
        "--media_attention",
        required=True,
        choices=["preceding", "all_preceding", "following"],
        help="following: OpenFlamingo 1 and Multimodal-GPT; preceding: OpenFlamingo 2",
    )
    flamingo.add_argument("--vision_tower", default="openai", help="open_clip pretrained tag, or file of a state dict")
    flamingo.add_argument("--vision_config", default="ViT-L-14-quickgelu", help="open_clip model name, or a .json")
    flamingo.add_argument("--resampler", type=json.loads, help='JSON, such as {"num_heads": 4, "head_dim": 16}')
    flamingo.add_argument("--cross_attention", type=json.loads, help="likewise")
    flamingo.add_argument("--vision_post_norm", action="store_true", help="trained with open_clip >= 2.23")
    flamingo.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: that of the LM")
    flamingo.add_argument("--lm_head", help="file with the LM head, rows of the added tokens included")
    lora = commands.add_parser("lora", help="a LoRA of Multimodal-GPT -> a PEFT folder")
    lora.set_defaults(run=_lora)
    lora.add_argument("lora_checkpoint", help=".pt or .safetensors")
    lora.add_argument("base", help="folder or Hub id that `flamingo` made")
    lora.add_argument("output_dir", help="the folder to make")
    lora.add_argument("--lora_alpha", type=float, help="where the file does not say")
    return parser.parse_args()


def main() -> None:
    """Convert from the command line."""
    arguments = vars(_parse())
    arguments.pop("run")(**arguments)


if __name__ == "__main__":
    main()

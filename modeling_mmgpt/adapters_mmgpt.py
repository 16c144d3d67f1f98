"""LoRA for MMGPT: the one place that names its target modules. Not part of the remote code."""

import re
from pathlib import Path

import peft
from torch import nn
from transformers.pytorch_utils import Conv1D

from .conditioning_mmgpt import decoder_layers
from .modeling_mmgpt import MMGPTForConditionalGeneration


GATED_BLOCK_TARGETS = ("attn.to_q", "attn.to_kv", "attn.to_out", "ff.1", "ff.3")


def lora_config(
    model: MMGPTForConditionalGeneration, r: int = 16, lora_alpha: int = 16, language_mlp: bool = False, **kwargs
) -> peft.LoraConfig:
    """Make the LoRA config of Multimodal-GPT for a model.

    Adapted are the LM's self-attention and the gated blocks (query, fused key and value, output, both feed-forward
    matrices); never the vision tower, never the resampler. With LLaMA-7B, ViT-L/14 and a block every 4 layers that
    is 23,461,888 parameters, the number Multimodal-GPT's own log prints:
    https://github.com/open-mmlab/Multimodal-GPT/issues/26.

    The adapter will name its base; a base in a local folder by its absolute path, which is written into
    `model.name_or_path`.

    Args:
        model: The model to adapt, for the names of its LM's matrices.
        r: Rank.
        lora_alpha: Scale; the update is `lora_alpha / r * B @ A`.
        language_mlp: Adapt the LM's feed-forward as well.
        **kwargs: Other fields of `peft.LoraConfig`.

    Raises:
        ValueError: If `language_mlp` is asked for and the LM's feed-forward has no linear layer, as where a mixture of
            experts keeps all of them in one weight.
    """
    if Path(model.name_or_path).is_dir():
        # PEFT writes this into the adapter, which has to find its base from any working directory.
        model.name_or_path = str(Path(model.name_or_path).resolve())
    decoder, name = decoder_layers(model.model.text_model)
    attention, feed_forward = set(), set()
    for layer in getattr(decoder, name):
        for path, module in layer.decoder_layer.named_modules():
            if isinstance(module, (nn.Linear, Conv1D)):
                (attention if "att" in path.split(".")[0] else feed_forward).add(f"decoder_layer.{path}")
    if language_mlp and not feed_forward:
        raise ValueError(
            f"language_mlp=True, but the feed-forward of {type(model.model.text_model).__name__} has no linear layer. "
            "Leave it out, or name its weights in `target_parameters`."
        )
    targets = {*attention, *(feed_forward if language_mlp else ())}
    targets.update(f"gated_cross_attn_layer.{path}" for path in GATED_BLOCK_TARGETS)
    pattern = "|".join(re.escape(target) for target in sorted(targets))
    return peft.LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=rf"model\.text_model\..*\.({pattern})", **kwargs)

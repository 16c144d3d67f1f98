"""The names that weights have in old files, and those they have here.

The old names come from
https://github.com/mlfoundations/open_flamingo/blob/v2.0.1/open_flamingo/src/flamingo.py,
https://github.com/open-mmlab/Multimodal-GPT/blob/main/mmgpt/train/train_utils.py.
"""

import os
import re

import torch
from transformers import PreTrainedModel

from ..conditioning_mmgpt import decoder_layers
from ..vision_mmgpt import OPEN_CLIP_NAME
from .old_files import read_weights


# Old name -> new name, every rule applied in this order; {layers} and {head} are the paths in the LM.
RENAMES = (
    (r"^module\.", ""),  # DistributedDataParallel
    (r"^lang_encoder\.base_model\.model\.", "lang_encoder."),  # PEFT
    (r"^lang_encoder\.gated_cross_attn_layers\.(\d+)\.", r"lang_encoder.{layers}.\1.gated_cross_attn_layer."),  # alias
    (r"^lang_encoder\.old_decoder_blocks\.(\d+)\.", r"lang_encoder.{layers}.\1.decoder_layer."),  # alias
    (r"^lang_encoder\.(embed_out|lm_head)\.", "lang_encoder.{head}."),  # GPT-NeoX has had both
    (r"^lang_encoder\.", "model.text_model."),
    (r"^perceiver\.", "model.resampler."),
    (r"^vision_encoder\.(visual\.)?", "model.vision_tower."),
    OPEN_CLIP_NAME,
    (r"\.lora_([AB])\.default\.weight$", r".lora_\1.weight"),  # PEFT 0.3 -> the names of its files, and of PEFT 0.2
)


# New names that nobody needs: buffers that transformers <= 4.30 saved, and open_clip's projection.
REDUNDANT = (
    r"\.decoder_layer\.[a-z_]+\.rotary_emb\.inv_freq$",
    r"\.decoder_layer\.(attention|attn)\.(bias|masked_bias)$",
    r"^model\.vision_tower\.proj$",
)


def rename(weights: dict[str, torch.Tensor], text_model: PreTrainedModel) -> dict[str, tuple[str, torch.Tensor]]:
    """Give every weight its new name.

    Returns:
        New name -> old name and tensor. Aliases and tied weights have one name.

    Raises:
        ValueError: If two weights of one name differ.
    """
    layers = name_of(text_model, decoder_layers(text_model))
    head = name_of(text_model, text_model.get_output_embeddings())
    rules = [(old, new.replace("{layers}", layers).replace("{head}", head)) for old, new in RENAMES]
    tied = {
        f"model.text_model.{key}": f"model.text_model.{to}" for key, to in text_model.all_tied_weights_keys.items()
    }
    has_clip = any(re.match(r"(module\.)?vision_encoder\.visual\.", key) for key in weights)
    found = {}
    for old, tensor in weights.items():
        if has_clip and re.match(r"(module\.)?vision_encoder\.(?!visual\.)", old):
            continue  # CLIP's text tower
        name = old
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        _enter(found, tied.get(name, name), old, tensor)
    return found


def _enter(found: dict[str, tuple[str, torch.Tensor]], name: str, old: str, tensor: torch.Tensor) -> None:
    """Add a weight; a second one of the same name has to equal the first."""
    other, first = found.setdefault(name, (old, tensor))
    same = first.data_ptr() == tensor.data_ptr() and first.shape == tensor.shape
    if not same and not torch.equal(first, tensor):
        raise ValueError(f"{other!r} and {old!r} are two names of one weight, {name!r}, and differ.")


def add_head(found: dict[str, tuple[str, torch.Tensor]], path: str | os.PathLike, text_model: PreTrainedModel) -> None:
    """Add the LM head from a file of its own, one tensor `(V, D)`.

    Raises:
        ValueError: If the file holds more than that, or a head that differs from the checkpoint's.
    """
    head, _ = read_weights(path)
    if len(head) != 1:
        raise ValueError(f"{path} holds {sorted(head)[:5]}; expected the LM head, one tensor, alone.")
    name = name_of(text_model, text_model.get_output_embeddings())
    if text_model.config.tie_word_embeddings:
        name = name_of(text_model, text_model.get_input_embeddings())
    ((old, tensor),) = head.items()
    _enter(found, f"model.text_model.{name}.weight", old, tensor)


def name_of(model: torch.nn.Module, wanted: torch.nn.Module) -> str:
    """The path of a module in a model."""
    return next(name for name, module in model.named_modules() if module is wanted)


def old_name(name: str) -> str:
    """The name of a weight in a flat checkpoint."""
    return name.replace("model.resampler.", "perceiver.").replace("model.text_model.", "lang_encoder.")


def is_redundant(name: str, layers: set[str]) -> bool:
    """Whether a weight may be left out; that of a layer only if the model has the layer."""
    layer, found, _ = name.partition(".decoder_layer.")
    return any(re.search(pattern, name) for pattern in REDUNDANT) and (not found or layer in layers)

"""Whether old weights fit a model: every weight has its place, and none is missing."""

import os
import re

import torch
from transformers.utils import logging

from ..configuration_mmgpt import MMGPTConfig
from ..modeling_mmgpt import MMGPTForConditionalGeneration
from .names import is_redundant, name_of, old_name


def resampler_sizes(found: dict) -> dict[str, int]:
    """Read the sizes of the resampler off the shapes of the checkpoint, which do not tell the number of heads."""
    shapes = _shapes(found, "model.resampler.")
    num_latents, width = matrix_shape(found, "model.resampler.latents")
    layers = [int(key.split(".")[1]) for key in shapes if key.startswith("layers.")]
    sizes = {"depth": 1 + max(layers, default=0), "num_latents": num_latents}
    if "layers.0.1.1.weight" in shapes:
        sizes["ff_mult"] = matrix_shape(found, "model.resampler.layers.0.1.1.weight")[0] // width
    for key, embeddings in (("max_num_frames", "frame_embs"), ("max_num_images", "media_time_embs")):
        if shapes.get(embeddings):  # not of a single number
            sizes[key] = shapes[embeddings][0]
    return sizes


def block_sizes(found: dict) -> dict[str, int]:
    """Read the sizes of the gated blocks in the same way."""
    up = next((name for name in found if name.endswith("gated_cross_attn_layer.ff.1.weight")), None)
    if up is None:
        return {}
    inner, width = matrix_shape(found, up)
    return {"ff_mult": inner // width}


def matrix_shape(found: dict, name: str) -> torch.Size:
    """Shape of a weight that sizes are read off."""
    if name not in found:
        raise ValueError(f"The checkpoint holds no {old_name(name)!r}.")
    old, tensor = found[name]
    if tensor.dim() != 2 or 0 in tensor.shape:
        raise ValueError(f"{old!r} of the checkpoint is {tuple(tensor.shape)}; expected a matrix.")
    return tensor.shape


def _shapes(found: dict, prefix: str) -> dict[str, torch.Size]:
    return {name[len(prefix) :]: tensor.shape for name, (_, tensor) in found.items() if name.startswith(prefix)}


def fill(model: MMGPTForConditionalGeneration, found: dict, path: str | os.PathLike) -> None:
    """Copy the weights into the model, if every weight has its place and none is missing.

    Required are the resampler, the gated blocks and the input embedding; the LM's and the tower's own weights are laid
    over those of their files where the checkpoint has them.
    """
    expected = model.state_dict()
    layers = {name.partition(".decoder_layer.")[0] for name in expected}
    embedding = name_of(model, model.get_input_embeddings())
    used = {name: entry for name, entry in found.items() if name in expected}
    left = {name: entry for name, entry in found.items() if name not in expected and not is_redundant(name, layers)}
    required = [
        name
        for name in expected
        if name.startswith("model.resampler.") or ".gated_cross_attn_layer." in name or name == f"{embedding}.weight"
    ]
    _complain(
        path,
        _describe(model.config),
        missing=[old_name(name) for name in required if name not in found],
        unexpected=[old for old, _ in left.values()],
        shapes={old: (tensor.shape, expected[name].shape) for name, (old, tensor) in used.items()},
    )
    with torch.no_grad():
        for name, (_, tensor) in logging.tqdm(used.items(), desc="Converting", unit="tensor"):
            expected[name].copy_(tensor)


def check_lora(found: dict, model: MMGPTForConditionalGeneration, path: str | os.PathLike) -> tuple[str, int]:
    """Check that a LoRA fits the base.

    Returns:
        The pattern of `target_modules`, which matches exactly the adapted modules, and the rank.
    """
    weights = {name: module.weight for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    names = {name.rpartition(".lora_")[0] for name in found} & set(weights)
    pattern = _target_pattern(names)
    rank = min((tensor.shape[0] for name, (_, tensor) in found.items() if ".lora_A." in name), default=0)
    wanted = {}
    for name in (name for name in weights if re.fullmatch(pattern, name)):
        out_features, in_features = weights[name].shape
        wanted[f"{name}.lora_A.weight"] = torch.Size([rank, in_features])
        wanted[f"{name}.lora_B.weight"] = torch.Size([out_features, rank])
    _complain(
        path,
        f"lora_A and lora_B of one rank for {_describe(model.config)}",
        missing=[old_name(name).replace(".", ".base_model.model.", 1) for name in wanted if name not in found],
        unexpected=[old for name, (old, _) in found.items() if name not in wanted] + ([] if found else ["(no key)"]),
        shapes={old: (tensor.shape, wanted[name]) for name, (old, tensor) in found.items() if name in wanted},
    )
    return pattern, rank


def _target_pattern(names: set[str]) -> str:
    """Match modules by their names inside a layer, as [`~modeling_mmgpt.adapters_mmgpt.lora_config`]."""
    targets = {re.sub(r"^.*?\.\d+\.", "", name) for name in names}
    return rf"model\.text_model\..*\.({'|'.join(re.escape(target) for target in sorted(targets))})"


def _complain(
    path: str | os.PathLike,
    expected: str,
    missing: list[str],
    unexpected: list[str],
    shapes: dict[str, tuple[torch.Size, torch.Size]],
) -> None:
    """Raise if keys do not fit, naming the first five of each kind."""
    reshaped = [
        f"{key} is {tuple(found)}, expected {tuple(wanted)}"
        for key, (found, wanted) in shapes.items()
        if found != wanted
    ]
    kinds = {"missing": missing, "not expected": unexpected, "of another shape": reshaped}
    if any(kinds.values()):
        listed = "; ".join(f"{len(keys)} {kind}, first {keys[:5]}" for kind, keys in kinds.items() if keys)
        raise ValueError(f"{path} does not fit: {listed}. Expected: {expected}.")


def _describe(config: MMGPTConfig) -> str:
    text, every = config.text_config, config.cross_attn_every_n_layers
    blocks = list(range(every - 1, text.num_hidden_layers, every))
    resampler, cross_attention = config.resampler, config.cross_attention
    return (
        f"{text.model_type} with {text.num_hidden_layers} layers of width {text.hidden_size} and blocks before layers "
        f"{blocks} (cross_attn_every_n_layers={every}) of {cross_attention['num_heads']} heads x "
        f"{cross_attention['head_dim']}; tower of width {config.vision_config.hidden_size}; resampler of "
        f"{resampler['num_heads']} heads x {resampler['head_dim']}"
    )

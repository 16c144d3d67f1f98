"""Turn pictures into latents once, where tower and resampler are frozen."""

import hashlib
from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..base_model_mmgpt import MMGPTModel


# The way from pixels to latents, in whatever file it lies. Whoever changes what it computes counts up: latents that
# were kept before are then made anew. `tests/test_latents.py` holds the number beside the latents of a fixed model.
LATENTS_FORMAT = 1


def frozen_encoder(model: nn.Module, accelerator: Accelerator) -> tuple[Callable[..., torch.Tensor], str]:
    """Make the function that turns pictures into latents as a training step does, to store them.

    Args:
        model: The model that is trained, bare or with an adapter, before anything shards it.
        accelerator: The Trainer's.

    Returns:
        [`MMGPTModel.encode_images`] in the arithmetic of a step, and a hash of all that it depends on.

    Raises:
        ValueError: If latents change from step to step: tower or resampler are trained, have an adapter, or draw
            random numbers; if they depend on the place in the row; or if DeepSpeed ZeRO-3 shards the weights.
    """
    model = next(module for module in model.modules() if isinstance(module, MMGPTModel))
    parts = {"vision_tower": model.vision_tower, "resampler": model.resampler}
    for name, part in parts.items():
        if any(parameter.requires_grad for parameter in part.parameters()):
            raise ValueError(f"Latents cannot be kept: `{name}` is trained. Freeze it, or leave out `cache_pictures`.")
        if any(isinstance(module, BaseTunerLayer) for module in part.modules()):
            raise ValueError(f"Latents cannot be kept: there is an adapter on `{name}`. Merge it into the base.")
        if any(parameter.numel() == 0 for parameter in part.parameters()):
            raise ValueError(f"Latents cannot be kept: `{name}` is sharded already, as by ZeRO-3. Use DDP or FSDP2.")
        part.train()  # as in a step
        broadcast(list(part.to(accelerator.device).state_dict().values()))  # FSDP: only the first process has read it
    if model.config.resampler["max_num_images"] is not None:
        raise ValueError("Latents cannot be kept: `max_num_images` is set, and they depend on the place in the row.")

    device, size = accelerator.device, model.config.vision_config.image_size

    @torch.no_grad()
    def encode(pixel_values: torch.Tensor, num_frames: torch.Tensor | None = None) -> torch.Tensor:
        num_frames = None if num_frames is None else num_frames.to(device)
        with accelerator.autocast():
            latents = model.encode_images(pixel_values.to(device), num_frames)
            if torch.is_autocast_enabled(device.type):  # then the matrices that take them would round them so as well
                latents = latents.to(torch.get_autocast_dtype(device.type))
        return latents

    probe = encode(torch.zeros(1, 1, 3, size, size))
    if not torch.equal(probe, encode(torch.zeros(1, 1, 3, size, size))):
        raise ValueError("Latents cannot be kept: tower or resampler draw random numbers in training (dropout?).")
    return encode, _fingerprint(model, parts, probe.dtype)


def _fingerprint(model: MMGPTModel, parts: dict[str, nn.Module], dtype: torch.dtype) -> str:
    """Hash all that latents depend on: the version of their computation, sizes, weights and data type."""
    sizes = f"{LATENTS_FORMAT} {model.config.vision_config.to_json_string()} {model.config.resampler} {dtype}"
    digest = hashlib.sha256(sizes.encode())
    for part in parts.values():
        for name, weight in part.state_dict().items():
            digest.update(name.encode())
            digest.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()

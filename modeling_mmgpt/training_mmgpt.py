"""What a Trainer of transformers or TRL lacks: whole checkpoints, the reference's decay, speed, kept pictures.

Not part of the remote code.
"""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, rotate_checkpoints

from .conditioning_mmgpt import decoder_layers
from .cross_attention_mmgpt import MMGPTGatedCrossAttentionBlock
from .modeling_mmgpt import MMGPTForConditionalGeneration, MMGPTModel


UNFINISHED = "unfinished"  # the folder, in the output folder, of the checkpoint that is being written


class TrainerMixin:
    """Put before a Trainer: `class MyTrainer(TrainerMixin, SFTTrainer)`."""

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Name the weights that decay, see [`decayed_weights`]."""
        return decayed_weights(model)

    def _get_output_dir(self, trial: Any) -> str:
        return os.path.join(super()._get_output_dir(trial), UNFINISHED)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint beside its place and rename it there, so that a killed run leaves whole ones only.

        The Trainer of transformers (5.23) writes into `checkpoint-N` file by file, and deletes old ones before that
        is whole everywhere.
        """
        folder, name = Path(super()._get_output_dir(trial)), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        written, final = folder / UNFINISHED / name, folder / name
        if self.args.should_save:
            shutil.rmtree(folder / UNFINISHED, ignore_errors=True)  # of a run that was killed
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(final)
        if self.args.should_save:
            self.state.save_to_json(str(written / TRAINER_STATE_NAME))
            _flush(written)
            shutil.rmtree(final, ignore_errors=True)  # of a run that had gone on from an earlier one
            written.rename(final)
            shutil.rmtree(written.parent)
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(folder), self.args.save_total_limit, best, use_mtime=True)
        self.accelerator.wait_for_everyone()


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """Find the last whole checkpoint of a run that wrote by [`TrainerMixin`]; `None` if there is none yet."""
    return get_last_checkpoint(output_dir) if os.path.isdir(output_dir) else None


def _flush(folder: Path) -> None:
    """Bring the files to the disk before they get their name, for a machine that dies with the process."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def decayed_weights(model: nn.Module) -> list[str]:
    """Name the parameters that weight decay is for: the matrices of the gated blocks, and LoRA on them.

    So OpenFlamingo and Multimodal-GPT mean it (`--weight_decay 0.1`): a gate, a norm or a bias has no business near
    zero, and the resampler, embedding rows and LoRA on the LM's own layers get none either.
    https://github.com/mlfoundations/open_flamingo/blob/v2.0.1/open_flamingo/train/train.py, `get_grouped_params`

    Args:
        model: The model, bare or with an adapter.
    """
    names = []
    for path, block in model.named_modules():
        if isinstance(block, MMGPTGatedCrossAttentionBlock):
            # By module: the reference goes by names that hold "norm", and so decays the norm called `ff.0`.
            names += [f"{path}.{name}.weight" for name, part in block.named_modules() if isinstance(part, nn.Linear)]
    return names


def keep_rows(parameter: nn.Parameter, rows: list[int]) -> None:
    """Zero the gradient of an embedding, or a head, outside some rows; sharded or not, in place."""
    if parameter.grad is None:
        return
    mask = torch.zeros(parameter.shape[0], 1, dtype=parameter.dtype, device=parameter.grad.device)
    mask[rows] = 1
    if isinstance(parameter.grad, DTensor):
        mask = distribute_tensor(mask, parameter.grad.device_mesh, parameter.grad.placements)
    parameter.grad.mul_(mask)


def fill_vocabulary(model: MMGPTForConditionalGeneration) -> None:
    """Fill the vocabulary up to a multiple of 64, in place: an odd number of rows makes the head's products slow."""
    model.resize_token_embeddings(pad_to_multiple_of=64, mean_resizing=False)


def compile_parts(model: nn.Module, **options) -> None:
    """Compile tower, resampler, every decoder layer of the LM and every gated block, each by itself, for training.

    Block and layer apart, since only the block sees how many pictures a row has, and is compiled for one, for another,
    and then for any. Both run through one function of transformers, `forward_with_checkpointing`, of which torch keeps
    eight versions and then runs it uncompiled, with no more than a warning: so the limit is raised, process-wide.

    With a cache every layer is one more version: generate under `torch.compiler.set_stance("force_eager")`.

    Args:
        model: The model, bare or with an adapter; its parts are compiled in place.
        **options: Those of `torch.compile`.
    """
    torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)
    model = _without_wrappers(model)
    model.vision_tower.compile(**options)
    model.resampler.compile(**options)
    decoder, name = decoder_layers(model.text_model)
    for layer in getattr(decoder, name):
        layer.decoder_layer.compile(**options)
        if layer.gated_cross_attn_layer is not None:
            layer.gated_cross_attn_layer.compile(**options)


def frozen_encoder(model: nn.Module, accelerator: Accelerator) -> tuple[Callable[..., torch.Tensor], str]:
    """Make the function that turns pictures into latents in a training step, for latents that are kept.

    Args:
        model: The model that is trained, bare or with an adapter, before anything shards it.
        accelerator: The Trainer's.

    Returns:
        [`MMGPTModel.encode_images`] in the arithmetic of a step, and a hash of all it depends on.

    Raises:
        ValueError: If latents change from step to step: tower or resampler are trained, have an adapter, or draw
            random numbers; if they depend on the place in the row; or if DeepSpeed ZeRO-3 has taken the weights apart.
    """
    model = _without_wrappers(model)
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


def _without_wrappers(model: nn.Module) -> MMGPTModel:
    """Find our model in one that is bare, or has an adapter around it."""
    return next(module for module in model.modules() if isinstance(module, MMGPTModel))


def _fingerprint(model: MMGPTModel, parts: dict[str, nn.Module], dtype: torch.dtype) -> str:
    """Hash all that latents depend on: sizes, weights, code, and the data type that they have."""
    sizes = f"{model.config.vision_config.to_json_string()} {model.config.resampler} {dtype}"
    digest = hashlib.sha256(sizes.encode())
    for module in ("vision", "perceiver", "attention"):
        digest.update(Path(__file__).with_name(f"{module}_mmgpt.py").read_bytes())
    for part in parts.values():
        for name, weight in part.state_dict().items():
            digest.update(name.encode())
            digest.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()

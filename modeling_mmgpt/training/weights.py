"""Which weights decay, and which rows are trained."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..cross_attention_mmgpt import MMGPTGatedCrossAttentionBlock


def decayed_weights(model: nn.Module) -> list[str]:
    """Name the parameters that weight decay is for: the matrices of the gated blocks, and LoRA on them.

    This is what OpenFlamingo and Multimodal-GPT intend (`--weight_decay 0.1`): gates, norms and biases do not decay,
    and neither do the resampler, embedding rows and LoRA on the LM's own layers.
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


def gates(model: nn.Module) -> list[nn.Parameter]:
    """The gates of the blocks, two each.

    Args:
        model: The model, bare or with an adapter.
    """
    blocks = [block for block in model.modules() if isinstance(block, MMGPTGatedCrossAttentionBlock)]
    return [gate for block in blocks for gate in (block.attn_gate, block.ff_gate)]


def keep_rows(parameter: nn.Parameter, rows: list[int]) -> None:
    """Zero the gradient of an embedding, or a head, outside some rows; sharded or not, in place."""
    if parameter.grad is None:
        return
    mask = torch.zeros(parameter.shape[0], 1, dtype=parameter.dtype, device=parameter.grad.device)
    mask[rows] = 1
    if isinstance(parameter.grad, DTensor):
        mask = distribute_tensor(mask, parameter.grad.device_mesh, parameter.grad.placements)
    parameter.grad.mul_(mask)

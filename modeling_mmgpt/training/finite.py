"""Training that does not fail silently: a step whose gradients are not finite changes nothing and is logged."""

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.utils import logging


logger = logging.get_logger(__name__)


class FiniteSteps:
    """Skip a step whose gradients are not finite, log which they are, and end the run after a few in a row.

    Mix it into a Trainer of transformers or TRL: `class MyTrainer(FiniteSteps, Trainer): ...`.

    It checks once a step, before gradients are clipped, because clipping would spread one NaN over all of them. A
    skipped step leaves weights and optimizer unchanged, on all processes, since they hold the same sums of gradients.
    Its loss is logged as it is, and counts as 0 in the average that the Trainer logs. In float16 the gradient scaler
    skips steps by itself, and under DeepSpeed there are no gradients to check: both are left alone.

    Attributes:
        patience: Number of steps in a row that end the run.
        skipped: Number of skipped steps.
        skipped_in_a_row: Number of skipped steps right before this one.
        loss_of_step: The loss of the step up to here; its gradients may be accumulated over several batches.
    """

    patience = 5
    skipped = 0
    skipped_in_a_row = 0
    loss_of_step: torch.Tensor | float = 0.0

    def training_step(self, model: nn.Module, inputs: dict[str, Any] | list, *args, **kwargs) -> torch.Tensor:
        """Compute gradients, and remove them if they are not finite.

        Raises:
            FloatingPointError: If a weight is not finite, or `patience` steps in a row are skipped.
        """
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.loss_of_step = self.loss_of_step + loss
        if self.accelerator.sync_gradients:
            loss_of_step, self.loss_of_step = self.loss_of_step, 0.0
            if self.accelerator.scaler is None:
                self._look(inputs, loss_of_step)
        return loss.nan_to_num(0, 0, 0)  # one NaN would stay in the Trainer's sum to the end

    def _look(self, inputs: dict[str, Any] | list, loss: torch.Tensor) -> None:
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        if is_finite(*gradients.values()):
            self.skipped_in_a_row = 0
            return
        self.skipped += 1
        self.skipped_in_a_row += 1
        spoiled = [name for name, weight in self.model.named_parameters() if not is_finite(weight)]
        wrong = [name for name, gradient in gradients.items() if not is_finite(gradient)]
        batch = inputs if isinstance(inputs, dict) else {}  # GRPO brings prompts, and makes its batch later
        rows = {
            key: (~value.flatten(1).isfinite().all(dim=1)).nonzero().flatten().tolist()
            for key, value in batch.items()
            if isinstance(value, torch.Tensor) and value.is_floating_point() and not is_finite(value)
        }
        found = (
            f"step {self.state.global_step + 1}: gradients are not finite in {len(wrong)} of {len(gradients)} "
            f"tensors, first {wrong[:3]}, last {wrong[-1]}; the loss is {loss.item():.4g}"
        )
        for key, numbers in rows.items():
            found += f"; {key} of the last batch is not finite in the rows {numbers}"
        if spoiled:
            raise FloatingPointError(
                f"At {found}; and {len(spoiled)} weights are not finite, first {spoiled[:5]}. No step can mend that: "
                "begin from other weights, or with --resume from the last whole checkpoint."
            )
        self.model.zero_grad(set_to_none=True)  # without a gradient, an optimizer neither moves nor decays a weight
        logger.warning(f"Skipped {found}. Skipped: {self.skipped_in_a_row} in a row, {self.skipped} in all.")
        self.log({"skipped_loss": loss.item(), "skipped_steps": self.skipped})
        if self.skipped_in_a_row >= self.patience:
            raise FloatingPointError(
                f"{self.skipped_in_a_row} steps in a row were skipped, the last of them {found}. The weights are "
                "those before them. If the loss is finite, it is the way back that fails: lower the learning rates, "
                "or train without --bf16. If it is not, look at the rows of these steps and at the weights that the "
                "run began with."
            )


def is_finite(*tensors: torch.Tensor) -> bool:
    """Whether all numbers of tensors are finite; of sharded ones, on all processes. Integers are finite."""
    norm = nn.utils.get_total_norm([tensor for tensor in tensors if tensor.is_floating_point()])
    return bool((norm.full_tensor() if isinstance(norm, DTensor) else norm).isfinite())


def avoid_cudnn_attention() -> None:
    """Make torch's attention run without cuDNN, process-wide, because its backward pass can give NaN.

    It does on Hopper GPUs since torch 2.11, in half precision, under a mask, with 64, 192, 320... keys: a row of 64
    tokens, or three pictures of 64 latents. https://github.com/pytorch/pytorch/issues/196678
    """
    torch.backends.cuda.enable_cudnn_sdp(False)

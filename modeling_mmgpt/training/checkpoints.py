"""Checkpoints that are whole or not there."""

import os
import shutil
from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, rotate_checkpoints

from .weights import decayed_weights


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

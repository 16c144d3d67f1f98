"""Reading the files of old checkpoints: tensors, and nothing that could run. Not part of the remote code."""

import os
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import load_file


# What a training file holds beside its weights.
BESIDE_WEIGHTS = {"epoch", "optimizer_state_dict", "lr_scheduler_state_dict", "tuning_config"}


class _ConfigDict:
    """Stands for `mmengine.config.config.ConfigDict` in a pickle: an ordered dict, whatever it is made from."""

    def __new__(cls, *items):
        return OrderedDict(items)


class _Config:
    """Stands for `mmengine.config.config.Config` in a pickle: keeps its first piece of state, does nothing."""

    def __setstate__(self, state: tuple):
        self.fields = state[0]


INERT = [(_ConfigDict, "mmengine.config.config.ConfigDict"), (_Config, "mmengine.config.config.Config")]


def read_weights(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict]:
    """Read a file of weights without running anything in it; a zip is mapped, not loaded.

    Returns:
        The weights by their old names, and the settings of the LoRA, empty where the file is silent.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or holds more than tensors in one of the known forms.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        if str(path).endswith(".safetensors"):
            contents = load_file(path)
        else:
            with torch.serialization.safe_globals(INERT):
                contents = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # damaged bytes raise whatever the byte that is wrong leads to
        # torch hides the reason behind its advice to read the file without `weights_only`.
        reason = str(error.__context__ or error).strip().split("\n")[0].split(" Please use")[0]
        raise ValueError(
            f"{path} ({os.path.getsize(path):,} bytes) cannot be read: {reason} It may be half a download, or hold "
            "more than tensors; nothing in it was run."
        ) from error
    return _unwrap(contents, path)


def _unwrap(contents: object, path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict]:
    """Take the weights and the LoRA's settings out of a training dictionary; a flat file is its weights."""
    if not isinstance(contents, dict):
        raise ValueError(f"{path} holds a {type(contents).__name__}; expected a dictionary of tensors.")
    beside = {}
    if "model_state_dict" in contents:
        beside = {key: value for key, value in contents.items() if key != "model_state_dict"}
        contents = contents["model_state_dict"]
    wrong = [key for key in beside if key not in BESIDE_WEIGHTS]
    wrong += [key for key, value in contents.items() if not isinstance(value, torch.Tensor)]
    if wrong:
        raise ValueError(
            f"{path} holds {wrong[:5]} beside its weights; expected tensors, alone or as `model_state_dict` beside "
            f"{sorted(BESIDE_WEIGHTS)}."
        )
    settings = beside.get("tuning_config") or {}
    settings = getattr(settings, "fields", settings)
    return contents, settings.get("tuning_config", settings)  # the outer config, or the inner one

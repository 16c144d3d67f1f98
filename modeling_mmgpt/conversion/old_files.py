"""Read the files of old checkpoints: tensors, and nothing that could run. Not part of the remote code."""

import os
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import load_file


# What a training file holds beside its weights.
BESIDE_WEIGHTS = {"epoch", "optimizer_state_dict", "lr_scheduler_state_dict", "tuning_config"}


class _ConfigDict:
    """Replaces `mmengine.config.config.ConfigDict` in a pickle: an ordered dict, whatever it is made from."""

    def __new__(cls, *items):
        return OrderedDict(items)


class _Config:
    """Replaces `mmengine.config.config.Config` in a pickle: keeps its first piece of state, does nothing."""

    def __setstate__(self, state: tuple):
        self.fields = state[0]


INERT = [(_ConfigDict, "mmengine.config.config.ConfigDict"), (_Config, "mmengine.config.config.Config")]


def read_weights(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict]:
    """Read a file of weights without running anything in it; a zip is mapped, not loaded.

    Returns:
        The weights by their old names, and the settings of the LoRA, empty where the file is silent.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged (a zip is checked by its own sizes and checksums), holds more than tensors in one
            of the known forms, or tensors that are not finite or larger than what the file holds of them.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        if str(path).endswith(".safetensors"):
            contents = load_file(path)
        else:
            _check_zip(path)
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


def _check_zip(path: str | os.PathLike) -> None:
    """Raise on a zip with compressed records: torch writes none, maps the bytes, and would read them as numbers.

    Records that hold no numbers are read, which checks their checksums.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            packed = [record.filename for record in file.infolist() if record.compress_type != zipfile.ZIP_STORED]
            if packed:
                raise ValueError(f"it is a zip with packed records, first {packed[:5]}.")
            for record in file.infolist():
                if "/data/" not in record.filename:
                    file.read(record)


def _unwrap(contents: object, path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict]:
    """Take the weights and the LoRA's settings out of a training dictionary; a flat file is its weights."""
    if not isinstance(contents, dict):
        raise ValueError(f"{path} holds a {type(contents).__name__}; expected a dictionary of tensors.")
    beside = {}
    if "model_state_dict" in contents:
        beside = {key: value for key, value in contents.items() if key != "model_state_dict"}
        contents = contents["model_state_dict"]
    if not isinstance(contents, dict):
        raise ValueError(f"{path} holds a {type(contents).__name__} as `model_state_dict`; expected a dictionary.")
    wrong = [key for key in beside if key not in BESIDE_WEIGHTS]
    wrong += [
        key for key, value in contents.items() if not isinstance(key, str) or not isinstance(value, torch.Tensor)
    ]
    if wrong:
        raise ValueError(
            f"{path} holds {wrong[:5]} beside its weights; expected tensors, alone or as `model_state_dict` beside "
            f"{sorted(BESIDE_WEIGHTS)}."
        )
    _check_tensors(contents, path)
    return contents, _settings(beside.get("tuning_config"), path)


def _settings(found: object, path: str | os.PathLike) -> dict:
    """Take the LoRA's settings out of the config of a training, the outer one or the inner one."""
    settings = getattr(found, "fields", found) or {}
    settings = settings.get("tuning_config", settings) if isinstance(settings, dict) else settings
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds a {type(settings).__name__} as `tuning_config`; expected a dictionary.")
    return settings


def _check_tensors(weights: dict[str, torch.Tensor], path: str | os.PathLike) -> None:
    """Raise on tensors that do not match the bytes of the file, and on numbers that are not finite."""
    odd = [key for key, value in weights.items() if not _is_plain(value)]
    if odd:
        raise ValueError(
            f"{path} holds {odd[:5]} in a sparse, nested, quantised, 8-bit or empty form; expected plain tensors."
        )
    stretched = [
        key for key, value in weights.items() if value.numel() * value.itemsize > value.untyped_storage().nbytes()
    ]
    if stretched:  # one number repeated by a stride of 0 can claim to be a matrix of terabytes
        raise ValueError(f"{path} claims more numbers than it holds for {stretched[:5]}.")
    if zipfile.is_zipfile(path):
        _check_records(weights, path)
    broken = [key for key, value in weights.items() if not torch.isfinite(value).all()]
    if broken:
        raise ValueError(f"{path} holds numbers that are not finite in {broken[:5]}: its training has failed.")


def _is_plain(value: torch.Tensor) -> bool:
    if value.is_nested or value.layout != torch.strided or value.is_meta or value.is_quantized:
        return False
    return value.itemsize > 1 or not value.is_floating_point()


def _check_records(weights: dict[str, torch.Tensor], path: str | os.PathLike) -> None:
    """Raise on numbers whose record in the zip has a wrong size or checksum.

    torch checks neither: a map would read past the end of a record that is shorter than its tensor.
    """
    with zipfile.ZipFile(path) as file:
        records = {(record.file_size, record.CRC) for record in file.infolist()}
    is_whole = {}
    for value in weights.values():
        storage = value.untyped_storage()
        if storage.data_ptr() not in is_whole:
            content = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            is_whole[storage.data_ptr()] = (storage.nbytes(), zlib.crc32(content)) in records
    damaged = [key for key, value in weights.items() if not is_whole[value.untyped_storage().data_ptr()]]
    if damaged:
        raise ValueError(
            f"{path} is damaged: the records of {damaged[:5]} are shorter than what they are said to hold, or have "
            "changed since they were written. Download it again."
        )

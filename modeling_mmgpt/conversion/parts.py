"""The language model and the vision tower of an old checkpoint."""

import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..configuration_mmgpt import MMGPTVisionConfig
from ..vision_mmgpt import load_vision_tower
from .fitting import matrix_shape
from .names import name_of, old_name
from .old_files import read_weights


logger = logging.get_logger(__name__)


# Fields of an MPT config that transformers' MPT does not read, and the one value each has there.
# https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/mpt/modeling_mpt.py
MPT_FIXED = {
    "qk_ln": False,
    "attn_qk_ln": False,  # its name in the 1B models
    "alibi": True,
    "alibi_bias_max": 8,
    "attn_type": "multihead_attention",
    "prefix_lm": False,
    "no_bias": True,
    "expansion_ratio": 4,
    "logit_scale": None,
}


def load_language_model(language_model: str | os.PathLike, dtype: torch.dtype | None) -> PreTrainedModel:
    """Load the LM with all its weights; transformers alone would draw missing ones at random, and warn.

    Raises:
        ValueError: If files and config do not fit, or if it is an MPT that transformers cannot express.
    """
    _reject_mpt(language_model)
    try:
        text_model, report = AutoModelForCausalLM.from_pretrained(
            language_model, dtype=dtype or "auto", output_loading_info=True
        )
    except (OSError, ValueError):  # transformers' own sentences
        raise
    except Exception as error:  # a config that lies leads anywhere
        raise ValueError(f"{language_model} cannot be loaded: its config and its weights do not fit.") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(
            f"{language_model} lacks {len(missing)} weights that its config speaks of, first {missing[:5]}."
        )
    return text_model


def _reject_mpt(language_model: str | os.PathLike) -> None:
    """Raise on the fields of an MPT that transformers would silently compute in another way."""
    config, _ = PreTrainedConfig.get_config_dict(language_model)
    if config.get("model_type") not in ("mpt", "mosaic_gpt"):
        return
    fields = {**config, **(config.get("attn_config") or {})}
    wrong = {key: fields[key] for key, value in MPT_FIXED.items() if fields.get(key, value) != value}
    if wrong:
        expected = {key: MPT_FIXED[key] for key in wrong}
        raise ValueError(f"{language_model} is an MPT with {wrong}; transformers' MPT is built with {expected} only.")


def resize_vocabulary(text_model: PreTrainedModel, found: dict, ids: dict[str, int | None]) -> None:
    """Resize the LM to the checkpoint's vocabulary; new rows of a head that it does not hold become the mean."""
    name = f"model.text_model.{name_of(text_model, text_model.get_input_embeddings())}.weight"
    if name not in found:
        given = [old for old, _ in found.values() if "lang_encoder" in old]
        raise ValueError(
            f"The checkpoint holds no {old_name(name)!r}, the embedding of {type(text_model).__name__}: it is of "
            f"another LM. Its keys begin with {given[:5]}."
        )
    rows, before = matrix_shape(found, name)[0], text_model.get_input_embeddings().num_embeddings
    outside = {f"{key}_token_id": value for key, value in ids.items() if value is not None and not 0 <= value < rows}
    if outside:
        raise ValueError(f"{outside} lie outside the vocabulary of the checkpoint, which has {rows} rows.")
    text_model.resize_token_embeddings(rows, mean_resizing=False)
    head = text_model.get_output_embeddings()
    head_name = f"model.text_model.{name_of(text_model, head)}.weight"
    if rows > before and head_name not in found and not text_model.config.tie_word_embeddings:
        with torch.no_grad():
            head.weight[before:] = head.weight[:before].mean(dim=0, dtype=torch.float32)
        logger.warning(
            f"The checkpoint does not hold the LM head's rows {before} to {rows - 1}, of the added tokens: they are "
            "set to the mean of the others. Give `lm_head` if you have them."
        )


def load_tower(
    vision_tower: str | os.PathLike, vision_config: str | dict, post_norm: bool, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], MMGPTVisionConfig]:
    """Read the tower's weights, as `dtype`, and its config with `post_norm`."""
    vision = str(vision_tower)
    if Path(vision).is_file() or vision.endswith((".safetensors", ".pt", ".bin")):
        vision, _ = read_weights(vision)
    elif not isinstance(vision_config, str):
        raise ValueError(f"{vision!r} is no file, and as a pretrained tag it needs the open_clip name of its model.")
    tower, config = load_vision_tower(vision, vision_config)
    config.post_norm = post_norm
    return tower.to(dtype).state_dict(), config

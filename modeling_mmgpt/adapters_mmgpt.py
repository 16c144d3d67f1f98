"""LoRA and quantisation for MMGPT: the one place that names their modules. Not part of the remote code."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import peft
import torch
from huggingface_hub import try_to_load_from_cache
from peft.utils import TrainableTokensWrapper, load_peft_weights
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig
from transformers.pytorch_utils import Conv1D

from .conditioning_mmgpt import decoder_layers
from .configuration_mmgpt import MMGPTConfig
from .modeling_mmgpt import MMGPTForConditionalGeneration


if TYPE_CHECKING:
    from torchao.core.config import AOBaseConfig

HEADS = ("lm_head", "embed_out")  # what the LMs of transformers call their head
GATED_BLOCK_TARGETS = ("attn.to_q", "attn.to_kv", "attn.to_out", "ff.1", "ff.3")


def lora_config(
    model: MMGPTForConditionalGeneration,
    r: int = 16,
    lora_alpha: int = 16,
    language_mlp: bool = False,
    new_tokens: bool = False,
    **kwargs,
) -> peft.LoraConfig:
    """Make the LoRA config of Multimodal-GPT for a model.

    It adapts the LM's self-attention and the gated blocks (query, fused key and value, output, both feed-forward
    matrices), never the vision tower or the resampler. With LLaMA-7B, ViT-L/14 and a block every 4 layers that
    is 23,461,888 parameters, the number Multimodal-GPT's own log prints:
    https://github.com/open-mmlab/Multimodal-GPT/issues/26.

    The adapter names its base: from the Hub by its id and commit, in a local folder by its absolute path, which is
    written into `model.name_or_path`.

    Args:
        model: The model to adapt, for the names of its LM's matrices.
        r: Rank.
        lora_alpha: Scale; the update is `lora_alpha / r * B @ A`.
        language_mlp: Adapt the LM's feed-forward as well.
        new_tokens: Train the rows of `<image>` and `<|endofchunk|>` in embedding and head, see [`new_token_rows`].
        **kwargs: Other fields of `peft.LoraConfig`; `revision` for a base that was not loaded from `main`.

    Raises:
        ValueError: If `language_mlp` is asked for and the LM's feed-forward has no linear layer, as where a mixture of
            experts keeps all of them in one weight.
    """
    if Path(model.name_or_path).is_dir():
        # PEFT writes this into the adapter, which has to find its base from any working directory.
        model.name_or_path = str(Path(model.name_or_path).resolve())
    elif model.name_or_path:
        # The model does not know its commit; the cache knows which one `main` was when it was loaded.
        cached = try_to_load_from_cache(model.name_or_path, "config.json")
        kwargs.setdefault("revision", Path(cached).parent.name if isinstance(cached, str) else None)
    attention, feed_forward = set(), set()
    for layer in decoder_layers(model.model.text_model):
        for path, module in layer.decoder_layer.named_modules():
            if isinstance(module, (nn.Linear, Conv1D)):
                (attention if "att" in path.split(".")[0] else feed_forward).add(f"decoder_layer.{path}")
    if language_mlp and not feed_forward:
        raise ValueError(
            f"language_mlp=True, but the feed-forward of {type(model.model.text_model).__name__} has no linear layer. "
            "Leave it out, or name its weights in `target_parameters`."
        )
    targets = {*attention, *(feed_forward if language_mlp else ())}
    targets.update(f"gated_cross_attn_layer.{path}" for path in GATED_BLOCK_TARGETS)
    pattern = "|".join(re.escape(target) for target in sorted(targets))
    if new_tokens:
        kwargs["trainable_token_indices"] = new_token_rows(model)
    return peft.LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=rf"model\.text_model\..*\.({pattern})", **kwargs)


def new_token_rows(model: MMGPTForConditionalGeneration) -> dict[str, list[int]]:
    """Name the rows of `<image>` and `<|endofchunk|>`, by the module whose weight they are in.

    Where embedding and head share one weight only the embedding is named: PEFT follows the tie by itself, and an
    adapter that names both is merged wrongly.

    Args:
        model: The model.
    """
    rows = [model.config.image_token_id, model.config.end_of_chunk_token_id]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    modules = [embedding] if head.weight is embedding.weight else [embedding, head]
    return {name: rows for name, module in model.named_modules() if module in modules}


def load_for_tuning(
    path: str | os.PathLike, prepare: Callable[[PreTrainedModel], None] | None = None, **kwargs
) -> PreTrainedModel | peft.PeftModel:
    """Load a whole model, or an adapter over its base, to be trained further.

    Args:
        path: Folder or Hub id.
        prepare: What is done to the base before the adapter is put over it.
        **kwargs: Arguments of `from_pretrained` for the base.

    Raises:
        ValueError: If the adapter does not fit its base, see [`check_adapter`].
    """
    try:
        base = peft.PeftConfig.from_pretrained(path).base_model_name_or_path
    except ValueError:  # PEFT's word for no adapter; what is wrong with a whole model, its loading says
        base = None
    if base is not None:
        check_adapter(path, AutoConfig.from_pretrained(base))
    model = MMGPTForConditionalGeneration.from_pretrained(base or path, **kwargs)
    if prepare is not None:
        prepare(model)
    return model if base is None else peft.PeftModel.from_pretrained(model, path, is_trainable=True)


def check_adapter(adapter: str | os.PathLike, config: MMGPTConfig) -> None:
    """Check that an adapter fits a base, before either is loaded. PEFT alone warns of missing weights only.

    `from_pretrained` and `load_adapter` call this by themselves.

    Args:
        adapter: Folder or Hub id of the adapter.
        config: The config of the base.

    Raises:
        ValueError: If weights are missing, left over, of another shape or not finite; the first are named.
    """
    with torch.device("meta"):
        model = peft.PeftModel(MMGPTForConditionalGeneration(config), peft.PeftConfig.from_pretrained(adapter))
    expected = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    found = load_peft_weights(str(adapter), device="cpu")
    shapes = {name: (tuple(found[name].shape), tuple(expected[name].shape)) for name in found.keys() & expected}
    wrong = {
        "missing": expected.keys() - found,
        "left over": found.keys() - expected - model.state_dict().keys(),
        "of another shape": {f"{name} {is_}, {be} here" for name, (is_, be) in shapes.items() if is_ != be},
        "not finite": {name for name, weight in found.items() if not weight.isfinite().all()},
    }
    wrong = [f"{len(names)} {what}, first {sorted(names)[:5]}" for what, names in wrong.items() if names]
    if wrong:
        raise ValueError(f"The adapter {adapter} does not fit its base: weights are {'; '.join(wrong)}.")


def show_head_bias(model: nn.Module) -> None:
    """Let TRL read `bias` off a head whose new rows are trained: PEFT (0.21) wraps it and shows `weight` only.

    Args:
        model: The model with its adapter, changed in place; a head without new rows is left alone.
    """
    head = model.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper):
        head.bias = head.token_adapter.get_base_layer().bias


def quantization_config(
    quant_type: "str | AOBaseConfig" = "nf4", compute_dtype: torch.dtype = torch.bfloat16
) -> BitsAndBytesConfig | TorchAoConfig:
    """Make the config that loads a base in 4 or 8 bits, for `from_pretrained(..., quantization_config=...)`.

    The matrices of the LM's layers and of the gated blocks are quantised. The tower, the resampler, the gates, norms,
    embeddings and the head keep their precision. A backend silently leaves what it cannot quantise: torchao GPT-2's
    matrices (`Conv1D`), and in 4 bits rows that `group_size` does not divide.

    Args:
        quant_type: `"nf4"` (QLoRA, https://arxiv.org/abs/2305.14314) or `"int8"` (LLM.int8(),
            https://arxiv.org/abs/2208.07339), both by bitsandbytes; or a config of torchao, such as
            `Int8WeightOnlyConfig()`, which `generate()` can compile.
        compute_dtype: The data type that matrices in NF4 are multiplied in.

    Raises:
        ValueError: If `quant_type` is another name.
    """
    kept = ["model.vision_tower", "model.resampler", *(rf".*\.{head}" for head in HEADS)]  # patterns from the start
    if not isinstance(quant_type, str):
        return TorchAoConfig(quant_type, modules_to_not_convert=kept)
    if quant_type == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    if quant_type == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
            llm_int8_skip_modules=kept,
        )
    raise ValueError(f"quant_type is {quant_type!r}; it can be 'nf4', 'int8' or a config of torchao.")

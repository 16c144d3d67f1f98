"""A LLaMA with fewer and larger products."""

import copy

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import Phi3Config

from ..modeling_mmgpt import MMGPTForConditionalGeneration


# Matrices of a decoder layer of Phi-3, and those of LLaMA's that stand in them one below the other.
FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
SAME_IN_BOTH = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "attention_dropout",
    "rope_parameters",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def fuse_projections(model: MMGPTForConditionalGeneration) -> MMGPTForConditionalGeneration:
    """Give the same model with query, key and value in one matrix, and gate and up in another.

    Reading one large matrix is faster than reading three. Phi-3 is built of LLaMA's blocks
    (https://arxiv.org/abs/2404.14219, section 2), and in transformers its matrices lie so. The result is a model like
    any other, with an LM of the family `phi3`: it is saved, published, quantised and tuned by the same code. Adapters
    of the one do not fit the other.

    Args:
        model: A model with a LLaMA; it is left as it is.

    Returns:
        A new model on the same device, whose logits differ by rounding. It shares the weights that are not joined with
        `model`, and is in evaluation mode.

    Raises:
        ValueError: If the LM is no LLaMA, has biases or scaled positions (as LLaMA 3.1 has), is quantised, or carries
            an adapter.
    """
    text_config = model.config.text_config
    if text_config.model_type != "llama":
        raise ValueError(
            f"Only a LLaMA can be fused, and the LM is a {type(model.model.text_model).__name__}. Some come fused, as "
            "those of MPT and Phi-3."
        )
    rope_type = text_config.rope_parameters["rope_type"]
    if text_config.attention_bias or text_config.mlp_bias or rope_type != "default":
        raise ValueError(
            "Phi-3 knows neither biases nor scaled positions, and this LLaMA has "
            f"attention_bias={text_config.attention_bias}, mlp_bias={text_config.mlp_bias}, rope_type={rope_type!r}."
        )
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("There is an adapter on the model, which would not fit: merge it first.")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("The weights are quantised: fuse the model, save it, and load that quantised.")

    config = copy.deepcopy(model.config)
    sizes = {name: copy.deepcopy(getattr(text_config, name)) for name in SAME_IN_BOTH}
    config.text_config = Phi3Config(**sizes, original_max_position_embeddings=text_config.max_position_embeddings)
    weights = model.state_dict()
    for number in range(text_config.num_hidden_layers):
        layer = f"model.text_model.model.layers.{number}.decoder_layer"
        for fused, parts in FUSED.items():
            rows = [weights.pop(f"{layer}.{part}.weight") for part in parts]
            weights[f"{layer}.{fused}.weight"] = torch.cat(rows)  # (sum of the rows, columns)
    fused_model = MMGPTForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=weights, dtype=model.dtype, device_map=model.device
    )
    fused_model.generation_config = copy.deepcopy(model.generation_config)
    return fused_model

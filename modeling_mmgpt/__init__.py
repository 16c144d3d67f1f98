"""Ids and pixels to logits: the MMGPT model. Importing it registers the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from .base_model_mmgpt import MMGPTModel
from .cache_mmgpt import MMGPTCache
from .configuration_mmgpt import MMGPTConfig, MMGPTVisionConfig
from .images_mmgpt import compute_image_index
from .modeling_mmgpt import MMGPTForConditionalGeneration


__all__ = [
    "MMGPTCache",
    "MMGPTConfig",
    "MMGPTForConditionalGeneration",
    "MMGPTModel",
    "MMGPTVisionConfig",
    "compute_image_index",
]

AutoConfig.register("mmgpt", MMGPTConfig, exist_ok=True)
AutoConfig.register("mmgpt_vision", MMGPTVisionConfig, exist_ok=True)
# All give the class that generates, so that an adapter's names fit whichever class loads it; TRL loads a folder by the
# class of causal LMs.
AutoModel.register(MMGPTConfig, MMGPTForConditionalGeneration, exist_ok=True)
AutoModelForCausalLM.register(MMGPTConfig, MMGPTForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(MMGPTConfig, MMGPTForConditionalGeneration, exist_ok=True)

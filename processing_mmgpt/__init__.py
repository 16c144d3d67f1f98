"""Text, pictures and annotations to batches: the MMGPT processor. Importing it registers the Auto classes."""

from transformers import AutoImageProcessor, AutoProcessor

from .collator_mmgpt import MMGPTCollator
from .image_processing_mmgpt import MMGPTImageProcessor
from .processing_mmgpt import MMGPTProcessor


__all__ = ["MMGPTCollator", "MMGPTImageProcessor", "MMGPTProcessor"]

# This file alone may know of the model: it is never copied to the Hub.
from modeling_mmgpt import MMGPTConfig  # noqa: E402


AutoProcessor.register(MMGPTConfig, MMGPTProcessor, exist_ok=True)
AutoImageProcessor.register(
    MMGPTConfig,
    image_processor_classes={"pil": MMGPTImageProcessor, "torchvision": MMGPTImageProcessor},
    exist_ok=True,
)

"""Text, pictures and annotations to batches: the MMGPT processor. Importing it registers the Auto classes."""

from importlib import import_module

from transformers import AutoImageProcessor, AutoProcessor

from .data.collator import MMGPTCollator
from .image_processing_mmgpt import MMGPTImageProcessor
from .processing_mmgpt import MMGPTProcessor


__all__ = ["READERS", "MMGPTCollator", "MMGPTImageProcessor", "MMGPTProcessor", "load_instruction_dataset"]

# This file alone may know of the model: it is never copied to the Hub.
from modeling_mmgpt import MMGPTConfig  # noqa: E402


AutoProcessor.register(MMGPTConfig, MMGPTProcessor, exist_ok=True)
AutoImageProcessor.register(
    MMGPTConfig,
    image_processor_classes={"pil": MMGPTImageProcessor, "torchvision": MMGPTImageProcessor},
    exist_ok=True,
)

LAZY = {"READERS": "data.readers", "load_instruction_dataset": "data.mixture"}


def __getattr__(name: str):
    """Import what needs `datasets` only when it is asked for."""
    if name in LAZY:
        return getattr(import_module(f".{LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

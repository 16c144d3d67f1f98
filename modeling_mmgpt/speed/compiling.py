"""Parts of a model compiled each by itself, and a vocabulary of a size that suits them."""

import torch
from torch import nn

from ..base_model_mmgpt import MMGPTModel
from ..conditioning_mmgpt import decoder_layers
from ..modeling_mmgpt import MMGPTForConditionalGeneration


def fill_vocabulary(model: MMGPTForConditionalGeneration) -> None:
    """Fill the vocabulary up to a multiple of 64, in place: an odd number of rows makes the head's products slow."""
    size = model.config.get_text_config().vocab_size  # under ZeRO-3, the weights know of no rows
    model.resize_token_embeddings(size, pad_to_multiple_of=64, mean_resizing=False)


def compile_parts(model: nn.Module, **options) -> None:
    """Compile tower, resampler, every decoder layer of the LM and every gated block, each by itself, for training.

    Block and layer apart, since only the block sees how many pictures a row has, and is compiled for one, for another,
    and then for any. Both run through one function of transformers, `forward_with_checkpointing`, of which torch keeps
    eight versions and then runs it uncompiled, with no more than a warning: so the limit is raised, process-wide.

    With a cache every layer is one more version: generate under `torch.compiler.set_stance("force_eager")`.

    Args:
        model: The model, bare or with an adapter; its parts are compiled in place.
        **options: Those of `torch.compile`.
    """
    torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)
    model = next(module for module in model.modules() if isinstance(module, MMGPTModel))
    model.vision_tower.compile(**options)
    model.resampler.compile(**options)
    for layer in decoder_layers(model.text_model):
        layer.decoder_layer.compile(**options)
        if layer.gated_cross_attn_layer is not None:
            layer.gated_cross_attn_layer.compile(**options)

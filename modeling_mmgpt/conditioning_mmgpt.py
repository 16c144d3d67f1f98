"""The gated blocks between the layers of the LM, and how their arguments pass through the LM."""

from contextvars import ContextVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .cross_attention_mmgpt import Conditioning, MMGPTGatedCrossAttentionBlock


# Six LM families accept keyword arguments and hand none of them to their layers; theirs come by this way.
SWALLOW_KEYWORDS = ("bloom", "codegen", "falcon", "gpt_neo", "gptj", "mpt")
_conditioning: ContextVar[Conditioning | None] = ContextVar("conditioning", default=None)


class ConditionedDecoderLayer(nn.Module):
    """A decoder layer of the LM, with a gated block before it where the config asks for one.

    It is a plain module, so that block and layer are checkpointed separately.

    Args:
        decoder_layer: The LM's own layer.
        gated_cross_attn_layer: The block before it, or `None`.
    """

    def __init__(self, decoder_layer: nn.Module, gated_cross_attn_layer: MMGPTGatedCrossAttentionBlock | None):
        super().__init__()
        self.decoder_layer = decoder_layer
        self.gated_cross_attn_layer = gated_cross_attn_layer

    def forward(self, hidden_states: torch.Tensor, *args, conditioning: Conditioning | None = None, **kwargs):
        """Run block and layer; without `conditioning` there are no images. The other arguments are the layer's own."""
        if conditioning is None and not torch.compiler.is_compiling():
            conditioning = _conditioning.get()
        if conditioning is not None and self.gated_cross_attn_layer is not None:
            if conditioning.record.first_state is None:
                conditioning.record.first_state = hidden_states
            hidden_states = self.gated_cross_attn_layer(hidden_states, *conditioning)
        return self.decoder_layer(hidden_states, *args, **kwargs)


def decoder_layers(text_model: PreTrainedModel) -> nn.ModuleList:
    """Find the decoder layers of a causal LM.

    Raises:
        ValueError: If the LM keeps its layers under none of the names `layers`, `h`, `blocks`.
    """
    decoder = text_model.get_decoder()
    for name in ("layers", "h", "blocks"):
        if isinstance(getattr(decoder, name, None), nn.ModuleList):
            return getattr(decoder, name)
    raise ValueError(
        f"{type(text_model).__name__} keeps its decoder layers under none of `layers`, `h`, `blocks` of its decoder "
        f"{type(decoder).__name__}: it cannot be conditioned on images."
    )


def add_gated_blocks(text_model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """Put a gated block before every n-th decoder layer of `text_model`, in place, and return it.

    Raises:
        ValueError: If the LM has fewer layers than that: no picture could reach it.
    """
    layers, every = decoder_layers(text_model), config.cross_attn_every_n_layers
    if every > len(layers):
        raise ValueError(
            f"cross_attn_every_n_layers is {every}, and the LM has {len(layers)} layers: there would be no gated "
            f"block, and no picture could reach the model. Give at most {len(layers)}."
        )
    for number, layer in enumerate(layers, start=1):
        has_block = number % every == 0
        block = MMGPTGatedCrossAttentionBlock(config, layer_idx=number // every - 1) if has_block else None
        layers[number - 1] = ConditionedDecoderLayer(layer, block)
    return text_model


def decode(language_model: nn.Module, conditioning: Conditioning | None, **kwargs):
    """Run an LM, or its decoder alone, with `conditioning` available to every layer.

    Args:
        language_model: The LM, whose layers are [`ConditionedDecoderLayer`]s.
        conditioning: What the gated blocks are handed; `None` to run the bare LM.
        **kwargs: The LM's own arguments; those that are `None` are left out.
    """
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    if conditioning is None:
        return language_model(**kwargs)
    if language_model.config.model_type not in SWALLOW_KEYWORDS:
        return language_model(conditioning=conditioning, **kwargs)
    return _decode_by_context(language_model, conditioning, kwargs)


# Dynamo cannot trace a ContextVar. Here a compiled forward breaks its graph and the LM runs as it stands; a full graph
# (`fullgraph=True`) is refused. Compiled on, the layers would find no images, and nobody would be told.
@torch.compiler.disable
def _decode_by_context(language_model: nn.Module, conditioning: Conditioning, kwargs: dict):
    token = _conditioning.set(conditioning)
    try:
        return language_model(**kwargs)
    finally:
        _conditioning.reset(token)

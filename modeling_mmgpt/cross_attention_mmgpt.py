"""The tanh-gated blocks through which the LM sees the images, and their arguments.

Flamingo, section 3.1.2: https://arxiv.org/abs/2204.14198. Names and sizes of the weights are those of OpenFlamingo,
https://github.com/mlfoundations/open_flamingo/blob/main/open_flamingo/src/helpers.py.

Letters: `B` rows, `T` text tokens, `M` images in a row, `N` latents, `D` width, `H` heads.
"""

from typing import NamedTuple

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_mmgpt import attend, feed_forward, split_heads


class Record:
    """What one forward records. A plain object, which hooks that move tensors leave alone."""

    def __init__(self):
        self.first_state: torch.Tensor | None = None  # (B, T, D), what the first block was given
        self.weights: list[torch.Tensor] = []  # (B, H, T, M*N) of each block, where attention is eager


class Conditioning(NamedTuple):
    """The arguments that the layers of the LM pass to their gated blocks.

    A tuple: hooks that place a model on several devices move its tensors, and checkpointing takes them by position.
    """

    image_latents: torch.Tensor | None  # (B, M, N, D_vision), the new images; None where all are cached
    attends: torch.Tensor  # bool (B, T, 1), whether the token attends to an image: its index is > 0
    has_images: torch.Tensor  # bool (B, T, 1), whether its document has any: its index is >= 0
    mask: torch.Tensor | None  # bool (B, 1, T, M*N), see `cross_attention_mask`
    cache: Cache | None  # keys and values of the images, a layer for each block
    record: Record


class MaskedCrossAttention(nn.Module):
    """Text tokens attend to the latents of their images.

    Args:
        config: The model's config, read at `cross_attention`, `text_config` and `vision_config`.
        layer_idx: Number of the block, its place in the cross-attention cache.
    """

    def __init__(self, config: PreTrainedConfig, layer_idx: int):
        super().__init__()
        sizes = config.cross_attention
        text_width, vision_width = config.text_config.hidden_size, config.vision_config.hidden_size
        inner = sizes["num_heads"] * sizes["head_dim"]
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = sizes["num_heads"]
        self.scaling = sizes["head_dim"] ** -0.5
        self.is_causal = False
        self.norm = nn.LayerNorm(text_width)
        self.to_q = nn.Linear(text_width, inner, bias=False)
        self.to_kv = nn.Linear(vision_width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, text_width, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        image_latents: torch.Tensor | None,
        mask: torch.Tensor | None,
        cache: Cache | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend.

        Args:
            hidden_states: `(B, T, D)`.
            image_latents: `(B, M, N, D_vision)`, the new images; `None` if the cache holds them all.
            mask: Bool `(B, 1, T, M*N)` over cached and new images; `None` for true everywhere.
            cache: Keys and values of the images, where the new ones are added; `None` for no cache.

        Returns:
            `(B, T, D)`, and the weights `(B, H, T, M*N)` if the implementation is eager.
        """
        query = split_heads(self.to_q(self.norm(hidden_states)), self.num_heads)  # (B, H, T, head_dim)
        if image_latents is None:
            key, value = cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values
        else:
            key, value = self.keys_values(image_latents)
            if cache is not None:
                key, value = cache.update(key, value, self.layer_idx)
        attended, weights = attend(self, query, key, value, mask)
        return self.to_out(attended), weights

    def keys_values(self, image_latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents `(B, M, N, D_vision)` to keys and values, each `(B, H, M*N, head_dim)`."""
        kv = self.to_kv(image_latents.flatten(1, 2))  # (B, M*N, 2*H*head_dim)
        key, value = (split_heads(x, self.num_heads) for x in kv.chunk(2, dim=-1))
        return key, value


class MMGPTGatedCrossAttentionBlock(GradientCheckpointingLayer):
    """Cross-attention and feed-forward, each added through a tanh gate that starts closed.

    Args:
        config: The model's config.
        layer_idx: Number of the block, its place in the cross-attention cache.
    """

    def __init__(self, config: PreTrainedConfig, layer_idx: int):
        super().__init__()
        self.attn = MaskedCrossAttention(config, layer_idx)
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.ff = feed_forward(config.text_config.hidden_size, config.cross_attention["ff_mult"])
        self.ff_gate = nn.Parameter(torch.zeros(1))

    def forward(
        self,
        hidden_states: torch.Tensor,
        image_latents: torch.Tensor | None,
        attends: torch.Tensor,
        has_images: torch.Tensor,
        mask: torch.Tensor | None,
        cache: Cache | None,
        record: Record,
    ) -> torch.Tensor:
        """Add what the tokens see of their images; tensors are positional, as reentrant checkpointing requires.

        Args:
            hidden_states: `(B, T, D)`.
            image_latents: This and what follows are the fields of [`Conditioning`], in their order. A token whose
                document has no images passes unchanged, to the bit.
            attends: `(B, T, 1)`.
            has_images: `(B, T, 1)`.
            mask: `(B, 1, T, M*N)`.
            cache: Keys and values of the images.
            record: Gets the weights, zero where a token attends to no image.

        Returns:
            `(B, T, D)`.
        """
        attended, weights = self.attn(hidden_states, image_latents, mask, cache)
        if weights is not None:
            record.weights.append(weights.where(attends[:, None], 0))
        attended = attended.where(attends, 0)  # (B, T, D)
        conditioned = hidden_states + self.attn_gate.tanh().to(attended.dtype) * attended
        conditioned = conditioned + self.ff_gate.tanh().to(attended.dtype) * self.ff(conditioned)
        return conditioned.where(has_images, hidden_states)

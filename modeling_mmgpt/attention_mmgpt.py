"""What the resampler and the gated blocks share: one attention call and one feed-forward."""

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def feed_forward(width: int, mult: int) -> nn.Sequential:
    """Norm, widen `mult` times, GELU, narrow: `(..., D) -> (..., D)`. The indices are the old checkpoints' names."""
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, width * mult, bias=False),
        nn.GELU(),
        nn.Linear(width * mult, width, bias=False),
    )


def split_heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """`(B, T, H*head_dim) -> (B, H, T, head_dim)`."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out, for `output_attentions`; same arguments and results as transformers' `sdpa`.

    Returns:
        `(B, T, H, head_dim)` and the weights `(B, H, T, S)`.
    """
    scores = query @ key.transpose(-1, -2) * scaling  # (B, H, T, S)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def attend(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention by the implementation that `module.config` names.

    Args:
        module: The attention layer, with `config` and `scaling`.
        query: `(B, H, T, head_dim)`.
        key: `(B, H, S, head_dim)`.
        value: `(B, H, S, head_dim)`.
        mask: Bool, broadcastable to `(B, H, T, S)`, true where attended; `None` for everywhere.

    Returns:
        `(B, T, H*head_dim)` and the weights `(B, H, T, S)`, `None` unless eager.
    """
    implementation = getattr(module.config, "_attn_implementation", "sdpa")
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
    attended, weights = attention(module, query, key, value, mask, scaling=module.scaling, is_causal=False)
    return attended.flatten(-2), weights

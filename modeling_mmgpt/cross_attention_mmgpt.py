"""Which token attends to which image, and the tanh-gated blocks that do it.

Flamingo, sections 3.1.2 and 3.1.3: https://arxiv.org/abs/2204.14198. Names and sizes of the weights are those of
OpenFlamingo, https://github.com/mlfoundations/open_flamingo/blob/main/open_flamingo/src/helpers.py.

Letters: `B` rows, `T` text tokens, `M` images in a row, `N` latents, `D` width, `H` heads.
"""

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_mmgpt import attend, feed_forward, split_heads
from .packing_mmgpt import images_of_document


def compute_image_index(
    is_image: torch.Tensor,
    media_attention: str,
    past_images: torch.Tensor | None = None,
    document_index: torch.LongTensor | None = None,
) -> torch.Tensor:
    """Number the image that each token attends to; images are counted along the row.

    A row of text, its `<image>` tokens as `#`, and what each mode makes of it:

        tokens           a  b  #  c  d  #  e  f
        preceding        0  0  1  1  1  2  2  2     the most recent image at or before the token
        all_preceding    0  0  1  1  1  2  2  2     the same number; every image up to it is attended
        following        1  1  1  2  2  2  0  0     the next image, an `<image>` token its own
        a row without   -1 -1 -1 -1 -1 -1 -1 -1     the blocks are off: the row is the bare LM's

    0 attends to no image: the attention half of a block adds nothing, its feed-forward half acts, as it did in the
    reference whose weights we load. A continuation counts on from the images before it: `e f` alone, with
    `past_images` 2, gives `2 2`, `2 2` and `0 0`. In a packed row each document is one to itself:

        document_index   1  1  1  1  2  2  3  3  3  3
        tokens           a  #  b  c  d  e  f  #  g  h
        preceding        0  1  1  1 -1 -1  0  2  2  2
        following        1  1  0  0 -1 -1  2  2  0  0

    Args:
        is_image: Bool `(B, T)`, true at `<image>` tokens.
        media_attention: `"preceding"`, `"all_preceding"` or `"following"`.
        past_images: `(B,)`, the images of each row before these tokens; `None` for none.
        document_index: `(B, T)`, the document of each token in a packed row; `None` where a row is one document.

    Returns:
        Integers `(B, T)`: -1, 0, or the number k >= 1 of an image of the row.
    """
    if past_images is None:
        past_images = is_image.new_zeros(len(is_image), dtype=torch.long)
    seen = past_images[:, None] + is_image.cumsum(dim=1)  # (B, T), images at or before each token
    if document_index is None:
        before, total = torch.zeros_like(seen[:, -1:]), seen[:, -1:]  # (B, 1), those of the token's document
    else:
        before, total = images_of_document(is_image, document_index)  # (B, T)
    if media_attention == "following":
        ahead = seen - is_image.long() + 1  # one more than the images before the token
        index = ahead.where(ahead <= total, 0)
    else:
        index = seen.where(seen > before, 0)
    return index.where(total > before, -1)


def compute_image_slots(index: torch.Tensor, num_images: int, past_images: torch.Tensor | None = None) -> torch.Tensor:
    """Number the pictures of each row; a picture without an `<image>` token gets 0 and is never attended to.

    Args:
        index: `(B, T)` from [`compute_image_index`].
        num_images: `M`, the pictures given for each row.
        past_images: `(B,)`, the images of each row before these; `None` for none.

    Returns:
        Integers `(B, M)`: the number of the image in its row, or 0.
    """
    slots = torch.arange(1, num_images + 1, device=index.device).expand(len(index), -1)  # (B, M)
    if past_images is not None:
        slots = slots + past_images[:, None]
    return slots.where(slots <= index.amax(dim=1, keepdim=True), 0)


def continue_image_index(index: torch.Tensor, start: int, end: int, media_attention: str) -> torch.Tensor:
    """Cut tokens `start` to `end` out of `(B, T)`, continued for tokens that follow without a picture of their own.

    An `<image>` among those, generated or looked up, stands for no picture and moves nothing.
    """
    last = index[:, -1:].clamp(max=0) if media_attention == "following" else index[:, -1:]
    num_following = max(0, end - max(start, index.shape[1]))
    return torch.cat([index[:, start:end], last.expand(-1, num_following)], dim=1)


def check_image_counts(new_tokens: torch.Tensor, num_images: int, continues: bool) -> None:
    """Compare the `<image>` tokens of each row with the pictures given.

    Args:
        new_tokens: `(B,)`, the `<image>` tokens of each row that are not in the cache.
        num_images: `M`, the pictures given for each row.
        continues: Whether the rows continue from a cache. Then every picture has to be new: without one, a row may
            hold fewer tokens than pictures, as rows of one batch differ.

    Raises:
        ValueError: With the row and both numbers.
    """
    counts = new_tokens.tolist()
    for row, count in enumerate(counts):
        if count > num_images or count < 0:
            raise ValueError(
                f"Row {row} holds {count} new <image> tokens, but {num_images} pictures were given for it. Give one "
                "picture for each <image> token that is not in the cache yet."
            )
    if continues and max(counts) < num_images:
        raise ValueError(
            f"{num_images} pictures were given, but no row holds more than {max(counts)} <image> tokens that are not "
            "in the cache: give the new pictures only."
        )


def cross_attention_mask(
    index: torch.Tensor,
    slots: torch.Tensor,
    num_latents: int,
    media_attention: str,
    before: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Expand image numbers into the mask of the cross-attention.

    Args:
        index: `(B, T)` from [`compute_image_index`].
        slots: `(B, M)` from [`compute_image_slots`].
        num_latents: `N`.
        media_attention: As in [`compute_image_index`].
        before: `(B, T)`, the images of the row before the document of each token; `None` where a row is one document.

    Returns:
        Bool `(B, 1, T, M*N)`, true where attended. A token that attends to nothing is true everywhere, which keeps
        its softmax finite; the block drops what it gathers. So `None`, true everywhere, where there is one image.
    """
    if slots.shape[1] == 1:
        return None
    index, slots = index[:, :, None], slots[:, None, :]  # (B, T, 1), (B, 1, M)
    if media_attention == "all_preceding":
        seen = (slots > (0 if before is None else before[:, :, None])) & (slots <= index)
    else:
        seen = (slots > 0) & (slots == index)
    seen = seen | ~seen.any(dim=-1, keepdim=True)  # (B, T, M)
    return seen.repeat_interleave(num_latents, dim=-1)[:, None]


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

    def keys_and_values(self, image_latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Project images `(B, M, N, D_vision)` to keys and values, each `(B, H, M*N, head_dim)`."""
        kv = self.to_kv(image_latents.flatten(1, 2))  # (B, M*N, 2*H*head_dim)
        key, value = (split_heads(x, self.num_heads) for x in kv.chunk(2, dim=-1))
        return key, value

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
            image_latents: `(B, M, N, D_vision)`; `None` if the cache holds the images.
            mask: Bool `(B, 1, T, M*N)`; `None` for true everywhere.
            cache: Keys and values of the images, used where there are no latents.

        Returns:
            `(B, T, D)`, and the weights `(B, H, T, M*N)` if the implementation is eager.
        """
        query = split_heads(self.to_q(self.norm(hidden_states)), self.num_heads)  # (B, H, T, head_dim)
        if image_latents is None:
            key, value = cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values
        else:
            key, value = self.keys_and_values(image_latents)  # (B, H, M*N, head_dim)
        attended, weights = attend(self, query, key, value, mask)
        return self.to_out(attended), weights


class MMGPTGatedCrossAttentionBlock(GradientCheckpointingLayer):
    """Cross-attention and feed-forward, each let in through a tanh gate that starts shut.

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
        hidden_states: torch.Tensor | None,
        image_latents: torch.Tensor | None,
        attends: torch.Tensor | None,
        has_images: torch.Tensor | None,
        mask: torch.Tensor | None,
        cache: Cache | None = None,
        cross_attentions: list | None = None,
        first_states: list | None = None,
    ) -> torch.Tensor | None:
        """Let the images in; tensors are positional, as reentrant checkpointing demands.

        Args:
            hidden_states: `(B, T, D)`; `None` to add the keys and values of images to the cache, and no more: by the
                same call, so that the weights are there where they are sharded or offloaded.
            image_latents: `(B, M, N, D_vision)`, or `None` where the cache holds all images.
            attends: Bool `(B, T, 1)`, whether the token attends to an image: the index of [`compute_image_index`] > 0.
            has_images: Bool `(B, T, 1)`, whether its row has any: the index >= 0. Without, the block is the identity,
                to the bit.
            mask: Bool `(B, 1, T, M*N)` from [`cross_attention_mask`], or `None`.
            cache: The cross-attention cache, if there is one.
            cross_attentions: A list the weights `(B, H, T, M*N)` are appended to, if they are wanted.
            first_states: A list that the first block puts its input into, if a block comes before all layers.

        Returns:
            `(B, T, D)`.
        """
        if hidden_states is None:
            cache.update(*self.attn.keys_and_values(image_latents), self.attn.layer_idx)
            return None
        if first_states is not None and not first_states:
            first_states.append(hidden_states)
        attended, weights = self.attn(hidden_states, image_latents, mask, cache)
        if cross_attentions is not None:
            cross_attentions.append(weights.where(attends[:, None], 0))
        attended = attended.where(attends, 0)  # (B, T, D)
        conditioned = hidden_states + self.attn_gate.tanh().to(attended.dtype) * attended
        conditioned = conditioned + self.ff_gate.tanh().to(attended.dtype) * self.ff(conditioned)
        return conditioned.where(has_images, hidden_states)

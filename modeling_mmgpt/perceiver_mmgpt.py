"""Perceiver resampler: patch tokens of any number become `N` latents an image.

Flamingo, section 3.1.1 and appendix A.1.1: https://arxiv.org/abs/2204.14198. Names and sizes of the weights are those
of OpenFlamingo, https://github.com/mlfoundations/open_flamingo/blob/main/open_flamingo/src/helpers.py.

Letters: `B` rows, `M` images in a row, `F` frames of an image, `P` patches, `N` latents, `D` width, `H` heads.
"""

import torch
from torch import nn
from transformers import PreTrainedConfig

from .attention_mmgpt import attend, feed_forward, split_heads


class PerceiverAttention(nn.Module):
    """Latents attend to the patch tokens and to themselves.

    Args:
        config: The model's config; its attention implementation is looked up at every call.
        width: Width `D` of tokens and latents.
        num_heads: Number of heads `H`.
        head_dim: Width of a head.
    """

    def __init__(self, config: PreTrainedConfig, width: int, num_heads: int, head_dim: int):
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.scaling = head_dim**-0.5
        self.is_causal = False
        self.norm_media = nn.LayerNorm(width)
        self.norm_latents = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, num_heads * head_dim, bias=False)
        self.to_kv = nn.Linear(width, 2 * num_heads * head_dim, bias=False)
        self.to_out = nn.Linear(num_heads * head_dim, width, bias=False)

    def forward(
        self, tokens: torch.Tensor, latents: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend.

        Args:
            tokens: `(B*M, F*P, D)`.
            latents: `(B*M, N, D)`.
            mask: Bool `(B*M, 1, 1, F*P + N)`, true where attended; `None` for everywhere.

        Returns:
            `(B*M, N, D)`, to be added to the latents, and the weights `(B*M, H, N, F*P + N)` if the implementation is
            eager.
        """
        latents = self.norm_latents(latents)
        keys_from = torch.cat([self.norm_media(tokens), latents], dim=1)  # (B*M, F*P + N, D)
        query = split_heads(self.to_q(latents), self.num_heads)  # (B*M, H, N, head_dim)
        key, value = (split_heads(x, self.num_heads) for x in self.to_kv(keys_from).chunk(2, dim=-1))
        attended, weights = attend(self, query, key, value, mask)  # (B*M, N, H*head_dim)
        return self.to_out(attended), weights


class PerceiverResampler(nn.Module):
    """Patch tokens of an image, or of the frames of a video, become `N` latents.

    Args:
        config: The model's config, read at `resampler` and `vision_config`.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        sizes, width = config.resampler, config.vision_config.hidden_size
        self.latents = nn.Parameter(torch.empty(sizes["num_latents"], width))
        self.frame_embs = _embeddings(sizes["max_num_frames"], width)
        self.media_time_embs = _embeddings(sizes["max_num_images"], 1, width)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PerceiverAttention(config, width, sizes["num_heads"], sizes["head_dim"]),
                    feed_forward(width, sizes["ff_mult"]),
                ]
            )
            for _ in range(sizes["depth"])
        )
        self.norm = nn.LayerNorm(width)

    def forward(
        self,
        tokens: torch.Tensor,
        num_frames: torch.Tensor | None = None,
        image_numbers: torch.Tensor | None = None,
        attentions: list | None = None,
    ) -> torch.Tensor:
        """Resample.

        Args:
            tokens: Patch tokens `(B, M, F, P, D)`.
            num_frames: `(B, M)`, how many of the `F` frames are real; `None` if all are.
            image_numbers: `(B, M)`, the place of each image in its row, from 0, for a model with embeddings of it;
                `None` for 0 to M - 1.
            attentions: A list to which the weights `(B*M, H, N, F*P + N)` of each layer are appended, of the latents
                over the patches and over themselves; `None` to leave them out. Needs the eager implementation.

        Returns:
            Latents `(B, M, N, D)`.

        Raises:
            ValueError: If there are more frames or images than the model has embeddings for.
        """
        B, M, F, P, D = tokens.shape
        if self.frame_embs is not None:
            _check_room("frames", F, self.frame_embs)
            tokens = tokens + self.frame_embs[:F, None]  # (F, 1, D)
        if self.media_time_embs is not None:
            if image_numbers is None:
                image_numbers = torch.arange(M, device=tokens.device).expand(B, -1)
            _check_room("images", int(image_numbers.max()) + 1, self.media_time_embs)
            tokens = tokens + self.media_time_embs[image_numbers][:, :, None]  # (B, M, 1, 1, D)
        tokens = tokens.reshape(B * M, F * P, D)
        latents = self.latents.to(tokens.dtype).expand(B * M, -1, -1)  # (B*M, N, D)
        mask = None if num_frames is None else self._real_frames(num_frames, F, P)
        for attention, ff in self.layers:
            attended, weights = attention(tokens, latents, mask)
            if attentions is not None:
                attentions.append(weights)
            latents = latents + attended
            latents = latents + ff(latents)
        return self.norm(latents).view(B, M, -1, D)

    def _real_frames(self, num_frames: torch.Tensor, F: int, P: int) -> torch.Tensor:
        """Mask `(B*M, 1, 1, F*P + N)`: the patches of real frames, and every latent."""
        frame = torch.arange(F, device=num_frames.device)
        patches = (frame < num_frames.reshape(-1, 1)).repeat_interleave(P, dim=1)  # (B*M, F*P)
        latents = patches.new_ones(len(patches), len(self.latents))  # (B*M, N)
        return torch.cat([patches, latents], dim=1)[:, None, None]


def _embeddings(count: int | None, *shape: int) -> nn.Parameter | None:
    return None if count is None else nn.Parameter(torch.empty(count, *shape))


def _check_room(what: str, found: int, embeddings: torch.Tensor) -> None:
    if found > len(embeddings):
        raise ValueError(
            f"Got {found} {what}, but the resampler has embeddings for {len(embeddings)}; give fewer {what}, or build "
            f"the model with a larger `max_num_{what}`."
        )

"""The vision tower: open_clip's ViT or a vision model of transformers, read at its patch tokens.

Letters: `K` pictures, `P` patches, `D` width, `H` heads.
"""

import re
from collections import OrderedDict
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import QuickGELUActivation
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_mmgpt import split_heads
from .configuration_mmgpt import MMGPTVisionConfig


# open_clip's name of a weight -> ours, as a pattern: torch's own attention keeps its input projection in no layer.
OPEN_CLIP_NAME = (r"(resblocks\.\d+\.attn\.in_proj)_", r"\1.")
# The same for `from_pretrained(key_mapping=)`, of files that were saved under the old names. Saving turns a mapping
# round; the end, which matches nothing, keeps it from turning this one.
KEY_MAPPING = {OPEN_CLIP_NAME[0]: OPEN_CLIP_NAME[1] + "(?!)"}


class VisionLayerNorm(nn.LayerNorm):
    """A norm that gives back the data type it got, under autocast too, as open_clip's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(..., D) -> (..., D)`."""
        return super().forward(x).to(x.dtype)


class VisionAttention(nn.Module):
    """Every token attends to every token; two plain linear layers, so that adapters and offloading reach both.

    Args:
        width: Width `D` of the tokens.
        num_heads: Number of heads `H`.
    """

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(K, 1 + P, D) -> (K, 1 + P, D)`."""
        query, key, value = (split_heads(part, self.num_heads) for part in self.in_proj(x).chunk(3, dim=-1))
        attended = nn.functional.scaled_dot_product_attention(query, key, value)  # (K, H, 1 + P, head width)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class LayerScale(nn.Module):
    """A factor for each channel.

    Args:
        width: Width `D`.
        value: What the factors begin with.
    """

    def __init__(self, width: int, value: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(..., D) -> (..., D)`."""
        return x * self.gamma


class MMGPTVisionBlock(GradientCheckpointingLayer):
    """A layer of the tower: attention and feed-forward, each after a norm.

    Args:
        config: The tower's config.
    """

    def __init__(self, config: MMGPTVisionConfig):
        super().__init__()
        width, inner = config.width, int(config.width * config.mlp_ratio)
        act = QuickGELUActivation if config.quick_gelu else nn.GELU
        self.ln_1 = VisionLayerNorm(width, **(config.norm_kwargs or {}))
        self.attn = VisionAttention(width, width // config.head_width)
        self.ls_1 = nn.Identity() if config.ls_init_value is None else LayerScale(width, config.ls_init_value)
        self.ln_2 = VisionLayerNorm(width, **(config.norm_kwargs or {}))
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, inner), gelu=act(**(config.act_kwargs or {})), c_proj=nn.Linear(inner, width)
            )
        )
        self.ls_2 = nn.Identity() if config.ls_init_value is None else LayerScale(width, config.ls_init_value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(K, 1 + P, D) -> (K, 1 + P, D)`."""
        x = x + self.ls_1(self.attn(self.ln_1(x)))
        return x + self.ls_2(self.mlp(self.ln_2(x)))


class MMGPTVisionTower(nn.Module):
    """open_clip's ViT without the projection into CLIP's joint space, which no token passes.

    The weights have the names of open_clip's `VisionTransformer`, but for [`OPEN_CLIP_NAME`]; `load_state_dict` takes
    both. https://github.com/mlfoundations/open_clip/blob/v3.3.0/src/open_clip/transformer.py

    Args:
        config: The tower's config.
    """

    def __init__(self, config: MMGPTVisionConfig):
        super().__init__()
        self.config = config
        width, side = config.width, config.image_size // config.patch_size
        learnable = config.pos_embed_type == "learnable"
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(1 + side**2, width), requires_grad=learnable)
        self.conv1 = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size, bias=False)
        self.ln_pre = nn.Identity() if config.no_ln_pre else VisionLayerNorm(width, **(config.norm_kwargs or {}))
        self.transformer = nn.ModuleDict(
            {"resblocks": nn.ModuleList(MMGPTVisionBlock(config) for _ in range(config.layers))}
        )
        self.ln_post = VisionLayerNorm(width, **(config.norm_kwargs or {}))
        self.register_load_state_dict_pre_hook(_take_open_clip_names)
        if not is_deepspeed_zero3_enabled():  # which has taken the layers apart by now
            self.initialize()

    def initialize(self) -> None:
        """Draw, as open_clip does, what a layer of its kind is not drawn from by itself and no checkpoint filled."""
        scale = self.config.width**-0.5
        init.normal_(self.class_embedding, std=scale)
        if self.config.pos_embed_type == "learnable":
            init.normal_(self.positional_embedding, std=scale)
        else:
            init.copy_(self.positional_embedding, sin_cos_2d(*self.positional_embedding.shape))
        for block in self.transformer["resblocks"]:
            init.xavier_uniform_(block.attn.in_proj.weight)
            if self.config.ls_init_value is not None:
                init.constant_(block.ls_1.gamma, self.config.ls_init_value)
                init.constant_(block.ls_2.gamma, self.config.ls_init_value)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See.

        Args:
            pixels: `(K, 3, height, width)`.

        Returns:
            The class token after the last norm, `(K, D)`, and the patch tokens, before or after it, `(K, P, D)`.
        """
        x = self.conv1(pixels).flatten(2).transpose(1, 2)  # (K, P, D)
        x = torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        x = self.ln_pre(x + self.positional_embedding.to(x.dtype))
        for block in self.transformer["resblocks"]:
            x = block(x)
        pooled, tokens = self.ln_post(x[:, 0]), x[:, 1:]
        return pooled, self.ln_post(tokens) if self.config.post_norm else tokens


def _take_open_clip_names(tower: nn.Module, state_dict: dict[str, torch.Tensor], *_) -> None:
    for key in list(state_dict):
        state_dict[re.sub(*OPEN_CLIP_NAME, key)] = state_dict.pop(key)


def sin_cos_2d(num_tokens: int, width: int) -> torch.Tensor:
    """Embed places by waves, `(1 + side * side, D)`: zeros for the class token, then rows of patches.

    Half the channels tell the column, half the row, each by sines and cosines of wavelengths from 2 pi to 20,000 pi.
    """
    side = int((num_tokens - 1) ** 0.5)
    waves = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64).outer(waves)  # (side, D / 4)
    place = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, D / 2)
    patches = torch.cat([place.repeat(side, 1), place.repeat_interleave(side, dim=0)], dim=1)
    return torch.cat([patches.new_zeros(1, width), patches])


def build_vision_tower(config: PreTrainedConfig) -> nn.Module:
    """Build the tower that a vision config describes, with fresh weights.

    Args:
        config: [`MMGPTVisionConfig`] for open_clip's ViT, or the vision config of a transformers model.
    """
    if config.model_type == MMGPTVisionConfig.model_type:
        return MMGPTVisionTower(config)
    return AutoModel.from_config(config)


def patch_tokens(tower: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Run the tower; one that is frozen builds no graph, even where checkpointing makes its embeddings ask for one.

    Args:
        tower: From [`build_vision_tower`].
        pixels: `(K, 3, height, width)`.

    Returns:
        `(K, P, D)`, without class token or other prefix.
    """
    needs_graph = pixels.requires_grad or any(parameter.requires_grad for parameter in tower.parameters())
    with torch.set_grad_enabled(torch.is_grad_enabled() and needs_graph):
        if torch.is_grad_enabled() and not pixels.requires_grad and not torch.compiler.is_compiling():
            pixels = pixels.detach().requires_grad_()  # without, a layer in a reentrant checkpoint gets no gradient
        if not isinstance(tower, PreTrainedModel):
            return tower(pixels)[1]
        patch_size = tower.config.patch_size
        num_patches = (pixels.shape[-2] // patch_size) * (pixels.shape[-1] // patch_size)
        return tower(pixel_values=pixels).last_hidden_state[:, -num_patches:]


def pooled_features(tower: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Describe each picture by one vector, to compare pictures by their cosine.

    It is the class token (of SigLIP: the pooled one) after the tower's last norm. OpenFlamingo compares after CLIP's
    projection into its joint space, and by a ViT-B/32 of its own
    (https://github.com/mlfoundations/open_flamingo/blob/v2.0.1/open_flamingo/eval/rices.py); our towers have no
    projection, for no token passes it.

    Args:
        tower: From [`build_vision_tower`].
        pixels: `(K, 3, height, width)`.

    Returns:
        `(K, D)`.

    Raises:
        ValueError: If the tower does not pool.
    """
    if not isinstance(tower, PreTrainedModel):
        return tower(pixels)[0]
    pooled = tower(pixel_values=pixels).pooler_output
    if pooled is None:
        raise ValueError(f"{type(tower).__name__} gives no pooled feature; average its patch tokens, for example.")
    return pooled


def load_vision_tower(
    vision: str | dict[str, torch.Tensor] | PreTrainedModel,
    config: str | dict | MMGPTVisionConfig | None,
) -> tuple[nn.Module, PreTrainedConfig]:
    """Load a tower with its weights.

    Args:
        vision: With `config`, an open_clip state dict, a file of one, or an open_clip pretrained tag. Without, the
            folder or Hub id of a vision model of transformers (CLIP, SigLIP), or such a model.
        config: An open_clip model name, its model config, or a [`MMGPTVisionConfig`]; `None` for transformers.

    Returns:
        The tower and its config.

    Raises:
        ValueError: If a file holds more than tensors, or if the weights do not fit the config; the message then lists
            the keys.
    """
    if config is None:
        if isinstance(vision, str):
            full = AutoConfig.from_pretrained(vision)
            vision = AutoModel.from_pretrained(vision, config=getattr(full, "vision_config", full))
        return vision, vision.config
    name = config if isinstance(config, str) else None
    if not isinstance(config, MMGPTVisionConfig):
        config = MMGPTVisionConfig.from_open_clip(config)
    if isinstance(vision, str) and not Path(vision).is_file():
        if name is None:
            raise ValueError(
                f"{vision!r} is no file, and as a pretrained tag it needs the open_clip name of its model as config."
            )
        vision = _pretrained_open_clip(name, vision, config)
    if isinstance(vision, str):
        vision = _read_file(vision)
    with torch.device("meta"):  # a config that lies may describe a tower of any size
        expected = build_vision_tower(config).state_dict()
    weights = {
        key.removeprefix("visual."): value for key, value in vision.items() if key.startswith("visual.")
    } or vision
    weights = {re.sub(*OPEN_CLIP_NAME, key): value for key, value in weights.items() if key != "proj"}
    missing, unexpected = sorted(set(expected) - set(weights)), sorted(set(weights) - set(expected))
    misshapen = [key for key in expected if key in weights and weights[key].shape != expected[key].shape]
    if missing or unexpected or misshapen:
        raise ValueError(
            f"The weights of the vision tower do not fit its config. Missing: {missing[:5]}, unexpected: "
            f"{unexpected[:5]}, of another shape: {misshapen[:5]}."
        )
    tower = build_vision_tower(config)
    tower.load_state_dict(weights)
    return tower, config


def _read_file(path: str) -> dict[str, torch.Tensor]:
    """Read a state dict without running anything in it."""
    load = load_file if path.endswith(".safetensors") else partial(torch.load, map_location="cpu", weights_only=True)
    try:
        weights = load(path)
    except Exception as error:  # damaged bytes raise whatever the byte that is wrong leads to
        raise ValueError(f"{path} cannot be read as a file of tensors alone; nothing in it was run.") from error
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ValueError(f"{path} holds more than tensors; expected the state dict of a vision tower.")
    return weights


def _pretrained_open_clip(name: str, tag: str, config: MMGPTVisionConfig) -> dict[str, torch.Tensor]:
    """Download the weights of an open_clip model.

    Raises:
        ValueError: If the tag's weights were trained with the other activation: they would load, and give other
            tokens.
    """
    try:
        import open_clip
    except ImportError as error:
        raise ImportError("An open_clip pretrained tag needs `pip install open_clip_torch`.") from error
    wanted = open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False)
    if wanted != config.quick_gelu:
        raise ValueError(
            f"The weights {tag!r} of {name!r} need quick_gelu={wanted}, and the config says {config.quick_gelu}: use "
            f"the model name {'with' if wanted else 'without'} '-quickgelu'."
        )
    return open_clip.create_model(name, pretrained=tag).visual.state_dict()

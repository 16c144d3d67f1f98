"""The vision tower: open_clip's ViT or a vision model of transformers, read at its patch tokens."""

from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from .configuration_mmgpt import MMGPTVisionConfig


def build_vision_tower(config: PreTrainedConfig) -> nn.Module:
    """Build the tower that a vision config describes, with fresh weights.

    Args:
        config: [`MMGPTVisionConfig`] for open_clip's ViT, or the vision config of a transformers model.

    Raises:
        ImportError: If open_clip is needed and missing.
    """
    if config.model_type != MMGPTVisionConfig.model_type:
        return AutoModel.from_config(config)
    try:
        from open_clip.model import CLIPVisionCfg, _build_vision_tower
    except ImportError as error:
        raise ImportError("This model has an open_clip vision tower: `pip install open_clip_torch`.") from error
    vision_cfg = CLIPVisionCfg(
        width=config.width,
        layers=config.layers,
        head_width=config.head_width,
        mlp_ratio=config.mlp_ratio,
        patch_size=config.patch_size,
        image_size=config.image_size,
        ls_init_value=config.ls_init_value,
        no_ln_pre=config.no_ln_pre,
        pos_embed_type=config.pos_embed_type,
        act_kwargs=config.act_kwargs,
        norm_kwargs=config.norm_kwargs,
        final_ln_after_pool=not config.post_norm,  # the norm after pooling leaves the patch tokens without it
        output_tokens=True,
    )
    # The only constructor of open_clip 3 that does not build a text tower too.
    tower = _build_vision_tower(embed_dim=config.width, vision_cfg=vision_cfg, quick_gelu=config.quick_gelu)
    tower.proj = None  # the projection into CLIP's joint space; no token passes it
    return tower


def patch_tokens(tower: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Run the tower.

    Args:
        tower: From [`build_vision_tower`].
        pixels: `(K, 3, height, width)`.

    Returns:
        `(K, P, D)`, without class token or other prefix.
    """
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
    weights = {key: value for key, value in weights.items() if key != "proj"}  # see build_vision_tower
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

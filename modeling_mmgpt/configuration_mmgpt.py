"""Configuration of MMGPT: a frozen vision tower, a resampler, gated cross-attention blocks and a causal LM."""

from collections.abc import Iterable
from typing import Any, Literal

import transformers
from packaging.version import Version
from transformers import AutoConfig, PreTrainedConfig


# Every door opens this file first. The number is also in setup.cfg, which does not travel to the Hub.
OLDEST_TRANSFORMERS = "5.24"

if Version(transformers.__version__).release < Version(OLDEST_TRANSFORMERS).release:
    raise ImportError(
        f"This model needs transformers {OLDEST_TRANSFORMERS} or newer, and {transformers.__version__} is installed: "
        "`pip install -U transformers`."
    )

RESAMPLER_DEFAULTS = {
    "depth": 6,
    "num_heads": 8,
    "head_dim": 64,
    "num_latents": 64,
    "ff_mult": 4,
    "max_num_frames": None,
    "max_num_images": None,
}
CROSS_ATTENTION_DEFAULTS = {"num_heads": 8, "head_dim": 64, "ff_mult": 4}

# Keys that transformers itself writes into a config or takes out of one; everything else has to be a field.
KEYS_OF_TRANSFORMERS = {
    "_attn_implementation_internal",
    "_commit_hash",
    "_experts_implementation_internal",
    "_name_or_path",
    "_output_attentions",
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "quantization_config",
    "torch_dtype",
    "use_cache",
}


def _reject_unknown(owner: str, given: dict[str, Any], known: Iterable[str]) -> None:
    """Raise if keys are left over: a misspelt one would silently train or load something else."""
    if given:
        raise ValueError(f"{owner} does not know {sorted(given)}. It knows {sorted(known)}.")


def _without(given: dict[str, Any], known: Iterable[str]) -> dict[str, Any]:
    return {key: value for key, value in given.items() if key not in known}


def _require_sizes(owner: str, sizes: dict[str, Any]) -> None:
    """Raise if a size is not a whole number from 1 on: what is built from it would fail far from here."""
    wrong = {name: size for name, size in sizes.items() if type(size) is not int or size < 1}
    if wrong:
        raise ValueError(f"{owner} has {wrong}; sizes have to be whole numbers from 1 on.")


class MMGPTVisionConfig(PreTrainedConfig):
    """An open_clip vision tower, by the fields of its `vision_cfg`.

    Source of the fields (CLIPVisionCfg):
    https://github.com/mlfoundations/open_clip/blob/v3.3.0/src/open_clip/model.py

    Args:
        width: Width `D` of the patch tokens.
        layers: Number of transformer layers.
        head_width: Width of one attention head.
        mlp_ratio: Width of the MLP over `width`.
        patch_size: Side of a square patch, in pixels.
        image_size: Side of the square picture, in pixels.
        ls_init_value: Initial layer scale, `None` for no layer scale.
        no_ln_pre: Leave out the norm before the transformer.
        pos_embed_type: `"learnable"` or `"sin_cos_2d"`.
        act_kwargs: Arguments of the activation.
        norm_kwargs: Arguments of the norms.
        quick_gelu: Use the activation of OpenAI's weights.
        post_norm: Patch tokens after the tower's last norm. The weights of OpenFlamingo and Multimodal-GPT expect
            them before it, as open_clip < 2.23 returns them; hence the default.

    Raises:
        ValueError: On an unknown field, or a size that is not a whole number from 1 on.
    """

    model_type = "mmgpt_vision"
    base_config_key = "vision_config"

    width: int = 768
    layers: int = 12
    head_width: int = 64
    mlp_ratio: float = 4.0
    patch_size: int = 16
    image_size: int = 224
    ls_init_value: float | None = None
    no_ln_pre: bool = False
    pos_embed_type: str = "learnable"
    act_kwargs: dict | None = None
    norm_kwargs: dict | None = None
    quick_gelu: bool = False
    post_norm: bool = False

    def __post_init__(self, **kwargs):
        _reject_unknown(type(self).__name__, _without(kwargs, KEYS_OF_TRANSFORMERS), type(self).__annotations__)
        sizes = ("width", "layers", "head_width", "patch_size", "image_size")
        _require_sizes(type(self).__name__, {name: getattr(self, name) for name in sizes})
        if self.patch_size > self.image_size:
            raise ValueError(f"A picture of {self.image_size} pixels holds no patch of {self.patch_size}.")
        if self.width < self.head_width or self.width % (self.width // self.head_width):
            raise ValueError(f"A width of {self.width} cannot be split into heads of {self.head_width}.")
        if self.pos_embed_type not in ("learnable", "sin_cos_2d"):
            raise ValueError(f"pos_embed_type is {self.pos_embed_type!r}; it can be 'learnable' or 'sin_cos_2d'.")
        super().__post_init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Width `D` of the patch tokens, under the name transformers' vision configs have for it."""
        return self.width

    @classmethod
    def from_open_clip(cls, name_or_config: str | dict, **kwargs) -> "MMGPTVisionConfig":
        """Read the tower out of an open_clip model config.

        Args:
            name_or_config: An open_clip model name such as `"ViT-L-14-quickgelu"`, or its model config
                (`{"embed_dim": ..., "vision_cfg": {...}, "quick_gelu": ...}`).
            **kwargs: Fields to set on top, such as `post_norm`.

        Raises:
            ValueError: If open_clip does not know the name, or the tower is not a plain ViT.
        """
        if isinstance(name_or_config, str):
            try:
                import open_clip
            except ImportError as error:
                raise ImportError("Reading an open_clip model name needs `pip install open_clip_torch`.") from error
            model_config = open_clip.get_model_config(name_or_config)
            if model_config is None:
                raise ValueError(
                    f"open_clip has no model config {name_or_config!r}; `open_clip.list_models()` names those it has."
                )
        else:
            model_config = name_or_config
        vision_cfg = dict(model_config["vision_cfg"])
        if vision_cfg.get("timm_model_name") or not isinstance(vision_cfg.get("layers", 12), int):
            raise ValueError(
                f"Only open_clip's own ViT towers have patch tokens we know how to read, got {vision_cfg}."
            )
        vision_cfg.setdefault("quick_gelu", model_config.get("quick_gelu", False))
        return cls(**vision_cfg, **kwargs)


class MMGPTConfig(PreTrainedConfig):
    """Configuration of [`MMGPTForConditionalGeneration`].

    Args:
        vision_config: [`MMGPTVisionConfig`] for an open_clip tower, or the vision config of a transformers model
            (CLIP, SigLIP); a dict of either.
        text_config: Config of any causal LM of transformers, or a dict of one.
        resampler: Sizes of the Perceiver resampler, over the defaults `{depth 6, num_heads 8, head_dim 64,
            num_latents 64, ff_mult 4, max_num_frames None, max_num_images None}`.
        cross_attention: Sizes of the gated blocks, over the defaults `{num_heads 8, head_dim 64, ff_mult 4}`.
        cross_attn_every_n_layers: Put a gated block before every n-th decoder layer (n - 1, 2n - 1, ...).
        media_attention: Which image a token attends to: `"preceding"` the most recent image at or before it (the
            Flamingo paper, OpenFlamingo 2); `"all_preceding"` every image at or before it; `"following"` the next
            one (OpenFlamingo 1, and Multimodal-GPT as released). See [`~modeling_mmgpt.compute_image_index`].
        image_token_id: Id of `<image>`.
        end_of_chunk_token_id: Id of `<|endofchunk|>`.
        tie_word_embeddings: Follows `text_config`; kept here because PEFT reads it here.

    Raises:
        ValueError: On an unknown key, here or in `resampler` or `cross_attention`, or on a size that is not a whole
            number from 1 on.
    """

    model_type = "mmgpt"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    resampler: dict | None = None
    cross_attention: dict | None = None
    cross_attn_every_n_layers: int = 4
    media_attention: Literal["preceding", "all_preceding", "following"] = "preceding"
    image_token_id: int | None = None
    end_of_chunk_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        _reject_unknown(type(self).__name__, _without(kwargs, KEYS_OF_TRANSFORMERS), type(self).__annotations__)
        for name, sizes in (("resampler", RESAMPLER_DEFAULTS), ("cross_attention", CROSS_ATTENTION_DEFAULTS)):
            given = getattr(self, name) or {}
            if not isinstance(given, dict):
                raise ValueError(f"MMGPTConfig.{name} is {given!r}; it has to be a dict of sizes.")
            _reject_unknown(f"MMGPTConfig.{name}", _without(given, sizes), sizes)
            needed = {key: size for key, size in given.items() if not size is sizes[key] is None}
            _require_sizes(f"MMGPTConfig.{name}", needed)
        if self.media_attention not in ("preceding", "all_preceding", "following"):
            raise ValueError(
                f"media_attention is {self.media_attention!r}; "
                "it has to be 'preceding', 'all_preceding' or 'following'."
            )
        _require_sizes("MMGPTConfig", {"cross_attn_every_n_layers": self.cross_attn_every_n_layers})
        self.resampler = {**RESAMPLER_DEFAULTS, **(self.resampler or {})}
        self.cross_attention = {**CROSS_ATTENTION_DEFAULTS, **(self.cross_attention or {})}
        self.vision_config = _sub_config(self.vision_config, default=MMGPTVisionConfig.model_type)
        self.text_config = _sub_config(self.text_config, default="llama")
        if self.text_config.model_type == MMGPTVisionConfig.model_type:
            raise ValueError("text_config is the config of a vision tower; it has to be that of a causal LM.")
        self.tie_word_embeddings = bool(self.text_config.tie_word_embeddings)
        if kwargs.get("attn_implementation") is None:  # of no part: each, as one of a model in use, keeps its own
            kwargs["attn_implementation"] = {}
        super().__post_init__(**{"auto_map": {}, **kwargs})  # TRL reads it of every config

    def to_dict(self) -> dict[str, Any]:
        """Give the fields; where the remote code is only if there is any."""
        fields = super().to_dict()
        return fields if fields.get("auto_map") else _without(fields, {"auto_map"})


def _sub_config(config: dict | PreTrainedConfig | None, default: str) -> PreTrainedConfig:
    """Turn a dict with a `model_type` into the config class of that type."""
    if isinstance(config, PreTrainedConfig):
        return config
    if not isinstance(config or {}, dict):
        raise ValueError(f"The config of a part is {config!r}; it has to be a dict or a config.")
    fields = dict(config or {})
    model_type = fields.pop("model_type", default)
    try:
        # Not by AutoConfig: as remote code, our own vision config is registered nowhere.
        if model_type == MMGPTVisionConfig.model_type:
            return MMGPTVisionConfig(**fields)
        return AutoConfig.for_model(model_type, **fields)
    except Exception as error:  # each family checks its fields, or trips over them, in its own way
        raise ValueError(f"A config of {model_type!r} cannot be made of {fields}: {error}") from error

"""MMGPT: a frozen vision tower, a Perceiver resampler and gated cross-attention between the layers of a causal LM.

Flamingo: https://arxiv.org/abs/2204.14198. MultiModal-GPT: https://arxiv.org/abs/2305.04790.

Letters: `B` rows, `T` text tokens, `M` images in a row, `F` frames of an image, `P` patches, `N` latents, `D` width.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.utils import can_return_tuple, logging
from transformers.utils.deprecation import deprecate_kwarg

from .base_model_mmgpt import Images, MMGPTModel, MMGPTPreTrainedModel
from .configuration_mmgpt import MMGPTConfig, MMGPTVisionConfig
from .generation_mmgpt import MMGPTGenerationMixin, drop_stale_suppression, suppress_images
from .vision_mmgpt import load_vision_tower


logger = logging.get_logger(__name__)

HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class MMGPTForConditionalGeneration(MMGPTPreTrainedModel, MMGPTGenerationMixin):
    """The model with logits, loss and `generate()`.

    Args:
        config: The config.
        vision_tower: A tower with its weights; `None` for a fresh one by the config.
        text_model: A causal LM with its weights; `None` for a fresh one by the config.
    """

    def __init__(
        self,
        config: MMGPTConfig,
        vision_tower: nn.Module | None = None,
        text_model: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        self.model = MMGPTModel(config, vision_tower, text_model)
        self.post_init()
        self._tied_weights_keys = dict(self.all_tied_weights_keys) or None  # where PEFT looks for them

    @classmethod
    def from_pretrained(cls, *args, generation_config: GenerationConfig | None = None, **kwargs):
        """Load like any model of transformers, and correct the id of `<image>` that older folders suppress."""
        loaded = super().from_pretrained(*args, generation_config=generation_config, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with `output_loading_info`
        if generation_config is None and model.name_or_path:
            drop_stale_suppression(model, **{key: kwargs[key] for key in HUB_KWARGS if key in kwargs})
        return loaded

    @property
    def generation_config(self) -> GenerationConfig:
        """The defaults of `generate()`; `<image>` is always among the suppressed tokens."""
        return self._generation_config

    @generation_config.setter
    def generation_config(self, value: GenerationConfig) -> None:
        self._generation_config = suppress_images(value, self.config)

    def get_input_embeddings(self) -> nn.Module:
        """The LM's input embedding."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Set the LM's input embedding."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The LM's head."""
        return self.model.text_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Set the LM's head."""
        self.model.text_model.set_output_embeddings(value)

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        num_frames: torch.LongTensor | None = None,
        image_index: torch.LongTensor | None = None,
        image_latents: torch.Tensor | None = None,
        image_numbers: torch.LongTensor | None = None,
        document_index: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithCrossAttentions:
        """Text and images to logits.

        Args:
            input_ids: `(B, T)`; one `<image>` token stands for each image.
            attention_mask: `(B, T_all)`, 0 at padding, over cached and new tokens.
            pixel_values: `(B, M, F, 3, height, width)`, or `(B, M, 3, height, width)` for one frame each. A row may
                hold fewer `<image>` tokens than `M`: the surplus is dropped.
            num_frames: `(B, M)`, how many of the `F` frames are real.
            image_index: `(B, T)`, which image each token attends to; by default computed from `input_ids`, see
                [`~modeling_mmgpt.compute_image_index`].
            image_latents: `(B, M, N, D_vision)`, pictures encoded by [`MMGPTModel.encode_images`].
            image_numbers: `(B, M)`, the number of each picture in its row, 0 for none; by default counted in the order
                of the `<image>` tokens.
            document_index: `(B, T)`, for packed rows: the document of each token, counted from 1, and 0 at padding
                behind them all. Each document is computed as if it stood alone, without a cache; its mask and
                positions replace `attention_mask` and `position_ids`.
            position_ids: `(B, T)`, handed to the LM.
            labels: `(B, T)`, -100 where nothing is learnt. They are shifted here.
            cache: The cache of an earlier call. The new tokens' `<image>`s, and no others, need pictures.
            use_cache: Return a cache; by default outside training.
            output_attentions: Return `attentions`, and `cross_attentions` `(B, H, T, M*N)` a block, which needs the
                eager implementation.
            logits_to_keep: Return only the logits of this many last tokens, or of the tokens at these places.
            **kwargs: Handed to the LM.

        Returns:
            `loss` if there are labels, `logits` `(B, T, V)`, the cache, and what else was asked for.

        Raises:
            ValueError: On more `<image>` tokens than pictures, on `inputs_embeds`, on a cache that does not fit.
        """
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        outputs, beside = self.model.run(
            self.model.text_model,
            input_ids,
            attention_mask,
            Images(pixel_values, num_frames, image_index, image_latents, image_numbers),
            document_index,
            position_ids,
            cache,
            use_cache,
            output_attentions,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        loss = None
        if labels is not None:
            vocab_size = self.config.text_config.vocab_size
            loss = self.loss_function(outputs.logits, labels, vocab_size, num_items_in_batch=num_items_in_batch)
        return CausalLMOutputWithCrossAttentions(loss=loss, logits=outputs.logits, **beside)

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision: str | dict[str, torch.Tensor] | PreTrainedModel,
        text: str | PreTrainedModel,
        *,
        vision_config: str | dict | MMGPTVisionConfig | None = None,
        image_token_id: int | None = None,
        end_of_chunk_token_id: int | None = None,
        pad_token_id: int | None = None,
        dtype: torch.dtype | None = None,
        **config,
    ) -> "MMGPTForConditionalGeneration":
        """Join a vision tower and a causal LM into a new model, whose resampler is new and whose gates are closed.

        Args:
            vision: With `vision_config`, an open_clip state dict, a file of one, or an open_clip pretrained tag.
                Without, the folder or Hub id of a vision model of transformers (CLIP, SigLIP), or such a model.
            text: Folder or Hub id of a causal LM of transformers, or such a model.
            vision_config: An open_clip model name, its model config, or a [`MMGPTVisionConfig`].
            image_token_id: Id of `<image>`. By default the three ids are those that
                `MMGPTProcessor.from_vision_text_pretrained` makes. The embeddings grow to hold them.
            end_of_chunk_token_id: Id of `<|endofchunk|>`.
            pad_token_id: Id of the padding token; by default that of the LM.
            dtype: Data type of all weights; by default that of the LM. To train the new parts, give float32: a step of
                1e-4 vanishes in half precision.
            **config: Other fields of [`MMGPTConfig`].

        Raises:
            ValueError: If the tower's weights do not fit its config, or ids are missing and `text` is a model.
        """
        text_model = text
        if isinstance(text, str):
            text_model = AutoModelForCausalLM.from_pretrained(text, dtype=dtype or "auto")
        if image_token_id is None or end_of_chunk_token_id is None:
            image_token_id, end_of_chunk_token_id, pad_token_id = new_token_ids(text)
        if isinstance(text, str):
            stop_at_learnt_end(text_model, text)
        if pad_token_id is not None:
            text_model.config.pad_token_id = pad_token_id
        rows = 1 + max(image_token_id, end_of_chunk_token_id, pad_token_id or 0)
        if rows > text_model.get_input_embeddings().num_embeddings:
            text_model.resize_token_embeddings(rows)
        if dtype is None and text_model.dtype != torch.float32:
            logger.warning(
                f"The new parts are {text_model.dtype}, as the LM, and steps of training vanish in it. To train them, "
                "give dtype=torch.float32, and do the arithmetic in half precision (`--bf16`)."
            )
        dtype = dtype or text_model.dtype
        with _default_dtype(dtype):  # new parts made in float32 would double the peak of a half model
            tower, vision_config = load_vision_tower(vision, vision_config)
            config = MMGPTConfig(
                vision_config=vision_config,
                text_config=text_model.config,
                image_token_id=image_token_id,
                end_of_chunk_token_id=end_of_chunk_token_id,
                **config,
            )
            model = cls(config, tower, text_model).to(dtype)
        model.generation_config = copy.deepcopy(text_model.generation_config)
        model.generation_config.pad_token_id = text_model.config.pad_token_id
        return model

    def freeze(self, vision: bool = False, resampler: bool = False, text: bool = False) -> None:
        """Freeze parts: the vision tower, the resampler, or the LM without its gated blocks."""
        if vision:
            self.model.vision_tower.requires_grad_(False)
        if resampler:
            self.model.resampler.requires_grad_(False)
        if text:
            for name, parameter in self.model.text_model.named_parameters():
                if "gated_cross_attn_layer" not in name:
                    parameter.requires_grad_(False)


def new_token_ids(text: str | PreTrainedModel) -> tuple[int, int, int]:
    """Ids of `<image>`, `<|endofchunk|>` and padding, as `MMGPTProcessor.from_vision_text_pretrained` makes them.

    Raises:
        ValueError: If `text` is a model, which has no tokenizer.
    """
    if not isinstance(text, str):
        raise ValueError("Give image_token_id and end_of_chunk_token_id: an LM given as a model has no tokenizer.")
    tokenizer = AutoTokenizer.from_pretrained(text)
    tokenizer.add_special_tokens(
        {"extra_special_tokens": ["<|endofchunk|>", "<image>"]}, replace_extra_special_tokens=False
    )
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<PAD>"})
    image_token_id, end_of_chunk_token_id = tokenizer.convert_tokens_to_ids(["<image>", "<|endofchunk|>"])
    return image_token_id, end_of_chunk_token_id, tokenizer.pad_token_id


def stop_at_learnt_end(text_model: PreTrainedModel, text: str) -> None:
    """Make a causal LM end at its tokenizer's end token, which the labels teach, whatever its own configs name.

    A list that holds this token is left alone: it names further end tokens.

    Args:
        text_model: The LM, whose config and generation config are set.
        text: Its folder or Hub id.

    Raises:
        ValueError: If the tokenizer has no end token.
    """
    learnt = AutoTokenizer.from_pretrained(text).eos_token_id
    if learnt is None:
        raise ValueError(
            f"The tokenizer of {text} has no end token, so a response could not be taught to end: set `eos_token` in "
            "its tokenizer_config.json."
        )
    for config in (text_model.config, text_model.generation_config):
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        if learnt not in ends:
            config.eos_token_id = learnt


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)

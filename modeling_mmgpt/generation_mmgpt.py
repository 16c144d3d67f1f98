"""What `generate()` needs besides a forward: each picture encoded once, before rows are repeated for beams."""

import copy
from collections import ChainMap
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate
from transformers.utils import logging
from transformers.utils.deprecation import deprecate_kwarg

from .cache_mmgpt import MMGPTCache
from .decoding_mmgpt import runs_ahead, sample_ahead
from .images_mmgpt import continue_image_index, plan_images


logger = logging.get_logger(__name__)


class MMGPTGenerationMixin(GenerationMixin):
    """`generate()` with pictures, by the public hooks of transformers' own."""

    @deprecate_kwarg("past_key_values", "6.0.0", new_name="cache")
    @torch.no_grad()
    def generate(
        self,
        inputs: torch.LongTensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        assistant_model: PreTrainedModel | None = None,
        streamer: Any = None,
        custom_generate: str | Callable | None = None,
        **kwargs,
    ):
        """Generate as transformers does, with the same arguments; pictures are arguments of `forward`.

        The image token is never generated, whatever the generation config says, unless the call itself gives
        `suppress_tokens`. Continuing from a `cache`, the ids are the cached ones and those of the new turn, and
        `pixel_values` holds the pictures whose `<image>` is not cached yet. On a GPU with a static cache it decodes by
        [`sample_ahead`].

        Args:
            inputs: `(B, T)`, the prompt; or `input_ids` by name.
            generation_config: As for transformers.
            assistant_model: A model of this class, with a tower and resampler of the same sizes.
            streamer: As for transformers.
            custom_generate: As for transformers.
            **kwargs: Other arguments of transformers' `generate()` and of `forward`.

        Raises:
            ValueError: If ids and pictures do not agree, or if an assistant cannot draft for this model.
        """
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        given = {} if generation_config is None else generation_config.to_diff_dict()
        settings = ChainMap(kwargs, given, self.generation_config.to_diff_dict())
        check_assistant(self, assistant_model, settings)
        cache = kwargs.get("cache")
        if cache is not None and custom_generate is sample_ahead:
            raise ValueError("sample_ahead gives tokens alone: leave out `cache`.")
        if input_ids is not None and kwargs.get("image_index") is None:
            kwargs.update(self.locate_and_encode(input_ids, **kwargs), pixel_values=None, num_frames=None)
        speculates = assistant_model is not None or settings.get("prompt_lookup_num_tokens") is not None
        if speculates and isinstance(cache, MMGPTCache) and not settings.get("is_assistant"):
            cache.forget_tokens()  # transformers starts to speculate with all ids, also those in the cache
        if generation_config is not None and generation_config.suppress_tokens is not None:
            generation_config = suppress_images(generation_config, self.config)
        if custom_generate is None and not speculates and runs_ahead(self, settings):
            custom_generate = partial(sample_ahead, streamer=streamer)
        return super().generate(
            input_ids,
            generation_config,
            assistant_model=assistant_model,
            streamer=streamer,
            custom_generate=custom_generate,
            **kwargs,
        )

    def locate_and_encode(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.Tensor | None = None,
        num_frames: torch.LongTensor | None = None,
        cache: MMGPTCache | None = None,
        **kwargs,
    ) -> dict[str, torch.Tensor]:
        """Find which image each token of a prompt attends to, and encode the new pictures.

        Empties the self-attention cache, and keeps the images, where a new picture changes states of cached tokens.

        Args:
            input_ids: `(B, T)`, all ids, also those of the tokens in the cache.
            pixel_values: The new pictures, as in `forward`.
            num_frames: Their frames, as in `forward`.
            cache: The cache that is continued.
            **kwargs: Other arguments of `generate()`, which say nothing about pictures.

        Returns:
            The arguments of `forward` that take the place of the pictures: `image_index`, and with pictures
            `image_latents` and `image_numbers`.

        Raises:
            ValueError: If ids and pictures do not agree, or if the cache holds all of the ids.
        """
        cache = cache if isinstance(cache, MMGPTCache) else None
        cached = None if cache is None else cache.image_count()
        if cached is not None:  # the owner of the cache may have repeated its rows for beams already
            cached = cached[:: len(cached) // len(input_ids)].to(input_ids.device)
        length = 0 if cache is None else int(cache.get_seq_length())
        if 0 < input_ids.shape[1] <= length:
            raise ValueError(
                f"The cache holds {length} tokens and `input_ids` only {input_ids.shape[1]}: give the cached ids and "
                "those of the new turn."
            )
        index, numbers, must_recompute = plan_images(
            self.model.find_image_tokens(input_ids),
            0 if pixel_values is None else pixel_values.shape[1],
            self.config.media_attention,
            cached=cached,
            continues=length > 0,
        )
        if must_recompute:
            logger.debug("A new picture changes what the cached tokens became: all tokens are computed anew.")
            cache.forget_tokens()
        if pixel_values is None:
            return {"image_index": index}
        if self.device.type != "meta":  # as that of a model whose first weights are offloaded: hooks move them then
            pixel_values, numbers = pixel_values.to(self.device), numbers.to(self.device)
            num_frames = None if num_frames is None else num_frames.to(self.device)
        latents = self.model.encode_images(pixel_values, num_frames, numbers)
        return {"image_index": index, "image_latents": latents, "image_numbers": numbers}

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        cache: MMGPTCache | None = None,
        is_first_iteration: bool | None = False,
        image_index: torch.LongTensor | None = None,
        image_latents: torch.Tensor | None = None,
        image_numbers: torch.LongTensor | None = None,
        **kwargs,
    ) -> dict:
        """Prepare the arguments of one forward.

        Args:
            input_ids: All tokens so far; in a chunked prefill, those of the chunk.
            cache: The cache; one of transformers is wrapped.
            is_first_iteration: Whether this belongs to the prefill.
            image_index: `(B, T_prompt)`, which image each token of the prompt attends to.
            image_latents: `(B, M, N, D_vision)` of the new pictures.
            image_numbers: `(B, M)`, their numbers in their rows.
            **kwargs: Handed to transformers.
        """
        if cache is not None:
            cache = MMGPTCache.wrap(cache, self.config)
        inputs = super().prepare_inputs_for_generation(
            input_ids, cache=cache, is_first_iteration=is_first_iteration, **kwargs
        )
        if image_index is None:
            return inputs
        num_tokens = inputs["input_ids"].shape[1]
        start = input_ids.shape[1] - num_tokens
        if cache is not None and is_first_iteration:
            start = int(cache.get_seq_length())  # the tokens may be a chunk, from the middle of the prompt
        index = continue_image_index(image_index, start, start + num_tokens, self.config.media_attention)
        inputs["image_index"] = index.to(inputs["input_ids"].device)
        # An assistant is called with the same pictures again and again, and a prompt comes in chunks. Later the cache
        # is not asked, which would wait for the device.
        is_prompt = cache is None or cache.image_numbers is None or is_first_iteration
        if image_latents is not None and is_prompt and not (cache is not None and cache.holds(image_numbers)):
            inputs.update(image_latents=image_latents, image_numbers=image_numbers)
        return inputs

    def create_masks_for_generate(self, config, **kwargs):
        """Make the masks of a compiled forward as the LM makes its own."""
        create = getattr(self.model.text_model, "create_masks_for_generate", create_masks_for_generate)
        return create(config=self.config.text_config, **kwargs)


def suppress_images(generation_config: GenerationConfig, config: PreTrainedConfig) -> GenerationConfig:
    """Add `<image>` to the suppressed tokens, in a copy: a generated one would stand for no picture."""
    suppressed = generation_config.suppress_tokens or []
    if config.image_token_id is None or config.image_token_id in suppressed:
        return generation_config
    generation_config = copy.deepcopy(generation_config)
    generation_config.suppress_tokens = [*suppressed, config.image_token_id]
    return generation_config


def drop_stale_suppression(model: PreTrainedModel, **hub_kwargs) -> None:
    """Allow the token that a folder of an older release suppresses in place of `<image>`.

    Such a folder holds the id that `<image>` had before the vocabulary grew. Newer folders have `<image>` in the list,
    beside the LM's own tokens.

    Args:
        model: The model that was loaded; its `name_or_path` says from where.
        **hub_kwargs: Where the folder is, as for `from_pretrained`.
    """
    image_token_id, suppressed = model.config.image_token_id, model.generation_config.suppress_tokens or []
    if len(suppressed) != 2 or suppressed[1] != image_token_id:
        return
    try:
        saved = GenerationConfig.from_pretrained(model.name_or_path, **hub_kwargs).suppress_tokens
    except OSError:  # the folder has none
        return
    if saved == suppressed[:1]:
        logger.warning(
            f"{model.name_or_path} suppresses token {saved[0]} in generation, and not <image>, which is "
            f"{image_token_id}: an older release wrote it for another vocabulary. <image> is suppressed instead."
        )
        model.generation_config.suppress_tokens = [image_token_id]


def check_assistant(model: PreTrainedModel, assistant: PreTrainedModel | None, settings: Mapping[str, Any]) -> None:
    """Check that an assistant can draft for a model; it gets the pictures as the model has encoded them.

    Raises:
        ValueError: If it takes no pictures, or encoded pictures of another size; or if the model is to be its
            own assistant, by an early exit.
    """
    if settings.get("assistant_early_exit") is not None:
        raise ValueError("assistant_early_exit cannot be used: the gated blocks are counted with all layers.")
    if assistant is None:
        return
    if assistant.config.model_type != model.config.model_type:
        raise ValueError(
            f"assistant_model is a {type(assistant).__name__}, which sees no pictures: its drafts would be of another "
            f"document. Give a {type(model).__name__}."
        )
    sizes = [(m.config.resampler["num_latents"], m.config.vision_config.hidden_size) for m in (assistant, model)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            "assistant_model is handed the pictures as this model encodes them, and expects other sizes: (latents, "
            f"width) {sizes[0]}, not {sizes[1]}. Give an assistant of the same vision tower and resampler."
        )

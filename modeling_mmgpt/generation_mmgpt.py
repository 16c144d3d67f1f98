"""What `generate()` needs beside a forward: each picture encoded once, before rows are repeated for beams."""

import torch
from transformers import GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate
from transformers.utils import logging

from .cache_mmgpt import MMGPTCache
from .cross_attention_mmgpt import (
    check_image_counts,
    compute_image_index,
    compute_image_slots,
    continue_image_index,
)
from .decoding_mmgpt import runs_ahead, sample_ahead


logger = logging.get_logger(__name__)


class MMGPTGenerationMixin(GenerationMixin):
    """The hooks of transformers' `generate()` that images touch, in the order in which it calls them."""

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs) -> None:
        check_assistant(self, generation_mode_kwargs.get("assistant_model"))
        if generation_config.assistant_early_exit is not None:
            raise ValueError("assistant_early_exit cannot be used: the gated blocks are counted with all layers.")
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: torch.Tensor | None = None, **kwargs
    ):
        if kwargs.get("image_index") is None:
            found = self._locate_and_encode(input_ids, expand_size, **kwargs)
            kwargs.update(found, pixel_values=None, num_frames=None)
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)

    def _locate_and_encode(
        self,
        input_ids: torch.Tensor,
        expand_size: int,
        pixel_values: torch.Tensor | None = None,
        num_frames: torch.Tensor | None = None,
        past_key_values: MMGPTCache | None = None,
        **kwargs,
    ) -> dict[str, torch.Tensor | None]:
        """Find out which image each token of the prompt attends to, and encode the new pictures.

        Empties the self-attention cache, and keeps the images, where a new picture changes what cached tokens became.
        """
        mode = self.config.media_attention
        is_image = self.model.find_image_tokens(input_ids)  # (B, T)
        num_images = 0 if pixel_values is None else pixel_values.shape[1]
        cache = past_key_values if isinstance(past_key_values, MMGPTCache) else None
        past_images = None if cache is None else cache.image_count()
        if past_images is not None and len(past_images) > len(input_ids):
            past_images = past_images[::expand_size]  # its owner has repeated the rows of the cache already
        continues = cache is not None and cache.get_seq_length() > 0
        if continues and cache.get_seq_length() >= input_ids.shape[1]:
            raise ValueError(
                f"The cache holds {cache.get_seq_length()} tokens and `input_ids` only {input_ids.shape[1]}: give the "
                "cached ids and those of the new turn."
            )
        new_images = is_image.sum(dim=1) - (0 if past_images is None else past_images)  # (B,)
        check_image_counts(new_images, num_images, continues)
        if continues and self.model.must_recompute(new_images, past_images):
            logger.debug("A new picture changes what the cached tokens became: all tokens are computed anew.")
            cache.forget_tokens()
        image_index = compute_image_index(is_image, mode)
        if pixel_values is None:
            return {"image_index": image_index}
        slots = compute_image_slots(image_index, num_images, past_images).to(self.device)
        latents = self.model.encode_images(pixel_values.to(self.device), num_frames, slots)
        return {"image_index": image_index, "image_latents": latents, "image_slots": slots}

    def _prepare_cache_for_generation(self, generation_config, model_kwargs: dict, *args, **kwargs) -> None:
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if model_kwargs.get("past_key_values") is not None:
            user_defined = getattr(model_kwargs["past_key_values"], "_is_user_defined", False)
            model_kwargs["past_key_values"] = MMGPTCache.wrap(model_kwargs["past_key_values"], self.config)
            model_kwargs["past_key_values"]._is_user_defined = user_defined
            self._cache_new_images(model_kwargs["past_key_values"], **model_kwargs)

    def _cache_new_images(
        self,
        cache: MMGPTCache,
        image_latents: torch.Tensor | None = None,
        image_slots: torch.Tensor | None = None,
        **kwargs,
    ) -> None:
        """Put the pictures of this call into the cache; an assistant is called with the same ones again and again."""
        if image_latents is not None:
            cached = cache.image_count()
            if cached is None or bool((cached < image_slots.amax(dim=1)).any()):
                self.model.cache_images(cache, image_latents, image_slots)

    def _sample(
        self,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus=False,
        streamer=None,
        **kwargs,
    ):
        mine = (input_ids, logits_processor, stopping_criteria, generation_config)
        if not synced_gpus and runs_ahead(self, generation_config, kwargs):
            return sample_ahead(self, *mine, streamer, **kwargs)
        return super()._sample(*mine, synced_gpus, streamer, **kwargs)

    def _assisted_decoding(self, input_ids: torch.Tensor, **kwargs):
        # transformers starts to speculate with all ids, also those in the cache: it has to be empty.
        if kwargs.get("past_key_values") is not None:
            kwargs["past_key_values"].forget_tokens()
        return super()._assisted_decoding(input_ids, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values: MMGPTCache | None = None,
        is_first_iteration: bool | None = False,
        image_index: torch.Tensor | None = None,
        image_latents: torch.Tensor | None = None,
        image_slots: torch.Tensor | None = None,
        **kwargs,
    ) -> dict:
        """Prepare the arguments of one forward.

        Args:
            input_ids: All tokens so far; in a chunked prefill, those of the chunk.
            past_key_values: The cache.
            is_first_iteration: Whether this belongs to the prefill.
            image_index: `(B, T_prompt)`, which image each token of the prompt attends to.
            image_latents: `(B, M, N, D_vision)` of the pictures, if there is no cache.
            image_slots: `(B, M)`, their numbers in their rows.
            **kwargs: Handed to transformers.
        """
        inputs = super().prepare_inputs_for_generation(
            input_ids, past_key_values=past_key_values, is_first_iteration=is_first_iteration, **kwargs
        )
        num_tokens = inputs["input_ids"].shape[1]
        start = input_ids.shape[1] - num_tokens
        if past_key_values is not None and is_first_iteration:
            start = int(past_key_values.get_seq_length())  # the tokens may be a chunk, from the middle of the prompt
        end = start + num_tokens
        index = continue_image_index(image_index, start, end, self.config.media_attention)
        inputs["image_index"] = index.to(self.device)
        if past_key_values is None:
            inputs.update(image_latents=image_latents, image_slots=image_slots)
        return inputs

    def create_masks_for_generate(self, config, **kwargs):
        """Make the masks of a compiled forward as the LM makes its own."""
        create = getattr(self.model.text_model, "create_masks_for_generate", create_masks_for_generate)
        return create(config=self.config.text_config, **kwargs)


def check_assistant(model: PreTrainedModel, assistant: PreTrainedModel | None) -> None:
    """Look whether an assistant can draft for a model: it is handed the pictures as the model has encoded them.

    Raises:
        ValueError: If it takes no pictures, or encoded pictures of another size.
    """
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

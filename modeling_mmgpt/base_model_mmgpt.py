"""The model up to the last hidden state: pictures to latents, and the LM's decoder between gated blocks.

Letters: `B` rows, `T` text tokens, `M` images in a row, `F` frames of an image, `P` patches, `N` latents, `D` width.
"""

import re
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Cache, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    ModelOutput,
)
from transformers.utils import can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg

from .cache_mmgpt import MMGPTCache
from .conditioning_mmgpt import add_gated_blocks, decode
from .configuration_mmgpt import MMGPTConfig
from .cross_attention_mmgpt import Conditioning, MMGPTGatedCrossAttentionBlock, Record
from .images_mmgpt import compute_image_numbers, cross_attention_mask, plan_images
from .packing_mmgpt import images_of_document, keep_documents_apart
from .perceiver_mmgpt import PerceiverResampler
from .vision_mmgpt import KEY_MAPPING, MMGPTVisionTower, build_vision_tower, patch_tokens


class Images(NamedTuple):
    """The images of a forward, as its arguments of the same names."""

    pixel_values: torch.Tensor | None
    num_frames: torch.Tensor | None
    image_index: torch.Tensor | None
    image_latents: torch.Tensor | None
    image_numbers: torch.Tensor | None

    @property
    def count(self) -> int:
        """`M`, the images of each row."""
        given = self.pixel_values if self.image_latents is None else self.image_latents
        return 0 if given is None else given.shape[1]


class MMGPTPreTrainedModel(PreTrainedModel):
    """What both models share: config, initialisation, and what they support."""

    config_class = MMGPTConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["MMGPTGatedCrossAttentionBlock"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Load like any model of transformers; the tower's weights may have open_clip's names."""
        kwargs["key_mapping"] = {**KEY_MAPPING, **(kwargs.get("key_mapping") or {})}
        return super().from_pretrained(*args, **kwargs)

    def load_adapter(self, peft_model_id: str | None = None, adapter_name: str = "default", **kwargs):
        """Load an adapter like any model of transformers, after a check that it fits.

        Raises:
            ValueError: If weights are missing, left over, of another shape or not finite, or if they would be lost, as
                transformers 5.24 loses those of layers on the disk; the first are named.
        """
        kwargs["ignore_mismatched_sizes"] = True  # else they are an error that does not name them
        info = super().load_adapter(peft_model_id, adapter_name, **kwargs)
        is_its_own = re.compile(
            rf"\.(lora_\w+|trainable_tokens_delta|modules_to_save)\.{re.escape(adapter_name)}(\.|$)"
        )
        weights = {name: weight for name, weight in self.named_parameters() if is_its_own.search(name)}
        wrong = {
            "missing": {name for name in info.missing_keys if name in weights},
            "left over": info.unexpected_keys,
            "of another shape": {f"{name} {tuple(is_)}, {tuple(be)} here" for name, is_, be in info.mismatched_keys},
            "lost, for their layers are on the disk": {name for name, weight in weights.items() if weight.is_meta},
            "not finite": {name for name, w in weights.items() if not w.is_meta and not w.isfinite().all()},
        }
        wrong = [f"{len(names)} {what}, first {sorted(names)[:5]}" for what, names in wrong.items() if names]
        if wrong:
            raise ValueError(f"The adapter {peft_model_id} does not fit its base: weights are {'; '.join(wrong)}.")
        return info

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PerceiverResampler):
            for embeddings in (module.latents, module.frame_embs, module.media_time_embs):
                if embeddings is not None:
                    init.normal_(embeddings)
        elif isinstance(module, MMGPTVisionTower):
            module.initialize()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Initialise the weights that no checkpoint holds.

        transformers asks the nearest model around a module, which for our blocks is the LM, and an LM knows nothing of
        gates: it would leave them as uninitialised memory. So our own initialisation covers them.
        """
        for block in self.modules():
            if isinstance(block, MMGPTGatedCrossAttentionBlock):
                init.zeros_(block.attn_gate)
                init.zeros_(block.ff_gate)
        super().initialize_weights()


class MMGPTModel(MMGPTPreTrainedModel):
    """The model up to the last hidden state.

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
        for given in (vision_tower, text_model):
            _keep_weights(given)
        self.vision_tower = build_vision_tower(config.vision_config) if vision_tower is None else vision_tower
        self.resampler = PerceiverResampler(config)
        if text_model is None:
            text_model = AutoModelForCausalLM.from_config(config.text_config)
        self.text_model = add_gated_blocks(text_model, config)
        self.post_init()

    def post_init(self) -> None:
        """Finish building, and say what stays whole on a device: gated blocks, layers of the LM, and the tower.

        FSDP gathers each of them as one, and fails at a name that it does not find. The layers of a tower are small,
        and gathering one takes the host time: so the tower is gathered whole.
        """
        super().post_init()
        named = getattr(self, "_no_split_modules", ())  # those of both parts, whether they are there or not
        there = {type(module).__name__ for module in self.text_model.modules()}
        self._no_split_modules = there.intersection(named) | {type(self.vision_tower).__name__}

    def get_input_embeddings(self) -> nn.Module:
        """The LM's input embedding."""
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Set the LM's input embedding."""
        self.text_model.set_input_embeddings(value)

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
        **kwargs,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Run the LM's decoder on text and images; arguments as in [`MMGPTForConditionalGeneration.forward`].

        Returns:
            `last_hidden_state` `(B, T, D)`, the cache, and what else was asked for.
        """
        images = Images(pixel_values, num_frames, image_index, image_latents, image_numbers)
        outputs, beside = self.run(self.text_model.get_decoder(), input_ids, attention_mask, images, **kwargs)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=outputs.last_hidden_state, **beside)

    def run(
        self,
        language_model: nn.Module,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None,
        images: Images,
        document_index: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> tuple[ModelOutput, dict]:
        """Run the LM, or its decoder alone, on text and images; both forwards call this.

        Args:
            language_model: `text_model`, or its decoder.
            input_ids: `(B, T)`.
            attention_mask: `(B, T_all)`.
            images: The images.
            document_index: This and what follows are arguments of [`MMGPTForConditionalGeneration.forward`].
            position_ids: `(B, T)`.
            cache: The cache of an earlier call.
            use_cache: Return a cache.
            output_attentions: Return attentions.
            **kwargs: Handed to `language_model`.

        Returns:
            What `language_model` returns, and what goes beside it into the output of either forward: the cache, hidden
            states, attentions and cross-attentions.
        """
        if kwargs.pop("inputs_embeds", None) is not None:
            raise ValueError("`inputs_embeds` cannot be given: the image a token attends to is read from `input_ids`.")
        cache = self.open_cache(cache, use_cache, input_ids.shape[1], document_index)
        conditioning = self.condition(input_ids, images, document_index, cache)
        if document_index is not None:
            attention_mask, position_ids = keep_documents_apart(self.text_model, document_index)
        outputs = decode(
            language_model,
            conditioning,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=None if cache is None else cache.self_attention_cache,
            use_cache=cache is not None,
            output_attentions=output_attentions,
            **kwargs,
        )
        hidden_states, cross_attentions = outputs.hidden_states, None
        if conditioning is not None:
            if self.config.cross_attn_every_n_layers == 1 and hidden_states:
                # transformers notes what the LM's first layer got, and here a block comes before that.
                hidden_states = (conditioning.record.first_state, *hidden_states[1:])
            if output_attentions and conditioning.record.weights:
                cross_attentions = tuple(conditioning.record.weights)
        return outputs, {
            "cache": cache,
            "hidden_states": hidden_states,
            "attentions": outputs.attentions,
            "cross_attentions": cross_attentions,
        }

    def open_cache(
        self,
        cache: Cache | None,
        use_cache: bool | None,
        num_tokens: int,
        document_index: torch.LongTensor | None = None,
    ) -> MMGPTCache | None:
        """Return the cache to use; `None` in checkpointed training, whose recomputation would fill it twice.

        Raises:
            ValueError: If the cache is a foreign one with tokens in it, or a static one without room, or if there is
                one although rows are packed.
        """
        if document_index is not None:
            if cache is not None:
                raise ValueError("Packed rows cannot be continued: give `cache` or `document_index`.")
            return None
        if use_cache is None:
            use_cache = self.config.text_config.use_cache and not self.training
        is_recomputed = self.training and self.is_activation_checkpointing and torch.is_grad_enabled()
        if (cache is None and not use_cache) or is_recomputed:
            return None
        cache = MMGPTCache.wrap(cache, self.config)
        if not torch.compiler.is_compiling():
            cache.check_room(num_tokens)
        return cache

    def condition(
        self,
        input_ids: torch.LongTensor,
        images: Images,
        document_index: torch.LongTensor | None,
        cache: MMGPTCache | None,
    ) -> Conditioning | None:
        """Prepare what the gated blocks get: the images, and which token attends to which; `None` without any image.

        Raises:
            ValueError: If tokens and pictures do not agree, see [`plan_images`], or if a picture cannot be added to
                the cache without recomputing it.
        """
        index, numbers, latents = images.image_index, images.image_numbers, images.image_latents
        cached = None if cache is None else cache.image_count()
        if index is None:
            continues = cache is not None and cache.get_seq_length() > 0
            index, planned, must_recompute = plan_images(
                self.find_image_tokens(input_ids),
                images.count,
                self.config.media_attention,
                before=cached if continues else None,
                cached=cached,
                continues=continues,
                document_index=document_index,
            )
            if must_recompute:
                raise ValueError(
                    "A new picture changes what the tokens in the cache should have been (a first picture arrives "
                    f"late, or media_attention is {self.config.media_attention!r}): run all tokens again without a "
                    "cache, or let `generate()` do it."
                )
            numbers = planned if numbers is None else numbers
        if images.count == 0 and cached is None:
            return None
        if images.count > 0:
            numbers = compute_image_numbers(index, images.count, cached) if numbers is None else numbers
            if latents is None:
                latents = self.encode_images(images.pixel_values, images.num_frames, numbers)
            if cache is not None:
                cache.add_images(numbers)
        before = None
        if document_index is not None:
            if self.config.resampler["max_num_images"] is not None:
                raise ValueError("Rows cannot be packed for a resampler that numbers images: `max_num_images` is set.")
            before, _ = images_of_document(self.find_image_tokens(input_ids), document_index)
        return Conditioning(
            image_latents=latents,
            attends=(index > 0)[..., None],
            has_images=(index >= 0)[..., None],
            mask=cross_attention_mask(
                index,
                numbers if cache is None else cache.image_numbers,
                self.config.resampler["num_latents"],
                self.config.media_attention,
                before,
            ),
            cache=None if cache is None else cache.cross_attention_cache,
            record=Record(),
        )

    def find_image_tokens(self, input_ids: torch.LongTensor) -> torch.Tensor:
        """True at the `<image>` tokens, `(B, T)`.

        Raises:
            ValueError: If the config does not say which id that is.
        """
        if self.config.image_token_id is None:
            raise ValueError("`config.image_token_id` is not set: it is the id of <image> in the tokenizer.")
        return input_ids == self.config.image_token_id

    def encode_images(
        self,
        pixel_values: torch.Tensor,
        num_frames: torch.LongTensor | None = None,
        image_numbers: torch.LongTensor | None = None,
    ) -> torch.Tensor:
        """Turn pictures into latents.

        Args:
            pixel_values: `(B, M, F, 3, height, width)`, or `(B, M, 3, height, width)` for one frame each.
            num_frames: `(B, M)`, how many of the `F` frames are real; `None` if all are.
            image_numbers: `(B, M)`, the number of each picture in its row. Those with 0, padding, are not encoded and
                become zeros. `None` for 1 to M.

        Returns:
            `(B, M, N, D_vision)`.

        Raises:
            ValueError: If the pictures have another shape or size, or are of another number of rows.
        """
        self.check_pixels(pixel_values, image_numbers)
        if pixel_values.dim() == 5:
            pixel_values = pixel_values[:, :, None]
        if image_numbers is None:
            image_numbers = torch.arange(1, pixel_values.shape[1] + 1, device=pixel_values.device)
            image_numbers = image_numbers.expand(len(pixel_values), -1)
        real = image_numbers > 0
        if torch.compiler.is_compiling() or not bool(real.any()):
            return self._encode(pixel_values, num_frames, (image_numbers - 1).clamp(min=0))
        frames = None if num_frames is None else num_frames[real][None]
        latents = self._encode(pixel_values[real][None], frames, image_numbers[real][None] - 1)[0]  # (K, N, D_vision)
        return latents.new_zeros(*real.shape, *latents.shape[1:]).masked_scatter(real[..., None, None], latents)

    def _encode(
        self, pixel_values: torch.Tensor, num_frames: torch.LongTensor | None, places: torch.LongTensor
    ) -> torch.Tensor:
        """`(B, M, F, 3, height, width)`, and their places `(B, M)` in their rows -> `(B, M, N, D_vision)`."""
        pixels = pixel_values.flatten(0, 2).to(self.resampler.latents.dtype)  # (B*M*F, 3, height, width)
        tokens = patch_tokens(self.vision_tower, pixels)  # (B*M*F, P, D_vision)
        return self.resampler(tokens.unflatten(0, pixel_values.shape[:3]), num_frames, places)

    def check_pixels(self, pixel_values: torch.Tensor, image_numbers: torch.Tensor | None) -> None:
        """Raise unless pictures have a shape and size that the tower takes, and are of as many rows as the text."""
        # A tower of transformers checks the size itself, or takes several, as DINOv2 does.
        size = None if isinstance(self.vision_tower, PreTrainedModel) else self.config.vision_config.image_size
        shape = tuple(pixel_values.shape)
        if len(shape) not in (5, 6) or shape[-3] != 3:
            raise ValueError(
                f"`pixel_values` has the shape {shape}; it has to be (rows, images, 3, height, width), or (rows, "
                "images, frames, 3, height, width) for videos: give what the processor returns."
            )
        if size is not None and shape[-2:] != (size, size):
            raise ValueError(
                f"The pictures have {shape[-2]} x {shape[-1]} pixels, and the vision tower takes {size} x {size}: use "
                "the processor of this model, or one with this `size`."
            )
        if image_numbers is not None and len(image_numbers) != shape[0]:
            raise ValueError(
                f"`pixel_values` holds pictures of {shape[0]} rows, and `input_ids` has {len(image_numbers)} rows: "
                "give both for the same rows."
            )


def _keep_weights(module: nn.Module | None) -> None:
    """Keep transformers from initialising a module that brings its weights."""
    for part in module.modules() if module is not None else ():
        part._is_hf_initialized = True

"""The cache of generation: self-attention of the LM, cross-attention of the blocks, and the numbers of the images."""

import torch
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedConfig


class MMGPTCache(EncoderDecoderCache):
    """A self-attention cache of any kind, and the keys and values of the images, each computed once.

    `image_numbers` is `(B, M)`: the number of each cached image in its row, 0 for padding; `None` before the first.

    Args:
        self_attention_cache: The cache handed to the LM.
    """

    def __init__(self, self_attention_cache: Cache):
        super().__init__(self_attention_cache, DynamicCache())
        self.image_numbers: torch.Tensor | None = None

    @classmethod
    def wrap(cls, cache: Cache | None, config: PreTrainedConfig) -> "MMGPTCache":
        """Make a cache from nothing, or around an empty cache of another kind.

        Raises:
            ValueError: If `cache` is of another kind and holds tokens, whose images are unknown; or if it is a static
                one that the LM cannot use.
        """
        if cache is None:
            return cls(DynamicCache(config=config.text_config))
        if isinstance(cache, cls):
            return cache
        if cache.get_seq_length() > 0:
            raise ValueError(
                f"`cache` is a {type(cache).__name__} that holds {cache.get_seq_length()} tokens, and knows "
                "nothing of their images. Continue from the `cache` that this model returned."
            )
        ours = cls(cache)
        # transformers cuts GPT-Neo's local window out of the room of the cache, not of the tokens in it.
        if config.text_config.model_type == "gpt_neo" and ours.capacity() > config.text_config.window_size:
            raise ValueError(
                f"GPT-Neo attends to the wrong tokens with a static cache ({ours.capacity()} tokens) longer than its "
                f"window ({config.text_config.window_size}). Use a dynamic one."
            )
        return ours

    def capacity(self) -> int:
        """How many tokens a static self-attention cache holds; -1 if it grows."""
        layers = self.self_attention_cache.layers
        return max((layer.get_max_length() for layer in layers if not layer.is_sliding), default=-1)

    def check_room(self, num_tokens: int) -> None:
        """Check that this many more tokens fit, if the self-attention cache is a static one.

        Raises:
            ValueError: With both lengths, if they do not.
        """
        capacity = self.capacity()
        if capacity > 0 and (needed := int(self.get_seq_length()) + num_tokens) > capacity:
            raise ValueError(
                f"The static cache holds {capacity} tokens, and this call needs {needed}: give `StaticCache` a larger "
                "`max_cache_len`."
            )

    def image_count(self) -> torch.Tensor | None:
        """Images of each row in the cache, `(B,)`; `None` before the first."""
        return None if self.image_numbers is None else self.image_numbers.amax(dim=1)

    def holds(self, numbers: torch.Tensor) -> bool:
        """Whether the images of these numbers `(B, M)` are in the cache already."""
        cached = self.image_count()
        return cached is not None and bool((cached >= numbers.amax(dim=1).to(cached.device)).all())

    def add_images(self, numbers: torch.Tensor) -> None:
        """Append `(B, M)` numbers of new images."""
        self.image_numbers = numbers if self.image_numbers is None else torch.cat([self.image_numbers, numbers], dim=1)

    def forget_tokens(self) -> None:
        """Empty the self-attention cache and keep the images."""
        self.self_attention_cache.reset()

    def reset(self) -> None:
        """Empty both caches."""
        self.self_attention_cache.reset()
        self.cross_attention_cache = DynamicCache()
        self.image_numbers = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the rows for beam search."""
        super().reorder_cache(beam_idx)
        self._map_numbers(lambda numbers: numbers.index_select(0, beam_idx.to(numbers.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        self._map_numbers(lambda numbers: numbers.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows."""
        super().batch_select_indices(indices)
        self._map_numbers(lambda numbers: numbers[indices])

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, given as a negative number; the images stay."""
        self.self_attention_cache.crop(tokens_to_remove)

    def _map_numbers(self, function) -> None:
        if self.image_numbers is not None:
            self.image_numbers = function(self.image_numbers)

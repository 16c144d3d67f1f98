"""What each request of a batch may set, and how its row samples."""

import struct
from collections.abc import Mapping
from typing import Any

import torch


HONOURED = ("do_sample", "temperature", "top_k", "top_p", "max_new_tokens", "max_length", "eos_token_id")
HONOURED += ("num_return_sequences",)
WITHOUT_EFFECT = ("bos_token_id", "pad_token_id", "use_cache", "length_penalty", "transformers_version")
OFF_AT_ONE = ("num_beams", "repetition_penalty", "typical_p", "guidance_scale")  # others are off where they are 0


def check_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Take out the settings of `generate()` that are honoured; those that are `None` are left to the defaults.

    Raises:
        ValueError: If others are set, with their names.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    unknown = given.keys() - {*HONOURED, *WITHOUT_EFFECT}
    off = {name for name in unknown if name.startswith("_") or given[name] == (1 if name in OFF_AT_ONE else 0)}
    refused = {name: given[name] for name in sorted(unknown - off)}
    if refused:
        raise ValueError(
            f"Continuous batching does not honour {refused}: leave them out, or call `generate()`. It knows "
            f"{', '.join(HONOURED)}."
        )
    return {name: value for name, value in given.items() if name in HONOURED}


def sampling_numbers(settings: Mapping[str, Any], vocab_size: int) -> list[int]:
    """Temperature (0: greedy), top_k and top_p of a request, floats by their bits; `generate()`'s defaults.

    Raises:
        ValueError: If one is out of range.
    """
    temperature = settings.get("temperature", 1.0) if settings.get("do_sample") else 0.0
    top_k, top_p = settings.get("top_k", 50) or vocab_size, settings.get("top_p", 1.0)
    if temperature < 0 or top_k < 1 or not 0 < top_p <= 1:
        raise ValueError(f"Got {temperature=}, {top_k=}, {top_p=}; they have to be >= 0, >= 0, and in (0, 1].")
    top_p = 2.0 if top_p == 1 else top_p  # else tokens would be lost to rounding
    temperature, top_p = struct.unpack("ii", struct.pack("ff", temperature, top_p))
    return [temperature, min(top_k, vocab_size), top_p]


def choose_by(
    scores: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor
) -> torch.Tensor:
    """Shut out all tokens but those that each row may draw, as transformers' processors do, in one sorting.

    Args:
        scores: `(R, V)`.
        temperature: `(R,)`, the bits of a float; 0 for the likeliest token alone.
        top_k: `(R,)`, at least 1.
        top_p: `(R,)`, the bits of a float; above 1 for all.

    Returns:
        `(R, V)`.
    """
    temperature, top_p = (x.view(torch.float32)[:, None] for x in (temperature, top_p))
    top_k = top_k[:, None].long().clamp(1, scores.shape[1])
    is_greedy = temperature == 0
    is_likeliest = torch.arange(scores.shape[1], device=scores.device) == scores.argmax(dim=1, keepdim=True)
    scores = scores / temperature.where(~is_greedy, 1)
    ordered, order = scores.sort(dim=1, descending=True)
    is_kept = ordered >= ordered.gather(1, top_k - 1)
    probabilities = ordered.where(is_kept, -torch.inf).softmax(dim=1)
    is_kept &= probabilities.cumsum(dim=1) - probabilities < top_p
    is_kept = torch.zeros_like(is_kept).scatter(1, order, is_kept)
    return scores.where(is_likeliest.where(is_greedy, is_kept), -torch.inf)


def disturb(scores: torch.Tensor) -> torch.Tensor:
    """Add Gumbel noise, with which the highest score is a draw from their softmax; a single finite one stays it."""
    return scores - torch.empty_like(scores).exponential_().log()

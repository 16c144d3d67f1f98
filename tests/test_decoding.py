"""The decoding loop that stays ahead of the device: the same tokens as `generate()`. Its speed is the benchmark's."""

import pytest
import torch
from transformers import CompileConfig, DynamicCache, LlamaConfig, MistralConfig, StaticCache

from modeling_mmgpt import MMGPTCache
from modeling_mmgpt.decoding_mmgpt import can_be_captured, sample_ahead


# The graph is traced and not compiled, which takes seconds. CUDA graphs:
# `examples/measurements/benchmark.py --parts agreement`.
STATIC = {
    "cache_implementation": "static",
    "compile_config": CompileConfig(fullgraph=True, backend="eager", mode=None),
}


@pytest.mark.parametrize(
    "cache", [{}, STATIC, STATIC | {"prefill_chunk_size": 8}], ids=["dynamic", "static", "static, prompt compiled"]
)
@pytest.mark.parametrize("choice", [{"do_sample": False}, {"do_sample": True, "temperature": 0.7}], ids=str)
def test_the_tokens_are_those_of_generate_also_where_rows_end_early(model, ids, pixels, cache, choice):
    batch = ids("ab#cd#ef", "__abcdef", "____#abc") | {"pixel_values": pixels(3, 2)}
    options = {"max_new_tokens": 16, "repetition_penalty": 1.2, **choice}
    torch.manual_seed(0)
    end = model.generate(**batch, **options, eos_token_id=None)[0, -6].item()
    found = []
    for loop in ({}, {"custom_generate": sample_ahead, **cache}):
        torch.manual_seed(0)
        found.append(model.generate(**batch, **options, **loop, eos_token_id=end))
    assert (found[0] == end).any() and torch.equal(*found)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"return_dict_in_generate": True}, "return_dict_in_generate"),
        ({"cache": "cache"}, "cache"),
        ({"num_beams": 2}, "one beam"),
        ({"use_cache": False}, "a cache"),
    ],
    ids=str,
)
def test_what_it_cannot_do_is_refused(model, ids, pixels, options, named):
    batch = ids("ab#cd") | {"pixel_values": pixels(1, 1)}
    if "cache" in options:
        options = {"cache": DynamicCache(config=model.config.text_config)}
    with pytest.raises(ValueError, match=named):
        model.generate(**batch, max_new_tokens=4, custom_generate=sample_ahead, **options)


def test_a_graph_fills_static_caches_without_a_sliding_window():
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2}
    whole, window = LlamaConfig(**sizes), MistralConfig(**sizes, num_key_value_heads=2, sliding_window=4)
    assert can_be_captured(MMGPTCache(StaticCache(whole, max_cache_len=8)))
    assert not can_be_captured(MMGPTCache(StaticCache(window, max_cache_len=8)))
    assert not can_be_captured(MMGPTCache(DynamicCache(config=whole)))

"""A decoding loop for speed: one compiled step, replayed as a CUDA graph, and a host that is always a step ahead.

transformers' own loop waits in every step until the device has decided whether all rows have ended, and the device
then waits while the next step is prepared. `generate()` uses this loop by itself where [`runs_ahead`] allows it.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import distributed, nn
from transformers import (
    Cache,
    CompileConfig,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.modeling_outputs import ModelOutput


# What transformers' own loop is needed for, by the names of `generate()`'s arguments.
OF_THE_OTHER_LOOP = (
    "cache",
    "compile_config",
    "disable_compile",
    "is_assistant",
    "return_dict_in_generate",
    "stop_strings",
    "synced_gpus",
)


def runs_ahead(model: PreTrainedModel, settings: Mapping[str, Any]) -> bool:
    """Whether `generate()` can take [`sample_ahead`]: a compiled step on a GPU, and tokens alone are asked for.

    With several processes transformers' loop is used, which waits for the slowest where weights are sharded.

    Args:
        model: The model.
        settings: The arguments of the call, over those of the generation configs.
    """
    quantizer, placed = getattr(model, "hf_quantizer", None), getattr(model, "hf_device_map", {})
    return (
        model.device.type == "cuda"
        and settings.get("cache_implementation") == "static"
        and settings.get("use_cache") is not False
        and settings.get("num_beams") in (None, 1)
        and not any(settings.get(name) for name in OF_THE_OTHER_LOOP)
        and not {"cpu", "disk"}.intersection(map(str, placed.values()))
        and (quantizer is None or quantizer.is_compileable)
        and "flash" not in model.config.text_config._attn_implementation  # cannot be compiled as one graph
        and not (distributed.is_initialized() and distributed.get_world_size() > 1)
    )


def sample_ahead(
    model: PreTrainedModel,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: Any = None,
    **model_kwargs,
) -> torch.LongTensor:
    """Decode greedily or by sampling; the arguments are those that `generate()` hands to its loops.

    On a CPU, where no step is compiled by default, ask for it; the first call compiles for a while. (A streamer cannot
    be used this way: transformers passes none to a loop that it is given.)

        model.generate(**inputs, cache_implementation="static", custom_generate=sample_ahead)

    Returns:
        `(B, T)`, the prompt and what follows; the same tokens as those of transformers' loop.

    Raises:
        ValueError: If scores, attentions or beams are asked for, or if there is to be no cache.
    """
    cache = model_kwargs.get("cache")
    if generation_config.return_dict_in_generate:
        raise ValueError("sample_ahead gives tokens alone: leave out `return_dict_in_generate`.")
    if cache is None or generation_config.num_beams > 1:
        raise ValueError("sample_ahead takes a cache and one beam: leave `custom_generate` out.")
    forward = compiled_step(model, generation_config.compile_config) if cache.is_compileable else model.__call__
    is_captured = input_ids.is_cuda and can_be_captured(cache)
    pad_token_id = padding(generation_config)
    unfinished = input_ids.new_ones(len(input_ids))  # (B,), 0 behind the end of a row
    coming = deque()  # of the last steps: tokens and whether all rows have ended, on their way to the host
    steps_ahead = 0 if input_ids.device.type == "cpu" else 1
    num_steps = 0

    chunk_size = generation_config.prefill_chunk_size
    if chunk_size is None:
        outputs = prefill(model, model, input_ids, input_ids.shape[1], model_kwargs)
    else:
        outputs = prefill(model, forward, input_ids, chunk_size, model_kwargs)
    while True:
        model_kwargs["cache"] = outputs.cache
        grow(model_kwargs)
        tokens = choose(logits_processor(input_ids, outputs.logits[:, -1].float()), generation_config.do_sample)
        if pad_token_id is not None:
            tokens = tokens.where(unfinished == 1, pad_token_id)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
        unfinished = unfinished & ~stopping_criteria(input_ids, None)
        coming.append(on_its_way(tokens, unfinished))
        if len(coming) > steps_ahead and arrives(coming.popleft(), streamer):
            break
        if stopping_criteria.max_length is not None and input_ids.shape[1] >= stopping_criteria.max_length:
            while coming:
                arrives(coming.popleft(), streamer)
            break
        inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **model_kwargs)
        if num_steps == 1 and is_captured:  # the first step has compiled what is captured
            forward = capture(forward, inputs)
        outputs = forward(**inputs, return_dict=True)
        num_steps += 1
    if streamer is not None:
        streamer.end()
    return input_ids[:, : input_ids.shape[1] - len(coming)]  # without what was decoded after all rows had ended


def prefill(
    model: PreTrainedModel,
    forward: Callable,
    input_ids: torch.LongTensor,
    chunk_size: int,
    model_kwargs: dict[str, Any],
) -> ModelOutput:
    """Run the prompt `(B, T)` in chunks, and return the outputs of the last."""
    mask, positions, start, chunk = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids"), 0, {}
    for ids in input_ids.split(chunk_size, dim=1):
        end = start + ids.shape[1]
        if mask is not None:
            chunk["attention_mask"] = mask[:, :end]
        if positions is not None:
            chunk["position_ids"] = positions[..., start:end]
        inputs = model.prepare_inputs_for_generation(ids, is_first_iteration=True, **{**model_kwargs, **chunk})
        outputs = forward(**inputs, return_dict=True)
        chunk["cache"], start = outputs.cache, end
    return outputs


def padding(generation_config: GenerationConfig) -> int | None:
    """The token after the end of a row: the padding token, else the first end token."""
    if generation_config.pad_token_id is not None or generation_config.eos_token_id is None:
        return generation_config.pad_token_id
    end = generation_config.eos_token_id
    return end[0] if isinstance(end, list) else end


def grow(model_kwargs: dict[str, Any]) -> None:
    """Make room for one more token in the mask and the positions of the next step, in place."""
    if (mask := model_kwargs.get("attention_mask")) is not None:
        model_kwargs["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    if (positions := model_kwargs.get("position_ids")) is not None:
        model_kwargs["position_ids"] = torch.cat([positions, positions[..., -1:] + 1], dim=-1)


def on_its_way(tokens: torch.LongTensor, unfinished: torch.LongTensor) -> tuple[torch.Tensor, torch.Event | None]:
    """Start to copy the decision of a step to the host without waiting: `(1 + B,)`, and the event that it is there."""
    decided = torch.cat([unfinished.amax(dim=0, keepdim=True), tokens])
    if decided.device.type == "cpu":
        return decided, None
    on_host = torch.empty(decided.shape, dtype=decided.dtype, pin_memory=decided.is_cuda)
    on_host.copy_(decided, non_blocking=True)
    there = torch.Event(device=decided.device)
    there.record()
    return on_host, there


def arrives(coming: tuple[torch.Tensor, torch.Event | None], streamer: Any) -> bool:
    """Wait for the decision of a step, pass its tokens to the streamer, and return whether all rows have ended."""
    decided, there = coming
    if there is not None:
        there.synchronize()
    if streamer is not None:
        streamer.put(decided[1:])
    return bool(decided[0] == 0)


def choose(scores: torch.Tensor, do_sample: bool) -> torch.LongTensor:
    """The next tokens `(B,)` by their scores `(B, V)`: the most likely, or drawn."""
    if do_sample:
        return torch.multinomial(nn.functional.softmax(scores, dim=-1), num_samples=1)[:, 0]
    return scores.argmax(dim=-1)


def compiled_step(model: PreTrainedModel, compile_config: CompileConfig | None) -> Callable:
    """The model's forward, compiled once a model; the graph is captured here, not by the compiler."""
    return model.get_compiled_call(compile_config or CompileConfig(fullgraph=True, mode="default"))


def can_be_captured(cache: Cache) -> bool:
    """Whether a graph can fill a cache: a static one, but no sliding window, which counts its tokens in Python."""
    return cache.is_compileable and not any(cache.is_sliding)


def capture(forward: Callable, inputs: dict) -> Callable:
    """Capture a call as a CUDA graph, without running it.

    Args:
        forward: A function that has run with inputs of these shapes before.
        inputs: Its arguments; those that are not tensors are captured as they are.

    Returns:
        A function of the same arguments, which copies the tensors in and replays. It returns the same output
        tensors each time, overwritten.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    static = list(tensors_in(inputs))
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # `torch.cuda.graph` would give all cached memory back first, in every call
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            outputs = forward(**inputs, return_dict=True)
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)

    def replay(return_dict: bool = True, **new):
        for into, tensor in zip(static, tensors_in(new), strict=True):
            into.copy_(tensor)
        graph.replay()
        return outputs

    return replay


def tensors_in(inputs: dict) -> Iterator[torch.Tensor]:
    """The tensors among the arguments of a forward; masks may come in a dict, and a cache keeps its own."""
    for value in inputs.values():
        if isinstance(value, dict):
            yield from tensors_in(value)
        elif isinstance(value, torch.Tensor):
            yield value

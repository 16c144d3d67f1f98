"""A decoding loop for speed: one compiled step, replayed as a CUDA graph, and a host that is always a step ahead.

transformers' own loop waits in every step until the device has decided whether all rows have ended, and so the device
waits while the next step is prepared. `generate()` takes this loop by itself where [`runs_ahead`] says so.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils import _pytree as pytree
from transformers import (
    Cache,
    CompileConfig,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation import BaseStreamer
from transformers.generation.utils import DeferredStopCheck, StopCheck


def runs_ahead(model: PreTrainedModel, generation_config: GenerationConfig, model_kwargs: dict) -> bool:
    """Whether `generate()` can take [`sample_ahead`]: a compiled step on a GPU, and tokens alone are asked for.

    A `compile_config` of the user is for transformers' loop.
    """
    cache = model_kwargs.get("past_key_values")
    return (
        model.device.type == "cuda"
        and model._valid_auto_compile_criteria(model_kwargs, generation_config)
        and generation_config.compile_config is None
        and can_be_captured(cache)
        and not getattr(cache, "_is_user_defined", False)
        and not generation_config.return_dict_in_generate
        and not generation_config.is_assistant
    )


def sample_ahead(
    model: PreTrainedModel,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
    **model_kwargs,
) -> torch.LongTensor:
    """Decode greedily or by sampling; the arguments are those that `generate()` hands to its loops.

    On a CPU, where no step is compiled unasked, it can be asked for; the first call then compiles for a while. (No
    streamer comes this way: transformers hands none to a loop that it is given.)

        model.generate(**inputs, cache_implementation="static", custom_generate=sample_ahead)

    Returns:
        `(B, T)`, the prompt and what follows; the same tokens as those of transformers' loop.

    Raises:
        ValueError: If more is asked for than tokens (scores, attentions, the cache), or beams, or to go without a
            cache.
    """
    cache = model_kwargs.get("past_key_values")
    if generation_config.return_dict_in_generate or getattr(cache, "_is_user_defined", False):
        raise ValueError("sample_ahead gives tokens alone: leave out `return_dict_in_generate` and `past_key_values`.")
    if cache is None or generation_config.num_beams > 1:
        raise ValueError("sample_ahead takes a cache and one beam: leave `custom_generate` out.")
    forward = compiled_step(model, generation_config.compile_config) if cache.is_compileable else model.__call__
    is_captured = input_ids.is_cuda and can_be_captured(cache)
    stop = StopCheck(streamer)
    if input_ids.device.type != "cpu":
        stop = DeferredStopCheck(input_ids, stopping_criteria.max_length, None, False, streamer)

    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    unfinished = input_ids.new_ones(len(input_ids))  # (B,), 0 behind the end of a row
    num_steps = 0
    while True:
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        tokens = choose(logits_processor(input_ids, outputs.logits[:, -1].float()), generation_config.do_sample)
        if generation_config._pad_token_tensor is not None:
            tokens = tokens.where(unfinished == 1, generation_config._pad_token_tensor)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
        unfinished = unfinished & ~stopping_criteria(input_ids, None)
        if stop(unfinished, tokens, input_ids.shape[1]):
            break
        inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **model_kwargs)
        if num_steps == 1 and is_captured:  # the first step has compiled what is captured
            forward = capture(forward, inputs)
        outputs = forward(**inputs, return_dict=True)
        num_steps += 1
    input_ids = input_ids[:, : input_ids.shape[1] - stop.finish()]
    if streamer is not None:
        streamer.end()
    return input_ids


def choose(scores: torch.Tensor, do_sample: bool) -> torch.LongTensor:
    """The next tokens `(B,)` by their scores `(B, V)`: the likeliest, or drawn."""
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
        inputs: Its arguments; what is no tensor in them is captured as it is.

    Returns:
        A function of the same arguments, which copies the tensors in and replays. It returns the same outputs each
        time, written over.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    static, _ = pytree.tree_flatten(inputs)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # `torch.cuda.graph` would give all cached memory back first, in every call
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            outputs = forward(**inputs, return_dict=True)
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)

    def replay(return_dict: bool = True, **new):
        for into, tensor in zip(static, pytree.tree_flatten(new)[0], strict=True):
            if isinstance(into, torch.Tensor):
                into.copy_(tensor)
        graph.replay()
        return outputs

    return replay

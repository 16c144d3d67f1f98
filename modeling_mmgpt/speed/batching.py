"""Many requests at once: continuous batching with pictures, on transformers' own engine.

That engine runs the LM on one packed row of whatever its requests want next. It carries some numbers for each request,
meant for logits processors; ours say which tokens are pictures and where their keys and values lie. From these a hook
of the LM makes what the gated blocks are handed. https://huggingface.co/docs/transformers/continuous_batching
"""

import queue
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from itertools import count
from typing import Any

import torch
import transformers
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from ..generation_mmgpt import suppress_images
from .picture_pool import PicturePool
from .sampling import check_settings, choose_by, disturb, sampling_numbers


ENCODED_AT_ONCE = 16  # pictures; the requests under way wait for them
# Families that say they can be batched and raise: they use a cache in ways that the paged one knows nothing of.
OF_OTHER_CACHES = ("gpt_neox", "opt")
# What is used of the manager beside its methods.
ATTRIBUTES = ("background_thread_status", "batch_processor", "input_queue", "logit_processor", "output_router")


class RequestNumbers:
    """The numbers that the engine carries for each request, in place of its list of logits processors.

    `2 * max_pictures` lines for pictures, and three for [`choose_by`] where requests may sample.

    Args:
        max_pictures: Pictures of a request at most.
        do_sample: Whether requests may sample.
        suppressed: Tokens that are never generated.
    """

    do_processing = True

    def __init__(self, max_pictures: int, do_sample: bool, suppressed: torch.Tensor):
        self.of_pictures, self.do_sample, self.suppressed = 2 * max_pictures, do_sample, suppressed
        self.tensors_required = self.of_pictures + (3 if do_sample else 0)

    def check_kwargs(self, kwargs: dict) -> None:
        """Nothing: requests were checked before they were queued."""

    def fill_defaults(self, storage: torch.Tensor) -> None:
        """No picture, and greedy."""
        storage.zero_()

    def prepare_tensor_args(self, requests_in_batch: list, arg_storage: torch.Tensor) -> torch.Tensor:
        """Write the numbers of a step: of pictures for each request, of sampling for each that gets a token."""
        getting = [request for request in requests_in_batch if request.has_new_token]
        pictures, sampling = arg_storage.split([self.of_pictures, self.tensors_required - self.of_pictures])
        for name, lines, to in ("pictures", pictures, requests_in_batch), ("sampling", sampling, getting):
            none = lines.new_zeros(len(lines))
            columns = [request.state.logit_processor_kwargs.get(name, none) for request in to]
            if len(lines) and columns:
                lines[:, : len(to)] = torch.stack(columns, dim=1)
        return arg_storage

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Process the scores `(R, V)` of the next tokens, which are then the highest of each row."""
        scores = scores.index_fill(1, self.suppressed, -torch.inf)
        if not self.do_sample:
            return scores
        temperature, top_k, top_p = numbers[self.of_pictures :, : len(scores)]
        if scores.device.type == "cpu" and not temperature.any():  # an accelerator would have to be waited for
            return scores
        return disturb(choose_by(scores, temperature, top_k, top_p))


class Admission(queue.Queue):
    """Requests in the order in which they came; out come those whose pictures are in the pool."""

    def __init__(self, engine: "BatchingEngine"):
        super().__init__(engine.manager.input_queue.maxsize)
        self.engine, self.let_in = engine, None

    def empty(self) -> bool:
        """False: the engine, which asks before each step, asks on until `get_nowait` says so."""
        return False

    def get_nowait(self):
        """The next request that is let in, in the engine's thread; once it fails all that waits, whatever comes."""
        status = self.engine.manager.background_thread_status
        if status.local_status >= status.HARD_STOP:
            return super().get_nowait()
        self.let_in = self.let_in or iter(self.engine.let_in())
        for request in self.let_in:
            return request
        self.let_in = None
        raise queue.Empty

    def take(self, state: Any) -> None:
        """Take a request out of the middle; the caller holds the `mutex`."""
        self.queue.remove(state)
        self.not_full.notify()


def names_of(request_id: str, replies: int) -> list[str]:
    """The names under which the replies to a request come."""
    return [request_id, *(f"{request_id}__child#{number}" for number in range(replies - 1))]


class BatchingEngine:
    """Generate for many requests at once, each with its own pictures and settings; a context manager.

        with BatchingEngine(model) as engine:
            engine.add_request(**processor(text="<image>A picture of", images=[picture]), max_new_tokens=20)
            print(engine.get_result().generated_tokens)

    In float32 a greedy reply is the one that `model.generate` gives; in half precision it depends on what else is in
    the batch, as replies of a padded batch do. `generate()` may run beside it. The weights have to stay as they are.

    Args:
        model: The model that generates, on one device.
        generation_config: Defaults of the requests; those of the model if `None`.
        config: A `ContinuousBatchingConfig`; that of [`default_config`] if `None`. Prompts that begin alike, pictures
            included, are computed once as far as whole pages go.
        num_slots: Pictures whose keys and values are held, at 1 MiB each for the sizes of OpenFlamingo-9B.
        max_pictures: Pictures of a request at most.
        do_sample: Whether requests may sample. Without, a step is spared a sorting of the vocabulary.

    Raises:
        ImportError: If this release of transformers has no such engine; it says what is missing.
        ValueError: If the LM cannot be batched, the model is on several devices, or a setting cannot be honoured.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        generation_config: GenerationConfig | None = None,
        config: Any = None,
        *,
        num_slots: int = 128,
        max_pictures: int = 16,
        do_sample: bool = True,
    ):
        check_model(model)
        generation_config = suppress_images(generation_config or model.generation_config, model.config)
        settings = generation_config.to_diff_dict()
        suppressed = settings.pop("suppress_tokens", None) or []
        self.settings, self.config, self.do_sample = check_settings(settings), model.config, do_sample
        self.manager = build_manager(model.model.text_model, config)
        self.pool = PicturePool(model.model, num_slots, max_pictures)
        suppressed = torch.tensor(suppressed, dtype=torch.long, device=model.model.text_model.device)
        self.manager.logit_processor = RequestNumbers(self.pool.max_pictures, do_sample, suppressed)
        self.manager.input_queue = self.requests = Admission(self)
        self.ids = count()
        self.held: dict[str, tuple[set, int]] = {}  # of requests let in: keys of their pictures, number of replies

    def __enter__(self) -> "BatchingEngine":
        """Make the cache, capture graphs if there are any, and start the thread that generates."""
        with ExitStack() as stack:
            hook = self.manager.model.register_forward_pre_hook(self._condition, with_kwargs=True)
            stack.callback(hook.remove)
            stack.callback(self.manager.destroy)
            config = self.manager.continuous_batching_config
            compiled = config.varlen_compile_config or config.decode_compile_config
            self.is_static = any(config.cuda_graph_booleans) or compiled is not None
            self.manager.warmup()
            stack.callback(self.manager.stop, hard_stop=True)
            self.room = self.manager.batch_processor.cache.num_blocks * config.page_size
            self.room = min(self.room, getattr(self.config.text_config, "max_position_embeddings", None) or self.room)
            with torch.inference_mode():  # which its thread takes over: operations take less of the host
                self.manager.start()
            self.on_exit = stack.pop_all()
        return self

    def __exit__(self, *error) -> None:
        """Stop, dropping the requests that are under way, and leave the model as it was."""
        self.on_exit.close()

    def add_request(
        self,
        input_ids: torch.LongTensor | list[int],
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        num_frames: torch.Tensor | None = None,
        *,
        request_id: str | None = None,
        streaming: bool = False,
        **settings,
    ) -> str:
        """Queue a request. From any thread; waits where the queue has a size and is full.

        Args:
            input_ids: `(1, T)`, or a list of `T`.
            attention_mask: `(1, T)`, 0 at padding, which is left out.
            pixel_values: `(1, M, F, 3, height, width)` or `(1, M, 3, height, width)`, as for `forward`.
            num_frames: `(1, M)`, as for `forward`.
            request_id: Its name, unlike those of all others under way.
            streaming: Give a result at each token, not only at the end.
            **settings: Of `generate()`, by name: `max_new_tokens`, `do_sample`, `temperature`, ...

        Returns:
            Its name. With `num_return_sequences` the other replies come as `{name}__child#{i}`.

        Raises:
            ValueError: If ids and pictures do not agree, there is not enough room, or a setting cannot be honoured.
            RuntimeError: If the engine has stopped.
            queue.Full: If the queue is still full after ten seconds.
        """
        ids = torch.as_tensor(input_ids).reshape(-1)
        ids = (ids if attention_mask is None else ids[attention_mask.reshape(-1).bool().to(ids.device)]).tolist()
        settings = self.settings | check_settings(settings)
        if settings.get("do_sample") and not self.do_sample:
            raise ValueError("The engine was made with do_sample=False, and the request samples.")
        new_tokens = settings.get("max_new_tokens", settings.get("max_length", 20 + len(ids)) - len(ids))
        if not (0 < len(ids) <= self.room - new_tokens and new_tokens > 0):
            raise ValueError(f"Got {len(ids)} tokens and {new_tokens} new ones: there is room for 1 to {self.room}.")
        request_id = self.manager.add_request(
            ids,
            request_id=request_id or f"request-{next(self.ids)}",
            max_new_tokens=new_tokens,
            eos_token_id=settings.get("eos_token_id"),
            streaming=streaming,
            pictures=self.pool.find_pictures(ids, pixel_values, num_frames),
            sampling=torch.tensor(sampling_numbers(settings, self.config.text_config.vocab_size)),
            replies=settings.get("num_return_sequences") or 1,
        )
        if request_id is None:
            raise RuntimeError(f"The engine has stopped: {self.fatal_error or 'its context was left'}.")
        return request_id

    def cancel_request(self, request_id: str) -> None:
        """End a request and its replies, waiting or under way; a result on its way may still come."""
        with self.requests.mutex:
            waiting = [state for state in self.requests.queue if state.request_id == request_id]
            for state in waiting:
                self.requests.take(state)
            held = self.held.get(request_id)
        if held is not None:
            for name in names_of(request_id, held[1]):
                self.manager.cancel_request(name)
        else:  # it waited, was refused or never came
            self._drop_handlers({request_id: waiting[0].logit_processor_kwargs["replies"] if waiting else 1})

    def register_result_handler(self, request_id: str, handle: Callable) -> None:
        """Have results of a request handed to a function, in the running event loop; call it before `add_request`."""
        self.manager.register_result_handler(request_id, handle)

    def get_result(self, timeout: float | None = None):
        """The next result that no handler takes, or `None`: in so many seconds none came, or the engine has stopped.

        It has `request_id`, `generated_tokens` so far, `is_finished()` and `error`.
        """
        return self.manager.get_result(timeout=timeout)

    def generate(self, requests: Iterable[Mapping[str, Any]]) -> list:
        """Reply to requests, as [`generate_batch`] does; nobody else may take results meanwhile."""
        results, names, ahead = {}, [], iter(requests)
        while ahead is not None or len(results) < len(names):
            while ahead is not None and self.requests.qsize() <= 2 * ENCODED_AT_ONCE:
                request = next(ahead, None)
                if request is None:
                    ahead = None
                else:
                    replies = (self.settings | request).get("num_return_sequences") or 1
                    names += names_of(self.add_request(**request), replies)
            result = self.get_result(timeout=0.1)
            if self.fatal_error is not None or (result is not None and result.error is not None):
                raise RuntimeError(f"A request failed: {self.fatal_error or result.error}")
            if result is not None and result.is_finished():
                results[result.request_id] = result
        return [results[name] for name in names]

    @property
    def fatal_error(self) -> Exception | None:
        """What ended the engine; `None` while it runs."""
        return self.manager.background_thread_status.fatal_error

    def let_in(self) -> list:
        """Take the requests whose pictures have a slot from the queue, in the engine's thread between two steps."""
        if not self.requests.queue:
            return []
        scheduler, pool = self.manager.batch_processor.scheduler, self.pool
        running = {name.partition("__child#")[0] for name in (*scheduler.active_requests, *scheduler.waiting_requests)}
        if not pool.has_marks and not running:  # begin anew, and find nothing by the old ones
            self.manager.batch_processor.cache.evict_cached_blocks()
            pool.marks.clear()
        self._drop_handlers({name: replies for name, (_, replies) in self.held.items() if name not in running})
        self.held = {name: held for name, held in self.held.items() if name in running}
        in_use = set().union(*(keys for keys, _ in self.held.values()))
        states, new = [], {}
        with self.requests.mutex:
            while self.requests.queue and pool.has_marks and len(new) < ENCODED_AT_ONCE:
                state = self.requests.queue[0]
                pictures, replies = (state.logit_processor_kwargs[name] for name in ("pictures", "replies"))
                added = pool.reserve(pictures, in_use)
                if added is None:
                    break
                new |= added
                self.held[state.request_id] = {picture.key for picture in pictures}, replies
                in_use |= self.held[state.request_id][0]
                state.num_children = replies - 1
                state.initial_tokens = pool.mark(state.initial_tokens, pictures)
                state.remaining_prefill_tokens = state.initial_tokens[:]
                state.logit_processor_kwargs |= {"pictures": pool.numbers(pictures)}
                states.append(state)
                self.requests.take(state)
        try:
            pool.encode(new.values())
        except Exception as error:  # such as too little memory: the requests under way go on
            pool.forget(new)
            failed = [state for state in states if not new.keys().isdisjoint(self.held[state.request_id][0])]
            for state in failed:
                self.manager.output_router.fail_and_deliver(state, error)
            states = [state for state in states if state not in failed]
        return states

    def _drop_handlers(self, gone: Mapping[str, int]) -> None:
        """Forget who waits for requests that are gone, given with the number of their replies."""
        for request_id, replies in gone.items():
            for name in names_of(request_id, replies):
                self.manager.output_router.result_handlers.pop(name, None)

    def _condition(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Hand the gated blocks what they need in a step of the engine; other calls of the LM stay as they are."""
        if "logits_processor_args" not in kwargs:
            return None
        numbers, starts, positions = (kwargs[k] for k in ("logits_processor_args", "cu_seq_lens_q", "position_ids"))
        conditioning = self.pool.condition(numbers, starts[1:], positions[0], self.is_static)
        added = {"input_ids": kwargs["input_ids"] % self.pool.vocabulary}
        added |= {} if conditioning is None else {"conditioning": conditioning}
        # Where there is a mask, `is_causal=False` changes nothing here, but a `generate()` beside it: transformers
        # writes it into the config as long as the step runs.
        return args, {name: value for name, value in kwargs.items() if (name, value) != ("is_causal", False)} | added


def check_model(model: PreTrainedModel) -> None:
    """Check that transformers' engine can run a model's LM.

    Raises:
        ValueError: If it cannot; some families would raise, some would be wrong in silence.
    """
    text_model = model.model.text_model
    if not text_model._supports_attention_backend or text_model.config.model_type in OF_OTHER_CACHES:
        raise ValueError(
            f"{type(text_model).__name__} cannot be batched continuously: its attention knows of no paged cache. Call "
            "`generate()`, whose rows are padded."
        )
    if len(places := set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise ValueError(f"Continuous batching takes a model on one device, and this one is on {places}.")


def default_config(device: torch.device, at_once: int | None = None, num_tokens: int | None = None) -> Any:
    """How transformers' engine runs: with a small cache on a CPU, elsewhere 60 % of what is free, on CUDA in graphs.

    Args:
        device: Where the model is.
        at_once: Requests that are under way at the same time; 32 on a CPU and 128 elsewhere if `None`.
        num_tokens: Tokens that are held of all of them together.

    Returns:
        A `ContinuousBatchingConfig`.

    Raises:
        ImportError: If this release of transformers has none.
    """
    from transformers import ContinuousBatchingConfig

    if device.type == "cpu":  # attention over a packed row grows with its square
        settings = {"page_size": 32, "num_blocks": 512, "max_batch_tokens": 256}
    else:
        settings = {"page_size": 64, "max_memory_percent": 0.6, "max_batch_tokens": 2048}
    if device.type == "cuda":
        settings |= {"use_cuda_graph": True, "q_padding_interval_size": 32, "kv_padding_interval_size": 2048}
        settings |= {"auto_switch_to_flash": False}  # the graphs were measured with sdpa
    if num_tokens is not None:
        settings["num_blocks"] = -(-num_tokens // settings["page_size"])
    at_once = at_once or (32 if device.type == "cpu" else 128)
    return ContinuousBatchingConfig(max_requests_per_batch=at_once, **settings)


def build_manager(text_model: PreTrainedModel, config: Any) -> Any:
    """Make transformers' own manager, for the bare LM.

    Raises:
        ImportError: If it is not there, or is another than the one that this file knows.
    """
    from transformers import ContinuousBatchingManager

    config = default_config(text_model.device) if config is None else config
    manager = ContinuousBatchingManager(text_model, GenerationConfig(do_sample=False), config)
    if missing := [name for name in ATTRIBUTES if not hasattr(manager, name)]:
        raise ImportError(
            f"ContinuousBatchingManager of transformers {transformers.__version__} has no {', '.join(missing)}, which "
            "batching needs: another release has them, or call `generate()`."
        )
    return manager


def generate_batch(
    model: PreTrainedModel,
    requests: Iterable[Mapping[str, Any]],
    generation_config: GenerationConfig | None = None,
    **options,
) -> list:
    """Generate for any number of requests, so many at once as there is room for.

        rows = [processor(text=prompt, images=[picture]) for prompt, picture in questions]
        replies = [result.generated_tokens for result in generate_batch(model, rows)]

    Args:
        model: The model that generates.
        requests: The arguments of [`BatchingEngine.add_request`] for each. They may be made on the way: few are kept.
        generation_config: Defaults of the requests; those of the model if `None`.
        **options: Other arguments of [`BatchingEngine`].

    Returns:
        What transformers' own `generate_batch` gives for each request, with `generated_tokens`, in the order of the
        requests; `num_return_sequences` of them for each.

    Raises:
        RuntimeError: If a request failed.
    """
    with BatchingEngine(model, generation_config, **options) as engine:
        return engine.generate(requests)

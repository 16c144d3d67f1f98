"""Many requests at once: continuous batching with pictures, on transformers' own engine.

That engine runs the LM on one packed row of whatever its requests want next. It carries some numbers for each request,
meant for logits processors; ours say which tokens are pictures and where their keys and values lie. From these a hook
of the LM makes what the gated blocks are handed. https://huggingface.co/docs/transformers/continuous_batching
"""

import copy
import hashlib
import queue
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import count
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from ..base_model_mmgpt import check_pixels
from ..conditioning_mmgpt import decoder_layers
from ..cross_attention_mmgpt import Conditioning, Record
from ..generation_mmgpt import suppress_images


ENCODED_AT_ONCE = 16  # pictures; the requests under way wait for them
HONOURED = ("do_sample", "temperature", "top_k", "top_p", "max_new_tokens", "max_length", "eos_token_id")
HONOURED += ("num_return_sequences",)
# Settings that change nothing at these values, and settings that change nothing here.
NEUTRAL = {"num_beams": 1, "min_length": 0, "min_new_tokens": 0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
NEUTRAL |= {"typical_p": 1.0, "guidance_scale": 1.0}
WITHOUT_EFFECT = (
    "bos_token_id",
    "pad_token_id",
    "use_cache",
    "length_penalty",
    "early_stopping",
    "transformers_version",
)
# What is used of transformers' manager beside its methods.
ATTRIBUTES = ("background_thread_status", "batch_processor", "input_queue", "logit_processor", "output_router")


class Picture(NamedTuple):
    """A picture of a request that waits."""

    key: tuple  # the same for pictures that can share a slot
    place: int  # of its `<image>` in the prompt
    number: int  # in its request, from 1
    pixels: torch.Tensor  # (F, 3, height, width)


class KeysValues(NamedTuple):
    """What a gated block attends to, each `(1, H, S * N, head_dim)`."""

    keys: torch.Tensor
    values: torch.Tensor


class Layers(NamedTuple):
    """In the place of a cache."""

    layers: list[KeysValues]


def attended_slots(
    places: torch.Tensor,
    slots: torch.Tensor,
    ends: torch.Tensor,
    positions: torch.Tensor,
    media_attention: str,
    num_slots: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find out which slots each token of a packed row attends to: [`compute_image_index`] without counting along it.

    All shapes are those of the arguments, and nothing is read by the host, so that a CUDA graph can hold it.

    Args:
        places: `(M, R)`, where in its request the `<image>` of each picture stands.
        slots: `(M, R)`, the slot of each picture, from 1; 0 for none.
        ends: `(R,)`, the token behind the last of each request.
        positions: `(T,)`, how far into its request each token is.
        media_attention: As in [`compute_image_index`].
        num_slots: `S`, slot 0 among them.

    Returns:
        Bool `(T, S)`, true where attended, all false where to none; and bool `(T,)`, whether the request has a picture.
    """
    tokens = torch.arange(len(positions), dtype=ends.dtype, device=ends.device)
    request = torch.searchsorted(ends, tokens, right=True).clamp(max=len(ends) - 1)  # (T,); padding is of the last
    places, slots = places[:, request].T, slots[:, request].T  # (T, M)
    is_real = slots > 0
    is_following = media_attention == "following"
    seen = is_real & ((places < positions[:, None]) if is_following else (places <= positions[:, None]))
    if media_attention != "all_preceding":
        number = torch.arange(1, seen.shape[1] + 1, device=seen.device)
        seen = is_real & (number == seen.sum(dim=1, keepdim=True) + is_following)
    found = torch.zeros(len(tokens), num_slots, dtype=torch.int32, device=slots.device)
    found.scatter_add_(1, slots.long(), seen.int())  # a picture may stand in a request twice
    return found > 0, is_real.any(dim=1)


class PicturePool:
    """Keys and values of pictures, `num_slots` at a time, for each gated block.

    A picture stays when its requests have ended, until its slot is needed: the least recently used goes first.

    Args:
        model: The model up to the last hidden state.
        num_slots: How many pictures are held; slot 0 comes on top, and is attended to by who attends to nothing.
    """

    def __init__(self, model: nn.Module, num_slots: int):
        self.model, config = model, model.config
        layers = decoder_layers(model.text_model)
        self.blocks = [layer.gated_cross_attn_layer for layer in layers if layer.gated_cross_attn_layer is not None]
        self.num_latents, sizes = config.resampler["num_latents"], config.cross_attention
        shape = (1, sizes["num_heads"], (1 + num_slots) * self.num_latents, sizes["head_dim"])
        latents = model.resampler.latents
        self.layers = [KeysValues(latents.new_zeros(shape), latents.new_zeros(shape)) for _ in self.blocks]
        self.chosen: tuple[torch.Tensor, Layers] | None = None
        self.slots: OrderedDict[Any, int] = OrderedDict((slot, slot) for slot in range(1, 1 + num_slots))
        self.asked = self.encoded = 0  # pictures of all requests, and those that were not there yet

    def reserve(self, pictures: Iterable[Picture], in_use: set) -> dict[tuple, Picture] | None:
        """Give each picture a slot, and return those that have to be encoded; `None` if there are not enough slots.

        Args:
            pictures: The pictures of a request.
            in_use: Keys of pictures that have to stay.
        """
        wanted = {picture.key: picture for picture in pictures}
        new = {key: picture for key, picture in wanted.items() if key not in self.slots}
        free = [key for key in self.slots if key not in in_use and key not in wanted][: len(new)]
        if len(free) < len(new):
            return None
        for key in wanted:
            self.slots[key] = self.slots.pop(key if key in self.slots else free.pop(0))
        self.asked, self.encoded = self.asked + len(wanted), self.encoded + len(new)
        return new

    def forget(self, keys: Iterable[tuple]) -> None:
        """Drop pictures that could not be encoded."""
        for key in keys:
            slot = self.slots.pop(key)
            self.slots[slot] = slot

    @torch.no_grad()
    def encode(self, pictures: Iterable[Picture]) -> None:
        """Fill the slots of pictures, together those with as many frames, and wait until the device has done it."""
        by_frames: dict[int, list[Picture]] = {}
        for picture in pictures:
            by_frames.setdefault(len(picture.pixels), []).append(picture)
        device, self.chosen = self.layers[0].keys.device, None
        for alike in by_frames.values():
            pixels = torch.stack([picture.pixels for picture in alike])[None].to(device)  # (1, M, F, 3, height, width)
            numbers = torch.tensor([[picture.number for picture in alike]], device=device)
            latents = self.model.encode_images(pixels, None, numbers)  # (1, M, N, D)
            slots = torch.tensor([self.slots[picture.key] for picture in alike], device=device)
            for block, layer in zip(self.blocks, self.layers, strict=True):
                for new, held in zip(block.attn.keys_values(latents), layer, strict=True):
                    new, held = (x.unflatten(2, (-1, self.num_latents)) for x in (new, held))  # (1, H, M or S, N, _)
                    held[0, :, slots] = new[0]
        if device.type != "cpu":  # the engine has a stream of its own
            torch.accelerator.current_stream(device).synchronize()

    def condition(
        self, numbers: torch.Tensor, ends: torch.Tensor, positions: torch.Tensor, is_static: bool
    ) -> Conditioning | None:
        """What the gated blocks get in a step; `None` without any picture.

        Args:
            numbers: `(2 * M, R)`, places and slots of the pictures of each request.
            ends: `(R,)`, as for [`attended_slots`].
            positions: `(T,)`, as for [`attended_slots`].
            is_static: Whether every step has to have the same shapes, and so all slots, not only those of its requests.
        """
        places, slots = numbers.chunk(2)
        layers, num_slots = Layers(self.layers), 1 + len(self.slots)
        if not is_static:
            used = torch.cat([slots.new_zeros(1), slots.flatten()]).unique()
            if len(used) == 1:
                return None
            layers, slots, num_slots = self.choose(used), torch.searchsorted(used, slots.contiguous()), len(used)
        mode = self.model.config.media_attention
        seen, has_images = attended_slots(places, slots, ends, positions, mode, num_slots)
        attends = seen.any(dim=1)
        seen = torch.cat([~attends[:, None], seen[:, 1:]], dim=1)
        return Conditioning(
            image_latents=None,
            attends=attends[None, :, None],
            has_images=has_images[None, :, None],
            mask=seen.repeat_interleave(self.num_latents, dim=1)[None, None],
            cache=layers,
            record=Record(),
        )

    def choose(self, used: torch.Tensor) -> Layers:
        """Keys and values of these slots alone; most steps have those of the step before."""
        if self.chosen is None or not torch.equal(self.chosen[0], used):
            of_slots = [
                [x.unflatten(2, (-1, self.num_latents))[:, :, used].flatten(2, 3) for x in layer]
                for layer in self.layers
            ]
            self.chosen = used, Layers([KeysValues(*layer) for layer in of_slots])
        return self.chosen[1]


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
        lines = slice(self.of_pictures), slice(self.of_pictures, self.tensors_required)
        for name, of_name, requests in zip(("pictures", "sampling"), lines, (requests_in_batch, getting), strict=True):
            empty = [0] * len(range(self.tensors_required)[of_name])
            columns = [request.state.logit_processor_kwargs.get(name, empty) for request in requests]
            if columns and empty:
                arg_storage[of_name, : len(columns)] = torch.tensor(columns, dtype=torch.int32).T.to(
                    arg_storage.device
                )
        return arg_storage

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Process the scores `(R, V)` of the next tokens."""
        scores = scores.index_fill(1, self.suppressed, -torch.inf)
        return choose_by(scores, *numbers[self.of_pictures :, : len(scores)]) if self.do_sample else scores


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


class Admission(queue.Queue):
    """Requests in the order in which they came; out come those whose pictures are in the pool.

    Args:
        maxsize: Requests that may wait; 0 for any number.
        admit: Gives the requests that are let in now.
        is_stopping: Whether the engine fails what still waits.
    """

    def __init__(self, maxsize: int, admit: Callable[[], Iterator], is_stopping: Callable[[], bool]):
        super().__init__(maxsize)
        self.admit, self.is_stopping, self.let_in = admit, is_stopping, None

    def empty(self) -> bool:
        """False: the engine, which asks before each step, asks on until `get_nowait` says so."""
        return False

    def get_nowait(self):
        """The next request that is let in, in the engine's thread."""
        if self.is_stopping():
            return super().get_nowait()
        self.let_in = self.let_in or self.admit()
        for request in self.let_in:
            return request
        self.let_in = None
        raise queue.Empty


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
        config: How transformers' engine runs. `allow_block_sharing` is turned off, since it takes tokens alone for a
            prefix. By default on a CPU a small cache, and elsewhere most of the device's memory.
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
        config: ContinuousBatchingConfig | None = None,
        *,
        num_slots: int = 64,
        max_pictures: int = 16,
        do_sample: bool = True,
    ):
        text_model = model.model.text_model
        check_model(model)
        generation_config = suppress_images(generation_config or model.generation_config, model.config)
        settings = generation_config.to_diff_dict()
        suppressed = settings.pop("suppress_tokens", None) or []
        self.settings = check_settings(settings)
        self.config, self.max_pictures, self.do_sample = model.config, max_pictures, do_sample
        self.text_model, self.ids, self.held = text_model, count(), {}
        self.manager = build_manager(text_model, config, do_sample)
        self.pool = PicturePool(model.model, num_slots)
        suppressed = torch.tensor(suppressed, dtype=torch.long, device=text_model.device)
        resolved = self.manager.continuous_batching_config
        compiled = (resolved.varlen_compile_config, resolved.decode_compile_config)
        self.is_static = any(resolved.cuda_graph_booleans) or compiled != (None, None)
        self.manager.logit_processor = RequestNumbers(max_pictures, do_sample, suppressed)
        self.status = self.manager.background_thread_status
        self.requests = Admission(self.manager.input_queue.maxsize, self._admit, self._is_stopping)
        self.manager.input_queue = self.requests

    def __enter__(self) -> "BatchingEngine":
        """Make the cache, capture graphs if there are any, and start the thread that generates."""
        with ExitStack() as stack:
            stack.callback(self.text_model.register_forward_pre_hook(self._condition, with_kwargs=True).remove)
            stack.callback(self.manager.destroy)
            self.manager.warmup()
            stack.callback(self.manager.stop, hard_stop=True)
            cache = self.manager.batch_processor.cache
            self.room = cache.num_blocks * self.manager.continuous_batching_config.page_size
            self.room = min(self.room, getattr(self.config.text_config, "max_position_embeddings", self.room))
            self.manager.start()
            self.on_exit = stack.pop_all()
        return self

    def __exit__(self, *error) -> None:
        """Stop, failing the requests that are under way, and leave the model as it was."""
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
        new_tokens = settings.get("max_new_tokens") or settings.get("max_length", 20 + len(ids)) - len(ids)
        if not 0 < len(ids) <= self.room - new_tokens or new_tokens < 1:
            raise ValueError(
                f"{len(ids)} tokens and {new_tokens} new ones: there is room for 1 to {self.room} in all."
            )
        request_id = self.manager.add_request(
            ids,
            request_id=request_id or f"request-{next(self.ids)}",
            max_new_tokens=new_tokens,
            eos_token_id=settings.get("eos_token_id"),
            streaming=streaming,
            pictures=self._pictures(ids, pixel_values, num_frames),
            sampling=sampling_numbers(settings, self.config.text_config.vocab_size),
            replies=settings.get("num_return_sequences", 1),
        )
        if request_id is None:
            raise RuntimeError(f"The engine has stopped: {self.fatal_error or 'its context was left'}.")
        return request_id

    def cancel_request(self, request_id: str) -> None:
        """End a request and its replies, wherever they are; nothing more is heard of them."""
        with self.requests.mutex:
            waiting = [state for state in self.requests.queue if state.request_id == request_id]
            for state in waiting:
                self.requests.queue.remove(state)
                self.requests.not_full.notify()
        replies = waiting[0].logit_processor_kwargs["replies"] if waiting else self.held.get(request_id, ((), 1))[1]
        for name in (request_id, *(f"{request_id}__child#{number}" for number in range(replies - 1))):
            self.manager.output_router.result_handlers.pop(name, None)
            if not waiting:
                self.manager.cancel_request(name)

    def register_result_handler(self, request_id: str, handle: Callable) -> None:
        """Have results of a request handed to a function, in the running event loop; call it before `add_request`."""
        self.manager.register_result_handler(request_id, handle)

    def get_result(self, timeout: float | None = None):
        """The next result that no handler takes; `None` if there is none in so many seconds, or the engine has stopped.

        It has `request_id`, `generated_tokens` so far, `is_finished()` and `error`.
        """
        return self.manager.get_result(timeout=timeout)

    def __iter__(self) -> Iterator:
        """Results as they come, until the engine stops."""
        return iter(self.manager)

    @property
    def fatal_error(self) -> Exception | None:
        """What ended the engine; `None` while it runs."""
        return self.status.fatal_error

    def _pictures(
        self, ids: list[int], pixel_values: torch.Tensor | None, num_frames: torch.Tensor | None
    ) -> list[Picture]:
        """Look whether ids and pictures agree, and take out those that have an `<image>`."""
        places = [place for place, token in enumerate(ids) if token == self.config.image_token_id]
        if not places:
            return []
        if pixel_values is None or len(places) > min(self.max_pictures, pixel_values.shape[1]):
            given = 0 if pixel_values is None else pixel_values.shape[1]
            raise ValueError(
                f"The request holds {len(places)} <image> tokens, and {given} pictures were given for it: give one for "
                f"each, and at most {self.max_pictures}."
            )
        check_pixels(pixel_values, self.config.vision_config.image_size, [ids])
        sizes, pictures = self.config.resampler, []
        for number, place in enumerate(places):
            pixels = pixel_values[0, number] if pixel_values.dim() == 6 else pixel_values[0, number, None]
            pixels = pixels if num_frames is None else pixels[: int(num_frames[0, number])]
            for what, found in (("frames", len(pixels)), ("images", len(places))):
                if found > (sizes[f"max_num_{what}"] or found):
                    raise ValueError(f"Got {found} {what}, and the model takes {sizes[f'max_num_{what}']}.")
            key = (hashlib.blake2b(pixels.contiguous().view(torch.uint8).cpu().numpy()).digest(), len(pixels))
            # Where its place tells, or both of two same pictures are attended to, they are not the same.
            if sizes["max_num_images"] is not None:
                key += (number,)
            elif self.config.media_attention == "all_preceding":
                key += (sum(picture.key[:2] == key for picture in pictures),)
            pictures.append(Picture(key, place, number + 1, pixels))
        return pictures

    def _is_stopping(self) -> bool:
        return self.status.local_status >= self.status.HARD_STOP

    def _admit(self) -> Iterator:
        """Let in the requests whose pictures have a slot, in the engine's thread between two steps."""
        if not self.requests.queue:
            return iter(())
        scheduler = self.manager.batch_processor.scheduler
        running = {name.partition("__child#")[0] for name in (*scheduler.active_requests, *scheduler.waiting_requests)}
        self.held = {name: held for name, held in self.held.items() if name in running}
        in_use = {key for keys, _ in self.held.values() for key in keys}
        let_in, new = [], {}
        with self.requests.mutex:
            while self.requests.queue and len(new) < ENCODED_AT_ONCE:
                state = self.requests.queue[0]
                pictures, replies = (state.logit_processor_kwargs[name] for name in ("pictures", "replies"))
                added = self.pool.reserve(pictures, in_use)
                if added is None:
                    break
                self.requests.queue.popleft()
                self.requests.not_full.notify()
                new |= added
                keys = {picture.key for picture in pictures}
                in_use |= keys
                self.held[state.request_id] = keys, replies
                slots, padding = (
                    [self.pool.slots[picture.key] for picture in pictures],
                    self.max_pictures - len(pictures),
                )
                numbers = [*(picture.place for picture in pictures), *[0] * padding, *slots, *[0] * padding]
                state.num_children = replies - 1
                state.logit_processor_kwargs |= {"pictures": numbers}
                let_in.append(state)
        try:
            self.pool.encode(new.values())
        except Exception as error:  # such as too little memory: the requests under way go on
            self.pool.forget(new)
            failed = [state for state in let_in if not new.keys().isdisjoint(self.held[state.request_id][0])]
            for state in failed:
                self.manager.output_router.fail_and_deliver(state, error)
            let_in = [state for state in let_in if state not in failed]
        return iter(let_in)

    def _condition(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Hand the gated blocks what they need in a step of the engine; other calls of the LM stay as they are."""
        if "logits_processor_args" not in kwargs:
            return None
        numbers = kwargs["logits_processor_args"][: 2 * self.max_pictures]
        ends, positions = kwargs["cu_seq_lens_q"][1:], kwargs["position_ids"][0]
        conditioning = self.pool.condition(numbers, ends, positions, self.is_static)
        return args, kwargs if conditioning is None else {**kwargs, "conditioning": conditioning}


def check_model(model: PreTrainedModel) -> None:
    """Look whether transformers' engine can run a model's LM.

    Raises:
        ValueError: If it cannot; some families would raise, some would be wrong in silence.
    """
    text_model = model.model.text_model
    if not text_model._supports_attention_backend:
        raise ValueError(
            f"{type(text_model).__name__} cannot be batched continuously: its attention knows nothing of a paged cache."
            " Call `generate()`, whose rows are padded."
        )
    if len(places := set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise ValueError(f"Continuous batching takes a model on one device, and this one is on {places}.")


def check_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Take out the settings of `generate()` that are honoured; those that are `None` are left to the defaults.

    Raises:
        ValueError: If others are set, with their names.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    unknown = given.keys() - {*HONOURED, *WITHOUT_EFFECT}
    refused = {n: given[n] for n in unknown if given[n] not in (False, NEUTRAL.get(n)) and not n.startswith("_")}
    if refused:
        raise ValueError(
            f"Continuous batching does not honour {refused}: leave them out, or call `generate()`. It knows "
            f"{', '.join(HONOURED)}."
        )
    return {name: value for name, value in given.items() if name in HONOURED}


def build_manager(text_model: PreTrainedModel, config: ContinuousBatchingConfig | None, do_sample: bool):
    """Make transformers' own manager, for the bare LM.

    Raises:
        ImportError: If it is not there, or is another than the one that this file knows.
    """
    from transformers import ContinuousBatchingManager

    if config is None:
        on_cpu = {"page_size": 32, "num_blocks": 512, "max_batch_tokens": 1024}  # else it takes 60 % of the memory
        config = ContinuousBatchingConfig(**(on_cpu if text_model.device.type == "cpu" else {}))
    config = copy.copy(config)
    config.allow_block_sharing = False
    manager = ContinuousBatchingManager(text_model, GenerationConfig(do_sample=do_sample), config)
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
    results, names = {}, []

    def collect(timeout: float | None) -> None:
        result = engine.get_result(timeout)
        if result is not None and result.error is not None or engine.fatal_error is not None:
            raise RuntimeError(f"A request failed: {result.error if result else engine.fatal_error}")
        if result is not None:
            results[result.request_id] = result

    with BatchingEngine(model, generation_config, **options) as engine:
        for request in requests:
            while engine.requests.qsize() > 2 * ENCODED_AT_ONCE:
                collect(timeout=0.1)
            name = engine.add_request(**request)
            replies = engine.settings | request
            names += [name, *(f"{name}__child#{k}" for k in range((replies.get("num_return_sequences") or 1) - 1))]
        while len(results) < len(names):
            collect(timeout=0.1)
    return [results[name] for name in names]

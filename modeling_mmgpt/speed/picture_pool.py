"""Keys and values of pictures that many requests share, and which of them a token of a packed row attends to."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from ..conditioning_mmgpt import decoder_layers
from ..cross_attention_mmgpt import Conditioning, Record


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
        Bool `(T, S)`, true where attended; and bool `(T,)`, whether the request has any picture.
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
        max_pictures: Pictures of a request at most.
    """

    def __init__(self, model: nn.Module, num_slots: int, max_pictures: int):
        self.model, self.max_pictures, config = model, min(max_pictures, num_slots), model.config
        layers = decoder_layers(model.text_model)
        self.blocks = [layer.gated_cross_attn_layer for layer in layers if layer.gated_cross_attn_layer is not None]
        self.num_latents, sizes = config.resampler["num_latents"], config.cross_attention
        shape = (1, sizes["num_heads"], (1 + num_slots) * self.num_latents, sizes["head_dim"])
        latents = model.resampler.latents
        self.layers = [KeysValues(latents.new_zeros(shape), latents.new_zeros(shape)) for _ in self.blocks]
        self.chosen: tuple[torch.Tensor, Layers] | None = None
        self.decoded: tuple[torch.Tensor, Conditioning] | None = None  # of the last step that only added tokens
        self.slots: OrderedDict[Any, int] = OrderedDict((slot, slot) for slot in range(1, 1 + num_slots))
        self.vocabulary = model.get_input_embeddings().num_embeddings
        self.marks: dict[tuple, int] = {}  # what makes equal tokens unlike, numbered from 2
        self.asked = self.encoded = 0  # pictures of all requests, and those that were not there yet

    def find_pictures(
        self, ids: list[int], pixel_values: torch.Tensor | None, num_frames: torch.Tensor | None
    ) -> list[Picture]:
        """Take out the pictures of a request that have an `<image>`; arguments as of [`BatchingEngine.add_request`].

        Raises:
            ValueError: If ids and pictures do not agree, or the model takes no such pictures.
        """
        places = [place for place, token in enumerate(ids) if token == self.model.config.image_token_id]
        if not places:
            return []
        if pixel_values is None or len(places) > min(self.max_pictures, pixel_values.shape[1]):
            given = 0 if pixel_values is None else pixel_values.shape[1]
            raise ValueError(
                f"The request holds {len(places)} <image> tokens, and {given} pictures were given for it: give one "
                f"for each, and at most {self.max_pictures}."
            )
        self.model.check_pixels(pixel_values, [ids])
        sizes, pictures = self.model.config.resampler, []
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
            elif self.model.config.media_attention == "all_preceding":
                key += (sum(picture.key[:2] == key for picture in pictures),)
            pictures.append(Picture(key, place, number + 1, pixels))
        return pictures

    def numbers(self, pictures: list[Picture]) -> torch.Tensor:
        """Places and slots of the pictures of a request, as [`PicturePool.condition`] takes them."""
        numbers = torch.zeros(2, self.max_pictures, dtype=torch.int32)
        for number, picture in enumerate(pictures):
            numbers[0, number], numbers[1, number] = picture.place, self.slots[picture.key]
        return numbers.flatten()

    def mark(self, ids: list[int], pictures: list[Picture]) -> list[int]:
        """Make ids unlike where what the LM makes of them is unlike, so that the engine finds equal prompts.

        An `<image>` tells its picture, and the first token whether there is any, or in `following`, where tokens look
        ahead, which there are. `id % V` is the id.
        """

        def number(of: tuple) -> int:
            return self.marks.setdefault(of, 2 + len(self.marks))

        marked, is_following = list(ids), self.model.config.media_attention == "following"
        if pictures:
            marked[0] += self.vocabulary * (number(tuple(p.key for p in pictures)) if is_following else 1)
        for picture in pictures if not is_following else ():
            marked[picture.place] = ids[picture.place] + self.vocabulary * number(picture.key)
        return marked

    @property
    def has_marks(self) -> bool:
        """Whether a request of `max_pictures` new pictures can be marked; marked ids are of 32 bits."""
        return self.vocabulary * (3 + len(self.marks) + self.max_pictures) < 2**31

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
        device, self.chosen, self.decoded = self.layers[0].keys.device, None, None
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
            numbers: `(2 * M, R)`, places and slots of the pictures of each request; what follows is not read.
            ends: `(R,)`, as for [`attended_slots`].
            positions: `(T,)`, as for [`attended_slots`].
            is_static: Whether all slots have to be there, for every step to have the same shapes.
        """
        numbers = numbers[: 2 * self.max_pictures]
        places, slots = numbers.chunk(2)
        is_repeatable = not is_static and len(positions) == len(ends) and bool((places < positions).all())
        if not is_static:
            if not slots.any():
                return None
            if is_repeatable and self.decoded is not None and torch.equal(self.decoded[0], numbers):
                return Conditioning(*self.decoded[1][:-1], record=Record())
        mode = self.model.config.media_attention
        seen, has_images = attended_slots(places, slots, ends, positions, mode, 1 + len(self.slots))
        attends, layers = seen.any(dim=1), Layers(self.layers)
        seen = torch.cat([~attends[:, None], seen[:, 1:]], dim=1)
        if not is_static:
            used = seen.any(dim=0).nonzero()[:, 0]
            seen, layers = seen[:, used], self.choose(used)
        conditioning = Conditioning(
            image_latents=None,
            attends=attends[None, :, None],
            has_images=has_images[None, :, None],
            mask=seen.repeat_interleave(self.num_latents, dim=1)[None, None],
            cache=layers,
            record=Record(),
        )
        if is_repeatable:  # behind all their pictures, requests go on seeing them
            self.decoded = numbers.clone(), conditioning
        return conditioning

    def choose(self, used: torch.Tensor) -> Layers:
        """Keys and values of these slots alone; most steps have those of the step before."""
        if self.chosen is None or not torch.equal(self.chosen[0], used):
            of_slots = [
                [x.unflatten(2, (-1, self.num_latents))[:, :, used].flatten(2, 3) for x in layer]
                for layer in self.layers
            ]
            self.chosen = used, Layers([KeysValues(*layer) for layer in of_slots])
        return self.chosen[1]

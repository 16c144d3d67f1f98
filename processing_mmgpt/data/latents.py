"""Latents: the output of frozen parts for each picture of a mixture, stored on the disk.

Where vision tower and resampler are not trained, a picture's latents never change. So each picture is opened, encoded
and resampled once, before training. Records then hold its latents, mapped into memory from tables in the cache of
`datasets`, which all processes and workers share. A table gets its name when it is complete, and the name holds all
that its latents depend on, so latents of something that has changed are never found, and are computed again.
"""

import hashlib
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from safetensors.torch import load, save
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from ..image_files_mmgpt import ImageError, shorten
from ..image_processing_mmgpt import MMGPTImageProcessor
from ..messages_mmgpt import Latents, Video
from .kept import open_table, table_folder
from .reading import BLANK, Reading


FORMAT = "1"  # to be raised where pixels are made in another way: latents of others are not used
IMAGES_PER_TABLE = 2_048  # what a killed run loses at most, and what is made anew where one picture has changed
IMAGES_PER_BATCH = 32
COLUMNS = datasets.Features(
    {"latents": datasets.Value("binary"), "checksum": datasets.Value("int64"), "problem": datasets.Value("string")}
)
NAME = "mmgpt_latents"

Place = tuple[str, int, int] | None  # source, row, number of the picture in it; `None` is the black picture
Encode = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


def keep_latents(
    data: datasets.Dataset,
    image_processor: MMGPTImageProcessor,
    encode: Encode,
    fingerprint: str,
    num_workers: int = 0,
) -> datasets.Dataset:
    """Put latents in place of the images of a mixture's records; missing ones are computed first.

    Every process of a run calls this; they share the work. The rows, their order and their draws stay, and so do
    the policies: a picture that cannot be read is noted in the table, and is skipped, replaced or an error when its
    row is read; with `on_bad_image: raise` it is an error at once. The policy also covers two things that end a run
    without latents: videos, and pictures too long and thin to be resized.

    Args:
        data: From [`~processing_mmgpt.data.mixture.load_instruction_dataset`], not streamed, or rows of it.
        image_processor: Turns pictures into pixels.
        encode: `pixel_values` `(B, M, F, 3, size, size)` and `num_frames` `(B, M)` to `(B, M, N, D_vision)`, as
            [`~modeling_mmgpt.training.latents.frozen_encoder`] makes it.
        fingerprint: What `encode` depends on, by the same.
        num_workers: Worker processes that open pictures.

    Returns:
        The same rows; an image of a record is [`~processing_mmgpt.messages_mmgpt.Latents`].

    Raises:
        ValueError: If `data` is streamed or not a mixture, or on a picture that cannot be read.
    """
    reading = data.format["format_kwargs"].get("transform") if isinstance(data, datasets.Dataset) else None
    if not isinstance(reading, Reading):
        raise ValueError("Latents are kept for a mixture on the disk: not for a stream, nor for another dataset.")
    places = _find_images(reading)
    keys, size = list(places), IMAGES_PER_TABLE
    tables = [{key: places[key] for key in keys[start : start + size]} for start in range(0, len(keys), size)]
    fingerprint = f"{fingerprint} {image_processor.to_json_string()} {FORMAT}"
    make = partial(_open_table, reading, image_processor, encode, fingerprint, num_workers)
    state = PartialState()
    first = state.process_index * len(tables) // state.num_processes
    for own in tables[first:] + tables[:first]:  # each process begins elsewhere, and waits where another is at work
        make(own)
    table = datasets.concatenate_datasets([make(own) for own in tables])
    index = np.array(keys, dtype="S64")  # a dict of a million would be copied into every worker
    order = np.argsort(index)
    folders = [table_folder(NAME, fingerprint, *own) for own in tables]
    return data.with_transform(replace(reading, open=partial(_look_up, table, folders, index[order], order)))


def image_key(image: Any) -> str:
    """Identify a picture or a video: a file by its path, size and time of last change, else by its bytes.

    Returns:
        64 digits.

    Raises:
        OSError: If there is no such file.
    """
    if isinstance(image, Video):
        image = f"data:video {image_key(image.source)}"
    elif isinstance(image, list | tuple):
        image = f"data:frames {' '.join(map(image_key, image))}"
    elif isinstance(image, Image.Image):
        image = f"{image.mode} {image.size}".encode() + image.tobytes()
    elif isinstance(image, str) and not image.startswith("data:"):
        status = os.stat(image)
        image = f"{os.path.abspath(image)} {status.st_size} {status.st_mtime_ns}"
    return hashlib.sha256(image.encode() if isinstance(image, str) else image).hexdigest()


def _find_images(reading: Reading) -> dict[str, Place]:
    """Find the first place of each picture of all sources, in their order; none is opened."""
    places: dict[str, Place] = {image_key(Image.new("RGB", BLANK)): None}
    for name, rows in reading.parts.items():
        if reading.sources[name].has_images(rows.column_names):
            for number, row in enumerate(rows):
                for image, key in _keys(reading, row):
                    places.setdefault(key, (name, number, image))
    return places


def _keys(reading: Reading, row: dict[str, Any]) -> Iterator[tuple[int, str]]:
    """Number and key of each image of a row that is there; what is missing is logged when the row is read."""
    try:
        images = reading.record(row)["images"]
    except ValueError:
        if reading.mixture.on_bad_record == "raise":
            raise
        return
    for number, image in enumerate(images):
        try:
            yield number, image_key(image)
        except OSError as error:
            if reading.mixture.on_bad_image == "raise":
                raise ValueError(f"A picture of {row['source']!r} is missing: {error.filename or image}") from error


def _open_table(
    reading: Reading,
    image_processor: MMGPTImageProcessor,
    encode: Encode,
    fingerprint: str,
    num_workers: int,
    places: dict[str, Place],
) -> datasets.Dataset:
    """Open the table of some pictures; the first process that needs it makes it."""
    folder = table_folder(NAME, fingerprint, *places)
    rows = partial(_make_rows, reading, image_processor, encode, num_workers, list(places.values()))

    def prepare() -> datasets.Dataset:
        given = {"cache_dir": str(folder), "fingerprint": folder.name, "dataset_name": NAME}
        table = datasets.Dataset.from_generator(rows, COLUMNS, **given)
        table.data.validate(full=True)  # no row begins or ends outside
        return table

    return open_table(folder, prepare, check_rows=False)  # of gigabytes each row is checked when it is read


def _make_rows(
    reading: Reading, image_processor: MMGPTImageProcessor, encode: Encode, num_workers: int, places: list[Place]
) -> Iterator[dict[str, Any]]:
    loaded = partial(_load, reading, image_processor)
    own = torch.Generator()  # the training goes on with the random numbers that it would have drawn
    for images in DataLoader(places, IMAGES_PER_BATCH, collate_fn=loaded, num_workers=num_workers, generator=own):
        frames = [one for one in images if isinstance(one, torch.Tensor)]  # each (F, 3, size, size)
        latents = iter(_encode(encode, frames) if frames else ())
        for one in images:
            problem = one if isinstance(one, str) else None
            kept = save({"latents": next(latents)}) if problem is None else None
            yield {"latents": kept, "checksum": zlib.crc32(kept or problem.encode()), "problem": problem}


def _encode(encode: Encode, frames: list[torch.Tensor]) -> torch.Tensor:
    """Encode pictures and videos, each `(F, 3, size, size)`, to `(K, N, D_vision)`."""
    num_frames = torch.tensor([[len(one)] for one in frames])  # (K, 1)
    pixel_values = pad_sequence(frames, batch_first=True)[:, None]  # (K, 1, F, 3, size, size)
    return encode(pixel_values, num_frames if num_frames.max() > 1 else None)[:, 0].cpu()


def _load(reading: Reading, image_processor: MMGPTImageProcessor, places: list[Place]) -> list[torch.Tensor | str]:
    """Open pictures: the frames `(F, 3, size, size)` of each, or what is wrong with it."""
    loaded: list[torch.Tensor | str] = []
    for place in places:
        try:
            image = Image.new("RGB", BLANK)
            if place is not None:
                name, row, number = place
                image = reading.record(reading.parts[name][row])["images"][number]
            loaded.append(image_processor.frames(image))
        except (OSError, TypeError, ValueError) as error:
            if reading.mixture.on_bad_image == "raise":
                raise ValueError(f"A picture of {name!r} cannot be read: {error}") from error
            loaded.append(str(error))
    return loaded


def _look_up(
    table: datasets.Dataset, folders: list[Path], index: np.ndarray, order: np.ndarray, image: Any
) -> Latents:
    """Return the latents of a picture, or raise the error of opening it."""
    key = image_key(image).encode()
    at = np.searchsorted(index, key)
    if at == len(index) or index[at] != key:
        raise RuntimeError(f"{shorten(str(image))} has changed while the run goes on: start it again.")
    kept = table[int(order[at])]
    if kept["checksum"] != zlib.crc32(kept["latents"] or (kept["problem"] or "").encode()):
        folder = folders[int(order[at]) // IMAGES_PER_TABLE]
        raise RuntimeError(f"Latents that were kept are spoiled: delete {folder}, and they are made anew.")
    if kept["problem"] is not None:
        raise ImageError(kept["problem"])
    return Latents(load(kept["latents"])["latents"])

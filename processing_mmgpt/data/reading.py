"""Read a row of a mixture into a conversation when it is needed, and handle a damaged one."""

import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import datasets
from PIL import Image

from ..image_files_mmgpt import open_image
from ..messages_mmgpt import Video
from .annotations import TOO_DEEP, is_lines, read_record
from .recipe import Mixture, Source
from .skip_log import log_skip


Rows = datasets.Dataset | datasets.IterableDataset

BLANK = (224, 224)  # size of the black picture in place of one that cannot be read
TRIES = 1_000  # rows of a source that are tried in place of one whose picture cannot be read


@dataclass
class Reading:
    """Read rows of a mixture when they are needed: the transform of its dataset.

    Args:
        mixture: The sources, and what to do about bad rows.
        seed: Seed of the readers' draws.
        parts: The rows of each source, out of which a bad row is replaced; empty in a streamed mixture.
        open: Called with each image, black ones too, for what goes into the record, as
            [`~processing_mmgpt.data.latents.keep_latents`] does; by default images stay as `on_bad_image` needs them.
            An error of it counts as an image that cannot be read.
    """

    mixture: Mixture
    seed: int
    parts: dict[str, Rows]
    open: Callable[[Any], Any] | None = None

    def __post_init__(self):
        self.sources = {source.name: source for source in self.mixture.sources}

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        """Read a batch of rows."""
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        records = [record for row in rows if (record := self._read_or_replace(row)) is not None]
        return {key: [record[key] for record in records] for key in ("messages", "images")}

    def _read_or_replace(self, row: dict[str, Any]) -> dict[str, list] | None:
        record = self._read(row)
        if record is not None or not self.parts:
            return record
        part, rng = self.parts[row["source"]], self._rng(row, "in its place")
        for _ in range(TRIES):
            if (record := self._read(part[rng.randrange(len(part))])) is not None:
                return record
        raise ValueError(f"{TRIES} rows of the source {row['source']!r} were tried, and none of them can be read.")

    def _read(self, row: dict[str, Any]) -> dict[str, list] | None:
        """Read one row; `None` if it is to be skipped, which is logged."""
        try:
            record = self.record(row)
        except ValueError as error:
            self._raise_or_log(row, str(error), self.mixture.on_bad_record)
            return None
        images = []
        for image in record["images"]:
            try:
                images.append(self.image(image))
            except ValueError as error:
                self._raise_or_log(row, str(error), self.mixture.on_bad_image)
                if self.mixture.on_bad_image == "skip":
                    return None
                images.append(self.image(Image.new("RGB", BLANK)))
        return {**record, "images": images}

    def record(self, row: dict[str, Any]) -> dict[str, list]:
        """The messages and the images of a row; no image is opened.

        Raises:
            ValueError: If it cannot be read, as "reason" or "reason: details".
        """
        if row.get("problem"):  # streamed: nobody has looked at it before
            raise ValueError(row["problem"])
        source = self.sources[row["source"]]
        try:
            given = json.loads(row["record"]) if row.get("record") is not None else row
        except RecursionError:  # it was read before, from a lower frame
            raise ValueError(TOO_DEEP) from None
        return read_record(given, source.reader, source.image_root, self._rng(row))

    def image(self, image: Any) -> Any:
        """What goes into the record for an image.

        Raises:
            ValueError: If it cannot be read, as "reason: details".
        """
        try:
            return self._as_needed(image) if self.open is None else self.open(image)
        except FileNotFoundError as error:
            raise ValueError(f"The picture is missing: {error.filename or image}") from error
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(f"The picture cannot be read: {error}") from error

    def _as_needed(self, image: Any) -> Any:
        """Open an image if a bad one shall not raise; a missing file is noticed in any case."""
        if isinstance(image, Video | list):
            return image  # a video, which no policy is for: whoever makes pixels of it opens it
        if self.mixture.on_bad_image != "raise":
            return open_image(image)
        if isinstance(image, str) and not image.startswith("data:") and not os.path.isfile(image):
            raise FileNotFoundError(image)
        return image  # whoever makes pixels of it opens it

    def _rng(self, row: dict[str, Any], purpose: str = "") -> random.Random:
        return random.Random(f"{self.seed}/{row['source']}/{row['file']}/{row['row']}/{purpose}")

    def _raise_or_log(self, row: dict[str, Any], problem: str, policy: str) -> None:
        source = self.sources[row["source"]]
        if policy == "raise":
            raise ValueError(f"{place(source, row)}: {problem}")
        log_skip(self.mixture.skip_log, source.name, place(source, row), problem)


def place(source: Source, row: dict[str, Any]) -> str:
    """Describe where a row of a source is found."""
    if source.dataset is not None:
        return f"{source.dataset}, row {row['row']}"
    path = source.files[row["file"]]
    return f"{path}, line {row['row'] + 1}" if is_lines(path) else f"{path}, record {row['row']}, from 0"

"""Mixtures: many annotation files, named in one YAML file, become one dataset of conversations."""

import os
from functools import partial
from typing import Any

import datasets
import numpy as np

from .reading import Reading, Rows, place
from .recipe import Mixture, Source, read_mixture
from .skip_log import log_skip
from .tables import COLUMNS, open_annotations


BUFFER = 10_000  # rows that a streamed mixture is shuffled over


def load_instruction_dataset(
    mixture: str | os.PathLike | dict[str, Any] | Mixture, seed: int = 0
) -> datasets.Dataset | datasets.IterableDataset:
    """Open a mixture.

    Annotation files are written once into tables in the cache of `datasets`, and every record is checked. Pictures are
    opened, and random choices are drawn, when a row is read. A draw depends on the seed and the place of the record in
    its file only, so it is the same for any number of workers and processes.

    Args:
        mixture: A YAML file or its contents; its keys are the fields of [`~processing_mmgpt.data.recipe.Mixture`]
            and [`~processing_mmgpt.data.recipe.Source`]. A JSONL file is a
            mixture of one source with the reader `"messages"`, whose pictures are paths relative to the file.
        seed: Seed of the order, the choice of rows and the draws of the readers.

    Returns:
        A dataset of `{"messages": [...], "images": [...]}`, in the order to train in. An image is a path, or an
        opened picture where `on_bad_image` needs it. With streaming, an `IterableDataset`.

    Raises:
        FileNotFoundError: If a file or an image root is not there.
        ValueError: On an unknown key or reader, an empty source, weights that do not sum to 1, and, unless they are to
            be skipped, a record that cannot be read: with the file, the number of the record, and what is wrong.
    """
    mixture = read_mixture(mixture)
    parts = {source.name: _take(open_source(source, mixture), source, mixture, seed) for source in mixture.sources}
    if mixture.image_text_ratio is None:
        rows = _mix(mixture.sources, parts, mixture, seed)
    else:
        rows = _take_turns(mixture.image_text_ratio, *_both(parts, mixture, seed), seed)
    reading = Reading(mixture, seed, {} if mixture.streaming else parts)
    if mixture.streaming:
        return rows.map(reading, batched=True, batch_size=1, remove_columns=rows.column_names)
    return rows.with_transform(reading)


# From files to rows


def open_source(source: Source, mixture: Mixture) -> Rows:
    """Open all rows of a source, including those that cannot be read: `problem` says why."""
    if source.dataset is None:
        kept = (source.annotations, source.reader, source.image_root, source.where, mixture.streaming)
        return open_annotations(source.name, source.files, *kept)
    rows = datasets.load_dataset(
        source.dataset, split=source.split, revision=source.revision, streaming=mixture.streaming
    )
    columns = [name for name in ("messages", "images") if name in (rows.column_names or [])]
    if "messages" not in columns:  # a stream of JSON does not know its columns in advance; Parquet does
        raise ValueError(f"The dataset of {source.name!r} needs a column `messages`; it has {rows.column_names}.")
    rows = rows.select_columns(columns)
    # Without what a file says that pictures are, `datasets` opens none, wherever it leads.
    rows = rows.cast(datasets.Features.from_arrow_schema(rows.features.arrow_schema.remove_metadata()))
    features = datasets.Features({name: COLUMNS[name] for name in ("source", "file", "row")})
    if mixture.streaming:
        features = datasets.Features({**rows.features, **features})
        return rows.map(partial(_number, source.name), with_indices=True, features=features)
    numbers = datasets.Dataset.from_dict(
        {"source": [source.name] * len(rows), "file": [0] * len(rows), "row": range(len(rows))}, features=features
    )
    return datasets.concatenate_datasets([rows, numbers], axis=1)


def _number(name: str, row: dict, number: int) -> dict:
    return {**row, "source": name, "file": 0, "row": number}


def _take(rows: Rows, source: Source, mixture: Mixture, seed: int) -> Rows:
    """Leave out what cannot be read, and take as many rows as wanted."""
    if mixture.streaming:
        if next(iter(rows), None) is None:
            raise ValueError(f"The source {source.name!r} is empty.")
        return rows if source.count is None else _shuffled(rows, seed).take(source.count)
    if "problem" in rows.column_names:
        rows = _without_problems(rows, source, mixture)
    if len(rows) == 0:
        raise ValueError(f"The source {source.name!r} is empty: {source.dataset or source.files}")
    if source.count is None or source.count >= len(rows):
        return rows
    return _shuffled(rows, seed).select(range(source.count))


def _without_problems(rows: datasets.Dataset, source: Source, mixture: Mixture) -> datasets.Dataset:
    valid = rows.data.column("problem").is_null().to_numpy()
    bad = np.flatnonzero(~valid)
    if len(bad) == 0:
        return rows
    if mixture.on_bad_record == "raise":
        first = rows[int(bad[0])]
        raise ValueError(
            f"{place(source, first)}: {first['problem']} ({len(bad)} of {len(rows)} records of {source.name!r} "
            "cannot be read; `on_bad_record: skip` leaves them out.)"
        )
    for row in rows.select(bad).select_columns(["file", "row", "problem"]):
        log_skip(mixture.skip_log, source.name, place(source, row), row["problem"])
    return rows.select(np.flatnonzero(valid))


# From rows to the order of a training


def _mix(sources: list[Source], parts: dict[str, Rows], mixture: Mixture, seed: int) -> Rows:
    """Mix by weight, or without any, all rows."""
    rows = [parts[source.name] for source in sources]
    weights = [source.weight for source in sources]
    if weights[0] is not None:
        rows = [_shuffled(part, seed) for part in rows]
        stop = mixture.stopping_strategy
        return datasets.interleave_datasets(rows, probabilities=weights, seed=seed, stopping_strategy=stop)
    if mixture.streaming:  # one after the other, a buffer would hold rows of one source only
        rows = [datasets.interleave_datasets(rows, stopping_strategy="all_exhausted_without_replacement")]
    rows = datasets.concatenate_datasets(rows)
    return _shuffled(rows, seed)


def _shuffled(rows: Rows, seed: int) -> Rows:
    if isinstance(rows, datasets.IterableDataset):
        return rows.shuffle(seed, buffer_size=BUFFER)
    return rows.shuffle(seed, keep_in_memory=True)  # 8 bytes a row; on the disk nobody would see what spoils them


def _both(parts: dict[str, Rows], mixture: Mixture, seed: int) -> list[Rows]:
    """Mix the sources with pictures, and those of text alone."""
    mixed = []
    for kind, what in ((True, "with pictures"), (False, "of text alone")):
        sources = [one for one in mixture.sources if one.has_images(parts[one.name].column_names) is kind]
        if not sources:
            raise ValueError(f"`image_text_ratio` needs sources of both kinds; there is none {what}.")
        mixed.append(_mix(sources, parts, mixture, seed))
    return mixed


def _take_turns(ratio: tuple[int, int], images: Rows, texts: Rows, seed: int) -> Rows:
    """Alternate rows of both kinds; those with pictures come once each, the others as often as needed."""
    share = ratio[0] / sum(ratio)
    if isinstance(images, datasets.IterableDataset):
        probabilities = None if share == 0.5 else [share, 1 - share]  # in strict alternation, or on average
        both = [images, texts.repeat(None)]
        return datasets.interleave_datasets(both, probabilities, seed, stopping_strategy="first_exhausted")
    count = max(1, round(len(images) * ratio[1] / ratio[0]))
    rounds = [_shuffled(texts, seed + number) for number in range(-(-count // len(texts)))]
    texts = datasets.concatenate_datasets(rounds).select(range(count))
    # Row k of n stands at (k + 1/2) / n of the way.
    places = np.concatenate([(np.arange(len(rows)) + 0.5) / len(rows) for rows in (images, texts)])
    return datasets.concatenate_datasets([images, texts]).select(np.argsort(places, kind="stable"))

"""Mixtures: many annotation files, named in one YAML file, to one dataset of conversations."""

import difflib
import json
import os
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import yaml
from PIL import Image

from ..image_files_mmgpt import open_image
from ..messages_mmgpt import Video
from .annotations import MESSAGES, is_lines, read_record
from .readers import READERS, TEXT_READERS
from .skip_log import log_skip
from .tables import COLUMNS, open_annotations


Rows = datasets.Dataset | datasets.IterableDataset

BUFFER = 10_000  # rows that a streamed mixture is shuffled over
BLANK = (224, 224)  # size of the black picture that stands for one that cannot be read
TRIES = 1_000  # rows of a source that are tried in place of one whose picture cannot be read
POLICIES = {"on_bad_record": ("raise", "skip"), "on_bad_image": ("raise", "skip", "blank")}


@dataclass(frozen=True)
class Source:
    """One source of a mixture.

    Args:
        reader: A name of `READERS`, or `"messages"` for records `{"messages": [...], "images": [...]}`.
        files: Annotation files: JSONL, a JSON list, or the document in which the data are published. Several streams
            (workers, processes) need several files.
        annotations: For the official form of VQA and OK-VQA, the answers to the questions in `files`, in their order.
        image_root: The folder that the paths of pictures start from and may not leave.
        dataset: In place of `files`, a Hub id or a folder for `datasets.load_dataset`, with columns `messages` and,
            if it has pictures, `images`.
        split: The split of `dataset`.
        revision: The revision of `dataset`.
        where: Fields and the values that records to be kept have in them, such as `{"split": 1}` for OCR-VQA.
        count: So many rows, drawn without replacement; by default, and if there are fewer, all.
        weight: The share of the source in the mixture, or with a ratio, among the sources of its kind.
        name: What the source is called in messages; by default after its reader.
    """

    reader: str
    files: list[str] = field(default_factory=list)
    annotations: list[str] = field(default_factory=list)
    image_root: str | None = None
    dataset: str | None = None
    split: str = "train"
    revision: str | None = None
    where: dict[str, Any] = field(default_factory=dict)
    count: int | None = None
    weight: float | None = None
    name: str = ""


@dataclass(frozen=True)
class Mixture:
    """A mixture, as its YAML file says it.

    Args:
        sources: The sources.
        root: The folder that relative paths in the file start from; by default the working folder.
        image_text_ratio: Such as `"1:1"` (in quotes: YAML takes 1:1 for a number). Rows with pictures and rows without
            take turns in it. Each row with pictures comes once; rows of text are repeated, or left out, to fit.
        streaming: Read while training, for what does not fit on the disk twice. Rows are shuffled over a buffer only.
        stopping_strategy: With weights, when a dataset ends; see `datasets.interleave_datasets`.
        on_bad_record: What to do about a record that lacks something: `"raise"` or `"skip"`.
        on_bad_image: What to do about a picture that is missing or broken: `"raise"`, `"skip"`: another row of the
            source stands in (streamed: the row is left out), or `"blank"`: a black picture stands in.
        skip_log: The file that names each row which was skipped or got a black picture; see `skip_log.count_skips`.
    """

    sources: list[Source]
    root: str = ""
    image_text_ratio: str | None = None
    streaming: bool = False
    stopping_strategy: str = "all_exhausted"
    on_bad_record: Literal["raise", "skip"] = "raise"
    on_bad_image: Literal["raise", "skip", "blank"] = "raise"
    skip_log: str | None = None


def load_instruction_dataset(
    mixture: str | os.PathLike | dict[str, Any] | Mixture, seed: int = 0
) -> datasets.Dataset | datasets.IterableDataset:
    """Open a mixture.

    Annotation files are brought once into tables on the disk, in the cache of `datasets`; there every record is
    checked. Pictures are opened, and what is random is drawn, when a row is read. What is drawn depends on the seed
    and the place of the record in its file only, so it is the same for any number of workers and processes.

    Args:
        mixture: A YAML file or its contents; its keys are the fields of `Mixture` and `Source`. A JSONL file stands
            for a mixture of one source with the reader `"messages"`, whose pictures are paths relative to the file.
        seed: What the order, the choice of rows and the draws of the readers come from.

    Returns:
        A dataset of `{"messages": [...], "images": [...]}`, in the order to train in. An image is a path, or a picture
        where `on_bad_image` made it necessary to open it. If the mixture says streaming, an `IterableDataset`.

    Raises:
        FileNotFoundError: If a file or an image root is not there.
        ValueError: On an unknown key or reader, an empty source, weights that do not sum to 1, and, unless they are to
            be skipped, a record that cannot be read: with the file, the number of the record, and what is wrong.
    """
    mixture = read_mixture(mixture)
    parts = {source.name: _take(open_source(source, mixture), source, mixture, seed) for source in mixture.sources}
    kinds: dict[bool, list[Source]] = {}
    for source in mixture.sources:
        kinds.setdefault(has_pictures(source, parts[source.name]), []).append(source)
    if mixture.image_text_ratio is None:
        rows = _mix(mixture.sources, parts, mixture, seed)
    else:
        rows = _take_turns(_ratio(mixture), *_both(kinds, parts, mixture, seed), seed)
    reading = Reading(mixture, seed, {} if mixture.streaming else parts)
    if mixture.streaming:
        return rows.map(reading, batched=True, batch_size=1, remove_columns=rows.column_names)
    return rows.with_transform(reading)


# From YAML


def read_mixture(mixture: str | os.PathLike | dict[str, Any] | Mixture) -> Mixture:
    """Read and check what a mixture says, without opening its files.

    Raises:
        FileNotFoundError: If a file or an image root is not there.
        ValueError: On an unknown key, reader or value, or weights that do not sum to 1.
    """
    if isinstance(mixture, Mixture):
        return mixture
    if not isinstance(mixture, dict) and Path(mixture).suffix == ".jsonl":
        source = {"reader": MESSAGES, "files": [str(mixture)], "image_root": str(Path(mixture).parent)}
        mixture = {"sources": [source]}
    elif not isinstance(mixture, dict):
        try:
            mixture = yaml.safe_load(Path(mixture).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"The mixture is no YAML: {error}") from error
    _check_keys(Mixture, mixture, "The mixture")
    sources = mixture["sources"] if isinstance(mixture["sources"], list) else []
    if not sources:
        raise ValueError(f"A mixture needs `sources`, a list of one or more; got {mixture['sources']!r}.")
    for number, source in enumerate(sources):
        _check_keys(Source, source, f"Source {number} of the mixture")
    _check_types(mixture, sources)
    result = Mixture(**{**mixture, "sources": _with_names([Source(**_as_lists(source)) for source in sources])})
    _check_mixture(result)
    sources = [_with_paths(source, result.root) for source in result.sources]
    result = replace(result, sources=sources, skip_log=result.skip_log and _below(result.root, result.skip_log))
    for source in result.sources:
        _check_source(source)
    return result


def _check_keys(kind: type, given: Any, what: str) -> None:
    if not isinstance(given, dict):
        raise ValueError(f"{what} has to be a mapping, got {given!r}.")
    known = [one.name for one in fields(kind)]
    for key in given:
        if key not in known:
            raise ValueError(f"{what} has the unknown key {key!r}.{_nearest(str(key), known)}")
    if known[0] not in given:
        raise ValueError(f"{what} has no `{known[0]}`.")


def _check_types(mixture: dict[str, Any], sources: list[dict[str, Any]]) -> None:
    """Raise where a path or a name is none, or a weight no number."""
    kinds = {"a text": str, "a mapping": dict, "a number": (int, float), "true or false": bool}
    wanted = dict.fromkeys(("root", "skip_log", "image_root", "dataset", "split", "revision", "name"), "a text")
    wanted |= {"stopping_strategy": "a text", "reader": "a text", "where": "a mapping", "weight": "a number"}
    wanted |= {"streaming": "true or false"}
    optional = {one.name for kind in (Mixture, Source) for one in fields(kind) if one.default is None}
    for given in (mixture, *sources):
        for key in ("files", "annotations"):
            value = given.get(key, [])
            if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
                raise ValueError(f"`{key}` has to be a path or a list of paths, got {value!r}.")
        for key in wanted.keys() & given.keys():
            is_number = wanted[key] == "a number" and isinstance(given[key], bool)
            if is_number or not isinstance(given[key], kinds[wanted[key]]):
                if given[key] is not None or key not in optional:
                    raise ValueError(f"`{key}` has to be {wanted[key]}, got {given[key]!r}.")


def _nearest(word: str, known: Iterable[str]) -> str:
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean {near[0]!r}?" if near else f" Known are {known}."


def _as_lists(source: dict[str, Any]) -> dict[str, Any]:
    return {
        key: [value] if key in ("files", "annotations") and isinstance(value, str) else value
        for key, value in source.items()
    }


def _with_names(sources: list[Source]) -> list[Source]:
    """Name sources after their readers, numbered where two would be alike."""
    result: list[Source] = []
    for source in sources:
        name, number = source.name or str(source.reader), 2
        taken = {other.name for other in result}
        if source.name in taken and source.name:
            raise ValueError(f"Two sources are called {source.name!r}.")
        while name in taken:
            name, number = f"{source.reader}_{number}", number + 1
        result.append(replace(source, name=name))
    return result


def _below(root: str, path: str) -> str:
    return os.path.join(os.path.expanduser(root), os.path.expanduser(path))


def _with_paths(source: Source, root: str) -> Source:
    return replace(
        source,
        files=[_below(root, path) for path in source.files],
        annotations=[_below(root, path) for path in source.annotations],
        image_root=source.image_root and _below(root, source.image_root),
    )


def _check_mixture(mixture: Mixture) -> None:
    for key, values in POLICIES.items():
        if getattr(mixture, key) not in values:
            raise ValueError(f"`{key}` has to be one of {list(values)}, got {getattr(mixture, key)!r}.")
    if "raise" != mixture.on_bad_record or "raise" != mixture.on_bad_image:
        if mixture.skip_log is None:
            raise ValueError("What is skipped is counted: `skip_log` has to name a file for it.")
    ratio = _ratio(mixture)
    kinds = [[s for s in mixture.sources if has_pictures(s) is kind] for kind in (True, False)]
    for group in kinds if ratio else [mixture.sources]:
        weights = [source.weight for source in group if source.weight is not None]
        if weights and (len(weights) < len(group) or abs(sum(weights) - 1) > 1e-6 or min(weights) <= 0):
            named = {source.name: source.weight for source in group}
            raise ValueError(f"Weights have to be above 0 and sum to 1, all of them or none given; got {named}.")


def _ratio(mixture: Mixture) -> tuple[int, int] | None:
    """Take `image_text_ratio` apart."""
    if mixture.image_text_ratio is None:
        return None
    pieces = str(mixture.image_text_ratio).split(":")
    if len(pieces) != 2 or not all(piece.isdecimal() and int(piece) > 0 for piece in pieces):
        raise ValueError(f'`image_text_ratio` has to be such as "1:1", in quotes; got {mixture.image_text_ratio!r}.')
    return int(pieces[0]), int(pieces[1])


def _check_source(source: Source) -> None:
    if source.reader not in {*READERS, MESSAGES}:
        near = _nearest(str(source.reader), {*READERS, MESSAGES})
        raise ValueError(f"The source {source.name!r} has the unknown reader {source.reader!r}.{near}")
    if bool(source.files) == bool(source.dataset) or (source.dataset and source.reader != MESSAGES):
        raise ValueError(f"The source {source.name!r} needs `files`, or with the reader {MESSAGES!r} a `dataset`.")
    if source.annotations and (len(source.annotations) != len(source.files) or source.reader not in ("vqa", "okvqa")):
        raise ValueError(f"The source {source.name!r} needs one of `annotations` for each of `files`, for VQA only.")
    if source.image_root is None and source.reader not in {*TEXT_READERS, MESSAGES}:
        raise ValueError(f"The source {source.name!r} has pictures and needs an `image_root`.")
    if source.count is not None and (not isinstance(source.count, int) or source.count < 1):
        raise ValueError(f"The source {source.name!r} has the count {source.count!r}; it has to be 1 or more.")
    for path in (*source.files, *source.annotations):
        if not os.path.isfile(path):
            raise FileNotFoundError(f"The source {source.name!r} has no such file: {path}")
    if source.image_root is not None and not os.path.isdir(source.image_root):
        raise FileNotFoundError(f"The source {source.name!r} has no such image root: {source.image_root}")


# From files to rows


def has_pictures(source: Source, rows: Rows | None = None) -> bool:
    """Whether a source is one of rows with pictures."""
    if source.dataset is not None and rows is not None:
        return "images" in rows.column_names
    return source.reader not in TEXT_READERS and (source.image_root is not None or source.dataset is not None)


def open_source(source: Source, mixture: Mixture) -> Rows:
    """Open all rows of a source, those that cannot be read included: `problem` says why."""
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
    if "images" in columns:
        rows = rows.cast_column("images", datasets.List(datasets.Image(decode=False)))
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
    """Leave out what cannot be read, and take as many as are wanted."""
    if mixture.streaming:
        if next(iter(rows), None) is None:
            raise ValueError(f"The source {source.name!r} is empty.")
        return rows if source.count is None else rows.shuffle(seed, buffer_size=BUFFER).take(source.count)
    if "problem" in rows.column_names:
        rows = _without_problems(rows, source, mixture)
    if len(rows) == 0:
        raise ValueError(f"The source {source.name!r} is empty: {source.dataset or source.files}")
    if source.count is None or source.count >= len(rows):
        return rows
    return rows.shuffle(seed).select(range(source.count))


def _without_problems(rows: datasets.Dataset, source: Source, mixture: Mixture) -> datasets.Dataset:
    valid = rows.data.column("problem").is_null().to_numpy()
    bad = np.flatnonzero(~valid)
    if len(bad) == 0:
        return rows
    if mixture.on_bad_record == "raise":
        first = rows[int(bad[0])]
        raise ValueError(
            f"{_place(source, first)}: {first['problem']} ({len(bad)} of {len(rows)} records of {source.name!r} "
            "cannot be read; `on_bad_record: skip` leaves them out.)"
        )
    for row in rows.select(bad).select_columns(["file", "row", "problem"]):
        _log_row(mixture, source, row, row["problem"])
    return rows.select(np.flatnonzero(valid))


def _place(source: Source, row: dict[str, Any]) -> str:
    if source.dataset is not None:
        return f"{source.dataset}, row {row['row']}"
    path = source.files[row["file"]]
    return f"{path}, line {row['row'] + 1}" if is_lines(path) else f"{path}, record {row['row']}, from 0"


# From rows to the order of a training


def _mix(sources: list[Source], parts: dict[str, Rows], mixture: Mixture, seed: int) -> Rows:
    """Mix by weight, or without any, all rows."""
    rows = [parts[source.name] for source in sources]
    weights = [source.weight for source in sources]
    if weights[0] is not None:
        rows = [part.shuffle(seed, **_buffer(part)) for part in rows]
        stop = mixture.stopping_strategy
        return datasets.interleave_datasets(rows, probabilities=weights, seed=seed, stopping_strategy=stop)
    if mixture.streaming:  # one behind the other, a buffer would hold rows of one source only
        rows = [datasets.interleave_datasets(rows, stopping_strategy="all_exhausted_without_replacement")]
    rows = datasets.concatenate_datasets(rows)
    return rows.shuffle(seed, **_buffer(rows))


def _buffer(rows: Rows) -> dict[str, int]:
    return {"buffer_size": BUFFER} if isinstance(rows, datasets.IterableDataset) else {}


def _both(kinds: dict[bool, list[Source]], parts: dict[str, Rows], mixture: Mixture, seed: int) -> list[Rows]:
    for kind, what in ((True, "with pictures"), (False, "of text alone")):
        if kind not in kinds:
            raise ValueError(f"`image_text_ratio` needs sources of both kinds; there is none {what}.")
    return [_mix(kinds[kind], parts, mixture, seed) for kind in (True, False)]


def _take_turns(ratio: tuple[int, int], pictures: Rows, texts: Rows, seed: int) -> Rows:
    """Let rows of both kinds take turns; those with pictures come once each, the others as often as it takes."""
    share = ratio[0] / sum(ratio)
    if isinstance(pictures, datasets.IterableDataset):
        probabilities = None if share == 0.5 else [share, 1 - share]  # exactly by turns, or on average
        both = [pictures, texts.repeat(None)]
        return datasets.interleave_datasets(both, probabilities, seed, stopping_strategy="first_exhausted")
    count = max(1, round(len(pictures) * ratio[1] / ratio[0]))
    rounds = [texts.shuffle(seed + number) for number in range(-(-count // len(texts)))]
    texts = datasets.concatenate_datasets(rounds).select(range(count))
    # Row k of n stands at (k + 1/2) / n of the way.
    places = np.concatenate([(np.arange(len(rows)) + 0.5) / len(rows) for rows in (pictures, texts)])
    return datasets.concatenate_datasets([pictures, texts]).select(np.argsort(places, kind="stable"))


def _log_row(mixture: Mixture, source: Source, row: dict[str, Any], problem: str) -> None:
    log_skip(mixture.skip_log, source.name, _place(source, row), problem)


# From a row to a conversation


@dataclass
class Reading:
    """Read rows of a mixture when they are asked for: the transform of its dataset.

    Args:
        mixture: What is mixed and what to do about bad rows.
        seed: What the readers' draws come from.
        parts: The rows of each source, for one to stand in for another; empty in a streamed mixture.
        log: Called with mixture, source, row and problem of each row that is skipped or gets a black picture.
        open: Called with each picture, the black ones too, for what stands in the record, as
            [`~processing_mmgpt.data.latents.keep_latents`] does; by default pictures stay as `on_bad_image` needs
            them. What it raises is a picture that cannot be read.
    """

    mixture: Mixture
    seed: int
    parts: dict[str, Rows]
    log: Callable[[Mixture, Source, dict[str, Any], str], None] = _log_row
    open: Callable[[Any], Any] | None = None

    def __post_init__(self):
        self.sources = {source.name: source for source in self.mixture.sources}

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        """Read a batch of rows."""
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        records = [record for row in rows if (record := self._read_or_replace(row)) is not None]
        return {key: [record[key] for record in records] for key in ("messages", "images")}

    def _read_or_replace(self, row: dict[str, Any]) -> dict[str, list] | None:
        record = self.read(row)
        if record is not None or not self.parts:
            return record
        part, rng = self.parts[row["source"]], self._rng(row, "in its place")
        for _ in range(TRIES):
            if (record := self.read(part[rng.randrange(len(part))])) is not None:
                return record
        raise ValueError(f"Of the source {row['source']!r}, {TRIES} rows in a row cannot be read.")

    def read(self, row: dict[str, Any]) -> dict[str, list] | None:
        """Read one row; `None` if it is to be skipped, which is logged."""
        source = self.sources[row["source"]]
        try:
            if row.get("problem"):  # streamed: nobody has looked at it before
                raise ValueError(row["problem"])
            given = json.loads(row["record"]) if row.get("record") is not None else row
            record = read_record(given, source.reader, source.image_root, self._rng(row))
        except ValueError as error:
            return self._bad(source, row, str(error), self.mixture.on_bad_record)
        for number, image in enumerate(record["images"]):
            try:
                record["images"][number] = (self.open or self.picture)(image)
            except (OSError, TypeError, ValueError) as error:
                missing = isinstance(error, FileNotFoundError)
                reason = f"The picture is missing: {image}" if missing else f"The picture cannot be read: {error}"
                record["images"][number] = self._bad(source, row, reason, self.mixture.on_bad_image)
                if record["images"][number] is None:
                    return None
        return record

    def _rng(self, row: dict[str, Any], purpose: str = "") -> random.Random:
        return random.Random(f"{self.seed}/{row['source']}/{row['file']}/{row['row']}/{purpose}")

    def picture(self, image: Any) -> Any:
        """Open a picture where a bad one is not to raise; whether the file is there is seen in any case."""
        if isinstance(image, Video | list):
            return image  # a video, which no policy is for: whoever makes pixels of it opens it
        if self.mixture.on_bad_image != "raise":
            return open_image(image)
        if isinstance(image, str) and not image.startswith("data:") and not os.path.isfile(image):
            raise FileNotFoundError(image)
        return image  # whoever makes pixels of it opens it

    def _bad(self, source: Source, row: dict[str, Any], problem: str, policy: str) -> Any:
        if policy == "raise":
            raise ValueError(f"{_place(source, row)}: {problem}")
        self.log(self.mixture, source, row, problem)
        return (self.open or self.picture)(Image.new("RGB", BLANK)) if policy == "blank" else None

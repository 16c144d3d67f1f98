"""Recipes: what a mixture's YAML file says, checked before any of its annotation files is opened."""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..image_files_mmgpt import shorten
from .annotations import MESSAGES
from .readers import READERS, TEXT_READERS


class Checked(BaseModel):
    """A part of a recipe: an unknown key or a value of another type is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Source(Checked):
    """One source of a mixture.

    Args:
        reader: A name of `READERS`, or `"messages"` for records `{"messages": [...], "images": [...]}`.
        files: Annotation files: JSONL, a JSON list, or the document in which the data are published. Several streams
            (workers, processes) need several files.
        annotations: For the official form of VQA and OK-VQA, the answers to the questions in `files`, in their order.
        image_root: The folder that the paths of pictures start from and may not leave.
        dataset: Instead of `files`, a Hub id or a folder for `datasets.load_dataset`, with columns `messages` and,
            if it has pictures, `images`.
        split: The split of `dataset`.
        revision: The revision of `dataset`.
        where: Fields and the values that records to be kept have in them, such as `{"split": 1}` for OCR-VQA.
        count: The most rows to take, drawn without replacement; by default all.
        weight: The share of the source in the mixture, or with a ratio, among the sources of its kind.
        name: What the source is called in messages; by default after its reader.
    """

    reader: str
    files: list[str] = []
    annotations: list[str] = []
    image_root: str | None = None
    dataset: str | None = None
    split: str = "train"
    revision: str | None = None
    where: dict[str, str | int | float | bool | None] = {}
    count: int | None = None
    weight: float | None = None
    name: str = ""

    @field_validator("files", "annotations", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    def has_images(self, columns: list[str] | None = None) -> bool:
        """Whether its rows have pictures; of a `dataset`, its columns say it where they are known."""
        if self.dataset is not None and columns is not None:
            return "images" in columns
        return self.reader not in TEXT_READERS and (self.image_root is not None or self.dataset is not None)


class Mixture(Checked):
    """A mixture, as its YAML file says it.

    Args:
        sources: The sources.
        root: The folder that relative paths in the file start from; by default the working folder.
        image_text_ratio: For example `"1:1"` (in quotes: YAML reads 1:1 as a number). Rows with pictures and rows
            without alternate in it. Each row with pictures comes once; rows of text are repeated, or left out, to fit.
        streaming: Read while training, for data too large to be copied on the disk. Rows are shuffled in a buffer.
        stopping_strategy: With weights, when a dataset ends; see `datasets.interleave_datasets`.
        on_bad_record: What to do about a record that lacks something: `"raise"` or `"skip"`.
        on_bad_image: What to do about a picture that is missing or broken: `"raise"`, `"skip"`: another row of the
            source is read in its place (streamed: the row is left out), or `"blank"`: a black picture is put in.
        skip_log: The file that names each row that is skipped or gets a black picture; see `skip_log.count_skips`.
    """

    sources: list[Source] = Field(min_length=1)
    root: str = ""
    image_text_ratio: tuple[int, int] | None = None
    streaming: bool = False
    stopping_strategy: str = "all_exhausted"
    on_bad_record: Literal["raise", "skip"] = "raise"
    on_bad_image: Literal["raise", "skip", "blank"] = "raise"
    skip_log: str | None = None

    @field_validator("image_text_ratio", mode="before")
    @classmethod
    def _two_numbers(cls, value: Any) -> Any:
        pieces = str(value).split(":")
        if value is None or len(pieces) == 2 and all(piece.isdecimal() and int(piece) > 0 for piece in pieces):
            return value and tuple(map(int, pieces))
        raise ValueError(f'`image_text_ratio` has to be such as "1:1", in quotes; got {shorten(value)}.')


def read_mixture(mixture: str | os.PathLike | dict[str, Any] | Mixture) -> Mixture:
    """Read and check a mixture, without opening its annotation files.

    Args:
        mixture: As for [`~processing_mmgpt.data.mixture.load_instruction_dataset`].

    Returns:
        The mixture, its sources with names, its paths below its root.

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
        except (yaml.YAMLError, RecursionError) as error:
            raise ValueError(f"The mixture is no YAML: {error}") from error
    try:
        result = Mixture.model_validate(mixture)
    except ValidationError as error:
        problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
        raise ValueError(_say(problems[0])) from None
    sources = [_with_paths(source, result.root) for source in _with_names(result.sources)]
    skip_log = result.skip_log and _below(result.root, result.skip_log)
    result = result.model_copy(update={"sources": sources, "skip_log": skip_log})
    _check_mixture(result)
    for source in sources:
        _check_source(source)
    return result


def files_of(path: str | os.PathLike) -> list[str]:
    """Name the files that a mixture is read from, without pictures: its own, and those of its sources.

    Args:
        path: A YAML or JSONL file, as for [`~processing_mmgpt.data.mixture.load_instruction_dataset`].

    Raises:
        FileNotFoundError: And what else [`read_mixture`] raises.
    """
    named = [file for source in read_mixture(path).sources for file in (*source.files, *source.annotations)]
    return [*dict.fromkeys([str(path), *named])]


def _say(problem: dict[str, Any]) -> str:
    """Describe an error of pydantic: where it is, what was given, what is expected."""
    place, kind, given = problem["loc"], problem["type"], problem["input"]
    what, model = "The mixture", Mixture
    if len(place) > 1 and place[0] == "sources":
        what, model, place = f"Source {place[1]} of the mixture", Source, place[2:]
    if not place:
        return f"{what} has to be a mapping, got {shorten(given)}."
    key = place[0]
    if kind == "extra_forbidden":
        return f"{what} has the unknown key {shorten(key)}.{_nearest(key, model.model_fields)}"
    if key == "sources":
        return f"A mixture needs `sources`, a list of one or more; got {shorten(given)}."
    if kind == "missing":
        return f"{what} has no `{key}`."
    if kind == "value_error":
        return str(problem["ctx"]["error"])
    if kind == "literal_error":
        return f"`{key}` has to be one of {[*get_args(model.model_fields[key].annotation)]}, got {shorten(given)}."
    if key == "where":
        return (
            f"{what}: `where` names fields, and for each a text, a number, true, false or null; got {shorten(given)}."
        )
    return f"{what}: `{key}` {problem['msg'].removeprefix('Input ')}, got {shorten(given)}."


def _nearest(word: str, known: Iterable[str]) -> str:
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean {near[0]!r}?" if near else f" Known are {known}."


def _with_names(sources: list[Source]) -> list[Source]:
    """Name sources after their readers, numbered where two would be alike."""
    result: dict[str, Source] = {}
    for source in sources:
        name, number = source.name or source.reader, 2
        if source.name and source.name in result:
            raise ValueError(f"Two sources are called {source.name!r}.")
        while name in result:
            name, number = f"{source.reader}_{number}", number + 1
        result[name] = source.model_copy(update={"name": name})
    return [*result.values()]


def _below(root: str, path: str) -> str:
    return os.path.join(os.path.expanduser(root), os.path.expanduser(path))


def _with_paths(source: Source, root: str) -> Source:
    paths = {key: [_below(root, path) for path in getattr(source, key)] for key in ("files", "annotations")}
    return source.model_copy(update={**paths, "image_root": source.image_root and _below(root, source.image_root)})


def _check_mixture(mixture: Mixture) -> None:
    if mixture.skip_log is None and (mixture.on_bad_record, mixture.on_bad_image) != ("raise", "raise"):
        raise ValueError("What is skipped is counted: `skip_log` has to name a file for it.")
    kinds = [[source for source in mixture.sources if source.has_images() is kind] for kind in (True, False)]
    for group in [mixture.sources] if mixture.image_text_ratio is None else kinds:
        weights = [source.weight for source in group if source.weight is not None]
        if weights and (len(weights) < len(group) or not abs(sum(weights) - 1) <= 1e-6 or min(weights) <= 0):
            named = {source.name: source.weight for source in group}
            raise ValueError(f"Weights have to be above 0 and sum to 1, all of them or none given; got {named}.")


def _check_source(source: Source) -> None:
    if source.reader not in {*READERS, MESSAGES}:
        near = _nearest(source.reader, {*READERS, MESSAGES})
        raise ValueError(f"The source {shorten(source.name)} has the unknown reader {shorten(source.reader)}.{near}")
    if bool(source.files) == bool(source.dataset) or (source.dataset and source.reader != MESSAGES):
        raise ValueError(f"The source {source.name!r} needs `files`, or with the reader {MESSAGES!r} a `dataset`.")
    if source.annotations and (len(source.annotations) != len(source.files) or source.reader not in ("vqa", "okvqa")):
        raise ValueError(f"The source {source.name!r} needs one of `annotations` for each of `files`, for VQA only.")
    if source.image_root is None and source.reader not in {*TEXT_READERS, MESSAGES}:
        raise ValueError(f"The source {source.name!r} has pictures and needs an `image_root`.")
    if source.count is not None and source.count < 1:
        raise ValueError(f"The source {source.name!r} has the count {source.count!r}; it has to be 1 or more.")
    for path in (*source.files, *source.annotations):
        if not os.path.isfile(path):
            raise FileNotFoundError(f"The source {source.name!r} has no such file: {path}")
    if source.image_root is not None and not os.path.isdir(source.image_root):
        raise FileNotFoundError(f"The source {source.name!r} has no such image root: {source.image_root}")

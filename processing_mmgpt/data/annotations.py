"""Annotation files: how a file becomes records, and what is wrong with one."""

import codecs
import functools
import json
import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from ..image_files_mmgpt import shorten
from ..messages_mmgpt import normalise, take_images
from .confining import confine
from .readers import READERS


MESSAGES = "messages"  # the reader of records that are in our form already

TOO_DEEP = "The record is nested too deep."

SPACE = re.compile(r"[ \t\r\n]*")
CHUNK = 2**20  # characters of a list that are read at once


# One record


def read_record(record: Any, reader: str, root: str | None, rng: random.Random) -> dict[str, list]:
    """Read an annotation record; every picture that is opened comes from here.

    Args:
        record: The record.
        reader: A name of `READERS`, or `"messages"` for one in our form.
        root: The folder of its pictures.
        rng: What the reader draws from.

    Returns:
        `messages`, and `images`: for each image part what [`~processing_mmgpt.data.confining.confine`] makes of it.

    Raises:
        ValueError: If the record lacks something or a path leaves `root`, as "reason" or "reason: details".
    """
    if not isinstance(record, dict):
        raise ValueError("The record is no JSON object.")
    result = _in_our_form(record) if reader == MESSAGES else READERS[reader](record, rng)
    return {"messages": result["messages"], "images": [confine(image, root) for image in result["images"]]}


def _in_our_form(record: dict[str, Any]) -> dict[str, list]:
    """Move the sources of pictures out of the messages."""
    given = record.get("images")
    if not isinstance(given, list | tuple | None):
        raise ValueError(f"The field 'images' has to be a list: got {shorten(given)}")
    try:
        messages, images = take_images(normalise(record.get("messages")), given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"The messages are not in order: {error}") from error
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("The messages hold no response to learn from.")
    return {"messages": messages, "images": images}


def problem_of(record: Any, text: str, reader: str, root: str | None, rng: random.Random) -> str | None:
    """Say what is wrong with a record, whose JSON is `text`; `None` if it can be read."""
    try:
        read_record(record, reader, root, rng)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "The text holds half of a character (a lone surrogate)."
    except RecursionError:
        return TOO_DEEP
    except ValueError as error:
        return str(error)
    return None


# One file


def read_file(
    path: str, annotations: str | None, reader: str, where: dict
) -> Iterator[tuple[int, str, Any, str | None]]:
    """Read the records of a file: one a line, a list, or one of the documents in `SHAPES`.

    Args:
        path: The file.
        annotations: For the official files of VQA and OK-VQA, the answers to the questions in `path`.
        reader: The reader the records are for.
        where: Fields and the values that records to be kept have in them.

    Yields:
        For each record its number, its text, itself, and what is wrong with the text.

    Raises:
        ValueError: If the file is no JSON, or no document that is known for `reader`.
    """
    if is_lines(path):
        rows = _read_lines(path)
    elif annotations is None and _is_list(path):
        rows = _read_list(path)
    else:
        rows = (
            (number, None, record, None) for number, record in enumerate(_read_document(path, annotations, reader))
        )
    for number, text, record, problem in rows:
        if reader == "nlvrv1" and isinstance(record, dict) and "split" not in record:
            text, record = None, {**record, "split": _split_of(path)}
        if isinstance(record, dict) and any(record.get(key) != value for key, value in where.items()):
            continue
        if text is None:
            try:
                text = json.dumps(record)
            except RecursionError:
                text, record, problem = "", None, TOO_DEEP
        yield number, text, record, problem


@functools.lru_cache(maxsize=1024)
def is_lines(path: str) -> bool:
    """Whether each line is a record: NLVR's `train.json` is such a file as well."""
    if path.endswith(".jsonl"):
        return True
    with open(path, "rb") as file:
        first = file.readline()
        if not first.lstrip().startswith(b"{") or not any(line.strip() for line in file):
            return False
    try:
        json.loads(first)
    except ValueError:
        return False
    return True


def _read_lines(path: str) -> Iterator[tuple[int, str, Any, str | None]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            if line.isspace():
                continue
            try:
                text = line.removeprefix(codecs.BOM_UTF8).decode()
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                yield number, line.decode(errors="replace"), None, f"Wrong JSON: {error}"
            else:
                yield number, text, record, None


def _is_list(path: str) -> bool:
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return file.read(CHUNK).lstrip()[:1] == "["


def _read_list(path: str) -> Iterator[tuple[int, str, Any, str | None]]:
    """Read a list item by item, so that gigabytes of it are never in memory at once."""
    decode, number, size = json.JSONDecoder().raw_decode, 0, CHUNK
    with open(path, encoding="utf-8-sig") as file:
        text = _characters(file, size)
        at = text.index("[") + 1
        closing = ","
        while closing == ",":
            try:
                start = SPACE.match(text, at).end()
                if number == 0 and text[start : start + 1] == "]":
                    return
                record, end = decode(text, start)
                closes = SPACE.match(text, end).end()
                closing = text[closes]
                if closing not in ",]":
                    raise json.JSONDecodeError("Expecting ',' delimiter", text, closes)
            except (IndexError, ValueError, RecursionError) as error:  # wrong, or not read far enough
                size, closing = 2 * size, ","
                if not (more := _characters(file, size)):
                    reason = error.msg if isinstance(error, json.JSONDecodeError) else error
                    raise ValueError(f"{path}: wrong JSON: record {number}, counted from 0: {reason}.") from error
                text, at = text[at:] + more, 0
                continue
            yield number, text[start:end], record, None
            number, at, size = number + 1, closes + 1, CHUNK
        if (text[at:] + _characters(file)).strip():
            raise ValueError(f"{path}: wrong JSON: something follows the list.")


def _characters(file: TextIO, size: int = -1) -> str:
    try:
        return file.read(size)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file.name}: wrong JSON: {error}") from error


def _read_document(path: str, annotations: str | None, reader: str) -> list[Any]:
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: wrong JSON: {error}") from error
    if annotations is not None:
        return join_vqa(document, _read_document(annotations, None, "answers"))
    if reader == "answers" or isinstance(document, list):
        return document
    try:
        return SHAPES[reader](document)
    except (AttributeError, KeyError, TypeError) as error:
        keys = shorten(list(document)[:5]) if isinstance(document, dict) else type(document).__name__
        raise ValueError(
            f"{path}: no form of a file that is known for the reader {reader!r}: it holds {keys}"
        ) from error


def _split_of(path: str) -> str:
    split = Path(path).name.split(".")[0]
    if split not in ("train", "dev", "test"):
        raise ValueError(f"{path}: the name of a file of NLVR says the split: train.json, dev.json or test.json")
    return split


# Documents that are no list


def join_vqa(questions: dict, annotations: dict) -> list[dict]:
    """Join the official questions and annotations of VQA v2 or OK-VQA into records as `read_vqa` takes them.

    `{"data_subtype": "train2014", "questions": [{"image_id": 9, "question": "...", "question_id": 9000}]}` and
    `{"annotations": [{"question_id": 9000, "answers": [{"answer": "red", ...}], ...}]}`; the pictures are
    `{data_subtype}/COCO_{data_subtype}_{image_id:012d}.jpg`.

    Source: https://visualqa.org/download.html
    """
    try:
        answers = {a["question_id"]: [given["answer"] for given in a["answers"]] for a in annotations["annotations"]}
        subtype = questions["data_subtype"]
        return [
            {
                "question": asked.get("question"),
                "image": f"{subtype}/COCO_{subtype}_{asked['image_id']:012d}.jpg",
                "question_id": asked["question_id"],
                "answer": answers.get(asked["question_id"]),  # a question without answers is a damaged record
            }
            for asked in questions["questions"]
        ]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"The questions and annotations are not those of VQA: {error!r}") from error


def _captions(document: dict) -> list[dict]:
    """Bring Karpathy's `dataset_coco.json` or the official captions of COCO into records of `read_coco_caption`."""
    if "annotations" not in document:
        return [
            {
                "image": f"{image['filepath']}/{image['filename']}",
                "caption": [sentence["raw"] for sentence in image["sentences"]],
                "split": image["split"],
            }
            for image in document["images"]
        ]
    captions: dict[int, list[str]] = {}
    for annotation in document["annotations"]:
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    return [{"image": image["file_name"], "caption": captions.get(image["id"])} for image in document["images"]]


def _books(document: dict) -> list[dict]:
    """Bring OCR-VQA's `dataset.json` into records; its loader calls the picture by book id and ending of the URL."""
    return [
        {**book, "filename": key + os.path.splitext(book["imageURL"])[1]} if isinstance(book, dict) else book
        for key, book in document.items()
    ]


SHAPES: dict[str, Callable[[dict], list]] = {
    "minigpt4": lambda document: document["annotations"],
    "clevr": lambda document: document["questions"],
    "text_ocr": lambda document: document["data"],
    "gqa": lambda document: list(document.values()),
    "ocr_vqa": _books,
    "coco_caption": _captions,
}

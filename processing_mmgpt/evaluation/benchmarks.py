"""Public benchmarks: their files as downloaded, the question, how a reply is read, and the score.

A `Benchmark` is a value; `BENCHMARKS` holds the ones of OpenFlamingo whose files have a public form. Splits, prompts,
lengths and post-processing are those of https://github.com/mlfoundations/open_flamingo/tree/655f693/open_flamingo/eval,
with each deviation noted beside the line.
"""

import json
import os
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from ..data.annotations import read_file
from ..data.confining import confined
from .few_shot import CAPTION, QUESTION, SEPARATOR
from .metrics import bleu, cider_d, vqa_accuracy


# As the code has it; its docstrings say that the length penalty is -2.0 by default.
DECODING = {"num_beams": 3, "length_penalty": 0.0, "do_sample": False}
# Without examples, OpenFlamingo shows two without their pictures, so that the form of an answer is known.
TEXT_ONLY_EXAMPLES = 2
QUERY_SET_SIZE = 2048  # at random out of the training split; what examples are drawn from

Sample = dict[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """All that defines a benchmark.

    Args:
        read: `(folder, is_support)` to samples: `id`, `image` (a path), `text` (what is asked, or `None`), `answer`
            (what an example shows), and what `score` compares with.
        prompt: The question in OpenFlamingo's form, `{}` for the text; `<image>` comes before it, the answer after it.
        instruction: The same as a user's turn, for models tuned on instructions.
        separator: The text between one example and the next.
        max_new_tokens: Length of a reply; `None` where classes are ranked by their likelihood.
        clean: From a reply to the answer in it.
        score: `(samples, predictions)` to scores by name, in percent, the main one first. A prediction is a text, or
            the log-likelihoods a token of the classes, in their order.
    """

    read: Callable[[Path, bool], list[Sample]]
    prompt: str
    instruction: str
    separator: str
    max_new_tokens: int | None
    clean: Callable[[str], str]
    score: Callable[[list[Sample], list[Any]], dict[str, float]]


def support_record(benchmark: Benchmark, sample: Sample, as_instruction: bool) -> dict[str, list]:
    """A sample as an example: a turn that asks and one that answers, for `few_shot.few_shot`."""
    query = query_record(benchmark, sample, as_instruction)
    answer = {"role": "assistant", "content": [{"type": "text", "text": sample["answer"]}]}
    return {**query, "messages": [*query["messages"], answer]}


def query_record(benchmark: Benchmark, sample: Sample, as_instruction: bool) -> dict[str, list]:
    """A sample as a query: a picture and what is asked of it, or in OpenFlamingo's form its text alone."""
    text = sample["text"]
    if as_instruction:
        text = benchmark.instruction.replace("{}", text or "")
    parts = [{"type": "image"}] + ([] if text is None else [{"type": "text", "text": text}])
    return {"messages": [{"role": "user", "content": parts}], "images": [sample["image"]]}


# Replies


def caption_of(reply: str) -> str:
    """The caption in a reply: what comes before the model begins another example."""
    return re.split("Output", reply, maxsplit=1)[0].replace('"', "").strip()


def short_answer_of(reply: str) -> str:
    """The answer in a reply: what comes before another question, or before a comma and a space."""
    return re.split("Question|Answer|Short|, ", reply, maxsplit=1)[0].strip()


# Scores


def score_captions(samples: list[Sample], predictions: list[str]) -> dict[str, float]:
    """CIDEr-D and BLEU-4, both times 100 as papers print them."""
    references = [sample["captions"] for sample in samples]
    return {
        "CIDEr": 100 * mean(cider_d(predictions, references)),
        "BLEU-4": 100 * bleu(predictions, references)[3],
    }


def score_answers(samples: list[Sample], predictions: list[str]) -> dict[str, float]:
    """Official VQA accuracy."""
    scores = [vqa_accuracy(p, sample["answers"]) for sample, p in zip(samples, predictions, strict=True)]
    return {"VQA accuracy": 100 * mean(scores)}


def score_classes(samples: list[Sample], predictions: list[list[float]]) -> dict[str, float]:
    """Share of samples whose class is the most likely."""
    likeliest = [sample["classes"][p.index(max(p))] for sample, p in zip(samples, predictions, strict=True)]
    return {"accuracy": 100 * mean(sample["answer"] == name for sample, name in zip(samples, likeliest, strict=True))}


def score_yes_no(samples: list[Sample], predictions: list[list[float]]) -> dict[str, float]:
    """Area under the ROC curve of the likelihood of "yes" against "no"; and accuracy."""
    from sklearn.metrics import roc_auc_score

    labels = [sample["answer"] == "yes" for sample in samples]
    # The margin orders samples as the normalised probability of the reference does, and only the order counts.
    margins = [yes - no for no, yes in predictions]
    return {"ROC-AUC": 100 * roc_auc_score(labels, margins), **score_classes(samples, predictions)}


# Files


def read_karpathy(folder: Path, is_support: bool) -> list[Sample]:
    """Captions of COCO in Karpathy's splits: `dataset_coco.json`, `train2014/`, `val2014/`.

    Examples are taken from "train" and show the first caption; queries are those of "test". "restval" is not used.

    Source: https://cs.stanford.edu/people/karpathy/deepimagesent/
    """
    records = _records(
        folder / "dataset_coco.json", "coco_caption", where={"split": "train" if is_support else "test"}
    )
    return [
        {
            "id": r["image"],
            "image": r["image"],
            "text": None,
            "captions": r["caption"],
            "answer": r["caption"][0].strip(),
        }
        for r in records
    ]


def read_vqa(questions: str, annotations: str, folder: Path, is_support: bool) -> list[Sample]:
    """Questions in the official form of VQA; the names of the two files have `{}` for train2014 or val2014.

    Source: https://visualqa.org/download.html, https://okvqa.allenai.org/download.html
    """
    split = "train2014" if is_support else "val2014"
    records = _records(folder / questions.format(split), "vqa", folder / annotations.format(split))
    return [
        {
            "id": r["question_id"],
            "image": r["image"],
            "text": r["question"],
            "answers": r["answer"],
            "answer": r["answer"][0],
        }
        for r in records
    ]


def read_hateful_memes(folder: Path, is_support: bool) -> list[Sample]:
    """Hateful Memes: `train.jsonl`, `dev.jsonl` (the queries, as in OpenFlamingo), `img/`.

    Source: https://arxiv.org/abs/2005.04790
    """
    lines = (folder / ("train.jsonl" if is_support else "dev.jsonl")).read_text(encoding="utf-8").splitlines()
    return [
        {
            "id": r["id"],
            "image": r["img"],
            "text": r["text"],
            "answer": "yes" if r["label"] else "no",
            "classes": ["no", "yes"],
        }
        for r in map(json.loads, lines)
    ]


def read_image_folder(folder: Path, is_support: bool) -> list[Sample]:
    """Pictures by class, as ImageNet is kept: `train/CLASS/*`, `val/CLASS/*`; a class's folder has its name in words.

    ImageNet's folders are called by WordNet ids: rename them, or link to them, by the class names you rank.
    """
    split = "train" if is_support else "val"
    classes = sorted(path.name for path in (folder / split).iterdir() if path.is_dir())
    return [
        {"id": image, "image": image, "text": None, "answer": name, "classes": classes}
        for name in classes
        for image in sorted(f"{split}/{name}/{file}" for file in os.listdir(folder / split / name))
    ]


def _records(path: Path, reader: str, annotations: Path | None = None, where: dict | None = None) -> list[dict]:
    found = read_file(str(path), annotations and str(annotations), reader, where or {})
    records = []
    for number, _, record, problem in found:
        if problem:
            raise ValueError(f"{path}, record {number}: {problem}")
        records.append(record)
    return records


def read_samples(benchmark: Benchmark, folder: Path, is_support: bool, count: int | None = None) -> list[Sample]:
    """Read a split of a benchmark.

    Args:
        benchmark: One of `BENCHMARKS`.
        folder: Its folder, files as downloaded.
        is_support: The training split, which examples are taken from, rather than the one that is scored.
        count: Number of samples, the same ones for the same number; by default all.

    Raises:
        FileNotFoundError: If a file is missing; a missing picture is noticed when it is opened.
        ValueError: If a file has another form, or a picture's path leaves the folder.
    """
    samples = benchmark.read(folder, is_support)
    if count is not None and count < len(samples):
        chosen = sorted(random.Random(count).sample(range(len(samples)), count))
        samples = [samples[i] for i in chosen]
    return [{**sample, "image": confined(str(folder), sample["image"])} for sample in samples]


VQA_V2 = Benchmark(
    read=partial(read_vqa, "v2_OpenEnded_mscoco_{}_questions.json", "v2_mscoco_{}_annotations.json"),
    prompt=QUESTION,
    instruction="{}",
    separator=SEPARATOR,
    max_new_tokens=5,
    clean=short_answer_of,
    score=score_answers,
)

BENCHMARKS = {
    "coco": Benchmark(
        read=read_karpathy,
        prompt=CAPTION,
        instruction="Describe the picture.",
        separator=SEPARATOR,
        max_new_tokens=20,
        clean=caption_of,
        score=score_captions,
    ),
    "vqav2": VQA_V2,
    # OpenFlamingo stems its predictions with NLTK's tagger here, since the answers of OK-VQA 1.1 are stemmed; this
    # does not, so that its figures come out lower.
    "ok_vqa": replace(
        VQA_V2, read=partial(read_vqa, "OpenEnded_mscoco_{}_questions.json", "mscoco_{}_annotations.json")
    ),
    # Of the paper's six orders of the examples one is used, as the code does unless told otherwise.
    "hateful_memes": Benchmark(
        read=read_hateful_memes,
        prompt="is an image with: '{}' written on it. Is it hateful? Answer:",
        instruction="This is an image with: '{}' written on it. Is it hateful? Answer yes or no.",
        separator="",
        max_new_tokens=None,
        clean=str.strip,
        score=score_yes_no,
    ),
    "imagenet": Benchmark(
        read=read_image_folder,
        prompt=CAPTION,
        instruction="What does the picture show?",
        separator="",
        max_new_tokens=None,
        clean=str.strip,
        score=score_classes,
    ),
}

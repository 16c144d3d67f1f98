"""Ask a model the questions of the tiny world and count what it gets right."""

import datetime
import os
import platform
from collections import Counter, defaultdict
from collections.abc import Sequence
from importlib.metadata import version

import torch
from PIL import Image
from scipy.stats import binomtest
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from .dialogue import Example
from .scenes import CELLS, COLOURS, SHAPES, SIDE, SIZES


BATCH = 100
MAX_NEW_TOKENS = 48  # four objects, described
CONFIDENCE = 0.95


@torch.inference_mode()
def answer(
    model: PreTrainedModel, processor: ProcessorMixin, examples: Sequence[Example], description: str = ""
) -> list[str]:
    """Let the model write the last reply of each dialogue, greedily, and return the replies."""
    replies = []
    by_length = sorted(range(len(examples)), key=lambda i: len(examples[i].answer))  # a batch ends together
    for start in tqdm(range(0, len(examples), BATCH), desc=description, leave=False):
        chunk = [examples[i] for i in by_length[start : start + BATCH]]
        inputs = processor.apply_chat_template(
            [example.messages[:-1] for example in chunk],
            images=[example.images for example in chunk],
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
        ).to(model.device)
        ids = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        replies += processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    in_order = dict(zip(by_length, replies, strict=True))
    return [in_order[i] for i in range(len(examples))]


def score(examples: Sequence[Example], replies: Sequence[str]) -> dict[str, float | int]:
    """Share of replies that are the whole answer, with its Wilson interval at 95 %."""
    return share(sum(e.answer == reply for e, reply in zip(examples, replies, strict=True)), len(examples))


def share(right: int, n: int) -> dict[str, float | int]:
    """`right` of `n`, with the Wilson interval at 95 %."""
    interval = binomtest(right, n).proportion_ci(CONFIDENCE, method="wilson")
    return {"accuracy": right / n, "low": float(interval.low), "high": float(interval.high), "n": n}


def with_blank_pictures(examples: Sequence[Example]) -> list[Example]:
    """The same questions about a dark, empty picture."""
    blank = Image.new("RGB", (SIDE, SIDE), (24, 24, 24))
    return [Example(e.skill, e.messages, [blank] * len(e.images)) for e in examples]


def with_swapped_pictures(examples: Sequence[Example]) -> list[Example]:
    """The same questions, each about the pictures of the next one."""
    others = [*examples[1:], examples[0]]
    return [Example(e.skill, e.messages, other.images) for e, other in zip(examples, others, strict=True)]


def prior(examples: Sequence[Example]) -> dict[str, float]:
    """What is right without a look at the picture, for one who knows what kind of answer is asked for.

    Returns:
        `majority`, the share of the most frequent answer, which a blank picture must not exceed; `collision`, the
        probability that two questions have the same answer, which a swapped picture must not exceed.
    """
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    for example in examples:
        kinds[_kind(example.answer)][example.answer] += 1
    majority = sum(max(answers.values()) for answers in kinds.values())
    collision = sum(sum(n * n for n in answers.values()) / answers.total() for answers in kinds.values())
    return {"majority": majority / len(examples), "collision": collision / len(examples)}


def _kind(answer: str) -> str:
    names = {"colour": COLOURS, "shape": SHAPES, "size": SIZES, "position": CELLS}
    return next((kind for kind, values in names.items() if answer in values), "other")


def measured_with(command: str) -> dict[str, str]:
    """Date, command, machine and versions, to stand beside figures."""
    packages = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "open_clip_torch")
    return {
        "date": datetime.date.today().isoformat(),
        "command": command,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, "
        + (torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"),
        "versions": ", ".join(f"{name} {version(name)}" for name in packages),
    }

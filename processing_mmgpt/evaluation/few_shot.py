r"""Few-shot prompts: support examples and a query become one prompt; the support is drawn at random or by similarity.

A support example is a record like any other: `{"messages": [...], "images": [...]}`. A query is one whose last turn
is the user's. [`few_shot`] joins them; the result is rendered

* in the form of Flamingo and OpenFlamingo by [`interleaved_prompts`]:
  `<image>Output:A cat.<|endofchunk|>\n<image>Output:`,
* in the form of instructions by `processor.apply_chat_template`, where the support is the earlier turns.

Similarity (RICES, retrieval-based in-context example selection: https://arxiv.org/abs/2109.05014) is the cosine of
features of pictures. Letters: `K` pictures of the pool, `Q` queries, `D` width of a feature.
"""

import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.functional import cosine_similarity, normalize
from tqdm.auto import tqdm
from transformers import BatchFeature

from ..messages_mmgpt import IMAGE_SOURCES, normalise, take_images
from ..processing_mmgpt import MMGPTProcessor


Record = dict[str, list]
Extract = Callable[[Sequence[Any]], torch.Tensor]  # pictures -> features (K, D)

TEMPLATE = Path(__file__).with_name("few_shot_template.jinja").read_text(encoding="utf-8")

# The prompts of OpenFlamingo's evaluation, and what stands between two examples there:
# https://github.com/mlfoundations/open_flamingo/blob/v2.0.1/open_flamingo/eval/models/open_flamingo.py
QUESTION = "Question:{} Short answer:"
CAPTION = "Output:"
SEPARATOR = "\n"

KIND = "mmgpt_index"  # in the metadata of an index
SAME = 0.999  # cosine of two features of one picture by one tower, whatever its data type


def few_shot(support: Sequence[Record], query: Record, with_images: bool = True) -> Record:
    """Put support examples before a query.

    Args:
        support: Records that end in a response, the one next to the query last.
        query: A record that ends in a user turn.
        with_images: Whether the support keeps its pictures. Without them, two examples are what OpenFlamingo calls
            0 shots: they show the form and no picture.

    Returns:
        One record: the support is the earlier turns.

    Raises:
        ValueError: If an example ends in a user turn or the query in a response, or if there is a system message
            anywhere but at the very beginning.
    """
    messages, images = [], []
    for number, record in enumerate([*support, query]):
        turns, own = take_images(normalise(record["messages"]), record.get("images"))
        is_query, ends_in = number == len(support), turns[-1]["role"]
        if (ends_in == "assistant") == is_query:
            what = "The query" if is_query else f"Support example {number}"
            raise ValueError(f"{what} ends in a turn of the {ends_in}: only the query waits for a response.")
        if not is_query and not with_images:
            turns, own = [_without_images(turn) for turn in turns], []
        messages += turns
        images += own
    return {"messages": normalise(messages), "images": images}


def _without_images(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": [part for part in message["content"] if part["type"] not in IMAGE_SOURCES]}


def interleaved_prompts(
    processor: MMGPTProcessor,
    records: Sequence[Record],
    question: str = QUESTION,
    caption: str = CAPTION,
    separator: str = SEPARATOR,
    bos_token: str | None = None,
) -> BatchFeature:
    """Render records in the form of OpenFlamingo: `<image>`, prompt, answer, `<|endofchunk|>`.

    A control token typed in a record stays text. Let generation end at the chunk's end:
    `model.generate(**batch, eos_token_id=processor.end_of_chunk_token_id)`.

    Args:
        processor: The processor.
        records: Each from [`few_shot`], or a query alone.
        question: The form of a user turn with a text, which replaces `{}`.
        caption: The form of a user turn of pictures alone.
        separator: What follows each `<|endofchunk|>`. OpenFlamingo's evaluation has a line break there, its
            README nothing.
        bos_token: The beginning of a row. By default, as in the reference, what the tokenizer writes by itself:
            LLaMA's its BOS, GPT-NeoX's and MPT's nothing, though they have one.

    Returns:
        A batch for `generate`, padded on the left.
    """
    if bos_token is None:
        bos_token = processor.tokenizer.decode(processor.tokenizer("")["input_ids"])
    return processor.apply_chat_template(
        [record["messages"] for record in records],
        images=[record.get("images") for record in records],
        chat_template=TEMPLATE,
        tokenize=True,
        return_dict=True,
        padding_side="left",
        bos_token=bos_token,
        question=question,
        caption=caption,
        separator=separator,
    )


def choose_at_random(pool_size: int, num_shots: int, rng: random.Random) -> list[int]:
    """Draw the numbers of `num_shots` different examples out of a pool."""
    return rng.sample(range(pool_size), num_shots)


def choose_similar(pool: torch.Tensor, queries: torch.Tensor, num_shots: int) -> list[list[int]]:
    """Find the examples whose pictures are most like those of the queries.

    Args:
        pool: `(K, D)`, features of any length.
        queries: `(Q, D)`.
        num_shots: How many to find for each query.

    Returns:
        For each query the numbers of `num_shots` examples, the most similar last, next to the query, as in
        https://github.com/mlfoundations/open_flamingo/blob/v2.0.1/open_flamingo/eval/rices.py.

    Raises:
        ValueError: If there are fewer than `num_shots` examples.
    """
    if num_shots > len(pool):
        raise ValueError(f"{num_shots} shots were asked for, and the pool holds {len(pool)} examples.")
    similarity = normalize(queries, dim=-1) @ normalize(pool, dim=-1).T  # (Q, K)
    return similarity.topk(num_shots, dim=-1).indices.flip(-1).tolist()


def build_index(path: str | os.PathLike, images: Sequence[Any], extract: Extract, batch_size: int = 64) -> Path:
    """Write the features of a pool to a safetensors file, which appears only when it is complete.

    Args:
        path: The file.
        images: One for each example, in any form that `extract` takes.
        extract: Turns pictures into features `(K, D)`. Those of a model's tower are
            `modeling_mmgpt.vision_mmgpt.pooled_features` of what the image processor makes of them.
        batch_size: Pictures handed to `extract` at once.

    Raises:
        ValueError: If the pool is empty.
    """
    path = Path(path)
    if not images:
        raise ValueError("An index needs at least one picture.")
    starts = tqdm(range(0, len(images), batch_size), desc="Features", leave=False)
    features = torch.cat([extract(images[start : start + batch_size]).float().cpu() for start in starts])
    tensors = {"features": features, "probe": _probe(extract)}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, temporary, metadata={"format": "pt", "kind": KIND})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def load_index(path: str | os.PathLike, extract: Extract, pool_size: int) -> torch.Tensor:
    """Read an index, if it is one of this tower and of a pool of this size.

    Args:
        path: A file of [`build_index`].
        extract: The function for the features of the queries. It is tried on one picture, whose feature has to equal
            that in the file: features of two towers, or of pictures of another size, cannot be compared.
        pool_size: The number of examples.

    Returns:
        Features `(K, D)`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not an index, or one of another tower or another pool.
    """
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("kind") != KIND:
                raise ValueError(f"{path} is no index of pictures; its tensors are {sorted(file.keys())[:5]}.")
            features, probe = file.get_tensor("features"), file.get_tensor("probe")
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as an index, it may be cut short: {error}") from error
    if len(features) != pool_size:
        raise ValueError(f"{path} holds the features of {len(features)} pictures, and the pool has {pool_size}.")
    own = _probe(extract)
    if own.shape != probe.shape:
        raise ValueError(
            f"{path} is of another tower: its features are {probe.shape[-1]} wide, those of this one {own.shape[-1]}."
        )
    similarity = cosine_similarity(own, probe, dim=-1).item()
    if similarity < SAME:
        raise ValueError(
            f"{path} is of another tower, or of pictures prepared in another way: the feature of one picture has a "
            f"cosine of {similarity:.3f} with what this tower makes of it, expected at least {SAME}. Build it anew."
        )
    return features


def _probe(extract: Extract) -> torch.Tensor:
    """The feature `(1, D)` of a picture that is always the same: coloured noise in blocks."""
    blocks = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(blocks).resize((64, 64), Image.Resampling.NEAREST)
    return extract([image]).float().cpu()

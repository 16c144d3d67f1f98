"""Show a model a few labelled pictures and ask it for the label of one more; nothing is trained.

    python examples/few_shot.py

The pictures are of the tiny world, one object each, and the labels are made up: each colour gets a word that names
another class in every sequence of the model's training. Prints a prompt, then the share of right answers for several
numbers of examples, drawn at random and chosen by similarity to the picture asked about (RICES). The index goes to
`outputs/few_shot`.
"""

import argparse
import random
from pathlib import Path

import torch
from tiny_world.corpus import LABELLED, PSEUDO_WORDS
from tiny_world.scenes import SEEN_PAIRS, render, sample_scene
from transformers import AutoModelForImageTextToText, AutoProcessor, BatchFeature, ProcessorMixin

import processing_mmgpt  # noqa: F401 - for the Auto classes
from modeling_mmgpt.vision_mmgpt import pooled_features
from processing_mmgpt.evaluation.few_shot import (
    build_index,
    choose_at_random,
    choose_similar,
    few_shot,
    interleaved_prompts,
    load_index,
)


BASE = Path(__file__).with_name("tiny_world") / "base"
CLASSES = ("red", "green", "blue")


def labelled_pictures(rng: random.Random, count: int, names: dict[str, str]) -> list[dict]:
    """Records of pictures whose responses are the names of their classes.

    Args:
        rng: Source of all randomness.
        count: How many.
        names: The name of each class, a colour or a shape. All classes are equally likely.
    """
    records = []
    for _ in range(count):
        member = rng.choice(list(names))
        pair = rng.choice([pair for pair in SEEN_PAIRS if member in pair])
        messages = [
            {"role": "user", "content": [{"type": "image"}]},
            {"role": "assistant", "content": f" {names[member]}"},
        ]
        records.append({"messages": messages, "images": [render(sample_scene(rng, count=1, pairs=[pair]))]})
    return records


def prompts(processor: ProcessorMixin, records: list[dict]) -> BatchFeature:
    """A batch in the form of this base's training documents; the defaults are OpenFlamingo's."""
    bos_token = processor.tokenizer.bos_token
    return interleaved_prompts(processor, records, caption=LABELLED, separator="", bos_token=bos_token)


def main() -> None:
    """Index the pool, choose, prompt, generate, count."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pool", type=int, default=64, help="labelled pictures to choose from")
    parser.add_argument("--queries", type=int, default=60, help="pictures to ask about")
    parser.add_argument("--shots", type=int, nargs="+", default=[0, 1, 2, 4, 8])
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/few_shot"))
    args = parser.parse_args()
    model = AutoModelForImageTextToText.from_pretrained(BASE, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(BASE)

    rng = random.Random(args.seed)
    names = dict(zip(CLASSES, rng.sample(PSEUDO_WORDS, len(CLASSES)), strict=True))
    pool, asked = labelled_pictures(rng, args.pool, names), labelled_pictures(rng, args.queries, names)
    queries = [{**record, "messages": record["messages"][:1]} for record in asked]
    answers = [record["messages"][1]["content"] for record in asked]

    @torch.inference_mode()
    def extract(pictures: list) -> torch.Tensor:
        return pooled_features(model.model.vision_tower, processor.image_processor(pictures)["pixel_values"])

    args.output_dir.mkdir(parents=True, exist_ok=True)
    index = build_index(args.output_dir / "index.safetensors", [record["images"][0] for record in pool], extract)
    features = load_index(index, extract, len(pool))  # on another day, of the same pool and tower
    of_queries = extract([query["images"][0] for query in queries])

    def ask(chosen: list[list[int]]) -> float:
        records = [few_shot([pool[i] for i in row], query) for row, query in zip(chosen, queries, strict=True)]
        batch = prompts(processor, records)
        # A name is one token here. Of other models, let a reply end at `eos_token_id=processor.end_of_chunk_token_id`.
        ids = model.generate(**batch, max_new_tokens=1, do_sample=False)
        replies = processor.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        right = sum(r.strip() == a.strip() for r, a in zip(replies, answers, strict=True))
        return right / len(answers)

    example = few_shot([pool[i] for i in choose_at_random(len(pool), 2, rng)], queries[0])
    shown = prompts(processor, [example])
    print(processor.decode(shown["input_ids"][0]), f"\n\n{'shots':<8}{'random':>8}{'similar':>9}")
    for shots in args.shots:
        at_random = ask([choose_at_random(len(pool), shots, rng) for _ in queries])
        print(f"{shots:<8}{at_random:>8.1%}{ask(choose_similar(features, of_queries, shots)):>9.1%}")


if __name__ == "__main__":
    main()

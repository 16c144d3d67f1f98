"""Score a model on a public benchmark, with 0 to 32 examples in the prompt, by the protocol of OpenFlamingo.

    accelerate launch --num_processes 2 examples/evaluate_benchmark.py outputs/quickstart/adapter \
        --benchmark vqav2 --data data/vqav2 --shots 0 4 8 16 32 --output_dir outputs/vqav2

`--data` is the benchmark's folder, files as downloaded (`processing_mmgpt/evaluation/benchmarks.py` names them; the
tiny world writes such folders: `python examples/write_benchmarks.py outputs/benchmarks`). Every number of examples is
scored once for each seed, which draws the examples. `predictions/SHOTS-SEED/` holds a line of JSON for each query.
If it is killed and started again, with the same or another number of processes, it continues: at most the batches in
progress are lost, and the scores are the same. `scores.json` has the scores and the standard errors over the seeds.

With `--greedy` answers are written without the protocol's three beams, many at once by continuous batching; a larger
`--batch_size` is then faster.
"""

import argparse
import json
import os
import random
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, BatchFeature, PreTrainedModel

from modeling_mmgpt.saving.whole import whole
from modeling_mmgpt.speed.batching import BatchingEngine
from modeling_mmgpt.vision_mmgpt import pooled_features
from processing_mmgpt import MMGPTProcessor
from processing_mmgpt.evaluation.benchmarks import (
    BENCHMARKS,
    DECODING,
    QUERY_SET_SIZE,
    TEXT_ONLY_EXAMPLES,
    Benchmark,
    Sample,
    query_record,
    read_samples,
    support_record,
)
from processing_mmgpt.evaluation.few_shot import (
    build_index,
    choose_at_random,
    choose_similar,
    few_shot,
    interleaved_prompts,
    load_index,
)


Choose = Callable[[list[Sample], int, int], list[list[int]]]  # queries, shots, seed -> numbers of examples


# One batch


def encode(
    processor: MMGPTProcessor,
    benchmark: Benchmark,
    form: str,
    support: list[list[Sample]],
    queries: list[Sample],
    with_images: bool,
) -> BatchFeature:
    """The prompts of a batch: each query after its examples."""
    as_instruction = form == "instruction"
    records = [
        few_shot(
            [support_record(benchmark, example, as_instruction) for example in examples],
            query_record(benchmark, query, as_instruction),
            with_images,
        )
        for examples, query in zip(support, queries, strict=True)
    ]
    if not as_instruction:
        return interleaved_prompts(processor, records, benchmark.prompt, benchmark.prompt, benchmark.separator)
    return processor.apply_chat_template(
        [record["messages"] for record in records],
        images=[record["images"] for record in records],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
    )


@torch.inference_mode()
def write_answers(
    model: PreTrainedModel,
    processor: MMGPTProcessor,
    inputs: BatchFeature,
    benchmark: Benchmark,
    engine: BatchingEngine | None = None,
) -> list[str]:
    """Let the model write an answer to each prompt of a batch: by beams, or greedily if there is an engine."""
    ends = [processor.end_of_chunk_token_id, processor.tokenizer.eos_token_id]
    settings = {"max_new_tokens": benchmark.max_new_tokens, "eos_token_id": ends}
    if engine is None:
        ids = model.generate(**inputs.to(model.device), **DECODING, **settings)[:, inputs["input_ids"].shape[1] :]
    else:
        rows = zip(*(tensor.split(1) for tensor in inputs.values()), strict=True)
        requests = [dict(zip(inputs.keys(), row, strict=True)) | settings for row in rows]
        ids = [result.generated_tokens for result in engine.generate(requests)]
    return [benchmark.clean(reply) for reply in processor.batch_decode(ids, skip_special_tokens=True)]


@torch.inference_mode()
def rank_classes(
    model: PreTrainedModel, processor: MMGPTProcessor, inputs: BatchFeature, classes: list[str]
) -> list[float]:
    """Mean log-likelihood of the tokens of each class name after one prompt, all from one cache of the prompt."""
    prompt = model(**inputs.to(model.device), use_cache=True, logits_to_keep=1)
    names = processor.tokenizer(
        classes, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt"
    ).to(model.device)
    cache = prompt.cache
    cache.batch_repeat_interleave(len(classes))
    before = inputs["attention_mask"].expand(len(classes), -1)
    after = model(
        input_ids=names["input_ids"],
        attention_mask=torch.cat([before, names["attention_mask"]], dim=1),
        cache=cache,
    )
    logits = torch.cat([prompt.logits.expand(len(classes), -1, -1), after.logits[:, :-1]], dim=1)  # (C, T, V)
    found = logits.float().log_softmax(-1).gather(-1, names["input_ids"][..., None]).squeeze(-1)  # (C, T)
    mask = names["attention_mask"]
    return ((found * mask).sum(1) / mask.sum(1)).tolist()


# Predictions, safe from a kill


def read_lines(path: Path) -> list[dict]:
    """The complete lines of a JSONL file; a kill may have cut the last one."""
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    return [json.loads(line) for line in whole.splitlines()]


def finished(folder: Path) -> dict:
    """All predictions in a folder, by the id of their query, whichever process wrote them."""
    return {row["id"]: row["prediction"] for path in sorted(folder.glob("*.jsonl")) for row in read_lines(path)}


def drop_torn_line(path: Path) -> None:
    """Cut a file after its last complete line."""
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def write_json(path: Path, contents: dict) -> None:
    """Write a file completely or not at all."""
    with whole(path) as unfinished:
        unfinished.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")


# The whole


def open_index(path: Path, model: PreTrainedModel, processor: MMGPTProcessor, support: list[Sample]) -> Choose:
    """Index the pictures of the training split once, and return a function that finds the most similar ones."""

    @torch.inference_mode()
    def extract(pictures: list) -> torch.Tensor:
        pixel_values = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        return pooled_features(model.model.vision_tower, pixel_values.to(model.device, model.dtype))

    with PartialState().main_process_first():
        if not path.exists():
            build_index(path, [sample["image"] for sample in support], extract)
    features = load_index(path, extract, len(support))

    def choose(queries: list[Sample], shots: int, seed: int) -> list[list[int]]:
        return choose_similar(features, extract([query["image"] for query in queries]).float().cpu(), shots)

    return choose


def draw(support: list[Sample]) -> Choose:
    """Return a function that draws examples for each query, out of a set that the seed draws."""

    def choose(queries: list[Sample], shots: int, seed: int) -> list[list[int]]:
        pool = random.Random(seed).sample(range(len(support)), min(QUERY_SET_SIZE, len(support)))
        drawn = [choose_at_random(len(pool), shots, random.Random(f"{seed} {query['id']}")) for query in queries]
        return [[pool[number] for number in numbers] for numbers in drawn]

    return choose


def predict(
    folder: Path, batches: list[list[Sample]], answer: Callable[[list[Sample]], list], description: str
) -> dict:
    """Answer this process's share of the batches that have no answer yet, and return all predictions by id.

    The batches, and so their results, are the same whatever the number of processes.
    """
    state = PartialState()
    folder.mkdir(parents=True, exist_ok=True)
    done = finished(folder)
    mine = [b for b in batches[state.process_index :: state.num_processes] if not done.keys() >= {q["id"] for q in b}]
    path = folder / f"{state.process_index}.jsonl"
    drop_torn_line(path)
    with path.open("a", encoding="utf-8") as file:
        for batch in tqdm(mine, desc=description, disable=not state.is_main_process):
            rows = [{"id": q["id"], "prediction": p} for q, p in zip(batch, answer(batch), strict=True)]
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
    state.wait_for_everyone()
    return finished(folder)


def check_same_run(args: argparse.Namespace) -> None:
    """Store the settings of the predictions in a folder; refuse to continue those of another run."""
    settings = {key: str(value) for key, value in vars(args).items() if key not in ("shots", "seeds", "output_dir")}
    path = args.output_dir / "settings.json"
    if not path.exists():
        write_json(path, settings)
    if (noted := json.loads(path.read_text())) != settings:
        differ = {key: (noted.get(key), value) for key, value in settings.items() if noted.get(key) != value}
        raise SystemExit(f"{args.output_dir} holds predictions of another run; (there, here): {differ}.")


def summary(scores: list[float]) -> dict:
    """Mean and standard error of the scores of the seeds."""
    error = stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else None
    return {"mean": mean(scores), "standard_error": error, "scores": scores}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or Hub id of a model or an adapter")
    parser.add_argument("--benchmark", choices=BENCHMARKS, required=True)
    parser.add_argument("--data", type=Path, required=True, help="the benchmark's folder")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--form", choices=("open_flamingo", "instruction"), default="open_flamingo")
    parser.add_argument("--selection", choices=("random", "rices"), default="random")
    parser.add_argument("--shots", type=int, nargs="+", default=[0, 4, 8, 16, 32])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_samples", type=int, help="score so many queries; by default all")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--greedy", action="store_true", help="write answers many at once, without beams")
    return parser.parse_args()


def main() -> None:
    """Read, predict, score, print."""
    args = parse()
    # Without the word, accelerate takes each of several processes on CPUs for the only one.
    state = PartialState(cpu=not torch.accelerator.is_available())
    benchmark = BENCHMARKS[args.benchmark]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with state.main_process_first():
        check_same_run(args)
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto").eval().to(state.device)
    processor = AutoProcessor.from_pretrained(args.model)
    support = read_samples(benchmark, args.data, is_support=True)
    queries = read_samples(benchmark, args.data, is_support=False, count=args.num_samples)
    size = args.batch_size if benchmark.max_new_tokens else 1  # classes are ranked for one query at a time
    batches = [queries[start : start + size] for start in range(0, len(queries), size)]
    if args.selection == "rices":
        choose = open_index(args.output_dir / "support.safetensors", model, processor, support)
        args.seeds = args.seeds[:1]  # nothing is drawn
    else:
        choose = draw(support)

    def answer(shots: int, seed: int, batch: list[Sample]) -> list:
        without_pictures = TEXT_ONLY_EXAMPLES if args.form == "open_flamingo" else 0
        chosen = choose(batch, shots or without_pictures, seed)
        examples = [[support[number] for number in numbers] for numbers in chosen]
        inputs = encode(processor, benchmark, args.form, examples, batch, with_images=shots > 0)
        if benchmark.max_new_tokens:
            return write_answers(model, processor, inputs, benchmark, engine)
        return [rank_classes(model, processor, inputs, batch[0]["classes"])]

    table, engine = {}, None
    with ExitStack() as stack:
        if args.greedy and benchmark.max_new_tokens:
            most = 1 + max(args.shots)  # pictures of a prompt
            engine = BatchingEngine(model, num_slots=max(128, 4 * most), max_pictures=most, do_sample=False)
            stack.enter_context(engine)
        for shots in args.shots:
            runs = []
            for seed in args.seeds:
                folder = args.output_dir / "predictions" / f"{shots}-{seed}"
                done = predict(folder, batches, partial(answer, shots, seed), f"{shots} shots, seed {seed}")
                runs.append(benchmark.score(queries, [done[query["id"]] for query in queries]))
            table[shots] = {name: summary([run[name] for run in runs]) for name in runs[0]}
            state.print(f"{shots} shots:", *(f"{name} {row['mean']:.2f}" for name, row in table[shots].items()))
    if state.is_main_process:
        write_json(args.output_dir / "scores.json", table)


if __name__ == "__main__":
    main()

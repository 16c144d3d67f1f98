"""Score a model on the tests that `make_data.py` writes, beside the classifiers of `baselines.py`.

    python -m examples.real_pictures.evaluate outputs/real --data outputs/real_pictures --split validation \
        --texts outputs/texts/held_out.jsonl --text SmolLM2 --output_dir outputs/real/validation

Controls: the pictures blank, and swapped among the rows of a test. `prior` is what the most frequent answer scores.
Intervals (95 %) are by bootstrap over what the pictures show, so that ten views of one thing do not count as ten.
"""

import argparse
import json
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    ProcessorMixin,
)

from processing_mmgpt import MMGPTCollator

from .compositions import TABLES


CONTROLS = ("as they are", "blank", "swapped")


def plain(text: str) -> str:
    """An answer without case, article and full stop."""
    words = text.strip().rstrip(".").lower().split()
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("a", "an", "the") else words)


def is_right(said: str, answers: list[str]) -> bool:
    """Whether an answer is one of those that are right."""
    return plain(said) in [plain(answer) for answer in answers]


def prompt(rows: list[dict], processor, folder: Path, control: str):
    """Make the batch of some rows; a row brings the pictures of another one as `swapped`."""
    images = []
    for row in rows:
        paths = row["swapped"] if control == "swapped" else row["images"]
        blank = Image.new("RGB", (224, 224), "gray")
        images.append([blank if control == "blank" else str(folder / path) for path in paths])
    return processor.apply_chat_template(
        [row["messages"] for row in rows],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"images": images},
    )


def swap(rows: list[dict]) -> list[dict]:
    """Give each row the pictures of the next one of its test that asks for another answer."""
    swapped = []
    for number, row in enumerate(rows):
        others = [*rows[number + 1 :], *rows[:number]]
        fitting = (o for o in others if o["test"] == row["test"] and o["answers"] != row["answers"])
        swapped.append({**row, "swapped": next(fitting, row)["images"]})
    return swapped


@torch.inference_mode()
def replies(model, processor, rows: list[dict], folder: Path, control: str, args: argparse.Namespace) -> list[str]:
    """Let the model answer all rows, greedily."""
    said, order = {}, sorted(range(len(rows)), key=lambda n: (len(rows[n]["images"]), len(str(rows[n]["messages"]))))
    collate = partial(prompt, processor=processor, folder=folder, control=control)
    loader = DataLoader([rows[n] for n in order], args.batch_size, num_workers=args.num_workers, collate_fn=collate)
    numbers = iter(order)
    for batch in loader:
        batch = {key: value.to(model.device) for key, value in batch.items()}
        new = model.generate(**batch, max_new_tokens=12, do_sample=False)[:, batch["input_ids"].shape[1] :]
        for text in processor.tokenizer.batch_decode(new, skip_special_tokens=True):
            said[next(numbers)] = text
    return [said[number] for number in range(len(rows))]


def interval(right: list[bool], about: list[str], seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of a share, by 2,000 bootstraps over what the rows are about."""
    groups = defaultdict(list)
    for one, thing in zip(right, about, strict=True):
        groups[thing].append(one)
    sums, sizes = (np.array([f(group) for group in groups.values()]) for f in (sum, len))
    drawn = np.random.default_rng(seed).integers(0, len(sums), (2000, len(sums)))
    shares = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    return tuple(np.quantile(shares, [0.025, 0.975]).tolist())


def share(rows: list[dict], said: list[str]) -> dict[str, float]:
    """The share of right answers with its interval, and the mean over the names of the shares of each."""
    right = [is_right(one, row["answers"]) for one, row in zip(said, rows, strict=True)]
    low, high = interval(right, [row["about"] for row in rows])
    names = defaultdict(list)
    for one, row in zip(right, rows, strict=True):
        names[row["answers"][0]].append(one)
    mean = np.mean([np.mean(own) for own in names.values()])
    return {"share": float(np.mean(right)), "low": low, "high": high, "mean of names": float(mean), "n": len(rows)}


def scores(rows: list[dict], said: dict[str, list[str]], classified: dict) -> dict[str, dict]:
    """Score all tests: each control, the prior, and the classifiers."""
    table = {}
    for test in dict.fromkeys(row["test"] for row in rows):
        numbers = [number for number, row in enumerate(rows) if row["test"] == test]
        own = [rows[number] for number in numbers]
        most = Counter(answer for row in own for answer in row["answers"]).most_common(1)[0][0]
        table[test] = {control: share(own, [all_[n] for n in numbers]) for control, all_ in said.items()}
        table[test]["prior"] = share(own, [most] * len(own))
        for name, one in classified.get(test, {}).items():
            table[test][name] = share(own, one["said"]) | ({"L2": one["L2"]} if "L2" in one else {})
    return table


@torch.inference_mode()
def text_loss(model, processor, rows: list[dict], batch_size: int) -> float:
    """Nats a token on the responses of rows of text. A bare LM can be given, for it ignores nothing there is."""
    collate, total, count = MMGPTCollator(processor), 0.0, 0
    for start in range(0, len(rows), batch_size):
        batch = {key: value.to(model.device) for key, value in collate(rows[start : start + batch_size]).items()}
        batch["input_ids"] *= batch["attention_mask"]  # padding may be no token of the bare LM
        learnt = int((batch["labels"][:, 1:] != -100).sum())
        total += float(model(**batch).loss) * learnt
        count += learnt
    return total / count


@torch.inference_mode()
def text_answers(model, processor, table: Path = TABLES / "text_questions.json") -> float:
    """The share of easy questions without a picture whose greedy reply holds an answer. A bare LM can be given."""
    rows = json.loads(table.read_text())
    batch = processor.apply_chat_template(
        [[{"role": "user", "content": row["question"]}] for row in rows],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    ).to(model.device)
    batch["input_ids"] *= batch["attention_mask"]
    new = model.generate(**batch, max_new_tokens=32, do_sample=False, eos_token_id=processor.tokenizer.eos_token_id)
    said = processor.tokenizer.batch_decode(new[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    right = [
        any(answer.lower() in one.lower() for answer in row["answers"]) for one, row in zip(said, rows, strict=True)
    ]
    return sum(right) / len(right)


def markdown(table: dict[str, dict]) -> str:
    """Write scores as a table."""
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    lines = ["| test | n | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for test, row in table.items():
        cells = [f"{100 * row[c]['share']:.1f}" if c in row else "" for c in columns]
        own = row["as they are"]
        cells[0] = f"**{cells[0]}** ({100 * own['low']:.0f} to {100 * own['high']:.0f})"
        if "photographs" in test:
            cells = [
                f"{cell} / {100 * row[c]['mean of names']:.1f}" if cell else ""
                for cell, c in zip(cells, columns, strict=True)
            ]
        lines.append(f"| {test} | {own['n']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def read(path: Path) -> list[dict]:
    """Read a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def load(path: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a model and its processor from a folder or a Hub id: in bfloat16 on a GPU, else in float32."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype).to(device).eval()
    return model, AutoProcessor.from_pretrained(path)


def main() -> None:
    """Load, answer, classify, score."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("--data", type=Path, required=True, help="folder that make_data.py has written")
    parser.add_argument("--split", default="validation", help="validation, test, or free, of free_photographs.py")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--no_controls", action="store_true", help="leave out blank and swapped pictures")
    parser.add_argument("--texts", type=Path, help="JSONL of held-out rows of text, to measure the loss on")
    parser.add_argument("--text", help="folder or Hub id of the language model as it was, for its loss on them")
    parser.add_argument("--rows", type=int, help="so many rows of each test only")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--num_workers", type=int, default=0)
    args = parser.parse_args()
    model, processor = load(args.model)
    rows, kept = [], Counter()
    for row in read(args.data / f"{args.split}.jsonl"):
        kept[row["test"]] += 1
        if args.rows is None or kept[row["test"]] <= args.rows:
            rows.append(row)
    rows, said = swap(rows), {}
    for control in CONTROLS[: 1 if args.no_controls else None]:
        said[control] = replies(model, processor, rows, args.data, control, args)
        right = np.mean([is_right(one, row["answers"]) for one, row in zip(said[control], rows, strict=True)])
        print(f"pictures {control}: {100 * right:.1f} % of {len(rows)} rows", flush=True)
    baselines = args.data / "baselines.json"
    whole = baselines.exists() and args.rows is None
    classified = json.loads(baselines.read_text()).get(args.split, {}) if whole else {}
    result = {"model": args.model, "split": args.split, "scores": scores(rows, said, classified)}
    if args.texts:
        texts = read(args.texts)
        models = {"now": model}
        if args.text:
            lm = AutoModelForCausalLM.from_pretrained(args.text, dtype=model.dtype)
            models["before"] = lm.to(model.device).eval()
        result["text loss"] = {when: text_loss(one, processor, texts, args.batch_size) for when, one in models.items()}
        result["text questions"] = {when: text_answers(one, processor) for when, one in models.items()}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "scores.json").write_text(json.dumps(result, indent=1) + "\n")
    given = [{**row, "said": {control: all_[n] for control, all_ in said.items()}} for n, row in enumerate(rows)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in given)
    (args.output_dir / "answers.jsonl").write_text(lines, encoding="utf-8")
    print(markdown(result["scores"]), *(json.dumps(result.get(f"text {x}")) for x in ("loss", "questions")), sep="\n")


if __name__ == "__main__":
    main()

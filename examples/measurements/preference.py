"""Measure on the tiny world what rewards and preferences teach: GRPO and DPO from the adapter of the quickstart.

    python examples/measurements/preference.py grpo --adapter outputs/quickstart/adapter --output-dir outputs/grpo
    python examples/measurements/preference.py dpo --adapter outputs/quickstart/adapter --output-dir outputs/dpo

Draws fresh scenes, tunes by `train_grpo.py` or `train_dpo.py` as a user would, and asks both adapters the same
questions about other scenes, of three seeds. Writes `report.json`: what each skill got right before and after, in how
many questions the two differ, and for DPO how often the right caption is more likely than a nearly right one.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from quickstart import load
from scipy.stats import binomtest
from tiny_world import evaluation
from tiny_world.dialogue import Example
from tiny_world.mixture import MIXTURE, example, mixture
from tiny_world.scenes import CELLS, COLOURS, SHAPES, SIZES


EXAMPLES = Path(__file__).parents[1]
SCENES = 1_000_000  # the seed of the scenes that are tuned on; those of the quickstart and of the questions are small
QUESTIONS = (101, 102, 103)  # the seeds of the questions
CAPTIONS = 0.7  # of the prompts; the others keep the other skills
OPTIONS = {
    "grpo": """--reward {program}:in_place --num_generations 8 --per_device_train_batch_size 64 --temperature 1.0
        --max_completion_length 48 --learning_rate 3e-4 --warmup_steps 10 --beta 0.0 --scale_rewards none""",
    "dpo": "--per_device_train_batch_size 16 --learning_rate 3e-4 --warmup_steps 10 --beta 0.1 --loss_type sigmoid",
}


def in_place(completions: list[list[dict]], answer: list[str], **kwargs) -> list[float]:
    """Reward each object that is described rightly in its place, and once more a reply that is right as a whole."""
    rewards = []
    for reply, right in zip(completions, answer, strict=True):
        said, true = (text.strip().split(", ") for text in (reply[0]["content"], right))
        hits = sum(a == b for a, b in zip(said, true, strict=False))
        rewards.append((hits / max(len(said), len(true)) + (said == true)) / 2)
    return rewards


def nearly_right(answer: str, rng: random.Random) -> str:
    """A caption in which one object has another size, colour, shape or place."""
    objects = answer.split(", ")
    which = rng.randrange(len(objects))
    words = objects[which].split(" ")  # "small purple square at left"
    kinds = {0: SIZES, 1: COLOURS, 2: SHAPES, 4: CELLS}
    place = rng.choice(list(kinds))
    words[place] = rng.choice([word for word in kinds[place] if word != words[place]])
    objects[which] = " ".join(words)
    return ", ".join(objects)


def write_records(kind: str, count: int, folder: Path) -> Path:
    """Write what is tuned on: records and their pictures; for DPO each with a rejected reply."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(count):
        rng = random.Random(f"{SCENES} {index}")
        shown = (
            example("caption", SCENES, index) if kind == "dpo" or rng.random() < CAPTIONS else mixture(SCENES, index)
        )
        names = [f"{index}-{number}.png" for number in range(len(shown.images))]
        for name, image in zip(names, shown.images, strict=True):
            image.save(folder / name)
        line = {"messages": shown.messages, "images": names}
        lines.append(line | ({"rejected": nearly_right(shown.answer, rng)} if kind == "dpo" else {}))
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def tune(kind: str, adapter: Path, data: Path, steps: int, seed: int, output_dir: Path) -> None:
    """Run the program that users run."""
    options = OPTIONS[kind].format(program=Path(__file__).resolve()).split()
    command = [sys.executable, EXAMPLES / f"train_{kind}.py", "--model_name_or_path", adapter, "--data", data]
    command += [
        "--output_dir",
        output_dir,
        "--max_steps",
        steps,
        "--seed",
        seed,
        *options,
        "--lr_scheduler_type",
        "cosine",
    ]
    command += [
        "--logging_steps",
        5,
        "--save_strategy",
        "no",
        "--report_to",
        "none",
        "--dataloader_pin_memory",
        "false",
    ]
    subprocess.run(list(map(str, command)), check=True)


def ask(adapter: Path, skills: Sequence[str], count: int) -> dict[str, list[bool]]:
    """Which questions of each skill are answered rightly, over all seeds."""
    model, processor = load(adapter)
    right = {}
    for skill in skills:
        asked = [example(skill, seed, index, "test") for seed in QUESTIONS for index in range(count)]
        replies = evaluation.answer(model, processor, asked, skill)
        right[skill] = [e.answer == reply for e, reply in zip(asked, replies, strict=True)]
    return right


@torch.inference_mode()
def prefers(adapter: Path, count: int) -> list[bool]:
    """Whether the right caption of a scene is more likely than a nearly right one."""
    model, processor = load(adapter)

    def likelihood(shown: Sequence[Example], answers: Sequence[str]) -> torch.Tensor:
        chats = [
            [*e.messages[:-1], {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
            for e, answer in zip(shown, answers, strict=True)
        ]
        batch = processor.apply_chat_template(
            chats,
            images=[e.images for e in shown],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        ).to(model.device)
        learnt = batch.pop("assistant_masks")[:, 1:]
        logits = model(**batch).logits[:, :-1].log_softmax(-1)
        return (logits.gather(2, batch["input_ids"][:, 1:, None])[..., 0] * learnt).sum(1)

    preferred = []
    for seed in QUESTIONS:
        asked = [example("caption", seed, index, "test") for index in range(count)]
        wrong = [nearly_right(e.answer, random.Random(f"{seed} {index}")) for index, e in enumerate(asked)]
        for start in range(0, count, evaluation.BATCH):
            part = slice(start, start + evaluation.BATCH)
            right = likelihood(asked[part], [e.answer for e in asked[part]])
            preferred += (right > likelihood(asked[part], wrong[part])).tolist()
    return preferred


def compare(before: list[bool], after: list[bool]) -> dict:
    """Shares before and after, and an exact test of the questions in which the two differ (McNemar's)."""
    gained = sum(b and not a for a, b in zip(before, after, strict=True))
    lost = sum(a and not b for a, b in zip(before, after, strict=True))
    p = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    return {
        "before": evaluation.share(sum(before), len(before)),
        "after": evaluation.share(sum(after), len(after)),
        "gained": gained,
        "lost": lost,
        "p": p,
    }


def main() -> None:
    """Draw, tune, ask, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=list(OPTIONS))
    parser.add_argument("--adapter", type=Path, default=Path("outputs/quickstart/adapter"))
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--scenes", type=int, default=3_000, help="records that are drawn")
    parser.add_argument("--count", type=int, default=400, help="questions of each skill and seed")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.perf_counter()
    data = write_records(args.kind, args.scenes, args.output_dir / "data")
    tune(args.kind, args.adapter, data, args.steps, args.seed, args.output_dir / "adapter")
    tuned = time.perf_counter() - start
    print(f"tuned after {tuned:.0f} s", flush=True)
    skills = [*MIXTURE, "unseen_pairs"]
    before, after = (ask(adapter, skills, args.count) for adapter in (args.adapter, args.output_dir / "adapter"))
    rows = {skill: compare(before[skill], after[skill]) for skill in skills}
    others = [skill for skill in skills if skill != "caption"]
    rows["all but captions"] = compare(*(sum((of[skill] for skill in others), []) for of in (before, after)))
    if args.kind == "dpo":
        rows["preferred"] = compare(*(prefers(a, args.count) for a in (args.adapter, args.output_dir / "adapter")))
    for name, row in rows.items():
        print(
            f"{name:18}{row['before']['accuracy']:>8.2%} ->{row['after']['accuracy']:>8.2%}"
            f"   +{row['gained']} -{row['lost']}   p {row['p']:.3g}"
        )
    command = f"python examples/measurements/preference.py {args.kind} --steps {args.steps} --seed {args.seed}"
    report = evaluation.measured_with(command) | {"seconds of tuning": round(tuned, 1), "skills": rows}
    (args.output_dir / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()

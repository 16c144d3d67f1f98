"""Measure on the tiny world what rewards and preferences teach: GRPO and DPO from the adapter of the quickstart.

    python examples/measurements/preference.py grpo --adapter outputs/quickstart/adapter --output-dir outputs/grpo
    python examples/measurements/preference.py dpo --adapter outputs/quickstart/adapter --output-dir outputs/dpo

Draws fresh scenes, keeps those of whose caption the adapter is in doubt, tunes by `train_grpo.py` or `train_dpo.py` as
a user would, and asks both adapters the same questions about other scenes, of three seeds. Writes `report.json`: what
each skill got right before and after, in how many questions the two differ, and for DPO how often the right caption is
more likely than one that is nearly right. Options of the program that tunes can follow: `--learning_rate 1e-4`.
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
from scipy.stats import binomtest
from transformers import PreTrainedModel, ProcessorMixin


sys.path.insert(0, str(Path(__file__).parents[1]))
from quickstart import load
from tiny_world import evaluation
from tiny_world.dialogue import Example
from tiny_world.mixture import MIXTURE, example, mixture
from tiny_world.scenes import CELLS, COLOURS, SHAPES, SIZES


EXAMPLES = Path(__file__).parents[1]
SCENES = 1_000_000  # the seed of the scenes that are tuned on; those of the quickstart and of the questions are small
QUESTIONS = (201, 202, 203)  # the seeds of the questions
DOUBTFUL = (0.02, 0.9)  # how likely a right caption is that is learnt: of samples of the others, all earn the same
CAPTIONS = 0.7  # of the records; the others are the replies of other skills that are least sure
WORDS = 8  # so many captions with one word changed are looked at for the likeliest
DRAWN = {"grpo": 4_000, "dpo": 8_000}  # captions, of which about a third are doubtful
STEPS = {"grpo": 270, "dpo": 260}
OPTIONS = {
    "grpo": f"""--reward {Path(__file__).resolve()}:in_place --num_generations 8 --per_device_train_batch_size 64
        --max_completion_length 28 --temperature 1.3 --learning_rate 3e-4 --beta 0.0 --scale_rewards none""",
    "dpo": """--per_device_train_batch_size 16 --learning_rate 2e-4 --beta 0.1 --loss_type sigmoid sft
        --loss_weights 1.0 10.0""",
}
OPTIONS_OF_BOTH = """--dtype float32 --warmup_steps 10 --lr_scheduler_type cosine --activation_checkpointing false
    --logging_steps 5 --save_strategy no --report_to none --dataloader_pin_memory false"""


def in_place(completions: list[list[dict]], answer: list[str], **kwargs) -> list[float]:
    """Reward each object that is described rightly in its place, and once more a reply that is right as a whole."""
    rewards = []
    for reply, right in zip(completions, answer, strict=True):
        said, true = (text.strip().split(", ") for text in (reply[0]["content"], right))
        hits = sum(a == b for a, b in zip(said, true, strict=False))
        rewards.append((hits / max(len(said), len(true)) + (said == true)) / 2)
    return rewards


def with_another_word(caption: str) -> list[str]:
    """All captions in which one object has another size, colour, shape or place in the picture."""
    words = caption.split(" ")  # "small purple square at left, large ..."
    found = []
    for index, word in enumerate(words):
        said, comma = word.rstrip(","), word[len(word.rstrip(",")) :]
        kind = (SIZES, COLOURS, SHAPES, (), CELLS)[index % 5]
        found += [" ".join([*words[:index], other + comma, *words[index + 1 :]]) for other in kind if other != said]
    return found


def in_another_order(caption: str) -> list[str]:
    """All captions in which an object and the next one have changed places in the order."""
    objects = caption.split(", ")
    pairs = [(i, i + 1) for i in range(len(objects) - 1)]
    return [", ".join([*objects[:i], objects[j], objects[i], *objects[j + 1 :]]) for i, j in pairs]


@torch.inference_mode()
def likelihoods(
    model: PreTrainedModel, processor: ProcessorMixin, examples: Sequence[Example], replies: Sequence[str]
) -> torch.Tensor:
    """How likely each reply is as the last one of its dialogue: `(N,)`, natural logarithms."""
    found = []
    for start in range(0, len(examples), evaluation.BATCH):
        part = slice(start, start + evaluation.BATCH)
        dialogues = [
            [*e.messages[:-1], {"role": "assistant", "content": [{"type": "text", "text": reply}]}]
            for e, reply in zip(examples[part], replies[part], strict=True)
        ]
        batch = processor.apply_chat_template(
            dialogues,
            images=[e.images for e in examples[part]],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        ).to(model.device)
        said = batch.pop("assistant_masks")
        turn = (said.diff(dim=1) == 1).cumsum(1)
        last = (turn == turn[:, -1:]) & said[:, 1:].bool()
        logits = model(**batch).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
        found.append(-(loss * last).sum(1).cpu())
    return torch.cat(found)


def nearly_right(
    model: PreTrainedModel, processor: ProcessorMixin, examples: Sequence[Example], rng: random.Random
) -> list[str]:
    """For each caption the likeliest of wrong ones: of all in another order, and of some with another word."""
    wrong = [[*in_another_order(e.answer), *rng.sample(with_another_word(e.answer), WORDS)] for e in examples]
    repeated = [e for e, captions in zip(examples, wrong, strict=True) for _ in captions]
    found = iter(likelihoods(model, processor, repeated, sum(wrong, [])).tolist())
    return [max(captions, key=lambda _: next(found)) for captions in wrong]


def write_records(kind: str, adapter: Path, count: int, folder: Path) -> Path:
    """Write what is tuned on, out of `count` captions: records and their pictures; for DPO with a rejected reply."""
    model, processor = load(adapter)

    def certainty(examples: Sequence[Example]) -> list[float]:
        return likelihoods(model, processor, examples, [e.answer for e in examples]).exp().tolist()

    captions = [example("caption", SCENES, index) for index in range(count)]
    low, high = DOUBTFUL
    captions = [e for e, p in zip(captions, certainty(captions), strict=True) if low < p < high]
    others = [e for index in range(count) if (e := mixture(SCENES, index)).skill != "caption"]
    # Of those that another one answers otherwise, for a wrong reply to stand beside them.
    others = [e for e in others if any(o.skill == e.skill and o.answer != e.answer for o in others)]
    sure = certainty(others)
    least = sorted(range(len(others)), key=sure.__getitem__)[: round(len(captions) * (1 - CAPTIONS) / CAPTIONS)]
    kept = captions + [others[index] for index in least]
    more = [{}] * len(kept)
    if kind == "dpo":
        rng = random.Random(SCENES)
        wrong = nearly_right(model, processor, captions, rng)
        for e in kept[len(captions) :]:
            wrong.append(rng.choice([o.answer for o in others if o.skill == e.skill and o.answer != e.answer]))
        more = [{"rejected": reply} for reply in wrong]
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, (shown, fields) in enumerate(zip(kept, more, strict=True)):
        names = [f"{index}-{number}.png" for number in range(len(shown.images))]
        for name, image in zip(names, shown.images, strict=True):
            image.save(folder / name)
        lines.append(json.dumps({"messages": shown.messages, "images": names} | fields) + "\n")
    path = folder / "records.jsonl"
    path.write_text("".join(lines))
    return path


def ask(adapter: Path, skills: Sequence[str], count: int) -> dict[str, list[bool]]:
    """Which questions of each skill are answered rightly, over all seeds."""
    model, processor = load(adapter)
    right = {}
    for skill in skills:
        asked = [example(skill, seed, index, "test") for seed in QUESTIONS for index in range(count)]
        replies = evaluation.answer(model, processor, asked, skill)
        right[skill] = [e.answer == reply for e, reply in zip(asked, replies, strict=True)]
    return right


def prefer(before: Path, after: Path, count: int) -> list[dict[str, list[bool]]]:
    """Whether the right caption is more likely than a wrong one, the likeliest of them before.

    Returns:
        For each adapter, the captions whose wrong one has another order, those where it has another word, and all.
    """
    asked = [example("caption", seed, index, "test") for seed in QUESTIONS for index in range(count)]
    wrong = nearly_right(*load(before), asked, random.Random(0))
    ordered = [sorted(e.answer.split(", ")) == sorted(w.split(", ")) for e, w in zip(asked, wrong, strict=True)]
    found = []
    for adapter in (before, after):
        model, processor = load(adapter)
        right = likelihoods(model, processor, asked, [e.answer for e in asked])
        won = (right > likelihoods(model, processor, asked, wrong)).tolist()
        rows = {"to another order": [True], "to another word": [False], "preferred": [True, False]}
        found.append({name: [w for w, o in zip(won, ordered, strict=True) if o in of] for name, of in rows.items()})
    return found


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
    parser.add_argument("--scenes", type=int, help="captions that are drawn")
    parser.add_argument("--count", type=int, default=250, help="questions of each skill and seed")
    parser.add_argument("--seed", type=int, default=0, help="of tuning")
    args, options = parser.parse_known_args()
    start = time.perf_counter()
    data = write_records(args.kind, args.adapter, args.scenes or DRAWN[args.kind], args.output_dir / "data")
    print(f"{len(data.read_text().splitlines())} records after {time.perf_counter() - start:.0f} s", flush=True)
    tuned = args.output_dir / "adapter"
    command = [sys.executable, EXAMPLES / f"train_{args.kind}.py", "--model_name_or_path", args.adapter]
    command += ["--data", data, "--output_dir", tuned, "--max_steps", STEPS[args.kind], "--seed", args.seed]
    command += [*OPTIONS[args.kind].split(), *OPTIONS_OF_BOTH.split(), *options]
    subprocess.run(list(map(str, command)), check=True)
    print(f"tuned after {time.perf_counter() - start:.0f} s", flush=True)
    skills = [*MIXTURE, "unseen_pairs"]
    before, after = (ask(adapter, skills, args.count) for adapter in (args.adapter, tuned))
    if args.kind == "dpo":
        for right, preferred in zip((before, after), prefer(args.adapter, tuned, args.count), strict=True):
            right |= preferred
    rows = {name: compare(before[name], after[name]) for name in before}
    for name, row in rows.items():
        print(
            f"{name:28}{row['before']['accuracy']:>8.2%} ->{row['after']['accuracy']:>8.2%}"
            f"   +{row['gained']} -{row['lost']}   p {row['p']:.3g}"
        )
    command = f"python examples/measurements/preference.py {args.kind} --seed {args.seed} {' '.join(options)}".strip()
    seconds = round(time.perf_counter() - start, 1)
    report = evaluation.measured_with(command) | {"seconds": seconds, "rows": rows}
    (args.output_dir / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"{seconds:.0f} s in all")


if __name__ == "__main__":
    main()

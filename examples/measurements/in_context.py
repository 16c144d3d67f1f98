"""Measure how a model learns names from pictures in its prompt: right answers over the number of examples.

    python examples/measurements/in_context.py

An episode gives made-up names to three colours or to three shapes, shows up to eight pictures with their names, and
asks for the name of one more; nothing is trained. "Trained" names, of one token, and "spelled" ones, of several, were
names in the base's training, each time of another class; "new" names are spelled and were in none of its documents.
Prints a table; `in_context.json` and `in_context.png` go to `outputs/in_context`.

Two scores: "said", all tokens of the name are the most likely of the whole vocabulary, which is what greedy decoding
writes, and "chosen", the most likely of the episode's three names. The control, "shuffled": the names stay, and each
example's picture is drawn anew from the three classes, whatever its name. Which name the query has is then independent
of all that the prompt holds: any name shown is right in one case of three. (A permutation of the pictures is no such
control: with one example it changes nothing.)
"""

import argparse
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from processing_mmgpt.evaluation.few_shot import few_shot


sys.path.insert(0, str(Path(__file__).parents[1]))
from few_shot import BASE, labelled_pictures, prompts
from tiny_world import evaluation
from tiny_world.corpus import PSEUDO_WORDS
from tiny_world.language import SPELLED_WORDS
from tiny_world.scenes import COLOURS, SHAPES


matplotlib.use("Agg")
WAYS = 3  # classes of an episode
BATCH = 50  # prompts
RULES = {"colours": tuple(COLOURS), "shapes": tuple(SHAPES)}
NAMES = {"trained": PSEUDO_WORDS, "spelled": SPELLED_WORDS["train"], "new": SPELLED_WORDS["test"]}
PICTURES, SCORES = ("own", "shuffled"), ("said", "chosen")


@dataclass(frozen=True)
class Episode:
    """What is shown and asked. `support` holds the records for either of `PICTURES`; the answer is one of `names`."""

    support: dict[str, list[dict]]
    query: dict
    names: list[str]
    answer: str


def draw_episode(rng: random.Random, classes: tuple[str, ...], words: tuple[str, ...], most: int) -> Episode:
    """Give `WAYS` of the `words` to as many of the `classes`, and draw `most` examples and a query."""
    names = dict(zip(rng.sample(classes, WAYS), rng.sample(words, WAYS), strict=True))
    *own, asked = labelled_pictures(rng, most + 1, names)
    others = labelled_pictures(rng, most, names)
    shuffled = [{**record, "images": other["images"]} for record, other in zip(own, others, strict=True)]
    question, reply = asked["messages"]
    query = {**asked, "messages": [question]}
    return Episode({"own": own, "shuffled": shuffled}, query, list(names.values()), reply["content"].strip())


@torch.inference_mode()
def count_right(
    model: PreTrainedModel, processor: ProcessorMixin, episodes: list[Episode], pictures: str, shots: int
) -> dict[str, int]:
    """How many episodes are right by each of `SCORES`, with the first `shots` examples of their support.

    Each prompt is a row for each of its episode's `W` names, which are `L` tokens or fewer.
    """
    right = dict.fromkeys(SCORES, 0)
    for start in range(0, len(episodes), BATCH):
        some = episodes[start : start + BATCH]
        batch = prompts(processor, [few_shot(e.support[pictures][:shots], e.query) for e in some])
        names = processor.tokenizer(
            [f" {name}" for episode in some for name in episode.names],
            add_special_tokens=False,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )  # (B * W, L)
        latents = model.model.encode_images(batch["pixel_values"])  # (B, M, N, D)
        prompt = {key: batch[key].repeat_interleave(WAYS, dim=0) for key in ("input_ids", "attention_mask")}
        logits = model(
            **{key: torch.cat([ids, names[key]], dim=1) for key, ids in prompt.items()},
            image_latents=latents.repeat_interleave(WAYS, dim=0),
            logits_to_keep=names["input_ids"].shape[1] + 1,
        ).logits[:, :-1]  # (B * W, L, vocabulary)
        is_name = names["attention_mask"].bool()
        is_likeliest = (logits.argmax(dim=-1) == names["input_ids"]) | ~is_name
        said = is_likeliest.all(dim=1).view(-1, WAYS)  # (B, W)
        each = logits.log_softmax(dim=-1).gather(-1, names["input_ids"][..., None]).squeeze(-1)  # (B * W, L)
        chosen = each.where(is_name, 0.0).sum(dim=1).view(-1, WAYS).argmax(dim=1)  # (B,)
        for row, episode in enumerate(some):
            answer = episode.names.index(episode.answer)
            right["said"] += said[row, answer].item()
            right["chosen"] += chosen[row].item() == answer
    return right


def measure(seeds: list[int], shots: list[int], count: int, names: list[str]) -> list[dict]:
    """One row for every kind of names, rule, kind of pictures and number of examples, over `count` episodes a seed."""
    model = AutoModelForImageTextToText.from_pretrained(BASE, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(BASE)
    rows = []
    for kind, rule in tqdm([(kind, rule) for kind in names for rule in RULES], desc="Episodes", leave=False):
        episodes = {
            seed: [draw_episode(rng, RULES[rule], NAMES[kind], max(shots)) for _ in range(count)]
            for seed in seeds
            for rng in [random.Random(f"{kind} {rule} {seed}")]
        }
        # Without an example there is no picture to shuffle.
        for pictures, number in [(p, n) for p in PICTURES for n in shots if n or p == "own"]:
            right = [count_right(model, processor, episodes[seed], pictures, number) for seed in seeds]
            row = {"names": kind, "rule": rule, "pictures": pictures, "shots": number}
            for score in SCORES:
                figures = evaluation.share(sum(r[score] for r in right), count * len(seeds))
                row[score] = figures | {"by_seed": [r[score] / count for r in right]}
            rows.append(row)
    return rows


def _line(rows: list[dict], **wanted: str) -> dict[int, dict]:
    """The rows of one line of table or plot, by their shots."""
    return {row["shots"]: row for row in rows if all(row[key] == value for key, value in wanted.items())}


def table(rows: list[dict]) -> str:
    """Markdown: right in percent, and the Wilson interval of all seeds together at 95 %."""
    shots = sorted({row["shots"] for row in rows})
    lines = [["names", "of", "score", "pictures", *map(str, shots)], ["---"] * (4 + len(shots))]
    kinds = dict.fromkeys((row["names"], row["rule"]) for row in rows)
    for names, rule, score, pictures in [(*kind, s, p) for kind in kinds for s in SCORES for p in PICTURES]:
        line = _line(rows, names=names, rule=rule, pictures=pictures)
        figures = [line[n][score] if n in line else None for n in shots]
        cells = [f and f"{f['accuracy']:.1%} ({100 * f['low']:.0f} - {100 * f['high']:.0f})" for f in figures]
        lines.append([names, rule, score, pictures, *(cell or "" for cell in cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(rows: list[dict], path: Path) -> None:
    """Save the figure as PNG: a column for each kind of names, a row for each score."""
    kinds = list(dict.fromkeys(row["names"] for row in rows))
    shots = sorted({row["shots"] for row in rows})
    figure = Figure(figsize=(1.5 + 4.2 * len(kinds), 7), layout="constrained")
    grid = figure.subplots(len(SCORES), len(kinds), sharex=True, sharey=True, squeeze=False)
    for axes, (score, names) in zip(grid.flat, [(s, k) for s in SCORES for k in kinds], strict=True):
        for (rule, colour), pictures in [
            (r, p) for r in zip(RULES, ("#0969da", "#bf8700"), strict=True) for p in PICTURES
        ]:
            line = _line(rows, names=names, rule=rule, pictures=pictures)
            right, low, high = (
                [100 * row[score][key] for row in line.values()] for key in ("accuracy", "low", "high")
            )
            style = "-" if pictures == "own" else "--"
            axes.plot(list(line), right, f"o{style}", ms=3, color=colour, label=f"{rule}, {pictures} pictures")
            axes.fill_between(list(line), low, high, color=colour, alpha=0.15, lw=0)
        axes.axhline(100 / WAYS, color="0.6", ls=":", label="one of three")
        if score == "said":  # a name that was not shown cannot be known
            axes.plot(shots, [100 * (1 - (1 - 1 / WAYS) ** n) for n in shots], color="0.6", label="name was shown")
        axes.set(title=f"{names} names, {score}", ylim=(-3, 103), xticks=shots)
        axes.grid(alpha=0.3)
    for axes in grid[:, 0]:
        axes.set_ylabel("right, %")
    for axes in grid[-1]:
        axes.set_xlabel("examples in the prompt")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shots", type=int, nargs="+", default=[0, 1, 2, 4, 8])
    parser.add_argument("--count", type=int, default=200, help="episodes for each seed, rule and kind of names")
    parser.add_argument("--names", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/in_context"))
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    report = evaluation.measured_with(" ".join(["python", "examples/measurements/in_context.py", *sys.argv[1:]]))
    report |= {"seeds": args.seeds, "rows": measure(args.seeds, args.shots, args.count, args.names)}
    (args.output_dir / "in_context.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(report["rows"], args.output_dir / "in_context.png")
    print(table(report["rows"]))


if __name__ == "__main__":
    main()

"""Measure what tuning on pictures and text together gives, beside tuning on either kind of data alone.

    python examples/measurements/joint.py

"Joint" is the quickstart: its figures are those of `tests/results/quickstart.json`. The other two ways differ in their
data alone, which are the part of its mixture with pictures, or the part without. Six tunings, a few minutes each on
two cores; one that is done is not run again. Writes `joint.json` and the adapters to `outputs/joint`, and prints the
table of docs/tiny_world.md.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import mean

from transformers import set_seed

from modeling_mmgpt.saving.whole import whole


sys.path.insert(0, str(Path(__file__).parents[1]))
from quickstart import BATCH, batches_of_like_length, load, tune
from tiny_world import evaluation, language, questions
from tiny_world.mixture import MIXTURE, mixture


JOINT = Path(__file__).parents[2] / "tests" / "results" / "quickstart.json"
PARTS = {"pictures only": questions.SKILLS, "text only": language.SKILLS}


def measure(part: str, seed: int, steps: int, count: int, folder: Path) -> dict[str, dict]:
    """Tune on one part of the quickstart's mixture, and ask `count` questions of each skill; or read what was said."""
    answers = folder / f"{part}, {steps} steps, {count} questions, seed {seed}".replace(" ", "_") / "answers.json"
    if not answers.exists():
        set_seed(seed)
        shares = {skill: share for skill, share in MIXTURE.items() if skill in PARTS[part]}
        examples = [mixture(seed, index, shares=shares) for index in range(steps * BATCH)]
        tune(batches_of_like_length(examples, seed), seed, answers.parent)
        skills, _, _ = evaluation.evaluate(*load(answers.parent / "adapter"), seed, count, control_count=0)
        with whole(answers) as unfinished:
            unfinished.write_text(json.dumps(skills))
    return json.loads(answers.read_text())


def table(runs: dict[str, dict[str, dict]]) -> str:
    """Markdown of `{way: {seed: {skill: score}}}`, right answers in percent.

    A cell has the mean over the seeds, and the lowest and the highest end of their 95 % intervals; the last two lines
    have the mean over the skills for each seed.
    """
    lines = [["", *runs], ["---"] * (1 + len(runs))]
    for skill in (*evaluation.SEEN, *evaluation.OTHER):
        scores = [[skills[skill] for skills in seeds.values()] for seeds in runs.values()]
        lines.append([skill.replace("_", " "), *map(_cell, scores)])
    for name, is_text in (("with pictures", False), ("text alone", True)):
        lines.append([f"**mean, {name}**", *(_means(seeds, is_text) for seeds in runs.values())])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(scores: list[dict]) -> str:
    low, high = min(s["low"] for s in scores), max(s["high"] for s in scores)
    return f"{100 * mean(s['accuracy'] for s in scores):.1f} ({100 * low:.0f} to {100 * high:.0f})"


def _means(seeds: dict[str, dict], is_text: bool) -> str:
    of_kind = (
        [s["accuracy"] for skill, s in row.items() if (skill in language.SKILLS) == is_text] for row in seeds.values()
    )
    return " / ".join(f"{100 * mean(accuracies):.1f}" for accuracies in of_kind)


def main() -> None:
    """Tune, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=500, help="tuning steps of 32 dialogues each")
    parser.add_argument("--count", type=int, default=400, help="test questions of each skill")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/joint"))
    args = parser.parse_args()
    joint = {seed: report["skills"] for seed, report in json.loads(JOINT.read_text())["reports"].items()}
    runs = {"joint": {str(seed): joint[str(seed)] for seed in args.seeds}}
    for part in PARTS:
        runs[part] = {str(s): measure(part, s, args.steps, args.count, args.output_dir) for s in args.seeds}
    report = evaluation.measured_with(" ".join(["python", "examples/measurements/joint.py", *sys.argv[1:]]))
    (args.output_dir / "joint.json").write_text(json.dumps({**report, "runs": runs}, indent=1) + "\n")
    print(table(runs))


if __name__ == "__main__":
    main()

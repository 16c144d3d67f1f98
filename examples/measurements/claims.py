"""Measure what Multimodal-GPT's paper claims, and what it left open, on the tiny world: three tunings a claim and arm.

    python examples/measurements/claims.py joint          # pictures and text together, against either alone
    python examples/measurements/claims.py short_answers  # how much data in one word makes all replies one word
    python examples/measurements/claims.py passes         # mixed batches, against pictures and text apart
    python examples/build_base.py --media_attention following --output_dir outputs/base_following
    python examples/measurements/claims.py attention      # tokens after a picture attend to it, or those before it
    python examples/measurements/claims.py table          # tables and plots of docs/claims.md, from tests/results

A tuning takes some four minutes on two cores; on a GPU, `--processes 12` runs so many side by side. Each claim ends in
`claims_<claim>.json` and `.png` in `outputs/claims`. Tunings that are done, also for another claim, are not run again.
"""

import argparse
import json
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed

from modeling_mmgpt.saving.whole import whole


sys.path.insert(0, str(Path(__file__).parents[1]))
from claims_report import draw, tables
from quickstart import BASE, BATCH, batches_of_like_length, load, tune
from tiny_world import evaluation, language, questions, sentences
from tiny_world.dialogue import Example
from tiny_world.mixture import MIXTURE, mixture


OUTPUTS = Path("outputs")
ROOT = Path(__file__).parents[2]
PICTURES = {skill: share for skill, share in MIXTURE.items() if skill in questions.SKILLS}
TEXT = {skill: share for skill, share in MIXTURE.items() if skill in language.SKILLS}


def mixed(seed: int, steps: int, shares: dict[str, float] = MIXTURE) -> list[Example]:
    """The quickstart's examples, or as many from a part of its mixture."""
    examples = [mixture(seed, index, shares=shares) for index in range(steps * BATCH)]
    return batches_of_like_length(examples, seed)


def in_turns(seed: int, steps: int, width: int) -> list[Example]:
    """`width` examples with pictures, as many without, and so on: the same examples whatever the width."""
    half = steps * BATCH // 2
    kinds = [[mixture(seed, index, shares=shares) for index in range(half)] for shares in (PICTURES, TEXT)]
    return [e for start in range(0, half, width) for examples in kinds for e in examples[start : start + width]]


def short_answers(seed: int, steps: int, share: float) -> list[Example]:
    """Instructions about pictures, a `share` of them answered in a word."""
    return batches_of_like_length(sentences.two_sources(seed, steps * BATCH, share), seed)


def ask_skills(adapter: Path, seed: int, count: int) -> dict[str, dict]:
    """What is right of each skill of the quickstart."""
    return evaluation.evaluate(*load(adapter), seed, count, control_count=0)[0]


def ask_sentences(adapter: Path, seed: int, count: int) -> dict[str, dict]:
    """What is right of each kind of `sentences.py`, in either form, and how many words the replies have."""
    model, processor = load(adapter)
    rows = {}
    for kind in sentences.KINDS:
        examples = [sentences.reply(kind, seed, index, in_a_word=True, split="test") for index in range(count)]
        replies = evaluation.answer(model, processor, examples, kind)
        # The answer ends the sentence.
        meant = replies if kind == "caption" else [(reply.split() or [""])[-1] for reply in replies]
        words = sum(len(reply.split()) for reply in replies) / count
        rows[kind] = evaluation.score(examples, meant) | {"words": words, "example": replies[0]}
    return rows


@dataclass(frozen=True)
class Arm:
    """One way to tune: `examples(seed, steps)`, in the order in which they are taken, and what is asked afterwards."""

    examples: Callable[[int, int], list[Example]] = mixed
    steps: int = 500
    passes: int = 1
    base: Path = BASE
    ask: Callable[[Path, int, int], dict[str, dict]] = ask_skills


FOLLOWING, SWITCHED = OUTPUTS / "base_following" / "base", OUTPUTS / "base_switched"
STEPS = (100, 500)  # of the arms of "passes": half-way up, and at the end
ARMS = {
    "joint (preceding)": Arm(),
    "pictures only": Arm(partial(mixed, shares=PICTURES)),
    "text only": Arm(partial(mixed, shares=TEXT)),
    "joint (following)": Arm(base=FOLLOWING),
    "joint (switched)": Arm(base=SWITCHED),
}
ARMS |= {
    f"{percent} % short": Arm(partial(short_answers, share=percent / 100), steps=300, ask=ask_sentences)
    for percent in (0, 20, 40, 60, 80, 100)
}
for steps in STEPS:
    ARMS |= {
        f"mixed, {steps} steps": Arm(partial(in_turns, width=BATCH // 2), steps),
        f"two passes, {steps} steps": Arm(partial(in_turns, width=BATCH // 2), steps, passes=2),
        f"alternating, {steps} steps": Arm(partial(in_turns, width=BATCH), steps),
    }
# The arms of each claim, by what is to be compared with what: a table and a panel of the plot each.
CLAIMS = {
    "joint": [["joint (preceding)", "pictures only", "text only"]],
    "short_answers": [[name for name in ARMS if name.endswith("short")]],
    "passes": [[name for name in ARMS if name.endswith(f"{steps} steps")] for steps in STEPS],
    "attention": [["joint (preceding)", "joint (following)", "joint (switched)"]],
}


def run(name: str, seed: int, steps: int, count: int) -> dict[str, dict]:
    """Tune one arm with one seed and ask it, or read what it said when it was run before."""
    arm = ARMS[name]
    folder = OUTPUTS / "claims" / f"{name}, {steps} steps, {count} questions, seed {seed}".replace(" ", "_")
    answers = folder / "answers.json"
    if not answers.exists():
        set_seed(seed)
        tune(arm.examples(seed, steps), seed, folder, arm.base, arm.passes)
        with whole(answers) as unfinished:
            unfinished.write_text(json.dumps(arm.ask(folder / "adapter", seed, count)))
    return json.loads(answers.read_text())


def prepare_bases(names: set[str]) -> None:
    """See to it that the bases of these arms are there: switch the shipped one, and ask for the one to be built."""
    if any(ARMS[name].base == SWITCHED for name in names):
        model = AutoModelForImageTextToText.from_pretrained(BASE, dtype="auto", media_attention="following")
        model.save_pretrained(SWITCHED)
        AutoProcessor.from_pretrained(BASE).save_pretrained(SWITCHED)
    if any(ARMS[name].base == FOLLOWING for name in names) and not (FOLLOWING / "config.json").exists():
        build = f"python examples/build_base.py --media_attention following --output_dir {FOLLOWING.parent}"
        raise SystemExit(f"There is no base in {FOLLOWING}. Build it first: {build}")


def measure(claims: list[str], seeds: list[int], steps: int | None, count: int, processes: int) -> None:
    """Run what the claims need, `processes` tunings at a time, and write what each claim shows.

    `steps` take the place of each arm's own; `count` questions are asked of each skill.
    """
    arms = {claim: [name for panel in CLAIMS[claim] for name in panel] for claim in claims}
    names = dict.fromkeys(name for claim in claims for name in arms[claim])
    prepare_bases(set(names))
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:  # CUDA cannot be forked
        runs = {
            name: {str(seed): pool.submit(run, name, seed, steps or ARMS[name].steps, count) for seed in seeds}
            for name in names
        }
        for claim in claims:
            report = evaluation.measured_with(" ".join(["python", "examples/measurements/claims.py", *sys.argv[1:]]))
            report["runs"] = {name: {seed: r.result() for seed, r in runs[name].items()} for name in arms[claim]}
            path = OUTPUTS / "claims" / f"claims_{claim}.json"
            path.write_text(json.dumps(report, indent=1) + "\n")
            draw(report, CLAIMS[claim], path.with_suffix(".png"))
            print(tables(report, CLAIMS[claim]), flush=True)


def publish() -> None:
    """Print the tables of `docs/claims.md`, and draw its plots."""
    for claim, panels in CLAIMS.items():
        report = json.loads((ROOT / "tests" / "results" / f"claims_{claim}.json").read_text())
        print(f"{claim}\n\n{tables(report, panels)}\n")
        draw(report, panels, ROOT / "docs" / f"claims_{claim}.png")


def main() -> None:
    """Measure claims, or print the tables of what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("claims", nargs="+", choices=(*CLAIMS, "table"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="tuning steps, in place of each arm's own")
    parser.add_argument("--count", type=int, default=400, help="test questions of each skill")
    parser.add_argument("--processes", type=int, default=1, help="tunings at a time")
    args = parser.parse_args()
    if claims := [claim for claim in args.claims if claim != "table"]:
        measure(claims, args.seeds, args.steps, args.count, args.processes)
    if "table" in args.claims:
        publish()


if __name__ == "__main__":
    main()

"""Measure whether a model learns a made-up word from examples in its prompt: right answers over their number.

    python -m examples.real_pictures.in_context outputs/real --data outputs/real_pictures --output_dir outputs/real

An episode gives two made-up words to two kinds of things, shows up to eight pictures of the validation split, each a
turn with its word for an answer, and asks for the word of one of the test split. Nothing is trained. Two scores:
"said", greedy decoding writes the word, and "chosen", it is the likelier of the two; chance is one half. The pictures
are photographs or, in episodes of their own, compositions, where what is asked about was never seen in training. The
control, "shuffled": the words stay, and the pictures change places among them at random.
"""

import argparse
import json
import random
from pathlib import Path

import torch

from processing_mmgpt import MMGPTCollator

from .evaluate import interval, is_right, load, prompt, read


WORDS = ["dax", "wug", "toma", "fep", "zorp", "blick", "kiki", "lorp", "modi", "vash"]
QUESTION = "What is this called?"


def question() -> dict:
    """The turn that asks about a picture."""
    return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}


def episode(rng: random.Random, shown: dict[str, list[str]], asked: dict[str, list[str]], shots: int) -> dict:
    """Draw an episode.

    Args:
        rng: Where all that is random comes from.
        shown: Files of the pictures of each kind, for the examples.
        asked: The same, for the question.
        shots: Number of examples, an even one: as many of either kind.

    Returns:
        `messages`; `own` and `shuffled`, the pictures of either control; the two `words`; the `answer`, one of them;
        and the picture that it is `about`.
    """
    kind = rng.choice([*asked])
    kinds = [kind, rng.choice([one for one in shown if one != kind])]
    rng.shuffle(kinds)
    words = dict(zip(kinds, rng.sample(WORDS, 2), strict=True))
    query, named = rng.choice(asked[kind]), kinds * (shots // 2)
    rng.shuffle(named)
    messages = [part for one in named for part in (question(), {"role": "assistant", "content": words[one]})]
    row = {"messages": [*messages, question()], "words": [*words.values()], "answer": words[kind], "about": query}
    for control, pictured in (("own", named), ("shuffled", rng.sample(named, shots))):
        drawn = {one: iter(rng.sample(shown[one], shots // 2)) for one in kinds}
        row[control] = [*(next(drawn[one]) for one in pictured), query]
    return row


@torch.inference_mode()
def answers(model, processor, episodes: list[dict], control: str, folder: Path, batch_size: int) -> list[dict]:
    """What the model writes, and which of the two words is the likelier one."""
    collate, given = MMGPTCollator(processor), []
    for start in range(0, len(episodes), batch_size):
        some = [{**one, "images": one[control]} for one in episodes[start : start + batch_size]]
        batch = prompt(some, processor, folder, "as they are").to(model.device)
        new = model.generate(**batch, max_new_tokens=8, do_sample=False)[:, batch["input_ids"].shape[1] :]
        said = processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        whole = [
            {
                "messages": [*one["messages"], {"role": "assistant", "content": word}],
                "images": [str(folder / path) for path in one["images"]],
            }
            for one in some
            for word in one["words"]
        ]
        batch = {key: value.to(model.device) for key, value in collate(whole).items()}
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")  # 0 where -100
        likelier = losses.sum(dim=1).view(-1, 2).argmin(dim=1).tolist()  # the turns before are the same for both
        given += [
            {"said": one, "chosen": row["words"][number]}
            for one, row, number in zip(said, some, likelier, strict=True)
        ]
    return given


def by_kind(rows: list[dict], test: str, least: int) -> dict[str, list[str]]:
    """Files of the pictures of a test that asks for kinds, for each kind that has enough of them."""
    files: dict[str, list[str]] = {}
    for row in rows:
        if row["test"] == test:
            files.setdefault(row["answers"][0], []).append(row["images"][0])
    return {kind: own for kind, own in files.items() if len(own) >= least}


def main() -> None:
    """Draw episodes, answer, score."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("--data", type=Path, required=True, help="folder that make_data.py has written")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--episodes", type=int, default=200, help="of each number of examples")
    parser.add_argument("--shots", type=int, nargs="*", default=[0, 2, 4, 8], help="numbers of examples, even ones")
    parser.add_argument("--batch_size", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model, processor = load(args.model)
    validation, test = (read(args.data / f"{split}.jsonl") for split in ("validation", "test"))
    least, result = max(args.shots) // 2, {}
    for name, examples, asked in (
        ("photographs", "kinds of photographs", "kinds of photographs"),
        ("things never seen", "kinds", "kinds of things never seen"),
    ):
        shown, queries = by_kind(validation, examples, max(1, least)), by_kind(test, asked, 1)
        if len(shown) < 2 or not set(shown) & set(queries):
            print(f"{name}: no two kinds have {least} pictures each", flush=True)
            continue
        queries = {kind: own for kind, own in queries.items() if kind in shown}
        for shots in args.shots:
            rng = random.Random(f"{args.seed} {name} {shots}")
            episodes = [episode(rng, shown, queries, shots) for _ in range(args.episodes)]
            for control in ("own", "shuffled") if shots else ("own",):
                given = answers(model, processor, episodes, control, args.data, args.batch_size)
                scores = {}
                for score in ("said", "chosen"):
                    right = [is_right(one[score], [e["answer"]]) for one, e in zip(given, episodes, strict=True)]
                    low, high = interval(right, [e["about"] for e in episodes])
                    scores[score] = {"share": sum(right) / len(right), "low": low, "high": high}
                result[f"{name}, {control}, {shots}"] = scores
                figures = {score: f"{100 * one['share']:.1f}" for score, one in scores.items()}
                print(f"{name}, {control}, {shots} examples: {figures}", flush=True)
                args.output_dir.mkdir(parents=True, exist_ok=True)
                (args.output_dir / "in_context.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

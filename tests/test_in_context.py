"""In-context learning on the tiny world: what is measured, what it has to show, and the page that reports it."""

import json
import random
import types
from pathlib import Path

import in_context
import pytest
import torch
from conftest import highest_by_chance, note_results
from PIL import Image
from tiny_world import corpus
from transformers import AutoModelForImageTextToText, AutoProcessor


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "tests" / "results" / "in_context.json"


def pick(rows: list[dict], **wanted) -> list[dict]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def test_examples_teach_names_and_shuffled_pictures_do_not(tmp_path):
    rows = in_context.measure(seeds=[0], shots=[0, 8], count=16, names=["trained"])
    right = {
        (pictures, shots): sum(row["said"]["accuracy"] for row in pick(rows, pictures=pictures, shots=shots)) / 2
        for pictures, shots in (("own", 0), ("own", 8), ("shuffled", 8))
    }
    assert right["own", 0] <= 0.1 and right["own", 8] >= 0.8 and right["shuffled", 8] <= 0.6
    in_context.draw(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_the_control_changes_pictures_alone_and_draws_them_without_regard_to_the_names():
    rng, kept = random.Random(0), []
    for _ in range(100):
        episode = in_context.draw_episode(rng, ("red", "green", "blue"), corpus.PSEUDO_WORDS, most=8)
        own, shuffled = episode.support["own"], episode.support["shuffled"]
        assert [record["messages"] for record in own] == [record["messages"] for record in shuffled]
        kept += [hue(a) == hue(b) for a, b in zip(own, shuffled, strict=True)]
    assert sum(kept) / len(kept) == pytest.approx(1 / 3, abs=0.06)


def hue(record: dict) -> int:
    """The strongest channel of the picture's object."""
    channels = [channel.getextrema()[1] for channel in record["images"][0].split()]
    return channels.index(max(channels))


def test_a_spelled_name_is_right_by_all_of_its_tokens(monkeypatch):
    """An episode without examples: what is said and chosen is decided by logits that are made up."""
    processor = AutoProcessor.from_pretrained(in_context.BASE)
    model = AutoModelForImageTextToText.from_pretrained(in_context.BASE, dtype=torch.float32).eval()
    names = ["bodu", "bodi", "dax"]  # two that part at the last letter, and one of a single token
    tokens = {name: processor.tokenizer(f" {name}", add_special_tokens=False)["input_ids"] for name in names}
    assert [len(ids) for ids in tokens.values()] == [4, 4, 1]
    query = {"messages": [{"role": "user", "content": [{"type": "image"}]}], "images": [Image.new("RGB", (48, 48))]}

    def right(says: str, answer: str) -> dict[str, int]:
        def forward(input_ids, logits_to_keep, **kwargs):
            logits = torch.zeros(len(input_ids), logits_to_keep, len(processor.tokenizer))
            for place, token in enumerate(tokens[says]):
                logits[:, place, token] = 9.0
            return types.SimpleNamespace(logits=logits)

        monkeypatch.setattr(model, "forward", forward)
        episode = in_context.Episode({"own": []}, query, names, answer)
        return in_context.count_right(model, processor, [episode], "own", 0)

    for says in names:
        for answer in names:
            assert right(says, answer) == dict.fromkeys(in_context.SCORES, int(says == answer))


@pytest.mark.bars
def test_right_answers_rise_with_the_examples_and_stay_at_chance_with_shuffled_pictures():
    rows = in_context.measure(seeds=[0, 1, 2], shots=[0, 1, 2, 4, 8], count=200, names=list(in_context.NAMES))
    note_results("in_context", {"rows": rows})
    check(rows)


def check(rows: list[dict]) -> None:
    """The bars that the base meets."""
    for rule in in_context.RULES:
        right = [row["said"]["accuracy"] for row in pick(rows, names="trained", rule=rule, pictures="own")]
        assert right == sorted(set(right)), rule
        assert right[-1] >= 0.9, rule
        new = pick(rows, names="new", rule=rule, pictures="own", shots=8)
        assert new[0]["said"]["accuracy"] >= 0.6, rule
    controls = pick(rows, pictures="shuffled")
    for figures in [row[score] for row in controls for score in in_context.SCORES]:
        highest = highest_by_chance(1 / in_context.WAYS, figures["n"], 2 * len(controls))
        assert figures["accuracy"] <= highest
    for row in pick(controls, names="trained", shots=8):  # with fewer, it also says names that were not shown
        assert row["said"]["low"] <= 1 / in_context.WAYS <= row["said"]["high"]


def test_the_recorded_figures_meet_the_bars():
    check(json.loads(RESULTS.read_text())["figures"]["rows"])


def test_the_page_says_what_was_measured():
    page, report = (ROOT / "docs" / "in_context.md").read_text(), json.loads(RESULTS.read_text())
    assert in_context.table(report["figures"]["rows"]) in page
    assert report["command"] in page and report["machine"] in page and report["versions"] in page

"""In-context learning on the tiny world: what is measured, what it has to show, and the page that reports it."""

import json
import random
from pathlib import Path

import in_context
import pytest
from conftest import note_results
from tiny_world import corpus, evaluation


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


def test_new_names_are_in_no_sequence_that_the_base_was_trained_on():
    rng = random.Random(0)
    learned = {text.strip() for _ in range(50) for text, is_learned in corpus.in_context(rng).pieces if is_learned}
    assert learned <= set(in_context.NAMES["trained"]) and not learned & set(in_context.NAMES["new"])


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
    controls = pick(rows, pictures="shuffled")
    for figures in [row[score] for row in controls for score in in_context.SCORES]:
        highest = evaluation.highest_by_chance(1 / in_context.WAYS, figures["n"], 2 * len(controls))
        assert figures["accuracy"] <= highest
    for row in pick(controls, names="trained", shots=8):  # with fewer, it also says names that were not shown
        assert row["said"]["low"] <= 1 / in_context.WAYS <= row["said"]["high"]


def test_the_recorded_figures_meet_the_bars():
    check(json.loads(RESULTS.read_text())["figures"]["rows"])


def test_the_page_says_what_was_measured():
    page, report = (ROOT / "docs" / "in_context.md").read_text(), json.loads(RESULTS.read_text())
    assert in_context.table(report["figures"]["rows"]) in page
    assert report["command"] in page and report["machine"] in page and report["versions"] in page


@pytest.mark.xfail(strict=True, reason="the base ties new names to pictures no better than docs/in_context.md says")
def test_names_never_trained_on_reach_sixty_per_cent():
    rows = pick(json.loads(RESULTS.read_text())["figures"]["rows"], names="new", pictures="own", shots=8)
    assert min(row["said"]["accuracy"] for row in rows) >= 0.6

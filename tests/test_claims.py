"""The claims program end to end, what its arms tune on, and the page that reports what it measured."""

import json
from collections import Counter
from pathlib import Path

import claims
import claims_report
import pytest
import quickstart
import torch
from PIL import ImageChops
from safetensors.torch import load_file
from tiny_world import language, sentences
from tiny_world.mixture import example


ROOT = Path(__file__).parents[1]


def recorded(claim: str) -> dict:
    return json.loads((ROOT / "tests" / "results" / f"claims_{claim}.json").read_text())


@pytest.mark.parametrize("claim", claims.CLAIMS)
def test_the_page_says_what_was_measured(claim):
    page = (ROOT / "docs" / "claims.md").read_text()
    report = recorded(claim)
    assert all(table in page for table in claims_report.tables(report, claims.CLAIMS[claim]).split("\n\n"))
    assert report["command"] in page and report["machine"] in page and report["versions"] in page
    assert all(set(runs) == {"0", "1", "2"} for runs in report["runs"].values())


def least_gain(report: dict, arm: str, other: str) -> dict[str, float]:
    """By how much `arm` is above `other` on each skill without pictures, from interval to interval of any seeds."""
    ours, theirs = report["runs"][arm].values(), report["runs"][other].values()
    return {
        row: min(rows[row]["low"] for rows in ours) - max(rows[row]["high"] for rows in theirs)
        for row in language.SKILLS
    }


def test_joint_tuning_is_forty_points_above_pictures_only_on_every_language_skill():
    gain = least_gain(recorded("joint"), "joint (preceding)", "pictures only")
    assert set(gain) == set(language.SKILLS) and min(gain.values()) >= 0.40


def test_a_claim_is_tuned_asked_and_written_and_not_run_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(claims.CLAIMS, "short_answers", [["100 % short"]])
    claims.measure(["short_answers"], seeds=[0], steps=1, count=2, processes=1)
    path = tmp_path / "outputs" / "claims" / "claims_short_answers.json"
    report = json.loads(path.read_text())
    rows = report["runs"]["100 % short"]["0"]
    assert set(rows) == set(sentences.KINDS) and all(row["n"] == 2 for row in rows.values())
    assert path.with_suffix(".png").stat().st_size > 0
    (saved,) = path.parent.glob("*/answers.json")
    rows["colour"]["words"] = 77.0
    saved.write_text(json.dumps(rows))
    assert claims.run("100 % short", 0, 1, 2)["colour"]["words"] == 77.0


def test_a_base_that_is_not_built_is_asked_for_before_anything_is_tuned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="build_base.py --media_attention following"):
        claims.prepare_bases({"joint (following)"})


def test_mixed_and_alternating_steps_go_through_the_same_examples():
    mixed, alternating = (claims.in_turns(0, 4, width) for width in (16, 32))
    for start in range(0, len(mixed), 64):  # two steps
        said = [Counter(str(e.messages) for e in order[start : start + 64]) for order in (mixed, alternating)]
        assert said[0] == said[1]
    has_picture = [[bool(e.images) for e in order] for order in (mixed, alternating)]
    assert has_picture == [([True] * 16 + [False] * 16) * 4, ([True] * 32 + [False] * 32) * 2]


def test_each_of_two_passes_is_averaged_over_its_own_tokens(tmp_path, monkeypatch):
    """With one mean over both, as Trainer has it by default, two passes would train what one pass trains."""
    monkeypatch.setattr(quickstart, "BATCH", 4)
    step = [example(skill, 0, index) for skill in ("caption", "sums") for index in range(2)]  # long, then short
    weights = []
    for passes in (1, 2):
        torch.manual_seed(0)
        quickstart.tune(3 * step, 0, tmp_path / str(passes), passes=passes)
        weights.append(load_file(tmp_path / str(passes) / "adapter" / "adapter_model.safetensors"))
    one, two = (torch.cat([w.flatten() for name, w in adapter.items() if "lora_B" in name]) for adapter in weights)
    assert ((one - two).abs() > 1e-5).float().mean() > 0.01


def test_both_sources_ask_the_same_and_answer_in_their_own_form():
    for kind in ("colour", "position", "size"):
        for index in range(20):
            word, sentence = (sentences.reply(kind, 0, index, in_a_word) for in_a_word in (True, False))
            assert word.messages[0] == sentence.messages[0]
            assert not ImageChops.difference(word.images[0], sentence.images[0]).getbbox()
            assert sentence.answer.split()[-1] == word.answer and len(sentence.answer.split()) >= 4


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_share_of_short_answers_is_the_same_in_every_kind_that_both_sources_ask(share):
    examples = sentences.two_sources(0, 1000, share)
    for kind in ("colour", "position"):
        short = [len(e.answer.split()) == 1 for e in examples if e.skill == kind]
        assert sum(short) / len(short) == pytest.approx(share, abs=0.08)
    kinds = Counter(e.skill for e in examples)
    assert (kinds["caption"] == 0) == (share == 1) and (kinds["shape"] == 0) == (share == 0)

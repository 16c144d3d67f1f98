"""Metrics: equal to what the official scripts print (`goldens/metrics`, each with its source)."""

import json
from pathlib import Path
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from processing_mmgpt.evaluation.metrics import bleu, cider_d, normalise_answer, tokenize_caption, vqa_accuracy


GOLDENS = Path(__file__).with_name("goldens") / "metrics"
CLOSE = {"abs": 1e-6, "rel": 0}


@pytest.fixture(scope="module")
def vqa():
    return json.loads((GOLDENS / "vqa.json").read_text())


@pytest.fixture(scope="module")
def captions():
    return json.loads((GOLDENS / "captions.json").read_text(encoding="utf-8"))


def test_every_answer_is_normalised_as_by_the_official_script(vqa):
    ours = {text: normalise_answer(text.replace("\n", " ").replace("\t", " ").strip()) for text in vqa["normalised"]}
    assert ours == vqa["normalised"] and len(ours) > 100


def test_vqa_accuracy_equals_the_official_one_question_by_question(vqa):
    answers = {q["question_id"]: [a["answer"] for a in q["answers"]] for q in vqa["annotations"]["annotations"]}
    ours = {r["question_id"]: 100 * vqa_accuracy(r["answer"], answers[r["question_id"]]) for r in vqa["results"]}
    assert ours == {int(number): pytest.approx(score, **CLOSE) for number, score in vqa["per_question"].items()}
    assert mean(ours.values()) == pytest.approx(vqa["accuracy"]["overall"], **CLOSE)
    assert len(set(vqa["per_question"].values())) > 3


def test_only_where_people_differ_is_an_answer_normalised():
    assert vqa_accuracy("The bus.", ["bus"] * 10) == 0.0
    assert vqa_accuracy("The bus.", ["bus"] * 9 + ["car"]) == 1.0


def test_a_quirk_of_the_official_script_is_kept():
    assert normalise_answer("." * 40 + "a") == "........a"  # its flag stands where the count belongs


def test_a_question_without_answers_is_refused():
    with pytest.raises(ValueError, match="hidden test splits"):
        vqa_accuracy("yes", [])


def test_captions_are_split_as_by_the_official_tokenizer(captions):
    ours = {caption: " ".join(tokenize_caption(caption)) for caption in captions["tokenized"]}
    assert ours == captions["tokenized"] and len(ours) > 300


def test_cider_d_equals_the_official_one_caption_by_caption(captions):
    rows = captions["captions"]
    ours = cider_d([row["caption"] for row in rows], [row["references"] for row in rows])
    assert ours == pytest.approx(captions["ciders"], **CLOSE)
    assert mean(ours) == pytest.approx(captions["cider"], **CLOSE)


def test_bleu_equals_the_official_one(captions):
    rows = captions["captions"]
    ours = bleu([row["caption"] for row in rows], [row["references"] for row in rows])
    assert ours == pytest.approx(captions["bleu"], **CLOSE)


def test_pictures_may_have_different_numbers_of_captions():
    predictions, references = ["a red bus", "two dogs"], [["a red bus"], ["two dogs", "some dogs", "two wet dogs"]]
    assert cider_d(predictions, references)[0] == pytest.approx(7.5)  # no n-gram of four words
    assert bleu(predictions, references)[0] == pytest.approx(1.0)


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=40), st.lists(st.text(max_size=20), min_size=2, max_size=10))
def test_scores_of_any_text_stay_in_their_range(prediction, references):
    assert 0 <= vqa_accuracy(prediction, references) <= 1
    assert all(0 <= score <= 10 + 1e-9 for score in cider_d([prediction, "a"], [references, ["b"]]))

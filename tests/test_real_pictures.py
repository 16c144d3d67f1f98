"""The way of `examples/real_pictures`, from cut-outs to scores, with tiny parts."""

import json
import random
import sys

import numpy as np
import pytest
import torch
import train_base
import train_sft
from PIL import Image
from real_pictures import (
    baselines,
    evaluate,
    free_photographs,
    in_context,
    make_data,
    own_answers,
    places,
    show_answers,
)
from real_pictures.compositions import LEFT, RIGHT, TABLES, WHOLE, Stamp, Studio, load_photos, load_stamps
from real_pictures.questions import Questions
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
)


COLOURS = {"ruby": "red", "leaf": "green", "sky": "blue", "sun": "yellow", "coal": "black", "plum": "purple"}


def call(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder of cut-outs, one of photographs, and the tables that name them."""
    folder = tmp_path_factory.mktemp("sources")
    table, said = [], []
    for number, (name, colour) in enumerate(COLOURS.items()):
        cut_out = Image.new("RGBA", (40, 30), (0, 0, 0, 0))
        cut_out.paste(colour, (10, 5, 30, 25))
        cut_out.save(folder / f"{name}.png")
        kind = ["stone", "plant"][number % 2]
        table.append({"file": f"{name}.png", "name": name, "kind": kind, "held_out": name == "plum"})
        said.append({"file": f"{name}.png", "caption": f"A {name}.", "translations": {"de": f"Ein {name}."}})
    (folder / "stamps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said))
    photos = []
    for number, colour in enumerate(["red", "green", "gray", "white"]):
        Image.new("RGB", (60, 50), colour).save(folder / f"photo{number}.jpg")
        split = ["validation", "test"][number % 2]
        names = [["ruby"], ["leaf"], None, None][number]
        photos.append({"file": f"photo{number}.jpg", "names": names, "kind": "stone", "drawn": False, "split": split})
    Image.new("RGB", (90, 60), "orange").save(folder / "monuments.jpg")
    for name, rows in (("stamps", table), ("photos", photos)):
        (folder / f"{name}_table.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture
def tables(sources, monkeypatch):
    """Have the programs read the tables of these sources."""
    for function, name in ((load_stamps, "stamps"), (load_photos, "photos")):
        monkeypatch.setattr(function, "__defaults__", (sources / f"{name}_table.json",))


@pytest.fixture(scope="module")
def parts(tmp_path_factory, make_model, make_lm):
    """A tower and a language model that have never met."""
    from conftest import _tokenizer

    folder = tmp_path_factory.mktemp("parts")
    lm = make_lm(make_model(text={"pad_token_id": None}))
    lm.resize_token_embeddings(258)
    for part in (lm, _tokenizer()):
        part.save_pretrained(folder / "lm")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=24, patch_size=8)).save_pretrained(folder / "tower")
    return folder


def test_from_cut_outs_to_scores(sources, tables, parts, tmp_path, monkeypatch, capsys):
    pool = tmp_path / "pool"
    given = ("--stamps", sources, "--photos", sources, "--output_dir", pool, "--processes", 1)
    call(monkeypatch, make_data, *given, "--rows", 24, "--views", 16, "--test_rows", 4, "--size", 32)
    rows = [json.loads(line) for line in (pool / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 24 and all((pool / path).is_file() for row in rows for path in row["images"])
    assert "plum" not in (pool / "train.jsonl").read_text()  # held out
    (pool / "texts").mkdir()
    text = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}], "images": []}
    (pool / "texts" / "train.jsonl").write_text(json.dumps(text) + "\n")
    recipe = (TABLES.parent / "recipes" / "real_pictures.yaml").read_text()
    (tmp_path / "recipe.yaml").write_text(recipe.replace("root: outputs/real_pictures", f"root: {pool}"))
    call(
        monkeypatch,
        train_base,
        *("--vision", parts / "tower", "--text", parts / "lm", "--data", tmp_path / "recipe.yaml"),
        *("--output_dir", tmp_path / "model", "--template", "chat", "--lora_r", 2, "--gate_learning_rate", 0.1),
        *("--cross_attn_every_n_layers", 2, "--resampler_depth", 1, "--num_latents", 4, "--learning_rate", 1e-3),
        *("--max_steps", 3, "--warmup_steps", 1, "--per_device_train_batch_size", 4, "--packing", "true"),
        *("--max_length", 1024, "--use_cpu", "--report_to", "none", "--save_strategy", "no"),
    )
    call(monkeypatch, baselines, parts / "tower", "--data", pool)
    call(monkeypatch, places, parts / "tower", "--data", pool, "--count", 8)
    assert capsys.readouterr().out.splitlines()[-1].startswith("| 2 |")  # the tower has two layers
    out = tmp_path / "scores"
    texts = ("--texts", pool / "texts" / "train.jsonl", "--text", parts / "lm")
    call(monkeypatch, evaluate, tmp_path / "model", "--data", pool, "--split", "test", "--output_dir", out, *texts)
    result = json.loads((out / "scores.json").read_text())
    assert result["text loss"].keys() == {"now", "before"}
    assert set(result["scores"]) == {
        *("names", "kinds", "kinds of things never seen", "yes or no", "count", "left or right", "second picture"),
        *("names of photographs", "kinds of photographs"),
    }
    names = result["scores"]["names"]
    assert {"as they are", "blank", "swapped", "prior", "1-NN, class token", "LR, mean of patches"} <= names.keys()
    assert names["as they are"]["n"] == 8 and result["scores"]["yes or no"]["prior"]["share"] == 0.5
    call(monkeypatch, show_answers, out / "answers.jsonl", "--data", pool, "--output", tmp_path / "answers.png")
    assert Image.open(tmp_path / "answers.png").width > 1000
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert all(row["said"].keys() == {"as they are", "blank", "swapped"} for row in answers)
    assert "| names | 8 |" in capsys.readouterr().out
    assert result["text questions"].keys() == {"now", "before"} and max(result["text questions"].values()) < 0.2
    call(
        monkeypatch,
        train_sft,
        *("--model_name_or_path", tmp_path / "model", "--data", tmp_path / "recipe.yaml", "--max_length", 1024),
        *("--output_dir", tmp_path / "tuned", "--lora_r", 2, "--learning_rate", 1e-3, "--max_steps", 2),
        *("--per_device_train_batch_size", 2, "--use_cpu", "--report_to", "none", "--save_strategy", "no"),
    )
    given = ("--data", pool, "--output_dir", out, "--episodes", 3, "--shots", 0, 2)
    call(monkeypatch, in_context, tmp_path / "tuned", *given)
    episodes = json.loads((out / "in_context.json").read_text())
    assert episodes["things never seen, shuffled, 2"]["said"]["share"] == 0


def test_own_answers_are_kept_if_they_end(parts, tmp_path, monkeypatch):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (tmp_path / "template.jinja").write_text(template)
    given = ("--template", tmp_path / "template.jinja", "--output_dir", tmp_path, "--count", 12, "--held_out", 1)
    call(monkeypatch, own_answers, parts / "lm", *given, "--max_new_tokens", 2, "--batch_size", 6)
    kept = [(tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("held_out", "train")]
    assert len(kept[0]) <= 1 and len(kept[0]) + len(kept[1]) < 12
    assert len(set(own_answers.prompts(1200, 0))) == 1200


def test_replies_are_searched_for_the_answers(parts, tmp_path):
    from processing_mmgpt import MMGPTProcessor

    processor = MMGPTProcessor.from_vision_text_pretrained(parts / "tower", parts / "lm")
    model = AutoModelForCausalLM.from_pretrained(parts / "lm")
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()  # every token is as likely, and the first one is taken
    first = processor.tokenizer.decode([0])
    for number, (answers, share) in enumerate([(["no", first], 1.0), (["no"], 0.0)]):
        (tmp_path / f"{number}.json").write_text(json.dumps([{"question": "Hi?", "answers": answers}]))
        assert evaluate.text_answers(model, processor, tmp_path / f"{number}.json") == share


def test_photographs_that_are_free_are_asked_about(tmp_path):
    (tmp_path / "pictures").mkdir()
    rows = free_photographs.rows(tmp_path)
    assert [row["answers"] for row in rows[:4]] == [
        *(["temple", "palace", "pagoda"], ["building"], ["flower", "dahlia"], ["plant"])
    ]
    assert all("CC" in row["about"] or "public domain" in row["about"] for row in rows)
    assert Image.open(tmp_path / rows[0]["images"][0]).size == (640, 427)


def test_a_place_is_found_in_tokens_that_tell_it():
    torch.manual_seed(0)
    noise, column = torch.randn(16, 36, 24), torch.arange(36) % 6
    told = places.place_scores(noise + 3 * (column - 2.5)[:, None] * torch.randn(24))
    assert told["column"][0] > 0.7 and told["column"][1] > 0.95 and told["row"][0] < 0.3
    silent = places.place_scores(noise)
    assert all(abs(explained) < 0.3 and 0.35 < half < 0.65 for explained, half in silent.values())


def test_an_episode_names_two_kinds_and_asks_for_one():
    shown = {kind: [f"{kind}{number}" for number in range(4)] for kind in ("animal", "food", "plant")}
    asked = {"animal": ["a"], "food": ["f"]}
    moved, right = 0, []
    for seed in range(60):
        episode = in_context.episode(random.Random(seed), shown, asked, 4)
        words = [turn["content"] for turn in episode["messages"] if turn["role"] == "assistant"]
        kinds = [path[:-1] for path in episode["own"][:-1]]
        named = dict(zip(kinds, words, strict=True))
        assert sorted(words) == sorted(episode["words"] * 2) and len(set(episode["own"])) == 5
        assert named["animal" if episode["own"][-1] == "a" else "food"] == episode["answer"]
        assert episode["own"][-1] == episode["shuffled"][-1] == episode["about"]
        assert sorted(path[:-1] for path in episode["shuffled"][:-1]) == sorted(kinds)
        moved += [path[:-1] for path in episode["shuffled"][:-1]] != kinds
        right.append(episode["words"].index(episode["answer"]))
    assert moved > 30 and 15 < sum(right) < 45


@pytest.fixture
def studio(sources, tables):
    stamps = load_stamps(sources)
    return Studio(stamps, sources, [sources / "monuments.jpg"], 64), stamps


def colour_share(picture, colour, box=WHOLE):
    """The share of a part of a picture that is red or green above all else."""
    left, top, right, bottom = (round(64 * side) for side in box)
    part = np.asarray(picture).astype(int)[top:bottom, left:right]
    channel = {"red": 0, "green": 1}[colour]
    others = np.delete(part, channel, axis=2).max(axis=2)
    return (part[..., channel] > others + 60).mean()


def test_things_stand_where_they_are_said_to(studio):
    studio, stamps = studio
    stamps = {stamp.name: stamp for stamp in stamps}
    studio.backgrounds = []
    for seed in range(8):
        rng = random.Random(seed)
        studio._background = lambda rng: Image.new("RGB", (64, 64), "white")
        picture = studio.compose([(stamps["ruby"], LEFT), (stamps["leaf"], RIGHT)], rng)
        assert colour_share(picture, "red", LEFT) > 0.05 > 0.01 > colour_share(picture, "red", RIGHT)
        assert colour_share(picture, "green", RIGHT) > 0.05 > 0.01 > colour_share(picture, "green", LEFT)


def test_questions_are_answered_by_the_pictures(studio):
    studio, stamps = studio
    for seed in range(40):
        for draw in (*make_data.SHARES, "two_pictures"):
            turns, things = getattr(Questions(studio, stamps, random.Random(seed), wild=0.5), draw)()
            assert turns[0][0] is not None and all(question and answer for _, question, answer in turns)
            if draw == "two_pictures":
                assert turns[1][0] is not None and turns[1][2] == things[1].name != things[0].name
            if draw in ("one_thing", "yes_or_no"):
                for _, question, answer in turns:
                    asked = [stamp.name for stamp in stamps if stamp.name in question]
                    assert answer not in ("yes", "no") or (asked == [things[0].name]) == (answer == "yes")


def test_no_answer_can_be_told_from_the_turns_before_it(studio):
    studio, stamps = studio
    first, later = [], []
    for seed in range(400):
        turns, _ = Questions(studio, stamps, random.Random(seed)).yes_or_no()
        answers = [answer for _, _, answer in turns]
        assert "yes" not in answers[:-1] and 1 <= len(answers) <= 4  # after a yes, all else would be no
        first.append(answers[0])
        later += answers[1:]
    assert 0.43 < first.count("yes") / len(first) < 0.57 and 0.43 < later.count("yes") / len(later) < 0.57
    for seed in range(40):
        ((_, question, answer), (_, then, last)), _ = Questions(studio, stamps, random.Random(seed)).sides()
        assert last not in question and last != answer
        if last in ("left", "right"):
            assert "next to" in question
        else:
            assert question.split()[-1] != then.split()[-1]


def test_a_wild_picture_still_shows_the_thing(studio):
    studio, stamps = studio
    stamps = {stamp.name: stamp for stamp in stamps}
    studio._background = lambda rng: Image.new("RGB", (64, 64), "white")
    shares = []
    for seed in range(60):
        picture = studio.compose([(stamps["ruby"], WHOLE)], random.Random(seed), wild=True)
        assert picture.size == (64, 64) and picture.mode == "RGB"
        shares.append(colour_share(picture, "red"))
    assert np.mean([share > 0.02 for share in shares]) > 0.75 and max(shares) > 0.5  # one in ten is grey
    both = [(stamps["ruby"], LEFT), (stamps["leaf"], RIGHT)]
    for seed in range(20):  # nothing is cut off where places are asked for
        picture = studio.compose(both, random.Random(seed), wild=True)
        assert colour_share(picture, "red", RIGHT) < 0.01 and colour_share(picture, "green", LEFT) < 0.01


def test_each_dialogue_has_two_pictures(studio, tmp_path, monkeypatch):
    monkeypatch.setattr(make_data, "studio", studio[0], raising=False)
    (tmp_path / "pictures").mkdir()
    for number in range(20):
        row = make_data.train_row(number, tmp_path, studio[1], 0)
        parts = [part for turn in row["messages"] if turn["role"] == "user" for part in turn["content"]]
        assert len(row["images"]) == 2 == sum(part["type"] == "image" for part in parts)


def test_rows_are_the_same_whatever_the_number_of_processes(studio, tmp_path, monkeypatch):
    monkeypatch.setattr(make_data, "studio", studio[0], raising=False)
    (tmp_path / "pictures").mkdir()
    once, twice = (make_data.train_row(5, tmp_path, studio[1], 0) for _ in range(2))
    assert once == twice


def test_answers_are_compared_without_case_article_and_stop():
    assert evaluate.is_right("A Frog.", ["frog"]) and not evaluate.is_right("frogs", ["frog"])
    assert evaluate.is_right("the", ["the"])


def test_the_interval_knows_that_views_of_one_thing_are_not_many_things():
    wide = evaluate.interval([True] * 50 + [False] * 50, ["a"] * 50 + ["b"] * 50)
    narrow = evaluate.interval([True] * 50 + [False] * 50, [str(number) for number in range(100)])
    assert wide == (0.0, 1.0) and narrow[0] > 0.35 and narrow[1] < 0.65


def test_swapped_pictures_are_those_of_another_answer():
    rows = [{"test": "t", "answers": [answer], "images": [answer]} for answer in "aab"]
    assert [row["swapped"] for row in evaluate.swap(rows)] == [["b"], ["b"], ["a"]]


def test_the_page_says_what_was_measured():
    root = TABLES.parents[1]
    run = json.loads((root / "tests" / "results" / "real_pictures_h100.json").read_text())
    page = (root / "docs" / "real_model.md").read_text()
    stages = [run[stage]["test"]["scores"] for stage in ("stage one", "tuned on both")]
    for test, row in stages[0].items():
        shares = [f"{100 * scores[test]['as they are']['share']:.1f}" for scores in stages]
        assert f"| {test} | {row['as they are']['n']} | {shares[0]} | {shares[1]} (" in page
    for test in ("names", "kinds of photographs"):
        ways = ("stage one", "tuned on pictures", "tuned on text", "tuned on both")
        shares = [f"{100 * run[way]['validation']['scores'][test]['as they are']['share']:.1f}" for way in ways]
        assert f"| {test} | {' | '.join(shares)} |" in page


# The single stage of train_base.py that these programs use


def test_lora_is_merged_and_the_run_resumes(parts, sources, tables, tmp_path, monkeypatch):
    pool = tmp_path / "pool"
    given = ("--stamps", sources, "--photos", sources, "--output_dir", pool, "--processes", 1)
    call(monkeypatch, make_data, *given, "--rows", 12, "--views", 1, "--test_rows", 1, "--size", 32)
    common = (
        *("--vision", parts / "tower", "--text", parts / "lm", "--data", pool / "train.jsonl", "--max_steps", 4),
        *("--template", "chat", "--lora_r", 2, "--cross_attn_every_n_layers", 2, "--learning_rate", 1e-2),
        *("--per_device_train_batch_size", 2, "--max_length", 1024, "--use_cpu", "--report_to", "none"),
        *("--save_steps", 2, "--logging_steps", 1, "--resampler_depth", 1),
    )
    call(monkeypatch, train_base, *common, "--output_dir", tmp_path / "whole")
    (tmp_path / "killed").mkdir()
    (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "killed" / "checkpoint-2")
    call(monkeypatch, train_base, *common, "--output_dir", tmp_path / "killed", "--resume")
    whole, killed = (AutoModelForImageTextToText.from_pretrained(tmp_path / name) for name in ("whole", "killed"))
    for (name, weight), (other, same) in zip(whole.named_parameters(), killed.named_parameters(), strict=True):
        assert name == other and "lora" not in name and torch.equal(weight, same), name
    lm = AutoModelForCausalLM.from_pretrained(parts / "lm")
    for part, is_adapted in (("self_attn.q_proj", True), ("mlp.up_proj", False)):
        weights = (
            model.get_submodule(f"layers.1.{path}").weight
            for model, path in ((whole.model.text_model.model, f"decoder_layer.{part}"), (lm.model, part))
        )
        assert torch.equal(*weights) != is_adapted
    assert AutoProcessor.from_pretrained(tmp_path / "whole").image_processor.size == 24


def test_stamps_have_names_kinds_and_captions(studio):
    assert Stamp("ruby.png", "ruby", "stone", "A ruby.", {"de": "Ein ruby."}, False) in studio[1]

"""Rewards and preferences: `train_grpo.py` and `train_dpo.py`, by TRL's own trainers."""

import json
import random
import re
import shutil

import preference
import pytest
import torch
import train_dpo
import train_grpo
from conftest import BASE, note_results
from preference import WORDS, in_another_order, in_place, likelihoods, nearly_right, with_another_word, write_records
from quickstart import load
from safetensors.torch import load_file
from test_examples import ROOT, run
from tiny_world.mixture import example
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import GRPOConfig


def records(folder, *numbers, **more):
    """Some of the example records in a file beside their pictures, each with more fields."""
    shutil.copytree(ROOT / "examples" / "records", folder)
    path = folder / "records.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(rows[number] | more) + "\n" for number in numbers))
    return path, [rows[number] for number in numbers]


def tune(program, data, output_dir, *options):
    """Run one step; gives what the program says, and the adapter's matrices that begin with zeros."""
    done = run(
        *(f"examples/{program}.py", "--model_name_or_path", BASE, "--data", data, "--output_dir", output_dir),
        *("--max_steps", 1, "--logging_steps", 1, "--report_to", "none", "--save_strategy", "no", *options),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    AutoProcessor.from_pretrained(output_dir)
    AutoModelForImageTextToText.from_pretrained(output_dir)
    weights = load_file(output_dir / "adapter_model.safetensors")
    return done.stdout, [weight for name, weight in weights.items() if "lora_B" in name]


# GRPO


def test_prompts_of_any_length_with_two_pictures_and_without_are_replied_to_and_learnt_from(tmp_path):
    """A prompt is as long as by itself: no padding is taken for text."""
    data, rows = records(tmp_path / "records", 3, 5)
    reward = tmp_path / "reward.py"
    reward.write_text("def first(completions, **kw):\n    return [float(i % 2) for i in range(len(completions))]\n")
    options = ["--per_device_train_batch_size", 4, "--num_generations", 2, "--max_completion_length", 1]
    said, learnt = tune("train_grpo", data, tmp_path / "out", *options, "--reward", f"{reward}:first")
    processor = AutoProcessor.from_pretrained(BASE)
    prompts = [
        processor.apply_chat_template(
            row["messages"][:-1],
            images=[str(tmp_path / "records" / name) for name in row["images"]],
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
        )["input_ids"]
        for row in rows
    ]
    lengths = [ids.shape[1] for ids in prompts]
    assert lengths[0] != lengths[1]
    assert re.search(r"'num_tokens': '([\d.e+]+)'", said)[1] == str(2 * sum(lengths) + 4)
    assert all(weight.any() for weight in learnt)


@pytest.mark.parametrize("seed", range(3))  # rows are shuffled
def test_where_there_are_as_many_pictures_as_rows_each_row_has_its_own(tmp_path, monkeypatch, seed):
    """Of two pictures and of none, with a reference model and two batches for what is generated at once."""
    data, rows = records(tmp_path / "records", 3, 5)
    processor = AutoProcessor.from_pretrained(BASE)
    pictures = [str(tmp_path / "records" / name) for name in rows[0]["images"]]
    given = {"images": pictures, "tokenize": True, "return_dict": True}
    own = processor.apply_chat_template(rows[0]["messages"][:-1], **given)["pixel_values"]
    seen = []

    def look(model, args, kwargs):
        pictures = kwargs.get("pixel_values")  # not where it generates
        for ids, pixels in () if pictures is None else zip(kwargs["input_ids"], pictures, strict=True):
            seen.append((int((ids == processor.image_token_id).sum()), bool((pixels == own[0]).all())))

    class Watched(train_grpo.Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.model.register_forward_pre_hook(look, with_kwargs=True)
            assert {weight.dtype for weight in self.model.parameters()} == {torch.float32}

    monkeypatch.setattr(train_grpo, "Trainer", Watched)
    config = GRPOConfig(
        str(tmp_path / "out"),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_generations=2,
        max_completion_length=1,
        max_steps=1,
        beta=0.1,
        bf16=False,
        report_to="none",
        dataloader_pin_memory=False,
        seed=seed,
    )
    train_grpo.tune(train_grpo.ScriptArguments(BASE, data, dtype="float32"), config)
    assert sorted(seen) == [(0, False)] * 4 + [(2, True)] * 4  # of the reference, and of the model


def test_a_reward_of_ones_own_is_found_or_named(tmp_path):
    (tmp_path / "mine.py").write_text("def one(completions, **kwargs):\n    return [1.0] * len(completions)\n")
    assert train_grpo.find_reward(f"{tmp_path}/mine.py:one")([None, None]) == [1.0, 1.0]
    assert train_grpo.find_reward("exact") is train_grpo.exact
    for name in (f"{tmp_path}/mine.py:two", f"{tmp_path}/none.py:one", "one"):
        with pytest.raises(ValueError, match=re.escape(name)):
            train_grpo.find_reward(name)


def test_streamed_prompts_are_refused(tmp_path):
    data, _ = records(tmp_path / "records", 5)
    recipe = tmp_path / "mixture.yaml"
    recipe.write_text(f"streaming: true\nsources:\n- {{name: a, reader: messages, files: {data}}}\n")
    with pytest.raises(ValueError, match="streaming"):
        train_grpo.prompts(recipe, 0)


@pytest.mark.parametrize("video", [{"type": "video", "video": "clip.mp4"}, ["colour.png", "colour.png"]])
def test_prompts_with_a_video_are_refused(tmp_path, video):
    data, _ = records(tmp_path / "records", 0, images=[video])
    with pytest.raises(ValueError, match="Row 0 of .* has a video"):
        train_grpo.prompts(data, 0)[0]


def test_rewards_are_those_of_the_words():
    def reply(text):
        return [{"role": "assistant", "content": text}]

    assert train_grpo.exact([reply(" red\n"), reply("blue")], ["red", "red"]) == [1.0, 0.0]
    assert in_place([reply("a, b"), reply("a, c"), reply("b"), reply("a, b, c")], ["a, b"] * 4) == [1, 0.25, 0, 1 / 3]


# DPO


def test_preferences_about_pictures_and_text_are_learnt(tmp_path):
    data, _ = records(tmp_path / "records", 0, 3, 5, rejected="something else")
    said, learnt = tune("train_dpo", data, tmp_path / "out", "--per_device_train_batch_size", 3)
    assert "rewards/margins" in said and all(weight.any() for weight in learnt)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"rejected": None}, "'rejected' is missing"),
        ({"rejected": 3, "images": []}, "line 1"),
        ({"messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]}, "line 1"),
        ({"rejected": "x", "images": ["../secret.png"]}, "leaves the image root"),
        ({"rejected": "x", "images": [["colour.png", "colour.png"]]}, "has a video"),
    ],
)
def test_a_pair_that_cannot_be_read_is_named_with_its_line(tmp_path, change, problem):
    data, _ = records(tmp_path / "records", 0, **change)
    with pytest.raises(ValueError, match=problem) as error:
        train_dpo.read_pairs(data)
    assert "line 1" in str(error.value)


def test_a_nearly_right_caption_has_another_word_or_order():
    right = "large blue cross at top-right, small purple square at left, small red star at bottom"
    others = with_another_word(right)
    assert len(others) == len(set(others)) == 3 * (1 + 6 + 5 + 8)
    for wrong in others:
        assert sum(a != b for a, b in zip(right.split(), wrong.split(), strict=True)) == 1
    a, b, c = right.split(", ")
    assert in_another_order(right) == [f"{b}, {a}, {c}", f"{a}, {c}, {b}"]
    assert in_another_order(a) == []


def test_the_likeliest_of_the_wrong_captions_is_rejected():
    model, processor = load(BASE)
    shown = [example("caption", 0, index) for index in range(3)]
    rejected = nearly_right(model, processor, shown, random.Random(0))
    rng = random.Random(0)
    for e, found in zip(shown, rejected, strict=True):
        wrong = [*in_another_order(e.answer), *rng.sample(with_another_word(e.answer), WORDS)]
        assert found in wrong
        among = likelihoods(model, processor, [e] * len(wrong), wrong)
        assert among[wrong.index(found)] == pytest.approx(among.max().item(), abs=1e-3)


def test_pairs_are_of_captions_and_of_other_skills(tmp_path, monkeypatch):
    monkeypatch.setattr(preference, "DOUBTFUL", (0.0, 1.0))
    rows = [json.loads(line) for line in write_records("dpo", BASE, 12, tmp_path).read_text().splitlines()]
    replies = [row["messages"][-1]["content"][0]["text"] for row in rows]
    assert len(rows) == 12 + 5 and all(row["rejected"] != reply for row, reply in zip(rows, replies, strict=True))
    captions = [row["rejected"].count(",") == reply.count(",") for row, reply in zip(rows, replies, strict=True)]
    assert all(captions[:12]) and all((tmp_path / name).exists() for row in rows for name in row["images"])
    assert len(train_dpo.read_pairs(tmp_path / "records.jsonl")) == len(rows)


def test_the_likelihood_is_that_of_the_last_reply_alone():
    """Beside a longer row, as by itself, and as the model's own loss has it."""
    model, processor = load(BASE)
    shown = [example("second_turn", 0, 0), example("caption", 0, 1), example("sums", 0, 2)]
    together = likelihoods(model, processor, shown, [e.answer for e in shown])
    for e, found in zip(shown, together, strict=True):
        asked = {"images": [e.images], "tokenize": True, "return_dict": True}
        prompt = processor.apply_chat_template([e.messages[:-1]], add_generation_prompt=True, **asked)["input_ids"]
        whole = processor.apply_chat_template([e.messages], **asked)
        labels = whole["input_ids"].clone()
        labels[:, : prompt.shape[1]] = -100
        loss = model(**whole, labels=labels).loss * (labels != -100).sum()
        assert found.item() == pytest.approx(-loss.item(), rel=1e-3)


# What they teach, which `docs/preference.md` tells


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The adapter of the quickstart."""
    folder = tmp_path_factory.mktemp("quickstart")
    done = run("examples/quickstart.py", "--output-dir", folder, "--count", 1, "--control-count", 0)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "adapter"


def measure(kind, adapter, output_dir):
    """Run the command of the docs and keep its report; gives what was right, and the seconds."""
    done = run("examples/measurements/preference.py", kind, "--adapter", adapter, "--output-dir", output_dir)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((output_dir / "report.json").read_text())
    note_results("preference", {kind: report})
    return report["rows"], report["seconds"]


@pytest.mark.bars
def test_rewards_make_captions_right_and_spoil_no_other_skill(quickstart, tmp_path):
    rows, seconds = measure("grpo", quickstart, tmp_path)
    assert rows["caption"]["after"]["accuracy"] >= 0.96
    for skill, row in rows.items():
        assert row["after"]["accuracy"] >= row["before"]["accuracy"] - 0.01, skill
    assert seconds <= 20 * 60  # on two idle cores


@pytest.mark.bars
def test_preferences_go_half_of_the_way_and_captions_stay_right(quickstart, tmp_path):
    rows, _ = measure("dpo", quickstart, tmp_path)
    assert rows["preferred"]["after"]["accuracy"] >= (1 + rows["preferred"]["before"]["accuracy"]) / 2
    assert rows["caption"]["after"]["accuracy"] >= rows["caption"]["before"]["accuracy"]

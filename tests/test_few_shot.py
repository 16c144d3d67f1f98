"""Few-shot prompts: what is rendered in both forms, which examples are chosen, and which index is refused."""

import random
import re
import sys

import few_shot as program
import pytest
import torch
from open_clip.model import CLIP
from tokenizers import processors
from transformers import CLIPVisionConfig, CLIPVisionModel

from modeling_mmgpt import MMGPTVisionConfig
from modeling_mmgpt.vision_mmgpt import build_vision_tower, pooled_features
from processing_mmgpt import MMGPTImageProcessor, MMGPTProcessor
from processing_mmgpt.evaluation.few_shot import (
    build_index,
    choose_at_random,
    choose_similar,
    few_shot,
    interleaved_prompts,
    load_index,
)


IMAGE = {"type": "image"}


def record(picture, answer=None, question=None):
    """A record of one picture, one question if there is one, and one answer if there is one."""
    text = [] if question is None else [{"type": "text", "text": question}]
    messages = [{"role": "user", "content": [IMAGE, *text]}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages, "images": [picture]}


# Both forms


def test_captions_in_the_form_of_openflamingo(processor, picture, draw):
    pictures = [picture(seed) for seed in range(3)]
    support = [record(pictures[0], "a cat"), record(pictures[1], "a dog")]
    batch = interleaved_prompts(processor, [few_shot(support, record(pictures[2]))])
    assert draw(batch["input_ids"][0]) == "^@Output:a cat%\n@Output:a dog%\n@Output:"
    expected = torch.stack([processor.image_processor.pixels(p) for p in pictures])
    assert torch.equal(batch["pixel_values"][0], expected)
    readme = interleaved_prompts(
        processor, [few_shot(support, record(pictures[2]))], caption="An image of", separator="", bos_token=""
    )
    assert draw(readme["input_ids"][0]) == "@An image ofa cat%@An image ofa dog%@An image of"


def test_questions_in_the_form_of_openflamingo(processor, picture, draw):
    support, query = record(picture(0), "red", "What colour {}?"), record(picture(1), question="How many?")
    batch = interleaved_prompts(processor, [few_shot([support], query)])
    assert draw(batch["input_ids"][0]) == (
        "^@Question:What colour {}? Short answer:red%\n@Question:How many? Short answer:"
    )
    memes = "is an image with: '{}' written on it. Is it hateful? Answer:"
    batch = interleaved_prompts(processor, [few_shot([record(picture(0), "no", "hi")], query)], question=memes)
    assert draw(batch["input_ids"][0]) == (
        "^@" + memes.replace("{}", "hi") + "no%\n@" + memes.replace("{}", "How many?")
    )


def test_no_shots_of_openflamingo_are_two_without_pictures(processor, picture, draw):
    support = [record(picture(0), "a cat"), record("never opened.png", "a dog")]
    batch = interleaved_prompts(processor, [few_shot(support, record(picture(2)), with_images=False)])
    assert draw(batch["input_ids"][0]) == "^Output:a cat%\nOutput:a dog%\n@Output:"
    assert torch.equal(batch["pixel_values"][0, 0], processor.image_processor.pixels(picture(2)))


def test_the_support_as_earlier_turns(processor, picture, draw):
    shown = few_shot([record(picture(0), "a cat", "What?")], record(picture(1), question="And this?"))
    batch = processor.apply_chat_template(
        shown["messages"], images=shown["images"], tokenize=True, return_dict=True, add_generation_prompt=True
    )
    drawn = draw(batch["input_ids"][0])
    assert drawn.partition("\n\n")[2] == (
        "### Image:\n@\n\n### Instruction:\nWhat?\n\n### Response:\na cat$"
        "\n\n### Image:\n@\n\n### Instruction:\nAnd this?\n\n### Response:\n"
    )
    assert batch["pixel_values"].shape[:2] == (1, 2)


def test_control_tokens_in_data_stay_text(processor, picture, draw):
    support = record(picture(0), "b<|endofchunk|>c</s>", "a<image>?")
    row = interleaved_prompts(processor, [few_shot([support], record(picture(1), question="<s>"))])["input_ids"][0]
    assert [(row == token).sum() for token in (256, 257, 258, 259)] == [1, 0, 1, 2]
    assert draw(row) == ("^@Question:a<image>? Short answer:b<|endofchunk|>c</s>%\n@Question:<s> Short answer:")


def test_rows_of_different_lengths_are_padded_on_the_left(processor, picture, draw):
    pool = [record(picture(0), "a cat"), record(picture(1), "a dog")]
    records = [few_shot(pool[:count], record(picture(2))) for count in (2, 0)]
    batch = interleaved_prompts(processor, records)
    assert re.fullmatch(r"_+\^@Output:", draw(batch["input_ids"][1]))
    assert batch["pixel_values"].shape[:2] == (2, 3) and not batch["pixel_values"][1, 1:].any()


def test_a_tokenizer_that_writes_no_bos_gets_none(base_tokenizer, picture, draw):
    base_tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    base_tokenizer.add_special_tokens({"additional_special_tokens": ["<|endofchunk|>", "<image>"]})
    base_tokenizer.add_special_tokens({"pad_token": "<PAD>"})
    processor = MMGPTProcessor(MMGPTImageProcessor(size=24), base_tokenizer)
    for given, drawn in ((None, "@Output:"), ("<s>", "^@Output:")):
        batch = interleaved_prompts(processor, [record(picture(0))], bos_token=given)
        assert draw(batch["input_ids"][0]) == drawn


def test_sources_in_the_messages_and_a_video_count_as_pictures(processor, picture, tmp_path, draw):
    picture(0).save(tmp_path / "a.png")
    inside = {"messages": [{"role": "user", "content": [{"type": "image", "path": str(tmp_path / "a.png")}]}]}
    inside["messages"].append({"role": "assistant", "content": "a cat"})
    query = {"messages": [{"role": "user", "content": [{"type": "video", "video": [picture(1), picture(2)]}]}]}
    batch = interleaved_prompts(processor, [few_shot([inside], query)])
    assert draw(batch["input_ids"][0]) == "^@Output:a cat%\n@Output:"
    assert batch["num_frames"].tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("support", "query", "named"),
    [
        ([record(None)], record(None), "Support example 0 ends in a turn of the user"),
        ([record(None, "a")], record(None, "b"), "The query ends in a turn of the assistant"),
        (
            [record(None, "a"), {"messages": [{"role": "system", "content": "P"}, *record(None, "b")["messages"]]}],
            record(None),
            "places? of 1 images|system",
        ),
    ],
)
def test_what_does_not_fit_together(support, query, named):
    with pytest.raises(ValueError, match=named):
        few_shot(support, query)


def test_the_interleaved_form_says_what_it_has_no_place_for(processor, picture):
    turns = record(picture(0))["messages"]
    for messages in (
        [{"role": "system", "content": "P"}, *turns],
        [{"role": "user", "content": [IMAGE, {"type": "input", "text": "x"}]}],
    ):
        with pytest.raises(Exception, match="interleaved form has no place"):
            interleaved_prompts(processor, [{"messages": messages, "images": [picture(0)]}])


# Choosing


def test_the_most_similar_stand_next_to_the_query():
    pool = torch.tensor([[1.0, 0.0], [0.0, 9.0], [0.6, 0.8], [-1.0, 0.0]])
    queries = torch.tensor([[5.0, 0.1], [0.0, 1.0]])
    assert choose_similar(pool, queries, 3) == [[1, 2, 0], [0, 2, 1]]
    with pytest.raises(ValueError, match="5 shots.*4 examples"):
        choose_similar(pool, queries, 5)


def test_the_same_seed_draws_the_same_examples():
    draws = [choose_at_random(100, 8, random.Random(seed)) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2] and len(set(draws[0])) == 8


# The index


@pytest.fixture
def extract(model, processor):
    @torch.no_grad()
    def features(pictures):
        return pooled_features(model.model.vision_tower, processor.image_processor(pictures)["pixel_values"])

    return features


@pytest.fixture
def index(tmp_path, extract, picture):
    return build_index(tmp_path / "index.safetensors", [picture(seed) for seed in range(5)], extract, batch_size=2)


def test_an_index_comes_back_and_finds_what_is_in_it(index, extract, picture):
    features = load_index(index, extract, pool_size=5)
    assert torch.allclose(features, extract([picture(seed) for seed in range(5)]), atol=1e-5)
    assert [row[-1] for row in choose_similar(features, extract([picture(3), picture(1)]), 2)] == [3, 1]
    load_index(index, lambda pictures: extract(pictures).bfloat16(), pool_size=5)  # the same tower, in half precision


def test_an_index_of_something_else_is_refused_by_name(index, extract, make_model, processor, picture, tmp_path):
    with pytest.raises(ValueError, match="features of 5 pictures, and the pool has 6"):
        load_index(index, extract, pool_size=6)
    tower = make_model(seed=1).model.vision_tower

    @torch.no_grad()
    def other(pictures):
        return pooled_features(tower, processor.image_processor(pictures)["pixel_values"])

    with pytest.raises(ValueError, match="another tower.*cosine"):
        load_index(index, other, pool_size=5)
    with pytest.raises(ValueError, match="16 wide, those of this one 8"):
        load_index(index, lambda pictures: extract(pictures)[:, :8], pool_size=5)
    index.write_bytes(index.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read as an index"):
        load_index(index, extract, pool_size=5)
    with pytest.raises(FileNotFoundError):
        load_index(tmp_path / "missing.safetensors", extract, pool_size=5)


def test_an_index_is_written_whole_or_not_at_all(tmp_path, extract, picture):
    with pytest.raises(ValueError, match="words.png"):
        (tmp_path / "words.png").write_text("no picture")
        build_index(tmp_path / "index.safetensors", [picture(0), tmp_path / "words.png"], extract)
    with pytest.raises(ValueError, match="at least one"):
        build_index(tmp_path / "index.safetensors", [], extract)
    assert [path.name for path in tmp_path.iterdir()] == ["words.png"]


@torch.no_grad()
def test_features_are_those_of_clip_before_its_projection():
    sizes = {"width": 16, "layers": 2, "head_width": 8, "patch_size": 8, "image_size": 24}
    clip = CLIP(12, sizes, {"width": 16, "heads": 2, "layers": 1}, quick_gelu=True).visual.eval()
    weights = clip.state_dict()
    projection = weights.pop("proj")
    pixels = torch.randn(2, 3, 24, 24)
    for post_norm in (False, True):  # of the patch tokens; nothing of it in the class token
        tower = build_vision_tower(MMGPTVisionConfig(**sizes, quick_gelu=True, post_norm=post_norm)).eval()
        tower.load_state_dict(weights)
        assert torch.allclose(pooled_features(tower, pixels) @ projection, clip(pixels), atol=1e-5)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tower = CLIPVisionModel(CLIPVisionConfig(**small, image_size=24, patch_size=8)).eval()
    assert torch.equal(pooled_features(tower, pixels), tower(pixels).pooler_output)


# The program


def test_the_program_learns_from_examples(tmp_path, monkeypatch, capsys):
    arguments = ["--queries", "20", "--shots", "0", "8", "--output-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["few_shot.py", *arguments])
    program.main()
    rows = {int(line.split()[0]): line for line in capsys.readouterr().out.splitlines()[-2:]}
    assert "0.0%" in rows[0]
    at_random, similar = (float(share) for share in re.findall(r"([\d.]+)%", rows[8]))
    assert at_random >= 80 and similar >= 95  # three classes: 33 by chance

"""The shipped base at work, in fp32 and bf16: what it says does not depend on how it is asked."""

import random
from pathlib import Path

import pytest
import torch
from tiny_world import corpus, scenes
from tiny_world.look_ups import look_up
from transformers import AutoModelForImageTextToText, AutoProcessor


BASE = Path(scenes.__file__).parent / "base"
KINDS = ("colour", "shape", "position", "size", "count", "yes_no")


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def model(request):
    return AutoModelForImageTextToText.from_pretrained(BASE, dtype=request.param).eval()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(BASE)


def drawn(count: int) -> list[tuple[str, object, str]]:
    """Look-ups as the base knows them: the text up to the value, the picture, the value."""
    rng, found = random.Random(7), []
    while len(found) < count:
        scene, kind = scenes.sample_scene(rng), KINDS[len(found) % len(KINDS)]
        if asked := look_up(rng, kind, scene):
            key = corpus.KEYS[kind][0].format(**asked.words)
            found.append((f"<s><image>{key}\n", scenes.render(scene), asked.answer))
    return found


LOOK_UPS = drawn(24)
TEXTS = [
    ("<s>23 + 45 =\n", "68"),
    ("<s>sort 7 2 5:\n", "2 5 7"),
    ("<s>copy dog cat:\n", "dog cat"),
    ("<s>apple:\n", "fruit"),
]


@torch.inference_mode()
def said(model, processor, texts, images=None, **kwargs) -> list[str]:
    """The lines that the model writes."""
    inputs = processor(text=texts, images=images, padding=True)
    stop = processor.tokenizer.encode("a\n", add_special_tokens=False)[-1]
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=stop, pad_token_id=0, **kwargs)
    return processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def answers(model, processor) -> list[str]:
    texts, images, _ = zip(*LOOK_UPS, strict=True)
    return said(model, processor, list(texts), [[image] for image in images])


def test_the_base_knows_its_look_ups(answers):
    right = sum(answer.strip() == expected for answer, (*_, expected) in zip(answers, LOOK_UPS, strict=True))
    assert right >= 23


@pytest.mark.parametrize("how", [{"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 2}], ids=str)
def test_the_way_of_decoding_changes_nothing(model, processor, answers, how):
    texts, images, _ = zip(*LOOK_UPS, strict=True)
    expected = answers
    if "num_beams" in how:
        expected = said(model, processor, list(texts), [[image] for image in images], use_cache=False, **how)
    assert said(model, processor, list(texts), [[image] for image in images], **how) == expected


def test_a_row_alone_says_what_it_says_in_a_mixed_padded_batch(model, processor, answers):
    texts = [text for text, *_ in LOOK_UPS[:6]] + [text for text, _ in TEXTS]
    images = [[image] for _, image, _ in LOOK_UPS[:6]] + [[]] * len(TEXTS)
    together = said(model, processor, texts, images)
    alone = [said(model, processor, [text], [given])[0] for text, given in zip(texts, images, strict=True)]
    assert together == alone
    assert together[:6] == answers[:6]
    for reply, (_, expected) in zip(together[6:], TEXTS, strict=True):
        assert reply.strip() == expected


@torch.inference_mode()
@pytest.mark.parametrize("pictures", [(1, 1), (1, 0), (0, 1), (0, 0)], ids="first {0[0]}, second {0[1]}".format)
def test_a_chat_that_goes_on_from_its_cache_says_what_it_says_without(model, processor, pictures):
    scene = [[image] for _, image, _ in LOOK_UPS[:2]]
    first, second = (scene[k] * pictures[k] for k in (0, 1))

    def turn(images: list, text: str) -> list[dict]:
        return [{"role": "user", "content": [*({"type": "image"} for _ in images), {"type": "text", "text": text}]}]

    start = processor.apply_chat_template(
        turn(first, "circle:"), images=first, tokenize=True, return_dict=True, add_generation_prompt=True
    )
    out = model.generate(**start, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    inputs = processor.continue_chat(out.sequences, start["attention_mask"], [turn(second, "objects:")], [second])
    assert inputs["input_ids"][0].tolist().count(processor.image_token_id) == sum(pictures)
    go_on = model.generate(**inputs, cache=out.cache, max_new_tokens=6, do_sample=False)
    both = processor.image_processor.stack([first + second])
    inputs.pop("pixel_values", None)
    anew = model.generate(**inputs, **both, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(go_on, anew)


def test_a_continued_chat_reads_as_the_whole_rendered_at_once(processor):
    first = [{"role": "user", "content": "circle:"}]
    reply, second = {"role": "assistant", "content": "red"}, [{"role": "user", "content": "objects:"}]
    whole = processor.apply_chat_template([*first, reply, *second], tokenize=True, add_generation_prompt=True)
    start = processor.apply_chat_template(first, tokenize=True, return_dict=True, add_generation_prompt=True)
    red, end = processor.tokenizer.encode("red", add_special_tokens=False), [processor.tokenizer.eos_token_id]
    for ids in (red, red + end, red + end + [processor.tokenizer.pad_token_id] * 2):
        sequences = torch.cat([start["input_ids"], torch.tensor([ids])], dim=1)
        inputs = processor.continue_chat(sequences, start["attention_mask"], [second])
        assert inputs["input_ids"][inputs["attention_mask"].bool()].tolist() == whole[0].tolist()

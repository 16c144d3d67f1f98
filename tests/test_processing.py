"""The processor: what is rendered, which ids it becomes, what is learnt, which pictures go along."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from modeling_mmgpt import MMGPTForConditionalGeneration
from processing_mmgpt import MMGPTCollator, MMGPTImageProcessor, MMGPTProcessor


GOLDENS = Path(__file__).parent / "goldens"
PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
CONTROL = ("<image>", "<|endofchunk|>", "</s>", "<s>", "<PAD>")
IMAGE_PART = {"type": "image"}


def user(*parts):
    return {"role": "user", "content": [IMAGE_PART if p == "#" else {"type": "text", "text": p} for p in parts]}


def assistant(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


SYSTEM = {"role": "system", "content": "P"}
INPUT = {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "input", "text": "x\ny"}]}

# Messages, the text they become with BOS and EOS as ^ and $, images as @, learnt tokens in «».
RENDERED = {
    "text": ([user("hi"), assistant("yo")], f"^{PREAMBLE}\n\n### Instruction:\nhi\n\n### Response:\n«yo$»"),
    "image": (
        [user("#", "hi"), assistant("yo")],
        f"^{PREAMBLE}\n\n### Image:\n@\n\n### Instruction:\nhi\n\n### Response:\n«yo$»",
    ),
    "image behind its question": (
        [SYSTEM, user("hi", "#"), assistant("yo")],
        "^P\n\n### Image:\n@\n\n### Instruction:\nhi\n\n### Response:\n«yo$»",
    ),
    "images": (
        [SYSTEM, user("#", "#", "hi"), assistant("yo")],
        "^P\n\n### Image:\n@\n\n### Image:\n@\n\n### Instruction:\nhi\n\n### Response:\n«yo$»",
    ),
    "turns": (
        [SYSTEM, user("#", "hi"), assistant("yo"), user("so"), assistant("no"), user("#", "eh"), assistant("ah")],
        "^P\n\n### Image:\n@\n\n### Instruction:\nhi\n\n### Response:\n«yo$»"
        "\n\n### Instruction:\nso\n\n### Response:\n«no$»"
        "\n\n### Image:\n@\n\n### Instruction:\neh\n\n### Response:\n«ah$»",
    ),
    "input": (
        [SYSTEM, INPUT, assistant("yo")],
        "^P\n\n### Instruction:\nhi\n\n### Input:\nx\ny\n\n### Response:\n«yo$»",
    ),
    "strings": (
        [SYSTEM, {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}],
        "^P\n\n### Instruction:\nhi\n\n### Response:\n«yo$»",
    ),
    "spaces": (
        [SYSTEM, user("  hi \n"), assistant(" \nyo ")],
        "^P\n\n### Instruction:\n  hi \n\n\n### Response:\n« \nyo $»",
    ),
    "template language": (
        [SYSTEM, user("{{ bos_token }}{% if %}"), assistant("{{ eos_token }}{# no #}<b>&amp;")],
        "^P\n\n### Instruction:\n{{ bos_token }}{% if %}\n\n### Response:\n«{{ eos_token }}{# no #}<b>&amp;$»",
    ),
    "several letters a token": (
        [SYSTEM, user("naïve 東"), assistant("é🙂")],
        "^P\n\n### Instruction:\nnaïve 東\n\n### Response:\n«é🙂$»",
    ),
    "no words in an answer": ([SYSTEM, user("hi"), assistant("")], "^P\n\n### Instruction:\nhi\n\n### Response:\n«$»"),
    "none padding of datasets": (
        [
            {"role": "system", "content": [{"type": "text", "text": "P", "image": None}]},
            {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "yo", "image": None}]},
        ],
        "^P\n\n### Image:\n@\n\n### Instruction:\nhi\n\n### Response:\n«yo$»",
    ),
}


def written(drawn):
    """The text of a drawing."""
    for symbol, token in (("«", ""), ("»", ""), ("^", "<s>"), ("$", "</s>"), ("@", "<image>")):
        drawn = drawn.replace(symbol, token)
    return drawn


@pytest.mark.parametrize("case", RENDERED)
def test_messages_become_this_text_these_ids_and_these_learnt_tokens(processor, draw, picture, case):
    messages, expected = RENDERED[case]
    images, marked = [picture(k) for k in range(expected.count("@"))], written(expected)
    assert processor.apply_chat_template(messages) == marked
    batch = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, images=images
    )
    row, mask = batch["input_ids"][0], batch["assistant_masks"][0]
    assert batch["attention_mask"].tolist() == [[1] * len(row)]
    if case == "several letters a token":  # its letters have several ids, which draw nothing one by one
        learnt = [token for token, m in zip(row.tolist(), mask.tolist(), strict=True) if m]
        assert processor.tokenizer.decode(learnt) == "é🙂</s>" and processor.tokenizer.decode(row) == marked
    else:
        assert draw(row, mask) == expected
    assert ("pixel_values" in batch) == bool(images)
    if images:
        assert batch["pixel_values"].shape == (1, len(images), 3, 24, 24)
        for k, image in enumerate(images):
            assert torch.equal(batch["pixel_values"][0, k], processor.image_processor.pixels(image))
    # Control text, which the rendered text is, becomes the same ids.
    again = processor(text=marked, images=images or None)
    assert again["input_ids"].tolist() == [row.tolist()]
    assert processor.apply_chat_template(messages, tokenize=True, images=images).tolist() == [row.tolist()]


def test_a_generation_prompt_is_the_head_of_a_response(processor, picture):
    text = processor.apply_chat_template([SYSTEM, user("#", "hi")], add_generation_prompt=True)
    assert text == "<s>P\n\n### Image:\n<image>\n\n### Instruction:\nhi\n\n### Response:\n"
    answered = processor.apply_chat_template([SYSTEM, user("#", "hi"), assistant("yo")])
    assert answered == text + "yo</s>"
    started = processor.apply_chat_template([SYSTEM, user("#", "hi"), assistant("yo")], continue_final_message=True)
    assert started == text + "yo"


def test_a_tokenizer_without_bos_gets_none(base_tokenizer):
    base_tokenizer.bos_token = None
    base_tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|endofchunk|>", "<image>"], "pad_token": "<PAD>"}
    )
    processor = MMGPTProcessor(MMGPTImageProcessor(size=24), base_tokenizer)
    assert processor.apply_chat_template([SYSTEM, user("hi")]) == "P\n\n### Instruction:\nhi"


SMOLLM2 = Path(__file__).parents[1] / "examples" / "recipes" / "smollm2.jinja"


@pytest.fixture
def smollm2(base_tokenizer):
    """A processor with the marks of SmolLM2, whose BOS opens every turn, and its template with pictures."""
    base_tokenizer.add_special_tokens({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
    base_tokenizer.add_special_tokens({"additional_special_tokens": ["<|endofchunk|>", "<image>"]})
    base_tokenizer.pad_token = "<|im_end|>"
    return MMGPTProcessor(MMGPTImageProcessor(size=24), base_tokenizer, SMOLLM2.read_text())


def test_a_template_of_another_family_marks_what_is_learnt(smollm2, picture):
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Sure? <|im_end|>"},
        {"role": "assistant", "content": "Yes."},
    ]
    batch = MMGPTCollator(smollm2, max_length=300)([{"messages": messages, "images": [picture(0)]}])
    decode = smollm2.tokenizer.decode
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    asked = "<|im_start|>user\n<image>What?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"
    again = "<|im_start|>user\nSure? <|im_end|><|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>"
    assert decode(batch["input_ids"][0]) == system + asked + again
    assert decode(batch["input_ids"][0][batch["labels"][0] != -100]) == "A cat.<|im_end|>Yes.<|im_end|>"
    ends = (batch["input_ids"] == smollm2.tokenizer.eos_token_id).sum()
    assert ends == 5  # that of the question's text is text


def test_a_chat_goes_on_as_if_it_were_rendered_whole(smollm2, processor):
    for one in (smollm2, processor):
        first = [{"role": "user", "content": "a"}]
        reply, second = {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}
        start = one.encode_chat(first, add_generation_prompt=True).input_ids
        answered = one.encode_chat([*first, reply])
        sequences = torch.tensor([answered.input_ids[: answered.ends[0]]])
        batch = one.continue_chat(sequences, torch.ones(1, len(start), dtype=torch.long), [[second]])
        whole = one.encode_chat([*first, reply, second], add_generation_prompt=True).input_ids
        assert batch["input_ids"][0].tolist() == whole


@pytest.mark.parametrize("texts", [["<s>a"], ["a"], ["a", "b"], ["<s>a", "<s>b"], ["<s>a", "b"], ["a", "<s>b"]])
def test_bos_stands_once_in_every_row(processor, draw, texts):
    batch = processor(text=texts, padding=True)
    assert [draw(row) for row in batch["input_ids"]] == [f"^{text[-1]}" for text in texts]
    assert draw(processor(text="ab", add_special_tokens=False)["input_ids"][0]) == "ab"


# Text that looks like control


@pytest.mark.parametrize("token", CONTROL)
@pytest.mark.parametrize("where", ["alone", "inside", "twice"])
def test_control_tokens_in_a_text_stay_text(processor, draw, picture, token, where):
    literal = {"alone": token, "inside": f"a {token} b", "twice": token * 2 + "<"}[where]
    messages = [
        {"role": "system", "content": literal},
        {
            "role": "user",
            "content": [IMAGE_PART, {"type": "text", "text": literal}, {"type": "input", "text": literal}],
        },
        assistant(literal),
    ]
    expected = (
        f"^{literal}\n\n### Image:\n@\n\n### Instruction:\n{literal}\n\n### Input:\n{literal}\n\n"
        f"### Response:\n«{literal}$»"
    )
    row = processor.encode_chat(messages, [picture(0)])
    assert draw(row.input_ids, row.learnt) == expected
    assert processor.apply_chat_template(messages) == written(expected)
    assert processor.tokenizer.decode(row.input_ids) == written(expected)


@pytest.mark.parametrize("role", ["system", "assistant", "user", "input"])
@pytest.mark.parametrize("halves", [("<ima", "ge>"), ("</", "s>"), ("<|endof", "chunk|>")])
def test_control_tokens_put_together_from_parts_stay_text(processor, role, halves):
    kind = "input" if role == "input" else "text"
    parts = [{"type": kind, "text": half} for half in halves]
    messages = [dict(SYSTEM), user("hi"), assistant("yo")]
    messages[{"system": 0, "user": 1, "input": 1, "assistant": 2}[role]]["content"] = parts
    ids = processor.encode_chat(messages).input_ids
    assert [ids.count(token) for token in (256, 257, 258, 259)] == [1, 1, 0, 0]


pieces = st.one_of(st.sampled_from([*CONTROL, "<", ">", "<ima", "ge>", "\n", "{{", "\U000f0000", "\U000f0003", "é"]),
                   st.text(max_size=3))  # fmt: skip
texts = st.lists(pieces, max_size=6).map("".join)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(asked=texts, answered=texts)
def test_any_text_comes_back_and_makes_no_control_token(processor, asked, answered):
    row = processor.encode_chat([SYSTEM, user(asked), assistant(answered)])
    assert [row.input_ids.count(token) for token in (256, 257, 258, 259, 260)] == [1, 1, 0, 0, 0]
    text = f"<s>P\n\n### Instruction:\n{asked}\n\n### Response:\n{answered}</s>"
    assert processor.tokenizer.decode(row.input_ids) == text
    assert processor.apply_chat_template([SYSTEM, user(asked), assistant(answered)]) == text
    learnt = [token for token, m in zip(row.input_ids, row.learnt, strict=True) if m]
    assert processor.tokenizer.decode(learnt) == answered + "</s>"


def test_in_control_text_an_image_counts(processor, draw, picture):
    batch = processor(text="<image>cat<|endofchunk|>", images=picture(0))
    assert draw(batch["input_ids"][0]) == "^@cat%"
    assert batch["pixel_values"].shape == (1, 1, 3, 24, 24)


# Loud errors


@pytest.fixture
def files(tmp_path, picture):
    picture(0, 40, 30).save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:900])
    (tmp_path / "words.png").write_text("no picture")
    return tmp_path


@pytest.mark.parametrize(
    ("messages", "images", "error", "named"),
    [
        ([], None, ValueError, ["empty"]),
        ("hi", None, TypeError, ["list"]),
        ([user("hi"), assistant("a"), assistant("b")], None, ValueError, ["Message 2"]),
        ([assistant("a")], None, ValueError, ["Message 0"]),
        ([{"role": "tool", "content": "a"}], None, ValueError, ["Message 0", "tool"]),
        ([{"content": "a"}], None, ValueError, ["Message 0", "role"]),
        ([user("hi"), SYSTEM], None, ValueError, ["Message 1", "system"]),
        ([{"role": "user", "content": [{"type": "audio"}]}], None, ValueError, ["Message 0", "audio"]),
        ([{"role": "user", "content": [{"type": "text"}]}], None, ValueError, ["Message 0", "text"]),
        ([{"role": "user", "content": ["hi"]}], None, ValueError, ["Message 0", "hi"]),
        ([{"role": "user", "content": None}], None, ValueError, ["Message 0"]),
        ([user("hi"), {"role": "assistant", "content": [IMAGE_PART]}], None, ValueError, ["Message 1", "image"]),
        ([user("#", "#", "hi")], ["good.png"], ValueError, ["2", "1"]),
        ([user("#", "hi")], None, ValueError, ["1", "0"]),
        ([user("hi")], ["good.png"], ValueError, ["0", "1"]),
        ([user("#", "hi")], ["cut.png"], ValueError, ["cut.png"]),
        ([user("#", "hi")], ["words.png"], ValueError, ["words.png"]),
        ([user("#", "hi")], ["missing.png"], FileNotFoundError, ["missing.png"]),
        ([user("#", "hi")], ["https://example.com/a.png"], ValueError, ["https://example.com/a.png"]),
        ([user("#", "hi")], ["data:image/png;base64,%%"], ValueError, ["base64"]),
        ([user("#", "hi")], [7], TypeError, ["int"]),
    ],
)
def test_what_is_wrong_is_named(processor, files, messages, images, error, named):
    images = images and [str(files / i) if isinstance(i, str) and ":" not in i else i for i in images]
    with pytest.raises(error) as caught:
        processor.apply_chat_template(messages, tokenize=True, return_dict=True, images=images)
    assert all(name in str(caught.value) for name in named), caught.value


def test_a_batch_names_the_row_and_both_numbers(processor, picture):
    with pytest.raises(ValueError, match="(?s)Row 1.*2.*1"):
        processor(text=["<image>", "<image><image>"], images=[[picture(0)], [picture(1)]], padding=True)
    with pytest.raises(ValueError, match="(?s)1.*2.*2"):
        processor(text=["<image>", "<image><image>"], images=[picture(0), picture(1)], padding=True)
    conversations = [[user("#", "hi")], [user("#", "#", "hi")]]
    with pytest.raises(ValueError, match="(?s)Row 1.*2.*1"):
        processor.apply_chat_template(conversations, tokenize=True, images=[[picture(0)], [picture(1)]])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM"])
def test_a_picture_cut_anywhere_is_refused_by_name_or_whole(processor, picture, tmp_path, kind):
    path, buffer = tmp_path / "cut.bin", io.BytesIO()
    picture(0, 12, 10).save(buffer, kind)
    whole = processor.image_processor.pixels(buffer.getvalue())
    for size in range(len(buffer.getvalue())):
        path.write_bytes(buffer.getvalue()[:size])
        try:
            pixels = processor.image_processor.pixels(str(path))
        except ValueError as error:
            assert "cut.bin" in str(error)
        else:
            assert torch.equal(pixels, whole), size


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(processor, tmp_path):
    Image.new("1", (9000, 9000)).save(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match="bomb.png"):
        processor.image_processor.pixels(str(tmp_path / "bomb.png"))


# Batches


def test_padding_is_on_the_left_for_generation_and_on_the_right_for_training(processor, draw):
    chats = [[SYSTEM, user("hi")], [SYSTEM, user("hello")]]
    short, long = "^P\n\n### Instruction:\nhi", "^P\n\n### Instruction:\nhello"
    head = "\n\n### Response:\n"
    asked = processor.apply_chat_template(chats, tokenize=True, return_dict=True, add_generation_prompt=True)
    assert [draw(row) for row in asked["input_ids"]] == ["___" + short + head, long + head]
    assert asked["attention_mask"].tolist() == [[0] * 3 + [1] * len(short + head), [1] * len(long + head)]
    trained = processor.apply_chat_template(
        [[*chat, assistant("a")] for chat in chats], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    drawn = [draw(*row) for row in zip(trained["input_ids"], trained["assistant_masks"], strict=True)]
    assert drawn == [short + head + "«a$»___", long + head + "«a$»"]
    for side, expected in (("left", ["_^a", "^ab"]), ("right", ["^a_", "^ab"])):
        rows = processor(text=["a", "ab"], padding=True, padding_side=side)["input_ids"]
        assert [draw(row) for row in rows] == expected
    assert [draw(row) for row in processor(text=["a", "ab"], padding=True)["input_ids"]] == ["_^a", "^ab"]
    assert processor(text=["a", "ab"], return_tensors=None)["input_ids"][0] == [256, ord("a") - 33]


def test_a_tokenizer_that_is_handed_over_pads_as_before(processor):
    processor.tokenizer.padding_side = "right"
    again = MMGPTProcessor(processor.image_processor, processor.tokenizer)
    assert processor.tokenizer.padding_side == "right" and again.tokenizer.padding_side == "left"


@pytest.mark.parametrize("where", [{}, {"return_tensors": "auto"}, {"return_tensors": None}])
@pytest.mark.parametrize("inside", ["pt", "auto", None])
def test_what_processor_kwargs_say_goes_before(processor, where, inside):
    given = {**where, "processor_kwargs": {"return_tensors": inside, "padding_side": "left"}}
    ids = processor.apply_chat_template([[SYSTEM, user("hi")], [SYSTEM, user("hello")]], tokenize=True, **given)
    assert isinstance(ids, torch.Tensor) == (inside is not None) and ids[0][0] == processor.tokenizer.pad_token_id
    with pytest.raises(ValueError, match="does not know the processor_kwargs .'truncatoin'"):
        processor.apply_chat_template([user("hi")], tokenize=True, processor_kwargs={"truncatoin": True})


@pytest.mark.parametrize("rows", [["<image>a"], ["<image>", "a", "<image>b<image>"], ["a", "b"]])
def test_flat_and_nested_pictures_are_the_same(processor, picture, rows):
    counts = [row.count("<image>") for row in rows]
    flat = [picture(k) for k in range(sum(counts))]
    rest = iter(flat)
    nested = [[next(rest) for _ in range(count)] for count in counts]
    one, other = (processor(text=rows, images=images, padding=True) for images in (flat, nested))
    assert one.keys() == other.keys() and ("pixel_values" in one) == bool(flat)
    assert all(torch.equal(one[key], other[key]) for key in one.keys())
    if not flat:
        return
    assert one["pixel_values"].shape == (len(rows), max(counts), 3, 24, 24)
    for row, pictures in enumerate(nested):
        for column in range(max(counts)):
            expected = processor.image_processor.pixels(pictures[column]) if column < len(pictures) else 0
            assert (one["pixel_values"][row, column] == expected).all()


def test_a_list_in_place_of_a_picture_is_a_video(processor, picture):
    images = [[[picture(0), picture(1)], picture(2)], [picture(3)]]
    batch = processor(text=["<image><image>", "<image>"], images=images, padding=True)
    assert batch["pixel_values"].shape == (2, 2, 2, 3, 24, 24)
    assert batch["num_frames"].tolist() == [[2, 1], [1, 1]]
    assert torch.equal(batch["pixel_values"][0, 0, 1], processor.image_processor.pixels(picture(1)))


@pytest.mark.parametrize("form", ["picture", "file", "file path", "path", "array", "bytes", "url", "base64"])
def test_a_picture_may_stand_in_a_message_in_any_form(processor, picture, tmp_path, form):
    image, file, buffer = picture(0, 40, 30), tmp_path / "a.png", io.BytesIO()
    image.save(buffer, "PNG")
    file.write_bytes(buffer.getvalue())
    encoded = base64.b64encode(buffer.getvalue()).decode()
    source = {
        "picture": {"image": image},
        "file": {"image": str(file)},
        "file path": {"image": file},
        "path": {"path": str(file)},
        "array": {"image": np.asarray(image)},
        "bytes": {"image": buffer.getvalue()},
        "url": {"url": f"data:image/png;base64,{encoded}"},
        "base64": {"base64": encoded},
    }[form]
    message = {"role": "user", "content": [{"type": "image", **source}, {"type": "text", "text": "hi"}]}
    batch = processor.apply_chat_template([message], tokenize=True, return_dict=True)
    assert torch.equal(batch["pixel_values"], processor.image_processor.pixels(image)[None, None])


def test_pictures_of_the_messages_and_of_the_list_are_put_in_order(processor, picture):
    one, two, three = (picture(k) for k in range(3))
    messages = [user("#", "hi"), assistant("yo"), {"role": "user", "content": [{"type": "image", "image": two}]}]
    messages += [assistant("yo"), user("#", "hi")]
    batch = processor.apply_chat_template(messages, tokenize=True, return_dict=True, images=[one, three])
    expected = torch.stack([processor.image_processor.pixels(p) for p in (one, two, three)])
    assert torch.equal(batch["pixel_values"][0], expected)


# In and out of folders


def test_a_saved_processor_comes_back(processor, picture, make_model, tmp_path):
    custom = MMGPTProcessor(
        MMGPTImageProcessor(size=16, image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.25, 0.5)),
        processor.tokenizer,
        chat_template="{{ bos_token }}{% for m in messages %}[{{ m.role }}]{% endfor %}",
    )
    for number, saved in enumerate((processor, custom)):
        folder = tmp_path / str(number)
        saved.save_pretrained(folder)
        for load in (MMGPTProcessor, AutoProcessor):
            again = load.from_pretrained(folder)
            assert type(again) is MMGPTProcessor
            assert again.apply_chat_template([user("hi")]) == saved.apply_chat_template([user("hi")])
            batch, expected = (p(text="<image>a", images=picture(0, 30, 40)) for p in (again, saved))
            assert all(torch.equal(batch[key], expected[key]) for key in expected.keys())
    assert custom.apply_chat_template([user("hi")]) == "<s>[user]"


def test_processor_and_model_of_a_folder_work_together(processor, make_model, picture, tmp_path):
    make_model().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model, again = MMGPTForConditionalGeneration.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    chats = [[SYSTEM, user("#", "hi")], [SYSTEM, user("hello")]]
    batch = again.apply_chat_template(
        chats, tokenize=True, return_dict=True, add_generation_prompt=True, images=[[picture(0)], []]
    )
    out = model.generate(**batch, max_new_tokens=4, do_sample=False)
    texts = again.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert len(texts) == 2 and all(isinstance(text, str) for text in texts)


def test_a_tokenizer_without_our_tokens_is_refused(base_tokenizer):
    with pytest.raises(ValueError, match="(?s)<image>.*<|endofchunk|>"):
        MMGPTProcessor(MMGPTImageProcessor(), base_tokenizer)


# The reference


@pytest.mark.parametrize("number", range(5))
def test_llava_records_have_the_ids_and_labels_of_the_reference(picture, number):
    """The reference deletes line breaks in a question, and cuts at 512 tokens, in the prompt or behind it."""
    golden = json.loads((GOLDENS / "llava.json").read_text())[number]
    processor = MMGPTProcessor(MMGPTImageProcessor(size=24), AutoTokenizer.from_pretrained(GOLDENS / "tokenizer_fast"))
    question = golden["question"].replace("<image>", "").replace("\n", "")
    messages = [user("#", question), assistant(golden["answer"])]
    assert processor.apply_chat_template(messages[:1], add_generation_prompt=True) == "<s>" + golden["prompt"]
    row = processor.encode_chat(messages, [picture(0)])
    assert row.input_ids[:512] == golden["input_ids"]
    labels = [t if m else -100 for t, m in zip(row.input_ids, row.learnt, strict=True)]
    assert labels[:512] == golden["labels"]
    assert (len(golden["input_ids"]) == 512) == (number >= 3) and row.input_ids[-1] == labels[-1] == 2


@pytest.mark.parametrize("token", ["<image>", "<|endofchunk|>", "</s>"])
def test_control_tokens_stay_text_with_a_sentencepiece_tokenizer_too(token):
    processor = MMGPTProcessor(MMGPTImageProcessor(size=24), AutoTokenizer.from_pretrained(GOLDENS / "tokenizer_fast"))
    literal = f"The {token} holds"
    row = processor.encode_chat([user(literal), assistant(literal)])
    assert [row.input_ids.count(i) for i in (1, 2, 700, 701, 702)] == [1, 1, 0, 0, 0]
    learnt = [t for t, m in zip(row.input_ids, row.learnt, strict=True) if m]
    assert learnt[-1] == 2
    assert processor.tokenizer.decode(learnt[:-1]).replace(" ", "") == literal.replace(" ", "")


def test_pictures_of_rows_are_a_ragged_list(processor, picture):
    many = [picture(seed) for seed in range(32)]
    batch = processor(["<image>" * 32, "a<image>", "b"], images=[many, [picture(40)], []], padding=True)
    assert batch["pixel_values"].shape[:2] == (3, 32)
    assert torch.equal(batch["pixel_values"][0, 31], processor.image_processor.pixels(many[31]))
    assert torch.equal(batch["pixel_values"][1, 0], processor.image_processor.pixels(picture(40)))
    assert not batch["pixel_values"][1, 1:].any() and not batch["pixel_values"][2].any()
    chats = [[user(*["#"] * 32, "a")], [user("#", "a")], [user("a")]]
    chat = processor.apply_chat_template(
        chats, images=[many, [picture(40)], []], tokenize=True, return_dict=True, add_generation_prompt=True
    )
    assert torch.equal(chat["pixel_values"], batch["pixel_values"])


# Arguments


LONG = [SYSTEM, user("hello " * 40)]
TOOL = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {}}}


@pytest.mark.parametrize("inside", [False, True])
def test_truncation_padding_and_tensors_are_honoured(processor, inside):
    def ask(messages, **options):
        options = {"processor_kwargs": options} if inside else options
        return processor.apply_chat_template(messages, tokenize=True, return_dict=True, **options)

    whole = ask(LONG)["input_ids"]
    assert torch.equal(ask(LONG, truncation=True, max_length=64)["input_ids"], whole[:, :64])
    assert ask(LONG, padding="max_length", max_length=400)["attention_mask"].sum(dim=1).tolist() == [whole.shape[1]]
    assert ask(LONG, padding="max_length", max_length=400)["input_ids"].shape == (1, 400)
    assert ask(LONG, pad_to_multiple_of=128)["input_ids"].shape[1] % 128 == 0
    assert isinstance(ask(LONG, return_tensors="np")["input_ids"], np.ndarray)
    assert ask(LONG, return_tensors=None)["input_ids"] == whole.tolist()
    learnt = [*LONG, assistant("yo")]
    masks = processor.apply_chat_template(
        learnt, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, truncation=True,
        max_length=whole.shape[1] + 17, return_tensors="np",
    )  # fmt: skip
    assert masks["assistant_masks"].shape == masks["input_ids"].shape and masks["assistant_masks"].sum() == 1


def test_the_processor_honours_the_same(processor, draw, picture):
    texts = ["abcdef", "<image>b"]
    rows = processor(text=texts, images=[None, [picture(0)]], truncation=True, max_length=3, padding=True)
    assert [draw(row) for row in rows["input_ids"]] == ["^ab", "^@b"]
    rows = processor(
        text=texts, images=[None, picture(0)][1:], padding="max_length", max_length=9, return_tensors="np"
    )
    assert rows["input_ids"].shape == (2, 9) and isinstance(rows["pixel_values"], np.ndarray)
    processor.tokenizer.truncation_side = "left"
    try:
        cut = processor(text="abcdef", truncation=True, max_length=3)
        assert draw(cut["input_ids"][0]) == "def"
    finally:
        processor.tokenizer.truncation_side = "right"
    assert processor.tokenizer("abcdef")["input_ids"][1:] == processor(text="abcdef")["input_ids"][0, 1:].tolist()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"add_generation_promt": True}, "add_generation_promt"),
        ({"tools": [TOOL]}, "tools"),
        ({"documents": [{"title": "a", "text": "b"}]}, "documents"),
        ({"size": 96}, "size"),
        ({"max_length": 64}, "truncation=True"),
        ({"add_special_tokens": True}, "add_special_tokens"),
        ({"sanitize_control_tokens": False}, "sanitize_control_tokens"),
        ({"processor_kwargs": {"truncate": True}}, "truncate"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
        ({"return_assistant_tokens_mask": True}, "return_dict"),
    ],
)
def test_an_argument_that_would_be_swallowed_is_refused_by_name(processor, options, named):
    with pytest.raises((TypeError, ValueError), match=named):
        processor.apply_chat_template([user("hi"), assistant("yo")], **{"tokenize": True, **options})


@pytest.mark.parametrize("options", [{"size": 96}, {"do_rescale": False}, {"paddin": True}])
def test_the_processor_refuses_what_it_does_not_know(processor, options):
    with pytest.raises(TypeError, match=next(iter(options))):
        processor(text="a", **options)


def test_what_the_template_reads_and_what_is_none_is_taken(processor):
    template = "{{ greeting }}{% for m in messages %}{% break %}{% endfor %}"
    template += "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}"
    ask = [user("hi")]
    assert processor.apply_chat_template(ask, chat_template=template, greeting="hey", tools=[TOOL]) == "heyadd"
    plain = processor.apply_chat_template(ask)
    assert processor.apply_chat_template(ask, tools=None, documents=None, sanitize_control_tokens=True) == plain


def test_a_begun_reply_is_padded_on_the_left(processor, draw):
    chats = [[SYSTEM, user("hi"), assistant("y")], [SYSTEM, user("hello"), assistant("n")]]
    rows = processor.apply_chat_template(chats, tokenize=True, return_dict=True, continue_final_message=True)
    head = "\n\n### Response:\n"
    assert [draw(row) for row in rows["input_ids"]] == [
        f"___^P\n\n### Instruction:\nhi{head}y", f"^P\n\n### Instruction:\nhello{head}n",
    ]  # fmt: skip
    right = processor.apply_chat_template(chats, tokenize=True, continue_final_message=True, padding_side="right")
    assert draw(right[0]).endswith("y___")


@pytest.mark.parametrize("nothing", [None, [], ()])
def test_none_is_a_row_without_pictures(processor, picture, nothing):
    batch = processor(text=["<image>a", "b"], images=[[picture(0)], nothing], padding=True)
    assert batch["pixel_values"].shape[:2] == (2, 1) and not batch["pixel_values"][1].any()
    chats = [[user("#", "a")], [user("b")]]
    again = processor.apply_chat_template(chats, images=[[picture(0)], nothing], tokenize=True, return_dict=True)
    assert torch.equal(again["pixel_values"], batch["pixel_values"])
    assert "pixel_values" not in processor(text=["a", "b"], images=[nothing, nothing], padding=True)


@pytest.mark.parametrize("cut", ["text", "chat"])
def test_truncation_that_cuts_a_picture_says_so(processor, picture, cut):
    with pytest.raises(ValueError, match="(?s)Row 0: truncation to 3 .* cuts 1 <image>.*max_length"):
        if cut == "text":
            processor(text="a b c <image>", images=picture(0), truncation=True, max_length=3)
        else:
            processor.apply_chat_template(
                [user("#", "a")], images=[picture(0)], tokenize=True, truncation=True, max_length=3
            )


@pytest.mark.parametrize("order", ["picture first", "pictures first", "numbers"])
def test_what_is_no_text_is_named(processor, picture, order):
    given = {"picture first": picture(0), "pictures first": [picture(0)], "numbers": [1, 2]}[order]
    with pytest.raises(
        TypeError, match=r"(?s)`text` is a string.*(Image|int).*processor\(text=\.\.\., images=\.\.\.\)"
    ):
        processor(given, "<image>a")

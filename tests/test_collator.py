"""The collator: conversations to a batch, labels token by token, what goes when a conversation is too long."""

import copy

import pytest
import torch
from datasets import Dataset, Image, List

from processing_mmgpt import MMGPTCollator, processing_mmgpt, rendering_mmgpt


def turns(*pairs, system="P"):
    """Messages from `(number of images, question, answer)`; without an answer the turn stays open."""
    messages = [{"role": "system", "content": [{"type": "text", "text": system}]}]
    for images, question, answer in pairs:
        content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
        messages.append({"role": "user", "content": content})
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def text(images, question, answer=None):
    asked = "\n\n### Image:\n@" * images + f"\n\n### Instruction:\n{question}"
    return asked if answer is None else f"{asked}\n\n### Response:\n«{answer}$»"


def drawn(draw, batch):
    return [draw(ids, labels != -100) for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)]


@pytest.fixture
def shown(processor):
    """Compare the pictures of a row with those it should have; behind them there are zeros."""

    def check(row, pictures):
        expected = torch.zeros_like(row)
        for k, picture in enumerate(pictures):
            expected[k] = processor.image_processor.pixels(picture)
        assert torch.equal(row, expected)

    return check


def test_rows_of_all_kinds_stand_in_one_batch(processor, draw, picture, shown):
    one, two, three = (picture(k) for k in range(3))
    records = [
        {"messages": turns((1, "a", "b"), (0, "c", "d"), (1, "e", "f")), "images": [one, two]},
        {"messages": turns((0, "g", "hi")), "images": []},
        {"messages": turns((0, "g", "hi"))},
        {"messages": turns((0, "g", "hi")), "images": None},
        {"messages": turns((1, "j", "")), "images": [three]},
    ]
    batch = MMGPTCollator(processor)(records)
    long = "^P" + text(1, "a", "b") + text(0, "c", "d") + text(1, "e", "f")
    rows = [long, *["^P" + text(0, "g", "hi")] * 3, "^P" + text(1, "j", "")]
    width = len(long) - 6  # the marks of three answers
    tokens = [len(row.replace("«", "").replace("»", "")) for row in rows]
    assert drawn(draw, batch) == [row + "_" * (width - n) for row, n in zip(rows, tokens, strict=True)]
    assert batch["attention_mask"].tolist() == [[1] * n + [0] * (width - n) for n in tokens]
    learnt = batch["labels"] != -100
    assert torch.equal(batch["labels"][learnt], batch["input_ids"][learnt])
    assert batch.keys() == {"input_ids", "attention_mask", "labels", "pixel_values"}
    for row, pictures in zip(batch["pixel_values"], ([one, two], [], [], [], [three]), strict=True):
        shown(row, pictures)
    assert "pixel_values" not in MMGPTCollator(processor)(records[1:4])


def test_the_batch_trains_the_model(processor, picture, model):
    records = [
        {"messages": turns((1, "a", "b")), "images": [picture(0)]},
        {"messages": turns((0, "g", "hi")), "images": []},
    ]
    batch = MMGPTCollator(processor)(records)
    logits = model(**batch).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert (model(**batch).loss - expected).abs() < 1e-5


THREE = turns((1, "a", "b"), (2, "c", "d"), (1, "e", "f"))
PARTS = ["^P" + text(1, "a", "b"), text(2, "c", "d"), text(1, "e", "f")]
LENGTHS = [sum(len(part) - 2 for part in PARTS[: k + 1]) for k in range(3)]


@pytest.mark.parametrize(
    ("max_length", "kept"),
    [
        (None, 3), (LENGTHS[2] + 1, 3), (LENGTHS[2], 3), (LENGTHS[2] - 1, 2),
        (LENGTHS[1], 2), (LENGTHS[1] - 1, 1), (LENGTHS[0], 1), (LENGTHS[0] - 1, 0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("inside", [False, True])
def test_a_long_conversation_is_cut_at_a_turn_with_its_pictures(
    processor, draw, picture, shown, max_length, kept, inside
):
    pictures = [picture(k) for k in range(4)]
    record = {"messages": THREE, "images": pictures}
    if inside:
        rest = iter(pictures)
        messages = copy.deepcopy(THREE)
        for message in messages:
            message["content"] = [
                {"type": "image", "image": next(rest)} if part["type"] == "image" else part
                for part in message["content"]
            ]
        record = {"messages": messages}
    other = {"messages": turns((0, "g", "hi"), system="")}
    collator = MMGPTCollator(processor, max_length=max_length)
    if kept == 0:
        with pytest.raises(ValueError, match=f"(?s)Row 1.*{LENGTHS[0]}.*{max_length}"):
            collator([other, record])
        return
    batch = collator([record, other])
    assert drawn(draw, batch)[0] == "".join(PARTS[:kept])
    shown(batch["pixel_values"][0], pictures[: (1, 3, 4)[kept - 1]])
    assert batch["pixel_values"].shape[1] == (1, 3, 4)[kept - 1]


@pytest.mark.parametrize("answered", [1, 2])
def test_a_question_left_open_is_the_first_to_go(processor, draw, picture, shown, answered):
    """A conversation may end with a question; where it does not fit, the answers before it are still there."""
    pictures = [picture(k) for k in range(4)]
    pairs = [(1, "a", "b"), (2, "c", "d")][:answered] + [(1, "open", None)]
    images = pictures[: sum(images for images, *_ in pairs)]
    whole = MMGPTCollator(processor)([{"messages": turns(*pairs), "images": images}])
    assert drawn(draw, whole) == ["".join(PARTS[:answered]) + text(1, "open")]
    collator = MMGPTCollator(processor, max_length=LENGTHS[answered - 1])
    batch = collator([{"messages": turns(*pairs), "images": images}])
    assert drawn(draw, batch) == ["".join(PARTS[:answered])]
    shown(batch["pixel_values"][0], images[:-1])


def test_however_long_a_conversation_it_is_rendered_once(processor, monkeypatch):
    rendered = []

    def counted(messages, *args, **kwargs):
        rendered.append(len(messages))
        return rendering_mmgpt.render(messages, *args, **kwargs)

    collator = MMGPTCollator(processor, max_length=60)
    monkeypatch.setattr(processing_mmgpt, "render", counted)
    batch = collator([{"messages": turns(*[(0, "a", "b")] * 12)}])
    assert batch["input_ids"].shape == (1, LENGTHS[0] - len("\n\n### Image:\n@")) and rendered == [25]


@pytest.mark.parametrize("odd", ["{{ '!' if messages | length == 2 }}", "{{ '!' if loop.revindex < 3 }}"])
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_a_template_that_writes_a_turn_otherwise_when_one_follows_cannot_be_cut(processor, role, odd):
    text = "{{ m.content[0].text }}"
    said = {"user": text, "assistant": "{% generation %}" + text + "{% endgeneration %}"}
    said[role] = said[role].replace(text, text + odd)
    template = "{% for m in messages %}{% if m.role == 'user' %}" + "{% else %}".join(said.values())
    template += "{% endif %}{% endfor %}"
    with pytest.raises(ValueError, match="writes an exchange in another way if one follows"):
        MMGPTCollator(processor, max_length=60, template={"chat_template": template})
    MMGPTCollator(processor, template={"chat_template": template})


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ({"messages": turns((0, "a", None))}, "response"),
        ({"messages": []}, "empty"),
        ({"messages": turns((2, "a", "b")), "images": ["one"]}, "2.*1"),
        ({"messages": turns((0, "a", "b")), "images": ["one"]}, "0.*1"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]}, "tool"),
    ],
)
def test_a_record_that_does_not_do_is_named_by_its_row(processor, record, named):
    good = {"messages": turns((0, "g", "hi")), "images": []}
    with pytest.raises(ValueError, match=f"(?s)[Rr]ow 1.*{named}"):
        MMGPTCollator(processor)([good, record])


@pytest.mark.parametrize("multiple", [1, 8, 64])
def test_the_batch_is_padded_to_a_multiple(processor, draw, multiple):
    records = [{"messages": turns((0, "g", answer))} for answer in ("hi", "hello")]
    batch = MMGPTCollator(processor, pad_to_multiple_of=multiple)(records)
    longest = len("^P" + text(0, "g", "hello")) - 2
    width = -(-longest // multiple) * multiple
    assert all(batch[key].shape == (2, width) for key in ("input_ids", "attention_mask", "labels"))
    assert drawn(draw, batch)[1] == "^P" + text(0, "g", "hello") + "_" * (width - longest)
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def test_a_placeholder_stands_only_where_there_is_no_picture(processor, picture, shown):
    collator = MMGPTCollator(processor, placeholder_image=True)
    without = {"messages": turns((0, "g", "hi"))}
    batch = collator([without, without])
    assert batch["pixel_values"].shape == (2, 1, 3, 24, 24) and not batch["pixel_values"].any()
    assert 259 not in batch["input_ids"]
    batch = collator([without, {"messages": turns((1, "a", "b")), "images": [picture(0)]}])
    shown(batch["pixel_values"][0], [])
    shown(batch["pixel_values"][1], [picture(0)])


def test_the_records_of_the_caller_stay_as_they_are(processor, picture):
    images = [picture(k) for k in range(4)]
    record = {"messages": copy.deepcopy(THREE), "images": images}
    record["messages"][0]["content"] = "P"
    before = copy.deepcopy(record["messages"])
    MMGPTCollator(processor, max_length=LENGTHS[1])([record])
    assert record["messages"] == before and record["images"] is images and len(images) == 4


def test_records_that_went_through_datasets_give_the_same_batch(processor, picture, tmp_path):
    records = [
        {"messages": turns((1, "a", "b"), (1, "c", "d")), "images": [picture(0), picture(1)]},
        {"messages": turns((0, "g", "hi")), "images": []},
    ]
    records[1]["messages"][1]["content"].append({"type": "input", "text": "x"})
    expected = MMGPTCollator(processor)(records)
    stored = Dataset.from_list(
        [{"messages": record["messages"], "images": record["images"]} for record in records]
    ).cast_column("images", List(Image()))
    stored.save_to_disk(tmp_path)
    loaded = [Dataset.load_from_disk(tmp_path)[k] for k in range(2)]
    assert loaded[0]["messages"][1]["content"][0] == {"type": "image", "text": None}
    batch = MMGPTCollator(processor)(loaded)
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[key], expected[key]) for key in expected)


ASK = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]}]
REPLY = [{"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ({"messages": ASK + REPLY, "images": "a.png"}, "list.*got a str"),
        ({"messages": ASK + REPLY, "images": "PICTURE"}, "list.*got a Image"),
        ({"messages": ASK + REPLY, "images": {"bytes": b"", "path": None}}, "list.*got a dict"),
        ({"messages": ASK + REPLY, "image": "PICTURE"}, "`images`, a list; this one has `image`"),
        ({"prompt": ASK, "completion": REPLY, "images": []}, "completion.*prompt.*`messages`"),
        ({"messages": None, "text": "a"}, "messages.*text"),
    ],
)
def test_a_record_of_another_form_is_told_what_to_do(processor, picture, record, named):
    record = {key: picture(0) if value == "PICTURE" else value for key, value in record.items()}
    with pytest.raises(ValueError, match=f"(?s)Row 0 of the batch: .*{named}"):
        MMGPTCollator(processor)([record])


def test_a_column_that_is_not_decoded_is_taken(processor, picture, shown, tmp_path):
    picture(0).save(tmp_path / "a.png")
    for column in ({"bytes": (tmp_path / "a.png").read_bytes(), "path": None},
                   {"bytes": None, "path": str(tmp_path / "a.png")}):  # fmt: skip
        batch = MMGPTCollator(processor)([{"messages": ASK + REPLY, "images": [column]}])
        shown(batch["pixel_values"][0], [picture(0)])

"""Messages: what a part may be, what no text may become, and that every door renders the same."""

import base64
import io
import threading

import pytest
import torch
from test_processing import PREAMBLE, RENDERED, SYSTEM, user, written
from tokenizers import AddedToken
from transformers import AutoProcessor

from processing_mmgpt import MMGPTCollator, MMGPTImageProcessor, MMGPTProcessor
from processing_mmgpt.messages_mmgpt import normalise
from processing_mmgpt.processing_mmgpt import add_control_tokens


IMAGE = {"type": "image"}


def text(words):
    return {"type": "text", "text": words}


def part(kind, picture):
    """A picture as OpenAI's part: with a dict, or the address alone."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url, "detail": "low"} if kind == "dict" else url}


# The tokenizer's own template


def without_none(message):
    parts = message["content"]
    if isinstance(parts, str):
        return message
    return {**message, "content": [{key: value for key, value in p.items() if value is not None} for p in parts]}


def with_string(message):
    """The message with a string for its content, if that is one text."""
    parts = without_none(message)["content"]
    is_text = len(parts) == 1 and not isinstance(parts, str) and parts[0]["type"] == "text"
    return {**message, "content": parts[0]["text"] if is_text else parts}


@pytest.mark.parametrize("case", RENDERED)
def test_the_tokenizer_renders_what_the_processor_renders(processor, case):
    messages, expected = RENDERED[case]
    render = processor.tokenizer.apply_chat_template
    assert render(list(map(without_none, messages)), tokenize=False) == written(expected)
    assert render(list(map(with_string, messages)), tokenize=False) == written(expected)


def test_the_tokenizer_of_an_lm_with_its_own_template_renders_ours(base_tokenizer):
    base_tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|>{% endfor %}"
    processor, ask = processor_of(base_tokenizer), [{"role": "user", "content": "hi"}]
    rendered = processor.apply_chat_template(ask)
    assert processor.tokenizer.apply_chat_template(ask, tokenize=False) == rendered
    assert rendered == f"<s>{PREAMBLE}\n\n### Instruction:\nhi"


@pytest.mark.parametrize("messages", [[{"role": "tool", "content": "a"}], [user("a"), SYSTEM]])
def test_what_the_template_has_no_place_for_it_refuses(processor, messages):
    with pytest.raises(Exception, match="cannot stand here"):
        processor.tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("options", [{}, {"greeting": "hey"}])
def test_a_broken_template_is_an_error_of_ours(processor, options):
    with pytest.raises(ValueError, match="chat template cannot"):
        processor.apply_chat_template([user("a")], chat_template="{% if %}{{ greeting }}", **options)


# Control tokens


def processor_of(tokenizer):
    add_control_tokens(tokenizer)
    return MMGPTProcessor(MMGPTImageProcessor(size=24), tokenizer)


def control_ids(processor, token, template=None):
    messages = [user(f"a {token} b"), {"role": "assistant", "content": token}, user(token * 2)]
    chat = processor.encode_chat(messages, chat_template=template) if template else processor.encode_chat(messages)
    assert token in processor.tokenizer.decode(chat.input_ids)
    return chat.input_ids.count(processor.tokenizer.convert_tokens_to_ids(token))


@pytest.mark.parametrize(
    "add",
    [
        lambda tokenizer, token: tokenizer.add_special_tokens({"additional_special_tokens": [token]}),
        lambda tokenizer, token: tokenizer.add_special_tokens({"extra_special_tokens": [token]}),
        lambda tokenizer, token: tokenizer.add_tokens([token], special_tokens=True),
        lambda tokenizer, token: tokenizer.add_tokens([AddedToken(token, special=True, lstrip=True)]),
        lambda tokenizer, token: tokenizer.add_special_tokens({"sep_token": token}),
    ],
)
@pytest.mark.parametrize("when", ["before ours", "after ours", "loaded"])
def test_no_special_token_of_any_tokenizer_can_be_typed(base_tokenizer, tmp_path, add, when):
    if when == "after ours":
        add_control_tokens(base_tokenizer)
    add(base_tokenizer, "<|im_start|>")
    processor = processor_of(base_tokenizer)
    if when == "loaded":
        processor.save_pretrained(tmp_path)
        processor = AutoProcessor.from_pretrained(tmp_path)
    assert processor.tokenizer("<|im_start|>", add_special_tokens=False)["input_ids"] == [
        processor.tokenizer.convert_tokens_to_ids("<|im_start|>")
    ]
    for token in ("<|im_start|>", "<image>", "<|endofchunk|>"):
        assert control_ids(processor, token) == 0


def test_an_added_token_that_the_template_writes_cannot_be_typed(base_tokenizer):
    base_tokenizer.add_tokens(["<turn>", "dog"])  # neither is special
    processor = processor_of(base_tokenizer)
    template = "{% for m in messages %}<turn>{{ m.content[0].text }}{% endfor %}"
    assert control_ids(processor, "<turn>", template) == 3  # those of the template
    dog = processor.tokenizer.convert_tokens_to_ids("dog")
    assert processor.encode_chat([user("a dog")]).input_ids.count(dog) == 1  # a word stays one


def test_adding_ours_keeps_the_special_tokens_of_the_tokenizer(base_tokenizer):
    base_tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    add_control_tokens(base_tokenizer)
    assert {"<|im_start|>", "<image>", "<|endofchunk|>"} <= set(base_tokenizer.all_special_tokens)


def test_a_token_that_is_added_the_documented_way_is_saved_and_loaded(base_tokenizer, draw, tmp_path):
    processor = processor_of(base_tokenizer)
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<dog>"]})  # which replaces the list
    processor.save_pretrained(tmp_path)
    for one in (processor, AutoProcessor.from_pretrained(tmp_path)):
        chat = one.encode_chat([SYSTEM, user("what does <image> mean? <dog>")])
        assert draw(chat.input_ids) == "^P\n\n### Instruction:\nwhat does <image> mean? <dog>"
        assert one("<dog>", add_special_tokens=False)["input_ids"].tolist() == [[261]]


def test_a_tokenizer_without_an_end_token_is_refused_by_name(base_tokenizer):
    base_tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end token"):
        processor_of(base_tokenizer)


def test_rendering_in_threads_is_rendering(processor):
    """Another thread encodes control text, and with other settings of the same tokenizer."""
    messages = [user("a <image> </s>"), {"role": "assistant", "content": "<s> yes"}] * 6
    expected, wrong, ended = processor.encode_chat(messages), [], threading.Event()

    def disturb():
        while not ended.is_set():
            processor.tokenizer(["<image>"], split_special_tokens=False, add_special_tokens=False)
            processor(text=["<s>a", "b"], padding=True)

    def ask():
        for _ in range(40):
            if processor.encode_chat(messages) != expected:
                wrong.append(1)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    other = threading.Thread(target=disturb)
    for thread in (*threads, other):
        thread.start()
    for thread in threads:
        thread.join()
    ended.set()
    other.join()
    assert not wrong


GENERATION = """{%- for m in messages %}
  {%- if m.role == 'user' %} U:{{ m.content[0].text }}
  {% else %}  A:%s{% endif %}
{% endfor %}"""


@pytest.mark.parametrize(
    "said",
    [
        "{% generation %} x {{ m.content[0].text }} y {% endgeneration %}",
        "  {%- generation -%}  x {{ m.content[0].text }} \n {%- endgeneration -%}  ",
        "\n    {% generation %}\n    x{{ m.content[0].text }}\n    {% endgeneration %}\n  z",
        "\n    {%+ generation %}\n{{ m.content[0].text }}{%+ endgeneration %}\n",
    ],
)
def test_spans_are_those_that_transformers_finds_and_the_text_is_the_same(processor, said):
    from transformers.utils.chat_template_utils import render_jinja_template

    template = GENERATION.replace("%s", said)
    messages = [user("hi"), {"role": "assistant", "content": "yo"}] * 2
    rendered = processor.apply_chat_template(messages, chat_template=template)
    (theirs,), (spans,) = render_jinja_template(
        conversations=[normalise(messages)], chat_template=template, return_assistant_tokens_mask=True
    )
    chat = processor.encode_chat(messages, chat_template=template)
    learnt = "".join(
        processor.tokenizer.decode([token]) for token, m in zip(chat.input_ids, chat.learnt, strict=True) if m
    )
    assert rendered == theirs
    assert learnt == "".join(theirs[begin:end] for begin, end in spans)


# Order, and other parts


@pytest.mark.parametrize(
    "content",
    [
        [text("This is a heart:"), IMAGE, text("And this?")],
        [IMAGE, text("a"), {"type": "video"}, text("b"), IMAGE],
        [text("a"), IMAGE, {"type": "input", "text": "b"}],
        [text("a"), {"type": "image_url", "image_url": "x.png"}, text("b")],
    ],
)
def test_a_picture_between_two_texts_is_an_error_that_names_the_few_shot_form(processor, content):
    for ask in (
        processor.apply_chat_template,
        processor.encode_chat,
        lambda m: MMGPTCollator(processor)([{"messages": m}]),
    ):
        with pytest.raises(ValueError, match=r"(?s)Message 0 .*between two texts.*<image>text<\|endofchunk\|>"):
            ask([{"role": "user", "content": content}])


@pytest.mark.parametrize(
    "content",
    [[IMAGE, IMAGE, text("q")], [text("q"), IMAGE, IMAGE], [IMAGE, text("q"), IMAGE],
     [text(" "), IMAGE, text("q"), IMAGE], [IMAGE, text("q"), text("r"), IMAGE]],
)  # fmt: skip
def test_pictures_behind_all_texts_are_rendered_before_them(processor, content):
    rendered = processor.apply_chat_template([SYSTEM, {"role": "user", "content": content}])
    head, tail = rendered.split("\n\n### Instruction:\n")
    assert head == "<s>P" + "\n\n### Image:\n<image>" * 2 and "<image>" not in tail


@pytest.mark.parametrize("kind", ["dict", "address"])
def test_an_image_url_is_an_image(processor, picture, kind):
    shown = picture(0)
    ask = [{"role": "user", "content": [part(kind, shown), text("q")]}]
    batch = processor.apply_chat_template(ask, tokenize=True, return_dict=True)
    assert torch.equal(batch["pixel_values"][0, 0], processor.image_processor.pixels(shown))
    trained = MMGPTCollator(processor)([{"messages": [*ask, {"role": "assistant", "content": "a"}]}])
    assert torch.equal(trained["pixel_values"], batch["pixel_values"])
    assert processor.apply_chat_template(ask).startswith(f"<s>{PREAMBLE}\n\n### Image:\n<image>")


@pytest.mark.parametrize("source", [None, {}, {"url": 3}, 3])
def test_an_image_url_without_a_url_is_refused(processor, source):
    with pytest.raises(ValueError, match="Message 0 .*image_url"):
        processor.encode_chat([{"role": "user", "content": [{"type": "image_url", "image_url": source}]}])

"""The readers against the reference: equal, or the fixed form spelt out; what they may draw; what they refuse.

`goldens/readers/expected.json` holds, for each dataset, what Multimodal-GPT makes of the files beside it: the prompts
and answers of its turns for some seeds, ids, and at which of them something is learnt.
"""

import copy
import itertools
import json
import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from processing_mmgpt import MMGPTImageProcessor, MMGPTProcessor
from processing_mmgpt.data.annotations import join_vqa, read_file
from processing_mmgpt.data.phrases import CONFIRM, DESCRIBE, OPINION, REASON
from processing_mmgpt.data.readers import READERS, TEXT_READERS, swap_sides


GOLDENS = Path(__file__).parent / "goldens"
EXPECTED = json.loads((GOLDENS / "readers" / "expected.json").read_text())
GLUED = "Can you confirm this information?Do you agree with this statement?"
PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
CASES = [(name, golden) for name, goldens in EXPECTED.items() for golden in goldens]
IDS = [f"{name}-{golden['index']}-{golden['seed']}" for name, golden in CASES]
DRAWS = 1200

# Where the reference has a bug: the turns as they are meant, by dataset and record.
FIXED = {
    # It deletes line breaks, joining words.
    ("llava", 1): [("Describe the scene.\nBe brief.", None)],
    ("baize", 0): [
        ("How do I boil an egg?", "Put it in hot water\nfor 8 minutes."),
        ("And a soft one?", "Five minutes."),
    ],
    # It drops the last piece of a dialogue, be it an exchange.
    ("baize", 2): [("One?", "First answer."), ("Two?", "Second answer.")],
    # It pairs entries k and k + 1 instead of 2k and 2k + 1.
    ("llava_dial", 0): [("What animal is this?", "It is a fox."), ("What colour is it?", "It is brown.")],
    ("llava_dial", 1): [
        ("Is it raining?", "Yes, it is."),
        ("How do you know?", "People hold umbrellas."),
        ("Is it cold?", "Probably."),
    ],
}


def annotations(name):
    folder = GOLDENS / "readers" / "data" / name
    (path,) = (path for path in folder.iterdir() if path.suffix in (".json", ".jsonl"))
    return [record for _, _, record, problem in read_file(str(path), None, name, {}) if problem is None]


@pytest.fixture(scope="module")
def llama():
    return MMGPTProcessor(MMGPTImageProcessor(size=24), AutoTokenizer.from_pretrained(GOLDENS / "tokenizer_fast"))


def turns(llama, record):
    """Spell a record as the reference does: the prompt of each turn and the answer."""
    rendered = llama.apply_chat_template(record["messages"]).removeprefix("<s>").split("</s>")
    assert rendered.pop() == ""
    pieces = [turn.partition("\n\n### Response:\n") for turn in rendered]
    return tuple((prompt + head, answer) for prompt, head, answer in pieces)


def possible(llama, name, record, draws=DRAWS):
    read = READERS[name]
    return {turns(llama, read(record, random.Random(seed))) for seed in range(draws)}


@pytest.fixture(scope="module")
def all_possible(llama):
    cache = {}

    def get(name, index):
        if (name, index) not in cache:
            draws = 1 if name in (*TEXT_READERS, "llava", "llava_dial", "gqa", "clevr") else DRAWS
            cache[name, index] = possible(llama, name, annotations(name)[index], draws)
        return cache[name, index]

    return get


def spelt(name, pairs, golden):
    head = PREAMBLE if name == "baize" else f"{PREAMBLE}\n\n### Image:\n<image>"
    return tuple(
        (
            f"{'' if number else head}\n\n### Instruction:\n{question}\n\n### Response:\n",
            golden["turns"][number][1] if answer is None else answer,
        )
        for number, (question, answer) in enumerate(pairs)
    )


@pytest.mark.parametrize(("name", "golden"), CASES, ids=IDS)
def test_prompts_and_answers_are_those_of_the_reference(all_possible, name, golden):
    wanted = tuple(map(tuple, golden["turns"]))
    found = all_possible(name, golden["index"])
    if (name, golden["index"]) in FIXED:
        pairs = FIXED[name, golden["index"]]
        assert found == {spelt(name, pairs, golden)} != {wanted}
        return
    if name == "llava_dial" and golden["index"] == 3:  # the long one: two exchanges, paired right
        (dialogue,) = found
        assert dialogue[0] == wanted[0] and wanted[1][1] in dialogue[1][0]  # its second answer is a question
        assert len(dialogue) == 2 and dialogue[1][1].startswith("word0 in a long list")
        return
    if name == "nlvrv2":  # two pictures, two `<image>`s; the reference squeezes them into one
        prompt = wanted[0][0].replace("### Image:\n<image>", "### Image:\n<image>\n\n### Image:\n<image>")
        wanted = ((prompt, wanted[0][1]),)
    if GLUED in wanted[0][0]:  # a missing comma
        halves = [wanted[0][0].replace(GLUED, half) for half in GLUED.replace("?D", "?|D").split("|")]
        assert wanted not in found and all(((prompt, wanted[0][1]),) in found for prompt in halves)
        return
    assert wanted in found


@pytest.mark.parametrize(("name", "golden"), CASES, ids=IDS)
def test_ids_and_labels_are_those_of_the_reference(llama, name, golden):
    """Where the turns are equal. It cuts at 512 tokens and adds no end token to a row that is cut."""
    record = annotations(name)[golden["index"]]
    for seed in range(DRAWS):
        conversation = READERS[name](record, random.Random(seed))
        if turns(llama, conversation) == tuple(map(tuple, golden["turns"])):
            break
    else:
        reasons = ("llava", "llava_dial", "baize", "nlvrv1", "nlvrv2")
        assert name in reasons, "only what is fixed may differ"
        return
    row = llama.encode_chat(conversation["messages"], conversation["images"])
    ids, learnt = row.input_ids, "".join(map(str, row.learnt))
    if len(golden["turns"]) > 1:  # it writes a BOS before each turn
        assert name == "baize"
        return
    assert ids[:512] == golden["input_ids"] and learnt[:512] == golden["learnt"]
    assert ids[-1] == 2 and learnt[-1] == "1"


def test_every_dataset_has_a_reader_and_goldens():
    names = "llava llava_dial minigpt4 aokvqa coco_caption ocr_vqa vqa okvqa gqa clevr nlvrv1 nlvrv2 snlive text_ocr"
    assert set(READERS) == set(EXPECTED) == {*names.split(), "dolly", "alpaca_gpt4", "baize"}
    assert len(READERS) == 17 and len(CASES) == 115


# What may be drawn


def contents(record):
    """Question, input block and answer of a record of one exchange, and its pictures."""
    user, assistant = record["messages"]
    texts = {part["type"]: part.get("text") for part in user["content"]}
    return texts["text"], texts.get("input", ""), assistant["content"][0]["text"], tuple(record["images"])


def drawn(name, record, draws=4000):
    return {contents(READERS[name](record, random.Random(seed))) for seed in range(draws)}


def test_what_can_be_drawn_is_exactly_this():
    one = {name: annotations(name)[0] for name in READERS}
    captions = annotations("coco_caption")[1]
    assert drawn("coco_caption", captions) == {
        (question, "", caption, (captions["image"],)) for question in DESCRIBE for caption in captions["caption"]
    }
    assert {question for question, *_ in drawn("minigpt4", one["minigpt4"])} == set(DESCRIBE)
    assert drawn("ocr_vqa", one["ocr_vqa"]) == {
        (question, "", answer, ("0000.jpg",))
        for question, answer in zip(one["ocr_vqa"]["questions"], one["ocr_vqa"]["answers"], strict=True)
    }
    reason = "The answer is reading. Because He holds an open book. His eyes point at the page. It is quiet."
    # The reference draws whether to show the choices, and then does not.
    assert drawn("aokvqa", one["aokvqa"]) == {
        (f"What is the man doing? {why}", block, reason, (one["aokvqa"]["image"],))
        for why, block in itertools.product(REASON, ("", "skiing, eating, reading, sleeping"))
    }
    assert drawn("snlive", one["snlive"]) == {
        (f"A person is outdoors. {ask}", block, "entailment", ("360.jpg",))
        for ask, block in itertools.product(OPINION, ("", "entailment, neutral, contradiction"))
    }
    assert drawn("nlvrv1", one["nlvrv1"]) == {
        (f"{one['nlvrv1']['sentence']} {ask}", block, "true", (f"train/images/30/train-330-0-{number}.png",))
        for ask, block, number in itertools.product(CONFIRM, ("", "true, false"), range(6))
    }
    pair, sentence = tuple(one["nlvrv2"]["images"]), one["nlvrv2"]["sentence"]
    swapped = "The right image shows two dogs and the left image shows one."
    assert drawn("nlvrv2", one["nlvrv2"]) == {
        (f"{text} {ask}", block, "True", images)
        for ask, block in itertools.product(CONFIRM, ("", "true, false"))
        for text, images in ((sentence, pair), (swapped, pair[::-1]))
    }


@pytest.mark.parametrize(("name", "count"), [("vqa", 0), ("okvqa", 0), ("text_ocr", 1)])
def test_the_answer_most_people_gave_is_the_true_one(name, count):
    record = annotations(name)[count]
    answers = record["answers" if name == "text_ocr" else "answer"]
    options = ", ".join(dict.fromkeys(answers))
    assert {(block, answer) for _, block, answer, _ in drawn(name, record, 50)} == {
        ("", answers[0]),
        (options, answers[0]),
    }


def test_half_of_the_draws_show_the_options():
    record = annotations("vqa")[0]
    shown = sum(bool(contents(READERS["vqa"](record, random.Random(seed)))[1]) for seed in range(2000))
    assert 900 < shown < 1100
    flipped = sum(
        READERS["nlvrv2"](annotations("nlvrv2")[0], random.Random(seed))["images"][0].endswith("img1.png")
        for seed in range(2000)
    )
    assert 430 < flipped < 570


@pytest.mark.parametrize(
    ("sentence", "other"),
    [
        ("The left image is right.", "The right image is left."),
        ("Left of the leftmost dog", "Right of the rightmost dog"),
        ("A bright light, upright, leftover copyright", "A bright light, upright, leftover copyright"),
        ("left-hand and righthand", "right-hand and lefthand"),
    ],
)
def test_sides_are_swapped_as_words(sentence, other):
    assert swap_sides(sentence) == other and swap_sides(other) == sentence


@pytest.mark.parametrize("name", READERS)
def test_readers_are_pure(name):
    for record in annotations(name):
        before = copy.deepcopy(record)
        first, second = (READERS[name](record, random.Random(7)) for _ in range(2))
        assert first == second and record == before
        places = sum(part["type"] == "image" for message in first["messages"] for part in message["content"])
        assert places == len(first["images"]) == (0 if name in TEXT_READERS else 1 + (name == "nlvrv2"))


# Forms of files


def test_both_forms_of_ocr_vqa(tmp_path):
    books = {
        "0761183272": {"imageURL": "http://x/51Al.jpg", "questions": ["Who?"], "answers": ["S. B."], "split": 1},
        "14": {"imageURL": "http://x/y.png", "questions": ["What?"], "answers": ["A book"], "split": 3},
    }
    (tmp_path / "dataset.json").write_text(json.dumps(books))
    records = [record for _, _, record, _ in read_file(str(tmp_path / "dataset.json"), None, "ocr_vqa", {})]
    assert [record["filename"] for record in records] == ["0761183272.jpg", "14.png"]
    assert drawn("ocr_vqa", records[0], 1) == {("Who?", "", "S. B.", ("0761183272.jpg",))}
    kept = list(read_file(str(tmp_path / "dataset.json"), None, "ocr_vqa", {"split": 1}))
    assert [number for number, *_ in kept] == [0]


def test_official_questions_and_annotations_join():
    questions = {
        "data_subtype": "val2014",
        "questions": [
            {"image_id": 262148, "question": "Where?", "question_id": 9},
            {"image_id": 1, "question": "?", "question_id": 8},
        ],
    }
    answers = {"annotations": [{"question_id": 9, "answers": [{"answer": "down", "answer_id": 1}] * 2}]}
    joined, alone = join_vqa(questions, answers)
    assert contents(READERS["vqa"](joined, random.Random(0))) == (
        "Where?",
        "",
        "down",
        ("val2014/COCO_val2014_000000262148.jpg",),
    )
    with pytest.raises(ValueError, match="'answer' is missing"):
        READERS["okvqa"](alone, random.Random(0))


def test_captions_of_coco_in_the_official_form_and_in_karpathys(tmp_path):
    official = {
        "images": [{"id": 5, "file_name": "COCO_train2014_000000000005.jpg"}],
        "annotations": [{"image_id": 5, "caption": "One."}, {"image_id": 5, "caption": "Two."}],
    }
    karpathy = {
        "images": [{"filepath": "val2014", "filename": "a.jpg", "split": "test", "sentences": [{"raw": "One."}]}]
    }
    for document, images, captions in (
        (official, ("COCO_train2014_000000000005.jpg",), {"One.", "Two."}),
        (karpathy, ("val2014/a.jpg",), {"One."}),
    ):
        (tmp_path / "captions.json").write_text(json.dumps(document))
        ((_, _, record, _),) = read_file(str(tmp_path / "captions.json"), None, "coco_caption", {})
        found = drawn("coco_caption", record)
        assert {answer for _, _, answer, _ in found} == captions and {pictures for *_, pictures in found} == {images}


def test_aokvqa_without_an_image_takes_the_picture_of_the_official_loader():
    record = {key: value for key, value in annotations("aokvqa")[0].items() if key != "image"}
    assert READERS["aokvqa"](record, random.Random(0))["images"] == ["train2017/000000000001.jpg"]


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("[|Human|] a\n[|AI|] b\nc\n[|AI|] d\n[|Human|]e[|AI|] f\n[|Human|] ", [("a", "b\nc\nd"), ("e", "f")]),
        ("x\n[|AI|] hello\n[|Human|] a\n[|AI|] b", [("a", "b")]),
        ("[|Human|] a\n[|AI|] b\n[|Human|] c", [("a", "b")]),
    ],
)
def test_baize_dialogues(text, pairs):
    messages = READERS["baize"]({"input": text}, random.Random(0))["messages"]
    found = [message["content"][0]["text"] for message in messages]
    assert list(zip(found[0::2], found[1::2], strict=True)) == pairs


# What is refused

NEEDED = {
    "llava": ["image", "conversations"],
    "llava_dial": ["image", "conversations"],
    "minigpt4": ["image_id", "caption"],
    "aokvqa": ["question", "choices", "correct_choice_idx", "rationales"],
    "coco_caption": ["image", "caption"],
    "ocr_vqa": ["filename", "questions", "answers"],
    "vqa": ["question", "image", "answer"],
    "okvqa": ["question", "image", "answer"],
    "gqa": ["imageId", "question", "fullAnswer"],
    "clevr": ["split", "image_filename", "question", "answer"],
    "nlvrv1": ["split", "sentence", "label", "identifier", "directory"],
    "nlvrv2": ["images", "sentence", "label"],
    "snlive": ["Flickr30K_ID", "sentence2", "gold_label"],
    "text_ocr": ["question", "image_id", "answers"],
    "dolly": ["instruction", "context", "response"],
    "alpaca_gpt4": ["instruction", "input", "output"],
    "baize": ["input"],
}


@pytest.mark.parametrize(("name", "field"), [(name, field) for name in NEEDED for field in NEEDED[name]])
def test_a_field_that_is_missing_or_of_another_kind_is_named(name, field):
    record = annotations(name)[0]
    for damaged in ({**record, field: None}, {**record, field: {}}, {k: v for k, v in record.items() if k != field}):
        with pytest.raises(ValueError, match=f"'{field}'"):
            READERS[name](damaged, random.Random(0))


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("aokvqa", {"correct_choice_idx": 4}, "correct_choice_idx"),
        ("ocr_vqa", {"answers": ["one"]}, "one length"),
        ("nlvrv2", {"images": ["one.png"]}, "two paths"),
        ("snlive", {"gold_label": "-"}, "gold_label"),
        ("nlvrv1", {"label": "maybe"}, "label"),
        ("vqa", {"answer": []}, "answer"),
        ("llava", {"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}]}, "in turns"),
        ("llava_dial", {"conversations": [{"from": "human", "value": "a"}]}, "in turns"),
        ("llava_dial", {"conversations": [{"from": "human"}, {"from": "gpt"}]}, "'value'"),
        ("baize", {"input": "[|Human|] nobody answers"}, "input"),
    ],
)
def test_what_contradicts_itself_is_refused(name, change, named):
    with pytest.raises(ValueError, match=named):
        READERS[name]({**annotations(name)[0], **change}, random.Random(0))

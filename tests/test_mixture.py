"""Mixtures: what is in them, in which order, what is refused, skipped and counted; and the report on one."""

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import datasets
import pytest
import yaml
from PIL import Image
from test_readers import EXPECTED, GOLDENS, NEEDED, annotations
from torch.utils.data import DataLoader

from processing_mmgpt.data import annotations as annotation_files
from processing_mmgpt.data import tables
from processing_mmgpt.data.confining import confined
from processing_mmgpt.data.mixture import load_instruction_dataset
from processing_mmgpt.data.readers import READERS, TEXT_READERS
from processing_mmgpt.data.recipe import read_mixture
from processing_mmgpt.data.report import LEARNT, PLAIN, draw, report
from processing_mmgpt.data.skip_log import count_skips


RECIPE = Path(__file__).parents[1] / "examples" / "recipes" / "multimodal_gpt.yaml"
DATA = GOLDENS / "readers" / "data"
MISSING, BROKEN = "The picture is missing", "The picture cannot be read"


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
    patch.undo()


def golden(name, **fields):
    (path,) = (path for path in (DATA / name).iterdir() if path.suffix in (".json", ".jsonl"))
    root = {} if name in TEXT_READERS else {"image_root": str(DATA / name / "images")}
    return {"reader": name, "files": [str(path)], **root, **fields}


def lines(path, records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return str(path)


def dolly(path, count, start=0):
    rows = range(start, start + count)
    return lines(path, [{"instruction": f"Say {n}.", "context": "", "response": f"{n}"} for n in rows])


def captions(folder, count, start=0):
    """A file of captions with a picture for each."""
    (folder / "images").mkdir(exist_ok=True)
    for number in range(start, start + count):
        Image.new("RGB", (4, 4), (number % 256, 0, 0)).save(folder / "images" / f"{number}.png")
    records = [{"image": f"{n}.png", "caption": [f"{n}", f"{n}!"]} for n in range(start, start + count)]
    return lines(folder / f"captions{start}.jsonl", records)


@pytest.fixture
def both(tmp_path):
    """A source with 12 pictures and one of 7 texts."""
    pictures = {"reader": "coco_caption", "files": captions(tmp_path, 12), "image_root": str(tmp_path / "images")}
    return pictures, {"reader": "dolly", "files": dolly(tmp_path / "dolly.jsonl", 7)}


def said(record):
    return record["messages"][-1]["content"][0]["text"]


def key(record):
    return json.dumps([record["messages"], [str(image) for image in record["images"]]])


# What is in a mixture


def test_all_seventeen_in_one():
    mixture = load_instruction_dataset({"sources": [golden(name) for name in READERS]})
    assert isinstance(mixture, datasets.Dataset)
    assert len(mixture) == sum(len({one["index"] for one in goldens}) for goldens in EXPECTED.values())
    for record in mixture:
        places = sum(part["type"] == "image" for message in record["messages"] for part in message["content"])
        assert places == len(record["images"]) and all(Path(image).is_file() for image in record["images"])


def test_with_a_ratio_rows_take_turns_and_texts_begin_anew(both):
    record = list(load_instruction_dataset({"sources": [*both], "image_text_ratio": "1:1"}))
    assert [bool(one["images"]) for one in record] == [True, False] * 12
    assert len({said(one).strip("!") for one in record[0::2]}) == 12
    texts = [said(one) for one in record[1::2]]
    assert sorted(texts[:7]) == [str(n) for n in range(7)] and len(set(texts[7:])) == 5
    two_to_one = load_instruction_dataset({"sources": [*both], "image_text_ratio": "2:1"})
    assert [bool(one["images"]) for one in two_to_one].count(False) == 6


def test_weights_are_shares(tmp_path):
    files = [dolly(tmp_path / "a.jsonl", 300), dolly(tmp_path / "b.jsonl", 300, 1000)]
    sources = [{"reader": "dolly", "files": f, "weight": w} for f, w in zip(files, (0.8, 0.2), strict=True)]
    rows = load_instruction_dataset({"sources": sources, "stopping_strategy": "first_exhausted"})
    share = sum(int(said(row)) < 1000 for row in rows) / len(rows)
    assert 0.75 < share < 0.85
    everything = load_instruction_dataset({"sources": sources})
    assert len({said(row) for row in everything}) == 600


def test_a_count_takes_rows_without_replacement(both):
    pictures, texts = both
    mixture = {"sources": [{**pictures, "count": 5}, {**texts, "count": 100}]}
    rows = [key(row) for row in load_instruction_dataset(mixture, seed=3)]
    assert len(rows) == len(set(rows)) == 5 + 7
    assert rows == [key(row) for row in load_instruction_dataset(mixture, seed=3)]
    assert set(rows) != {key(row) for row in load_instruction_dataset(mixture, seed=4)}


def test_where_keeps_some_records(tmp_path):
    books = {str(n): {"imageURL": "x.png", "questions": ["?"], "answers": [f"{n}"], "split": n % 3} for n in range(9)}
    (tmp_path / "books.json").write_text(json.dumps(books))
    source = {"reader": "ocr_vqa", "files": str(tmp_path / "books.json"), "image_root": str(tmp_path)}
    rows = load_instruction_dataset({"sources": [{**source, "where": {"split": 1}}]}).with_format(None)
    assert sorted(row["row"] for row in rows) == [1, 4, 7]


def test_official_vqa_files(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "COCO_val2014_000000000009.jpg")
    (tmp_path / "val2014").symlink_to(tmp_path, target_is_directory=True)  # a link within the root
    asked = {"data_subtype": "val2014", "questions": [{"image_id": 9, "question": "Where?", "question_id": 1}]}
    (tmp_path / "q.json").write_text(json.dumps(asked))
    answers = {"annotations": [{"question_id": 1, "answers": [{"answer": "here"}]}]}
    (tmp_path / "a.json").write_text(json.dumps(answers))
    files = {"files": str(tmp_path / "q.json"), "annotations": str(tmp_path / "a.json")}
    (row,) = load_instruction_dataset({"sources": [{"reader": "vqa", **files, "image_root": str(tmp_path)}]})
    assert said(row) == "here" and row["images"][0].endswith("val2014/COCO_val2014_000000000009.jpg")


def test_records_in_our_form_and_datasets_of_arrow(tmp_path, both):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "red.png")
    user = {"role": "user", "content": [{"type": "image", "image": "red.png"}, {"type": "text", "text": "Which?"}]}
    reply = {"role": "assistant", "content": "Red."}
    ours = lines(tmp_path / "ours.jsonl", [{"messages": [user, reply]}])
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]}
    arrow = datasets.Dataset.from_list(
        [{"messages": [user, {**reply, "content": [{"type": "text", "text": "Red."}]}]}]
    )
    arrow = arrow.add_column("images", [[{"path": None, "bytes": (tmp_path / "red.png").read_bytes()}]])
    (tmp_path / "arrow").mkdir()
    arrow.to_parquet(tmp_path / "arrow" / "train.parquet")
    sources = [
        {"reader": "messages", "files": ours, "image_root": str(tmp_path)},
        {"reader": "messages", "dataset": str(tmp_path / "arrow")},
        both[1],
    ]
    for streaming in (False, True):
        rows = list(load_instruction_dataset({"sources": sources, "streaming": streaming}))
        pictures = [row for row in rows if row["images"]]
        assert len(rows) == 9 and len(pictures) == 2
        assert {type(row["images"][0]) for row in pictures} == {str, bytes}
        assert all(row["messages"][0]["content"][0] == {"type": "image"} for row in pictures)


# Streams, workers, seeds


def collected(dataset, workers):
    loader = DataLoader(dataset, batch_size=3, num_workers=workers, collate_fn=lambda rows: [key(row) for row in rows])
    return [row for batch in loader for row in batch]


def test_rows_are_the_same_for_any_number_of_workers(both):
    mixture = {"sources": [*both], "image_text_ratio": "1:1"}
    rows = [collected(load_instruction_dataset(mixture, seed=5), workers) for workers in (0, 1, 2)]
    assert rows[0] == rows[1] == rows[2]
    other = collected(load_instruction_dataset(mixture, seed=6), 0)
    assert other != rows[0] and sorted(other) != sorted(rows[0])  # order, and what the readers draw


def test_a_stream_holds_the_same_rows_for_any_number_of_workers(tmp_path):
    files = [captions(tmp_path, 5, start) for start in (0, 5, 10, 15)]
    source = {"reader": "coco_caption", "files": files, "image_root": str(tmp_path / "images")}
    mixture = {"sources": [source], "streaming": True}
    dataset = load_instruction_dataset(mixture, seed=5)
    assert isinstance(dataset, datasets.IterableDataset)
    rows = [sorted(collected(load_instruction_dataset(mixture, seed=5), workers)) for workers in (0, 1, 2)]
    assert rows[0] == rows[1] == rows[2] and len(set(rows[0])) == 20
    mapped = load_instruction_dataset({**mixture, "streaming": False}, seed=5)
    assert sorted(collected(mapped, 0)) == rows[0]


def test_streamed_kinds_take_turns(both):
    rows = list(load_instruction_dataset({"sources": [*both], "image_text_ratio": "1:1", "streaming": True}))
    assert [bool(row["images"]) for row in rows] == [True, False] * 11 + [True]
    some = load_instruction_dataset({"sources": [{**both[0], "count": 4}], "streaming": True})
    assert len({said(row).strip("!") for row in some}) == 4


def test_what_a_reader_draws_depends_on_the_record_only(both):
    pictures, texts = both
    alone = {said(row).strip("!"): key(row) for row in load_instruction_dataset({"sources": [pictures]}, seed=9)}
    among = load_instruction_dataset({"sources": [texts, {**pictures, "count": 6}]}, seed=9)
    assert all(alone[said(row).strip("!")] == key(row) for row in among if row["images"])


def test_a_changed_file_is_read_anew(tmp_path):
    path = dolly(tmp_path / "a.jsonl", 3)
    assert len(load_instruction_dataset({"sources": [{"reader": "dolly", "files": path}]})) == 3
    dolly(tmp_path / "a.jsonl", 4)
    assert len(load_instruction_dataset({"sources": [{"reader": "dolly", "files": path}]})) == 4


# What is skipped and counted

PATHS = {
    **dict.fromkeys(("llava", "llava_dial", "aokvqa", "coco_caption", "vqa", "okvqa"), "image"),
    **{"minigpt4": "image_id", "ocr_vqa": "filename", "gqa": "imageId", "clevr": "image_filename"},
    **{"nlvrv1": "directory", "nlvrv2": "images", "snlive": "Flickr30K_ID", "text_ocr": "image_id"},
}
FORMS = {
    "minigpt4": lambda records: {"annotations": records},
    "clevr": lambda records: {"questions": records},
    "text_ocr": lambda records: {"data": records},
    "gqa": lambda records: dict(enumerate(records)),
}


def damaged(name, folder):
    """A file of 60 records, 5 % of them damaged and 5 % without their picture; and what is to be counted."""
    rng, pristine = random.Random(name), annotations(name)
    records = [dict(pristine[number % len(pristine)]) for number in range(60)]
    counts = Counter()
    for number in (0, 1, 2):
        field = rng.choice(NEEDED[name])
        number = 20 * number + rng.randrange(10)
        if name in ("nlvrv1", "snlive", "dolly") and rng.random() < 0.5:
            records[number], reason = "{not JSON", "Wrong JSON"
        elif name == "nlvrv1" and field == "split":  # which the name of the file says
            records[number], reason = 5, "The record is no JSON object."
        else:
            reason = f"The field {field!r} is missing."
            if name == "coco_caption" and field == "caption":
                records[number]["caption"] = []
                reason = "The field 'caption' has to be a list of one or more strings."
            else:
                del records[number][field]
        counts[name, reason] += 1
        if name in PATHS:
            gone = records[number - number % 10 + 10 + rng.randrange(10)]
            gone[PATHS[name]] = ["gone.png", "gone.png"] if name == "nlvrv2" else "gone"
            counts[name, MISSING] += 1
    if name in ("nlvrv1", "snlive", "dolly"):
        return lines(folder / "train.jsonl", records), counts
    (folder / "train.json").write_text(json.dumps(FORMS.get(name, list)(records)))
    return str(folder / "train.json"), counts


def test_damaged_records_and_pictures_are_skipped_and_counted(tmp_path):
    sources, expected = [], Counter()
    for name in READERS:
        (tmp_path / name).mkdir()
        path, counts = damaged(name, tmp_path / name)
        sources.append(golden(name, files=[path]))
        expected += counts
    log = tmp_path / "log" / "skipped.jsonl"
    mixture = {"sources": sources, "on_bad_record": "skip", "on_bad_image": "skip", "skip_log": str(log)}
    dataset = load_instruction_dataset(mixture)
    assert len(dataset) == 17 * 57
    for workers in (0, 2):  # an epoch each
        rows = collected(dataset, workers)
        assert len(rows) == 17 * 57 and not any("gone" in row for row in rows)
        assert count_skips(log) == expected and expected.total() == 17 * 3 + 14 * 3


def test_a_stream_leaves_out_what_is_damaged(tmp_path, both):
    pictures, texts = both
    Path(texts["files"]).write_text(Path(texts["files"]).read_text() + "nonsense\n")
    (tmp_path / "images" / "3.png").write_bytes(b"no picture")
    policies = {"on_bad_record": "skip", "on_bad_image": "skip", "skip_log": str(tmp_path / "log.jsonl")}
    rows = list(load_instruction_dataset({"sources": [*both], "streaming": True, **policies}))
    assert len(rows) == 11 + 7
    assert count_skips(tmp_path / "log.jsonl") == {("dolly", "Wrong JSON"): 1, ("coco_caption", BROKEN): 1}


@pytest.mark.parametrize("damage", ["gone", "cut", "text"])
def test_a_bad_picture_is_named_or_black_or_replaced(tmp_path, both, damage):
    picture = tmp_path / "images" / "3.png"
    if damage == "gone":
        picture.unlink()
    else:
        picture.write_bytes(picture.read_bytes()[:50] if damage == "cut" else b"text")
    reason = MISSING if damage == "gone" else BROKEN
    log = tmp_path / "log.jsonl"
    black = list(load_instruction_dataset({"sources": [both[0]], "on_bad_image": "blank", "skip_log": str(log)}))
    assert len(black) == 12
    (image,) = (row["images"][0] for row in black if said(row).strip("!") == "3")
    assert image.size == (224, 224) and not image.getbbox()
    assert count_skips(log) == {("coco_caption", reason): 1}
    log.unlink()
    others = list(load_instruction_dataset({"sources": [both[0]], "on_bad_image": "skip", "skip_log": str(log)}))
    assert len(others) == 12 and "3" not in {said(row).strip("!") for row in others}
    assert count_skips(log) == {("coco_caption", reason): 1}
    if damage == "gone":
        with pytest.raises(ValueError, match=r"captions0.jsonl, line 4: The picture is missing: .*3.png"):
            list(load_instruction_dataset({"sources": [both[0]]}))


# What is refused


@pytest.mark.parametrize(
    "image", ["../a.png", "b/../../a.png", "/etc/passwd", "..\\a.png", "C:\\a.png", "c:a.png", "a\0.png", ".."]
)
def test_a_path_may_not_leave_the_root(tmp_path, image):
    with pytest.raises(ValueError, match="leaves the image root"):
        confined(str(tmp_path), image)
    path = lines(tmp_path / "a.jsonl", [{"image": image, "caption": "A cat"}])
    source = {"reader": "coco_caption", "files": path, "image_root": str(tmp_path)}
    with pytest.raises(ValueError, match="a.jsonl, line 1: A picture's path leaves the image root: "):
        load_instruction_dataset({"sources": [source]})


def test_a_link_may_not_leave_the_root(tmp_path):
    for name in ("root", "outside"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "outside" / "a.png")
    (tmp_path / "root" / "file.png").symlink_to(tmp_path / "outside" / "a.png")
    (tmp_path / "root" / "folder").symlink_to(tmp_path / "outside", target_is_directory=True)
    (tmp_path / "link").symlink_to(tmp_path / "root", target_is_directory=True)
    for image in ("file.png", "folder/a.png"):
        with pytest.raises(ValueError, match=f"'{image}' is a link to the outside"):
            confined(str(tmp_path / "root"), image)
    (tmp_path / "root" / "b.c..png").touch()
    assert confined(str(tmp_path / "link"), "b.c..png")  # the root itself may be one; dots in a name are dots


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": []}, "needs `sources`"),
        ({"sauces": []}, "unknown key 'sauces'. Did you mean 'sources'?"),
        ({"streeming": True}, "unknown key 'streeming'. Did you mean 'streaming'?"),
        ({"on_bad_image": "ignore"}, "`on_bad_image` has to be one of ['raise', 'skip', 'blank'], got 'ignore'"),
        ({"on_bad_image": "skip"}, "`skip_log` has to name a file"),
        ({"image_text_ratio": 61}, 'has to be such as "1:1", in quotes; got 61'),
        ({"image_text_ratio": "1:1"}, "needs sources of both kinds; there is none with pictures"),
    ],
)
def test_a_wrong_mixture_is_refused(tmp_path, change, message):
    source = {"reader": "dolly", "files": dolly(tmp_path / "a.jsonl", 2)}
    with pytest.raises(ValueError) as error:
        load_instruction_dataset({"sources": [source], **change})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reader": "doly"}, "source 'doly' has the unknown reader 'doly'. Did you mean 'dolly'?"),
        ({"file": "a"}, "Source 0 of the mixture has the unknown key 'file'. Did you mean 'files'?"),
        ({"files": []}, "'dolly' needs `files`"),
        ({"reader": "vqa"}, "source 'vqa' has pictures and needs an `image_root`"),
        ({"weight": 0.5}, "sum to 1, all of them or none given; got {'dolly': 0.5}"),
        *(({"weight": w}, f"got {{'dolly': {w}}}") for w in (float("nan"), float("inf"), -1.0, 0.0)),
        *(({key: True}, f"`{key}` should be a valid") for key in ("weight", "count")),
        ({"where": {"category": ["a"]}}, "a text, a number, true, false or null; got ['a']"),
        ({"reader": "x" * 5_000}, "has the unknown reader 'xxx"),
        ({"count": 0}, "count 0; it has to be 1 or more"),
        ({"annotations": "a.json"}, "needs one of `annotations` for each of `files`, for VQA only"),
        ({"where": {"category": "none"}}, "source 'dolly' is empty"),
        ({"reader": "messages"}, "line 1: The messages are not in order: A conversation is a list of messages"),
    ],
)
def test_a_wrong_source_is_refused(tmp_path, change, message):
    source = {"reader": "dolly", "files": dolly(tmp_path / "a.jsonl", 2), **change}
    with pytest.raises(ValueError) as error:
        load_instruction_dataset({"sources": [source]})
    assert message in str(error.value) and len(str(error.value)) < 1_000


# A list of a million words in 300 bytes.
BOMB = "[&a0 lol" + "".join(f", &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 7)) + "]"
PLACES = ["BOMB", "sources: BOMB", "root: BOMB", "on_bad_image: BOMB", "image_text_ratio: BOMB", "BOMB: 1"]
PLACES += [f"sources: [{{reader: a, {key}: BOMB}}]" for key in ("reader", "files", "count", "weight", "where", "name")]
PLACES += ["sources: [{reader: a, where: {a: BOMB}}]", "sources: [BOMB]", "sources: &a [*a]", "root: &a [*a]"]
PLACES += ["sources: " + "[" * 5_000, "sources: " + "9" * 5_000, "sources: " + "a" * 100_000]


@pytest.mark.parametrize("text", PLACES, ids=lambda text: text[:40])
def test_a_message_about_a_recipe_is_short(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text.replace("BOMB", BOMB))
    with pytest.raises(ValueError) as error:
        load_instruction_dataset(tmp_path / "recipe.yaml")
    assert 0 < len(str(error.value)) < 1_000


def test_what_is_not_there_is_named(tmp_path):
    for change in ({"files": ["nowhere.jsonl"]}, {"image_root": "nowhere"}):
        with pytest.raises(FileNotFoundError, match="'coco_caption' has no such .*nowhere"):
            load_instruction_dataset({"sources": [golden("coco_caption", **change)]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"instruction": "a", "context": "", "response": "b"}\n\n{"instruction"\n',
            r"a.jsonl, line 3: Wrong JSON: .*",
        ),
        ('{"instruction": "a", "context": ""}\n', r"a.jsonl, line 1: The field 'response' is missing."),
        ('{"instruction": "\\ud83d", "context": "", "response": "b"}', "half of a character"),
        ("\n\n", "is empty"),
        ("[1]\n", "line 1: The record is no JSON object"),
    ],
)
def test_a_damaged_record_is_named_before_a_training_starts(tmp_path, text, message):
    (tmp_path / "a.jsonl").write_text(text)
    source = {"reader": "dolly", "files": str(tmp_path / "a.jsonl")}
    with pytest.raises(ValueError, match=message):
        load_instruction_dataset({"sources": [source]})
    with pytest.raises(ValueError, match=message):
        list(load_instruction_dataset({"sources": [source], "streaming": True}))


def test_records_that_another_version_checked_are_checked_anew(tmp_path, monkeypatch):
    source, checked = {"reader": "dolly", "files": dolly(tmp_path / "a.jsonl", 3)}, []
    check = tables.problem_of
    monkeypatch.setattr(tables, "problem_of", lambda *given: checked.append(given) or check(*given))
    for number, version in ((3, tables.FORMAT), (3, tables.FORMAT), (6, "another")):
        monkeypatch.setattr(tables, "FORMAT", version)
        assert len(load_instruction_dataset({"sources": [source]})) == 3 and len(checked) == number


@pytest.mark.parametrize(("text", "message"), [("[{]", "wrong JSON: record 0"), ('{"a": 1}', r"holds \['a'\]")])
def test_a_file_of_another_form_is_named(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    source = {"reader": "clevr", "files": str(tmp_path / "a.json"), "image_root": str(tmp_path)}
    with pytest.raises(ValueError, match=f"a.json: .*{message}"):
        load_instruction_dataset({"sources": [source]})


# The recipe and the report


def test_the_recipe_loads_what_it_names(tmp_path):
    recipe = yaml.safe_load(RECIPE.read_text())
    assert {s["name"]: s.get("count") for s in recipe["sources"] if s.get("count")} == {
        "aokvqa": 5000,
        "coco_caption": 512,
        "ocr_vqa": 512,
    }
    assert [s["name"] for s in recipe["sources"]] == list(
        "llava llava_dial aokvqa minigpt4 coco_caption ocr_vqa dolly alpaca_gpt4 baize".split()
    )
    for source in recipe["sources"]:
        for file in source["files"]:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(golden(source["reader"])["files"][0], tmp_path / file)
        if "image_root" in source:
            shutil.copytree(DATA / source["reader"] / "images", tmp_path / source["image_root"], dirs_exist_ok=True)
    recipe["root"] = str(tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    rows = list(load_instruction_dataset(tmp_path / "recipe.yaml", seed=1))
    assert [bool(row["images"]) for row in rows] == [True, False] * (2 * 5 + 4 + 3 + 3 + 2 * 3 + 3)


def test_the_report_counts_everything(tmp_path, both, processor):
    pictures, texts = both
    texts["files"] = [texts["files"], lines(tmp_path / "b.jsonl", ["nonsense", {"instruction": "Only."}])]
    (tmp_path / "images" / "3.png").write_bytes(b"text")
    (tmp_path / "images" / "4.png").unlink()
    long = {"from": "human", "value": "<image>\nWhy?"}, {"from": "gpt", "value": "Because it has to be so, I think."}
    again = {"from": "human", "value": "And?"}, {"from": "gpt", "value": "word " * 50}
    records = [{"image": "0.png", "conversations": [*long, *again]}]
    dialogues = {"reader": "llava_dial", "files": lines(tmp_path / "d.jsonl", records)}
    sources = [pictures, texts, {**dialogues, "image_root": str(tmp_path / "images")}]
    mixture = read_mixture({"sources": sources})
    text, findings = report(mixture, processor, max_length=250)
    found = findings["coco_caption"]
    assert found.rows == 12 and found.problems == {MISSING: 1, BROKEN: 1} and found.short == 10
    assert findings["dolly"].rows == 9 and findings["dolly"].problems.total() == 2
    assert (findings["llava_dial"].cut, findings["llava_dial"].lost) == (1, 0)
    assert findings["llava_dial"].answers == {5: 1, 50: 1} and findings["llava_dial"].longest > 400
    assert text.count("short answers make every reply short") == 2 and "21 rows" not in text
    assert "In all: 22 rows, 4 cannot be trained on." in text
    assert f"{LEARNT}Because it has to be so, I think.</s>{PLAIN}" in text and text.count("-" * 40) == 3
    draw(findings, tmp_path / "report.png")
    assert Image.open(tmp_path / "report.png").size > (500, 500)
    assert report(mixture, processor, limit=2)[1]["coco_caption"].rows == 2


@pytest.mark.parametrize("size", [1, 2, 7, 64, 2**20])
def test_a_list_is_read_item_by_item_as_it_would_be_at_once(tmp_path, monkeypatch, size):
    monkeypatch.setattr(annotation_files, "CHUNK", size)
    file = tmp_path / "list.json"
    rng = random.Random(0)
    for indent in (None, 2):
        records = [{"a": rng.random(), "é": ["]", "\n", {"b": None}] * rng.randrange(3)} for _ in range(20)]
        records += [12, -3.5e7, True, "x,]", [], {}]
        file.write_text(json.dumps(records, indent=indent, ensure_ascii=False), encoding="utf-8-sig")
        read = list(annotation_files.read_file(str(file), None, "dolly", {}))
        assert [record for _, _, record, _ in read] == records and [n for n, *_ in read] == list(range(26))
        assert [json.loads(text) for _, text, _, _ in read] == records
    for wrong in ("[1, 2", "[1,]", "[1 2]", "[1] 2", "[,]", '[{"a": }]', "["):
        file.write_text(wrong)
        with pytest.raises(ValueError, match="list.json: wrong JSON"):
            list(annotation_files.read_file(str(file), None, "dolly", {}))
    file.write_text(" [ ] ")
    assert list(annotation_files.read_file(str(file), None, "dolly", {})) == []

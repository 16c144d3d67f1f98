"""Records of somebody else: whatever form one takes, nothing outside its root is opened, and none ends a load."""

import json
import os
import random
import sys
from collections import Counter

import datasets
import pyarrow.parquet
import pytest
from conftest import note_results
from PIL import Image
from test_hostile import JUNK, limited, mutate_tree
from test_image_files import data_url, encoded
from test_latents import PIXELS, Encoder
from test_mixture import _own_cache as _own_cache
from test_mixture import lines, said
from test_readers import annotations
from test_video import film

from processing_mmgpt import load_instruction_dataset
from processing_mmgpt.data.annotations import read_record
from processing_mmgpt.data.confining import confined
from processing_mmgpt.data.latents import keep_latents
from processing_mmgpt.data.readers import READERS, TEXT_READERS
from processing_mmgpt.data.recipe import read_mixture
from processing_mmgpt.data.report import report
from processing_mmgpt.evaluation.benchmarks import BENCHMARKS, read_samples


OPENED = []  # what this process opens, once `watch` has been asked for it
REPLY = {"role": "assistant", "content": "That."}


def _note(event, arguments):
    if event == "open" and isinstance(arguments[0], str | bytes):
        OPENED.append(os.fsdecode(arguments[0]))


@pytest.fixture
def opened(monkeypatch):
    """Paths of the files that Python or Pillow opens, as they are given."""
    if not _note.__dict__:  # a hook stays as long as the process
        _note.added = sys.addaudithook(_note)
    open_picture = Image.open

    def watched(file, *given, **named):
        OPENED.append(str(getattr(file, "name", "")) if hasattr(file, "read") else os.fsdecode(file))
        return open_picture(file, *given, **named)

    monkeypatch.setattr(Image, "open", watched)
    OPENED.clear()
    return OPENED


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A root with pictures, a video, links and a pipe; beside it a folder with others, which is the user's home."""
    (tmp_path / "root" / "sub").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    for path in ("root/in.png", "root/sub/in.png", "outside/secret.png"):
        (tmp_path / path).write_bytes(encoded())
    for path in ("root/clip.mp4", "outside/secret.mp4"):
        film(str(tmp_path / path), count=3)
    links = {"link.png": "../outside/secret.png", "folder": "../outside", "inner.png": "sub/in.png", "up": ".."}
    for name, target in links.items():
        (tmp_path / "root" / name).symlink_to(target)
    os.mkfifo(tmp_path / "root" / "pipe")
    monkeypatch.setenv("HOME", str(tmp_path / "outside"))
    return tmp_path / "root"


def outside(opened, root):
    secret = os.path.realpath(root.parent / "outside")
    return [path for path in opened if os.path.realpath(path).startswith(secret)]


def asked(*parts):
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}, REPLY]


def mixture_of(root, records, **fields):
    path = lines(root.parent / "records.jsonl", records)
    source = {"reader": "messages", "files": path, "image_root": str(root)}
    skip = {"on_bad_record": "skip", "on_bad_image": "skip", "skip_log": str(root.parent / "skips.jsonl")}
    return {"sources": [source], **skip, **fields}


# One form each

LEAVES, NO_FORM = "leaves the image root", "A picture has to be|are no bytes|has to be a list"
FORMS = {
    "a path": ("SECRET.png", LEAVES),
    "bytes that are a path": ({"bytes": "SECRET.png"}, NO_FORM),
    "bytes that are a path below": ({"bytes": "in.png"}, NO_FORM),
    "bytes that are numbers": ({"bytes": [137, 80]}, NO_FORM),
    "a path beside": ({"bytes": None, "path": "SECRET.png"}, LEAVES),
    "a video": ({"type": "video", "video": "SECRET.mp4"}, LEAVES),
    "a video's bytes": ({"type": "video", "video": {"bytes": "SECRET.mp4"}}, NO_FORM),
    "a video in a video": ({"type": "video", "video": {"type": "video", "video": "SECRET.mp4"}}, NO_FORM),
    "frames": (["in.png", "SECRET.png"], LEAVES),
    "bytes of frames": (["in.png", {"bytes": "SECRET.png"}], NO_FORM),
    "frames in frames": ([["SECRET.png"]], NO_FORM),
    "a picture in a list": ([{"type": "image", "image": "SECRET.png"}], NO_FORM),
    "an address of a file": ("file://SECRET.png", None),
    "a home": ("~/secret.png", None),
    "another's home": ("~root/secret.png", None),
    "a step up": ("../outside/secret.png", LEAVES),
    "a link": ("link.png", "is a link to the outside"),
    "a folder's link": ("folder/secret.png", "is a link to the outside"),
    "a link up": ("up/outside/secret.png", "is a link to the outside"),
    "another's root": ("/proc/self/rootSECRET.png", LEAVES),
    "a null": ("SECRET.png\0", LEAVES),
    "a null behind": ("in.png\0SECRET.png", LEAVES),
    "nothing": ("", LEAVES),
    "a number": (7, NO_FORM),
    "true": (True, NO_FORM),
    "an object": ({}, NO_FORM),
    "an object of another kind": ({"image": "SECRET.png"}, NO_FORM),
}


def spelt(form, root):
    """Put the real path in."""
    secret = str(root.parent / "outside" / "secret")
    return json.loads(json.dumps(form).replace("SECRET", secret))


@pytest.mark.parametrize("policy", ["skip", "blank"])
@pytest.mark.parametrize("form", FORMS)
def test_a_record_reads_nothing_outside_its_root(root, opened, form, policy):
    given, message = FORMS[form]
    given = spelt(given, root)
    records = [{"messages": asked({"type": "image"}), "images": [given]}]
    records += [{"messages": asked({"type": kind, kind: given})} for kind in ("image", "video")]
    records += [{"messages": asked({"type": kind, "path": given})} for kind in ("image", "video")]
    good = {"messages": asked({"type": "image", "image": "in.png"})}
    for record in records if message else ():
        with pytest.raises(ValueError, match=message):
            read_record(record, "messages", str(root), random.Random(0))
    for streaming in (False, True):
        mixture = mixture_of(root, [*records, good], on_bad_image=policy, streaming=streaming)
        with limited(60):
            rows = list(load_instruction_dataset(mixture))
            for image in (image for row in rows for image in row["images"]):
                try:
                    PIXELS.frames(image)
                except (OSError, TypeError, ValueError):
                    pass  # what counts is what was opened
        assert rows and outside(opened, root) == []
    assert any(path.endswith("root/in.png") for path in opened)


def test_the_watch_sees_what_is_opened(root, opened):
    PIXELS.frames(str(root.parent / "outside" / "secret.png"))
    PIXELS.frames(str(root / "link.png"))
    assert len(outside(opened, root)) >= 2


@pytest.mark.parametrize("images", ["in.png", {"path": "in.png"}, 7, True])
def test_images_are_a_list(root, images):
    record = {"messages": asked(*[{"type": "image"}] * 6), "images": images}
    with pytest.raises(ValueError, match="The field 'images' has to be a list: got "):
        read_record(record, "messages", str(root), random.Random(0))


def test_a_folder_that_becomes_a_link_is_seen(root):
    assert confined(str(root), "sub/in.png")
    (root / "sub").rename(root / "before")
    (root / "sub").symlink_to("../outside", target_is_directory=True)
    with pytest.raises(ValueError, match="is a link to the outside"):
        confined(str(root), "sub/secret.png")


@pytest.mark.parametrize("where", ["images", "messages"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_of_arrow_opens_no_picture_that_it_names(root, opened, where, streaming, monkeypatch):
    """`datasets` opens a path in what a Parquet file says is a picture; a stranger writes both."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # 10 seconds, else
    picture = {"path": str(root.parent / "outside" / "secret.png"), "bytes": None}
    text = datasets.Value("string")
    part = {"type": text, "text": text} | ({"image": datasets.Image()} if where == "messages" else {})
    features = {"messages": datasets.List({"role": text, "content": datasets.List(part)})}
    user = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
    record = {"messages": [{"role": "user", "content": user}]}
    record["messages"].append({"role": "assistant", "content": [{"type": "text", "text": "That."}]})
    if where == "messages":
        user[0]["image"] = picture
    else:
        features["images"], record["images"] = datasets.List(datasets.Image()), [picture]
    rows = datasets.Dataset.from_list([record], features=datasets.Features(features))
    (root.parent / "arrow").mkdir()
    pyarrow.parquet.write_table(rows.data.table, root.parent / "arrow" / "train.parquet")
    for image_root, message in ((None, "has no image_root"), (str(root), LEAVES)):
        source = {"reader": "messages", "dataset": str(root.parent / "arrow"), "image_root": image_root}
        with pytest.raises(ValueError, match=message):
            list(load_instruction_dataset({"sources": [source], "streaming": streaming}))
    assert outside(opened, root) == []


@pytest.mark.parametrize("image", ["../outside/secret.png", "link.png", {"bytes": "in.png"}, ["in.png"], 7, None])
def test_a_benchmark_stays_in_its_folder(root, image):
    lines(root / "dev.jsonl", [{"id": 1, "img": image, "text": "a", "label": 0}])
    with pytest.raises(ValueError, match="A picture's path"):
        read_samples(BENCHMARKS["hateful_memes"], root, is_support=False)


# A record that is deep ends nothing


@pytest.mark.parametrize("depth", [100, 900, 980, 5_000, 100_000])
@pytest.mark.parametrize("reader", ["messages", "nlvrv1", "dolly"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_deep_record_is_skipped(root, depth, reader, streaming):
    deep = "[" * depth + "]" * depth
    if reader == "messages":
        good = {"messages": asked({"type": "image", "image": "in.png"})}
        parts = {"type": "image"}
        wrong = [json.dumps({"messages": asked(parts), "images": "DEEP"}), json.dumps({"messages": "DEEP"})]
        wrong += [json.dumps({"messages": asked({"type": kind, kind: "DEEP"})}) for kind in ("image", "video")]
        wrong += [json.dumps({"messages": asked({"type": "image", "base64": "DEEP"})})]
        wrong += [json.dumps({"messages": [{"role": "DEEP", "content": "a"}]}), '"DEEP"']
    else:
        good = annotations(reader)[0]
        wrong = [json.dumps({**good, key: "DEEP"}) for key in good if key not in ("split", "identifier", "category")]
    file = lines(root.parent / "train.jsonl", [*(text.replace('"DEEP"', deep) for text in wrong), good])
    fields = {"streaming": streaming, "on_bad_image": "raise"}
    mixture = mixture_of(root, [], **fields)
    mixture["sources"] = [{"reader": reader, "files": file} | ({} if reader == "dolly" else {"image_root": str(root)})]
    if reader == "nlvrv1":
        mixture["on_bad_image"] = "blank"
    rows = list(load_instruction_dataset(mixture))
    assert 1 <= len(rows) <= 2 and "DEEP" not in said(rows[0])


# Generated records

SOURCES = ["in.png", "sub/in.png", "inner.png", "./in.png", "clip.mp4"]
SOURCES += [form for form, _ in FORMS.values()]
SOURCES += ["pipe", "/dev/zero", "/dev/stdin", ".", "..", "sub", "SECRET.mp4", "folder/secret.mp4", "data:SECRET.png"]
SOURCES += [" SECRET.png", "FILE:SECRET.png", "http://127.0.0.1/SECRET.png", "\\SECRET.png", "C:\\a.png", "a" * 5_000]
SOURCES += [
    "in.png/../link.png",
    "sub/../../outside/secret.png",
    "IN.PNG",
    "in.png\n",
    "\ud800.png",
    "in.png/a",
    "DEEP",
]


def wrapped(rng, depth=0):
    """A picture in some form, right or wrong."""
    given = rng.choice(SOURCES) if rng.random() < 0.85 else rng.choice([data_url(encoded()), *JUNK])
    kind = rng.randrange(16)
    if kind < 6 or depth > 3:
        return given
    if kind == 6:
        return {"bytes": wrapped(rng, depth + 1), "path": rng.choice([None, "in.png", given])}
    if kind == 7:
        return {rng.choice(["path", "url", "image", "video", "file", "filename", "base64"]): wrapped(rng, depth + 1)}
    if kind == 8:
        name = rng.choice(["image", "video"])
        return {"type": name, rng.choice([name, "path", "url", "bytes"]): wrapped(rng, depth + 1)}
    if kind == 9:
        return [wrapped(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 10:
        for _ in range(rng.choice([1, 2])):
            given = [given] if rng.random() < 0.9 else {"path": given}
    return given


def generated(rng):
    """A record in our form: places and pictures, inline parts, both; often with something wrong in it."""
    parts, images = [], []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        part = {"type": rng.choice(["image", "image", "video"])}
        if rng.random() < 0.5:
            part[rng.choice(["image", "video", "url", "path", "base64", "bytes", "source"])] = wrapped(rng)
        else:
            images.append(wrapped(rng))
        parts.append(part)
    record = {"messages": asked(*parts), "images": images}
    return mutate_tree(rng, record) if rng.random() < 0.3 else record


def written(record, root):
    text = json.dumps(record, default=lambda value: value.decode())
    text = text.replace('"DEEP"', "[" * 900 + "]" * 900)
    return text.replace("SECRET", str(root.parent / "outside" / "secret"))


def hostile_sources(root, count):
    """Files of records for every reader that brings pictures, most of them in our form; so many in all."""
    rng, sources, left = random.Random(0), [], count
    for reader in (name for name in READERS if name not in TEXT_READERS):
        pristine, share = annotations(reader), count // 40
        records = [mutate_tree(rng, rng.choice(pristine)) for _ in range(share - 1)]
        for record in records:
            for key in record if isinstance(record, dict) else ():
                if "image" in str(key).lower() or key in (
                    "filename",
                    "directory",
                    "Flickr30K_ID",
                    "split",
                    "identifier",
                ):
                    record[key] = wrapped(rng) if rng.random() < 0.7 else record[key]
        texts = [written(record, root) for record in [*records, pristine[0]]]
        (root.parent / reader).mkdir()
        sources.append({"reader": reader, "files": lines(root.parent / reader / "train.jsonl", texts)})
        left -= share
    good = {"messages": asked({"type": "image", "image": "in.png"})}
    texts = [written(generated(rng), root) for _ in range(left - 1)] + [json.dumps(good)]
    sources.append({"reader": "messages", "files": lines(root.parent / "train.jsonl", texts)})
    return [{**source, "image_root": str(root)} for source in sources]


def attack(root, opened, processor, count):
    """Take generated records along every way on which they are read, and make pixels of what comes out."""
    sources, counts = hostile_sources(root, count), Counter(records=count)
    for policy, streaming in (("blank", False), ("blank", True), ("skip", False)):
        log = root.parent / f"{policy}-{streaming}.jsonl"
        mixture = mixture_of(root, [], on_bad_image=policy, streaming=streaming, skip_log=str(log))
        mixture["sources"] = sources if policy == "blank" else sources[-1:]  # of the others hardly a picture is there
        data = load_instruction_dataset(mixture)
        for record in data:
            counts["taken"] += 1
            for image in record["images"]:
                try:
                    counts["pictures"] += len(PIXELS.frames(image)) > 0
                except (ImportError, OSError, TypeError, ValueError):
                    counts["refused when they are opened"] += 1
    kept = keep_latents(data, PIXELS, Encoder(), "one")
    counts["with latents"] = sum(len(record["images"]) > 0 for record in kept)
    _, findings = report(read_mixture(mixture), processor)
    counts["reported on"] = sum(found.rows for found in findings.values())
    counts["files opened below the root"] = len({path for path in opened if path.startswith(str(root))})
    counts["files opened outside"] = len(outside(opened, root))
    return dict(counts)


def test_generated_records_read_nothing_outside_and_end_nothing(root, opened, processor):
    with limited(120):
        counts = attack(root, opened, processor, 200)
    assert counts["files opened outside"] == 0 and counts["files opened below the root"] >= 2
    assert counts["taken"] >= 3 and counts["pictures"] > 0 and counts["with latents"] > 0


@pytest.mark.bars
def test_five_thousand_generated_records(root, opened, processor):
    counts = attack(root, opened, processor, 5_000)
    note_results("confining", counts)
    assert counts["files opened outside"] == 0 and counts["files opened below the root"] >= 2
    assert counts["taken"] >= 100 and counts["pictures"] > 0 and counts["with latents"] > 0

"""Old files of strangers: nothing in them runs, and what is wrong with one is said in a sentence."""

import copy
import io
import json
import pickle
import random
import re
import signal
import struct
import traceback
import zipfile
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from test_converting import LORA, V1, Bomb, arguments, convert
from test_image_files import FILES, encoded, frames
from tiny_world import evaluation
from transformers.utils import logging as transformers_logging

from modeling_mmgpt import MMGPTConfig, MMGPTForConditionalGeneration
from modeling_mmgpt.conversion.old_files import read_weights
from modeling_mmgpt.converting_mmgpt import convert_lora
from processing_mmgpt import MMGPTImageProcessor, load_instruction_dataset
from processing_mmgpt.data.recipe import read_mixture
from processing_mmgpt.data.skip_log import count_skips
from processing_mmgpt.image_files_mmgpt import OWN_IMAGES, ImagePolicy, open_image


FOLDER = V1 / "every1"


@pytest.fixture(scope="module", autouse=True)
def _no_progress_bar():
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


# A pickle with a payload, in every slot


def pickled(path, bomb):
    path.write_bytes(pickle.dumps(bomb))


def zipped(path, bomb):
    torch.save({"model_state_dict": {"a": torch.zeros(2)}, "epoch": bomb}, path)


def legacy(path, bomb):
    torch.save({"a": bomb}, path, _use_new_zipfile_serialization=False)


def in_a_key(path, bomb):
    torch.save({("a", bomb): torch.zeros(2)}, path)


def as_safetensors(path, bomb):
    pickled(path.with_suffix(".safetensors"), bomb)


FORMS = {form.__name__: form for form in (pickled, zipped, legacy, in_a_key, as_safetensors)}
SLOTS = "checkpoint vision_tower lm_head language_model lora tower_of_a_fresh_model".split()


def put(slot, path, folder):
    """Give a file to the slot of a conversion that reads it."""
    if slot == "lora":
        return convert_lora(path, FOLDER, folder / "out", lora_alpha=8)
    if slot == "tower_of_a_fresh_model":
        tower = arguments(FOLDER)["vision_config"]
        return MMGPTForConditionalGeneration.from_vision_text_pretrained(
            str(path), str(FOLDER / "lm"), vision_config=tower, image_token_id=1, end_of_chunk_token_id=2
        )
    if slot == "language_model":
        language_model = folder / "lm"
        language_model.mkdir()
        for file in ("config.json", "generation_config.json"):
            if (FOLDER / "lm" / file).exists():
                (language_model / file).write_bytes((FOLDER / "lm" / file).read_bytes())
        name = "model.safetensors" if path.suffix == ".safetensors" else "pytorch_model.bin"
        path.rename(language_model / name)
        path = language_model
    return convert(FOLDER, **{slot: path})


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("slot", SLOTS)
def test_a_payload_does_not_run_in_any_slot(tmp_path, slot, form):
    burnt, path = tmp_path / "burnt", tmp_path / "hostile.pt"
    FORMS[form](path, Bomb(burnt))
    path = next(tmp_path.glob("hostile.*"))
    with pytest.raises((ValueError, OSError)):
        put(slot, path, tmp_path)
    assert not burnt.exists() and not (tmp_path / "out").exists()


def test_the_payload_is_live(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "burnt")))
    assert (tmp_path / "burnt").exists()


# Files that lie about their tensors


def checkpoint():
    return {key: value.clone() for key, value in torch.load(FOLDER / "checkpoint.pt", weights_only=True).items()}


EMBEDDING = "lang_encoder.model.embed_tokens.weight"


def stretched(weights):
    weights[EMBEDDING] = torch.zeros(1).expand(2**40, weights[EMBEDDING].shape[1])


def sparse(weights):
    weights[EMBEDDING] = weights[EMBEDDING].to_sparse()


def meta(weights):
    weights[EMBEDDING] = weights[EMBEDDING].to("meta")


def scalar(weights):
    weights[EMBEDDING] = torch.tensor(1.0)


def flat(weights):
    weights["perceiver.latents"] = weights["perceiver.latents"].flatten()


def numbered(weights):
    weights[7] = weights.pop(EMBEDDING)


def not_a_number(weights):
    weights["perceiver.latents"][0, 0] = torch.nan


def infinite(weights):
    weights[EMBEDDING][0, 0] = torch.inf


def of_words(weights):
    weights[EMBEDDING] = "a matrix"


LIES = {f.__name__: f for f in (stretched, sparse, meta, scalar, flat, numbered, not_a_number, infinite, of_words)}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("lie", LIES)
def test_a_checkpoint_that_lies_about_a_tensor_is_refused(tmp_path, lie):
    weights, path = checkpoint(), tmp_path / "lie.pt"
    LIES[lie](weights)
    torch.save(weights, path)
    with pytest.raises(ValueError, match=r"lie\.pt|of the checkpoint is .*expected a matrix"):
        convert(FOLDER, checkpoint=path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_adapter_that_is_not_finite_is_refused(tmp_path, value):
    source = next(LORA.glob("*.pt"))
    weights, _ = read_weights(LORA / "final_weights_mmengine_config.pt")
    weights = {key: tensor.clone() for key, tensor in weights.items()}
    next(value for key, value in weights.items() if "lora_A" in key)[0, 0] = value
    torch.save(weights, tmp_path / source.name)
    with pytest.raises(ValueError, match="not finite"):
        convert_lora(tmp_path / source.name, FOLDER, tmp_path / "out", lora_alpha=8)


@pytest.mark.parametrize("settings_of", ["a word", 7, ["a", "list"], {"tuning_config": "a word"}])
def test_settings_of_another_form_are_refused(tmp_path, settings_of):
    torch.save({"model_state_dict": {"a": torch.zeros(2)}, "tuning_config": settings_of}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"tuning_config.*expected a dictionary"):
        read_weights(tmp_path / "a.pt")


def test_a_zip_bomb_is_refused(tmp_path):
    """A tensor of four numbers whose record unpacks to 200 MB."""
    torch.save({"a": torch.zeros(4)}, tmp_path / "honest.pt")
    with zipfile.ZipFile(tmp_path / "honest.pt") as old, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as new:
        for item in old.infolist():
            is_data = item.filename.endswith("data/0")
            kind = zipfile.ZIP_DEFLATED if is_data else zipfile.ZIP_STORED
            new.writestr(item.filename, bytes(200_000_000) if is_data else old.read(item), kind)
    assert (tmp_path / "bomb.pt").stat().st_size < 1_000_000
    with pytest.raises(ValueError, match=r"bomb\.pt"):
        read_weights(tmp_path / "bomb.pt")


def test_a_safetensors_header_that_lies_is_refused(tmp_path):
    path = tmp_path / "lie.safetensors"
    for header, size in (
        ({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 16]}}, 0),
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 2**50]}}, 0),
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}}, 0),
        ({}, 2**60),
    ):
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", size or len(text)) + text + bytes(16))
        with pytest.raises(ValueError, match=r"lie\.safetensors"):
            read_weights(path)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 10**6},
        {"num_hidden_layers": 40},
        {"vocab_size": 10**9},
        {"intermediate_size": 1},
        {"num_attention_heads": 0},
        {"num_attention_heads": 7},
        {"hidden_size": -8},
        {"hidden_size": "wide"},
        {"model_type": "no such model"},
        {"architectures": ["os.system"], "model_type": "clip"},
    ],
    ids=str,
)
def test_a_language_model_whose_config_lies_is_refused(tmp_path, change):
    config = json.loads((FOLDER / "lm" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    (tmp_path / "model.safetensors").symlink_to(FOLDER / "lm" / "model.safetensors")
    with pytest.raises((ValueError, OSError)) as caught:
        convert(FOLDER, language_model=tmp_path)
    assert str(caught.value)


@pytest.mark.parametrize(
    "change", [{"width": 8}, {"layers": 900}, {"patch_size": 0}, {"image_size": 7}, {"width": "a"}], ids=str
)
def test_a_tower_whose_config_lies_is_refused(change):
    config = arguments(FOLDER)["vision_config"]
    with pytest.raises(ValueError):
        convert(FOLDER, vision_config={**config, "vision_cfg": {**config["vision_cfg"], **change}})


# Pictures in a data set


WHOLE = {
    "16 bits": lambda: Image.fromarray(np.linspace(0, 65535, 900).reshape(30, 30).astype(np.uint16)),
    "cmyk": lambda: Image.new("CMYK", (30, 30), (0, 200, 200, 0)),
    "palette": lambda: Image.new("RGB", (30, 30), (200, 0, 0)).convert("P"),
    "turned": lambda: Image.new("RGB", (40, 20), (200, 0, 0)),
}


@pytest.fixture
def dataset(tmp_path):
    """A data set of one picture, honest ones beside it; gives the mixture."""

    def make(data: bytes, path="hostile.png", **options):
        (tmp_path / "images").mkdir(exist_ok=True)
        for number in range(3):
            Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"{number}.png")
        if path == "hostile.png":
            (tmp_path / "images" / path).write_bytes(data)
        lines = [
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "a"}],
             "images": [name]}
            for name in (path, "0.png", "1.png", "2.png")
        ]  # fmt: skip
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
        source = {"reader": "messages", "files": "a.jsonl", "image_root": "images"}
        return {"sources": [source], "root": str(tmp_path), "skip_log": str(tmp_path / "skips"), **options}

    return make


@pytest.mark.parametrize("name", WHOLE)
def test_unusual_pictures_of_a_data_set_are_read_for_what_they_show(dataset, name):
    buffer, picture = io.BytesIO(), WHOLE[name]()
    exif = Image.Exif()
    exif[0x0112] = 6 if name == "turned" else 1
    picture.save(buffer, "TIFF" if name == "cmyk" else "PNG", exif=exif)
    rows = load_instruction_dataset(dataset(buffer.getvalue(), on_bad_image="skip"))
    sizes = {image.size for row in rows for image in row["images"]}
    assert (20, 40) in sizes if name == "turned" else (30, 30) in sizes
    assert not count_skips(rows.format["format_kwargs"]["transform"].mixture.skip_log)


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith(("tiff", "eps", "ppm", "too many"))])
def test_a_hostile_picture_in_a_data_set_is_skipped_and_counted(dataset, name):
    mixture = dataset(FILES[name], on_bad_image="skip")
    rows = [row for row in load_instruction_dataset(mixture)]
    if name != "thin png":  # whole, but refused when it is resized
        assert len(rows) == 4 and all(image.size == (8, 8) for row in rows for image in row["images"])
        assert sum(count_skips(mixture["skip_log"]).values()) == 1


@pytest.mark.parametrize(
    "path",
    ["../a.jsonl", "/etc/passwd", "images/../../a", "..\\a.png", "C:\\a.png", "file:///etc/passwd", "a\0.png", "."],
)
def test_a_path_that_leaves_the_folder_of_pictures_is_refused(dataset, path):
    mixture = dataset(b"", path)
    with pytest.raises((ValueError, FileNotFoundError)):
        _ = load_instruction_dataset(mixture)[:]


# Mutations: an answer, or an error that our own code raises


RESULTS = Path(__file__).with_name("results") / "mutations.json"
OURS = (
    "/modeling_mmgpt/",
    "/processing_mmgpt/",
    "huggingface_hub/dataclasses.py",
)  # the last checks fields of configs
JUNK = [
    None,
    True,
    0,
    -1,
    1,
    7,
    2**31,
    2**63,
    0.5,
    float("nan"),
    "",
    "a",
    "\0",
    "\ud800",
    "<image>",
    "</s>",
    "\U000f0000",
]
JUNK += [
    "\U000f0000\U000f0001",
    "9" * 400,
    [],
    {},
    [[]],
    {"type": "image"},
    {"type": "text", "text": "b"},
    b"a",
    [0] * 9,
]
JUNK += ["../a.png", "http://127.0.0.1/", "data:image/png;base64,AAAA", "llama", "clip", "{{ 1 }}"]
SIDE = 24


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Change a few bytes, cut, repeat, or set a number in a header to an extreme."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        at, kind = rng.randrange(len(data) or 1), rng.randrange(5)
        if kind == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del data[at : len(data) if rng.random() < 0.3 else at + rng.randrange(1, 9)]
        elif kind == 2:
            data[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif kind == 3:
            data[at : at + 4] = rng.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\0\0\xff\xff"))
        else:
            data[at:at] = data[at : at + rng.randrange(1, 40)]
    return bytes(data)


def mutate_text(rng: random.Random, text: str) -> str:
    pieces = re.split(r"(\W)", text)
    for _ in range(rng.choice((1, 1, 1, 2))):
        at = rng.randrange(len(pieces))
        pieces[at : at + rng.randrange(2)] = rng.choice(
            (
                [],
                [rng.choice(pieces)],
                ["{% for a in messages %}"],
                ["[0]"],
                ["|upper"],
                ["{{ messages }}"],
                ["\U000f0000"],
            )
        )
    return "".join(pieces)


def mutate_tree(rng: random.Random, tree):
    """Put junk, nothing, or another part of the tree in the place of a part."""
    tree = copy.deepcopy(tree)
    places = []

    def walk(node):
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in items:
            places.append((node, key))
            walk(value)

    walk(tree)
    for _ in range(rng.choice((1, 1, 2, 3))):
        node, key = rng.choice(places)
        if rng.random() < 0.15 and isinstance(node, dict):
            node.pop(key, None)
        elif rng.random() < 0.1 and isinstance(node, dict):
            node[rng.choice(("type", "text", "misspelt", 7, ""))] = rng.choice(JUNK)
        elif isinstance(node, dict) or key < len(node):
            other, name = rng.choice(places)
            found = other.get(name) if isinstance(other, dict) else other[name] if name < len(other) else None
            node[key] = copy.deepcopy(rng.choice(JUNK) if rng.random() < 0.7 else found)
    return tree


def picture_files() -> list[bytes]:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif.get_ifd(0x8769)[0x9003] = 6, "maker", "2026:01:01 00:00:00"
    plain = [encoded(kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000")]
    modes = [encoded("PNG", mode=mode) for mode in ("1", "L", "LA", "P", "RGBA")] + [encoded("JPEG", mode="CMYK")]
    others = [encoded(kind, exif=exif) for kind in ("JPEG", "PNG", "WEBP", "TIFF")] + [
        encoded("JPEG", progressive=True)
    ]
    others += [encoded("TIFF", compression=name) for name in ("tiff_lzw", "tiff_deflate", "jpeg")]
    return plain + modes + others + [frames("GIF"), frames("WEBP"), frames("PNG")]


PICTURES = picture_files()
MESSAGES = [
    {"role": "system", "content": "Be <image> brief."},
    {"role": "user", "content": [{"type": "image", "image": encoded()}, {"type": "text", "text": "What? </s>"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    {"role": "user", "content": [{"type": "text", "text": "And?"}, {"type": "input", "text": "12"}]},
]
CONFIG = {
    "vision_config": {"model_type": "mmgpt_vision", "width": 32, "layers": 2, "image_size": 24, "patch_size": 8},
    "text_config": {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "resampler": {"depth": 1, "num_heads": 2, "head_dim": 8, "num_latents": 4, "max_num_frames": None},
    "cross_attention": {"num_heads": 2, "head_dim": 8, "ff_mult": 2},
    "cross_attn_every_n_layers": 1,
    "media_attention": "preceding",
    "image_token_id": 3,
    "end_of_chunk_token_id": 4,
}
MIXTURE = {
    "sources": [
        {"reader": "messages", "files": ["a.jsonl"], "image_root": ".", "count": 3, "weight": 0.5, "where": {"a": 1}},
        {"reader": "alpaca_gpt4", "files": "a.jsonl", "weight": 0.5, "name": "text"},
    ],
    "image_text_ratio": None,
    "streaming": False,
    "on_bad_record": "skip",
    "on_bad_image": "blank",
    "skip_log": "skips",
}


def try_picture(rng: random.Random, processor, folder) -> None:
    data = mutate_bytes(rng, rng.choice(PICTURES))
    policy = ImagePolicy() if rng.random() < 0.5 else OWN_IMAGES
    pixels = processor.image_processor.pixels(open_image(data, policy))
    assert pixels.shape == (3, SIDE, SIDE) and pixels.isfinite().all()


def try_template(rng: random.Random, processor, folder) -> None:
    template = mutate_text(rng, processor.chat_template)
    batch = processor.apply_chat_template(MESSAGES, chat_template=template, tokenize=True, return_dict=True)
    check_batch(batch, processor.apply_chat_template(MESSAGES, chat_template=template), processor)


def try_messages(rng: random.Random, processor, folder) -> None:
    messages = mutate_tree(rng, MESSAGES)
    batch = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    check_batch(batch, processor.apply_chat_template(messages), processor)


def check_batch(batch, text: str, processor) -> None:
    """What was rendered is what the ids say, and each picture has its token."""
    ids = batch["input_ids"][0].tolist()
    assert processor.tokenizer.decode(ids) == text
    assert ids.count(processor.image_token_id) == (len(batch["pixel_values"][0]) if "pixel_values" in batch else 0)


def try_config(rng: random.Random, processor, folder) -> None:
    given = json.loads(json.dumps(mutate_tree(rng, CONFIG), default=str))  # as from a file
    config = MMGPTConfig(**given)
    again = MMGPTConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_json_string() == config.to_json_string()  # of text: nan is no nan
    for name in ("resampler", "cross_attention"):
        assert {**getattr(config, name), **(given.get(name) or {})} == getattr(config, name)


def try_mixture(rng: random.Random, processor, folder) -> None:
    given = mutate_tree(rng, {**MIXTURE, "root": str(folder)})
    mixture = read_mixture({str(key): value for key, value in given.items()})
    assert len(mixture.sources) == len(given["sources"])


def try_image_processor(rng: random.Random, processor, folder) -> None:
    given = mutate_tree(rng, {"size": SIDE, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2]})
    image_processor = MMGPTImageProcessor(**{str(key): value for key, value in given.items()})
    assert image_processor.size > 2**20 or image_processor.pixels(encoded()).isfinite().all()


KINDS = {
    "images": [try_picture],
    "templates": [try_template],
    "messages": [try_messages],
    "configs": [try_config, try_mixture, try_image_processor],
}


@contextmanager
def limited(seconds: int):
    """End what hangs."""

    def stop(*_):
        raise AssertionError(f"It takes longer than {seconds} s.")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def attempt(kind: str, number: int, processor, folder) -> str:
    """Try one mutation; an error has to be a `ValueError`, or what docs/security.md names beside it, raised by us."""
    rng = random.Random(f"{kind} {number}")
    try:
        with limited(60):
            rng.choice(KINDS[kind])(rng, processor, folder)
    except (ValueError, TypeError, FileNotFoundError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1].filename
        if not any(place in last for place in OURS) or not str(error):
            raise AssertionError(f"{kind} {number}: not an error of ours") from error
        return "refused"
    return "answered"


def mutate(kind: str, examples: int, processor, folder) -> Counter:
    (folder / "a.jsonl").write_text("")
    numbers = set()

    @seed(0)
    @settings(max_examples=examples, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 2**48))
    def run(number):
        numbers.add(number)
        counts[attempt(kind, number, processor, folder)] += 1

    counts = Counter()
    run()
    return counts + Counter(different=len(numbers))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_a_mutation_gives_an_answer_or_an_error_of_ours(kind, processor, tmp_path):
    assert mutate(kind, 50, processor, tmp_path).total() >= 50


@pytest.mark.bars
@pytest.mark.filterwarnings("ignore")
def test_ten_thousand_mutations(processor, tmp_path):
    counts = {kind: mutate(kind, 2500, processor, tmp_path) for kind in KINDS}
    figures = {kind: dict(count) for kind, count in counts.items()}
    figures["mutations"] = sum(count["answered"] + count["refused"] for count in counts.values())
    command = evaluation.measured_with("pytest -m bars tests/test_hostile.py")
    RESULTS.write_text(json.dumps(command | figures, indent=1, sort_keys=True) + "\n")
    assert figures["mutations"] >= 10_000

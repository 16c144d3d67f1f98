"""Latents that are kept: a run with them is the run without, and none is used that something else was made from."""

import os
import re
import signal
from functools import partial
from pathlib import Path

import datasets
import peft
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from test_mixture import captions, lines
from test_train import LIMIT, SERVER, TURNS, assert_same_run, history, losses, options, run, shard_on_cpus
from test_train import one_process as one_process
from test_train import world as world

from modeling_mmgpt import base_model_mmgpt
from modeling_mmgpt.adapters_mmgpt import lora_config
from modeling_mmgpt.training.latents import frozen_encoder
from processing_mmgpt import MMGPTCollator, MMGPTImageProcessor, load_instruction_dataset
from processing_mmgpt.data import latents as latent_tables
from processing_mmgpt.data.latents import keep_latents
from processing_mmgpt.data.skip_log import count_skips
from processing_mmgpt.messages_mmgpt import Latents


SIDE = 8
PIXELS = MMGPTImageProcessor(size=SIDE)


def use_cache(folder: Path) -> None:
    datasets.config.HF_DATASETS_CACHE = str(folder)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


# Training


def watch(cache: Path, shard: bool = False) -> None:
    """Use a cache of one's own, and print how many pictures the tower gets."""
    use_cache(cache)
    latent_tables.IMAGES_PER_BATCH = 1
    tower = base_model_mmgpt.patch_tokens

    def watched(model, pixels):
        print(f"tower: {len(pixels)}", flush=True)
        return tower(model, pixels)

    base_model_mmgpt.patch_tokens = watched
    if shard:
        shard_on_cpus()


def seen(log: Path, rank: int = 0) -> int:
    return sum(map(int, re.findall(r"tower: (\d+)", Path(f"{log}.{rank}").read_text())))


def norms(output: Path) -> list[float]:
    """The norm of the gradient of each step."""
    return [entry["grad_norm"] for entry in history(output) if "loss" in entry]


# One picture in each batch at most, since the last bits of what the tower makes depend on how many it gets at once.
ROWS = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
PACKED = {"data": "turns.yaml", "train_sampling_strategy": "sequential", "packing": True, "max_length": 1024}


@pytest.mark.parametrize("given", [ROWS, PACKED], ids=["rows", "packed"])
def test_two_epochs_with_kept_latents_are_two_epochs_without(tmp_path, world, given):
    """Six pictures in twelve rows, dropout in the LM; six steps are an epoch. Equal to the bit, gradients too."""
    given = {**given, "max_steps": 12, "save_steps": 12}
    watched = {"prepare": partial(watch, tmp_path / "cache")}
    run(tmp_path / "without.log", "train_sft", *options(world, tmp_path / "without", **given), **watched)
    assert seen(tmp_path / "without.log") == 2 * 6
    for number, encoded in enumerate((6 + 1, 0)):  # and the black one; the second run finds them
        log, output = tmp_path / f"{number}.log", tmp_path / f"with-{number}"
        run(log, "train_sft", *options(world, output, **given), "--cache_pictures", **watched)
        assert seen(log) == 2 + encoded  # two to see whether they are equal
        assert_same_run(tmp_path / "without", output)
        assert norms(tmp_path / "without") == norms(output)


@pytest.mark.parametrize("config", ["fsdp2.yaml", pytest.param("ddp.yaml", marks=pytest.mark.bars)])
def test_two_processes_one_without_pictures_share_what_is_kept(tmp_path, world, one_process, config):
    """As without: one of the two has all pictures and the other none. With FSDP only one has read the tower."""
    prepare = partial(watch, tmp_path / "cache", config == "fsdp2.yaml")
    given = options(world, tmp_path / "out", "still", **TURNS, per_device_train_batch_size=1)
    log = tmp_path / "log"
    run(log, "train_sft", *given, "--cache_pictures", processes=2, config=config, prepare=prepare)
    assert seen(log, 0) + seen(log, 1) == 2 * (2 + 1) + 6 + 1  # the zero picture of rows without; and the black one
    assert losses(tmp_path / "out") == pytest.approx(losses(one_process), rel=1e-5)
    assert norms(tmp_path / "out") == pytest.approx(norms(one_process), rel=1e-4)  # float32, another order of sums


# What is kept, and what is made anew


class Encoder:
    """Latents `(B, 1, 2, 3)` from which the picture can be told: mean and size of its first frame, its frames."""

    def __init__(self):
        self.pictures = 0

    def __call__(self, pixel_values, num_frames):
        self.pictures += len(pixel_values)
        frames = torch.ones(len(pixel_values), 1) if num_frames is None else num_frames
        means = pixel_values[:, :, 0].mean(dim=(-2, -1))  # (B, 1, 3)
        return torch.stack([means, frames[..., None].expand_as(means)], dim=2)


def kept(data, fingerprint="one", image_processor=PIXELS):
    """The records of some data with their latents, and how many pictures were encoded for them."""
    encoder = Encoder()
    records = keep_latents(data, image_processor, encoder, fingerprint)[:]
    return [[image.tensor for image in images] for images in records["images"]], encoder.pictures


def expected(data):
    """What the latents of each record have to be, from the pictures that it brings without them."""
    return [[Encoder()(PIXELS.frames(i)[None, None], None)[0, 0] for i in images] for images in data[:]["images"]]


@pytest.fixture
def tables_of_three(monkeypatch):
    monkeypatch.setattr(latent_tables, "IMAGES_PER_TABLE", 3)


def source(folder: Path, count: int) -> dict:
    """A source with so many pictures, and one record more: it repeats the third."""
    files = captions(folder, count)
    records = Path(files).read_text().splitlines()
    lines(Path(files), [*records, records[2]])
    return {"reader": "coco_caption", "files": files, "image_root": str(folder / "images")}


def equal(latents, others):
    return len(latents) == len(others) and all(map(torch.equal, sum(latents, []), sum(others, [])))


def test_what_has_changed_is_made_anew_and_nothing_else(tmp_path, tables_of_three):
    """Seven pictures and the black one, three a table."""
    pictures = source(tmp_path, 7)

    def load():
        return load_instruction_dataset({"sources": [pictures]}).select([3, 0, 7, 2])

    latents, encoded = kept(load())
    assert encoded == 8 and equal(latents, expected(load()))
    assert kept(load())[1] == 0
    assert kept(load(), fingerprint="other weights")[1] == 8
    assert kept(load(), image_processor=MMGPTImageProcessor(size=SIDE, image_mean=(0, 0, 0)))[1] == 8
    Image.new("RGB", (4, 4), (200, 100, 50)).save(tmp_path / "images" / "3.png")
    latents, encoded = kept(load())
    assert encoded == 3 and equal(latents, expected(load()))
    data = keep_latents(load(), PIXELS, Encoder(), "one")
    for number in range(7):
        Image.new("RGB", (4, 4), (number, 0, 1)).save(tmp_path / "images" / f"{number}.png")
    with pytest.raises(RuntimeError, match="has changed while the run goes on"):
        data[0]


def test_latents_of_pixels_that_were_made_in_another_way_are_not_used(tmp_path, monkeypatch):
    data = load_instruction_dataset({"sources": [source(tmp_path, 3)]})
    assert [kept(data)[1], kept(data)[1]] == [4, 0]
    monkeypatch.setattr(latent_tables, "FORMAT", "of another version")
    assert kept(data)[1] == 4


def die(pixel_values, num_frames):
    """Kill this process in the middle of the second table."""
    die.pictures = getattr(die, "pictures", 0) + len(pixel_values)
    if die.pictures > 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return Encoder()(pixel_values, num_frames)


def keep_and_die(cache: Path, mixture: dict) -> None:
    use_cache(cache)
    latent_tables.IMAGES_PER_TABLE, latent_tables.IMAGES_PER_BATCH = 3, 1
    keep_latents(load_instruction_dataset(mixture), PIXELS, die, "one")


def test_a_run_killed_while_it_makes_latents_leaves_whole_tables_only(tmp_path, tables_of_three):
    mixture = {"sources": [source(tmp_path, 8)]}
    process = SERVER.Process(target=keep_and_die, args=(tmp_path / "cache", mixture))
    process.start()
    process.join(LIMIT)
    assert process.exitcode == -signal.SIGKILL
    assert list((tmp_path / "cache" / "mmgpt_latents").rglob("*.incomplete/*.arrow"))
    data = load_instruction_dataset(mixture)
    latents, encoded = kept(data)
    assert encoded == 6  # of nine; the first table was whole
    assert equal(latents, expected(data))


@pytest.mark.parametrize("policy", ["skip", "blank"])
def test_damaged_pictures_are_replaced_and_counted_as_without(tmp_path, policy):
    pictures = source(tmp_path, 8)
    (tmp_path / "images" / "2.png").unlink()
    (tmp_path / "images" / "5.png").write_bytes((tmp_path / "images" / "5.png").read_bytes()[:40])
    logs = [tmp_path / name for name in ("without.jsonl", "with.jsonl")]
    without, data = (
        load_instruction_dataset({"sources": [pictures], "on_bad_image": policy, "skip_log": str(log)}, seed=1)
        for log in logs
    )
    latents, encoded = kept(data)
    assert encoded == 6 + 1
    assert equal(latents, expected(without))
    assert logs[0].read_text() == logs[1].read_text() and count_skips(logs[1]).total() == 3
    assert keep_latents(data, PIXELS, Encoder(), "one")[:]["messages"] == without[:]["messages"]


def test_a_picture_that_cannot_be_read_is_raised_for_before_training(tmp_path):
    pictures = source(tmp_path, 3)
    (tmp_path / "images" / "1.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="'coco_caption' cannot be read: .*1.png is no picture"):
        kept(load_instruction_dataset({"sources": [pictures]}))


def test_videos_and_pictures_of_one_row_are_what_the_model_makes_of_them(tmp_path, model, processor, picture):
    """A video of three frames, one of two, a picture; a row of text. Through the collator, packed with others."""
    names = [f"{number}.png" for number in range(6)]
    for number, name in enumerate(names):
        picture(number, 30, 40).save(tmp_path / name)
    user = [{"type": "video"}, {"type": "image"}, {"type": "video"}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": "That."}]
    text = [{"role": "user", "content": "No picture."}, {"role": "assistant", "content": "None."}]
    images = [names[:3], names[3], names[4:]]
    path = lines(tmp_path / "a.jsonl", [{"messages": messages, "images": images}, {"messages": text, "images": []}])
    model.requires_grad_(False)
    encode, fingerprint = frozen_encoder(model, Accelerator(cpu=True))
    data = load_instruction_dataset(path)
    records = keep_latents(data, processor.image_processor, encode, fingerprint)
    collator = MMGPTCollator(processor, max_length=512, packing=True)
    without, batch = (collator([rows[1], rows[0], rows[1]]) for rows in (data, records))
    latents = model.model.encode_images(without.pop("pixel_values"), without.pop("num_frames"))
    torch.testing.assert_close(batch.pop("image_latents"), latents, rtol=1e-5, atol=1e-5)
    assert without.keys() == batch.keys() and all(torch.equal(batch[key], without[key]) for key in batch)


# What is refused


def test_latents_that_change_from_step_to_step_are_refused(make_model, tmp_path):
    accelerator = Accelerator(cpu=True)
    model = make_model()
    with pytest.raises(ValueError, match="`vision_tower` is trained"):
        frozen_encoder(model, accelerator)
    tuned = peft.get_peft_model(model, lora_config(model, r=2))
    first, again = (frozen_encoder(tuned, accelerator)[1] for _ in range(2))
    assert first == again
    with torch.no_grad():
        model.model.resampler.norm.bias[0] += 1e-3
    assert frozen_encoder(tuned, accelerator)[1] != first
    next(iter(model.model.resampler.parameters())).requires_grad_(True)
    with pytest.raises(ValueError, match="`resampler` is trained"):
        frozen_encoder(tuned, accelerator)
    adapted = peft.get_peft_model(make_model(), peft.LoraConfig(r=2, target_modules=r".*resampler.*to_q"))
    adapted.requires_grad_(False)
    with pytest.raises(ValueError, match="an adapter on `resampler`"):
        frozen_encoder(adapted, accelerator)
    numbering = make_model(resampler={"max_num_images": 4}).requires_grad_(False)
    with pytest.raises(ValueError, match="`max_num_images` is set"):
        frozen_encoder(numbering, accelerator)
    dropping = make_model().requires_grad_(False)
    dropping.model.resampler.norm = torch.nn.Sequential(dropping.model.resampler.norm, torch.nn.Dropout(0.1))
    with pytest.raises(ValueError, match="draw random numbers"):
        frozen_encoder(dropping, accelerator)


def test_streams_and_other_datasets_are_refused(tmp_path):
    pictures = source(tmp_path, 3)
    stream = load_instruction_dataset({"sources": [pictures], "streaming": True})
    other = datasets.Dataset.from_dict({"messages": [[]], "images": [[]]})
    for data in (stream, other):
        with pytest.raises(ValueError, match="a mixture on the disk"):
            kept(data)


def test_pixels_and_latents_in_one_batch_are_refused(processor, picture):
    with pytest.raises(ValueError, match="latents and some are not"):
        processor.image_processor.stack([[picture(0)], [Latents(torch.zeros(2, 3))]])

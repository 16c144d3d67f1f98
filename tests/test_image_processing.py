"""Pictures to pixels: open_clip's evaluation transform, bit for bit, on upright pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import image_transform
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor

from processing_mmgpt import MMGPTImageProcessor


GOLDENS = Path(__file__).parent / "goldens" / "image_preprocess"
MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr")  # of 8 bits
EXIF_ORIENTATION = 0x0112


def noise(width, height, mode="RGB", seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    if mode == "P":
        picture = Image.fromarray(values[..., 0], "P")
        picture.putpalette(values[0].tobytes().ljust(768, b"\x07")[:768])
        return picture
    return Image.fromarray(values, "RGBA").convert(mode)


LEVEL = 1 / 255 / 0.25  # of 255, after the least standard deviation


@pytest.mark.parametrize("case", sorted(load_file(GOLDENS / "pixel_values.safetensors")))
def test_pixels_are_those_of_the_reference(case):
    expected = load_file(GOLDENS / "pixel_values.safetensors")[case]
    name, size = case.rsplit(".", 1)
    # A Pillow may round one step of its bicubic resize another way than that of the goldens, in open_clip as in ours.
    theirs = image_transform(int(size), is_train=False)(Image.open(GOLDENS / f"{name}.png"))
    allowed = 0.0 if torch.equal(theirs, expected) else LEVEL
    for source in (GOLDENS / f"{name}.png", Image.open(GOLDENS / f"{name}.png")):
        ours = MMGPTImageProcessor(size=int(size))(source)["pixel_values"]
        assert (ours[0] - expected).abs().max() <= allowed


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    size=st.integers(1, 48),
    mode=st.sampled_from(MODES),
    seed=st.integers(0, 9),
)
def test_pixels_are_those_of_open_clip(width, height, size, mode, seed):
    picture = noise(width, height, mode, seed)
    expected = image_transform(size, is_train=False)(picture)
    assert torch.equal(MMGPTImageProcessor(size=size).pixels(picture), expected)


@pytest.mark.parametrize("side", [224, 336])
@pytest.mark.parametrize("shape", [(225, 301), (640, 480), (100, 351), (224, 224), (336, 1)])
def test_pixels_are_those_of_open_clip_in_its_sizes(side, shape):
    picture = noise(*shape)
    assert torch.equal(MMGPTImageProcessor(size=side).pixels(picture), image_transform(side, is_train=False)(picture))


def test_other_means_and_deviations_are_used():
    mean, std = (0.5, 0.4, 0.3), (0.5, 0.25, 0.2)
    expected = image_transform(24, is_train=False, mean=mean, std=std)(noise(30, 40))
    assert torch.equal(MMGPTImageProcessor(size=24, image_mean=mean, image_std=std).pixels(noise(30, 40)), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_upright(tmp_path, orientation):
    upright, turn = noise(30, 40), Image.Transpose
    # How a camera stores an upright picture, by the orientation it notes down.
    stored = {
        1: upright,
        2: upright.transpose(turn.FLIP_LEFT_RIGHT),
        3: upright.transpose(turn.ROTATE_180),
        4: upright.transpose(turn.FLIP_TOP_BOTTOM),
        5: upright.transpose(turn.TRANSPOSE),
        6: upright.transpose(turn.ROTATE_90),
        7: upright.transpose(turn.TRANSVERSE),
        8: upright.transpose(turn.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    expected = MMGPTImageProcessor(size=24).pixels(upright)
    for source in (str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes(), Image.open(tmp_path / "a.png")):
        assert torch.equal(MMGPTImageProcessor(size=24).pixels(source), expected)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_arrays_equal_pictures(mode):
    picture = noise(40, 30, mode)
    processor = MMGPTImageProcessor(size=24)
    assert torch.equal(processor.pixels(np.asarray(picture)), processor.pixels(picture))


@pytest.mark.parametrize(
    "array", [np.zeros((4, 4, 3)), np.zeros((4, 4, 2), np.uint8), np.zeros((1, 4, 4, 3), np.uint8)]
)
def test_arrays_of_other_kinds_are_refused(array):
    with pytest.raises(ValueError, match="uint8"):
        MMGPTImageProcessor(size=24).pixels(array)


def test_the_picture_of_the_caller_stays_as_it_is():
    picture = noise(40, 30, "RGBA")
    before = picture.tobytes()
    MMGPTImageProcessor(size=24).pixels(picture)
    assert picture.mode == "RGBA" and picture.size == (40, 30) and picture.tobytes() == before


def test_one_picture_or_a_list_and_a_folder(tmp_path):
    processor = MMGPTImageProcessor(size=24, image_mean=(0.1, 0.2, 0.3))
    pictures = [noise(30, 40, seed=k) for k in range(2)]
    batch = processor(pictures)["pixel_values"]
    assert batch.shape == (2, 3, 24, 24)
    assert torch.equal(processor(pictures[1])["pixel_values"][0], batch[1])
    processor.save_pretrained(tmp_path)
    for load in (MMGPTImageProcessor, AutoImageProcessor):
        again = load.from_pretrained(tmp_path)
        assert type(again) is MMGPTImageProcessor
        assert torch.equal(again(pictures)["pixel_values"], batch)


def test_a_misspelt_argument_is_refused():
    with pytest.raises(ValueError, match="sise"):
        MMGPTImageProcessor(sise=24)

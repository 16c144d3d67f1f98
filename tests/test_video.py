"""Videos: which frames are taken from a file, what they become, and which files are refused."""

import io
import os
import random
import struct
import sys
import threading
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from processing_mmgpt import MMGPTCollator, MMGPTImageProcessor, MMGPTProcessor
from processing_mmgpt import videos_mmgpt as videos
from processing_mmgpt.data.annotations import read_record
from processing_mmgpt.messages_mmgpt import Video
from processing_mmgpt.videos_mmgpt import open_video


WIDTH, HEIGHT, RATE = 48, 32, 4


def film(target, times=None, form="mp4", count=12):
    """Write a video whose k-th frame has the grey 20 k; by default 4 frames a second for 3 seconds."""
    with av.open(target, "w", format=form) as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, RATE)
        for number in range(count) if times is None else range(len(times)):
            frame = av.VideoFrame.from_ndarray(
                np.full((HEIGHT, WIDTH, 3), 20 * number % 256, np.uint8), format="rgb24"
            )
            frame.pts = number if times is None else times[number]
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return target


@pytest.fixture
def clip(tmp_path):
    return film(str(tmp_path / "clip.mp4"))


def numbers(frames):
    """Which frames these are, by their grey."""
    return [round(np.asarray(frame).mean() / 20) for frame in frames]


def question(source, key="video"):
    return [{"role": "user", "content": [{"type": "video", key: source}, {"type": "text", "text": "What?"}]}]


# Which frames


@pytest.mark.parametrize(
    ("fps", "most", "expected"),
    [
        (1, None, [0, 4, 8]),
        (2, None, [0, 2, 4, 6, 8, 10]),
        (0.5, None, [0, 8]),
        (0.01, None, [0]),
        (8, None, [k // 2 for k in range(24)]),
        (3, None, [0, 1, 2, 4, 5, 6, 8, 9, 10]),
        (4, 3, [0, 4, 8]),
        (4, 5, [0, 2, 4, 7, 9]),
        (1, 2, [0, 6]),
        (1, 3, [0, 4, 8]),
        (1, 1, [0]),
    ],
)
def test_frames_at_a_rate_up_to_a_number(clip, fps, most, expected):
    assert numbers(open_video(clip, fps, most)) == expected


@pytest.mark.parametrize("form", ["mp4", "matroska", "avi", "mpegts"])
def test_containers_of_several_kinds_by_path_and_by_bytes(tmp_path, form):
    path = tmp_path / "clip"
    film(str(path), form=form)
    assert numbers(open_video(path)) == numbers(open_video(path.read_bytes())) == [0, 4, 8]


def test_a_frame_is_the_one_shown_at_the_time(tmp_path):
    uneven = film(str(tmp_path / "uneven.mp4"), times=[0, 1, 9, 10, 20])  # quarters of a second
    assert numbers(open_video(uneven)) == [0, 1, 1, 3, 3, 4]


def test_a_film_of_a_phone_is_turned_upright(clip, tmp_path):
    content = bytearray(open(clip, "rb").read())
    matrix = content.index(b"tkhd") + 4 + 40  # behind version, times, id, duration and layer
    quarter = (0, 1, 0, -1, 0, 0)
    for place, value in zip((0, 4, 8, 12, 16, 20), quarter, strict=True):
        content[matrix + place : matrix + place + 4] = struct.pack(">i", value << 16)
    frames = open_video(bytes(content))
    assert [frame.size for frame in frames] == [(HEIGHT, WIDTH)] * 3
    assert open_video(clip)[0].size == (WIDTH, HEIGHT)


def test_upright_is_the_way_players_turn(tmp_path):
    """A picture whose left half is white, with the matrix of a quarter turn clockwise: white is at the top."""
    path = tmp_path / "half.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=1)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        half = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        half[:, : WIDTH // 2] = 255
        container.mux(stream.encode(av.VideoFrame.from_ndarray(half, format="rgb24")))
        container.mux(stream.encode(None))
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 44
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, HEIGHT << 16, 0, 1 << 30)
    (frame,) = open_video(bytes(content))
    assert frame.size == (HEIGHT, WIDTH)
    upper, lower = np.asarray(frame)[: WIDTH // 2].mean(), np.asarray(frame)[WIDTH // 2 :].mean()
    assert upper > 200 and lower < 50


# What they become


@pytest.mark.parametrize("key", ["video", "path"])
def test_a_video_is_one_image_token_of_several_frames(processor, clip, draw, key):
    batch = processor.apply_chat_template(question(clip, key), tokenize=True, return_dict=True)
    assert draw(batch["input_ids"][0]).count("@") == 1 and "### Image:\n@" in draw(batch["input_ids"][0])
    assert batch["num_frames"].tolist() == [[3]] and batch["pixel_values"].shape[:3] == (1, 1, 3)
    expected = torch.stack([processor.image_processor.pixels(frame) for frame in open_video(clip)])
    assert torch.equal(batch["pixel_values"][0, 0], expected)


def test_a_list_of_frame_files_is_taken_as_it_is(processor, picture, tmp_path):
    paths = []
    for seed in range(10):  # more than `max_num_frames`
        paths.append(str(tmp_path / f"{seed}.png"))
        picture(seed).save(paths[-1])
    batch = processor.apply_chat_template(question(paths, "path"), tokenize=True, return_dict=True)
    assert batch["num_frames"].tolist() == [[10]]
    assert torch.equal(batch["pixel_values"][0, 0, 9], processor.image_processor.pixels(picture(9)))


def test_videos_pictures_and_text_in_one_batch(model, processor, clip, picture):
    image = [{"role": "user", "content": [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "a"}]}]
    text = [{"role": "user", "content": "a"}]
    inputs = processor.apply_chat_template(
        [question(clip), image, text],
        images=[None, [picture(0), clip], None],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
    )
    assert inputs["num_frames"].tolist() == [[3, 1], [1, 3], [1, 1]]
    direct = processor(
        ["a<image>", "<image>b<image>"],
        images=[{"type": "video", "video": clip}, picture(0), {"type": "video", "video": clip}],
        padding=True,
    )
    assert torch.equal(direct["pixel_values"], inputs["pixel_values"][:2])
    together = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    alone = processor.apply_chat_template(
        [image], images=[[picture(0), clip]], tokenize=True, return_dict=True, add_generation_prompt=True
    )
    ids = model.generate(**alone, max_new_tokens=4, do_sample=False)[:, alone["input_ids"].shape[1] :]
    assert torch.equal(ids[0], together[1])


def test_more_frames_than_the_model_has_embeddings_for(make_model, processor, clip):
    sizes = {"depth": 1, "num_heads": 2, "head_dim": 8, "num_latents": 4, "max_num_frames": 2}
    model = make_model(resampler=sizes)
    inputs = processor.apply_chat_template(question(clip), tokenize=True, return_dict=True)
    with pytest.raises(ValueError, match="Got 3 frames.*for 2"):
        model(**inputs)
    fitting = MMGPTProcessor(
        MMGPTImageProcessor(size=24, max_num_frames=model.config.resampler["max_num_frames"]), processor.tokenizer
    )
    inputs = fitting.apply_chat_template(question(clip), tokenize=True, return_dict=True)
    assert inputs["num_frames"].tolist() == [[2]] and model(**inputs).logits.isfinite().all()


def test_rate_and_number_are_saved_with_the_processor(processor, clip, tmp_path):
    MMGPTProcessor(MMGPTImageProcessor(24, video_fps=4, max_num_frames=10), processor.tokenizer).save_pretrained(
        tmp_path
    )
    again = MMGPTProcessor.from_pretrained(tmp_path)
    batch = again.apply_chat_template(question(clip), tokenize=True, return_dict=True)
    assert batch["num_frames"].tolist() == [[10]]
    for wrong in ({"video_fps": 0}, {"max_num_frames": 0}):
        with pytest.raises(ValueError, match="positive"):
            MMGPTImageProcessor(24, **wrong)


def test_a_record_with_a_video_is_learnt_from(model, processor, clip):
    answered = [*question(clip), {"role": "assistant", "content": "x"}]
    batch = MMGPTCollator(processor)([{"messages": answered, "images": []}])
    assert batch["num_frames"].tolist() == [[3]] and model(**batch).loss.isfinite()


def test_a_video_in_a_mixture_stays_below_its_root(tmp_path, clip):
    answered = {"role": "assistant", "content": "x"}
    found = read_record({"messages": [*question("clip.mp4"), answered]}, "messages", str(tmp_path), None)
    assert found["images"] == [Video(clip)] and len(found["messages"]) == 2
    for outside in ("../clip.mp4", "/etc/passwd", ["clip.mp4", "../x.png"], {"path": "/etc/passwd"}):
        with pytest.raises(ValueError, match="leaves the image root"):
            read_record({"messages": [*question(outside), answered]}, "messages", str(tmp_path), None)


# What is refused


@pytest.mark.parametrize("wrong", ["pipe", "folder", "/dev/zero"])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, wrong):
    path = tmp_path / wrong
    if wrong == "pipe":
        os.mkfifo(path)
        threading.Thread(target=lambda: open(path, "wb").close(), daemon=True).start()  # so that nobody waits for ever
    elif wrong == "folder":
        path.mkdir()
    with pytest.raises(ValueError, match="is no file|cannot be opened as a file"):
        open_video(str(path))


def test_a_video_of_too_many_or_too_large_frames_is_refused_before_any_is_decoded(clip, monkeypatch):
    monkeypatch.setattr(videos, "_frames_at", lambda *_: pytest.fail("a frame was decoded"))
    monkeypatch.setattr(videos, "MAX_FRAMES", 11)
    with pytest.raises(ValueError, match="clip.mp4.*more than the 11 frames"):
        open_video(clip)
    monkeypatch.setattr(videos, "MAX_PIXELS", WIDTH * HEIGHT - 1)
    with pytest.raises(ValueError, match="48 x 32 pixels"):
        open_video(clip)


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("form", ["mp4", "avi"])
def test_a_film_cut_short_is_refused_by_name(tmp_path, form, part):
    path = tmp_path / "cut"
    film(str(path), form=form, count=40)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(ValueError, match="cut cannot be read as a video"):
        open_video(path)


@pytest.mark.parametrize("form", ["mp4", "matroska", "avi"])
def test_a_film_with_wrong_bytes_is_read_or_refused_by_name(tmp_path, form):
    path, rng = tmp_path / "wrong", random.Random(0)
    film(str(path), form=form)
    content, outcomes = path.read_bytes(), set()
    for _ in range(60):
        wrong = bytearray(content)
        for _ in range(8):
            wrong[rng.randrange(len(wrong))] = rng.randrange(256)
        try:
            outcomes.add(len(open_video(bytes(wrong), 1, 8)) in range(1, 9))
        except ValueError as error:
            outcomes.add("video bytes cannot be read as a video" in str(error))
    assert outcomes == {True}


def test_a_rate_that_gives_too_many_frames_is_refused(clip):
    with pytest.raises(ValueError, match="more than the 108,000"):
        open_video(clip, fps=1e6)
    assert len(open_video(clip, fps=1e6, max_num_frames=2)) == 2


def test_what_is_no_video_is_named(tmp_path, picture, processor):
    (tmp_path / "words.mp4").write_text("no video")
    sound = tmp_path / "sound.mp4"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    for name, reason in (("words.mp4", "words.mp4 cannot be read"), ("sound.mp4", "no pictures")):
        with pytest.raises(ValueError, match=f"Row 0.*{reason}" if name == "words.mp4" else reason):
            processor(["<image>"], images=[{"type": "video", "video": str(tmp_path / name)}])
    with pytest.raises(FileNotFoundError):
        open_video(tmp_path / "missing.mp4")
    with pytest.raises(ValueError, match="Videos are not fetched from 'https://example.com/a.mp4'"):
        open_video("https://example.com/a.mp4")
    with pytest.raises(TypeError, match="int"):
        open_video(7)
    with pytest.raises(ValueError, match="at least one frame"):
        processor(["<image>"], images=[[[]]])


@pytest.mark.parametrize(
    "playlist",
    [
        "ffconcat version 1.0\nfile clip.mp4\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\nclip.mp4\n#EXT-X-ENDLIST\n",
    ],
)
def test_a_playlist_opens_no_other_file(clip, tmp_path, monkeypatch, playlist):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.mp4").write_text(playlist)
    with pytest.raises(ValueError, match="list.mp4 cannot be read as a video"):
        open_video("list.mp4")


def test_without_pyav_the_message_says_what_to_install(clip, processor, picture, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match="pip install av"):
        open_video(clip)
    assert processor(["<image>"], images=[[[picture(0), picture(1)]]])["num_frames"].tolist() == [[2]]


def test_a_picture_file_is_no_video_and_a_video_no_picture(clip, picture, processor):
    buffer = io.BytesIO()
    picture(0).save(buffer, "PNG")
    with pytest.raises(ValueError, match="video bytes cannot be read"):
        open_video(buffer.getvalue())
    with pytest.raises(ValueError, match="no picture of a format"):
        processor(["<image>"], images=[clip])
    assert isinstance(open_video(clip)[0], Image.Image)

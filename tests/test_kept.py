"""Tables that are kept: shared by processes, made anew or named where they are spoiled, and nothing done is lost."""

import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
from pathlib import Path

import datasets
import pytest
from test_latents import PIXELS, Encoder, equal, expected, kept, use_cache
from test_latents import _own_cache as _own_cache
from test_latents import source as pictures
from test_mixture import dolly, said
from torch.utils.data import get_worker_info

from processing_mmgpt import load_instruction_dataset
from processing_mmgpt.data import kept as kept_tables
from processing_mmgpt.data import latents as latent_tables
from processing_mmgpt.data import report
from processing_mmgpt.data.latents import keep_latents


LIMIT = 120


def texts(folder: Path, count: int = 200) -> dict:
    return {"sources": [{"reader": "dolly", "files": dolly(folder / "a.jsonl", count)}]}


def spoil(file: Path, rng: random.Random) -> None:
    """Cut a file, or turn a bit."""
    data = bytearray(file.read_bytes())
    at = rng.randrange(len(data))
    if rng.random() < 0.3:
        del data[at:]
    else:
        data[at] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def files_of(cache: Path, suffix: str) -> list[Path]:
    return sorted(file for file in cache.rglob(f"*{suffix}") if file.is_file())


@pytest.mark.parametrize("suffix", [".arrow", "dataset_info.json", "digests.json"])
def test_a_spoiled_table_of_records_is_made_anew(tmp_path, suffix):
    mixture, cache = texts(tmp_path), tmp_path / "cache"
    rows = [said(row) for row in load_instruction_dataset(mixture)]
    (file,) = files_of(cache, suffix)
    whole, rng = file.read_bytes(), random.Random(suffix)
    for _ in range(8):
        spoil(file, rng)
        assert [said(row) for row in load_instruction_dataset(mixture)] == rows
        assert file.read_bytes() == whole or suffix != ".arrow"
    file.unlink()
    assert [said(row) for row in load_instruction_dataset(mixture)] == rows


def test_a_whole_table_is_not_made_anew(tmp_path, monkeypatch):
    mixture = texts(tmp_path)
    rows = [said(row) for row in load_instruction_dataset(mixture)]
    monkeypatch.setattr(kept_tables.shutil, "rmtree", lambda *_: pytest.fail("made anew"))
    assert [said(row) for row in load_instruction_dataset(mixture)] == rows


def test_spoiled_latents_are_made_anew_or_named(tmp_path, monkeypatch):
    monkeypatch.setattr(latent_tables, "IMAGES_PER_TABLE", 3)
    monkeypatch.setattr(kept_tables, "HEAD", 600)
    cache, rng = tmp_path / "cache", random.Random(0)
    data = load_instruction_dataset({"sources": [pictures(tmp_path, 7)]})
    latents, encoded = kept(data)
    shutil.copytree(cache / "mmgpt_latents", tmp_path / "whole")
    named = 0
    for _ in range(40):
        file = files_of(cache / "mmgpt_latents", ".arrow")[1]
        spoil(file, rng)
        try:
            found, _ = kept(data)
        except RuntimeError as error:
            folder = Path(re.search(r"delete (\S+),", str(error))[1])
            assert file.is_relative_to(folder)
            shutil.rmtree(folder)  # as it says
            found, again = kept(data)
            assert again in (2, 3)  # of eight
            named += 1
        assert equal(found, latents)
        shutil.rmtree(cache / "mmgpt_latents")
        shutil.copytree(tmp_path / "whole", cache / "mmgpt_latents")
    assert encoded == 8 and named > 0


def load_at_once(cache: Path, mixture: dict, with_pictures: bool, start, results) -> None:
    use_cache(cache)
    datasets.disable_progress_bars()
    latent_tables.IMAGES_PER_TABLE = 3
    start.wait(LIMIT)
    data = load_instruction_dataset(mixture, seed=3)
    if with_pictures:
        latents, encoded = kept(data)
        results.put((encoded, [one.tolist() for row in latents for one in row]))
    else:
        results.put((0, [said(row) for row in data]))


@pytest.mark.parametrize("with_pictures", [False, True])
def test_processes_that_write_one_table_at_once_share_it(tmp_path, with_pictures):
    mixture = {"sources": [pictures(tmp_path, 40)]} if with_pictures else texts(tmp_path, 3_000)
    fork = multiprocessing.get_context("fork")
    start, results = fork.Barrier(3), fork.Queue()
    given = (tmp_path / "cache", mixture, with_pictures, start, results)
    processes = [fork.Process(target=load_at_once, args=given) for _ in range(3)]
    for process in processes:
        process.start()
    encoded, rows = zip(*(results.get(timeout=LIMIT) for _ in processes), strict=True)
    for process in processes:
        process.join(LIMIT)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert rows[0] == rows[1] == rows[2] and len(rows[0]) >= 40
    assert sum(encoded) == (41 if with_pictures else 0)  # each once, and the black one


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", Path("/proc/mmgpt")):
        use_cache(folder)
        with pytest.raises(OSError, match=f"cannot be kept in {folder}/mmgpt_annotations: .*HF_DATASETS_CACHE"):
            load_instruction_dataset(texts(tmp_path))


def test_a_killed_worker_is_said_and_whole_tables_are_kept(tmp_path, monkeypatch):
    """As the system kills one where memory runs out."""
    monkeypatch.setattr(latent_tables, "IMAGES_PER_TABLE", 3)
    data = load_instruction_dataset({"sources": [pictures(tmp_path, 8)]})
    load = latent_tables._load

    def die(reading, image_processor, places):
        if ("coco_caption", 4, 0) in places and get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return load(reading, image_processor, places)

    monkeypatch.setattr(latent_tables, "_load", die)
    with pytest.raises(RuntimeError, match="DataLoader worker .*(killed|exited)"):
        keep_latents(data, PIXELS, Encoder(), "one", num_workers=1)
    monkeypatch.setattr(latent_tables, "_load", load)
    latents, encoded = kept(data)
    assert encoded == 6 and equal(latents, expected(data))  # of nine; the first table was whole


def test_a_report_is_refused_before_the_work_where_it_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    given = ["report", "recipe.yaml", "--processor", "nowhere", "--output", str(tmp_path / "file" / "report")]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(OSError, match="file/report"):
        report.main()

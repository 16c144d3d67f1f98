"""The way of one record from a line of JSON to the loss: the files it enters are those that the page names."""

import re
import sys
from pathlib import Path

import torch
from conftest import BASE
from transformers import AutoModelForImageTextToText, AutoProcessor

from processing_mmgpt import MMGPTCollator, load_instruction_dataset


ROOT = Path(__file__).parents[1]
PACKAGES = tuple(f"{ROOT / name}/" for name in ("modeling_mmgpt", "processing_mmgpt"))


def entered(run) -> set[str]:
    """Names of the files of our packages in which a function is called while `run` runs."""
    files = set()

    def note(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGES):
            files.add(Path(frame.f_code.co_filename).stem)

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return files


def test_the_page_names_the_files_that_a_record_enters():
    model = AutoModelForImageTextToText.from_pretrained(BASE, dtype=torch.float32).train()
    processor = AutoProcessor.from_pretrained(BASE)

    def from_disk_to_loss():
        records = load_instruction_dataset(ROOT / "examples/records/records.jsonl", seed=0)
        batch = MMGPTCollator(processor)([records[0]])
        assert batch["pixel_values"].shape[:2] == (1, 1)
        assert model(**batch).loss.isfinite()

    files = entered(from_disk_to_loss)
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    way = page[page.index("## The way of a record") : page.index("## Which file to open")]
    assert f"enters {len(files)} files" in way
    assert files == set(re.findall(r"`(\w+)`", way))

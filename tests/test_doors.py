"""Every way of loading a published adapter, merged model and base, with our packages and without: docs/loading.md."""

import functools
import subprocess
import sys
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub
from test_hub import ROOT, ask_here, note, push, through
from tiny_world.evaluation import measured_with
from transformers import AutoProcessor, BitsAndBytesConfig


BASE = ROOT / "examples" / "tiny_world" / "base"
PAGE = ROOT / "docs" / "loading.md"
DOORS = {
    "auto_model": "`AutoModel.from_pretrained`",
    "auto_model_for_image_text_to_text": "`AutoModelForImageTextToText.from_pretrained`",
    "peft_model": "`PeftModel.from_pretrained(base, adapter)`",
    "pipeline_by_name": '`pipeline("image-text-to-text", repo)`, chat messages',
    "pipeline_of_parts": '`pipeline("image-text-to-text", model=, processor=)`',
    "text_iterator_streamer": "`TextIteratorStreamer`",
    "device_map_auto": '`device_map="auto"`',
    "disk_offload": "`device_map` with a part on `disk`",
    "pinned_revision": '`revision="first"`, after a later push',
    "offline": "`HF_HUB_OFFLINE=1`, from the cache",
    "four_bits": "`BitsAndBytesConfig(load_in_4bit=True)`",
}
TEXT = ("pipeline_by_name", "pipeline_of_parts", "text_iterator_streamer")
AS_THEY_ARE = ["model.vision_tower", "model.resampler", "lm_head"]
# Wide enough for bitsandbytes on a CPU, whose blocks of 64 must fit each row.
WIDE = {
    "text": {"hidden_size": 128, "intermediate_size": 128},
    "vision": {"width": 64, "head_width": 32},
    "cross_attention": {"num_heads": 2, "head_dim": 32},
}


@pytest.fixture(scope="module")
def folders(adapter, make_adapter, make_model, processor, tmp_path_factory) -> dict[str, Path]:
    """Folders by the name of their repository."""
    root = tmp_path_factory.mktemp("folders")
    make_model(**WIDE).save_pretrained(root / "wide-base")
    processor.save_pretrained(root / "wide-base")
    found = {"base": BASE, "adapter": adapter, "wide-base": root / "wide-base"}
    found["wide-adapter"] = make_adapter(root / "wide-base", root / "wide-adapter")
    for name in ("adapter", "wide-adapter"):
        merged = name.replace("adapter", "merged")
        command = [sys.executable, ROOT / "examples" / "merge_adapter.py", found[name], root / merged]
        subprocess.run([*map(str, command), "--dtype", "float32"], cwd=ROOT, check=True, capture_output=True)
        found[merged] = root / merged
    return found


@functools.cache
def expected(door: str, folder: Path, scene: Path) -> list[int] | str:
    """What the local folder writes."""
    four_bits = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=AS_THEY_ARE)
    ids = ask_here(folder, scene, **({"quantization_config": four_bits} if door == "four_bits" else {}))
    return AutoProcessor.from_pretrained(folder).decode(ids, skip_special_tokens=True) if door in TEXT else ids


def answers(hub: LoopbackHub, home: Path, kind: str, packages: str, scene: Path) -> dict[str, list[int] | str]:
    """What every door gives that needs no later push."""
    online = [door for door in DOORS if door not in ("pinned_revision", "offline", "four_bits")]
    if kind != "adapter":
        online.remove("peft_model")
    found = through(hub, home, f"someone/{kind}", packages, scene, *online)
    found |= through(hub, home, f"someone/wide-{kind}", packages, scene, "four_bits")
    asked, plain = len(hub.requests), "auto_model_for_image_text_to_text"
    found["offline"] = through(hub, home, f"someone/{kind}", packages, scene, plain, HF_HUB_OFFLINE="1")[plain]
    assert len(hub.requests) == asked
    return found


@pytest.mark.bars
def test_every_door_of_every_kind_gives_the_same_tokens(folders, make_adapter, scene, tmp_path):
    pytest.importorskip("bitsandbytes")
    cells = [(kind, packages) for kind in ("adapter", "merged", "base") for packages in ("with", "without")]
    homes = {cell: tmp_path / "-".join(cell) for cell in cells}
    found = {}
    with LoopbackHub() as hub:
        push(hub, tmp_path, *([folder, f"someone/{name}"] for name, folder in folders.items()))
        for cell, home in homes.items():
            home.mkdir()
            found |= {(door, *cell): said for door, said in answers(hub, home, *cell, scene).items()}
        for repo in hub.repos.values():
            repo.refs["refs/tags/first"] = repo.refs["refs/heads/main"]
        later = make_adapter(BASE, tmp_path / "later", seed=2)
        push(hub, tmp_path, *([later, f"someone/{kind}"] for kind in ("adapter", "merged", "base")))
        for (kind, packages), home in homes.items():
            said = through(hub, home, f"someone/{kind}", packages, scene, "pinned_revision")
            found["pinned_revision", kind, packages] = said["pinned_revision"]
    right = {}
    for (door, kind, packages), said in found.items():
        folder = folders[f"wide-{kind}" if door == "four_bits" else kind]
        right[door, kind, packages] = said == expected(door, folder, scene)
    write_page(right, cells)
    note(doors={"cells": len(right), "right": sum(right.values())})
    assert len(right) == 62 and all(right.values()), [cell for cell, good in right.items() if not good]


def write_page(right: dict[tuple[str, str, str], bool], cells: list[tuple[str, str]]) -> None:
    """Put the table into docs/loading.md, between its two comments."""
    head = " | ".join(f"{kind}, {packages}" for kind, packages in cells)
    rows = [f"| way | {head} |", "|---" * (1 + len(cells)) + "|"]
    marks = {True: "same", False: "**other**", None: "-"}
    for door, name in DOORS.items():
        rows.append(" | ".join([f"| {name}", *(marks[right.get((door, *cell))] for cell in cells)]) + " |")
    by = measured_with("pytest -m bars tests/test_doors.py")
    rows += ["", f"`{by['command']}`, {by['date']}; {by['machine']}; {by['versions']}."]
    before, _, rest = PAGE.read_text().partition("<!-- table -->")
    _, _, after = rest.partition("<!-- end of table -->")
    PAGE.write_text(f"{before}<!-- table -->\n" + "\n".join(rows) + f"\n<!-- end of table -->{after}")

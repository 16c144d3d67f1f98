"""The staged folder, loaded for real in a process that cannot import our packages."""

import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import push_to_hub
from modeling_mmgpt.adapters_mmgpt import lora_config


BASE = Path(__file__).parents[1] / "examples" / "tiny_world" / "base"
ANSWER = """
import sys
for name in ("modeling_mmgpt", "processing_mmgpt"):
    sys.modules[name] = None  # importing it raises
import torch
from PIL import Image
from transformers import {auto}, AutoProcessor
model = {auto}.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
content = [{{"type": "image", "path": sys.argv[2]}}, {{"type": "text", "text": "Where?"}}]
messages = [{{"role": "user", "content": content}}]
inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
print("IDS", model.generate(**inputs, max_new_tokens=12, do_sample=False)[0].tolist())
"""


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.linear_gradient("L").resize((48, 48)).convert("RGB").save(path)
    return path


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """An adapter of the shipped base, with weights that change what it says."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(BASE, dtype=torch.float32)
    tuned = peft.get_peft_model(model, lora_config(model, r=4))
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    tuned.save_pretrained(folder)
    AutoProcessor.from_pretrained(BASE).save_pretrained(folder)
    return folder


def ids_here(folder: Path, picture: Path) -> list[int]:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image", "path": str(picture)}, {"type": "text", "text": "Where?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, add_generation_prompt=True
    )
    return model.generate(**inputs, max_new_tokens=12, do_sample=False)[0].tolist()


def ids_without_packages(folder: Path, picture: Path, home: Path, auto: str) -> list[int]:
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-P", "-c", ANSWER.format(auto=auto), str(folder), str(picture)],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.split("IDS ")[1])


@pytest.mark.parametrize("auto", ["AutoModelForImageTextToText", "AutoModel"])
def test_a_staged_adapter_gives_the_same_tokens_without_our_packages(adapter, picture, tmp_path, auto):
    push_to_hub.stage(adapter, "someone/adapter", tmp_path / "staged")
    here = ids_here(adapter, picture)
    assert here != ids_here(BASE, picture)  # else the adapter's absence would not be seen
    assert ids_without_packages(tmp_path / "staged", picture, tmp_path, auto) == here


def test_a_staged_model_gives_the_same_tokens_without_our_packages(picture, tmp_path):
    push_to_hub.stage(BASE, "someone/base", tmp_path / "staged")
    there = ids_without_packages(tmp_path / "staged", picture, tmp_path, "AutoModelForImageTextToText")
    assert there == ids_here(BASE, picture)


def test_the_base_is_named_by_what_others_can_load(adapter, tmp_path):
    push_to_hub.stage(adapter, "someone/adapter", tmp_path / "whole")
    assert (
        json.loads((tmp_path / "whole/adapter_config.json").read_text())["base_model_name_or_path"]
        == "someone/adapter"
    )
    push_to_hub.stage(adapter, "someone/adapter", tmp_path / "alone", base_model="someone/base")
    assert (
        json.loads((tmp_path / "alone/adapter_config.json").read_text())["base_model_name_or_path"] == "someone/base"
    )
    assert not (tmp_path / "alone/model.safetensors").exists()
    assert "someone/base" in (tmp_path / "alone/README.md").read_text()
    assert str(tmp_path) not in (tmp_path / "alone/adapter_config.json").read_text()


def test_a_base_that_is_gone_stops_the_staging_and_leaves_nothing(adapter, tmp_path):
    source = tmp_path / "adapter"
    source.mkdir()
    for file in adapter.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/nowhere/base"
    (source / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match="/nowhere/base"):
        push_to_hub.stage(source, "someone/adapter", tmp_path / "staged")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_a_folder_without_weights_or_processor_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="adapter_config.json nor config.json"):
        push_to_hub.stage(tmp_path, "someone/nothing", tmp_path / "staged")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="processor_config.json"):
        push_to_hub.stage(tmp_path, "someone/nothing", tmp_path / "staged")


def test_nothing_but_what_is_named_is_staged(adapter, tmp_path):
    source = tmp_path / "adapter"
    source.mkdir()
    for file in adapter.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    (source / "optimizer.pt").write_bytes(b"state")
    (source / ".env").write_text("HF_TOKEN=secret")
    push_to_hub.stage(source, "someone/adapter", tmp_path / "staged")
    staged = {path.name for path in (tmp_path / "staged").iterdir()}
    assert not staged & {"optimizer.pt", ".env"}
    assert {"adapter_model.safetensors", "processor_config.json", "modeling_mmgpt.py", "README.md"} <= staged

"""The staged folder, loaded for real in a process that cannot import our packages."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.dynamic_module_utils import get_relative_import_files

import push_to_hub


BASE = Path(__file__).parents[1] / "examples" / "tiny_world" / "base"
ANSWER = """
import sys
for name in ("modeling_mmgpt", "processing_mmgpt"):
    sys.modules[name] = None  # importing it raises
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
content = [{"type": "image", "path": sys.argv[2]}, {"type": "text", "text": "Where?"}]
messages = [{"role": "user", "content": content}]
inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
print("IDS", model.generate(**inputs, max_new_tokens=12, do_sample=False)[0].tolist())
"""


# What lies flat in a package is remote code: it travels. The entry files, and what lies flat without being any.
FLAT = {
    "processing_mmgpt": (("processing_mmgpt.py", "image_processing_mmgpt.py"), {"__init__.py"}),
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("package", FLAT)
def test_the_flat_files_of_a_package_are_its_remote_code(package):
    entries, exceptions = FLAT[package]
    folder = Path(__file__).parents[1] / package
    needed = {folder / entry for entry in entries}
    needed |= {Path(file) for entry in entries for file in get_relative_import_files(folder / entry)}
    assert set(folder.glob("*.py")) == needed | {folder / name for name in exceptions}


def ids_here(folder: Path, scene: Path) -> list[int]:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image", "path": str(scene)}, {"type": "text", "text": "Where?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, add_generation_prompt=True
    )
    return model.generate(**inputs, max_new_tokens=12, do_sample=False)[0].tolist()


def ids_without_packages(folder: Path, scene: Path, home: Path) -> list[int]:
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-P", "-c", ANSWER, str(folder), str(scene)],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.split("IDS ")[1])


def test_a_staged_adapter_gives_the_same_tokens_without_our_packages(adapter, scene, tmp_path):
    push_to_hub.stage(adapter, "someone/adapter", tmp_path / "staged")
    here = ids_here(adapter, scene)
    assert here != ids_here(BASE, scene)  # else the adapter's absence would not be seen
    assert ids_without_packages(tmp_path / "staged", scene, tmp_path) == here


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


def copy_of(adapter: Path, tmp_path: Path, **changes) -> Path:
    """A copy of the adapter, with other values in its config."""
    source = Path(shutil.copytree(adapter, tmp_path / "source"))
    config = json.loads((source / "adapter_config.json").read_text())
    (source / "adapter_config.json").write_text(json.dumps(config | changes))
    return source


def test_the_commit_of_the_base_is_kept_and_may_be_given(adapter, tmp_path):
    source = copy_of(adapter, tmp_path, base_model_name_or_path="someone/base", revision="a" * 40)
    for given, expected in ((None, "a" * 40), ("b" * 40, "b" * 40)):
        push_to_hub.stage(source, "someone/adapter", tmp_path / "staged", base_revision=given)
        assert json.loads((tmp_path / "staged/adapter_config.json").read_text())["revision"] == expected
        assert f'from_pretrained("someone/base", revision="{expected}"' in (tmp_path / "staged/README.md").read_text()


def test_a_base_that_is_gone_stops_the_staging_and_leaves_nothing(adapter, tmp_path):
    source = copy_of(adapter, tmp_path, base_model_name_or_path="/nowhere/base")
    with pytest.raises(FileNotFoundError, match="/nowhere/base"):
        push_to_hub.stage(source, "someone/adapter", tmp_path / "staged")
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_a_folder_without_weights_or_processor_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="adapter_config.json nor config.json"):
        push_to_hub.stage(tmp_path, "someone/nothing", tmp_path / "staged")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="processor_config.json"):
        push_to_hub.stage(tmp_path, "someone/nothing", tmp_path / "staged")


def test_nothing_but_what_is_named_is_staged_and_the_rest_is_listed(adapter, tmp_path, monkeypatch, capsys):
    source = copy_of(adapter, tmp_path)
    (source / "optimizer.pt").write_bytes(b"state")
    (source / ".env").write_text("HF_TOKEN=secret")
    (source / "checkpoint-10").mkdir()
    staged = tmp_path / "staged"
    monkeypatch.setattr("sys.argv", ["push_to_hub.py", str(source), "someone/adapter", "--staging", str(staged)])
    push_to_hub.main()
    printed = capsys.readouterr().out
    files = {path.name for path in staged.iterdir()}
    assert not files & {"optimizer.pt", ".env", "checkpoint-10"}
    assert {"adapter_model.safetensors", "processor_config.json", "modeling_mmgpt.py", "README.md"} <= files
    for name in ("optimizer.pt", ".env", "checkpoint-10/"):
        assert f"not published  {name}\n" in printed
    for file in staged.iterdir():
        assert f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" in printed
    assert "Nothing was uploaded" in printed


@pytest.mark.parametrize(
    ("kind", "secret"),
    [
        ("a Hugging Face token", "hf_" + "a" * 34),
        ("an OpenAI key", "sk-proj-" + "b" * 40),
        ("a GitHub token", "ghp_" + "c" * 36),
        ("an AWS key", "AKIA" + "D" * 16),
        ("a private key", "-----BEGIN OPENSSH PRIVATE KEY-----"),
    ],
)
def test_a_secret_in_a_published_file_stops_the_staging(adapter, tmp_path, kind, secret):
    source = copy_of(adapter, tmp_path)
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(config | {"token": secret}))
    with pytest.raises(ValueError, match=f"tokenizer_config.json holds {kind}") as caught:
        push_to_hub.stage(source, "someone/adapter", tmp_path / "staged")
    assert secret not in str(caught.value) and not (tmp_path / "staged").exists()


def test_no_path_of_this_machine_is_published(tmp_path):
    source = Path(shutil.copytree(BASE, tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["_name_or_path"] = str(tmp_path / "llama")
    (source / "config.json").write_text(json.dumps(config))
    push_to_hub.stage(source, "someone/base", tmp_path / "staged")
    published = (file for file in (tmp_path / "staged").iterdir() if file.suffix != ".safetensors")
    assert not any(str(tmp_path) in file.read_text() for file in published)


REPORT = {
    "training": {"steps": 500, "learning rate": 0.002},
    "data": {"colour": 400, "sums": 1200},
    "command": "python examples/quickstart.py --seed 1",
    "protocol": "exact match of the whole greedy reply",
    "versions": "torch 2.15.0",
    "dataset": "Tiny world",
    "skills": {"colour": {"accuracy": 0.995, "low": 0.98, "high": 0.999, "n": 400}, "captions": {"cider": 84.25}},
}


def test_the_card_says_what_happened_and_is_valid(adapter, tmp_path):
    source = copy_of(adapter, tmp_path)
    (source / "report.json").write_text(json.dumps(REPORT))
    push_to_hub.stage(source, "someone/adapter", tmp_path / "staged", base_model="someone/base", licence="apache-2.0")
    card = ModelCard.load(tmp_path / "staged" / "README.md")
    results = {result.dataset_config: (result.metric_type, result.metric_value) for result in card.data.eval_results}
    assert results == {"colour": ("accuracy", 0.995), "captions": ("cider", 84.25)}
    assert (card.data.license, card.data.base_model) == ("apache-2.0", "someone/base")
    weights = load_file(adapter / "adapter_model.safetensors")
    said = (
        f"r = 4, alpha = 16; {sum(tensor.numel() for tensor in weights.values()):,} weights",
        "`attn.to_kv`, `attn.to_out`, `attn.to_q`, `ff.1`, `ff.3`, `self_attn.k_proj`",
        "in the mode `preceding`",
        "### Image:\n<image>\n\n### Instruction:\nWhat is in the picture?",
        "steps: 500, learning rate: 0.002.",
        "| sums | 1,200 |\n| in all | 1,600 |",
        "exact match of the whole greedy reply; torch 2.15.0.\n\n```\npython examples/quickstart.py --seed 1\n```",
        "| colour | accuracy | 0.995 | 0.98 .. 0.999 | 400 |\n| captions | cider | 84.25 |  |  |",
    )
    for sentence in said:
        assert sentence in card.text, sentence


def test_a_card_without_a_report_claims_nothing(adapter, tmp_path):
    push_to_hub.stage(adapter, "someone/adapter", tmp_path / "staged")
    card = ModelCard.load(tmp_path / "staged" / "README.md")
    assert card.data.eval_results is None and card.data.license is None
    assert "## Results" not in card.text and "## Training" not in card.text
    assert "does not state a licence" in card.text


def test_the_licence_is_that_of_the_base(adapter, tmp_path):
    base = Path(shutil.copytree(BASE, tmp_path / "base"))
    (base / "README.md").write_text("---\nlicense: mit\n---\n# Base\n")
    source = copy_of(adapter, tmp_path, base_model_name_or_path=str(base))
    push_to_hub.stage(source, "someone/adapter", tmp_path / "staged")
    assert ModelCard.load(tmp_path / "staged" / "README.md").data.license == "mit"

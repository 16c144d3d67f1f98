"""The staged folder, loaded for real in a process that cannot import our packages."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import note_results
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.dynamic_module_utils import get_relative_import_files

import push_to_hub


BASE = Path(__file__).parents[1] / "examples" / "tiny_world" / "base"
TOKEN = "hf_" + "a" * 34
SECRETS = {  # spelled apart, so that nobody takes this file for a leak
    "an Anthropic key": "sk-" + "ant-api03-" + "e" * 40,
    "a GitLab token": "glpat" + "-" + "f" * 20,
    "a Google key": "AIza" + "g" * 35,
    "a Slack token": "xoxb" + "-1234567890-abcdef",
    "a Stripe key": "sk_" + "live_" + "h" * 24,
    "an npm token": "npm" + "_" + "i" * 36,
    "a PyPI token": "pypi" + "-" + "j" * 60,
    "a Weights & Biases key": "wandb" + "_v1_" + "k" * 30,
    "a web token": "eyJ" + "l" * 20 + ".eyJ" + "m" * 20 + ".n",
    "a password in an address": "https://someone:" + "secret@example.org",
    "a secret of the environment": "WANDB_API_KEY=" + "0123456789abcdef",
}
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
    "modeling_mmgpt": (("modeling_mmgpt.py",), {"__init__.py", "adapters_mmgpt.py", "converting_mmgpt.py"}),
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


def test_an_adapter_that_does_not_fit_its_base_stops_the_staging(adapter, tmp_path):
    copy = copy_of(adapter, tmp_path)
    weights = load_file(copy / "adapter_model.safetensors")
    weights[min(weights)].fill_(torch.nan)
    save_file(weights, copy / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="does not fit its base: weights are 1 not finite"):
        push_to_hub.stage(copy, "someone/adapter", tmp_path / "staged")
    assert not (tmp_path / "staged").exists()


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
        *SECRETS.items(),
    ],
)
def test_a_secret_in_a_published_file_stops_the_staging(adapter, tmp_path, kind, secret):
    source = copy_of(adapter, tmp_path)
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(config | {"token": secret}))
    with pytest.raises(ValueError, match=f"tokenizer_config.json holds {kind}") as caught:
        push_to_hub.stage(source, "someone/adapter", tmp_path / "staged")
    assert secret not in str(caught.value) and not (tmp_path / "staged").exists()


def staged(source: Path, tmp_path: Path, **options) -> Path:
    push_to_hub.stage(source, "someone/adapter", tmp_path / "staged", **{"base_model": "someone/base", **options})
    return tmp_path / "staged"


@pytest.mark.parametrize(
    "report",
    [
        {"command": f"accelerate launch examples/train_sft.py --hub_token {TOKEN}"},
        {"training": {"hub_token": TOKEN}},
        {"training": {"arguments": [{"hub": ["x", TOKEN]}]}},
        {"data": {TOKEN: 1}},
        {"skills": {TOKEN: {"accuracy": 1.0}}},
    ],
)
def test_a_secret_of_the_report_stops_the_card(adapter, tmp_path, report):
    source = copy_of(adapter, tmp_path)
    (source / "report.json").write_text(json.dumps({"skills": {"colour": {"accuracy": 1.0}}} | report))
    with pytest.raises(ValueError, match="README.md holds a Hugging Face token"):
        staged(source, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_a_secret_in_the_metadata_of_weights_stops_the_staging(adapter, tmp_path):
    source = copy_of(adapter, tmp_path)
    weights = load_file(source / "adapter_model.safetensors")
    save_file(weights, source / "adapter_model.safetensors", metadata={"format": "pt", "run": f'["\n{TOKEN}"]'})
    with pytest.raises(ValueError, match="adapter_model.safetensors holds a Hugging Face token"):
        staged(source, tmp_path)


def test_bytes_behind_the_weights_are_refused(adapter, tmp_path):
    source = copy_of(adapter, tmp_path)
    with (source / "adapter_model.safetensors").open("ab") as file:
        file.write(TOKEN.encode())
    with pytest.raises(SafetensorError, match="not fully covered"):
        staged(source, tmp_path)
    assert not (tmp_path / "staged").exists()


def test_a_secret_in_the_name_of_a_file_stops_the_staging(tmp_path):
    source = Path(shutil.copytree(BASE, tmp_path / "source"))
    shutil.copy(source / "model.safetensors", source / f"model-{TOKEN}.safetensors")
    with pytest.raises(ValueError, match="The name of file .* holds a Hugging Face token") as caught:
        push_to_hub.stage(source, "someone/base", tmp_path / "staged")
    assert TOKEN not in str(caught.value)


def test_a_secret_behind_an_escape_is_seen(adapter, tmp_path):
    source = copy_of(adapter, tmp_path, note=["first line\nsk-" + "p" * 40])
    with pytest.raises(ValueError, match="adapter_config.json holds an OpenAI key"):
        staged(source, tmp_path)


def test_only_the_files_of_a_tokenizer_go_along_binary_ones_too(adapter, tmp_path):
    source = copy_of(adapter, tmp_path)
    (source / "tokenizer_notes.txt").write_text("for me alone")
    (source / "tokenizer_old").mkdir()
    (source / "tokenizer.model").write_bytes(b"\x0a\xff\xfe\x80")
    files = {path.name for path in staged(source, tmp_path).iterdir()}
    assert "tokenizer.model" in files and not files & {"tokenizer_notes.txt", "tokenizer_old"}
    left = push_to_hub.left_behind(source, tmp_path / "staged")
    assert {"tokenizer_notes.txt", "tokenizer_old/"} <= set(left)


def test_a_secret_in_a_binary_file_stops_the_staging(adapter, tmp_path):
    source = copy_of(adapter, tmp_path)
    (source / "tokenizer.model").write_bytes(b"\x0a\xff\xfe" + TOKEN.encode() + b"\x80")
    with pytest.raises(ValueError, match="tokenizer.model holds a Hugging Face token"):
        staged(source, tmp_path)


def test_a_link_is_followed_within_the_folder_alone(adapter, tmp_path):
    source = copy_of(adapter, tmp_path)
    (source / "inside").write_bytes(b"pieces")
    (source / "tokenizer.model").symlink_to(source / "inside")
    assert not (staged(source, tmp_path) / "tokenizer.model").is_symlink()
    (tmp_path / "private").write_text("for me alone")
    (source / "tokenizer.model").unlink()
    (source / "tokenizer.model").symlink_to(tmp_path / "private")
    with pytest.raises(ValueError, match="tokenizer.model is a link out of .*source, to .*private"):
        staged(source, tmp_path)


def test_names_of_folders_are_emptied_in_lists_too(adapter, tmp_path):
    paths = {"_name_or_path": str(tmp_path / "one")}
    source = copy_of(adapter, tmp_path, parts=[paths, [paths]], name_or_path=[str(tmp_path / "two"), "someone/base"])
    config = json.loads((staged(source, tmp_path) / "adapter_config.json").read_text())
    emptied = {"_name_or_path": ""}
    assert (config["parts"], config["name_or_path"]) == ([emptied, [emptied]], ["", "someone/base"])


def test_a_path_that_nobody_can_empty_stops_the_staging(adapter, tmp_path):
    source = copy_of(adapter, tmp_path)
    for path in (Path.home() / "data", Path.cwd() / "data", source / "data"):
        (source / "report.json").write_text(json.dumps({"training": {"data": str(path)}}))
        with pytest.raises(ValueError, match="README.md holds a path of this machine"):
            staged(source, tmp_path)


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


def test_a_push_that_breaks_off_says_what_is_public(monkeypatch, tmp_path):
    def cut(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(push_to_hub.HfApi, "create_repo", lambda *args, **kwargs: None)
    monkeypatch.setattr(push_to_hub.HfApi, "list_repo_files", lambda *args, **kwargs: [])
    monkeypatch.setattr(push_to_hub.HfApi, "create_commit", cut)
    with pytest.raises(KeyboardInterrupt) as caught:
        push_to_hub.upload(tmp_path, "someone/adapter")
    assert "whole or not at all: see https://huggingface.co/someone/adapter/commits/main" in caught.value.__notes__[0]


def test_the_message_of_the_commit_is_looked_at(tmp_path):
    with pytest.raises(ValueError, match="message or the name of the branch holds a Hugging Face token"):
        push_to_hub.upload(tmp_path, "someone/adapter", message=f"With {TOKEN}")


# The bar


def hide(source: Path, secret: str, place: str, rng: random.Random) -> None:
    """Put a secret into one place of a folder."""
    nested = rng.choice([secret, [secret], {"a": [0, {"b": f"x {secret}"}]}, {secret: 1}, f"one\n{secret}"])
    if place == "report":
        keys = ("command", "protocol", "date", "machine", "versions", "training", "data", "skills", "dataset")
        key = rng.choice(keys)
        values = {"training": {"hub": nested}, "data": {secret: 1}, "skills": {secret: {"accuracy": 0.5}}}
        text = f"{rng.choice(['', 'python x.py --token '])}{secret}"
        report = {"skills": {"colour": {"accuracy": 0.5}}} | {key: values.get(key, text)}
        (source / "report.json").write_text(json.dumps(report))
    elif place == "metadata":
        weights = load_file(source / "adapter_model.safetensors")
        metadata = rng.choice([{"run": secret}, {secret: "run"}, {"run": json.dumps(nested)}])
        save_file(weights, source / "adapter_model.safetensors", metadata=metadata)
    elif place == "tensor name":
        weights = load_file(source / "adapter_model.safetensors")
        save_file({**weights, f"base_model.model.{secret}": torch.zeros(1)}, source / "adapter_model.safetensors")
    elif place == "tail":
        with (source / "adapter_model.safetensors").open("ab") as file:
            file.write(secret.encode())
    elif place == "config":
        path = source / rng.choice(["adapter_config.json", "tokenizer_config.json", "processor_config.json"])
        path.write_text(json.dumps(json.loads(path.read_text()) | {"note": nested}))
    elif place == "vocabulary":
        contents = json.loads((source / "tokenizer.json").read_text())
        contents["model"]["vocab"].append([rng.choice([secret, f"word {secret}", f"\n{secret}"]), 0.0])
        (source / "tokenizer.json").write_text(json.dumps(contents))
    elif place == "template":
        with (source / "chat_template.jinja").open("a") as file:
            file.write(f"{{# {secret} #}}")
    elif place == "binary":
        (source / "tokenizer.model").write_bytes(rng.randbytes(40) + secret.encode() + rng.randbytes(40))
    elif place == "other file":
        (source / rng.choice(["tokenizer_notes.txt", ".env", "special_tokens_map.json.bak"])).write_text(secret)
    elif place == "name":
        (source / rng.choice([f"tokenizer_{secret}", f"model-{secret}.safetensors", secret])).write_text("x")
    else:  # a link
        (source.parent / "private").write_text(secret)
        name = rng.choice(["tokenizer.model", "special_tokens_map.json", "tokenizer_link", "generation_config.json"])
        (source / name).symlink_to(source.parent / "private")


PLACES = ("report", "metadata", "tensor name", "tail", "config", "vocabulary", "template", "binary", "other file")
PLACES += ("name", "link")


@pytest.mark.bars
def test_no_secret_is_staged_in_silence(adapter, tmp_path, count=1000):
    secrets = [TOKEN, "AKIA" + "D" * 16, "ghp_" + "c" * 36, "sk-proj-" + "b" * 40]
    secrets += [secret for secret in SECRETS.values() if "/" not in secret]  # no file has a name with one
    refused, silent = Counter(), Counter()
    for number in range(count):
        rng = random.Random(number)
        place, secret = PLACES[number % len(PLACES)], rng.choice(secrets)
        folder = tmp_path / str(number)
        folder.mkdir()
        source = copy_of(adapter, folder)
        hide(source, secret, place, rng)
        try:
            out = staged(source, folder)
        except (ValueError, SafetensorError) as error:
            assert secret not in str(error), (number, place)
            assert {path.name for path in folder.iterdir()} <= {"source", "private"}, (number, place)
            refused[place] += 1
        else:
            public = [part for file in out.iterdir() for part in (file.name.encode(), file.read_bytes())]
            assert not any(secret.encode() in part for part in public), (number, place)
            silent[place] += 1
        shutil.rmtree(folder)
    assert sum(refused.values()) > count * 0.7
    note_results("push_to_hub", {"folders": count, "refused": dict(refused), "left behind": dict(silent), "leaked": 0})

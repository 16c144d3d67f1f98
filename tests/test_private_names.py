"""Private names of our dependencies: which are left, and that none is needed to import, load and generate."""

import os
import subprocess
import sys

import pytest
from conftest import BASE
from private_names import ROOT, private_names

from push_to_hub import stage


# Name -> what goes without it. A new one does not come in: find the public way, or argue for a line here.
ALLOWED = {
    # Read or called by transformers on every model class; without them its defaults hold.
    "_attn_implementation": "attention is sdpa",
    "_can_compile_fullgraph": "a compiled forward of transformers' own loop",
    "_init_weights": "fresh resamplers and towers are drawn as LMs draw theirs",
    "_no_split_modules": "device_map",
    "_supports_attention_backend": "continuous batching",
    "_supports_sdpa": "attention is eager",
    "_tied_weights_keys": "PEFT's way to follow a tie",
    # Joining a tower and an LM: transformers would draw their weights anew.
    "_is_hf_initialized": "from_vision_text_pretrained",
    # Publishing: which files are remote code is transformers' rule.
    "get_relative_import_files": "push_to_hub.py",
    # Templates.
    "render_jinja_template": "the tiny world, to find the words of its template",
    # Measurements.
    "add_fused_lm_head": "benchmark.py",
    "local_torch_dtype": "benchmark.py",
    "_dynamo": "compile_parts, benchmark.py",
}


@pytest.fixture(scope="module")
def folders(adapter, tmp_path_factory):
    """The base and an adapter as they lie here, and the base as it is staged for the Hub with its code."""
    staged = tmp_path_factory.mktemp("staged") / "base"
    stage(BASE, "someone/base", staged)
    return {"packages": [BASE, adapter], "remote": [staged]}


def generated(names, how, folders, picture, tmp_path) -> list[str]:
    """The ids that a process of its own generates from each folder, with some names hidden from our files."""
    command = [sys.executable, ROOT / "tests" / "private_names.py", ",".join(names), how, picture, *folders]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "PYTHONSAFEPATH": "1", "PYTHONPATH": ""}
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [line for line in done.stdout.splitlines() if line.startswith("IDS")]


@pytest.fixture(scope="module")
def expected(folders, scene, tmp_path_factory):
    """The ids of base and adapter with nothing hidden."""
    return generated((), "packages", folders["packages"], scene, tmp_path_factory.mktemp("plain"))


def test_no_private_name_has_come_in():
    found = private_names()
    assert set(found) == set(ALLOWED), {name: sorted(files) for name, files in found.items() if name not in ALLOWED}


def test_with_all_of_them_hidden_base_and_adapter_generate_the_same(folders, expected, scene, tmp_path):
    assert generated(ALLOWED, "packages", folders["packages"], scene, tmp_path) == expected
    assert generated(ALLOWED, "remote", folders["remote"], scene, tmp_path) == expected[:1]


@pytest.mark.bars
@pytest.mark.parametrize("name", ALLOWED)
def test_with_one_of_them_hidden_base_and_adapter_generate_the_same(folders, expected, scene, tmp_path, name):
    assert generated([name], "packages", folders["packages"], scene, tmp_path) == expected
    assert generated([name], "remote", folders["remote"], scene, tmp_path) == expected[:1]

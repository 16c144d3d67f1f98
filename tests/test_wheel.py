"""The wheel and the sdist: what is in them, and that the wheel is enough outside of the repository."""

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from urllib.request import Request, urlopen

import pytest


ROOT = Path(__file__).parents[1]
SOURCES = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "modeling_mmgpt", "processing_mmgpt")
ANSWER = """
import sys, modeling_mmgpt, processing_mmgpt
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
processor = processing_mmgpt.MMGPTProcessor(AutoProcessor.from_pretrained(sys.argv[1]).image_processor,
    AutoProcessor.from_pretrained(sys.argv[1]).tokenizer)  # with the template of the package
inputs = processor.apply_chat_template(
    [{"role": "user", "content": "3 + 4 ="}], tokenize=True, return_dict=True, add_generation_prompt=True)
model.generate(**inputs, max_new_tokens=2)
print(modeling_mmgpt.__file__, processing_mmgpt.__file__)
"""
# A program that finds the packages anywhere but in the environment would find them here.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
ENVIRONMENT |= {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "OMP_WAIT_POLICY": "PASSIVE"}


def run(*command: str | Path, cwd: Path) -> str:
    command = [*map(str, command)]
    done = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def version() -> str:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return config["metadata"]["version"]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy to build from: a build leaves folders behind."""
    folder = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(source) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    run(*command, "--wheel-dir", source / "dist", source, cwd=source)
    return next((source / "dist").glob("*.whl"))


def tracked() -> set[str]:
    packages = (ROOT / name for name in ("modeling_mmgpt", "processing_mmgpt"))
    files = [file for package in packages for file in package.rglob("*") if file.suffix in (".py", ".jinja")]
    return {file.relative_to(ROOT).as_posix() for file in files}


def test_the_wheel_holds_the_two_packages_their_template_and_the_version_of_setup_cfg(wheel):
    files = zipfile.ZipFile(wheel)
    assert {name for name in files.namelist() if ".dist-info/" not in name} == tracked()
    metadata = files.read(f"mmgpt-{version()}.dist-info/METADATA").decode()
    assert f"\nVersion: {version()}\n" in metadata and "\nLicense-File: LICENSE\n" in metadata
    assert "\nDescription-Content-Type: text/markdown\n" in metadata and "\n# mmgpt\n" in metadata


def test_the_sdist_holds_what_the_wheel_is_built_from(source):
    backend = "import setuptools.build_meta as backend; print(backend.build_sdist('dist'))"
    name = run(sys.executable, "-c", backend, cwd=source).split()[-1]
    assert name == f"mmgpt-{version()}.tar.gz"
    with tarfile.open(source / "dist" / name) as files:
        inside = {member.partition("/")[2] for member in files.getnames()}
    assert {"setup.cfg", "pyproject.toml", "README.md", "LICENSE"} | tracked() <= inside


def test_the_changelog_begins_with_the_version_of_setup_cfg():
    assert re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)[0] == version()


@pytest.mark.bars
def test_the_wheel_answers_tunes_and_serves_in_an_environment_of_its_own(wheel, tmp_path):
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    # What it depends on, from here; no editable install of ours, whose `.pth` file is read in no other folder.
    here = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "dependencies.pth").write_text(f"import sys; sys.path.append({here!r})\n")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", site, wheel, cwd=tmp_path)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")  # the programs, away from the packages beside them

    assert run(python, "-c", ANSWER, "examples/tiny_world/base", cwd=tmp_path).count(str(site)) == 2
    tune = ["examples/train_sft.py", "--model_name_or_path", "examples/tiny_world/base", "--max_steps", "2"]
    run(python, *tune, "--data", "examples/records/records.jsonl", "--output_dir", "adapter", cwd=tmp_path)
    picture = ["--image", "examples/records/colour.png", "--max-new-tokens", "4"]
    run(python, "examples/generate.py", "adapter", "How many objects are there?", *picture, cwd=tmp_path)
    assert reply_of_the_server(python, tmp_path)["choices"][0]["message"]["role"] == "assistant"


def reply_of_the_server(python: Path, folder: Path) -> dict:
    """Serve `folder/adapter` and ask it once."""
    command = [str(python), "examples/serve.py", "adapter", "--port", "0"]
    log = folder / "log"
    with log.open("wb") as file:
        server = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=file, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + 240
        while not (found := re.search(r"running on (http://127\.0\.0\.1:\d+)", log.read_text())):
            assert server.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        body = {"messages": [{"role": "user", "content": "Add 39 and 34."}], "max_tokens": 4}
        headers = {"Content-Type": "application/json"}
        asked = Request(f"{found[1]}/v1/chat/completions", json.dumps(body).encode(), headers)
        return json.load(urlopen(asked, timeout=120))
    finally:
        server.terminate()
        server.wait(20)

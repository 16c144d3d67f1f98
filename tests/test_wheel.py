"""The wheel: what is in it, and that it is enough."""

import configparser
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
BASE = ROOT / "examples" / "tiny_world" / "base"
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


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    source = tmp_path_factory.mktemp("source")  # a build leaves folders behind
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    run(*command, "--wheel-dir", source / "dist", source, cwd=source)
    return next((source / "dist").glob("*.whl"))


def test_the_wheel_holds_the_two_packages_their_template_and_the_version_of_setup_cfg(wheel):
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    version = config["metadata"]["version"]
    files = zipfile.ZipFile(wheel)
    inside = {name for name in files.namelist() if ".dist-info/" not in name}
    packages = (ROOT / name for name in ("modeling_mmgpt", "processing_mmgpt"))
    tracked = [file for package in packages for file in package.rglob("*") if file.suffix in (".py", ".jinja")]
    assert inside == {file.relative_to(ROOT).as_posix() for file in tracked}
    assert f"\nVersion: {version}\n" in files.read(f"mmgpt-{version}.dist-info/METADATA").decode()


@pytest.mark.bars
def test_the_wheel_works_in_an_environment_of_its_own(wheel, tmp_path):
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    # What it depends on, from here; no editable install of ours, whose `.pth` file is read in no other folder.
    here = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "dependencies.pth").write_text(f"import sys; sys.path.append({here!r})\n")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", site, wheel, cwd=tmp_path)
    printed = run(python, "-c", ANSWER, BASE, cwd=tmp_path)
    assert printed.count(str(site)) == 2

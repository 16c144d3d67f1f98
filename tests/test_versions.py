"""The tested set: constraints.txt pins what setup.cfg asks for, inside its ranges, and is what every page installs."""

import configparser
import re
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from modeling_mmgpt.configuration_mmgpt import OLDEST_TRANSFORMERS


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.[pi][yp]*")]
PINS = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]


def requirements() -> list[Requirement]:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lists = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    asked = [Requirement(line) for text in lists for line in text.split()]
    return [requirement for requirement in asked if requirement.name != setup["metadata"]["name"]]


def test_whatever_an_extra_asks_for_is_pinned_inside_its_range():
    pins = [Requirement(line) for line in PINS]
    wrong = []
    for asked in requirements():
        own = [pin for pin in pins if canonicalize_name(pin.name) == canonicalize_name(asked.name)]
        if not own or not all(str(pin.specifier).removeprefix("==") in asked.specifier for pin in own):
            wrong.append(f"setup.cfg: {asked}; constraints.txt: {', '.join(map(str, own)) or 'nothing'}")
    assert not wrong


def test_pins_are_exact_and_leave_cuda_to_torch():
    assert not [line for line in PINS if not re.match(r"[\w.-]+==[\w.+]+( ;|$)", line)]
    assert not [line for line in PINS if re.match(r"nvidia|cuda|triton|pip==", line)]


def test_the_first_two_blocks_of_the_readme_install_the_tested_set():
    blocks = re.findall(r"^```\n(.*?)^```$", README, re.M | re.S)[:2]
    installs = [line for block in blocks for line in block.splitlines() if line.startswith("pip")]
    assert installs == [f'pip install -e ".[{extra}]" -c constraints.txt' for extra in ("train", "dev")]


def test_every_page_installs_the_tested_set():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    installs = re.findall(r'pip install -e (?:\.|\\?"\S+)(.{0,19})', text)
    assert len(installs) > 10
    assert set(installs) == {" -c constraints.txt"}


def test_an_older_transformers_is_refused_by_name_and_the_floor_is_that_of_setup_cfg():
    (asked,) = {str(requirement.specifier) for requirement in requirements() if requirement.name == "transformers"}
    assert f">={OLDEST_TRANSFORMERS}" in asked.split(",")
    code = """
import importlib
from modeling_mmgpt import configuration_mmgpt
configuration_mmgpt.transformers.__version__ = "5.23.1"
importlib.reload(configuration_mmgpt)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"ImportError: This model needs transformers {OLDEST_TRANSFORMERS} or newer, and 5.23.1" in done.stderr

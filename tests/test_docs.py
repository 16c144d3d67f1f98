"""The documentation: every block runs, every link and path resolves, no diary, the site builds without a warning.

Above a block, a comment may say that it does not run here, or only with the long checks:

    <!-- not run: why -->        <!-- long: why -->

Blocks of Python run in order, one namespace a page, in a copy of the repository's root; those of a shell run with
`pytest -m bars`. The README has no such comments, for it is read on other sites too: `README` says what of it does not
run here.
"""

import configparser
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import av
import nbformat
import peft
import pytest
import torch
from nbclient import NotebookClient
from tiny_world.mixture import example
from transformers import AutoModelForImageTextToText, AutoProcessor

from modeling_mmgpt.adapters_mmgpt import lora_config


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MORE = [ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md"]
FENCE = re.compile(
    r"^(?:<!-- (?P<mark>not run|long): (?P<why>[^\n]+) -->\n+)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S
)
COMMENT = re.compile(r"<!--.*?-->", re.S)
DIARY = (  # what tells how the work went, and not how things are
    *("(was|were) not (run|timed|measured|tried|at hand)", "not (run|timed|measured|tried) yet", "not yet been"),
    *("by turns", "in (another|other|an earlier|one more|three more) runs?", "of commit", "for these cases alone"),
    *("no command (here|of today)", "seen while", "learnt on the way", "(an|the) earlier (base|version|commit|page)"),
    *(
        "currently",
        "now (takes|has|is|works)",
        "ships now",
        "used to (be|have|take|give|need)",
        "until now",
        "so far,",
    ),
    *("these days", "nowadays", "recently", "previously", "formerly", "at the moment", "no longer", "any more"),
    *("measured anew", "work in progress", "todo"),
)
PATHS = re.compile(r"(?:examples|docs|tests|modeling_mmgpt|processing_mmgpt)/[\w./*-]*\w")
MEASURED = re.compile(r"^\|.*(?<![\d.])\d+\.\d+(?![\d.]).*\|$", re.M)  # a row of a table with a figure
SOURCE = re.compile(r"\b(pytest|python|accelerate launch) |tests/results/")
LINK = re.compile(r"\]\((?!https?://|mailto:)([^)#\s]*)(#[^)\s]*)?\)")
BADGE = re.compile(r"img\.shields\.io/badge/(\w+)-(\S+)-blue")
COMMANDS = ("python ", "accelerate ", "pytest", "pip ", ". ")
STAND_INS = ("few_shot.md", "video.md")  # pages whose blocks go on from a model, a processor and pictures of one's own
README = {
    "pip install": "`.ci/run` runs the test command, and `pytest -m bars tests/test_examples.py` the quickstart",
    "SmolLM2": "downloads a vision tower and a language model",
    "serve.py": "waits for requests and questions; your_data.md runs the rest of it",
}


@dataclass(frozen=True)
class Block:
    """A block of a page that runs."""

    language: str
    code: str
    is_long: bool


def blocks(page: Path) -> list[Block]:
    """The blocks of a page that run, in order."""
    found = []
    for match in FENCE.finditer(page.read_text(encoding="utf-8")):
        language, code = match["language"], match["code"]
        if not language and code.startswith(COMMANDS):
            language = "bash"
        exempt = page.name == "README.md" and any(words in code for words in README)
        if language in ("python", "bash") and match["mark"] != "not run" and not exempt:
            found.append(Block(language, code, match["mark"] == "long" or language == "bash"))
    return found


@pytest.fixture(scope="session")
def adapter(tmp_path_factory) -> Path:
    """What the quickstart leaves, but for the five minutes: an adapter of the tiny base that has learnt nothing."""
    base, folder = ROOT / "examples" / "tiny_world" / "base", tmp_path_factory.mktemp("quickstart") / "adapter"
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    peft.get_peft_model(model, lora_config(model)).save_pretrained(folder)
    AutoProcessor.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture
def root(tmp_path, monkeypatch, adapter) -> Path:
    """A folder that looks like the root of the repository, which blocks may write to."""
    for name in ("examples", "modeling_mmgpt", "processing_mmgpt", "push_to_hub.py", "model_card.jinja"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("docs", "tests"):  # which a block may write to
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("goldens", "__pycache__"))
    (tmp_path / "outputs" / "quickstart").mkdir(parents=True)
    (tmp_path / "outputs" / "quickstart" / "adapter").symlink_to(adapter)
    (tmp_path / "outputs" / "quickstart" / "report.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_shell(code: str) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    environment |= {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-ec", code], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{code}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def stand_ins(root: Path) -> dict:
    """A small model and its processor, pictures and a video, for pages that speak of those of the reader."""
    base = ROOT / "examples" / "tiny_world" / "base"
    pictures = [example("colour", 0, number).images[0] for number in range(10)]
    for name, picture in zip(("a.jpg", "b.jpg", "c.jpg"), pictures, strict=False):
        picture.save(root / name)
    with av.open(str(root / "clip.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=2, width=48, height=48)
        for picture in pictures:
            file.mux(stream.encode(av.VideoFrame.from_image(picture)))
        file.mux(stream.encode())
    return {
        "torch": torch,
        "model": AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval(),
        "processor": AutoProcessor.from_pretrained(base),
        "pictures": pictures,
        "queries": pictures[:2],
    }


def run(page: Path, with_long: bool) -> None:
    namespace = {"__name__": "__main__", **(stand_ins(Path.cwd()) if page.name in STAND_INS else {})}
    for number, block in enumerate(blocks(page)):
        if block.is_long and not with_long:
            continue
        if block.language == "bash":
            run_shell(block.code)
        else:
            exec(compile(block.code, f"{page.name}, block {number}", "exec"), namespace)


def with_any(*languages: str) -> list:
    pages = [page for page in PAGES if any(block.language in languages for block in blocks(page))]
    return [pytest.param(page, id=page.name) for page in pages]


@pytest.mark.parametrize("page", with_any("python"))
def test_every_block_of_python_runs(root, page):
    run(page, with_long=False)


@pytest.mark.bars
@pytest.mark.parametrize("page", with_any("python", "bash"))
def test_every_block_runs(root, page):
    run(page, with_long=True)
    if page.name == "your_data.md":
        assert replies_to(root / "my_data", "outputs/my_adapter") == [
            "green",
            "green",
            "red",
            "green",
            "blue",
            "green",
        ]


def replies_to(folder: Path, adapter: str) -> list[str]:
    """What the adapter says of the pictures of a page."""
    model = AutoModelForImageTextToText.from_pretrained(adapter, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(adapter)
    question = {"type": "text", "text": "What colour is the circle?"}
    asked = [
        [{"role": "user", "content": [{"type": "image", "path": str(p)}, question]}]
        for p in sorted(folder.glob("*.png"))
    ]
    inputs = processor.apply_chat_template(asked, tokenize=True, return_dict=True, add_generation_prompt=True)
    ids = model.generate(**inputs, max_new_tokens=16)
    return processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_readme_is_short_and_shows_python_early():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    assert lines.index("```python") < 50


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_keeps_a_diary(page):
    text = COMMENT.sub("", page.read_text(encoding="utf-8"))
    assert [match.group() for match in re.finditer(rf"\b({'|'.join(DIARY)})\b", text, re.I)] == []


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_tables_of_figures_name_what_prints_them(page):
    """In the same section, or before the first."""
    intro, *sections = re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.M)
    without = [
        section.splitlines()[0] for section in sections if MEASURED.search(section) and not SOURCE.search(section)
    ]
    assert SOURCE.search(intro) or without == []


@pytest.mark.parametrize("page", [*PAGES, *MORE], ids=lambda page: page.name)
def test_every_path_of_the_repository_is_there(page):
    named = set(re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")))
    paths = {path for code in named for path in PATHS.findall(code)}
    assert [path for path in paths if not list(ROOT.glob(path))] == []


@pytest.mark.parametrize("page", [*PAGES, *MORE], ids=lambda page: page.name)
def test_every_link_inside_resolves(page):
    missing = []
    for target, anchor in LINK.findall(re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)):
        file = page if not target else page.parent / target
        if not file.exists() or (anchor and anchor[1:] not in headings(file)):
            missing.append(target + anchor)
    assert not missing


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub and MkDocs both make them."""
    lines = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", line.lower()).strip().replace(" ", "-") for line in lines}


def test_badges_say_what_setup_cfg_says():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    badges = {key: unquote(value) for key, value in BADGE.findall((ROOT / "README.md").read_text(encoding="utf-8"))}
    (transformers,) = re.findall(r"^transformers>=([\d.]+)", setup["options"]["install_requires"], re.M)
    assert badges == {
        "python": setup["options"]["python_requires"].replace(">=", "≥"),
        "transformers": f"≥{transformers}",
        "licence": setup["metadata"]["license"].replace("-", "--"),
    }


def test_a_block_that_does_not_run_says_why():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert text.count("<!-- not run") + text.count("<!-- long") == sum(bool(m["mark"]) for m in FENCE.finditer(text))


@pytest.mark.bars
def test_the_notebook_runs_from_top_to_bottom(root, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "examples" / "tour.ipynb", as_version=4)
    folder = root / "tour"  # it writes to ../outputs
    folder.mkdir()
    (folder / "tiny_world").symlink_to(ROOT / "examples" / "tiny_world")
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    printed = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))
    right, asked = map(int, re.search(r"(\d+) of (\d+) right", printed).groups())
    assert right >= 0.9 * asked  # the base follows no instruction


@pytest.mark.bars
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    reference = (tmp_path / "site" / "reference" / "index.html").read_text(encoding="utf-8")
    for name in ("MMGPTForConditionalGeneration", "MMGPTProcessor", "vqa_accuracy", "convert_flamingo"):
        assert name in reference
    pages = {page.stem for page in PAGES[1:]}
    assert {folder.parent.name for folder in (tmp_path / "site").glob("*/index.html")} >= pages - {"index"}

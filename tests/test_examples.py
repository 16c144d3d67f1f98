"""The example programs, run as their docstrings say."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiles
import torch
from conftest import highest_by_chance
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file
from tiny_world import evaluation
from tiny_world.dialogue import Turn, dialogue
from tiny_world.mixture import example
from transformers import AutoModelForImageTextToText, AutoProcessor

from processing_mmgpt import load_instruction_dataset


ROOT = Path(__file__).parents[1]
BASE = ROOT / "examples" / "tiny_world" / "base"


def run(*command: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=1200
    )


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "scene.png"
    example("colour", 0, 0).images[0].save(path)
    return path


def records(path: Path, *lines: dict | str) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def asked(*content: dict, answer: str = "red") -> list[dict]:
    return [{"role": "user", "content": list(content)}, {"role": "assistant", "content": answer}]


# The folder


def test_two_programs_see_one_tiny_world():
    """Also where one of them lies in another folder."""
    code = "import sys; sys.path[:0] = sys.argv[1:]; import tiles, quickstart, tiny_world.evaluation as world;"
    code += "print(tiles.evaluation is quickstart.evaluation is world, [m for m in sys.modules if 'examples' in m])"
    done = run("-c", code, "examples", "examples/measurements")
    assert done.stdout.split() == ["True", "[]"], done.stderr


def test_the_tiny_world_has_one_name():
    named = re.compile(r"(examples|measurements)\.(tiny_world|measurements|[a-z_]+ import)")
    places = [ROOT / "README.md", *ROOT.glob("*.py"), *ROOT.glob("docs/*.md"), *ROOT.glob("tests/*.py")]
    places += [*ROOT.glob("examples/**/*.py"), *ROOT.glob("examples/*.ipynb"), *ROOT.glob("tests/results/*.json")]
    assert [place.name for place in places if named.search(place.read_text())] == []
    assert not (ROOT / "examples" / "__init__.py").exists()


def test_the_page_names_every_program_and_every_command_is_there():
    page = (ROOT / "examples" / "README.md").read_text()
    programs = [*ROOT.glob("examples/*.py"), *ROOT.glob("examples/measurements/*.py")]
    started = {str(path.relative_to(ROOT)) for path in programs if "\n    main()\n" in path.read_text()}
    assert set(re.findall(r"examples/\w+(?:/\w+)?\.py", page)) == started


@pytest.mark.parametrize("program", ["write_benchmarks.py", "measurements/tiles.py", "measurements/in_context.py"])
def test_a_program_starts_from_anywhere(program, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = run(ROOT / "examples" / program, "--help", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("usage"), done.stderr


def test_small_text_in_a_large_picture_is_whole_in_its_cell():
    asked = example("reading", 0, 3, "test")
    shown = tiles.views(asked, 3)
    (large,), (cell,) = shown["whole, 144 x 144"], shown["the cell that holds the text"]
    assert large.size == (144, 144) and len(shown["nine cells as nine images"]) == 9
    assert cell.tobytes() == asked.images[0].tobytes()
    assert [cell.tobytes() == other.tobytes() for other in shown["nine cells as nine images"]].count(True) == 1


# generate.py


def test_generate_answers_about_a_picture_and_without_one(picture):
    done = run("examples/generate.py", BASE, "circle:", "--image", picture, "--max-new-tokens", "4")
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    done = run("examples/generate.py", BASE, "3 + 4 =", "--max-new-tokens", "4")
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


@pytest.mark.parametrize(
    ("model", "image", "named"),
    [("nowhere", None, "nowhere"), ("orphan", None, "no/such/base"), (BASE, "torn.png", "torn.png")],
)
def test_generate_names_what_it_cannot_load(tmp_path, model, image, named):
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    if model == "orphan":
        model = tmp_path / "adapter"
        LoraConfig(base_model_name_or_path="/no/such/base", target_modules="x").save_pretrained(model)
    extra = [] if image is None else ["--image", tmp_path / image]
    done = run("examples/generate.py", model, "circle:", *extra)
    assert done.returncode == 1 and named in done.stderr and "Traceback" not in done.stderr


# train_sft.py


def test_train_sft_by_accelerate_tunes_on_pictures_and_text_and_its_adapter_loads(tmp_path, picture):
    data = records(
        tmp_path / "records.jsonl",
        {"messages": asked({"type": "image"}, {"type": "text", "text": "What is it?"}), "images": ["scene.png"]},
        {"messages": asked({"type": "text", "text": "What is 1 plus 2?"}, answer="3")},
    )
    command = ["-m", "accelerate.commands.launch", "--num_processes", "1", "examples/train_sft.py", "--data", data]
    command += ["--model_name_or_path", BASE.relative_to(ROOT), "--output_dir", tmp_path / "adapter"]
    command += ["--max_steps", "2", "--learning_rate", "1e-2", "--report_to", "none"]
    command += ["--lora_r", "4"]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(BASE)  # found from any working directory
    report = json.loads((tmp_path / "adapter" / "report.json").read_text())
    assert report == {"training": {"steps": 2, "learning rate": 0.01, "seed": 42}, "data": {"records.jsonl": 2}}
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any("lora_B" in name and tensor.abs().max() > 0 for name, tensor in weights.items())
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(tmp_path / "adapter")
    content = [{"type": "image", "path": str(picture)}, {"type": "text", "text": "What is it?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, add_generation_prompt=True
    )
    base = AutoModelForImageTextToText.from_pretrained(BASE, dtype=torch.float32)
    assert (model(**inputs).logits - base(**inputs).logits).abs().max() > 1e-3


@pytest.mark.parametrize(("line", "named"), [("{no json", "line 2"), ({"images": []}, "messages")])
def test_a_bad_line_is_named_before_training(tmp_path, line, named):
    path = records(tmp_path / "records.jsonl", {"messages": asked({"type": "text", "text": "a"})}, line)
    with pytest.raises(ValueError, match=named) as caught:
        load_instruction_dataset(path)
    assert "records.jsonl" in str(caught.value)


# What the quickstart counts


def colour(answer: str, shade: int = 0) -> object:
    return dialogue("colour", [Turn("What colour?", answer, [Image.new("RGB", (48, 48), (shade, 0, 0))])])


def test_only_the_whole_answer_counts():
    examples = [colour("red"), colour("blue"), colour("top-left"), colour("3")]
    row = evaluation.score(examples, ["red", "blu", "top-left ", "3"])
    assert row["accuracy"] == 0.5 and row["n"] == 4
    assert (row["low"], row["high"]) == pytest.approx((0.15, 0.85), abs=0.005)  # Wilson's, for 2 of 4


def test_swapped_pictures_are_all_others_and_blank_ones_show_nothing():
    examples = [colour("red", shade) for shade in range(5)]
    swapped, blank = evaluation.with_swapped_pictures(examples), evaluation.with_blank_pictures(examples)
    shades = [e.images[0].getpixel((0, 0))[0] for e in swapped]
    assert sorted(shades) == list(range(5)) and all(a != b for a, b in enumerate(shades))
    assert len({e.images[0].tobytes() for e in blank}) == 1
    assert [e.answer for e in swapped] == [e.answer for e in blank] == ["red"] * 5


def test_the_prior_knows_what_kind_of_answer_is_asked_for():
    examples = [colour(a) for a in ("red", "red", "blue", "circle", "star", "star")]
    assert evaluation.prior(examples) == pytest.approx({"majority": 4 / 6, "collision": (5 / 3 + 5 / 3) / 6})


def test_answers_come_back_in_the_order_of_the_questions(monkeypatch):
    model = AutoModelForImageTextToText.from_pretrained(BASE, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(BASE)
    examples = [example(skill, 0, k) for k in range(2) for skill in ("caption", "colour", "copying", "second_turn")]
    together = evaluation.answer(model, processor, examples)
    monkeypatch.setattr(evaluation, "BATCH", 1)
    assert together == evaluation.answer(model, processor, examples)


# The bars of the quickstart

AT_LEAST = dict.fromkeys(
    "colour shape size position count count_colour yes_no text_colour second_turn".split()
    + "sums differences sorting facts".split(),
    0.95,
)
AT_LEAST |= {"reading": 0.8, "digits": 0.9, "unseen_pairs": 0.9, "copying": 0.9}
RESULTS = Path(__file__).with_name("results") / "quickstart.json"


@pytest.mark.bars
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_quickstart_reaches_its_bars(tmp_path, seed):
    done = run("examples/quickstart.py", "--seed", str(seed), "--output-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    note_results(seed, report)
    below = {name: report["skills"][name]["accuracy"] for name, bar in AT_LEAST.items()}
    below = {name: accuracy for name, accuracy in below.items() if accuracy < AT_LEAST[name]}
    assert not below
    rows = 2 * len(report["controls"])
    for name, row in report["controls"].items():
        n = row["blank"]["n"]
        for view, chance in (("blank", "majority"), ("swapped", "collision")):
            highest = highest_by_chance(row["prior"][chance], n, rows)
            assert row[view]["accuracy"] <= highest, (name, view)


def note_results(seed: int, report: dict) -> None:
    """Keep the last figures of this bar, with what they were measured with."""
    noted = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    noted |= evaluation.measured_with("pytest -m bars tests/test_examples.py")
    noted.setdefault("reports", {})[str(seed)] = report
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(noted, indent=1, sort_keys=True) + "\n")

"""Speed: what is imported, what is compiled anew, and that the benchmark runs. The figures are the benchmark's."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import note_results


ROOT = Path(__file__).parents[1]


def test_nothing_is_imported_that_transformers_does_not_import_for_a_model():
    code = """
import sys
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationMixin, PreTrainedModel, ProcessorMixin
from transformers import DynamicCache, masking_utils, modeling_layers
from transformers.image_processing_utils import BaseImageProcessor
before = set(sys.modules)
import modeling_mmgpt, processing_mmgpt
print(sorted(set(sys.argv[1:]) & (set(sys.modules) - before)))
"""
    unused = ("trl", "datasets", "matplotlib", "open_clip", "peft", "av", "sklearn", "scipy", "gradio")
    command = [sys.executable, "-c", code, *unused]
    assert subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip() == "[]"


@pytest.mark.bars
def test_the_benchmark_runs_and_nothing_is_compiled_anew(tmp_path):
    """On a CPU, at the shape of the tiny base: 50 requests of random length and number of pictures."""
    command = [sys.executable, "examples/benchmark.py", "--tiny", "--output-dir", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT)
    result = json.loads((tmp_path / "benchmark.json").read_text())
    assert all(same for name, same in result["agreement"].items() if name.startswith("same tokens"))
    assert result["recompiles"]["recompiles"] == 0 and result["recompiles"]["requests"] == 50
    speeds = {
        f"{row['model']}, {row['setting']}": round(row["tokens_s"], 1)
        for row in result["decode"]["rows"]
        if row["images"] == 1 and row["rows"] == 1
    }
    assert {name.split(",")[0] for name in speeds} == {"mmgpt", "idefics", "mllama", "lm"}
    assert {row["setting"] for row in result["train"] if row["model"] == "mmgpt"} == {"plain", "fast", "lean"}
    loops = ["two padded passes", "packed rows", "packed rows, pictures kept"]
    assert [row["loop"] for row in result["mixture"]] == loops
    assert (tmp_path / "benchmark.png").stat().st_size > 10_000
    turns = {
        f"{part}, by turns, ms a step": {kind: round(value, 3) for kind, value in result[part].items()}
        for part in ("eager", "compiled", "pictures")
    }
    seconds = {statement: round(value, 2) for statement, value in result["imports"].items()}
    figures = {"tokens a second, one row": speeds, "recompiles": result["recompiles"], "imports, seconds": seconds}
    note_results("benchmark", {**figures, **turns})

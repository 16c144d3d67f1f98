"""Speed: what is imported, what is compiled anew, and that the benchmark runs. The figures are the benchmark's."""

import json
import os
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


def run_benchmark(folder: Path, *options: str) -> dict:
    """Run the benchmark at the shape of the tiny base, and give what it wrote."""
    command = [sys.executable, "examples/measurements/benchmark.py", "--tiny", "--output-dir", str(folder), *options]
    subprocess.run(command, check=True, cwd=ROOT)
    return json.loads((folder / "benchmark.json").read_text())


def check_requests(result: dict) -> None:
    """No request made the compiler start again."""
    assert result["recompiles"]["recompiles"] == 0 and result["recompiles"]["requests"] == 50


def check_settings_and_loops(result: dict) -> None:
    """Every setting and loop was measured."""
    settings = {row["setting"] for row in result["decode"]["rows"] if row["model"] == "mmgpt"}
    assert settings == {"eager", "compiled", "theirs", "fused"}
    assert {row["setting"] for row in result["train"] if row["model"] == "mmgpt"} == {"plain", "fast", "lean"}
    loops = ["two padded passes", "packed rows", "packed rows, pictures kept"]
    assert [row["loop"] for row in result["mixture"]] == loops


def test_nothing_is_compiled_anew(tmp_path):
    """On a CPU: 50 requests of random length and number of pictures."""
    check_requests(run_benchmark(tmp_path, "--kinds", "mmgpt", "--parts", "recompiles"))


@pytest.mark.bars
def test_the_whole_benchmark_beside_its_peers(tmp_path):
    result = run_benchmark(tmp_path)
    assert (tmp_path / "benchmark.png").stat().st_size > 10_000
    check_requests(result)
    check_settings_and_loops(result)
    assert all(same for name, same in result["agreement"].items() if name.startswith("same tokens"))
    speeds = {
        f"{row['model']}, {row['setting']}": round(row["tokens_s"], 1)
        for row in result["decode"]["rows"]
        if row["images"] == 1 and row["rows"] == 1
    }
    assert {name.split(",")[0] for name in speeds} == {"mmgpt", "idefics", "mllama", "lm"}
    turns = {
        f"{part}, by turns, ms a step": {kind: round(value, 3) for kind, value in result[part].items()}
        for part in ("eager", "compiled", "pictures")
    }
    seconds = {statement: round(value, 2) for statement, value in result["imports"].items()}
    figures = {"tokens a second, one row": speeds, "recompiles": result["recompiles"], "imports, seconds": seconds}
    note_results("benchmark", {**figures, **turns})


@pytest.mark.bars
def test_clusters_are_measured_by_the_program_that_people_launch(tmp_path):
    """On CPUs: the speed of one and two processes, their losses, and what is refused."""
    command = [sys.executable, "examples/measurements/clusters.py", "--tiny", "--output-dir", str(tmp_path), "--only"]
    command += ["one_gpu-1-plain", "ddp-2-plain", "float32-one_gpu-1", "float32-ddp-2", "new_tokens-fsdp2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    rows = {row["name"]: row for row in json.loads((tmp_path / "clusters.json").read_text())["rows"]}
    assert "new_tokens does not go with FSDP" in rows.pop("new_tokens-fsdp2")["error"]
    assert len(rows) == 4 and not any("error" in row for row in rows.values())
    assert all(rows[name]["tokens a second"] > 0 for name in ("one_gpu-1-plain", "ddp-2-plain"))
    assert rows["ddp-2-plain"]["efficiency"] > 0
    assert len(rows["float32-ddp-2"]["losses"]) == 20 and rows["float32-ddp-2"]["apart from float32-one_gpu-1"] < 1e-3

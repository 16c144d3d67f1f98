"""Quantised bases: which matrices are, that a model in memory becomes what one in a folder does, and the benchmark."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import note_results
from torch import nn

from modeling_mmgpt import MMGPTForConditionalGeneration
from modeling_mmgpt.adapters_mmgpt import quantization_config


pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")
import benchmark_quantized as program  # noqa: E402


ROOT = Path(__file__).parents[1]
METHODS = ("nf4", "llm-int8", "int8", "fp8")  # those with kernels for a CPU


@pytest.fixture(scope="module")
def make_wide(make_model):
    """Bitsandbytes takes, on a CPU, rows of a multiple of 64 weights."""

    def make(family="llama", **text):
        sizes = {"hidden_size": 64, "intermediate_size": 128}
        heads = {"num_heads": 2, "head_dim": 32}
        vision = {"width": 64, "head_width": 32}
        return make_model(family, text={**sizes, **text}, vision=vision, cross_attention=heads)

    return make


def load_quantized(folder, method):
    config = quantization_config(program.quant_type(method, 32), torch.float32)
    return MMGPTForConditionalGeneration.from_pretrained(folder, quantization_config=config)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])  # whose heads are `lm_head` and `embed_out`
def test_quantised_are_the_layers_and_the_blocks_and_nothing_else(make_wide, tmp_path, family, method):
    model = make_wide(family)
    model.save_pretrained(tmp_path)
    quantized = load_quantized(tmp_path, method)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    found = {name for name in linear if type(quantized.get_submodule(name).weight) is not nn.Parameter}
    assert found == {name for name in linear if name.startswith("model.text_model.")} - {head}
    assert {name.rsplit(".", 1)[-1] for name in found} >= {"to_q", "to_kv", "to_out"}
    whole = {f"{name}.weight" for name in found}
    for name, parameter in model.named_parameters():
        assert name in whole or torch.equal(parameter, quantized.get_parameter(name)), name


@pytest.mark.parametrize("method", METHODS)
def test_a_model_in_memory_becomes_what_one_in_a_folder_does(make_wide, ids, pixels, tmp_path, method):
    model, batch = make_wide(), {**ids("a#b#cd", "abcdef"), "pixel_values": pixels(2, 2)}
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        exact = model(**batch).logits
        expected = load_quantized(tmp_path, method)(**batch).logits
        logits = program.quantize(model, method, 32)(**batch).logits
    assert torch.equal(logits, expected) and not torch.equal(logits, exact)


def test_an_unknown_way_to_quantise_is_named():
    with pytest.raises(ValueError, match="'int3'.*'nf4', 'int8' or a config of torchao"):
        quantization_config("int3")


def test_drift_is_the_divergence_from_the_reference():
    reference, logits = torch.zeros(3, 2), torch.tensor([[0.0, 0.0], [0.0, math.log(3)], [math.log(3), 0.0]])
    reference[1:, 0] = 1e-3  # whose likeliest token is the first
    found = program.drift(logits, reference)
    one = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert found["kl"] == pytest.approx(2 / 3 * one, rel=1e-2) and found["same_top"] == pytest.approx(2 / 3)
    assert program.drift(reference, reference) == {"kl": 0.0, "same_top": 1.0}


@pytest.mark.bars
def test_the_benchmark_of_quantised_bases_runs(tmp_path):
    """On a CPU, tiny; what has no kernels for a CPU is listed with the reason."""
    command = [sys.executable, "examples/measurements/benchmark_quantized.py", "--tiny", "--output-dir", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT)
    result = json.loads((tmp_path / "quantized.json").read_text())
    skipped = {row["method"] for row in result["methods"] if "skipped" in row}
    assert skipped == {"int4", "fp8-dynamic"}
    rows = {(row["method"], row["setting"]): row for row in result["methods"] if "setting" in row}
    assert {(method, setting) for method, settings in program.SETTINGS.items() for setting in settings} == {
        *rows,
        *((method, "compiled") for method in skipped),
    }
    assert rows["bf16", "compiled"]["random"] == {"kl": 0.0, "same_top": 1.0}  # float32 on a CPU
    assert all(0 < row["random"]["kl"] < 0.01 for (method, _), row in rows.items() if "bf16" not in method)
    whole = rows["bf16", "compiled"]["tiny_base"]["right"]
    drifts = {method: row["tiny_base"] for (method, _), row in rows.items() if "kl" in row["tiny_base"]}
    assert all(abs(found["right"] - whole) < 0.02 for found in drifts.values())
    assert [row["what"] for row in result["memory"]] == ["inference"] * 6 + ["LoRA, fast", "LoRA, lean", "LoRA, lean"]
    assert (tmp_path / "quantized.md").read_text().count("\n| ---") == 2
    note_results("quantized", {"the tiny base over float32, on a CPU": drifts})

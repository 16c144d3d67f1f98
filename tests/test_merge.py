"""merge_adapter.py, and what PEFT does with several adapters of our models."""

import json
import shutil

import merge_adapter
import peft
import pytest
import torch
from conftest import BASE
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

from modeling_mmgpt import MMGPTForConditionalGeneration
from modeling_mmgpt.adapters_mmgpt import lora_config


@pytest.fixture
def make_base(make_model, processor, tmp_path):
    """Save a tiny base with its processor, and an adapter of it; return both folders."""

    def make(dtype=torch.float32, adapters=1, **fields):
        base = tmp_path / "base"
        make_model(dtype=dtype, **fields).save_pretrained(base)
        processor.save_pretrained(base)
        return base, [make_adapter(base, tmp_path / f"adapter-{k}", k) for k in range(adapters)]

    def make_adapter(base, folder, seed):
        model = MMGPTForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
        torch.manual_seed(seed)
        tuned = peft.get_peft_model(model, lora_config(model, r=2 + seed))
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        tuned.save_pretrained(folder)
        processor.save_pretrained(folder)
        return folder

    return make


def merge(monkeypatch, *arguments) -> None:
    monkeypatch.setattr("sys.argv", ["merge_adapter.py", *map(str, arguments)])
    merge_adapter.main()


AMPLIFIED = 2e-4  # the tiny model's weights are so large that the rounding of float32 shows in the fourth digit


def logits(model, inputs):
    with torch.inference_mode():
        return model.eval()(**inputs).logits


@pytest.mark.parametrize("which", ["shipped", "untied", "tied"])
def test_merged_equals_adapter_and_loads_without_peft(make_base, adapter, monkeypatch, tmp_path, which):
    base, tied, tolerance = BASE, which == "tied", 1e-5
    if which != "shipped":
        base, (adapter,) = make_base(text={"tie_word_embeddings": tied})
        tolerance = AMPLIFIED
    inputs = merge_adapter.probe(AutoProcessor.from_pretrained(adapter))
    tuned, plain = (
        logits(AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32), inputs)
        for folder in (adapter, base)
    )
    merge(monkeypatch, adapter, tmp_path / "merged", "--dtype", "float32")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    scale = tuned.abs().max()
    assert (plain - tuned).abs().max() > 1e-2 * scale
    assert (logits(model, inputs) - tuned).abs().max() <= tolerance * scale
    assert model.config.get_text_config().tie_word_embeddings == tied
    report = json.loads((tmp_path / "merged" / "report.json").read_text())["merge"]
    assert report["dtype"] == "float32" and report["max_logit_difference"] <= tolerance * report["max_logit"]


def test_merged_and_fused_equals_adapter(adapter, monkeypatch, tmp_path):
    inputs = merge_adapter.probe(AutoProcessor.from_pretrained(adapter))
    tuned = logits(AutoModelForImageTextToText.from_pretrained(adapter, dtype=torch.float32), inputs)
    merge(monkeypatch, adapter, tmp_path / "fused", "--dtype", "float32", "--fuse")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "fused")
    assert model.config.text_config.model_type == "phi3"
    assert (logits(model, inputs) - tuned).abs().max() <= 1e-5 * tuned.abs().max()


def test_in_bfloat16_every_weight_is_the_exact_sum_rounded_once(make_base, monkeypatch, tmp_path):
    base, (adapter,) = make_base(dtype=torch.bfloat16)
    merge(monkeypatch, adapter, tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").state_dict()
    tuned = peft.PeftModel.from_pretrained(
        MMGPTForConditionalGeneration.from_pretrained(base, dtype=torch.float64), adapter
    ).double()
    exact = tuned.merge_and_unload().state_dict()
    for name, weight in merged.items():
        assert weight.dtype == torch.bfloat16
        # Half a unit in the last of bfloat16's 8 bits, and a little for the float32 that the sum went through.
        assert ((weight.double() - exact[name]).abs() <= 2**-8 * 1.001 * exact[name].abs() + 1e-30).all(), name


def test_an_adapter_that_lies_beside_its_base_is_merged_once(make_base, monkeypatch, tmp_path):
    base, (adapter,) = make_base()
    inputs = merge_adapter.probe(AutoProcessor.from_pretrained(adapter))
    tuned = logits(AutoModelForImageTextToText.from_pretrained(adapter), inputs)
    both = shutil.copytree(base, tmp_path / "both")
    shutil.copytree(adapter, both, dirs_exist_ok=True)
    config = json.loads((both / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(both)
    (both / "adapter_config.json").write_text(json.dumps(config))
    merge(monkeypatch, both, tmp_path / "merged")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert (logits(model, inputs) - tuned).abs().max() <= AMPLIFIED * tuned.abs().max()


def test_a_quantised_base_is_refused_unless_asked(make_base, monkeypatch, tmp_path):
    pytest.importorskip("bitsandbytes")
    text = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4}
    blocks = {"num_heads": 2, "head_dim": 32}
    vision = {"width": 64, "head_width": 32}
    base, (adapter,) = make_base(text=text, vision=vision, cross_attention=blocks)
    as_they_are = ["model.vision_tower", "model.resampler", "lm_head"]
    options = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=as_they_are)
    merge(monkeypatch, adapter, tmp_path / "exact")
    model = AutoModelForImageTextToText.from_pretrained(base, quantization_config=options)
    shutil.rmtree(base)
    model.save_pretrained(base)
    with pytest.raises(SystemExit, match="is quantised .*bitsandbytes.*--dequantize"):
        merge(monkeypatch, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    merge(monkeypatch, adapter, tmp_path / "merged", "--dequantize", "--dtype", "float32")
    report = json.loads((tmp_path / "merged" / "report.json").read_text())["merge"]
    assert report["max_logit_difference"] <= AMPLIFIED * report["max_logit"]
    merged, exact = (
        AutoModelForImageTextToText.from_pretrained(tmp_path / name).state_dict() for name in ("merged", "exact")
    )
    for name, weight in exact.items():  # no further off than half the widest gap of FP4, a sixth
        assert (merged[name] - weight).abs().max() <= 0.17 * weight.abs().max() + 1e-6, name


def test_an_adapter_that_does_not_fit_is_not_merged(make_base, monkeypatch, tmp_path):
    _, (adapter,) = make_base()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    with pytest.raises(
        SystemExit, match=r"cannot be merged: .* does not fit its base: weights are \d+ of another shape"
    ):
        merge(monkeypatch, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_folder_that_is_there_is_not_overwritten(make_base, monkeypatch, tmp_path):
    _, (adapter,) = make_base()
    (tmp_path / "merged").mkdir()
    with pytest.raises(SystemExit, match="is there already"):
        merge(monkeypatch, adapter, tmp_path / "merged")
    assert not list((tmp_path / "merged").iterdir())


def test_adapters_are_switched_switched_off_and_swapped_in_place(make_base):
    base, folders = make_base(adapters=2)
    inputs = merge_adapter.probe(AutoProcessor.from_pretrained(base))
    alone = [logits(AutoModelForImageTextToText.from_pretrained(folder), inputs) for folder in folders]
    plain = logits(AutoModelForImageTextToText.from_pretrained(base), inputs)
    model = peft.PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), folders[0], "one")
    model.load_adapter(folders[1], "two")
    for name, expected in (("two", alone[1]), ("one", alone[0]), ("two", alone[1])):
        model.set_adapter(name)
        assert (logits(model, inputs) - expected).abs().max() <= 1e-6 * expected.abs().max()
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), plain)
    model = peft.PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), folders[0])
    prepare_model_for_compiled_hotswap(model, target_rank=3)  # room for the larger of both
    for folder, expected in ((folders[1], alone[1]), (folders[0], alone[0])):
        hotswap_adapter(model, folder, adapter_name="default")
        assert (logits(model, inputs) - expected).abs().max() <= 1e-6 * expected.abs().max()

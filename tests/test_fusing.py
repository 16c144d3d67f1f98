"""A LLaMA with fused projections is the same model."""

import peft
import pytest
import torch
from conftest import BASE
from transformers import AutoModelForImageTextToText

from modeling_mmgpt.adapters_mmgpt import lora_config
from modeling_mmgpt.speed.fusing import fuse_projections


LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 8


@pytest.mark.parametrize(
    "text",
    [
        {},
        {"tie_word_embeddings": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
        {"head_dim": 16, "rms_norm_eps": 0.1, "hidden_act": "gelu"},
    ],
)
def test_a_fused_model_says_the_same_and_is_saved_as_any_other(make_model, ids, pixels, tmp_path, text):
    model = make_model("llama", text=text)
    model.generation_config.max_new_tokens = 7
    batch = {**ids("a#bcdefghijkl", "#ab#cdefghijk"), "pixel_values": pixels(2, 2)}
    fuse_projections(model).save_pretrained(tmp_path)
    fused = AutoModelForImageTextToText.from_pretrained(tmp_path)
    with torch.inference_mode():
        expected, logits = model(**batch).logits, fused(**batch).logits
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    said = fused.generate(**batch, cache_implementation="static", do_sample=False)
    assert said.shape[1] <= 13 + 7 and torch.equal(said, model.generate(**batch, do_sample=False))
    names = {name.rsplit(".", 2)[-2] for name, _ in fused.model.text_model.named_parameters() if "_proj" in name}
    assert names == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


def test_fusing_leaves_the_model_as_it_was_and_copies_what_is_joined_alone(make_model):
    model = make_model("llama")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    fused = fuse_projections(model)
    assert model.config.text_config.model_type == "llama"
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    shared = {weight.data_ptr() for weight in model.parameters()}
    copied = {name.rsplit(".", 2)[-2] for name, weight in fused.named_parameters() if weight.data_ptr() not in shared}
    assert copied == {"qkv_proj", "gate_up_proj"}


def with_adapter(model):
    return peft.get_peft_model(model, lora_config(model)).get_base_model()


@pytest.mark.parametrize(
    ("family", "text", "prepare", "said"),
    [
        ("gpt_neox", {}, None, "GPTNeoXForCausalLM"),
        ("llama", {"attention_bias": True}, None, "attention_bias=True"),
        ("llama", {"rope_parameters": LLAMA3}, None, "'llama3'"),
        ("llama", {}, with_adapter, "merge it first"),
    ],
)
def test_what_cannot_be_fused_is_refused(make_model, family, text, prepare, said):
    model = make_model(family, text=text)
    with pytest.raises(ValueError, match=said):
        fuse_projections(model if prepare is None else prepare(model))


def test_a_quantised_model_is_refused():
    model = AutoModelForImageTextToText.from_pretrained(BASE, dtype=torch.float32)
    model.hf_quantizer = object()  # as transformers leaves it
    with pytest.raises(ValueError, match="quantised"):
        fuse_projections(model)

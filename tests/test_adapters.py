"""LoRA: what it adapts, how many weights that is, adapters in and out of folders, a short training run."""

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText, LlamaConfig
from trl import SFTConfig, SFTTrainer

from modeling_mmgpt import MMGPTConfig, MMGPTForConditionalGeneration, MMGPTVisionConfig
from modeling_mmgpt.adapters_mmgpt import check_adapter, lora_config
from processing_mmgpt import MMGPTCollator


def trainable(model):
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def test_multimodal_gpt_has_as_many_trainables_as_its_log_says():
    config = MMGPTConfig(
        vision_config=MMGPTVisionConfig.from_open_clip("ViT-L-14-quickgelu"),
        text_config=LlamaConfig(vocab_size=32003),
        cross_attn_every_n_layers=4,
        image_token_id=32001,
        end_of_chunk_token_id=32000,
    )
    counts = []
    for language_mlp in (False, True):
        with torch.device("meta"):
            model = MMGPTForConditionalGeneration(config)
            counts.append(trainable(get_peft_model(model, lora_config(model, language_mlp=language_mlp))))
    assert counts[0] == 23_461_888
    assert counts[1] - counts[0] == 32 * 16 * 3 * (4096 + 11008)  # layers, rank, three matrices of one in and one out


BLOCK = {f"gated_cross_attn_layer.{name}" for name in ("attn.to_q", "attn.to_kv", "attn.to_out", "ff.1", "ff.3")}
LLAMA = {f"decoder_layer.self_attn.{name}_proj" for name in "qkvo"}
LLAMA_MLP = {f"decoder_layer.mlp.{name}_proj" for name in ("gate", "up", "down")}


@pytest.mark.parametrize(
    ("family", "attention", "mlp"),
    [
        ("llama", LLAMA, LLAMA_MLP),
        ("gemma2", LLAMA, LLAMA_MLP),
        ("opt", {f"decoder_layer.self_attn.{n}_proj" for n in ("q", "k", "v", "out")},
         {"decoder_layer.fc1", "decoder_layer.fc2"}),
        ("gpt2", {f"decoder_layer.attn.{n}" for n in ("c_attn", "c_proj")},
         {f"decoder_layer.mlp.{n}" for n in ("c_fc", "c_proj")}),
        ("gpt_neox", {f"decoder_layer.attention.{n}" for n in ("query_key_value", "dense")},
         {f"decoder_layer.mlp.{n}" for n in ("dense_h_to_4h", "dense_4h_to_h")}),
        ("mpt", {f"decoder_layer.attn.{n}" for n in ("Wqkv", "out_proj")},
         {f"decoder_layer.ffn.{n}" for n in ("up_proj", "down_proj")}),
        ("bloom", {f"decoder_layer.self_attention.{n}" for n in ("query_key_value", "dense")},
         {f"decoder_layer.mlp.{n}" for n in ("dense_h_to_4h", "dense_4h_to_h")}),
        ("falcon", {f"decoder_layer.self_attention.{n}" for n in ("query_key_value", "dense")},
         {f"decoder_layer.mlp.{n}" for n in ("dense_h_to_4h", "dense_4h_to_h")}),
        ("gptj", {f"decoder_layer.attn.{n}" for n in ("q_proj", "k_proj", "v_proj", "out_proj")},
         {f"decoder_layer.mlp.{n}" for n in ("fc_in", "fc_out")}),
    ],
)  # fmt: skip
def test_the_targets_are_the_attention_and_the_blocks_and_nothing_else(make_model, family, attention, mlp):
    for language_mlp, expected in ((False, attention | BLOCK), (True, attention | BLOCK | mlp)):
        model = make_model(family)
        config = lora_config(model, r=4, lora_alpha=8, language_mlp=language_mlp, lora_dropout=0.1)
        assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 8, 0.1)
        peft = get_peft_model(model, config)
        names = {name.split(".lora_A")[0] for name, _ in peft.named_modules() if name.endswith("lora_A")}
        ends = {end for end in expected if any(name.endswith(f".{end}") for name in names)}
        assert ends == expected
        assert all(any(name.endswith(f".{end}") for end in expected) for name in names)
        assert not any("vision_tower" in name or "resampler" in name for name in names)
        layers = 4
        assert len(names) == layers * len(expected - BLOCK) + layers // 2 * len(BLOCK)


def batch_of(ids, pixels):
    return {**ids("a#b#cd", "abcdef"), "pixel_values": pixels(2, 2)}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("extra", ["plain", "language_mlp", "resampler", "tokens", "both"])
def test_an_adapter_comes_back_whatever_loads_it(make_model, ids, pixels, tmp_path, tied, extra):
    base, adapter, batch = str(tmp_path / "base"), str(tmp_path / "adapter"), batch_of(ids, pixels)
    make_model(text={"tie_word_embeddings": tied}).save_pretrained(base)
    kwargs = {}
    if extra == "language_mlp":
        kwargs["language_mlp"] = True
    if extra in ("resampler", "both"):
        kwargs["modules_to_save"] = ["resampler"]
    if extra in ("tokens", "both"):
        new = [258, 259]
        kwargs["trainable_token_indices"] = {"embed_tokens": new} if tied else {"embed_tokens": new, "lm_head": new}
    model = MMGPTForConditionalGeneration.from_pretrained(base)
    plain = model(**batch).logits
    peft = get_peft_model(model, lora_config(model, **kwargs))
    torch.manual_seed(0)
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    expected = peft.eval()(**batch).logits
    assert (expected - plain).abs().max() > 0.1
    peft.save_pretrained(adapter)
    loaded = [
        AutoModel.from_pretrained(adapter),
        AutoModelForImageTextToText.from_pretrained(adapter),
        PeftModel.from_pretrained(MMGPTForConditionalGeneration.from_pretrained(base), adapter),
    ]
    for again in loaded:
        assert (again.eval()(**batch).logits - expected).abs().max() < 1e-6
    tokens = [m.generate(**batch, do_sample=False, max_new_tokens=4) for m in (peft, *loaded)]
    assert all(torch.equal(tokens[0], other) for other in tokens[1:])
    merged = loaded[-1].merge_and_unload()
    assert (merged(**batch).logits - expected).abs().max() < 1e-3


SPOILED = {
    "missing": lambda weights, name: weights.pop(name),
    "left over": lambda weights, name: weights.update(
        {name.replace(".layers.0.", ".layers.9."): weights[name].clone()}
    ),
    "of another shape": lambda weights, name: weights.update({name: weights[name].repeat(2, 1)}),
    "not finite": lambda weights, name: weights[name].view(-1)[-1:].fill_(torch.inf),
}


@pytest.mark.parametrize("how", SPOILED)
def test_an_adapter_that_does_not_fit_is_an_error_that_names_weights(make_model, tmp_path, how):
    base, adapter = str(tmp_path / "base"), tmp_path / "adapter"
    make_model().save_pretrained(base)
    model = MMGPTForConditionalGeneration.from_pretrained(base)
    get_peft_model(model, lora_config(model, modules_to_save=["resampler"])).save_pretrained(adapter)
    check_adapter(adapter, model.config)
    weights = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in sorted(weights) if name.endswith("q_proj.lora_B.weight"))
    SPOILED[how](weights, name)
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    layer = "9" if how == "left over" else "0"
    said = rf"does not fit its base: weights are 1 {how}, first \['\S*\.layers\.{layer}\.\S*q_proj\.lora_B"
    loaded = MMGPTForConditionalGeneration.from_pretrained(base)
    doors = [
        lambda: AutoModel.from_pretrained(adapter),
        lambda: AutoModelForImageTextToText.from_pretrained(adapter),
        lambda: loaded.load_adapter(adapter, "other"),
        lambda: check_adapter(adapter, model.config),
    ]
    for door in doors:
        with pytest.raises(ValueError, match=said):
            door()


@pytest.mark.parametrize(
    ("how", "said"),
    [("dora", "missing, first .*lora_magnitude_vector"), ("disk", "lost, .* on the disk, first .*lora_A")],
)
def test_an_adapter_that_transformers_loads_wrongly_is_an_error(make_model, tmp_path, how, said):
    base, adapter = str(tmp_path / "base"), tmp_path / "adapter"
    make_model().save_pretrained(base)
    model = MMGPTForConditionalGeneration.from_pretrained(base)
    get_peft_model(model, lora_config(model, use_dora=how == "dora")).save_pretrained(adapter)
    places = {"model.vision_tower": "cpu", "model.resampler": "cpu", "model.text_model": "disk"}
    options = {"device_map": places, "offload_folder": tmp_path / "disk"} if how == "disk" else {}
    with pytest.raises(ValueError, match=said):
        AutoModel.from_pretrained(adapter, **options)


def test_an_adapter_of_another_base_is_an_error(make_model, tmp_path):
    small, large = (make_model(cross_attn_every_n_layers=n) for n in (2, 1))
    get_peft_model(large, lora_config(large)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="20 left over, first"):
        check_adapter(tmp_path, small.config)


@pytest.fixture
def records(picture):
    def record(number, pictures):
        question = [{"type": "image"}] * pictures + [{"type": "text", "text": f"q{number}"}]
        answer = [{"type": "text", "text": f"a{number}"}]
        messages = [{"role": "system", "content": "P"}, {"role": "user", "content": question},
                    {"role": "assistant", "content": answer}]  # fmt: skip
        return {"messages": messages, "images": [picture(number + k) for k in range(pictures)]}

    return [record(number, pictures) for number, pictures in enumerate((1, 0, 2, 0, 0, 1))]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_training_moves_lora_and_nothing_else(make_model, processor, records, tmp_path, checkpointed):
    model = make_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    config = SFTConfig(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1,
        activation_checkpointing=checkpointed, use_cpu=True, bf16=False, report_to=[], save_strategy="no",
        max_length=None, remove_unused_columns=False, dataset_kwargs={"skip_prepare_dataset": True}, seed=0,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_dict({"record": range(6)}).with_transform(
            lambda batch: {key: [records[i][key] for i in batch["record"]] for key in ("messages", "images")}
        ),
        data_collator=MMGPTCollator(processor),
        processing_class=processor,
        peft_config=lora_config(model, r=4),
    )
    start = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and all(0 < loss < 20 for loss in losses)
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, start[name])}
    assert moved and all("lora_" in name for name in moved)
    assert moved >= {name for name in start if "lora_B" in name}
    for name, parameter in trainer.model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, before[name.removeprefix("base_model.model.").replace(".base_layer", "")])


def test_the_loss_of_the_trainer_is_the_loss_of_the_model(make_model, processor, records, tmp_path):
    model, collator = make_model(), MMGPTCollator(processor)
    expected = model(**collator(records[:3])).loss
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            report_to=[],
            max_length=None,
            remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=Dataset.from_dict({"messages": ["unused"], "images": [[]]}),
        data_collator=collator,
        processing_class=processor,
    )
    assert (trainer.compute_loss(trainer.model, collator(records[:3])) - expected).abs() < 1e-5


def test_a_placeholder_picture_changes_no_loss_and_no_gradient(make_model, processor, records):
    without = [record for record in records if not record["images"]]
    found = []
    for placeholder in (False, True):
        model = make_model().train()
        batch = MMGPTCollator(processor, placeholder_image=placeholder)(without)
        assert ("pixel_values" in batch) == placeholder
        loss = model(**batch).loss
        loss.backward()
        found.append((loss, {n: p.grad for n, p in model.named_parameters()}))
    (plain, grads), (placed, placed_grads) = found
    assert plain.item() == placed.item()
    for name, grad in placed_grads.items():
        if ".gated_cross_attn_layer." in name:
            assert grads[name] is None and grad is not None and (grad == 0).all(), name
        elif grads[name] is not None:
            assert torch.equal(grad, grads[name]), name

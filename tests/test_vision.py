"""The vision tower: open_clip's tokens, adapters and offloading that reach every layer, older names of its weights."""

import copy
import re
import sys
import warnings

import accelerate
import peft
import pytest
import torch
from conftest import BASE, SIDE, VISION
from open_clip.model import CLIP
from open_clip.pos_embed import get_2d_sincos_pos_embed
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText, CLIPVisionConfig, SiglipVisionConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from modeling_mmgpt import MMGPTForConditionalGeneration, MMGPTModel, MMGPTVisionConfig, vision_mmgpt
from modeling_mmgpt.adapters_mmgpt import quantization_config
from modeling_mmgpt.vision_mmgpt import (
    MMGPTVisionBlock,
    build_vision_tower,
    load_vision_tower,
    patch_tokens,
    pooled_features,
)


SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
PARTS = ("model.vision_tower", "model.resampler", "model.text_model")


def other_tower(kind):
    """The argument of `make_model` that puts a vision model of transformers, or for `"ours"` ours, into the slot."""
    if kind == "ours":
        return {}
    config = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}[kind.partition(" ")[0]]
    head = {"vision_use_head": False} if kind == "siglip without head" else {}
    return {"vision_config": config(**SIZES, image_size=SIDE, patch_size=8, **head)}


def to_old_names(weights):
    """Give a state dict the names that open_clip's attention has, and ours had."""
    return {re.sub(r"\.attn\.in_proj\.", ".attn.in_proj_", name): value for name, value in weights.items()}


def batch_of(ids, pixels):
    batch = {**ids("a#b#cd", "abcdef"), "pixel_values": pixels(2, 2)}
    return {**batch, "labels": batch["input_ids"]}


# The tokens


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize(
    "fields",
    [{}, {"ls_init_value": 0.3}, {"no_ln_pre": True}, {"pos_embed_type": "sin_cos_2d"}, {"norm_kwargs": {"eps": 0.1}},
     {"mlp_ratio": 2.5}, {"width": 24, "head_width": 10}, {"act_kwargs": {"approximate": "tanh"}}],
    ids=str,
)  # fmt: skip
def test_the_tokens_are_those_of_open_clip(pixels, fields, quick_gelu, post_norm):
    if quick_gelu and "act_kwargs" in fields:
        pytest.skip("the quick GELU has no arguments")
    sizes = {**VISION, **fields}
    del sizes["quick_gelu"]
    torch.manual_seed(0)
    reference = CLIP(8, sizes, {"width": 16, "heads": 2, "layers": 1}, quick_gelu=quick_gelu).visual
    reference.output_tokens, reference.final_ln_after_pool, reference.proj = True, not post_norm, None
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    config = MMGPTVisionConfig(**sizes, quick_gelu=quick_gelu, post_norm=post_norm)
    tower, _ = load_vision_tower(reference.state_dict(), config)
    for dtype, autocast, tolerance in [
        (torch.float32, False, 1e-5),
        (torch.bfloat16, False, 0.1),
        (torch.float32, True, 0.1),
    ]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            expected = reference.to(dtype)(pixels(2).to(dtype))
            found = tower.to(dtype)(pixels(2).to(dtype))
        for one, other in zip(expected, found, strict=True):
            assert one.dtype == other.dtype and (one - other).abs().max() <= tolerance


def test_a_place_is_drawn_as_open_clip_draws_it(make_model):
    tower = make_model(vision={"ls_init_value": 0.3, "layers": 1}).model.vision_tower
    assert tower.positional_embedding.requires_grad
    config = MMGPTVisionConfig(**VISION, pos_embed_type="sin_cos_2d", ls_init_value=0.3)
    whole = copy.deepcopy(make_model().config)
    whole.vision_config = config
    for tower in (build_vision_tower(config), MMGPTModel(whole).vision_tower):
        expected = torch.from_numpy(get_2d_sincos_pos_embed(16, SIDE // 8, cls_token=True)).float()
        assert torch.allclose(tower.positional_embedding, expected, atol=1e-6)
        assert not tower.positional_embedding.requires_grad
        assert all(bool((block.ls_1.gamma == 0.3).all()) for block in tower.transformer["resblocks"])
        assert 0.5 < tower.class_embedding.std() * 16**0.5 < 1.5


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"width": 25, "head_width": 9}, "25.*heads of 9"), ({"head_width": 32}, "heads of 32"),
     ({"pos_embed_type": "rope"}, "rope")],
)  # fmt: skip
def test_a_tower_that_cannot_be_built_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        MMGPTVisionConfig(**{**VISION, **fields})


def test_compiled_and_eager_towers_are_equal(make_model, pixels):
    tower = make_model().model.vision_tower
    with torch.no_grad():
        expected = patch_tokens(tower, pixels(2)), pooled_features(tower, pixels(2))
        tower.compile(backend="eager", fullgraph=True)
        assert torch.equal(patch_tokens(tower, pixels(2)), expected[0])
        assert torch.equal(pooled_features(tower, pixels(2)), expected[1])


def test_a_norm_gives_back_the_data_type_it_got(make_model, pixels, monkeypatch):
    tower, layer_norm = make_model(dtype=torch.bfloat16).model.vision_tower, torch.nn.functional.layer_norm
    monkeypatch.setattr(  # as autocast on a GPU
        torch.nn.functional, "layer_norm", lambda x, shape, *rest: layer_norm(x, shape, *rest).float()
    )
    assert {found.dtype for found in tower(pixels(1).bfloat16())} == {torch.bfloat16}


def test_a_model_needs_no_open_clip(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "open_clip"]:
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises
    model = AutoModelForImageTextToText.from_pretrained(BASE)
    model(input_ids=torch.tensor([[model.config.image_token_id, 5]]), pixel_values=torch.randn(1, 1, 3, 48, 48))
    with pytest.raises(ImportError, match="open_clip_torch"):
        MMGPTVisionConfig.from_open_clip("ViT-L-14")


# Adapters on the tower


@pytest.mark.parametrize(
    ("options", "checkpointed"),
    [({}, None), ({}, False), ({}, True), ({"use_dora": True}, None)],
    ids=["lora", "lora-checkpointed", "lora-reentrant", "dora"],
)
@pytest.mark.parametrize("kind", ["ours", "clip"])
def test_lora_on_every_linear_layer_learns(make_model, ids, pixels, tmp_path, kind, options, checkpointed):
    base, adapter, batch = tmp_path / "base", tmp_path / "adapter", batch_of(ids, pixels)
    make_model(**other_tower(kind)).save_pretrained(base)
    model = MMGPTForConditionalGeneration.from_pretrained(base)
    plain = model(**batch).logits
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", **options)).train()
    if checkpointed is not None:
        model.activation_checkpointing_enable({"use_reentrant": checkpointed})
    linear = {name for name, module in tuned.named_modules() if name.endswith("lora_A.default")}
    assert any("vision_tower" in name and name.endswith("out_proj.lora_A.default") for name in linear)
    assert kind == "clip" or sum("vision_tower" in name for name in linear) == 2 * 4
    optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = tuned(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert losses[-1] < losses[0]
    expected = tuned.eval()(**batch).logits
    assert (expected - plain).abs().max() > 0.01
    tuned.save_pretrained(adapter)
    loaded = [peft.PeftModel.from_pretrained(MMGPTForConditionalGeneration.from_pretrained(base), adapter)]
    if not options:  # transformers (5.24) itself leaves out the magnitudes of any DoRA, with a warning
        loaded.append(AutoModel.from_pretrained(adapter))
    for again in loaded:
        assert (again.eval()(**batch).logits - expected).abs().max() < 1e-5


def test_an_adapter_that_takes_weights_apart_changes_nothing_before_it_learns(make_model, ids, pixels):
    model, batch = make_model(), batch_of(ids, pixels)
    expected = model(**batch).logits
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights="pissa"))
    assert (tuned.eval()(**batch).logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["ours", "clip"])
def test_a_quantised_base_leaves_the_tower_as_it_is(make_model, kind):
    skipped = quantization_config().llm_int8_skip_modules
    linear = {n for n, m in make_model(**other_tower(kind)).named_modules() if isinstance(m, torch.nn.Linear)}
    quantised = {name for name in linear if should_convert_module(name, skipped)}
    assert any("gated_cross_attn_layer" in name for name in quantised)
    assert any("vision_tower" in name for name in linear - quantised)
    assert not any("vision_tower" in name for name in quantised)


# Checkpointing


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_a_trained_tower_the_same_gradients(make_model, ids, pixels, use_reentrant):
    grads = []
    for checkpointed in (False, True):
        model = make_model().train()
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
            blocks = [module for module in model.modules() if isinstance(module, MMGPTVisionBlock)]
            assert len(blocks) == 2 and all(block.gradient_checkpointing for block in blocks)
        model(**batch_of(ids, pixels)).loss.backward()
        tower = model.model.vision_tower.named_parameters()
        grads.append({name: parameter.grad for name, parameter in tower if "ln_post" not in name})
    for name, plain in grads[0].items():
        assert plain.abs().max() > 0 and torch.allclose(plain, grads[1][name], atol=1e-6), name


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", ["ours", "clip", "siglip"])
def test_a_frozen_tower_builds_no_graph_where_layers_are_checkpointed(make_model, ids, pixels, kind, use_reentrant):
    model, seen = make_model(**other_tower(kind)).train(), []
    model.freeze(vision=True)
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    model.model.resampler.register_forward_pre_hook(lambda _, args: seen.append(args[0].requires_grad))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "None of the inputs have requires_grad")
        model(**batch_of(ids, pixels)).loss.backward()
    assert seen == [False]


def test_pixels_get_a_gradient_through_a_frozen_tower(make_model, pixels):
    model, given = make_model(), pixels(1, 1).requires_grad_()
    model.freeze(vision=True)
    model.model.encode_images(given).sum().backward()
    assert given.grad.abs().max() > 0
    with torch.no_grad():
        assert not model.model.encode_images(given).requires_grad


# Offloading


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", ["ours", "clip", "siglip without head"])
def test_any_part_can_lie_on_the_disk(make_model, ids, pixels, tmp_path, kind, part):
    model, batch = make_model(**other_tower(kind)), batch_of(ids, pixels)
    model.save_pretrained(tmp_path / "base")
    expected = model(**batch).logits
    places = {name: "disk" if name == part else "cpu" for name in PARTS}
    loaded = MMGPTForConditionalGeneration.from_pretrained(
        tmp_path / "base", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert any(parameter.is_meta for parameter in loaded.get_submodule(part).parameters())
    assert torch.equal(loaded(**batch).logits, expected)


@pytest.mark.parametrize("name", ["model.vision_tower", "model.text_model.model.layers.1.gated_cross_attn_layer", ""])
def test_any_part_can_be_offloaded_by_accelerate(make_model, ids, pixels, tmp_path, name):
    for offload in (accelerate.cpu_offload, lambda *args, **kw: accelerate.disk_offload(args[0], tmp_path, **kw)):
        model, batch = make_model(), batch_of(ids, pixels)
        expected = model(**batch).logits
        offload(model.get_submodule(name), execution_device="cpu")
        assert any(parameter.is_meta for parameter in model.get_submodule(name).parameters())
        assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("kind", ["ours", "clip", "siglip"])
def test_the_tower_stays_whole_on_a_device_and_all_that_is_named_is_there(make_model, kind):
    """FSDP makes a unit of each class that is named, and fails at the name of one that is not in the model."""
    model = make_model(**other_tower(kind))
    names = {type(module).__name__ for module in model.modules()}
    tower, *parts = model.model.vision_tower.modules()
    assert {"MMGPTGatedCrossAttentionBlock", "LlamaDecoderLayer", type(tower).__name__} == model._no_split_modules
    assert model._no_split_modules <= names
    assert model._no_split_modules.isdisjoint(type(part).__name__ for part in parts)


def test_a_tower_is_not_drawn_where_zero_3_has_taken_it_apart(monkeypatch):
    """DeepSpeed empties each layer as soon as it is built, when a model is loaded under ZeRO-3."""

    class Emptied(torch.nn.Linear):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.weight = torch.nn.Parameter(torch.empty(0))

    monkeypatch.setattr(torch.nn, "Linear", Emptied)
    with pytest.raises(ValueError, match="Fan in"):
        build_vision_tower(MMGPTVisionConfig(**VISION))
    monkeypatch.setattr(vision_mmgpt, "is_deepspeed_zero3_enabled", lambda: True)
    build_vision_tower(MMGPTVisionConfig(**VISION))


# The older names


@pytest.fixture
def old_folder(make_model, tmp_path):
    """A base saved when the tower was open_clip's own module."""
    folder = tmp_path / "old"
    make_model().save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    save_file(to_old_names(weights), folder / "model.safetensors", metadata={"format": "pt"})
    assert set(load_file(folder / "model.safetensors")) != set(weights)
    return folder


def test_a_folder_under_the_older_names_loads_whatever_loads_it(make_model, make_adapter, old_folder, tmp_path):
    expected = make_model().state_dict()
    places = {"model.vision_tower": "disk", "model.resampler": "cpu", "model.text_model": "cpu"}
    for auto, options in [
        (MMGPTForConditionalGeneration, {}),
        (AutoModel, {}),
        (AutoModelForImageTextToText, {"dtype": torch.float32, "key_mapping": None}),
        (AutoModelForImageTextToText, {"key_mapping": {"^no such name": "nor such"}}),
        (AutoModelForImageTextToText, {"device_map": places, "offload_folder": tmp_path / "offload"}),
    ]:
        model, report = auto.from_pretrained(old_folder, output_loading_info=True, **options)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        for name, value in model.state_dict().items():
            assert value.is_meta or torch.equal(value, expected[name]), name
    inner, report = MMGPTModel.from_pretrained(old_folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert torch.equal(inner.vision_tower.conv1.weight, expected["model.vision_tower.conv1.weight"])


def test_a_folder_under_the_older_names_is_saved_under_the_new_ones(make_model, old_folder, tmp_path):
    places = {"model.vision_tower": "disk", "model.resampler": "cpu", "model.text_model": "cpu"}
    expected = make_model().state_dict()
    for number, options in enumerate(({}, {"device_map": places, "offload_folder": tmp_path / "offload"})):
        model = AutoModelForImageTextToText.from_pretrained(old_folder, **options)
        model.save_pretrained(tmp_path / str(number))
        saved = load_file(tmp_path / str(number) / "model.safetensors")
        assert set(saved) == set(expected)
        assert all(torch.equal(value, expected[name]) for name, value in saved.items())


def test_an_adapter_reaches_a_base_under_the_older_names(old_folder, ids, pixels, tmp_path):
    batch = batch_of(ids, pixels)
    model = MMGPTForConditionalGeneration.from_pretrained(old_folder)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    expected = tuned.eval()(**batch).logits
    tuned.save_pretrained(tmp_path / "adapter")
    for auto in (AutoModel, AutoModelForImageTextToText):
        assert (auto.from_pretrained(tmp_path / "adapter").eval()(**batch).logits - expected).abs().max() < 1e-5


def test_a_state_dict_under_the_older_names_loads_strictly(make_model):
    model, weights = make_model(seed=1), make_model().state_dict()
    given = to_old_names(weights)
    assert set(given) != set(weights)
    model.load_state_dict(given)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert set(given) == set(to_old_names(weights))  # what was given is as it was
    given.pop("model.vision_tower.transformer.resblocks.1.attn.in_proj_bias")
    with pytest.raises(RuntimeError, match=r"resblocks\.1\.attn\.in_proj\.bias"):
        model.load_state_dict(given)


def test_an_lm_or_another_tower_keeps_names_that_look_alike(make_model, tmp_path):
    model = make_model(**other_tower("siglip"))
    assert "model.vision_tower.head.attention.in_proj_weight" in model.state_dict()
    model.save_pretrained(tmp_path)
    again, report = MMGPTForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]

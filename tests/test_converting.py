"""Old checkpoints give the numbers they were trained to give.

The folders in `goldens/` were made by the reference code (Multimodal-GPT 9c73e47, open_flamingo 2.0.1, transformers
4.28.1, open_clip 2.20.0, PEFT 0.3.0) on tiny random models with open gates. A test runs for every case whose file is
there; what has no file is left out to keep the repository small.
"""

import json
import logging
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import open_clip
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_world import evaluation
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    MptConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from modeling_mmgpt import MMGPTConfig, MMGPTForConditionalGeneration, MMGPTVisionConfig
from modeling_mmgpt import converting_mmgpt as converting
from modeling_mmgpt.conditioning_mmgpt import decoder_layers
from modeling_mmgpt.conversion import parts
from modeling_mmgpt.conversion.names import rename
from modeling_mmgpt.conversion.old_files import read_weights
from modeling_mmgpt.converting_mmgpt import convert_flamingo, convert_lora
from modeling_mmgpt.vision_mmgpt import patch_tokens


GOLDENS = Path(__file__).parent / "goldens"
V1, V2, LORA = GOLDENS / "flamingo_llama_v1", GOLDENS / "flamingo_v2", GOLDENS / "mmgpt_lora" / "every2"
MODES = {
    "attend_following": "following",
    "attend_previous": "preceding",
    "attend_previous__all_media": "all_preceding",
    "immediate": "preceding",
    "all_media": "all_preceding",
    "text_only": "following",
}  # `attend_following__all_media` is no mode of ours
TOLERANCE = 1e-4


@pytest.fixture(scope="module", autouse=True)
def _no_progress_bar():
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


def read_json(path):
    return json.loads(path.read_text())


def arguments(folder, **changes):
    """The arguments of `convert_flamingo` for a folder of goldens."""
    config = read_json(folder / "config.json")
    resampler, block = config["perceiver"], config["cross_attn"]
    head = folder / "lm_head_resized.safetensors"
    return {
        "checkpoint": folder / "checkpoint.pt",
        "language_model": folder / "lm",
        "vision_tower": folder / "vision_open_clip.safetensors",
        "vision_config": config["vision_open_clip_config"],
        "cross_attn_every_n_layers": config["cross_attn_every_n_layers"],
        "media_attention": "following" if "flamingo_v2" not in str(folder) else "preceding",
        "image_token_id": config["image_token_id"],
        "end_of_chunk_token_id": config["endofchunk_token_id"],
        "pad_token_id": config["pad_token_id"],
        "resampler": {"num_heads": resampler["heads"], "head_dim": resampler["dim_head"]},
        "cross_attention": {"num_heads": block["heads"], "head_dim": block["dim_head"]},
        "lm_head": head if head.exists() else None,
        **changes,
    }


def convert(folder, **changes):
    return convert_flamingo(**arguments(folder, **changes))


def cases(*wanted):
    """Folder, layout and mode of every forward case whose file is here."""
    found = []
    for index in sorted(GOLDENS.glob("*/*/cases.json")):
        for name in read_json(index):
            layout, mode = name.split("__", 1)
            if (index.parent / f"cases/{name}.safetensors").exists() and mode in wanted:
                found.append(pytest.param(index.parent, layout, mode, id=f"{index.parent.name}-{name}"))
    return found


def load_case(folder, layout, mode):
    inputs = load_file(folder / f"cases/{layout}.inputs.safetensors")
    outputs = load_file(folder / f"cases/{layout}__{mode}.safetensors")
    batch = {key.removeprefix("input."): value for key, value in inputs.items() if key.startswith("input.")}
    outputs.update({key: value for key, value in inputs.items() if key.startswith("output.")})
    return batch, {key.removeprefix("output."): value for key, value in outputs.items()}


def blocks(model):
    layers = decoder_layers(model.model.text_model)
    return {
        number: layer.gated_cross_attn_layer
        for number, layer in enumerate(layers)
        if layer.gated_cross_attn_layer is not None
    }


def run(model, batch):
    """Outputs by the names they have in the goldens."""
    found, hooks = {}, []
    for number, block in blocks(model).items():
        hooks.append(
            block.register_forward_hook(lambda _, __, out, name=f"xattn_block.{number}": found.update({name: out}))
        )
    outputs = model(**batch, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    found.update({f"hidden_states.{number}": state for number, state in enumerate(outputs.hidden_states)})
    if "pixel_values" in batch:
        pixels = batch["pixel_values"]
        found["vision_tokens"] = patch_tokens(model.model.vision_tower, pixels.flatten(0, 2)).unflatten(
            0, pixels.shape[:3]
        )
        found["perceiver"] = model.model.encode_images(pixels)
    return {**found, "logits": outputs.logits, "loss": outputs.loss[None]}


def difference(found, expected, mask):
    """Largest difference, at the tokens of `mask` `(B, T)` if there are tokens."""
    if found.shape[:2] == mask.shape and found.dim() == 3:
        found, expected = found[mask], expected[mask]
    return (found - expected).abs().max().item()


# --- the numbers of the reference ---


@pytest.mark.parametrize(
    ("folder", "layout", "mode"), cases("attend_following", "attend_previous", "immediate", "text_only")
)
@torch.no_grad()
def test_every_output_is_that_of_the_reference(folder, layout, mode):
    model = convert(folder, media_attention=MODES[mode])
    batch, expected = load_case(folder, layout, mode)
    if "logits_lora_off" in expected:
        expected = {"logits": expected["logits_lora_off"]}
    found, mask = run(model, batch), batch["attention_mask"].bool()
    differences = {name: difference(found[name], value, mask) for name, value in expected.items()}
    assert differences and max(differences.values()) <= TOLERANCE, differences


@pytest.mark.parametrize(("folder", "layout", "mode"), cases("all_media", "attend_previous__all_media"))
@torch.no_grad()
def test_all_media_is_all_preceding_where_an_image_is_allowed(folder, layout, mode):
    """Before the first image the reference averages all slots, ours attends to none: there, take its values."""
    model = convert(folder, media_attention=MODES[mode])
    batch, expected = load_case(folder, layout, mode)
    allowed = (batch["input_ids"] == model.config.image_token_id).cumsum(dim=1) > 0
    found = {}
    for number, block in blocks(model).items():

        def as_the_reference(_, __, out, name=f"xattn_block.{number}"):
            found[name] = out
            return out.where(allowed[..., None], expected[name])

        block.register_forward_hook(as_the_reference)
    found["logits"] = model(**batch, use_cache=False).logits
    mask = batch["attention_mask"].bool() & allowed
    differences = {name: difference(value, expected[name], mask) for name, value in found.items()}
    assert max(differences.values()) <= TOLERANCE, differences
    first = min(blocks(model))
    assert difference(found[f"xattn_block.{first}"], expected[f"xattn_block.{first}"], ~allowed) > 1e-2


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, id=f"{p.parts[-3]}-{p.stem}") for p in sorted(GOLDENS.glob("*/*/cases/*.grad_norms.json"))],
)
def test_gradient_norms(path):
    folder, (layout, mode) = path.parents[1], path.name.removesuffix(".grad_norms.json").split("__", 1)
    model = convert(folder, media_attention=MODES[mode])
    inputs = load_file(folder / f"cases/{layout}.inputs.safetensors")
    batch = {key.removeprefix("input."): value for key, value in inputs.items() if key.startswith("input.")}
    model(**batch).loss.backward()
    names = {old: torch.empty(0) for old in read_json(path)}
    parameters = dict(model.named_parameters())
    for new, (old, _) in rename(names, model.model.text_model).items():
        norm = parameters[new].grad.norm().item()
        # A gate's gradient is one sum over all tokens: where it cancels to 1e-3, float32 leaves 1e-7 of noise.
        assert norm == pytest.approx(read_json(path)[old], rel=TOLERANCE, abs=1e-6), old


def generations():
    return [
        pytest.param(path, id=f"{path.parts[-3]}-{path.stem}")
        for path in sorted(GOLDENS.glob("*/*/generation/*.safetensors"))
    ]


def load_generation(path):
    tensors = load_file(path)
    batch = {key.removeprefix("input."): value for key, value in tensors.items() if key.startswith("input.")}
    outputs = {key.removeprefix("output."): value for key, value in tensors.items() if key.startswith("output.")}
    return batch, outputs, read_json(path.parents[1] / "generation.json")[path.stem]


@pytest.mark.parametrize("path", generations())
def test_generations(path):
    batch, expected, settings = load_generation(path)
    options = {"max_new_tokens": settings["max_new_tokens"], "do_sample": False, "suppress_tokens": []}
    ends = {"eos_token_id": settings["eos_token_id"], "pad_token_id": 0}
    is_v1 = "flamingo_v2" not in str(path)
    compared = 0
    for mode in ("attend_following", "attend_previous") if is_v1 else ("immediate",):
        model = convert(path.parents[1], media_attention=MODES[mode])
        prefix = f"{mode}." if is_v1 else ""
        for search, beams in (("greedy", 1), ("beam3", 3)):
            names = [f"{search}_no_cache"] if is_v1 else [search]
            if mode == "attend_following":
                names.append(f"{search}_reference_cached")
            for use_cache in (True, False):
                ids = model.generate(**batch, **options, **ends, num_beams=beams, use_cache=use_cache)
                for name in names:
                    assert torch.equal(ids, expected[prefix + name]), (name, use_cache)
                    compared += 1
    if not is_v1:
        stop = model.generate(**batch, **options, **settings["stop_variant"])
        assert torch.equal(stop, expected["greedy_stop"])
    assert compared == (12 if is_v1 else 4)


# --- LoRA ---


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The converted base of the adapters, as a folder."""
    folder = tmp_path_factory.mktemp("base")
    convert(LORA).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return convert_lora(LORA / "final_weights_mmengine_config.pt", base, tmp_path_factory.mktemp("lora") / "adapter")


def with_lora(base, adapter, mode="following", trainable=False):
    model = MMGPTForConditionalGeneration.from_pretrained(base, media_attention=mode)
    return PeftModel.from_pretrained(model, adapter, is_trainable=trainable).eval()


def lora_parameters(model):
    """The LoRA's parameters, by their old names."""
    return {
        name.replace("base_model.model.model.text_model.", "lang_encoder.base_model.model."): parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }


@pytest.mark.parametrize(
    ("folder", "layout", "mode"),
    [case for case in cases("attend_following", "attend_previous", "text_only") if case.values[0] == LORA],
)
def test_lora_on_and_off_with_its_gradients(base, adapter, folder, layout, mode):
    model = with_lora(base, adapter, MODES[mode], trainable=True)
    batch, expected = load_case(folder, layout, mode)
    mask = batch["attention_mask"].bool()
    outputs = model(**batch)
    assert difference(outputs.logits, expected["logits"], mask) <= TOLERANCE
    assert abs(outputs.loss - expected["loss"]).item() <= TOLERANCE
    with model.disable_adapter(), torch.no_grad():
        assert difference(model(**batch).logits, expected["logits_lora_off"], mask) <= TOLERANCE
    outputs.loss.backward()
    gradients = {name.removeprefix("grad."): value for name, value in expected.items() if name.startswith("grad.")}
    parameters = lora_parameters(model)
    assert len(gradients) == (52 if "pixel_values" in batch else 32) and len(parameters) == 52
    for name, gradient in gradients.items():
        assert (parameters[name].grad - gradient).norm() <= TOLERANCE * gradient.norm(), name
    for name in set(parameters) - set(gradients):  # the blocks of a row without an image
        assert parameters[name].grad is None or not parameters[name].grad.any(), name


def losses_of(model, batches, kinds, number):
    for kind in kinds:
        batch = {name.split(".")[-1]: value for name, value in batches.items() if name.startswith(f"{kind}.{number}.")}
        if "image" in batch:
            batch["pixel_values"] = batch.pop("image")[:, None]
        yield model(**batch).loss


@pytest.mark.parametrize(
    "name", [path.stem for path in sorted(LORA.glob("train/*.safetensors")) if path.stem != "batches"]
)
def test_training_trajectory(base, adapter, name):
    """The reference's loop: clipped after every micro step, weight decay on the blocks only."""
    settings, expected = read_json(LORA / "train/runs.json")[name], load_file(LORA / f"train/{name}.safetensors")
    batches = load_file(LORA / "train/batches.safetensors")
    model = with_lora(base, adapter, trainable=True)
    parameters = lora_parameters(model)
    decayed = [value for key, value in parameters.items() if "gated_cross_attn_layer" in key]
    others = [value for key, value in parameters.items() if "gated_cross_attn_layer" not in key]
    groups = [{"params": decayed, "weight_decay": settings["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
    optimizer, losses, rates = torch.optim.AdamW(groups), [], list(settings["lr_used_at_each_optimizer_step"])
    accumulation, steps = settings["gradient_accumulation_steps"], settings["micro_steps"]
    kinds = ["vision", "language"] if settings["with_language_batches"] else ["vision"]
    for step in range(steps):
        for loss in losses_of(model, batches, kinds, step):
            losses.append(loss.item())
            (loss / accumulation).backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), settings["max_grad_norm"])
        assert norm.item() == pytest.approx(settings["grad_norm_before_clip_each_micro_step"][step], rel=TOLERANCE)
        if (step + 1) % accumulation == 0 or step + 1 == steps:
            rate = rates.pop(0)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
    assert not rates
    assert losses == pytest.approx([entry["loss"] for entry in settings["losses_in_order"]], abs=TOLERANCE)
    for key, value in expected.items():
        if key.startswith("final."):
            assert (parameters[key.removeprefix("final.")] - value).abs().max() <= TOLERANCE, key


def lora_file(form, folder):
    """Write a form of the LoRA file that `final_weights_mmengine_config.pt` does not have; the tensors are its own."""
    weights, settings = read_weights(LORA / "final_weights_mmengine_config.pt")
    outer, epoch = {"tuning_config": settings}, {"epoch": 0, "optimizer_state_dict": {}, "lr_scheduler_state_dict": {}}
    prefixed = {f"module.{name}": value for name, value in weights.items()}
    peft_02 = {name.replace(".default.", "."): value for name, value in weights.items()}
    if form.endswith(".safetensors"):
        save_file(weights if "peft" not in form else peft_02, folder / form)
        return folder / form
    contents = {
        "final_weights.pt": {"model_state_dict": weights, "tuning_config": outer},
        "checkpoint_0.pt": {"model_state_dict": prefixed, "tuning_config": outer, **epoch},
        "release_style_module_prefix.pt": {"model_state_dict": prefixed, "tuning_config": settings},
        "final_weights_peft020_names.pt": {"model_state_dict": peft_02, "tuning_config": outer},
    }[form]
    torch.save(contents, folder / form)
    return folder / form


FORMS = (
    "final_weights.pt",
    "final_weights_mmengine_config.pt",
    "checkpoint_0.pt",
    "release_style_module_prefix.pt",
    "final_weights_peft020_names.pt",
    "final_weights.safetensors",
    "final_weights_peft020_names.safetensors",
)


@pytest.mark.parametrize("form", FORMS)
def test_seven_forms_of_an_adapter(base, adapter, tmp_path, form):
    path = LORA / form if (LORA / form).exists() else lora_file(form, tmp_path)
    converted = convert_lora(path, base, tmp_path / "out", lora_alpha=None if form.endswith(".pt") else 8)
    assert converted == tmp_path / "out"
    assert sorted(file.name for file in converted.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config, tensors = read_json(converted / "adapter_config.json"), load_file(converted / "adapter_model.safetensors")
    assert (config["r"], config["lora_alpha"], len(tensors)) == (4, 8, 52)
    assert (config["base_model_name_or_path"], config["inference_mode"]) == (str(base), True)
    first = load_file(adapter / "adapter_model.safetensors")
    assert tensors.keys() == first.keys() and all(torch.equal(tensors[name], first[name]) for name in first)


@torch.no_grad()
def test_an_adapter_loads_by_peft_and_by_auto_model(base, adapter):
    batch, expected = load_case(LORA, "a_one_image", "attend_following")
    for model in (with_lora(base, adapter), AutoModel.from_pretrained(adapter).eval()):
        assert difference(model(**batch).logits, expected["logits"], batch["attention_mask"].bool()) <= TOLERANCE


# --- the forms of a checkpoint ---


def save_old(weights, path):
    torch.save(weights, path)
    return path


def same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def unfiltered(folder):
    """The complete state dict of an OpenFlamingo 2 model, from its filtered one, its LM and its tower."""
    weights = torch.load(folder / "checkpoint.pt", weights_only=True)
    lm = load_file(folder / "lm/model.safetensors")
    lm.update({"lm_head.weight": load_file(folder / "lm_head_resized.safetensors")["lm_head.weight"]})
    tower = load_file(folder / "vision_open_clip.safetensors")
    listing, complete = read_json(folder / "checkpoint_unfiltered_keys_ddp.json"), {}
    for key in (key.removeprefix("module.") for key in listing):
        same = key.replace("lang_encoder.gated_cross_attn_layers", "lang_encoder.model.layers")
        same = same.replace("lang_encoder.old_decoder_blocks", "lang_encoder.model.layers")
        if "gated_cross_attn_layers" in key:
            number = same.split(".")[3]
            same = same.replace(f"layers.{number}.", f"layers.{number}.gated_cross_attn_layer.")
        elif "old_decoder_blocks" in key:
            number = same.split(".")[3]
            same = same.replace(f"layers.{number}.", f"layers.{number}.decoder_layer.")
        plain = same.replace("lang_encoder.", "").replace("decoder_layer.", "")
        places = (weights, same), (lm, plain), (tower, key.replace("vision_encoder.", "visual."))
        complete[key] = next(tensors[name] for tensors, name in places if name in tensors)
        assert list(complete[key].shape) == listing[f"module.{key}"]
    return complete


@pytest.mark.parametrize("form", ["ddp", "training", "unfiltered", "unfiltered_ddp"])
def test_every_form_of_a_checkpoint_is_the_same_model(tmp_path, form):
    folder = V2 / "llama"
    weights = unfiltered(folder) if "unfiltered" in form else torch.load(folder / "checkpoint.pt", weights_only=True)
    if form != "unfiltered":
        weights = {f"module.{key}": value for key, value in weights.items()}
    if form == "training":
        weights = {"epoch": 0, "model_state_dict": weights, "optimizer_state_dict": {}, "lr_scheduler_state_dict": {}}
    path = save_old(weights, tmp_path / "checkpoint.pt")
    head = {"lm_head": None} if "unfiltered" in form else {}
    assert same_weights(convert(folder, checkpoint=path, **head), convert(folder))


def test_an_unfiltered_checkpoint_wins_over_the_files_beside_it(tmp_path):
    folder = V2 / "llama"
    weights = unfiltered(folder)
    for key in ("lang_encoder.model.layers.2.decoder_layer.mlp.up_proj.weight", "vision_encoder.ln_pre.bias"):
        weights[key] = weights[key] + 1
    alias = "lang_encoder.old_decoder_blocks.2.mlp.up_proj.weight"
    path = save_old(weights, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=f"(?s){alias}.*two names of one weight"):
        convert(folder, checkpoint=path, lm_head=None)
    del weights[alias]
    model = convert(folder, checkpoint=save_old(weights, path), lm_head=None)
    found = model.state_dict()["model.text_model.model.layers.2.decoder_layer.mlp.up_proj.weight"]
    assert torch.equal(found, weights["lang_encoder.model.layers.2.decoder_layer.mlp.up_proj.weight"])
    assert torch.equal(model.state_dict()["model.vision_tower.ln_pre.bias"], weights["vision_encoder.ln_pre.bias"])


def old_names(model):
    """A complete checkpoint of a model, by the old names and aliases."""
    weights = {
        key.replace("model.text_model.", "lang_encoder.")
        .replace("model.resampler.", "perceiver.")
        .replace("model.vision_tower.", "vision_encoder.visual."): value.clone()
        for key, value in model.state_dict().items()
    }
    for key, value in list(weights.items()):
        key = re.sub(r"^lang_encoder\..*?(\.\d+)\.decoder_layer\.", r"lang_encoder.old_decoder_blocks\1.", key)
        key = re.sub(
            r"^lang_encoder\..*?(\.\d+)\.gated_cross_attn_layer\.", r"lang_encoder.gated_cross_attn_layers\1.", key
        )
        weights[key] = value
    return weights


@pytest.fixture
def old_files(tmp_path, make_lm):
    """Take a model apart into what `convert_flamingo` wants."""

    def make(model, keep=lambda key: True, rows=None):
        lm = make_lm(model)
        lm.resize_token_embeddings(rows or lm.config.vocab_size, mean_resizing=False)
        lm.save_pretrained(tmp_path / "lm")
        tower = {f"visual.{key}": value for key, value in model.model.vision_tower.state_dict().items()}
        save_file(tower, tmp_path / "vision.safetensors")
        weights = {key: value for key, value in old_names(model).items() if keep(key)}
        vision = {
            key: getattr(model.config.vision_config, key)
            for key in ("width", "layers", "head_width", "patch_size", "image_size")
        }
        return {
            "checkpoint": save_old(weights, tmp_path / "checkpoint.pt"),
            "language_model": tmp_path / "lm",
            "vision_tower": tmp_path / "vision.safetensors",
            "vision_config": {"vision_cfg": vision, "quick_gelu": True},
            "cross_attn_every_n_layers": 2,
            "media_attention": "preceding",
            "image_token_id": model.config.image_token_id,
            "end_of_chunk_token_id": model.config.end_of_chunk_token_id,
            "resampler": {"num_heads": 2, "head_dim": 8},
            "cross_attention": {"num_heads": 2, "head_dim": 8},
        }

    return make


def filtered(key):
    """What OpenFlamingo 2 keeps: what it trained, and every name with `embed` in it."""
    return key.startswith("perceiver") or any(part in key for part in ("gated_cross_attn_layer", "embed", "wte"))


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox", "mpt", "gptj"])
@pytest.mark.parametrize("complete", [False, True])
@torch.no_grad()
def test_a_model_taken_apart_comes_back(make_model, old_files, ids, pixels, family, complete):
    model = make_model(family)
    # 50,432 rows in MPT-7B, 50,280 in its OpenFlamingo: a vocabulary can shrink too
    options = old_files(model, (lambda key: True) if complete else filtered, rows=272)
    again = convert_flamingo(**options)
    batch = {**ids("a#b#cd", "__ab#f"), "pixel_values": pixels(2, 2)}
    real = batch["attention_mask"].bool()
    assert torch.equal(again(**batch).logits[real], model(**batch).logits[real])
    assert again.config.text_config.vocab_size == model.config.text_config.vocab_size and not again.training


# What the config.json of mosaicml/mpt-7b has beside the sizes, and the names of a layer in its checkpoint.
MPT_7B = {
    "architectures": ["MPTForCausalLM"],
    "attn_config": {
        "alibi": True,
        "alibi_bias_max": 8,
        "attn_impl": "torch",
        "attn_pdrop": 0,
        "attn_type": "multihead_attention",
        "attn_uses_sequence_id": False,
        "clip_qkv": None,
        "prefix_lm": False,
        "qk_ln": False,
        "softmax_scale": None,
    },
    "auto_map": {
        "AutoConfig": "configuration_mpt.MPTConfig",
        "AutoModelForCausalLM": "modeling_mpt.MPTForCausalLM",
    },
    "emb_pdrop": 0,
    "embedding_fraction": 1.0,
    "expansion_ratio": 4,
    "init_config": {"name": "kaiming_normal_", "init_div_is_residual": True},
    "init_device": "cpu",
    "learned_pos_emb": True,
    "logit_scale": None,
    "model_type": "mpt",
    "no_bias": True,
    "norm_type": "low_precision_layernorm",
    "resid_pdrop": 0,
    "tokenizer_name": "EleutherAI/gpt-neox-20b",
    "use_cache": False,
    "verbose": 0,
}
MPT_7B_LAYER = {"norm_1", "attn.Wqkv", "attn.out_proj", "norm_2", "ffn.up_proj", "ffn.down_proj"}


@torch.no_grad()
def test_mpt_in_the_layout_of_the_7b(make_model, old_files, ids, pixels):
    model = make_model("mpt")
    options = old_files(model, filtered, rows=272)
    layer = "lang_encoder.old_decoder_blocks.0."
    names = {key.removeprefix(layer) for key in old_names(model) if key.startswith(layer)}
    assert names == {f"{name}.weight" for name in MPT_7B_LAYER}
    path = options["language_model"] / "config.json"
    path.write_text(json.dumps({**read_json(path), **MPT_7B}))
    again, batch = convert_flamingo(**options), {**ids("a#b#cd", "__ab#f"), "pixel_values": pixels(2, 2)}
    real = batch["attention_mask"].bool()
    assert torch.equal(again(**batch).logits[real], model(**batch).logits[real])


@pytest.mark.parametrize(
    "path", sorted(GOLDENS.glob("*/*/checkpoint_unfiltered_keys_ddp.json")), ids=lambda p: p.parts[-2]
)
def test_every_key_of_the_complete_listings_has_its_place(path, tmp_path):
    """Shapes alone: a checkpoint of ones, laid over a fresh LM and tower."""
    folder = path.parent
    config = AutoConfig.from_pretrained(folder / "lm")
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "lm")
    listing = read_json(path)
    weights = {key: torch.ones(shape) for key, shape in listing.items()}
    tower = {
        key.replace("module.vision_encoder.", "visual."): value for key, value in weights.items() if "vision" in key
    }
    save_file(tower, tmp_path / "vision.safetensors")
    checkpoint = save_old(weights, tmp_path / "checkpoint.pt")
    changes = {"checkpoint": checkpoint, "language_model": tmp_path / "lm", "lm_head": None}
    model = convert(folder, **changes, vision_tower=tmp_path / "vision.safetensors")
    assert all((value == 1).all() for value in model.state_dict().values())


@torch.no_grad()
def test_frame_and_image_embeddings(make_model, old_files, ids, pixels):
    sizes = {"num_heads": 2, "head_dim": 8}
    resampler = {**sizes, "depth": 3, "num_latents": 5, "max_num_frames": 4, "max_num_images": 3, "ff_mult": 2}
    model = make_model(resampler=resampler, cross_attention={**sizes, "ff_mult": 3})
    again = convert_flamingo(**old_files(model))
    assert (again.config.resampler, again.config.cross_attention) == (
        model.config.resampler,
        model.config.cross_attention,
    )
    batch = {**ids("a#b#cd"), "pixel_values": pixels(1, 2, 3)}
    assert torch.equal(again(**batch).logits, model(**batch).logits)


@torch.no_grad()
def test_the_text_tower_of_clip_is_ballast(make_model, old_files, ids, pixels):
    model = make_model()
    options = old_files(model)
    weights = torch.load(options["checkpoint"], weights_only=True)
    for key in ("transformer.resblocks.0.ln_1.weight", "positional_embedding", "logit_scale", "visual.proj"):
        weights[f"vision_encoder.{key}"] = torch.ones(3)
    save_old(weights, options["checkpoint"])
    batch = {**ids("a#b"), "pixel_values": pixels(1, 1)}
    assert torch.equal(convert_flamingo(**options)(**batch).logits, model(**batch).logits)


def test_tower_tokens_after_the_norm_on_demand(pixels):
    folder = V1 / "every1"
    before, after = convert(folder), convert(folder, vision_post_norm=True)
    assert after.config.vision_config.post_norm and not before.config.vision_config.post_norm
    tokens = [patch_tokens(model.model.vision_tower, pixels(2)) for model in (before, after)]
    assert torch.allclose(before.model.vision_tower.ln_post(tokens[0]), tokens[1], atol=1e-6)
    assert (tokens[0] - tokens[1]).abs().max() > 1


def test_the_rows_of_added_tokens_that_nobody_saved_are_the_mean(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(parts.logger, "propagate", True)
    folder = V1 / "every1"
    with caplog.at_level("WARNING"):
        model = convert(folder, lm_head=None)
    assert "rows 300 to 302" in caplog.text and "mean" in caplog.text
    head = model.get_output_embeddings().weight
    assert torch.allclose(head[300:], head[:300].mean(dim=0).expand(3, -1), atol=1e-6)
    caplog.clear()
    convert(folder)
    assert "rows" not in caplog.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_take_the_dtype_asked_for(dtype):
    model, single = convert(V1 / "every1", dtype=dtype), convert(V1 / "every1")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert same_weights(model, single.to(dtype))
    assert torch.get_default_dtype() == torch.float32


# --- bad input ---


class Bomb:
    """Leaves a file behind if its pickle is run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def inject(source, target, text, payload):
    """Copy a `.pt` with other bytes in its pickle."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for item in old.infolist():
            data = old.read(item)
            assert (text in data) == item.filename.endswith("data.pkl")
            new.writestr(item, data.replace(text, payload))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("where", ["weights", "config", "plain", "legacy"])
def test_a_hostile_pickle_does_not_run(tmp_path, base, where):
    burnt, path = tmp_path / "burnt", tmp_path / "hostile.pt"
    if where == "weights":
        torch.save({"model_state_dict": {"a": Bomb(burnt)}}, path)
    elif where == "config":  # in the place of a text in the state of an honest mmengine config
        text = b"configs/lora_config.py"
        text = b"X" + len(text).to_bytes(4, "little") + text
        call = b"cposix\nmkdir\n(X" + len(str(burnt)).to_bytes(4, "little") + str(burnt).encode() + b"tR"
        inject(LORA / "final_weights_mmengine_config.pt", path, text, call)
    elif where == "legacy":
        torch.save({"a": Bomb(burnt)}, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(Bomb(burnt)))
    before, what = torch.serialization.get_safe_globals(), "Unsupported operand" if where == "plain" else "posix.mkdir"
    with pytest.raises(ValueError, match=f"{what} .*nothing in it was run"):
        convert_lora(path, base, tmp_path / "out", lora_alpha=8)
    with pytest.raises(ValueError, match=f"{what} .*nothing in it was run"):
        convert(V1 / "every1", checkpoint=path)
    assert not burnt.exists() and not (tmp_path / "out").exists()
    assert set(torch.serialization.get_safe_globals()) == set(before)
    if where != "plain":  # the payload is live: Python's own unpickler would run it
        pickle.loads(pickle.dumps(Bomb(burnt)))
        assert burnt.exists()


def rewritten(source, target, name, change):
    """Copy a `.pt` with another content, and its checksum, in one record."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for item in old.infolist():
            data = old.read(item)
            new.writestr(item.filename, change(data) if item.filename.endswith(name) else data)


def flipped(source, target, name, at):
    """Copy a `.pt` with a bit flipped in one record; its checksum stays."""
    with zipfile.ZipFile(source) as file:
        (record,) = [file.read(item) for item in file.infolist() if item.filename.endswith(name)]
    content = bytearray(source.read_bytes())
    content[content.index(record) + record.index(at)] ^= 1
    target.write_bytes(content)


def claimed(pickled: bytes) -> bytes:
    """A pickle whose first storage claims 2^40 numbers."""
    found = re.search(rb"cpuq.(K.|M..|J....)", pickled, re.S)
    return pickled[: found.start(1)] + b"\x8a\x06" + (2**40).to_bytes(6, "little") + pickled[found.end(1) :]


DAMAGED = {
    "a short record": lambda source, target: rewritten(source, target, "/data/1", lambda data: data[:-8]),
    "a flipped bit": lambda source, target: flipped(source, target, "/data/1", b""),
    "2^40 numbers": lambda source, target: rewritten(source, target, ".pkl", claimed),
}


@pytest.mark.parametrize("how", DAMAGED)
@pytest.mark.parametrize("source", [V1 / "every1/checkpoint.pt", LORA / "final_weights_mmengine_config.pt"])
def test_a_zip_is_held_to_its_own_sizes_and_checksums(tmp_path, source, how):
    path = tmp_path / "damaged.pt"
    DAMAGED[how](source, path)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(
        ValueError, match=r"damaged.pt is damaged: the records of \['\S+'\] are shorter .* or have changed"
    ):
        read_weights(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < peak + 100_000  # KiB on Linux


def test_a_flipped_bit_in_what_names_the_weights_is_seen(tmp_path):
    flipped(V1 / "every1/checkpoint.pt", tmp_path / "damaged.pt", ".pkl", b"perceiver")
    with pytest.raises(ValueError, match="Bad CRC-32 for file .*data.pkl"):
        read_weights(tmp_path / "damaged.pt")


@pytest.mark.parametrize("kind", ["float8", "nested", "sparse"])
def test_tensors_of_other_kinds_are_named(tmp_path, kind):
    weight = {
        "float8": lambda: torch.ones(4).to(torch.float8_e4m3fn),
        "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "sparse": lambda: torch.eye(3).to_sparse(),
    }[kind]()
    torch.save({"whole": torch.ones(2), "odd": weight}, tmp_path / "odd.pt")
    with pytest.raises(
        ValueError, match=r"odd.pt holds \['odd'\] in a sparse, nested, quantised, 8-bit or empty form"
    ):
        read_weights(tmp_path / "odd.pt")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_half_a_download(tmp_path, suffix, share):
    source = V1 / "every1/checkpoint.pt"
    if suffix == ".safetensors":
        weights = {key: value.clone() for key, value in torch.load(source, weights_only=True).items()}
        source = tmp_path / "whole.safetensors"
        save_file(weights, source)
        assert same_weights(convert(V1 / "every1", checkpoint=source), convert(V1 / "every1"))
    data = source.read_bytes()
    path = tmp_path / f"half{suffix}"
    path.write_bytes(data[: int(len(data) * share)])
    for name in ("vision_tower", "lm_head"):
        with pytest.raises(ValueError, match="half a download"):
            convert(V1 / "every1", **{name: path})
    with pytest.raises(ValueError, match=rf"half{suffix} .*bytes\) cannot be read: .*half a download"):
        convert(V1 / "every1", checkpoint=path)


@pytest.mark.parametrize(
    ("folder", "change", "message"),
    [
        (V1 / "every1", {"cross_attn_every_n_layers": 2},
         r"22 not expected, first \['lang_encoder.model.layers.0.gated_cross_attn_layer.*layers \[1, 3\]"),
        (V2 / "opt", {"cross_attn_every_n_layers": 1},
         r"22 missing, first \['lang_encoder.model.decoder.layers.0.gated_cross_attn_layer.attn_gate'"),
        (V2 / "opt", {"language_model": V1 / "every1/lm"},
         r"no 'lang_encoder.model.embed_tokens.weight', the embedding of LlamaForCausalLM"),
        (V1 / "every1", {"language_model": LORA / "lm"},
         r"embed_tokens.weight is \(303, 24\), expected \(303, 48\).*width 48"),
        (V1 / "every1", {"checkpoint": LORA / "checkpoint.pt"}, "perceiver.latents is"),
        (V1 / "every1", {"checkpoint": LORA / "final_weights_mmengine_config.pt"},
         "no OpenFlamingo checkpoint: expected `perceiver.latents`"),
        (V1 / "every1", {"checkpoint": V1 / "every1/lm/model.safetensors"}, "no OpenFlamingo checkpoint"),
        (V1 / "every1", {"resampler": None},
         r"perceiver.layers.0.0.to_q.weight is \(64, 24\), expected \(512, 24\).*resampler of 8 heads x 64"),
        (V1 / "every1", {"cross_attention": None}, r"gated_cross_attn_layer.attn.to_q.weight is .*8 heads x 64"),
        (V1 / "every1", {"image_token_id": 303}, r"'image_token_id': 303.*303 rows"),
        (V1 / "every1", {"media_attention": None}, "media_attention is None"),
        (V1 / "every1", {"vision_tower": V2 / "opt/vision_open_clip.safetensors"}, "size mismatch|do not fit"),
        (V1 / "every1", {"lm_head": LORA / "lm_head_resized.safetensors"},
         r"lm_head.weight is \(303, 48\), expected \(303, 24\)"),
        (V1 / "every1", {"lm_head": V1 / "every1/lm/model.safetensors"}, "expected the LM head, one tensor"),
        (V1 / "every1", {"vision_tower": "openai", "vision_config": "ViT-L-14"}, "need quick_gelu=True"),
        (V1 / "every1", {"vision_tower": "openai"}, "'openai' is no file, and as a pretrained tag it needs"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(folder, change, message):
    with pytest.raises((ValueError, RuntimeError), match=f"(?s){message}"):
        convert(folder, **change)


def test_the_mode_has_no_default():
    options = arguments(V1 / "every1")
    del options["media_attention"]
    with pytest.raises(TypeError, match="media_attention"):
        convert_flamingo(**options)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("perceiver.layers.1.0.to_q.weight", "1 missing, first .'perceiver.layers.1.0.to_q.weight'"),
        ("lang_encoder.model.layers.9.decoder_layer.self_attn.rotary_emb.inv_freq", "1 not expected"),
        ("lang_encoder.model.layers.0.decoder_layer.self_attn.extra.weight", "1 not expected"),
        ("something.else", "1 not expected, first .'something.else'"),
    ],
)
def test_every_key_is_accounted_for(tmp_path, key, message):
    weights = torch.load(V1 / "every1/checkpoint.pt", weights_only=True)
    weights = {k: v for k, v in weights.items() if k != key} if key in weights else {**weights, key: torch.ones(3)}
    with pytest.raises(ValueError, match=message):
        convert(V1 / "every1", checkpoint=save_old(weights, tmp_path / "checkpoint.pt"))


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ([torch.ones(2)], "holds a list"),
        ({"model_state_dict": {"a": 1}}, r"holds \['a'\] beside"),
        ({"model_state_dict": {"a": torch.ones(2)}, "config": {}}, r"holds \['config'\] beside"),
        ({"state_dict": {"a": torch.ones(2)}}, r"holds \['state_dict'\] beside"),
    ],
)
def test_what_is_no_state_dict(tmp_path, contents, message):
    with pytest.raises(ValueError, match=message):
        convert(V1 / "every1", checkpoint=save_old(contents, tmp_path / "checkpoint.pt"))


@pytest.mark.parametrize("name", ["checkpoint", "vision_tower", "lm_head"])
def test_a_missing_file(name):
    with pytest.raises(FileNotFoundError, match="no file .*nowhere.safetensors"):
        convert(V1 / "every1", **{name: "nowhere.safetensors"})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"attn_config": {"qk_ln": True}}, "MPT with {'qk_ln': True}"),
        ({"attn_config": {"alibi": False}}, "MPT with {'alibi': False}"),
        ({"no_bias": False}, "MPT with {'no_bias': False}"),
    ],
)
def test_an_mpt_that_transformers_cannot_express_is_named(make_model, old_files, config, message):
    options = old_files(make_model("mpt"))
    path = options["language_model"] / "config.json"
    path.write_text(json.dumps({**read_json(path), **config}))
    with pytest.raises(ValueError, match=message):
        convert_flamingo(**options)
    assert MptConfig().attn_config.qk_ln is False


def test_an_adapter_for_another_base(base, tmp_path):
    source, every_three = LORA / "final_weights_mmengine_config.pt", tmp_path / "every_three"
    convert(V1 / "every1").save_pretrained(tmp_path / "every_one")
    config = MMGPTForConditionalGeneration.from_pretrained(base).config
    config.cross_attn_every_n_layers = 3
    MMGPTForConditionalGeneration(config).save_pretrained(every_three)
    for folder, message in (
        (
            tmp_path / "every_one",
            r"20 missing, first \['lang_encoder.base_model.model.model.layers.0.gated_cross_attn",
        ),
        (every_three, r"not expected, first \['lang_encoder.base_model.model.model.layers.1.gated_cross_attn"),
        (LORA / "lm", "is a 'llama', no MMGPT model"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_lora(source, folder, tmp_path / "out")
    with pytest.raises(ValueError, match="not expected, first .'perceiver"):
        convert_lora(LORA / "checkpoint.pt", base, tmp_path / "out", lora_alpha=8)
    assert not (tmp_path / "out").exists()


def test_an_adapter_with_a_part_missing(base, tmp_path):
    weights, _ = read_weights(LORA / "final_weights_mmengine_config.pt")
    name = "lang_encoder.base_model.model.model.layers.2.decoder_layer.self_attn.k_proj.lora_B.default.weight"
    path = tmp_path / "lora.safetensors"
    save_file({key: value for key, value in weights.items() if key != name}, path)
    with pytest.raises(
        ValueError, match=r"1 missing, first \['lang_encoder.base_model.model.model.layers.2.*lora_B.weight'"
    ):
        convert_lora(path, base, tmp_path / "out", lora_alpha=8)
    save_file({**weights, name: weights[name][:, :2].contiguous()}, path)
    with pytest.raises(ValueError, match=r"lora_B.default.weight is \(48, 2\), expected \(48, 4\)"):
        convert_lora(path, base, tmp_path / "out", lora_alpha=8)
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_written_whole_or_not_at_all(base, tmp_path, monkeypatch):
    monkeypatch.chdir(base.parent)
    weights, settings = read_weights(LORA / "final_weights_mmengine_config.pt")
    contents = {"model_state_dict": weights, "tuning_config": {**settings, "lora_dropout": 0.25}}
    source = save_old(contents, tmp_path / "lora.pt")
    config = read_json(convert_lora(source, base.name, tmp_path / "out") / "adapter_config.json")
    assert (config["lora_dropout"], config["base_model_name_or_path"]) == (0.25, str(base))

    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(converting, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        convert_lora(source, base, tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora.pt", "out"]


def test_a_tied_head_is_its_embedding(tmp_path):
    weights = torch.load(V2 / "opt/checkpoint.pt", weights_only=True)
    weights["lang_encoder.lm_head.weight"] = weights["lang_encoder.lm_head.weight"] + 1
    with pytest.raises(ValueError, match="lang_encoder.lm_head.weight' are two names of one weight"):
        convert(V2 / "opt", checkpoint=save_old(weights, tmp_path / "checkpoint.pt"))


def test_lora_alpha_comes_from_somewhere_and_does_not_contradict(base, tmp_path):
    silent = lora_file("final_weights.safetensors", tmp_path)
    with pytest.raises(ValueError, match="does not say what `lora_alpha` is"):
        convert_lora(silent, base, tmp_path / "out")
    with pytest.raises(ValueError, match="`lora_alpha` is 16, but .* says 8"):
        convert_lora(LORA / "final_weights_mmengine_config.pt", base, tmp_path / "out", lora_alpha=16)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").touch()
    with pytest.raises(FileExistsError, match="taken"):
        convert_lora(silent, base, tmp_path / "taken", lora_alpha=8)


# --- the command line ---


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "modeling_mmgpt.converting_mmgpt", *map(str, arguments)], capture_output=True, text=True
    )


def words_tokenizer(size):
    """A tokenizer of so many words, without the tokens that a processor adds behind them."""
    words = Tokenizer(models.WordLevel({f"word{number}": number for number in range(size)}, unk_token="word0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="word1", eos_token="word2")


def test_the_command_line_converts_both(tmp_path, monkeypatch):
    assert "flamingo" in command("--help").stdout
    options = arguments(LORA)
    (tmp_path / "vision.json").write_text(json.dumps(options["vision_config"]))
    flags = [f"--{name}={options[name]}" for name in ("cross_attn_every_n_layers", "media_attention", "lm_head")]
    flags += [f"--{name}={json.dumps(options[name])}" for name in ("resampler", "cross_attention")]
    flags += ["--vision_tower", options["vision_tower"], "--vision_config", tmp_path / "vision.json"]
    line = ["x", "flamingo", options["checkpoint"], shutil.copytree(LORA / "lm", tmp_path / "lm")]
    words_tokenizer(999).save_pretrained(tmp_path / "lm")
    monkeypatch.setattr(sys, "argv", [str(a) for a in [*line, tmp_path / "wrong", *flags]])
    with pytest.raises(ValueError, match="outside the vocabulary"):
        converting.main()
    words_tokenizer(300).save_pretrained(tmp_path / "lm")
    monkeypatch.setattr(sys, "argv", [str(a) for a in [*line, tmp_path / "base", *flags]])
    converting.main()
    assert same_weights(MMGPTForConditionalGeneration.from_pretrained(tmp_path / "base"), convert(LORA))
    lora = [LORA / "final_weights_mmengine_config.pt", tmp_path / "base", tmp_path / "adapter"]
    monkeypatch.setattr(sys, "argv", ["x", "lora", *map(str, lora)])
    converting.main()
    assert (tmp_path / "adapter/adapter_model.safetensors").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "lm", "vision.json"]


@torch.no_grad()
def test_the_program_leaves_what_auto_model_and_auto_processor_load(
    make_model, old_files, base_tokenizer, picture, tmp_path, monkeypatch
):
    """Here the tokenizer says which ids the control tokens have, and the heads are OpenFlamingo's."""
    heads = {"num_heads": 8, "head_dim": 64}
    model = make_model(resampler={**heads, "depth": 1, "num_latents": 4}, cross_attention=heads)
    options = old_files(model, filtered, rows=272)
    base_tokenizer.save_pretrained(options["language_model"])
    (tmp_path / "vision.json").write_text(json.dumps(options["vision_config"]))
    line = ["x", "flamingo", options["checkpoint"], options["language_model"], tmp_path / "out"]
    line += ["--vision_tower", options["vision_tower"], "--vision_config", tmp_path / "vision.json"]
    line += ["--cross_attn_every_n_layers", 2, "--media_attention", "preceding"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in line])
    converting.main()
    again = AutoModel.from_pretrained(tmp_path / "out").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    config = again.config
    assert (config.image_token_id, config.end_of_chunk_token_id) == (259, 258)
    assert (processor.image_token_id, config.text_config.pad_token_id) == (259, 260)
    batch = processor(["a<image>b"], images=[picture(0)])
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    with pytest.raises(FileExistsError, match="out exists already"):
        converting.main()


@torch.no_grad()
def test_the_program_gives_an_adapter_the_processor_of_its_base(base, tmp_path, processor, monkeypatch):
    whole = tmp_path / "base"
    shutil.copytree(base, whole)
    lora = LORA / "final_weights_mmengine_config.pt"
    monkeypatch.setattr(sys, "argv", [str(word) for word in ("x", "lora", lora, whole, tmp_path / "adapter")])
    with pytest.raises(OSError):
        converting.main()  # the base has no processor
    assert not (tmp_path / "adapter").exists()
    processor.save_pretrained(whole)
    converting.main()
    assert AutoProcessor.from_pretrained(tmp_path / "adapter").image_token_id == 259
    assert len([name for name, _ in AutoModel.from_pretrained(tmp_path / "adapter").named_parameters()]) > 52


@pytest.mark.parametrize(
    ("family", "sizes", "every", "rows", "parameters", "trained"),
    [
        ("llama", {}, 4, 32_003, 8_220_454_928, 1_309_919_248),
        ("mpt", {"d_model": 4096, "n_heads": 32, "n_layers": 32}, 4, 50_280, 8_130_678_800, 1_384_781_840),
        (
            "gpt_neox",
            {"hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 10240},
            *(2, 50_280, 4_039_029_792, 1_089_480_736),
        ),
    ],
)
def test_sizes_of_the_released_models(family, sizes, every, rows, parameters, trained):
    """Those in `docs/old_checkpoints.md`: of the model, and of what OpenFlamingo trained and saved."""
    config = MMGPTConfig(
        vision_config=MMGPTVisionConfig.from_open_clip("ViT-L-14-quickgelu"),
        text_config=AutoConfig.for_model(family, vocab_size=rows, **sizes),
        cross_attn_every_n_layers=every,
    )
    with torch.device("meta"):
        model = MMGPTForConditionalGeneration(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    saved = [p for name, p in model.named_parameters() if "gated_cross_attn_layer" in name or "resampler" in name]
    assert sum(p.numel() for p in [*saved, model.get_input_embeddings().weight]) == trained


@pytest.mark.bars
@pytest.mark.skipif(sys.platform != "linux", reason="Linux counts in KiB")
def test_the_peak_memory_is_at_most_1_3_times_the_weights():
    """Of 1.6 B parameters; `python tests/measure_converting.py --layers 32` measures the whole 9B."""
    program = Path(__file__).with_name("measure_converting.py")
    done = subprocess.run([sys.executable, program, "--layers", "4"], stdout=subprocess.PIPE, text=True, check=True)
    measured = json.loads(done.stdout)
    command = "pytest -m bars tests/test_converting.py -k peak"
    results = Path(__file__).with_name("results") / "converting_memory.json"
    results.write_text(json.dumps({**evaluation.measured_with(command), **measured}, indent=1, sort_keys=True) + "\n")
    assert measured["weights"] > 3e9 and measured["ratio"] <= 1.3


def test_gelu_is_what_the_config_says():
    """The two activations give other tokens: nothing in a state dict tells them apart."""
    folder = V1 / "every1"
    config = read_json(folder / "config.json")["vision_open_clip_config"]
    batch, expected = load_case(folder, "a_one_image", "attend_previous")
    for quick_gelu in (True, False):
        model = convert(folder, vision_config={**config, "quick_gelu": quick_gelu})
        tokens = patch_tokens(model.model.vision_tower, batch["pixel_values"].flatten(0, 2))
        distance = (tokens - expected["vision_tokens"].flatten(0, 2)).abs().max().item()
        assert (distance <= TOLERANCE) == quick_gelu
    assert open_clip.get_pretrained_cfg("ViT-L-14", "openai")["quick_gelu"]

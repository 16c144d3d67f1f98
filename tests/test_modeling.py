"""The model: what a picture may change and what it may not, errors, weights in and out of files."""

import copy
import json
import pickle

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from modeling_mmgpt import (
    MMGPTConfig,
    MMGPTForConditionalGeneration,
    MMGPTVisionConfig,
    compute_image_index,
)
from processing_mmgpt import MMGPTCollator, MMGPTProcessor


MODES = ("preceding", "all_preceding", "following")
DTYPES = (torch.float32, torch.bfloat16)


def logits(model, batch, **kwargs):
    with torch.no_grad():
        return model(**batch, use_cache=False, **kwargs).logits


def difference(one, other):
    return (one.float() - other.float()).abs().max().item()


# Which image a token attends to


@pytest.mark.parametrize(
    ("mode", "row", "past", "expected"),
    [
        ("preceding", "ab#cd#ef", 0, "00111222"),
        ("all_preceding", "ab#cd#ef", 0, "00111222"),
        ("following", "ab#cd#ef", 0, "11122200"),
        ("preceding", "abcd", 0, "----"),
        ("all_preceding", "abcd", 0, "----"),
        ("following", "abcd", 0, "----"),
        ("preceding", "ef", 2, "22"),
        ("all_preceding", "ef", 2, "22"),
        ("following", "ef", 2, "00"),
        ("preceding", "e#f", 2, "233"),
        ("all_preceding", "e#f", 2, "233"),
        ("following", "e#f", 2, "330"),
        ("preceding", "##a", 0, "122"),
        ("following", "##a", 0, "120"),
        ("following", "a#", 0, "11"),
    ],
)
def test_each_token_has_the_image_that_the_drawing_says(ids, mode, row, past, expected):
    is_image = ids(row)["input_ids"] == 259
    index = compute_image_index(is_image, mode, torch.tensor([past]) if past else None)
    assert index.tolist() == [[-1 if c == "-" else int(c) for c in expected]]


def test_rows_are_numbered_apart_from_each_other(ids):
    is_image = ids("a#b#", "abcd", "#bcd")["input_ids"] == 259
    index = compute_image_index(is_image, "preceding", torch.tensor([0, 3, 0]))
    assert index.tolist() == [[0, 1, 1, 2], [3, 3, 3, 3], [1, 1, 1, 1]]


# What a picture may not change


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_shut_gates_give_the_bare_lm_to_the_bit(make_model, make_lm, ids, pixels, mode, dtype):
    model = make_model(gates=0.0, media_attention=mode, dtype=dtype)
    batch = ids("__a#b#cd", "abcdefgh", "#bcdef__")
    bare = make_lm(model)(**batch).logits
    assert difference(logits(model, batch, pixel_values=pixels(3, 2)), bare) == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pictures", ["random", "zero", "none"])
@pytest.mark.parametrize("others", ["a#b#cdef", "abcdefgh"])
def test_a_row_without_picture_is_the_bare_lm_whatever_stands_beside(
    make_model, make_lm, ids, pixels, mode, dtype, pictures, others
):
    if pictures == "none" and "#" in others:
        return
    model = make_model(media_attention=mode, dtype=dtype)
    batch = ids("abcdefgh", "__cdefgh", others)
    bare = make_lm(model)(**batch).logits
    given = {"random": pixels(3, 2), "zero": torch.zeros(3, 2, 3, 24, 24), "none": None}[pictures]
    ours = logits(model, batch, pixel_values=given)
    assert not ours.isnan().any()
    real = batch["attention_mask"].bool()[:2]
    assert difference(ours[:2][real], bare[:2][real]) == 0.0
    assert (difference(ours[2], bare[2]) > 0.1) == ("#" in others)


@pytest.mark.parametrize(
    ("mode", "row", "changed", "untouched"),
    [
        ("preceding", "ab#cd#ef", 1, 5),
        ("all_preceding", "ab#cd#ef", 1, 5),
        ("preceding", "ab#cd#ef", 0, 2),
        ("all_preceding", "ab#cd#ef", 0, 2),
        ("following", "ab#cd#ef", 1, 3),
        ("following", "ab#cd#ef", 0, 0),
    ],
)
def test_a_picture_changes_no_logit_before_the_tokens_that_see_it(
    make_model, ids, pixels, mode, row, changed, untouched
):
    model, batch = make_model(media_attention=mode), ids(row)
    one = pixels(1, 2)
    other = one.clone()
    other[:, changed] = pixels(1, seed=9)
    change = (logits(model, batch, pixel_values=one) - logits(model, batch, pixel_values=other)).abs().amax(-1)[0]
    assert (change[:untouched] == 0).all()
    assert (change[untouched:] > 1e-3).all()


@pytest.mark.parametrize("mode", ["preceding", "all_preceding"])
def test_a_picture_that_comes_later_changes_nothing_before_unless_it_is_the_first(make_model, ids, pixels, mode):
    model, given = make_model(media_attention=mode), pixels(1, 2)
    whole = logits(model, ids("ab#cd#ef"), pixel_values=given)
    start = logits(model, ids("ab#cd"), pixel_values=given[:, :1])
    assert difference(whole[:, :5], start) < 1e-5
    # The first picture of a document turns the feed-forward of the blocks on, also before it, and no more than that.
    assert difference(start[:, :2], logits(model, ids("ab"))) > 1e-3
    for block in model.modules():
        if hasattr(block, "ff_gate"):
            block.ff_gate.data.zero_()
    assert difference(logits(model, ids("ab#cd"), pixel_values=given)[:, :2], logits(model, ids("ab"))) < 1e-5


def test_only_all_preceding_sees_an_image_through_a_later_one(make_model, ids, pixels):
    one = pixels(1, 2)
    other = torch.cat([pixels(1, 1, seed=9), one[:, 1:]], dim=1)
    # One block before the first layer that mixes tokens: the last token gets nothing of image 1 but by its own eyes.
    for mode, sees in (("preceding", False), ("all_preceding", True)):
        model = make_model(media_attention=mode, cross_attn_every_n_layers=1)
        seen = []
        block = model.model.text_model.model.layers[0].gated_cross_attn_layer
        block.register_forward_hook(lambda _, args, output, seen=seen: seen.append(output[:, -1]))
        for given in (one, other):
            logits(model, ids("#a#b"), pixel_values=given)
        assert (difference(*seen) > 1e-3) == sees


@pytest.mark.parametrize("mode", MODES)
def test_surplus_pictures_are_dropped(make_model, ids, pixels, mode):
    model, batch = make_model(media_attention=mode), ids("a#bc", "##bc")
    given = pixels(2, 3)
    exact = logits(model, batch, pixel_values=given[:, :2])
    assert difference(logits(model, batch, pixel_values=given), exact) < 1e-5
    given[0, 1:], given[1, 2:] = float("nan"), float("nan")
    assert difference(logits(model, batch, pixel_values=given), exact) < 1e-5


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sizes", [{}, {"max_num_images": 3}, {"max_num_frames": 2, "max_num_images": 2}])
def test_a_row_alone_equals_the_row_in_a_batch(make_model, ids, pixels, mode, sizes):
    resampler = {"depth": 2, "num_heads": 2, "head_dim": 8, "num_latents": 4, **sizes}
    model, given = make_model(media_attention=mode, resampler=resampler), pixels(3, 2)
    rows = ("a#b#cdef", "__#bcdef", "abcdefgh")
    batch = ids(*rows)
    together = logits(model, batch, pixel_values=given)
    for number, row in enumerate(rows):
        alone = row.replace("_", "")
        expected = logits(model, ids(alone), pixel_values=given[number : number + 1])
        assert difference(together[number, -len(alone) :], expected[0]) < 2e-5


def test_video_frames_that_are_padding_do_not_count(make_model, ids, pixels):
    model, batch = make_model(), ids("a#b#")
    given = pixels(1, 2, 3)
    num_frames = torch.tensor([[3, 1]])
    ours = logits(model, batch, pixel_values=given, num_frames=num_frames)
    noise = given.clone()
    noise[0, 1, 1:] = pixels(2, seed=5)
    assert difference(ours, logits(model, batch, pixel_values=noise, num_frames=num_frames)) == 0.0
    assert difference(ours, logits(model, batch, pixel_values=noise)) > 1e-3
    noise[0, 0, 2] = pixels(seed=6)
    assert difference(ours, logits(model, batch, pixel_values=noise, num_frames=num_frames)) > 1e-3


def test_one_frame_may_be_given_with_or_without_its_axis(model, ids, pixels):
    given = pixels(1, 2)
    five, six = (logits(model, ids("a#b#"), pixel_values=p) for p in (given, given[:, :, None]))
    assert difference(five, six) == 0.0


def test_padding_gives_no_nan_and_changes_nothing(model, ids, pixels):
    given = pixels(1, 1)
    plain = logits(model, ids("a#bc"), pixel_values=given)
    left, right = (logits(model, ids(row), pixel_values=given) for row in ("___a#bc", "a#bc___"))
    assert not left.isnan().any() and not right.isnan().any()
    assert difference(left[:, 3:], plain) < 2e-5 and difference(right[:, :4], plain) < 2e-5


# Loud errors


@pytest.mark.parametrize(
    ("rows", "pictures", "named"),
    [(("a#b#", "##b#"), 2, ("Row 1", "3", "2")), (("a#",), 0, ("Row 0", "1", "0"))],
)
def test_too_few_pictures_are_named_by_row_and_numbers(model, ids, pixels, rows, pictures, named):
    given = pixels(len(rows), pictures) if pictures else None
    for run in (model, model.model, model.generate):
        with pytest.raises(ValueError) as error:
            run(**ids(*rows), pixel_values=given)
        assert all(part in str(error.value) for part in named), error.value


@pytest.mark.parametrize(
    ("shape", "named"),
    [
        ((1, 3, 24, 24), r"shape \(1, 3, 24, 24\).*rows, images, 3"),
        ((1, 1, 24, 24, 3), r"shape \(1, 1, 24, 24, 3\)"),
        ((1, 1, 1, 24, 24), r"shape \(1, 1, 1, 24, 24\)"),
        ((1, 1, 3, 32, 32), "32 x 32.*24 x 24"),
        ((1, 1, 3, 24, 16), "24 x 16.*24 x 24"),
        ((2, 1, 3, 24, 24), "2 rows.*1 rows"),
    ],
)
def test_pictures_of_another_shape_are_named(model, ids, shape, named):
    for run in (model, model.model, model.generate):
        with pytest.raises(ValueError, match=named):
            run(**ids("#a"), pixel_values=torch.zeros(shape))


@pytest.mark.parametrize("every", [5, 8])
def test_a_model_that_no_picture_reaches_is_refused_with_both_numbers(make_model, every):
    with pytest.raises(ValueError, match=f"(?s){every}.*4 layers"):
        make_model(cross_attn_every_n_layers=every)


def test_attentions_under_sdpa_are_none_with_a_warning(make_model, ids, pixels, caplog):
    model = make_model(attention="sdpa")
    with caplog.at_level("WARNING", logger="transformers"):
        outputs = model(**ids("a#b"), pixel_values=pixels(1, 1), output_attentions=True)
    assert outputs.cross_attentions is None and not any(a is not None for a in outputs.attentions or ())


def test_inputs_embeds_is_refused_by_name(model):
    for run in (model, model.model):
        with pytest.raises(ValueError, match="inputs_embeds"):
            run(input_ids=torch.tensor([[1]]), inputs_embeds=torch.zeros(1, 1, 32))


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: MMGPTConfig(cross_attn_every=2), "cross_attn_every"),
        (lambda: MMGPTConfig(resampler={"latents": 2}), "latents"),
        (lambda: MMGPTConfig(cross_attention={"heads": 2}), "heads"),
        (lambda: MMGPTVisionConfig(heads=2), "heads"),
        (lambda: MMGPTConfig(vision_config={"heads": 2}), "heads"),
        (lambda: MMGPTVisionConfig.from_open_clip({"vision_cfg": {"layers": 2, "heads": 2}}), "heads"),
        (lambda: MMGPTConfig(media_attention="next"), "next"),
        (lambda: MMGPTConfig(cross_attn_every_n_layers=0), "cross_attn_every_n_layers"),
    ],
)
def test_a_misspelt_config_is_refused(make, key):
    with pytest.raises(Exception, match=key) as error:
        make()
    assert isinstance(error.value, ValueError) or "Validation" in type(error.value).__name__


def test_more_frames_or_images_than_embeddings_are_refused(make_model, ids, pixels):
    resampler = {"depth": 1, "num_heads": 2, "head_dim": 8, "num_latents": 4}
    model = make_model(resampler={**resampler, "max_num_frames": 2})
    with pytest.raises(ValueError, match="3 frames"):
        model(**ids("a#"), pixel_values=pixels(1, 1, 3))
    model = make_model(resampler={**resampler, "max_num_images": 1})
    with pytest.raises(ValueError, match="2 images"):
        model(**ids("a##"), pixel_values=pixels(1, 2))


# Attention implementations, training


@pytest.mark.parametrize("mode", MODES)
def test_cross_attentions_sum_to_one_and_stay_within_the_mask(make_model, ids, pixels, mode):
    model = make_model(media_attention=mode, attention="eager")
    batch = ids("ab#cd#ef", "abcd#fgh", "abcdefgh")
    index = compute_image_index(batch["input_ids"] == 259, mode)
    for run in (model, model.model):
        weights = run(**batch, pixel_values=pixels(3, 2), output_attentions=True).cross_attentions
        assert [tuple(w.shape) for w in weights] == [(3, 2, 8, 8)] * 2  # B, H, T, M*N, of two blocks
        for w in weights:
            looks = (index > 0)[:, None].float().expand(3, 2, 8)  # a token that attends to nothing has no weights
            assert difference(w.sum(-1), looks) < 1e-5
            image = torch.tensor([1, 2]).repeat_interleave(4)
            seen = image <= index[..., None] if mode == "all_preceding" else image == index[..., None]
            outside = ~(seen & (index[..., None] > 0))[:, None].expand_as(w)
            assert outside.any() and (w[outside] == 0).all()
            assert (w[(seen & (index[..., None] > 0))[:, None].expand_as(w)] > 0).all()


def test_eager_equals_sdpa(make_model, ids, pixels):
    batch, given = ids("a#b#cd__", "abcdefgh", "#bcdefgh"), pixels(3, 2)
    eager, sdpa = (logits(make_model(attention=a), batch, pixel_values=given) for a in ("eager", "sdpa"))
    real = batch["attention_mask"].bool()
    assert difference(eager[real], sdpa[real]) < 1e-5
    model = make_model(attention="sdpa")
    model.set_attn_implementation("eager")
    assert difference(logits(model, batch, pixel_values=given)[real], eager[real]) == 0.0


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "mpt"])
def test_checkpointing_gives_the_same_gradients(make_model, ids, pixels, family, use_reentrant):
    grads = []
    for checkpointed in (False, True):
        model = make_model(family).train()
        model.freeze(vision=True)
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        batch = ids("a#b#cd__", "abcdefgh")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        # A cache asked for in vain: recomputation would fill it twice.
        model(**batch, pixel_values=pixels(2, 2), labels=labels, use_cache=True).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    plain, again = grads
    assert plain.keys() == again.keys()
    for name in plain:
        assert plain[name] is not None and plain[name].abs().max() > 0, name
        assert difference(plain[name], again[name]) <= 1e-5 * max(1.0, plain[name].abs().max().item()), name


def test_the_loss_is_the_mean_cross_entropy_of_shifted_labels(model, ids, pixels):
    batch = ids("a#b#cd", "abcdef")
    labels = batch["input_ids"].clone()
    labels[:, :3] = -100
    out = model(**batch, pixel_values=pixels(2, 2), labels=labels)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert difference(out.loss, expected) < 1e-5
    kept = model(**batch, pixel_values=pixels(2, 2), logits_to_keep=1).logits
    assert kept.shape[1] == 1 and difference(kept[:, 0], out.logits[:, -1]) < 1e-5


def test_frozen_parts_build_no_graph(make_model, ids, pixels):
    model, batch = make_model().train(), ids("a#b#")
    states = {}
    model.model.vision_tower.register_forward_hook(lambda *args: states.update(tower=args[-1][1]))
    model.model.resampler.register_forward_hook(lambda *args: states.update(resampler=args[-1]))
    layers = model.model.text_model.model.layers
    layers[0].register_forward_hook(lambda *args: states.update(layer=args[-1]))
    for given, graph in [
        ({"vision": True}, {"tower": False, "resampler": True, "layer": True}),
        ({"resampler": True}, {"tower": False, "resampler": False, "layer": True}),
        ({"text": True}, {"tower": False, "resampler": False, "layer": False}),
    ]:
        model.freeze(**given)
        loss = model(**batch, pixel_values=pixels(1, 2), labels=batch["input_ids"]).loss
        assert {part: state.requires_grad for part, state in states.items()} == graph
    loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if ".gated_cross_attn_layer." in name}


def test_fresh_blocks_learn_from_their_gates_on(make_model, ids, pixels):
    model, batch = make_model(gates=0.0).train(), ids("a#b#cd")
    model(**batch, pixel_values=pixels(1, 2), labels=batch["input_ids"]).loss.backward()
    gates = [p.grad for n, p in model.named_parameters() if n.endswith("_gate")]
    assert len(gates) == 4 and all(gate.abs() > 0 for gate in gates)


@pytest.mark.parametrize("family", ["gpt2", "mpt"])
def test_hidden_states_begin_with_the_embedding_also_before_a_block(make_model, make_lm, ids, pixels, family):
    model, batch = make_model(family, cross_attn_every_n_layers=1), ids("ab#cd")
    bare = make_lm(model)(**batch, output_hidden_states=True).hidden_states
    for run in (model, model.model):
        ours = run(**batch, pixel_values=pixels(1, 1), output_hidden_states=True).hidden_states
        assert len(ours) == len(bare) and difference(ours[0], bare[0]) == 0.0
        assert difference(ours[1], bare[1]) > 1e-2


# In and out of files


@pytest.mark.parametrize("tied", [False, True])
def test_weights_come_back_from_a_folder(make_model, ids, pixels, tmp_path, tied):
    model = make_model(
        text={"tie_word_embeddings": tied}, media_attention="following", resampler={"depth": 1, "max_num_frames": 2}
    )
    batch, given = ids("a#b#", "abcd"), pixels(2, 2)
    expected = logits(model, batch, pixel_values=given)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    assert ("model.text_model.lm_head.weight" in load_file(tmp_path / "model.safetensors")) != tied
    for load in (MMGPTForConditionalGeneration, AutoModelForImageTextToText):
        again, info = load.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert type(again) is MMGPTForConditionalGeneration
        for field in MMGPTConfig.__annotations__.keys() - {"text_config", "vision_config"}:
            assert getattr(again.config, field) == getattr(model.config, field)
        assert difference(logits(again, batch, pixel_values=given), expected) == 0.0
        assert (again.get_input_embeddings().weight is again.get_output_embeddings().weight) == tied


def test_what_a_checkpoint_lacks_is_initialised(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {k: v for k, v in weights.items() if "gated_cross_attn_layer" not in k and "resampler" not in k}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = MMGPTForConditionalGeneration.from_pretrained(tmp_path)
    for name, parameter in again.named_parameters():
        if name.endswith("_gate"):
            assert (parameter == 0).all()
        elif name not in kept and parameter.dim() > 1:
            assert 0 < parameter.abs().max() < 10, name
        elif name not in kept:
            assert (parameter == float(name.endswith("weight"))).all(), name


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_equal_and_apart(model, ids, pixels, copied):
    batch, given = ids("a#b#"), pixels(1, 2)
    expected = logits(model, batch, pixel_values=given)
    other = copied(model)
    assert difference(logits(other, batch, pixel_values=given), expected) == 0.0
    for parameter in other.parameters():
        parameter.data.zero_()
    assert difference(logits(model, batch, pixel_values=given), expected) == 0.0


@pytest.mark.parametrize("tied", [False, True])
def test_the_vocabulary_can_grow(make_model, ids, pixels, tied):
    model, batch = make_model(text={"tie_word_embeddings": tied}), ids("a#b#")
    expected = logits(model, batch, pixel_values=pixels(1, 2))
    model.resize_token_embeddings(300)
    ours = logits(model, batch, pixel_values=pixels(1, 2))
    assert ours.shape[-1] == model.config.text_config.vocab_size == 300
    assert difference(ours[..., :261], expected) == 0.0
    assert torch.isfinite(model(**batch, pixel_values=pixels(1, 2), labels=batch["input_ids"] + 30).loss)


# Joining a tower and an LM


@pytest.fixture
def lm_folder(make_model, make_lm, base_tokenizer, tmp_path):
    """A tiny Llama of 258 tokens with its tokenizer, as it would be downloaded."""
    lm = make_lm(make_model(text={"pad_token_id": None}))
    lm.resize_token_embeddings(258)
    lm.save_pretrained(tmp_path / "lm")
    base_tokenizer.save_pretrained(tmp_path / "lm")
    return str(tmp_path / "lm")


@pytest.fixture
def open_clip_model():
    torch.manual_seed(0)
    sizes = {"image_size": 24, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
    return open_clip.model.CLIP(8, sizes, text, quick_gelu=True).eval(), {"vision_cfg": sizes, "quick_gelu": True}


def hf_tower(kind):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config, tower = {
        "clip": (CLIPVisionConfig, CLIPVisionModel),
        "siglip": (SiglipVisionConfig, SiglipVisionModel),
    }[kind]
    return tower(config(**sizes, image_size=24, patch_size=8)).eval()


@pytest.mark.parametrize("kind", ["open_clip", "open_clip file", "clip", "siglip"])
def test_a_tower_and_an_lm_are_joined(lm_folder, open_clip_model, ids, pixels, tmp_path, kind):
    given, folder = pixels(1, 1), str(tmp_path / "tower")
    config = {}
    if kind.startswith("open_clip"):
        clip, model_config = open_clip_model
        vision, config = clip.state_dict(), {"vision_config": model_config}
        clip.visual.output_tokens, clip.visual.final_ln_after_pool = True, True
        expected = clip.visual(given[0])[1]  # before ln_post, without class token
        if kind == "open_clip file":
            vision = str(tmp_path / "clip.safetensors")
            save_file(clip.state_dict(), vision)
    else:
        tower = hf_tower(kind)
        tower.save_pretrained(folder)
        vision = folder
        expected = tower(given[0]).last_hidden_state[:, 1 if kind == "clip" else 0 :]
    sizes = {"resampler": {"depth": 1, "num_latents": 4}, "cross_attn_every_n_layers": 2}
    model = MMGPTForConditionalGeneration.from_vision_text_pretrained(vision, lm_folder, **config, **sizes).eval()
    seen = []
    model.model.resampler.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    batch = {"input_ids": torch.tensor([[97, model.config.image_token_id, 98, 99]])}
    ours = logits(model, batch, pixel_values=given)
    assert expected.shape == (1, 9, 16) and difference(seen[0][0, 0], expected) < 1e-6
    # The gates are shut: it is the LM, whose vocabulary grew.
    lm = AutoModelForCausalLM.from_pretrained(lm_folder)
    text = {"input_ids": torch.tensor([[97, 98, 99]])}
    assert difference(logits(model, text)[..., :258], lm(**text).logits) < 1e-5
    lm.resize_token_embeddings(261)
    lm.set_input_embeddings(model.get_input_embeddings())
    lm.set_output_embeddings(model.get_output_embeddings())
    assert difference(ours, lm(**batch).logits) == 0.0
    # The processor of the same folders speaks of the same tokens, and makes pictures of the tower's size.
    processor = MMGPTProcessor.from_vision_text_pretrained(vision, lm_folder, **config)
    assert processor.image_token_id == model.config.image_token_id == 259
    assert processor.end_of_chunk_token_id == model.config.end_of_chunk_token_id == 258
    assert processor.tokenizer.pad_token_id == model.config.text_config.pad_token_id == 260
    assert model.generation_config.pad_token_id == 260 and model.generation_config.suppress_tokens == [259]
    assert len(processor.tokenizer) == model.get_input_embeddings().num_embeddings
    assert processor.image_processor.size == 24
    model.save_pretrained(tmp_path / "joined")
    again = MMGPTForConditionalGeneration.from_pretrained(tmp_path / "joined")
    assert difference(logits(again, batch, pixel_values=given), ours) == 0.0
    assert again.generation_config.pad_token_id == 260 and again.generation_config.suppress_tokens == [259]


@pytest.mark.parametrize(
    "sizes",
    [
        {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}},
        {"size": {"height": 16, "width": 16}},
        {"size": {"shortest_edge": 16}},
        {"size": 16},
    ],
)
def test_pictures_have_the_size_that_the_towers_preprocessor_says(lm_folder, tmp_path, sizes):
    """DINOv2's config says 518, its preprocessor 224: it takes both, by interpolation."""
    config = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 24, "patch_size": 8}
    Dinov2Model(Dinov2Config(**config)).save_pretrained(tmp_path / "tower")
    kept = {"image_processor_type": "BitImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.5] * 3, **sizes}
    (tmp_path / "tower" / "preprocessor_config.json").write_text(json.dumps(kept))
    processor = MMGPTProcessor.from_vision_text_pretrained(str(tmp_path / "tower"), lm_folder)
    assert processor.image_processor.size == 16
    model = MMGPTForConditionalGeneration.from_vision_text_pretrained(
        str(tmp_path / "tower"), lm_folder, cross_attn_every_n_layers=2
    )
    seen = []
    model.model.resampler.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(**processor("<image>a", [Image.new("RGB", (30, 20))]))
    assert seen[0].shape == (1, 1, 1, 4, 16)


def test_new_parts_in_half_precision_are_warned_of(lm_folder, open_clip_model, monkeypatch):
    said = []
    monkeypatch.setattr("modeling_mmgpt.modeling_mmgpt.logger.warning", said.append)
    clip, model_config = open_clip_model
    AutoModelForCausalLM.from_pretrained(lm_folder, dtype=torch.bfloat16).save_pretrained(lm_folder)
    given = {"vision_config": model_config, "cross_attn_every_n_layers": 2}
    for dtype in (torch.float32, torch.bfloat16):  # whoever names it knows it
        MMGPTForConditionalGeneration.from_vision_text_pretrained(clip.state_dict(), lm_folder, dtype=dtype, **given)
    assert not said
    model = MMGPTForConditionalGeneration.from_vision_text_pretrained(clip.state_dict(), lm_folder, **given)
    assert model.model.resampler.latents.dtype == torch.bfloat16
    assert len(said) == 1 and "dtype=torch.float32" in said[0]


@pytest.mark.parametrize(
    ("named", "expected"), [(7, 257), ([7, 9], 257), ([7, 257], [7, 257]), (None, 257), (257, 257)]
)
@pytest.mark.parametrize("config_alone", [False, True])
def test_a_joined_model_stops_at_the_end_that_its_labels_teach(
    make_model, make_lm, base_tokenizer, open_clip_model, processor, tmp_path, named, expected, config_alone
):
    lm = make_lm(make_model(text={"pad_token_id": None}))
    lm.resize_token_embeddings(258)
    lm.config.eos_token_id = lm.generation_config.eos_token_id = named
    lm.save_pretrained(tmp_path / "lm")
    base_tokenizer.save_pretrained(tmp_path / "lm")
    if config_alone:
        (tmp_path / "lm" / "generation_config.json").unlink()
    clip, model_config = open_clip_model
    model = MMGPTForConditionalGeneration.from_vision_text_pretrained(
        clip.state_dict(), str(tmp_path / "lm"), vision_config=model_config, cross_attn_every_n_layers=2
    )
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    row = MMGPTCollator(processor)([{"messages": messages}])
    assert row["labels"][0, -1] == 257
    model.save_pretrained(tmp_path / "joined")
    (tmp_path / "without").mkdir()
    for file in (tmp_path / "joined").iterdir():
        if file.name != "generation_config.json":
            (tmp_path / "without" / file.name).symlink_to(file)
    loaded = [MMGPTForConditionalGeneration.from_pretrained(tmp_path / name) for name in ("joined", "without")]
    for one in (model, *loaded):
        assert one.generation_config.eos_token_id == expected


def test_an_lm_whose_tokenizer_has_no_end_is_refused_by_name(lm_folder, open_clip_model, base_tokenizer):
    base_tokenizer.eos_token = None
    base_tokenizer.save_pretrained(lm_folder)
    clip, model_config = open_clip_model
    with pytest.raises(ValueError, match="no end token"):
        MMGPTForConditionalGeneration.from_vision_text_pretrained(
            clip.state_dict(), lm_folder, vision_config=model_config
        )


def test_joining_keeps_the_special_tokens_of_the_lm(lm_folder, open_clip_model, base_tokenizer, tmp_path):
    base_tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    base_tokenizer.save_pretrained(lm_folder)
    clip, model_config = open_clip_model
    model = MMGPTForConditionalGeneration.from_vision_text_pretrained(
        clip.state_dict(), lm_folder, vision_config=model_config
    )
    processor = MMGPTProcessor.from_vision_text_pretrained(None, lm_folder, vision_config=model_config)
    assert model.config.image_token_id == processor.image_token_id == 260
    assert "<|im_start|>" in processor.tokenizer.all_special_tokens


def test_the_last_norm_of_the_tower_is_a_choice(lm_folder, open_clip_model, pixels):
    clip, model_config = open_clip_model
    config = MMGPTVisionConfig.from_open_clip(model_config, post_norm=True)
    model = MMGPTForConditionalGeneration.from_vision_text_pretrained(
        clip.state_dict(), lm_folder, vision_config=config
    ).eval()
    clip.visual.output_tokens = True
    seen = []
    model.model.resampler.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.model.encode_images(pixels(1, 1))
    assert difference(seen[0][0, 0], clip.visual(pixels(1))[1]) < 1e-6


def test_a_state_dict_that_does_not_fit_is_refused_with_its_keys(lm_folder, open_clip_model):
    clip, model_config = open_clip_model
    weights = clip.state_dict()
    weights["visual.surplus"] = weights.pop("visual.class_embedding")
    with pytest.raises(ValueError, match=r"(?s)class_embedding.*surplus"):
        MMGPTForConditionalGeneration.from_vision_text_pretrained(weights, lm_folder, vision_config=model_config)


def test_an_lm_given_as_a_model_needs_its_ids_said(make_model, make_lm, open_clip_model):
    clip, model_config = open_clip_model
    lm = make_lm(make_model())
    with pytest.raises(ValueError, match="image_token_id"):
        MMGPTForConditionalGeneration.from_vision_text_pretrained(clip.state_dict(), lm, vision_config=model_config)
    model = MMGPTForConditionalGeneration.from_vision_text_pretrained(
        clip.state_dict(), lm, vision_config=model_config, image_token_id=261, end_of_chunk_token_id=262
    )
    assert model.get_input_embeddings().num_embeddings == 263


def test_open_clip_names_give_the_tower_they_name():
    config = MMGPTVisionConfig.from_open_clip("ViT-L-14-quickgelu")
    assert (config.width, config.layers, config.patch_size, config.image_size) == (1024, 24, 14, 224)
    assert config.quick_gelu and not config.post_norm
    assert not MMGPTVisionConfig.from_open_clip("ViT-L-14").quick_gelu
    for name in ("RN50", "no such model"):
        with pytest.raises(ValueError):
            MMGPTVisionConfig.from_open_clip(name)

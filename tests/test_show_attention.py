"""What the model looks at: the parts on a tiny model, the program as its docstring says, and how well it points."""

import hashlib
import json
import random
import shutil
import sys
from pathlib import Path

import pytest
import quickstart
import show_attention
import torch
from PIL import Image
from tiny_world import evaluation
from tiny_world.look_ups import named_look_up, objects_named_alone
from tiny_world.mixture import example, mixture
from tiny_world.questions import WORDINGS
from tiny_world.scenes import CELL, CELLS, SIDE, SIZES, Object, Scene, render, sample_scene
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed


ROOT = Path(__file__).parents[1]
BASE = ROOT / "examples" / "tiny_world" / "base"
RESULTS = Path(__file__).with_name("results") / "attention.json"


# The parts


@pytest.fixture
def inputs(ids, pixels):
    return {**ids("ab#cd#ef"), "pixel_values": pixels(1, 2)}


def test_each_latent_is_traced_to_patches_and_is_the_models_own(make_model, pixels):
    model = make_model(attention="eager")
    latents, made_of = show_attention.resample(model, pixels(1, 2))
    torch.testing.assert_close(latents, model.model.encode_images(pixels(1, 2)))
    assert made_of.shape == (2, 4, 9)
    assert torch.allclose(made_of.sum(dim=-1), torch.ones(2, 4))
    assert not torch.allclose(made_of[0], made_of[1])


def test_with_one_layer_the_trace_is_the_weights_over_the_patches(make_model, pixels):
    model = make_model(attention="eager", resampler={"depth": 1, "num_heads": 2, "head_dim": 8, "num_latents": 4})
    weights: list[torch.Tensor] = []
    tokens = show_attention.patch_tokens(model.model.vision_tower, pixels(1))
    model.model.resampler(tokens[None, :, None], attentions=weights)
    over_patches = weights[0].mean(dim=1)[..., :9]  # without the latents' look at themselves
    _, made_of = show_attention.resample(model, pixels(1, 1))
    assert len(weights) == 1 and weights[0].shape == (1, 2, 4, 9 + 4)
    assert torch.allclose(made_of, over_patches / over_patches.sum(dim=-1, keepdim=True))


@pytest.mark.parametrize(
    ("mode", "looks_at"),
    [
        ("preceding", ["", "", "1", "1", "1", "2", "2", "2"]),
        ("following", ["1", "1", "1", "2", "2", "2", "", ""]),
        ("all_preceding", ["", "", "1", "1", "1", "12", "12", "12"]),
    ],
)
def test_heat_is_gates_times_weights_on_the_pictures_of_the_mode(make_model, inputs, mode, looks_at):
    model = make_model(attention="eager", media_attention=mode)
    heat = show_attention.look(model, inputs)
    strength = heat.sum(dim=-1)  # (T, M)
    assert [("1" * bool(one)) + ("2" * bool(two)) for one, two in strength.tolist()] == looks_at
    opened = show_attention.gates(model)
    assert torch.allclose(opened, torch.tensor(0.7).tanh().expand(2, 2))
    seen = strength.sum(dim=-1) > 0
    assert torch.allclose(strength.sum(dim=-1)[seen], opened[:, 0].sum())


def test_above_even_leaves_what_stands_out():
    heat = torch.tensor([[1.0, 1.0, 5.0, 1.0], [1.0, 1.0, 3.0, 3.0]])  # 2 in the mean
    expected = torch.tensor([[0, 0, 0.6, 0], [0, 0, 0.2, 0.2]])
    torch.testing.assert_close(show_attention.above_even(heat), expected)
    assert not show_attention.above_even(torch.ones(2, 4)).any()
    assert not show_attention.above_even(torch.zeros(2, 4)).any()


def test_the_places_are_those_that_write_the_reply(processor, picture):
    content = [{"type": "image", "image": picture(0)}, {"type": "text", "text": "What?"}]
    _, tokens, places = show_attention.encode(processor, [{"role": "user", "content": content}], "red")
    assert [tokens[place + 1] for place in places] == ["r", "e", "d"]
    assert tokens[places[0]] == "⏎"


# The program


def test_the_program_draws_both_modes(tmp_path, monkeypatch, capsys):
    command = [BASE, "square :", "--image", ROOT / "examples/records/colour.png", "--answer", "yellow"]
    command += ["--output", tmp_path / "attention.png"]
    monkeypatch.setattr(sys, "argv", ["show_attention.py", *map(str, command)])
    show_attention.main()
    printed = capsys.readouterr().out
    assert "preceding: “yellow”" in printed and "following: “yellow”" in printed
    with Image.open(tmp_path / "attention.png") as drawn:
        assert drawn.width > 1000


# How well it points

SCENES = 200


def tuned(mode: str) -> tuple:
    """The quickstart's model in a mode; its adapter is kept in `outputs/attention`, for it takes minutes.

    The folder bears the hash of the base's weights: an adapter of another base is none of this one.
    """
    weights = hashlib.sha256((BASE / "model.safetensors").read_bytes()).hexdigest()
    folder = ROOT / "outputs" / "attention" / f"{mode}-{weights[:8]}"
    if not (folder / "adapter").exists():
        base = shutil.copytree(BASE, folder / "base", dirs_exist_ok=True)
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, "media_attention": mode}))
        set_seed(0)
        examples = [mixture(0, index) for index in range(500 * quickstart.BATCH)]
        quickstart.tune(quickstart.batches_of_like_length(examples, 0), 0, folder, base)
    model = AutoModelForImageTextToText.from_pretrained(
        folder / "adapter", dtype=torch.float32, attn_implementation="eager"
    )
    assert model.config.media_attention == mode
    return model, AutoProcessor.from_pretrained(folder / "adapter")


def patches_of(o: Object, patch: int) -> torch.Tensor:
    """The patches that the box of an object touches, bool `(P,)`."""
    column, row = CELLS[o.position]
    left, top = CELL * column + o.left, CELL * row + o.top
    touched = torch.zeros(SIDE // patch, SIDE // patch, dtype=torch.bool)
    last = SIZES[o.size] - 1
    touched[top // patch : (top + last) // patch + 1, left // patch : (left + last) // patch + 1] = True
    return touched.flatten()


def ask(kind: str, o: Object, scenes: list[Scene], rng: random.Random) -> tuple[list[dict], str]:
    found = named_look_up(kind, o)
    content = [{"type": "image", "image": render(scene)} for scene in scenes]
    question = rng.choice(WORDINGS[kind]).format(**found.words)
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}], found.answer


def heat_of_the_answer(model, processor, messages: list[dict], answer: str) -> torch.Tensor:
    """The heat `(M, P)` at the place that writes the answer, which is the last token but the end."""
    inputs, _, places = show_attention.encode(processor, messages, answer)
    return show_attention.look(model, inputs)[places[-1]]


def share_of(flags: list) -> float:
    return round(sum(map(float, flags)) / len(flags), 3)


def pointing(model, processor, kind: str) -> dict[str, float]:
    """Scenes of two to four objects, one asked for: how much of the heat lies on its patches."""
    product, above, hottest = [], [], []
    for number in range(SCENES):
        rng = random.Random(f"attention {kind} {number}")
        while not (named := objects_named_alone(scene := sample_scene(rng, count=rng.randint(2, 4)), kind)):
            pass
        o = rng.choice(named)
        heat = heat_of_the_answer(model, processor, *ask(kind, o, [scene], rng))  # (1, P)
        mask = patches_of(o, model.config.vision_config.patch_size)[None]
        product.append(float(heat[mask].sum() / heat.sum()))
        above.append(float(show_attention.above_even(heat)[mask].sum()))
        hottest.append(bool(mask[0, heat.argmax()]))
    return {
        "above_even": round(sum(above) / SCENES, 3),
        "above_even_over_half": share_of([share > 0.5 for share in above]),
        "product": round(sum(product) / SCENES, 3),
        "product_over_half": share_of([share > 0.5 for share in product]),
        "hottest_patch": share_of(hottest),
    }


def right_picture(model, processor) -> float:
    """Two pictures in one turn, and a question about a shape that one of them shows: looks it there most?"""
    right = []
    for number in range(SCENES):
        rng = random.Random(f"attention pair {number}")
        named = []
        while not named:
            scenes = [sample_scene(rng, count=rng.randint(1, 3)) for _ in range(2)]
            shapes = [[o.shape for o in scene.objects] for scene in scenes]
            named = [
                (which, o)
                for which, scene in enumerate(scenes)
                for o in objects_named_alone(scene, "colour")
                if o.shape not in shapes[1 - which]
            ]
        which, o = rng.choice(named)
        heat = heat_of_the_answer(model, processor, *ask("colour", o, scenes, rng))
        right.append(show_attention.above_even(heat).sum(dim=-1).argmax().item() == which)
    return share_of(right)


def newest_picture(model, processor) -> float:
    """A picture and a question, then another of both: looks the second answer at the second picture most?"""
    newest = []
    for number in range(SCENES):
        e = example("two_pictures", 0, number, "test")
        pictures = iter(e.images)
        messages = [
            {**m, "content": [{**p, "image": next(pictures)} if p["type"] == "image" else p for p in m["content"]]}
            for m in e.messages[:-1]
        ]
        heat = heat_of_the_answer(model, processor, messages, e.answer)
        newest.append(show_attention.above_even(heat).sum(dim=-1).argmax().item() == 1)
    return share_of(newest)


@pytest.mark.bars
def test_over_half_of_the_heat_lies_on_the_asked_object():
    model, processor = tuned("preceding")
    found = {kind: pointing(model, processor, kind) for kind in ("colour", "shape", "size", "position")}
    note_results("asked_object", found)
    assert min(of_kind["above_even_over_half"] for of_kind in found.values()) >= 0.8


@pytest.mark.bars
def test_of_two_pictures_the_right_one_is_looked_at():
    model, processor = tuned("all_preceding")
    found = {"shown_in_one_alone": right_picture(model, processor), "newest": newest_picture(model, processor)}
    note_results("right_picture", found)
    assert found["shown_in_one_alone"] >= 0.9


def note_results(name: str, found: dict) -> None:
    """Keep the last figures, with what they were measured with."""
    noted = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    noted |= evaluation.measured_with("pytest -m bars tests/test_show_attention.py")
    noted |= {name: found, "scenes": SCENES, "seed": 0}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(noted, indent=1, sort_keys=True) + "\n")

"""A model whose parts lie in several places gives what it gives in one: accelerate moves weights and arguments."""

import pytest
import torch

from modeling_mmgpt import MMGPTForConditionalGeneration


PARTS = ("model.vision_tower", "model.resampler", "model.text_model")
WANTED = {"output_hidden_states": True, "output_attentions": True, "use_cache": True}


def load(folder, **kwargs):
    return MMGPTForConditionalGeneration.from_pretrained(folder, attn_implementation="eager", **kwargs).eval()


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("family", ["llama", "mpt"])  # conditioning comes as an argument, or by a context variable
@pytest.mark.parametrize("on_disk", [PARTS[2:], PARTS], ids=["LM on disk", "all on disk"])
def test_offloaded_parts_change_nothing(make_model, ids, pixels, tmp_path, family, every, on_disk):
    make_model(family, cross_attn_every_n_layers=every).save_pretrained(tmp_path / "model")
    places = {part: "disk" if part in on_disk else "cpu" for part in PARTS}
    batch = ids("ab#c#d", "__ab#c") | {"pixel_values": pixels(2, 2)}
    whole = load(tmp_path / "model")
    placed = load(tmp_path / "model", device_map=places, offload_folder=tmp_path / "offloaded")
    with torch.no_grad():
        expected, found = whole(**batch, **WANTED), placed(**batch, **WANTED)
    assert torch.equal(found.logits, expected.logits)
    for name in ("hidden_states", "attentions", "cross_attentions"):
        assert len(found[name]) == len(expected[name]) > 0
        assert all(map(torch.equal, found[name], expected[name]))
    length = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(placed.generate(**batch, **length), whole.generate(**batch, **length))

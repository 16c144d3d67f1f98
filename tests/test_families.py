"""Families of language models: what each does with pictures, measured, and the page that says so.

`pytest -m bars tests/test_families.py` measures all of them and writes `docs/language_models.md` anew.
"""

import copy
import functools
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import FAMILIES, note_results
from transformers import CompileConfig

from modeling_mmgpt import MMGPTForConditionalGeneration
from modeling_mmgpt.adapters_mmgpt import lora_config
from modeling_mmgpt.conditioning_mmgpt import SWALLOW_KEYWORDS, decoder_layers


PAGE = Path(__file__).parents[1] / "docs" / "language_models.md"
# Of each way a family may differ, one: plain, windows, experts, fused projections, absolute positions, by ContextVar.
FAST = ("qwen3", "smollm3", "gemma3_text", "qwen3_moe", "opt", "gpt2", "mpt", "gpt_neo")
ROWS = ("__#b#cdefghi", "abcdefghijkl", "abcd#fghijkl")
NEVER = float("inf")  # the difference of two generations that chose different tokens


class Tiny(NamedTuple):
    """A tiny model of a family, the same with shut gates and its bare LM, and what they are given."""

    model: MMGPTForConditionalGeneration
    shut: MMGPTForConditionalGeneration
    lm: torch.nn.Module
    batch: dict
    pictures: torch.Tensor
    first_row: dict


def difference(one, other):
    return (one - other).abs().max().item()


@torch.no_grad()
def logits(model, tiny):
    return model(**tiny.batch, pixel_values=tiny.pictures).logits


def generate(tiny, batch=None, pictures=None, num_tokens=8, **kwargs):
    """Greedy tokens and the logits that chose them, or beams and their scores."""
    out = tiny.model.generate(
        **(batch or tiny.batch),
        pixel_values=tiny.pictures if pictures is None else pictures,
        **{
            "do_sample": False,
            "max_new_tokens": num_tokens,
            "min_new_tokens": num_tokens,
            "use_cache": True,
            **kwargs,
        },
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
    )
    values = out.sequences_scores if "num_beams" in kwargs else torch.stack(out.logits, dim=1)
    return out.sequences[:, -num_tokens:], values


def distance(one, other):
    return difference(one[1], other[1]) if torch.equal(one[0], other[0]) else NEVER


# What is measured: each gives the largest difference


def shut_gates(tiny):
    return difference(logits(tiny.shut, tiny), tiny.lm(**tiny.batch).logits)


def text_row(tiny):
    ours, bare = logits(tiny.model, tiny), tiny.lm(**tiny.batch).logits
    assert difference(ours[0, 2:], bare[0, 2:]) > 1e-2 and difference(ours[2], bare[2]) > 1e-2  # pictures do count
    return difference(ours[1], bare[1])


def cached(tiny):
    return distance(generate(tiny), generate(tiny, use_cache=False))


def beams(tiny):
    return distance(generate(tiny, num_beams=3), generate(tiny, num_beams=3, use_cache=False))


def padded(tiny):
    alone = generate(tiny, tiny.first_row, tiny.pictures[:1])
    together = generate(tiny)
    return distance(alone, (together[0][:1], together[1][:1]))


def static(tiny):
    return distance(generate(tiny), generate(tiny, cache_implementation="static"))


def compiled(tiny):
    torch.compiler.reset()
    fullgraph = tiny.lm.config.model_type not in SWALLOW_KEYWORDS
    compile_config = CompileConfig(fullgraph=fullgraph, backend="eager", mode=None)
    compile_config._compile_all_devices = True  # by itself transformers compiles on a GPU only
    how = {"cache_implementation": "static", "compile_config": compile_config}
    return distance(generate(tiny, num_tokens=3), generate(tiny, num_tokens=3, **how))


def checkpointed(tiny):
    gradients = []
    for enabled in (False, True):
        model = copy.deepcopy(tiny.model).train()
        if enabled:
            model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)  # of the dropout
        model(**tiny.batch, pixel_values=tiny.pictures, labels=tiny.batch["input_ids"]).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, again = gradients
    assert plain.keys() == again.keys() and any("gated_cross_attn_layer" in name for name in plain)
    return max(difference(plain[name], again[name]) / max(1.0, plain[name].abs().max()) for name in plain)


def saved(tiny):
    with tempfile.TemporaryDirectory() as folder:
        tiny.model.save_pretrained(folder)
        again, info = MMGPTForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return difference(logits(again, tiny), logits(tiny.model, tiny))


# Name of the column, what it means, what is measured, how large it may be.
CHECKS = {
    "shut gates": ("the model with shut gates gives the logits of the bare LM", shut_gates, 0.0),
    "text row": ("a row without a picture, in a batch with pictures, gives the logits of the bare LM", text_row, 0.0),
    "cached": ("greedy generation with a dynamic cache equals generation without one", cached, 1e-4),
    "beams": ("so does beam search", beams, 1e-4),
    "padded": ("a row padded on the left generates what it generates alone", padded, 1e-4),
    "static": ("generation with a static cache equals generation with a dynamic one", static, 1e-4),
    "checkpointed": ("gradients with checkpointing equal those without, relative to the largest", checkpointed, 1e-5),
    "saved": ("the model saved and loaded gives the same logits", saved, 0.0),
    "compiled": ("generation with a static cache and a compiled forward equals generation without", compiled, 1e-4),
}


def lora_targets(model, **kwargs):
    """Names of the LM's layers that LoRA adapts; they are the same in each decoder layer."""
    pattern = re.compile(lora_config(model, **kwargs).target_modules)
    found = [name for name, _ in model.named_modules() if pattern.fullmatch(name)]
    assert all(name.startswith("model.text_model.") for name in found)
    ours = [name for name in found if "gated_cross_attn_layer" in name]
    names = {name.split(".decoder_layer.")[1] for name in found if name not in ours}
    assert len(ours) == 5 * 2 and len(found) - len(ours) == 4 * len(names)
    return names


def last_names(paths):
    return ", ".join(sorted({path.split(".")[-1] for path in paths}))


def refused(error):
    return f"refused: {str(error).split('. ')[0]}"


def describe(model):
    """What can be said of a family without running it."""
    layers = decoder_layers(model.model.text_model)
    path = next(path for path, module in model.model.text_model.named_modules() if module is layers)
    attention = lora_targets(model)
    try:
        mlp = last_names(lora_targets(model, language_mlp=True) - attention)
    except ValueError as error:
        mlp = refused(error)
    way = "context variable" if model.config.text_config.model_type in SWALLOW_KEYWORDS else "keyword"
    return {"layers": path, "by": way, "LoRA": last_names(attention), "LoRA of the MLP": mlp}


def measure(tiny, check):
    """The largest difference, or the words of the refusal."""
    try:
        return float(CHECKS[check][1](tiny))
    except ValueError as error:
        return refused(error)


def cell(check, measured):
    return measured if isinstance(measured, str) else "yes" if measured <= CHECKS[check][2] else "NO"


@functools.cache
def measure_family(family, make_model, make_lm, ids, pixels, checks=tuple(CHECKS)):
    """The row of a family in the page, and its figures."""
    shut = make_model(family, gates=0.0)
    tiny = Tiny(make_model(family), shut, make_lm(shut), ids(*ROWS), pixels(3, 2), ids(ROWS[0].strip("_")))
    figures = {check: measure(tiny, check) for check in checks}
    row = {**describe(tiny.model), **{check: cell(check, figure) for check, figure in figures.items()}}
    return row, figures


# The page


def write_page(rows):
    """The page of all families, from `{family: row}`."""
    refusals = list(dict.fromkeys(c for row in rows.values() for c in row.values() if c.startswith("refused")))
    bounds = {check: "exactly" if bound == 0 else f"within {bound:g}" for check, (_, _, bound) in CHECKS.items()}
    columns = ["layers", "by", "LoRA", "LoRA of the MLP", *CHECKS]
    lines = [
        "# Language models",
        "",
        "Any causal LM of transformers can be the language model if its decoder keeps its layers in a list.",
        f"{len(rows)} families were measured, each as a tiny random model with open gates, in float32 on a CPU;",
        "figures and versions stand in `tests/results/families.json`. This page is written by",
        "`pytest -m bars tests/test_families.py`.",
        "",
        "Pictures reach the layers as a keyword argument where the LM hands those on, else by a context variable. The",
        "second way cannot be traced by `torch.compile`: there the LM runs as it stands inside a compiled forward,",
        "and `fullgraph=True` is an error. An MPT's config says `use_cache: false`: give `generate(use_cache=True)`.",
        "",
        *(f"* **{check}**: {meaning}, {bounds[check]}." for check, (meaning, _, _) in CHECKS.items()),
        "* **LoRA**: what `lora_config(model)` adapts in each decoder layer, and what `language_mlp=True` adds.",
        "",
        "| `model_type` | " + " | ".join(columns) + " |",
        "|" + "---|" * (1 + len(columns)),
    ]
    for family, row in rows.items():
        cells = [f"refused [{refusals.index(c) + 1}]" if c in refusals else c for c in (row[name] for name in columns)]
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    lines += [
        "",
        *(f"{number}. {text.removeprefix('refused: ')}." for number, text in enumerate(refusals, start=1)),
        "",
    ]
    return "\n".join(lines)


def read_page():
    """The rows of the committed page."""
    text = PAGE.read_text()
    table = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    refusals = {f"refused [{n}]": f"refused: {words}" for n, words in re.findall(r"(?m)^(\d+)\. (.*)\.$", text)}
    names = table[0][1:]
    return {row[0]: dict(zip(names, (refusals.get(c, c) for c in row[1:]), strict=True)) for row in table[1:]}


@pytest.mark.parametrize("family", FAST)
def test_a_family_does_what_its_row_of_the_page_says(make_model, make_lm, ids, pixels, family):
    quick = tuple(check for check in CHECKS if check != "compiled")
    row, figures = measure_family(family, make_model, make_lm, ids, pixels, quick)
    assert "NO" not in row.values(), figures
    assert read_page()[family] == {**read_page()[family], **row}


@pytest.mark.bars
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes_or_refuses_by_name(make_model, make_lm, ids, pixels, family):
    row, figures = measure_family(family, make_model, make_lm, ids, pixels)
    assert "NO" not in row.values(), figures


@pytest.mark.bars
def test_the_page_is_what_was_measured(make_model, make_lm, ids, pixels):
    """Writes the page and the figures; fails where the page changed, which is then there to be looked at."""
    measured = {family: measure_family(family, make_model, make_lm, ids, pixels) for family in FAMILIES}
    before = PAGE.read_text() if PAGE.exists() else ""
    PAGE.write_text(write_page({family: row for family, (row, _) in measured.items()}))
    note_results("families", {family: figures for family, (_, figures) in measured.items()})
    assert PAGE.read_text() == before
    assert read_page() == {family: row for family, (row, _) in measured.items()}

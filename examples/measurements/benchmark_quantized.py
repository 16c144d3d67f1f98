"""Measure quantised bases: speed, memory, what they say differently, and which cards hold them.

    python examples/measurements/benchmark_quantized.py --output-dir outputs/quantized          # one GPU, the 9B shape
    python examples/measurements/benchmark_quantized.py --tiny --output-dir outputs/quantized   # a CPU: does it run

`--parts methods` quantises the model of `benchmark.py` by each of `--methods`, in the way of
`from_pretrained(..., quantization_config=...)`, and measures decoding of one row, memory, and how far its next-token
distribution is from that of the same weights in float32: on random weights, and on the trained tiny base, whose right
answers are counted as well. `--parts memory` runs inference and LoRA steps with the memory of cards of 24, 40, 80 GB.
Writes `quantized.json` and `quantized.md`, after each method anew.
"""

import argparse
import gc
import json
import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import transformers
from benchmark import generate, generation_options, step, time_generation, trainee
from benchmark_models import (
    DEVICE,
    DTYPE,
    OPEN_FLAMINGO_9B,
    TINY_BASE,
    Shape,
    build,
    free,
    half_learnt,
    inputs,
    measure,
)
from torch import nn
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    Int4WeightOnlyConfig,
    Int8WeightOnlyConfig,
    PerRow,
)
from torchao.quantization.quantize_.workflows import Int4PackingFormat
from transformers import AutoModelForImageTextToText, AutoProcessor, CompileConfig

from modeling_mmgpt import MMGPTForConditionalGeneration
from modeling_mmgpt.adapters_mmgpt import quantization_config
from modeling_mmgpt.decoding_mmgpt import sample_ahead


sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_world import corpus
from tiny_world.documents import Collator, encode, forward, probe


BASE = Path(__file__).parents[1] / "tiny_world" / "base"
TINY = replace(TINY_BASE, hidden=256, heads=4, intermediate=512)  # on a CPU bitsandbytes takes multiples of 64
GROUP, TINY_GROUP = 128, 32  # weights of a row that share a scale in `int4`; the rows of the tiny base are 160 long
CARDS = (24, 40, 80)  # GB
CONTEXT = 1  # GB that CUDA itself takes on a card, beside what torch allocates

# How each method is run. `tuned` compiles products of a matrix and a vector anew, searching for their best form: they
# then read 8-bit weights as they are, which are otherwise written out in 16 bits first.
SETTINGS = {
    "bf16": ("compiled",),
    "int4": ("compiled",),
    "nf4": ("eager", "compiled"),
    "bf16-tuned": ("tuned",),
    "int8": ("tuned",),
    "fp8": ("tuned",),
    "llm-int8": ("eager",),
    "fp8-dynamic": ("compiled",),
}
NEEDS_CUDA = {
    "int4": "its weights are packed for the tensor cores of a GPU",
    "fp8-dynamic": "its products of 8-bit floats need a GPU",
}
BASE_NEEDS_CUDA = {"nf4": "on a CPU bitsandbytes takes only rows of a multiple of 64 weights; the base has 160"}


def quant_type(method: str, group_size: int):
    """What [`quantization_config`] takes for a method; `None` for the model as it is."""
    torchao_types = {
        "int8": partial(Int8WeightOnlyConfig, version=2),
        "fp8": Float8WeightOnlyConfig,
        "fp8-dynamic": partial(Float8DynamicActivationFloat8WeightConfig, granularity=PerRow()),
        "int4": partial(
            Int4WeightOnlyConfig, group_size=group_size, int4_packing_format=Int4PackingFormat.TILE_PACKED_TO_4D
        ),
    }
    if method in torchao_types:  # by default they would set the compiler's options for the whole process
        return torchao_types[method](set_inductor_config=False)
    return {"nf4": "nf4", "llm-int8": "int8"}.get(method)


# The models


def quantize(model: nn.Module, method: str, group_size: int = GROUP) -> nn.Module:
    """Quantise a model in memory, matrix by matrix, by the code that quantises one in a folder."""
    kind = quant_type(method, group_size)
    if kind is None:
        return model
    return MMGPTForConditionalGeneration.from_pretrained(
        None,
        config=model.config,
        state_dict=model.state_dict(),
        dtype=model.dtype,
        device_map=model.device,
        quantization_config=quantization_config(kind, model.dtype),
    )


def options_of(setting: str) -> dict:
    """Options of `generate()`; the prompt is not compiled."""
    if setting == "eager":
        return {}
    options = generation_options("compiled") | {"custom_generate": sample_ahead}  # compiles over bitsandbytes as well
    if setting == "tuned" and DEVICE == "cuda":
        tuned = {"coordinate_descent_tuning": True}
        options["compile_config"] = CompileConfig(fullgraph=True, mode=None, options=tuned)
    return options


# Drift


def drift(logits: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """Compare the next-token distributions of `(..., V)` logits with those of the reference.

    Returns:
        `kl`, the mean over positions of KL(reference || logits) in nats, and `same_top`, the share of positions whose
        likeliest token is the same.
    """
    log_p, log_q = reference.float().log_softmax(-1), logits.float().log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    return {"kl": kl.item(), "same_top": (logits.argmax(-1) == reference.argmax(-1)).float().mean().item()}


@torch.no_grad()
def random_logits(model: nn.Module, shape: Shape, tiny: bool) -> torch.Tensor:
    """Logits `(B, T, V)` of random text with two pictures a row."""
    batch = inputs("mmgpt", shape, *((2, 32) if tiny else (4, 128)), 2)
    batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    return model(**batch).logits.cpu()


@torch.no_grad()
def base_logits(model: nn.Module, processor, count: int) -> torch.Tensor:
    """Logits `(tokens, V)` of the tiny base on look-ups about drawn scenes."""
    rng = random.Random(0)
    batch = Collator(processor.tokenizer.pad_token_id)([encode(corpus.look_ups(rng), processor) for _ in range(count)])
    batch = {key: value.to(DEVICE) for key, value in batch.items()}
    return forward(model, batch).logits[batch["attention_mask"].bool()].cpu()


def load_base(method: str, dtype: torch.dtype) -> nn.Module:
    """Load the tiny base, quantised."""
    kind = quant_type(method, TINY_GROUP)
    config = None if kind is None else quantization_config(kind, dtype)
    model = AutoModelForImageTextToText.from_pretrained(
        BASE, dtype=dtype, device_map=DEVICE, quantization_config=config
    )
    return model.eval()


def measure_base(method: str, tiny: bool) -> dict[str, float | str]:
    """Drift of the tiny base from float32, and the share of values that it gets right in documents of its kind."""
    if DEVICE == "cpu" and method in BASE_NEEDS_CUDA:
        return {"skipped": BASE_NEEDS_CUDA[method]}
    count = 10 if tiny else 100
    processor = AutoProcessor.from_pretrained(BASE)
    reference = base_logits(load_base("bf16", torch.float32), processor, count)
    model = load_base(method, DTYPE)
    right = statistics.mean(probe(model, processor, count).values())
    return {"right": right, **drift(base_logits(model, processor, count), reference)}


# Speed


def measure_method(method: str, shape: Shape, reference: torch.Tensor, tiny: bool) -> list[dict]:
    """Load by one method; time each of its settings on a row of 128 tokens with one picture."""
    if DEVICE == "cpu" and method in NEEDS_CUDA:
        return [{"method": method, "skipped": NEEDS_CUDA[method]}]
    base = measure_base(method, tiny)
    free()
    held = torch.cuda.memory_allocated() if DEVICE == "cuda" else 0
    model = quantize(build("mmgpt", shape), method)
    free()
    found = {"weights_gb": (torch.cuda.memory_allocated() - held) / 1e9 if DEVICE == "cuda" else None}
    found |= {"random": drift(random_logits(model, shape, tiny), reference), "tiny_base": base}
    batch, new_tokens = inputs("mmgpt", shape, 1, 16 if tiny else 128, 1), 8 if tiny else 64
    rows = []
    for setting in SETTINGS[method]:
        prefill, decode, peak = time_generation(model, batch, new_tokens, options_of(setting))
        times = {"prefill_ms": prefill * 1e3, "decode_ms": decode * 1e3, "peak_gb": peak}
        rows.append({"method": method, "setting": setting, **times, **found})
        print(json.dumps(rows[-1]), flush=True)
    return rows


# Memory


def fit(run: Callable) -> dict[str, float | None]:
    """Run with the memory of each card, from the smallest on, until it is enough.

    Returns:
        `card_gb`, `None` if none of them is; what tensors took at the peak, `peak_gb`, and what torch had reserved for
        them, `reserved_gb`.
    """
    if DEVICE == "cpu":
        run()
        return {"card_gb": None, "peak_gb": None, "reserved_gb": None}
    whole = torch.cuda.get_device_properties(0).total_memory / 1e9
    for card in CARDS:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((card - CONTEXT) / whole)
        try:
            _, peak = measure(run, 1)
            return {"card_gb": card, "peak_gb": peak, "reserved_gb": torch.cuda.max_memory_reserved() / 1e9}
        except torch.OutOfMemoryError:
            print(f"not within {card} GB", flush=True)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    return {"card_gb": None, "peak_gb": None, "reserved_gb": None}


def fit_inference(shape: Shape, tiny: bool) -> list[dict]:
    """A prompt of 2,048 tokens with pictures, and eight tokens after it."""
    tokens, rows = 64 if tiny else 2048, []
    for method in ("bf16", "int8", "nf4"):
        model = quantize(build("mmgpt", shape), method)
        free()
        for images in (1, 8):
            batch = inputs("mmgpt", shape, 1, tokens, images)
            with torch.no_grad():
                found = fit(partial(generate, model, batch, 8))
            rows.append({"what": "inference", "base": method, "rows": 1, "tokens": tokens, "images": images, **found})
            print(json.dumps(rows[-1]), flush=True)
        del model
    return rows


def fit_training(shape: Shape, tiny: bool) -> list[dict]:
    """LoRA steps on full rows with a picture each, in the settings of `benchmark.py`."""
    cases = [("bf16", "fast", (512, 1024)), ("bf16", "lean", (512, 2048)), ("nf4", "lean", (512, 2048))]
    count, rows = 2 if tiny else 8, []
    for method, setting, lengths in cases:
        model, optimizer = trainee(quantize(build("mmgpt", shape), method), "mmgpt", setting)
        free()
        for tokens in (32,) if tiny else lengths:
            batch = half_learnt("mmgpt", shape, count, tokens)
            found = fit(partial(step, model, optimizer, batch, setting))
            case = {"what": f"LoRA, {setting}", "base": method, "rows": count, "tokens": tokens, "images": count}
            rows.append({**case, **found})
            print(json.dumps(rows[-1]), flush=True)
        del model, optimizer
        free()
    return rows


# The report


def markdown(rows: list[dict]) -> str:
    """Rows of equal keys as a table; nested ones become columns of their own."""
    flat = []
    for row in rows:
        flat.append({})
        for key, value in row.items():
            flat[-1] |= {f"{key}: {k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    keys = list(dict.fromkeys(key for row in flat for key in row))
    cells = [
        [f"{v:.4g}" if isinstance(v, float) else "" if v is None else str(v) for v in map(row.get, keys)]
        for row in flat
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in [keys, ["---"] * len(keys), *cells]) + "\n"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="tiny shapes")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/quantized"))
    parser.add_argument("--methods", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--parts", nargs="+", default=["methods", "memory"], choices=["methods", "memory"])
    args = parser.parse_args()
    transformers.logging.disable_progress_bar()
    shape = TINY if args.tiny else OPEN_FLAMINGO_9B
    args.output_dir.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    result = {"device": device, "torch": torch.__version__, "transformers": transformers.__version__}
    tables = {part: [] for part in args.parts}

    def note(part: str, rows: list[dict]) -> None:
        tables[part] += rows
        (args.output_dir / "quantized.json").write_text(json.dumps(result | tables, indent=2) + "\n")
        (args.output_dir / "quantized.md").write_text("\n".join(markdown(rows) for rows in tables.values()))

    if "methods" in args.parts:
        reference = random_logits(build("mmgpt", shape).float(), shape, args.tiny)
        for method in args.methods:
            note("methods", measure_method(method, shape, reference, args.tiny))
            free()
    if "memory" in args.parts:
        note("memory", fit_inference(shape, args.tiny))
        note("memory", fit_training(shape, args.tiny))
    print((args.output_dir / "quantized.md").read_text())


if __name__ == "__main__":
    main()

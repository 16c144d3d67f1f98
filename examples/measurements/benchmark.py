"""Measure speed and memory beside what a user would run instead: Idefics, Mllama and the bare LM of transformers.

    python examples/measurements/benchmark.py --output-dir outputs/benchmark          # one GPU, the 9B shape
    python examples/measurements/benchmark.py --tiny --output-dir outputs/benchmark   # a CPU, in ten minutes

All weights are random and all figures come from one run on one machine, each model at its best setting, so that a
ratio is a ratio. Writes `benchmark.json` and `benchmark.png`, and prints what it measures. `--parts` picks some.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
import transformers
from benchmark_models import (
    BUILD,
    DEVICE,
    LAYERS,
    OPEN_FLAMINGO_9B,
    TINY_BASE,
    Shape,
    build,
    bytes_a_token,
    free,
    half_learnt,
    inputs,
    measure,
    roofline,
    static_cache,
)
from peft import LoraConfig, get_peft_model
from torch import nn
from trl.trainer.utils import add_fused_lm_head

from modeling_mmgpt.adapters_mmgpt import lora_config
from modeling_mmgpt.decoding_mmgpt import sample_ahead
from modeling_mmgpt.speed.compiling import compile_parts
from modeling_mmgpt.speed.fusing import fuse_projections


BACKEND = "inductor" if DEVICE == "cuda" else "eager"  # of what `generate` does not compile: takes minutes on a CPU
# A module that has more versions than torch keeps would run uncompiled, with no more than a warning.
torch.compiler.config.fail_on_recompile_limit_hit = True


# Generation


def generate(model: nn.Module, batch: dict, new_tokens: int, **options) -> torch.Tensor:
    """Generate exactly so many tokens, greedily; a cache that was made ahead is emptied first."""
    if "cache" in options:
        options["cache"].reset()
    length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    return model.generate(**batch, **length, do_sample=False, pad_token_id=0, **options)


def compile_encoder(model: nn.Module) -> None:
    """Compile tower and resampler; `generate` compiles the rest by itself where the cache is static."""
    model.model.vision_tower.compile(backend=BACKEND)
    model.model.resampler.compile(backend=BACKEND)


def generation_options(setting: str, chunk: int | None = None) -> dict:
    """Options of `generate()` for a model of ours; `fused`, which is another model, takes those of `compiled`.

    Compiled are the step, where the cache is static, and a prompt that comes in chunks of `chunk` tokens.
    """
    if setting == "eager":
        return {}
    options = {"cache_implementation": "static", "prefill_chunk_size": chunk}
    return options if DEVICE == "cuda" else options | {"custom_generate": sample_ahead}  # there only if asked for


def options_of(model: nn.Module, kind: str, shape: Shape, setting: str, case: tuple[int, int, int]) -> dict:
    """Options of `generate()`; peers are compiled by transformers' loop, on a CPU, where that compiles none, here.

    Idefics' prompt, which breaks into several graphs, is left as it is.
    """
    rows, images, tokens = case
    if kind == "mmgpt" or setting == "eager":
        return generation_options(setting, tokens)
    if DEVICE == "cpu":
        model.compile()
    chunk = None if kind == "idefics" else tokens
    return {"cache": static_cache(model, shape, rows, images, tokens + 128), "prefill_chunk_size": chunk}


def time_generation(
    model: nn.Module, batch: dict, new_tokens: int, options: dict, repeats: int = 3, warmup: int = 2
) -> tuple[float, float, float | None]:
    """Time a prompt and the tokens after it.

    Returns:
        Seconds to the first token, seconds of a step, and the peak of the device's memory in GB.
    """
    with torch.no_grad():
        whole, peak = measure(partial(generate, model, batch, new_tokens, **options), repeats, warmup)
        prefill, _ = measure(partial(generate, model, batch, 1, **options), repeats, warmup)
    return prefill, (whole - prefill) / (new_tokens - 1), peak


def measure_generation(
    model: nn.Module, kind: str, shape: Shape, setting: str, case: tuple[int, int, int]
) -> dict[str, str | float | None]:
    """Time the first token and the next ones of `(rows, images, tokens)`, compiled for this case alone."""
    torch._dynamo.reset()
    rows, images, tokens = case
    batch = inputs(kind, shape, rows, tokens, images)
    options = options_of(model, kind, shape, setting, case)
    new_tokens, warmup = (64, 1) if setting == "eager" else (128, 3)  # compiled, captured, replayed
    prefill, decode, peak = time_generation(model, batch, new_tokens, options, warmup=warmup)
    row = {"model": kind, "setting": setting, "rows": rows, "images": images, "tokens": tokens}
    row |= {"prefill_ms": prefill * 1e3, "decode_ms": decode * 1e3, "tokens_s": rows / decode, "peak_gb": peak}
    print(json.dumps(row), flush=True)
    return row


def decode_cases(tiny: bool) -> dict[tuple[str, str], list[tuple[int, int, int]]]:
    """The cases `(rows, images, tokens)` of each model in each setting."""
    tokens = 16 if tiny else 128
    one, eight, many, pictures = (1, 1, tokens), (8, 1, tokens), (32, 1, tokens), (1, 8, 4 * tokens)
    cases = {
        ("mmgpt", "eager"): [one, many, (1, 32, 8 * tokens)],
        ("mmgpt", "compiled"): [one, eight, many, pictures],
        ("mmgpt", "fused"): [one, eight, many],
        ("mllama", "eager"): [one, many],
        ("mllama", "compiled"): [one, eight, many, pictures],
        ("idefics", "eager"): [one, many],
        ("idefics", "compiled"): [one, eight, many],
        ("lm", "compiled"): [one],
    }
    return {key: of_kind[:1] for key, of_kind in cases.items()} if tiny else cases


def measure_decode(shape: Shape, kinds: list[str], tiny: bool) -> dict:
    """Generation of all models, eager and compiled; of ours also fused."""
    rows, token_bytes = [], None
    for kind in kinds:
        model = build(kind, shape)
        if kind == "mmgpt":
            token_bytes = bytes_a_token(model)
        for (of_kind, setting), cases in decode_cases(tiny).items():
            if of_kind != kind:
                continue
            if setting == "fused":
                model = fuse_projections(model)
            if kind == "mmgpt" and setting != "eager":
                compile_encoder(model)
            rows += [measure_generation(model, kind, shape, setting, case) for case in cases]
        del model
        free()
    return {"rows": rows, "bytes_a_token": token_bytes}


def compare_by_turns(cases: dict[str, tuple[nn.Module, dict, dict]], tiny: bool) -> dict[str, float]:
    """Time decoding of some cases, each a model, its batch and its options of `generate()`, by turns.

    Where the host decides, and what else it does, only figures taken by turns can be compared.

    Returns:
        Medians in ms a step, and the median ratios of the first to each of the others.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(5 if tiny else 9):
        for name, (model, batch, options) in cases.items():
            _, decode, _ = time_generation(model, batch, 64, options, repeats=1, warmup=2 if turn == 0 else 0)
            times[name].append(1e3 * decode)
    first, *others = times
    ratios = {
        f"{first} / {name}": statistics.median(a / b for a, b in zip(times[first], times[name], strict=True))
        for name in others
    }
    return {name: statistics.median(of_case) for name, of_case in times.items()} | ratios


def compare_models(shape: Shape, tiny: bool, setting: str) -> dict[str, float]:
    """Decoding of one row with a picture, by ours and by both peers in the same setting."""
    rows, images, tokens = case = (1, 1, 24 if tiny else 128)
    cases = {}
    for kind in ("mmgpt", "mllama", "idefics"):
        model = build(kind, shape)
        batch = inputs(kind, shape, rows, tokens, images)
        cases[kind] = (model, batch, options_of(model, kind, shape, setting, case))
    return compare_by_turns(cases, tiny)


def compare_settings() -> dict[str, bool | float]:
    """Whether compiling changes what is said, on the tiny shape: greedy tokens in float32, logits in bfloat16.

    The rows are padded and end at different times. The error of the logits, against float32, is in parts of the
    largest: rounding is what bfloat16 itself costs.
    """
    model = build("mmgpt", TINY_BASE).float()
    batch = inputs("mmgpt", TINY_BASE, 4, 24, 2)
    batch["attention_mask"] = batch["attention_mask"].clone()
    batch["attention_mask"][1, :1] = 0
    batch["pixel_values"] = batch["pixel_values"].float()
    exact = model(**batch).logits
    words = partial(model.generate, **batch, do_sample=False, max_new_tokens=32, pad_token_id=0)
    end = words()[0, -8].item()  # one row ends early
    said = words(eos_token_id=end)
    same = {
        f"same tokens, {name}": torch.equal(words(eos_token_id=end, **generation_options("compiled", chunk)), said)
        for name, chunk in {"step compiled": None, "step and prompt compiled": 24}.items()
    }
    free()
    model, batch["pixel_values"] = model.to(torch.bfloat16), batch["pixel_values"].to(torch.bfloat16)
    eager = model(**batch).logits
    model.forward = torch.compile(model.forward, backend=BACKEND)
    compiled = model(**batch).logits
    largest = exact.abs().max()
    return same | {
        f"bf16 error of logits, {key}": ((logits.float() - exact).abs().max() / largest).item()
        for key, logits in {"eager": eager, "compiled": compiled}.items()
    }


def count_recompiles(shape: Shape, tiny: bool) -> dict[str, int]:
    """Recompiles over 50 requests of random length and number of pictures, after a warm-up over both."""
    model = build("mmgpt", shape)
    compile_encoder(model)
    longest, most = (64, 4) if tiny else (512, 8)
    rng = random.Random(0)
    compiled = torch._dynamo.utils.counters["stats"]

    warmup = [(longest, 1), (longest - 8, 2), (longest - 16, 0), (longest - 24, 3), (longest - 9, most)]
    requests = [(rng.randint(2 * most, longest), rng.randint(0, most)) for _ in range(50)]
    for number, (tokens, images) in enumerate(warmup + requests):
        if number == len(warmup):
            before = compiled["unique_graphs"]
        batch = inputs("mmgpt", shape, 1, tokens, max(1, images))
        if images == 0:
            batch["input_ids"][batch["input_ids"] == shape.image_token] = 5
            del batch["pixel_values"]
        generate(model, batch, 4, **generation_options("compiled"))
    return {"requests": 50, "graphs_after_warmup": before, "recompiles": compiled["unique_graphs"] - before}


# Training


def compile_peer(model: nn.Module, kind: str) -> None:
    """Compile the parts of a peer as `compile_parts` does ours."""
    torch.compiler.config.recompile_limit = 64  # all layers come through one function of transformers
    for part in LAYERS[kind](model.model):
        part.compile(backend=BACKEND)


def trainee(model: nn.Module, kind: str, setting: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Put LoRA on the LM and the blocks, and make its optimiser.

    `plain` is PEFT as it comes; `fast` compiles all parts and makes only the logits that have a label (TRL's loss);
    `lean` recomputes activations on top of that. For peers it is on the self-attention and the cross-attention.
    """
    model.requires_grad_(False)
    if kind == "mmgpt":
        config = lora_config(model)
    else:
        attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
        encoders = r".*(vision_model|perceiver_resampler).*"
        config = LoraConfig(r=16, lora_alpha=16, target_modules=attention, exclude_modules=encoders)
    if setting != "plain":
        add_fused_lm_head(model)
    peft_model = get_peft_model(model, config, autocast_adapter_dtype=False)
    if setting == "lean":
        peft_model.activation_checkpointing_enable({"use_reentrant": False})
        peft_model.enable_input_require_grads()
    if setting != "plain":
        compile_parts(model, backend=BACKEND) if kind == "mmgpt" else compile_peer(model, kind)
    trained = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    return peft_model.train(), torch.optim.AdamW(trained, lr=1e-4, fused=DEVICE == "cuda")


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict, setting: str) -> None:
    """One optimiser step."""
    model(**batch, **({} if setting == "plain" else {"fused_lm_head": True})).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def measure_step(model: nn.Module, kind: str, shape: Shape, setting: str, tiny: bool) -> dict:
    """One LoRA step on full rows, 8 x 512 tokens with a picture each, half of the tokens learnt."""
    rows, tokens = (2, 32) if tiny else (8, 512)
    model, optimizer = trainee(model, kind, setting)
    elapsed, peak = measure(partial(step, model, optimizer, half_learnt(kind, shape, rows, tokens), setting), 5, 3)
    row = {"model": kind, "setting": setting, "rows": rows, "tokens": tokens}
    row |= {"tokens_s": rows * tokens / elapsed, "peak_gb": peak}
    row["trainable"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(json.dumps(row), flush=True)
    return row


def measure_training(shape: Shape, tiny: bool, kinds: list[str]) -> list[dict]:
    """LoRA steps of all models; of ours also as PEFT comes, and with activations recomputed."""
    measured = []
    for kind in kinds:
        for setting in ("plain", "fast", "lean") if kind == "mmgpt" else ("fast",):
            measured.append(measure_step(build(kind, shape), kind, shape, setting, tiny))
            free()
    return measured


# Start

IMPORTS = (
    "import torch, transformers",  # which imports next to nothing before it is used
    "from transformers import AutoModel, PreTrainedModel",
    "import modeling_mmgpt",
)


def time_imports(tiny: bool) -> dict[str, float]:
    """Seconds that a new process takes for each of `IMPORTS`, by turns, medians."""
    times: dict[str, list[float]] = {statement: [] for statement in IMPORTS}
    for _ in range(2 if tiny else 5):
        for statement in IMPORTS:
            command = [sys.executable, "-c", statement]
            elapsed, _ = measure(partial(subprocess.run, command, check=True, capture_output=True), 1, warmup=0)
            times[statement].append(elapsed)
    return {statement: statistics.median(of_statement) for statement, of_statement in times.items()}


# The report


def draw(rows: list[dict], path: Path) -> None:
    """Tokens a second, and the time to the first, against rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = {"mmgpt": "ours", "lm": "bare LM", "idefics": "Idefics", "mllama": "Mllama"}
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    series: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        series.setdefault((row["model"], row["setting"]), []).append(row)
    colours = {model: f"C{number}" for number, model in enumerate(names)}
    styles = {"eager": ":", "compiled": "-", "fused": "--"}
    for (model, setting), of_series in series.items():
        short = sorted((r for r in of_series if r["tokens"] == of_series[0]["tokens"]), key=lambda row: row["rows"])
        for axis, key in zip(axes, ("tokens_s", "prefill_ms"), strict=True):
            points = [row["rows"] for row in short], [row[key] for row in short]
            axis.plot(*points, styles[setting], marker="o", color=colours[model], label=f"{names[model]}, {setting}")
    titles = {"tokens / s": "decoding", "ms": "time to the first token"}
    counts = sorted({row["rows"] for row in rows})
    for axis, (unit, title) in zip(axes, titles.items(), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="rows, one picture each", ylabel=unit, title=title)
        axis.set_xticks(counts, counts, minor=False)
        axis.set_xticks([], minor=True)
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


# Each is given the shape, whether that is the tiny one, and the kinds of models.
PARTS = {
    "roofline": lambda shape, tiny, kinds: roofline(),
    "agreement": lambda shape, tiny, kinds: compare_settings(),
    "decode": lambda shape, tiny, kinds: measure_decode(shape, kinds, tiny),
    "turns": lambda shape, tiny, kinds: {key: compare_models(shape, tiny, key) for key in ("eager", "compiled")},
    "recompiles": lambda shape, tiny, kinds: count_recompiles(shape, tiny),
    "train": lambda shape, tiny, kinds: measure_training(shape, tiny, kinds),
    "imports": lambda shape, tiny, kinds: time_imports(tiny),
}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="tiny shapes")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/benchmark"))
    parser.add_argument("--kinds", nargs="+", default=list(BUILD), choices=list(BUILD), help="the models")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    args = parser.parse_args()
    shape = TINY_BASE if args.tiny else OPEN_FLAMINGO_9B
    args.output_dir.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    result = {"device": device, "torch": torch.__version__, "transformers": transformers.__version__}
    for part in args.parts:
        result[part] = PARTS[part](shape, args.tiny, args.kinds)
        (args.output_dir / "benchmark.json").write_text(json.dumps(result, indent=2) + "\n")
        print(part, json.dumps(result[part]) if isinstance(result[part], dict) else "", flush=True)
        free()
    if "decode" in result:
        draw(result["decode"]["rows"], args.output_dir / "benchmark.png")


if __name__ == "__main__":
    main()

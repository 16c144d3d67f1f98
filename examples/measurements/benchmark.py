"""Measure speed and memory beside what a user would run instead: Idefics, Mllama and the bare LM of transformers.

    python examples/measurements/benchmark.py --output-dir outputs/benchmark          # one GPU, the 9B shape
    python examples/measurements/benchmark.py --tiny --output-dir outputs/benchmark   # a CPU, in five minutes

All weights are random and all figures come from one run on one machine, so that a ratio is a ratio. Writes
`benchmark.json` and `benchmark.png`, and prints what it measures. `--parts` picks some, see `--help`.
"""

import argparse
import json
import math
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
    DTYPE,
    OPEN_FLAMINGO_9B,
    TINY_BASE,
    Shape,
    build,
    free,
    inputs,
    measure,
    roofline,
)
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import CompileConfig
from trl.trainer.utils import add_fused_lm_head

from modeling_mmgpt.adapters_mmgpt import lora_config
from modeling_mmgpt.decoding_mmgpt import sample_ahead
from modeling_mmgpt.speed.compiling import compile_parts, fill_vocabulary
from modeling_mmgpt.speed.fusing import fuse_projections
from processing_mmgpt.data.packing import fill_rows


BACKEND = "inductor" if DEVICE == "cuda" else "eager"  # of the compiler; on a CPU to compile takes minutes


# Generation


def generate(model: nn.Module, batch: dict, new_tokens: int, **options) -> torch.Tensor:
    """Generate exactly so many tokens, greedily."""
    length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    return model.generate(**batch, **length, do_sample=False, pad_token_id=0, **options)


def compile_encoder(model: nn.Module) -> None:
    """Compile tower and resampler; `generate` compiles the rest by itself where the cache is static."""
    model.model.vision_tower.compile(backend=BACKEND)
    model.model.resampler.compile(backend=BACKEND)


def generation_options(setting: str, chunk: int | None = None) -> dict:
    """Options of `generate()` for a setting; for `eager` none, and `fused`, which is another model, as for `compiled`.

    Compiled are the step, where the cache is static, and a prompt that comes in chunks of `chunk` tokens. A model of
    ours then decodes by its own loop; told how to compile (`theirs`), by that of transformers.
    """
    if setting == "eager":
        return {}
    options = {"cache_implementation": "static", "prefill_chunk_size": chunk}
    if setting == "theirs":
        options["compile_config"] = CompileConfig(fullgraph=True, mode="reduce-overhead" if DEVICE == "cuda" else None)
        options["compile_config"]._compile_all_devices = True
    elif DEVICE == "cpu":  # where it is taken only if asked for
        options["custom_generate"] = sample_ahead
    return options


def time_generation(
    model: nn.Module, batch: dict, new_tokens: int, options: dict, repeats: int = 3, warmup: int = 2
) -> tuple[float, float, float | None]:
    """Time a prompt and the tokens after it.

    Returns:
        Seconds of the prompt, seconds of a step, and the peak of the device's memory in GB.
    """
    with torch.no_grad():
        whole, peak = measure(partial(generate, model, batch, new_tokens, **options), repeats, warmup)
        prefill, _ = measure(partial(generate, model, batch, 1, **options), repeats, warmup)
    return prefill, (whole - prefill) / (new_tokens - 1), peak


def measure_generation(
    model: nn.Module, kind: str, shape: Shape, setting: str, cases: list[tuple[int, int, int]]
) -> list[dict]:
    """Time prefill and decode of `(rows, images, tokens)` cases, each compiled for itself.

    The prompt is compiled only where it is one row: elsewhere that is not worth it.
    """
    new_tokens, warmup = (64, 1) if setting == "eager" else (128, 2)
    measured = []
    for rows, images, tokens in cases:
        torch._dynamo.reset()
        batch = inputs(kind, shape, rows, tokens, images)
        chunk = tokens if rows == 1 else None
        options = generation_options(setting, chunk)
        prefill, decode, peak = time_generation(model, batch, new_tokens, options, warmup=warmup)
        row = {"model": kind, "setting": setting, "rows": rows, "images": images, "tokens": tokens}
        row |= {"prefill_ms": prefill * 1e3, "decode_ms": decode * 1e3, "tokens_s": rows / decode, "peak_gb": peak}
        measured.append(row)
        print(json.dumps(row), flush=True)
    return measured


def bytes_a_token(model: nn.Module) -> int:
    """What decoding one token has to read: each weight of LM and blocks, but for embedding and image keys."""
    return sum(
        parameter.numel() * parameter.element_size()
        for name, parameter in model.named_parameters()
        if "text_model" in name and "embed_tokens" not in name and "to_kv" not in name
    )


def measure_decode(shape: Shape, kinds: list[str], tiny: bool) -> dict:
    """Generation of all models, eager and compiled; of ours also by transformers' loop, and fused."""
    tokens = 16 if tiny else 128
    one, eight, many = (1, 1, tokens), (8, 1, tokens), (32, 1, tokens)  # rows, images, tokens
    longer = [(1, 1, 4 * tokens), (1, 8, 4 * tokens)]
    cases = {
        ("mmgpt", "eager"): [one, longer[1], (1, 32, 8 * tokens)],
        ("mmgpt", "compiled"): [one, eight, many, *longer],
        ("mmgpt", "theirs"): [one],
        ("mmgpt", "fused"): [one, eight, many],
        ("idefics", "eager"): [one, eight, many, longer[1]],
        ("mllama", "eager"): [one, eight, many, longer[1]],
        ("lm", "eager"): [one],
        ("lm", "theirs"): [one],
    }
    if tiny:
        cases = {key: list(dict.fromkeys([one, of_kind[-1]])) for key, of_kind in cases.items()}
    rows, token_bytes = [], None
    for kind in kinds:
        model = build(kind, shape)
        for setting in ("eager", "compiled", "theirs", "fused"):
            if (kind, setting) == ("mmgpt", "compiled"):
                fill_vocabulary(model)
                compile_encoder(model)
                token_bytes = bytes_a_token(model)
            if (kind, setting) == ("mmgpt", "fused"):
                model = fuse_projections(model)
                compile_encoder(model)
            if (kind, setting) in cases:
                rows += measure_generation(model, kind, shape, setting, cases[kind, setting])
        del model
        free()
    return {"rows": rows, "bytes_a_token": token_bytes}


def compare_by_turns(cases: dict[str, tuple[nn.Module, dict, dict]], tiny: bool) -> dict[str, float]:
    """Time decoding of two cases, each a model, its batch and its options of `generate()`, by turns.

    Where the host decides, and what else it does, only figures taken by turns can be compared.

    Returns:
        Medians in ms a step, and the median ratio of the first to the second.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(5 if tiny else 9):
        for name, (model, batch, options) in cases.items():
            _, decode, _ = time_generation(model, batch, 64, options, repeats=1, warmup=2 if turn == 0 else 0)
            times[name].append(1e3 * decode)
    ratio = statistics.median(first / second for first, second in zip(*times.values(), strict=True))
    return {name: statistics.median(of_case) for name, of_case in times.items()} | {"ratio": ratio}


def compare_with_peer(shape: Shape, tiny: bool, setting: str, peer: str) -> dict[str, float]:
    """Decoding of one row with a picture: ours in a setting, and a peer eager."""
    tokens = 24 if tiny else 128
    cases = {
        kind: (build(kind, shape), inputs(kind, shape, 1, tokens, 1), generation_options(of_kind, tokens))
        for kind, of_kind in (("mmgpt", setting), (peer, "eager"))
    }
    return compare_by_turns(cases, tiny)


def compare_pictures(shape: Shape, tiny: bool) -> dict[str, float]:
    """Decoding of one compiled row with eight pictures, and with one."""
    tokens = 64 if tiny else 512
    model, options = build("mmgpt", shape), generation_options("compiled", tokens)
    cases = {
        name: (model, inputs("mmgpt", shape, 1, tokens, images), options)
        for name, images in {"8 pictures": 8, "1 picture": 1}.items()
    }
    return compare_by_turns(cases, tiny)


def compare_settings() -> dict[str, bool | float]:
    """Whether compiling changes what is said, on the tiny shape: greedy tokens in float32, logits in bfloat16.

    The error of the logits, against float32, is in parts of the largest: rounding is what bfloat16 itself costs.
    """
    model = build("mmgpt", TINY_BASE).float()
    batch = inputs("mmgpt", TINY_BASE, 4, 24, 2)
    batch["pixel_values"] = batch["pixel_values"].float()
    exact = model(**batch).logits
    words = partial(model.generate, **batch, do_sample=False, max_new_tokens=32, pad_token_id=0)
    end = words()[0, -8].item()  # one row ends early
    said = words(eos_token_id=end)
    same = {
        f"same tokens, {setting}": torch.equal(words(eos_token_id=end, **generation_options(setting)), said)
        for setting in ("compiled", "theirs")
    }
    free()
    model, batch["pixel_values"] = model.to(torch.bfloat16), batch["pixel_values"].to(torch.bfloat16)
    eager = model(**batch).logits
    model.forward = torch.compile(model.forward, backend=BACKEND)
    compiled = model(**batch).logits
    errors = {"eager": eager, "compiled": compiled}
    largest = exact.abs().max()
    return same | {
        f"bf16 error of logits, {key}": ((logits.float() - exact).abs().max() / largest).item()
        for key, logits in errors.items()
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


def trainee(model: nn.Module, kind: str, setting: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Put LoRA on the LM and the blocks, and make its optimiser.

    `plain` is PEFT as it comes; `fast` compiles all parts, makes only the logits that have a label (TRL's own loss),
    and fills the vocabulary up; `lean` recomputes activations on top of that.
    """
    if setting != "plain":
        fill_vocabulary(model)
    model.requires_grad_(False)
    if kind == "mmgpt":
        config = lora_config(model)
    else:
        config = LoraConfig(r=16, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    if setting != "plain":
        add_fused_lm_head(model)
    peft_model = get_peft_model(model, config, autocast_adapter_dtype=False)
    if setting == "lean":
        peft_model.activation_checkpointing_enable({"use_reentrant": False})
        peft_model.enable_input_require_grads()
    if setting != "plain":
        compile_parts(model, backend=BACKEND)
    trained = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    return peft_model.train(), torch.optim.AdamW(trained, lr=1e-4, fused=DEVICE == "cuda")


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[dict], setting: str) -> None:
    """One optimiser step over the batches, gradients added up."""
    for batch in batches:
        model(**batch, **({} if setting == "plain" else {"fused_lm_head": True})).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def epoch(model: nn.Module, optimizer: torch.optim.Optimizer, steps: list[list[dict]], setting: str) -> None:
    """A step for each list of batches."""
    for batches in steps:
        step(model, optimizer, batches, setting)


def half_learnt(kind: str, shape: Shape, rows: int, tokens: int) -> dict[str, torch.Tensor]:
    """A batch of full rows with a picture each; the second half of the tokens is learnt."""
    batch = inputs(kind, shape, rows, tokens, 1)
    labels = batch["input_ids"].clone()
    labels[:, : tokens // 2] = -100
    return {**batch, "labels": labels}


def measure_training(shape: Shape, tiny: bool, kinds: list[str]) -> list[dict]:
    """One LoRA step on full rows, 8 x 512 tokens with a picture each, half of the tokens learnt."""
    rows, tokens = (2, 32) if tiny else (8, 512)
    measured = []
    for kind in kinds:
        for setting in ("plain", "fast", "lean") if kind == "mmgpt" else ("plain",):
            model, optimizer = trainee(build(kind, shape), kind, setting)
            batches = [half_learnt(kind, shape, rows, tokens)]
            elapsed, peak = measure(partial(step, model, optimizer, batches, setting), 5, 3)
            row = {"model": kind, "setting": setting, "rows": rows, "tokens": tokens}
            row |= {"tokens_s": rows * tokens / elapsed, "peak_gb": peak}
            row["trainable"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
            measured.append(row)
            print(json.dumps(row), flush=True)
            del model, optimizer, batches
            free()
    return measured


def documents(shape: Shape, count: int, longest: int, mean: int = 180, sigma: float = 0.8) -> list[dict]:
    """Draw documents as instruction data has them: log-normal lengths, every other with a picture, half learnt."""
    rng = random.Random(0)
    drawn = []
    for number in range(count):
        length = min(longest, max(8, round(rng.lognormvariate(math.log(mean) - sigma**2 / 2, sigma))))
        ids = [rng.randrange(5, shape.vocabulary - 10) for _ in range(length)]
        if number % 2 == 0:
            ids[1] = shape.image_token
        drawn.append({"input_ids": ids, "image": number % 2 == 0})
    return drawn


def rows_of(shape: Shape, packed: list[list[dict]], width: int | None = None) -> dict[str, torch.Tensor]:
    """Make a batch of rows: packed ones of `width` tokens, or of one document each, padded to the longest."""
    is_packed = width is not None
    width = width or max(sum(len(d["input_ids"]) for d in row) for row in packed)
    ids, labels, index = (torch.zeros(len(packed), width, dtype=torch.long) for _ in range(3))
    labels -= 100
    images = max(sum(d["image"] for d in row) for row in packed)
    for number, row in enumerate(packed):
        start = 0
        for place, document in enumerate(row, start=1):
            end = start + len(document["input_ids"])
            ids[number, start:end] = torch.tensor(document["input_ids"])
            labels[number, (start + end) // 2 : end] = ids[number, (start + end) // 2 : end]
            index[number, start:end] = place
            start = end
    batch = {"input_ids": ids, "attention_mask": (index > 0).long(), "labels": labels}
    if is_packed:
        batch["document_index"] = index
    if images:
        batch["pixel_values"] = torch.randn(len(packed), images, 3, shape.side, shape.side, dtype=DTYPE)
    return {key: value.to(DEVICE) for key, value in batch.items()}


@torch.no_grad()
def keep_pictures(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch with latents in the place of its pictures, as they are kept between epochs."""
    batch = dict(batch)
    if "pixel_values" in batch:
        batch["image_latents"] = model.get_base_model().model.encode_images(batch.pop("pixel_values"))
    return batch


def measure_mixture(shape: Shape, tiny: bool) -> list[dict]:
    """Samples a second on documents of natural lengths: two padded passes a step against packed rows."""
    batch, width, count = (4, 64, 32) if tiny else (16, 2048, 256)
    mean = 20 if tiny else 180
    drawn = documents(shape, count, width, mean)
    kinds = [[d for d in drawn if d["image"]], [d for d in drawn if not d["image"]]]
    half = batch // 2
    alternating = [
        [rows_of(shape, [[document] for document in kind[start : start + half]]) for kind in kinds]
        for start in range(0, len(kinds[0]), half)
    ]
    rows = [[drawn[number] for number in row] for row in fill_rows([len(d["input_ids"]) for d in drawn], width)]
    packed = [[rows_of(shape, rows[start : start + 2], width)] for start in range(0, len(rows), 2)]
    measured = []
    for setting in ("plain", "fast"):
        model, optimizer = trainee(build("mmgpt", shape), "mmgpt", setting)
        loops = {"two padded passes": alternating}
        if setting == "fast":
            kept = [[keep_pictures(model, batch) for batch in batches] for batches in packed]
            loops = {"packed rows": packed, "packed rows, pictures kept": kept}
            if DEVICE == "cuda":  # on a CPU it has no gradient
                model.get_base_model().model.text_model.set_attn_implementation("flex_attention")
        for name, steps in loops.items():
            elapsed, peak = measure(partial(epoch, model, optimizer, steps, setting), 3)
            measured.append({"loop": name, "setting": setting, "samples_s": count / elapsed, "peak_gb": peak})
            print(json.dumps(measured[-1]), flush=True)
        del model, optimizer
        free()
    return measured


# Start

IMPORTS = (
    "import torch, transformers",  # which imports next to nothing before it is used
    "from transformers import AutoConfig, AutoModel",  # what registering a model takes
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


def draw(result: dict, path: Path) -> None:
    """Throughput against rows, and memory against pictures."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = {"mmgpt": "ours", "lm": "bare LM", "idefics": "Idefics", "mllama": "Mllama"}
    settings = {"theirs": "compiled, loop of transformers", "fused": "fused, compiled"}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    series: dict[str, list[dict]] = {}
    for row in result["decode"]["rows"]:
        setting = settings.get(row["setting"], row["setting"])
        series.setdefault(f"{names[row['model']]}, {setting}", []).append(row)
    for name, rows in series.items():
        one = sorted((r["rows"], r["tokens_s"]) for r in rows if r["images"] == 1 and r["tokens"] == rows[0]["tokens"])
        left.plot(*zip(*one, strict=True), marker="o", label=name)
        # The prompt is longer where it has more pictures.
        pictures = {r["images"]: r["peak_gb"] or 0 for r in rows if r["rows"] == 1}
        right.plot(list(pictures), list(pictures.values()), marker="o", label=name)
    left.set(xscale="log", yscale="log", xlabel="rows, one picture each", ylabel="tokens / s", title="decode")
    counts = sorted({row["rows"] for row in result["decode"]["rows"]})
    left.set_xticks(counts, counts, minor=False)
    left.set_xticks([], minor=True)
    right.set(xlabel="pictures in one row", ylabel="peak GB", title="memory", ylim=(0, None))
    right.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


# Each is given the shape, whether that is the tiny one, and the kinds of models.
PARTS = {
    "roofline": lambda shape, tiny, kinds: roofline(),
    "agreement": lambda shape, tiny, kinds: compare_settings(),
    "decode": lambda shape, tiny, kinds: measure_decode(shape, kinds, tiny),
    "eager": lambda shape, tiny, kinds: compare_with_peer(shape, tiny, "eager", "mllama"),
    "compiled": lambda shape, tiny, kinds: compare_with_peer(shape, tiny, "compiled", "idefics"),
    "pictures": lambda shape, tiny, kinds: compare_pictures(shape, tiny),
    "recompiles": lambda shape, tiny, kinds: count_recompiles(shape, tiny),
    "train": lambda shape, tiny, kinds: measure_training(shape, tiny, kinds),
    "mixture": lambda shape, tiny, kinds: measure_mixture(shape, tiny),
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
        draw(result, args.output_dir / "benchmark.png")


if __name__ == "__main__":
    main()

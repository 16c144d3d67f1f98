"""Measure chats with a picture many at once, by continuous batching, beside one after the other by `generate()`.

    python examples/measurements/batching.py --shape 9b --output batching.json     # one GPU, in less than four minutes
    python examples/measurements/batching.py --shape tiny --chats 1 8 32           # a CPU
    python examples/measurements/batching.py --shape 9b --chats --questions 192   # one GPU, in two minutes
    python examples/measurements/batching.py --draw batching.json --output batching.png

Weights are random. A chat is 128 tokens with a picture of its own and a reply of 64; N of them come at the same time.
Each setting prints a line of JSON for each N: tokens a second of all replies, and for streamed replies the times to
the first token and between tokens, in ms, as the caller sees them. A setting that fails prints why, and the next runs.
`--questions 192` asks so many of 60 to 200 tokens, whose replies have 4 to 128, of the engine with its own settings,
and in padded batches of 32: the two ways of `evaluate_benchmark.py`.
"""

import argparse
import importlib.util
import json
import sys
import time
import traceback
from datetime import date
from functools import partial
from pathlib import Path

import torch
import transformers
from benchmark_models import DEVICE, DTYPE, OPEN_FLAMINGO_9B, TINY_BASE, Shape, build, free, inputs, synchronize
from torch import nn
from transformers import ContinuousBatchingConfig

from modeling_mmgpt.speed.batching import BatchingEngine
from processing_mmgpt.processing_mmgpt import pad_rows


SHAPES = {"9b": OPEN_FLAMINGO_9B, "tiny": TINY_BASE}
GRAPHS = {"use_cuda_graph": True, "q_padding_interval_size": 32, "kv_padding_interval_size": 2048}
# How transformers' engine runs; sdpa unless the switch to flash is on, which needs a package.
SETTINGS = {
    "plain": {"auto_switch_to_flash": False, "use_cuda_graph": False},
    "graphs": {"auto_switch_to_flash": False, **GRAPHS},
    "graphs, may sample": {"auto_switch_to_flash": False, **GRAPHS},  # the requests are greedy all the same
    "flash": {"auto_switch_to_flash": True},
}
PAGE = 64  # tokens
LONGEST = 120  # seconds for all chats
PADDED = 32  # questions in a padded batch
SEQUENTIAL = 4  # chats that are generated one after the other; more would take as long each


def chats(shape: Shape, number: int, tokens: int) -> list[dict]:
    """Make so many chats, each with its picture, where a server has them: on the host."""
    batch = {name: tensor.cpu() for name, tensor in inputs("mmgpt", shape, number, tokens, 1).items()}
    return [{name: tensor[row : row + 1] for name, tensor in batch.items()} for row in range(number)]


def percentiles(seconds: list[float]) -> list[float]:
    """The 50th and the 95th percentile, in ms."""
    if not seconds:
        return []
    return [round(1e3 * value, 2) for value in torch.tensor(seconds).quantile(torch.tensor([0.5, 0.95])).tolist()]


def run_at_once(engine: BatchingEngine, requests: list[dict], new_tokens: int, streaming: bool) -> dict:
    """Give an engine all requests and wait for the replies."""
    start = time.perf_counter()
    arrived: dict[str, list[float]] = {}
    for request in requests:
        name = engine.add_request(**request, max_new_tokens=new_tokens, eos_token_id=-1, streaming=streaming)
        arrived[name] = []
    waiting, count = len(requests), 0
    while waiting:
        result = engine.get_result(timeout=1)
        if engine.fatal_error is not None or time.perf_counter() - start > LONGEST:
            raise RuntimeError(f"{waiting} replies are missing: {engine.fatal_error}")
        if result is None:
            continue
        if result.error is not None:
            raise RuntimeError(result.error)
        arrived[result.request_id].append(time.perf_counter() - start)
        if result.is_finished():
            waiting, count = waiting - 1, count + len(result.generated_tokens)
    seconds = time.perf_counter() - start
    measured = {"seconds": round(seconds, 3), "tokens_s": round(count / seconds, 1)}
    if streaming:
        between = [b - a for times in arrived.values() for a, b in zip(times, times[1:], strict=False)]
        measured |= {"first_ms": percentiles([times[0] for times in arrived.values()])}
        measured |= {"between_ms": percentiles(between)}
    return measured


def measure_engine(model: nn.Module, shape: Shape, setting: str, args: argparse.Namespace) -> list[dict]:
    """Time an engine at all numbers of chats, after a run of each that warms up."""
    most, rows = max(args.chats), []
    pages = most * -(-(args.tokens + args.new_tokens) // PAGE)
    config = ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=64 + int(1.25 * pages),
        max_batch_tokens=2048 if DEVICE == "cuda" else 256,
        **SETTINGS[setting],
    )
    start = time.perf_counter()
    with BatchingEngine(model, config=config, num_slots=most, do_sample="sample" in setting) as engine:
        resolved = engine.manager.continuous_batching_config
        how = {
            "setting": setting,
            "attention": model.model.text_model.config._attn_implementation,
            "graphs": resolved.use_cuda_graph,
            "async": resolved.use_async_batching,
            "room": engine.room,
            "started_s": round(time.perf_counter() - start, 2),
        }
        print(json.dumps(how), flush=True)
        if setting == "flash" and "flash" not in how["attention"]:
            raise RuntimeError("There is no flash attention here.")
        for number in args.chats:
            requests = chats(shape, 3 * number, args.tokens)  # no picture and no prompt comes twice
            run_at_once(engine, requests[:number], args.new_tokens, streaming=False)
            engine.pool.encoded = 0
            row = {**how, "chats": number}
            row |= run_at_once(engine, requests[number : 2 * number], args.new_tokens, streaming=False)
            row["encoded"] = engine.pool.encoded
            streamed = run_at_once(engine, requests[2 * number :], args.new_tokens, streaming=True)
            row |= {f"streamed_{name}": value for name, value in streamed.items()}
            row["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1) if DEVICE == "cuda" else None
            rows.append(row)
            print(json.dumps(row), flush=True)
        if args.profile:
            profile(engine, requests[:number], args.new_tokens)
    return rows


def profile(engine: BatchingEngine, requests: list[dict], new_tokens: int) -> None:
    """Print what the device does meanwhile."""
    with torch.profiler.profile() as profiler:
        run_at_once(engine, requests, new_tokens, streaming=False)
    key = "self_device_time_total" if DEVICE == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=key, row_limit=15, max_name_column_width=60), flush=True)


def measure_sequential(model: nn.Module, shape: Shape, args: argparse.Namespace) -> list[dict]:
    """Time chats one after the other, and work out what N chats that come at the same time wait for."""
    requests = [{name: t.to(DEVICE) for name, t in chat.items()} for chat in chats(shape, SEQUENTIAL, args.tokens)]

    def generate(new_tokens: int) -> float:
        synchronize()
        start = time.perf_counter()
        for request in requests:
            model.generate(**request, do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
        synchronize()
        return (time.perf_counter() - start) / len(requests)

    generate(1)
    whole, first = generate(args.new_tokens), generate(1)
    rows = []
    for number in args.chats:
        row = {"setting": "one after the other", "attention": model.model.text_model.config._attn_implementation}
        row |= {"chats": number, "seconds": round(number * whole, 3), "tokens_s": round(args.new_tokens / whole, 1)}
        row |= {"streamed_first_ms": percentiles([place * whole + first for place in range(number)])}
        row |= {"streamed_between_ms": percentiles([(whole - first) / (args.new_tokens - 1)])}
        rows.append(row | {"measured_chats": SEQUENTIAL})
        print(json.dumps(rows[-1]), flush=True)
    return rows


# Questions, whose replies end at different times


def questions(shape: Shape, number: int, seed: int) -> list[dict]:
    """Make requests of 60 to 200 tokens with a picture each; their replies have 4 to 128, half of them 24 at most."""
    generator = torch.Generator().manual_seed(seed)
    said = torch.randn(number, generator=generator).mul(0.8).add(3.2).exp().clamp(4, 128).round().long().tolist()
    asked = torch.randint(60, 201, (number,), generator=generator).tolist()
    whole = chats(shape, number, 200)
    return [
        {"input_ids": row["input_ids"][:, :long], "pixel_values": row["pixel_values"], "max_new_tokens": new}
        for row, long, new in zip(whole, asked, said, strict=True)
    ]


def generate_padded(model: nn.Module, requests: list[dict]) -> None:
    """Generate the replies of one padded batch; it lasts as long as its longest."""
    ids = [request["input_ids"][0].tolist() for request in requests]
    width, new = max(map(len, ids)), max(request["max_new_tokens"] for request in requests)
    batch = {
        "input_ids": torch.tensor(pad_rows(ids, 0, "left", width)),
        "attention_mask": torch.tensor(pad_rows([[1] * len(row) for row in ids], 0, "left", width)),
        "pixel_values": torch.cat([request["pixel_values"] for request in requests]),
    }
    batch = {name: tensor.to(DEVICE) for name, tensor in batch.items()}
    model.generate(**batch, do_sample=False, max_new_tokens=new, min_new_tokens=new)


def measure_questions(model: nn.Module, shape: Shape, number: int) -> list[dict]:
    """Time questions by the engine, twice, for it builds its graphs the first time, and in padded batches."""
    rows = []

    def note(how: str, requests: list[dict], seconds: float) -> None:
        tokens = sum(request["max_new_tokens"] for request in requests)
        row = {"questions": number, "setting": how, "seconds": round(seconds, 2)}
        rows.append(row | {"tokens": tokens, "tokens_s": round(tokens / seconds, 1)})
        print(json.dumps(rows[-1]), flush=True)

    with BatchingEngine(model, do_sample=False) as engine:
        for seed, how in enumerate(("the engine, its first questions", "the engine, other questions")):
            requests = questions(shape, number, seed)
            start = time.perf_counter()
            list(engine.generate([request | {"eos_token_id": -1} for request in requests]))
            note(how, requests, time.perf_counter() - start)
    requests = questions(shape, number, seed=0)
    generate_padded(model, [request | {"max_new_tokens": 3} for request in requests[:PADDED]])  # warms up
    start = time.perf_counter()
    for first in range(0, number, PADDED):
        generate_padded(model, requests[first : first + PADDED])
    synchronize()
    note(f"padded batches of {PADDED}", requests, time.perf_counter() - start)
    return rows


def draw(result: dict, path: Path) -> None:
    """Draw tokens a second, and times to the first token and between tokens, over the chats at once."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4))
    left, right = figure.subplots(1, 2)
    for setting in dict.fromkeys(row["setting"] for row in result["rows"] if "chats" in row):
        rows = [row for row in result["rows"] if row["setting"] == setting and "chats" in row]
        counts = [row["chats"] for row in rows]
        left.plot(counts, [row["tokens_s"] for row in rows], marker="o", label=setting)
        if setting == "graphs":
            for which, style in (("first", "-"), ("between", ":")):
                for place, name in enumerate(("p50", "p95")):
                    times = [row[f"streamed_{which}_ms"][place] for row in rows]
                    right.plot(counts, times, style, marker="o^"[place], label=f"{which}, {name}")
    left.set(xscale="log", yscale="log", xlabel="chats at once", ylabel="tokens / s", title=result["device"])
    right.set(
        xscale="log", yscale="log", xlabel="chats at once", ylabel="ms", title="to the first token and between, graphs"
    )
    for axes in (left, right):
        axes.set_xticks(counts, counts)
        axes.set_xticks([], minor=True)
        axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument(
        "--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS) if DEVICE == "cuda" else ["plain"]
    )
    parser.add_argument("--chats", type=int, nargs="*", default=[1, 8, 32, 128], help="at once; with no number, none")
    parser.add_argument("--tokens", type=int, default=128, help="of a prompt")
    parser.add_argument("--new_tokens", type=int, default=64, help="of a reply")
    parser.add_argument("--questions", type=int, default=0, help="also time so many questions of other lengths")
    parser.add_argument("--profile", action="store_true", help="also print what takes the time of the most chats")
    parser.add_argument("--draw", type=Path, help="measure nothing: draw such a JSON file to the output, a PNG")
    parser.add_argument("--output", type=Path, help="a JSON file")
    args = parser.parse_args()
    if args.draw:
        draw(json.loads(args.draw.read_text()), args.output)
        return
    began = time.perf_counter()
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    result = {"device": device, "torch": torch.__version__, "transformers": transformers.__version__}
    result |= {"shape": args.shape, "dtype": str(DTYPE), "tokens": args.tokens, "new_tokens": args.new_tokens}
    found = [name for name in ("flash_attn", "flash_attn_interface", "kernels") if importlib.util.find_spec(name)]
    result |= {"command": " ".join(sys.argv), "date": str(date.today()), "packages": found}
    result["rows"] = []
    print(json.dumps(result), flush=True)
    model = build("mmgpt", SHAPES[args.shape])
    print(f"built after {time.perf_counter() - began:.1f} s", flush=True)
    shape, jobs = SHAPES[args.shape], {}
    if args.chats:
        jobs = {setting: partial(measure_engine, model, shape, setting, args) for setting in args.settings}
        jobs["one after the other"] = partial(measure_sequential, model, shape, args)
    if args.questions:
        jobs["questions"] = partial(measure_questions, model, shape, args.questions)
    for setting, measure in jobs.items():
        try:
            result["rows"] += measure()
        except Exception:
            print(f"{setting} failed:", traceback.format_exc(), flush=True)
        free()
        result["seconds"] = round(time.perf_counter() - began, 1)
        print(f"{setting} done after {result['seconds']} s", flush=True)
        if args.output:
            args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()

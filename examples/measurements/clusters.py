"""Measure `accelerate launch ... examples/train_sft.py` on one, two and four GPUs of a host, as people launch it.

    python examples/measurements/clusters.py --output-dir outputs/clusters                # four GPUs, in half an hour
    python examples/measurements/clusters.py --output-dir outputs/clusters --parts speed --only ddp-4-fast fsdp2-4-fast

`speed`: tokens a second in steady state, peak memory of a GPU by nvidia-smi, and seconds from the launch to the end of
the first step, at the shape of OpenFlamingo-9B with random bfloat16 weights. A step is four times five rows of 2,048
tokens on each GPU, a row four dialogues with a picture. `fast` is `--compile_layers true --fill_vocabulary true
--attn_implementation flex_attention`.
`losses`: the tiny base on the same batches whatever the number of GPUs; with two or four, some have no picture.
`resume`: a run killed by SIGKILL and resumed. `options`: a few steps of what goes with what. A run that fails is noted
with its error, and the next one goes on. `clusters.json` holds everything that the folder has results of.
"""

import argparse
import ast
import json
import multiprocessing
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from itertools import accumulate, product, repeat
from pathlib import Path

import psutil
import torch
from benchmark_models import OPEN_FLAMINGO_9B, build
from PIL import Image
from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from processing_mmgpt import MMGPTCollator, MMGPTProcessor


EXAMPLES = Path(__file__).parents[1]
TINY_BASE = EXAMPLES / "tiny_world" / "base"
PARTS = ("speed", "losses", "resume", "options")
CONFIGS = ("ddp", "fsdp2", "zero2", "zero3")
FOR_SPEED = (*CONFIGS, "fsdp2_gathered")
ON_GPUS = torch.cuda.is_available()
SKIPPED = 3  # steps before the clock runs: torch compiles, and its allocator finds its sizes
FLEX = {"attn_implementation": "flex_attention"}
SETTINGS = {"plain": {}, "fast": {"compile_layers": True, "fill_vocabulary": True, **FLEX}}
SGD = {"dtype": "float32", "bf16": False, "optim": "sgd", "learning_rate": 1, "max_grad_norm": 0.5}
OPTIONS = {
    "compile_layers": {"compile_layers": True},
    "fill_vocabulary": {"fill_vocabulary": True},
    "new_tokens": {"new_tokens": True},
    "load_in_4bit": {"load_in_4bit": True},
    "cache_pictures": {"cache_pictures": True},
    "samples": {"eval_rows": 8, "eval_strategy": "steps", "eval_steps": 2, "samples": 2},
    "packing": {"packing": True, "max_length": 128, **FLEX},
    "activation_checkpointing": {"activation_checkpointing": True},
}


@dataclass
class Case:
    """A run: a config of `examples/accelerate`, so many processes, and the options of a program."""

    name: str
    config: str
    processes: int
    options: dict
    program: str = "train_sft.py"
    timed: bool = False  # and ended at its last step: nobody waits for what follows
    killed: bool = False  # by SIGKILL after the fifth step, and resumed


def speed_cases(work: Path, rows: int, tiny: bool) -> list[Case]:
    """Each config on each number of GPUs, in each setting."""
    options = {"model_name_or_path": work / "base", "data": work / "large" / "records.jsonl", "max_length": 2048}
    options |= {"per_device_train_batch_size": 4 * rows, "gradient_accumulation_steps": 4, "max_steps": 9}
    options |= {"learning_rate": 1e-4, "activation_checkpointing": False, "save_strategy": "no"}
    options |= {"packing": True, "dataloader_num_workers": 4}
    if tiny:
        options |= {**tiny_options(work), "max_length": 256, "per_device_train_batch_size": 4, "max_steps": 6}
    return [
        Case(f"{config}-{n}-{setting}", config, n, {**options, **how}, timed=True)
        for config, n in (("one_gpu", 1), *product(FOR_SPEED, (2, 4)))
        for setting, how in SETTINGS.items()
    ]


def losses_cases(work: Path) -> list[Case]:
    """Twenty steps of eight rows, on one, two and four processes: in float32 by SGD, and in bfloat16 by AdamW."""
    options = {**tiny_options(work), "max_steps": 20, "save_steps": 20}
    return [
        Case(f"{kind}-{config}-{n}", config, n, {**options, "per_device_train_batch_size": 8 // n, **how})
        for kind, how in (("float32", SGD), ("bfloat16", {}))
        for config, n in (("one_gpu", 1), *product(CONFIGS, (2, 4)))
    ]


def resume_cases(work: Path) -> list[Case]:
    """Eight steps of two processes: never killed, and killed and resumed."""
    options = {**tiny_options(work), "max_steps": 8, "save_steps": 2}
    whole = [Case(f"resume-{config}-whole", config, 2, options) for config in CONFIGS]
    return whole + [Case(f"resume-{config}", config, 2, options, killed=True) for config in CONFIGS]


def options_cases(work: Path) -> list[Case]:
    """What goes with what, on two processes."""
    options = {**tiny_options(work), "max_steps": 4, "save_steps": 4}
    base = {"vision": work / "tower", "text": work / "lm", "cross_attn_every_n_layers": 1, "bf16": ON_GPUS}
    base |= {key: options[key] for key in options.keys() - {"model_name_or_path", "activation_checkpointing"}}
    cases = [Case(f"{name}-{c}", c, 2, {**options, **how}) for c, (name, how) in product(CONFIGS, OPTIONS.items())]
    return cases + [Case(f"train_base-{config}", config, 2, base, program="train_base.py") for config in CONFIGS]


def tiny_options(work: Path) -> dict:
    """Options of runs of the tiny base: batches of eight rows, of which four have a picture."""
    options = {"model_name_or_path": TINY_BASE, "data": work / "tiny" / "records.jsonl", "learning_rate": 1e-3}
    return options | {"per_device_train_batch_size": 4, "activation_checkpointing": False}


# What they train on


def make_inputs(work: Path, large: bool) -> None:
    """Make data and models that are not there yet."""
    if not (work / "tiny").exists():
        make_data(work / "tiny", 96, length=64, side=48, every=4)
        make_parts(work)
    if large and not (work / "large").exists():
        make_data(work / "large", 480, length=512, side=OPEN_FLAMINGO_9B.side, every=480, times=6)
    if large and not (work / "base").exists():
        maker = multiprocessing.get_context("spawn").Process(target=make_base, args=(work / "base",))
        maker.start()  # a process of its own, which leaves nothing on the card
        maker.join()


def make_data(folder: Path, number: int, length: int, side: int, every: int, times: int = 1) -> None:
    """Write dialogues of exactly so many tokens, all `times`: `every` with a picture, as many without, and so on."""
    processor = MMGPTProcessor.from_pretrained(TINY_BASE)
    tokens = processor.tokenizer.get_vocab()
    words = sorted(f" {token[1:]}" for token in tokens if token[0] == "▁" and token[1:].isalpha())  # a token each
    rng, encode, records = random.Random(0), MMGPTCollator(processor).encode, []
    folder.mkdir(parents=True)
    for n in range(number):
        picture, pixels = [], []
        if n // every % 2 == 0:
            picture, pixels = [f"{n}.jpg"], [Image.effect_noise((side, side), rng.uniform(32, 96)).convert("RGB")]
            pixels[0].save(folder / picture[0])
        room = length - len(encode({"messages": dialogue("", "", len(picture)), "images": pixels}).input_ids)
        asked, said = ("".join(rng.choices(words, k=k)) for k in (room // 2, room - room // 2))
        records.append(json.dumps({"messages": dialogue(asked, said, len(picture)), "images": picture}))
    (folder / "records.jsonl").write_text("\n".join(records * times) + "\n")


def dialogue(asked: str, said: str, pictures: int) -> list[dict]:
    """A question and its answer."""
    content = [*[{"type": "image"}] * pictures, {"type": "text", "text": f"What{asked}"}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": f"It{said}"}]


def make_base(folder: Path) -> None:
    """Write a base of the shape of OpenFlamingo-9B with random weights, and the tokenizer of the tiny base."""
    model, processor = build("mmgpt", OPEN_FLAMINGO_9B), MMGPTProcessor.from_pretrained(TINY_BASE)
    processor.image_processor.size = OPEN_FLAMINGO_9B.side
    model.config.image_token_id = processor.image_token_id
    model.generation_config.suppress_tokens = [processor.image_token_id]
    model.config.end_of_chunk_token_id = processor.tokenizer.convert_tokens_to_ids("<|endofchunk|>")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def make_parts(folder: Path) -> None:
    """Write a small tower and a small LM with the tokenizer of the tiny base, for stage one."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_BASE)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=48, patch_size=8)).save_pretrained(folder / "tower")
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer))).save_pretrained(folder / "lm")
    tokenizer.save_pretrained(folder / "lm")


# A run


def run(case: Case, folder: Path, cards: list[int], limit: float) -> None:
    """Launch a case on some cards, and note what came of it."""
    output = folder / "runs" / case.name
    shutil.rmtree(output, ignore_errors=True)
    options = case.options | {"output_dir": output, "logging_steps": 1, "report_to": "none", "disable_tqdm": True}
    options |= {"train_sampling_strategy": "sequential", **({} if ON_GPUS else {"use_cpu": True})}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += ["--config_file", str(EXAMPLES / "accelerate" / f"{case.config}.yaml")]
    command += ["--num_processes", str(case.processes), "--gpu_ids", ",".join(map(str, cards))]
    if not ON_GPUS or not case.options.get("bf16", True):
        command += ["--mixed_precision", "no"]
    command += [str(EXAMPLES / case.program), *(piece for key in options for piece in (f"--{key}", str(options[key])))]
    log, row = folder / f"{case.name}.log", {"name": case.name, "processes": case.processes}
    log.unlink(missing_ok=True)
    if case.killed:
        row["steps before SIGKILL"] = len(launch(command, log, limit, kill_after=5)["losses"])
        command.append("--resume")
    kill_after = case.options["max_steps"] if case.timed else None
    row |= launch(command, log, limit, kill_after, cards if case.timed and ON_GPUS else [])
    for state in output.glob(f"checkpoint-{case.options['max_steps']}/trainer_state.json"):  # it has all digits
        row["losses"] = [entry["loss"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]
    (folder / f"{case.name}.json").write_text(json.dumps(row, indent=1) + "\n")
    shown = row["losses"][:3] + row["losses"][-1:]
    print(json.dumps(row | {"losses": shown}), flush=True)


def launch(
    command: list[str], log: Path, limit: float, kill_after: int | None = None, cards: Sequence[int] = ()
) -> dict:
    """Run a command to its end, or until it has logged so many steps, and say what was seen of it and of the cards."""
    start, steps, memory = time.monotonic(), [], []
    with log.open("a") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=EXAMPLES.parent)
    late = threading.Timer(limit, kill, [process])
    watching = threading.Thread(target=watch, args=(process, cards, memory))
    late.start()
    watching.start()
    for line in process.stdout:
        if line.startswith("{'loss'"):
            steps.append({"at": time.monotonic() - start, **ast.literal_eval(line)})
            if len(steps) == kill_after:
                kill(process)
    code = process.wait()
    late.cancel()
    watching.join()
    row = {"seconds": round(time.monotonic() - start, 1), "losses": [float(step["loss"]) for step in steps]}
    if steps:
        row["seconds to the first step"] = round(steps[0]["at"], 1)
    if memory:
        row["peak GB of a GPU"] = round(max(memory) * 2**20 / 1e9, 1)
    if len(steps) > SKIPPED and "num_tokens" in steps[0]:
        first, last = steps[SKIPPED - 1], steps[-1]
        tokens = float(last["num_tokens"]) - float(first["num_tokens"])
        row["tokens a second"] = round(tokens / (last["at"] - first["at"]))
    if code and len(steps) != kill_after:
        said = [line for line in log.read_text().splitlines() if "Error: " in line and "ChildFailed" not in line]
        row["error"] = said[-1][-600:] if said else f"It ended with {code}; the limit is {limit:.0f} s."
    return row


def kill(process: subprocess.Popen) -> None:
    """Send SIGKILL to a process and to all that it has started."""
    with suppress(psutil.NoSuchProcess):  # which has ended meanwhile
        launcher = psutil.Process(process.pid)
        for one in (launcher, *launcher.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                one.kill()


def watch(process: subprocess.Popen, cards: Sequence[int], memory: list[int]) -> None:
    """Note what nvidia-smi shows of the memory of some cards, in MiB, until a process ends."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", ",".join(map(str, cards))]
    while cards and process.poll() is None:
        memory += map(int, subprocess.run(query, capture_output=True, text=True, check=True).stdout.split())
        time.sleep(0.5)


# The table


def table(folder: Path) -> dict:
    """Gather the results of a folder, beside those of one GPU, of DDP, or of the run that was not killed."""
    rows = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*-*.json"))}
    for name, row in rows.items():
        kind, _, rest = name.partition("-")
        one = rows.get(f"one_gpu-1-{rest.split('-')[-1]}", {})
        if "tokens a second" in row and "tokens a second" in one and kind in ("one_gpu", *FOR_SPEED):
            row["efficiency"] = round(row["tokens a second"] / row["processes"] / one["tokens a second"], 3)
        others = [f"{name}-whole", f"{kind}-one_gpu-1", f"{kind}-ddp"]
        other = next((rows[other] for other in others if other in rows), row)
        if other is not row and len(row["losses"]) == len(other["losses"]) > 0:
            pairs = zip(row["losses"], other["losses"], strict=True)
            row[f"apart from {other['name']}"] = max(abs(a - b) / abs(b) for a, b in pairs)
    device = torch.cuda.get_device_name() if ON_GPUS else "cpu"
    noted = {"device": device, "date": date.today().isoformat(), "command": "python examples/measurements/clusters.py"}
    noted |= {name: version(name) for name in ("torch", "transformers", "accelerate", "trl", "peft")}
    return noted | {"rows": list(rows.values())}


def waves(cases: list[Case], cards: int) -> list[list[Case]]:
    """Put neighbours side by side that have a card for each process."""
    waves, taken = [], cards
    for case in cases:
        if taken + case.processes > cards:
            waves.append([])
            taken = 0
        waves[-1].append(case)
        taken += case.processes
    return waves


def main() -> None:
    """Make models and data, launch the cases, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, help="results and logs")
    parser.add_argument("--work-dir", type=Path, help="models and data, 17 GB; by default the output folder")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--only", nargs="+", metavar="CASE", help="names of cases, such as fsdp2-4-fast")
    parser.add_argument("--at-once", type=int, default=4, help="runs of the tiny base at once, which share the cards")
    parser.add_argument("--limit", type=float, default=600, help="seconds for a case")
    parser.add_argument("--rows", type=int, default=5, help="of 2,048 tokens that a GPU has at once, for speed")
    parser.add_argument("--tiny", action="store_true", help="speed of the tiny base, to see that it runs")
    args = parser.parse_args()
    folder, work = args.output_dir.resolve(), (args.work_dir or args.output_dir).resolve()
    cards = max(1, torch.cuda.device_count())
    folder.mkdir(parents=True, exist_ok=True)
    make_inputs(work, "speed" in args.parts and not args.tiny)
    cases = {
        "speed": speed_cases(work, args.rows, args.tiny),
        "losses": losses_cases(work),
        "resume": resume_cases(work),
        "options": options_cases(work),
    }
    for part in args.parts:
        asked = {case.name: case for case in cases[part] if case.processes <= cards or not ON_GPUS}
        asked = [asked[name] for name in args.only or asked if name in asked]
        for wave in waves(asked, cards) if part == "speed" else [asked]:
            first = accumulate((case.processes for case in wave), initial=0)
            taken = [[(k + n) % cards for n in range(case.processes)] for k, case in zip(first, wave, strict=False)]
            with ThreadPoolExecutor(cards if part == "speed" else args.at_once) as pool:
                list(pool.map(run, wave, repeat(folder), taken, repeat(args.limit)))
    (folder / "clusters.json").write_text(json.dumps(table(folder), indent=1) + "\n")


if __name__ == "__main__":
    main()

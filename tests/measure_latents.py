"""What keeping the latents of pictures brings: training on a CPU with and without; and the work of a step.

    python tests/measure_latents.py                 # examples/train_sft.py on the tiny base, minutes on two cores
    python tests/measure_latents.py --count         # nothing is computed, seconds

Prints one JSON object a line.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode


ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "examples" / "measurements")]
EXAMPLES = 256
SIZES = {"scenes of the tiny world, 48 x 48, PNG": None, "the same as photos, 640 x 480, JPEG": (640, 480)}


def write(folder: Path, size: tuple[int, int] | None) -> None:
    """Write dialogues of the tiny world, as the quickstart draws them, and their pictures."""
    from tiny_world.mixture import mixture

    records = []
    for number, example in enumerate(mixture(0, index) for index in range(EXAMPLES)):
        names = [f"{number}-{place}.{'png' if size is None else 'jpg'}" for place in range(len(example.images))]
        for name, picture in zip(names, example.images, strict=True):
            (picture if size is None else picture.resize(size)).convert("RGB").save(folder / name)
        records.append({"messages": example.messages, "images": names})
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def train(folder: Path, output: str, *more: str) -> dict[str, float]:
    """Run the program for two epochs."""
    command = [sys.executable, "examples/train_sft.py", "--model_name_or_path", "examples/tiny_world/base"]
    command += ["--data", str(folder / "records.jsonl"), "--output_dir", str(folder / output), "--report_to", "none"]
    command += ["--num_train_epochs", "2", "--per_device_train_batch_size", "32", "--learning_rate", "1e-3", *more]
    command += ["--activation_checkpointing", "false", "--save_strategy", "no", "--use_cpu", "true"]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    (steps,) = re.findall(r"'train_steps_per_second': '?([\d.]+)", done.stdout)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"steps a second": float(steps), "s of CPU, with the start": round(used, 1)}


def measure_training() -> None:
    """Train without, with latents that are made first, and with latents that are there."""
    for name, size in SIZES.items():
        with tempfile.TemporaryDirectory() as given:
            folder = Path(given)
            write(folder, size)
            figures = {"pictures": name, "without": train(folder, "without")}
            figures["with, made first"] = train(folder, "with", "--cache_pictures", "true")
            figures["with, there already"] = train(folder, "again", "--cache_pictures", "true")
            print(json.dumps(figures), flush=True)


def count_work() -> None:
    """Count the arithmetic of a LoRA step; on the meta device, nothing is computed."""
    from benchmark_models import OPEN_FLAMINGO_9B, Shape, build_mmgpt
    from peft import get_peft_model

    from modeling_mmgpt.adapters_mmgpt import lora_config

    small = Shape(960, 32, 15, 2560, 49_155, 1024, 24, 14, 224, 4)  # SmolLM2-360M and ViT-L/14
    for name, shape in (("OpenFlamingo-9B", OPEN_FLAMINGO_9B), ("SmolLM2-360M, ViT-L/14", small)):
        with torch.device("meta"):
            base = build_mmgpt(shape).requires_grad_(False)
            model = get_peft_model(base, lora_config(base))
            for tokens, pictures in ((512, 1), (128, 1), (512, 4)):
                ids, numbers = torch.randint(5, 100, (1, tokens)), torch.arange(1, pictures + 1)[None]
                given = {"image_latents": torch.empty(1, pictures, 64, shape.vision_width), "image_numbers": numbers}
                given |= {"attention_mask": torch.ones(1, 1, tokens, tokens, dtype=torch.bool), "labels": ids}
                pixels = torch.empty(1, pictures, 3, shape.side, shape.side)
                with FlopCounterMode(display=False) as latents, torch.no_grad():
                    base.model._encode(pixels[:, :, None], None, None)
                with FlopCounterMode(display=False) as rest:
                    model(ids, image_index=torch.ones_like(ids), **given).loss.backward()
                row = {"shape": name, "tokens": tokens, "pictures": pictures}
                for what, counted in (("latents", latents), ("the rest", rest)):
                    row[f"TFLOP, {what}"] = round(counted.get_total_flops() / 1e12, 2)
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", action="store_true", help="count the work of a LoRA step")
    count_work() if parser.parse_args().count else measure_training()

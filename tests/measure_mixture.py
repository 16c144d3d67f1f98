"""Open a mixture of a million text rows and 100,000 rows with pictures for the first time, and read from it.

    python tests/measure_mixture.py --folder outputs/million

Makes the files, then measures in a process of its own: seconds to the first open with an empty cache, the peak of its
memory after the imports and in all, and rows a second through the collator. Prints one JSON object.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image


TEXTS, PICTURES, FILES = 1_000_000, 100_000, 1_000
BASE = Path(__file__).parents[1] / "examples" / "tiny_world" / "base"


def write(folder: Path) -> None:
    """Write annotations as Alpaca's and LLaVA's are, lists in JSON, and the pictures they name."""
    rng, words = random.Random(0), [f"word{number}" for number in range(2_000)]

    def sentence(most: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(3, most)))

    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in range(FILES):
        color = tuple(rng.randrange(256) for _ in range(3))
        Image.new("RGB", (48, 48), color).save(folder / "images" / f"{number}.png")
    with open(folder / "texts.json", "w") as file:
        rows = ({"instruction": sentence(20), "input": "", "output": sentence(40)} for _ in range(TEXTS))
        file.write("[" + ",\n".join(map(json.dumps, rows)) + "]")
    with open(folder / "pictures.json", "w") as file:
        rows = (
            {
                "id": str(number),
                "image": f"{number % FILES}.png",
                "conversations": [
                    {"from": "human", "value": f"<image>\n{sentence(20)}"},
                    {"from": "gpt", "value": sentence(40)},
                ],
            }
            for number in range(PICTURES)
        )
        file.write("[" + ",\n".join(map(json.dumps, rows)) + "]")


def peak_mb() -> float:
    """The peak of this process' memory so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def measure(folder: Path) -> dict:
    """Open, and read; in a process whose cache is empty."""
    from transformers import AutoProcessor

    from processing_mmgpt import MMGPTCollator, load_instruction_dataset

    processor = AutoProcessor.from_pretrained(BASE)
    report = {"peak MB after the imports": round(peak_mb())}
    pictures = {"reader": "llava", "files": ["pictures.json"], "image_root": "images"}
    texts = {"reader": "alpaca_gpt4", "files": ["texts.json"]}
    for source in (pictures, texts):
        source["files"] = [str(folder / name) for name in source["files"]]
    pictures["image_root"] = str(folder / "images")
    start, cpu = time.perf_counter(), time.process_time()
    data = load_instruction_dataset({"sources": [pictures, texts]}, seed=0)
    report |= {"rows": len(data), "first open, s": round(time.perf_counter() - start, 1)}
    report["first open, s of CPU"] = round(time.process_time() - cpu, 1)
    report["peak MB after the first open"] = round(peak_mb())
    collate, rng = MMGPTCollator(processor), random.Random(0)
    start, count = time.perf_counter(), 0
    for _ in range(250):
        batch = [data[rng.randrange(len(data))] for _ in range(16)]
        count += len(collate(batch)["input_ids"])
    report["rows a second through the collator"] = round(count / (time.perf_counter() - start))
    report["peak MB in all"] = round(peak_mb())
    return report


def main() -> None:
    """Write what is not there yet, and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("outputs/million"))
    parser.add_argument("--child", action="store_true", help="measure in this process")
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.folder.resolve())))
        return
    if not (args.folder / "pictures.json").exists():
        write(args.folder)
    cache = args.folder / f"cache-{os.getpid()}"
    environment = {**os.environ, "HF_DATASETS_CACHE": str(cache), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, __file__, "--child", "--folder", str(args.folder)]
    print(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
